from __future__ import annotations

import pytest
import torch
from cancelling import bias_gradients
from episodes import assert_close, draw_mlp, running_stats
from hypothesis import example, given
from hypothesis import strategies as st

import kernelmeta as km


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 21),
    st.integers(1, 45),
    st.sampled_from(["task", "batch", "running"]),
)
@example(2, 75, 5, 40, "task")
@example(2, 300, 20, 160, "task")
def test_equals_the_reference(T: int, Q: int, N: int, H: int, norm_stats: str) -> None:
    g = torch.Generator().manual_seed(0)
    mlp = draw_mlp(N, H, torch.float64, g)
    z = torch.randn(T, Q, N, dtype=torch.float64, generator=g) * 5
    leaves = [z.requires_grad_(), *(p.requires_grad_() for p in mlp)]
    outs = []
    for op in (km.ops.synthetic_gradient_mlp, km.reference.synthetic_gradient_mlp):
        out = op(z, mlp, norm_stats=norm_stats, running_stats=running_stats(H))
        weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        outs.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    assert_close(*outs, 1e-10)


def test_rows_of_one_task() -> None:
    mlp = draw_mlp(3, 8, torch.float64, torch.Generator().manual_seed(0))
    z = torch.randn(10, 3, dtype=torch.float64)
    out = km.ops.synthetic_gradient_mlp(z, mlp)
    assert torch.equal(out, km.ops.synthetic_gradient_mlp(z[None], mlp)[0])
    assert torch.equal(out, km.ops.synthetic_gradient_mlp(z.t().contiguous().t(), mlp))


def test_low_precision_and_no_tasks() -> None:
    mlp = draw_mlp(3, 8, torch.float64, torch.Generator().manual_seed(0))
    z = torch.randn(2, 10, 3, dtype=torch.float64)
    low = type(mlp)(*(p.bfloat16() for p in mlp))
    out = km.ops.synthetic_gradient_mlp(z.bfloat16(), low)
    assert out.dtype is torch.bfloat16
    exact = km.ops.synthetic_gradient_mlp(z.bfloat16().double(), type(mlp)(*(p.double() for p in low)))
    assert_close([out], [exact], 1e-2)
    assert km.ops.synthetic_gradient_mlp(z[:0], mlp).shape == (0, 10, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_that_cancel(dtype: torch.dtype) -> None:
    assert (bias_gradients("cpu", dtype) < 3 * bias_gradients("reference", dtype)).all()


@pytest.mark.parametrize("shape", [(10, 4), (3,), (0, 3), (2, 2, 2, 3)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    mlp = draw_mlp(3, 8, torch.float32, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="logits: expected shape"):
        km.ops.synthetic_gradient_mlp(torch.zeros(shape), mlp)
