"""Argument checks shared by the ops: what was given, what is accepted, before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kernelmeta.backends import is_traced
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.tasks import Ragged

_FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_COMPUTED_IN = frozenset({torch.float32, torch.float64})

MOST = 2**31  # ways of a task, steps
NORM_STATS = ("task", "batch", "running")
REDUCTIONS = ("sum", "mean")


def by_kernel(backend: str) -> bool:
    """Whether the kernels look at their arguments themselves, so that looking twice would cost time for nothing."""
    return backend in ("cpu", "cuda") and not is_traced()


def explain(error: Exception, check: Callable[..., object], given: Mapping[str, Any]) -> NoReturn:
    """Raise what ``check`` says about what was given, or if it finds no fault, the error itself."""
    try:
        check(**given)
    except (TypeError, ValueError) as better:
        raise better from None
    raise error


def shape_text(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def tensors(**named: Tensor) -> None:
    """All are floating-point tensors on one device."""
    device = None
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATING:
            got = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {got}")
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} is on {device}: all must be on one device")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {meaning} = {list(expected)}, got {shape_text(tensor)}")


def dimensions(name: str, tensor: Tensor, meaning: str) -> None:
    if tensor.dim() != meaning.count(",") + 1:
        raise ValueError(f"{name}: expected shape {meaning}, got {shape_text(tensor)}")


def one_value(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one value, got shape {shape_text(tensor)}")


def labels(name: str, tensor: Tensor, expected: tuple[int, ...], features: Tensor, meaning: str = "[T, S]") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int64, got {str(tensor.dtype).removeprefix('torch.')}")
    shape(name, tensor, expected, meaning)
    if tensor.device != features.device:
        raise ValueError(f"{name} is on {tensor.device}, but the features are on {features.device}")


def frozen(**features: Tensor) -> None:
    """Features of which no gradient is asked."""
    for name, tensor in features.items():
        if torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, and gets none here; detach() it, or, to train what it comes from, call "
                "the module and loss.backward()"
            )


def index(name: str, tensor: Tensor, bank: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int64, got {str(tensor.dtype).removeprefix('torch.')}")
    dimensions(name, tensor, "[T, rows]")
    if tensor.device != bank.device:
        raise ValueError(f"{name} is on {tensor.device}, but the bank is on {bank.device}")


def episode(
    support: Tensor, support_index: Tensor | None, query: Tensor, query_index: Tensor | None
) -> tuple[int, int, int]:
    """T, S and Q of feature rows [T, rows, D], or of banks [n, D] with an index [T, rows] each."""
    if (support_index is None) != (query_index is None):
        raise ValueError("support_index and query_index must be given together")
    if support_index is not None and query_index is not None:
        dimensions("query", query, "[n, D]")
        dimensions("support", support, "[n, D]")
        index("query_index", query_index, query)
        index("support_index", support_index, support)
        T, S = support_index.shape
        Q = query_index.shape[1]
        if query_index.shape[0] != T:
            raise ValueError(f"query_index: expected {T} tasks as in support_index, got {query_index.shape[0]}")
    else:
        dimensions("query", query, "[T, Q, D]")
        dimensions("support", support, "[T, S, D]")
        T, Q = query.shape[:2]
        S = support.shape[1]
        if support.shape[0] != T:
            raise ValueError(f"support: expected {T} tasks as in query, got {shape_text(support)}")
    if support.shape[-1] != query.shape[-1]:
        raise ValueError(f"support: expected {query.shape[-1]} features as in query, got {shape_text(support)}")
    return T, S, Q


def integers(name: str, tensor: Tensor, features: Tensor) -> None:
    """An int64 tensor on the features' device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int64, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != features.device:
        raise ValueError(f"{name} is on {tensor.device}, but the features are on {features.device}")


def ways(n_way: int) -> None:
    if not isinstance(n_way, int) or isinstance(n_way, bool) or n_way < 1:
        raise ValueError(f"n_way: expected an int of at least 1, got {n_way!r}")
    if n_way > MOST:
        raise ValueError(f"n_way: expected at most 2^31, got {n_way}")


def task_rows(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    support_index: Tensor | None,
    query_index: Tensor | None,
    ragged: Ragged | None,
) -> None:
    """Rows and labels of even or ragged tasks, given as features or as indices of a bank's rows, fit each other."""
    if (support_index is None) != (query_index is None):
        raise ValueError("support_index and query_index must be given together")
    if ragged is not None and not isinstance(ragged, Ragged):
        raise TypeError(f"ragged: expected kernelmeta.Ragged, got {type(ragged).__name__}")
    rows = "T, rows" if ragged is None else "rows"
    for name, features, rows_index in (("support", support, support_index), ("query", query, query_index)):
        if rows_index is None:
            dimensions(name, features, f"[{rows}, D]")
        else:
            dimensions(name, features, "[n, D]")
            integers(f"{name}_index", rows_index, features)
            dimensions(f"{name}_index", rows_index, f"[{rows}]")
    of_support = support.shape[:-1] if support_index is None else support_index.shape
    of_query = query.shape[:-1] if query_index is None else query_index.shape
    if support.shape[-1] != query.shape[-1]:
        raise ValueError(f"support: expected {query.shape[-1]} features as in query, got {shape_text(support)}")
    if query.shape[-1] == 0:
        raise ValueError(f"query: expected at least one feature, got {shape_text(query)}")
    integers("support_labels", labels, support)
    shape("support_labels", labels, tuple(of_support), "[T, S]" if ragged is None else "[all support rows]")
    if ragged is None:
        if of_support[0] != of_query[0]:
            raise ValueError(f"support: expected {of_query[0]} tasks as in query, got {of_support[0]}")
        if of_query[1] == 0:
            raise ValueError(f"query: expected at least one row, got {shape_text(query)}")
        return
    offsets = {"support_offsets": ragged.support_offsets, "query_offsets": ragged.query_offsets}
    for name, tensor in offsets.items():
        integers(f"ragged.{name}", tensor, support)
        dimensions(f"ragged.{name}", tensor, "[T + 1]")
    counts = [tensor.numel() for tensor in offsets.values()]
    if counts[0] != counts[1] or counts[0] == 0:
        raise ValueError(
            f"ragged.support_offsets and query_offsets: expected T + 1 numbers in both, got {counts[0]} and {counts[1]}"
        )
    if ragged.n_ways is not None:
        integers("ragged.n_ways", ragged.n_ways, support)
        shape("ragged.n_ways", ragged.n_ways, (counts[0] - 1,), "[T]")
    most = {"max_support": ragged.max_support, "max_query": ragged.max_query}
    for name, value in most.items():
        if value is None:
            if any(other is not None for other in most.values()):
                raise ValueError("ragged.max_support and max_query must be given together")
        elif isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"ragged.{name}: expected an int, got {type(value).__name__}")
        elif value < (least := int(name == "max_query")):
            raise ValueError(f"ragged.{name}: expected at least {least}, got {value}")


def mlp(parameters: Sequence[Tensor], outputs: int | None = None) -> tuple[int, int]:
    """N and H of an MLP whose ten tensors fit each other; it has as many outputs as inputs if nothing else is said."""
    if len(parameters) != 10:
        raise TypeError(f"mlp: expected the ten tensors of MLPParameters, got {len(parameters)}")
    weight1 = parameters[0]
    if not isinstance(weight1, Tensor) or weight1.dim() != 2 or 0 in weight1.shape:
        raise ValueError("mlp.weight1: expected a tensor of shape [H, N], both at least 1")
    H, N = weight1.shape
    h, out = (H,), N if outputs is None else outputs
    expected = [weight1.shape, h, h, h, (H, H), h, h, h, (out, H), (out,)]
    if [getattr(t, "shape", None) for t in parameters] != expected:
        for name, tensor, want in zip(MLPParameters._fields, parameters, expected, strict=True):
            if not isinstance(tensor, Tensor) or tensor.shape != want:
                got = shape_text(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"mlp.{name}: expected shape {list(want)} for H={H}, N={N}, got {got}")
    return N, H


def norm_stats(mode: str, running_stats: Tensor | None, H: int, returned: bool) -> None:
    if mode not in NORM_STATS:
        raise ValueError(f"norm_stats: expected one of {', '.join(NORM_STATS)}, got {mode!r}")
    if mode == "running":
        if running_stats is None:
            raise ValueError("norm_stats='running' needs running_stats, a tensor [2, 2, H]")
        if returned:
            raise ValueError("norm_stats='running' has no statistics of its own to return")
        shape("running_stats", running_stats, (2, 2, H), "[2, 2, H]")


def step_size(steps: int, inner_lr: float, reduction: str, rows: int) -> float:
    """inner_lr for the sum over rows, as the kernels want it."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    if steps > MOST:
        raise ValueError(f"steps: expected at most 2^31, got {steps}")
    if reduction == "sum":
        return float(inner_lr)
    if reduction == "mean":
        return float(inner_lr) / rows
    raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def precisions(all_tensors: Sequence[Tensor | None]) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes to compute in and to return, or None where every tensor (or None) has the one dtype that is both."""
    dtypes = {t.dtype for t in all_tensors if t is not None}
    if len(dtypes) == 1 and dtypes <= _COMPUTED_IN:
        return None
    result = functools.reduce(torch.promote_types, dtypes)
    if torch.is_autocast_enabled(next(t.device.type for t in all_tensors if t is not None)):
        result = torch.promote_types(result, torch.float32)
    return compute_type(result), result


def compute_type(result: torch.dtype) -> torch.dtype:
    """What results of this type are computed in."""
    return torch.float64 if result is torch.float64 else torch.float32
