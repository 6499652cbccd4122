"""ANIL: a linear head shared by all tasks, adapted by gradient steps on the support rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kernelmeta import ops
from kernelmeta.nn.program import Program
from kernelmeta.nn.training_step import TrainsAtOnce
from kernelmeta.reference.phases import Phase


class ANIL(TrainsAtOnce, Program):
    """MAML's inner loop on the head alone (Raghu et al. 2020): the mean loss of the labelled support rows.

    The meta-gradient is that of MAML (Finn et al. 2017): exact, through all steps. A :class:`Program` of one phase, on
    an op of its own where all tasks have equal sizes.

    Args:
        n_way: N.
        n_features: D.
        steps: K; may be lowered after training.
        inner_lr: of the steps; the first value of their rates where these are learned.
        first_order: steps are constants, as in first-order MAML: no gradient flows through them.
        learn_rates: learn one rate for each step (Meta-SGD's idea, Li et al. 2017).
        oracle: the loss: "cross_entropy" or "hinge".

    Parameters: ``weight`` [N, D], ``bias`` [N], and with ``learn_rates`` one ``rates`` [K].

    Raises:
        ValueError: an argument out of its range, named.
    """

    weight: nn.Parameter

    def __init__(
        self,
        n_way: int,
        n_features: int,
        steps: int = 5,
        inner_lr: float = 0.1,
        first_order: bool = False,
        learn_rates: bool = False,
        *,
        oracle: str = "cross_entropy",
    ) -> None:
        if oracle not in ("cross_entropy", "hinge"):
            raise ValueError(f"oracle: expected cross_entropy or hinge, got {oracle!r}")
        phase = Phase(oracle, steps, inner_lr, learn_rates=learn_rates)
        super().__init__(n_way, n_features, [phase], classifier="linear", start="learned")
        self.steps, self.first_order, self.learn_rates = steps, first_order, learn_rates
        self._kept_rates: Tensor | None = None

    def _constant_rates(self, bias: Tensor) -> Tensor:
        """inner_lr for each step, in the precision of the head; kept, since making it costs as much as a check."""
        kept = self._kept_rates
        if kept is None or kept.dtype is not bias.dtype or kept.device != bias.device:
            kept = torch.full((self.phases[0].steps,), self.phases[0].lr, dtype=bias.dtype, device=bias.device)
            if not torch.compiler.is_compiling():
                self._kept_rates = kept
        return kept

    def _adapt(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        *,
        return_weights: bool = False,
        support_offsets: Tensor | None = None,
        query_offsets: Tensor | None = None,
        n_ways: Tensor | None = None,
        max_support: int | None = None,
        max_query: int | None = None,
        **options: Any,
    ) -> Any:
        if support_offsets is not None:
            return super()._adapt(
                support, support_labels, query, return_weights=return_weights, support_offsets=support_offsets,
                query_offsets=query_offsets, n_ways=n_ways, max_support=max_support, max_query=max_query, **options,
            )  # fmt: skip
        if any(given is not None for given in (query_offsets, n_ways, max_support, max_query)):
            raise ValueError("query_offsets, n_ways, max_support and max_query: need support_offsets")
        bias, rates = self._learned(support_labels)
        results = ops.linear_head(
            support, support_labels, query, self.weight, bias, rates, oracle=self.phases[0].oracle,
            first_order=self.first_order, return_weights=return_weights, **options,
        )  # fmt: skip
        if not return_weights:
            return results
        logits, heads = results
        return logits, (heads[..., :-1], heads[..., -1])

    def _gradients(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, **index: Any
    ) -> tuple[ops.HeadGradients, list[tuple[Tensor, Tensor]]]:
        bias, rates = self._learned(support_labels)
        results = ops.linear_head_gradients(
            support, support_labels, query, query_labels, self.weight, bias, rates, oracle=self.phases[0].oracle,
            first_order=self.first_order, **index,
        )  # fmt: skip
        of_weight, of_bias, of_rates = results.gradients
        found: list[tuple[Tensor, Tensor]] = [(self.weight, of_weight), (self.bias, of_bias)]
        if self.learn_rates:
            own = self.rates[0]
            found.append((own, pad(of_rates, (0, len(own) - len(of_rates)))))
        return results, found

    def _learned(self, support_labels: Tensor) -> tuple[Tensor, Tensor]:
        """The head's bias, and the rates of the steps."""
        S = support_labels.shape[-1]
        if self.n_way > S:  # the op itself takes classes without a row; programs do not
            raise ValueError(
                f"support: task 0 has {self.n_way} ways and {S} support rows; every class needs at least one"
            )
        bias = self.bias
        rates = self.rates[0] if self.learn_rates else self._constant_rates(bias)
        return bias, rates if rates.shape[0] == self.steps else rates[: self.steps]
