"""Modules: learners, called alike (support, support_labels, query), and the networks around them."""

from kernelmeta.nn.anil import ANIL
from kernelmeta.nn.backbones import Conv4, WideResNet
from kernelmeta.nn.cosine_classifier import CosineClassifier
from kernelmeta.nn.equivariant_gradient_mlp import EquivariantGradientMLP
from kernelmeta.nn.equivariant_sib import EquivariantSIB
from kernelmeta.nn.lqf import LQF
from kernelmeta.nn.maml import MAML
from kernelmeta.nn.program import Program
from kernelmeta.nn.prototypes import Prototypes
from kernelmeta.nn.ridge_head import RidgeHead
from kernelmeta.nn.sib import SIB
from kernelmeta.nn.soft_kmeans import SoftKMeans
from kernelmeta.nn.synthetic_gradient_mlp import SyntheticGradientMLP
from kernelmeta.phases import Phase

__all__ = [
    "ANIL",
    "LQF",
    "MAML",
    "SIB",
    "Conv4",
    "CosineClassifier",
    "EquivariantGradientMLP",
    "EquivariantSIB",
    "Phase",
    "Program",
    "Prototypes",
    "RidgeHead",
    "SoftKMeans",
    "SyntheticGradientMLP",
    "WideResNet",
]
