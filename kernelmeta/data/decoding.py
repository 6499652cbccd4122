"""Image files to 8-bit RGB, as somebody who looks at them would see them, or an error that says why not."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# Those with a clear beginning: others are taken for anything. (EPS and WMF run other programs.)
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_WITH_ALPHA = ("LA", "PA", "La", "RGBA", "RGBa")
_UNDEFINED = {
    "I": "whole numbers of 32 bits, or with a sign",
    "F": "floating-point numbers",
    "LAB": "L*a*b* colours",
    "HSV": "HSV colours",
}
# Tags of TIFF.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


@functools.cache
def formats() -> tuple[str, ...]:
    """Formats that are read, by Pillow's names, as far as it was built with them."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def extensions() -> frozenset[str]:
    """Their files' extensions, in lower case."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats())


def shorter_side(path: str | os.PathLike[str]) -> int | None:
    """Of an image, by its header; None if that cannot be read."""
    try:
        with Image.open(path, formats=formats()) as image:
            return min(image.size)
    except Exception:
        return None


def decode(path: str | os.PathLike[str]) -> Image.Image:
    """The (first) image of a file, as RGB of 8 bits.

    Turned as its EXIF orientation says; transparency on white; 16 bits scaled to 8.

    Raises:
        ValueError: it cannot be read, or its numbers do not say which is white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tags that are damaged, and large images
            return _decode(path)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ValueError(f"{_what(error)}") from None


def _decode(path: str | os.PathLike[str]) -> Image.Image:
    # By a file object: Pillow maps files that it knows by name, and then garbles TIFF images that lie on a side.
    with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
        image.load()
        return _rgb(_upright(image), image.format, getattr(image, "tag_v2", {}))


def _what(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image" if text.startswith("cannot identify image file") else text


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image) or image
    except Exception:  # EXIF data that are none say nothing about the orientation
        return image


def _rgb(image: Image.Image, file_format: str | None, tags: Any) -> Image.Image:
    if image.mode == "L" and 1 not in _numbers(tags.get(_SAMPLE_FORMAT, 1)):
        raise ValueError(_undefined("numbers with a sign"))
    deep = image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))
    if deep:
        return _from_16_bits(image, tags)
    if image.mode in _WITH_ALPHA or (image.mode in _PLAIN and "transparency" in image.info):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode in _PLAIN:
        return image.convert("RGB")
    raise ValueError(_undefined(_UNDEFINED.get(image.mode, f"mode {image.mode}")))


def _from_16_bits(image: Image.Image, tags: Any) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    white = 2 ** max(_numbers(tags.get(_BITS, 16))) - 1
    if values.min() < 0 or values.max() > white:
        raise ValueError(_undefined("numbers beyond 16 bits"))
    grey = (values * 255 + white // 2) // white
    if 1 not in _numbers(tags.get(_PHOTOMETRIC, 1)):  # of grey images, 0: white is zero
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _numbers(tag: Any) -> tuple[int, ...]:
    return tuple(tag) if isinstance(tag, tuple) else (int(tag),)


def _undefined(what: str) -> str:
    return f"{what}: which of them is white is not defined; convert it to 8 or 16 bits"
