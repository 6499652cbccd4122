"""What was trained on tasks of one number of classes serves tasks of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.data import FeatureBank
from kernelmeta.data.files import read_json
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.loading import for_ways, load_learner
from kernelmeta.training.prediction import Rows, predict
from kernelmeta.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(bank_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("equivariant") / "run"
    small = ("--way", "3", "--query", "4", "--episodes", "320", "--eval-episodes", "20", "--quiet")
    command = ["train", "--learner", "equivariant", "--data", str(bank_file), *small, "--out", str(out)]
    assert main(command) == 0
    return out


@pytest.mark.parametrize("way", [2, 3, 6])
def test_evaluated_on_other_numbers_of_classes(run: Path, way: int, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert main(["evaluate", str(run), "--way", str(way), "--episodes", "100", "--quiet", "--json", str(file)]) == 0
    results = read_json(file)
    assert results["way"] == way and results["not_finite"] == {"own": 0, "prototypes": 0, "soft_kmeans": 0}
    assert results["accuracy"] > 150 / way
    # Fewer steps, down to none: the class means.
    assert [row["steps"] for row in results["accuracy_over_steps"]] == [0, 1, 2, 3]
    assert results["accuracy_over_steps"][0]["accuracy"] != results["accuracy"]


def test_is_the_program_of_one_phase(bank_file: Path, tmp_path: Path) -> None:
    # so that `combined` has it among its candidates
    shared = {"way": 3, "query": 4, "episodes": 64, "tasks_per_step": 16, "optimizer": "Adam", "lr": 3e-3}
    states = []
    for own in (
        {"learner": "equivariant", "steps": 2, "inner_lr": 0.02},
        {"learner": "combined", "phases": "equivariant_gradient:2:0.02"},
        {"learner": "combined", "phases": "cross_entropy:2:0.1,equivariant_gradient:2:0.02"},
    ):
        trainer = Trainer(
            TrainConfig(data=str(bank_file), validate_every=0, **shared, **own), FeatureBank.load(bank_file)
        )
        assert trainer.run(tmp_path)
        states.append(trainer.head.state_dict())
    first, same, other = states
    assert list(first) == list(same) and all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_reduction_is_a_setting_of_programs(bank_file: Path, tmp_path: Path) -> None:
    settings = {
        "learner": "combined",
        "phases": "assignment:1:0.02,equivariant_gradient:1:0.02",
        "way": "2:4",
        "query": 4,
    }
    trained = {"data": str(bank_file), "episodes": 32, "tasks_per_step": 16, "validate_every": 0, **settings}
    bank, heads = FeatureBank.load(bank_file), {}
    for reduction in (None, "mean", "sum"):
        trainer = Trainer(TrainConfig(reduction=reduction, **trained), bank)
        assert trainer.head.reduction == reduction
        assert trainer.run(tmp_path)
        heads[reduction] = load_learner(tmp_path)[0]
        assert heads[reduction].reduction == reduction
    support, labels, query = bank.features[None, :4], torch.arange(4)[None], bank.features[None, 4:40]
    for one in (None, "mean"):  # of the two phases' gradients one is summed without it
        heads[one].load_state_dict(heads["sum"].state_dict())
        assert not torch.allclose(heads[one](support, labels, query), heads["sum"](support, labels, query))
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, None, got 'max'"):
        Trainer(TrainConfig(reduction="max", **trained), bank)


def test_predicts_any_number_of_classes(run: Path) -> None:
    head, settings = load_learner(run)
    assert isinstance(head, km.nn.EquivariantSIB) and head.n_way == 3
    g = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(5, 24, generator=g)
    support, query = (means.repeat(n, 1) + torch.randn(5 * n, 24, generator=g) / 2 for n in (2, 4))
    names = ["a", "b", "c", "d", "e"]
    found = predict(str(run), Rows(support, list("0123456789"), names * 2), Rows(query, [str(i) for i in range(20)]))
    assert [row[1] for row in found.rows()] == names * 4
    own = for_ways(head, 5)
    z = own(support[None], torch.arange(5).repeat(2)[None], query[None])[0] / settings["temperature"]
    assert (found.probabilities - z.softmax(-1)).abs().max() < 1e-5


def test_a_classifier_of_scikit_learn_takes_the_run(run: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    g = torch.Generator().manual_seed(1)
    means = 2 * torch.randn(4, 24, generator=g)
    rows = (means.repeat(5, 1) + torch.randn(20, 24, generator=g) / 2).double().numpy()
    labels = torch.arange(4).repeat(5).numpy()
    classifier = km.FewShotClassifier(weights=run).fit(rows[:8], labels[:8])
    assert classifier.method_ == "equivariant"
    assert (classifier.predict(rows[8:]) == labels[8:]).all()
