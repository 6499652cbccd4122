"""Files are written whole or not at all, and no pickle is run."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernelmeta.data.files import read_json, read_weights, write_json, write_text
from kernelmeta.data.replacing import replacing
from kernelmeta.data.tensor_files import read_tensors, write_tensors


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def write_and_fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_and_fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    def full(path, tensors, metadata):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr("kernelmeta.data.tensor_files._write", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(3)}, {})
    assert os.listdir(tmp_path) == []


def test_new_files_have_the_usual_permissions(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_same_content_gives_the_same_bytes(tmp_path):
    tensors = {name: torch.rand(3) for name in "edcba"}
    write_tensors(tmp_path / "1", tensors, {"key": "value"})
    write_tensors(tmp_path / "2", dict(sorted(tensors.items())), {"key": "value"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


class Mischief:
    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    harm = Mischief()
    harm.path = str(tmp_path / "harm")
    torch.save({"weight": torch.zeros(2), "x": harm}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(harm))
    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(harm))
    for name in ("a.pth", "b.pth", "c.safetensors"):
        with pytest.raises(ValueError, match=name) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_weights_of_both_formats_are_read(tmp_path):
    weights = {"layer.weight": torch.rand(2, 3)}
    torch.save(weights, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["layer.weight"], weights["layer.weight"])
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a dict of tensors, got list"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 200_000, "not a JSON file"),
        (b'{"a":' * 200_000, "not a JSON file"),
        (b'{"a": 1e400}', "the number 1e400 is too large"),
        (b'{"a": -1e999}', "the number -1e999 is too large"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": Infinity}', "Infinity is no number"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        ('{"a": 1}'.encode("utf-16"), "not a JSON file"),
        (b"", "not a JSON file"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not a JSON file"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_json_has_no_number_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_tensors_come_back_to_the_library_and_to_us(tmp_path):
    tensors = {
        "half": torch.rand(3, 5).half(), "b": torch.rand(7).bfloat16(), "double": torch.rand(2, 2).double(),
        "flag": torch.tensor([True, False]), "none": torch.zeros(0, 4), "one": torch.tensor(3.5),
        "strided": torch.rand(4, 6).t(), "expanded": torch.rand(1).expand(3, 1), "one more": torch.rand(1, 1)[:, ::2],
        "stride 0": torch.ones(()).expand(1, 1), "no row": torch.zeros(0, 3).t(),
        "int": torch.arange(5, dtype=torch.int32),
    }  # fmt: skip
    metadata = {"a": 'quotes " and \\ and \n and ü and "crc32":"', "crc": "x"}
    write_tensors(tmp_path / "file", tensors, metadata)
    found, read = read_tensors(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == read == {**metadata, "crc32": read["crc32"]}
    theirs = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and torch.equal(theirs[name], tensor)
        assert found[name].dtype == tensor.dtype
    with pytest.raises(TypeError, match=r"c: .*complex64 cannot be written"):
        write_tensors(tmp_path / "file", {"c": torch.zeros(1, dtype=torch.complex64)}, {})
    assert os.listdir(tmp_path) == ["file"]
