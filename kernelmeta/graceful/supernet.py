"""One set of weights for a whole family of small backbones.

Duggal, Zhou, Yang, Xiong, Xia, Tu, Soatto: Compatibility-aware Heterogeneous Visual Search, CVPR 2021.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kernelmeta.graceful.small import Architecture, SmallBackbone


class Space(NamedTuple):
    """The architectures to choose from: every depth, width and kernel with every other."""

    depths: tuple[int, ...] = (1, 2)
    widths: tuple[tuple[int, ...], ...] = ((8, 16, 24), (16, 24, 32, 48), (24, 32, 48, 64, 96))  # stem, stages
    kernels: tuple[int, ...] = (3, 5)

    def genes(self) -> list[tuple[int, ...]]:
        """What each of the eight numbers of an architecture may be."""
        return [self.depths] * 2 + list(self.widths) + [self.kernels] * 3

    def __iter__(self) -> Iterator[Architecture]:
        return (architecture_of(genes) for genes in itertools.product(*self.genes()))

    def largest(self) -> Architecture:
        """The one whose weights hold all others'."""
        return architecture_of([max(gene) for gene in self.genes()])

    def smallest(self) -> Architecture:
        """The one of the fewest operations."""
        return architecture_of([min(gene) for gene in self.genes()])

    def draw(self, random: np.random.Generator) -> Architecture:
        """Any of them, all alike.

        Args:
            random: where it comes from.
        """
        return architecture_of([int(random.choice(gene)) for gene in self.genes()])


def architecture_of(genes: Iterable[int]) -> Architecture:
    """From eight numbers: two depths, three widths, three kernels."""
    d1, d2, w0, w1, w2, k0, k1, k2 = genes
    return Architecture((d1, d2), (w0, w1, w2), (k0, k1, k2))


class SuperNet(nn.Module):
    """The largest backbone of a space; every other is made of its first channels and its kernels' middles.

    Args:
        space: of the architectures.
        n_features: D, that of the gallery.
        in_channels: of the images.
    """

    def __init__(self, space: Space, n_features: int, in_channels: int = 1) -> None:
        super().__init__()
        self.space, self.D, self.in_channels = space, n_features, in_channels
        self.largest = SmallBackbone(space.largest(), n_features, in_channels)

    def n_features(self, height: int, width: int) -> int:
        """D, whatever the image's size."""
        return self.D

    def weights(self, skeleton: SmallBackbone) -> dict[str, Tensor]:
        """The part of the weights that a backbone of the space uses, as views: gradients reach the whole.

        Args:
            skeleton: a backbone of that architecture; its weights do not matter.
        """
        mine = dict(self.largest.named_parameters())
        return {name: _part(mine[name], theirs.shape) for name, theirs in skeleton.named_parameters()}

    def forward(self, images: Tensor, architecture: Architecture | None = None) -> Tensor:
        """[n, in_channels, height, width] -> [n, D], with the batch's own statistics; the largest by default."""
        if architecture is None:
            made: Tensor = self.largest(images)
            return made
        skeleton = self._skeleton(architecture)
        return functional_call(skeleton, self.weights(skeleton), (images,))

    def _skeleton(self, architecture: Architecture) -> SmallBackbone:
        with torch.random.fork_rng(devices=[]):
            return SmallBackbone(architecture, self.D, self.in_channels).to(self.largest.embedding.weight.device)

    @torch.no_grad()
    def extract(self, architecture: Architecture, images: Iterable[Tensor]) -> SmallBackbone:
        """A backbone of its own with this network's weights, ready to be judged.

        Args:
            architecture: one of the space.
            images: batches [n, in_channels, height, width] from which its BatchNorm takes means and variances: those
                of another architecture are not its own.
        """
        made = self._skeleton(architecture)
        made.load_state_dict(self.weights(made), strict=False)
        norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        made.train()
        for batch in images:
            made(batch)
        for norm in norms:
            norm.momentum = 0.1
        return made.eval()


def _part(weight: Tensor, shape: torch.Size) -> Tensor:
    """The first channels, and of a kernel the middle."""
    for dimension, (have, want) in enumerate(zip(weight.shape, shape, strict=True)):
        weight = weight.narrow(dimension, (have - want) // 2 if dimension > 1 else 0, want)
    return weight
