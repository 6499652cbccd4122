"""The equivariant gradient: logits in, a guess of d loss / d logits out, whatever the number and order of the classes.

One MLP looks at every pair of a row q and a class n by itself. With p = softmax(z), means over the task's Q rows, and
eps = 1e-9, it is told

    0  log p, at least -20                    how likely the class is
    1  p
    2  log(m + eps), m_n = N mean_q p_qn      the class's share of all rows, over an even share
    3  log p - log(1 - p), within -20 and 20  how far it is ahead of all others together, or behind
    4  -sum_n p_n log p_n                     how unsure the row is
    5  z - mean_q z                           how near the row is, by the measure of the class
    6  p / (m + eps)                          how much of the class's mass the row has

each normalised over all Q N pairs of the task. Then Linear(7, H) - ReLU - BatchNorm(H) - Linear(H, H) - ReLU -
BatchNorm(H) - Linear(H, 1), as in the synthetic-gradient MLP of Hu et al. 2020 (section 4), which reads a row's N
logits in the order of the classes instead.

None of the inputs depends on how the classes are numbered: renumbering them renumbers the result, and the parameters
fit any N. The time is linear in N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.synthetic_gradient_mlp import NORM_EPS, mlp_with_norm_stats

PAIR_INPUTS = 7
CLAMP, EPS = 20.0, 1e-9
TINY = 1e-30  # of 1 - p: its logarithm is finite


def pair_inputs(logits: Tensor) -> Tensor:
    """[..., Q, N] -> [..., Q, N, 7], not normalised."""
    N = logits.shape[-1]
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mass = N * p.mean(-2, keepdim=True) + EPS
    # 1 - p, as the sum over the other classes: before, and after.
    none = torch.zeros_like(p[..., :1])
    before = torch.cat([none, p[..., :-1].cumsum(-1)], -1)
    after = torch.cat([p[..., 1:].flip(-1).cumsum(-1).flip(-1), none], -1)
    odds = log_p - (before + after).clamp_min(TINY).log()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    inputs = (
        log_p.clamp_min(-CLAMP), p, mass.log(), odds.clamp(-CLAMP, CLAMP), entropy,
        logits - logits.mean(-2, keepdim=True), p / mass,
    )  # fmt: skip
    return torch.stack([i.expand_as(p) for i in inputs], -1)


@without_autocast
def equivariant_gradient_mlp(
    logits: Tensor, mlp: MLPParameters, *, norm_stats: str = "task", running_stats: Tensor | None = None
) -> Tensor:
    """Guess the gradient of the loss with respect to the logits.

    Args:
        logits: [..., Q, N], at least one row.
        mlp: weight1 [H, 7], weight3 [1, H], bias3 [1], the rest as in :class:`kernelmeta.MLPParameters`.
        norm_stats: whose statistics the two BatchNorms use: "task", over its pairs, or "running". The inputs are
            normalised over the task's own pairs always.
        running_stats: [2, 2, H], of "running".

    Returns:
        [..., Q, N].
    """
    logits, *parameters = promoted(logits, *mlp)
    pairs = pair_inputs(logits).flatten(-3, -2)
    centred = pairs - pairs.mean(-2, keepdim=True)
    pairs = centred / (centred.square().mean(-2, keepdim=True) + NORM_EPS).sqrt()
    guess, _ = mlp_with_norm_stats(
        pairs, MLPParameters(*parameters), norm_stats=norm_stats, running_stats=running_stats
    )
    return guess.view(logits.shape)
