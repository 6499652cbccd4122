"""``kernelmeta extract``: any backbone, gone on with after a kill, shared out over processes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kernelmeta.cli import main
from kernelmeta.data import FeatureBank
from kernelmeta.data.images import FolderImages
from kernelmeta.training import extraction
from kernelmeta.training.extraction import extract
from kernelmeta.training.foreign_backbones import foreign_backbone

FUNCTIONS = """
import torch

class Means(torch.nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(-1)

def means():
    return Means()

def with_preparation():
    return Means(), lambda image: torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)[:, None, None]

def no_module():
    return 3
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, classes in (("train", 3), ("val", 2), ("test", 2)):
        for c in range(classes):
            folder = tmp_path / "photos" / split / f"{split}{c}"
            folder.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of one's own in the current folder; its name, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    name = f"eyes_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    return name


def vision_transformer(folder: Path, pooler: bool = True) -> None:
    """A small one with random weights, and what prepares its images."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    torch.manual_seed(0)
    transformers.ViTModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_normalize": true,'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )


@pytest.mark.parametrize("pooler", [True, False])
def test_a_model_of_transformers_with_its_own_preprocessing(photos: Path, tmp_path: Path, pooler: bool) -> None:
    vision_transformer(tmp_path / "vit", pooler)
    out = tmp_path / "bank.safetensors"
    assert main(["extract", str(photos), "--backbone", f"hf:{tmp_path / 'vit'}", "--out", str(out), "--quiet"]) == 0
    bank = FeatureBank.load(out)
    from transformers import ViTModel

    model = ViTModel.from_pretrained(tmp_path / "vit").eval()
    image = Image.open(photos / "train" / "train1" / "2.png").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        output = model(pixels)
    # Weights that the folder lacks are random: without a pooler's, the class token is what there is.
    want = output.pooler_output if pooler else output.last_hidden_state[:, 0]
    torch.testing.assert_close(bank.features[7][None], want, rtol=1e-3, atol=1e-3)


def test_a_function_of_ones_own(photos: Path, functions: str, tmp_path: Path) -> None:
    out = tmp_path / "bank.safetensors"
    assert main(["extract", str(photos), "--backbone", f"{functions}:means", "--out", str(out), "--quiet"]) == 0
    images = FolderImages(photos)
    torch.testing.assert_close(FeatureBank.load(out).features[4], images.load(4).flatten(1).mean(-1))


def test_its_preprocessing_sees_the_image_as_it_is(photos: Path, functions: str) -> None:
    images, eyes = FolderImages(photos), foreign_backbone(f"{functions}:with_preparation")
    bank = extract(images, eyes.module, "a test", prepare=eyes.prepare)
    want = [Image.open(path).getpixel((0, 0)) for path in images.paths]
    assert bank.features.tolist() == [list(pixel) for pixel in want]


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "torchvision:convnext_tiny"])
def test_models_of_timm_and_torchvision(photos: Path, tmp_path: Path, name: str) -> None:
    """They need torchvision, which needs another PyTorch than most environments have: this says how it went there."""
    library, _, model = name.partition(":")
    package = pytest.importorskip(library, reason=f"{library} is not installed")
    torch.manual_seed(0)
    whole = package.create_model(model) if library == "timm" else package.models.get_model(model)
    whole.eval()
    weights, out = tmp_path / "weights.pt", tmp_path / "bank.safetensors"
    torch.save(whole.state_dict(), weights)
    command = ["extract", str(photos), "--backbone", name, "--weights", str(weights), "--out", str(out), "--quiet"]
    assert main(command) == 0
    # Its last layer on the features is what the whole classifier says.
    bank, eyes = FeatureBank.load(out), foreign_backbone(name, weights)
    assert eyes.prepare is not None
    images = FolderImages(photos)
    pixels = torch.stack([eyes.prepare(images.image(row)) for row in range(3)])
    last = whole.get_classifier() if library == "timm" else getattr(whole, "fc", None) or whole.classifier[-1]
    with torch.no_grad():
        torch.testing.assert_close(last(bank.features[:3]), whole(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_module_at_all:make", "No module named 'no_such_module_at_all'"),
        ("{own}:no_such_function", "no attribute 'no_such_function'"),
        ("{own}:no_module", "expected a torch.nn.Module"),
        ("hf:/no/such/folder", "hf:/no/such/folder"),
    ],
)
def test_what_is_no_backbone_is_one_line(
    photos: Path, functions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, why: str
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    name = name.format(own=functions)
    assert main(["extract", str(photos), "--backbone", name, "--out", str(tmp_path / "bank.safetensors")]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert "Traceback" not in error


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_without_the_library_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    prefix = {"transformers": "hf"}.get(library, library)
    with pytest.raises(ImportError, match=rf"needs {library}: pip install 'kernelmeta\[{prefix}\]'"):
        foreign_backbone(f"{prefix}:anything")


class Killed(Exception):
    pass


class Counts(nn.Module):
    """Counts the images that it sees, and is killed by some."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.seen, self.most = 0, most

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        if self.seen > self.most:
            raise Killed
        return x.flatten(2).mean(-1)


def test_a_killed_run_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "PER_PART", 10)
    images, parts = FolderImages(photos), tmp_path / "parts"
    want = extract(images, Counts(1000), "a test", batch_size=4)
    with pytest.raises(Killed):
        extract(images, Counts(24), "a test", batch_size=4, parts=parts)
    said: list[str] = []
    again = Counts(1000)
    got = extract(images, again, "a test", batch_size=4, parts=parts, say=said.append)
    assert said == ["going on: 20 of 35 images were done before"]
    assert again.seen == len(images.paths) - 20
    assert torch.equal(got.features, want.features)
    assert torch.equal(got.labels, want.labels)
    assert not parts.exists()


def test_what_another_backbone_left_is_not_taken(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "PER_PART", 10)
    images, parts = FolderImages(photos), tmp_path / "parts"
    first, second = Scaled(1.0), Scaled(2.0)
    monkeypatch.setattr(extraction.shutil, "rmtree", lambda folder: None)
    extract(images, first, "a test", parts=parts)
    got = extract(images, second, "a test", parts=parts)
    torch.testing.assert_close(got.features, extract(images, second, "a test").features)
    assert torch.equal(extract(images, second, "a test", parts=parts).features, got.features)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(2).mean(-1)


def test_two_processes_give_what_one_gives(photos: Path, functions: str, tmp_path: Path) -> None:
    command = ["-m", "kernelmeta", "extract", str(photos), "--backbone", f"{functions}:means", "--quiet", "--out"]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    (photos / "val" / "val0" / "broken.png").write_bytes(b"no image")
    subprocess.run([sys.executable, *command, str(one), "--skip-bad"], check=True, cwd=tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*torchrun, *command, str(two), "--skip-bad"], check=True, cwd=tmp_path)
    assert one.read_bytes() == two.read_bytes()
    assert len(FeatureBank.load(two).labels) == 35


def test_features_of_another_backbone_of_the_same_width_are_noticed(photos, tmp_path, monkeypatch, capsys):
    """A bank says whose features it holds, and a run on whose it was trained: one architecture, other weights."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        assert main(["extract", "photos", "--seed", str(seed), "--out", f"{name}.safetensors", "--quiet"]) == 0
    a, again, b = (FeatureBank.load(f"{name}.safetensors") for name in ("a", "again", "b"))
    assert a.backbone == again.backbone != b.backbone
    assert re.fullmatch("conv4 [0-9a-f]{8}", a.backbone)
    assert a.without_rows(torch.tensor([0])).backbone == a.backbone
    replace(b, backbone="").save("unknown.safetensors")
    few = ("--way", "2", "--query", "2", "--episodes", "4", "--eval-episodes", "0", "--learner", "ridge", "--quiet")
    assert main(["train", "--data", "a.safetensors", "--out", "run", *few]) == 0
    assert main(["share", "run", "--out", "shared"]) == 0
    lists = {"task": ["t"], "support_rows": [[0, 5]], "support_labels": [["x", "y"]], "query_rows": [[1, 6]]}
    pq.write_table(pa.table(lists), "tasks.parquet")
    capsys.readouterr()

    def said(*args: str) -> str:
        assert main([*args, "--quiet"]) == 0
        return capsys.readouterr().err

    def warned(first: str, other: str) -> str:
        return f"warning: features of two backbones, {a.backbone} ({first}) and {b.backbone} ({other}), cannot be"

    for run in ("run", "shared"):
        of = ("evaluate", run, "--way", "2", "--shot", "1", "--query", "2", "--episodes", "4", "--data")
        for data in ("a", "again", "unknown"):
            assert "warning" not in said(*of, f"{data}.safetensors")
        assert warned(run, "b.safetensors") in said(*of, "b.safetensors")
    of = ("predict", "prototypes", "--out", "labels.csv", "--support", "a.safetensors", "--query")
    for data in ("again", "unknown"):
        assert "backbone" not in said(*of, f"{data}.safetensors")
    line = said(*of, "b.safetensors")
    assert warned("the support", "the query") in line and line.count("\n") == 1
    of = ("adapt", "--tasks", "tasks.parquet", "--out")
    assert "warning" not in said(*of, "1", "ridge", "--bank", "b.safetensors")
    assert "warning" not in said(*of, "2", "run", "--bank", "a.safetensors")
    assert warned(str(tmp_path / "run"), str(tmp_path / "b.safetensors")) in said(
        *of, "3", "run", "--bank", "b.safetensors"
    )
