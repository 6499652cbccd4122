"""Modes on a card: under autocast every learner and every plain function computes in the precision of its arguments,
and what plain PyTorch gives there is what it gives on a CPU. Skipped where there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from episodes import draw
from nn.test_modules import LEARNERS
from test_plain_functions import CALLS, drawn, tensors
from torch import Tensor, nn

import kernelmeta as km
from kernelmeta import graceful

REASON = km.backends()["cuda"].reason
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"needs a GPU: {REASON}")
LOW = (torch.bfloat16, torch.float16)


def on_card(what: Any) -> Any:
    """A tensor or a module there; a call with all that it was given there."""
    if isinstance(what, (Tensor, nn.Module)):
        return what.to("cuda")
    if isinstance(what, partial):
        named = {name: on_card(value) for name, value in what.keywords.items()}
        return partial(on_card(what.func), *map(on_card, what.args), **named)
    return what


@contextlib.contextmanager
def ordered_sums() -> Iterator[None]:
    """PyTorch adds rows up in the order in which its threads come, unless told not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return bool(want) and all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_plain_functions(name: str) -> None:
    of_cpu, call = tensors(CALLS[name](2)()), on_card(CALLS[name](2))
    with ordered_sums():
        want = tensors(call())
        for a, b in zip(want, of_cpu, strict=True):
            assert a.is_cuda and a.dtype is b.dtype
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4 * float(b.detach().double().abs().max()))
        for dtype in LOW:
            with torch.autocast("cuda", dtype):
                assert same(tensors(call()), want), dtype


def views(device: str, labels_on: str) -> tuple[graceful.Views, graceful.Views, graceful.Labels]:
    """An old and a wider new model's features of 12 queries and 40 items of 4 classes, the queries among the items."""
    old, new = drawn(40, 8), drawn(40, 12, seed=1)
    classes, ids = torch.arange(40) % 4, torch.arange(40)
    named = (t.to(labels_on) for t in (classes[:12], classes, ids[:12], ids))
    models = (graceful.Views(x[:12].to(device), x.to(device)) for x in (old, new))
    return (*models, graceful.Labels(*named))


@pytest.mark.parametrize("labels_on", ["cuda", "cpu"])
def test_galleries(labels_on: str) -> None:
    def run(device: str, labels_on: str) -> tuple[list[list[int]], list[float]]:
        old, new, labels = views(device, labels_on)
        ids = {"query_ids": labels.query_ids, "gallery_ids": labels.gallery_ids}
        rows = [
            graceful.nearest(old.query, gallery, backend=backend, block=7, **ids).tolist()
            for backend in ("torch", "auto")
            for gallery in (old.gallery, old.gallery.cpu())
        ]
        found = graceful.compatibility(old, new, labels)
        scores = [found.old_old, found.new_old, found.new_new, *(s for _, s in graceful.backfill(old, new, labels))]
        return rows, [float(number) for score in scores for number in score]

    (rows, scores), (wanted, want) = run("cuda", labels_on), run("cpu", "cpu")
    assert rows == wanted
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(want))


@pytest.mark.parametrize("labels_on", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", [nn.Linear, km.nn.CosineClassifier])
def test_classifiers_of_older_models(kind: Any, labels_on: str) -> None:
    """With two classes of five that the old model never saw."""
    torch.manual_seed(0)
    old, columns = kind(8, 3), graceful.match_classes(("a", "b", "c"), ("b", "x", "a", "c", "y"), same=False)
    features, labels = drawn(20, 8), torch.arange(20) % 5

    def run(device: str, labels_on: str) -> Tensor:
        made = graceful.frozen_classifier(
            deepcopy(old).to(device), columns=columns, features=features.to(device), labels=labels.to(labels_on)
        )
        return graceful.influence_loss(features.to(device), labels.to(device), made, 8).cpu()

    torch.testing.assert_close(run("cuda", labels_on), run("cpu", "cpu"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learner", LEARNERS)
def test_learners(learner: Any) -> None:
    """A first call in inference mode leaves nothing behind; autocast changes neither logits nor gradients."""
    episode = draw(dtype=torch.float32)
    support, labels, query = episode.support.cuda(), episode.labels.cuda(), episode.query.cuda()
    torch.manual_seed(0)
    head = learner(3, 13).cuda()
    with torch.inference_mode():
        head.eval()(support, labels, query)
    head.train()

    def run() -> list[Tensor]:
        rows = support.detach().requires_grad_(), query.detach().requires_grad_()
        logits = head(rows[0], labels, rows[1])
        leaves = [*rows, *(p for p in head.parameters() if p.requires_grad)]
        found = torch.autograd.grad(logits.square().sum(), leaves, allow_unused=True)
        return [logits.detach(), *(t for t in found if t is not None)]

    want = run()
    assert all(t.isfinite().all() for t in want)
    for dtype in LOW:
        with torch.autocast("cuda", dtype):
            assert same(run(), want), dtype
