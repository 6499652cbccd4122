"""Search: its budget, its rewards, that it finds what it is asked for, and that it goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernelmeta.data.files import read_json
from kernelmeta.graceful.judging import rows_to_judge_by, sides
from kernelmeta.graceful.search import JUDGED, REWARDS, Rewards, Search, SearchConfig, evolve, parse, random_search
from kernelmeta.graceful.supernet import Space
from kernelmeta.graceful.updating import OldModel
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer

SPACE = Space((1, 2), ((4, 6), (4, 8), (8, 12)), (3, 5))


def fits(architecture):
    return architecture.operations(16, 12) <= 60_000


def fake(architecture):
    """The wider, the better for itself; the deeper, the better for the gallery."""
    return Rewards(sum(architecture.widths), 10 * sum(architecture.depths) + architecture.widths[0])


def test_rewards():
    assert [Rewards(50.0, 40.0).of(reward) for reward in REWARDS] == [50, 40, 20]


@pytest.mark.parametrize("judged", [1, 40, 100, 10_000])
def test_each_search_judges_so_many_architectures_within_the_budget_once(judged):
    candidates = [a for a in SPACE if fits(a)]
    assert 100 < len(candidates) < len(list(SPACE))
    for names in (
        random_search(SPACE, fits, fake, judged, 0),
        *(evolve(SPACE, fits, fake, reward, judged, 0) for reward in REWARDS),
    ):
        assert len(names) == len(set(names)) == min(judged, len(candidates))
        assert all(fits(parse(name)) for name in names)
    assert random_search(SPACE, fits, fake, 40, 1) != random_search(SPACE, fits, fake, 40, 2)


def test_evolution_finds_the_best_sooner_than_chance():
    for reward in ("cross", "product"):
        best = max(fake(a).of(reward) for a in SPACE if fits(a))
        evolved, drawn = [], []
        for seed in range(5):
            names = evolve(SPACE, fits, fake, reward, 70, seed)
            evolved.append(max(fake(parse(name)).of(reward) for name in names))
            names = random_search(SPACE, fits, fake, 70, seed)
            drawn.append(max(fake(parse(name)).of(reward) for name in names))
        assert np.mean(evolved) >= np.mean(drawn) and max(evolved) == best


def test_no_architecture_within_the_budget_is_an_error():
    with pytest.raises(ValueError, match="budget: no architecture is that small"):
        random_search(SPACE, lambda architecture: False, fake, 5, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "speed"}, "reward: expected one of self, cross, product"),
        ({"budget": 0.0}, "budget: expected a share of more than 0"),
        ({"judged": 0}, "judged: expected at least 1"),
        ({"epochs": "many"}, "epochs: expected int"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig.from_dict({"data": "bars", "gallery": "there", **change})


@pytest.fixture(scope="module")
def gallery(bars, tmp_path_factory):
    out = tmp_path_factory.mktemp("gallery")
    config = PretrainConfig(
        "bars", backbone="small-2.2-8.16.24-3.3.3-12", epochs=10, warmup_epochs=1, milestone=8, batch_size=16,
        holdout=0.8,
    )  # fmt: skip
    Pretrainer(config, bars).run(out)
    return OldModel(out, bars)


def make_search(bars, gallery, out, **change):
    config = SearchConfig("bars", gallery.path, budget=0.5, judged=6, epochs=2, final_epochs=2, batch_size=8, lr=0.05)
    validation, test = (sides(bars, torch.tensor(half)) for half in sides(bars, rows_to_judge_by(bars, gallery)[0]))
    return Search(replace(config, **change), gallery, bars, bars, validation, test, out, space=SPACE)


def test_a_search_goes_on_where_it_was_stopped(bars, gallery, tmp_path, monkeypatch):
    whole = make_search(bars, gallery, tmp_path / "whole").run()
    assert whole["searches"] == {"random": 6, "self": 6, "cross": 6, "product": 6}
    assert set(whole["chosen"]) == {"self", "cross", "product", "random"}
    cut = make_search(bars, gallery, tmp_path / "cut")
    monkeypatch.setattr(cut, "test_one", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    judged = read_json(tmp_path / "cut" / JUDGED)
    assert judged == read_json(tmp_path / "whole" / JUDGED)
    resumed = make_search(bars, gallery, tmp_path / "cut")
    monkeypatch.setattr("kernelmeta.graceful.supernet.SuperNet.extract", None)  # nothing is judged twice
    assert resumed.run() == whole
    budget = 0.5 * whole["gallery"]["operations"]
    assert all(row["operations"] <= budget for row in whole["judged"].values())
    best = max(whole["judged"].values(), key=lambda row: row["cross"])
    assert whole["chosen"]["cross"]["supernet"]["cross"] <= best["cross"]
    # Another seed is another search: its models are not taken for this one's.
    with pytest.raises(ValueError, match="seed: the checkpoint was trained with 0, not 7"):
        make_search(bars, gallery, tmp_path / "cut", seed=7).run()


def test_the_file_of_what_was_judged_may_be_broken(bars, gallery, tmp_path):
    search = make_search(bars, gallery, tmp_path)
    (tmp_path / JUDGED).write_text('{"1.1-4.4.8-3.3.3": [1]}')
    with pytest.raises(ValueError, match="not the judged architectures"):
        search.run()
