"""Images to a feature bank."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernelmeta.data import FeatureBank
from kernelmeta.data.images import BACKBONE_SPLIT, LabelledImages, batches
from kernelmeta.data.tensor_files import bytes_of, read_metadata, read_tensors, write_tensors
from kernelmeta.data.words import listing
from kernelmeta.ranks import Ranks
from kernelmeta.training.foreign_backbones import Prepare

# Images a file, where features are kept as they come.
PER_PART = 256


@torch.no_grad()
def extract(
    images: LabelledImages,
    backbone: torch.nn.Module,
    source: str,
    *,
    device: str = "cpu",
    name: str = "",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 128,
    workers: int = 0,
    progress: bool = False,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda line: None,
    prepare: Prepare | None = None,
    parts: Path | None = None,
    processes: Ranks | None = None,
) -> FeatureBank:
    """Features of every image whose class is not kept for the backbone.

    Args:
        backbone: [B, channels, H, H] -> [B, D]; set to eval mode.
        source: the bank's free text.
        name: what the backbone is called; the bank then says whose features it holds.
        dtype: of the features kept; bfloat16 and float16 are also what the backbone computes in (autocast).
        prepare: from an image to the backbone's input; without, as the set of images does it.
        parts: a folder for features as they come. After a kill, a call with the same arguments goes on from there.
        processes: that share the images out, each of which gets the whole bank; they need ``parts``, the same folder.
        skip_bad: go on without images that cannot be read, and those whose features are not finite.
        say: takes lines about what was left out.

    Raises:
        ValueError: images cannot be read, or their features are NaN or infinite; all are named. No class is left.
    """
    ranks = processes or Ranks()
    if ranks.size > 1 and parts is None:
        raise ValueError("parts: several processes need a folder for what each of them does")
    images.check(skip_bad=skip_bad, workers=workers, progress=progress, processes=ranks)
    for note in images.notes:
        say(note)
    backbone.eval().to(device)
    kept = (images.class_split != BACKBONE_SPLIT).nonzero().flatten()
    new_label = torch.full((len(images.class_split),), -1).index_copy(0, kept, torch.arange(len(kept)))
    labels = new_label[images.labels]
    rows = (labels >= 0).nonzero().flatten().tolist()
    if not rows:
        raise ValueError(f"{images.source}: every class is kept for the backbone; none is left for the bank")

    def features_of(chosen: Sequence[int]) -> Iterator[Tensor]:
        precision = dtype if dtype in (torch.bfloat16, torch.float16) else None
        for pixels, _ in batches(images, chosen, batch_size, workers=workers, prepare=prepare):
            with torch.autocast(torch.device(device).type, precision, enabled=precision is not None):
                found = backbone(pixels.to(device))
            if found.ndim != 2 or len(found) != len(pixels):
                raise ValueError(
                    f"backbone: expected [{len(pixels)}, D] of {len(pixels)} images, got {list(found.shape)}"
                )
            bar.update(len(pixels))
            yield found.to(dtype).cpu()

    with tqdm(total=len(rows), desc="extract", unit="image", disable=not progress) as bar:
        if parts is None:
            features = torch.cat(list(features_of(rows)))
        else:
            checksum = _checksum([torch.tensor(rows), *backbone.state_dict().values()])
            key = f"{source} {dtype} {images.fingerprint()} {checksum}"
            features = _by_parts(parts, key, rows, features_of, ranks, bar, say)
    bank = FeatureBank(
        features,
        labels[rows],
        images.class_split[kept],
        tuple(images.class_names[c] for c in kept.tolist()),
        source,
        backbone=f"{name} {_checksum([*backbone.state_dict().values()]):08x}" if name else "",
    )
    bad = bank.non_finite_rows()
    if not len(bad):
        return bank
    named = [
        f"row {row} ({images.name(rows[row])}, class {bank.class_names[bank.labels[row]]!r})" for row in bad.tolist()
    ]
    text = f"features of {len(named)} of {len(rows)} images are NaN or infinite in {str(dtype).partition('.')[2]}"
    text = f"{images.source}: {text}: {listing(named)}"
    if not skip_bad:
        raise ValueError(f"{text}; --skip-bad goes on without")
    say(f"left out: {text}")
    return bank.without_rows(bad)


def _by_parts(
    folder: Path,
    key: str,
    rows: list[int],
    features_of: Callable[[list[int]], Iterator[Tensor]],
    ranks: Ranks,
    bar: Any,
    say: Callable[[str], None],
) -> Tensor:
    """The features of all rows, from the files of a folder; those of them that are this process' and aren't there yet
    are made.
    """
    files = [folder / f"part-{i:06d}.safetensors" for i in range(-(-len(rows) // PER_PART))]
    there = [_holds(file, key) for file in files]
    if any(there):
        say(f"going on: {min(PER_PART * sum(there), len(rows))} of {len(rows)} images were done before")
    for i, file in list(enumerate(files))[ranks.rank :: ranks.size]:
        chosen = rows[i * PER_PART : (i + 1) * PER_PART]
        if there[i]:
            bar.update(len(chosen))
            continue
        features = torch.cat(list(features_of(chosen)))
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"features": features}, {"of": key})
    ranks.barrier()
    found = [read_tensors(file)[0]["features"].clone() for file in files]
    ranks.barrier()  # all have read them
    if ranks.first:
        shutil.rmtree(folder)
    return torch.cat(found)


def _holds(file: Path, key: str) -> bool:
    try:
        return read_metadata(file).get("of") == key
    except (OSError, ValueError):  # not there
        return False


def _checksum(tensors: Sequence[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(bytes_of(tensor.cpu().contiguous()), checksum)
    return checksum
