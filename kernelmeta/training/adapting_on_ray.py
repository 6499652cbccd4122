"""``kernelmeta adapt`` on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kernelmeta.data.task_tables import Piece
from kernelmeta.data.words import one_line
from kernelmeta.training.adapting import Adapter, Job


def on_ray(job: Job, pieces: list[Piece]) -> Iterator[Piece]:
    """Answers pieces on the cluster at ``RAY_ADDRESS``, or on one that is started here; all must see the same files.

    A worker that is lost is replaced, and what it was at is done again.

    Raises:
        ImportError: Ray is missing.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray Data: pip install 'kernelmeta[ray]' ({one_line(error)})") from None
    if not pieces:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    numbers = [{"file": p.file, "group": p.group, "first": p.first, "n": p.n} for p in pieces]
    data = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _Worker, fn_constructor_args=(job,), batch_size=1, concurrency=min(workers, len(pieces))
    )
    for row in data.iter_rows():
        yield Piece(*(int(row[name]) for name in Piece._fields))


class _Worker:
    """One process of the cluster."""

    def __init__(self, job: Job) -> None:
        self._adapter = Adapter(job)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        pieces = [Piece(*map(int, row)) for row in zip(*(batch[name] for name in Piece._fields), strict=True)]
        for _ in self._adapter.run(pieces):
            pass
        return batch
