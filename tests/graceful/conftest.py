"""Images on which a small backbone learns its classes in a second."""

from __future__ import annotations

import pytest
import torch

from kernelmeta.data.images import ArrayImages


@pytest.fixture(scope="session")
def bars():
    """Bars: a class is their direction and place. Classes 0 to 5 are for the backbone, 6 and 7 are never trained on;
    images are of five groups.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 120, (8, 20, 16, 16), generator=generator, dtype=torch.uint8)
    for c in range(8):
        along = pixels[c].transpose(1, 2) if c % 2 else pixels[c]
        along[:, 2 + c // 2 * 3] = 255
    split = torch.tensor([3] * 6 + [2] * 2, dtype=torch.uint8)
    labels = torch.arange(8).repeat_interleave(20)
    return ArrayImages(
        pixels.flatten(0, 1), labels, split, tuple("abcdefgh"), "bars", padding=1, groups=torch.arange(160) % 5
    )
