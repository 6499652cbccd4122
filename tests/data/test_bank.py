"""Feature banks: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kernelmeta.data import EpisodeSampler, FeatureBank, RaggedEpisodeSampler
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named_and_refused_or_left_out(tmp_path, dtype, value):
    tensors = parts(dtype)
    tensors["features"][2, 1] = tensors["features"][7, 0] = value
    path = tmp_path / "bank.safetensors"
    save_file(tensors, path, METADATA)
    with pytest.raises(ValueError, match=r"2 rows hold .*: row 2 \(class 'c'\), row 7 \(class 'd'\)"):
        FeatureBank.load(path)
    assert not FeatureBank.load(path, non_finite="keep").features.isfinite().all()
    left = FeatureBank.load(path, non_finite="drop")
    assert torch.equal(left.features, tensors["features"][[0, 1, 3, 4, 5, 6]])
    assert left.labels.tolist() == [0, 1, 3, 0, 1, 2]
    with pytest.raises(ValueError, match="non_finite: expected one of"):
        FeatureBank.load(path, non_finite="hide")


def test_a_class_without_a_row_that_is_finite_is_left_out_too(tmp_path):
    tensors = parts()
    tensors["features"][tensors["labels"] == 1] = float("nan")
    save_file(tensors, tmp_path / "bank.safetensors", METADATA)
    left = FeatureBank.load(tmp_path / "bank.safetensors", non_finite="drop")
    assert left.class_names == ("a", "c", "d")
    assert left.class_split.tolist() == [0, 1, 2]
    assert left.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint32])
def test_labels_are_whole_numbers_of_any_size(tmp_path, dtype):
    tensors = {**parts(), "labels": parts()["labels"].to(dtype)}
    assert FeatureBank(**tensors, class_names=tuple("abcd")).labels.dtype is torch.int64
    save_file(tensors, tmp_path / "bank.safetensors", METADATA)
    assert torch.equal(FeatureBank.load(tmp_path / "bank.safetensors").labels, parts()["labels"])


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "bank.safetensors"
    FeatureBank(**parts(), class_names=("a", "β", "c", "d"), source="a test").save(path)
    whole = path.read_bytes()
    before = FeatureBank.load(path)
    noticed = 0
    for at in range(len(whole)):
        for bit in (1, 16):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                bank = FeatureBank.load(path)
            except ValueError:
                noticed += 1
                continue
            # One of the letters of "crc32", without which there is no checksum: all else is as it was.
            assert torch.equal(bank.features, before.features)
            assert (bank.class_names, bank.source) == (before.class_names, before.source)
    assert noticed >= 2 * len(whole) - 10


def test_a_bank_that_is_cut_or_written_to_while_in_use_is_an_error(tmp_path):
    path = tmp_path / "bank.safetensors"
    n = 4000
    bank = FeatureBank(torch.rand(n, 8), torch.arange(n) % 10, torch.zeros(10, dtype=torch.uint8), tuple("abcdefghij"))
    bank.save(path)
    whole = path.read_bytes()
    later = os.stat(path).st_mtime + 10
    read = FeatureBank.load(path)
    sampler = EpisodeSampler(read, "train")
    sampler.draw(0, 1)
    os.utime(path, (later, later))
    sampler.draw(0, 1)  # touched, no more
    bank.save(path)
    sampler.draw(0, 1)  # replaced: what is mapped is still there
    assert torch.equal(read.features, bank.features)
    read = FeatureBank.load(path)
    samplers = (EpisodeSampler(read, "train"), RaggedEpisodeSampler(read, "train", ways=(2, 3)))
    with open(path, "r+b") as file:
        file.seek(len(whole) - 4)
        file.write(b"0000")
    for sampler in samplers:
        with pytest.raises(ValueError, match="written to while it was in use"):
            sampler.draw(0, 1)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"cut from \d+ bytes to 1000 while it was in use"):
        samplers[0].draw(0, 1)


FOREIGN = {
    "npy": "a NumPy array",
    "npz": "an archive of NumPy arrays",
    "csv": "a table in text",
    "json": "JSON text",
    "pt": "a file of torch.save",
    "pkl": "a pickle",
    "parquet": "a Parquet file",
    "lfs": "a pointer of Git LFS",
    "html": "HTML or XML text",
    "zip": "a zip archive",
    "empty": "an empty file",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_bank_that_is_really_another_file_is_told_apart(tmp_path, kind):
    path, tensor = tmp_path / "bank.safetensors", torch.rand(5, 3)
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, tensor.numpy())
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, features=tensor.numpy())
    elif kind == "pt":
        torch.save({"features": tensor}, path)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps([1, 2]))
    else:
        content = {
            "csv": b"label,x,y\n1,0.5,0.25\n",
            "json": b'\xef\xbb\xbf{"features": [1, 2]}',
            "parquet": b"PAR1\x15\x04\x15 rest PAR1",
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "html": b"<!DOCTYPE html><html>404</html>",
            "zip": b"PK\x03\x04 cut",
            "empty": b"",
        }
        path.write_bytes(content[kind])
    with pytest.raises(ValueError, match=f"{path}: {FOREIGN[kind]}.*, not a safetensors file") as caught:
        FeatureBank.load(path)
    assert "\n" not in str(caught.value)


def test_folders_and_pipes_are_no_banks(tmp_path):
    with pytest.raises(IsADirectoryError):
        FeatureBank.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a regular file"):
        FeatureBank.load(tmp_path / "pipe")


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
        ({"labels": torch.zeros(8)}, "labels: expected int64, int32, .*, got float32"),
        ({"labels": torch.zeros(8, dtype=torch.bool)}, "labels: expected int64, int32, .*, got bool"),
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
        {"class_names": "[" * 100_000},
        {"image_shape": "[1e400, 1, 3]"},
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
    for content in (whole[:-1], whole[:50], b"\x00\x01\x02", whole[:8] + b"{" * 100):
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
