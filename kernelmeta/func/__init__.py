"""Transforms of whole networks, on torch.func: no kernel of ours, so that every inner loop is found in one place."""

from kernelmeta.func.inner_loop import Adapted, maml

__all__ = ["Adapted", "maml"]
