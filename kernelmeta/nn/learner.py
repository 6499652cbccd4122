"""What all learners share: how they are called."""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from kernelmeta.adapted_classifier import AdaptedClassifier, CosineTerms
from kernelmeta.backends import holds_numbers
from kernelmeta.nn.pretrained import Pretrained
from kernelmeta.ops import _checks
from kernelmeta.reference.task_rows import as_labels, gathered
from kernelmeta.tasks import Classifier, Ragged
from kernelmeta.transforms import Transform, check_center, parse_power

Kind = TypeVar("Kind", bound="Learner")


class Learner(Pretrained, ABC):
    """A module that makes a classifier for each of T tasks, and classifies the tasks' query rows with it.

    Every learner takes two settings of the features, ``transform`` and ``center``, see :class:`kernelmeta.Transform`:
    what is done to the rows of every call before the learner sees them. Both "none" leaves the rows as they are; with
    any other they come out with length 1, in float32 at least, and rows of a bank are copied.

    Args:
        transform: "none", or "power:P".
        center: "none"; "task", which makes any learner transductive; "train", whose mean `center_on` sets.
        n_features: D, for "train".

    Buffers: ``train_mean`` [D] where ``center`` is "train".

    Raises:
        ValueError: none of these.
    """

    n_way: int
    train_mean: Tensor | None

    def __init__(self, transform: str = "none", center: str = "none", n_features: int | None = None) -> None:
        super().__init__()
        parse_power(transform)
        check_center(center)
        if center == "train" and n_features is None:
            raise ValueError("center: 'train' needs n_features")
        self.transform, self.center = transform, center
        if n_features is not None and center == "train":
            self.register_buffer("train_mean", torch.full((n_features,), math.nan))
        else:  # (torch.export stumbles over a buffer that is None)
            self.train_mean = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # torch.compile counts by code what it has compiled, and stops at eight: every class has code of its own.
        shared = cls.forward
        own = FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__)
        own.__kwdefaults__ = shared.__kwdefaults__
        cls.forward = functools.update_wrapper(own, shared)  # type: ignore[method-assign]

    def forward(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        return_weights: bool = False,
        *,
        ragged: Ragged | None = None,
    ) -> Tensor | tuple[Tensor, Classifier]:
        """Classify the query rows of T tasks.

        Args:
            support: [T, S, D]; every class needs at least one row, counts may differ.
            support_labels: [T, S] int64 in 0..N-1.
            query: [T, Q, D].
            return_weights: return the classifiers too.
            ragged: tasks of unequal size; then features are [all rows, D] and labels [all support rows].

        Returns:
            Logits [T, Q, N] or [all query rows, N]; with ``return_weights`` a pair of them and the `Classifier`.

        Raises:
            ValueError, TypeError: what does not fit, named.
        """
        return self._classify(support, support_labels, query, return_weights=return_weights, ragged=ragged)

    def _classify(
        self, support: Tensor, support_labels: Tensor, query: Tensor, *, ragged: Ragged | None, **options: Any
    ) -> Tensor | tuple[Tensor, Classifier]:
        """A call; ``options`` go to `_adapt`."""
        if not (isinstance(support, Tensor) and isinstance(support_labels, Tensor) and isinstance(query, Tensor)):
            check_tensors(support=support, support_labels=support_labels, query=query)
        if self.feature_transform is not None:
            support, query, _ = self._transformed(support, support_labels, query, ragged=ragged)
        return self._adapt(support, support_labels, query, ragged=ragged, **options)

    def from_bank(
        self,
        bank: Tensor,
        support_index: Tensor,
        support_labels: Tensor,
        query_index: Tensor,
        *,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """The logits for rows of a feature bank, read where they lie.

        Args:
            bank: [n, D].
            support_index, query_index: [T, S] and [T, Q] int64; [all support rows], [all query rows] of tasks of
                unequal size.
            support_labels: of the shape of ``support_index``.
            ragged: tasks of unequal size.

        Raises:
            ValueError, TypeError: what does not fit, named.
        """
        return self._from_bank(bank, support_index, support_labels, query_index, ragged=ragged)

    def _from_bank(
        self,
        bank: Tensor,
        support_index: Tensor,
        support_labels: Tensor,
        query_index: Tensor,
        *,
        ragged: Ragged | None,
        **options: Any,
    ) -> Tensor:
        """A call of `from_bank`; ``options`` go to `_adapt`."""
        check_tensors(bank=bank, support_index=support_index, support_labels=support_labels, query_index=query_index)
        index: dict[str, Any] = {"support_index": support_index, "query_index": query_index}
        support = query = bank
        if self.feature_transform is not None:
            support, query, index = self._transformed(bank, support_labels, bank, ragged=ragged, **index)
        logits = self._adapt(support, support_labels, query, ragged=ragged, **index, **options)
        assert isinstance(logits, Tensor)
        return logits

    takes_ragged = True
    """Whether tasks of unequal size may be given in one call."""

    @property
    def takes_any_ways(self) -> bool:
        """Whether no parameter depends on the number of classes, so that `for_ways` can change it."""
        return False

    def for_ways(self: Kind, n_way: int) -> Kind:
        """This learner for tasks of ``n_way`` classes, with the same parameters: what trains one trains both.

        Raises:
            ValueError: its parameters are those of a fixed number of classes; ``n_way`` below 1.
        """
        if n_way < 1:
            raise ValueError(f"n_way: expected at least 1, got {n_way}")
        if n_way == self.n_way:
            return self
        if not self.takes_any_ways:
            raise ValueError(f"n_way: {type(self).__name__} has parameters for {self.n_way} classes, not for {n_way}")
        other = copy.copy(self)
        other.n_way = n_way
        object.__setattr__(other, "_made_with", {**self._made_with, "n_way": n_way})
        return other

    @property
    def feature_transform(self) -> Transform | None:
        """What is done to the rows of a call; None where they stay as they are.

        Raises:
            ValueError: ``center`` is "train", and nobody has said yet what the mean is.
        """
        if self.transform == "none" and self.center == "none":
            return None
        mean = self.train_mean
        if mean is not None and holds_numbers(mean) and mean.device.type == "cpu" and bool(mean[0].isnan()):
            raise ValueError("center: the mean of the training rows is not known yet; give them to center_on()")
        return Transform(self.transform, self.center, mean)

    def center_on(self, rows: Tensor) -> None:
        """Take the mean for ``center="train"``, and do nothing for any other.

        Args:
            rows: [n, D], of the training classes.

        Raises:
            ValueError: other than D features.
        """
        if self.train_mean is None:
            return
        if rows.dim() != 2 or rows.shape[1] != len(self.train_mean) or not len(rows):
            raise ValueError(f"rows: expected [n, {len(self.train_mean)}], got shape {list(rows.shape)}")
        mean = Transform.of_training(rows, self.transform, self.center).mean
        assert mean is not None
        with torch.no_grad():
            self.train_mean.copy_(mean)

    def _transformed(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        *,
        support_index: Tensor | None = None,
        query_index: Tensor | None = None,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The rows of a call, gathered and transformed, and the arguments that say where rows lie: none then.

        With ``feature_transform`` None everything as it was.
        """
        index = {"support_index": support_index, "query_index": query_index}
        transform = self.feature_transform
        if transform is None:
            return support, query, index
        _checks.task_rows(support, as_labels(support_labels), query, support_index, query_index, ragged)
        support, query = gathered(support, support_index, "support"), gathered(query, query_index, "query")
        return *transform(support, query, ragged), {}

    @property
    def transductive(self) -> bool:
        """Whether the query rows have a part in the classifier: then a row's answer depends on the rows beside it."""
        return self.center == "task" or self._steps_on_query

    @property
    def _steps_on_query(self) -> bool:
        phases = getattr(self, "phases", None)
        if phases is None:  # a learner that takes steps without phases takes them on the query rows, as SIB does
            return getattr(self, "steps", 0) > 0
        return any(phase.rows == "query" and phase.steps > 0 for phase in phases)

    @property
    def cosine_terms(self) -> CosineTerms | None:
        """Scale and bias of a cosine classifier; None for a linear one."""
        return None

    def adapt(
        self, support: Tensor, support_labels: Tensor, query: Tensor | None = None, *, ragged: Ragged | None = None
    ) -> AdaptedClassifier:
        """The classifiers of T tasks as plain tensors, to be used without this package.

        Args:
            support, support_labels: as in a call.
            query: as in a call; a learner that is not `transductive` needs none.
            ragged: tasks of unequal size.

        Returns:
            weight [T, N, D] and bias [T, N]; ``export(path)`` writes one task's as ONNX. A linear classifier (ANIL,
            ridge, linear programs) gives any row the logits ``x weight^T + bias``; a cosine classifier
            ``scale (bias + cos(x, weight))`` with the learner's own scale and bias, so that the largest cosine is the
            answer. Where the learner transforms features, x is the row transformed, minus the mean of these query rows
            with ``center="task"``; what is exported does that itself.

        Raises:
            ValueError, TypeError: what does not fit, named; no query rows for a learner that needs them.
        """
        check_tensors(support=support, support_labels=support_labels)
        if query is None:
            if self.transductive:
                raise ValueError(f"query: {type(self).__name__} refines its classifier on the query rows; give them")
            if ragged is None:
                query = support[..., :1, :]
            else:
                query = support
                ragged = ragged._replace(query_offsets=ragged.support_offsets, max_query=ragged.max_support)
        results = self(support, support_labels, query, return_weights=True, ragged=ragged)
        transform = self.feature_transform
        means = None if transform is None else transform.query_means(support, query, ragged)
        return AdaptedClassifier.of(results[1], self, None if ragged is None else ragged.n_ways, means)

    @abstractmethod
    def _adapt(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        *,
        return_weights: bool = False,
        support_index: Tensor | None = None,
        query_index: Tensor | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor | tuple[Tensor, Classifier]:
        """Logits, and classifiers if asked for; with indices the features are banks."""

    if TYPE_CHECKING:
        # nn.Module's own says that it returns anything.
        @overload
        def __call__(
            self, support: Tensor, support_labels: Tensor, query: Tensor, return_weights: Literal[False] = ...,
            *, ragged: Ragged | None = ...,
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, support: Tensor, support_labels: Tensor, query: Tensor, return_weights: Literal[True],
            *, ragged: Ragged | None = ...,
        ) -> tuple[Tensor, Classifier]: ...  # fmt: skip
        @overload
        def __call__(
            self, support: Tensor, support_labels: Tensor, query: Tensor, return_weights: bool,
            *, ragged: Ragged | None = ...,
        ) -> Tensor | tuple[Tensor, Classifier]: ...  # fmt: skip
        def __call__(self, *args: object, **options: object) -> object: ...


def check_tensors(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_even(learner: nn.Module, ragged: Ragged | None) -> None:
    """Raise for a learner that takes tasks of equal size only."""
    if ragged is not None:
        raise ValueError(
            f"ragged: {type(learner).__name__} takes tasks of equal size; a kernelmeta.nn.Program takes unequal ones"
        )
