"""A family of small backbones: what is searched through for a network that runs where queries are made."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

PREFIX = "small-"


class Architecture(NamedTuple):
    """Of a small backbone: a stem and two stages, each of which halves the image's sides."""

    depths: tuple[int, int]  # convolutions of the stages
    widths: tuple[int, int, int]  # channels of the stem and of the stages
    kernels: tuple[int, int, int]  # sides of their convolutions, odd

    @property
    def name(self) -> str:
        """ "1.2-16.32.64-3.3.5", say: depths, widths, kernels."""
        return "-".join(".".join(map(str, part)) for part in self)

    def operations(self, size: int, n_features: int, in_channels: int = 1) -> int:
        """Multiplications of one image [in_channels, size, size]; two floating-point operations each.

        Args:
            size: side of the image.
            n_features: D.
            in_channels: of the image.
        """
        side, channels, total = size, in_channels, 0
        for depth, width, kernel in zip((1, *self.depths), self.widths, self.kernels, strict=True):
            side = (side + 1) // 2
            total += side**2 * kernel**2 * width * (channels + (depth - 1) * width)
            channels = width
        return total + channels * n_features


def parse_backbone(name: str) -> tuple[Architecture, int]:
    """The architecture and the number of features that a name of `SmallBackbone` tells.

    Raises:
        ValueError: it is no such name.
    """
    found = re.fullmatch(
        PREFIX + r"(\d+)\.(\d+)-(\d+)\.(\d+)\.(\d+)-(\d+)\.(\d+)\.(\d+)-(\d+)", name if len(name) < 80 else ""
    )
    if found:
        d1, d2, w0, w1, w2, k0, k1, k2, D = map(int, found.groups())
        kernels_fit = all(k % 2 and k <= 15 for k in (k0, k1, k2))
        if min(d1, d2, w0, w1, w2, D) >= 1 and max(d1, d2) <= 64 and max(w0, w1, w2, D) <= 65536 and kernels_fit:
            return Architecture((d1, d2), (w0, w1, w2), (k0, k1, k2)), D
    raise ValueError(
        f"backbone: expected {PREFIX}<depths>-<widths>-<kernels>-<features>, {PREFIX}1.2-16.32.64-3.3.5-64 say, with"
        f" odd kernels, got {name[:80]!r}"
    )


class SmallBackbone(nn.Module):
    """A stem, two stages, the mean over all places, and a linear layer to the features.

    Every layer is a convolution, BatchNorm and ReLU; the first of a stage halves the sides, the others add what comes
    in. Its name as a backbone is ``small-<depths>-<widths>-<kernels>-<features>``.

    Args:
        architecture: depths, widths, kernels.
        n_features: D, which may be that of a large model.
        in_channels: 3 for colour, 1 for grey images.
    """

    def __init__(self, architecture: Architecture, n_features: int, in_channels: int = 1) -> None:
        super().__init__()
        self.architecture, self.D = architecture, n_features
        layers: list[nn.Module] = []
        channels = in_channels
        for depth, width, kernel in zip((1, *architecture.depths), *architecture[1:], strict=True):
            stage = nn.ModuleList()
            for index in range(depth):
                convolution = nn.Conv2d(
                    channels, width, kernel, stride=1 if index else 2, padding=kernel // 2, bias=False
                )
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                stage.append(nn.Sequential(convolution, nn.BatchNorm2d(width)))
                channels = width
            layers.append(stage)
        self.stages = nn.ModuleList(layers)
        self.embedding = nn.Linear(channels, n_features)

    def n_features(self, height: int, width: int) -> int:
        """D, whatever the image's size."""
        return self.D

    def forward(self, images: Tensor) -> Tensor:
        """[n, in_channels, height, width] -> [n, D]."""
        x = images
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for index, layer in enumerate(stage):
                made = layer(x)
                x = F.relu(made + x if index else made)
        features: Tensor = self.embedding(x.mean((2, 3)))
        return features
