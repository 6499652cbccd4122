"""What is done to features before a method sees them: a power, a centre, length 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernelmeta.reference.norms import unit
from kernelmeta.reference.task_rows import each_task
from kernelmeta.tasks import Ragged

CENTERS = ("none", "task", "train")


def parse_power(text: str) -> float | None:
    """ "none" -> None, "power:0.5" -> 0.5. Raises ValueError."""
    if text == "none":
        return None
    name, _, value = text.partition(":")
    try:
        power = float(value)
    except ValueError:
        power = -1.0
    if name != "power" or not 0 < power <= 1:
        raise ValueError(f"transform: expected 'none' or 'power:P' with 0 < P <= 1, got {text!r}")
    return power


def power_transform(rows: Tensor, power: float) -> Tensor:
    """``sign(x) (|x| + 1e-6)^power``, element by element (Hu, Gripon and Pateux 2020, eq. 1, for features that may be
    negative too).

    Args:
        rows: [..., D].
        power: 0.5 takes square roots.
    """
    return rows.sign() * (rows.abs() + 1e-6) ** power


@dataclass(frozen=True)
class Transform:
    """Features as a method gets them; rows of length 1 come out, but those that were 0.

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
        if not isinstance(self.transform, str):
            raise ValueError(f"transform: expected 'none' or 'power:P', got {self.transform!r}")
        parse_power(self.transform)
        if self.center not in CENTERS:
            raise ValueError(f"center: expected one of {', '.join(CENTERS)}, got {self.center!r}")
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
        """The rows of T tasks, transformed.

        Args:
            support: [T, S, D], or [all support rows, D].
            query: [T, Q, D], or [all query rows, D].
            ragged: tasks of unequal size.

        Raises:
            ValueError: a task without a query row.
        """
        power = parse_power(self.transform)
        dtype = torch.promote_types(torch.promote_types(support.dtype, query.dtype), torch.float32)
        both = [rows.to(dtype) for rows in (support, query)]
        if power is not None:
            both = [power_transform(rows, power) for rows in both]
        if self.center == "train":
            assert self.mean is not None
            mean = self.mean.to(both[0])
            both = [rows - mean for rows in both]
        both = [unit(rows) for rows in both]
        if self.center == "task":
            if ragged is None:
                both = [unit(rows - rows.mean(-2, keepdim=True)) for rows in both]
            else:
                parts = [both[0][:0]], [both[1][:0]]
                for *slices, _ in each_task(ragged, 1):
                    for rows, own, done in zip(both, slices, parts, strict=True):
                        done.append(unit(rows[own] - rows[own].mean(-2, keepdim=True)))
                both = [torch.cat(done) for done in parts]
        return both[0], both[1]
