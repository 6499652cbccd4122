"""SIB as a module (Hu et al., "Empirical Bayes Transductive Meta-Learning with Synthetic Gradients", ICLR 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelmeta import ops
from kernelmeta.adapted_classifier import CosineTerms
from kernelmeta.nn import xfer
from kernelmeta.nn.kept import KeptNumbers
from kernelmeta.nn.learner import check_even
from kernelmeta.nn.synthetic_gradient_mlp import SyntheticGradientMLP
from kernelmeta.nn.training_step import TrainsAtOnce
from kernelmeta.tasks import Classifier, Ragged

# The published names of what SyntheticGradientMLP calls weight1, bias1, ...
_XFER_MLP = {
    "weight1": "dni.layer1.0.weight",
    "bias1": "dni.layer1.0.bias",
    "gain1": "dni.layer1.2.weight",
    "shift1": "dni.layer1.2.bias",
    "weight2": "dni.layer2.0.weight",
    "bias2": "dni.layer2.0.bias",
    "gain2": "dni.layer2.2.weight",
    "shift2": "dni.layer2.2.bias",
    "weight3": "dni.layer3.weight",
    "bias3": "dni.layer3.bias",
}
_XFER_STATS = [f"dni.layer{i}.2.running_{kind}" for i in (1, 2) for kind in ("mean", "var")]


class SIB(TrainsAtOnce):
    """Proposes a cosine classifier from the support set and refines it on the unlabelled query rows.

    Args:
        n_way: N, the classes of a task.
        n_features: D.
        steps: K, synthetic-gradient steps.
        inner_lr: their learning rate.
        hidden: hidden units of the MLP; 8 N, as published, if None.
        norm_stats: whose statistics the MLP's BatchNorm uses, in training and in evaluation: "task" (each task its
            own), "batch" (all tasks of a call together, as the published code with several tasks; not fused),
            "running" (the running statistics, the published module in ``eval()``).
        reduction: "sum" of the synthetic gradient over the query rows, as published, or "mean".
        momentum: of the running statistics, which are updated in training mode once a step, and which only
            ``norm_stats="running"`` reads. With several tasks and "task" statistics they follow the tasks' average.
            torch.func transforms, which allow no side effects, leave them as they are.
        transform, center: of the features, see :class:`Learner`.

    Parameters: ``weight`` [D], ``scale`` [1], ``bias`` [1] and those of ``mlp``.

    Raises:
        ValueError: an argument out of its range, named.
    """

    def __init__(
        self,
        n_way: int,
        n_features: int,
        steps: int = 3,
        inner_lr: float = 1e-3,
        hidden: int | None = None,
        norm_stats: str = "task",
        *,
        reduction: str = "sum",
        momentum: float = 0.1,
        transform: str = "none",
        center: str = "none",
    ) -> None:
        super().__init__(transform, center, n_features)
        if n_features < 1:
            raise ValueError(f"n_features: expected at least 1, got {n_features}")
        if steps < 0:
            raise ValueError(f"steps: expected 0 or more, got {steps}")
        if norm_stats not in ("task", "batch", "running"):
            raise ValueError(f"norm_stats: expected one of task, batch, running, got {norm_stats!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: expected one of sum, mean, got {reduction!r}")
        self.n_way, self.n_features, self.steps, self.inner_lr = n_way, n_features, steps, inner_lr
        self.norm_stats, self.reduction, self.momentum = norm_stats, reduction, momentum
        self.weight = nn.Parameter(torch.ones(n_features))
        self.scale = nn.Parameter(torch.full((1,), 10.0))
        self.bias = nn.Parameter(torch.zeros(1))
        self.mlp = SyntheticGradientMLP(n_way, hidden, norm_stats)
        self._shares = KeptNumbers(_shares_of_steps)

    takes_ragged = False

    def _trained(self) -> Sequence[Tensor]:
        return (self.weight, self.scale, self.bias, *self.mlp.tensors())

    def _options(self, mlp: SyntheticGradientMLP) -> dict[str, Any]:
        """What both ops below take by name, the same at every call."""
        return {
            "mlp": mlp.tensors(), "running_stats": mlp.running_stats, "norm_stats": self.norm_stats,
            "steps": self.steps, "inner_lr": self.inner_lr, "reduction": self.reduction,
        }  # fmt: skip

    def _gradients(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, **index: Any
    ) -> tuple[ops.SIBGradients, Sequence[Tensor]]:
        results = ops.sib_gradients(
            support, support_labels, query, query_labels, self.weight, self.scale, self.bias,
            return_norm_stats=self._tracks(support_labels), **self._options(self.mlp), **index,
        )  # fmt: skip
        if results.norm_stats is not None:
            self._update_running_stats(results.norm_stats, self.mlp.running_stats)
        return results, results.gradients

    def _adapt(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        *,
        return_weights: bool = False,
        support_index: Tensor | None = None,
        query_index: Tensor | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor | tuple[Tensor, Classifier]:
        check_even(self, ragged)
        tracks, mlp = self._tracks(support_labels), self.mlp
        results: Any = ops.sib(
            support, support_labels, query, self.weight, self.scale, self.bias, return_weights=return_weights,
            return_norm_stats=tracks, support_index=support_index, query_index=query_index, **self._options(mlp),
        )  # fmt: skip
        if tracks:
            *results, stats = results
            self._update_running_stats(stats, mlp.running_stats)
            results = tuple(results) if return_weights else results[0]
        answer: Tensor | tuple[Tensor, Classifier] = results
        return answer

    def _tracks(self, labels: Tensor) -> bool:
        """Whether a call updates the running statistics."""
        return (
            self.training
            and self.norm_stats != "running"
            and self.steps > 0
            and labels.shape[0] > 0
            and not torch._C._are_functorch_transforms_active()
        )

    def _update_running_stats(self, stats: Tensor, running: Tensor) -> None:
        """One exponential update a step, [K, 2, 2, H], all steps in one product."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a backward pass that runs the forward pass again (torch.utils.checkpoint)
        K, keep = self.steps, 1 - self.momentum
        shares = self._shares((self.momentum, K), running)
        if stats.dtype is not running.dtype:
            stats = stats.to(running.dtype)
        running.view(1, -1).addmm_(shares, stats.view(K, -1), beta=keep**K)

    @staticmethod
    def from_xfer(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """A published checkpoint, or its ``SIB`` state_dict, as a state_dict of this module.

        Raises:
            ValueError: a key is missing or unknown, named.
        """
        names = ["wnLayerFavg.weight", "scale_cls", "bias", *_XFER_MLP.values(), *_XFER_STATS]
        found = xfer.take(xfer.part(checkpoint, "SIB"), names, "SIB checkpoint")
        stats = torch.stack([found[name] for name in _XFER_STATS])
        return {
            "weight": found["wnLayerFavg.weight"],
            "scale": found["scale_cls"],
            "bias": found["bias"],
            **{f"mlp.{ours}": found[theirs] for ours, theirs in _XFER_MLP.items()},
            "mlp.running_stats": stats.view(2, 2, -1),
        }

    @property
    def cosine_terms(self) -> CosineTerms | None:
        return (self.scale, self.bias)

    def extra_repr(self) -> str:
        return (
            f"n_way={self.n_way}, n_features={self.n_features}, steps={self.steps}, inner_lr={self.inner_lr}, "
            f"norm_stats={self.norm_stats!r}, reduction={self.reduction!r}"
        )


def _shares_of_steps(momentum: float, steps: int) -> tuple[tuple[float, ...]]:
    """What each step's statistics weigh in the running ones after the last step."""
    return (tuple(momentum * (1 - momentum) ** (steps - 1 - k) for k in range(steps)),)
