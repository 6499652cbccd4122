"""Fused few-shot inner loops for PyTorch. ``import kernelmeta as km``; see README.md.

- `km.ops`: the fused operators; `km.reference`: the same in plain PyTorch, the specification
- `km.nn`: modules; `km.func`: inner loops over whole networks; `km.data`: episodes and feature banks
- `km.linear`: neural tangent kernels, linearised networks, certified steps
- `km.graceful`: successors that keep what their predecessors do right, and the galleries that those indexed
- `km.Ragged`, `km.Classifier`, `km.AdaptedClassifier`: tasks of unequal size, what learners make for a task, and that
  as a file; `km.Phase`, `km.MLPParameters`: what programs consist of, and the parameters of the synthetic-gradient MLP;
  `km.FlipCounts`: rows that flip between two models; `km.Transform`: what is done to features before a learner
- `km.FewShotClassifier`: learners for scikit-learn, which it needs
- `km.backends()`, `km.use_backend()`: what this installation can run, and what to run
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kernelmeta.starting  # noqa: F401 (before what takes seconds)

# isort: split
from kernelmeta import data, func, graceful, linear, nn, ops, reference, triton
from kernelmeta.adapted_classifier import AdaptedClassifier
from kernelmeta.backends import backends, use_backend
from kernelmeta.flip_counts import FlipCounts
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.phases import Phase
from kernelmeta.tasks import Classifier, Ragged
from kernelmeta.transforms import Transform
from kernelmeta.version import __version__

__all__ = [
    "AdaptedClassifier",
    "Classifier",
    "FlipCounts",
    "MLPParameters",
    "Phase",
    "Ragged",
    "Transform",
    "__version__",
    "backends",
    "data",
    "func",
    "graceful",
    "linear",
    "nn",
    "ops",
    "reference",
    "triton",
    "use_backend",
]

if TYPE_CHECKING:
    from kernelmeta.few_shot_classifier import FewShotClassifier as FewShotClassifier


def __getattr__(name: str) -> Any:
    if name == "FewShotClassifier":  # imported by who asks for it: it needs scikit-learn
        from kernelmeta.few_shot_classifier import FewShotClassifier

        return FewShotClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
