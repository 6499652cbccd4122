"""Other programs' files, whole and damaged, become a bank with the rows that were written, or one line that says why
not."""

# ruff: noqa: PT017 (what an error says is part of the case)

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tests.fuzz.tensor_files import damaged, text

from kernelmeta.data.importing import import_bank


def written(random: np.random.Generator, X: np.ndarray, y: list[str], suffix: str) -> bytes:
    stream = io.BytesIO()
    if suffix == ".npz":
        np.savez(stream, X=X, y=np.array(y))
    elif suffix == ".pt":
        torch.save({"X": torch.from_numpy(X), "y": torch.tensor([sorted(set(y)).index(name) for name in y])}, stream)
    elif suffix == ".safetensors":
        return save({"X": torch.from_numpy(X), "y": torch.tensor([sorted(set(y)).index(name) for name in y])})
    elif suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        lists = pa.array(X.tolist(), pa.list_(pa.float32()))
        columns = {f"x{i}": column for i, column in enumerate(X.T)} if random.random() < 0.5 else {"embedding": lists}
        parquet.write_table(pa.table({"label": y, **columns}), stream)
    else:
        lines = io.StringIO()
        writer = csv.writer(lines, delimiter=str(random.choice([",", ";", "\t"])))
        writer.writerow(["label", *(f"x{i}" for i in range(X.shape[1]))])
        writer.writerows([name, *row] for name, row in zip(y, X.tolist(), strict=True))
        return lines.getvalue().encode()
    return stream.getvalue()


def check(random: np.random.Generator, folder: Path) -> None:
    suffixes = [".npz", ".pt", ".safetensors", ".csv"]
    try:
        import pyarrow  # noqa: F401

        suffixes.append(".parquet")
    except ImportError:
        pass
    suffix = str(random.choice(suffixes))
    n, D, C = int(random.integers(3, 40)), int(random.integers(1, 6)), int(random.integers(3, 6))
    names = [f"c{i}" + "".join(ch for ch in text(random) if ch.isprintable() and ch not in '";,') for i in range(C)]
    y = [names[i % C].strip() for i in random.permutation(max(n, C))]
    X = random.normal(size=(len(y), D)).astype(np.float32)
    path, out = folder / f"rows{suffix}", folder / "bank.safetensors"
    whole = written(random, X, y, suffix)
    path.write_bytes(whole)
    bank = import_bank([path], out)
    assert torch.allclose(bank.features, torch.from_numpy(X), rtol=1e-6)
    order = {name: i for i, name in enumerate(sorted(set(y)))}
    assert bank.labels.tolist() == [order[name] for name in y]
    for _ in range(20):
        path.write_bytes(damaged(random, whole))
        out.unlink(missing_ok=True)
        try:
            import_bank([path], out)
        except (ValueError, OSError, MemoryError) as error:
            assert "\n" not in str(error).replace(str(path), ""), repr(error)
            assert not out.exists()
