"""Programs in D dimensions, step by step: the specification of the engine's inner loops.

A program refines a classifier theta by phases of steps (DESIGN: one engine, many learners). With X the rows of a phase
and G [rows, N] what its oracle gives for their logits Z, a step of rate lr is

    linear   Z = X W^T + b            W' = W - lr G^T X,   b' = b - lr sum(G)
    dot      Z = X W^T                W' = W - lr G^T X
    cosine   Z = s (b + Xhat that^T)  theta' = theta - lr s (G^T Xhat - that * sum(G cos)) / |theta|
    euclidean  Z = s (X theta^T - |theta|^2 / 2)    theta' = theta - lr s (G^T X - theta * sum(G))

with Xhat the normalised rows and that the normalised theta. A phase may have several oracles, whose steps are along the
weighted sum of their gradients, each at its own rows' logits. Each gradient is written out, so that the functions here
can be differentiated any number of times, compiled, and used under torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from kernelmeta.backends import holds_numbers, is_traced
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.phases import GUESSED, Part, Phase, parts_of
from kernelmeta.reference.class_means import check_labels, class_means
from kernelmeta.reference.equivariant_gradient import equivariant_gradient_mlp
from kernelmeta.reference.norms import FLOOR, unit, unit_and_length
from kernelmeta.reference.precision import promoted, without_autocast
from kernelmeta.reference.synthetic_gradient_mlp import synthetic_gradient_mlp
from kernelmeta.reference.task_rows import check_label_range, each_task, gathered
from kernelmeta.reference.transport import Bags, proportions_gradient, transport
from kernelmeta.tasks import Classifier, Ragged

LEAST_MASS = 1e-12  # of a class; one with fewer rows stays where it is in a soft assignment
LEAST_MEAN = 1e-30  # of a prediction, for its logarithm
FEW = 16  # ways up to which PyTorch is quicker with the classes of many rows in the outer dimension,
CACHED = 2**20  # unless the elements of a task's rows are more than these


class Adapted(NamedTuple):
    """What a program leaves: theta = a theta0 + P^T X over the rows it used (normalised for a cosine classifier)."""

    logits: Tensor  # [T, Q, N]
    weights: Tensor  # [T, N, D]
    bias: Tensor  # [T, N], linear (a Euclidean classifier is returned as one)
    support_coefficients: Tensor  # P, [T, S, N]
    query_coefficients: Tensor  # P, [T, Q, N]
    start_coefficients: Tensor  # a, [T, N]


def oracle_gradient(
    oracle: str,
    logits: Tensor,
    labels: Tensor | None,
    *,
    mean: bool,
    target_scale: Tensor | float = 1.0,
    mlp: MLPParameters | None = None,
    running_stats: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """G = d loss / d logits: [T, rows, N] -> [T, rows, N], from one-hot labels of that shape where needed."""
    if oracle == "cross_entropy":
        assert labels is not None
        G = logits.softmax(-1) - labels
    elif oracle == "squared_error":
        assert labels is not None
        G = logits - target_scale * labels
    elif oracle == "hinge":
        assert labels is not None
        own = (logits * labels).sum(-1, keepdim=True)
        violated = ((1 + logits - own) > 0).to(logits.dtype) * (1 - labels)
        G = violated - labels * violated.sum(-1, keepdim=True)
    elif oracle == "entropy":
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        pulls = -p * log_p if alpha == 1 else _less_by_itself(p, log_p, alpha) * (alpha / (1 - alpha))
        G = pulls - p * pulls.sum(-1, keepdim=True)
    elif oracle == "marginal_entropy":
        p = logits.softmax(-1)
        log_mean = p.mean(-2, keepdim=True).clamp_min(LEAST_MEAN).log()
        slope = -log_mean if alpha == 1 else ((alpha - 1) * log_mean).expm1() * (alpha / (1 - alpha))
        # slope - <p, slope>, of differences, which keep their digits where one class has all of a row.
        G = p * (p @ (slope - slope.transpose(-1, -2)))
    elif oracle not in GUESSED:
        raise ValueError(f"oracle: {oracle!r} has no gradient here")
    else:
        assert mlp is not None
        norm_stats = "task" if running_stats is None else "running"
        guess = equivariant_gradient_mlp if oracle == "equivariant_gradient" else synthetic_gradient_mlp
        G = guess(logits, mlp, norm_stats=norm_stats, running_stats=running_stats)
    return G / logits.shape[-2] if mean else G


def _less_by_itself(p: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """p^alpha - p, with its digits where alpha is nearly 1; where p is 0 and alpha below 1, too."""
    x = (alpha - 1) * log_p
    near = x.abs() < 0.5
    return torch.where(near, p * torch.where(near, x, 0).expm1(), (alpha * log_p).exp() - p)


def run_phases(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    theta0: Tensor,
    phases: Sequence[Phase],
    rates: Tensor,
    *,
    classifier: str,
    scale: Tensor | None,
    bias: Tensor | None,
    target_scale: Tensor | None,
    mlp: MLPParameters | None,
    running_stats: Tensor | None,
    reduction: str | None,
    first_order: bool,
    coefficients: bool,
    proportions: Tensor | None,
    bag_offsets: Tensor | None,
) -> Adapted:
    """The phases on T tasks of equal size; ``theta0`` is [T, N, D], the rest as in :func:`kernelmeta.ops.program`."""
    T, N, _ = theta0.shape
    y = one_hot(labels, N).to(theta0.dtype)
    sizes = y.sum(-2)  # support rows of each class, [T, N]
    all_labelled = holds_numbers(sizes) and sizes.device.type == "cpu" and bool((sizes > 0).all())
    cosine, euclidean = classifier == "cosine", classifier == "euclidean"
    if cosine:
        query = unit(query)
        if any(part.rows == "support" for part in parts_of(phases)):
            support = unit(support)
        assert scale is not None
    theta, lrs = theta0, rates.unbind()
    a = theta0.new_ones(T, N)
    linear = classifier == "linear"
    b = theta0.new_zeros(T, N) if not linear or bias is None else bias.expand(T, N)
    zero = {"support": torch.zeros_like(y), "query": theta0.new_zeros(T, query.shape[-2], N)}
    P = zero if coefficients else {}

    def classify(rows: Tensor) -> Tensor:
        """Logits [T, rows, N]."""
        weights = scale * unit(theta) if scale is not None and cosine else theta
        products = _products(rows, weights)
        if euclidean and scale is not None:
            return scale * (products - theta.square().sum(-1).unsqueeze(-2) / 2)
        if not cosine:
            return products + b.unsqueeze(-2)
        return products if bias is None or scale is None else products + scale * bias

    def gradient(part: Part, logits: Tensor, shares: Tensor | None) -> Tensor:
        if part.marginals == "none":
            return oracle_gradient(
                part.oracle, logits, y if part.rows == "support" else None, mean=part.means(reduction),
                target_scale=1.0 if target_scale is None else target_scale, mlp=mlp, running_stats=running_stats,
                alpha=part.alpha,
            )  # fmt: skip
        assert shares is not None
        if part.oracle == "proportions":
            G = proportions_gradient(logits, shares, bags)
        else:
            G = logits.softmax(-1) - transport(logits, shares, bags, part.relax)
        return G / logits.shape[-2] if part.means(reduction) else G

    live = {"support": support, "query": query}
    bags = Bags(query, bag_offsets)
    uniform = theta0.new_full((T, 1, N), 1 / N).expand(T, bags.share.shape[1], N)

    k = 0
    for phase in phases:
        shares = proportions if phase.marginals == "given" else uniform
        start = (theta, a, dict(P))
        for _ in range(phase.steps):
            lr = lrs[k]
            k += 1
            if phase.oracle == "soft_assignment":
                rows, logits = query, classify(query)
                if phase.marginals != "none":
                    assert shares is not None
                    p = transport(logits, shares, bags, phase.relax).transpose(-1, -2)
                elif _classes_outside(rows, N):
                    p = logits.transpose(-1, -2).softmax(-2)
                else:
                    p = logits.softmax(-1).transpose(-1, -2)
                own = p.sum(-1)
                counts = sizes if all_labelled else torch.where(sizes + own < LEAST_MASS, 1.0, sizes)
                mass = counts + own
                sums = torch.baddbmm(counts.unsqueeze(-1) * start[0], p, rows)
                theta = torch.lerp(theta, sums / mass.unsqueeze(-1), lr)
                if coefficients:
                    a = torch.lerp(a, counts * start[1] / mass, lr)
                for name in P:
                    moved = counts.unsqueeze(-2) * start[2][name] + (p.transpose(-1, -2) if name == "query" else 0)
                    P[name] = torch.lerp(P[name], moved / mass.unsqueeze(-2), lr)
                continue
            of_rows: dict[str, Tensor] = {}  # G of the support and of the query rows
            for part in phase.parts:
                guess = gradient(part, classify(live[part.rows]), shares)
                guess = guess if part.weight == 1 else part.weight * guess
                of_rows[part.rows] = of_rows[part.rows] + guess if part.rows in of_rows else guess
            if first_order:
                of_rows = {name: G.detach() for name, G in of_rows.items()}
            step = _sum(
                G.transpose(-1, -2) @ (live[name].detach() if first_order else live[name])
                for name, G in of_rows.items()
            )
            if cosine:
                assert scale is not None
                h, r = unit_and_length(theta)
                # Sum of G times the cosines; where |theta| is at its floor, a cosine's gradient is the whole row.
                along = (h * step).sum(-1, keepdim=True) * (r > FLOOR)
                theta = theta - lr * scale * (step - h * along) / r
                if coefficients:
                    grown = (1 + lr * scale * along / r.square()).squeeze(-1)
                    a = a * grown
                    P = {name: value * grown.unsqueeze(-2) for name, value in P.items()}
                    P |= {name: P[name] - lr * scale * G / r.transpose(-1, -2) for name, G in of_rows.items()}
            elif euclidean:
                assert scale is not None
                total = _sum(G.sum(-2) for G in of_rows.values())
                theta = theta - lr * scale * (step - theta * total.unsqueeze(-1))
                if coefficients:
                    grown = 1 + lr * scale * total
                    a = a * grown
                    P = {name: value * grown.unsqueeze(-2) for name, value in P.items()}
                    P |= {name: P[name] - lr * scale * G for name, G in of_rows.items()}
            else:
                theta = theta - lr * step
                if linear:
                    b = b - lr * _sum(G.sum(-2) for G in of_rows.values())
                if coefficients:
                    P |= {name: P[name] - lr * G for name, G in of_rows.items()}
    P = P or zero
    if euclidean:
        assert scale is not None
        logits, theta, b = classify(query), scale * theta, scale * theta.square().sum(-1) / -2
        return Adapted(logits, theta, b, P["support"], P["query"], a)
    return Adapted(classify(query), theta, b, P["support"], P["query"], a)


def _classes_outside(rows: Tensor, n_way: int) -> bool:
    """Whether PyTorch is quicker where the classes lie in the outer dimension of logits."""
    return n_way < FEW and rows.shape[-2] * rows.shape[-1] <= CACHED


def _products(rows: Tensor, weights: Tensor) -> Tensor:
    """Of each row with each class, [T, rows, N]."""
    if _classes_outside(rows, weights.shape[-2]):
        return torch.bmm(weights, rows.transpose(-1, -2)).transpose(-1, -2)
    return torch.bmm(rows, weights.transpose(-1, -2))


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


@without_autocast
def adapt(
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
    support_index: Tensor | None = None,
    query_index: Tensor | None = None,
    ragged: Ragged | None = None,
    coefficients: bool = True,
    proportions: Tensor | None = None,
    bag_offsets: Tensor | None = None,
) -> Adapted:
    """Everything that a program leaves; arguments as :func:`kernelmeta.ops.program`.

    Without ``coefficients`` those of the rows are zeros, and those of the start ones.
    """
    support, query = gathered(support, support_index, "support"), gathered(query, query_index, "query")
    if rates is None:
        values = [phase.lr for phase in phases for _ in range(phase.steps)]
        rates = support.new_tensor(values, dtype=torch.float64 if support.dtype is torch.float64 else torch.float32)
    if proportions is not None and proportions.dim() == 2:
        proportions = proportions.unsqueeze(1)  # one bag
    if bag_offsets is not None and bag_offsets.dim() == 1:
        tasks_of = support_labels.shape[0] if ragged is None else ragged.support_offsets.shape[0] - 1
        bag_offsets = bag_offsets.expand(tasks_of, -1)
    theta0 = start if isinstance(start, Tensor) else None
    given_start = theta0 is not None and theta0.dim() == 3  # each task its own
    names = ["start", "weight", "scale", "bias", "target_scale", "proportions"]
    given = [theta0, weight, scale, bias, target_scale, proportions, *(mlp or ())]
    support, query, rates, *rest = promoted(support, query, rates, *(t for t in given if t is not None))
    values_of = iter(rest)
    tensors = {name: None if t is None else next(values_of) for name, t in zip(names, given, strict=False)}
    mlp = None if mlp is None else MLPParameters(*values_of)

    def one_batch(
        support: Tensor, labels: Tensor, query: Tensor, ways: int, theta0: Tensor | None, shares: Tensor | None,
        bag_offsets: Tensor | None,
    ) -> Adapted:  # fmt: skip
        if (theta0 is not None or start == "zero") and not is_traced():  # (class means look for themselves)
            (check_label_range if given_start else check_labels)(labels, ways)
        if theta0 is not None:
            theta0 = theta0[..., :ways, :].expand(support.shape[0], -1, -1)
        elif start == "zero":
            theta0 = support.new_zeros(support.shape[0], ways, support.shape[-1])
        else:
            theta0 = class_means(support, labels, ways, tensors["weight"])
        own_bias = tensors["bias"]
        if own_bias is not None and classifier == "linear":
            own_bias = own_bias[:ways]
        own_mlp = mlp
        if mlp is not None and not any(p.oracle == "equivariant_gradient" for p in parts_of(phases)):
            own_mlp = mlp._replace(weight1=mlp.weight1[:, :ways], weight3=mlp.weight3[:ways], bias3=mlp.bias3[:ways])
        return run_phases(
            support, labels, query, theta0, phases, rates, classifier=classifier, scale=tensors["scale"],
            bias=own_bias, target_scale=tensors["target_scale"], mlp=own_mlp, running_stats=running_stats,
            reduction=reduction, first_order=first_order, coefficients=coefficients,
            proportions=None if shares is None else shares[..., :ways], bag_offsets=bag_offsets,
        )  # fmt: skip

    if ragged is None:
        return one_batch(support, support_labels, query, n_way, tensors["start"], tensors["proportions"], bag_offsets)
    tasks, theta0, shares = [], tensors["start"], tensors["proportions"]
    for t, (s, q, own) in enumerate(each_task(ragged, n_way)):
        if s.start == s.stop and any(p.rows == "support" for p in parts_of(phases)):
            raise ValueError(f"support: task {t} has no row, and phases of support rows need one")
        own_start = theta0[t, None] if given_start and theta0 is not None else theta0
        task = one_batch(
            support[None, s], support_labels[None, s], query[None, q], own, own_start,
            None if shares is None else shares[t, None], None if bag_offsets is None else bag_offsets[t, None],
        )  # fmt: skip
        tasks.append(_widened(task, n_way))
    return _joined(tasks, support, query, n_way)


def program(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    phases: Sequence[Phase],
    *,
    return_weights: bool = False,
    **options: Any,
) -> Any:
    """Refine a classifier by a program. See :func:`kernelmeta.ops.program`."""
    adapted = adapt(support, support_labels, query, phases, **options)
    return (adapted.logits, Classifier(adapted.weights, adapted.bias)) if return_weights else adapted.logits


def _widened(task: Adapted, n_way: int) -> Adapted:
    """The results of one task with room for ``n_way`` classes: minus infinity in the logits, zeros elsewhere."""
    more = n_way - task.logits.shape[-1]
    logits, weights, *rest = task
    return Adapted(
        pad(logits, (0, more), value=float("-inf"))[0],
        pad(weights, (0, 0, 0, more)),
        *(pad(r, (0, more)) for r in rest),
    )


def _joined(tasks: Sequence[Adapted], support: Tensor, query: Tensor, n_way: int) -> Adapted:
    """Ragged results: rows of all tasks one after the other."""
    if not tasks:
        rows = support.new_zeros(0, n_way)
        return Adapted(rows, support.new_zeros(0, n_way, support.shape[-1]), *[rows.clone() for _ in range(4)])
    logits, weights, bias, of_support, of_query, a = zip(*tasks, strict=True)
    P, Pq = (torch.cat([p[0] for p in rows]) for rows in (of_support, of_query))
    return Adapted(torch.cat(logits), torch.cat(weights), torch.cat(bias), P, Pq, torch.cat(a))
