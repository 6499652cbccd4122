"""Backbones: pretraining resumes bit for bit, extraction writes what the backbone says, foreign weights are
refused.
"""

from __future__ import annotations

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kernelmeta import nn
from kernelmeta.cli import main
from kernelmeta.data import FeatureBank
from kernelmeta.data.images import ArrayImages
from kernelmeta.training.backbones import load_backbone, make_backbone, trained_style
from kernelmeta.training.checkpoint import CHECKPOINT, Checkpoint
from kernelmeta.training.extraction import extract
from kernelmeta.training.pretraining import PretrainConfig, Pretrainer

CONFIG = PretrainConfig("a test", epochs=3, warmup_epochs=1, milestone=2, batch_size=8, lr=0.05, seed=1)


@pytest.fixture(scope="module")
def images():
    """Bars: a class is their direction and place. Classes 0 to 3 are for the backbone, 4 to 6 for the
    bank.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 80, (7, 6, 16, 16), generator=generator, dtype=torch.uint8)
    for c in range(7):
        along = pixels[c].transpose(1, 2) if c % 2 else pixels[c]
        along[:, 4 + c // 2 * 3] = 255
    split = torch.tensor([3, 3, 3, 3, 0, 1, 2], dtype=torch.uint8)
    labels = torch.arange(7).repeat_interleave(6)
    return ArrayImages(pixels.flatten(0, 1), labels, split, tuple("abcdefg"), "bars", padding=1)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain")
    trainer = Pretrainer(CONFIG, images)
    trainer.run(out)
    return out / CHECKPOINT


def test_pretraining_learns_its_own_classes(images, trained):
    history = Checkpoint.load(trained, "pretrain").state["history"]
    assert [row[0] for row in history] == [1, 2, 3]
    assert history[-1][1] < history[0][1]
    assert Pretrainer(CONFIG, images).classifier.weight.shape == (4, 64)


def test_a_cut_pretraining_goes_on_bit_for_bit(images, trained, tmp_path):
    cut = Pretrainer(CONFIG, images)
    cut.config = replace(CONFIG, epochs=1)
    cut.run(tmp_path)
    resumed = Pretrainer(CONFIG, images)
    resumed.restore(Checkpoint.load(tmp_path / CHECKPOINT, "pretrain"))
    assert resumed.epoch == 1
    resumed.run(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == trained.read_bytes()


def test_interrupted_in_an_epoch_it_goes_on_bit_for_bit(images, trained, tmp_path, monkeypatch):
    cut = Pretrainer(CONFIG, images)
    step, done = Pretrainer._step, []

    def step_and_interrupt(self, *args):
        step(self, *args)
        done.append(1)
        if len(done) == 4:  # of three an epoch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Pretrainer, "_step", step_and_interrupt)
    assert not cut.run(tmp_path)
    assert (cut.epoch, cut.batch) == (1, 1)
    resumed = Pretrainer(CONFIG, images)
    resumed.restore(Checkpoint.load(tmp_path / CHECKPOINT, "pretrain"))
    assert resumed.run(tmp_path)
    assert len(done) == 9
    assert (tmp_path / CHECKPOINT).read_bytes() == trained.read_bytes()


def test_the_rate_rises_stays_and_falls():
    config = PretrainConfig("a test")
    assert [config.rate(epoch) for epoch in (0, 5, 10, 59.9, 60, 129)] == pytest.approx([0, 0.05, 0.1, 0.1, 0.01, 0.01])


def test_extraction_keeps_the_order_and_drops_the_backbones_classes(images, trained):
    backbone, name, _ = load_backbone(trained, None, 1, 16)
    assert name == "conv4"
    bank = extract(images, backbone, "a test", batch_size=4)
    assert bank.class_names == ("e", "f", "g")
    assert bank.class_split.tolist() == [0, 1, 2]
    assert torch.equal(bank.labels, torch.arange(3).repeat_interleave(6))
    with torch.no_grad():
        expected = backbone(torch.stack([images.load(i) for i in range(24, 42)]))
    torch.testing.assert_close(bank.features, expected, rtol=1e-5, atol=1e-6)


def test_published_weights_are_read_whole_or_alone(tmp_path):
    torch.manual_seed(0)
    ours = nn.Conv4()
    layers = {"0": "Conv", "1": "BatchNorm"}
    published = {}
    for key, value in ours.state_dict().items():
        _, block, layer, tensor = key.split(".")
        published[f"conv_blocks.{block}.layers.{layers[layer]}.{tensor}"] = value
    torch.save({"netFeat": published, "SIB": {}, "lr": 1e-3, "nbStep": 3}, tmp_path / "whole.pth")
    torch.save(published, tmp_path / "alone.pth")
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    for file in ("whole.pth", "alone.pth", "ours.safetensors"):
        backbone = load_backbone(tmp_path / file, "conv4", 3, 80).module
        for key, value in ours.state_dict().items():
            assert torch.equal(backbone.state_dict()[key], value), (file, key)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):  # of DataParallel, torch.compile, both
        wrapped = {f"{prefix}{key}": value for key, value in published.items()}
        torch.save({"netFeat": wrapped, "SIB": {}, "lr": 1e-3, "nbStep": 3}, tmp_path / "wrapped whole.pth")
        torch.save(wrapped, tmp_path / "wrapped alone.pth")
        save_file({f"{prefix}{key}": value for key, value in ours.state_dict().items()}, tmp_path / "wrapped ours.st")
        for file in ("wrapped whole.pth", "wrapped alone.pth", "wrapped ours.st"):
            backbone = load_backbone(tmp_path / file, "conv4", 3, 80).module
            for key, value in ours.state_dict().items():
                assert torch.equal(backbone.state_dict()[key], value), (prefix, file, key)
    with pytest.raises(ValueError, match="which backbone are these weights of"):
        load_backbone(tmp_path / "alone.pth", None, 3, 80)
    save_file({**ours.state_dict(), "blocks.0.0.weight": torch.full((64, 3, 3, 3), torch.inf)}, tmp_path / "inf.st")
    with pytest.raises(ValueError, match=r"inf\.st: holds NaN or infinite weights"):
        load_backbone(tmp_path / "inf.st", "conv4", 3, 80)
    with pytest.raises(ValueError, match="not the weights of wrn28_10"):
        load_backbone(tmp_path / "alone.pth", "wrn28_10", 3, 80)
    del published["conv_blocks.2.layers.Conv.weight"]
    torch.save(published, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"not the weights of conv4.*conv_blocks\.2\.layers\.Conv\.weight"):
        load_backbone(tmp_path / "less.pth", "conv4", 3, 80)


def test_weights_of_another_backbone_are_refused(trained):
    with pytest.raises(ValueError, match="the weights of conv4, not of conv4_128"):
        load_backbone(trained, "conv4_128", 1, 16)
    with pytest.raises(ValueError, match="not the weights of conv4"):
        load_backbone(trained, None, 3, 16)


def test_backbones_suit_their_images():
    with pytest.raises(ValueError, match="backbone: expected one of"):
        make_backbone("resnet", 3, 80)
    with torch.device("meta"):
        for size in (32, 80):
            network = make_backbone("wrn28_10", 3, size)
            assert network(torch.zeros(2, 3, size, size)).shape == (2, 640)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 25}, "batch_size: 25, but there are only 24 images"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"lr": -1.0}, "lr: expected a number of at least 0"),
        ({"backbone": "vgg"}, "backbone: expected one of"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(images, change, message):
    with pytest.raises(ValueError, match=message):
        Pretrainer(replace(CONFIG, **change), images)


def test_images_of_another_size_are_seen_as_the_backbone_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for folder, size, classes in (("small/train", 28, "abcd"), ("known", 28, "ef"), ("large", 64, "efg")):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(6):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{i}.png")
    short = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8", "--quiet"]
    assert main(["pretrain", "small", *short, "--out", "run"]) == 0
    weights = ["--weights", f"run/{CHECKPOINT}", "--quiet"]
    assert trained_style(weights[1]) == "cifar-fs"
    sizes = {}
    for name, style in (("as trained", []), ("otherwise", ["--style", "miniimagenet"])):
        assert main(["extract", "large", *weights, *style, "--out", "bank.safetensors"]) == 0
        sizes[name] = FeatureBank.load("bank.safetensors").n_features
    assert sizes == {"as trained": 256, "otherwise": 1600}
    rows = ["--support", "known", "--query", "large"]
    assert main(["predict", "prototypes", *rows, *weights, "--out", "labels.csv"]) == 0
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 19
