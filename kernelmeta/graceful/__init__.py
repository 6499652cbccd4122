"""Updates that keep what users rely on: a successor without new mistakes, one that searches the gallery that its
predecessor indexed, and small networks that search the gallery of a large one.
"""

from __future__ import annotations

from kernelmeta.graceful.compatible import frozen_classifier, influence_loss, match_classes
from kernelmeta.graceful.flips import Flips, Interval, flips
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
from kernelmeta.ops.focal_distillation_op import focal_distillation

__all__ = [
    "Compatibility",
    "Flips",
    "Interval",
    "Labels",
    "Scores",
    "Views",
    "backfill",
    "compatibility",
    "cross_scores",
    "flips",
    "focal_distillation",
    "frozen_classifier",
    "influence_loss",
    "match_classes",
    "nearest",
    "retrieval_scores",
]
