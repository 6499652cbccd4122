"""Linearised learning: what gradient descent does where a network is linear in its weights, or in each layer's."""

from kernelmeta.linear.convergence import Certificate, LocalRate, adaptive_step, certificate, local_rate
from kernelmeta.linear.lqf import Linearised, lqf
from kernelmeta.linear.ntk import ntk_gram, relu_ntk

__all__ = [
    "Certificate",
    "Linearised",
    "LocalRate",
    "adaptive_step",
    "certificate",
    "local_rate",
    "lqf",
    "ntk_gram",
    "relu_ntk",
]
