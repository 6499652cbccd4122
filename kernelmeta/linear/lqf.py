"""LQF: a network, linearised at its weights, that is trained like one (Achille et al., CVPR 2021).

What makes linear fine-tuning as good as the nonlinear one there is leaky ReLU in the place of ReLU (section 3.3), the
squared error to one-hot targets times 15 (section 3.1), normalisation frozen, and preconditioning.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import leaky_relu, relu
from torch.overrides import TorchFunctionMode


class Linearised(nn.Module):
    """``f(x; w0) + df/dw(x; w0) (w - w0)``: linear in its parameters, which start at w0.

    Args:
        module: f, with its weights w0; it is copied. Its mode is frozen: dropout and normalisation do what they do in
            evaluation.

    Parameters, in ``moved``: how far each parameter of f that is trained is from w0, zero at start, in f's order.
    ``names`` maps their names in f to those there (underscores for dots).

    Raises:
        TypeError: no module.
        ValueError: none of its parameters is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        frozen = copy.deepcopy(module).eval()
        self.names = {name: name.replace(".", "_") for name, p in frozen.named_parameters() if p.requires_grad}
        if not self.names:
            raise ValueError("module: none of its parameters is trained (requires_grad)")
        origin = dict(frozen.named_parameters())
        self.moved = nn.ParameterDict()  # (made of a dict it would sort its names)
        for name, own in self.names.items():
            self.moved[own] = nn.Parameter(torch.zeros_like(origin[name]))
        self.frozen = frozen.requires_grad_(False)

    def train(self, mode: bool = True) -> Linearised:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, *inputs: Any) -> Tensor:
        """What f returns, linearised; the arguments of f."""
        origin = dict(self.frozen.named_parameters())
        tangents = {
            name: self.moved[self.names[name]] if name in self.names else torch.zeros_like(p)
            for name, p in origin.items()
        }

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(self.frozen, parameters, inputs)
            return found

        value: Tensor
        along: Tensor
        value, along = jvp(outputs, (origin,), (tangents,))[:2]
        return value + along

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """f itself with the weights w: near w0 it is what this module is."""
        module = copy.deepcopy(self.frozen)
        for name, parameter in module.named_parameters():
            if name in self.names:
                parameter.add_(self.moved[self.names[name]])
                parameter.requires_grad_()
        return module


def lqf(module: nn.Module, *, slope: float = 0.01) -> Linearised:
    """A network ready for linear-quadratic fine-tuning: leaky ReLU for ReLU, linearised at its weights.

    Train it by the squared error to one-hot targets times 15; it is a least-squares problem.

    Args:
        module: a pre-trained network; it is copied. ReLUs are found as modules, and as calls of PyTorch's functions.
        slope: of the leaky ReLU, below zero.

    Returns:
        A `Linearised` module, called as the network is.

    Raises:
        TypeError, ValueError: as `Linearised`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    leaky = copy.deepcopy(module)
    if isinstance(leaky, nn.ReLU):
        leaky = nn.LeakyReLU(slope)
    for part in list(leaky.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.LeakyReLU(slope))
    own = any(not type(part).__module__.startswith("torch.nn.modules.") for part in leaky.modules())
    return Linearised(LeakyCalls(leaky, slope) if own else leaky)


class LeakyCalls(nn.Module):
    """A network whose forward pass calls leaky ReLUs where it calls PyTorch's functions for ReLU.

    Args:
        network: what is called.
        slope: of the leaky ReLU, below zero.
    """

    def __init__(self, network: nn.Module, slope: float) -> None:
        super().__init__()
        self.network, self.slope = network, slope

    def forward(self, *inputs: Any) -> Any:
        with _LeakyMode(self.slope):
            return self.network(*inputs)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


class _LeakyMode(TorchFunctionMode):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELUS:
            given = [*args, *(kwargs or {}).values()]  # (the rows first, unless someone names them last)
            return leaky_relu(given[0], self.slope, func in _INPLACE or any(given[1:]))
        return func(*args, **(kwargs or {}))


_INPLACE = (torch.relu_, Tensor.relu_)
_RELUS = (torch.relu, Tensor.relu, relu, *_INPLACE)
