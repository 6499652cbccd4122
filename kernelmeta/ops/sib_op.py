"""The inner loop of SIB (Hu et al., ICLR 2020), all steps and all tasks in one op.

    logits = s (b + cos(query, theta_K)),   theta_{k+1} = theta_k - lr dZ/dtheta^T MLP(Z)

with theta_0 given (:func:`sib_inner_loop`) or the weighted class means of a support set (:func:`sib`). The kernels
work in the space of the rows (csrc/engine/inner_loop.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelmeta import reference
from kernelmeta.backends import select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import Args, DifferentiableOp, is_traced
from kernelmeta.reference import MLPParameters, explicit

# Positions of the raw op's arguments.
_QUERY, _START, _WEIGHT, _SCALE = 0, 2, 5, 6
_DIFFERENTIABLE = (_QUERY, _START, *range(_WEIGHT, _WEIGHT + 13))
_RETURN_WEIGHTS = 21

_ARGUMENTS = (
    "Tensor query, Tensor? query_index, Tensor start, Tensor? start_index, Tensor? support_labels, Tensor? weight, "
    "Tensor scale, Tensor bias, Tensor weight1, Tensor bias1, Tensor gain1, Tensor shift1, Tensor weight2, "
    "Tensor bias2, Tensor gain2, Tensor shift2, Tensor weight3, Tensor bias3, Tensor? running_stats, int steps, "
    "float inner_lr, bool return_weights"
)


def sizes(args: Args) -> tuple[int, int, int, int, int, int, int]:
    """T, S, Q, N, D, H, K of the raw op's arguments."""
    query, query_index, start, start_index = args[:4]
    T, Q = query.shape[:2] if query_index is None else query_index.shape
    S = start.shape[1] if start_index is None else start_index.shape[1]
    H, N = args[8].shape
    return T, S, Q, N, query.shape[-1], H, args[19]


def trace_size(N: int, Q: int, D: int, K: int, return_weights: bool) -> int:
    """Elements that one task's forward pass leaves for its backward pass: ``Trace`` in csrc/engine/inner_loop.h."""

    def padded(n: int) -> int:
        return (n + 15) // 16 * 16

    rows = padded(Q)
    in_rows = padded(N * D) + padded(N) + K * N * rows  # theta0, lost, A G
    if return_weights:
        in_rows += padded((K + 1) * N) + (K + 1) * N * rows
    if K > 0 and 8 * K * N >= Q:  # forms_gram in csrc/engine/inner_loop.h
        in_rows += Q * rows
    else:  # theta of every step and w
        in_rows = max(in_rows, padded((K + 1) * N * D) + padded(K * N * D))
    return in_rows + rows + padded((K + 1) * N) + (K + 1) * N * rows


def _fake(*args: Any) -> tuple[Tensor, ...]:
    T, _, Q, N, D, H, K = sizes(args)
    return_weights, return_stats, save_trace = args[_RETURN_WEIGHTS:]
    new_empty = args[_SCALE].new_empty
    return (
        new_empty(T, Q, N),
        new_empty((T, N, D) if return_weights else 0),
        new_empty((K, 2, 2, H) if return_stats else 0),
        new_empty((T, trace_size(N, Q, D, K, return_weights)) if save_trace else 0),
    )


def _fake_backward(grad_logits: Tensor, grad_weights: Tensor | None, trace: Tensor, *args: Any) -> tuple[Tensor, ...]:
    T, S, Q, N, D, _, _ = sizes(args)
    need_query, need_start = args[-2:]
    new_empty = args[_SCALE].new_empty
    return (
        new_empty((T, Q, D) if need_query else 0),
        new_empty((T, S, D) if need_start else 0),
        new_empty(D if args[_WEIGHT] is not None else 0),
        *(new_empty(p.shape) for p in args[_SCALE : _SCALE + 12]),
    )


def _gathered(features: Tensor, index: Tensor | None) -> Tensor:
    return features if index is None else features[index]


def _fallback(*args: Any) -> tuple[Tensor, ...]:
    query, query_index, start, start_index, labels, weight, scale, bias, *mlp = args[:18]
    running_stats, steps, inner_lr, return_weights, return_stats, _ = args[18:]
    dtype = scale.dtype
    theta0 = _gathered(start, start_index).to(dtype)
    parameters = MLPParameters(*mlp)
    if labels is not None:
        theta0 = reference.class_means(theta0, labels, parameters.weight1.shape[1], weight)
    results = explicit.sib_inner_loop(
        theta0,
        _gathered(query, query_index).to(dtype),
        scale,
        bias,
        parameters,
        steps=steps,
        inner_lr=inner_lr,
        norm_stats="task" if running_stats is None else "running",
        running_stats=running_stats,
        return_weights=True,
        return_norm_stats=return_stats,
    )
    none = scale.new_empty(0)
    return (
        results[0],
        results[1] if return_weights else none,
        results[2] if return_stats else none.clone(),
        none.clone(),
    )


def _fallback_backward(
    grad_logits: Tensor, grad_weights: Tensor | None, trace: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    need_query, need_start = args[-2:]
    needs = [i not in (_QUERY, _START) for i in range(18)]
    needs[_QUERY], needs[_START] = need_query, need_start
    inputs = list(args[:18])
    with torch.enable_grad():
        for i in (_QUERY, _START):  # gradients are those of the gathered rows
            inputs[i], inputs[i + 1] = _gathered(inputs[i], inputs[i + 1]), None
        for i in _DIFFERENTIABLE:
            if needs[i] and inputs[i] is not None:
                inputs[i] = inputs[i].detach().requires_grad_()
        logits, weights, _, _ = _fallback(*inputs, *args[18:-2], False, False)
        wanted = [inputs[i] for i in _DIFFERENTIABLE if needs[i] and inputs[i] is not None]
        outputs, grads = [logits], [grad_logits]
        if grad_weights is not None:
            outputs.append(weights)
            grads.append(grad_weights)
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    results = []
    for i in _DIFFERENTIABLE:
        if needs[i] and inputs[i] is not None:
            grad = next(found)
            results.append(torch.zeros_like(inputs[i]) if grad is None else grad.contiguous())
        else:
            results.append(logits.new_empty(0))
    return tuple(results)


def _backward_args(args: Args, residuals: Args, grads: Args, needs: Any) -> Args:
    grad_logits, grad_weights = grads
    if grad_logits is None:
        T, _, Q, N, _, _, _ = sizes(args)
        grad_logits = args[_SCALE].new_zeros(T, Q, N)
    if not args[_RETURN_WEIGHTS]:
        grad_weights = None  # of an empty tensor
    return (grad_logits, grad_weights, residuals[1], *args[: _RETURN_WEIGHTS + 1], needs[_QUERY], needs[_START])


OP = DifferentiableOp(
    "sib",
    schema=f"({_ARGUMENTS}, bool return_stats, bool save_trace) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema=f"(Tensor grad_logits, Tensor? grad_weights, Tensor trace, {_ARGUMENTS}, bool need_query, "
    f"bool need_start) -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    fake=_fake,
    fake_backward=_fake_backward,
    fallback=_fallback,
    fallback_backward=_fallback_backward,
    differentiable=_DIFFERENTIABLE,
    n_outputs=2,
    n_private=1,
    backward_args=_backward_args,
    save=lambda args: (*args[:-1], True),
)


def sib_inner_loop(
    theta0: Tensor,
    query: Tensor,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    *,
    steps: int,
    inner_lr: float,
    reduction: str = "sum",
    norm_stats: str = "task",
    running_stats: Tensor | None = None,
    return_weights: bool = False,
    return_norm_stats: bool = False,
) -> Any:
    """Refine a cosine classifier by K synthetic-gradient steps on unlabelled query rows (Hu et al. 2020, eq. 13-15).

    Args:
        theta0: [T, N, D], the classifier to start from.
        query: [T, Q, D], at least one row a task.
        scale, bias: [1], s and b of ``Z = s (b + cos(x, theta))``.
        mlp: the synthetic-gradient MLP.
        steps: K, 0 or more.
        inner_lr: the inner learning rate.
        reduction: "sum" over the query rows, as published, or "mean" (the step is divided by Q).
        norm_stats: whose statistics BatchNorm uses: "task" (each task its own), "batch" (all T*Q rows; unfused),
            "running" (``running_stats``).
        running_stats: [2, 2, H]: layer; mean, variance; unit.
        return_weights: return theta_K, [T, N, D], too.
        return_norm_stats: return the statistics of every step too, [K, 2, 2, H]: step; layer; mean, unbiased
            variance; unit. For "task" they are averaged over the tasks. They carry no gradient.

    Returns:
        The logits [T, Q, N] after the last step, in the dtype that features and parameters promote to (under
        autocast float32 at least); a tuple if more was asked for.

    Raises:
        ValueError: shapes, devices or options that do not fit, named.
        TypeError: tensors that are not floating point.
    """
    given = (query, None, theta0, None, None, None, scale, bias, mlp, running_stats)
    options = (steps, inner_lr, reduction, norm_stats, return_norm_stats)
    try:
        return _run(_check_inner_loop, given, options, return_weights)
    except Exception as error:
        _checks.explain(error, _check_inner_loop, given, options)


def sib(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    *,
    steps: int,
    inner_lr: float,
    reduction: str = "sum",
    norm_stats: str = "task",
    running_stats: Tensor | None = None,
    return_weights: bool = False,
    return_norm_stats: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
) -> Any:
    """The whole episode: :func:`class_means` of the support set, refined by :func:`sib_inner_loop`, in one op.

    Args:
        support: [T, S, D]; every class needs at least one row. Classes may have unequal counts.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D], at least one row a task.
        weight: [D], the learned diagonal weights of the class means.
        support_index, query_index: [T, S] and [T, Q] int64, given together: then ``support`` and ``query`` are
            feature banks [n, D] (the same one or two) and the op reads its rows straight from them.
        scale, bias, mlp, steps, ...: as in :func:`sib_inner_loop`.

    Returns:
        As :func:`sib_inner_loop`.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit, named; a class without a support row.
        TypeError: features that are not floating point, labels or indices that are not int64.
    """
    given = (query, query_index, support, support_index, support_labels, weight, scale, bias, mlp, running_stats)
    options = (steps, inner_lr, reduction, norm_stats, return_norm_stats)
    try:
        return _run(_check_episode, given, options, return_weights)
    except Exception as error:
        _checks.explain(error, _check_episode, given, options)


def _check_inner_loop(given: Args, options: Args) -> None:
    query, _, theta0, _, _, _, scale, bias, mlp, running_stats = given
    _checks.tensors(theta0=theta0, query=query, scale=scale, bias=bias)
    N, _ = _checks.mlp(mlp)
    _checks.dimensions("query", query, "[T, Q, D]")
    _checks.shape("theta0", theta0, (query.shape[0], N, query.shape[2]), "[T, N, D]")
    _check_options(query, query.shape[1], scale, bias, mlp, running_stats, *options)


def _check_episode(given: Args, options: Args) -> None:
    query, query_index, support, support_index, labels, weight, scale, bias, mlp, running_stats = given
    _checks.tensors(support=support, query=query, weight=weight, scale=scale, bias=bias)
    _checks.mlp(mlp)
    T, S, Q = _checks.episode(support, support_index, query, query_index)
    _checks.shape("weight", weight, (query.shape[-1],), "[D]")
    _checks.labels("support_labels", labels, (T, S), support)
    _check_options(query, Q, scale, bias, mlp, running_stats, *options)


def _check_options(
    query: Tensor,
    Q: int,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    running_stats: Tensor | None,
    steps: int,
    inner_lr: float,
    reduction: str,
    norm_stats: str,
    return_norm_stats: bool,
) -> None:
    if Q == 0 or query.shape[-1] == 0:
        raise ValueError(f"query: expected at least one row and one feature, got {_checks.shape_text(query)}")
    _checks.one_value("scale", scale)
    _checks.one_value("bias", bias)
    _checks.norm_stats(norm_stats, running_stats, mlp[0].shape[0], return_norm_stats)
    _checks.step_size(steps, inner_lr, reduction, Q)


def _run(check: Callable[[Args, Args], None], given: Args, options: Args, return_weights: bool) -> Any:
    """Both public functions: ``start`` is theta0, or support rows if labels are given."""
    query, query_index, start, start_index, labels, weight, scale, bias, mlp, running_stats = given
    steps, inner_lr, reduction, norm_stats, return_norm_stats = options
    backend = select(query.device.type)
    # What the kernel would take in another sense than meant here, it must not see.
    clear = check is _check_inner_loop or (labels is not None and weight is not None)
    clear = clear and norm_stats == "task" and (start_index is None) is (query_index is None)
    if not clear or not _checks.by_kernel(backend):
        check(given, options)
    T, Q = query.shape[:2] if query_index is None else query_index.shape
    lr = _checks.step_size(steps, inner_lr, reduction, Q)
    if norm_stats != "running":
        running_stats = None
    if start_index is not None and (query.requires_grad or start.requires_grad):
        start, query = _gathered(start, start_index), _gathered(query, query_index)
        start_index = query_index = None
    parameters: Any = (weight, scale, bias, *mlp)
    precision = _checks.precisions((query, start, *parameters))
    if precision is not None:
        compute = precision[0]
        parameters = [None if p is None else p.to(compute) for p in parameters]
        running_stats = None if running_stats is None else running_stats.to(compute)
        if compute is torch.float64:
            query, start = query.to(compute), start.to(compute)

    plain = backend == "reference"
    if plain or (norm_stats == "batch" and T != 1):
        weight, scale, bias, *rest = parameters
        start = _gathered(start, start_index).to(scale.dtype)
        if labels is not None:
            start = reference.class_means(start, labels, mlp[0].shape[1], weight)
        loop = explicit.sib_inner_loop if not plain or is_traced() else reference.sib_inner_loop
        logits, weights, *stats = loop(
            start, _gathered(query, query_index).to(scale.dtype), scale, bias, MLPParameters(*rest), steps=steps,
            inner_lr=lr, norm_stats=norm_stats, running_stats=running_stats, return_weights=True,
            return_norm_stats=return_norm_stats,
        )  # fmt: skip
    else:
        logits, weights, *stats = OP.on(backend)(
            query, query_index, start, start_index, labels, *parameters, running_stats, steps, lr, return_weights,
            return_norm_stats, False,
        )  # fmt: skip
    if precision is not None:
        logits, weights = logits.to(precision[1]), weights.to(precision[1])
    if not return_weights and not return_norm_stats:
        return logits
    return (logits, *([weights] if return_weights else []), *(stats[:1] if return_norm_stats else []))
