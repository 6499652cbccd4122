"""Features and tasks as the raw ops `program` and `ridge` take them: even, or of unequal size."""

from __future__ import annotations

from typing import Any

from kernelmeta.tasks import Ragged

FEATURES = (
    "Tensor support, Tensor? support_index, Tensor query, Tensor? query_index, Tensor support_labels, "
    "Tensor? support_offsets, Tensor? query_offsets, Tensor? n_ways"
)
SIZES = "int max_support, int max_query"  # -1 where they are not known


_EVEN: dict[str, Any] = dict.fromkeys(Ragged._fields[:3]) | {"max_support": -1, "max_query": -1}


def fields(ragged: Ragged | None) -> dict[str, Any]:
    """The arguments of the raw op that say where tasks begin."""
    if ragged is None:
        return _EVEN
    known = {"max_support": ragged.max_support, "max_query": ragged.max_query}
    return ragged._asdict() | {name: -1 if most is None else most for name, most in known.items()}


def of_call(call: Any) -> Ragged | None:
    """The other way round."""
    if call.support_offsets is None:
        return None
    most = (None if m < 0 else m for m in (call.max_support, call.max_query))
    return Ragged(call.support_offsets, call.query_offsets, call.n_ways, *most)


def shapes(call: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Leading dimensions of support and query, [T, rows] or [all rows], and T."""
    support = tuple(call.support.shape[:-1] if call.support_index is None else call.support_index.shape)
    query = tuple(call.query.shape[:-1] if call.query_index is None else call.query_index.shape)
    return support, query, query[0] if call.support_offsets is None else call.support_offsets.shape[0] - 1
