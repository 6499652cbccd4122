"""Linear-quadratic fine-tuning of a small network as a learner (Achille et al., CVPR 2021), for every task anew."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kernelmeta import ops
from kernelmeta.linear.dynamics import kernel_ridge
from kernelmeta.nn.learner import Learner, check_even
from kernelmeta.reference.task_rows import as_labels, check_label_range, gathered, one_hot_targets
from kernelmeta.tasks import Classifier, Ragged


class LQF(Learner):
    """A perceptron that all tasks start from, linearised there and fitted to each task's support rows.

    The rows are scaled to length sqrt(D); the network, with leaky ReLUs, is moved by ridge regression in the space of
    its tangent kernel to one-hot targets times ``target_scale``, which is where weight decay leads (LQF's squared
    error, section 3.1 of the paper). Its weights, the strength of the decay and the scale of the logits are
    meta-learned, through the solution.

    Args:
        n_way: N.
        n_features: D.
        hidden: units of each hidden layer; one layer, or several with a sequence.
        target_scale: what the right class should get.
        regularization: starting value of the ridge, in units of the kernel's mean over a task's support rows.
        slope: of the leaky ReLU, below zero.
        transform, center: of the features, see :class:`Learner`.

    Parameters: ``weights`` and ``biases``, lists of those of the layers, ``log_regularization`` [1], ``scale`` [1].

    Raises:
        ValueError: an argument out of its range, named.
    """

    takes_ragged = False

    def __init__(
        self,
        n_way: int,
        n_features: int,
        hidden: int | tuple[int, ...] = 64,
        target_scale: float = 15.0,
        *,
        regularization: float = 0.1,
        slope: float = 0.01,
        transform: str = "none",
        center: str = "none",
    ) -> None:
        super().__init__(transform, center, n_features)
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        if n_way < 1 or n_features < 1 or not hidden or min(hidden) < 1:
            raise ValueError(
                f"n_way, n_features and hidden: expected at least 1, got {n_way}, {n_features} and {hidden}"
            )
        for name, value in (("target_scale", target_scale), ("regularization", regularization)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= slope < math.inf:
            raise ValueError(f"slope: expected a number of at least 0, got {slope}")
        self.n_way, self.n_features, self.hidden = n_way, n_features, hidden
        self.target_scale, self.slope = target_scale, slope
        layers = [nn.Linear(*sizes) for sizes in zip((n_features, *hidden), (*hidden, n_way), strict=True)]
        self.weights = nn.ParameterList(layer.weight for layer in layers)
        self.biases = nn.ParameterList(layer.bias for layer in layers)
        self.log_regularization = nn.Parameter(torch.tensor([math.log(regularization)]))
        self.scale = nn.Parameter(torch.ones(1))

    @property
    def _steps_on_query(self) -> bool:
        return False

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
        if return_weights:
            raise ValueError("return_weights: the classifier of LQF is a network, not one weight a class")
        labels = as_labels(support_labels)
        of_support, of_query = (
            normalize(gathered(rows, index, name), dim=-1) * math.sqrt(self.n_features)
            for rows, index, name in ((support, support_index, "support"), (query, query_index, "query"))
        )
        kernel = ops.ntk_gram(of_support, of_query, list(self.weights), list(self.biases), full=True, slope=self.slope)
        check_label_range(labels, self.n_way)
        targets = self.target_scale * one_hot_targets(labels, self.n_way, kernel.gram.dtype)
        # Each task's kernel in units of its own mean, which is what the ridge counts in.
        mean = kernel.gram.flatten(3).flatten(1, 2).diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1, 1, 1)
        fit = kernel_ridge(
            kernel.gram / mean, targets, kernel.cross / mean, regularization=self.log_regularization.exp(),
            support_outputs=kernel.support_outputs, query_outputs=kernel.query_outputs,
        )  # fmt: skip
        return self.scale * fit.outputs

    def extra_repr(self) -> str:
        return (
            f"n_way={self.n_way}, n_features={self.n_features}, hidden={self.hidden}, "
            f"target_scale={self.target_scale}, slope={self.slope}"
        )
