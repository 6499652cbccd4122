"""Before anything is timed: does it compute the same as the float64 reference?

Float32 gradients may legitimately differ in single elements, by percents, where a ReLU's input lies within rounding
of zero. So gradients are compared in the Euclidean norm of each whole gradient; tests/benchmarks hold every peer to
1e-9 in float64, element by element.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernelmeta as km
from benchmarks.peers import Peer, PeerRunner, Result
from benchmarks.problem import Problem

# Largest error of a logit (relative to the largest logit), and relative error of each gradient in the 2-norm.
TOLERANCES = {"float32": (1e-4, 2e-2), "bfloat16": (1e-4, 2e-2), "float64": (1e-10, 1e-9)}
# Statistics over all T*Q rows, summed in float32 by PyTorch's own batch_norm: at T = 512 the largest error of a logit
# was 3.1e-4, and 3.5e-13 for the same function in float64.
BATCH_LOGITS = 1e-3
# Many steps through ReLUs multiply rounding errors by millions: in float64, after 50 steps, the kernel's gradients were
# up to 3e-9 from the specification's, the eager dual form's 2e-8.
MANY_STEPS, AFTER_MANY_STEPS = 10, (1e-8, 1e-6)
_CHUNK = 16  # tasks of the reference at a time, for its memory


class Disagreement(AssertionError):
    """A peer's numbers are not the reference's: nothing about it is reported."""


def reference(problem: Problem, mode: str, norm_stats: str = "task", copy: int = 0) -> Result:
    """Logits and gradients of the specification in float64."""
    inputs = problem.inputs[copy]
    parameters = problem.parameters.fresh(torch.float64)
    T, Q = inputs.answers.shape
    support = inputs.support.detach().double().requires_grad_(mode == "train+features")
    query = inputs.query.detach().double().requires_grad_(mode == "train+features")
    chunk = T if norm_stats == "batch" else _CHUNK
    logits = []
    for t in range(0, T, chunk):
        part = slice(t, t + chunk)
        z = km.reference.sib(
            support[part], inputs.labels[part], query[part], parameters.weight, parameters.scale, parameters.bias,
            parameters.mlp, steps=problem.size.K, inner_lr=problem.inner_lr, norm_stats=norm_stats,
        )  # fmt: skip
        logits.append(z.detach())
        if mode != "forward":
            F.cross_entropy(z.flatten(0, 1), inputs.answers[part].flatten(), reduction="sum").div(T * Q).backward()
    gradients = [] if mode == "forward" else [leaf.grad for leaf in parameters.leaves()]
    if mode == "train+features":
        gradients += [support.grad, query.grad]
    return torch.cat(logits), gradients


def errors(got: Result, want: Result) -> tuple[float, float]:
    """The largest relative error of the logits, and of any gradient in the 2-norm; infinite if not finite."""
    logits, expected = _tensor(got[0]), _tensor(want[0])
    if logits.shape != expected.shape or len(got[1]) != len(want[1]):
        raise Disagreement(f"shapes: logits {tuple(logits.shape)}, expected {tuple(expected.shape)}")
    of_logits = float((logits - expected).abs().max() / expected.abs().max())
    pairs = [(_tensor(g), _tensor(w)) for g, w in zip(got[1], want[1], strict=True)]
    # A gradient that nearly vanishes is held to an absolute error.
    least = 1e-4 * max((float(w.norm()) for _, w in pairs), default=0.0)
    of_gradients = max((float((g - w).norm()) / max(float(w.norm()), least) for g, w in pairs), default=0.0)
    found = (of_logits, of_gradients)
    return tuple(e if np.isfinite(e) else float("inf") for e in found)  # type: ignore[return-value]


def check(
    name: str, peer: Peer, runner: PeerRunner, problem: Problem, mode: str, *, want: Result | None = None
) -> tuple[float, float]:
    """The errors of the runner on the first copy of the inputs; ``want``: what `reference` gave for them, if known.

    Raises:
        Disagreement: they exceed the tolerance.
    """
    found = errors(runner(0), want or reference(problem, mode, peer.norm_stats))
    allowed = TOLERANCES[problem.size.dtype]
    if problem.size.K > MANY_STEPS and problem.size.dtype == "float64":
        allowed = AFTER_MANY_STEPS
    if peer.norm_stats == "batch" and problem.size.dtype != "float64":
        allowed = (BATCH_LOGITS, allowed[1])
    if found[0] > allowed[0] or found[1] > allowed[1]:
        raise Disagreement(
            f"{name} at {problem.size}, {mode}: logits off by {found[0]:.1e} (allowed {allowed[0]:.0e}), "
            f"gradients by {found[1]:.1e} (allowed {allowed[1]:.0e})"
        )
    return found


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.from_numpy(np.asarray(value).astype(np.float64))
