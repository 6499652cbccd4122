"""Focal distillation, forward and backward, beside the same in eager PyTorch, that compiled, a peer, and three passes
of exp, which is what the mathematics asks for. ``python -m pytest benchmarks/test_focal_distillation.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts
from benchmarks.agreement import errors
from benchmarks.floors import Ceilings
from kernelmeta import ops, reference

TAU, ALPHA, BETA = 100.0, 1.0, 5.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    """As one would write it."""
    focus = ALPHA + BETA * (old.argmax(-1) == labels)
    kl = F.kl_div(F.log_softmax(new / TAU, -1), F.log_softmax(old / TAU, -1), log_target=True, reduction="none")
    return F.cross_entropy(new, labels) + (focus * TAU**2 * kl.sum(-1)).mean()


def kernelmeta(new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    return ops.focal_distillation(new, old, labels, alpha=ALPHA, beta=BETA, tau=TAU)


def float64(new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    loss = reference.focal_distillation(new, old, labels, alpha=ALPHA, beta=BETA, tau=TAU)
    assert isinstance(loss, Tensor)
    return loss


def liger() -> Loss:
    """Its divergence as it is, which knows no weight a row: the mean weight on all of them, and PyTorch's cross
    entropy. It is made for a GPU.
    """
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        pytest.skip("liger-kernel, or a GPU for it, is not there")
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
        kl = divergence(F.log_softmax(new / TAU, -1), F.log_softmax(old / TAU, -1))
        focus = (ALPHA + BETA * (old.argmax(-1) == labels)).mean()
        found: Tensor = F.cross_entropy(new, labels) + focus * TAU**2 * kl
        return found

    return loss


def draw(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    old = 2 * torch.randn(rows, classes, generator=g)
    new = old + torch.randn(rows, classes, generator=g)
    labels = torch.where(
        torch.rand(rows, generator=g) < 0.5, old.argmax(-1), torch.randint(classes, (rows,), generator=g)
    )
    return new, old, labels


def trained(loss: Loss, new: Tensor, old: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaf = new.detach().requires_grad_()
    value = loss(leaf, old, labels)
    return value.detach(), list(torch.autograd.grad(value, leaf))


FORMS = ("kernelmeta", "eager", "compiled", "liger", "three exp", "copy")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("rows", "classes"), [(4096, 1000), (4800, 5), (256, 32768)])
def test_focal_distillation(rows: int, classes: int, name: str, benchmark: Any, ceilings: Ceilings) -> None:
    new, old, labels = draw(rows, classes)
    benchmark.group = f"focal_distillation R={rows} C={classes}"
    floor = ceilings.floor(counts.focal_distillation(rows, classes))
    benchmark.extra_info.update({"R": rows, "C": classes, "peer": name, "floor_us": floor * 1e6})
    if name in ("three exp", "copy"):
        out = torch.empty_like(new)
        benchmark(lambda: out.copy_(new) if name == "copy" else [torch.exp(new) for _ in range(3)])
        return
    form = liger() if name == "liger" else {"kernelmeta": kernelmeta}.get(name, eager)
    if name == "compiled":
        form = torch.compile(form)
    if name == "kernelmeta":
        want = trained(float64, new.double(), old.double(), labels)
        assert max(errors(trained(form, new, old, labels), want)) <= 1e-6
    benchmark(lambda: trained(form, new, old, labels))
