"""The synthetic-gradient MLP alone, beside the same in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import agreement, counts, forms
from benchmarks.floors import Ceilings
from benchmarks.problem import Size, draw
from kernelmeta import ops, reference

FORMS: dict[str, Callable[..., Tensor]] = {"kernelmeta": ops.synthetic_gradient_mlp, "eager": forms.mlp_of_task}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("size", [Size(T=1), Size(T=64), Size(T=8, N=20, S=20)], ids=str)
def test_synthetic_gradient_mlp(size: Size, mode: str, name: str, benchmark: Any, ceilings: Ceilings) -> None:
    problem = draw(size, copies=1)
    logits = torch.randn(size.T, size.Q, size.N, generator=torch.Generator().manual_seed(0))
    incoming = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))

    def run(form: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], agreement.Result]:
        mlp = problem.parameters.fresh(dtype).mlp
        rows, grad = logits.to(dtype).requires_grad_(mode != "forward"), incoming.to(dtype)

        def call() -> agreement.Result:
            if mode == "forward":
                with torch.no_grad():
                    return form(rows, mlp), []
            out = form(rows, mlp)
            return out.detach(), list(torch.autograd.grad(out, [rows, *mlp], grad))

        return call

    runner = run(FORMS[name], torch.float32)
    found = agreement.errors(runner(), run(reference.synthetic_gradient_mlp, torch.float64)())
    assert all(error <= allowed for error, allowed in zip(found, agreement.TOLERANCES["float32"], strict=True))
    floor = ceilings.floor(counts.mlp(size, mode))
    benchmark.group = f"mlp {size} {mode}"
    benchmark.extra_info.update({**size._asdict(), "mode": mode, "peer": name, "floor_us": floor * 1e6})
    benchmark(runner)
