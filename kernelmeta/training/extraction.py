"""Images to a feature bank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tqdm import tqdm

from kernelmeta.data import FeatureBank
from kernelmeta.data.images import BACKBONE_SPLIT, LabelledImages, batches
from kernelmeta.data.words import listing


@torch.no_grad()
def extract(
    images: LabelledImages,
    backbone: torch.nn.Module,
    source: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 128,
    workers: int = 0,
    progress: bool = False,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> FeatureBank:
    """Features of every image whose class is not kept for the backbone.

    Args:
        backbone: [B, channels, H, H] -> [B, D]; set to eval mode.
        source: the bank's free text.
        dtype: of the features kept.
        skip_bad: go on without images that cannot be read, and those whose features are not finite.
        say: takes lines about what was left out.

    Raises:
        ValueError: images cannot be read, or their features are NaN or infinite; all are named. No class is left.
    """
    images.check(skip_bad=skip_bad, workers=workers, progress=progress)
    for note in images.notes:
        say(note)
    backbone.eval().to(device)
    kept = (images.class_split != BACKBONE_SPLIT).nonzero().flatten()
    new_label = torch.full((len(images.class_split),), -1).index_copy(0, kept, torch.arange(len(kept)))
    rows = (new_label[images.labels] >= 0).nonzero().flatten().tolist()
    if not rows:
        raise ValueError(f"{images.source}: every class is kept for the backbone; none is left for the bank")
    features, labels = [], []
    bar = tqdm(total=len(rows), desc="extract", unit="image", disable=not progress)
    for pixels, batch_labels in batches(images, rows, batch_size, workers=workers):
        features.append(backbone(pixels.to(device)).to(dtype).cpu())
        labels.append(new_label[batch_labels])
        bar.update(len(batch_labels))
    bar.close()
    bank = FeatureBank(
        torch.cat(features),
        torch.cat(labels),
        images.class_split[kept],
        tuple(images.class_names[c] for c in kept.tolist()),
        source,
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
