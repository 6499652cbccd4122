"""Arrays and files of other programs as feature banks."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.data import FeatureBank
from kernelmeta.data.class_split import parse_shares, split_classes
from kernelmeta.data.whole_numbers import check_whole

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.array(["fox", "ant", "bee", "cow"] * 3)
NAMES = ("ant", "bee", "cow", "fox")
CODES = torch.tensor([3, 0, 1, 2] * 3)


def import_files(tmp_path, *files, **options) -> FeatureBank:
    from kernelmeta.data.importing import import_bank

    return import_bank([tmp_path / file for file in files], tmp_path / "bank.safetensors", **options)


def check(bank: FeatureBank, dtype: torch.dtype = torch.float32) -> None:
    assert bank.class_names == NAMES
    assert torch.equal(bank.labels, CODES)
    assert bank.features.dtype is dtype
    torch.testing.assert_close(bank.features.float(), torch.from_numpy(X).to(dtype).float(), rtol=1e-6, atol=0)


# ---- arrays


@pytest.mark.parametrize("X", [X, X.astype(np.float64), torch.from_numpy(X), X.tolist()])
@pytest.mark.parametrize("y", [Y, Y.tolist(), Y.astype(object), np.char.encode(Y)])
def test_a_bank_from_arrays(X, y):
    bank = FeatureBank.from_arrays(X, y)
    check(bank)
    assert not bank.class_split.any()


def test_numbers_are_classes_in_their_order():
    bank = km.data.FeatureBank.from_arrays(X, [10, 9, 2, -1] * 3)
    assert bank.class_names == ("-1", "2", "9", "10")
    assert bank.labels.tolist() == [3, 2, 1, 0] * 3
    named = FeatureBank.from_arrays(X, torch.arange(4).repeat(3), class_names=NAMES)
    assert named.class_names == NAMES
    assert FeatureBank.from_arrays(X, np.tile([0.0, 1.0, 2.0, 3.0], 3)).class_names == ("0", "1", "2", "3")
    assert FeatureBank.from_arrays(X.astype(np.float16), Y).features.dtype is torch.float16
    assert FeatureBank.from_arrays(torch.from_numpy(X).bfloat16(), Y).features.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"X": X[0]}, r"expected a matrix \[n, D\]"),
        ({"X": X.astype(str)}, "X: expected numbers"),
        ({"X": X[:5]}, "y: expected one label for each of the 5 rows"),
        ({"y": np.linspace(0, 1, 12)}, "expected whole numbers or names"),
        ({"y": [*Y[:11], ""]}, "row 11 has none"),
        ({"y": [*Y[:11], None]}, "got none in row 11"),
        ({"y": [0.0, 1.0, 2.0, math.nan, *range(4, 12)]}, "got nan in row 3"),
        ({"class_names": NAMES}, "class_names: expected a name for each"),
        ({"split": "60/40"}, "split: expected shares"),
        ({"split": "60/20/30"}, r"expected shares that sum to 100 \(or to 1\), got 60/20/30, which sum to 110"),
        ({"y": [1, "1", 2, 3] * 3}, "both the number 1 and the text '1' are there"),
        ({"X": np.full((12, 3), 2**24 + 1)}, "X: 36 whole numbers, 16777217 the first, have more digits than float32"),
        ({"X": torch.full((12, 3), -(2**63) + 1)}, "X: 36 whole numbers, -9223372036854775807 the first"),
        ({"split": [0, 1]}, "split: expected one for each of 4 classes or 12 rows, got 2"),
        ({"split": ["train", "val", "test", "other"]}, "got 'other'"),
        ({"split": [0] * 11 + [1]}, "is in another split than the rest of its class"),
        ({"split": "60/20/20", "y": ["a"] * 12}, "expected at least 3 classes"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FeatureBank.from_arrays(**{"X": X, "y": Y, **given})


def test_labels_are_what_they_are_in_mixed_lists():
    """NumPy would make "2.0" of the 2.0 here, and round the large number there."""
    assert FeatureBank.from_arrays(X, [2.0, "a", 3, "b"] * 3).class_names == ("2", "3", "a", "b")
    large = FeatureBank.from_arrays(X, [2**53 + 1, 2**53, 1.0, 0] * 3)
    assert large.class_names == ("0", "1", str(2**53), str(2**53 + 1))
    assert FeatureBank.from_arrays(X, torch.tensor([2.0, 1, 3, 4] * 3).bfloat16()).class_names == ("1", "2", "3", "4")


@given(st.integers(-(2**63), 2**64 - 1))
def test_whole_numbers_pass_where_float32_holds_them(value):
    held = int(np.float32(value)) == value
    array = np.array([0, value], np.uint64 if value >= 0 else np.int64)
    with contextlib.nullcontext() if held else pytest.raises(ValueError, match="more digits than float32"):
        check_whole(array)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "x.safetensors", "x.csv", "x.parquet", "lists.parquet"])
def test_whole_numbers_that_would_be_rounded_are_refused_in_every_kind_of_file(tmp_path, name):
    ids = np.array([[2**24, 5], [2**24 + 1, 6], [3, 7]])
    path, y = tmp_path / name, np.array(["a", "b", "c"])
    np.save(tmp_path / "y.npy", y)
    files = [name, "y.npy"]
    if name == "x.npy":
        np.save(path, ids)
    elif name == "x.npz":
        np.savez(path, X=ids)
    elif name == "x.pt":
        torch.save(torch.from_numpy(ids), path)
    elif name == "x.safetensors":
        save_file({"X": torch.from_numpy(ids)}, path)
    elif name == "x.csv":
        path.write_text("p,q,y\n" + "\n".join(f"{a},{b},{c}" for (a, b), c in zip(ids, y, strict=True)))
        files = [name]
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"X": ids.tolist()} if name == "lists.parquet" else {"p": ids[:, 0], "q": ids[:, 1]}
        pq.write_table(pa.table({**columns, "y": y}), path)
        files = [name]
    with pytest.raises(ValueError, match=f"{name}: .*1 whole numbers, 16777217 the first, have more digits"):
        import_files(tmp_path, *files)


def test_a_blank_in_the_first_row_hides_no_column(tmp_path):
    (tmp_path / "x.csv").write_text("p,q,empty,y\n,1,,a\n2,3,,b\n5,6,,c\n")
    with pytest.raises(ValueError, match=r"x.csv: line 2, column 'p': expected a number, got ''"):
        import_files(tmp_path, "x.csv")
    said = []
    (tmp_path / "y.csv").write_text("p,q,empty,y\n7,1,,a\n2,3,,b\n5,6,,c\n")
    bank = import_files(tmp_path, "y.csv", say=said.append)
    assert bank.features.tolist() == [[7, 1], [2, 3], [5, 6]]
    assert said == [f"{tmp_path / 'y.csv'}: columns that are no numbers are left out: empty"]


def test_a_split_for_classes_or_rows():
    assert FeatureBank.from_arrays(X, Y, ["train", "val", "test", "test"]).class_split.tolist() == [0, 1, 2, 2]
    of_rows = np.array([0, 1, 2, 2])[CODES.numpy()]
    assert FeatureBank.from_arrays(X, Y, of_rows).class_split.tolist() == [0, 1, 2, 2]


# ---- the split


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=80), st.integers(0, 99))
def test_every_split_has_its_share_of_large_and_of_small_classes(sizes, seed):
    shares = parse_shares("60/20/20")
    split = split_classes(sizes, shares, seed)
    assert torch.equal(split, split_classes(sizes, shares, seed))
    counts = torch.bincount(split.long(), minlength=3).tolist()
    assert all(abs(n - share * len(sizes)) <= 1 or n == 1 for n, share in zip(counts, shares, strict=True))
    if len(sizes) >= 40:
        large = sorted(range(len(sizes)), key=lambda c: -sizes[c])[: len(sizes) // 2]
        boundary = sizes[large[-1]]
        if sizes.count(boundary) == 1:
            of_large = torch.bincount(split[large].long(), minlength=3).tolist()
            assert all(abs(n - share * len(large)) <= 4 for n, share in zip(of_large, shares, strict=True))


def test_the_seed_matters():
    draws = {tuple(split_classes([5] * 20, (0.6, 0.2, 0.2), seed).tolist()) for seed in range(20)}
    assert len(draws) == 20


# ---- files


def save_npz(path):
    np.savez(path / "a.npz", features=X, labels=Y)
    return ["a.npz"]


def save_npys(path):
    np.save(path / "X.npy", X)
    np.save(path / "y.npy", Y)
    return ["X.npy", "y.npy"]


def save_pieces(path):
    for i, rows in enumerate((slice(0, 5), slice(5, 12))):
        np.savez(path / f"{i}.npz", X=X[rows], y=Y[rows])
    return ["0.npz", "1.npz"]


def save_csv(path):
    lines = ["a,label,b,note,c", *(f"{a},{y},{b},words,{c}" for (a, b, c), y in zip(X.tolist(), Y, strict=True))]
    (path / "t.csv").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    return ["t.csv"]


def save_parquet(path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"label": Y, **{c: X[:, i] for i, c in enumerate("abc")}}), path / "t.parquet")
    return ["t.parquet"]


def save_vectors(path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    vectors = pa.array(X.tolist(), type=pa.list_(pa.float32()))
    parquet.write_table(pa.table({"class": Y, "n": list(range(12)), "embedding": vectors}), path / "v.parquet")
    return ["v.parquet"]


def save_dataset(path):
    """As save_to_disk of datasets 4 leaves it: streams of record batches, labels as numbers that have names."""
    pa = pytest.importorskip("pyarrow")
    folder = path / "dataset"
    folder.mkdir()
    names = sorted(set(Y), reverse=True)
    vectors = pa.array(X.tolist(), type=pa.list_(pa.float32()))
    whole = pa.table({"embedding": vectors, "label": pa.array([names.index(y) for y in Y], pa.int64()), "text": Y})
    files = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, rows in zip(files, (whole.slice(0, 5), whole.slice(5)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as stream:
            stream.write_table(rows, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "0", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    described = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": described}))
    return ["dataset"]


def test_datasets_that_cannot_be_read_say_why(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    save_dataset(tmp_path)
    folder = tmp_path / "dataset"
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    state = json.loads((folder / "state.json").read_text())

    def refused(source, message):
        assert main(["import", str(source), "--out", str(tmp_path / "bank"), "--quiet"]) == 2
        assert message in capsys.readouterr().err

    refused(tmp_path / "splits", "a dataset of several splits; name one or more of them")
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    refused(folder, "its rows have an order of their own")
    (folder / "state.json").write_text("{")
    refused(folder, "not JSON")
    (folder / "state.json").write_text("{}")
    refused(folder, "does not say which files hold the rows")
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "data-00001-of-00002.arrow").write_bytes(b"nothing of the kind")
    refused(folder, "data-00001-of-00002.arrow")
    (folder / "data-00000-of-00002.arrow").unlink()
    refused(folder, "data-00000-of-00002.arrow")


WRITERS = [save_dataset, save_npz, save_npys, save_pieces, save_csv, save_parquet, save_vectors]


@pytest.mark.parametrize("write", WRITERS)
def test_files_become_a_bank(tmp_path, write, monkeypatch):
    monkeypatch.setattr("kernelmeta.data.tables.PIECE", 12)  # 4 rows
    monkeypatch.setattr("kernelmeta.data.tables._CSV_ROWS", 5)
    bank = import_files(tmp_path, *write(tmp_path))
    check(bank)
    assert sorted(bank.class_split.unique().tolist()) == [0, 1, 2]
    check(FeatureBank.load(tmp_path / "bank.safetensors"))  # and its checksum


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_become_a_bank(tmp_path, dtype):
    features = torch.from_numpy(X).to(dtype)
    save_file({"features": features, "y": CODES}, tmp_path / "t.safetensors")
    torch.save({"X": features, "labels": CODES}, tmp_path / "t.pt")
    kept = torch.float32 if dtype is torch.float64 else dtype
    for file in ("t.safetensors", "t.pt"):
        bank = import_files(tmp_path, file)
        assert bank.features.dtype is kept and torch.equal(bank.features, features.to(kept))
        assert bank.class_names == ("0", "1", "2", "3") and torch.equal(bank.labels, CODES)
    torch.save((features, CODES), tmp_path / "pair.pt")
    assert torch.equal(import_files(tmp_path, "pair.pt").labels, CODES)


def test_a_label_column_by_its_name(tmp_path):
    (tmp_path / "t.csv").write_text("x\tlabel\tkind\n" + "".join(f"{i}\t{i}\t{y}\n" for i, y in enumerate(Y)))
    bank = import_files(tmp_path, "t.csv", label="kind")
    assert bank.class_names == NAMES and bank.n_features == 2
    with pytest.raises(ValueError, match="no column 'species'; there are x, label, kind"):
        import_files(tmp_path, "t.csv", label="species")


CSV = {
    "": "empty",
    "1,2\n3,4\n": "expected a first line that names the columns",
    "a,label\n1,x,3\n": "line 2: expected 2 columns, got 3",
    "a,label\n1,x\nred,y\n2,z\n": "line 3, column 'a': expected a number, got 'red'",
    "a,label\n1,x\n2,\n": "row 1 has none",
    "a,b\n1,2\n": "no labels; --label names their column",
    "a,a,label\n1,2,x\n": "two columns are called 'a'",
    "label\nx\ny\nz\n": "none of the files holds any",
    "\n \n": "t.csv: empty; expected a line that names the columns",
    "a,label\n": "t.csv: no rows below its first line, which names the columns a, label",
    "a|label\n1|x\n": r"no labels; there are a\|label; expected commas, semicolons or tabs between columns",
    "sep=\na,label\n1,x\n": "not a text file of columns",
    "a,b,label\n1,2,x\n,,\n3,4,y\n": "labels: row 1 has none",
    "a,b,label\n0,5,0,7,x\n": "line 2: expected 3 columns, got 5",
    'a,label\n"0,5",x\n': "line 2, column 'a': '0,5' has a decimal comma; expected decimal points, or semicolons",
    "a;b;label\n1;2;x\n0,5;0.7;y\n": "line 3, column 'a': '0,5' has a decimal comma, but line 3, column 'b': '0.7' has",
    "a;label\n1.234,5;x\n": "line 2, column 'a': '1.234,5' has separators of thousands",
    "a,label\n1,x\nnan,y\n2,z\n": "row holds NaN or infinite features: row 1 \\(class 'y'\\)",
}


@pytest.mark.parametrize("text", CSV)
def test_what_is_wrong_with_a_table_is_said(tmp_path, text, capsys):
    (tmp_path / "t.csv").write_text(text)
    assert main(["import", str(tmp_path / "t.csv"), "--out", str(tmp_path / "bank.safetensors"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(CSV[text], error), error
    assert not (tmp_path / "bank.safetensors").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a;b;label\n0.5;-2;cat\n1;25e-1;dog\n",
        "a;b;label\n0,5;-2;cat\n1;25e-1;dog\n",
        "a;b;label\n0,5;-2,0;cat\n+1,0;,25e1;dog\n",
        "sep=;\na;b;label\n0,5;-2;cat\n1;2,5;dog\n",
        "a\tb\tlabel\n0.5\t-2\tcat\n1\t2.5\tdog\n",
        '"a";"b";"a, label, of, 1"\n0.5;-2;cat\n1;2.5;dog\n',
        "\n\na,b,label\n\n0.5,-2,cat\n1,2.5,dog\n\n  \n,,\n , ,\n\n",
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    (tmp_path / "t.csv").write_text(text.replace("\n", "\r\n"), newline="", encoding="utf-8-sig")
    said: list[str] = []
    label = "a, label, of, 1" if "a, label" in text else None
    bank = import_files(tmp_path, "t.csv", label=label, say=said.append)
    assert bank.features.tolist() == [[0.5, -2.0], [1.0, 2.5]]
    assert bank.class_names == ("cat", "dog")
    decimals = f"{tmp_path / 't.csv'}: commas in its numbers are read as decimal commas"
    assert [line for line in said if "split" not in line] == [decimals] * (
        re.search(r"\d,\d", text.partition(";")[2]) is not None
    )


def test_two_classes_are_a_bank_and_are_split_only_where_asked_for(tmp_path, capsys):
    """Cats and dogs: nothing to train on, but rows to label others by."""
    rows, bank = str(tmp_path / "t.csv"), str(tmp_path / "bank.safetensors")
    (tmp_path / "t.csv").write_text("a,b,label\n1,0,cat\n0,1,dog\n1,0.1,cat\n")
    assert main(["import", rows, "--out", bank, "--split", "60/20/20"]) == 2
    assert "split: expected at least 3 classes" in capsys.readouterr().err
    assert main(["import", rows, "--out", bank]) == 0
    said = capsys.readouterr()
    assert "too few classes to be split 60/20/20 (cat, dog): all are for training" in said.err
    assert "3 x 2 features; classes: 2 train, 0 val, 0 test" in said.out
    assert main(["predict", "prototypes", "--support", bank, "--query", rows, "--out", str(tmp_path / "o.csv")]) == 0
    assert "100.0 % of those that were labelled are right" in capsys.readouterr().out


def test_what_is_wrong_with_arrays_is_said(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "short.npy", Y[:5])
    np.save(tmp_path / "wide.npy", np.zeros((3, 7), np.float32))
    np.savez(tmp_path / "two.npz", a=X, b=X)
    FeatureBank.from_arrays(X, Y).save(tmp_path / "b.safetensors")
    (tmp_path / "words.pt").write_bytes(b"words")
    (tmp_path / "t.xlsx").write_bytes(b"")
    for files, message in {
        ("object.npy",): "not a NumPy file of numbers or text",
        ("X.npy",): "no labels",
        ("X.npy", "short.npy"): "more rows of features than the 5 labels",
        ("X.npy", "wide.npy", "short.npy"): "expected 3 features as in",
        ("two.npz",): "which array holds the features, a, b",
        ("b.safetensors",): "a feature bank already",
        ("words.pt",): "words.pt",
        ("t.xlsx",): "expected a file .npy",
    }.items():
        with pytest.raises(ValueError, match=message):
            import_files(tmp_path, *files)
    with pytest.raises(FileNotFoundError):
        import_files(tmp_path, "nowhere.npy")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text", "expected a tensor, a list or a dict of them, got str"),
        (None, "expected a tensor, a list or a dict of them, got NoneType"),
        ({"X": torch.eye(6).to_sparse(), "y": torch.arange(6)}, "X is sparse"),
        ({"X": torch.eye(6), "y": torch.arange(6).to_sparse()}, "y is sparse"),
        ({"X": torch.eye(6).to("meta"), "y": torch.arange(6)}, "X is on the meta device"),
        ({"X": torch.quantize_per_tensor(torch.eye(6), 1.0, 0, torch.qint8)}, "X is quantized"),
        ({"X": torch.nested.nested_tensor([torch.eye(2), torch.eye(3)])}, "X is nested"),
        ({"X": torch.eye(6), "y": [[1], [2, 3]]}, "y: setting an array element with a sequence"),
    ],
)
def test_what_torch_saves_that_is_no_plain_tensor_is_named(tmp_path, content, said):
    torch.save(content, tmp_path / "rows.pt")
    with pytest.raises(ValueError, match=f"rows.pt: {re.escape(said)}"):
        import_files(tmp_path, "rows.pt")


def test_the_command_and_then_training(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "X.npy", (rng.normal(size=(30, 1, 8)) + 0.3 * rng.normal(size=(30, 20, 8))).reshape(600, 8))
    np.save(tmp_path / "y.npy", np.repeat([f"class {i}" for i in range(30)], 20))
    bank, run = str(tmp_path / "bank.safetensors"), str(tmp_path / "run")
    assert main(["import", str(tmp_path / "X.npy"), str(tmp_path / "y.npy"), "--out", bank, "--quiet"]) == 0
    assert "600 x 8 features; classes: 18 train, 6 val, 6 test" in capsys.readouterr().out
    small = ["--learner", "prototypes", "--episodes", "20", "--eval-episodes", "20", "--query", "3", "--quiet"]
    assert main(["train", "--data", bank, "--out", run, *small]) == 0


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("kernelmeta.data.tables.PIECE", 1 << 16)
    monkeypatch.setattr("kernelmeta.data.tensor_files._PIECE", 1 << 20)
    X = np.lib.format.open_memmap(tmp_path / "X.npy", mode="w+", dtype=np.float32, shape=(40_000, 256))  # 41 MB
    X[:] = 1
    X.flush()
    np.save(tmp_path / "y.npy", np.arange(40_000) % 5)
    tracemalloc.start()
    import_files(tmp_path, "X.npy", "y.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
