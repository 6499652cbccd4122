"""Ridge regression as a learner."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernelmeta import ops
from kernelmeta.nn.learner import Learner
from kernelmeta.reference.task_rows import gathered
from kernelmeta.tasks import Classifier, Ragged


class RidgeHead(Learner):
    """A ridge regression of the labels for each task, in closed form (R2-D2, Bertinetto et al. 2019).

    Args:
        n_way: N; of the task that has most, where they differ.
        n_features: D; taken so that learners are built alike, nothing depends on it.
        regularization: starting value of lambda, above 0.
        scale: starting value of the scale of the logits.
        transform, center: of the features, see :class:`Learner`.

    Parameters: ``log_regularization`` [1] (so that lambda stays positive), ``scale`` [1], ``bias`` [1].

    Raises:
        ValueError: a size below 1, or a regularization that is not positive.
    """

    def __init__(
        self,
        n_way: int,
        n_features: int | None = None,
        regularization: float = 1.0,
        scale: float = 10.0,
        *,
        transform: str = "none",
        center: str = "none",
    ) -> None:
        super().__init__(transform, center, n_features)
        if n_way < 1 or (n_features is not None and n_features < 1):
            raise ValueError(f"n_way and n_features: expected at least 1, got {n_way} and {n_features}")
        if not 0 < regularization < math.inf:
            raise ValueError(f"regularization: expected a positive number, got {regularization}")
        self.n_way, self.n_features = n_way, n_features
        self.log_regularization = nn.Parameter(torch.tensor([math.log(regularization)]))
        self.scale = nn.Parameter(torch.tensor([float(scale)]))
        self.bias = nn.Parameter(torch.zeros(1))

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
        logits, alpha = ops.ridge(
            support, support_labels, query, self.log_regularization.exp(), self.scale, self.bias, n_way=self.n_way,
            return_coefficients=True, support_index=support_index, query_index=query_index, ragged=ragged,
        )  # fmt: skip
        if not return_weights:
            return logits
        # The scale is multiplied in.
        rows = gathered(support, support_index, "support").to(alpha.dtype)
        alpha = self.scale * alpha
        if ragged is None:
            weight = alpha.transpose(-1, -2) @ rows
        else:
            task = torch.arange(len(alpha), device=alpha.device)[:, None] >= ragged.support_offsets[1:]
            task = task.sum(1)
            products = alpha.unsqueeze(-1) * rows.unsqueeze(-2)  # [all support rows, N, D]
            T = len(ragged.support_offsets) - 1
            weight = products.new_zeros(T, *products.shape[1:]).index_add(0, task, products)
        return logits, Classifier(weight, self.bias.to(weight.dtype).expand(weight.shape[:2]))

    @property
    def takes_any_ways(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return f"n_way={self.n_way}, n_features={self.n_features}"
