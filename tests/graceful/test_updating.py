"""Successors of pretrained runs: each method's loss, resuming, and what is refused."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kernelmeta.data.images import ArrayImages
from kernelmeta.graceful.judging import judge_update, rows_to_judge_by, sides, worst_flips
from kernelmeta.graceful.updating import METHODS, OldModel, UpdateConfig, Updater
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint
from kernelmeta.training.finite import NotFiniteError
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer, held_out

CONFIG = PretrainConfig(
    "bars",
    backbone="small-1.1-4.8.16-3.3.3-12",
    epochs=4,
    warmup_epochs=1,
    milestone=3,
    batch_size=16,
    lr=0.1,
    holdout=0.4,
)


def update(method, **more):
    return UpdateConfig(**{**CONFIG.to_dict(), "seed": 1, "method": method, "old": "a test", **more})


@pytest.fixture(scope="module")
def old(bars, tmp_path_factory):
    out = tmp_path_factory.mktemp("old")
    Pretrainer(CONFIG, bars).run(out)
    return OldModel(out, bars)


def batch(bars):
    pixels = torch.stack([bars.load(row) for row in range(0, 120, 9)])
    return pixels, bars.labels[range(0, 120, 9)]


def test_each_loss_is_its_formula(bars, old):
    pixels, answers = batch(bars)
    for method in METHODS:
        wider = "small-1.1-4.8.16-3.3.3-14" if method == "bct" else CONFIG.backbone
        trainer = Updater(update(method, weight=0.3, backbone=wider), bars, old)
        trainer.backbone.eval()
        loss, logits = trainer._loss(pixels, answers)
        features = trainer.backbone(pixels)
        before = old.classifier(old.backbone(pixels))
        label_loss = F.cross_entropy(trainer.classifier(features), answers)
        if method == "head":
            expected = F.cross_entropy(old.classifier(features), answers)
            assert len(trainer.parameters) == len(list(trainer.backbone.parameters()))
        elif method == "bct":
            expected = label_loss + 0.3 * F.cross_entropy(old.classifier(features[:, :12]), answers)
        else:
            expected = label_loss
        if method in ("focal", "ldi"):
            focus = 1 + 5 * (before.argmax(1) == answers).float()
            p, log_q = (before / 100).softmax(1), (logits / 100).log_softmax(1)
            distance = 1e4 * (p.double() * (p.double().log() - log_q.double())).sum(1)
            if method == "ldi":
                distance = ((logits - before).abs() - 0.5).clamp_min(0).square().mean(1)
            expected = label_loss + 0.3 * (focus * distance).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=2e-3), method
        loss.backward()
        assert all(p.grad is not None for p in trainer.backbone.parameters())
        assert all(p.grad is None for p in old.backbone.parameters())


@pytest.mark.parametrize("method", ["focal", "ldi", "bct", "head"])
def test_classes_may_stand_in_another_order(bars, old, method):
    place = torch.tensor([3, 0, 5, 1, 4, 2, 6, 7])  # of the class that was there
    names = tuple(bars.class_names[int((place == c).nonzero())] for c in range(8))
    moved = replace(bars, labels=place[bars.labels], class_names=names)
    # A successor that is the old model but for the order of its classes is at no distance from it.
    trainer = Updater(update(method), moved, old)
    trainer.backbone = old.backbone
    if method != "head":
        trainer.classifier.scale = old.classifier.scale
        trainer.classifier.weight = torch.nn.Parameter(old.classifier.weight[place.argsort()[:6]])
    pixels, answers = batch(bars)
    loss = trainer._loss(pixels, place[answers])[0]
    expected = F.cross_entropy(old.classifier(old.backbone(pixels)), answers)
    assert loss.item() == pytest.approx(expected.item() * (2 if method == "bct" else 1), rel=1e-5)


@pytest.mark.parametrize("method", ["bct", "head", "focal"])
def test_interrupted_in_an_epoch_it_goes_on_bit_for_bit(bars, old, method, tmp_path, monkeypatch):
    whole = Updater(update(method), bars, old)
    whole.run(tmp_path / "whole")
    step, done = Updater._step, []

    def step_and_interrupt(self, *args):
        step(self, *args)
        done.append(1)
        if len(done) == 6:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Updater, "_step", step_and_interrupt)
        assert not Updater(update(method), bars, old).run(tmp_path / "cut")
    resumed = Updater(update(method), bars, old)
    resumed.restore(Checkpoint.load(tmp_path / "cut" / CHECKPOINT, "pretrain"))
    assert resumed.batch > 0
    resumed.run(tmp_path / "cut")
    assert (tmp_path / "cut" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_a_compatible_successor_searches_the_old_gallery_and_a_free_one_does_not(bars, old, tmp_path):
    models = {}
    for method in ("bct", "none"):
        trainer = Updater(update(method, epochs=12, milestone=9), bars, old)
        trainer.run(tmp_path / method)
        models[method] = OldModel(tmp_path / method, bars)
    results, seen = judge_update(bars, old, models["bct"], models["none"])
    known = results["known"]
    assert results["held_out"] and results["images"] == 48 == len(seen.rows)
    assert known["new_old"]["top1"] > known["free_old"]["top1"] + 30
    assert [row["share"] for row in known["backfill"]] == [0, 0.25, 0.5, 0.75, 1]
    assert results["unseen"]["queries"] + results["unseen"]["gallery"] == 40
    assert results["flips"]["error_old"] == pytest.approx(
        100 * float((seen.old.argmax(1) != seen.labels).float().mean()), abs=1e-4
    )


def test_a_successor_may_know_more_classes(bars, old, tmp_path):
    more = replace(bars, class_split=torch.tensor([3] * 7 + [2], dtype=torch.uint8))
    trainer = Updater(update("bct"), more, old)
    assert trainer.columns.tolist() == [0, 1, 2, 3, 4, 5, -1]
    rows = [row for row in trainer.rows.tolist() if more.labels[row] == 6]
    assert torch.allclose(trainer.old_classifier.weight[6], old.features(more, rows).mean(0), atol=1e-6)
    trainer.run(tmp_path)
    new = OldModel(tmp_path, more)
    assert judge_update(more, old, new)[0]["new_classes"] == 1
    for method in ("focal", "ldi"):
        with pytest.raises(ValueError, match="1 that the old model does not know, 'g'"):
            Updater(update(method), more, old)


def test_what_does_not_fit_is_refused(bars, old, tmp_path):
    fewer = replace(bars, class_split=torch.tensor([3] * 5 + [2] * 3, dtype=torch.uint8))
    for method in METHODS:
        with pytest.raises(ValueError, match="1 of the old model's 6 are not there, 'f'"):
            Updater(update(method), fewer, old)
    with pytest.raises(ValueError, match="gives 8 features; the old classifier takes 12 or more"):
        Updater(update("bct", backbone="small-1.1-4.8.16-3.3.3-8"), bars, old)
    with pytest.raises(ValueError, match="gives 16 features; the old classifier takes 12"):
        Updater(update("head", backbone="small-1.1-4.8.16-3.3.3-16"), bars, old)
    for change, message in (
        ({"method": "magic"}, "method: expected one of bct"),
        ({"tau": 0.0}, "tau: expected a number of more than 0"),
        ({"weight": float("nan")}, "weight: expected"),
        ({"beta": -1.0}, "beta: expected"),
        ({"holdout": 1.0}, "holdout: expected a share"),
        ({"backbone": "conv5"}, "backbone: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            update(**{"method": "bct", **change})
    with pytest.raises(ValueError, match="there is no such run"):
        OldModel(tmp_path / "nowhere", bars)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        OldModel(tmp_path, bars)
    colour = ArrayImages(bars.pixels, bars.labels, bars.class_split, bars.class_names, "colour", channels=3)
    with pytest.raises(ValueError, match="the weights do not fit"):
        OldModel(old.path, colour)
    checkpoint = Checkpoint.load(f"{old.path}/{CHECKPOINT}", "pretrain")
    del checkpoint.state["classes"]
    checkpoint.save(tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="does not name its classes"):
        OldModel(tmp_path, bars)


def test_a_run_that_diverges_stops(bars, old, tmp_path):
    with pytest.raises(NotFiniteError, match="training stopped: the loss is"):
        Updater(update("bct", lr=1e12), bars, old).run(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_what_is_held_out_is_not_trained_on(bars):
    held = held_out(bars, 0.4)
    assert len(bars.groups[held].unique()) == 2 and not torch.isin(bars.groups[~held], bars.groups[held].unique()).any()
    assert not held[Pretrainer(CONFIG, bars).rows].any()
    plain = replace(bars, groups=None)
    held = held_out(plain, 0.1)
    assert torch.bincount(bars.labels[held]).tolist() == [2] * 8
    assert not held_out(plain, 0.0).any()
    # At least one of a class, and never all.
    assert torch.bincount(bars.labels[held_out(plain, 0.001)]).tolist() == [1] * 8
    assert torch.bincount(bars.labels[held_out(plain, 0.999)]).tolist() == [19] * 8


def test_images_to_judge_by_are_kept_from_the_models_and_where_that_is_not_certain_it_is_said(bars, old, tmp_path):
    rows, apart = rows_to_judge_by(bars, old)
    assert apart and len(rows) == 48 and torch.equal(rows, (held_out(bars, 0.4) & (bars.labels < 6)).nonzero()[:, 0])
    Pretrainer(replace(CONFIG, holdout=0.0, epochs=1), bars).run(tmp_path)
    rows, apart = rows_to_judge_by(bars, old, OldModel(tmp_path, bars))
    assert not apart and len(rows) == 120
    # Whether a model has seen images of a set other than its own is not known.
    others = replace(bars, pixels=255 - bars.pixels)
    rows, apart = rows_to_judge_by(others, OldModel(tmp_path, bars))
    assert not apart and len(rows) == 120
    Updater(update("bct", epochs=1), others, old).run(tmp_path / "others")
    rows, apart = rows_to_judge_by(others, old, OldModel(tmp_path / "others", others))
    assert not apart and torch.equal(rows, (held_out(others, 0.4) & (bars.labels < 6)).nonzero()[:, 0])
    with pytest.raises(ValueError, match="has no class that"):
        rows_to_judge_by(replace(bars, class_names=tuple("ijklmnop")), old)


def test_halves_share_no_group_or_no_image(bars):
    rows = torch.arange(3, 140)
    query, gallery = sides(bars, rows)
    assert sorted(query + gallery) == rows.tolist()
    assert not set(bars.groups[query].tolist()) & set(bars.groups[gallery].tolist())
    query, gallery = sides(replace(bars, groups=None), rows)
    assert sorted(query + gallery) == rows.tolist()
    counts = [torch.bincount(bars.labels[half], minlength=8) for half in (query, gallery)]
    assert (counts[0] - counts[1]).abs().max() <= 1


def test_the_surest_mistake_comes_first(bars, old):
    from kernelmeta.graceful.judging import Flipped

    labels = torch.tensor([0, 0, 0, 0])
    before = torch.tensor([[2.0, 0], [2, 0], [2, 0], [0, 2]])
    after = torch.tensor([[1.0, 2], [0, 3], [3, 0], [0, 9]])
    seen = Flipped(torch.arange(4), labels, before, after)
    assert worst_flips(seen, 9).tolist() == [1, 0]
    assert worst_flips(seen, 1).tolist() == [1]
