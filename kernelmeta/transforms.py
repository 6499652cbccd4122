"""What is done to features before a learner sees them: a power, a centre, length 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernelmeta.reference.norms import unit
from kernelmeta.tasks import Ragged

CENTERS = ("none", "task", "train")


def parse_power(text: str) -> float | None:
    """ "none" -> None, "power:0.5" -> 0.5. Raises ValueError."""
    if text == "none":
        return None
    name, _, value = text.partition(":") if isinstance(text, str) else ("", "", "")
    try:
        power = float(value)
    except ValueError:
        power = -1.0
    if name != "power" or not 0 < power <= 1:
        raise ValueError(f"transform: expected 'none' or 'power:P' with 0 < P <= 1, got {text!r}")
    return power


def check_center(center: str) -> None:
    """Raises ValueError."""
    if center not in CENTERS:
        raise ValueError(f"center: expected one of {', '.join(CENTERS)}, got {center!r}")


def power_transform(rows: Tensor, power: float) -> Tensor:
    """``sign(x) (|x| + 1e-6)^power``, element by element (Hu, Gripon and Pateux 2020, eq. 1, for features that may be
    negative too).

    Args:
        rows: [..., D].
        power: 0.5 takes square roots.
    """
    return rows.sign() * (rows.abs() + 1e-6) ** power


def transformed(
    rows: Tensor, power: float | None = None, train_mean: Tensor | None = None, task_mean: Tensor | None = None
) -> Tensor:
    """Rows [..., D] after the power, minus the mean of training rows, of length 1, and minus the mean of their task's
    rows, of length 1 again; without what is None.
    """
    if power is not None:
        rows = power_transform(rows, power)
    if train_mean is not None:
        rows = rows - train_mean
    rows = unit(rows)
    return rows if task_mean is None else unit(rows - task_mean)


@dataclass(frozen=True)
class Transform:
    """Features as a learner gets them; rows of length 1 come out, but those that were 0.

    Args:
        transform: "none", or "power:P", see `power_transform`.
        center: "none"; "task", which divides rows by their length, takes the mean of a task's support rows from these
            and that of its query rows from those (PT-MAP: Hu, Gripon and Pateux 2020, section 3.2), and supposes that
            both have their classes in equal proportions; "train", which takes ``mean`` from all (SimpleShot: Wang et
            al. 2019, "CL2N").
        mean: [D], for "train": of training rows after the power, see `of_training`.

    Raises:
        ValueError: none of these; "train" without a mean.
    """

    transform: str = "none"
    center: str = "none"
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        parse_power(self.transform)
        check_center(self.center)
        if self.center == "train" and self.mean is None:
            raise ValueError("center: 'train' needs the mean of training rows, see Transform.of_training")

    @staticmethod
    def of_training(rows: Tensor, transform: str = "none", center: str = "none") -> Transform:
        """The transform whose mean is that of these rows.

        Args:
            rows: [n, D], of the training classes.
            transform, center: as above.

        Raises:
            ValueError: as above.
        """
        if center != "train":
            return Transform(transform, center)
        power = parse_power(transform)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return Transform(transform, center, (rows if power is None else power_transform(rows, power)).mean(0))

    def __call__(self, support: Tensor, query: Tensor, ragged: Ragged | None = None) -> tuple[Tensor, Tensor]:
        """The rows of T tasks, transformed; in float32 at least.

        Args:
            support: [T, S, D], or [all support rows, D].
            query: [T, Q, D], or [all query rows, D].
            ragged: tasks of unequal size.
        """
        both = self._alone(support, query)
        if self.center == "task":
            offsets = (None, None) if ragged is None else (ragged.support_offsets, ragged.query_offsets)
            both = tuple(unit(r - _of_rows(r, *_means(r, of))) for r, of in zip(both, offsets, strict=True))
        return both[0], both[1]

    def query_means(self, support: Tensor, query: Tensor, ragged: Ragged | None = None) -> Tensor | None:
        """What ``center="task"`` takes from the query rows of each task, [T, D]; None for any other centre.

        Args:
            support, query, ragged: as in a call.
        """
        if self.center != "task":
            return None
        return _means(self._alone(support, query)[1], None if ragged is None else ragged.query_offsets)[0]

    def _alone(self, support: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        """What is done to each row alone."""
        dtype = torch.promote_types(torch.promote_types(support.dtype, query.dtype), torch.float32)
        mean = None if self.mean is None or self.center != "train" else self.mean.to(support.device, dtype)
        return tuple(transformed(rows.to(dtype), parse_power(self.transform), mean) for rows in (support, query))


def _means(rows: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The means [T, D] of the rows of tasks; for rows [all rows, D] with the task of each, [all rows]."""
    if offsets is None:
        return rows.mean(-2), None
    T = offsets.shape[0] - 1
    # (offsets that don't fit the rows are named by the op that gets them next)
    task = torch.searchsorted(offsets, torch.arange(rows.shape[0], device=rows.device), right=True) - 1
    task = task.clamp(0, max(T - 1, 0))
    counts = offsets.diff().clamp_min(1).to(rows.dtype).unsqueeze(-1)
    return rows.new_zeros(T, rows.shape[-1]).index_add(0, task, rows) / counts, task


def _of_rows(rows: Tensor, means: Tensor, task: Tensor | None) -> Tensor:
    return means.unsqueeze(-2) if task is None else means[task]
