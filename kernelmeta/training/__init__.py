"""Meta-training, pretraining and evaluation; `kernelmeta.cli` puts them behind commands."""

from __future__ import annotations

from kernelmeta.training.config import TrainConfig
from kernelmeta.training.evaluation import evaluate
from kernelmeta.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer", "evaluate"]
