"""The shares of the query rows that classes have: what is checked of them, and who is told where they are not met."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kernelmeta.backends import holds_numbers
from kernelmeta.ops import _checks
from kernelmeta.phases import Phase
from kernelmeta.tasks import Ragged

# How far from 1 a sum may be, which shares are divided by: rounding, of the narrow types.
_OFF = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
_OFF_OTHERWISE = 1e-4


def checked(
    proportions: Tensor | None,
    bag_offsets: Tensor | None,
    phases: Sequence[Phase],
    query: Tensor,
    ragged: Ragged | None,
    T: int,
    N: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Proportions [T, B, N] whose sums are 1, and offsets [T, B + 1], as the raw op takes them.

    Where nobody can look at the numbers, on a GPU, those of a bag that cannot be used are NaN.
    """
    marginals = {p.marginals for p in phases}
    if ("given" in marginals) != (proportions is not None):
        raise ValueError(
            "proportions: phases with marginals='given' need them"
            if proportions is None
            else "proportions: there is no phase with marginals='given'"
        )
    B = 1
    if bag_offsets is not None:
        if marginals <= {"none"}:
            raise ValueError("bag_offsets: there is no phase with marginals")
        _checks.integers("bag_offsets", bag_offsets, query)
        if bag_offsets.dim() == 1:
            bag_offsets = bag_offsets.expand(T, -1)
        B = bag_offsets.shape[-1] - 1
        if bag_offsets.shape != (T, B + 1) or B < 1:
            raise ValueError(
                f"bag_offsets: expected shape [T, B + 1] with T={T} or [B + 1], got {_checks.shape_text(bag_offsets)}"
            )
    if proportions is None:
        return None, bag_offsets
    if proportions.dim() == 2 and bag_offsets is None:
        proportions = proportions.unsqueeze(1)
    if proportions.shape != (T, B, N):
        meaning = "[T, N]" if bag_offsets is None else "[T, B, N]"
        expected = [T, N] if bag_offsets is None else [T, B, N]
        raise ValueError(f"proportions: expected shape {meaning} = {expected}, got {_checks.shape_text(proportions)}")
    own: Tensor | None = None
    if ragged is not None and ragged.n_ways is not None:
        own = torch.arange(N, device=proportions.device) < ragged.n_ways.view(-1, 1, 1)
    return _summing_to_one(proportions, own), bag_offsets


def _summing_to_one(p: Tensor, own: Tensor | None) -> Tensor:
    """``own`` [T, 1, N]: which ways a task has; None: all."""
    off, p = (
        _OFF.get(p.dtype, _OFF_OTHERWISE),
        p.double(),
    )  # rounded sums of a narrower type would not be 1 in a wider one
    given, p = p, p if own is None else p.masked_fill(~own, 0)
    sums = p.sum(-1, keepdim=True)
    wrong = ~((sums - 1).abs() <= off) | (p < 0).any(-1, keepdim=True)
    if own is not None:
        wrong = wrong | ((given != 0) & ~own).any(-1, keepdim=True)
    if not holds_numbers(p) or p.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return (p / sums).masked_fill(wrong, float("nan"))
    if wrong.any():
        task, bag, _ = wrong.nonzero()[0].tolist()
        values = ", ".join(f"{x:.6g}" for x in given[task, bag].tolist())
        where = f"task {task}" if p.shape[1] == 1 else f"task {task}, bag {bag}"
        raise ValueError(
            f"proportions: {where}: expected numbers from 0 that sum to 1 over the task's own classes, got {values}"
        )
    return p / sums


def warn_of_missed(logits: Tensor, ragged: Ragged | None) -> None:
    """Name the tasks that came out as NaN."""
    if logits.device.type != "cpu" or not holds_numbers(logits) or torch._C._are_functorch_transforms_active():
        return
    rows = logits.isnan().any(-1)
    if not rows.any():
        return
    if ragged is None:
        tasks = rows.any(-1).nonzero()[:, 0]
    else:
        tasks = torch.searchsorted(ragged.query_offsets, rows.nonzero()[:, 0], right=True).unique() - 1
    warnings.warn(
        "the classes' shares of the query rows were not met, or rows are not finite: NaN in task "
        + ", ".join(map(str, tasks[:10].tolist())),
        UserWarning,
        stacklevel=3,
    )
