"""Updates that keep what users rely on: a successor without new mistakes, one that searches the gallery that its
predecessor indexed, and small networks that search the gallery of a large one.
"""

from __future__ import annotations

from kernelmeta.graceful.compatible import frozen_classifier, influence_loss, match_classes
from kernelmeta.graceful.retrieval import (
    Compatibility,
    Labels,
    Scores,
    Views,
    backfill,
    compatibility,
    cross_scores,
    nearest,
    retrieval_scores,
)

__all__ = [
    "Compatibility",
    "Labels",
    "Scores",
    "Views",
    "backfill",
    "compatibility",
    "cross_scores",
    "frozen_classifier",
    "influence_loss",
    "match_classes",
    "nearest",
    "retrieval_scores",
]
