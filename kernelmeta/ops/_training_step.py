"""What the ops share that give the loss and the gradients of a training step at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kernelmeta.backends import is_traced, select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import LIBRARY, define, on_one_device
from kernelmeta.ops._signature import Signature


def declare(
    name: str, signature: Signature, n_results: int, fake: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Any]:
    """Declare such a raw op; what calls it is returned."""
    define(f"{name}({signature.text}) -> ({', '.join(['Tensor'] * n_results)})")
    torch.library.register_fake(f"kernelmeta::{name}", on_one_device(fake), lib=LIBRARY)
    raw: Callable[..., Any] = getattr(torch.ops.kernelmeta, name).default._op
    return raw


def is_fused(query: Tensor, support: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether there is one kernel for all of it, and it takes these tensors as they are."""
    if select(query.device.type) != "cpu" or is_traced():
        return False
    precision = _checks.precisions((support, query, *parameters))
    # (features narrower than the parameters are read as they are)
    return precision is None or (precision[1] is torch.float32 and {p.dtype for p in parameters} == {torch.float32})


def one_after_the_other(
    forward: Callable[[list[Tensor]], tuple[Tensor, ...]], parameters: Sequence[Tensor], query_labels: Tensor
) -> tuple[Any, ...]:
    """Forward, loss and backward by autograd, for any device and precision.

    Args:
        forward: parameters -> the logits [T, Q, N], and whatever else is wanted.
        query_labels: [T, Q] int64.

    Returns:
        The loss, the accuracy, the logits, the gradients, and what ``forward`` gave beside the logits.
    """
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in parameters]
        logits, *rest = forward(leaves)
        _checks.labels("query_labels", query_labels, tuple(logits.shape[:2]), logits, "[T, Q]")
        _check_range(query_labels, logits.shape[-1])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = cross_entropy(wide.flatten(0, -2), query_labels.flatten())
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    accuracy = (logits.argmax(-1) == query_labels).to(loss.dtype).mean()
    return loss.detach(), accuracy, logits.detach(), gradients, rest


def _check_range(labels: Tensor, n_way: int) -> None:
    if labels.device.type != "cpu" or not labels.numel():
        return  # (a GPU would have to be waited for)
    for label in labels.aminmax():
        if not 0 <= label < n_way:
            raise ValueError(f"query_labels: label {int(label)}; labels must be in 0..{n_way - 1}")
