from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from episodes import assert_close, draw, relative_error
from golden import load, part
from torch.nn.functional import normalize

import kernelmeta as km


def combined(n_way: int, n_features: int, **options: Any) -> km.nn.Program:
    phases = [km.nn.Phase("cross_entropy", 2, 0.1), km.nn.Phase("synthetic_gradient", 2, 0.01)]
    return km.nn.Program(n_way, n_features, phases, **options)


LEARNERS: list[Any] = [
    km.nn.SIB, km.nn.EquivariantSIB, km.nn.Prototypes, km.nn.SoftKMeans, km.nn.ANIL, km.nn.RidgeHead, combined,
]  # fmt: skip


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_learners_are_called_alike(learner: Any, dtype: torch.dtype) -> None:
    episode = draw(dtype=dtype)
    head = learner(3, 13).to(dtype)
    logits = head(episode.support, episode.labels, episode.query)
    assert logits.shape == (2, 11, 3)
    # SoftKMeans has no parameters to say how precise it shall be.
    assert logits.dtype == (torch.promote_types(dtype, torch.float32) if learner is km.nn.SoftKMeans else dtype)
    logits, weights = head(episode.support, episode.labels, episode.query, return_weights=True)
    assert isinstance(weights, km.Classifier)
    assert weights.weight.shape == (2, 3, 13) and weights.bias.shape == (2, 3)
    if learner in (km.nn.ANIL, km.nn.RidgeHead) and dtype is torch.float64:  # linear classifiers
        assert_close([logits], [episode.query @ weights.weight.mT + weights.bias[:, None]], 1e-12)


@pytest.mark.parametrize("learner", LEARNERS)
def test_adapt_gives_the_classifier_of_a_call(learner: Any) -> None:
    episode = draw()
    head = learner(3, 13).double().eval()
    logits, want = head(episode.support, episode.labels, episode.query, return_weights=True)
    assert_close(head.adapt(episode.support, episode.labels, episode.query), want, 0)
    if head.transductive:
        with pytest.raises(ValueError, match=r"query: .* refines its classifier on the query rows"):
            head.adapt(episode.support, episode.labels)
        return
    alone = head.adapt(episode.support, episode.labels)
    assert_close(alone, want, 1e-12)
    if learner in (km.nn.ANIL, km.nn.RidgeHead):
        assert_close([logits], [episode.query @ alone.weight.mT + alone.bias[:, None]], 1e-12)
    else:
        cosines = normalize(episode.query, dim=-1) @ normalize(alone.weight, dim=-1).mT
        assert_close([logits], [head.scale * (head.bias + cosines)], 1e-12)
    if learner is km.nn.RidgeHead:
        offsets = torch.tensor([0, episode.support.shape[1], 2 * episode.support.shape[1]])
        flat = head.adapt(episode.support.flatten(0, 1), episode.labels.flatten(), ragged=km.Ragged(offsets, offsets))
        assert_close(flat, want, 1e-12)


def test_what_is_transductive() -> None:
    heads = {learner.__name__: learner(3, 13).transductive for learner in LEARNERS}
    expected = ("SIB", "EquivariantSIB", "SoftKMeans", "combined")
    assert heads == {name: name in expected for name in heads}
    assert not km.nn.SIB(3, 13, steps=0).transductive and not km.nn.SoftKMeans(3, steps=0).transductive


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_stored_in_half_precision(learner: Any, dtype: torch.dtype) -> None:
    episode = draw(dtype=torch.float32)
    head = learner(3, 13).eval()
    support, query = episode.support.to(dtype), episode.query.to(dtype)
    logits = head(support, episode.labels, query)
    assert logits.dtype is torch.float32
    assert relative_error(logits, head(support.float(), episode.labels, query.float())) < 1e-5


@pytest.mark.parametrize("learner", LEARNERS)
def test_autocast_changes_nothing(learner: Any) -> None:
    episode = draw(dtype=torch.float32)
    head = learner(3, 13).eval()
    want = head(episode.support, episode.labels, episode.query)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(episode.support, episode.labels, episode.query), want)


@pytest.mark.parametrize("learner", [km.nn.Prototypes, km.nn.SoftKMeans])
def test_baselines_need_no_number_of_features(learner: Any) -> None:
    episode = draw(dtype=torch.float32)
    args = (episode.support, episode.labels, episode.query)
    assert torch.equal(learner(3)(*args), learner(3, 13)(*args))


def test_sib_without_steps_is_prototypes() -> None:
    episode = draw()
    sib, prototypes = km.nn.SIB(3, 13, steps=0).double(), km.nn.Prototypes(3, 13).double()
    args = (episode.support, episode.labels, episode.query)
    assert_close([sib(*args)], [prototypes(*args)], 1e-13)


def test_soft_kmeans_step_by_step() -> None:
    episode = draw()
    logits, (theta, _) = km.nn.SoftKMeans(3, 13, steps=1, scale=4.0)(
        episode.support, episode.labels, episode.query, return_weights=True
    )
    support, query = normalize(episode.support, dim=-1), normalize(episode.query, dim=-1)
    for t in range(2):
        means = torch.stack([support[t][episode.labels[t] == n].mean(0) for n in range(3)])
        shares = torch.softmax(4 * query[t] @ normalize(means, dim=-1).T, -1)
        for n in range(3):
            rows = support[t][episode.labels[t] == n]
            want = (rows.sum(0) + shares[:, n] @ query[t]) / (len(rows) + shares[:, n].sum())
            assert_close([theta[t, n]], [want], 1e-12)
    assert_close([logits], [4 * query @ normalize(theta, dim=-1).mT], 1e-12)


def test_from_bank_equals_gathered_features() -> None:
    bank = torch.randn(60, 13)
    head = km.nn.SIB(3, 13).eval()
    support, query = torch.randint(60, (2, 6)), torch.randint(60, (2, 9))
    labels = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    got = head.from_bank(bank, support, labels, query)
    assert torch.equal(got, head(bank[support], labels, bank[query]))


def test_running_statistics_follow_training_only() -> None:
    episode = draw(dtype=torch.float32)
    head = km.nn.SIB(3, 13, steps=2)
    args = (episode.support, episode.labels, episode.query)
    start = head.mlp.running_stats.clone()
    head.eval()(*args)
    assert torch.equal(head.mlp.running_stats, start)
    head.train()(*args)
    assert not torch.equal(head.mlp.running_stats, start)
    moved = head.mlp.running_stats.clone()
    none = (episode.support[:0], episode.labels[:0], episode.query[:0])
    assert head(*none).shape == (0, 11, 3)
    head.norm_stats = "running"
    head(*args)
    assert torch.equal(head.mlp.running_stats, moved)


def test_copies_are_the_same_module() -> None:
    episode = draw(dtype=torch.float32)
    args = (episode.support, episode.labels, episode.query)
    head = km.nn.SIB(3, 13, steps=2, inner_lr=0.1, reduction="mean").eval()
    want = head(*args)
    fresh = km.nn.SIB(3, 13, steps=2, inner_lr=0.1, reduction="mean").eval()
    fresh.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), fresh):
        assert torch.equal(other(*args), want)
    assert relative_error(head.double()(*(a.double() if a.is_floating_point() else a for a in args)), want) < 1e-5


def test_every_parameter_gets_a_gradient() -> None:
    episode = draw(dtype=torch.float32)
    head = km.nn.SIB(3, 13, steps=2, inner_lr=0.1)
    head(episode.support, episode.labels, episode.query).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


def test_module_compiles_in_training() -> None:
    episode = draw(dtype=torch.float32)
    args = (episode.support, episode.labels, episode.query)
    head = km.nn.SIB(3, 13, steps=2, inner_lr=0.1)
    other = copy.deepcopy(head)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    head(*args).square().sum().backward()
    compiled(*args).square().sum().backward()
    for a, b in zip(head.parameters(), other.parameters(), strict=True):
        assert_close([b.grad], [a.grad], 1e-5)
    assert_close([other.mlp.running_stats], [head.mlp.running_stats], 1e-5)


def test_functional_call() -> None:
    episode = draw()
    args = (episode.support, episode.labels, episode.query)
    head = km.nn.SIB(3, 13, steps=2, inner_lr=0.1).double().eval()
    parameters = {k: v.detach() for k, v in head.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(head, p, args).square().sum())(parameters)
    head(*args).square().sum().backward()
    for name, p in head.named_parameters():
        assert_close([grads[name]], [p.grad], 1e-10)


def test_transforms_leave_the_running_statistics_alone() -> None:
    episode = draw()
    args = (episode.support, episode.labels, episode.query)
    head = km.nn.SIB(3, 13, steps=2, inner_lr=0.1).double().train()
    start = head.mlp.running_stats.clone()
    parameters = {k: v.detach() for k, v in head.named_parameters()}

    def loss(p: Any) -> torch.Tensor:
        return torch.func.functional_call(head, p, args).square().sum()

    grads = torch.func.grad(loss)(parameters)
    assert torch.equal(head.mlp.running_stats, start)
    head(*args).square().sum().backward()
    assert_close([grads["mlp.weight2"]], [head.mlp.weight2.grad], 1e-10)
    assert not torch.equal(head.mlp.running_stats, start)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        episode = draw(dtype=torch.float32)
        args = (episode.support, episode.labels, episode.query)
        head = km.nn.SIB(3, 13, steps=2, inner_lr=0.1)
        alone = copy.deepcopy(head)
        wrapped = torch.nn.parallel.DistributedDataParallel(head)
        for _ in range(2):  # the second call raises if the first left a parameter without gradient
            wrapped(*args).square().sum().backward()
            alone(*args).square().sum().backward()
        assert_close([p.grad for p in head.parameters()], [p.grad for p in alone.parameters()], 1e-6)
        assert_close([head.mlp.running_stats], [alone.mlp.running_stats], 1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("learner", "options", "message"),
    [
        (km.nn.SIB, {"n_way": 0, "n_features": 4}, "n_way"),
        (km.nn.SIB, {"n_way": 2, "n_features": 0}, "n_features"),
        (km.nn.SIB, {"n_way": 2, "n_features": 4, "steps": -1}, "steps"),
        (km.nn.SIB, {"n_way": 2, "n_features": 4, "norm_stats": "layer"}, "norm_stats"),
        (km.nn.Prototypes, {"n_way": 0, "n_features": 4}, "n_way"),
        (km.nn.SoftKMeans, {"n_way": 2, "n_features": 4, "steps": -1}, "steps"),
    ],
)
def test_bad_options(learner: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(**options)


# ---- backbones and published checkpoints


def published_name(ours: str) -> str:
    """The published WideResNet's name of one of our tensors, by the structure of both."""
    for a, b in (("stem", "conv1"), ("groups.0.", "block1.layer."), ("groups.1.", "block2.layer."),
                 ("groups.2.", "block3.layer."), (".norm", ".bn"), ("shortcut", "convShortcut")):  # fmt: skip
        ours = ours.replace(a, b)
    return "bn1" + ours.removeprefix("norm") if ours.startswith("norm") else ours


def test_backbones() -> None:
    for channels in (64, 128):
        net = km.nn.Conv4(channels, in_channels=1)
        assert net(torch.randn(2, 1, 28, 35)).shape == (2, net.n_features(28, 35)) == (2, channels * 2)
    with torch.device("meta"):
        wrn = km.nn.WideResNet()
        assert sum(p.numel() for p in wrn.parameters()) == 36_472_784
        assert wrn(torch.randn(1, 3, 80, 80)).shape == (1, 640)
        assert km.nn.WideResNet(first_stride=1)(torch.randn(1, 3, 32, 32)).shape == (1, 640)
    with pytest.raises(ValueError, match="at least 16 x 16"):
        km.nn.Conv4()(torch.zeros(1, 3, 8, 8))


def test_published_backbones_are_read_strictly() -> None:
    net = km.nn.WideResNet(10, 1)
    published = {published_name(k): v for k, v in net.state_dict().items()}
    checkpoint = {"netFeat": published, "SIB": {}, "lr": 0.1, "nbStep": 3}
    other = km.nn.WideResNet(10, 1)
    other.load_state_dict(km.nn.WideResNet.from_xfer(checkpoint, 10, 1))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), other.eval()(x))
    missing = dict(published)
    del missing["block2.layer.0.convShortcut.weight"]
    with pytest.raises(ValueError, match=r"missing key 'block2\.layer\.0\.convShortcut\.weight'"):
        km.nn.WideResNet.from_xfer(missing, 10, 1)
    with pytest.raises(ValueError, match=r"unknown key 'fc\.weight'"):
        km.nn.WideResNet.from_xfer({**published, "fc.weight": x}, 10, 1)
    with pytest.raises(ValueError, match="unknown key 'epoch'"):
        km.nn.WideResNet.from_xfer({**checkpoint, "epoch": 3}, 10, 1)

    conv = km.nn.Conv4()
    layers = {"0": "Conv", "1": "BatchNorm"}
    parts = {k: k.split(".") for k in conv.state_dict()}
    published = {f"conv_blocks.{p[1]}.layers.{layers[p[2]]}.{p[3]}": conv.state_dict()[k] for k, p in parts.items()}
    with pytest.raises(ValueError, match=r"unknown key 'fc\.num_batches_tracked'"):
        km.nn.Conv4.from_xfer({**published, "fc.num_batches_tracked": x})
    with pytest.raises(ValueError, match="missing key 'lr'"):
        km.nn.Conv4.from_xfer({"netFeat": published, "SIB": {}, "nbStep": 3})
    with pytest.raises(TypeError, match="expected a dict, got list"):
        km.nn.Conv4.from_xfer([published])  # type: ignore[arg-type]
    # PyTorch before 0.4.1 did not count the batches.
    old = {k: v for k, v in published.items() if "num_batches" not in k}
    km.nn.Conv4().load_state_dict(km.nn.Conv4.from_xfer(old))
    other_conv = km.nn.Conv4()
    other_conv.load_state_dict(km.nn.Conv4.from_xfer(published))
    assert torch.equal(conv.eval()(x), other_conv.eval()(x))


def test_published_heads_are_read_strictly() -> None:
    state = part(load("sib_3way_batch_of_3"), "state.")
    head = km.nn.SIB(3, 32)
    head.load_state_dict(km.nn.SIB.from_xfer({"netFeat": {}, "SIB": state, "lr": 0.1, "nbStep": 2}))
    assert head.scale.item() == pytest.approx(7.3)
    without = {k: v for k, v in state.items() if k != "dni.layer3.bias"}
    with pytest.raises(ValueError, match=r"missing key 'dni\.layer3\.bias'"):
        km.nn.SIB.from_xfer(without)
    with pytest.raises(ValueError, match=r"unknown key 'dni\.layer4\.bias'"):
        km.nn.SIB.from_xfer({**state, "dni.layer4.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing key 'SIB'"):
        km.nn.SIB.from_xfer({"netFeat": {}})
