"""ANIL: a linear head shared by all tasks, adapted by gradient steps on the support rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from kernelmeta import ops
from kernelmeta.nn.kept import KeptNumbers
from kernelmeta.nn.program import Program
from kernelmeta.nn.training_step import TrainsAtOnce
from kernelmeta.phases import Phase
from kernelmeta.tasks import Classifier, Ragged


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
        transform, center: of the features, see :class:`Learner`.

    Parameters: ``weight`` [N, D], ``bias`` [N], and with ``learn_rates`` one ``rates`` [K].

    Raises:
        ValueError: an argument out of its range, named.
    """

    weight: nn.Parameter
    bias: nn.Parameter

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
        transform: str = "none",
        center: str = "none",
    ) -> None:
        if oracle not in ("cross_entropy", "hinge"):
            raise ValueError(f"oracle: expected cross_entropy or hinge, got {oracle!r}")
        phase = Phase(oracle, steps, inner_lr, learn_rates=learn_rates)
        super().__init__(
            n_way, n_features, [phase], classifier="linear", start="learned", transform=transform, center=center
        )
        self.steps, self.first_order, self.learn_rates = steps, first_order, learn_rates
        self._constant_rates = KeptNumbers()

    def _adapt(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        *,
        return_weights: bool = False,
        ragged: Ragged | None = None,
        **index: Any,
    ) -> Tensor | tuple[Tensor, Classifier]:
        if ragged is not None:
            return super()._adapt(support, support_labels, query, return_weights=return_weights, ragged=ragged, **index)
        bias, rates = self._learned(support_labels)
        return ops.linear_head(
            support, support_labels, query, self.weight, bias, rates, oracle=self.phases[0].oracle,
            first_order=self.first_order, return_weights=return_weights, **index,
        )  # fmt: skip

    def _trained(self) -> Sequence[Tensor]:
        return (self.weight, self.bias, *self.rates)

    def _gradients(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, **index: Any
    ) -> tuple[ops.HeadGradients, Sequence[Tensor]]:
        bias, rates = self._learned(support_labels)
        results = ops.linear_head_gradients(
            support, support_labels, query, query_labels, self.weight, bias, rates, oracle=self.phases[0].oracle,
            first_order=self.first_order, **index,
        )  # fmt: skip
        *of_head, of_rates = results.gradients
        return results, (*of_head, *(pad(of_rates, (0, len(own) - len(of_rates))) for own in self.rates))

    def _learned(self, support_labels: Tensor) -> tuple[Tensor, Tensor]:
        """The head's bias, and the rates of the steps."""
        S = support_labels.shape[-1]
        if self.n_way > S:  # the op itself takes classes without a row; programs do not
            raise ValueError(
                f"support: task 0 has {self.n_way} ways and {S} support rows; every class needs at least one"
            )
        bias = self.bias
        if not self.learn_rates:
            return bias, self._constant_rates((self.phases[0].lr,) * self.steps, bias)
        rates = self.rates[0]
        return bias, rates if rates.shape[0] == self.steps else rates[: self.steps]
