"""Inner loops over whole networks (MAML; Finn, Abbeel & Levine, ICML 2017), on torch.func."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from kernelmeta.func.exact_norms import ExactNorms

Loss = Callable[[Any, Tensor], Tensor]
# What `maml` returns: (support, support_labels, query, return_parameters=False) -> outputs, or with parameters.
Adapted = Callable[..., Any]
# A rate for all parameters, or one for each of them by name.
Rate = float | Tensor | Mapping[str, float | Tensor]

_STATS = ("running_mean", "running_var", "num_batches_tracked")
NORM_STATS = ("task", "running")


def maml(
    network: nn.Module,
    *,
    steps: int,
    inner_lr: Rate | Sequence[Rate],
    first_order: bool = False,
    adapt: Collection[str] | None = None,
    loss: Loss = F.cross_entropy,
    norm_stats: str = "task",
    chunk_size: int | None = None,
) -> Adapted:
    """A function that adapts ``network`` to tasks by gradient descent on their support rows.

    For every task, ``theta <- theta - inner_lr * d loss(network(support; theta), labels) / d theta``, K times from the
    network's parameters; then the network's outputs on the query rows (Finn et al. 2017, algorithm 2, lines 5-6 and
    8). All tasks run at once, under vmap. The result is differentiable in the network's parameters, the rates and the
    rows, through all steps; the network itself is left as it is.

    Args:
        network: maps rows [n, ...] to outputs [n, ...]; its parameters, buffers and mode are read at every call.
        steps: K.
        inner_lr: a number, a tensor without dimensions, or a mapping from the name of every adapted parameter to a
            number or a tensor that is a scalar or has the parameter's shape (Meta-SGD; Li et al. 2017); or a sequence
            of K of these, or a tensor [K], one for each step (Antoniou et al., ICLR 2019). Tensors may be learned.
        first_order: take the inner gradients for constants (first-order MAML). Otherwise second order, exact.
        adapt: names of the parameters, or of modules that hold them, that the inner loop changes; by default all that
            require gradients. ``["head"]`` is ANIL of any network.
        loss: of outputs [S, ...] and labels [S, ...], a scalar; by default the mean cross-entropy.
        norm_stats: whose statistics BatchNorm layers use.

            ``"task"`` (default): those of the rows they are given, in training and in evaluation: the support rows of
            a task in its inner steps, its query rows at the end. Running statistics are neither read nor written.
            This is what MAML was published with; tasks stay independent of each other, and results do not depend on
            the calls before. But a query row's output then depends on the other query rows (it is transductive), and
            a task of one row has no statistics.

            ``"running"``: the stored ones, as they are; the layers must be in ``eval()``, since tasks that run
            side by side have no order in which they could update them. Row by row, as are GroupNorm and LayerNorm.
        chunk_size: tasks under vmap at a time, to bound memory; all by default.

    Returns:
        ``f(support [T, S, ...], support_labels [T, S, ...], query [T, Q, ...], return_parameters=False)`` -> outputs
        [T, Q, ...]; with ``return_parameters`` a tuple of them and the adapted parameters, name -> [T, ...].
        ``torch.compile(f, fullgraph=True)`` traces it whole; train through it as through any compiled function.

    Raises:
        ValueError, TypeError: an argument out of its range, named; a layer that cannot work this way, named.

    Recurrent layers do not run under vmap and are refused. A fused op of this package inside the network has no second
    derivative and raises.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: expected a torch.nn.Module, got {type(network).__name__}")
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    if norm_stats not in NORM_STATS:
        raise ValueError(f"norm_stats: expected one of {', '.join(NORM_STATS)}, got {norm_stats!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    wanted = None if adapt is None else tuple(adapt)
    _check_layers(network)
    names = _adapted(network, wanted)
    _check_rates(inner_lr, steps, {name: p for name, p in network.named_parameters() if name in names})

    def adapted_outputs(support: Tensor, support_labels: Tensor, query: Tensor, return_parameters: bool = False) -> Any:
        _check_rows(support, support_labels, query)
        if norm_stats == "running":
            _check_eval(network)
        names = _adapted(network, wanted)
        constants: dict[str, Any] = {name: p for name, p in network.named_parameters() if name not in names}
        constants |= dict(network.named_buffers())
        if norm_stats == "task":
            constants |= _without_running_stats(network)

        def inner_loss(theta: dict[str, Tensor], rows: Tensor, labels: Tensor) -> Tensor:
            return loss(functional_call(network, theta | constants, (rows,)), labels)

        def one_task(rows: Tensor, labels: Tensor, query: Tensor) -> Any:
            theta: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if name in names}
            for step in range(steps):
                gradient = grad(inner_loss)(theta, rows, labels)
                if first_order:
                    gradient = {name: g.detach() for name, g in gradient.items()}
                theta = {name: p - _rate(inner_lr, step, name) * gradient[name] for name, p in theta.items()}
            outputs = functional_call(network, theta | constants, (query,))
            return (outputs, theta) if return_parameters else outputs

        over_tasks = vmap(one_task, randomness="different", chunk_size=chunk_size)
        # Fused attention has no second derivative; PyTorch's plain one has.
        with ExactNorms(), sdpa_kernel(SDPBackend.MATH):
            return over_tasks(support, support_labels, query)

    return adapted_outputs


def _adapted(network: nn.Module, wanted: Collection[str] | None) -> set[str]:
    """Names of the parameters that the inner loop changes."""
    parameters = dict(network.named_parameters())
    if wanted is None:
        names = {name for name, p in parameters.items() if p.requires_grad}
    else:
        names = {name for name in parameters if any(name == w or name.startswith(f"{w}.") for w in wanted)}
        for entry in wanted:
            if not any(name == entry or name.startswith(f"{entry}.") for name in parameters):
                raise ValueError(f"adapt: {entry!r} names no parameter of the network, nor a module that has one")
    if not names:
        raise ValueError("network: no parameter to adapt; none requires a gradient")
    return names


def _without_running_stats(network: nn.Module) -> dict[str, Any]:
    """None for the running statistics of every BatchNorm: then it takes those of its rows, in either mode."""
    return {
        f"{path}.{stat}" if path else stat: None
        for path, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for stat in _STATS
        if getattr(module, stat) is not None
    }


def _check_layers(network: nn.Module) -> None:
    for path, module in network.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"network: {path!r} is a SyncBatchNorm, which couples processes; tasks are independent. Use BatchNorm"
            )
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(f"network: {path!r} has no shape yet; run the network on some rows first")
        if isinstance(module, nn.RNNBase):
            raise ValueError(f"network: {path!r} ({type(module).__name__}) cannot run for several tasks under vmap")
        if isinstance(module, _NormBase) and not isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ValueError(
                f"network: {path!r} ({type(module).__name__}) tracks running statistics, which tasks that run side by"
                " side cannot update in any order; build it with track_running_stats=False"
            )


def _check_eval(network: nn.Module) -> None:
    for path, module in network.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f'norm_stats: "running" reads the stored statistics; {path!r} must have some and be in eval() mode'
            )


def _check_rates(inner_lr: Any, steps: int, adapted: Mapping[str, Tensor]) -> None:
    per_step = isinstance(inner_lr, Tensor) and inner_lr.dim() == 1
    if per_step or (isinstance(inner_lr, Sequence) and not isinstance(inner_lr, str)):
        if len(inner_lr) != steps:
            raise ValueError(f"inner_lr: expected one rate for each of {steps} steps, got {len(inner_lr)}")
        if not per_step:
            for rate in inner_lr:
                _check_rate(rate, adapted)
        return
    _check_rate(inner_lr, adapted)


def _check_rate(rate: Any, adapted: Mapping[str, Tensor]) -> None:
    if isinstance(rate, Mapping):
        missing = sorted(adapted.keys() - rate.keys())
        if missing:
            raise ValueError(f"inner_lr: no rate for the adapted parameter {missing[0]!r}")
        for name, parameter in adapted.items():
            own = rate[name]
            if isinstance(own, Tensor) and own.dim() > 0 and own.shape != parameter.shape:
                raise ValueError(
                    f"inner_lr: expected a scalar or {list(parameter.shape)} for {name!r}, got {list(own.shape)}"
                )
    elif isinstance(rate, Tensor):
        if rate.dim() > 0:
            raise ValueError(
                f"inner_lr: expected a scalar or one rate a step, got a tensor of shape {list(rate.shape)}"
            )
    elif not isinstance(rate, (int, float)) or isinstance(rate, bool):
        raise TypeError(f"inner_lr: expected a number, a tensor or a mapping, got {type(rate).__name__}")


def _rate(inner_lr: Any, step: int, name: str) -> Any:
    if isinstance(inner_lr, Sequence) or (isinstance(inner_lr, Tensor) and inner_lr.dim() == 1):
        inner_lr = inner_lr[step]
    return inner_lr[name] if isinstance(inner_lr, Mapping) else inner_lr


def _check_rows(support: Tensor, support_labels: Tensor, query: Tensor) -> None:
    for name, rows in (("support", support), ("support_labels", support_labels), ("query", query)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(rows).__name__}")
        if rows.dim() < 2:
            raise ValueError(f"{name}: expected [tasks, rows, ...], got shape {list(rows.shape)}")
        if rows.shape[0] != support.shape[0]:
            raise ValueError(f"{name}: expected {support.shape[0]} tasks, as support, got {rows.shape[0]}")
    if support.shape[0] == 0:
        raise ValueError("support: expected at least one task, got none")
    if support_labels.shape[1] != support.shape[1]:
        raise ValueError(
            f"support_labels: expected {support.shape[1]} a task, one for each row, got {support_labels.shape[1]}"
        )
    if support.shape[2:] != query.shape[2:]:
        raise ValueError(f"query: expected rows {list(support.shape[2:])}, as support, got {list(query.shape[2:])}")
