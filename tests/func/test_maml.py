"""MAML of whole networks, against a loop over tasks and steps with ``create_graph=True`` in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kernelmeta as km

DOUBLE = torch.float64


def conv_net(norm: type[nn.Module] | None = nn.BatchNorm2d, way: int = 3, smooth: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1)]
    if norm is not None:
        layers.append(norm(4) if norm is nn.BatchNorm2d else norm(2, 4))
    layers += [nn.Tanh() if smooth else nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 3 * 3, way)]
    return nn.Sequential(*layers).to(DOUBLE)


def mlp(D: int, hidden: int, way: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, way)).to(DOUBLE)


def tasks(T: int, S: int, Q: int, way: int, row: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    support = torch.randn(T, S, *row, dtype=DOUBLE, generator=generator)
    query = torch.randn(T, Q, *row, dtype=DOUBLE, generator=generator)
    return support, (torch.arange(S) % way).expand(T, S), query


def unrolled(network, support, labels, query, rates, first_order=False, names=None):
    """Task by task, step by step. ``rates``: one mapping, name -> rate, for every step."""
    outputs = []
    for t in range(len(support)):
        # In training mode BatchNorm uses the statistics of its rows; the copy takes the running ones with it.
        scratch = copy.deepcopy(network).train()
        theta = dict(network.named_parameters())
        for step in rates:
            moved = [name for name in theta if names is None or name in names]
            value = F.cross_entropy(torch.func.functional_call(scratch, theta, (support[t],)), labels[t])
            gradients = torch.autograd.grad(value, [theta[name] for name in moved], create_graph=not first_order)
            theta = {**theta, **{n: theta[n] - step[n] * g for n, g in zip(moved, gradients, strict=True)}}
        outputs.append(torch.func.functional_call(scratch, theta, (query[t],)))
    return torch.stack(outputs)


def gradients(outputs, leaves):
    """Of a loss in which every output has a weight of its own."""
    weights = torch.linspace(-1, 2, outputs.numel(), dtype=DOUBLE).view_as(outputs)
    return torch.autograd.grad((outputs * weights).sum(), leaves)


def assert_equal(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=12)
@given(
    T=st.integers(1, 3),
    shot=st.integers(1, 3),
    Q=st.integers(2, 6),
    D=st.integers(2, 6),
    steps=st.integers(0, 3),
    first_order=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 2]),
)
def test_outputs_and_gradients_are_those_of_the_unrolled_loop(T, shot, Q, D, steps, first_order, chunk_size):
    network = mlp(D, 4, 2)
    support, labels, query = tasks(T, 2 * shot, Q, 2, (D,))
    support.requires_grad_()
    query.requires_grad_()
    f = km.func.maml(network, steps=steps, inner_lr=0.3, first_order=first_order, chunk_size=chunk_size)
    rates = [dict.fromkeys(dict(network.named_parameters()), 0.3)] * steps
    # The support reaches the outputs through the inner gradients alone.
    leaves = [*network.parameters(), query, *([support] if steps and not first_order else [])]
    assert_equal(f(support, labels, query), unrolled(network, support, labels, query, rates, first_order), leaves)


def test_a_convolutional_network_and_every_kind_of_rate():
    network = conv_net(smooth=True)
    support, labels, query = tasks(3, 6, 5, 3, (1, 6, 6))
    parameters = dict(network.named_parameters())
    scalar = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    per_step = torch.tensor([0.2, 0.1], dtype=DOUBLE, requires_grad=True)
    generator = torch.Generator().manual_seed(4)
    meta_sgd = [
        {
            name: torch.rand(p.shape, dtype=DOUBLE, generator=generator).requires_grad_()
            for name, p in parameters.items()
        }
        for _ in range(2)
    ]
    everywhere = dict.fromkeys
    cases = [
        (scalar, [everywhere(parameters, scalar)] * 2, [scalar]),
        (per_step, [everywhere(parameters, rate) for rate in per_step], [per_step]),
        ([0.2, 0.05], [everywhere(parameters, rate) for rate in (0.2, 0.05)], []),
        (meta_sgd[0], [meta_sgd[0]] * 2, [*meta_sgd[0].values()]),
        (meta_sgd, meta_sgd, [rate for step in meta_sgd for rate in step.values()]),
    ]
    for inner_lr, rates, leaves in cases:
        found = km.func.maml(network, steps=2, inner_lr=inner_lr)(support, labels, query)
        assert_equal(found, unrolled(network, support, labels, query, rates), [*network.parameters(), *leaves])


class Attention(nn.MultiheadAttention):
    def forward(self, rows):
        return super().forward(rows, rows, rows, need_weights=False)[0]


IMAGE, VECTOR, SEQUENCE = (4, 6, 6), (8,), (3, 8)
LAYERS = {
    "BatchNorm2d": (nn.BatchNorm2d(4), IMAGE),
    "BatchNorm2d without weight": (nn.BatchNorm2d(4, affine=False), IMAGE),
    "BatchNorm1d": (nn.BatchNorm1d(8), VECTOR),
    "BatchNorm without running statistics": (nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "InstanceNorm2d": (nn.InstanceNorm2d(4, affine=True), IMAGE),
    "GroupNorm": (nn.GroupNorm(2, 4), IMAGE),
    "LayerNorm": (nn.LayerNorm(8), VECTOR),
    "LayerNorm of sequences": (nn.LayerNorm([3, 8]), SEQUENCE),
    "RMSNorm": (nn.RMSNorm(8), VECTOR),
    "LocalResponseNorm": (nn.LocalResponseNorm(2), IMAGE),
    "PReLU": (nn.PReLU(), VECTOR),
    "Softmax": (nn.Softmax(-1), VECTOR),
    "AvgPool2d": (nn.AvgPool2d(2), IMAGE),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(2), IMAGE),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 4, 3), IMAGE),
    "CosineClassifier": (km.nn.CosineClassifier(8, 8), VECTOR),
    "weight_norm": (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), VECTOR),
    "attention": (Attention(8, 2, batch_first=True), SEQUENCE),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_exact_second_derivatives(name):
    # PyTorch's own batching rules of BatchNorm, InstanceNorm and LayerNorm with a weight have wrong ones.
    layer, row = LAYERS[name]
    torch.manual_seed(0)
    first = nn.Conv2d(4, 4, 3, padding=1) if row is IMAGE else nn.Linear(8, 8)
    body = nn.Sequential(first, layer, nn.Tanh(), nn.Flatten()).to(DOUBLE)
    support, labels, query = tasks(2, 6, 5, 3, row)
    network = body.append(nn.Linear(body(query[0]).shape[1], 3).to(DOUBLE))
    rates = [dict.fromkeys(dict(network.named_parameters()), 0.3)] * 2
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # the unrolled loop needs it
        expected = unrolled(network, support, labels, query, rates)
        expected_gradients = gradients(expected, list(network.parameters()))
    found = km.func.maml(network, steps=2, inner_lr=0.3)(support, labels, query)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(found, list(network.parameters())), expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_second_order_is_more_than_first_order_by_the_hessian():
    # One step: the gradients differ by -rate * Hessian of the support loss * gradient of the query loss.
    network = mlp(4, 3, 2)
    support, labels, query = tasks(1, 6, 5, 2, (4,))
    parameters = list(network.parameters())
    exact, first = (
        gradients(km.func.maml(network, steps=1, inner_lr=0.3, first_order=order)(support, labels, query), parameters)
        for order in (False, True)
    )
    inner = torch.autograd.grad(F.cross_entropy(network(support[0]), labels[0]), parameters, create_graph=True)
    hessian_product = torch.autograd.grad(inner, parameters, first)
    for a, b, product in zip(exact, first, hessian_product, strict=True):
        torch.testing.assert_close(a - b, -0.3 * product, rtol=1e-9, atol=1e-11)
    assert max(product.abs().max() for product in hessian_product) > 1e-3


def test_first_order_is_so_under_torch_func_too():
    network = mlp(4, 3, 2)
    support, labels, query = tasks(2, 6, 5, 2, (4,))
    f = km.func.maml(network, steps=2, inner_lr=0.3, first_order=True)

    def value(parameters):
        return torch.func.functional_call(Callee(network, f), parameters, (support, labels, query)).square().sum()

    expected = torch.autograd.grad(f(support, labels, query).square().sum(), list(network.parameters()))
    found = torch.func.grad(value)({f"network.{name}": p.detach() for name, p in network.named_parameters()})
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class Callee(nn.Module):
    """Holds the network, so that functional_call can replace its parameters."""

    def __init__(self, network, f):
        super().__init__()
        self.network, self.f = network, f

    def forward(self, *args):
        return self.f(*args)


def test_only_what_is_asked_for_is_adapted():
    network = mlp(4, 3, 2)
    support, labels, query = tasks(2, 6, 5, 2, (4,))
    for adapt, names in ((["3"], {"3.weight", "3.bias"}), (["0.weight", "3"], {"0.weight", "3.weight", "3.bias"})):
        f = km.func.maml(network, steps=2, inner_lr=0.3, adapt=adapt)
        outputs, theta = f(support, labels, query, return_parameters=True)
        rates = [dict.fromkeys(names, 0.3)] * 2
        assert set(theta) == names
        assert theta["3.weight"].shape == (2, 2, 3)
        assert_equal(outputs, unrolled(network, support, labels, query, rates, names=names), [*network.parameters()])
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    outputs = km.func.maml(network, steps=2, inner_lr=0.3)(support, labels, query)
    rates = [dict.fromkeys(("3.weight", "3.bias"), 0.3)] * 2
    torch.testing.assert_close(
        outputs, unrolled(network, support, labels, query, rates, names=("3.weight", "3.bias")), rtol=1e-9, atol=1e-9
    )


def test_task_statistics_leave_the_network_and_other_tasks_alone():
    network = conv_net()
    support, labels, query = tasks(4, 6, 5, 3, (1, 6, 6))
    f = km.func.maml(network, steps=2, inner_lr=0.1)
    before = copy.deepcopy(network.state_dict())
    outputs = f(support, labels, query)
    for t in range(4):
        torch.testing.assert_close(f(*(x[t : t + 1] for x in (support, labels, query)))[0], outputs[t])
    network.eval()
    assert torch.equal(f(support, labels, query), outputs)
    with torch.no_grad():
        assert torch.equal(f(support, labels, query), outputs)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert network[1].running_mean is not None


def test_running_statistics_are_read_and_make_rows_independent():
    network = conv_net()
    for _ in range(3):
        network(torch.randn(8, 1, 6, 6, dtype=DOUBLE) * 2 + 1)
    network.eval()
    support, labels, query = tasks(2, 6, 5, 3, (1, 6, 6))
    f = km.func.maml(network, steps=2, inner_lr=0.1, norm_stats="running")
    outputs = f(support, labels, query)
    torch.testing.assert_close(f(support, labels, query[:, :1]), outputs[:, :1])
    theta = dict(network.named_parameters())
    for _ in range(2):
        value = F.cross_entropy(torch.func.functional_call(network, theta, (support[1],)), labels[1])
        steps = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), steps, strict=True)}
    torch.testing.assert_close(outputs[1], torch.func.functional_call(network, theta, (query[1],)))
    network.train()
    with pytest.raises(ValueError, match=r'norm_stats: "running".*\'1\' must have some and be in eval'):
        f(support, labels, query)


@pytest.mark.parametrize("norm_stats", ["task", "running"])
@pytest.mark.parametrize("first_order", [False, True])
def test_compiled_whole_it_is_the_same(norm_stats, first_order):
    network = conv_net().eval()
    support, labels, query = tasks(2, 6, 5, 3, (1, 6, 6))
    f = km.func.maml(network, steps=2, inner_lr=0.1, first_order=first_order, norm_stats=norm_stats)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(support, labels, query), f(support, labels, query), [*network.parameters()])


def test_dropout_follows_the_mode_of_the_network():
    network = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2)).to(DOUBLE)
    support, labels, query = tasks(2, 6, 5, 2, (4,))
    f = km.func.maml(network, steps=1, inner_lr=0.1)
    assert not torch.equal(f(support, labels, query), f(support, labels, query))
    network.eval()
    assert torch.equal(f(support, labels, query), f(support, labels, query))


def test_another_loss_and_other_outputs():
    torch.manual_seed(0)
    network = nn.Linear(3, 2).to(DOUBLE)
    support, _, query = tasks(2, 6, 5, 2, (3,))
    targets = torch.randn(2, 6, 2, dtype=DOUBLE)
    outputs, theta = km.func.maml(network, steps=1, inner_lr=0.1, loss=F.mse_loss)(
        support, targets, query, return_parameters=True
    )
    residual = support[0] @ network.weight.T + network.bias - targets[0]
    expected = network.weight - 0.1 * residual.T @ support[0] / 6
    torch.testing.assert_close(theta["weight"][0], expected)
    torch.testing.assert_close(outputs[0], query[0] @ expected.T + theta["bias"][0])


def test_a_fused_op_inside_the_network_says_that_it_has_no_second_derivative():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = km.nn.SyntheticGradientMLP(2, 4)

        def forward(self, rows):
            return self.mlp(rows[None])[0]

    network = Scores().to(DOUBLE)
    support, labels, query = tasks(1, 6, 5, 2, (2,))
    with pytest.raises(RuntimeError, match="second derivative"):
        km.func.maml(network, steps=1, inner_lr=0.1)(support, labels, query).sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"steps": 1.0}, TypeError, "steps: expected an int, got float"),
        ({"inner_lr": "fast"}, TypeError, "inner_lr: expected a number"),
        ({"inner_lr": [0.1]}, ValueError, "inner_lr: expected one rate for each of 2 steps, got 1"),
        ({"inner_lr": torch.ones(3)}, ValueError, "inner_lr: expected one rate for each of 2 steps, got 3"),
        ({"inner_lr": torch.ones(2, 2)}, ValueError, r"inner_lr: expected a scalar or .* shape \[2, 2\]"),
        ({"inner_lr": {"0.weight": 0.1}}, ValueError, "no rate for the adapted parameter '0.bias'"),
        (
            {"inner_lr": {n: torch.ones(p.shape[-1:]) for n, p in mlp(4, 3, 2).named_parameters()}},
            ValueError,
            r"inner_lr: expected a scalar or \[3, 4\] for '0.weight', got \[4\]",
        ),
        ({"norm_stats": "batch"}, ValueError, "norm_stats: expected one of task, running, got 'batch'"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
        ({"adapt": ["head"]}, ValueError, "adapt: 'head' names no parameter"),
        ({"network": F.relu}, TypeError, "network: expected a torch.nn.Module"),
        ({"network": nn.ReLU()}, ValueError, "network: no parameter to adapt"),
        ({"network": nn.Sequential(nn.Linear(4, 2), nn.SyncBatchNorm(2))}, ValueError, "'1' is a SyncBatchNorm"),
        (
            {"network": nn.Sequential(nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2, track_running_stats=True))},
            ValueError,
            r"'1' \(InstanceNorm2d\) tracks running statistics",
        ),
        ({"network": nn.GRU(4, 2)}, ValueError, r"'' \(GRU\) cannot run for several tasks"),
        ({"network": nn.LazyLinear(3)}, ValueError, "has no shape yet"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, error, message):
    arguments = {"network": mlp(4, 3, 2), "steps": 2, "inner_lr": 0.1, **options}
    with pytest.raises(error, match=message):
        km.func.maml(arguments.pop("network"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 5, dtype=torch.int64)}, "support_labels: expected 6 a task"),
        ({"labels": torch.zeros(3, 6, dtype=torch.int64)}, "support_labels: expected 2 tasks, as support, got 3"),
        ({"query": torch.zeros(2, 5, 3, dtype=DOUBLE)}, r"query: expected rows \[4\], as support, got \[3\]"),
        ({"support": torch.zeros(4, dtype=DOUBLE)}, r"support: expected \[tasks, rows, ...\], got shape \[4\]"),
        ({"support": torch.zeros(0, 6, 4, dtype=DOUBLE)}, "expected 0 tasks|expected at least one task"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change, message):
    support, labels, query = tasks(2, 6, 5, 2, (4,))
    rows = {"support": support, "labels": labels, "query": query, **change}
    with pytest.raises(ValueError, match=message):
        km.func.maml(mlp(4, 3, 2), steps=1, inner_lr=0.1)(*rows.values())
