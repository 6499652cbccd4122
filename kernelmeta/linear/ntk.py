"""Neural tangent kernels: the Gram matrix of a network's gradients (Jacot et al., NeurIPS 2018).

``K[i, c, j, e] = <d f_c(x_i) / d w, d f_e(x_j) / d w>`` over all parameters w. For a perceptron the gradients need not
be formed: with A the inputs of a layer and G the derivatives of the outputs in what the layer gives,
``K = sum over layers (A A^T + 1_bias) o (G G^T)``. Any other module is differentiated by `torch.func`, either by
contracting Jacobians or by products of the kernel with vectors, whichever takes fewer multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from kernelmeta.reference.precision import without_autocast

_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Identity)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class _Layer(NamedTuple):
    """One linear layer, seen from the rows [T, n, ...]."""

    inputs: Tensor  # [T, n, D], A
    derivatives: Tensor  # [T, n, C, H], G
    weight: bool  # which of its parameters are trained
    bias: bool


@without_autocast
def ntk_gram(
    module: nn.Module, x1: Tensor, x2: Tensor | None = None, *, full: bool = False, chunk_size: int | None = None
) -> Tensor:
    """The neural tangent kernel between the rows of T tasks, over the parameters of a module that are trained.

    Args:
        module: maps rows [n, ...] to outputs [n, C], each row by itself. `torch.nn.Sequential` of linear layers and
            activations is computed layer by layer, anything else by `torch.func`.
        x1: [T, n, ...].
        x2: [T, m, ...]; ``x1`` if None.
        full: keep the outputs apart.
        chunk_size: for `torch.func`, how many rows (or vectors) at once: less memory, more calls. All if None.

    Returns:
        [T, n, m], the trace over the outputs; with ``full`` [T, n, C, m, C].

    Raises:
        TypeError: something that is no module or no floating-point tensor.
        ValueError: shapes or types that do not fit; a module without trained parameters, with PReLU, dropout or
            normalisation over the batch, or whose outputs are not [n, C]; ``chunk_size`` below 1.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    x2 = x1 if x2 is None else x2
    for name, x in (("x1", x1), ("x2", x2)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() < 3:
            raise ValueError(f"{name}: expected [T, rows, ...], got shape {list(x.shape)}")
    if x1.shape[0] != x2.shape[0] or x1.shape[2:] != x2.shape[2:]:
        raise ValueError(f"x2: expected {x1.shape[0]} tasks with rows of {list(x1.shape[2:])}, got {list(x2.shape)}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an int of at least 1, got {chunk_size!r}")
    if any(isinstance(part, nn.PReLU) for part in module.modules()):
        raise ValueError("module: torch.func differentiates PReLU wrongly (seen with PyTorch 2.13); use LeakyReLU")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("module: none of its parameters is trained (requires_grad)")
    if any(isinstance(part, _NORMS) and (part.training or not part.track_running_stats) for part in module.modules()):
        raise ValueError("module: normalises over the rows of a batch, where no row stands for itself; call eval()")
    if any(isinstance(part, nn.modules.dropout._DropoutNd) and part.training for part in module.modules()):
        raise ValueError("module: drops units at random, so that it has no kernel; call eval()")
    kinds = {p.dtype for p in module.parameters()} | {x1.dtype, x2.dtype}
    if len(kinds) > 1:
        raise ValueError(f"x1, x2 and the module: expected one type, got {', '.join(sorted(map(str, kinds)))}")
    if 0 in x1.shape[:2] or 0 in x2.shape[:2]:
        raise ValueError(f"x1 and x2: expected at least one task and one row, got {list(x1.shape)}, {list(x2.shape)}")
    layers = _perceptron(module)
    if layers is not None and x1.dim() == 3:
        first = _layers(layers, x1)
        second = first if x2 is x1 else _layers(layers, x2)
        return _by_layers(first, second, full)
    # (each task's rows are one object where they are the same: then their Jacobians are taken once)
    pairs = ((x, x) for x in x1) if x2 is x1 else zip(x1, x2, strict=True)
    return torch.stack([_by_differentiation(module, a, b, full, chunk_size) for a, b in pairs])


def _perceptron(module: nn.Module) -> Sequence[nn.Module] | None:
    """The layers of a plain perceptron, in order; None for anything else, or where layers share a parameter."""

    def flat(part: nn.Module) -> list[nn.Module]:
        # (a subclass may do something else in its forward)
        return [p for child in part for p in flat(child)] if type(part) is nn.Sequential else [part]

    parts = flat(module)
    linear = [part for part in parts if type(part) is nn.Linear]
    shared = [p for part in linear for p in part.parameters()]
    plain = (
        all(type(part) in (nn.Linear, *_ELEMENTWISE) for part in parts)
        and not any(getattr(part, "inplace", False) for part in parts)
        and not any(p._forward_hooks or p._forward_pre_hooks for p in module.modules())
        and len({id(p) for p in shared}) == len(shared)
    )
    return parts if plain and linear else None


def _layers(parts: Sequence[nn.Module], x: Tensor) -> list[_Layer]:
    """The inputs and the derivatives of every linear layer."""
    inputs: list[tuple[nn.Linear, Tensor]] = []
    slopes: list[Tensor | None] = []  # of the activations before each linear layer, and after the last
    slope: Tensor | None = None
    for part in parts:
        if isinstance(part, nn.Linear):
            slopes.append(slope)
            slope = None
            inputs.append((part, x))
            x = part(x)
        else:
            x, own = jvp(part, (x,), (torch.ones_like(x),))[:2]
            slope = own if slope is None else slope * own
    C = x.shape[-1]
    G = torch.eye(C, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], C, C)
    if slope is not None:
        G = G * slope.unsqueeze(-2)
    found = []
    for (part, a), before in zip(reversed(inputs), reversed(slopes), strict=True):
        bias = part.bias is not None and part.bias.requires_grad
        found.append(_Layer(a, G, part.weight.requires_grad, bias))
        if part is not inputs[0][0]:
            G = G @ part.weight
            if before is not None:
                G = G * before.unsqueeze(-2)
    return found


def _by_layers(first: Sequence[_Layer], second: Sequence[_Layer], full: bool) -> Tensor:
    total: Tensor | None = None
    for a, b in zip(first, second, strict=True):
        if not (a.weight or a.bias):
            continue
        of_inputs: Tensor | float = a.inputs @ b.inputs.transpose(-1, -2) if a.weight else 0.0
        of_inputs = of_inputs + float(a.bias)
        # [T, n C, H] and [T, n, C H]
        start, end = (1, 2) if full else (2, 3)
        G1, G2 = (layer.derivatives.flatten(start, end) for layer in (a, b))
        product = G1 @ G2.transpose(-1, -2)
        if full:
            T, n, C, _ = a.derivatives.shape
            product = product.view(T, n, C, -1, C)
            of_inputs = of_inputs[:, :, None, :, None] if isinstance(of_inputs, Tensor) else of_inputs
        total = product * of_inputs if total is None else total + product * of_inputs
    assert total is not None
    return total


def _by_differentiation(module: nn.Module, x1: Tensor, x2: Tensor, full: bool, chunk_size: int | None) -> Tensor:
    """One task: [n, ...], [m, ...] -> [n, m], or [n, C, m, C]."""
    trained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def one_row(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        outputs: Tensor = functional_call(module, parameters, (row.unsqueeze(0),))
        return outputs.squeeze(0)

    from torch.utils.flop_counter import FlopCounterMode  # (takes half a second to import)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = module(x1[:1])
    if outputs.dim() != 2:
        raise ValueError(f"module: expected outputs [rows, C], got shape {list(outputs.shape)} for one row")
    n, m, C, P = len(x1), len(x2), outputs.shape[1], sum(p.numel() for p in trained.values())
    forward = max(counter.get_total_flops() // 2, P)
    pairs = C * C if full else C
    contracted = n * m * pairs * P + 2 * (n + m) * C * forward
    by_vectors = m * C * (2 + 2 * n) * forward
    if contracted <= by_vectors:
        return _contracted(one_row, trained, x1, x2, full, chunk_size)
    return _by_vectors(one_row, trained, x1, x2, full, chunk_size)


def _contracted(
    one_row: Callable[[dict[str, Tensor], Tensor], Tensor],
    trained: dict[str, Tensor],
    x1: Tensor,
    x2: Tensor,
    full: bool,
    chunk_size: int | None,
) -> Tensor:
    """From the Jacobians of as many rows as fit a chunk."""
    jacobian = vmap(jacrev(one_row), (None, 0))
    rows = max(len(x1), len(x2)) if chunk_size is None else chunk_size
    product = "icp,jep->icje" if full else "icp,jcp->ij"

    def block(of_a: dict[str, Tensor], of_b: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [torch.einsum(product, of_a[name].flatten(2), of_b[name].flatten(2)) for name in trained]
        ).sum(0)

    first = x1.split(rows)
    second = first if x2 is x1 else x2.split(rows)
    found: list[list[Tensor]] = []
    for i, a in enumerate(first):
        of_a = jacobian(trained, a)
        # A kernel of rows with themselves is symmetric: what is below its diagonal is there already.
        known = [found[j][i] for j in range(i)] if x2 is x1 else []
        line = [each.permute(2, 3, 0, 1) if full else each.T for each in known]
        for b in second[len(line) :]:
            line.append(block(of_a, of_a if b is a else jacobian(trained, b)))
        found.append(line)
    return torch.cat([torch.cat(line, 2 if full else 1) for line in found])


def _by_vectors(
    one_row: Callable[[dict[str, Tensor], Tensor], Tensor],
    trained: dict[str, Tensor],
    x1: Tensor,
    x2: Tensor,
    full: bool,
    chunk_size: int | None,
) -> Tensor:
    """Column by column: a gradient of one output of one row, and the derivative of all outputs along it."""

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return vmap(one_row, (None, 0))(parameters, x1)

    with torch.no_grad():
        C = one_row(trained, x2[0]).shape[0]

    def column(j: Tensor, e: Tensor) -> Tensor:
        row = x2.index_select(0, j.unsqueeze(0)).squeeze(0)
        back = vjp(lambda parameters: one_row(parameters, row), trained)[1]
        (gradient,) = back(torch.nn.functional.one_hot(e, C).to(x2.dtype))
        along: Tensor = jvp(outputs, (trained,), (gradient,))[1]  # [n, C]
        return along if full else along.index_select(1, e.unsqueeze(0)).squeeze(1)

    j, e = torch.meshgrid(torch.arange(len(x2)), torch.arange(C), indexing="ij")
    columns = vmap(column, chunk_size=chunk_size)(j.flatten().to(x2.device), e.flatten().to(x2.device))
    if full:  # [m C, n, C]
        return columns.view(len(x2), C, len(x1), C).permute(2, 3, 0, 1)
    return columns.view(len(x2), C, len(x1)).sum(1).T


def _geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(a b) of numbers of at least 0, whose product may be out of range; exact where they are equal, and with a
    gradient of 0 where one is 0.
    """
    both = (a > 0) & (b > 0)
    return torch.where(both, b * torch.where(both, a / torch.where(b > 0, b, 1), 1).sqrt(), 0)


@without_autocast
def relu_ntk(x1: Tensor, x2: Tensor | None = None, *, depth: int = 1, bias: float = 0.0) -> Tensor:
    """The neural tangent kernel of an infinitely wide ReLU network, by the arc-cosine recursion (Cho & Saul 2009).

    Weights have the variance 2 / (inputs), those of the first layer 1 / D, those of the last one 1 / (inputs); biases
    have the variance ``bias``^2.

    Args:
        x1: [..., n, D].
        x2: [..., m, D]; ``x1`` if None.
        depth: hidden layers, at least 0: 0 is the linear kernel.
        bias: standard deviation of the biases.

    Returns:
        [..., n, m], for one output.

    Raises:
        ValueError: shapes that do not fit, or a depth below 0.
    """
    x2 = x1 if x2 is None else x2
    if x1.dim() < 2 or x2.dim() < 2 or x1.shape[-1] != x2.shape[-1]:
        raise ValueError(f"x2: expected rows of {x1.shape[-1]} features as in x1, got shape {list(x2.shape)}")
    if depth < 0:
        raise ValueError(f"depth: expected at least 0, got {depth}")
    D = x1.shape[-1]
    covariance = x1 @ x2.transpose(-1, -2) / D + bias**2
    own1, own2 = (x.square().sum(-1) / D + bias**2 for x in (x1, x2))
    kernel = covariance
    for _ in range(depth):
        lengths = _geometric_mean(own1.unsqueeze(-1), own2.unsqueeze(-2))
        cosine = (covariance / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp(-1, 1)
        # At an angle of 0 or pi the derivative of arccos is infinite, and those of what is made of it are not.
        inside = cosine.abs() < 1
        straight = torch.zeros_like(cosine).masked_fill(cosine <= 0, math.pi)
        angle = torch.where(inside, torch.arccos(torch.where(inside, cosine, 0)), straight)
        slopes = (math.pi - angle) / math.pi
        covariance = lengths * (torch.sin(angle) + (math.pi - angle) * cosine) / math.pi + bias**2
        kernel = covariance + kernel * slopes
        own1, own2 = own1 + bias**2, own2 + bias**2
    return kernel
