"""Kronecker-factored preconditioning: exact where its factors are, and better than none elsewhere."""

from __future__ import annotations

import builtins
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kernelmeta as km
from kernelmeta.linear import optimizer_steps
from kernelmeta.linear.lqf import Linearised

needs_curvlinops = pytest.mark.skipif(
    importlib.util.find_spec("curvlinops") is None, reason="curvlinops, for preconditioning, is not installed"
)


def jacobian(model: Linearised, rows: Tensor) -> dict[str, Tensor]:
    """[n C, parameters] by name."""
    own = {name: p for name, p in model.frozen.named_parameters() if name in model.names}
    J: Any = jacrev(lambda moved: functional_call(model.frozen, moved, rows))(own)
    return {name: J[name].flatten(0, 1).flatten(1) for name in own}


def blocks(J: dict[str, Tensor], together: list[list[str]], damping: float) -> tuple[Tensor, Tensor]:
    """The damped blocks of J^T J of these parameters, and all of it."""
    of = [name for name in J for _ in range(J[name].shape[1])]
    group = torch.tensor([next(i for i, names in enumerate(together) if name in names) for name in of])
    whole = torch.cat(list(J.values()), 1)
    H = whole.mT @ whole
    return H * (group[:, None] == group) + damping * torch.eye(len(H), dtype=H.dtype), H


def normalising() -> nn.Module:
    """A convolution that sees its image once, normalisation, and a linear layer without a bias."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.5
    return nn.Sequential(nn.Conv2d(1, 3, 4, bias=False), norm, nn.Flatten(), nn.Linear(3, 3, bias=False))


# Where K-FAC is exact: one linear layer, or one row.
CASES: dict[str, tuple[Any, tuple[int, ...], list[list[str]]]] = {
    "one layer, many rows": (lambda: nn.Linear(4, 3), (7, 4), [["weight", "bias"]]),
    "a perceptron, one row": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 3)), (1, 4),
        [["0.weight", "0.bias"], ["2.weight", "2.bias"]],
    ),
    "normalisation, one row": (normalising, (1, 1, 4, 4), [["0.weight"], ["1.weight", "1.bias"], ["3.weight"]]),
}  # fmt: skip


@needs_curvlinops
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_damped_curvature_where_it_is_exact(case: str) -> None:
    torch.manual_seed(0)
    make, shape, together = CASES[case]
    model, rows = Linearised(make().double()), torch.randn(shape).double()
    P, H = blocks(jacobian(model, rows), together, 0.3)
    precondition = km.linear.KroneckerPreconditioner(model, rows, damping=0.3)
    gradients = [torch.randn_like(p) for p in model.moved.values()]
    got = torch.cat([v.flatten() for v in precondition(gradients)])
    want = torch.linalg.solve(P, torch.cat([v.flatten() for v in gradients]))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    decayed = H + 0.1 * torch.eye(len(H), dtype=H.dtype)
    largest = torch.linalg.eigvals(torch.linalg.solve(P, decayed)).real.max()
    assert precondition.largest_rate(0.1, iterations=300) == pytest.approx(2 / float(largest), rel=1e-3)
    assert not any(p.requires_grad for p in model.frozen.parameters())


def badly_scaled() -> tuple[Linearised, Tensor, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    rows = torch.randn(60, 20) * torch.logspace(0.5, -1, 20) + 0.5
    targets = 15 * nn.functional.one_hot(torch.arange(60) % 4, 4)
    return km.linear.lqf(network).double(), rows.double(), targets.double()


def both_problems(relative: float) -> tuple[optimizer_steps.Modes, optimizer_steps.Weights, float, float]:
    """In the kernel's space and in that of the weights, the loss that is near enough, the largest eigenvalue."""
    model, rows, targets = badly_scaled()
    values, vectors = torch.linalg.eigh(optimizer_steps.tangent_gram(model, rows))
    decay = relative * float(values.mean())
    weights = optimizer_steps.Weights(model, rows, targets, decay)
    modes = optimizer_steps.Modes(values.clamp_min(0), vectors.mT @ weights.gap.flatten(), decay)
    optimum, first = modes.optimum(), modes.loss_and_gradient(modes.start())[0]
    return modes, weights, optimum + 0.01 * (first - optimum), float(values[-1]) + decay


@needs_curvlinops
def test_steps_to_the_optimum_with_and_without() -> None:
    modes, weights, enough, largest = both_problems(1e-3)
    model, rows, _ = badly_scaled()
    precondition = km.linear.KroneckerPreconditioner(model, rows, damping=10 * weights.decay)
    rate = precondition.largest_rate(weights.decay)
    found = [
        (
            optimizer_steps.count(problem, optimizer_steps.heavy_ball(1.75 * top, 0.9, *how), enough, 300),
            optimizer_steps.conjugate_gradients(problem, enough, 300, *how),
        )
        for problem, top, how in ((modes, 2 / largest, ()), (weights, rate, (precondition,)))
    ]
    for without, with_it in zip(*found, strict=True):  # (seen: 128 and 43 with the better momenta, 49 and 22)
        assert with_it is not None and without is not None and 2 * with_it < without


def test_the_same_steps_in_the_space_of_the_kernel() -> None:
    modes, weights, enough, largest = both_problems(1e-2)
    rate = 1.9 / largest
    counts = [
        (
            optimizer_steps.count(problem, optimizer_steps.heavy_ball(rate, 0.9), enough, 500),
            optimizer_steps.conjugate_gradients(problem, enough, 500),
        )
        for problem in (modes, weights)
    ]
    assert counts[0] == counts[1] and None not in counts[0]
    # Nothing is below the optimum, and what diverges is given up.
    assert optimizer_steps.count(modes, optimizer_steps.heavy_ball(rate, 0.9), 0.99 * modes.optimum(), 500) is None
    assert optimizer_steps.count(modes, optimizer_steps.heavy_ball(5 * rate, 0.9), enough, 10**9) is None


def test_without_curvlinops(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "curvlinops":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    model, rows, _ = badly_scaled()
    with pytest.raises(ImportError, match=r"pip install 'kernelmeta\[lqf\]'"):
        km.linear.KroneckerPreconditioner(model, rows, damping=1.0)


@needs_curvlinops
def test_wrong_damping_is_named() -> None:
    model, rows, _ = badly_scaled()
    with pytest.raises(ValueError, match="damping: expected a positive number, got 0"):
        km.linear.KroneckerPreconditioner(model, rows, damping=0)
