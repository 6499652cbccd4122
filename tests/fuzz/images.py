"""An image is decoded to what somebody would see, told apart from Pillow's own conversions by arithmetic on pixels."""

# ruff: noqa: PT017 (what an error says is part of the case)

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tests.fuzz.tensor_files import damaged

from kernelmeta.data.decoding import decode
from kernelmeta.data.images import FolderImages

# Mode, format, extension.
KINDS = (
    ("L", "PNG"), ("RGB", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("P", "PNG"),
    ("L", "TIFF"), ("RGB", "TIFF"), ("RGBA", "TIFF"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF"), ("1", "TIFF"),
    ("RGB", "BMP"), ("L", "BMP"), ("RGB", "PPM"), ("L", "PPM"), ("I;16", "PPM"), ("P", "GIF"), ("RGBA", "WEBP"),
    ("RGB", "WEBP"), ("I;16", "JPEG2000"), ("RGB", "JPEG2000"), ("RGB", "JPEG"), ("L", "JPEG"),
)  # fmt: skip
# Where pixel (y, x) of the image that was stored is seen, by orientation: rows and columns reversed, swapped.
TURNED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}  # fmt: skip
WITH_EXIF = ("PNG", "TIFF", "WEBP", "JPEG")


def draw(random: np.random.Generator, mode: str, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None, dict]:
    """An image, what is seen of it [H, W, 3] in 0..255 (None: nothing is defined), and what to save it with."""
    height, width = size
    if mode == "I":
        return Image.fromarray(random.integers(-(2**31), 2**31, size).astype(np.int32)), None, {}
    if mode == "F":
        return Image.fromarray(random.random(size, dtype=np.float32)), None, {}
    if mode == "I;16":
        values = random.integers(0, 65536, size)
        return Image.fromarray(values.astype(np.uint16)), np.repeat(values[:, :, None] / 257, 3, 2), {}
    if mode == "1":
        bits = random.random(size) < 0.5
        return Image.fromarray(bits), np.repeat(255.0 * bits[:, :, None], 3, 2), {}
    if mode == "P":
        image = Image.fromarray(random.integers(0, 16, size).astype(np.uint8), "P")
        palette = random.integers(0, 256, (16, 3))
        image.putpalette(palette.flatten().tolist())
        seen = palette[np.asarray(image)].astype(float)
        if random.random() < 0.5:
            return image, seen, {}
        key = int(random.integers(0, 16))
        return image, np.where((np.asarray(image) == key)[:, :, None], 255.0, seen), {"transparency": key}
    channels = {"L": 1, "RGB": 3, "LA": 2, "RGBA": 4}[mode]
    values = random.integers(0, 256, (height, width, channels)).astype(np.uint8)
    image = Image.fromarray(values[:, :, 0] if channels == 1 else values, mode)
    colours = values[:, :, : 1 if channels < 3 else 3].astype(float)
    if channels in (2, 4):
        alpha = values[:, :, -1:] / 255
        colours = alpha * colours + (1 - alpha) * 255
    return image, np.repeat(colours, 3, 2) if colours.shape[2] == 1 else colours, {}


def check(random: np.random.Generator, folder: Path) -> None:
    mode, kind = KINDS[int(random.integers(len(KINDS)))]
    size = (int(random.integers(1, 60)), int(random.integers(1, 60)))
    if kind == "JPEG2000":
        size = (max(size[0], 32), max(size[1], 32))
    image, seen, options = draw(random, mode, size)
    if kind == "JPEG":
        options |= {"quality": 100, "subsampling": 0}
    if kind in ("WEBP", "JPEG2000"):
        options |= {"lossless": True, "exact": True} if kind == "WEBP" else {"irreversible": False}
    orientation = int(random.integers(1, 9)) if kind in WITH_EXIF else 1
    if orientation > 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    case = f"{mode} {kind} {size} {sorted(options)} orientation {orientation}"
    (folder / "train" / "a").mkdir(parents=True)
    path = folder / "train" / "a" / "0.png"
    if kind == "PPM" and mode == "I;16":
        path.write_bytes(f"P5 {size[1]} {size[0]} 65535\n".encode() + np.asarray(image).astype(">u2").tobytes())
    else:
        image.save(path, kind, **options)
    try:
        found = np.asarray(decode(path))
    except ValueError as error:
        assert seen is None and "not defined" in str(error), (case, error)
        return
    assert seen is not None, case
    expected = TURNED[orientation](seen)
    assert found.shape == expected.shape and found.dtype == np.uint8, (case, found.shape)
    worst = np.abs(found - expected)
    # JPEG rounds frequencies and colour differences; alpha is composed in whole numbers.
    assert worst.max() <= (6 if kind == "JPEG" else 1.01), (case, worst.max())
    images = FolderImages(folder, str(random.choice(["cifar-fs", "miniimagenet"])))
    assert images.load(0).isfinite().all(), case
    assert images.load_augmented(0, random).shape == images.load(0).shape, case
    whole = path.read_bytes()
    for _ in range(5):
        path.write_bytes(damaged(random, whole))
        try:
            assert decode(path).mode == "RGB", case
        except ValueError as error:
            assert "\n" not in str(error), (case, error)
