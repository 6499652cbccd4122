"""Programs: phases of gradient steps on a classifier, all steps and all tasks in one op.

The kernels work in the space of the rows (csrc/engine/program.h), with a Gram matrix in the place of the features: the
time of a step does not depend on D. What they compute is what kernelmeta/reference/program.py says, in D dimensions.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from kernelmeta.backends import is_traced, select
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.ops import _checks, _gram_program, _marginals, _ragged
from kernelmeta.ops._differentiable import DifferentiableOp
from kernelmeta.ops._gram_program import Gram
from kernelmeta.ops._signature import mlp_of, mlp_tensors
from kernelmeta.ops._trace import elements, padded
from kernelmeta.ops.class_means_op import class_means
from kernelmeta.phases import ENTROPIES, GUESSED, MARGINALS, ORACLES, Part, Phase, parts_of, total_steps
from kernelmeta.reference.equivariant_gradient import PAIR_INPUTS
from kernelmeta.reference.program import adapt
from kernelmeta.reference.task_rows import as_labels, gathered
from kernelmeta.tasks import Classifier, Ragged

STARTS = ("class_means", "learned", "zero", "given")  # in the order of enum Start in csrc/engine/program_task.h
_OF_TENSORS = ("learned", "given")
CLASSIFIERS = ("cosine", "linear", "euclidean", "dot")  # in the order of enum ClassifierKind in csrc/ops/program.h
SCALED = ("cosine", "euclidean")


PHASE_NUMBERS = 8  # of one part of a phase, see `encode`
ONE = struct.unpack("<q", struct.pack("<d", 1.0))[0]


def encode(phases: Sequence[Phase], reduction: str | None) -> list[int]:
    """Phases as the raw op takes them, the parts of a sum one after the other: oracle, of query rows, mean, steps,
    marginals, relax or alpha, whether the next part is of the same sum, weight. Numbers that are no integers are the
    bits of doubles; of a sum, the last part has the steps.

    Those without a step are left out.
    """
    oracles = list(ORACLES)
    return [
        number
        for phase in phases
        if phase.steps
        for i, p in enumerate(phase.parts, 1)
        for number in (
            oracles.index(p.oracle), int(p.rows == "query"), int(p.means(reduction)),
            phase.steps if i == len(phase.parts) else 0, MARGINALS.index(p.marginals),
            _bits(p.alpha if p.oracle in ENTROPIES else p.relax), int(i < len(phase.parts)), _bits(p.weight),
        )
    ]  # fmt: skip


def _bits(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _decode(numbers: Sequence[int]) -> tuple[list[Phase], set[str]]:
    """Phases, and the reductions that some of their parts have."""
    oracles = list(ORACLES)
    phases: list[Phase] = []
    reductions, parts = set(), []
    for o, query, mean, steps, marginals, bits, joins, weight in zip(*[iter(numbers)] * PHASE_NUMBERS, strict=True):
        number, factor = (struct.unpack("<d", struct.pack("<q", b))[0] for b in (bits, weight))
        setting = {"alpha" if oracles[o] in ENTROPIES else "relax": number}
        reductions.add("mean" if mean else "sum")
        parts.append(Part(oracles[o], "query" if query else "support", factor, MARGINALS[marginals], **setting))
        if joins:
            continue
        plain = len(parts) == 1 and factor == 1
        oracle = parts[0].oracle if plain else "".join(p.term for p in parts)
        phase = Phase(
            oracle, steps, 1.0, parts[0].rows if plain else None,
            marginals=MARGINALS[max(MARGINALS.index(p.marginals) for p in parts)], relax=min(p.relax for p in parts),
            alpha=next((p.alpha for p in parts if p.alpha != 1), 1.0),
        )  # fmt: skip
        if list(phase.parts) != parts:
            raise ValueError(f"phases: the parts of {oracle} differ in marginals, relax or alpha")
        phases.append(phase)
        parts = []
    return phases, reductions


def _fake(call: Any) -> tuple[Tensor, ...]:
    support, query, T = _ragged.shapes(call)
    new_empty, N = call.rates.new_empty, call.n_way
    kept = ((*support, N), (*query, N), (T, N))
    return new_empty((*query, N)), *(new_empty(shape if call.coefficients else 0) for shape in kept)


def _plain(call: Any) -> tuple[Tensor | None, ...]:
    phases, reductions = _decode(call.phases)
    mlp = mlp_of(call)
    dtype = call.rates.dtype
    results = adapt(
        call.support.to(dtype), call.support_labels, call.query.to(dtype), phases,
        n_way=call.n_way, rates=call.rates, classifier=CLASSIFIERS[call.classifier],
        start=call.theta0 if STARTS[call.start] in _OF_TENSORS else STARTS[call.start], weight=call.weight,
        scale=call.scale, bias=call.bias, target_scale=call.target_scale,
        mlp=None if mlp.weight1 is None else mlp, running_stats=call.running_stats,
        reduction=reductions.pop() if len(reductions) == 1 else None, first_order=call.first_order,
        support_index=call.support_index, query_index=call.query_index, ragged=_ragged.of_call(call),
        coefficients=call.coefficients, proportions=call.proportions, bag_offsets=call.bag_offsets,
    )  # fmt: skip
    kept = (results.support_coefficients, results.query_coefficients, results.start_coefficients)
    return results.logits, *(p if call.coefficients else None for p in kept)


def _trace(call: Any) -> Any:
    """``ProgramTrace`` in csrc/engine/program_shape.h, of all tasks."""
    (T, S), (_, Q), _ = _ragged.shapes(call)
    N, D, K, of_query = (
        call.n_way,
        call.query.shape[-1],
        sum(call.phases[3::PHASE_NUMBERS]),
        call.phases[1::PHASE_NUMBERS],
    )
    uses_support, uses_query = not all(of_query), any(of_query)
    ld = padded(Q) + (padded(S) if uses_support else 0)
    arrays: list[tuple[Any, ...]] = [(K + 1, N, ld), (K, N, ld)]
    if call.start == STARTS.index("class_means"):
        arrays.append((N, D))
    classifier = CLASSIFIERS[call.classifier]
    if classifier != "linear":
        arrays.append((K + 1, N))
    if classifier == "cosine":
        arrays += [(ld,), (K + 1, N), (N,)]
    arrays += [(S, ld)] * uses_support + [(Q, ld)] * uses_query
    if call.coefficients:
        arrays += [(K + 1, N)] * (classifier != "linear") + [(K + 1, N, ld)]
    return T * elements(*arrays)


def _work(call: Any) -> int:
    """As if all tasks were of the same size."""
    support, query, T = _ragged.shapes(call)
    S, Q = (math.prod(rows) // max(T, 1) for rows in (support, query))
    N, D, H = call.n_way, call.query.shape[-1], 0 if call.weight1 is None else call.weight1.shape[0]
    total = (S + Q) * N * D + S * (S // 2 + Q) * D + Q * Q // 2 * D
    for phase in _decode(call.phases)[0]:
        for part in phase.parts:
            rows = Q if part.rows == "query" else S
            total += phase.steps * rows * N * (S + Q + 20)
            if part.oracle == "synthetic_gradient":
                total += phase.steps * rows * H * (2 * N + H)
            elif part.oracle == "equivariant_gradient":
                total += phase.steps * rows * N * H * (PAIR_INPUTS + 1 + H)
    return T * total


@functools.lru_cache(maxsize=1024)
def _outgrow_gram(T: int, supports: int, queries: int, N: int, D: int, phases: tuple[int, ...]) -> bool:
    """Whether T tasks with so many support and query rows together take fewer multiplications without Gram matrices.

    It takes (S + Q)^2 D / 2 multiplications a task, and (S + Q)^2 elements; without it a step takes 2 (S + Q) N D, in
    products that PyTorch's own are good at. Those come with some dozen calls a step. The factors were measured.
    """
    S, Q = supports // max(T, 1), queries // max(T, 1)
    of_query, steps = phases[1::PHASE_NUMBERS], sum(phases[3::PHASE_NUMBERS])
    gram = (0 if all(of_query) else S * (S / 2 + Q)) + (Q * Q / 2 if any(of_query) else 0)
    rows = Q + (0 if all(of_query) else S)
    with_gram = 0.7 * gram * D + 1.5 * steps * gram * N
    without = (3 + 2 * steps) * rows * N * D
    calls = 2.2e6 * (1 + steps)
    return T * with_gram > T * without + calls


OP = DifferentiableOp(
    "program",
    f"{_ragged.FEATURES}, Tensor? theta0, Tensor? weight, Tensor? scale, Tensor? bias, Tensor? target_scale, "
    f"Tensor rates, {mlp_tensors('Tensor?')}, Tensor? running_stats, Tensor? proportions, "
    "Tensor? bag_offsets, int n_way, int[] phases, int classifier, int start, "
    f"bool first_order, bool coefficients, {_ragged.SIZES}",
    results=("logits", "support_coefficients", "query_coefficients", "start_coefficients"),
    outputs=4,
    differentiable=(
        "support",
        "query",
        "theta0",
        "weight",
        "scale",
        "bias",
        "target_scale",
        "rates",
        *MLPParameters._fields,
        "proportions",
    ),
    rows={"support": "support_index", "query": "query_index"},
    trace=_trace,
    fake=_fake,
    plain=_plain,
    work=_work,
)


# fmt: off
@overload
def program(
    support: Tensor | None, support_labels: Tensor, query: Tensor | None, phases: Sequence[Phase], *,
    n_way: int, rates: Tensor | None = ..., classifier: str = ..., start: str | Tensor = ...,
    weight: Tensor | None = ..., scale: Tensor | None = ..., bias: Tensor | None = ...,
    target_scale: Tensor | None = ..., mlp: MLPParameters | None = ..., running_stats: Tensor | None = ...,
    reduction: str | None = ..., first_order: bool = ..., return_weights: Literal[False] = ...,
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
    gram: Gram | None = ..., weight_decay: float | Tensor = ..., proportions: Tensor | None = ...,
    bag_offsets: Tensor | None = ...,
) -> Tensor: ...
@overload
def program(
    support: Tensor | None, support_labels: Tensor, query: Tensor | None, phases: Sequence[Phase], *,
    n_way: int, rates: Tensor | None = ..., classifier: str = ..., start: str | Tensor = ...,
    weight: Tensor | None = ..., scale: Tensor | None = ..., bias: Tensor | None = ...,
    target_scale: Tensor | None = ..., mlp: MLPParameters | None = ..., running_stats: Tensor | None = ...,
    reduction: str | None = ..., first_order: bool = ..., return_weights: Literal[True],
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
    gram: Gram | None = ..., weight_decay: float | Tensor = ..., proportions: Tensor | None = ...,
    bag_offsets: Tensor | None = ...,
) -> tuple[Tensor, Classifier]: ...
@overload
def program(
    support: Tensor | None, support_labels: Tensor, query: Tensor | None, phases: Sequence[Phase], *,
    n_way: int, rates: Tensor | None = ..., classifier: str = ..., start: str | Tensor = ...,
    weight: Tensor | None = ..., scale: Tensor | None = ..., bias: Tensor | None = ...,
    target_scale: Tensor | None = ..., mlp: MLPParameters | None = ..., running_stats: Tensor | None = ...,
    reduction: str | None = ..., first_order: bool = ..., return_weights: bool,
    support_index: Tensor | None = ..., query_index: Tensor | None = ..., ragged: Ragged | None = ...,
    gram: Gram | None = ..., weight_decay: float | Tensor = ..., proportions: Tensor | None = ...,
    bag_offsets: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Classifier]: ...
# fmt: on
def program(
    support: Tensor | None,
    support_labels: Tensor,
    query: Tensor | None,
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
    ragged: Ragged | None = None,
    gram: Gram | None = None,
    weight_decay: float | Tensor = 0.0,
    proportions: Tensor | None = None,
    bag_offsets: Tensor | None = None,
) -> Tensor | tuple[Tensor, Classifier]:
    """Start a classifier for each task, refine it by phases of steps, and classify the query rows.

    The gradient is exact, through all steps, in everything that is a floating-point tensor.

    Args:
        support: [T, S, D]; every class needs at least one row (but see ``start``). Classes may have unequal counts.
        support_labels: [T, S] int64 in 0..N-1.
        query: [T, Q, D], at least one row a task.
        phases: what is done, in this order; see :class:`kernelmeta.nn.Phase`.
        n_way: N.
        rates: [K], the learning rate of each step of all phases; those of the phases if None.
        classifier: "cosine", ``Z = scale (bias + cos(x, theta))``; "linear", ``Z = x theta^T + bias``, where the
            bias is adapted too (as in MAML's head; Finn et al. 2017, Raghu et al. 2020); "dot", ``Z = x theta^T``,
            linear without a bias; or "euclidean", ``Z = scale (x theta^T - |theta|^2 / 2)``, minus half of
            ``scale |x - theta|^2`` but for what a row's classes have in common (Snell et al. 2017).
        start: "class_means" (means of the normalised support rows, times ``weight``), "zero" (not cosine), or a
            tensor: [N, D], that all tasks share, or [T, N, D], each task's own. With each task's own, classes may
            have no support row, nor need a task have one (S may be 0) where no phase uses support rows: text
            embeddings of class names, refined on unlabelled rows, for example.
        weight: [D], for class means; ones if None.
        scale: [1], of a cosine or Euclidean classifier.
        bias: [1], of a cosine classifier; [N], the start of a linear one's; zero if None. The others have none.
        target_scale: [1], what "squared_error" wants a row's own class to get; one if None.
        mlp: for "synthetic_gradient", with N inputs and outputs; or for "equivariant_gradient", with 7 inputs and one
            output (:class:`kernelmeta.nn.EquivariantGradientMLP`). A program has one of the two.
        running_stats: [2, 2, H]: the MLP's BatchNorm uses these instead of each task's own.
        reduction: "mean" or "sum" of the losses over the rows; the mean of losses, and the sum of guessed
            gradients, as published, if None.
        first_order: steps are constants: no gradient flows through them but into their rates (first-order MAML).
            For "linear" and "dot".
        return_weights: return the refined classifier too; a Euclidean one as the linear one with the same logits,
            ``scale theta`` and ``-scale |theta|^2 / 2``.
        support_index, query_index: [T, S] and [T, Q] int64, given together: then ``support`` and ``query`` are
            feature banks [n, D] and the op reads its rows straight from them.
        ragged: tasks of unequal size: then ``support`` is [all support rows, D], ``support_labels`` [all support
            rows], ``query`` [all query rows, D] (or indices of those lengths). A task with fewer than ``n_way`` ways
            uses the first ways of everything that is learned for all: rows of the start and of the bias, inputs and
            outputs of the MLP of synthetic gradients.
        gram: what is known of the rows instead of the rows themselves, ``support`` and ``query`` being None: a
            `TangentKernel`, as :func:`ntk_gram` returns, whose outputs are where the logits start; or the matrices
            ``gram`` [T, S, S] and ``cross`` [T, Q, S] of any kernel. It takes ``classifier="linear"``,
            ``start="zero"`` and phases of support rows with losses; a bias is what the kernel has (K + 1). It runs as
            plain PyTorch everywhere.
        weight_decay: beside ``gram`` only: half the factor of the squared distance from where the weights of the model
            start, in the loss of every phase, a number or [1].
        proportions: for phases with ``marginals="given"``: [T, N], the shares of a task's query rows that its classes
            have, 0 or more; they sum to 1 over the task's own ways. With ``bag_offsets`` [T, B, N], of each bag. A
            class of share 0 gets no row.
        bag_offsets: [T, B + 1] int64, or [B + 1] for all tasks alike: the query rows of a task are divided into B bags,
            each with its own proportions: bag b owns the task's rows offsets[b] .. offsets[b + 1].

    Returns:
        Logits, [T, Q, N] or [sum Q, N], minus infinity beyond a task's own ways, in the dtype that all arguments
        promote to (under autocast float32 at least). With ``return_weights`` a pair of them and the refined
        classifiers. A task whose classes' shares are not met within 1e-5 (of float64 1e-10) is NaN, and a warning
        names it where the numbers can be looked at.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit, named; a class without a support row; more
            ways than a task has rows.
        TypeError: features that are not floating point, labels, indices, offsets or ways that are not int64.
    """
    if gram is not None:
        absent = {"support": support, "query": query, "weight": weight, "scale": scale, "bias": bias, "mlp": mlp,
                  "running_stats": running_stats, "support_index": support_index, "query_index": query_index,
                  "ragged": ragged, "first_order": first_order, "return_weights": return_weights,
                  "proportions": proportions, "bag_offsets": bag_offsets}  # fmt: skip
        return _gram_program.run(
            gram, support_labels, phases, n_way=n_way, rates=rates, target_scale=target_scale, reduction=reduction,
            weight_decay=weight_decay, absent=absent, classifier=classifier, start=start,
        )  # fmt: skip
    if support is None or query is None:
        raise TypeError("support and query: expected tensors, or gram instead of both")
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        raise ValueError("weight_decay: expected 0, its default, unless gram is given")
    theta0 = start if isinstance(start, Tensor) else None
    named: dict[str, Tensor] = {"support": support, "query": query}
    optional = {"rates": rates, "start": theta0, "weight": weight, "scale": scale, "bias": bias,
                "target_scale": target_scale, "proportions": proportions}  # fmt: skip
    named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    _checks.tensors(**named)
    support_labels = as_labels(support_labels)
    _checks.task_rows(support, support_labels, query, support_index, query_index, ragged)
    D = query.shape[-1]
    _check_program(phases, n_way, classifier, start, scale, mlp, reduction, first_order)
    phases = [p for p in phases if p.steps]
    if total_steps(phases) > _checks.MOST:
        raise ValueError(f"phases: expected at most 2^31 steps in all, got {total_steps(phases)}")
    of_tasks = support_labels.shape[0] if ragged is None else ragged.support_offsets.shape[0] - 1
    kind = start if isinstance(start, str) else "learned"
    if theta0 is None and kind in _OF_TENSORS:
        raise ValueError(f"start: expected the tensor itself of a {kind} start")
    if theta0 is not None:
        if theta0.dim() == 3:
            kind = "given"
            _checks.shape("start", theta0, (of_tasks, n_way, D), "[T, N, D]")
        else:
            _checks.shape("start", theta0, (n_way, D), "[N, D] or [T, N, D]")
    if ragged is None and not support_labels.shape[1] and any(p.rows == "support" for p in parts_of(phases)):
        raise ValueError("support: tasks have no row, and phases of support rows need one")
    if weight is not None:
        _checks.shape("weight", weight, (D,), "[D]")
    if bias is not None and classifier == "linear":
        _checks.shape("bias", bias, (n_way,), "[N]")
    for name, tensor in (("scale", scale), ("target_scale", target_scale)):
        if tensor is not None:
            _checks.one_value(name, tensor)
    if bias is not None and classifier == "cosine":
        _checks.one_value("bias", bias)
    if bias is not None and classifier == "euclidean":
        raise ValueError("bias: expected None for a Euclidean classifier, whose logits |theta| shifts")
    if bias is not None and classifier == "dot":
        raise ValueError("bias: expected None for a dot product; a linear classifier has one")
    if running_stats is not None and mlp is not None:
        _checks.shape("running_stats", running_stats, (2, 2, mlp[0].shape[0]), "[2, 2, H]")
    proportions, bag_offsets = _marginals.checked(proportions, bag_offsets, phases, query, ragged, of_tasks, n_way)
    K = total_steps(phases)
    if rates is not None:
        _checks.shape("rates", rates, (K,), "[K], one for each step of all phases,")
    mlp = mlp if any(p.oracle in GUESSED for p in parts_of(phases)) else None
    precision = _checks.precisions([*named.values(), *(mlp or ())])
    compute, result_type = (query.dtype, None) if precision is None else precision
    proportions = None if proportions is None else proportions.to(compute)
    if rates is None:
        # (not a tensor of numbers: a copy to a GPU waits for it)
        steps = [torch.full((p.steps,), float(p.lr), dtype=compute, device=query.device) for p in phases]
        rates = steps[0] if len(steps) == 1 else torch.cat(steps) if steps else query.new_empty(0, dtype=compute)
    encoded = encode(phases, reduction)
    args = OP.arguments(
        support=support, support_index=support_index, query=query, query_index=query_index,
        support_labels=support_labels, **_ragged.fields(ragged), theta0=theta0, weight=weight, scale=scale, bias=bias,
        target_scale=target_scale, rates=rates, mlp=mlp or [None] * 10,
        running_stats=None if mlp is None else running_stats, proportions=proportions, bag_offsets=bag_offsets,
        n_way=n_way, phases=encoded,
        classifier=CLASSIFIERS.index(classifier), start=STARTS.index(kind),
        first_order=first_order, coefficients=return_weights,
    )  # fmt: skip
    if precision is not None:
        args = OP.cast(args, compute)
    backend = select(query.device.type)
    if backend == "cuda" and _needs_plain_form(phases, classifier):
        backend = "reference"
    if backend != "reference" and not is_traced():
        T = support_labels.shape[0] if ragged is None else ragged.support_offsets.shape[0] - 1
        queries = query.numel() // D if query_index is None else query_index.numel()
        if _outgrow_gram(T, support_labels.numel(), queries, n_way, D, tuple(encoded)):
            backend = "reference"
    logits, *coefficients = OP.compute(backend, args)
    if any(p.marginals != "none" for p in phases):
        _marginals.warn_of_missed(logits, ragged)
    if not return_weights:
        return logits if result_type is None else logits.to(result_type)
    made = (logits, *_classifiers(OP.signature.call(*args), *coefficients))
    logits, weight, bias = made if result_type is None else (t.to(result_type) for t in made)
    return logits, Classifier(weight, bias)


def _needs_plain_form(phases: Sequence[Phase], classifier: str) -> bool:
    """Whether the CUDA kernels, whose registers are full, leave it to plain PyTorch: `kJointSteps` in csrc."""
    return classifier in ("euclidean", "dot") or any(
        phase.is_sum or phase.alpha != 1 or phase.oracle == "marginal_entropy" for phase in phases
    )


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
    if classifier in SCALED and scale is None:
        raise ValueError(f"scale: a {classifier} classifier needs one, a tensor of one value")
    if reduction is not None and reduction not in _checks.REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_checks.REDUCTIONS)} or None, got {reduction!r}")
    for oracle in {p.oracle for p in parts_of(phases)} & set(GUESSED):
        if mlp is None:
            raise ValueError(f"mlp: phases of {oracle} need one")
        if oracle == "synthetic_gradient":
            N, _ = _checks.mlp(mlp)
            if n_way != N:
                raise ValueError(f"mlp: expected {n_way} inputs and outputs, one for each way, got {N}")
        else:
            inputs, _ = _checks.mlp(mlp, 1)
            if inputs != PAIR_INPUTS:
                raise ValueError(f"mlp: expected {PAIR_INPUTS} inputs, those of an equivariant gradient, got {inputs}")


def check_combination(phases: Sequence[Phase], classifier: str, start: str, first_order: bool) -> None:
    """What cannot be combined, whatever the tensors are."""
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier: expected one of {', '.join(CLASSIFIERS)}, got {classifier!r}")
    if start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    if classifier == "cosine" and start == "zero":
        raise ValueError("start: 'zero' has no direction for a cosine classifier; use a linear or a Euclidean one")
    if classifier in SCALED and first_order:
        raise ValueError(f"first_order: expected False for a {classifier} classifier, got True")
    if {p.oracle for p in parts_of(phases)} >= set(GUESSED):
        raise ValueError(f"phases: expected one of {' and '.join(GUESSED)}, got both: a program has one MLP")
    if classifier != "cosine" and any(p.oracle == "soft_assignment" for p in phases):
        raise ValueError("phases: soft_assignment needs a cosine classifier")


def _classifiers(call: Any, of_support: Tensor, of_query: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """theta = a theta0 + P^T X, [T, N, D], and the bias [T, N]; of a cosine classifier zeros. Of a Euclidean one the
    linear classifier with its logits.
    """
    kind = CLASSIFIERS[call.classifier]
    n_way, n_ways, weight, bias, dtype = call.n_way, call.n_ways, call.weight, call.bias, a.dtype
    labels, support_offsets, query_offsets = call.support_labels, call.support_offsets, call.query_offsets
    support = gathered(call.support, call.support_index, "support").to(dtype)
    query = gathered(call.query, call.query_index, "query").to(dtype)

    def one_batch(
        task: Sequence[Tensor], ways: int, own: Tensor | None = None, theta0: Tensor | None = call.theta0
    ) -> tuple[Tensor, Tensor]:
        """``own`` [T, N]: the ways that each task has, if not all ``ways``. Rows that it does not have are zeros."""
        support, labels, query, of_support, of_query, a = task
        if call.start == STARTS.index("class_means"):
            theta = class_means(support, labels, ways, weight) if own is None else _means(support, labels, own, weight)
        elif theta0 is not None:
            theta = theta0[..., :ways, :].expand(support.shape[0], -1, -1)
        else:
            theta = support.new_zeros(support.shape[0], ways, support.shape[-1])
        if kind == "cosine":
            support, query = normalize(support, dim=-1, eps=1e-12), normalize(query, dim=-1, eps=1e-12)
        if call.first_order:
            support, query = support.detach(), query.detach()
        P, Pq = of_support[..., :ways], of_query[..., :ways]
        theta = a[..., :ways, None] * theta + P.transpose(-1, -2) @ support + Pq.transpose(-1, -2) @ query
        if kind == "cosine":
            return theta, theta.new_zeros(theta.shape[:2])
        if kind == "euclidean":
            return call.scale * theta, call.scale * theta.square().sum(-1) / -2
        shift = P.sum(-2) + Pq.sum(-2)
        if bias is not None:
            shift = shift + (bias[:ways] if own is None else bias * own)
        return theta, shift if kind == "linear" else torch.zeros_like(shift)

    if support_offsets is None:
        return one_batch((support, labels, query, of_support, of_query, a), n_way)
    most_support, most_query = call.max_support, call.max_query
    if most_support > 0 and a.shape[0] > 0:  # not one task after the other, which has to know the offsets
        ways = torch.arange(n_way, device=a.device)
        own = ways.expand_as(a) >= 0 if n_ways is None else ways < n_ways[:, None]
        of_task = [_spread(flat, support_offsets, most_support, fill) for flat, fill in ((support, 0), (labels, -1))]
        of_task += [_spread(query, query_offsets, most_query, 0), _spread(of_support, support_offsets, most_support, 0)]
        return one_batch((*of_task, _spread(of_query, query_offsets, most_query, 0), a), n_way, own)
    bounds = (support_offsets.tolist(), query_offsets.tolist())
    all_ways = [n_way] * (len(bounds[0]) - 1) if n_ways is None else n_ways.tolist()
    thetas, shifts = [], []
    for t, ways in enumerate(all_ways):
        s, q = (slice(*b[t : t + 2]) for b in bounds)
        task = (support[None, s], labels[None, s], query[None, q], of_support[None, s], of_query[None, q], a[t, None])
        given = call.theta0[t, None] if call.start == STARTS.index("given") else call.theta0
        theta, shift = one_batch(task, ways, None, given)
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
