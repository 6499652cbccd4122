"""Class means alone, beside the same in eager PyTorch."""

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

FORMS: dict[str, Callable[..., Tensor]] = {"kernelmeta": ops.class_means, "eager": forms.class_means}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("size", [Size(T=1), Size(T=512), Size(T=64, S=25), Size(T=64, N=20, S=20)], ids=str)
def test_class_means(size: Size, mode: str, name: str, benchmark: Any, ceilings: Ceilings) -> None:
    problem = draw(size)
    incoming = torch.randn(size.T, size.N, size.D, generator=torch.Generator().manual_seed(1))

    def run(form: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[int], agreement.Result]:
        weight = problem.parameters.fresh(dtype).weight
        grad = incoming.to(dtype)
        rows = [i.support.to(dtype) for i in problem.inputs]

        def call(i: int) -> agreement.Result:
            i %= len(rows)
            if mode == "forward":
                with torch.no_grad():
                    return form(rows[i], problem.inputs[i].labels, size.N, weight), []
            out = form(rows[i], problem.inputs[i].labels, size.N, weight)
            return out.detach(), list(torch.autograd.grad(out, [weight], grad))

        return call

    runner = run(FORMS[name], torch.float32)
    found = agreement.errors(runner(0), run(reference.class_means, torch.float64)(0))
    assert all(error <= allowed for error, allowed in zip(found, agreement.TOLERANCES["float32"], strict=True))
    floor = ceilings.floor(counts.class_means(size, mode))
    benchmark.group = f"class_means {size} {mode}"
    benchmark.extra_info.update({**size._asdict(), "mode": mode, "peer": name, "floor_us": floor * 1e6})
    turn = iter(range(1 << 60))
    benchmark(lambda: runner(next(turn)))
