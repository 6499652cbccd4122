"""Programs: phases of gradient steps on a classifier, all steps and all tasks in one op.

The kernels work in the space of the rows (csrc/engine/program.h), with a Gram matrix in the place of the features: the
time of a step does not depend on D. What they compute is what kernelmeta/reference/program.py says, in D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from kernelmeta.backends import select
from kernelmeta.ops import _checks
from kernelmeta.ops._differentiable import Args, DifferentiableOp
from kernelmeta.ops.class_means_op import class_means
from kernelmeta.reference import MLPParameters, Phase
from kernelmeta.reference.phases import ORACLES, total_steps
from kernelmeta.reference.program import adapt

STARTS = ("class_means", "learned", "zero")
CLASSIFIERS = ("cosine", "linear")

# Positions of the raw op's arguments.
_QUERY, _SUPPORT, _THETA0, _RATES, _MLP, _RUNNING = 0, 2, 8, 13, 14, 24
_DIFFERENTIABLE = (_QUERY, _SUPPORT, *range(_THETA0, _RUNNING))
_N_TENSORS = 25

_ARGUMENTS = (
    "Tensor query, Tensor? query_index, Tensor support, Tensor? support_index, Tensor support_labels, "
    "Tensor? support_offsets, Tensor? query_offsets, Tensor? n_ways, Tensor? theta0, Tensor? weight, Tensor? scale, "
    "Tensor? bias, Tensor? target_scale, Tensor rates, Tensor? weight1, Tensor? bias1, Tensor? gain1, "
    "Tensor? shift1, Tensor? weight2, Tensor? bias2, Tensor? gain2, Tensor? shift2, Tensor? weight3, "
    "Tensor? bias3, Tensor? running_stats, int n_way, int[] phases, bool cosine, int start, bool first_order, "
    "bool coefficients, int max_support, int max_query"
)


def encode(phases: Sequence[Phase], reduction: str | None) -> list[int]:
    """Phases as the raw op takes them: oracle, of query rows, mean, steps. Those without a step are left out."""
    oracles = list(ORACLES)
    return [
        number
        for p in phases
        if p.steps
        for number in (oracles.index(p.oracle), int(p.rows == "query"), int(p.means(reduction)), p.steps)
    ]


def _decode(numbers: Sequence[int]) -> list[tuple[Phase, str]]:
    """Phases and the reduction of each."""
    oracles = list(ORACLES)
    return [
        (Phase(oracles[o], steps, 1.0, "query" if query else "support"), "mean" if mean else "sum")
        for o, query, mean, steps in zip(*[iter(numbers)] * 4, strict=True)
    ]


def _padded(n: int) -> int:
    return (n + 15) // 16 * 16


def trace_size(
    S: int, Q: int, N: int, D: int, phases: Sequence[int], cosine: bool, start: int, coefficients: bool
) -> int:
    """Elements that one task's forward pass leaves for its backward pass: ``ProgramTrace`` in csrc/engine/program.h."""
    K = sum(phases[3::4])
    uses_query = any(phases[1::4])
    uses_support = not all(phases[1::4])
    ld = _padded(Q) + (_padded(S) if uses_support else 0)
    per_step = _padded((K + 1) * N)
    size = _padded(N * D) if start == 0 else 0
    size += (2 * K + 1) * N * ld
    if cosine:
        size += ld + 2 * per_step + _padded(N)
    size += (S * ld if uses_support else 0) + (Q * ld if uses_query else 0)
    if coefficients:
        size += (per_step if cosine else 0) + (K + 1) * N * ld
    return size


def _rows(args: Args) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Leading dimensions of support and query, ([T, S] or [all rows]), and T."""
    support, query = _checks.row_shapes(*args[:4])
    return support, query, query[0] if args[5] is None else args[5].shape[0] - 1


def _fake(*args: Any) -> tuple[Tensor, ...]:
    n_way, phases, cosine, start, _, coefficients, _, _, save_trace = args[_N_TENSORS:]
    support, query, T = _rows(args)
    new_empty = args[_RATES].new_empty
    size: Any = 0
    if save_trace and args[5] is None:
        size = T * trace_size(support[1], query[1], n_way, args[_QUERY].shape[-1], phases, cosine, start, coefficients)
    elif save_trace:  # it depends on the offsets
        size = torch.library.get_ctx().new_dynamic_size()
    return (
        new_empty((*query, n_way)),
        new_empty((*support, n_way) if coefficients else 0),
        new_empty((*query, n_way) if coefficients else 0),
        new_empty((T, n_way) if coefficients else 0),
        new_empty(size),
    )


def _mlp_shapes(weight1: Tensor | None) -> list[tuple[int, ...]]:
    H, N = (0, 0) if weight1 is None else weight1.shape
    return [(H, N), (H,), (H,), (H,), (H, H), (H,), (H,), (H,), (N, H), (N,)]


def _fake_backward(
    grad: Tensor, of_support: Tensor | None, of_query: Tensor | None, of_start: Tensor | None, trace: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    need_query, need_support = args[-2:]
    support, query, _ = _rows(args)
    new_empty = args[_RATES].new_empty
    D = args[_QUERY].shape[-1]
    return (
        new_empty((*query, D) if need_query else 0),
        new_empty((*support, D) if need_support else 0),
        *(new_empty(0 if p is None else p.shape) for p in args[_THETA0:_MLP]),
        *(new_empty(shape) for shape in _mlp_shapes(args[_MLP])),
    )


def _fallback(*args: Any) -> tuple[Tensor, ...]:
    query, query_index, support, support_index, labels, support_offsets, query_offsets, n_ways = args[:8]
    theta0, weight, scale, bias, target_scale, rates, *mlp = args[_THETA0:_RUNNING]
    n_way, numbers, cosine, start, first_order, coefficients, *most = args[_N_TENSORS : _N_TENSORS + 8]
    phases = _decode(numbers)
    reductions = {reduction for _, reduction in phases}
    results = adapt(
        support.to(rates.dtype), labels, query.to(rates.dtype), [phase for phase, _ in phases], n_way=n_way,
        rates=rates, classifier="cosine" if cosine else "linear", start=theta0 if start == 1 else STARTS[start],
        weight=weight, scale=scale, bias=bias, target_scale=target_scale,
        mlp=None if mlp[0] is None else MLPParameters(*mlp), running_stats=args[_RUNNING],
        reduction=reductions.pop() if len(reductions) == 1 else None, first_order=first_order,
        support_index=support_index, query_index=query_index, support_offsets=support_offsets,
        query_offsets=query_offsets, n_ways=n_ways, **_checks.given_sizes(*most),
    )  # fmt: skip
    none = rates.new_empty(0)
    kept = [results.support_coefficients, results.query_coefficients, results.start_coefficients]
    return (results.logits, *(p if coefficients else none.clone() for p in kept), none)


def _fallback_backward(
    grad: Tensor, of_support: Tensor | None, of_query: Tensor | None, of_start: Tensor | None, trace: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    need_query, need_support = args[-2:]
    inputs = list(args[:_N_TENSORS])
    needs = dict.fromkeys(_DIFFERENTIABLE, True) | {_QUERY: need_query, _SUPPORT: need_support}
    with torch.enable_grad():
        for i in (_QUERY, _SUPPORT):  # gradients are those of the gathered rows
            if inputs[i + 1] is not None:
                inputs[i], inputs[i + 1] = inputs[i][inputs[i + 1]], None
        for i in _DIFFERENTIABLE:
            if needs[i] and inputs[i] is not None:
                inputs[i] = inputs[i].detach().requires_grad_()
        results = _fallback(*inputs, *args[_N_TENSORS:-2], False)
        wanted = [inputs[i] for i in _DIFFERENTIABLE if needs[i] and inputs[i] is not None]
        pairs = [
            (result, g)
            for result, g in zip(results, (grad, of_support, of_query, of_start), strict=False)
            if g is not None and result.requires_grad
        ]
        found = iter(
            torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if pairs
            else [None] * len(wanted)
        )
    absent = dict(zip(range(_MLP, _RUNNING), _mlp_shapes(None), strict=True))
    gradients = []
    for i in _DIFFERENTIABLE:
        if needs[i] and inputs[i] is not None:
            g = next(found)
            gradients.append(torch.zeros_like(inputs[i]) if g is None else g.to(grad.dtype).contiguous())
        else:
            gradients.append(grad.new_empty(absent.get(i, (0,))))
    return tuple(gradients)


def _backward_args(args: Args, residuals: Args, grads: Args, needs: Any) -> Args:
    support, query, T = _rows(args)
    n_way, coefficients = args[_N_TENSORS], args[_N_TENSORS + 5]
    new_zeros = args[_RATES].new_zeros
    grad, *others = grads
    if grad is None:
        grad = new_zeros(*query, n_way)
    if not coefficients or all(g is None for g in others):
        others = [None, None, None]  # of empty tensors
    else:
        shapes = ((*support, n_way), (*query, n_way), (T, n_way))
        others = [new_zeros(s) if g is None else g for g, s in zip(others, shapes, strict=True)]
    return (grad, *others, residuals[0], *args[: _N_TENSORS + 8], needs[_QUERY], needs[_SUPPORT])


OP = DifferentiableOp(
    "program",
    schema=f"({_ARGUMENTS}, bool save_trace) -> ({', '.join(['Tensor'] * 5)})",
    backward_schema="(Tensor grad_logits, Tensor? grad_support_coefficients, Tensor? grad_query_coefficients, "
    f"Tensor? grad_start_coefficients, Tensor trace, {_ARGUMENTS}, bool need_query, bool need_support) -> "
    f"({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    fake=_fake,
    fake_backward=_fake_backward,
    fallback=_fallback,
    fallback_backward=_fallback_backward,
    differentiable=_DIFFERENTIABLE,
    n_outputs=4,
    n_private=1,
    backward_args=_backward_args,
    save=lambda args: (*args[:-1], True),
)


def program(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    phases: Sequence[Phase],
    *,
    n_way: int,
    rates: Tensor | None = None,
    classifier: str = "cosine",
    start: str | Tensor = "class_means",
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    target_scale: Tensor | None = None,
    mlp: MLPParameters | None = None,
    running_stats: Tensor | None = None,
    reduction: str | None = None,
    first_order: bool = False,
    return_weights: bool = False,
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
    support_offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    n_ways: Tensor | None = None,
    max_support: int | None = None,
    max_query: int | None = None,
) -> Any:
    """Start a classifier for each task, refine it by phases of steps, and classify the query rows.

    The gradient is exact, through all steps, in everything that is a floating-point tensor.

    Args:
        support: [T, S, D]; every class needs at least one row. Classes may have unequal counts.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D], at least one row a task.
        phases: what is done, in this order; see :class:`kernelmeta.nn.Phase`.
        n_way: N.
        rates: [K], the learning rate of each step of all phases; those of the phases if None.
        classifier: "cosine", ``Z = scale (bias + cos(x, theta))``, or "linear", ``Z = x theta^T + bias``, where the
            bias is adapted too (as in MAML's head; Finn et al. 2017, Raghu et al. 2020).
        start: "class_means" (means of the normalised support rows, times ``weight``), "zero" (linear only), or a
            tensor [N, D] that all tasks share.
        weight: [D], for class means; ones if None.
        scale: [1], of a cosine classifier.
        bias: [1], of a cosine classifier; [N], the start of a linear one's; zero if None.
        target_scale: [1], what "squared_error" wants a row's own class to get; one if None.
        mlp: for "synthetic_gradient".
        running_stats: [2, 2, H]: the MLP's BatchNorm uses these instead of each task's own.
        reduction: "mean" or "sum" of the losses over the rows; the mean of losses, and the sum of synthetic
            gradients, as published, if None.
        first_order: steps are constants: no gradient flows through them but into their rates (first-order MAML).
            Linear classifiers only.
        return_weights: return the refined classifier too.
        support_index, query_index: [T, S] and [T, Q] int64, given together: then ``support`` and ``query`` are
            feature banks [n, D] and the op reads its rows straight from them.
        support_offsets, query_offsets: [T + 1] int64, given together, for tasks of unequal size: task t owns the
            rows offsets[t] .. offsets[t + 1] of ``support`` [sum S, D], ``support_labels`` [sum S] and ``query``
            [sum Q, D] (or of indices of those lengths).
        n_ways: [T] int64, the ways of each task, at most ``n_way``. A task with fewer uses the first ways of
            everything that is learned for all: rows of the start and of the bias, inputs and outputs of the MLP.
        max_support, max_query: the most support and query rows that a task may have, given together, for tasks of
            unequal size on a GPU: with them a call does not wait for the device, to read the offsets, and can be
            captured in a CUDA graph. Memory is taken for T tasks as large. What is wrong with the offsets, the ways
            or a task's size cannot raise an error then: a task that is larger, or has more ways than rows, comes out
            as NaN, and all do where the offsets do not rise from 0 to the number of rows.

    Returns:
        Logits, [T, Q, N] or [sum Q, N], minus infinity beyond a task's own ways, in the dtype that all arguments
        promote to (under autocast float32 at least). With ``return_weights`` a pair of them and theta [T, N, D] or,
        for a linear classifier, (theta, bias [T, N]); zeros beyond a task's own ways.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit, named; a class without a support row; more
            ways than a task has rows.
        TypeError: features that are not floating point, labels, indices, offsets or ways that are not int64.
    """
    theta0 = start if isinstance(start, Tensor) else None
    named: dict[str, Tensor] = {"support": support, "query": query}
    optional = {"rates": rates, "start": theta0, "weight": weight, "scale": scale, "bias": bias,
                "target_scale": target_scale}  # fmt: skip
    named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    _checks.tensors(**named)
    _checks.task_rows(
        support, support_labels, query, support_index, query_index, support_offsets, query_offsets, n_ways
    )
    sizes = _checks.task_sizes(max_support, max_query, support_offsets)
    D = query.shape[-1]
    _check_program(phases, n_way, classifier, start, scale, mlp, reduction, first_order)
    phases = [p for p in phases if p.steps]
    if theta0 is not None:
        _checks.shape("start", theta0, (n_way, D), "[N, D]")
    if weight is not None:
        _checks.shape("weight", weight, (D,), "[D]")
    if bias is not None and classifier == "linear":
        _checks.shape("bias", bias, (n_way,), "[N]")
    for name, tensor in (("scale", scale), ("target_scale", target_scale)):
        if tensor is not None:
            _checks.one_value(name, tensor)
    if bias is not None and classifier == "cosine":
        _checks.one_value("bias", bias)
    if running_stats is not None and mlp is not None:
        _checks.shape("running_stats", running_stats, (2, 2, mlp[0].shape[0]), "[2, 2, H]")
    K = total_steps(phases)
    if rates is not None:
        _checks.shape("rates", rates, (K,), "[K], one for each step of all phases,")
    if support_index is not None and query_index is not None and (support.requires_grad or query.requires_grad):
        support, query = support[support_index], query[query_index]
        support_index = query_index = None

    mlp = mlp if any(p.oracle == "synthetic_gradient" for p in phases) else None
    own: list[Tensor | None] = [theta0, weight, scale, bias, target_scale, rates, *(mlp or [None] * 10), running_stats]
    if mlp is None:
        own[-1] = None
    precision = _checks.precisions((query, support, *own[:-1]))
    compute = query.dtype if precision is None else precision[0]
    if own[5] is None:
        # (not a tensor of numbers: a copy to a GPU waits for it)
        steps = [torch.full((p.steps,), float(p.lr), dtype=compute, device=query.device) for p in phases]
        own[5] = torch.cat(steps) if steps else query.new_empty(0, dtype=compute)
    if precision is not None:
        own = [None if t is None else t.to(compute) for t in own]
        if compute is torch.float64:
            query, support = query.to(compute), support.to(compute)
    backend = select(query.device.type)
    kind = 1 if theta0 is not None else STARTS.index(str(start))
    options = (n_way, encode(phases, reduction), classifier == "cosine", kind, first_order, return_weights, *sizes)
    args = (query, query_index, support, support_index, support_labels, support_offsets, query_offsets, n_ways, *own)
    run = _fallback if backend == "reference" else OP.on(backend)
    logits, *coefficients = run(*args, *options, False)[:4]
    if precision is not None:
        logits = logits.to(precision[1])
    if not return_weights:
        return logits
    weights = _classifiers(args, coefficients, classifier, kind, n_way, first_order, sizes)
    dtype = compute if precision is None else precision[1]
    theta, shift = (w.to(dtype) for w in weights)
    return logits, theta if classifier == "cosine" else (theta, shift)


def _check_program(
    phases: Sequence[Phase],
    n_way: int,
    classifier: str,
    start: str | Tensor,
    scale: Tensor | None,
    mlp: MLPParameters | None,
    reduction: str | None,
    first_order: bool,
) -> None:
    _checks.ways(n_way)
    for phase in phases:
        if not isinstance(phase, Phase):
            raise TypeError(f"phases: expected kernelmeta.nn.Phase, got {type(phase).__name__}")
    check_combination(phases, classifier, start if isinstance(start, str) else "learned", first_order)
    if classifier == "cosine" and scale is None:
        raise ValueError("scale: a cosine classifier needs one, a tensor of one value")
    if reduction is not None and reduction not in _checks.REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_checks.REDUCTIONS)} or None, got {reduction!r}")
    if any(p.oracle == "synthetic_gradient" and p.steps for p in phases):
        if mlp is None:
            raise ValueError("mlp: a synthetic_gradient phase needs one")
        N, _ = _checks.mlp(mlp)
        if n_way != N:
            raise ValueError(f"mlp: expected {n_way} inputs and outputs, one for each way, got {N}")


def check_combination(phases: Sequence[Phase], classifier: str, start: str, first_order: bool) -> None:
    """What cannot be combined, whatever the tensors are."""
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier: expected one of {', '.join(CLASSIFIERS)}, got {classifier!r}")
    if start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    if classifier == "cosine" and start == "zero":
        raise ValueError("start: 'zero' has no direction for a cosine classifier; use a linear one")
    if classifier == "cosine" and first_order:
        raise ValueError("first_order: expected False for a cosine classifier, got True")
    if classifier == "linear" and any(p.oracle == "soft_assignment" for p in phases):
        raise ValueError("phases: soft_assignment needs a cosine classifier")


def _classifiers(
    args: Args,
    coefficients: Sequence[Tensor],
    classifier: str,
    kind: int,
    n_way: int,
    first_order: bool,
    sizes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """theta = a theta0 + P^T X, [T, N, D], and the bias [T, N]; of a cosine classifier zeros."""
    query, query_index, support, support_index, labels, support_offsets, query_offsets, n_ways, theta0, weight = args[
        :10
    ]
    bias = args[11]
    of_support, of_query, a = coefficients
    dtype = a.dtype
    support = (support if support_index is None else support[support_index]).to(dtype)
    query = (query if query_index is None else query[query_index]).to(dtype)

    def one_batch(task: Sequence[Tensor], ways: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``own`` [T, N]: the ways that each task has, if not all ``ways``. Rows that it does not have are zeros."""
        support, labels, query, of_support, of_query, a = task
        if kind == 0:
            theta = class_means(support, labels, ways, weight) if own is None else _means(support, labels, own, weight)
        elif kind == 1:
            theta = theta0[:ways].expand(support.shape[0], -1, -1)
        else:
            theta = support.new_zeros(support.shape[0], ways, support.shape[-1])
        if classifier == "cosine":
            support, query = normalize(support, dim=-1, eps=1e-12), normalize(query, dim=-1, eps=1e-12)
        if first_order:
            support, query = support.detach(), query.detach()
        P, Pq = of_support[..., :ways], of_query[..., :ways]
        theta = a[..., :ways, None] * theta + P.transpose(-1, -2) @ support + Pq.transpose(-1, -2) @ query
        if classifier == "cosine":
            return theta, theta.new_zeros(theta.shape[:2])
        shift = P.sum(-2) + Pq.sum(-2)
        if bias is not None:
            shift = shift + (bias[:ways] if own is None else bias * own)
        return theta, shift

    if support_offsets is None:
        return one_batch((support, labels, query, of_support, of_query, a), n_way)
    if sizes[0] > 0 and a.shape[0] > 0:  # not one task after the other, which has to know the offsets
        ways = torch.arange(n_way, device=a.device)
        own = ways.expand_as(a) >= 0 if n_ways is None else ways < n_ways[:, None]
        of_task = [_spread(flat, support_offsets, sizes[0], fill) for flat, fill in ((support, 0), (labels, -1))]
        of_task += [_spread(query, query_offsets, sizes[1], 0), _spread(of_support, support_offsets, sizes[0], 0)]
        return one_batch((*of_task, _spread(of_query, query_offsets, sizes[1], 0), a), n_way, own)
    bounds = (support_offsets.tolist(), query_offsets.tolist())
    all_ways = [n_way] * (len(bounds[0]) - 1) if n_ways is None else n_ways.tolist()
    thetas, shifts = [], []
    for t, ways in enumerate(all_ways):
        s, q = (slice(*b[t : t + 2]) for b in bounds)
        task = (support[None, s], labels[None, s], query[None, q], of_support[None, s], of_query[None, q], a[t, None])
        theta, shift = one_batch(task, ways)
        thetas.append(pad(theta, (0, 0, 0, n_way - ways)))
        shifts.append(pad(shift, (0, n_way - ways)))
    if not thetas:
        return support.new_zeros(0, n_way, support.shape[-1]), support.new_zeros(0, n_way)
    return torch.cat(thetas), torch.cat(shifts)


def _spread(flat: Tensor, offsets: Tensor, most: int, fill: int) -> Tensor:
    """[all rows, ...] -> [T, most, ...], with ``fill`` where a task has no row."""
    line = torch.arange(most, device=flat.device)
    source = (offsets[:-1, None] + line).clamp(0, flat.shape[0] - 1)
    absent = line >= offsets.diff()[:, None]
    return flat[source].masked_fill(absent.view(*absent.shape, *[1] * (flat.dim() - 1)), fill)


def _means(support: Tensor, labels: Tensor, own: Tensor, weight: Tensor | None) -> Tensor:
    """Class means [T, N, D] of rows [T, S, D] whose labels are -1 where there is none."""
    of_class = (labels[:, None] == torch.arange(own.shape[1], device=labels.device)[:, None]).to(support.dtype)
    sums = of_class @ normalize(support, dim=-1, eps=1e-12)
    means = sums / of_class.sum(-1, keepdim=True).clamp(min=1)
    return means if weight is None else means * weight
