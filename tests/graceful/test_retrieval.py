"""Retrieval against loops in float64: top-1, average precision, ties, self-matches, galleries in blocks."""

from __future__ import annotations

import math

import pytest
import torch

from kernelmeta.graceful import retrieval
from kernelmeta.graceful.retrieval import (
    Labels,
    Views,
    backfill,
    compatibility,
    cross_scores,
    nearest,
    retrieval_scores,
)


def naive(query, gallery, query_labels, gallery_labels, query_ids=None, gallery_ids=None):
    """(nearest items, top-1, mAP), item by item."""
    found, first, precisions = [], [], []
    for i, q in enumerate(query.tolist()):
        scored = []
        for j, g in enumerate(gallery.tolist()):
            if query_ids is not None and query_ids[i] == gallery_ids[j]:
                continue
            length = math.hypot(*q) * math.hypot(*g)
            scored.append((-sum(a * b for a, b in zip(q, g, strict=True)) / length, j))
        ranked = [j for _, j in sorted(scored)]
        found.append(ranked[0] if ranked else -1)
        right = [bool(gallery_labels[j] == query_labels[i]) for j in ranked]
        if any(right):
            first.append(right[0])
            hits = [k for k, hit in enumerate(right) if hit]
            precisions.append(sum((n + 1) / (k + 1) for n, k in enumerate(hits)) / len(hits))
    return found, 100 * sum(first) / len(first), 100 * sum(precisions) / len(precisions), len(first)


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (23, 31))
    labels = [torch.randint(0, 5, (n,), generator=generator) for n in (23, 31)]
    labels[0][:2] = 7  # a class that the gallery has not
    return query, gallery, *labels


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("ids", [False, True])
def test_scores_are_those_of_a_loop(task, block, ids, monkeypatch):
    monkeypatch.setattr(retrieval, "_HELD", 64)  # two queries at a time
    query, gallery, query_labels, gallery_labels = task
    more = {}
    if ids:
        more = {"query_ids": torch.arange(23), "gallery_ids": torch.arange(31)}
        gallery[:23] = query  # every query's nearest item is itself
    found, first, precision, n = naive(*task, *more.values())
    assert nearest(query, gallery, block=block, backend="torch", **more).tolist() == found
    scores = retrieval_scores(*task, block=block, **more)
    assert scores.queries == n < 23
    assert scores.top1 == pytest.approx(first, rel=1e-12)
    assert scores.mean_average_precision == pytest.approx(precision, rel=1e-12)


def test_faiss_finds_the_same(task):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install 'kernelmeta[faiss]')")
    query, gallery, *_ = task
    more = {"query_ids": torch.arange(23), "gallery_ids": torch.arange(31)}
    for ids in ({}, more):
        for block in (4, 100):
            torch_finds = nearest(query, gallery, backend="torch", **ids)
            assert torch.equal(nearest(query, gallery, backend="faiss", block=block, **ids), torch_finds)


def test_without_faiss_torch_searches_and_asking_for_it_says_how(task, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    query, gallery, *_ = task
    assert torch.equal(nearest(query, gallery), nearest(query, gallery, backend="torch"))
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        nearest(query, gallery, backend="faiss")


@pytest.mark.parametrize("block", [1, 2, 100])
def test_of_equals_the_first_of_the_gallery_ranks_first(block):
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert nearest(query, gallery, block=block, backend="torch").tolist() == [1]
    labels = torch.tensor([1, 0, 1, 1])
    scores = retrieval_scores(query, gallery, torch.tensor([1]), labels, block=block)
    # Ranks 1 to 3 are rows 1 to 3; row 0 is last.
    assert scores == pytest.approx((0.0, 100 * (1 / 2 + 2 / 3 + 3 / 4) / 3, 1))


def test_many_equals_rank_in_the_gallerys_order():
    gallery = torch.ones(3000, 2)
    labels = torch.zeros(3000, dtype=torch.int64)
    labels[::2] = 1
    scores = retrieval_scores(torch.ones(1, 2), gallery, torch.tensor([1]), labels)
    precisions = [(n + 1) / (2 * n + 1) for n in range(1500)]
    assert scores == pytest.approx((100.0, 100 * sum(precisions) / 1500, 1))


def test_a_gallery_of_one_item():
    query, gallery = torch.randn(2, 3), torch.randn(1, 3)
    assert retrieval_scores(query, gallery, torch.tensor([0, 1]), torch.tensor([1])) == (100.0, 100.0, 1)
    own = {"query_ids": torch.tensor([5, 6]), "gallery_ids": torch.tensor([5])}
    assert nearest(query, gallery, backend="torch", **own).tolist() == [-1, 0]
    with pytest.raises(ValueError, match="no item of any query's class"):
        retrieval_scores(query[:1], gallery, torch.tensor([1]), torch.tensor([1]), **{k: v[:1] for k, v in own.items()})


def views(width, seed, noise):
    """Features of four classes, each about a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(6)
    means = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    made = [means[labels] + noise * torch.randn(24, width, generator=generator) for _ in range(2)]
    return Views(*made), Labels(labels, labels)


def test_compatibility_and_backfill_are_made_of_the_same_scores():
    old, labels = views(5, 0, 1.5)
    new, free = (Views(*(side + 0.5 * torch.randn_like(side) for side in views(5, s, 0.2)[0])) for s in (2, 3))
    found = compatibility(old, new, labels, free)
    assert found.new_old == retrieval_scores(new.query, old.gallery, labels.query, labels.gallery)
    gain = (found.new_old.top1 - found.old_old.top1) / (found.free_free.top1 - found.old_old.top1)
    assert found.update_gain() == pytest.approx(gain)
    assert found.tax("mean_average_precision") == pytest.approx(
        found.free_free.mean_average_precision - found.new_new.mean_average_precision
    )
    curve = backfill(old, new, labels)
    assert [share for share, _ in curve] == [0, 0.25, 0.5, 0.75, 1]
    assert curve[0][1] == pytest.approx(found.new_old, abs=1e-4) and curve[-1][1] == pytest.approx(
        found.new_new, abs=1e-4
    )
    # A gallery of two models of other lengths is none of directions alone.
    longer = Views(new.query, 9 * new.gallery)
    assert backfill(old, longer, labels)[2][1] == pytest.approx(curve[2][1], abs=1e-4)


def test_of_a_wider_model_the_first_features_count_against_a_narrower_one():
    old, labels = views(5, 0, 1.0)
    new = Views(*(torch.cat([side, 9 * torch.randn(24, 3)], 1) for side in views(5, 4, 0.3)[0]))
    narrow = Views(*(side[:, :5] for side in new))
    assert cross_scores(new.query, old.gallery, labels) == cross_scores(narrow.query, old.gallery, labels)
    assert backfill(old, new, labels) == backfill(old, narrow, labels)
    assert compatibility(old, new, labels).new_new != compatibility(old, narrow, labels).new_new
    with pytest.raises(ValueError, match="at least the old model's 8"):
        backfill(new, old, labels)


def test_without_a_free_model_there_is_no_gain():
    old, labels = views(5, 0, 1.0)
    found = compatibility(old, old, labels)
    assert found.update_gain() is None and found.tax() is None
    assert "free_free" not in found.to_dict()
    assert compatibility(old, old, labels, old).update_gain() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery": torch.empty(0, 6)}, "expected items"),
        ({"gallery": torch.ones(3, 5)}, r"expected \[G, D\]"),
        ({"query": torch.full((23, 6), math.nan)}, "query: holds NaN"),
        ({"gallery": torch.full((31, 6), math.inf)}, "gallery: holds NaN or inf"),
        ({"query_ids": torch.arange(23)}, "gallery_ids: expected with"),
        ({"query_ids": torch.arange(23), "gallery_ids": torch.zeros(31).long()}, "each once"),
        ({"query_ids": torch.arange(2), "gallery_ids": torch.arange(31)}, "2.*|expected 31"),
        ({"query_labels": torch.zeros(2).long()}, "labels: expected 23"),
    ],
)
def test_what_does_not_fit_is_refused(task, change, message):
    arguments = dict(zip(("query", "gallery", "query_labels", "gallery_labels"), task, strict=True))
    with pytest.raises(ValueError, match=message):
        retrieval_scores(**{**arguments, **change})


@pytest.mark.parametrize("size", [1e20, 1e25])
def test_the_size_of_items_does_not_matter(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(5, 6, generator=generator), torch.randn(20, 6, generator=generator)
    want = retrieval.nearest(query, gallery)
    assert torch.equal(retrieval.nearest(query * size, gallery), want)
    assert torch.equal(retrieval.nearest(query, gallery * size), want)
