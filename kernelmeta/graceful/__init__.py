"""Updates that keep what the model before did right: losses to train a successor with, and what it is judged by."""

from kernelmeta.graceful.flips import Flips, Interval, flips
from kernelmeta.ops.focal_distillation_op import focal_distillation

__all__ = ["Flips", "Interval", "flips", "focal_distillation"]
