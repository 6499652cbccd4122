"""Image folders: layout, sizes, normalisation, augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kernelmeta.data.images import STYLES, ArrayImages, FolderImages, batches


def make_folder(root, size=(84, 84), per_class=3, splits=("train", "val", "test")):
    random = np.random.default_rng(0)
    for split in splits:
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_classes_carry_the_split_of_their_folder(tmp_path):
    images = FolderImages(make_folder(tmp_path))
    assert images.class_names == ("train/ant", "train/bee", "val/ant", "val/bee", "test/ant", "test/bee")
    assert images.class_split.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.labels.tolist() == [c for c in range(6) for _ in range(3)]
    assert (images.channels, images.size) == (3, 80)


def test_an_image_is_cropped_and_normalised_as_published(tmp_path):
    images = FolderImages(make_folder(tmp_path))
    pixels = np.asarray(Image.open(tmp_path / "train" / "ant" / "1.png")).astype(np.float64)[2:82, 2:82]
    expected = (pixels - STYLES["miniimagenet"].mean) / STYLES["miniimagenet"].std
    found = images.load(1)
    assert found.shape == (3, 80, 80)
    assert found.dtype == torch.float32
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_small_images_are_taken_for_cifar(tmp_path):
    images = FolderImages(make_folder(tmp_path, size=(32, 32)))
    assert images.load(0).shape == (3, 32, 32)
    assert FolderImages(tmp_path, "miniimagenet").load(0).shape == (3, 80, 80)


@pytest.mark.parametrize("size", [(200, 150), (90, 300), (40, 33)])
def test_other_sizes_are_resized_to_fit(tmp_path, size):
    images = FolderImages(make_folder(tmp_path, size=size, per_class=1))
    assert images.load(0).shape == (3, 80, 80)
    assert images.load_augmented(0, np.random.default_rng(0)).shape == (3, 80, 80)


def test_augmentation_depends_on_its_key_alone(tmp_path):
    images = FolderImages(make_folder(tmp_path, size=(32, 32)))
    rows = [3, 0, 5, 1, 17]
    one = torch.cat([pixels for pixels, _ in batches(images, rows, 2, key=(0, 1))])
    two = torch.cat([pixels for pixels, _ in batches(images, rows, 3, key=(0, 1), workers=1)])
    other = torch.cat([pixels for pixels, _ in batches(images, rows, 2, key=(0, 2))])
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    labels = torch.cat([labels for _, labels in batches(images, rows, 2)])
    assert torch.equal(labels, images.labels[rows])


def test_every_augmentation_happens(tmp_path):
    white = np.full((32, 32, 3), 200, np.uint8)
    white[:, :16] = 100
    (tmp_path / "train" / "x").mkdir(parents=True)
    Image.fromarray(white).save(tmp_path / "train" / "x" / "0.png")
    images = FolderImages(tmp_path)
    style = STYLES["cifar-fs"]
    views = torch.stack([images.load_augmented(0, np.random.default_rng(i)) for i in range(60)])
    pixels = views * torch.tensor(style.std).view(3, 1, 1) + torch.tensor(style.mean).view(3, 1, 1)
    right_brighter = pixels[:, :, 8:24, 20:28].mean((1, 2, 3)) > pixels[:, :, 8:24, 4:12].mean((1, 2, 3))
    assert 15 < right_brighter.sum() < 45  # flips
    # Shifts: black rows above or below, up to the padding.
    black_rows = (pixels.mean((1, 3)) < 2).sum(1)
    assert black_rows.min() == 0
    assert 0 < black_rows.max() <= style.padding
    assert pixels[:, :, 16, 16].std() > 5  # brightness


def test_arrays_are_shifted_by_up_to_the_padding():
    pixels = torch.zeros(1, 28, 28, dtype=torch.uint8)
    pixels[0, 14, 14] = 255
    split = torch.tensor([0], dtype=torch.uint8)
    images = ArrayImages(pixels, torch.tensor([0]), split, ("a",), "a test")
    assert images.load(0).shape == (1, 28, 28)
    assert images.load(0).aminmax() == (-1, 1)
    found = {
        tuple((images.load_augmented(0, np.random.default_rng(i))[0] > 0).nonzero()[0].tolist()) for i in range(300)
    }
    assert found == {(y, x) for y in range(12, 17) for x in range(12, 17)}


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected train/, val/ or test/"):
        FolderImages(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FolderImages(tmp_path / "none")
    make_folder(tmp_path)
    with pytest.raises(ValueError, match="style: expected one of"):
        FolderImages(tmp_path, "imagenet")


def test_a_broken_image_is_named(tmp_path):
    images = FolderImages(make_folder(tmp_path))
    images.paths[4].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bee/1\.png: not an image that can be read"):
        images.load(4)
