"""The data set that comes with the package: what it promises, and what its loader refuses."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from kernelmeta.data.glyphs import ImageSet, load_glyphs

META_TRAIN, META_VAL, META_TEST, BACKBONE = range(4)
SHIPPED = resources.files("kernelmeta.data") / "glyphs.npz"


@pytest.fixture(scope="module")
def glyphs() -> ImageSet:
    return load_glyphs()


def differences(one: torch.Tensor, many: torch.Tensor) -> torch.Tensor:
    """L1 distances of images [a, p] from images [b, p] as a share of their mean ink: [a, b]."""
    return torch.cdist(one, many, p=1) / ((one.sum(1)[:, None] + many.sum(1)) / 2)


def test_counts(glyphs: ImageSet) -> None:
    assert glyphs.images.shape == (164 * 24, 28, 28) and glyphs.images.dtype == torch.uint8
    assert glyphs.labels.dtype == torch.int64
    assert torch.equal(glyphs.labels.bincount(), torch.full((164,), 24))
    assert len(set(glyphs.class_names)) == 164
    assert glyphs.class_split.bincount().tolist() == [44, 24, 40, 56]


def test_held_out_scripts_are_never_trained_on(glyphs: ImageSet) -> None:
    scripts: dict[int, set[str]] = {split: set() for split in range(4)}
    for name, split in zip(glyphs.class_names, glyphs.class_split.tolist(), strict=True):
        scripts[split].add(name.split()[0])
    assert scripts[META_VAL] == {"ARMENIAN"}
    assert scripts[META_TEST] == {"GEORGIAN", "HEBREW", "THAI"}
    assert not (scripts[META_TRAIN] | scripts[BACKBONE]) & (scripts[META_VAL] | scripts[META_TEST])


def test_a_glyph_is_centred_and_its_longer_side_is_22_pixels(glyphs: ImageSet) -> None:
    ink, spans = glyphs.images > 0, []
    for profile in (ink.any(1), ink.any(2)):
        first = profile.int().argmax(1)
        last = 27 - profile.flip(1).int().argmax(1)
        assert int((first - (27 - last)).abs().max()) <= 1
        spans.append(last - first + 1)
    longer = torch.maximum(*spans)
    assert int(longer.min()) >= 22 and int(longer.max()) <= 23  # 23: the margin of the box filter
    assert bool((glyphs.images.flatten(1).max(1).values > 60).all())  # no faint speck


def test_no_two_images_are_nearly_equal(glyphs: ImageSet) -> None:
    images = glyphs.images.flatten(1).float()
    for start in range(0, len(images), 500):
        near = differences(images[start : start + 500], images) < 0.06
        near[torch.arange(len(near)), start + torch.arange(len(near))] = False
        assert not near.any(), glyphs.labels[near.nonzero()[0]]


def test_faces_are_named_once_a_class_and_appear_in_the_data_card(glyphs: ImageSet) -> None:
    with SHIPPED.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        faces, names = archive["faces"], archive["face_names"]
    for label in range(164):
        assert len(set(faces[glyphs.labels.numpy() == label])) == 24
    card = Path(__file__).parents[2] / "docs/glyphs.md"
    if not card.is_file():
        pytest.skip("the data card is not part of an installation")
    rows = [line.strip("| ").split(" | ") for line in card.read_text().splitlines()]
    listed = {f"{row[0].removeprefix('| ')} {style}" for row in rows if len(row) == 4 for style in row[1].split(", ")}
    assert set(names.tolist()) <= listed


def test_the_file_stays_small() -> None:
    with SHIPPED.open("rb") as file:
        assert len(file.read()) < 800_000


def test_loading_again_gives_the_same(glyphs: ImageSet) -> None:
    again = load_glyphs()
    assert again.class_names == glyphs.class_names
    assert all(torch.equal(a, b) for a, b in zip(again[:3], glyphs[:3], strict=True))


def tamper(path: Path, **changes: np.ndarray) -> Path:
    with SHIPPED.open("rb") as file:
        arrays = dict(np.load(file, allow_pickle=False))
    np.savez(path, **{**arrays, **changes})
    return path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": np.zeros((5, 28, 28), np.uint8)}, "images"),
        ({"images": np.zeros((164 * 24, 28, 28), np.float32)}, "images"),
        ({"class_split": np.full(164, 4, np.uint8)}, "class_split"),
        ({"labels": np.zeros(164 * 24, np.uint16)}, "labels"),
        ({"class_names": np.array([{"a": 1}], dtype=object)}, "pickle"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, changes: dict[str, np.ndarray], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_glyphs(tamper(tmp_path / "other.npz", **changes))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    with SHIPPED.open("rb") as file:
        path.write_bytes(file.read()[:100_000])
    with pytest.raises(ValueError, match=r"cut\.npz is not a file of glyphs"):
        load_glyphs(path)
    with pytest.raises(OSError, match="absent"):
        load_glyphs(tmp_path / "absent.npz")
