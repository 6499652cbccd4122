"""Linearised learning: what gradient descent does where a network is linear in its weights, or in each layer's."""

from kernelmeta.linear.closed_form import solutions
from kernelmeta.linear.convergence import Certificate, LocalRate, adaptive_step, certificate, local_rate
from kernelmeta.linear.dynamics import (
    Fit,
    Path,
    Posterior,
    RidgeFit,
    descent,
    descent_path,
    kernel_ridge,
    posterior,
    ridge_path,
)
from kernelmeta.linear.kernels import cosine_gram, linear_gram, rbf_gram
from kernelmeta.linear.lqf import Linearised, lqf
from kernelmeta.linear.ntk import ntk_gram, relu_ntk
from kernelmeta.linear.preconditioning import KroneckerPreconditioner

__all__ = [
    "Certificate",
    "Fit",
    "KroneckerPreconditioner",
    "Linearised",
    "LocalRate",
    "Path",
    "Posterior",
    "RidgeFit",
    "adaptive_step",
    "certificate",
    "cosine_gram",
    "descent",
    "descent_path",
    "kernel_ridge",
    "linear_gram",
    "local_rate",
    "lqf",
    "ntk_gram",
    "posterior",
    "rbf_gram",
    "relu_ntk",
    "ridge_path",
    "solutions",
]
