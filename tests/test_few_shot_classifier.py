"""`kernelmeta.FewShotClassifier` among scikit-learn's classifiers."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from runs import make_bank

import kernelmeta as km
from kernelmeta.cli import main
from kernelmeta.training.loading import load_learner

sklearn = pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn is not installed")

from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_iris  # noqa: E402
from sklearn.model_selection import cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

rng = np.random.default_rng(0)
CENTRES = 3 * rng.normal(size=(4, 16))
NAMES = np.array(["wolf", "bear", "lynx", "deer"])
TOLD = ("soft_kmeans", "sinkhorn_kmeans", "pt_map", "tim")  # methods that take proportions


def rows(of_class: np.ndarray) -> np.ndarray:
    return CENTRES[of_class] + rng.normal(size=(len(of_class), 16))


SUPPORT_CLASSES, QUERY_CLASSES = np.repeat(np.arange(4), 3), np.repeat(np.arange(4), 10)
SUPPORT, QUERY = rows(SUPPORT_CLASSES), rows(QUERY_CLASSES)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A SIB for four classes of sixteen features."""
    folder = tmp_path_factory.mktemp("run")
    make_bank(D=16).save(folder / "bank.safetensors")
    data = ["--data", str(folder / "bank.safetensors"), "--out", str(folder / "sib"), "--quiet"]
    assert main(["train", "--way", "4", "--query", "3", "--episodes", "40", "--eval-episodes", "0", *data]) == 0
    return str(folder / "sib")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "classifier",
    [
        km.FewShotClassifier("prototypes"),
        km.FewShotClassifier("ridge"),
        km.FewShotClassifier(),
        km.FewShotClassifier(transductive=False),
        *map(km.FewShotClassifier, [*TOLD[1:], "alpha_tim", "laplacian_shot", "bd_cspn", "logistic_regression"]),
    ],
    ids=str,
)
def test_the_contract(classifier) -> None:
    expected = {}
    if classifier.method not in ("prototypes", "ridge", "logistic_regression") and classifier.transductive:
        expected["check_methods_subset_invariance"] = "the rows of a call are judged together"
    check_estimator(classifier, expected_failed_checks=expected)


@pytest.mark.parametrize("method", [None, "prototypes", "ridge"])
@pytest.mark.parametrize("labels", [NAMES, np.array([10, -1, 7, 3]), np.array([True, False]), NAMES.astype(object)])
def test_labels_of_any_type(method, labels) -> None:
    few = len(labels) > SUPPORT_CLASSES
    classifier = km.FewShotClassifier(method).fit(SUPPORT[few], labels[SUPPORT_CLASSES[few]])
    query = len(labels) > QUERY_CLASSES
    answers = classifier.predict(QUERY[query])
    assert answers.dtype == labels.dtype
    assert np.mean(answers == labels[QUERY_CLASSES[query]]) > 0.9
    shares = classifier.predict_proba(QUERY[query])
    assert shares.shape == (query.sum(), len(labels)) and np.allclose(shares.sum(1), 1)
    assert classifier.score(QUERY[query], labels[QUERY_CLASSES[query]]) > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors(dtype) -> None:
    classifier = km.FewShotClassifier().fit(torch.tensor(SUPPORT, dtype=dtype), torch.from_numpy(SUPPORT_CLASSES))
    assert np.mean(classifier.predict(torch.tensor(QUERY, dtype=dtype)) == QUERY_CLASSES) > 0.9


def test_scikit_learns_tools() -> None:
    X, y = load_iris(return_X_y=True, as_frame=False)
    y = np.array(["setosa", "versicolor", "virginica"])[y]
    pipeline = make_pipeline(StandardScaler(), km.FewShotClassifier("prototypes"))
    assert cross_val_score(pipeline, X, y, cv=5).mean() > 0.75
    pipeline.set_params(fewshotclassifier__method="ridge")
    assert clone(pipeline).fit(X, y)[-1].method_ == "ridge"
    fitted = km.FewShotClassifier().fit(SUPPORT, NAMES[SUPPORT_CLASSES])
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(QUERY), fitted.predict_proba(QUERY))


def test_trained_weights(run) -> None:
    classifier = km.FewShotClassifier(weights=run).fit(SUPPORT, NAMES[SUPPORT_CLASSES])
    assert classifier.method_ == "sib"
    head, settings = load_learner(run)
    labels = classifier.support_labels_[None]
    logits = head.double()(torch.from_numpy(SUPPORT)[None], labels, torch.from_numpy(QUERY)[None])[0]
    want = (logits / settings["temperature"]).softmax(-1)
    assert np.abs(classifier.predict_proba(QUERY) - want.detach().numpy()).max() < 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "knn"}, "method: expected one of soft_kmeans, prototypes"),
        ({"method": "sib"}, "sib must be trained; give the weights"),
        ({"feature_center": "tsk"}, "^feature_center: expected one of none, task, train, got 'tsk'"),
        ({"feature_transform": "sqrt"}, "^feature_transform: expected 'none' or 'power:P'"),
        ({"method": "ridge", "weights": "run"}, "are of sib"),
        ({"weights": "run", "classes": 3}, "was trained for 4 classes at a time, not 3"),
        ({"weights": "run", "features": 9}, "was trained on 16 features, but the rows have 9"),
    ],
)
def test_what_does_not_fit_is_named(run, given, message) -> None:
    given = dict(given)
    few = given.pop("classes", 4) > SUPPORT_CLASSES
    X = SUPPORT[few][:, : given.pop("features", 16)]
    if "weights" in given:
        given["weights"] = run
    with pytest.raises(ValueError, match=message):
        km.FewShotClassifier(**given).fit(X, SUPPORT_CLASSES[few])


def test_numbers_and_text_among_the_labels_are_not_merged() -> None:
    with pytest.raises(ValueError, match="y: some labels are numbers and some are text"):
        km.FewShotClassifier().fit(SUPPORT, [1, "1", 2, 3] * (len(SUPPORT) // 4))
    with pytest.raises(ValueError, match=r"y: row 3 has no label \(None\)"):
        km.FewShotClassifier().fit(SUPPORT, ["a", "b", "c", None] * (len(SUPPORT) // 4))
    mixed = [2.0, 1, 2, 3] * (len(SUPPORT) // 4)
    assert km.FewShotClassifier().fit(SUPPORT, mixed).classes_.tolist() == [1, 2, 3]


def test_a_learner_of_any_number_of_classes(tmp_path) -> None:
    make_bank(D=16).save(tmp_path / "bank.safetensors")
    data = ["--data", str(tmp_path / "bank.safetensors"), "--out", str(tmp_path / "run"), "--quiet"]
    small = ["--learner", "ridge", "--query", "3", "--episodes", "20", "--eval-episodes", "0"]
    assert main(["train", *small, *data]) == 0  # 5-way
    classifier = km.FewShotClassifier(weights=tmp_path / "run").fit(SUPPORT, SUPPORT_CLASSES)
    assert classifier.predict_proba(QUERY).shape == (40, 4)


def test_rows_judged_together_and_alone() -> None:
    together = km.FewShotClassifier().fit(SUPPORT, SUPPORT_CLASSES)
    alone = km.FewShotClassifier(transductive=False).fit(SUPPORT, SUPPORT_CLASSES)
    part = QUERY[::3]
    assert np.abs(together.predict_proba(QUERY)[::3] - together.predict_proba(part)).max() > 1e-4
    assert np.abs(alone.predict_proba(QUERY)[::3] - alone.predict_proba(part)).max() < 1e-9


def test_doubtful_query_sets_warn() -> None:
    classifier = km.FewShotClassifier().fit(SUPPORT, NAMES[SUPPORT_CLASSES])
    with pytest.warns(UserWarning, match="a single row has no others to be judged together with"):
        classifier.predict(QUERY[:1])
    with pytest.warns(UserWarning, match="100 % of these rows belong to one class"):
        classifier.predict(QUERY[:10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict(QUERY)
        for quiet in (km.FewShotClassifier(transductive=False), km.FewShotClassifier("ridge")):
            quiet.fit(SUPPORT, NAMES[SUPPORT_CLASSES]).predict(QUERY[:1])


def test_many_rows_are_judged_in_parts(monkeypatch) -> None:
    classifiers = [km.FewShotClassifier("ridge"), km.FewShotClassifier(transductive=False)]
    want = [c.fit(SUPPORT, SUPPORT_CLASSES).predict_proba(QUERY) for c in classifiers]
    monkeypatch.setattr("kernelmeta.training.answers._ROWS", 7)
    monkeypatch.setattr("kernelmeta.training.answers._TASKS", 7)
    for classifier, whole in zip(classifiers, want, strict=True):
        assert np.abs(classifier.predict_proba(QUERY) - whole).max() < 1e-12


def test_rows_alone_are_alone_where_a_call_couples_its_tasks(run, monkeypatch) -> None:
    head = km.nn.SIB(4, 16, norm_stats="batch").double().eval()
    head.tasks_together = 4  # as a training with four tasks a step leaves it
    monkeypatch.setattr("kernelmeta.training.answers.load_learner", lambda path, at: (head, {"learner": "sib"}))
    classifier = km.FewShotClassifier(weights=run, transductive=False).fit(SUPPORT, SUPPORT_CLASSES)
    assert np.abs(classifier.predict_proba(QUERY)[::3] - classifier.predict_proba(QUERY[::3])).max() < 1e-12


# Rows of the classes in the order of NAMES, of which there are 60.
UNEVEN = np.array([33, 3, 18, 6])
SHARES = dict(zip(NAMES.tolist(), (UNEVEN / 60).tolist(), strict=True))


def noisy_task(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One labelled row of each class, and 60 rows to label, unevenly spread: X, y, X, y."""
    draw = np.random.default_rng(seed)
    support, query = np.arange(4), np.repeat(np.arange(4), UNEVEN)
    X, rest = (CENTRES[own] + 3 * draw.normal(size=(len(own), 16)) for own in (support, query))
    return X, NAMES[support], rest, NAMES[query]


@pytest.mark.parametrize("method", TOLD)
def test_known_proportions_help(method) -> None:
    even, told = [], []
    for seed in range(20):
        X, y, query, answers = noisy_task(seed)
        even.append(km.FewShotClassifier(method).fit(X, y).score(query, answers))
        told.append(km.FewShotClassifier(method, proportions=SHARES).fit(X, y).score(query, answers))
    assert np.mean(told) > np.mean(even) + 0.05


@pytest.mark.parametrize("method", TOLD)
def test_proportions_in_every_form(method) -> None:
    X, y, query, _ = noisy_task(0)
    want = km.FewShotClassifier(method, proportions=SHARES).fit(X, y).predict_proba(query)
    in_order = np.array([SHARES[name] for name in sorted(SHARES)])
    for given in (in_order, in_order.tolist(), torch.from_numpy(in_order), in_order.astype(np.float32)):
        found = km.FewShotClassifier(method, proportions=given).fit(X, y).predict_proba(query)
        assert np.abs(found - want).max() < 1e-4
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    series = pandas.Series(SHARES).sort_values()  # in another order than the classes
    found = km.FewShotClassifier(method, proportions=series).fit(X, y).predict_proba(query)
    assert np.abs(found - want).max() < 1e-12
    if method in ("sinkhorn_kmeans", "pt_map"):  # the others only lean towards the proportions
        assert np.abs(want.mean(0) - in_order).max() < 0.02
    of_numbers = km.FewShotClassifier(method, proportions={1: 0.1, 0: 0.55, 3: 0.05, 2: 0.3}).fit(X, [0, 3, 2, 1])
    named = km.FewShotClassifier(method, proportions={"1": 0.1, "0": 0.55, "3": 0.05, "2": 0.3}).fit(X, list("0321"))
    assert np.array_equal(of_numbers.predict(query).astype(str), named.predict(query))


def test_proportions_of_another_call() -> None:
    X, y, query, answers = noisy_task(1)
    classifier = km.FewShotClassifier("pt_map", proportions=SHARES).fit(X, y)
    first = classifier.predict_proba(query)
    part = answers != "wolf"
    other = {name: float(np.mean(answers[part] == name)) for name in NAMES.tolist()}
    classifier.set_params(proportions=other)
    found = classifier.predict(query[part])
    assert "wolf" not in found  # of which there are none
    assert np.array_equal(found, clone(classifier).fit(X, y).predict(query[part]))
    again = pickle.loads(pickle.dumps(classifier.set_params(proportions=SHARES)))
    assert np.array_equal(again.predict_proba(query), first)
    classifier.set_params(proportions={**SHARES, "wolf": 0.5})
    with pytest.raises(ValueError, match="proportions: expected shares of 0 or more that sum to 1"):
        classifier.predict(query)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wolf": 0.5, "bear": 0.5}, "no number for 'deer', 'lynx'; the classes are 'bear', 'deer', 'lynx', 'wolf'"),
        ({**SHARES, "fox": 0.0}, "there is no class 'fox'"),
        ({"wolf": 0.4, "bear": 0.2, "lynx": 0.2, "deer": 0.1}, r"got \[0.2, 0.1, 0.2, 0.4\], whose sum is 0.9"),
        ([0.5, 0.5, 0.5, -0.5], r"0 or more that sum to 1, got \[0.5, 0.5, 0.5, -0.5\]"),
        ([0.25, 0.25, 0.25, 0.25 + 3e-6], "whose sum is 1.000003"),
        ([0.5, 0.5, np.nan, 0.0], "whose sum is nan"),
        ([0.5, 0.5, np.inf, 0.0], "whose sum is inf"),
        (
            [0.5, 0.5],
            r"expected 4 numbers, one for each of the classes 'bear', 'deer', 'lynx', 'wolf', got \[0.5, 0.5\]",
        ),
        (1.0, "expected 4 numbers"),
        ({"wolf": 6, "bear": 2, "lynx": 1, "deer": 1}, "whose sum is 10; rows that were counted are given as counts"),
        ("wolf=1", "expected a mapping, label -> number, or numbers, got 'wolf=1'"),
        ({"wolf": "many", "bear": 0.2, "lynx": 0.2, "deer": 0.1}, "or numbers, got"),
    ],
)
def test_proportions_that_are_none(given, message) -> None:
    classifier = km.FewShotClassifier("pt_map", proportions=given)  # nothing is looked at before fit
    with pytest.raises(ValueError, match=f"proportions: .*{message}"):
        classifier.fit(SUPPORT, NAMES[SUPPORT_CLASSES])


@pytest.mark.parametrize("method", TOLD)
def test_counted_proportions(method) -> None:
    X, y, query, _ = noisy_task(0)
    counts = {"wolf": 11, "bear": 0, "lynx": 6, "deer": 3}  # of 20 rows; no bear happened to be among them
    shares = {name: (count + 1) / 24 for name, count in counts.items()}
    counted = km.FewShotClassifier(method, counts=counts).fit(X, y).predict_proba(query)
    in_order = km.FewShotClassifier(method, counts=torch.tensor([0, 3, 6, 11])).fit(X, y).predict_proba(query)
    assert np.array_equal(counted, in_order)
    as_known = km.FewShotClassifier(method, proportions=shares).fit(X, y).predict_proba(query)
    difference = np.abs(counted - as_known).max()
    assert difference > 1e-3 if method == "soft_kmeans" else difference < 1e-12  # which trusts them less
    more = {name: 10**7 * count for name, count in counts.items()}
    many = km.FewShotClassifier(method, counts=more).fit(X, y).predict_proba(query)
    known = km.FewShotClassifier(method, proportions={name: n / 20 for name, n in counts.items()}).fit(X, y)
    assert np.abs(many - known.predict_proba(query)).max() < 1e-3


def test_counted_proportions_help() -> None:
    without, counted = [], []
    for seed in range(40):
        X, y, query, answers = noisy_task(seed)
        counts = np.random.default_rng(seed).multinomial(30, [SHARES[name] for name in sorted(SHARES)])
        without.append(km.FewShotClassifier().fit(X, y).score(query, answers))
        counted.append(km.FewShotClassifier(counts=counts).fit(X, y).score(query, answers))
    assert np.mean(counted) > np.mean(without) + 0.02


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"counts": {"wolf": 3, "bear": 1}}, "counts: no number for 'deer', 'lynx'"),
        ({"counts": [3, 1, -1, 2]}, "counts: expected whole numbers from 0"),
        ({"counts": [0.5, 0.2, 0.2, 0.1]}, "counts: expected whole numbers from 0.*; shares are given as proportions"),
        ({"counts": [0, 0, 0, 0]}, "at least one of them above"),
        ({"counts": [1, 2, 3, np.nan]}, "counts: expected whole numbers"),
        ({"counts": [1, 2, 3, 4], "proportions": SHARES}, "counts: expected either proportions or counts, got both"),
        ({"counts": [1, 2, 3, 4], "method": "ridge"}, "proportions: ridge takes none"),
        ({"counts": [1, 2, 3, 4], "transductive": False}, "each row is judged alone"),
    ],
)
def test_counts_that_are_none(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        km.FewShotClassifier(**given).fit(SUPPORT, NAMES[SUPPORT_CLASSES])


def test_who_takes_no_proportions(run) -> None:
    takes = "these do: soft_kmeans, tim, sinkhorn_kmeans, pt_map"
    for options in ({"method": "ridge"}, {"method": "prototypes"}, {"method": "laplacian_shot"}, {"weights": run}):
        with pytest.raises(ValueError, match=f"proportions: [a-z_]* takes none; {takes}"):
            km.FewShotClassifier(**options, proportions=SHARES).fit(SUPPORT, NAMES[SUPPORT_CLASSES])
    with pytest.raises(ValueError, match="proportions: with transductive=False each row is judged alone"):
        km.FewShotClassifier("tim", proportions=SHARES, transductive=False).fit(SUPPORT, NAMES[SUPPORT_CLASSES])
    for method in (*TOLD[1:], "bd_cspn"):
        with pytest.raises(ValueError, match=f"transductive=False: {method} shares the rows of a call out"):
            km.FewShotClassifier(method, transductive=False).fit(SUPPORT, SUPPORT_CLASSES)
    for method in ("alpha_tim", "laplacian_shot"):
        alone = km.FewShotClassifier(method, transductive=False).fit(SUPPORT, SUPPORT_CLASSES)
        assert np.abs(alone.predict_proba(QUERY)[::3] - alone.predict_proba(QUERY[::3])).max() < 1e-9
        assert alone.score(QUERY, QUERY_CLASSES) > 0.9


@pytest.mark.parametrize("options", [{}, {"method": "ridge"}, {"method": "tim", "proportions": {"wolf": 1.0}}])
def test_one_class_alone_is_refused(options) -> None:
    with pytest.raises(ValueError, match=r"y: expected labels of at least two classes, got one class: 'wolf'"):
        km.FewShotClassifier(**options).fit(SUPPORT, ["wolf"] * len(SUPPORT))


@pytest.mark.parametrize("method", TOLD)
def test_doubts_where_proportions_are_known(method) -> None:
    bears, of_bears = QUERY[QUERY_CLASSES == 1], {"wolf": 0.0, "bear": 1.0, "lynx": 0.0, "deer": 0.0}
    told = km.FewShotClassifier(method, proportions=of_bears).fit(SUPPORT, NAMES[SUPPORT_CLASSES])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (told.predict(bears) == "bear").all()
    with pytest.warns(UserWarning, match="a single row has no others to be judged together with; prototypes and ridge"):
        assert np.isfinite(told.predict_proba(bears[:1])).all()
    with pytest.warns(UserWarning, match=r"belong to one class \(bear\), whose proportion is given as 5 %"):
        told.set_params(proportions=SHARES).predict(bears)
    with pytest.warns(UserWarning, match="over all 4 classes; proportions= tells it how many rows each class has"):
        told.set_params(proportions=None).predict(bears)


def test_rows_that_are_not_finite_are_named_with_proportions_too() -> None:
    classifier = km.FewShotClassifier("pt_map", proportions=SHARES).fit(SUPPORT, NAMES[SUPPORT_CLASSES])
    with pytest.raises(ValueError, match="NaN"):
        classifier.predict(np.where(np.arange(16) == 3, np.nan, QUERY))


def test_without_scikit_learn_it_says_what_is_missing() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import kernelmeta as km; km.ops; km.FewShotClassifier"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "pip install 'kernelmeta[sklearn]'" in done.stderr


@pytest.mark.parametrize("odd", [None, 3.0])
def test_labels_of_several_types_are_one_clear_error(odd):
    y = np.array(["cat", "dog", odd, "cat"], object)
    with pytest.raises(ValueError, match=f"y: expected labels of one type, got {type(odd).__name__}, str"):
        km.FewShotClassifier().fit(np.eye(4), y)
