"""Flip rates as a metric of `torchmetrics <https://lightning.ai/docs/torchmetrics>`_, which an extra installs:
``pip install kernelmeta[metrics]``. Imported by name alone: ``from kernelmeta.graceful.metrics import FlipRates``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelmeta.ops import _checks
from kernelmeta.reference.focal_distillation import rows_right
from kernelmeta.reference.task_rows import as_labels

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "kernelmeta.graceful.metrics needs torchmetrics, which is not installed: pip install 'kernelmeta[metrics]' "
        "(kernelmeta.graceful.flips gives the same rates without it)"
    ) from error


class FlipRates(Metric):
    """The rates of `Flips`, added up over batches and processes.

    ``update(new_logits, old_logits, labels)`` takes logits [..., C] and labels [...]; ``compute()`` gives a dictionary
    of float64 [] tensors: ``negative, positive, relative_negative, negative_impact, error_old, error_new``.

    Args:
        ignore_index: rows with this label are left out.
    """

    full_state_update = False
    higher_is_better = False
    negative: Tensor
    positive: Tensor
    old_wrong: Tensor
    new_wrong: Tensor
    rows: Tensor

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        for name in ("negative", "positive", "old_wrong", "new_wrong", "rows"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, new_logits: Tensor, old_logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            new_logits: [..., C].
            old_logits: the same of the old classifier.
            labels: int64, one for each row, or ``ignore_index``.

        Raises:
            ValueError: shapes that do not fit.
        """
        labels = as_labels(labels)
        _checks.tensors(new_logits=new_logits, old_logits=old_logits)
        _checks.shape("old_logits", old_logits, tuple(new_logits.shape), "new_logits.shape")
        _checks.labels("labels", labels, tuple(new_logits.shape[:-1]), new_logits, "new_logits.shape[:-1]")
        counted = labels != self.ignore_index
        new, old = rows_right(new_logits, labels), rows_right(old_logits, labels)
        self.negative += (counted & old & ~new).sum()
        self.positive += (counted & new & ~old).sum()
        self.old_wrong += (counted & ~old).sum()
        self.new_wrong += (counted & ~new).sum()
        self.rows += counted.sum()

    def compute(self) -> dict[str, Tensor]:
        """The rates over all batches; NaN where there is nothing to divide by."""
        negative, positive, error_old, error_new = (
            t.double() / self.rows for t in (self.negative, self.positive, self.old_wrong, self.new_wrong)
        )
        return {
            "negative": negative,
            "positive": positive,
            "relative_negative": negative / ((1 - error_old) * error_new),
            "negative_impact": negative / error_new,
            "error_old": error_old,
            "error_new": error_new,
        }
