"""Backbones by name, and their weights from files."""

from __future__ import annotations

import os

from kernelmeta import nn
from kernelmeta.data.file_kinds import is_safetensors
from kernelmeta.data.files import read_weights
from kernelmeta.data.images import STYLES
from kernelmeta.data.words import one_line
from kernelmeta.graceful.small import PREFIX, SmallBackbone, parse_backbone
from kernelmeta.nn import xfer
from kernelmeta.training.checkpoint import Checkpoint, checkpoint_state
from kernelmeta.training.finite import check_weights
from kernelmeta.training.foreign_backbones import NAMES, ImageBackbone, foreign_backbone, is_foreign

Backbone = nn.Conv4 | nn.WideResNet | SmallBackbone
# Besides those of `SmallBackbone`, see there.
BACKBONES = ("conv4", "conv4_128", "wrn28_10")


def make_backbone(name: str, channels: int, size: int) -> Backbone:
    """A backbone for images [channels, size, size], untrained.

    Raises:
        ValueError: there is no backbone of that name, or it cannot take such images.
    """
    if name in ("conv4", "conv4_128"):
        return nn.Conv4(channels=128 if name == "conv4_128" else 64, in_channels=channels)
    if name == "wrn28_10":
        return nn.WideResNet(first_stride=1 if size <= 32 else 2, in_channels=channels)
    check_backbone(name)
    return SmallBackbone(*parse_backbone(name), in_channels=channels)


def check_backbone(name: str) -> None:
    """Raises ValueError if there is no backbone of that name."""
    if name.startswith(PREFIX):
        parse_backbone(name)
    elif name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, or {NAMES}, got {name!r}")


def trained_style(path: str | os.PathLike[str] | None) -> str | None:
    """The style of images, see `kernelmeta.data.images.STYLES`, that the weights of a file were trained on: those of a
    folder that ``kernelmeta pretrain`` saw. None of other files, and where nobody knows.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    if path is None or not is_safetensors(path):
        return None
    state = checkpoint_state(path)
    style = state.get("style") or state.get("config", {}).get("style")
    return style if style in STYLES else None


def load_backbone(path: str | os.PathLike[str] | None, name: str | None, channels: int, size: int) -> ImageBackbone:
    """A backbone with the weights of a file, or another library's.

    Args:
        path: a checkpoint of ``kernelmeta pretrain``, a published checkpoint (a dict with ``netFeat``) or
            its feature extractor alone, or a state dict of the backbone.
        name: one of `BACKBONES`; only a checkpoint of ``kernelmeta pretrain`` knows by itself. Or, with or without a
            file, one that :func:`~kernelmeta.training.foreign_backbones.foreign_backbone` takes.

    Raises:
        ImportError: a foreign backbone's library is not installed.
        OSError: there is no such file, or it cannot be read.
        ValueError: truncated, foreign, a pickle that would run code, or the weights do not fit or are not finite.
    """
    if name is not None and is_foreign(name):
        return foreign_backbone(name, path)
    if path is None:
        raise ValueError(f"weights: {name or 'a backbone'} needs them; without, --backbone takes {NAMES}")
    weights = read_weights(path)
    if any(key.startswith("backbone.") for key in weights):
        checkpoint = Checkpoint.load(path, "pretrain")
        found = checkpoint.state.get("config", {}).get("backbone")
        if name is not None and name != found:
            raise ValueError(f"{path}: the weights of {found}, not of {name}")
        name, weights = str(found), dict(checkpoint.tensors["backbone"])
    elif name is None:
        raise ValueError(
            f"{path}: which backbone are these weights of? Give --backbone, one of {', '.join(BACKBONES)}, or {NAMES}"
        )
    weights = xfer.unwrapped(weights)
    backbone = make_backbone(name, channels, size)
    published = "netFeat" in weights or any(key.startswith(("conv_blocks.", "bn1.")) for key in weights)
    try:
        if published and isinstance(backbone, nn.Conv4):
            weights = nn.Conv4.from_xfer(weights, backbone.channels)
        elif published:
            weights = nn.WideResNet.from_xfer(weights)
        backbone.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the weights of {name} ({one_line(error)})") from None
    check_weights(path, weights)
    return ImageBackbone(backbone, name)
