"""Descent, ridge regression, paths and posteriors, against steps, fits and inverses that are written out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from episodes import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from perceptrons import draw as draw_rows
from torch import Tensor
from torch.autograd import gradcheck

import kernelmeta as km
from kernelmeta import linear


class Problem(NamedTuple):
    gram: Tensor
    targets: Tensor
    cross: Tensor
    query_gram: Tensor
    support_outputs: Tensor
    query_outputs: Tensor

    @property
    def start(self) -> dict[str, Tensor]:
        return {"support_outputs": self.support_outputs, "query_outputs": self.query_outputs}


def draw(*, apart: bool, T: int = 2, S: int = 6, Q: int = 4, N: int = 3, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    each = N if apart else 1
    features = normal(T, (S + Q) * each, 4 * (S + Q)) / (S + Q) ** 0.5
    K = features @ features.mT
    s, q = slice(0, S * each), slice(S * each, None)

    def apart_or_not(kernel: Tensor) -> Tensor:
        return kernel.unflatten(2, (-1, N)).unflatten(1, (-1, N)) if apart else kernel

    kernels = [apart_or_not(K[:, a, b]) for a, b in ((s, s), (q, s), (q, q))]
    return Problem(kernels[0], normal(T, S, N), kernels[1], kernels[2], normal(T, S, N), normal(T, Q, N))


def support(p: Problem, keep: list[int], *, apart: bool) -> tuple[Tensor, Tensor]:
    """The kernel of some support rows, and that of all with them."""
    columns = p.gram[..., keep, :] if apart else p.gram[..., keep]
    return columns[:, keep], columns


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("oracle", ["squared_error", "cross_entropy"])
def test_descent_is_training_a_linear_model(apart: bool, oracle: str) -> None:
    """In the space of its weights: J is a square root of the kernel."""
    p = draw(apart=apart)
    T, S, N = p.targets.shape
    y = p.targets.softmax(-1)
    fit = linear.descent(p.gram, y, p.cross, steps=40, lr=0.3, weight_decay=0.1, oracle=oracle, **p.start)
    gram = p.gram.flatten(3).flatten(1, 2) if apart else torch.stack([torch.kron(k, torch.eye(N)) for k in p.gram])
    J = torch.linalg.cholesky(gram)  # [T, S N, weights]
    w = torch.zeros(T, J.shape[-1], 1, dtype=J.dtype, requires_grad=True)
    for _ in range(40):
        f = p.support_outputs + (J @ w).view(T, S, N)
        loss = (f - y).square().sum() / 2 if oracle == "squared_error" else -(y * f.log_softmax(-1)).sum()
        (gradient,) = torch.autograd.grad(loss / S, w)
        w = (w - 0.3 * (gradient + 0.1 * w)).detach().requires_grad_()
    cross = p.cross.flatten(3).flatten(1, 2) if apart else torch.stack([torch.kron(k, torch.eye(N)) for k in p.cross])
    want = p.query_outputs + (cross @ torch.linalg.solve(J.mT, w)).view_as(p.query_outputs)
    assert_close([fit.outputs], [want.detach()], 1e-10)


@pytest.mark.parametrize("apart", [False, True])
def test_paths_are_descent_and_ridge_one_by_one(apart: bool) -> None:
    p = draw(apart=apart)
    steps = [0, 1, 7, 1000, 64]
    rates: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1}
    path = linear.descent_path(p.gram, p.targets, p.cross, steps=steps, **rates, **p.start)
    for i, k in enumerate(steps):
        assert_close(
            [path.outputs[i], path.coefficients[i]],
            list(linear.descent(p.gram, p.targets, p.cross, steps=k, **rates, **p.start)),
            1e-11,
        )
    strengths = [0.6, 3.0]
    ridges = linear.ridge_path(p.gram, p.targets, p.cross, regularizations=strengths, **p.start)
    for i, strength in enumerate(strengths):
        fit = linear.kernel_ridge(p.gram, p.targets, p.cross, regularization=strength, **p.start)
        assert_close([ridges.outputs[i], ridges.coefficients[i]], list(fit[:2]), 1e-11)
    # where 1,000 steps lead: S weight_decay
    assert_close([ridges.outputs[0]], [path.outputs[3]], 1e-11)


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_left_out_is_what_a_fit_to_the_others_misses(apart: bool) -> None:
    p = draw(apart=apart)
    found = linear.kernel_ridge(p.gram, p.targets, regularization=0.5, support_outputs=p.support_outputs)
    for i in range(p.targets.shape[1]):
        others = [j for j in range(p.targets.shape[1]) if j != i]
        gram, cross = support(p, others, apart=apart)
        fit = linear.kernel_ridge(
            gram, p.targets[:, others], cross, regularization=0.5, support_outputs=p.support_outputs[:, others],
            query_outputs=p.support_outputs,
        )  # fmt: skip
        assert_close([found.left_out[:, i]], [(p.targets - fit.outputs)[:, i]], 1e-10)


def test_the_linearised_network_is_the_same_by_op_and_by_kernel() -> None:
    rows = draw_rows()
    labels = (torch.arange(7) % 4).expand(2, 7)
    options: dict[str, Any] = {"steps": 50, "lr": 0.2, "weight_decay": 0.05, "oracle": "cross_entropy"}
    want = km.ops.linearised_descent(rows.support, labels, rows.query, rows.weights, rows.biases, **options)
    kernel = km.ops.ntk_gram(rows.support, rows.query, rows.weights, rows.biases, full=True)
    targets = torch.nn.functional.one_hot(labels, 4).double()
    fit = linear.descent(
        kernel.gram, targets, kernel.cross, support_outputs=kernel.support_outputs, query_outputs=kernel.query_outputs,
        **options,
    )  # fmt: skip
    assert_close([fit.outputs], [want], 1e-11)


@pytest.mark.parametrize("apart", [False, True])
def test_posterior_is_that_of_the_joint_normal_distribution(apart: bool) -> None:
    p = draw(apart=apart)
    found = linear.posterior(p.gram, p.targets, p.cross, p.query_gram, noise=0.3, **p.start)
    gram, cross, own = (
        k.flatten(3).flatten(1, 2) if apart else k for k in (p.gram, p.cross, p.query_gram)
    )  # fmt: skip
    noisy = gram + 0.3 * torch.eye(gram.shape[-1], dtype=gram.dtype)
    residuals = p.targets - p.support_outputs
    residuals = residuals.flatten(1).unsqueeze(-1) if apart else residuals
    mean = (cross @ noisy.inverse() @ residuals).view_as(p.query_outputs) + p.query_outputs
    covariance = (own - cross @ noisy.inverse() @ cross.mT).view_as(p.query_gram)
    normal = torch.distributions.MultivariateNormal(torch.zeros(gram.shape[-1]).double(), noisy.unsqueeze(1))
    likelihood = normal.log_prob(residuals.mT).sum(-1)
    assert_close(list(found), [mean, covariance, likelihood], 1e-10)


@pytest.mark.skipif(importlib.util.find_spec("gpytorch") is None, reason="gpytorch is not installed")
def test_posterior_is_gpytorchs() -> None:
    gpytorch: Any = importlib.import_module("gpytorch")
    g = torch.Generator().manual_seed(0)
    x, q, y = (torch.randn(n, d, generator=g, dtype=torch.float64) for n, d in ((9, 4), (5, 4), (9, 1)))
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor(0.2, dtype=torch.float64)  # (numbers would be rounded to float32)

    class Process(gpytorch.models.ExactGP):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__(x, y.squeeze(-1), likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.RBFKernel()

        def forward(self, rows: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(rows), self.covar_module(rows))

    process = Process().double()
    process.covar_module.lengthscale = torch.tensor(1.7, dtype=torch.float64)
    process.eval()
    likelihood.eval()
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        theirs = process(q)
        process.train()
        marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, process)(process(x), y.squeeze(-1)) * len(x)
    grams = [km.linear.rbf_gram(a, b, length=1.7) for a, b in ((x, x), (q, x), (q, q))]
    found = linear.posterior(grams[0], y, grams[1], grams[2], noise=0.2)
    assert_close([found.mean.squeeze(-1), found.covariance, found.log_likelihood],
                 [theirs.mean, theirs.covariance_matrix, marginal], 1e-10)  # fmt: skip


def symmetric(kernel: Tensor) -> Tensor:
    flat = kernel.flatten(3).flatten(1, 2) if kernel.dim() == 5 else kernel
    return ((flat + flat.mT) / 2).view_as(kernel)


FITS: dict[str, Callable[..., Any]] = {
    "descent": lambda K, y, C, f, q, a, b: linear.descent(
        K, y, C, steps=7, lr=a, weight_decay=b, support_outputs=f, query_outputs=q
    ),
    "cross entropy": lambda K, y, C, f, q, a, b: linear.descent(
        K, y.softmax(-1), C, steps=7, lr=a, weight_decay=b, oracle="cross_entropy", support_outputs=f, query_outputs=q
    ),
    "descent_path": lambda K, y, C, f, q, a, b: linear.descent_path(
        K, y, C, steps=[0, 1, 6, 40], lr=a, weight_decay=b, support_outputs=f, query_outputs=q
    ),
    "kernel_ridge": lambda K, y, C, f, q, a, b: linear.kernel_ridge(
        K, y, C, regularization=a + b, support_outputs=f, query_outputs=q
    ),
    "ridge_path": lambda K, y, C, f, q, a, b: linear.ridge_path(
        K, y, C, regularizations=torch.stack([a, b]), support_outputs=f, query_outputs=q
    ),
    "posterior": lambda K, y, C, f, q, a, b: linear.posterior(
        K, y, C, C.new_zeros(()).expand(*C.shape[:-2], *C.shape[-4:-2], *C.shape[-4:-2])
        if C.dim() == 5 else C @ C.mT, noise=a + b, support_outputs=f, query_outputs=q,
    ),
}  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", FITS)
def test_gradcheck(name: str, apart: bool) -> None:
    p = draw(apart=apart, S=4, Q=2, N=2)
    values = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.1)]
    given = [
        t.detach().clone().requires_grad_()
        for t in (p.gram, p.targets, p.cross, p.support_outputs, p.query_outputs, *values)
    ]
    if name == "posterior" and apart:
        given[2] = p.cross.detach()
    assert gradcheck(lambda K, *others: tuple(FITS[name](symmetric(K), *others)), given)


@pytest.mark.parametrize("name", ["descent_path", "ridge_path"])
def test_eigenvalues_that_meet_have_gradients(name: str) -> None:
    values = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.1)]
    gram = torch.diag(torch.tensor([2.0, 2, 2, 1, 1])).double().expand(2, 5, 5).clone().requires_grad_()
    y = torch.randn(2, 5, 3, dtype=torch.float64)

    def fit(K: Tensor) -> Any:
        return tuple(FITS[name](symmetric(K), y, None, None, None, *values))

    assert gradcheck(fit, gram)


def test_a_second_derivative_of_a_path_is_an_error() -> None:
    p = draw(apart=False)
    gram = p.gram.clone().requires_grad_()
    path = linear.ridge_path(gram, p.targets, regularizations=[1.0])
    (first,) = torch.autograd.grad(path.outputs.square().sum(), gram, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), gram)


@settings(max_examples=20)
@given(st.integers(1, 300), st.booleans())
def test_checkpoints_change_nothing(steps: int, apart: bool) -> None:
    p = draw(apart=apart)
    gram = p.gram.clone().requires_grad_()
    fit = linear.descent(gram, p.targets, p.cross, steps=steps, lr=0.2)
    (got,) = torch.autograd.grad(fit.outputs.square().sum(), gram)
    flat = p.gram.flatten(3).flatten(1, 2) if apart else p.gram
    leaf = flat.clone().requires_grad_()
    y = p.targets.flatten(1).unsqueeze(-1) if apart else p.targets
    pulls = torch.zeros_like(y)
    for _ in range(steps):
        pulls = pulls - 0.2 / p.targets.shape[1] * (leaf @ pulls - y)
    outputs = (p.cross.flatten(3).flatten(1, 2) if apart else p.cross) @ pulls
    (want,) = torch.autograd.grad(outputs.square().sum() + 0 * leaf.sum(), leaf)
    assert_close([fit.outputs.flatten(), got.flatten()], [outputs.flatten(), want.flatten()], 1e-10)


def test_no_task() -> None:
    p = Problem(*(t[:0] for t in draw(apart=False)))
    assert linear.descent(p.gram, p.targets, p.cross, steps=3, lr=0.1).outputs.shape == (0, 4, 3)
    assert linear.kernel_ridge(p.gram, p.targets, p.cross, regularization=1.0).left_out.shape == (0, 6, 3)
    assert linear.ridge_path(p.gram, p.targets, p.cross, regularizations=[1.0]).outputs.shape == (1, 0, 4, 3)


@pytest.mark.parametrize("name", ["descent", "kernel_ridge"])
def test_compile(name: str) -> None:
    p = draw(apart=False)
    values = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.1)]
    given = (p.gram, p.targets, p.cross, p.support_outputs, p.query_outputs, *values)
    compiled = torch.compile(FITS[name], fullgraph=True, backend="aot_eager")
    assert_close(list(compiled(*given)), list(FITS[name](*given)), 1e-12)


def test_what_does_not_fit_is_named() -> None:
    p = draw(apart=False)
    with pytest.raises(ValueError, match=r"gram: expected \[\.\.\., 6, 6\]"):
        linear.descent(p.gram[:, 1:], p.targets, steps=1, lr=0.1)
    with pytest.raises(ValueError, match="cross: expected the columns"):
        linear.descent(p.gram, p.targets, p.cross[..., 1:], steps=1, lr=0.1)
    with pytest.raises(ValueError, match="steps: expected"):
        linear.descent_path(p.gram, p.targets, steps=[], lr=0.1)
    with pytest.raises(ValueError, match="regularization: a Gram matrix is singular"):
        linear.kernel_ridge(p.gram * 0, p.targets, regularization=0.0)
    with pytest.raises(TypeError, match="targets: expected a floating-point tensor"):
        linear.descent(p.gram, p.targets.long(), steps=1, lr=0.1)


def test_a_singular_gram_matrix() -> None:
    """Equal, collinear and zero rows: paths need no inverse, and a ridge makes one."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=g)
    x[:, 1], x[:, 2], x[:, 3] = x[:, 0], 0, -2 * x[:, 0]
    y = torch.randn(2, 6, 2, dtype=torch.float64, generator=g)
    x.requires_grad_()
    K = linear.linear_gram(x)
    near = linear.ridge_path(K, y, K, regularizations=[1e-3, 1.0]).outputs
    assert_close([near[1]], [linear.kernel_ridge(K, y, K, regularization=1.0).outputs], 1e-10)
    path = linear.descent_path(K, y, K, steps=[0, 1, 50, 10**9], lr=0.05).outputs
    assert_close([path[2]], [linear.descent(K, y, K, steps=50, lr=0.05).outputs], 1e-10)
    assert not path[0].any()
    assert_close([path[3]], [x @ (torch.linalg.pinv(x) @ y)], 1e-6)  # least squares in the space of the rows
    for fit in (near, path[:3], linear.posterior(K, y, K, K, noise=1e-3).mean):
        (gradient,) = torch.autograd.grad(fit.sum(), x, retain_graph=True)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 2.0**-300, 2.0**300])  # (powers of two: nothing is rounded otherwise)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_infinite_kernel_of_rows_out_of_the_ordinary(size: float, depth: int) -> None:
    """It is homogeneous: rows may be huge or tiny. Rows of zeros and rows that are parallel have gradients too."""
    x = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[:, 2], x[:, 3] = x[:, 0], -x[:, 0], 0
    scaled = (size * x).requires_grad_()
    K = linear.relu_ntk(scaled, depth=depth)
    assert_close([K / size / size], [linear.relu_ntk(x, depth=depth)], 1e-12)
    assert_close([K[:, 0]], [K[:, 1]], 1e-12)
    assert not K[:, 3].any()
    (gradient,) = torch.autograd.grad(K.sum() / size, scaled)
    assert gradient.isfinite().all()


def test_the_cosine_of_rows_out_of_the_ordinary() -> None:
    x = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[:, 2], x[:, 3] = x[:, 0], -1e100 * x[:, 0], 0
    K = linear.cosine_gram(x.requires_grad_())
    assert_close([K[0, 0, :4]], [torch.tensor([1.0, 1, -1, 0]).double()], 1e-12)
    assert torch.autograd.grad(K.sum(), x)[0].isfinite().all()


def test_kernels_that_need_no_network() -> None:
    x, y = torch.randn(2, 5, 3).double(), torch.randn(2, 4, 3).double()
    apart = x.unsqueeze(2) - y.unsqueeze(1)
    assert_close([linear.rbf_gram(x + 1e6, y + 1e6, length=0.7)], [(-apart.square().sum(-1) / 0.98).exp()], 1e-8)
    assert_close([linear.linear_gram(x, y, bias=1.0)], [torch.einsum("tid,tjd->tij", x, y) + 1], 1e-12)
    assert_close([linear.cosine_gram(x).diagonal(dim1=1, dim2=2)], [torch.ones(2, 5).double()], 1e-12)
    with pytest.raises(ValueError, match="x2: expected rows of 3 features"):
        linear.rbf_gram(x, y[..., 1:])
