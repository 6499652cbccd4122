"""The form of `program` that runs on Gram matrices: what it takes, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kernelmeta.ops import _checks
from kernelmeta.phases import LABELLED, Phase, total_steps
from kernelmeta.reference.gram_program import gram_program
from kernelmeta.reference.ntk import TangentKernel
from kernelmeta.reference.task_rows import as_labels, check_label_range, one_hot_targets

Gram = TangentKernel | tuple[Tensor, Tensor]


def run(
    gram: Gram,
    support_labels: Tensor,
    phases: Sequence[Phase],
    *,
    n_way: int,
    rates: Tensor | None,
    target_scale: Tensor | None,
    reduction: str | None,
    weight_decay: float | Tensor,
    absent: dict[str, Any],
    classifier: str,
    start: str | Tensor,
) -> Tensor:
    """[T, Q, N]. ``absent``: arguments of `program` that have no meaning here, by name: they have to be None or
    False.
    """
    for name, value in absent.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected none beside gram")
    if classifier != "linear" or not isinstance(start, str) or start != "zero":
        raise ValueError("gram: expected classifier='linear' and start='zero' beside it; kernels know no other")
    for phase in phases:
        if any(part.oracle not in LABELLED for part in phase.parts) or phase.rows != "support":
            raise ValueError(
                f"phases: expected losses of support rows ({', '.join(LABELLED)}) beside gram, got {phase.oracle} of "
                f"{phase.rows} rows"
            )
    if not isinstance(gram, tuple) or len(gram) not in (2, 4):
        raise TypeError(f"gram: expected a TangentKernel or (gram, cross), got {type(gram).__name__}")
    support_labels = as_labels(support_labels)
    K, cross = gram[:2]
    _checks.tensors(gram=K, cross=cross)
    if support_labels.dim() != 2:
        raise ValueError(f"support_labels: expected [T, S], got {list(support_labels.shape)}")
    T, S = support_labels.shape
    apart = K.dim() == 5
    own = (n_way,) if apart else ()
    _checks.shape("gram", K, (T, S, *own, S, *own), "[T, S, S] or [T, S, N, S, N]")
    Q = cross.shape[1] if cross.dim() == K.dim() else 0
    _checks.shape("cross", cross, (T, Q, *own, S, *own), "[T, Q, S] or [T, Q, N, S, N]")
    starts = {"support_outputs": (T, S, n_way), "query_outputs": (T, Q, n_way)}
    outputs = (
        dict(zip(starts, gram[2:], strict=True)) if len(gram) == 4 else {n: K.new_zeros(starts[n]) for n in starts}
    )
    if not isinstance(weight_decay, Tensor):
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a number of at least 0, got {weight_decay}")
        weight_decay = K.new_tensor([weight_decay])
    given = {"rates": rates, "target_scale": target_scale, "weight_decay": weight_decay}
    optional = {name: t for name, t in given.items() if t is not None}
    _checks.tensors(gram=K, **outputs, **optional)
    _checks.one_value("weight_decay", weight_decay)
    for name, shape in starts.items():
        _checks.shape(name, outputs[name], shape, "[T, rows, N]")
    steps = total_steps(phases)
    if rates is None:
        rates = K.new_tensor([phase.lr for phase in phases for _ in range(phase.steps)])
    _checks.shape("rates", rates, (steps,), "[K], one for each step of all phases,")
    if target_scale is not None:
        _checks.one_value("target_scale", target_scale)
    check_label_range(support_labels, n_way)
    floating = [K, cross, *outputs.values(), *optional.values()]
    compute, result_type = _checks.precisions(floating) or (K.dtype, K.dtype)
    kernel = TangentKernel(*(t.to(compute) for t in (K, cross, *outputs.values())))
    logits = gram_program(
        kernel, one_hot_targets(support_labels, n_way, compute), [p for p in phases if p.steps], rates.to(compute),
        target_scale=1.0 if target_scale is None else target_scale.to(compute).reshape(()), reduction=reduction,
        weight_decay=weight_decay.to(compute).reshape(()),
    )  # fmt: skip
    return logits.to(result_type)
