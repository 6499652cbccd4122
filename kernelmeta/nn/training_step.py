"""What learners share whose training step is one launch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kernelmeta import ops
from kernelmeta.nn.learner import Learner


class TrainsAtOnce(Learner):
    """A learner that gives the mean cross entropy of the query rows and its gradients without autograd."""

    def gradients(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_labels: Tensor,
        *,
        support_index: Tensor | None = None,
        query_index: Tensor | None = None,
    ) -> ops.SIBGradients | ops.HeadGradients:
        """A training step's worth in one launch, outside of autograd.

        The mean cross entropy of the query rows, and its gradient in every parameter, which becomes its ``grad``
        (what was there is gone; hooks are not called). Then comes the optimizer's step.

        Args:
            support: [T, S, D]; or a bank [n, D], with ``support_index`` [T, S] int64.
            support_labels: [T, S] int64 in 0..N-1.
            query: [T, Q, D]; or a bank [n, D], with ``query_index`` [T, Q] int64.
            query_labels: [T, Q] int64 in 0..N-1.

        Returns:
            ``loss`` [], ``accuracy`` [], ``logits`` [T, Q, N] and ``gradients``, those of the op:
            :func:`kernelmeta.ops.sib_gradients`, :func:`kernelmeta.ops.linear_head_gradients`.

        Raises:
            ValueError, TypeError: as that op.
        """
        results, gradients = self._gradients(
            support, support_labels, query, query_labels, support_index=support_index, query_index=query_index
        )
        for parameter, gradient in gradients:
            if parameter.requires_grad:
                parameter.grad = gradient
        return results

    @abstractmethod
    def _gradients(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, **index: Any
    ) -> tuple[Any, Iterable[tuple[Tensor, Tensor]]]:
        """The op's results, and each parameter's gradient."""
