"""torch.ops.kernelmeta.sib and the two functions around it, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from episodes import Episode, assert_close, draw, relative_error, running_stats, shapes
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kernelmeta as km
from kernelmeta.ops.sib_op import OP

CPU = km.backends()["cpu"]
needs_kernel = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")


def run(sib: Any, episode: Episode, theta: bool = True, **options: Any) -> list[torch.Tensor]:
    """Results and all gradients of a random linear function of them."""
    options = {"steps": 2, "inner_lr": 0.05, **options}
    results = sib(*episode.arguments(), return_weights=theta, **options)
    results = [results[0], results[1].weight] if theta else [results]
    g = torch.Generator().manual_seed(3)
    loss = sum((r * torch.randn(r.shape, dtype=torch.float64, generator=g).to(r.dtype)).sum() for r in results)
    grads = torch.autograd.grad(loss, episode.leaves(), allow_unused=True)
    return results + [torch.zeros_like(p) if d is None else d for d, p in zip(grads, episode.leaves(), strict=True)]


@needs_kernel
@settings(max_examples=60)
@given(
    shapes(),
    st.integers(0, 4),
    st.sampled_from([1e-3, 0.05, 1.0]),
    st.sampled_from(["sum", "mean"]),
    st.sampled_from(["task", "running"]),
    st.booleans(),
)
@example({"T": 2, "S": 40, "Q": 100, "N": 20, "D": 65, "H": 40}, 2, 0.05, "mean", "task", True)
@example({"T": 2, "S": 9, "Q": 300, "N": 5, "D": 33, "H": 12}, 3, 0.05, "mean", "task", True)  # no Gram matrix
@example({"T": 1, "S": 5, "Q": 75, "N": 5, "D": 640, "H": 40}, 3, 1e-3, "sum", "task", True)
@example({"T": 33, "S": 3, "Q": 5, "N": 2, "D": 9, "H": 4}, 1, 1e-3, "sum", "task", False)
def test_equals_the_reference(
    sizes: dict[str, int], steps: int, lr: float, reduction: str, norm_stats: str, theta: bool
) -> None:
    episode = draw(**sizes)
    options = {
        "steps": steps,
        "inner_lr": lr,
        "reduction": reduction,
        "norm_stats": norm_stats,
        "running_stats": running_stats(sizes["H"]),
    }
    got = run(km.ops.sib, episode.fresh(), theta, **options)
    want = run(km.reference.sib, episode.fresh(), theta, **options)
    assert_close(got, want, 1e-9)


def test_batch_statistics_equal_the_reference() -> None:
    episode = draw()
    got = run(km.ops.sib, episode.fresh(), norm_stats="batch")
    assert_close(got, run(km.reference.sib, episode.fresh(), norm_stats="batch"), 1e-11)


@pytest.mark.parametrize("norm_stats", ["task", "batch"])
def test_returned_norm_stats_equal_the_reference(norm_stats: str) -> None:
    episode = draw(T=3)
    options: dict[str, Any] = {"steps": 3, "inner_lr": 0.1, "norm_stats": norm_stats, "return_norm_stats": True}
    got = km.ops.sib(*episode.fresh().arguments(), **options)
    want = km.reference.sib(*episode.arguments(), **options)
    assert got[1].shape == (3, 2, 2, 8) and not got[1].requires_grad
    assert_close(got, want, 1e-11)


def test_given_theta0() -> None:
    episode = draw().fresh()
    theta0 = torch.randn(2, 3, 13, dtype=torch.float64, requires_grad=True)
    leaves = [theta0, *episode.leaves()[1:2], *episode.leaves()[3:]]
    outs = []
    for loop in (km.ops.sib_inner_loop, km.reference.sib_inner_loop, km.reference.explicit.sib_inner_loop):
        z, (theta, _) = loop(theta0, episode.query, *episode[4:], steps=3, inner_lr=0.3, return_weights=True)
        outs.append([z, theta, *torch.autograd.grad(z.square().sum() + theta.pow(3).sum(), leaves)])
    assert_close(outs[0], outs[1], 1e-10)
    assert_close(outs[2], outs[1], 1e-10)


@needs_kernel
def test_float32_errs_no_more_than_twice_the_eager_reference() -> None:
    """Medians over draws: where a ReLU's input lies within rounding of zero, single gradients differ a lot."""
    ratios = []
    for seed in range(12):
        episode = draw(T=2, S=5, Q=75, N=5, D=640, H=40, seed=seed)
        episode = episode.map(lambda t: t.float().double())
        want = run(km.reference.sib, episode.fresh(), steps=3, inner_lr=1e-2)
        got = run(km.ops.sib, episode.fresh(torch.float32), steps=3, inner_lr=1e-2)
        eager = run(km.reference.sib, episode.fresh(torch.float32), steps=3, inner_lr=1e-2)
        errors = [[relative_error(r, w) + 1e-7 for r, w in zip(results, want, strict=True)] for results in (got, eager)]
        ratios.append([ours / theirs for ours, theirs in zip(*errors, strict=True)])
    median = torch.tensor(ratios).median(0).values
    assert median.max() < 2, median.tolist()


TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32-parameters", "all"])
def test_low_precision(dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    exact = draw(T=2, S=5, Q=20, N=5, D=48, H=16)
    exact = exact.map(lambda t: t.to(dtype).double())  # the same numbers in both
    episode = exact.map(lambda t: t.to(parameters or dtype))
    episode = episode._replace(support=exact.support.to(dtype), query=exact.query.to(dtype)).fresh()
    got = run(km.ops.sib, episode, inner_lr=1e-3)
    assert got[0].dtype == torch.promote_types(dtype, parameters or dtype)
    assert [g.dtype for g in got[2:]] == [p.dtype for p in episode.leaves()]
    # Only the results' rounding, and the gradients': everything between is computed in float32.
    want = run(km.reference.sib, exact.fresh(), inner_lr=1e-3)
    assert_close(got[:2], want[:2], TOLERANCES[dtype])
    assert_close(got[2:], want[2:], 5 * TOLERANCES[dtype])


def test_float64_parameters_with_float32_features() -> None:
    episode = draw().fresh()
    mixed = episode._replace(query=episode.query.detach().float(), support=episode.support.detach().float())
    got = km.ops.sib(*mixed.arguments(), steps=1, inner_lr=0.1)
    want = km.ops.sib(*mixed.map(lambda t: t.double()).arguments(), steps=1, inner_lr=0.1)
    assert got.dtype is torch.float64
    assert_close([got], [want], 1e-14)


# ---- tasks are independent


def test_a_batch_equals_its_tasks_one_by_one() -> None:
    episode = draw(T=5).fresh()
    z, (theta, _) = km.ops.sib(*episode.arguments(), steps=3, inner_lr=0.5, return_weights=True)
    grads = torch.autograd.grad(z.square().sum() + theta.sum(), episode.leaves())
    total = [torch.zeros_like(p) for p in episode.leaves()[2:]]
    for t in range(5):
        one = episode._replace(
            support=episode.support[t : t + 1], labels=episode.labels[t : t + 1], query=episode.query[t : t + 1]
        )
        z1, (theta1, _) = km.ops.sib(*one.arguments(), steps=3, inner_lr=0.5, return_weights=True)
        g = torch.autograd.grad(z1.square().sum() + theta1.sum(), one.leaves())
        assert_close([z1, theta1, *g[:2]], [z[t : t + 1], theta[t : t + 1], *(x[t : t + 1] for x in grads[:2])], 1e-12)
        total = [a + b for a, b in zip(total, g[2:], strict=True)]
    assert_close(grads[2:], total, 1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_one_task_does_not_touch_the_others(poison: float) -> None:
    episode = draw(T=4, dtype=torch.float32).fresh()
    support, query = episode.support.detach().clone(), episode.query.detach().clone()
    support[2, 1], query[2, 3] = poison, poison
    spoilt = episode._replace(support=support.requires_grad_(), query=query.requires_grad_())
    outs = []
    for e in (episode, spoilt):
        z, (theta, _) = km.ops.sib(*e.arguments(), steps=2, inner_lr=0.1, return_weights=True)
        outs.append([z, theta, *torch.autograd.grad((z * z).sum() + theta.sum(), [e.support, e.query])])
    others = [0, 1, 3]
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a[others], b[others])
    if poison != 1e30:
        assert torch.isnan(outs[1][0][2]).any()


# ---- memory


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "stepped"])
def test_any_strides(layout: str) -> None:
    episode = draw(T=2, S=6, Q=10, N=3, D=12)
    labels = episode.labels

    def rearrange(x: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "expanded":
            return x[:1].expand(2, -1, -1)
        if layout == "sliced":
            return torch.cat([x, x], 2)[:, :, 5:17]
        return x.repeat_interleave(2, 1)[:, ::2]

    if layout == "expanded":
        labels = labels[:1].expand(2, -1)
    base = episode._replace(labels=labels).fresh()
    strided = base._replace(support=rearrange(base.support), query=rearrange(base.query))
    dense = strided._replace(
        support=strided.support.contiguous(), query=strided.query.contiguous(), labels=labels.contiguous()
    )
    outs = []
    for e in (strided, dense):
        z = km.ops.sib(*e.arguments(), steps=2, inner_lr=0.1)
        outs.append([z, *torch.autograd.grad(z.square().sum(), base.leaves())])
    assert_close(outs[0], outs[1], 1e-13)


@pytest.mark.parametrize("through", ["cat", "transpose", "expand", "select"])
def test_gradients_that_arrive_strided(through: str) -> None:
    episode = draw(T=2)

    def loss(z: torch.Tensor) -> torch.Tensor:
        weights = torch.randn(2, 3, 11, dtype=z.dtype, generator=torch.Generator().manual_seed(5))
        if through == "cat":
            return (torch.cat([z, z * 2], 2)[:, :, 1:4] * weights.mT).sum()
        if through == "transpose":
            return (z.transpose(1, 2).contiguous() * weights).sum()
        if through == "expand":
            return z.sum()
        return z[:, 3].sum()

    outs = []
    for sib in (km.ops.sib, km.reference.sib):
        e = episode.fresh()
        outs.append(torch.autograd.grad(loss(sib(*e.arguments(), steps=2, inner_lr=0.1)), e.leaves()))
    assert_close(*outs, 1e-11)


def test_reads_straight_from_a_bank() -> None:
    episode = draw(dtype=torch.float32)
    g = torch.Generator().manual_seed(4)
    bank = torch.randn(50, 13, generator=g)
    support_index, query_index = (torch.randint(50, (2, rows), generator=g) for rows in (7, 11))
    options: dict[str, Any] = {"steps": 2, "inner_lr": 0.1}
    rest = (episode.weight, episode.scale, episode.bias, episode.mlp)
    want = km.ops.sib(bank[support_index], episode.labels, bank[query_index], *rest, **options)
    index: dict[str, Any] = {"support_index": support_index, "query_index": query_index}
    assert torch.equal(km.ops.sib(bank, episode.labels, bank, *rest, **options, **index), want)
    half = bank.bfloat16()
    narrow, wide = (km.ops.sib(b, episode.labels, b, *rest, **options, **index) for b in (half, half.float()))
    assert_close([narrow], [wide], 1e-6)
    learned = bank.clone().requires_grad_()
    km.ops.sib(learned, episode.labels, learned, *rest, **options, **index).square().sum().backward()
    gathered = [bank[support_index].requires_grad_(), bank[query_index].requires_grad_()]
    km.ops.sib(gathered[0], episode.labels, gathered[1], *rest, **options).square().sum().backward()
    want_grad = torch.zeros_like(bank).index_put_((support_index,), gathered[0].grad, accumulate=True)
    want_grad.index_put_((query_index,), gathered[1].grad, accumulate=True)
    assert_close([learned.grad], [want_grad], 1e-5)
    index["query_index"] = torch.full_like(query_index, 50)
    with pytest.raises(ValueError, match="index 50 is outside of the bank's 50 rows"):
        km.ops.sib(bank, episode.labels, bank, *rest, **options, **index)


@needs_kernel
@pytest.mark.parametrize("Q", [40, 200])
def test_without_gradients_the_results_are_the_same(Q: int) -> None:
    """With nothing to save, other sizes are worth a Gram matrix."""
    episode = draw(Q=Q).fresh()
    want = km.ops.sib(*episode.arguments(), steps=3, inner_lr=0.1, return_weights=True)
    with torch.no_grad():
        got = km.ops.sib(*episode.arguments(), steps=3, inner_lr=0.1, return_weights=True)
    assert_close([got[0], got[1].weight], [want[0], want[1].weight], 1e-11)


@needs_kernel
def test_offsets_beyond_two_to_the_31() -> None:
    """Rows far apart in one huge allocation, of which only the pages of these rows are ever touched."""
    episode = draw(dtype=torch.float32)
    far = torch.empty(2**31 + 11 * 13, dtype=torch.bfloat16).as_strided((2, 11, 13), (2**31, 13, 1))
    far.copy_(episode.query)
    strided = episode._replace(query=far)
    dense = episode._replace(query=far.contiguous())
    outs = [km.ops.sib(*e.arguments(), steps=2, inner_lr=0.1) for e in (strided, dense)]
    assert torch.equal(*outs)


def test_no_tasks() -> None:
    episode = draw(T=1).fresh()
    none = episode._replace(support=episode.support[:0], labels=episode.labels[:0], query=episode.query[:0])
    z, (theta, _) = km.ops.sib(*none.arguments(), steps=2, inner_lr=0.1, return_weights=True)
    assert z.shape == (0, 11, 3) and theta.shape == (0, 3, 13)
    grads = torch.autograd.grad(z.sum() + theta.sum(), episode.leaves())
    assert all(g.abs().max() == 0 for g in grads)


# ---- arguments


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("labels out of range", {"labels": torch.full((2, 7), 3)}, ValueError, r"label 3; labels must be in 0\.\.2"),
    ("negative label", {"labels": torch.full((2, 7), -1)}, ValueError, r"label -1"),
    ("a class without a row", {"labels": torch.zeros(2, 7, dtype=torch.int64)}, ValueError, "no row of class 1"),
    ("labels of another shape", {"labels": torch.zeros(2, 6, dtype=torch.int64)}, ValueError, "labels: expected shape"),
    ("float labels", {"labels": torch.zeros(2, 7)}, TypeError, "support_labels: expected int64, got float32"),
    ("integer features", {"query": torch.zeros(2, 11, 13, dtype=torch.int64)}, TypeError, "query: expected float32"),
    ("empty query", {"query": torch.zeros(2, 0, 13)}, ValueError, "query: expected at least one row"),
    ("other number of features", {"query": torch.zeros(2, 11, 12)}, ValueError, "support: expected 12 features"),
    ("other number of tasks", {"query": torch.zeros(3, 11, 13)}, ValueError, "support: expected 3 tasks"),
    ("two dimensions", {"query": torch.zeros(11, 13)}, ValueError, r"query: expected shape \[T, Q, D\]"),
    ("weight of another size", {"weight": torch.ones(12)}, ValueError, "weight: expected shape"),
    ("scale of two values", {"scale": torch.ones(2)}, ValueError, "scale: expected one value"),
    ("mixed devices", {"weight": torch.ones(13, device="meta")}, ValueError, "weight is on meta"),
    ("one meta parameter", {"bias": torch.ones(1, device="meta")}, ValueError, "bias is on meta"),
    ("a list", {"query": [1.0]}, TypeError, "query: expected a tensor, got list"),
    ("no labels", {"labels": None}, TypeError, "support_labels: expected a tensor, got NoneType"),
    ("no weight", {"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    ("three MLP tensors", {"mlp": (torch.ones(8, 3),) * 3}, TypeError, "mlp: expected the ten tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    episode = draw(dtype=torch.float32)._replace(**change)
    with pytest.raises(error, match=message):
        km.ops.sib(*episode.arguments(), steps=1, inner_lr=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: expected 0 or more, got -1"),
        ({"steps": 1.5}, TypeError, "steps: expected an int"),
        ({"reduction": "median"}, ValueError, "reduction: expected one of sum, mean"),
        ({"norm_stats": "layer"}, ValueError, "norm_stats: expected one of task, batch, running"),
        ({"norm_stats": "running"}, ValueError, "needs running_stats"),
        ({"norm_stats": "running", "running_stats": torch.ones(2, 2, 5)}, ValueError, "running_stats: expected"),
        ({"support_index": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "given together"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        km.ops.sib(*draw().arguments(), **{"steps": 1, "inner_lr": 0.1, **options})


def test_mlp_that_does_not_fit() -> None:
    episode = draw()
    broken = episode.mlp._replace(weight2=torch.ones(8, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mlp.weight2: expected shape \[8, 8\] for H=8, N=3, got \[8, 7\]"):
        km.ops.sib(*episode._replace(mlp=broken).arguments(), steps=1, inner_lr=0.1)


@needs_kernel
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("support_labels", lambda t: t[:1]),
        ("weight", lambda t: t[:3]),
        ("scale", lambda t: t[:0]),
        ("weight1", lambda t: t[:2]),
        ("weight2", lambda t: t.float()),
        ("query", lambda t: t[:, :, :3]),
    ],
)
def test_the_raw_op_refuses_what_it_would_read_out_of_bounds(name: str, change: Any) -> None:
    e = draw()
    args = OP.arguments(
        start=e.support, start_index=None, query=e.query, query_index=None, support_labels=e.labels, weight=e.weight,
        scale=e.scale, bias=e.bias, mlp=e.mlp, running_stats=None, steps=1, inner_lr=0.1, return_weights=False,
        return_stats=False,
    )  # fmt: skip
    torch.ops.kernelmeta.sib(*args, save_trace=True)
    bad = OP.signature.replace(args, **{name: change(getattr(OP.signature.call(*args), name))})
    with pytest.raises(ValueError, match=r"expected|must"):
        torch.ops.kernelmeta.sib(*bad, save_trace=True)


@pytest.mark.parametrize("D", [1, 7, 255, 256, 257, 513])
@pytest.mark.parametrize("Q", [1, 8, 9, 17, 33])
def test_gram_matrix_at_the_edges_of_its_panels(Q: int, D: int) -> None:
    """Rows that repeat each other or are collinear among them: logits and gradients of the parameters in float64."""
    g = torch.Generator().manual_seed(100 * Q + D)
    bank = torch.randn(40, D, generator=g, dtype=torch.float64)
    bank[5], bank[6] = bank[4], 3 * bank[4]
    head = km.nn.SIB(2, D, steps=2, inner_lr=0.01).double()
    labels = torch.tensor([[0, 1]]).expand(3, -1)
    support, query = (torch.randint(0, 40, (3, n), generator=g) for n in (2, Q))

    def found(backend: str) -> list[torch.Tensor]:
        with km.use_backend(backend):
            logits = head(bank[support], labels, bank[query])
            return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(head.parameters()))]

    for got, want in zip(found("cpu"), found("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * max(1.0, want.abs().max().item()))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [257, 300, 513])
@pytest.mark.parametrize("Q", [5, 16, 33])
def test_rows_that_an_index_names(Q: int, D: int, dtype: torch.dtype) -> None:
    """Beyond one panel of features, in every storage type: the same bits as from gathered rows, and the right ones."""
    g = torch.Generator().manual_seed(100 * Q + D)
    bank = torch.randn(40, D, generator=g, dtype=torch.float64).to(dtype)
    bank[5], bank[6] = bank[4], 3 * bank[4]
    wide = torch.promote_types(dtype, torch.float32)
    # Not any weights: BatchNorm over few rows may divide by nearly nothing, and then any float32 loses digits.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = km.nn.SIB(3, D, steps=2, inner_lr=0.01).to(wide)
    labels = torch.tensor([[0, 1, 2, 1]]).expand(3, -1).contiguous()
    support, query = (torch.randint(0, 40, (3, n), generator=g) for n in (4, Q))

    def with_gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(head.parameters()))]

    named = with_gradients(head.from_bank(bank, support, labels, query))
    gathered = with_gradients(head(bank[support], labels, bank[query]))
    assert all(torch.equal(a, b) for a, b in zip(named, gathered, strict=True))
    head.double()
    with km.use_backend("reference"):
        want = with_gradients(head(bank[support].double(), labels, bank[query].double()))
    assert_close(named, want, 1e-9 if wide is torch.float64 else 1e-3)
