"""Feature banks: what is written is read, and nothing else is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kernelmeta.data import FeatureBank
from kernelmeta.data.bank import FORMAT


def parts(dtype: torch.dtype = torch.float32) -> dict:
    return {
        "features": torch.arange(24, dtype=torch.float32).view(8, 3).to(dtype),
        "labels": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]),
        "class_split": torch.tensor([0, 0, 1, 2], dtype=torch.uint8),
    }


METADATA = {"format": FORMAT, "class_names": json.dumps(["a", "β", "c", "d"]), "source": "a test"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bank_comes_back_as_it_was(tmp_path, dtype):
    bank = FeatureBank(**parts(dtype), class_names=("a", "β", "c", "d"), source="a test")
    bank.save(tmp_path / "new" / "bank.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["bank.safetensors"]
    read = FeatureBank.load(tmp_path / "new" / "bank.safetensors")
    assert torch.equal(read.features, bank.features)
    assert read.features.dtype == dtype
    assert torch.equal(read.labels, bank.labels)
    assert torch.equal(read.class_split, bank.class_split)
    assert (read.class_names, read.source, read.n_features) == (bank.class_names, bank.source, 3)
    assert read.classes("train").tolist() == [0, 1]
    assert read.classes("test").tolist() == [3]


def test_rows_that_are_images_say_so(tmp_path):
    bank = FeatureBank(**parts(), class_names=tuple("abcd"), image_shape=(3, 1, 1))
    bank.save(tmp_path / "bank.safetensors")
    assert FeatureBank.load(tmp_path / "bank.safetensors").image_shape == (3, 1, 1)
    with pytest.raises(ValueError, match=r"image_shape: expected .* of 3 pixels, got \(1, 2, 2\)"):
        FeatureBank(**parts(), class_names=tuple("abcd"), image_shape=(1, 2, 2))


def test_a_bank_written_by_another_tool_is_read(tmp_path):
    save_file({**parts(), "more": torch.zeros(2)}, tmp_path / "bank.safetensors", {**METADATA, "more": "yes"})
    assert FeatureBank.load(tmp_path / "bank.safetensors").class_names == ("a", "β", "c", "d")


def test_nan_features_are_allowed(tmp_path):
    tensors = parts()
    tensors["features"][2, 1] = float("nan")
    save_file(tensors, tmp_path / "bank.safetensors", METADATA)
    assert FeatureBank.load(tmp_path / "bank.safetensors").features.isnan().sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features": torch.zeros(8, 3, dtype=torch.int64)},
            "features: expected float32, float16, bfloat16, got int64",
        ),
        ({"features": torch.zeros(8, 3, dtype=torch.float64)}, "features: expected float32"),
        ({"features": torch.zeros(8)}, "features: expected 2 dimensions"),
        ({"features": torch.zeros(8, 0)}, "features: expected at least one"),
        ({"features": torch.zeros(7, 3)}, "labels: expected one for each of the 7 rows"),
        ({"labels": torch.zeros(8, dtype=torch.int32)}, "labels: expected int64, got int32"),
        ({"labels": torch.tensor([0, 1, 2, 4, 0, 1, 2, 4])}, r"labels: expected 0..3, got 0..4"),
        ({"labels": torch.tensor([0, 1, 2, -1, 0, 1, 2, 3])}, r"labels: expected 0..3, got -1..3"),
        ({"labels": torch.tensor([0, 1, 3, 3, 0, 1, 3, 3])}, "labels: class 2 \\('c'\\) has no sample"),
        (
            {"class_split": torch.tensor([0, 0, 1, 3], dtype=torch.uint8)},
            "class_split: expected 0, 1 or 2, got 3",
        ),
        ({"class_split": torch.tensor([0, 0, 1, 2])}, "class_split: expected uint8"),
        (
            {"class_split": torch.zeros(5, dtype=torch.uint8)},
            "class_names: expected 5 as in class_split, got 4",
        ),
    ],
)
def test_what_breaks_the_format_is_refused(tmp_path, change, message):
    path = tmp_path / "bank.safetensors"
    save_file({**parts(), **change}, path, METADATA)
    with pytest.raises(ValueError, match=message) as caught:
        FeatureBank.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other-1"},
        {"class_names": "a, b"},
        {"class_names": "[1, 2, 3, 4]"},
        {"image_shape": "3x1"},
        {"image_shape": "3"},
        {"image_shape": "[1, 2, 2]"},
    ],
)
def test_foreign_metadata_is_refused(tmp_path, change):
    save_file(parts(), tmp_path / "bank.safetensors", {**METADATA, **change})
    with pytest.raises(ValueError, match=next(iter(change))):
        FeatureBank.load(tmp_path / "bank.safetensors")


def test_a_missing_tensor_is_named(tmp_path):
    tensors = parts()
    del tensors["class_split"]
    save_file(tensors, tmp_path / "bank.safetensors", METADATA)
    with pytest.raises(ValueError, match="no tensor 'class_split'"):
        FeatureBank.load(tmp_path / "bank.safetensors")


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    save_file(parts(), path, METADATA)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:50], b"", b"PK\x03\x04 something else", whole[:8] + b"{" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated, or not a safetensors file") as caught:
            FeatureBank.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="No such file"):
        FeatureBank.load(tmp_path / "none")


def test_arguments_are_checked_in_memory_too():
    with pytest.raises(TypeError, match="features: expected float32"):
        FeatureBank(**{**parts(), "features": torch.zeros(8, 3, dtype=torch.int32)}, class_names=tuple("abcd"))
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        FeatureBank(**{**parts(), "labels": [0, 1]}, class_names=tuple("abcd"))
