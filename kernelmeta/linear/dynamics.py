"""What gradient descent, ridge regression and Gaussian processes make of a Gram matrix, on batches of tasks.

Everything takes ``gram`` K, of the support rows, and ``cross``, of the query rows with them, of any kernel:
[..., S, S] and [..., Q, S], one for all outputs; or apart, [..., S, N, S, N] and [..., Q, N, S, N], as
`km.ops.ntk_gram` with ``full`` has them. A model that is linear in its weights, trained from ``f_0`` on the squared
error or the cross-entropy, moves its outputs by ``K p``: the coefficients p say how much each support row pulls.

- `descent`: K steps of gradient descent, or any number of them, for no more memory;
- `descent_path`: all of them at once for the squared error, from one eigendecomposition;
- `kernel_ridge`: where they lead (with weight decay, or none), with the leave-one-out residuals; `ridge_path`: for many
  strengths at once;
- `posterior`: the Gaussian process with this kernel.

All are differentiable in all tensors; the paths once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.backends import holds_numbers
from kernelmeta.reference.ntk import loss_gradient
from kernelmeta.reference.precision import without_autocast

ORACLES = ("squared_error", "cross_entropy")


class Fit(NamedTuple):
    """A fit in function space."""

    outputs: Tensor
    """[..., Q, N], of the query rows; the support rows where no ``cross`` was given."""
    coefficients: Tensor
    """[..., S, N], p: the outputs move by ``cross p``."""


class RidgeFit(NamedTuple):
    """A ridge regression, and what it would say of every support row if that row had not been there."""

    outputs: Tensor
    """[..., Q, N], of the query rows; the support rows where no ``cross`` was given."""
    coefficients: Tensor
    """[..., S, N]."""
    left_out: Tensor
    """[..., S, N], ``y - f`` of every support row, f fitted to the others: a validation error without a query label."""


class Posterior(NamedTuple):
    """A Gaussian process at the query rows, given the support rows."""

    mean: Tensor
    """[..., Q, N]."""
    covariance: Tensor
    """[..., Q, Q], the same for all outputs, or [..., Q, N, Q, N]; of the outputs without noise."""
    log_likelihood: Tensor
    """[...], log p(y), of all support rows and outputs together."""


class _Problem(NamedTuple):
    """One kernel for columns of right-hand sides: ``gram`` [..., R, R], ``targets`` [..., R, columns]."""

    gram: Tensor
    cross: Tensor
    residuals: Tensor  # targets - support_outputs
    N: int
    apart: bool  # rows are pairs of a support row and an output

    def outputs(self, moved: Tensor, query_outputs: Tensor | None) -> Tensor:
        """[..., rows, N] from what they move by, and where they start."""
        moved = moved.unflatten(-2, (-1, self.N)).squeeze(-1) if self.apart else moved
        return moved if query_outputs is None else query_outputs + moved

    def rows(self, columns: Tensor) -> Tensor:
        """[..., S, N]."""
        return columns.unflatten(-2, (-1, self.N)).squeeze(-1) if self.apart else columns


def _problem(
    gram: Tensor, targets: Tensor, cross: Tensor | None, support_outputs: Tensor | None, query_outputs: Tensor | None
) -> tuple[_Problem, Tensor | None]:
    given = {"gram": gram, "targets": targets, "cross": cross, "support_outputs": support_outputs}
    for name, tensor in (given | {"query_outputs": query_outputs}).items():
        if tensor is None and name not in ("gram", "targets"):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if targets.dim() < 2 or targets.shape[-2] < 1 or targets.shape[-1] < 1:
        raise ValueError(f"targets: expected [..., S, N], got shape {list(targets.shape)}")
    S, N = targets.shape[-2:]
    apart = gram.dim() >= 4 and tuple(gram.shape[-4:]) == (S, N, S, N)
    if not apart and (gram.dim() < 2 or tuple(gram.shape[-2:]) != (S, S)):
        raise ValueError(
            f"gram: expected [..., {S}, {S}] or [..., {S}, {N}, {S}, {N}] for these targets, got {list(gram.shape)}"
        )
    if cross is None:
        cross, query_outputs = gram, support_outputs if query_outputs is None else query_outputs
    elif tuple(cross.shape[-3:]) != (N, S, N) if apart else cross.shape[-1] != S:
        raise ValueError(f"cross: expected the columns of gram {list(gram.shape)}, got {list(cross.shape)}")
    if support_outputs is not None and support_outputs.shape[-2:] != targets.shape[-2:]:
        raise ValueError(f"support_outputs: expected [..., {S}, {N}], got {list(support_outputs.shape)}")
    Q = cross.shape[-4 if apart else -2]
    if query_outputs is not None and tuple(query_outputs.shape[-2:]) != (Q, N):
        raise ValueError(f"query_outputs: expected [..., {Q}, {N}], got {list(query_outputs.shape)}")
    residuals = targets if support_outputs is None else targets - support_outputs
    if apart:
        gram, cross = (kernel.flatten(-4, -3).flatten(-2, -1) for kernel in (gram, cross))
        residuals = residuals.flatten(-2).unsqueeze(-1)
    return _Problem(gram, cross, residuals, N, apart), query_outputs


def _number(name: str, value: float | Tensor, like: Tensor, *, least: float | None = 0.0) -> Tensor:
    found = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if found.numel() != 1:
        raise ValueError(f"{name}: expected one value, got shape {list(found.shape)}")
    if not isinstance(value, Tensor) and least is not None and not least <= value < math.inf:
        raise ValueError(f"{name}: expected a number of at least {least:g}, got {value}")
    return found.reshape(())


@without_autocast
def descent(
    gram: Tensor,
    targets: Tensor,
    cross: Tensor | None = None,
    *,
    steps: int,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    oracle: str = "squared_error",
    support_outputs: Tensor | None = None,
    query_outputs: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Fit:
    """K steps of gradient descent in function space: ``p <- p - lr (w dl/df(f_0 + K p) + weight_decay p)``.

    The loss is the sum over support rows of their weights w times ``|f - y|^2 / 2`` or ``-sum y log softmax(f)``.
    The backward pass makes the steps anew from checkpoints; its memory grows by ``sqrt(steps)`` coefficients.
    :func:`kernelmeta.ops.linearised_descent` is the same with the kernel of a perceptron, which it never stores.

    Args:
        gram: K, [..., S, S] or [..., S, N, S, N].
        targets: y, [..., S, N].
        cross: [..., Q, S] or [..., Q, N, S, N]; the support rows are asked about if None.
        steps: K, at least 0.
        lr, weight_decay: numbers, or tensors of one value.
        oracle: "squared_error" or "cross_entropy".
        support_outputs, query_outputs: f_0, [..., rows, N]; zero if None.
        row_weights: w, [..., S]; 1 / S each if None.

    Returns:
        A `Fit`.

    Raises:
        TypeError, ValueError: tensors or options that do not fit, named.
    """
    p, query_outputs = _problem(gram, targets, cross, support_outputs, query_outputs)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps: expected an int of at least 0, got {steps!r}")
    if oracle not in ORACLES:
        raise ValueError(f"oracle: expected one of {', '.join(ORACLES)}, got {oracle!r}")
    rate, decay = _number("lr", lr, targets, least=None), _number("weight_decay", weight_decay, targets)
    S = targets.shape[-2]
    weights = targets.new_full((S,), 1 / S) if row_weights is None else row_weights
    if weights.shape[-1] != S:
        raise ValueError(f"row_weights: expected [..., {S}], got {list(weights.shape)}")
    start = torch.zeros_like(targets) if support_outputs is None else support_outputs

    def some(
        pulls: Tensor, kernel: Tensor, y: Tensor, f0: Tensor, w: Tensor, eta: Tensor, kept: Tensor, *, count: int
    ) -> Tensor:
        for _ in range(count):
            flat = pulls.flatten(-2).unsqueeze(-1) if p.apart else pulls
            g = loss_gradient(f0 + p.rows(kernel @ flat), y, oracle)
            pulls = kept * pulls - eta * w.unsqueeze(-1) * g
        return pulls

    shape = torch.broadcast_shapes(targets.shape, p.gram.shape[:-2] + targets.shape[-2:])
    pulls = targets.new_zeros(shape)
    tensors = (p.gram, targets, start, weights, rate, 1 - rate * decay)
    each = max(1, math.isqrt(steps))
    for first in range(0, steps, each):
        pulls = _checkpointed(some, pulls, tensors, min(each, steps - first))
    columns = pulls.flatten(-2).unsqueeze(-1) if p.apart else pulls
    return Fit(p.outputs(p.cross @ columns, query_outputs), pulls)


def _checkpointed(some: Any, pulls: Tensor, tensors: Sequence[Tensor], count: int) -> Tensor:
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (pulls, *tensors)):
        result: Tensor = some(pulls, *tensors, count=count)
        return result
    from torch.utils.checkpoint import checkpoint

    found: Tensor = checkpoint(some, pulls, *tensors, count=count, use_reentrant=False, preserve_rng_state=False)
    return found


def _factor(gram: Tensor, strength: Tensor, what: str) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    matrix = gram + strength * eye
    factor, code = torch.linalg.cholesky_ex(matrix)
    failed = code != 0
    if holds_numbers(failed) and failed.any():
        # What is not a number stays that, in its own task.
        if (failed & matrix.isfinite().all(-1).all(-1)).any():
            raise ValueError(f"{what}: a Gram matrix is singular, or none; more of it would help")
        factor = factor.masked_fill(failed[..., None, None], math.nan)
    return factor


@without_autocast
def kernel_ridge(
    gram: Tensor,
    targets: Tensor,
    cross: Tensor | None = None,
    *,
    regularization: float | Tensor,
    support_outputs: Tensor | None = None,
    query_outputs: Tensor | None = None,
) -> RidgeFit:
    """Kernel ridge regression ``p = (K + l I)^-1 (y - f_0)``, and its leave-one-out residuals in the same pass.

    It is where gradient descent on the squared error ends: ``l = S weight_decay`` for rows that weigh 1 / S each. The
    residual of row i, fitted without it, is ``p_i / [(K + l I)^-1]_ii`` (Rasmussen & Williams 2006, equation 5.12);
    where outputs are apart, that is the block of the row's outputs.

    Args:
        gram, targets, cross, support_outputs, query_outputs: as for `descent`.
        regularization: l, a number or a tensor of one value.

    Returns:
        A `RidgeFit`.

    Raises:
        TypeError, ValueError: tensors that do not fit, named; a singular system.
    """
    p, query_outputs = _problem(gram, targets, cross, support_outputs, query_outputs)
    factor = _factor(p.gram, _number("regularization", regularization, p.gram), "regularization")
    columns = torch.cholesky_solve(p.residuals, factor)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)  # L^-1; the inverse is its square
    pulls = p.rows(columns)
    if p.apart:
        own = half.unflatten(-1, (-1, p.N)).movedim(-2, -3)  # [..., S, R, N]
        blocks = own.mT @ own
        left_out = torch.linalg.solve(blocks, pulls.unsqueeze(-1)).squeeze(-1)
    else:
        left_out = pulls / half.square().sum(-2).unsqueeze(-1)
    return RidgeFit(p.outputs(p.cross @ columns, query_outputs), pulls, left_out)


class _Spectral(torch.autograd.Function):
    """``U diag(values[k]) U^T B`` for values that are functions of the eigenvalues of a symmetric matrix.

    Its gradient in the matrix is made of the functions' divided differences (Daleckii & Krein), which are finite where
    eigenvalues meet; the eigenvectors' own gradient is not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, vectors: Tensor, values: Tensor, divided: Tensor) -> Tensor:
        return vectors @ (values.unsqueeze(-1) * (vectors.mT @ right))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        right, vectors, values, divided = ctx.saved_tensors
        return (*_SpectralGradient.apply(grads[0], right, vectors, values, divided), None)


class _SpectralGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, right: Tensor, vectors: Tensor, values: Tensor, divided: Tensor
    ) -> tuple[Tensor, Tensor, None, Tensor]:
        g, b = vectors.mT @ grad, vectors.mT @ right
        of_values = (g * b).sum(-1)
        inner = (divided * (g @ b.mT)).sum(0)
        inner = (inner + inner.mT) / 2
        of_matrix = vectors @ inner @ vectors.mT
        of_right = (vectors @ (values.unsqueeze(-1) * g)).sum(0)
        return of_matrix, of_right, None, of_values

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("a second derivative through an eigendecomposition is not implemented")


class Path(NamedTuple):
    """Fits in function space, one for each number of steps or strength."""

    outputs: Tensor
    """[k, ..., Q, N], of the query rows; the support rows where no ``cross`` was given."""
    coefficients: Tensor
    """[k, ..., S, N]."""


def _path(p: _Problem, values: Tensor, vectors: Tensor, divided: Tensor, query_outputs: Tensor | None) -> Path:
    batch = torch.broadcast_shapes(p.gram.shape[:-2], p.residuals.shape[:-2])
    gram, residuals, vectors = (t.expand(*batch, *t.shape[-2:]) for t in (p.gram, p.residuals, vectors))
    columns = _Spectral.apply(gram, residuals, vectors, values.expand(-1, *batch, -1), divided)
    return Path(p.outputs(p.cross @ columns, query_outputs), p.rows(columns))


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; NaN of a matrix that is not finite, which would stop all others of the batch."""
    finite = gram.detach().isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, gram.detach(), 0))
    return torch.where(finite.squeeze(-1), values, math.nan), vectors


class _Power(NamedTuple):
    """``m^n`` and ``1 + m + ... + m^(n - 1)`` of every eigenvalue's m, and their divided differences."""

    power: Tensor
    total: Tensor
    power_divided: Tensor
    total_divided: Tensor

    def doubled(self) -> _Power:
        i, j = self.power.unsqueeze(-1), self.power.unsqueeze(-2)
        return _Power(
            self.power.square(),
            self.total * (1 + self.power),
            self.power_divided * (i + j),
            self.total_divided * (1 + j) + self.total.unsqueeze(-1) * self.power_divided,
        )

    def one_more(self, m: Tensor) -> _Power:
        return _Power(
            self.power * m,
            self.total + self.power,
            self.power_divided * m.unsqueeze(-2) + self.power.unsqueeze(-1),
            self.total_divided + self.power_divided,
        )


def _powers(m: Tensor, n: int) -> _Power:
    """By squaring: nothing is subtracted, so that equal eigenvalues are no special case."""
    zero = (m.unsqueeze(-1) + m.unsqueeze(-2)) * 0
    found = _Power(torch.ones_like(m), torch.zeros_like(m), zero, zero)
    for bit in bin(n)[2:]:
        found = found.doubled()
        if bit == "1":
            found = found.one_more(m)
    return found


@without_autocast
def descent_path(
    gram: Tensor,
    targets: Tensor,
    cross: Tensor | None = None,
    *,
    steps: Sequence[int],
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    support_outputs: Tensor | None = None,
    query_outputs: Tensor | None = None,
) -> Path:
    """`descent` on the squared error after each of these numbers of steps, in closed form: one eigendecomposition.

    Every row weighs 1 / S. Time and memory grow with the number of fits, and with the logarithm of the steps.

    Args:
        gram, targets, cross, lr, weight_decay, support_outputs, query_outputs: as for `descent`.
        steps: in any order.

    Returns:
        A `Path`.

    Raises:
        TypeError, ValueError: tensors or options that do not fit, named.
    """
    p, query_outputs = _problem(gram, targets, cross, support_outputs, query_outputs)
    counts = list(steps)
    if not counts or any(not isinstance(k, int) or isinstance(k, bool) or k < 0 for k in counts):
        raise ValueError(f"steps: expected ints of at least 0, got {counts!r}")
    rate, decay = _number("lr", lr, targets, least=None), _number("weight_decay", weight_decay, targets)
    values, vectors = _eigen(p.gram)
    share = rate / targets.shape[-2]
    found = [_powers(1 - rate * decay - share * values, k) for k in counts]
    # (a function's divided difference in lambda is that in m times dm / dlambda = -share)
    divided = torch.stack([f.total_divided.detach() for f in found]) * -share.detach().square()
    return _path(p, share * torch.stack([f.total for f in found]), vectors, divided, query_outputs)


@without_autocast
def ridge_path(
    gram: Tensor,
    targets: Tensor,
    cross: Tensor | None = None,
    *,
    regularizations: Sequence[float] | Tensor,
    support_outputs: Tensor | None = None,
    query_outputs: Tensor | None = None,
) -> Path:
    """`kernel_ridge` for many strengths, in closed form: one eigendecomposition.

    Args:
        gram, targets, cross, support_outputs, query_outputs: as for `descent`.
        regularizations: [k], the strengths.

    Returns:
        A `Path`.

    Raises:
        TypeError, ValueError: tensors that do not fit, named.
    """
    p, query_outputs = _problem(gram, targets, cross, support_outputs, query_outputs)
    strengths = torch.as_tensor(regularizations, dtype=p.gram.dtype, device=p.gram.device)
    if strengths.dim() != 1 or not len(strengths):
        raise ValueError(f"regularizations: expected [k], got shape {list(strengths.shape)}")
    values, vectors = _eigen(p.gram)
    inverse = 1 / (values + strengths.view(-1, *[1] * values.dim()))
    with torch.no_grad():
        divided = -inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    return _path(p, inverse, vectors, divided, query_outputs)


@without_autocast
def posterior(
    gram: Tensor,
    targets: Tensor,
    cross: Tensor,
    query_gram: Tensor,
    *,
    noise: float | Tensor,
    support_outputs: Tensor | None = None,
    query_outputs: Tensor | None = None,
) -> Posterior:
    """The Gaussian process with this kernel, and this mean, given the support rows (Rasmussen & Williams 2006, 2.2).

    Args:
        gram, targets, cross, support_outputs, query_outputs: as for `descent`; the outputs are the mean before.
        query_gram: [..., Q, Q] or [..., Q, N, Q, N], of the query rows.
        noise: its variance, a number or a tensor of one value.

    Returns:
        A `Posterior`.

    Raises:
        TypeError, ValueError: tensors that do not fit, named; a singular system.
    """
    p, query_outputs = _problem(gram, targets, cross, support_outputs, query_outputs)
    rows = p.cross.shape[-2]
    own = query_gram.flatten(-4, -3).flatten(-2, -1) if p.apart and query_gram.dim() >= 4 else query_gram
    if tuple(own.shape[-2:]) != (rows, rows):
        raise ValueError(f"query_gram: expected the rows of cross {list(cross.shape)}, got {list(query_gram.shape)}")
    factor = _factor(p.gram, _number("noise", noise, p.gram), "noise")
    columns = torch.cholesky_solve(p.residuals, factor)
    half = torch.linalg.solve_triangular(factor, p.cross.mT, upper=False)
    covariance = own - half.mT @ half
    if p.apart:
        covariance = covariance.unflatten(-1, (-1, p.N)).unflatten(-3, (-1, p.N))
    logs = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    n, repeats = p.residuals.shape[-2:]
    fit = (p.residuals * columns).sum((-2, -1)) / 2
    likelihood = -fit - repeats * (logs + n / 2 * math.log(2 * math.pi))
    return Posterior(p.outputs(p.cross @ columns, query_outputs), covariance, likelihood)
