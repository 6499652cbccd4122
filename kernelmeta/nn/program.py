"""Learners as programs: a start, and phases of steps that refine it for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kernelmeta import ops
from kernelmeta.adapted_classifier import CosineTerms
from kernelmeta.nn.equivariant_gradient_mlp import EquivariantGradientMLP
from kernelmeta.nn.learner import Learner, check_tensors
from kernelmeta.nn.synthetic_gradient_mlp import SyntheticGradientMLP
from kernelmeta.ops.program_op import SCALED, check_combination
from kernelmeta.phases import Phase, parts_of
from kernelmeta.tasks import Classifier, Ragged

# Starts that come with each call: then a task needs no labelled row.
FROM_OUTSIDE = ("given", "mean_map")


class OfCall(TypedDict, total=False):
    """What a program's call takes by name."""

    ragged: Ragged | None
    start: Tensor | None
    proportions: Tensor | None
    bag_offsets: Tensor | None


class Program(Learner):
    """A classifier that starts alike for all tasks, or from their class means, and is refined by phases of steps.

    Args:
        n_way: N, the classes of a task; of the one that has most, where they differ.
        n_features: D.
        phases: what is done, in this order.
        classifier: "cosine", ``Z = scale (bias + cos(x, theta))``; "linear", ``Z = x theta^T + bias``, whose bias is
            adapted too; "dot", ``Z = x theta^T``; or "euclidean", ``Z = scale (x theta^T - |theta|^2 / 2)``.
        start: "class_means" (means of the normalised support rows, weighted), "learned" (one start for all tasks),
            "zero" (not cosine), "given" (with each call, from outside) or "mean_map" (from the means of bags of query
            rows whose proportions are given, :func:`kernelmeta.ops.mean_map`). With the last two a task needs no
            labelled row.
        norm_stats: whose statistics the BatchNorm of the MLP that guesses gradients uses: "task" (each task its own) or
            "running" (those in ``mlp.running_stats``, e.g. of a trained :class:`SIB`; a program does not update them).
        hidden: hidden units of the MLP; 8 N, or 16 of an equivariant gradient's, if None.
        reduction: "mean" or "sum" of the losses over a phase's rows; the mean of losses, and the sum of guessed
            gradients, as published, if None.
        scale: of a cosine or Euclidean classifier, the value that ``scale`` starts from.
        transform, center: of the features, see :class:`Learner`.

    Parameters, as far as the phases need them: ``weight`` ([D] for class means, [N, D] for a learned start),
    ``scale`` [1] (cosine, Euclidean), ``bias`` [1] (cosine) or [N] (linear), ``target_scale`` [1] (squared error),
    those of ``mlp`` (synthetic or equivariant gradient), and ``rates``, a list of one [steps] for each phase with
    ``learn_rates``.

    Raises:
        ValueError, TypeError: an argument that is not as above, or phases that cannot be combined, named.
    """

    weight: nn.Parameter | None
    scale: nn.Parameter | None
    bias: nn.Parameter | None
    target_scale: nn.Parameter | None

    def __init__(
        self,
        n_way: int,
        n_features: int,
        phases: Sequence[Phase],
        classifier: str = "cosine",
        start: str = "class_means",
        norm_stats: str = "task",
        hidden: int | None = None,
        reduction: str | None = None,
        scale: float = 10.0,
        *,
        transform: str = "none",
        center: str = "none",
    ) -> None:
        super().__init__(transform, center, n_features)
        if n_way < 1 or n_features < 1:
            raise ValueError(f"n_way and n_features: expected at least 1, got {n_way} and {n_features}")
        for phase in phases:
            if not isinstance(phase, Phase):
                raise TypeError(f"phases: expected kernelmeta.nn.Phase, got {type(phase).__name__}")
        check_combination(phases, classifier, "given" if start == "mean_map" else start, False)
        if norm_stats not in ("task", "running"):
            raise ValueError(f"norm_stats: expected one of task, running, got {norm_stats!r}")
        if reduction not in ("mean", "sum", None):
            raise ValueError(f"reduction: expected one of mean, sum, None, got {reduction!r}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale: expected a positive number, got {scale}")
        self.n_way, self.n_features, self.phases = n_way, n_features, tuple(phases)
        self.classifier, self.start, self.norm_stats, self.reduction = classifier, start, norm_stats, reduction
        self.first_order = False
        oracles = {p.oracle for p in parts_of(self.phases)}
        weight: Tensor | None = None
        if start == "class_means":
            weight = torch.ones(n_features)
        elif start == "learned":
            weight = nn.Linear(n_features, n_way).weight.detach().clone()
        target = torch.ones(1) if "squared_error" in oracles else None
        first_scale = torch.full((1,), float(scale)) if classifier in SCALED else None
        bias = {"cosine": torch.zeros(1), "linear": torch.zeros(n_way)}.get(classifier)
        for name, value in (("weight", weight), ("scale", first_scale), ("target_scale", target), ("bias", bias)):
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.mlp: SyntheticGradientMLP | EquivariantGradientMLP | None = None
        if "synthetic_gradient" in oracles:
            self.mlp = SyntheticGradientMLP(n_way, hidden, norm_stats)
        elif "equivariant_gradient" in oracles:
            self.mlp = EquivariantGradientMLP(16 if hidden is None else hidden, norm_stats)
        self.rates = nn.ParameterList(torch.full((p.steps,), float(p.lr)) for p in self.phases if p.learn_rates)

    def step_rates(self) -> Tensor | None:
        """The learning rate of each step of all phases, [K]; None where none is learned."""
        if not len(self.rates):
            return None
        if len(self.phases) == 1:
            rates: Tensor = self.rates[0]
            return rates
        learned = iter(self.rates)
        return torch.cat(
            [next(learned) if p.learn_rates else self.rates[0].new_full((p.steps,), p.lr) for p in self.phases]
        )

    def forward(
        self,
        support: Tensor | None,
        support_labels: Tensor | None,
        query: Tensor,
        return_weights: bool = False,
        *,
        ragged: Ragged | None = None,
        start: Tensor | None = None,
        proportions: Tensor | None = None,
        bag_offsets: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Classifier]:
        """Classify the query rows of T tasks.

        Args:
            support: [T, S, D]; every class needs at least one row, counts may differ. Where the start does not come
                from these rows, classes may have none; without any, ``support`` and ``support_labels`` are None.
            support_labels: [T, S] int64 in 0..N-1.
            query: [T, Q, D].
            return_weights: return the classifiers too.
            ragged: tasks of unequal size; then features are [all rows, D] and labels [all support rows].
            start: [T, N, D], or [N, D] for all tasks alike, of a program that starts from what it is given.
            proportions: [T, N], the shares of the query rows that the classes have, for phases with
                ``marginals="given"`` and the start "mean_map"; with bags [T, B, N].
            bag_offsets: [T, B + 1], or [B + 1] for all tasks alike: where the bags of the query rows begin and end.

        Returns:
            Logits [T, Q, N] or [all query rows, N]; with ``return_weights`` a pair of them and the `Classifier`.

        Raises:
            ValueError, TypeError: what does not fit, named.
        """
        if support is None and support_labels is None and self.start in FROM_OUTSIDE:
            check_tensors(query=query)
            rows = (query.shape[0], 0) if ragged is None else (0,)
            support = query.new_empty(*rows, query.shape[-1])
            support_labels = torch.empty(rows, dtype=torch.int64, device=query.device)
        of_call = {"start": start, "proportions": proportions, "bag_offsets": bag_offsets}
        return self._classify(
            support, support_labels, query, return_weights=return_weights, ragged=ragged,  # type: ignore[arg-type]
            **{name: value for name, value in of_call.items() if value is not None},
        )  # fmt: skip

    def _adapt(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        *,
        start: Tensor | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Classifier]:
        mlp = self.mlp
        return ops.program(
            support, support_labels, query, self.phases, n_way=self.n_way, rates=self.step_rates(),
            classifier=self.classifier, start=self._start(query, start, options),
            weight=self.weight if self.start == "class_means" else None, scale=self.scale, bias=self.bias,
            target_scale=self.target_scale, mlp=None if mlp is None else mlp.tensors(),
            running_stats=mlp.running_stats if mlp is not None and self.norm_stats == "running" else None,
            reduction=self.reduction, first_order=self.first_order, return_weights=return_weights, **options,
        )  # fmt: skip

    def _start(self, query: Tensor, given: Tensor | None, options: dict[str, Any]) -> str | Tensor:
        """Where a call starts from. Of its ``options``, those that the steps do not read are taken out."""
        if (given is not None) != (self.start == "given"):
            raise ValueError(
                "start: the program starts from what it is given; expected a tensor [T, N, D] or [N, D], got None"
                if given is None
                else f"start: expected None, since the program starts from {self.start!r}"
            )
        if self.start == "mean_map":
            proportions, bag_offsets = options.get("proportions"), options.get("bag_offsets")
            if proportions is None or bag_offsets is None:
                raise ValueError("start: 'mean_map' needs proportions and bag_offsets")
            check_tensors(proportions=proportions, bag_offsets=bag_offsets)
            given = ops.mean_map(query, proportions, bag_offsets, normalize=self.classifier == "cosine")
            if all(p.marginals != "given" for p in self.phases if p.steps):
                del options["proportions"], options["bag_offsets"]
        if given is None:
            return self.weight if self.weight is not None and self.start == "learned" else self.start
        check_tensors(start=given)
        ragged = options.get("ragged")
        T = query.shape[0] if ragged is None else ragged.support_offsets.shape[0] - 1
        return given.expand(T, -1, -1) if given.dim() == 2 else given

    def from_bank(
        self,
        bank: Tensor,
        support_index: Tensor,
        support_labels: Tensor,
        query_index: Tensor,
        *,
        ragged: Ragged | None = None,
        proportions: Tensor | None = None,
    ) -> Tensor:
        """As of every learner, with the ``proportions`` [T, N] of a call where phases need them."""
        told = {} if proportions is None else {"proportions": proportions}
        return self._from_bank(bank, support_index, support_labels, query_index, ragged=ragged, **told)

    @property
    def needs_proportions(self) -> bool:
        """Whether every call must tell the classes' shares of the query rows: some phase has ``marginals="given"``."""
        return any(part.marginals == "given" for part in parts_of(self.phases))

    @property
    def takes_any_ways(self) -> bool:
        return (
            self.classifier != "linear" and self.start != "learned" and not isinstance(self.mlp, SyntheticGradientMLP)
        )

    @property
    def cosine_terms(self) -> CosineTerms | None:
        return (self.scale, self.bias) if self.scale is not None and self.bias is not None else None

    if TYPE_CHECKING:
        # As `Learner` declares it, with what a program's forward takes besides.
        @overload
        def __call__(
            self, support: Tensor | None, support_labels: Tensor | None, query: Tensor,
            return_weights: Literal[False] = ..., **of_call: Unpack[OfCall],
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, support: Tensor | None, support_labels: Tensor | None, query: Tensor, return_weights: Literal[True],
            **of_call: Unpack[OfCall],
        ) -> tuple[Tensor, Classifier]: ...  # fmt: skip
        @overload
        def __call__(
            self, support: Tensor | None, support_labels: Tensor | None, query: Tensor, return_weights: bool,
            **of_call: Unpack[OfCall],
        ) -> Tensor | tuple[Tensor, Classifier]: ...  # fmt: skip
        def __call__(self, *args: object, **options: object) -> object: ...

    def extra_repr(self) -> str:
        return (
            f"n_way={self.n_way}, n_features={self.n_features}, classifier={self.classifier!r}, start={self.start!r}, "
            f"phases={list(self.phases)}"
        )
