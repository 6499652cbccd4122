"""Programs in Triton: what lies before and after the phases, in the order of one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.ops._ragged import shapes
from kernelmeta.ops._signature import mlp_of
from kernelmeta.ops._trace import padded
from kernelmeta.ops.program_op import ONE, OP, PHASE_NUMBERS
from kernelmeta.phases import ORACLES
from kernelmeta.triton import anew, class_means_kernels, mlp_kernels, phases
from kernelmeta.triton.launch import interpreted
from kernelmeta.triton.oracle_kernels import EQUIVARIANT_GRADIENT, WITHOUT_KERNELS
from kernelmeta.triton.phases import Gradients, Learned, Live, Phase
from kernelmeta.triton.products import (
    combine,
    dots,
    inverse_norms,
    out_of_range,
    squared_norms,
    without_radial_part,
)
from kernelmeta.triton.tasks import Tasks
from kernelmeta.triton.trace import Trace, size_of

_WITHOUT_KERNELS = {list(ORACLES).index(name) for name in WITHOUT_KERNELS}
_FLOOR2 = 1e-24  # of a squared norm
_CLASS_MEANS, _ZERO, _GIVEN = 0, 2, 3  # starts
_COSINE, _LINEAR, _EUCLIDEAN, _DOT = range(4)  # classifiers


def _live(call: Any, S: int, Q: int) -> Live:
    """The rows that steps and results depend on, of tasks with so many support and query rows."""
    S = 0 if all(call.phases[1::PHASE_NUMBERS]) else S
    return Live(S, Q, padded(S), padded(S) + padded(Q), None)


def _fits(call: Any, live: Live) -> bool:
    dtype = call.rates.dtype
    if call.start == _GIVEN and (call.support_offsets is not None or 0 in call.support_labels.shape):
        return False  # a task may have no support row
    if any(call.phases[4::PHASE_NUMBERS]) or not _WITHOUT_KERNELS.isdisjoint(call.phases[::PHASE_NUMBERS]):
        return False  # means of predictions
    if any(call.phases[6::PHASE_NUMBERS]) or {*call.phases[5::PHASE_NUMBERS], *call.phases[7::PHASE_NUMBERS]} - {ONE}:
        return False  # joint steps, weights, alpha
    H = 0 if call.weight1 is None else call.weight1.shape[0]
    pairs = call.n_way * max(live.S, live.Q) if EQUIVARIANT_GRADIENT.value in call.phases[::PHASE_NUMBERS] else 0
    return (dtype is torch.float32 or interpreted()) and phases.fits(live.ld, call.n_way, H, dtype, pairs)


def _fields(call: Any, live: Live) -> dict[str, tuple[int, ...]]:
    """What a task's forward pass leaves; a linear classifier does not need A G."""
    N, K, coefficients = call.n_way, sum(call.phases[3::PHASE_NUMBERS]), call.coefficients
    cosine, has_length = call.classifier == _COSINE, call.classifier in (_COSINE, _EUCLIDEAN)
    return {
        "theta0": (N, call.query.shape[-1]) if call.start == _CLASS_MEANS else (),
        "inverse": (live.ld,) if cosine else (),
        "r2": (K + 1, N) if has_length else (),
        "u": (K + 1, N, live.ld),
        "ag": (K, N, live.ld) if has_length else (),
        "gram_support": (live.S, live.ld) if live.S else (),
        "gram_query": (live.Q, live.ld) if any(call.phases[1::PHASE_NUMBERS]) else (),
        "anchor": (K + 1, N) if cosine else (),
        "lost": (N,) if cosine else (),
        "a": (K + 1, N) if coefficients and has_length else (),
        "p": (K + 1, N, live.ld) if coefficients else (),
    }


class _Program:
    """What a call, forward or backward, is about."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.theta0, self.weight, self.bias, rates = call.theta0, call.weight, call.bias, call.rates
        self.N, self.start = call.n_way, call.start
        self.cosine, self.euclidean = call.classifier == _COSINE, call.classifier == _EUCLIDEAN
        self.linear, self.biased = call.classifier in (_LINEAR, _DOT), call.classifier == _LINEAR
        self.first_order, self.coefficients = call.first_order, call.coefficients
        self.tasks = tasks = Tasks(call, every_class=call.start != _GIVEN)
        self.given = (call.theta0, call.weight, call.scale, call.bias, call.target_scale, call.rates)
        scale, bias, target, mlp = call.scale, call.bias, call.target_scale, mlp_of(call)
        self.phases = [
            Phase(o, bool(query), bool(mean), steps)
            for o, query, mean, steps, *_ in zip(*[iter(call.phases)] * PHASE_NUMBERS, strict=True)
        ]
        self.K = sum(phase.steps for phase in self.phases)
        self.live = _live(call, tasks.S, tasks.Q)._replace(counts=tasks.counts)
        self.fields, self.fits = _fields(call, self.live), tasks.T > 0 and _fits(call, self.live)
        if tasks.counts is not None and not self.live.S:
            counts = tasks.counts.clone()
            counts[:, 0].zero_()
            self.live = self.live._replace(counts=counts)
        ones = rates.new_ones(1)
        own_bias = bias if self.cosine and bias is not None else ones.new_zeros(1)
        values = [ones if self.linear else scale, own_bias, ones if target is None else target]
        own = torch.cat([v.reshape(1) for v in values])
        self.learned = Learned(
            own, rates.contiguous(), tasks.labels.contiguous(), None if mlp.weight1 is None else mlp, call.running_stats
        )

    def of_tasks(self, chosen: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The call for some of the tasks alone; where their support and query rows, or those of all rows that are one
        after the other, are.
        """
        call = self.call
        of_support = of_query = chosen
        own: dict[str, Any] = {}
        if call.support_offsets is not None:
            of_support, own["support_offsets"] = anew.rows_of(chosen, call.support_offsets)
            of_query, own["query_offsets"] = anew.rows_of(chosen, call.query_offsets)
            own |= {"n_ways": None if call.n_ways is None else call.n_ways[chosen], "max_support": -1, "max_query": -1}
        for rows, index, at in (("query", "query_index", of_query), ("support", "support_index", of_support)):
            name = rows if getattr(call, index) is None else index
            own[name] = getattr(call, name)[at]
        if self.start == _GIVEN:
            own["theta0"] = call.theta0[chosen]
        return call._replace(**own, support_labels=call.support_labels[of_support]), of_support, of_query

    def parts(self) -> list[tuple[bool, slice]]:
        """(Of query rows, place among the live rows)."""
        query = (True, self.live.query)
        return [(False, self.live.support), query] if self.live.S else [query]

    def start_of(self, trace: Trace) -> Tensor | None:
        """theta0 [T, N, D], contiguous; None: zero."""
        if self.start == _ZERO:
            return None
        if self.start == _CLASS_MEANS:
            return trace["theta0"].contiguous()
        return self.theta0.expand(self.tasks.T, -1, -1).contiguous()


def trace(call: Any) -> int:
    """Elements that a forward pass leaves; none where it runs in plain PyTorch."""
    (T, S), (_, Q), _ = shapes(call)
    live = _live(call, S, Q)
    return T * size_of(_fields(call, live)) if T and _fits(call, live) else 0


def forward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``program``. What one program cannot hold runs in plain PyTorch, without trace."""
    program = _Program(call)
    tasks, live, N, K = program.tasks, program.live, program.N, program.K
    rates = program.learned.rates
    if not program.fits:
        results: tuple[Tensor, ...] = OP.plain_forward(*call)
        return results
    data = rates.new_zeros(tasks.T, size_of(program.fields))
    trace = Trace(data, program.fields)
    _begin(program, trace)
    phases.forward(trace, live, N, program.phases, program.learned)

    u = trace["u"][:, K, :, live.query].transpose(1, 2)
    logits = program.learned.numbers[0] * (u + _shift(program, trace))
    own = tasks.own_ways
    if own is not None:
        logits.masked_fill_(~own.unsqueeze(1), -float("inf"))
    coefficients = [rates.new_empty(0) for _ in range(3)]
    if program.coefficients:
        p = trace["p"][:, K].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        of_support = p[:, live.support] if live.S else p.new_zeros(tasks.T, tasks.S, N)
        a = trace["a"][:, K].clone() if "a" in trace else p.new_ones(tasks.T, N)
        if own is not None:
            a.masked_fill_(~own, 0)
        coefficients = [tasks.flatten(of_support, False), tasks.flatten(p[:, live.query], True), a]
    found = [tasks.flatten(logits, True), *coefficients]
    lost = _lost(program, trace)
    if lost is not None:
        own_call, rows_s, rows_q = program.of_tasks(lost)
        of_lost = OP.plain_forward(*own_call._replace(save_trace=False))[:4]
        anew.put(found, (rows_q, rows_s, rows_q, lost), of_lost)
    return *found, data.view(-1) if call.save_trace else rates.new_empty(0)


def _shift(program: _Program, trace: Trace) -> Tensor:
    """What is added to the last U, [T, 1, N] or []."""
    return trace["r2"][:, program.K].unsqueeze(1) / -2 if program.euclidean else program.learned.numbers[1]


def _lost(program: _Program, trace: Trace) -> Tensor | None:
    """The numbers of the tasks to be done anew, see `anew`; None if there are none."""
    theta0 = program.start_of(trace)
    if not program.cosine or theta0 is None:
        return None
    # The labels of broken tasks cannot be used.
    return anew.lost(trace, theta0.masked_fill(program.tasks.broken.view(-1, 1, 1), float("nan")))


def _begin(program: _Program, trace: Trace) -> None:
    """The Gram matrix, the start, and what it says about the live rows."""
    tasks, live, N = program.tasks, program.live, program.N
    if program.start == _CLASS_MEANS:
        means = class_means_kernels.forward(
            tasks.support, tasks.labels, program.weight, N, tasks.support_index, tasks.counts is not None
        )
        trace["theta0"].copy_(means)
    theta0 = program.start_of(trace)
    u = trace["u"][:, 0]
    for of_query, place in program.parts():
        rows, index = tasks.rows(of_query)
        if theta0 is not None:
            dots(theta0, rows, u[..., place], None, index)
        _form_gram(program, trace, of_query, place)
        if program.cosine:
            inverse = inverse_norms(rows, index, u.dtype)
            trace["inverse"][:, place] = inverse
            extreme = out_of_range(inverse.reciprocal().square()) | (tasks.D == 1)
            trace["lost"][:] += extreme.any(-1, keepdim=True)
    if program.cosine:
        assert theta0 is not None
        r2, inverse = trace["r2"][:, 0], trace["inverse"]
        squared_norms(theta0, None, r2)
        r2.clamp_min_(_FLOOR2)
        u *= inverse.unsqueeze(1)
        u *= r2.rsqrt().unsqueeze(-1)
        for name in ("gram_support", "gram_query"):
            if name in trace:
                place = live.support if name == "gram_support" else live.query
                trace[name].mul_(inverse.unsqueeze(1)).mul_(inverse[:, place].unsqueeze(-1))
    elif program.euclidean:
        if theta0 is not None:
            squared_norms(theta0, None, trace["r2"][:, 0])
    elif program.bias is not None:
        for _, place in program.parts():
            u[..., place] += program.bias.unsqueeze(-1)
    if "a" in trace:
        trace["a"][:, 0] = 1
    u.masked_fill_(tasks.broken.view(-1, 1, 1), float("nan"))


def _form_gram(program: _Program, trace: Trace, of_query: bool, place: slice) -> None:
    """Products of one part of the live rows with all of them; the bias of a linear classifier adds one."""
    name = "gram_query" if of_query else "gram_support"
    if name not in trace:
        return
    rows, index = program.tasks.rows(of_query)
    for other_query, other in program.parts():
        gram = trace[name][..., other]
        if other_query < of_query and "gram_support" in trace:
            gram.copy_(trace["gram_support"][..., place].transpose(1, 2))
        else:
            other_rows, other_index = program.tasks.rows(other_query)
            dots(rows, other_rows, gram, index, other_index)
            if program.biased:
                gram += 1


def backward(call: Any) -> tuple[Tensor, ...]:
    """The raw op ``program_backward``."""
    program = _Program(call)
    if not program.fits:
        results: tuple[Tensor, ...] = OP.plain_backward(*call)
        return results
    need_query, need_support = call.need_query, call.need_support
    of_support, of_query, of_start = (
        call.grad_support_coefficients, call.grad_query_coefficients, call.grad_start_coefficients
    )  # fmt: skip
    tasks, live, N, K = program.tasks, program.live, program.N, program.K
    rates, cosine = program.learned.rates, program.cosine
    trace = Trace(call.trace.contiguous().view(tasks.T, -1), program.fields)
    coefficients = program.coefficients and of_query is not None
    new_zeros = rates.new_zeros
    T, ld = tasks.T, live.ld
    rows = K > 0 and (need_query or (need_support and live.S > 0))
    gs, gag = (new_zeros(T, K, N, ld) if rows else None for _ in range(2))
    mlp = program.learned.mlp
    grad = Gradients(
        u=new_zeros(T, N, ld), r2=new_zeros(T, N), p=new_zeros(T, N, ld) if coefficients else None,
        a=new_zeros(T, N), mlp=new_zeros(T, 0 if mlp is None else sum(p.numel() for p in mlp)),
        numbers=new_zeros(T, 3), rates=new_zeros(T, K), gs=gs, gag=gag,
    )  # fmt: skip
    if grad.p is not None:
        assert of_support is not None and of_query is not None and of_start is not None
        if live.S:
            grad.p[..., live.support] = tasks.spread(of_support, False).transpose(1, 2)
        grad.p[..., live.query] = tasks.spread(of_query, True).transpose(1, 2)
        grad.a.copy_(of_start)
    gz = tasks.spread(call.grad_logits, True).transpose(1, 2)
    if tasks.own_ways is not None:
        gz = gz.masked_fill(~tasks.own_ways.unsqueeze(-1), 0)
    scale = program.learned.numbers[0]
    grad.u[..., live.query] = scale * gz
    if not program.linear:
        shift = _shift(program, trace).transpose(-1, -2) if program.euclidean else _shift(program, trace)
        grad.numbers[:, 0] = (gz * (trace["u"][:, K, :, live.query] + shift)).sum((1, 2))
    if cosine:
        grad.numbers[:, 1] = scale * gz.sum((1, 2))
    elif program.euclidean:
        grad.r2.copy_(gz.sum(-1) * (scale / -2))
    phases.backward(trace, live, N, program.phases, program.learned, grad, program.first_order)
    lost = _lost(program, trace)
    if lost is not None:
        for found in grad:
            if isinstance(found, Tensor):
                found[lost] = 0
        trace = Trace(trace.data.clone(), program.fields)
        trace.data[lost] = 1  # and nothing that is not finite
    results = _finish(program, trace, grad, need_query, need_support)
    if lost is not None:
        own, rows_s, rows_q = program.of_tasks(lost)
        given = [None if g is None else g[at] for g, at in ((of_support, rows_s), (of_query, rows_q), (of_start, lost))]
        own = own._replace(
            grad_logits=call.grad_logits[rows_q], grad_support_coefficients=given[0],
            grad_query_coefficients=given[1], grad_start_coefficients=given[2],
        )  # fmt: skip
        of_lost = OP.plain_backward(*own)
        anew.put(results[:2], (rows_s, rows_q), of_lost[:2])
        if program.start == _GIVEN:
            anew.put(results[2:3], [lost], of_lost[2:3])
            of_lost = (*of_lost[:2], torch.zeros_like(results[2]), *of_lost[3:])
        results = (*results[:2], *anew.add(results[2:], of_lost[2:]))
    return results


def _finish(program: _Program, trace: Trace, grad: Gradients, need_query: bool, need_support: bool) -> tuple[Any, ...]:
    """Gradients of the start and of the steps -> those of the op's arguments."""
    tasks, _live, N = program.tasks, program.live, program.N
    cosine, none = program.cosine, grad.u.new_empty(0)
    theta0 = program.start_of(trace)
    gu = grad.u  # of the rows, not normalised, times theta0
    gn0 = grad.r2 if program.euclidean else None
    if cosine:
        u, r2 = trace["u"][:, 0], trace["r2"][:, 0]
        gn0 = (grad.r2 - (gu * u).sum(-1) / (2 * r2)).masked_fill_(r2 <= _FLOOR2, 0)
        gu = gu * r2.rsqrt().unsqueeze(-1) * trace["inverse"].unsqueeze(1)

    # theta0
    gtheta0 = grad.u.new_zeros(tasks.T, N, tasks.D)
    if theta0 is not None:
        for of_query, place in program.parts():
            gtheta0 += combine(gu[..., place], *tasks.rows(of_query))
        if gn0 is not None:
            gtheta0.addcmul_(theta0, gn0.unsqueeze(-1), value=2)
    of_means, gweight = none, none
    weight = program.weight
    if program.start == _CLASS_MEANS:
        of_means, gweight = class_means_kernels.backward(
            gtheta0,
            tasks.support,
            tasks.labels,
            weight,
            N,
            need_support,
            tasks.support_index,
            tasks.counts is not None,
        )
    elif weight is not None:
        gweight = torch.zeros_like(weight)

    # the live rows
    of_rows = {}
    moved = None
    if grad.gs is not None:
        moved = phases.gram_gradient(grad, program.first_order)
        if cosine:
            moved *= trace["inverse"].unsqueeze(1) * trace["inverse"].unsqueeze(2)
    for of_query, place in program.parts():
        if not (need_query if of_query else need_support):
            continue
        g = grad.u.new_zeros(tasks.T, place.stop - place.start, tasks.D)
        if theta0 is not None:
            g += combine(gu[..., place].transpose(1, 2), theta0)
        if moved is not None:
            for other_query, other in program.parts():
                g += combine(moved[:, place, other], *tasks.rows(other_query))
        if cosine:
            g = without_radial_part(g, tasks.gathered(of_query), trace["inverse"][:, place])
        of_rows[of_query] = g
    gquery, gsupport = none, none.clone()
    if need_query:
        gquery = tasks.flatten(of_rows[True], True)
    if need_support:
        found = of_rows.get(False)
        total = of_means if found is None else found if program.start != _CLASS_MEANS else found + of_means
        if found is None and program.start != _CLASS_MEANS:
            total = grad.u.new_zeros(tasks.T, tasks.S, tasks.D)
        gsupport = tasks.flatten(total, False)
    return gsupport, gquery, *_of_parameters(program, grad, gtheta0, gweight)


def _of_parameters(program: _Program, grad: Gradients, gtheta0: Tensor, gweight: Tensor) -> list[Tensor]:
    """theta0, weight, scale, bias, target_scale, rates, the MLP's and proportions; empty where there is none."""
    mlp = program.learned.mlp
    numbers = grad.numbers.sum(0)
    given = program.given
    gbias = grad.u.sum((0, 2)) if program.linear else numbers[1:2].clone()
    of_start = gtheta0 if program.start == _GIVEN else gtheta0.sum(0)
    found = [of_start, gweight, numbers[:1].clone(), gbias, numbers[2:].clone(), grad.rates.sum(0)]
    none = grad.u.new_empty(0)
    of_mlp = [none.clone() for _ in MLPParameters._fields] if mlp is None else mlp_kernels.unpack(grad.mlp, mlp)
    of_others = (none.clone() if p is None else g.view(p.shape) for g, p in zip(found, given, strict=True))
    return [*of_others, *of_mlp, none.clone()]
