"""The influence loss against its formula in float64, and classes that one of the models does not know."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernelmeta.graceful import frozen_classifier, influence_loss, match_classes
from kernelmeta.nn import CosineClassifier


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def test_influence_is_the_old_classifiers_cross_entropy_on_the_first_features(draw):
    old = torch.nn.Linear(4, 3).double()
    features = torch.randn(6, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    logits = features[:, :4] @ old.weight.T + old.bias
    naive = torch.stack([logits[i].exp().sum().log() - logits[i, labels[i]] for i in range(6)]).mean()
    loss = influence_loss(features, labels, frozen_classifier(old), 4)
    assert torch.allclose(loss, naive, rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, features)
    (expected,) = torch.autograd.grad(naive, features)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-14)
    assert not gradient[:, 4:].any()
    with pytest.raises(ValueError, match="4 or more"):
        influence_loss(features[:, :3], labels, old, 4)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_new_classes_get_their_old_features_mean(kind, draw):
    old = torch.nn.Linear(4, 3).double() if kind == "linear" else CosineClassifier(4, 3).double()
    features, labels = torch.randn(8, 4, generator=draw, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 3, 3, 4, 4])
    # New class 1 was no class of the old model, 3 neither; 0, 2, 4 were its 2, 0, 1.
    columns = torch.tensor([2, -1, 0, -1, 1])
    made = frozen_classifier(old, columns=columns, features=features, labels=labels)
    logits = made(features)
    assert logits.shape == (8, 5)
    assert torch.allclose(logits[:, [2, 4, 0]], old(features), rtol=1e-12)
    mean = F.normalize(features[1:3].mean(0), dim=0)
    if kind == "linear":
        expected = features @ mean * old.weight.norm(dim=1).mean() + old.bias.mean()
    else:
        expected = old.scale * F.normalize(features, dim=1) @ mean
    assert torch.allclose(logits[:, 1], expected, rtol=1e-12)
    assert not any(p.requires_grad for p in made.parameters())
    assert all(p.requires_grad for p in old.parameters()) and old.weight.shape == (3, 4)
    for more, message in (
        ({}, "old model's features"),
        ({"features": features, "labels": labels.clamp(max=2)}, "none of class 3"),
        ({"features": features[:, :2], "labels": labels}, r"expected \[n, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            frozen_classifier(old, columns=columns, **more)
    with pytest.raises(ValueError, match="classes below 3"):
        frozen_classifier(old, columns=torch.tensor([0, 3]))


def test_classes_are_matched_by_name():
    assert match_classes(("a", "b"), ("c", "b", "a"), same=False).tolist() == [-1, 1, 0]
    with pytest.raises(ValueError, match="1 of the old model's 2 are not there, 'b'"):
        match_classes(("a", "b"), ("a",), same=False)
    with pytest.raises(ValueError, match="does not know, 'c'"):
        match_classes(("a", "b"), ("a", "b", "c"), same=True)
