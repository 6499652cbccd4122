"""The backbones of the published experiments: images in, features out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernelmeta.nn import xfer


def _initialise(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def _renamed(module: nn.Module, checkpoint: Mapping[str, Any], rename: Any, what: str) -> dict[str, Tensor]:
    """The state_dict of ``module`` with tensors that ``checkpoint`` holds under other names."""
    counters = ".num_batches_tracked"
    names = {key: rename(key) for key in module.state_dict() if not key.endswith(counters)}
    published = xfer.part(checkpoint, "netFeat")
    found = xfer.take(published, names.values(), what)
    result = {ours: found[theirs] for ours, theirs in names.items()}
    for key in module.state_dict():
        if key.endswith(counters):
            result[key] = published.get(rename(key), torch.zeros((), dtype=torch.int64, device="cpu"))
    return result


class Conv4(nn.Module):
    """Four times convolution 3x3 - BatchNorm - ReLU - max-pooling 2x2; features are the flattened last map.

    Args:
        channels: 64 or 128 in the published experiments.
        in_channels: 3 for colour, 1 for grey images.

    Raises:
        ValueError: images of fewer than 16 x 16 pixels, when it is called.
    """

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    nn.MaxPool2d(2),
                )
                for i in range(4)
            )
        )
        _initialise(self)

    def n_features(self, height: int, width: int) -> int:
        """Features of an image of this size (at least 16 pixels each way)."""
        return self.channels * (height // 16) * (width // 16)

    def forward(self, images: Tensor) -> Tensor:
        """[n, in_channels, height, width] -> [n, D]."""
        if min(images.shape[-2:]) < 16:
            raise ValueError(f"images: expected at least 16 x 16 pixels, got {list(images.shape)}")
        features: Tensor = self.blocks(images).flatten(1)
        return features

    @staticmethod
    def from_xfer(checkpoint: Mapping[str, Any], channels: int = 64) -> dict[str, Tensor]:
        """A published checkpoint, or its ``netFeat`` state_dict, as a state_dict of this module.

        Raises:
            ValueError: a key is missing or unknown, named.
        """
        layers = {"0": "Conv", "1": "BatchNorm"}

        def rename(key: str) -> str:
            _, block, layer, tensor = key.split(".")
            return f"conv_blocks.{block}.layers.{layers[layer]}.{tensor}"

        with torch.device("meta"):
            return _renamed(Conv4(channels), checkpoint, rename, "Conv4 checkpoint")


class _ResidualBlock(nn.Module):
    """Two BatchNorm - ReLU - convolution; where the shape changes, the shortcut starts from the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x).relu()
        straight = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = straight + self.conv2(self.norm2(self.conv1(h)).relu())
        return out


class WideResNet(nn.Module):
    """WRN-28-10 (Zagoruyko & Komodakis 2016) as published with SIB: 640 features.

    Args:
        depth, widen_factor: 28 and 10 in the published experiments.
        first_stride: of the first group of blocks: 2 for 80 x 80 images, 1 for 32 x 32.
        in_channels: 3 for colour, 1 for grey images.

    Raises:
        ValueError: a depth that is not 4 more than a multiple of 6.
    """

    def __init__(self, depth: int = 28, widen_factor: int = 10, first_stride: int = 2, in_channels: int = 3) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth: expected 4 more than a multiple of 6, got {depth}")
        per_group = (depth - 4) // 6
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.groups = nn.Sequential(
            *(
                nn.Sequential(
                    *(
                        _ResidualBlock(widths[i] if j == 0 else widths[i + 1], widths[i + 1], stride if j == 0 else 1)
                        for j in range(per_group)
                    )
                )
                for i, stride in enumerate((first_stride, 2, 2))
            )
        )
        self.norm = nn.BatchNorm2d(widths[3])
        self.width = widths[3]
        _initialise(self)

    def n_features(self, height: int, width: int) -> int:
        """Features of an image, whatever its size."""
        return self.width

    def forward(self, images: Tensor) -> Tensor:
        """[n, in_channels, height, width] -> [n, D]."""
        features: Tensor = self.norm(self.groups(self.stem(images))).relu().mean((-1, -2))
        return features

    @staticmethod
    def from_xfer(checkpoint: Mapping[str, Any], depth: int = 28, widen_factor: int = 10) -> dict[str, Tensor]:
        """A published checkpoint, or its ``netFeat`` state_dict, as a state_dict of this module.

        Raises:
            ValueError: a key is missing or unknown, named.
        """
        names = {"norm1": "bn1", "norm2": "bn2", "conv1": "conv1", "conv2": "conv2", "shortcut": "convShortcut"}

        def rename(key: str) -> str:
            if not key.startswith("groups."):
                return key.replace("stem.", "conv1.").replace("norm.", "bn1.")
            _, group, block, layer, tensor = key.split(".")
            return f"block{int(group) + 1}.layer.{block}.{names[layer]}.{tensor}"

        with torch.device("meta"):
            return _renamed(WideResNet(depth, widen_factor), checkpoint, rename, "WideResNet checkpoint")
