"""Whatever a file holds, reading it gives what it should hold or one line that says what is wrong."""

# ruff: noqa: PT017 (what an error says is part of the case)

from __future__ import annotations

import functools
import io
import json
import pickle
from pathlib import Path

import numpy as np
import torch
from tests.fuzz.tensor_files import damaged
from tests.runs import make_bank

from kernelmeta.data import FeatureBank
from kernelmeta.data.files import read_json, read_weights
from kernelmeta.training import TrainConfig, Trainer
from kernelmeta.training.checkpoint import Checkpoint
from kernelmeta.training.loading import load_learner

NAMES = ("file", "file.safetensors", "file.pth", "file.json", "file.npy")
READERS = {
    "bank": FeatureBank.load,
    "checkpoint": functools.partial(Checkpoint.load, kind="train"),
    "learner": load_learner,
    "weights": read_weights,
    "JSON": read_json,
}


class Harm:
    """A pickle that leaves a mark if it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@functools.cache
def genuine() -> list[bytes]:
    """A bank, a checkpoint, a file of torch.save, JSON, a NumPy array."""
    import tempfile

    files = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bank = make_bank(samples=8, D=4)
        bank.save(folder / "bank")
        trainer = Trainer(TrainConfig(way=2, query=2, data="a test", hidden=3), bank)
        trainer._run_block(2)
        trainer.checkpoint().save(folder / "checkpoint")
        torch.save({"weight": torch.zeros(3), "more": [1, "x"]}, folder / "weights")
        files = [(folder / name).read_bytes() for name in ("bank", "checkpoint", "weights")]
    array = io.BytesIO()
    np.save(array, np.zeros((3, 4)))
    return [*files, json.dumps({"a": [1, 2.5, "x", None]}).encode(), array.getvalue()]


def content(random: np.random.Generator, mark: Path) -> bytes:
    kind = random.integers(0, 8)
    whole = genuine()[int(random.integers(len(genuine())))]
    if kind == 0:
        return random.bytes(int(random.integers(0, 300)))
    if kind == 1:
        return pickle.dumps(Harm(mark), protocol=int(random.integers(0, 6)))
    if kind == 2:
        saved = io.BytesIO()
        torch.save({"SIB": Harm(mark), "weight": torch.zeros(2)}, saved)
        return saved.getvalue()
    if kind == 3:
        return random.choice([b"[", b'{"a":', b"((", b"1e400", b"NaN", b"\xef\xbb\xbf{}", b"9"]) * int(
            random.integers(1, 9999)
        )
    if kind == 4:  # a header that says anything
        header = json.dumps({"__metadata__": {"format": "kernelmeta-bank-1"}, "features": {
            "dtype": str(random.choice(["F32", "F99", "I64"])), "shape": [int(random.integers(-2, 2**40)), 3],
            "data_offsets": [0, int(random.integers(0, 2**62))]}}).encode()  # fmt: skip
        return len(header).to_bytes(8, "little") + header + random.bytes(12)
    for _ in range(int(random.integers(0, 4))):
        whole = damaged(random, whole) or b"x"
    return whole


def check(random: np.random.Generator, folder: Path) -> None:
    path, mark = folder / str(random.choice(NAMES)), folder / "harm"
    path.write_bytes(content(random, mark))
    for name, read in READERS.items():
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), (name, path.name, path.read_bytes()[:200], error)
            assert str(path) in str(error), (name, path.name, path.read_bytes()[:200], error)
        assert not mark.exists(), (name, path.name, "a pickle was run")
