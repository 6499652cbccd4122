"""The CUDA kernels of linear_head, program and ridge on a card, against float64 on the CPU. Skipped where there is
none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from episodes import assert_close, draw_labels, draw_mlp, draw_pair_mlp, flat, running_stats
from torch import Tensor

import kernelmeta as km
from kernelmeta.mlp_parameters import MLPParameters
from kernelmeta.phases import Phase

REASON = km.backends()["cuda"].reason
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"needs a GPU: {REASON}")

Values = dict[str, Any]
CROSS_ENTROPY, SQUARES, HINGE = (Phase(name, 2, 0.05) for name in ("cross_entropy", "squared_error", "hinge"))
SYNTHETIC = Phase("synthetic_gradient", 3, 1e-2)
JOINT = Phase("cross_entropy + entropy - 0.5*marginal_entropy", 2, 0.05, alpha=2.0)
EQUIVARIANT = Phase("equivariant_gradient", 3, 1e-2)


class Case(NamedTuple):
    """An op, its tensors in float64 on the CPU, and what else it is told."""

    op: Callable[..., Any]
    leaves: Values  # floating point, all of which get a gradient
    fixed: Values  # labels, indices, offsets
    options: Values


FEATURES = ("support", "query")


def call(case: Case, device: str, dtype: torch.dtype, stored: torch.dtype | None = None) -> tuple[Any, list[Tensor]]:
    """The results of the op, and its leaves there; features may be stored in a precision of their own."""
    leaves = {
        k: t.to(device, stored if stored and k in FEATURES else dtype).detach().requires_grad_()
        for k, t in case.leaves.items()
    }
    fixed = {k: t.to(device, dtype if t.is_floating_point() else t.dtype) for k, t in case.fixed.items()}
    arguments = {k: v for k, v in leaves.items() if not k.startswith("mlp.")}
    mlp = [v for k, v in leaves.items() if k.startswith("mlp.")]
    if mlp:
        arguments["mlp"] = MLPParameters(*mlp)
    return case.op(**arguments, **with_ragged(fixed, case.options)), list(leaves.values())


def with_ragged(fixed: Values, options: Values) -> Values:
    """What else an op is told, with what `km.Ragged` holds in one."""
    told = {**fixed, **options}
    own = {name: told.pop(name) for name in km.Ragged._fields if name in told}
    return {**told, "ragged": km.Ragged(**own)} if own else told


def with_gradients(case: Case, device: str, dtype: torch.dtype, stored: torch.dtype | None = None) -> list[Tensor]:
    """Results and the gradients of a fixed linear function of them, on the CPU. What is minus infinity counts as 0."""
    results, leaves = call(case, device, dtype, stored)
    results = [r.masked_fill(r == -torch.inf, 0) for r in flat(results)]
    g = torch.Generator().manual_seed(3)
    loss = sum((r * torch.randn(r.shape, dtype=torch.float64, generator=g).to(r)).sum() for r in results)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return [r.detach().cpu() for r in (*results, *zeros)]


def check(case: Case, dtype: torch.dtype = torch.float64, tolerance: float = 1e-9, backend: str = "cuda") -> None:
    want = with_gradients(case, "cpu", torch.float64)
    with km.use_backend(backend):
        got = with_gradients(case, "cuda", dtype)
    assert_close(got, want, tolerance)


def rows(T: int, S: int, Q: int, N: int, D: int, seed: int = 0) -> tuple[Values, Values]:
    g = torch.Generator().manual_seed(seed)
    features = {
        "support": torch.randn(T, S, D, dtype=torch.float64, generator=g) / D**0.5,
        "query": torch.randn(T, Q, D, dtype=torch.float64, generator=g) / D**0.5,
    }
    return features, {"support_labels": draw_labels(T, S, N, g)}


def ragged(S: list[int], Q: list[int], ways: list[int], D: int) -> tuple[Values, Values]:
    g = torch.Generator().manual_seed(1)
    features = {
        "support": torch.randn(sum(S), D, dtype=torch.float64, generator=g) / D**0.5,
        "query": torch.randn(sum(Q), D, dtype=torch.float64, generator=g) / D**0.5,
    }
    labels = [draw_labels(1, s, n, g)[0] for s, n in zip(S, ways, strict=True)]
    return features, {
        "support_labels": torch.cat(labels),
        "support_offsets": torch.tensor([0, *S]).cumsum(0),
        "query_offsets": torch.tensor([0, *Q]).cumsum(0),
        "n_ways": torch.tensor(ways),
    }


def learned(N: int, D: int, names: str, H: int = 6) -> Values:
    g = torch.Generator().manual_seed(2)
    one = {"scale": 7.3, "bias": 0.11, "target_scale": 1.5, "regularization": 0.7}
    shapes = {"weight": (D,), "start": (N, D), "biases": (N,)}
    found: Values = {}
    for name in names.split():
        if name.endswith("mlp"):
            mlp = draw_pair_mlp(H, torch.float64, g) if name == "pair_mlp" else draw_mlp(N, H, torch.float64, g)
            found |= {f"mlp.{field}": tensor for field, tensor in zip(MLPParameters._fields, mlp, strict=True)}
        elif name in one:
            found[name] = torch.tensor([one[name]], dtype=torch.float64)
        else:
            key = "bias" if name == "biases" else name
            found[key] = torch.randn(shapes[name], dtype=torch.float64, generator=g) * 0.5 + 1
    return found


def program_case(phases: list[Phase], names: str, tasks: tuple[Values, Values], N: int, D: int, **options: Any) -> Case:
    K = sum(p.steps for p in phases)
    rates = torch.tensor([p.lr for p in phases for _ in range(p.steps)], dtype=torch.float64)
    leaves = {**tasks[0], **learned(N, D, names), **({"rates": rates} if K else {})}
    return Case(km.ops.program, leaves, tasks[1], {"phases": phases, "n_way": N, "return_weights": True, **options})


COSINE = "scale bias weight"
LINEAR: Values = {"classifier": "linear"}
EVEN = {"T": 2, "S": 7, "Q": 11, "N": 3, "D": 33}
UNEQUAL = ([4, 9, 40], [3, 20, 1], [4, 2, 3])
PROGRAMS = {
    "synthetic gradient": program_case([SYNTHETIC], f"{COSINE} mlp", rows(**EVEN), 3, 33),
    "equivariant gradient": program_case([EQUIVARIANT], f"{COSINE} pair_mlp", rows(**EVEN), 3, 33),
    "equivariant gradient, unequal tasks": program_case(
        [CROSS_ENTROPY, EQUIVARIANT], f"{COSINE} pair_mlp", ragged(*UNEQUAL, D=14), 4, 14
    ),
    "running statistics": program_case(
        [SYNTHETIC], f"{COSINE} mlp", rows(**EVEN), 3, 33, running_stats=running_stats(6)
    ),
    "linear head": program_case([CROSS_ENTROPY], "start biases", rows(**EVEN), 3, 33, **LINEAR),
    "first order": program_case([HINGE, SQUARES], "start biases", rows(**EVEN), 3, 33, first_order=True, **LINEAR),
    "from zero": program_case(
        [SQUARES, Phase("entropy", 1, 0.05)], "target_scale biases", rows(**EVEN), 3, 33, start="zero", **LINEAR
    ),
    "soft k-means": program_case(
        [CROSS_ENTROPY, Phase("soft_assignment", 2, 0.8)], COSINE, rows(**EVEN), 3, 33
    ),
    "joint steps": program_case([JOINT, SYNTHETIC], f"{COSINE} mlp", rows(**EVEN), 3, 33),
    "joint steps, unequal tasks": program_case([JOINT], COSINE, ragged(*UNEQUAL, 33), 4, 33),
    "classifier by distances": program_case(
        [JOINT, CROSS_ENTROPY], "scale start", rows(**EVEN), 3, 33, classifier="euclidean"
    ),
    "no steps": program_case([], COSINE, rows(**EVEN), 3, 33),
    "many rows": program_case([CROSS_ENTROPY, SYNTHETIC], f"{COSINE} mlp", rows(1, 150, 300, 5, 65), 5, 65),
    "unequal tasks": program_case([HINGE, SYNTHETIC], f"{COSINE} mlp", ragged(*UNEQUAL, 33), 4, 33),
    "unequal linear tasks": program_case(
        [CROSS_ENTROPY, Phase("entropy", 1, 0.05)], "start biases", ragged(*UNEQUAL, 33), 4, 33, **LINEAR
    ),
    "unequal tasks, sizes given": program_case(
        [HINGE, SYNTHETIC], f"{COSINE} mlp", ragged(*UNEQUAL, 33), 4, 33, max_support=41, max_query=20
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_small_ops(name: str) -> None:
    check(on_device(PROGRAMS[name]))


def on_device(case: Case) -> Case:
    """running_stats is an option to draw, a tensor to move."""
    options = dict(case.options)
    fixed = {**case.fixed, **({"running_stats": options.pop("running_stats")} if "running_stats" in options else {})}
    return case._replace(fixed=fixed, options=options)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_in_float32(name: str) -> None:
    check(on_device(PROGRAMS[name]), torch.float32, 1e-2)


def head_case(T: int, S: int, Q: int, N: int, D: int, **options: Any) -> Case:
    features, fixed = rows(T, S, Q, N, D)
    leaves = {**features, **learned(N, D, "biases"), "rates": torch.full((3,), 0.1, dtype=torch.float64)}
    leaves["weight"] = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return Case(km.ops.linear_head, leaves, fixed, {"return_weights": True, **options})


HEADS = {
    "small": head_case(3, 9, 11, 3, 33),
    "published": head_case(4, 25, 75, 5, 640, oracle="squared_error"),
    "hinge": head_case(2, 9, 11, 3, 33, oracle="hinge"),
    "first order": head_case(2, 9, 11, 3, 33, first_order=True),
    "many rows": head_case(1, 150, 200, 20, 65),
    "many tasks": head_case(300, 4, 5, 2, 17),
    "no tasks": head_case(0, 4, 5, 2, 17),
}


@pytest.mark.parametrize("name", HEADS)
def test_linear_head_small_ops(name: str) -> None:
    check(HEADS[name])


def ridge_case(tasks: tuple[Values, Values], N: int, **sizes: int) -> Case:
    leaves = {**tasks[0], **learned(N, 0, "regularization scale bias")}
    return Case(km.ops.ridge, leaves, tasks[1], {"n_way": N, "return_coefficients": True, **sizes})


RIDGES = {
    "small": ridge_case(rows(**EVEN), 3),
    "many rows": ridge_case(rows(2, 120, 75, 5, 65), 5),
    "unequal tasks": ridge_case(ragged(*UNEQUAL, 33), 4),
    "unequal tasks, sizes given": ridge_case(ragged(*UNEQUAL, 33), 4, max_support=40, max_query=30),
}


@pytest.mark.parametrize("name", RIDGES)
def test_ridge_small_ops(name: str) -> None:
    check(RIDGES[name])


@pytest.mark.parametrize("case", [HEADS["small"], HEADS["published"], RIDGES["small"], RIDGES["unequal tasks"]])
def test_other_learners_in_float32(case: Case) -> None:
    check(case, torch.float32, 1e-2)


@pytest.mark.parametrize("case", [HEADS["published"], PROGRAMS["synthetic gradient"], RIDGES["small"]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_narrow_features_and_banks(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    names = ("support", "query")
    narrow = {name: case.leaves[name].to(dtype) for name in names}
    stored = case._replace(leaves={**case.leaves, **{name: t.double() for name, t in narrow.items()}})
    want = flat(call(stored, "cpu", torch.float64)[0])
    parameters = {k: v.float().cuda() for k, v in case.leaves.items() if k not in names}
    mlp = [parameters.pop(k) for k in list(parameters) if k.startswith("mlp.")]
    if mlp:
        parameters["mlp"] = MLPParameters(*mlp)
    fixed = {k: v.cuda() for k, v in case.fixed.items()}
    banks = {name: t.flatten(0, 1).flip(0).cuda() for name, t in narrow.items()}
    index = {
        f"{name}_index": torch.arange(t.shape[0] * t.shape[1], device="cuda").flip(0).view(t.shape[:2])
        for name, t in narrow.items()
    }
    with km.use_backend("cuda"), torch.no_grad():
        straight = case.op(**{k: t.cuda() for k, t in narrow.items()}, **parameters, **with_ragged(fixed, case.options))
        banked = case.op(**banks, **index, **parameters, **with_ragged(fixed, case.options))
    assert_close([r.cpu() for r in flat(straight)], want, tolerance)
    assert all(torch.equal(a, b) for a, b in zip(flat(straight), flat(banked), strict=True))


@pytest.mark.parametrize("case", [HEADS["published"], PROGRAMS["synthetic gradient"], RIDGES["small"]])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_gradients_with_narrow_features(case: Case, stored: torch.dtype) -> None:
    rounded = {name: case.leaves[name].to(stored).double() for name in FEATURES}
    want = with_gradients(case._replace(leaves={**case.leaves, **rounded}), "cpu", torch.float64)
    with km.use_backend("cuda"):
        got = with_gradients(case, "cuda", torch.float32, stored)
    assert_close(got, want, 3e-2)


@pytest.mark.parametrize("case", [HEADS["small"], PROGRAMS["soft k-means"], RIDGES["small"]])
def test_the_same_bits_again(case: Case) -> None:
    first, second = (with_gradients(case, "cuda", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", [HEADS["small"], PROGRAMS["synthetic gradient"], RIDGES["small"]])
def test_bad_labels_give_nan_to_their_task(case: Case) -> None:
    labels = case.fixed["support_labels"].clone()
    labels[1, 0] = 7
    broken = case._replace(fixed={"support_labels": labels})
    logits = flat(call(broken, "cuda", torch.float32)[0])[0]
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_a_singular_system_gives_nan_to_its_task() -> None:
    case = RIDGES["small"]
    support = case.leaves["support"].clone()
    support[1, 1] = support[1, 0]
    singular = case._replace(
        leaves={**case.leaves, "support": support, "regularization": torch.zeros(1, dtype=torch.float64)}
    )
    logits = flat(call(singular, "cuda", torch.float64)[0])[0]
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@pytest.mark.parametrize("case", [PROGRAMS["unequal tasks, sizes given"], RIDGES["unequal tasks, sizes given"]])
@pytest.mark.parametrize(
    ("offsets", "broken"),
    [([0, 4, 13, 53], []), ([0, 4, 11, 53], [2]), ([0, 4, 3, 53], [0, 1, 2]), ([0, 4, 1 << 40, 53], [0, 1, 2])],
)
def test_offsets_that_nobody_looked_at(case: Case, offsets: list[int], broken: list[int]) -> None:
    told = case._replace(fixed={**case.fixed, "support_offsets": torch.tensor(offsets)})
    logits = flat(call(told, "cuda", torch.float32)[0])[0]
    bounds = case.fixed["query_offsets"].tolist()
    for t in range(3):
        assert bool(logits[bounds[t] : bounds[t + 1]].isnan().all()) == (t in broken)


@pytest.mark.parametrize(
    "case",
    [
        HEADS["small"],
        PROGRAMS["synthetic gradient"],
        PROGRAMS["unequal tasks, sizes given"],
        RIDGES["small"],
        RIDGES["unequal tasks, sizes given"],
    ],
)
def test_graph_capture_and_replay(case: Case) -> None:
    leaves = {k: t.to("cuda", torch.float32).requires_grad_() for k, t in case.leaves.items()}
    fixed = {k: t.cuda() for k, t in case.fixed.items()}
    arguments = {k: v for k, v in leaves.items() if not k.startswith("mlp.")}
    mlp = [v for k, v in leaves.items() if k.startswith("mlp.")]
    if mlp:
        arguments["mlp"] = MLPParameters(*mlp)

    def step() -> list[Tensor]:
        logits = flat(case.op(**arguments, **with_ragged(fixed, case.options)))[0]
        logits = logits.where(logits != -torch.inf, 0)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(leaves.values()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["query"].normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
