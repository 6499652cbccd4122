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
    ],
    ids=str,
)
def test_the_contract(classifier) -> None:
    expected = {}
    if classifier.method is None and classifier.transductive:
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


def test_without_scikit_learn_it_says_what_is_missing() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import kernelmeta as km; km.ops; km.FewShotClassifier"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "pip install 'kernelmeta[sklearn]'" in done.stderr
