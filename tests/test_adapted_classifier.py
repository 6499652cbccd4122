"""A task's classifier in a file: it gives the learner's own logits, in programs that do not know this package."""

from __future__ import annotations

import copy
import logging.handlers
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelmeta as km

torch.manual_seed(0)
T, N, D = 2, 3, 13
SUPPORT, QUERY = torch.randn(T, 9, D), torch.randn(T, 7, D)
LABELS = torch.arange(9).remainder(N).expand(T, -1).contiguous()
COMBINED = [km.nn.Phase("cross_entropy", 2, 0.1), km.nn.Phase("synthetic_gradient", 2, 0.01)]
LEARNERS = {
    "sib": lambda: km.nn.SIB(N, D, inner_lr=0.1),
    "equivariant": lambda: km.nn.EquivariantSIB(N, D),
    "prototypes": lambda: km.nn.Prototypes(N, D),
    "soft_kmeans": lambda: km.nn.SoftKMeans(N),
    "ridge": lambda: km.nn.RidgeHead(N),
    "anil": lambda: km.nn.ANIL(N, D),
    "cosine program": lambda: km.nn.Program(N, D, COMBINED),
    "linear program": lambda: km.nn.Program(N, D, COMBINED[:1], classifier="linear"),
}


def adapted(name: str) -> tuple[km.AdaptedClassifier, Tensor]:
    """The classifiers, and the logits [T, Q, N] of a learner with other scales and biases than at the start."""
    head = LEARNERS[name]().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    logits = head(SUPPORT, LABELS, QUERY).detach()
    with torch.no_grad():
        found = head.adapt(SUPPORT, LABELS, QUERY)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1)  # trained further: the classifiers stay what they are
    return found, logits


@pytest.mark.parametrize("name", LEARNERS)
def test_the_module_gives_the_logits_of_the_learner(name: str) -> None:
    classifier, logits = adapted(name)
    for task in range(T):
        torch.testing.assert_close(classifier.module(task)(QUERY[task]), logits[task], rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(classifier)
    torch.testing.assert_close(again.module(1)(QUERY[1]), logits[1], rtol=1e-5, atol=1e-5)


def run_onnx(path: Path, rows: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]) == (["rows"], ["logits"])
    return torch.from_numpy(session.run(None, {"rows": rows.numpy()})[0])


@pytest.mark.parametrize("name", LEARNERS)
def test_onnx_gives_the_logits_of_the_learner(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    classifier, logits = adapted(name)
    classifier.export(tmp_path / "c.onnx", task=1)
    assert [file.name for file in tmp_path.iterdir()] == ["c.onnx"]
    for n in (7, 1):
        torch.testing.assert_close(run_onnx(tmp_path / "c.onnx", QUERY[1, :n]), logits[1, :n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_exported_program_gives_the_logits_of_the_learner(name: str, tmp_path: Path) -> None:
    classifier, logits = adapted(name)
    classifier.export(tmp_path / "c.pt2", task=1)
    program = torch.export.load(tmp_path / "c.pt2").module()
    for n in (7, 1):
        torch.testing.assert_close(program(QUERY[1, :n]), logits[1, :n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_backbone_is_exported_with_its_classifier(suffix: str, tmp_path: Path) -> None:
    backbone = nn.Sequential(km.nn.Conv4(8, 1), nn.Flatten()).eval()
    images, labels = torch.randn(1, 8, 1, 16, 16), LABELS[:1, :8]
    with torch.no_grad():
        features = backbone(images[0])
    head = km.nn.Prototypes(N)
    classifier = head.adapt(features[None], labels)
    path = tmp_path / f"whole{suffix}"
    classifier.export(path, backbone=backbone, example=images[0])
    want = head(features[None], labels, features[None])[0].detach()
    for n in (8, 1):
        if suffix == ".onnx":
            pytest.importorskip("onnxscript", reason="onnxscript is not installed")
            found = run_onnx(path, images[0, :n])
        else:
            found = torch.export.load(path).module()(images[0, :n])
        torch.testing.assert_close(found, want[:n], rtol=1e-5, atol=1e-5)


def test_the_exporter_tells_nothing_of_itself(tmp_path: Path) -> None:
    """Which optional packages PyTorch does without, say; what the user's backbone warns of stays."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    class Warns(nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("of the backbone", UserWarning, stacklevel=1)
            return super().forward(x)

    told = logging.handlers.BufferingHandler(1000)
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    log.addHandler(told)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            classifier = km.nn.Prototypes(N).adapt(SUPPORT[:1], LABELS[:1])
            classifier.export(tmp_path / "c.onnx", backbone=Warns().eval(), example=SUPPORT[0])
    finally:
        log.removeHandler(told)
    assert [record.getMessage() for record in told.buffer] == []
    assert {str(warning.message) for warning in warned} == {"of the backbone"}


WHOLE = (SUPPORT, LABELS, QUERY)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_whole_learner_is_exported_as_a_program(name: str) -> None:
    torch.manual_seed(0)
    head = LEARNERS[name]().eval()
    for backend in ("cpu" if km.backends()["cpu"].available else "reference", "reference"):
        with km.use_backend(backend):
            program = torch.export.export(head, WHOLE).module()
            torch.testing.assert_close(program(*WHOLE), head(*WHOLE), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "ridge"])
def test_a_whole_learner_is_exported_as_onnx_through_the_reference(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.manual_seed(0)  # an MLP of which float32 keeps the digits
    head = LEARNERS[name]().eval()
    with km.use_backend("reference"):
        torch.onnx.export(head, WHOLE, dynamo=True, verbose=False).save(tmp_path / "whole.onnx")
    session = runtime.InferenceSession(str(tmp_path / "whole.onnx"), providers=["CPUExecutionProvider"])
    given = zip([i.name for i in session.get_inputs()], WHOLE, strict=True)
    found = torch.from_numpy(session.run(None, {name: t.numpy() for name, t in given})[0])
    torch.testing.assert_close(found, head(*WHOLE).detach(), rtol=1e-5, atol=1e-5)


def test_a_task_with_fewer_ways_has_no_class_beyond_them() -> None:
    offsets = torch.tensor([0, 9, 15])
    ragged = km.Ragged(offsets, torch.tensor([0, 7, 14]), torch.tensor([3, 2]))
    support, query = SUPPORT.flatten(0, 1)[:15], QUERY.flatten(0, 1)
    labels = torch.cat([LABELS[0], torch.arange(6).remainder(2)])
    head = km.nn.Prototypes(N)
    classifier = head.adapt(support, labels, ragged=ragged)
    logits = head(support, labels, query, ragged=ragged).detach()
    torch.testing.assert_close(classifier.module(1)(query[7:]), logits[7:, :2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "c.onnx"}, "task: there are the classifiers of 2 tasks; say which"),
        ({"path": "c.onnx", "task": 2}, r"task: expected 0\.\.1, got 2"),
        ({"path": "c.tflite", "task": 0}, r"path: expected a file \.onnx or \.pt2, got .*c\.tflite"),
        ({"path": "c.pt2", "task": 0, "backbone": nn.Identity().eval()}, "example: expected inputs of the backbone"),
        ({"path": "c.pt2", "task": 0, "example": QUERY}, "example: expected inputs of the backbone"),
        (
            {"path": "c.pt2", "task": 0, "backbone": nn.Linear(4, 5).eval(), "example": torch.zeros(1, 4)},
            r"backbone: expected features \[n, 13\], got shape \[2, 5\]",
        ),
        ({"path": "c.pt2", "task": 0, "backbone": nn.Identity(), "example": QUERY[0]}, r"call its eval\(\) first"),
    ],
)
def test_what_cannot_be_exported_is_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        adapted("prototypes")[0].export(tmp_path / given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


def test_without_onnx_it_says_what_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxscript'] = None; import torch, kernelmeta as km\n"
        "c = km.nn.Prototypes(2).adapt(torch.eye(2)[None], torch.arange(2)[None])\n"
        "c.export('c.pt2'); c.export('c.onnx')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "pip install 'kernelmeta[onnx]'" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt2"]
