"""Small backbones: their names, what they cost, and the supernet that holds the weights of all."""

from __future__ import annotations

import pytest
import torch

from kernelmeta.graceful.search import operations, parse
from kernelmeta.graceful.small import Architecture, SmallBackbone, parse_backbone
from kernelmeta.graceful.supernet import Space, SuperNet
from kernelmeta.nn import Conv4
from kernelmeta.training.backbones import make_backbone

SPACE = Space((1, 2), ((4, 6), (4, 8), (8, 12)), (3, 5))


def test_a_name_tells_the_architecture():
    architecture, D = parse_backbone("small-1.2-4.8.12-3.5.3-16")
    assert (architecture, D) == (Architecture((1, 2), (4, 8, 12), (3, 5, 3)), 16)
    assert parse(architecture.name) == architecture
    backbone = make_backbone(f"small-{architecture.name}-16", 3, 20)
    assert backbone(torch.zeros(2, 3, 20, 20)).shape == (2, backbone.n_features(20, 20)) == (2, 16)
    for name in ("small-", "small-1.2-4.8.12-3.5.4-16", "small-0.2-4.8.12-3.5.3-16", "small-1.2-4.8-3.5.3-16"):
        with pytest.raises(ValueError, match="backbone: expected small-<depths>"):
            make_backbone(name, 1, 28)


@pytest.mark.parametrize("size", [16, 19, 28])
def test_operations_are_those_that_the_layers_do(size):
    for architecture in (SPACE.largest(), SPACE.smallest(), Architecture((2, 1), (4, 8, 12), (5, 3, 3))):
        backbone = SmallBackbone(architecture, 7, 2)
        assert architecture.operations(size, 7, 2) == operations(backbone, 2, size)
        assert backbone.training
    # 16 x 16 x 9 x 8, then 8 x 8, 4 x 4, 2 x 2 x 9 x 64.
    assert operations(Conv4(8, 1), 1, 16) == 256 * 9 * 8 + (64 + 16 + 4) * 9 * 64


def test_the_space_is_every_combination():
    assert len(set(SPACE)) == len(list(SPACE)) == 2**8
    assert SPACE.largest() == Architecture((2, 2), (6, 8, 12), (5, 5, 5))
    assert SPACE.smallest() in set(SPACE)


@pytest.mark.parametrize("name", ["1.1-4.4.8-3.3.3", "2.1-6.4.12-3.5.3", "2.2-6.8.12-5.5.5"])
def test_a_part_of_the_supernet_is_the_backbone_that_it_gives(name):
    torch.manual_seed(0)
    supernet, images = SuperNet(SPACE, 5), torch.randn(9, 1, 16, 16)
    architecture = parse(name)
    backbone = supernet.extract(architecture, [images[:4], images])
    assert backbone.architecture == architecture and not backbone.training
    # With the statistics of the batch, as in training.
    assert torch.allclose(backbone.train()(images), supernet(images, architecture), atol=1e-6)
    supernet(images, architecture).square().sum().backward()
    first = supernet.largest.stages[0][0][0].weight.grad
    k = (5 - architecture.kernels[0]) // 2
    inner = first[: architecture.widths[0], :, k : 5 - k, k : 5 - k]
    assert inner.abs().min() > 0 and torch.isclose(first.abs().sum(), inner.abs().sum())


def test_statistics_are_the_mean_over_the_calibration_images():
    torch.manual_seed(0)
    supernet, batches = SuperNet(SPACE, 5), [torch.randn(4, 1, 16, 16), 3 + torch.randn(4, 1, 16, 16)]
    backbone = supernet.extract(SPACE.largest(), batches)
    maps = [backbone.stages[0][0][0](batch).mean((0, 2, 3)) for batch in batches]
    assert torch.allclose(backbone.stages[0][0][1].running_mean, sum(maps) / 2, atol=1e-5)
