"""`kernelmeta predict`: from files to labels."""

from __future__ import annotations

import csv
import html
import html.parser
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_bank

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.data import FeatureBank
from kernelmeta.data.folders import scan_classes
from kernelmeta.training import prediction

rng = np.random.default_rng(1)
CENTRES = 3 * rng.normal(size=(3, 6))
NAMES = ["otter", "marten", "bad,ger"]


def rows(of_class: np.ndarray) -> np.ndarray:
    return (CENTRES[of_class] + rng.normal(size=(len(of_class), 6))).astype(np.float32)


SUPPORT_CLASSES, QUERY_CLASSES = np.repeat(np.arange(3), 2), rng.permutation(np.repeat(np.arange(3), 7))
SUPPORT, QUERY = rows(SUPPORT_CLASSES), rows(QUERY_CLASSES)


def table(path, X, labels=None, ids=None):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        head = [*(["id"] if ids else []), *(["label"] if labels else []), *(f"f{i}" for i in range(X.shape[1]))]
        writer.writerow(head)
        for i, row in enumerate(X.tolist()):
            writer.writerow([*([ids[i]] if ids else []), *([labels[i]] if labels else []), *row])
    return str(path)


@pytest.fixture
def support(tmp_path):
    return table(tmp_path / "support.csv", SUPPORT, [NAMES[c] for c in SUPPORT_CLASSES])


@pytest.fixture
def query(tmp_path):
    return table(tmp_path / "query.csv", QUERY, ids=[f"photo {i}" for i in range(len(QUERY))])


def answers(tmp_path, *args):
    out = tmp_path / "labels.csv"
    assert main(["predict", *map(str, args), "--out", str(out), "--quiet"]) == 0
    with open(out, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["soft_kmeans", "prototypes", "ridge"])
def test_labels_in_the_order_of_the_query(tmp_path, support, query, method, capsys):
    found = answers(tmp_path, method, "--support", support, "--query", query)
    assert [row["id"] for row in found] == [f"photo {i}" for i in range(len(QUERY))]
    assert list(found[0]) == ["id", "label", "probability", "runner_up"]
    assert np.mean([row["label"] == NAMES[c] for row, c in zip(found, QUERY_CLASSES, strict=True)]) > 0.9
    assert all(1 / 3 <= float(row["probability"]) <= 1 and row["runner_up"] != row["label"] for row in found)
    assert f"21 labels by {method}" in capsys.readouterr().out


def test_the_probabilities_are_those_of_the_learner(tmp_path, support, query):
    found = answers(tmp_path, "soft_kmeans", "--support", support, "--query", query)
    order = np.argsort(NAMES)  # classes are in the order of their names
    labels = torch.from_numpy(np.argsort(order)[SUPPORT_CLASSES])
    logits = km.nn.SoftKMeans(3)(torch.from_numpy(SUPPORT)[None], labels[None], torch.from_numpy(QUERY)[None])
    want = logits[0].softmax(-1).max(-1).values
    assert np.allclose([float(row["probability"]) for row in found], want, atol=2e-6)


def test_every_kind_of_file(tmp_path, support, query):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    want = answers(tmp_path, "ridge", "--support", support, "--query", query)
    columns = {f"f{i}": QUERY[:, i] for i in range(6)}
    parquet.write_table(pa.table({"id": [row["id"] for row in want], **columns}), tmp_path / "query.parquet")
    np.savez(tmp_path / "support.npz", X=SUPPORT, y=np.array(NAMES)[SUPPORT_CLASSES])
    np.save(tmp_path / "query.npy", QUERY)
    FeatureBank.from_arrays(SUPPORT, np.array(NAMES)[SUPPORT_CLASSES]).save(tmp_path / "support.safetensors")
    FeatureBank.from_arrays(QUERY, QUERY_CLASSES).save(tmp_path / "query.safetensors")
    for rows in ("support.npz", "support.safetensors"):
        found = answers(tmp_path, "ridge", "--support", tmp_path / rows, "--query", tmp_path / "query.parquet")
        assert found == want
    for rows in ("query.npy", "query.safetensors"):
        found = answers(tmp_path, "ridge", "--support", support, "--query", tmp_path / rows)
        assert [row["id"] for row in found] == [str(i) for i in range(21)]
        assert [row["label"] for row in found] == [row["label"] for row in want]


def test_a_trained_run(tmp_path, support, query, capsys):
    make_bank(D=6).save(tmp_path / "bank.safetensors")
    data = ["--data", str(tmp_path / "bank.safetensors"), "--out", str(tmp_path / "sib"), "--quiet"]
    assert main(["train", "--way", "3", "--query", "3", "--episodes", "40", "--eval-episodes", "0", *data]) == 0
    found = answers(tmp_path, tmp_path / "sib", "--support", support, "--query", query)
    assert np.mean([row["label"] == NAMES[c] for row, c in zip(found, QUERY_CLASSES, strict=True)]) > 0.8
    assert "by sib" in capsys.readouterr().out


def test_labels_of_the_query_are_compared(tmp_path, support, capsys):
    known = table(tmp_path / "known.csv", QUERY, [NAMES[c] for c in QUERY_CLASSES])
    found = answers(tmp_path, "ridge", "--support", support, "--query", known)
    right = 100 * np.mean([row["label"] == NAMES[c] for row, c in zip(found, QUERY_CLASSES, strict=True)])
    assert f"{right:.1f} % of those that were labelled are right" in capsys.readouterr().out


def test_labels_of_the_query_that_the_support_has_not_are_counted(tmp_path, support, capsys):
    known = table(tmp_path / "known.csv", np.r_[QUERY, QUERY[:4]], [*(NAMES[c] for c in QUERY_CLASSES), *["lynx"] * 4])
    answers(tmp_path, "ridge", "--support", support, "--query", known, "--report", tmp_path / "r.html")
    apart = "apart from 4 rows whose label is none of the support"
    assert f"are right, {apart}" in capsys.readouterr().out
    assert f"%, {apart}" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("kind", ["csv", "safetensors"])
def test_rows_that_are_not_finite_are_left_out_if_that_is_asked_for(tmp_path, support, kind, capsys):
    bad = QUERY.copy()
    bad[[3, 5], 1] = np.nan
    names = [NAMES[c] for c in QUERY_CLASSES]
    path = table(tmp_path / "bad.csv", bad, names)
    if kind == "safetensors":
        path = str(tmp_path / "bad.safetensors")
        replace(FeatureBank.from_arrays(QUERY, np.array(names)), features=torch.from_numpy(bad)).save(path)
    args = ["predict", "ridge", "--support", support, "--query", path, "--out", str(tmp_path / "labels.csv")]
    assert main(args) == 2
    assert "2 rows" in capsys.readouterr().err
    assert main([*args, "--skip-bad"]) == 0
    assert "left out: 2 rows with NaN or infinite features, counted from 0: 3, 5" in capsys.readouterr().err
    with open(tmp_path / "labels.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [str(i) for i in range(21) if i not in (3, 5)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", ["y", "class", "id"])
def test_a_feature_of_the_support_is_a_feature_of_the_query(tmp_path, name, kind):
    """... though a column of that name is taken for labels or names elsewhere."""
    pd = pytest.importorskip("pandas")
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    columns = ["x", name, *(f"f{i}" for i in range(4))]
    of_support = pd.DataFrame(SUPPORT, columns=columns).assign(label=[NAMES[c] for c in SUPPORT_CLASSES])
    for rows, frame in (("support", of_support), ("query", pd.DataFrame(QUERY, columns=columns))):
        path = tmp_path / f"{rows}.{kind}"
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    found = answers(tmp_path, "ridge", "--support", tmp_path / f"support.{kind}", "--query", tmp_path / f"query.{kind}")
    assert np.mean([row["label"] == NAMES[c] for row, c in zip(found, QUERY_CLASSES, strict=True)]) > 0.9


def test_the_report_holds_the_warnings_of_the_command(tmp_path, capsys):
    for name, X, backbone in (("support", SUPPORT, "one"), ("query", QUERY[QUERY_CLASSES == 0], "another")):
        labels = np.array(NAMES)[SUPPORT_CLASSES] if name == "support" else np.zeros(len(X), np.int64)
        replace(FeatureBank.from_arrays(X, labels), backbone=backbone).save(tmp_path / f"{name}.safetensors")
    files = [word for name in ("support", "query") for word in (f"--{name}", str(tmp_path / f"{name}.safetensors"))]
    page = tmp_path / "r.html"
    assert main(["predict", "soft_kmeans", *files, "--out", str(tmp_path / "l.csv"), "--report", str(page)]) == 0
    said = re.findall(r"warning: (.*)", capsys.readouterr().err)
    assert len(said) == 2 and "one" in said[0] and "--alone" in said[1]
    text = html.unescape(page.read_text())
    assert all(warning in text for warning in said) and "transductive=" not in text


def test_an_empty_class_folder_is_told(tmp_path):
    for colour, name in enumerate(("red", "green")):
        paint(tmp_path / name / "0.png", colour)
    (tmp_path / "blue").mkdir()
    assert "1 class folder without an image (blue)" in "".join(scan_classes(tmp_path).notes)


def test_doubts_are_said(tmp_path, support, capsys):
    one_class = table(tmp_path / "one.csv", QUERY[QUERY_CLASSES == 0])
    answers(tmp_path, "soft_kmeans", "--support", support, "--query", one_class)
    said = capsys.readouterr().err
    assert "belong to one class (otter)" in said and "--alone judges each row alone" in said
    answers(tmp_path, "soft_kmeans", "--support", support, "--query", one_class, "--alone")
    assert "warning" not in capsys.readouterr().err


def test_known_proportions(tmp_path, capsys):
    """Of rows of which most are of one class; a label holds a comma."""
    draw = np.random.default_rng(3)
    of_class = np.repeat(np.arange(3), [30, 3, 7])
    near = (CENTRES[of_class] + 3 * draw.normal(size=(40, 6))).astype(np.float32)
    of_support = table(tmp_path / "s.csv", SUPPORT, [NAMES[c] for c in SUPPORT_CLASSES])
    rows = table(tmp_path / "uneven.csv", near, [NAMES[c] for c in of_class])

    def right(*options):
        found = answers(tmp_path, "pt_map", "--support", of_support, "--query", rows, *options)
        return np.mean([row["label"] == NAMES[c] for row, c in zip(found, of_class, strict=True)])

    report = tmp_path / "report.html"
    told = right("--proportions", "otter=0.75,bad,ger=0.175, marten=0.075", "--report", report)
    assert "bad,ger 0.175, marten 0.075, otter 0.75" in report.read_text()
    assert told > right("--report", report) + 0.05
    assert "taken to be equal" in report.read_text()
    right("--counts", "otter=14,bad,ger=0, marten=3", "--report", report)
    assert "bad,ger 0.05, marten 0.2, otter 0.75" in report.read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["pt_map", "--proportions", "otter=0.5"], "no number for 'bad,ger', 'marten'"),
        (["pt_map", "--proportions", "otter=0.5,marten,bad,ger=0.5"], "there is no class 'marten,bad,ger'"),
        (["pt_map", "--proportions", "otter=0.5,marten=0.5,bad,ger=0.5"], "whose sum is 1.5"),
        (["pt_map", "--proportions", "otter=0.5,otter=0.5"], "'otter' is given twice"),
        (["pt_map", "--proportions", "otter=half"], "expected LABEL=NUMBER, or several with commas, got 'otter=half'"),
        (["pt_map", "--proportions", "otter=nan,marten=0.5,bad,ger=0.5"], "whose sum is nan"),
        (["pt_map", "--proportions", ""], "no number for"),
        (
            ["ridge", "--proportions", "otter=1"],
            "ridge takes none; these do: soft_kmeans, tim, sinkhorn_kmeans, pt_map",
        ),
        (["tim", "--proportions", "otter=1", "--alone"], "with --alone each row is judged alone, and one row has none"),
        (["tim", "--counts", "otter=3,bad,ger=1"], "counts: no number for 'marten'"),
        (["tim", "--counts", "otter=3,otter=1"], "counts: 'otter' is given twice"),
        (["tim", "--counts", "otter=3,bad,ger=1,marten=0.5"], "counts: expected whole numbers from 0"),
        (["tim", "--alone"], "--alone: tim shares the rows of a call out"),
    ],
)
def test_proportions_that_cannot_be(tmp_path, support, query, given, message, capsys):
    out = tmp_path / "labels.csv"
    assert main(["predict", *given, "--support", support, "--query", query, "--out", str(out), "--quiet"]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_single_row_with_proportions(tmp_path, support, capsys):
    one = table(tmp_path / "one.csv", QUERY[:1])
    shares = "otter=0.7,marten=0.2,bad,ger=0.1"
    (row,) = answers(tmp_path, "sinkhorn_kmeans", "--support", support, "--query", one, "--proportions", shares)
    assert (row["label"], float(row["probability"])) == ("otter", 0.7)  # it is told so
    assert "a single row has no others to be judged together with" in capsys.readouterr().err
    all_of_one = table(tmp_path / "all.csv", QUERY[QUERY_CLASSES == 0])
    answers(tmp_path, "sinkhorn_kmeans", "--support", support, "--query", all_of_one)
    assert "--proportions tells it how many rows each class has" in capsys.readouterr().err


class Page(html.parser.HTMLParser):
    """Looks at a page as a browser does: which tags are open, what is asked for from elsewhere."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elsewhere: list[str] = []
        self.images = 0
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith("data:"):
                self.elsewhere.append(value)
        self.images += tag == "img"

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def page(path) -> Page:
    found = Page()
    found.feed(path.read_text(encoding="utf-8"))
    assert found.open == [] and found.elsewhere == []
    return found


def test_the_report_is_complete_in_itself(tmp_path, support):
    ids = ["<script>alert(1)</script>", *(f"photo {i}" for i in range(1, len(QUERY)))]
    query = table(tmp_path / "query.csv", QUERY, ids=ids)
    report = tmp_path / "report.html"
    found = answers(tmp_path, "soft_kmeans", "--support", support, "--query", query, "--report", report)
    shown = page(report)
    assert "<script" not in report.read_text() and ids[0] in shown.text
    least = min(found, key=lambda row: float(row["probability"]))
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", report.read_text().split("The least certain first")[1])
    assert rows[0] == (least["id"], least["label"])
    assert "judged" in shown.text and "together" in shown.text
    assert support in shown.text and query in shown.text and "center" in shown.text


def test_labels_are_written_as_csv_alone(tmp_path, support, query, capsys):
    out = tmp_path / "labels.parquet"
    assert main(["predict", "ridge", "--support", support, "--query", query, "--out", str(out)]) == 2
    assert "labels are written as CSV" in capsys.readouterr().err and not out.exists()


def test_the_report_of_very_many_classes_stays_readable(tmp_path):
    many = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    support = table(tmp_path / "s.csv", many, [f"class <{i}>" for i in range(300)])
    report = tmp_path / "report.html"
    found = answers(tmp_path, "prototypes", "--support", support, "--query", support, "--report", report)
    assert len(found) == 300
    shown = page(report)
    assert "the 40 most frequent of 300" in shown.text
    assert report.read_text().count("<rect") == 40 + 10


def test_the_report_shows_long_names(tmp_path):
    names = ["a passably long name of a class", "a name of a class that is much too long for a plot & more"]
    support = table(tmp_path / "s.csv", np.eye(2, dtype=np.float32), names)
    report = tmp_path / "report.html"
    answers(tmp_path, "prototypes", "--support", support, "--query", support, "--report", report)
    bars = report.read_text().partition("<svg")[2].partition("</svg>")[0]
    assert f">{names[0]}</text>" in bars
    assert f">{names[1][:31]}…<title>{names[1].replace('&', '&amp;')}</title></text>" in bars


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_report(tmp_path, support, query):
    report = tmp_path / "report.html"
    answers(tmp_path, "soft_kmeans", "--support", support, "--query", query, "--report", report)
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    command = [BROWSER, *quiet, "--dump-dom", report.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert "<h1>21 answers of soft_kmeans</h1>" in done.stdout
    assert done.stdout.count("<tr>") == 21 + 1 + 12 and done.stdout.count("<svg") == 2


def paint(path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 60, (32, 32, 3))
    noise[..., colour] += 180
    Image.fromarray(noise.astype(np.uint8)).save(path)


def test_photos_in_folders(tmp_path, capsys):
    from kernelmeta.training.backbones import make_backbone

    torch.manual_seed(0)
    torch.save(make_backbone("conv4", 3, 32).state_dict(), tmp_path / "conv4.pt")
    for colour, name in enumerate(("red", "green", "blue")):
        for i in range(3):
            paint(tmp_path / "known" / name / f"{i}.png", colour)
        for i in range(4):
            paint(tmp_path / "new" / f"{name}-{i}.png", colour)
    report = tmp_path / "report.html"
    folders = ["--support", tmp_path / "known", "--query", tmp_path / "new", "--report", report]
    found = answers(tmp_path, "prototypes", *folders, "--weights", tmp_path / "conv4.pt", "--backbone", "conv4")
    assert [row["id"] for row in found] == sorted(f"{n}-{i}.png" for n in ("red", "green", "blue") for i in range(4))
    assert all(row["id"].startswith(row["label"]) for row in found)
    assert page(report).images == 12
    capsys.readouterr()
    assert main(["predict", "ridge", *map(str, folders), "--out", str(tmp_path / "x.csv")]) == 2
    assert "give the --weights of a backbone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"what": "sib"}, "sib must be trained"),
        ({"what": "nothing"}, "nothing: neither a run, nor one of soft_kmeans, prototypes, ridge,"),
        ({"what": "soft_kmean"}, "pt_map; did you mean soft_kmeans?"),
        ({"support": "query.csv"}, "support: no labels"),
        (
            {"query": "wide.csv"},
            "expected the same columns of features as in the other file, got them with f6; a column of",
        ),
        ({"query": "nan.csv"}, "1 row with NaN or infinite features, counted from 0: 2"),
        ({"support": "one.csv"}, "support: expected labels of at least two classes, got one class: 'otter'"),
        ({"query": "empty.csv"}, "empty.csv"),
        ({"query": "missing.csv"}, "missing.csv"),
        ({"support": "unlabelled.csv"}, "row 1 has none"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, support, query, given, message, capsys):
    table(tmp_path / "wide.csv", np.zeros((3, 7)))
    table(tmp_path / "nan.csv", np.where(np.arange(4)[:, None] == 2, np.nan, np.ones((4, 6))))
    table(tmp_path / "one.csv", SUPPORT[:2], ["otter", "otter"])
    table(tmp_path / "unlabelled.csv", SUPPORT[:3], ["otter", "", "marten"])
    (tmp_path / "empty.csv").write_text("f0,f1,f2,f3,f4,f5\n")
    where = {"support": support, "query": query, **{k: str(tmp_path / v) for k, v in given.items() if k != "what"}}
    out = tmp_path / "labels.csv"
    rows = ["--support", where["support"], "--query", where["query"], "--out", str(out), "--quiet"]
    assert main(["predict", given.get("what", "ridge"), *rows]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_label_column_of_another_name(tmp_path, capsys):
    for name, X, labels in (("s.csv", SUPPORT, SUPPORT_CLASSES), ("q.csv", QUERY, QUERY_CLASSES)):
        lines = ["kind,a,b,c,d,e,f", *(f"{c},{','.join(map(str, row))}" for c, row in zip(labels, X, strict=True))]
        (tmp_path / name).write_text("\n".join(lines))
    rows = ["--support", tmp_path / "s.csv", "--query", tmp_path / "q.csv", "--label", "kind"]
    found = answers(tmp_path, "ridge", *rows)  # the query's own column is no feature
    assert np.mean([int(row["label"]) == c for row, c in zip(found, QUERY_CLASSES, strict=True)]) > 0.9


def shuffled(path, columns, X):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"f{i}" for i in columns])
        writer.writerows(X[:, columns].tolist())
    return str(path)


def test_columns_are_matched_by_their_names(tmp_path, support, query, capsys):
    want = [row["label"] for row in answers(tmp_path, "prototypes", "--support", support, "--query", query)]
    other = shuffled(tmp_path / "shuffled.csv", [4, 2, 0, 5, 1, 3], QUERY)
    assert [row["label"] for row in answers(tmp_path, "prototypes", "--support", support, "--query", other)] == want
    fewer = shuffled(tmp_path / "fewer.csv", [4, 2, 0, 5, 1], QUERY)
    rows = ["--support", support, "--query", fewer, "--out", str(tmp_path / "out.csv"), "--quiet"]
    assert main(["predict", "prototypes", *rows]) == 2
    assert "got them without f3" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1e-20, 1e30])
@pytest.mark.parametrize("method", ["prototypes", "soft_kmeans", "ridge"])
def test_rows_that_cannot_be_compared_are_named(tmp_path, support, method, size, capsys):
    X = QUERY.copy()
    X[3] *= size
    bad = table(tmp_path / "bad.csv", X)
    out = tmp_path / "out.csv"
    assert main(["predict", method, "--support", support, "--query", bad, "--out", str(out), "--quiet"]) == 2
    assert "query: 1 rows are too large or too small to be compared: the largest feature of row 3" in (
        capsys.readouterr().err
    )
    assert not out.exists()
    classifier = km.FewShotClassifier(method=method).fit(SUPPORT, SUPPORT_CLASSES)
    with pytest.raises(ValueError, match="rescale the features"):
        classifier.predict(X)


def test_no_output_takes_the_place_of_an_input(tmp_path, support, query, capsys):
    before = Path(support).read_text()
    for out, report in ((support, None), (query, None), (str(tmp_path / "a.csv"), str(tmp_path / "a.csv"))):
        more = [] if report is None else ["--report", report]
        rows = ["--support", support, "--query", query, "--out", out, "--quiet"]
        assert main(["predict", "ridge", *rows, *more]) == 2
        assert "would take the place of" in capsys.readouterr().err
    assert Path(support).read_text() == before
    assert main(["import", support, "--out", support, "--quiet"]) == 2
    assert Path(support).read_text() == before


def test_from_arrays_and_photos_to_labels(tmp_path, monkeypatch):
    """The commands of the README, as they stand there; timm, which would download, is stood in for."""

    def pixels(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((2, 2)), np.float32)).permute(2, 0, 1) / 255

    timm = SimpleNamespace(
        list_models=lambda: ["resnet18"],
        create_model=lambda name, pretrained, num_classes: torch.nn.Flatten() if pretrained else None,
        data=SimpleNamespace(
            resolve_model_data_config=lambda module: {},
            create_transform=lambda is_training: lambda image: pixels(image),
        ),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.chdir(tmp_path)
    features, names = [], []
    for colour, name in enumerate(("red", "green", "blue")):
        for i in range(3):
            paint(tmp_path / "labelled" / name / f"{i}.png", colour)
            paint(tmp_path / "photos" / f"{name}-{i}.png", colour)
            features.append(pixels(Image.open(tmp_path / "labelled" / name / f"{i}.png")).flatten().numpy())
            names.append(name)
    np.save("X.npy", np.stack(features))
    np.save("y.npy", np.array(names))
    np.save("new.npy", np.stack(features[::-1]))
    table(tmp_path / "labelled.csv", np.stack(features), names)
    table(tmp_path / "rows.csv", np.stack(features[::-1]))
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    part = readme[readme.index("## Labels for your rows") : readme.index("## Drop-in")]
    commands = [shlex.split(line) for line in re.findall(r"(?m)^    (kernelmeta .*)$", part)]
    assert [words[1] for words in commands] == ["predict", "import", "predict", "predict", "predict"]
    found = []
    for words in commands:
        assert main(words[1:]) == 0
        if words[1] == "predict":
            with open("labels.csv", newline="") as file:
                found.append(list(csv.DictReader(file)))
    for of_rows in found[:2]:
        assert [row["label"] for row in of_rows] == names[::-1]
    for of_photos in found[2:]:
        assert len(of_photos) == 9 and all(row["id"].startswith(row["label"]) for row in of_photos)


def test_a_backbone_is_used_or_refused_and_images_that_cannot_be_read_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("looks_at_colours.py").write_text(
        "import torch\n"
        "class Colours(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.flatten(2).mean(-1)\n"
        "def colours():\n"
        "    return Colours()\n"
    )
    for colour, name in enumerate(("red", "green", "blue")):
        for i in range(2):
            paint(tmp_path / "known" / name / f"{i}.png", colour)
            paint(tmp_path / "photos" / f"{name}-{i}.png", colour)
    rows = ["--support", "known", "--query", "photos"]
    found = answers(tmp_path, "soft_kmeans", *rows, "--backbone", "looks_at_colours:colours")
    assert len(found) == 6 and all(row["id"].startswith(row["label"]) for row in found)
    assert main(["predict", "soft_kmeans", *rows, "--backbone", "conv4", "--out", "out.csv"]) == 2
    assert "--backbone: conv4 needs --weights" in capsys.readouterr().err
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    command = ["predict", "soft_kmeans", *rows, "--backbone", "looks_at_colours:colours", "--out", "out.csv"]
    assert main(command) == 2
    assert "--skip-bad goes on without" in capsys.readouterr().err
    again = answers(tmp_path, "soft_kmeans", *rows, "--backbone", "looks_at_colours:colours", "--skip-bad")
    assert [row["id"] for row in again] == [row["id"] for row in found]


@pytest.mark.parametrize(
    ("what", "given", "message"),
    [
        ("softkmeans", {}, "neither a run, nor one of"),
        ("prototypes", {"--out": "photos"}, "--out: photos is a folder"),
        ("prototypes", {"--report": "photos"}, "--report: photos is a folder"),
        ("prototypes", {"--support": "photos"}, "support: no labels"),
        ("prototypes", {"--support": "one"}, "support: expected labels of at least two classes, got one class: 'red'"),
        ("prototypes", {"--query": "empty"}, "empty: no images, and no folders of images"),
    ],
)
def test_mistakes_are_found_before_any_image_is_looked_at(tmp_path, monkeypatch, what, given, message, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "load_backbone", lambda *_: pytest.fail("too late"))
    for colour, name in enumerate(("red", "green")):
        paint(tmp_path / "known" / name / "0.png", colour)
        paint(tmp_path / "photos" / f"{name}.png", colour)
    paint(tmp_path / "one" / "red" / "0.png", 0)
    (tmp_path / "empty").mkdir()
    options = {"--support": "known", "--query": "photos", "--out": "labels.csv", "--backbone": "timm:resnet18"}
    assert main(["predict", what, *(word for pair in (options | given).items() for word in pair)]) == 2
    assert message in capsys.readouterr().err


def test_classes_of_a_bank_of_photos_are_called_as_their_folders_are():
    split = torch.tensor([0, 2], dtype=torch.uint8)
    for given, want in (
        (("train/red", "test/blue"), ["red", "blue"]),
        (("train/red", "test/red"), ["train/red", "test/red"]),  # which would be one
        (("red", "test/blue"), ["red", "test/blue"]),
    ):
        bank = FeatureBank(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), split, given, "a test")
        assert list(prediction._without_split(bank)) == want
