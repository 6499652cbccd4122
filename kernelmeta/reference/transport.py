"""Oracles that know the shares p of the query rows that the classes have, and their gradients.

With pi = softmax(Z), means over the rows of a bag, and J(a, b) = a (b - <a, b>):

    proportions  L = -sum_n p_n log(mean pi_n)                           G = J(pi, -p / mean pi)
    assignment   L = mean lse(Z) - min_g [mean lse(Z + g) - <p, g>]      G = pi - T,  T = softmax(Z + g)

T is optimal transport with entropy 1: its rows sum to 1, and their mean is p. ``relax`` below 1 puts a KL divergence of
weight relax / (1 - relax) between mean T and p in the place of the constraint (Chizat et al. 2018): mean T is then
p exp(-tau g), tau = (1 - relax) / relax. It is how far p is trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.backends import holds_numbers

TARGET = {torch.float32: 1e-6, torch.float64: 1e-12}  # of mean T - p exp(-tau g)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # else the task is NaN
_RIDGE = {torch.float32: 1e-6, torch.float64: 1e-14}
_LONGEST, _LEAST_MASS = 4.0, 1e-30
_STEPS, _HALVINGS = 100, 30
_TRACED_STEPS, _TRACED_HALVINGS = 12, 2  # where nobody can look whether they are enough


class Bags:
    """Which query rows [T, Q] belong to which of B bags; all to one without offsets ([T, B + 1])."""

    def __init__(self, rows: Tensor, offsets: Tensor | None) -> None:
        T, Q, _ = rows.shape
        if offsets is None:
            self.number = None
            self.share = rows.new_full((T, 1, Q), 1 / Q)  # [T, B, Q]: what a row is of its bag
            self.filled = torch.ones(T, 1, 1, dtype=torch.bool, device=rows.device)
            return
        line = torch.arange(Q, device=rows.device)
        self.number = (line >= offsets[:, 1:-1, None]).sum(1).unsqueeze(-1)  # [T, Q, 1]
        counts = offsets.diff()
        inside = (line >= offsets[:, :-1, None]) & (line < offsets[:, 1:, None])
        self.share = inside.to(rows.dtype) / counts.clamp(min=1).unsqueeze(-1)
        self.filled = (counts > 0).unsqueeze(-1)

    def of_rows(self, of_bags: Tensor) -> Tensor:
        """[T, B, N] -> [T, Q or 1, N]."""
        if self.number is None:
            return of_bags
        return of_bags.gather(1, self.number.expand(-1, -1, of_bags.shape[-1]))

    def mean(self, of_rows: Tensor) -> Tensor:
        """[T, Q, N] -> [T, B, N]."""
        return self.share @ of_rows


def proportions_gradient(logits: Tensor, p: Tensor, bags: Bags) -> Tensor:
    """G of the KL divergence of the mean prediction, times the number of rows: [T, Q, N], p [T, B, N]."""
    pi = logits.softmax(-1)
    u = bags.of_rows(-p / bags.mean(pi).clamp(min=_LEAST_MASS))
    return pi * (u - (pi * u).sum(-1, keepdim=True))


def transport(logits: Tensor, p: Tensor, bags: Bags, relax: float = 1.0) -> Tensor:
    """T [T, Q, N], from logits [T, Q, N] and p [T, B, N]. Classes with p = 0 get nothing.

    Newton's method, whose steps are at most four long, or twice as long as the last one where that descended; they are
    halved until they descend. The derivatives come from two more steps that are differentiated, which makes the first
    and the second one exact. A task whose mean T is not as it must be is NaN.
    """
    tau = (1 - relax) / relax
    log_pi = logits.log_softmax(-1)
    g = _solve(log_pi.detach(), p.detach(), bags, tau)
    problem = _Problem(log_pi, p, bags, tau)
    for _ in range(2):
        T, mean, residual, _ = problem.at(g)
        g = g - problem.solved(T, mean, residual, residual)
    T, _, residual, _ = problem.at(g)
    wrong = ~(residual.detach().abs() <= TOLERANCE[logits.dtype]).flatten(1).all(-1)
    return T.masked_fill(wrong.view(-1, 1, 1), float("nan"))


class _Problem:
    """The function of g that is least at the solution, mean lse(log pi + g) + phi(g), and its derivatives."""

    def __init__(self, log_pi: Tensor, p: Tensor, bags: Bags, tau: float) -> None:
        self.log_pi, self.p, self.bags, self.tau = log_pi, p, bags, tau
        self.included = p > 0  # [T, B, N]
        self.of_rows = bags.of_rows(self.included)

    def at(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T [T, Q, N]; mean T and its difference from what it must be, [T, B, N]; the function [T, B, 1]."""
        z = (self.log_pi + self.bags.of_rows(g)).masked_fill(~self.of_rows, -torch.inf)
        lse = z.logsumexp(-1, keepdim=True)
        T = z.softmax(-1)
        mean = self.bags.mean(T)
        wanted = self.p * (-self.tau * g).exp() if self.tau else self.p
        linear = self.p * (-self.tau * g).expm1() / self.tau if self.tau else -self.p * g
        residual = (mean - wanted).masked_fill(~(self.included & self.bags.filled), 0)
        return T, mean, residual, self.bags.mean(lse) + linear.sum(-1, keepdim=True)

    def solved(self, T: Tensor, mean: Tensor, residual: Tensor, right: Tensor) -> Tensor:
        """H^-1 ``right`` [T, B, N]; where tau is zero, of the solutions the one that sums to zero."""
        second = torch.einsum("tbq,tqn,tqm->tbnm", self.bags.share, T, T)
        both = self.included.unsqueeze(-1) & self.included.unsqueeze(-2)
        H = torch.where(both, (0.0 if self.tau else 1.0) - second, torch.zeros_like(second))
        diagonal = mean + self.tau * (mean - residual) + _RIDGE[T.dtype]
        H = H + torch.where(self.included & self.bags.filled, diagonal, torch.ones_like(diagonal)).diag_embed()
        found: Tensor = torch.linalg.solve_ex(H, right.unsqueeze(-1))[0].squeeze(-1)
        return found


@torch.no_grad()
def _solve(log_pi: Tensor, p: Tensor, bags: Bags, tau: float) -> Tensor:
    """g, [T, B, N]."""
    problem, visible = _Problem(log_pi, p, bags, tau), holds_numbers(log_pi)
    visible = visible and not torch._C._are_functorch_transforms_active()
    same, target = (1e-14, 1e-12) if log_pi.dtype is torch.float64 else (1e-6, 1e-6)
    mean = bags.mean(log_pi.exp()).clamp(min=_LEAST_MASS)
    # One step of Sinkhorn's algorithm, which descends.
    g = torch.where(
        problem.included, (p.clamp(min=1e-300 if p.dtype is torch.float64 else 1e-37).log() - mean.log()), 0
    )
    g = g / (1 + tau)
    T, mean, residual, value = problem.at(g)
    limit = torch.full_like(value, _LONGEST)
    for _ in range(_STEPS if visible else _TRACED_STEPS):
        done = (residual.abs() <= target).all(-1, keepdim=True) | ~value.isfinite()
        if visible and done.all():
            break
        step = -problem.solved(T, mean, residual, residual)
        longest = step.abs().amax(-1, keepdim=True)
        step = step * (limit / torch.maximum(longest, limit))
        step = step.masked_fill(done, 0)
        length = torch.ones_like(value)
        for _ in range(_HALVINGS if visible else _TRACED_HALVINGS):
            following = problem.at(g + length * step)
            descends = (following[3] <= value + same * (1 + value.abs())) | done
            if visible and descends.all():
                break
            length = torch.where(descends, length, length / 2)
        g = g + length * step
        limit = torch.where((longest > limit) & (length == 1), 2 * limit, _LONGEST)
        T, mean, residual, value = problem.at(g)
    return g
