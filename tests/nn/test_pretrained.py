"""Learners in folders: they come back as they were, for us and for huggingface_hub, and refuse what they are not."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from episodes import draw
from runs import make_bank

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.training.loading import load_learner

PHASES = [km.nn.Phase("cross_entropy", 2, 0.1), km.nn.Phase("synthetic_gradient", 2, 0.01, learn_rates=True)]
LEARNERS = {
    "sib": lambda: km.nn.SIB(3, 13, steps=2, hidden=7, reduction="mean"),
    "equivariant": lambda: km.nn.EquivariantSIB(3, 13, steps=2, hidden=7, reduction="mean"),
    "prototypes": lambda: km.nn.Prototypes(3),
    "soft_kmeans": lambda: km.nn.SoftKMeans(3, steps=4, scale=7.0),
    "ridge": lambda: km.nn.RidgeHead(3, regularization=0.5),
    "anil": lambda: km.nn.ANIL(3, 13, 2, learn_rates=True, oracle="hinge"),
    "program": lambda: km.nn.Program(3, 13, PHASES, scale=5.0),
}


def trained(name: str) -> km.nn.SIB:
    torch.manual_seed(0)
    head = LEARNERS[name]()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return head.eval()


def logits(head: torch.nn.Module) -> torch.Tensor:
    episode = draw(dtype=torch.float32)
    return head(episode.support, episode.labels, episode.query)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    head = trained(name)
    head.save_pretrained(tmp_path / "shared")
    assert sorted(os.listdir(tmp_path / "shared")) == ["README.md", "config.json", "model.safetensors"]
    for kind in (type(head), km.nn.Prototypes.__mro__[1]):  # its own class, and any learner
        again = kind.from_pretrained(tmp_path / "shared")
        assert type(again) is type(head) and not again.training and repr(again) == repr(head)
        assert torch.equal(logits(again), logits(head))
    for copied in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        copied.save_pretrained(tmp_path / "copy")
        assert (tmp_path / "copy/config.json").read_bytes() == (tmp_path / "shared/config.json").read_bytes()


@pytest.mark.parametrize("name", ["sib", "prototypes", "anil"])
def test_the_mixin_of_huggingface_hub_reads_and_writes_the_same_folders(tmp_path: Path, name: str) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    head = trained(name)
    head.save_pretrained(tmp_path / "ours")
    mixed = type(type(head).__name__, (hub.PyTorchModelHubMixin, type(head)), {})
    theirs = mixed.from_pretrained(str(tmp_path / "ours"))
    assert torch.equal(logits(theirs), logits(head))


def test_what_is_no_such_learner_is_named(tmp_path: Path) -> None:
    trained("sib").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a SIB, not a ANIL"):
        km.nn.ANIL.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"learner": "Harm"}, "expected a learner, got 'Harm'"),
        ({"n_features": 14}, "size mismatch"),
        ({"norm_stats": "none"}, "norm_stats: expected one of"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            km.nn.SIB.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="safetensors"):
        km.nn.SIB.from_pretrained(tmp_path)


def test_without_huggingface_hub_folders_work_and_the_hub_says_what_is_missing(tmp_path: Path) -> None:
    trained("sib").save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; import kernelmeta as km\n"
        "print(km.nn.SIB.from_pretrained('.')); km.nn.SIB.from_pretrained('user/name')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("SIB(")
    assert done.returncode and "pip install 'kernelmeta[hub]'" in done.stderr


def test_a_run_is_shared_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = make_bank()
    bank.save(tmp_path / "bank.safetensors")
    run, shared, json_file = tmp_path / "run", tmp_path / "shared", tmp_path / "r.json"
    args = ["train", "--data", str(tmp_path / "bank.safetensors"), "--way", "3", "--query", "4", "--quiet"]
    assert main([*args, "--episodes", "300", "--eval-episodes", "50", "--out", str(run)]) == 0
    assert main(["share", str(run), "--out", str(shared)]) == 0
    results = json.loads((run / "results.json").read_text())
    card = (shared / "README.md").read_text()
    assert f"| **SIB** | {results['accuracy']:.2f} ± {results['ci95']:.2f} |" in card
    assert "## Intended use" in card and "library_name: kernelmeta" in card
    everything = "".join(path.read_text(errors="replace") for path in shared.iterdir())
    assert str(tmp_path) not in everything  # nothing of the machine of the training
    settings = load_learner(shared)[1]
    assert settings["temperature"] == results["calibration"]["temperature"]
    capsys.readouterr()
    few = ["--data", str(tmp_path / "bank.safetensors"), "--episodes", "50", "--json", str(json_file), "--quiet"]
    assert main(["evaluate", str(shared), *few]) == 0
    assert f"{shared}: SIB, trained on 300 3-way 1-shot episodes\n" in capsys.readouterr().out
    assert json.loads(json_file.read_text())["accuracy"] == results["accuracy"]
    few_rows = bank.features[:60:7].numpy(), bank.labels[:60:7].numpy()
    found = [
        km.FewShotClassifier(weights=where).fit(*few_rows).predict_proba(bank.features[:60]) for where in (run, shared)
    ]
    assert (found[0] == found[1]).all()
    # Other weights than those that were evaluated: the card does not claim their accuracy.
    assert main(["share", str(run), "--out", str(shared), "--at", "last"]) == 0
    assert "## Accuracy" not in (shared / "README.md").read_text()
    assert main(["share", str(run), "--out", str(run)]) == 2
    assert "holds a run" in capsys.readouterr().err
