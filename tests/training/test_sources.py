"""What --data may name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernelmeta.data import EpisodeSampler
from kernelmeta.data.glyphs import load_glyphs
from kernelmeta.training.sources import open_bank, open_images


def test_glyphs_without_a_backbone_are_pixels_of_the_classes_not_kept_for_it():
    glyphs, bank = load_glyphs(), open_bank("glyphs")
    kept = (glyphs.class_split < 3).nonzero().flatten()
    assert bank.class_names == tuple(glyphs.class_names[c] for c in kept.tolist())
    assert bank.class_split.tolist() == glyphs.class_split[kept].tolist()
    assert bank.features.shape == (int((glyphs.class_split[glyphs.labels] < 3).sum()), 784)
    rows = torch.isin(glyphs.labels, kept)
    assert torch.equal(bank.features, glyphs.images[rows].flatten(1) / 255)
    for split in ("train", "val", "test"):
        assert EpisodeSampler(bank, split, balance="dirichlet:2").draw(0, 5).query_index.shape == (5, 75)


def test_glyphs_as_images():
    images = open_images("glyphs")
    assert (images.channels, images.size) == (1, 28)
    assert images.load(0).aminmax() == (-1, 1)


def test_a_bank_takes_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"weights: .* is not a folder of images"):
        open_bank(str(tmp_path / "bank.safetensors"), weights="some.pth")


@pytest.mark.parametrize("name", ["rows.csv", "X.npy"])
def test_a_file_that_import_takes_is_no_bank_and_says_so(tmp_path, name):
    path = tmp_path / name
    if name == "X.npy":
        np.save(path, np.zeros((3, 2)))
    else:
        path.write_text("a,b,label\n1,2,x\n")
    with pytest.raises(ValueError, match=r"not a safetensors file.*'kernelmeta import' makes a bank of such files"):
        open_bank(str(path))
