"""The ops: functions of tensors, batched over tasks, differentiable; each runs on the best backend there is."""

from kernelmeta.ops.class_means_op import class_means
from kernelmeta.ops.focal_distillation_op import focal_distillation
from kernelmeta.ops.label_proportions import mean_map, smoothed_proportions
from kernelmeta.ops.linear_head_gradients_op import HeadGradients, linear_head_gradients
from kernelmeta.ops.linear_head_op import linear_head
from kernelmeta.ops.linearised_descent_op import linearised_descent
from kernelmeta.ops.ntk_gram_op import TangentKernel, ntk_gram
from kernelmeta.ops.program_op import program
from kernelmeta.ops.ridge_op import ridge
from kernelmeta.ops.sib_gradients_op import SIBGradients, sib_gradients
from kernelmeta.ops.sib_op import sib, sib_inner_loop
from kernelmeta.ops.synthetic_gradient_mlp_op import synthetic_gradient_mlp

__all__ = [
    "HeadGradients",
    "SIBGradients",
    "TangentKernel",
    "class_means",
    "focal_distillation",
    "linear_head",
    "linear_head_gradients",
    "linearised_descent",
    "mean_map",
    "ntk_gram",
    "program",
    "ridge",
    "sib",
    "sib_gradients",
    "sib_inner_loop",
    "smoothed_proportions",
    "synthetic_gradient_mlp",
]
