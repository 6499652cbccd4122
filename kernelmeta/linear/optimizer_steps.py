"""How many steps a linearised network's least squares takes to come near its optimum, by optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from kernelmeta.linear.closed_form import tangent_gram
from kernelmeta.linear.lqf import Linearised
from kernelmeta.linear.preconditioning import KroneckerPreconditioner

# The weights after a step, from those before it and the gradient.
Step = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
Precondition = Callable[[list[Tensor]], list[Tensor]]
# Steps that one setting takes, of those that it may take.
Attempt = Callable[[int], int | None]
NEAR = 0.01  # of the way from the start to the optimum
# Of the heavy ball; rates as shares of 1 over the largest eigenvalue, stable below 2 (1 + momentum).
MOMENTA = (0.9, 0.85, 0.95, 0.98, 0.99)
SHARES = (3.5, 1.9, 1.0)
ADAM_RATES = (1e-3, 3e-3, 3e-4, 1e-2, 1e-4)
DAMPINGS = (10.0, 30.0, 100.0)  # over the weight decay


class Modes(NamedTuple):
    """The problem in the coordinates of the kernel's eigenvectors, in which gradient descent with momentum and
    conjugate gradients go from one eigenvector to none of the others: ``w - w0 = J^T V c``.
    """

    values: Tensor  # [n C]
    gap: Tensor  # [n C], V^T (f(x; w0) - y)
    decay: float

    def start(self) -> list[Tensor]:
        return [torch.zeros_like(self.gap)]

    def loss_and_gradient(self, c: list[Tensor]) -> tuple[float, list[Tensor]]:
        off = self.gap + self.values * c[0]
        loss = off.square().sum() / 2 + self.decay * (self.values * c[0].square()).sum() / 2
        return float(loss), [off + self.decay * c[0]]

    def times(self, c: list[Tensor]) -> list[Tensor]:
        """The curvature times a vector."""
        return [(self.values + self.decay) * c[0]]

    def product(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Of two vectors, as weights."""
        return (self.values * a[0] * b[0]).sum()

    def optimum(self) -> float:
        return float((self.decay * self.gap.square() / (self.values + self.decay)).sum() / 2)


class Weights:
    """The problem in the network's weights.

    Args:
        model: linearised at its start.
        rows, targets: [n, ...], [n, C].
        decay: l in ``|f(x) - y|^2 / 2 + l |w - w0|^2 / 2``.
    """

    def __init__(self, model: Linearised, rows: Tensor, targets: Tensor, decay: float) -> None:
        self.names, self.decay = list(model.names), decay
        origin = dict(model.frozen.named_parameters())
        self.at = {name: origin[name] for name in self.names}

        def outputs(moved: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(model.frozen, origin | moved, rows)
            return found

        self._outputs = outputs
        start, self._pull = vjp(outputs, self.at)[:2]
        self.gap: Tensor = start - targets

    def start(self) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.at.values()]

    def _along(self, w: list[Tensor]) -> Tensor:
        found: Tensor = jvp(self._outputs, (self.at,), (dict(zip(self.names, w, strict=True)),))[1]
        return found

    def _back(self, off: Tensor, w: list[Tensor]) -> list[Tensor]:
        back = self._pull(off)[0]
        return [back[name] + self.decay * v for name, v in zip(self.names, w, strict=True)]

    def loss_and_gradient(self, w: list[Tensor]) -> tuple[float, list[Tensor]]:
        off = self.gap + self._along(w)
        loss = float(off.square().sum() / 2 + self.decay * self.product(w, w) / 2)
        return loss, self._back(off, w)

    def times(self, w: list[Tensor]) -> list[Tensor]:
        """The curvature times a vector."""
        return self._back(self._along(w), w)

    def product(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([(v * u).sum() for v, u in zip(a, b, strict=True)]).sum()


def _as_it_is(gradient: list[Tensor]) -> list[Tensor]:
    return gradient


def _moved(a: list[Tensor], share: float | Tensor, b: list[Tensor]) -> list[Tensor]:
    return [v + share * u for v, u in zip(a, b, strict=True)]


def heavy_ball(lr: float, momentum: float, precondition: Precondition = _as_it_is) -> Step:
    """Gradient descent with momentum.

    Args:
        lr, momentum: of a step.
        precondition: what is done to gradients first.
    """
    speed: list[Tensor] | None = None

    def step(w: list[Tensor], gradient: list[Tensor]) -> list[Tensor]:
        nonlocal speed
        pull = [-lr * v for v in precondition(gradient)]
        speed = pull if speed is None else _moved(pull, momentum, speed)
        return _moved(w, 1.0, speed)

    return step


def adam(start: list[Tensor], lr: float) -> Step:
    """Adam.

    Args:
        start: weights.
        lr: its rate.
    """
    held = [nn.Parameter(v.clone()) for v in start]
    optimizer = torch.optim.Adam(held, lr=lr)

    def step(w: list[Tensor], gradient: list[Tensor]) -> list[Tensor]:
        for parameter, v in zip(held, gradient, strict=True):
            parameter.grad = v
        optimizer.step()
        return [p.detach().clone() for p in held]

    return step


def count(problem: Modes | Weights, step: Step, enough: float, most: int) -> int | None:
    """Steps until the loss is small enough; None where it is not after ``most`` of them, or grows.

    Args:
        problem: what is minimised.
        step: of the optimizer.
        enough: the loss.
        most: steps that are tried.
    """
    w = problem.start()
    first: float | None = None
    for i in range(most):
        loss, gradient = problem.loss_and_gradient(w)
        first = loss if first is None else first
        if loss <= enough:
            return i
        if not loss < 4 * first:
            return None
        w = step(w, gradient)
    return None


def conjugate_gradients(
    problem: Modes | Weights, enough: float, most: int, precondition: Precondition = _as_it_is
) -> int | None:
    """`count`, of conjugate gradients: each step with the best rate and momentum there are.

    Args:
        problem, enough, most: as for `count`.
        precondition: what is done to gradients first.
    """
    w = problem.start()
    loss, gradient = problem.loss_and_gradient(w)
    r = [-v for v in gradient]
    z = precondition(r)
    d, rz = z, problem.product(r, z)
    for i in range(most):
        if loss <= enough:
            return i
        curved = problem.times(d)
        share = rz / problem.product(d, curved)
        w, r = _moved(w, share, d), _moved(r, -share, curved)
        z = precondition(r)
        after = problem.product(r, z)
        d, rz = _moved(z, after / rz, d), after
        loss = problem.loss_and_gradient(w)[0]
    return None


def _fewest(attempts: Iterable[Attempt], most: int) -> int | None:
    """The fewest steps: none is tried for longer than the best so far."""
    best = None
    for attempt in attempts:
        found = attempt(most if best is None else best)
        best = best if found is None else found
    return best


def steps_to_optimum(
    model: Linearised,
    rows: Tensor,
    targets: Tensor,
    *,
    regularization: float,
    most: int,
    chunk_size: int | None = None,
) -> dict[str, int | None]:
    """Steps of the full gradient until the loss has gone 99 % of the way from its start to its optimum, with the best
    rates of a grid for each optimizer, None where none gets there.

    The loss is ``|f(X) - targets|^2 / 2 + l |w - w0|^2 / 2``. Momentum and conjugate gradients without a
    preconditioner run in the space of the kernel, in float64.

    Args:
        model: linearised at its start.
        rows: images to learn from.
        targets: [n, classes].
        regularization: l, in units of the kernel's mean eigenvalue.
        most: steps that are tried.
        chunk_size: as for `ntk_gram`.

    Raises:
        ImportError: curvlinops, for the preconditioner, is not installed.
    """
    values, vectors = torch.linalg.eigh(tangent_gram(model, rows, chunk_size))
    values = values.clamp_min(0)
    decay = regularization * float(values.mean())
    weights = Weights(model, rows, targets, decay)
    modes = Modes(values, vectors.mT @ weights.gap.double().flatten(), decay)
    optimum, first = modes.optimum(), modes.loss_and_gradient(modes.start())[0]
    enough = optimum + NEAR * (first - optimum)

    def momentum(problem: Modes | Weights, rate: float, precondition: Precondition = _as_it_is) -> Iterator[Attempt]:
        """Args: rate: 1 over the largest eigenvalue."""
        for momentum, share in itertools.product(MOMENTA, SHARES):
            yield partial(count, problem, heavy_ball(share * rate, momentum, precondition), enough)

    preconditioners = [KroneckerPreconditioner(model, rows, damping=damping * decay) for damping in DAMPINGS]
    attempts: dict[str, Iterable[Attempt]] = {
        "momentum": momentum(modes, 1 / (float(values[-1]) + decay)),
        "Adam": (partial(count, weights, adam(weights.start(), lr), enough) for lr in ADAM_RATES),
        "conjugate gradients": [partial(conjugate_gradients, modes, enough)],
        "Kronecker-factored, momentum": itertools.chain.from_iterable(
            momentum(weights, p.largest_rate(decay) / 2, p) for p in preconditioners
        ),
        "Kronecker-factored, conjugate gradients": (
            partial(conjugate_gradients, weights, enough, precondition=p) for p in preconditioners
        ),
    }
    return {name: _fewest(of_optimizer, most) for name, of_optimizer in attempts.items()}
