"""Image folders: layout, sizes, normalisation, augmentation."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernelmeta.data import FeatureBank
from kernelmeta.data.decoding import decode
from kernelmeta.data.images import STYLES, ArrayImages, FolderImages, batches
from kernelmeta.training.extraction import extract


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


def test_classes_in_a_folder_without_splits_are_split(tmp_path):
    sizes = {f"class {i}": 1 + i % 3 for i in range(10)}
    for name, n in sizes.items():
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "README.txt").write_text("ten classes")
    images = FolderImages(tmp_path)
    assert sorted(name.partition("/")[2] for name in images.class_names) == sorted(sizes)
    assert images.class_split.bincount().tolist() == [6, 2, 2]
    split = ("train", "val", "test")
    for name, number, label in zip(images.class_names, images.class_split.tolist(), range(10), strict=True):
        assert name.startswith(f"{split[number]}/")
        assert int((images.labels == label).sum()) == sizes[name.partition("/")[2]]
    assert "its 10 classes are split 60/20/20" in images.notes[0] and "README" not in images.notes[0]
    assert FolderImages(tmp_path).class_names == images.class_names  # again the same
    (tmp_path / "test").mkdir()  # now there are splits, and these are no classes of theirs
    with pytest.raises(ValueError, match="expected train/, val/ or test/"):
        FolderImages(tmp_path)


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


def classes_of(root):
    return FolderImages(root, "miniimagenet").class_names


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "#recycle", "__pycache__"],
)
@pytest.mark.parametrize("full", [True, False])
def test_hidden_and_system_folders_are_no_classes(tmp_path, name, full):
    make_folder(tmp_path, size=(8, 8))
    before = classes_of(tmp_path)
    for folder in (tmp_path, tmp_path / "test"):
        (folder / name).mkdir()
        if full:
            Image.new("RGB", (8, 8)).save(folder / name / "0.png")
    images = FolderImages(tmp_path)
    assert images.class_names == before
    assert images.notes[0] == f"{tmp_path}: left out: 2 hidden or of a system"


def test_what_is_left_out_is_one_line_with_counts(tmp_path):
    make_folder(tmp_path, size=(8, 8))
    ant = tmp_path / "train" / "ant"
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (ant / name).write_bytes(b"\0\5\26\7")
    for name in ("a.txt", "b.TXT", "labels.csv", "noextension"):
        (ant / name).write_text("x")
    (ant / "more").mkdir()
    Image.new("RGB", (8, 8)).save(ant / "more" / "0.png")
    (ant / "folder.png").mkdir()
    os.mkfifo(ant / "pipe.png")
    (tmp_path / "train" / "stray.png").write_bytes(b"x")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("x")
    images = FolderImages(tmp_path)
    assert len(images.paths) == 18
    (line,) = [note for note in images.notes if "left out" in note]
    for part in (
        "4 hidden or of a system",
        "2 files named *.txt",
        "1 file named *.csv",
        "2 folders within class folders",
        "1 special file (pipes or devices)",
        "1 file outside of class folders",
        "1 class folder without an image (train/empty)",
        "1 folder beside train, val and test (docs)",
        "1 file beside them (README.md)",
    ):
        assert part in line, line
    assert "\n" not in line


def test_classes_in_two_splits_are_named(tmp_path):
    make_folder(tmp_path, size=(8, 8))
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    (note,) = FolderImages(tmp_path).notes
    assert "two splits" in note and "'ant' (train, val, test), 'bee' (train, test)" in note


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("Train", "train"), ("TRAIN", "train"), ("training", "train"), ("valid", "val"), ("Validation", "val"),
     ("Test", "test"), ("testing", "test"), ("novel", "test")],
)  # fmt: skip
def test_splits_that_are_called_otherwise_are_named(tmp_path, wrong, right):
    make_folder(tmp_path, size=(8, 8))
    (tmp_path / right).rename(tmp_path / wrong)
    with pytest.raises(ValueError, match=f"{wrong}: is this {right}/"):
        FolderImages(tmp_path)


def test_a_class_whose_name_is_not_utf8_is_named_before_anything_is_decoded(tmp_path, monkeypatch):
    make_folder(tmp_path, size=(8, 8))
    bad = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.rename(tmp_path / "train" / "ant", bad)
    monkeypatch.setattr("kernelmeta.data.decoding.Image.open", None)
    with pytest.raises(ValueError, match=r"train/caf\\xe9: the name of this class is not UTF-8"):
        FolderImages(tmp_path)


def test_files_and_folders_above_may_have_any_name(tmp_path):
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    make_folder(Path(root), size=(8, 8))
    os.rename(f"{root}/train/ant/0.png", os.fsencode(f"{root}/train/ant/") + b"\xff\xfe.png")
    images = FolderImages(root)
    images.check()
    bank = extract(images, torch.nn.Flatten(), images.source)
    assert len(images.paths) == len(bank.labels) == 18
    bank.save(tmp_path / "bank.safetensors")
    assert FeatureBank.load(tmp_path / "bank.safetensors").source.endswith("caf\\xe9")


EXTENSIONS = {
    ".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".png": "PNG", ".gif": "GIF", ".bmp": "BMP",
    ".webp": "WEBP", ".tif": "TIFF", ".TIFF": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".jp2": "JPEG2000",
}  # fmt: skip


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_usual_extension_is_read(tmp_path, extension):
    (tmp_path / "train" / "a").mkdir(parents=True)
    kind, mode = EXTENSIONS[extension], "L" if extension == ".pgm" else "RGB"
    Image.new(mode, (40, 40), "white").save(tmp_path / "train" / "a" / f"0{extension}", kind)
    images = FolderImages(tmp_path)
    images.check()
    assert images.notes == ()
    assert images.load(0).shape == (3, 80, 80)


def shown(path):
    """What is seen of an image file, [H, W, 3] in 0..255."""
    return np.asarray(decode(path)).astype(int)


PATTERN = np.random.default_rng(0).integers(0, 256, (6, 9)).astype(np.uint8)


@pytest.mark.parametrize("extension", ["png", "tif", "jp2"])
def test_16_bits_are_scaled(tmp_path, extension):
    values = np.random.default_rng(1).integers(0, 65536, (40, 40)).astype(np.uint16)
    values[0, :2] = 0, 65535
    Image.fromarray(values).save(tmp_path / f"a.{extension}", **({"irreversible": False} if extension == "jp2" else {}))
    found = shown(tmp_path / f"a.{extension}")
    assert np.abs(found - values[:, :, None] / 257).max() <= 0.5 + 1e-9


def test_16_bits_of_other_makers_are_scaled(tmp_path):
    values = np.random.default_rng(1).integers(0, 1024, (5, 7))
    (tmp_path / "a.pgm").write_bytes(b"P5 7 5 1023\n" + values.astype(">u2").tobytes())
    assert np.abs(shown(tmp_path / "a.pgm") - values[:, :, None] * 255 / 1023).max() <= 1
    wide = np.random.default_rng(1).integers(0, 65536, (16, 16)).astype(np.uint16)
    for order, white_is_zero in (("<", 0), (">", 0), ("<", 1)):
        write_tiff(tmp_path / "a.tif", wide.astype(f"{order}u2"), 16, order, photometric=1 - white_is_zero)
        expected = 255 - wide / 257 if white_is_zero else wide / 257
        assert np.abs(shown(tmp_path / "a.tif") - expected[:, :, None]).max() <= 0.5 + 1e-9


def write_tiff(path, values, bits, order="<", photometric=1, sample_format=1):
    """A TIFF of one strip, which Pillow cannot write in every form."""
    height, width = values.shape
    tags = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height,
        279: values.nbytes, 339: sample_format,
    }  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + values.nbytes)
    path.write_bytes(start + values.tobytes() + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "message"),
    [
        (PATTERN.astype(np.int32), 32, 2, "whole numbers of 32 bits"),
        (PATTERN.astype(np.uint32), 32, 1, "whole numbers of 32 bits"),
        (PATTERN.astype(np.int16), 16, 2, "with a sign"),
        (PATTERN.astype(np.int8), 8, 2, "with a sign"),
        (PATTERN.astype(np.float32) / 255, 32, 3, "floating-point numbers"),
        (PATTERN.astype(np.float32), 32, 3, "floating-point numbers"),
    ],
)
def test_ranges_that_are_not_defined_are_refused_by_name(tmp_path, values, bits, sample_format, message):
    (tmp_path / "train" / "a").mkdir(parents=True)
    write_tiff(tmp_path / "train" / "a" / "0.tif", values, bits, sample_format=sample_format)
    with pytest.raises(ValueError, match=f"train/a/0.tif: .*{message}.*white is not defined"):
        FolderImages(tmp_path).check()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_is_turned_as_its_exif_data_say(tmp_path, orientation, extension, mode):
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 16, 8))
    undo = {
        2: (Image.Transpose.FLIP_LEFT_RIGHT,), 3: (Image.Transpose.ROTATE_180,), 4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,), 6: (Image.Transpose.ROTATE_90,), 7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }  # fmt: skip
    stored = upright
    for step in undo.get(orientation, ()):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert(mode).save(tmp_path / f"a.{extension}", exif=exif)
    assert np.abs(shown(tmp_path / f"a.{extension}") - np.asarray(upright).astype(int)).mean() < 8


def test_exif_data_that_are_none_do_no_harm(tmp_path):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage" * 10)
    assert shown(tmp_path / "a.jpg").min() > 250


def with_alpha(mode):
    """Half of the image hides black below full transparency, a quarter is half transparent, a quarter opaque."""
    rgba = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 128), (0, 4, 4, 8))
    rgba.paste((100, 100, 100, 255), (4, 4, 8, 8))
    return rgba if mode == "RGBA" else rgba.convert(mode)


@pytest.mark.parametrize(("mode", "extension"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tif")])
def test_transparency_shows_white(tmp_path, mode, extension):
    with_alpha(mode).save(tmp_path / f"a.{extension}", **({"lossless": True} if extension == "webp" else {}))
    found = shown(tmp_path / f"a.{extension}")
    assert (found[:4] == 255).all() and (found[4:, 4:] == 100).all()
    assert abs(found[4:, :4] - 127).max() <= 1


def test_transparent_colours_and_palettes_show_white(tmp_path):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png", transparency=7)
    Image.fromarray(np.full((8, 8), 700, np.uint16)).save(tmp_path / "deep.png", transparency=700)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    palette.save(tmp_path / "alphas.png", transparency=bytes([255, 0]))
    for path in tmp_path.iterdir():
        assert (shown(path) == 255).all(), path
    palette.save(tmp_path / "opaque.gif")
    assert (shown(tmp_path / "opaque.gif") == [10, 20, 30]).all()


def test_every_bad_file_is_listed_at_once(tmp_path):
    make_folder(tmp_path, size=(40, 40), per_class=4)
    bad = ["train/ant/1.png", "train/bee/0.png", "val/ant/3.png", "test/bee/2.png"]
    (tmp_path / bad[0]).write_bytes(b"")
    (tmp_path / bad[1]).write_bytes((tmp_path / bad[1]).read_bytes()[:-3000])
    (tmp_path / bad[2]).unlink()
    (tmp_path / bad[2]).symlink_to("nowhere.png")
    (tmp_path / bad[3]).write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    for workers in (0, 2):
        with pytest.raises(ValueError, match="4 images cannot be read") as caught:
            FolderImages(tmp_path).check(workers=workers)
        assert all(name in str(caught.value) for name in bad)
        assert "\n" not in str(caught.value)
    images = FolderImages(tmp_path)
    images.check(skip_bad=True)
    assert len(images.paths) == len(images.labels) == 20
    assert all(str(tmp_path / name) not in map(str, images.paths) for name in bad)
    assert images.notes[-1].startswith(f"{tmp_path}: left out: 4 images cannot be read (")
    for i in range(20):
        assert images.class_names[images.labels[i]] == "/".join(images.paths[i].parts[-3:-1])


def test_a_class_with_bad_files_alone_is_left_out_and_named(tmp_path):
    make_folder(tmp_path, size=(40, 40), per_class=2)
    for path in (tmp_path / "val" / "ant").iterdir():
        path.write_bytes(b"x")
    images = FolderImages(tmp_path)
    images.check(skip_bad=True)
    assert images.class_names == ("train/ant", "train/bee", "val/bee", "test/ant", "test/bee")
    assert images.class_split.tolist() == [0, 0, 1, 2, 2]
    assert "and with them classes val/ant" in images.notes[-1]
    for path in images.paths:
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="no image can be read; 12 images"):
        FolderImages(tmp_path).check(skip_bad=True)


def test_a_bad_first_file_does_not_hide_the_others(tmp_path):
    make_folder(tmp_path, size=(32, 32))
    for name in ("ant/0", "ant/1", "bee/2"):
        (tmp_path / "train" / f"{name}.png").write_bytes(b"x")
    images = FolderImages(tmp_path)
    assert images.size == 32
    with pytest.raises(ValueError, match="3 images cannot be read"):
        images.check()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (2000, 84)])
def test_images_of_odd_shapes_are_read(tmp_path, size):
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", size, "white").save(tmp_path / "train" / "a" / "0.png")
    images = FolderImages(tmp_path, "miniimagenet")
    assert images.load(0).shape == (3, 80, 80)
    assert images.load_augmented(0, np.random.default_rng(0)).shape == (3, 80, 80)


def test_features_that_are_not_finite_name_their_images(tmp_path):
    images = FolderImages(make_folder(tmp_path, size=(32, 32), per_class=1))

    class Overflow(torch.nn.Module):
        def forward(self, pixels):
            rows = pixels.flatten(1)[:, :4].clone()
            rows[1] = 1e6  # beyond float16
            return rows

    with pytest.raises(ValueError, match=r"1 of 6 images are NaN or infinite in float16: row 1 \(.*train/bee/0\.png"):
        extract(images, Overflow(), "a test", dtype=torch.float16)
    lines = []
    bank = extract(images, Overflow(), "a test", dtype=torch.float16, skip_bad=True, say=lines.append)
    assert bank.class_names == ("train/ant", "val/ant", "val/bee", "test/ant", "test/bee")
    assert "train/bee/0.png" in lines[-1]
