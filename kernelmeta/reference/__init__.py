"""Every op in plain PyTorch, any floating dtype, any device: the specification, to be held against the paper.

The functions have the names, arguments and results of those in :mod:`kernelmeta.ops`, which document them.
"""

from kernelmeta.reference import explicit
from kernelmeta.reference.class_means import class_means
from kernelmeta.reference.focal_distillation import focal_distillation
from kernelmeta.reference.linear_head import linear_head
from kernelmeta.reference.ntk import linearised_descent, ntk_gram
from kernelmeta.reference.program import program
from kernelmeta.reference.ridge import ridge
from kernelmeta.reference.sib import sib, sib_inner_loop
from kernelmeta.reference.synthetic_gradient_mlp import synthetic_gradient_mlp

__all__ = [
    "class_means",
    "explicit",
    "focal_distillation",
    "linear_head",
    "linearised_descent",
    "ntk_gram",
    "program",
    "ridge",
    "sib",
    "sib_inner_loop",
    "synthetic_gradient_mlp",
]
