"""Images to a feature bank."""

from __future__ import annotations

import torch
from tqdm import tqdm

from kernelmeta.data import FeatureBank
from kernelmeta.data.images import BACKBONE_SPLIT, LabelledImages, batches


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
) -> FeatureBank:
    """Features of every image whose class is not kept for the backbone.

    Args:
        backbone: [B, channels, H, H] -> [B, D]; set to eval mode.
        source: the bank's free text.
        dtype: of the features kept.

    Raises:
        ValueError: an image cannot be read, or no class is left.
    """
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
    return FeatureBank(
        torch.cat(features),
        torch.cat(labels),
        images.class_split[kept],
        tuple(images.class_names[c] for c in kept.tolist()),
        source,
    )
