"""Learners that are told the classes' shares of the query rows: in training, evaluation, comparisons and answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.data import EpisodeSampler, FeatureBank
from kernelmeta.data.files import read_json
from kernelmeta.training import TrainConfig, Trainer
from kernelmeta.training.answers import check_use, make_learner
from kernelmeta.training.comparison import CompareConfig, Comparison
from kernelmeta.training.comparison_table import markdown
from kernelmeta.training.evaluation import interval
from kernelmeta.training.learners import parse_phases
from kernelmeta.training.loading import load_learner
from kernelmeta.training.proportions import query_shares

PHASES = "assignment:2:0.05:given,equivariant_gradient:1:0.01"
TOLD = TrainConfig(
    learner="combined", phases=PHASES, way=3, query=4, query_balance="dirichlet:2", episodes=8, tasks_per_step=4,
    optimizer="Adam", data="a test", seed=3, validate_every=0, transform="power:0.5", center="task",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(bank_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("told") / "run"
    options = ("--way", "3", "--query", "4", "--query-balance", "dirichlet:2", "--episodes", "64", "--quiet")
    own = ("--learner", "combined", "--phases", PHASES, "--eval-episodes", "40")
    assert main(["train", *own, *options, "--data", str(bank_file), "--out", str(out)]) == 0
    return out


def test_marginals_are_the_fourth_word_of_a_phase() -> None:
    given, learned, uniform = parse_phases("assignment:2:0.05:given, equivariant_gradient:1:0.01, assignment:1:1")
    assert given == km.nn.Phase("assignment", 2, 0.05, marginals="given")
    assert (learned.marginals, uniform.marginals) == ("none", "uniform")
    with pytest.raises(ValueError, match="phases: expected ORACLE:STEPS:RATE"):
        parse_phases("assignment:2:0.05:given:3")
    with pytest.raises(ValueError, match="marginals: cross_entropy takes none, got 'given'"):
        parse_phases("cross_entropy:2:0.05:given")


@pytest.mark.parametrize("sizes", [{}, {"way": "2:5", "query": "2:6"}])
def test_a_step_is_told_the_shares_of_its_own_query_rows(bank: FeatureBank, sizes: dict[str, str]) -> None:
    config = replace(TOLD, **sizes)
    trainer = Trainer(config, bank)
    head = config.make_learner(bank.n_features)
    drawn = trainer.sampler.draw(0, 4)
    losses = []
    for t in range(4):  # each task by itself
        e = drawn.task(t) if sizes else type(drawn)(*(x[t : t + 1] for x in drawn))
        N = int(drawn.ragged.n_ways[t]) if sizes else 3
        shares = one_hot(e.query_labels, N).double().mean(1)
        rows = (bank.features[e.support_index], e.support_labels, bank.features[e.query_index])
        logits = head.for_ways(N)(*rows, proportions=shares)
        losses.append(cross_entropy(logits[0], e.query_labels[0]).item())
    loss, _ = trainer._run_block(1)
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_shares_of_tasks_of_unequal_size() -> None:
    answers = torch.tensor([0, 0, 1, 2, 1, 1])
    ragged = km.Ragged(torch.tensor([0, 3, 5]), torch.tensor([0, 4, 6]), torch.tensor([3, 2]))
    expected = torch.tensor([[0.5, 0.25, 0.25], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(query_shares(answers, 3, ragged), expected)
    torch.testing.assert_close(query_shares(answers[:4][None], 3), expected[:1])


def test_a_run_is_evaluated_with_the_shares(bank: FeatureBank, run: Path, tmp_path: Path, capsys) -> None:
    learner, settings = load_learner(run)
    assert learner.needs_proportions and settings["phases"] == PHASES
    assert main(["evaluate", str(run), "--episodes", "30", "--json", str(tmp_path / "r.json"), "--quiet"]) == 0
    assert "combined is told the classes' shares of the query rows, the others not" in capsys.readouterr().out
    results = read_json(tmp_path / "r.json")
    sampler = EpisodeSampler(bank, "test", way=3, shot=1, query=4, balance="dirichlet:2", seed=0)
    e = sampler.draw(0, 30)
    shares = one_hot(e.query_labels, 3).double().mean(1)
    with torch.no_grad():
        logits = learner(
            bank.features[e.support_index], e.support_labels, bank.features[e.query_index], proportions=shares
        )
    right = (logits.argmax(-1) == e.query_labels).double().mean(1)
    assert results["proportions_known"] and results["accuracy"] == pytest.approx(interval(right)[0])
    # Evaluated with other shares it is another learner.
    with torch.no_grad():
        other = learner(
            bank.features[e.support_index], e.support_labels, bank.features[e.query_index],
            proportions=torch.full_like(shares, 1 / 3),
        )  # fmt: skip
    assert not torch.equal(other.argmax(-1), logits.argmax(-1))


COMPARE = CompareConfig(
    data="a test", learners=("pt_map", "combined"), way=3, query=4, shots=(1,), balances=("known:dirichlet:2",),
    episodes=64, trial_episodes=64, finalists=1, validation_episodes=10, eval_episodes=20, seed=5,
)  # fmt: skip


def test_it_is_compared_where_the_shares_are_known_and_nowhere_else(
    bank: FeatureBank, run: Path, tmp_path: Path
) -> None:
    trained = {"phases": PHASES, "tasks_per_step": 4, "optimizer": "Adam"}
    some = {"pt_map": [{"steps": 3}], "combined": [{"run": str(run)}, trained]}
    results = Comparison(COMPARE, bank, tmp_path / "known", candidates=some).run()
    assert results["take_proportions"] == ["pt_map", "combined"]
    cell = results["cells"][0]
    assert cell["proportions_known"] and len(cell["learners"]["combined"]["tried"]) == 2
    assert "where they are known, the others not: PT-MAP, combined." in markdown(results)
    for candidate in some["combined"]:
        with pytest.raises(ValueError, match=r"candidates: combined .*must be told the classes' shares.*known:even"):
            Comparison(
                replace(COMPARE, balances=("known:dirichlet:2", "even")), bank, tmp_path / "both",
                candidates={**some, "combined": [candidate]},
            )  # fmt: skip


def test_answers_need_the_shares_too(run: Path) -> None:
    chosen = make_learner(None, run, n_way=3, n_features=24)
    check_use(chosen, transductive=True, proportions=True)
    with pytest.raises(ValueError, match="must be told the classes' shares of the query rows; give them"):
        check_use(chosen, transductive=True, proportions=False)


def test_it_neither_updates_another_nor_is_updated(bank_file: Path, run: Path, tmp_path: Path, capsys) -> None:
    small = ("--way", "3", "--query", "4", "--episodes", "8", "--eval-episodes", "0", "--quiet")
    data = ("--data", str(bank_file))
    plain = str(tmp_path / "plain")
    assert main(["train", "--learner", "prototypes", *data, *small, "--out", plain]) == 0
    told = ("--learner", "combined", "--phases", PHASES)
    for number, (own, old) in enumerate(((told, plain), (("--learner", "prototypes"), str(run)))):
        out = str(tmp_path / f"new {number}")
        assert main(["train", *own, *data, *small, "--update-from", old, "--out", out]) == 2
        assert "told the classes' shares of the query rows" in capsys.readouterr().err
