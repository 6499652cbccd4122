"""Linearised learning: what gradient descent does where a network is linear in its weights, or in each layer's."""

from kernelmeta.linear.convergence import Certificate, LocalRate, adaptive_step, certificate, local_rate

__all__ = ["Certificate", "LocalRate", "adaptive_step", "certificate", "local_rate"]
