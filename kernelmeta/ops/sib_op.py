"""The inner loop of SIB (Hu et al., ICLR 2020), all steps and all tasks in one op.

    logits = s (b + cos(query, theta_K)),   theta_{k+1} = theta_k - lr dZ/dtheta^T MLP(Z)

with theta_0 given (:func:`sib_inner_loop`) or the weighted class means of a support set (:func:`sib`). The kernels
work in the space of the rows (csrc/engine/cosine_step.h, inner_loop.h).
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Required, Unpack

from kernelmeta import reference
from kernelmeta.backends import is_traced, select
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._signature import Args, mlp_of, mlp_tensors
from kernelmeta.ops._trace import elements, padded
from kernelmeta.reference import explicit
from kernelmeta.reference.task_rows import as_labels, gathered
from kernelmeta.tasks import Classifier

# start: the support rows, or, without support_labels, theta0.
FEATURES = "Tensor start, Tensor? start_index, Tensor query, Tensor? query_index, Tensor? support_labels"
PARAMETERS = f"Tensor? weight, Tensor scale, Tensor bias, {mlp_tensors()}, Tensor? running_stats"
OPTIONS = "int steps, float inner_lr"


def fake(call: Any) -> tuple[Tensor, ...]:
    T, Q = call.query.shape[:2] if call.query_index is None else call.query_index.shape
    H, N = call.weight1.shape
    new_empty = call.scale.new_empty
    return (
        new_empty(T, Q, N),
        new_empty((T, N, call.query.shape[-1]) if call.return_weights else 0),
        new_empty((call.steps, 2, 2, H) if call.return_stats else 0),
    )


def _plain(call: Any, loop: Any = explicit.sib_inner_loop, norm_stats: str | None = None) -> tuple[Tensor | None, ...]:
    mlp = mlp_of(call)
    theta0 = gathered(call.start, call.start_index, "support").to(call.scale.dtype)
    if call.support_labels is not None:
        theta0 = reference.class_means(theta0, call.support_labels, mlp.weight1.shape[1], call.weight)
    logits, classifier, *stats = loop(
        theta0, gathered(call.query, call.query_index, "query").to(call.scale.dtype), call.scale, call.bias, mlp,
        steps=call.steps, inner_lr=call.inner_lr,
        norm_stats=norm_stats or ("task" if call.running_stats is None else "running"),
        running_stats=call.running_stats, return_weights=True, return_norm_stats=call.return_stats,
    )  # fmt: skip
    return logits, classifier.weight if call.return_weights else None, stats[0] if stats else None


def _trace(call: Any) -> Any:
    """``Trace`` in csrc/engine/inner_loop.h, of all tasks."""
    T, Q = call.query.shape[:2] if call.query_index is None else call.query_index.shape
    N, D, K, ld = call.weight1.shape[1], call.query.shape[-1], call.steps, padded(Q)
    arrays: list[tuple[Any, ...]] = [(Q,), (K + 1, N), (K + 1, N, ld)]
    if K > 0 and 8 * K * N >= Q:  # forms_gram
        arrays += [(N, D), (Q, ld), (K, N, ld), (N,)]
        arrays += [(K + 1, N), (K + 1, N, ld)] * call.return_weights
    else:
        arrays += [(K + 1, N, D), (K, N, D)]
    return T * elements(*arrays)


def _reference(call: Any) -> tuple[Tensor | None, ...]:
    return _plain(call, explicit.sib_inner_loop if is_traced() else reference.sib_inner_loop)


def _work(call: Any) -> int:
    T, S = call.start.shape[:2] if call.start_index is None else call.start_index.shape
    Q, D = (call.query if call.query_index is None else call.query_index).shape[1], call.query.shape[-1]
    (H, N), K = call.weight1.shape, call.steps
    rows = Q * D * (min(Q // 2, 4 * K * N) + N) + (2 * S + N) * D
    return T * (rows + K * (Q * H * (2 * N + H) + Q * Q * N))


OP = DifferentiableOp(
    "sib",
    f"{FEATURES}, {PARAMETERS}, {OPTIONS}, bool return_weights",
    options="bool return_stats",
    results=("logits", "weights", "stats"),
    outputs=2,
    differentiable=("start", "query", "weight", "scale", "bias", *MLPParameters._fields),
    rows={"start": "start_index", "query": "query_index"},
    trace=_trace,
    fake=fake,
    plain=_plain,
    reference=_reference,
    work=_work,
)


class SIBOptions(TypedDict, total=False):
    """What `sib_inner_loop` and `sib` take by name, and whatever they return."""

    steps: Required[int]
    inner_lr: Required[float]
    reduction: str
    norm_stats: str
    running_stats: Tensor | None


class SIBRowOptions(SIBOptions, total=False):
    support_index: Tensor | None
    query_index: Tensor | None


# What the public functions return, by return_weights and return_norm_stats.
# fmt: off
@overload
def sib_inner_loop(
    theta0: Tensor, query: Tensor, scale: Tensor, bias: Tensor, mlp: MLPParameters, *,
    return_weights: Literal[False] = ..., return_norm_stats: Literal[False] = ..., **options: Unpack[SIBOptions],
) -> Tensor: ...
@overload
def sib_inner_loop(
    theta0: Tensor, query: Tensor, scale: Tensor, bias: Tensor, mlp: MLPParameters, *,
    return_weights: Literal[True], return_norm_stats: Literal[False] = ..., **options: Unpack[SIBOptions],
) -> tuple[Tensor, Classifier]: ...
@overload
def sib_inner_loop(
    theta0: Tensor, query: Tensor, scale: Tensor, bias: Tensor, mlp: MLPParameters, *,
    return_weights: bool = ..., return_norm_stats: bool = ..., **options: Unpack[SIBOptions],
) -> Tensor | tuple[Any, ...]: ...
# fmt: on
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
) -> Tensor | tuple[Any, ...]:
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
        return_weights: return the classifiers too, a `Classifier` whose weight is theta_K.
        return_norm_stats: return the statistics of every step too, [K, 2, 2, H]: step; layer; mean, unbiased
            variance; unit. For "task" they are averaged over the tasks. They carry no gradient.

    Returns:
        The logits [T, Q, N] after the last step, in the dtype that features and parameters promote to (under
        autocast float32 at least); a tuple if more was asked for.

    Raises:
        ValueError: shapes, devices or options that do not fit, named.
        TypeError: tensors that are not floating point.
    """
    given = dict(locals())
    try:
        backend = select(query.device.type)
        # What a kernel would take in another sense than meant here, it must not see.
        if norm_stats != "task" or not _checks.by_kernel(backend):
            _check_inner_loop(**given)
        args = OP.arguments(
            start=theta0, start_index=None, query=query, query_index=None, support_labels=None, weight=None,
            return_weights=return_weights, **loop_arguments(given, query),
        )  # fmt: skip
        return _run(backend, args, norm_stats, query.shape[0])
    except Exception as error:
        _checks.explain(error, _check_inner_loop, given)


# fmt: off
@overload
def sib(
    support: Tensor, support_labels: Tensor, query: Tensor, weight: Tensor, scale: Tensor, bias: Tensor,
    mlp: MLPParameters, *, return_weights: Literal[False] = ..., return_norm_stats: Literal[False] = ...,
    **options: Unpack[SIBRowOptions],
) -> Tensor: ...
@overload
def sib(
    support: Tensor, support_labels: Tensor, query: Tensor, weight: Tensor, scale: Tensor, bias: Tensor,
    mlp: MLPParameters, *, return_weights: Literal[True], return_norm_stats: Literal[False] = ...,
    **options: Unpack[SIBRowOptions],
) -> tuple[Tensor, Classifier]: ...
@overload
def sib(
    support: Tensor, support_labels: Tensor, query: Tensor, weight: Tensor, scale: Tensor, bias: Tensor,
    mlp: MLPParameters, *, return_weights: bool = ..., return_norm_stats: bool = ...,
    **options: Unpack[SIBRowOptions],
) -> Tensor | tuple[Any, ...]: ...
# fmt: on
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
) -> Tensor | tuple[Any, ...]:
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
    support_labels = as_labels(support_labels)
    given = dict(locals())
    try:
        backend = select(query.device.type)
        # What a kernel would take in another sense than meant here, it must not see.
        clear = support_labels is not None and weight is not None and norm_stats == "task"
        clear = clear and (support_index is None) is (query_index is None)
        if not clear or not _checks.by_kernel(backend):
            _check_episode(**given)
        rows = query if query_index is None else query_index
        args = OP.arguments(
            start=support, start_index=support_index, query=query, query_index=query_index,
            support_labels=support_labels, weight=weight, return_weights=return_weights, **loop_arguments(given, rows),
        )  # fmt: skip
        return _run(backend, args, norm_stats, rows.shape[0])
    except Exception as error:
        _checks.explain(error, _check_episode, given)


def loop_arguments(given: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Of what a public function was given, by name: what the raw ops `sib` and `sib_gradients` take beside features.

    ``rows`` is [T, Q, ...].
    """
    return {
        "scale": given["scale"], "bias": given["bias"], "mlp": given["mlp"], "steps": given["steps"],
        "inner_lr": _checks.step_size(given["steps"], given["inner_lr"], given["reduction"], rows.shape[1]),
        "running_stats": given["running_stats"] if given["norm_stats"] == "running" else None,
        "return_stats": given["return_norm_stats"],
    }  # fmt: skip


def _check_inner_loop(
    theta0: Tensor, query: Tensor, scale: Tensor, bias: Tensor, mlp: MLPParameters, **options: Any
) -> None:
    _checks.tensors(theta0=theta0, query=query, scale=scale, bias=bias)
    N, _ = _checks.mlp(mlp)
    _checks.dimensions("query", query, "[T, Q, D]")
    _checks.shape("theta0", theta0, (query.shape[0], N, query.shape[2]), "[T, N, D]")
    _check_options(query, query.shape[1], scale, bias, mlp, **options)


def _check_episode(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    support_index: Tensor | None,
    query_index: Tensor | None,
    **options: Any,
) -> None:
    _checks.tensors(support=support, query=query, weight=weight, scale=scale, bias=bias)
    _checks.mlp(mlp)
    T, S, Q = _checks.episode(support, support_index, query, query_index)
    _checks.shape("weight", weight, (query.shape[-1],), "[D]")
    _checks.labels("support_labels", support_labels, (T, S), support)
    _check_options(query, Q, scale, bias, mlp, **options)


def _check_options(
    query: Tensor,
    Q: int,
    scale: Tensor,
    bias: Tensor,
    mlp: MLPParameters,
    *,
    running_stats: Tensor | None,
    norm_stats: str,
    return_norm_stats: bool,
    **_: Any,
) -> None:
    if Q == 0 or query.shape[-1] == 0:
        raise ValueError(f"query: expected at least one row and one feature, got {_checks.shape_text(query)}")
    _checks.one_value("scale", scale)
    _checks.one_value("bias", bias)
    _checks.norm_stats(norm_stats, running_stats, mlp[0].shape[0], return_norm_stats)


def _run(backend: str, args: Args, norm_stats: str, T: int) -> Any:
    if norm_stats == "batch" and T != 1:  # all tasks together: no kernel does that
        precision = OP.precision(args)
        if precision is not None:
            args = OP.cast(args, precision[0])
        loop = reference.sib_inner_loop if backend == "reference" and not is_traced() else explicit.sib_inner_loop
        results: Any = _plain(OP.signature.call(*args), loop, "batch")
        if precision is not None:
            results = (*(None if t is None else t.to(precision[1]) for t in results[:2]), results[2])
    else:
        results = OP.run(backend, args)
    logits, weights, stats = results
    *_, return_weights, return_stats = args
    if not return_weights and not return_stats:
        return logits
    classifier = (Classifier.cosine(weights),) if return_weights else ()
    return (logits, *classifier, *((stats,) if return_stats else ()))
