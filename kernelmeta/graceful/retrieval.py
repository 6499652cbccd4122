"""Retrieval of one model's queries in another model's gallery: top-1, mean average precision, and what an update
gains, costs, and gets from a gallery indexed anew in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelmeta.reference.norms import unit
from kernelmeta.reference.precision import without_autocast

# Similarities held at once.
_HELD = 2**24
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Scores(NamedTuple):
    """Of queries in a gallery, in percent."""

    top1: float  # queries whose nearest item is of their class
    mean_average_precision: float  # over queries, of the precision at each item of their class
    queries: int  # with an item of their class in the gallery; no other counts


class Compatibility(NamedTuple):
    """What an update of the model does for a gallery; ``x_y``: queries of x in the gallery of y."""

    old_old: Scores  # the old model by itself
    new_old: Scores  # no item indexed again
    new_new: Scores  # all items indexed again
    free_free: Scores | None  # of a model trained without regard to the old one
    free_old: Scores | None  # the same model's queries in the old gallery

    def update_gain(self, metric: str = "top1") -> float | None:
        """The share of the free model's gain that the new model brings without indexing anything again.

        Args:
            metric: "top1" or "mean_average_precision".

        Returns:
            None where there is no free model, or it gains nothing.
        """
        if self.free_free is None:
            return None
        old, free = getattr(self.old_old, metric), getattr(self.free_free, metric)
        return None if free <= old else (getattr(self.new_old, metric) - old) / (free - old)

    def tax(self, metric: str = "top1") -> float | None:
        """Points that the new model loses against the free one, each in its own gallery; None without a free one.

        Args:
            metric: "top1" or "mean_average_precision".
        """
        return None if self.free_free is None else getattr(self.free_free, metric) - getattr(self.new_new, metric)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        scores = {name: value._asdict() for name, value in zip(self._fields, self, strict=True) if value is not None}
        metrics = ("top1", "mean_average_precision")
        return {
            **scores,
            "update_gain": {metric: self.update_gain(metric) for metric in metrics},
            "tax": {metric: self.tax(metric) for metric in metrics},
        }


def nearest(
    query: Tensor,
    gallery: Tensor,
    *,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    backend: str = "auto",
    block: int = 65536,
) -> Tensor:
    """The item of the gallery with the largest cosine to each query.

    The gallery is read ``block`` rows at a time and may be larger than memory (a tensor of a mapped file).

    Args:
        query: [Q, D].
        gallery: [G, D].
        query_ids: [Q] int64; the item of the same id is the query itself and is left out.
        gallery_ids: [G] int64, each once.
        backend: "faiss" (faiss-cpu, an extra), "torch", or "auto": faiss where it is installed and queries are on the
            CPU.
        block: rows of the gallery at a time.

    Returns:
        [Q] int64, row of the gallery, the first of equals; -1 where nothing is left. On the queries' device, where the
        search runs, wherever the gallery is.

    Raises:
        ValueError: shapes do not fit, ids are not distinct, the gallery is empty, or features are not finite.
        ModuleNotFoundError: faiss was asked for and is not installed.
    """
    _check(query, gallery, query_ids, gallery_ids)
    search = _block_search("torch" if backend == "auto" and query.is_cuda else backend)
    query_ids, gallery_ids = _beside(query, query_ids), _beside(query, gallery_ids)
    best = torch.full((len(query),), -torch.inf, dtype=query.dtype, device=query.device)
    row = torch.full((len(query),), -1, device=query.device)
    query = unit(query)
    for start in range(0, len(gallery), block):
        items = _normalised(gallery[start : start + block], query)
        own = None if gallery_ids is None else gallery_ids[start : start + block]
        similarity, found = search(query, items, query_ids, own)
        better = similarity > best  # and not equal: the first stays
        best = torch.where(better, similarity, best)
        row = torch.where(better, found + start, row)
    return row


def retrieval_scores(
    query: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    *,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    block: int = 65536,
) -> Scores:
    """Top-1 and mean average precision of queries in a gallery, by cosine; equals rank in the gallery's order.

    The gallery is read ``block`` rows at a time; of the similarities, those of as many queries as fit are held.

    Args:
        query: [Q, D].
        gallery: [G, D]; may be a tensor of a mapped file.
        query_labels: [Q] int64.
        gallery_labels: [G] int64.
        query_ids, gallery_ids: see `nearest`.
        block: rows of the gallery at a time.

    Raises:
        ValueError: shapes do not fit, ids are not distinct, the gallery is empty, features are not finite, or no
            query has an item of its class in the gallery.
    """
    _check(query, gallery, query_ids, gallery_ids)
    if query_labels.shape != (len(query),) or gallery_labels.shape != (len(gallery),):
        raise ValueError(
            f"labels: expected {len(query)} and {len(gallery)}, got {list(query_labels.shape)} and"
            f" {list(gallery_labels.shape)}"
        )
    query_labels, gallery_labels = query_labels.to(query.device), gallery_labels.to(query.device)
    query_ids, gallery_ids = _beside(query, query_ids), _beside(query, gallery_ids)
    n_rows = max(1, _HELD // len(gallery))
    first, precision, counted = 0.0, 0.0, 0
    for start in range(0, len(query), n_rows):
        part = slice(start, start + n_rows)
        similarity = _similarities(unit(query[part]), gallery, block)
        relevant = query_labels[part, None] == gallery_labels
        if query_ids is not None and gallery_ids is not None:
            own = query_ids[part, None] == gallery_ids
            similarity[own] = -torch.inf
            relevant &= ~own
        kept = relevant.any(1)
        hits = relevant[kept].gather(1, similarity[kept].argsort(dim=1, descending=True, stable=True)).double()
        place = torch.arange(1, len(gallery) + 1, dtype=torch.float64, device=query.device)
        precision += float(((hits.cumsum(1) / place) * hits).sum(1).div(hits.sum(1)).sum())
        first += float(hits[:, 0].sum())
        counted += int(kept.sum())
    if not counted:
        raise ValueError("gallery: it holds no item of any query's class (a query itself is left out)")
    return Scores(100 * first / counted, 100 * precision / counted, counted)


class Views(NamedTuple):
    """One model's features of the images that are looked for, and of those that are looked through."""

    query: Tensor  # [Q, D]
    gallery: Tensor  # [G, D]


class Labels(NamedTuple):
    """Classes of a retrieval task, and ids where the same image may stand on both sides."""

    query: Tensor  # [Q] int64
    gallery: Tensor  # [G] int64
    query_ids: Tensor | None = None  # [Q] int64
    gallery_ids: Tensor | None = None  # [G] int64, each once


def cross_scores(query: Tensor, gallery: Tensor, labels: Labels) -> Scores:
    """`retrieval_scores` of two models: where one is wider, the features that both have (its first ones) are compared.

    Args:
        query: [Q, D_query], of one model.
        gallery: [G, D_gallery], of the other.
        labels: of both.

    Raises:
        ValueError: see `retrieval_scores`.
    """
    D = min(query.shape[-1], gallery.shape[-1])
    return retrieval_scores(
        query[:, :D],
        gallery[:, :D],
        labels.query,
        labels.gallery,
        query_ids=labels.query_ids,
        gallery_ids=labels.gallery_ids,
    )


def compatibility(old: Views, new: Views, labels: Labels, free: Views | None = None) -> Compatibility:
    """How well the new model searches the old gallery, and what that costs in its own.

    Args:
        old: features of the old model.
        new: features of its successor.
        labels: of the images.
        free: features of a model trained as the successor was, without regard to the old one.

    Raises:
        ValueError: see `retrieval_scores`.
    """
    return Compatibility(
        cross_scores(*old, labels),
        cross_scores(new.query, old.gallery, labels),
        cross_scores(*new, labels),
        None if free is None else cross_scores(*free, labels),
        None if free is None else cross_scores(free.query, old.gallery, labels),
    )


def backfill(
    old: Views, new: Views, labels: Labels, *, shares: Sequence[float] = SHARES, seed: int = 0
) -> list[tuple[float, Scores]]:
    """Scores of the new model's queries in a gallery of which a share has been indexed again.

    Where the new model is wider, its first features count: items of both models must compare.

    Args:
        old: features of the old model.
        new: features of its successor.
        labels: of the images.
        shares: of the gallery, 0 to 1.
        seed: of the order in which items are indexed again; each share holds the smaller ones.

    Returns:
        A pair (share, scores) for every share.

    Raises:
        ValueError: a share is not in 0..1, or the new features are narrower; see `retrieval_scores`.
    """
    D, G = old.gallery.shape[-1], len(old.gallery)
    if new.gallery.shape[-1] < D:
        raise ValueError(f"new: expected at least the old model's {D} features, got {new.gallery.shape[-1]}")
    order = torch.randperm(G, generator=torch.Generator().manual_seed(seed))
    curve = []
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"shares: expected numbers of 0 to 1, got {share}")
        done = order[: round(share * G)]
        mixed = old.gallery.clone()
        mixed[done] = new.gallery[done, :D].to(mixed)
        curve.append((float(share), cross_scores(new.query, mixed, labels)))
    return curve


def _check(query: Tensor, gallery: Tensor, query_ids: Tensor | None, gallery_ids: Tensor | None) -> None:
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"gallery: expected [G, D] and queries [Q, D], got {list(gallery.shape)} and {list(query.shape)}"
        )
    if not len(gallery) or not len(query):
        raise ValueError(f"gallery: expected items and queries, got {len(gallery)} and {len(query)}")
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("gallery_ids: expected with query_ids, and only with them")
    if query_ids is not None and gallery_ids is not None:
        if query_ids.shape != (len(query),) or gallery_ids.shape != (len(gallery),):
            raise ValueError(f"gallery_ids: expected {len(gallery)}, and {len(query)} query_ids")
        if len(gallery_ids.unique()) != len(gallery_ids):
            raise ValueError("gallery_ids: expected each once")
    if not bool(query.isfinite().all()):
        raise ValueError("query: holds NaN or infinite features")


def _beside(query: Tensor, ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.to(query.device)


def _normalised(items: Tensor, like: Tensor) -> Tensor:
    if not bool(items.isfinite().all()):
        raise ValueError("gallery: holds NaN or infinite features")
    return unit(items.to(like))


def _similarities(query: Tensor, gallery: Tensor, block: int) -> Tensor:
    """[Q, G] cosines, of normalised queries."""
    made = query.new_empty(len(query), len(gallery))
    for start in range(0, len(gallery), block):
        items = _normalised(gallery[start : start + block], query)
        torch.mm(query, items.T, out=made[:, start : start + len(items)])
    return made


def _block_search(backend: str) -> Any:
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"backend: expected auto, faiss or torch, got {backend!r}")
    if backend != "torch":
        try:
            import faiss  # noqa: F401
        except ModuleNotFoundError:
            if backend == "faiss":
                raise ModuleNotFoundError(
                    "faiss is not installed: pip install 'kernelmeta[faiss]', or backend='torch'"
                ) from None
        else:
            return _faiss_search
    return _torch_search


@without_autocast
def _torch_search(query: Tensor, items: Tensor, query_ids: Tensor | None, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Similarity and row of each query's nearest item of a block; -inf where there is none."""
    values, rows = [], []
    n_rows = max(1, _HELD // len(items))
    for start in range(0, len(query), n_rows):
        similarity = query[start : start + n_rows] @ items.T
        if query_ids is not None and own is not None:
            similarity[query_ids[start : start + n_rows, None] == own] = -torch.inf
        value, row = similarity.max(1)  # the first of equals
        values.append(value)
        rows.append(row)
    return torch.cat(values), torch.cat(rows)


def _faiss_search(query: Tensor, items: Tensor, query_ids: Tensor | None, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_torch_search`, in float32."""
    import faiss

    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.float().contiguous().numpy(force=True))
    k = 1 if own is None else min(2, len(items))
    searched = index.search(query.float().contiguous().numpy(force=True), k)
    similarity, rows = (torch.from_numpy(found).to(query.device) for found in searched)
    if query_ids is not None and own is not None:
        similarity[own[rows] == query_ids[:, None]] = -torch.inf
    value, place = similarity.max(1)
    return value.to(query.dtype), rows.gather(1, place[:, None])[:, 0]
