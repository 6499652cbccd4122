"""The little that splitting tasks over processes takes (torchrun; gloo on the CPU, NCCL on GPUs)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run. A run of one process needs nothing of torch.distributed."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, n: int) -> tuple[int, int]:
        """First and number of the ``n`` tasks of a step that fall to this process.

        Raises:
            ValueError: they cannot be split evenly.
        """
        if n % self.size:
            raise ValueError(f"tasks_per_step: expected a multiple of the {self.size} processes, got {n}")
        return self.rank * (n // self.size), n // self.size

    def average(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: list[Any]) -> list[Any]:
        """The items of all processes: one of the first, one of the second, and so on, in turn.

        Each has those of ``[rank::size]`` of one list.
        """
        if self.size == 1:
            return value
        of_all: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(of_all, value)
        return [of_all[i % self.size][i // self.size] for i in range(sum(map(len, of_all)))]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started; one process where it started none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
