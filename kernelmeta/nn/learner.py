"""What all learners share: how they are called."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from kernelmeta.adapted_classifier import AdaptedClassifier, CosineTerms
from kernelmeta.nn.pretrained import Pretrained
from kernelmeta.tasks import Classifier, Ragged


class Learner(Pretrained, ABC):
    """A module that makes a classifier for each of T tasks, and classifies the tasks' query rows with it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # torch.compile counts by code what it has compiled, and stops at eight: every class has code of its own.
        shared = Learner.forward
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
        check_tensors(support=support, support_labels=support_labels, query=query)
        return self._adapt(support, support_labels, query, return_weights=return_weights, ragged=ragged)

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
        check_tensors(bank=bank, support_index=support_index, support_labels=support_labels, query_index=query_index)
        logits = self._adapt(
            bank, support_labels, bank, support_index=support_index, query_index=query_index, ragged=ragged
        )
        assert isinstance(logits, Tensor)
        return logits

    takes_ragged = True
    """Whether tasks of unequal size may be given in one call."""

    @property
    def transductive(self) -> bool:
        """Whether the query rows have a part in the classifier: then a row's answer depends on the rows beside it."""
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
            answer.

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
        return AdaptedClassifier.of(results[1], self, None if ragged is None else ragged.n_ways)

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
