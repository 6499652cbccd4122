"""Backbones by name, and their weights from files."""

from __future__ import annotations

import os

import torch

from kernelmeta import nn
from kernelmeta.data.files import read_weights
from kernelmeta.training.checkpoint import Checkpoint

BACKBONES = ("conv4", "conv4_128", "wrn28_10")


def make_backbone(name: str, channels: int, size: int) -> torch.nn.Module:
    """A backbone for images [channels, size, size], untrained.

    Raises:
        ValueError: there is no backbone of that name, or it cannot take such images.
    """
    if name in ("conv4", "conv4_128"):
        return nn.Conv4(channels=128 if name == "conv4_128" else 64, in_channels=channels)
    if name == "wrn28_10":
        if channels != 3:
            raise ValueError(f"backbone: wrn28_10 takes colour images, got {channels} channel")
        return nn.WideResNet(image_size=size)
    raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")


def load_backbone(
    path: str | os.PathLike[str], name: str | None, channels: int, size: int
) -> tuple[torch.nn.Module, str]:
    """A backbone with the weights of a file, and its name.

    Args:
        path: a checkpoint of ``kernelmeta pretrain``, a published checkpoint (a dict with ``netFeat``) or
            its feature
            extractor alone, or a state dict of the backbone.
        name: one of `BACKBONES`; only a checkpoint of ``kernelmeta pretrain`` knows by itself.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: truncated, foreign, a pickle that would run code, or the weights do not fit.
    """
    weights = read_weights(path)
    if any(key.startswith("backbone.") for key in weights):
        checkpoint = Checkpoint.load(path, "pretrain")
        found = checkpoint.state.get("config", {}).get("backbone")
        if name is not None and name != found:
            raise ValueError(f"{path}: the weights of {found}, not of {name}")
        name, weights = str(found), dict(checkpoint.tensors["backbone"])
    elif name is None:
        raise ValueError(f"{path}: which backbone are these weights of? Give one of {', '.join(BACKBONES)}")
    backbone = make_backbone(name, channels, size)
    if "netFeat" in weights:
        weights = weights["netFeat"]
    try:
        if any(key.startswith(("conv_blocks.", "block1.layer.")) for key in weights):
            weights = type(backbone).from_xfer(weights)  # type: ignore[attr-defined]
        backbone.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{path}: not the weights of {name} ({' '.join(lines[:2])[:200]})") from None
    return backbone, name
