"""What tasks are described by, and what comes out of them: `Ragged`, `Classifier`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Ragged(NamedTuple):
    """Tasks of unequal size, their rows one after the other: task t owns the rows offsets[t] .. offsets[t + 1].

    Features of such tasks are [all support rows, D] and [all query rows, D], labels [all support rows].
    """

    support_offsets: Tensor
    """[T + 1] int64, rising from 0 to the number of all support rows."""
    query_offsets: Tensor
    """[T + 1] int64, likewise."""
    n_ways: Tensor | None = None
    """[T] int64, the ways of each task, at most the ``n_way`` of the learner; all have as many if None."""
    max_support: int | None = None
    """The most support rows that a task may have, given together with ``max_query``. With both, a call on a GPU does
    not wait for the device, to read the offsets, and can be captured in a CUDA graph; memory is taken for T tasks as
    large. What is wrong with the offsets, the ways or a task's size cannot raise an error then: a task that is larger,
    or has more ways than rows, comes out as NaN, and all do where the offsets do not rise from 0 to the number of
    rows."""
    max_query: int | None = None
    """The most query rows."""


class Classifier(NamedTuple):
    """What learners make for each task, returned where ``return_weights`` asks for it.

    A linear classifier gives the logits ``x weight^T + bias``. A cosine classifier's ``weight`` is theta, of
    ``Z = scale (bias + cos(x, theta))``, and its ``bias`` here is 0: scale and bias are the learner's own.
    """

    weight: Tensor
    """[T, N, D]; zeros beyond a task's own ways."""
    bias: Tensor
    """[T, N]"""

    @staticmethod
    def cosine(theta: Tensor) -> Classifier:
        """A cosine classifier, from theta [T, N, D]."""
        return Classifier(theta, theta.new_zeros(theta.shape[:-1]))
