"""A task's classifier to be used elsewhere: as a plain module, as ONNX, as an exported program."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelmeta.data.replacing import replacing
from kernelmeta.tasks import Classifier
from kernelmeta.transforms import Transform, parse_power, transformed

FORMATS = (".onnx", ".pt2")


CosineTerms = tuple[Tensor | float, Tensor | float]


class MakesClassifiers(Protocol):
    """A learner, as far as this file needs it."""

    @property
    def cosine_terms(self) -> CosineTerms | None: ...

    @property
    def feature_transform(self) -> Transform | None: ...


class AdaptedClassifier(Classifier):
    """What ``head.adapt`` returns: the `Classifier` of each of T tasks, and how its logits are computed.

    ``weight`` [T, N, D] and ``bias`` [T, N] are those of `Classifier`.
    """

    cosine_terms: CosineTerms | None
    """Scale and bias of the learner's cosine classifier; None for a linear one."""
    n_ways: Tensor | None
    """[T], the number of classes of each task, where they differ."""
    transform: Transform | None
    """What the learner does to rows; None where they stay as they are."""
    query_means: Tensor | None
    """[T, D], what ``center="task"`` takes from each task's rows; None for any other centre."""

    @classmethod
    def of(
        cls,
        classifier: Classifier,
        learner: MakesClassifiers,
        n_ways: Tensor | None = None,
        query_means: Tensor | None = None,
    ) -> AdaptedClassifier:
        """With the terms of the learner that made it.

        Args:
            classifier: of T tasks.
            learner: whose scale and bias a cosine classifier has, and whose transform of the rows.
            n_ways: [T], where they differ.
            query_means: [T, D], for ``center="task"``.
        """
        # Copies, for the learner may be trained further: its parameters may be part of all of these.
        self = cls(classifier.weight.clone(), classifier.bias.clone())
        terms = learner.cosine_terms
        self.cosine_terms = None if terms is None else (_of_now(terms[0]), _of_now(terms[1]))
        self.n_ways, self.query_means = n_ways, query_means
        transform = learner.feature_transform
        if transform is not None and transform.mean is not None:
            transform = replace(transform, mean=transform.mean.clone())
        self.transform = transform
        return self

    def module(self, task: int | None = None) -> RowClassifier:
        """The classifier of one task, rows [n, D] -> logits [n, N].

        Args:
            task: its number; None if there is one task alone.

        Raises:
            ValueError: no such task, or several and none named.
        """
        T = len(self.weight)
        if task is None and T != 1:
            raise ValueError(f"task: there are the classifiers of {T} tasks; say which")
        task = 0 if task is None else task
        if not 0 <= task < T:
            raise ValueError(f"task: expected 0..{T - 1}, got {task}")
        N = self.weight.shape[1] if self.n_ways is None else int(self.n_ways[task])
        weight, bias = self.weight[task, :N].detach(), self.bias[task, :N].detach()
        means = None if self.query_means is None else self.query_means[task].detach()
        if self.cosine_terms is None:
            return RowClassifier(weight, bias, unit=False, transform=self.transform, task_mean=means)
        scale, shift = (float(term) for term in self.cosine_terms)
        weight, bias = scale * F.normalize(weight, dim=1), bias + scale * shift
        return RowClassifier(weight, bias, unit=True, transform=self.transform, task_mean=means)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        task: int | None = None,
        backbone: nn.Module | None = None,
        example: Tensor | None = None,
    ) -> None:
        """Write one task's classifier to a file that needs this package no more.

        The program takes ``rows`` [n, D] of any number and returns ``logits`` [n, N]; with a backbone it takes what
        that takes.

        Args:
            path: ending with .onnx (needs ``pip install 'kernelmeta[onnx]'``) or .pt2 (``torch.export.load``).
            task: its number; None if there is one task alone.
            backbone: images or other inputs -> features [n, D]; exported with the classifier; in evaluation mode.
            example: inputs of the backbone, [n, ...]. Its sizes beside n stay those of the program.

        Raises:
            ImportError: ONNX was asked for and is not installed.
            OSError: the file cannot be written.
            ValueError: another ending, a backbone without an example or with other features, or `module`'s.
        """
        path = Path(path)
        if path.suffix not in FORMATS:
            raise ValueError(f"path: expected a file {' or '.join(FORMATS)}, got {path}")
        classifier = self.module(task)
        N, D = classifier.weight.shape
        if (backbone is None) != (example is None):
            raise ValueError("example: expected inputs of the backbone, where there is one, and only there")
        whole: nn.Module = classifier
        inputs = classifier.weight.new_zeros(2, D)
        if backbone is not None and example is not None:
            if backbone.training:
                raise ValueError("backbone: it is in training mode; call its eval() first")
            # (programs for any number of rows are traced with two)
            inputs = example[:1].expand(2, *example.shape[1:]).contiguous()
            with torch.no_grad():
                features = backbone(inputs)
            if features.shape != (2, D):
                raise ValueError(f"backbone: expected features [n, {D}], got shape {list(features.shape)}")
            whole = nn.Sequential(backbone, classifier)
        with torch.no_grad(), replacing(path) as temporary:
            write = _write_onnx if path.suffix == ".onnx" else _write_program
            write(whole.eval(), inputs, temporary)


class RowClassifier(nn.Module):
    """Rows [n, D] -> logits [n, N]: ``x weight^T + bias``, with rows of length 1 where ``unit`` says so.

    Args:
        weight: [N, D].
        bias: [N].
        unit: whether rows are divided by their length.
        transform: what is done to rows before; None for nothing.
        task_mean: [D], what ``center="task"`` takes from rows.
    """

    weight: Tensor
    bias: Tensor
    train_mean: Tensor | None
    task_mean: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        unit: bool,
        transform: Transform | None = None,
        task_mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.power = None if transform is None else parse_power(transform.transform)
        self.transforms = transform is not None
        means = {"train_mean": None if transform is None else transform.mean, "task_mean": task_mean}
        for name, mean in means.items():
            if mean is None:  # (torch.export stumbles over a buffer that is None)
                setattr(self, name, None)
            else:
                self.register_buffer(name, mean.detach().to(weight.dtype).clone())
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias.clone())
        self.unit = unit

    def forward(self, rows: Tensor) -> Tensor:
        """[n, D] -> [n, N]."""
        rows = rows.to(self.weight.dtype)
        if self.transforms:
            rows = transformed(rows, self.power, self.train_mean, self.task_mean)
        return F.linear(F.normalize(rows, dim=-1) if self.unit else rows, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"n_way={len(self.bias)}, n_features={self.weight.shape[1]}, unit={self.unit}"


def _of_now(term: Tensor | float) -> Tensor | float:
    return term.detach().clone() if isinstance(term, Tensor) else term


def _program(whole: nn.Module, inputs: Tensor) -> Any:
    return torch.export.export(whole, (inputs,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))


def _write_program(whole: nn.Module, inputs: Tensor, path: str | os.PathLike[str]) -> None:
    with open(path, "wb") as file:
        torch.export.save(_program(whole, inputs), file)


def _write_onnx(whole: nn.Module, inputs: Tensor, path: str | os.PathLike[str]) -> None:
    try:
        import onnxscript  # noqa: F401 (which PyTorch needs, with onnx)
    except ImportError:
        raise ImportError("ONNX needs onnx and onnxscript: pip install 'kernelmeta[onnx]'") from None
    with _quiet_exporter():
        program = torch.onnx.export(
            _program(whole, inputs), (inputs,), dynamo=True, input_names=["rows"], output_names=["logits"],
            verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(path, external_data=False)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """PyTorch's exporter tells which optional packages it does without, and what of itself will change; errors stay."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for about_torch in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", about_torch)
            yield
    finally:
        log.setLevel(level)
