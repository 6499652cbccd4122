"""Few-shot learners as scikit-learn knows classifiers; imported by who asks for ``kernelmeta.FewShotClassifier``."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "kernelmeta.FewShotClassifier needs scikit-learn 1.6 or later: pip install 'kernelmeta[sklearn]'"
    ) from error

from kernelmeta.data.label_codes import as_array
from kernelmeta.training.answers import Chosen, check_use, doubts, make_learner, probabilities
from kernelmeta.training.proportions import Proportions, proportions_of


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """A few labelled rows in, labels for others out; scikit-learn's contract.

    Features are used as they are: for columns of different scales put a ``StandardScaler`` before it, in a pipeline.

    Args:
        method: "soft_kmeans", "prototypes", "ridge", "sinkhorn_kmeans", "pt_map", "tim", "alpha_tim", "laplacian_shot",
            "bd_cspn", "logistic_regression", which need no training, or the learner that the weights are of: "sib",
            "equivariant", "anil", "combined" too. None: that of the weights, or soft k-means.
        weights: a run folder of ``kernelmeta train``, its checkpoint, or a published one.
        at: which weights of that run: "best", those that were best on its validation classes, or "last". None: the best
            where it has any.
        temperature: by which logits are divided for probabilities: above 1 these are less sure. None: the one that
            suits the validation classes of the run best, or 1 without a run. It changes no answer.
        transductive: the rows of one `predict` call are judged together, by a method that can (soft k-means, SIB, some
            programs). This is worth several points where they are a fair sample of all classes, and a loss where they
            are not: a call with one row, or with rows of one class, warns. With False each row is judged alone, which
            methods that share rows out among the classes ("sinkhorn_kmeans", "pt_map", "tim", "bd_cspn") cannot.
        proportions: the classes' shares of the rows of one `predict` call, as a mapping, label -> share, or as an array
            in the order of ``classes_``; they sum to 1. "soft_kmeans", "sinkhorn_kmeans", "pt_map" and "tim" take them.
            None: the last three take all classes to have equally many rows, and lose many points where that is wrong.
            For another call, `set_params` sets others; there is no need to fit again.
        counts: where the proportions are not known: how many rows of each class there were in a sample of such rows,
            likewise a mapping, label -> number, or an array. With n rows in all, a class with c of them has the share
            (c + 1) / (n + C), which soft k-means trusts the more, the more rows were counted.
        feature_transform: for a method without weights: "none", or "power:P", which takes a power of each, see
            :class:`kernelmeta.Transform`. None: the method's own. Weights come with theirs.
        feature_center: likewise: "none", or "task", which takes from the rows of a call their mean, so that they are
            judged together.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: D.

    Raises:
        ValueError: by `fit`: rows of one class alone, no such method, one that must be trained, weights that do not
            fit, proportions or counts that the method does not take or that are none; what scikit-learn's checks find
            in X and y.
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        weights: str | os.PathLike[str] | None = None,
        at: str | None = None,
        temperature: float | None = None,
        transductive: bool = True,
        proportions: Any = None,
        counts: Any = None,
        feature_transform: str | None = None,
        feature_center: str | None = None,
    ) -> None:
        self.method = method
        self.weights = weights
        self.at = at
        self.temperature = temperature
        self.transductive = transductive
        self.proportions = proportions
        self.counts = counts
        self.feature_transform = feature_transform
        self.feature_center = feature_center

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Take the labelled rows.

        Args:
            X: [n, D], an array or tensor of any float type.
            y: [n] labels of any type, of two classes or more; every class that there is must be among them.
        """
        X, y = validate_data(self, _array(X), _labels(y), dtype=_DTYPES)
        kinds = {type(label).__name__ for label in y} if y.dtype == object else set()
        if len(kinds) > 1:  # which have no order
            raise ValueError(f"y: expected labels of one type, got {', '.join(sorted(kinds))}")
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if self.temperature is not None and not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")
        if len(self.classes_) < 2:
            only = self.classes_.tolist()[0]
            raise ValueError(f"y: expected labels of at least two classes, got one class: {only!r}")
        try:
            chosen = make_learner(
                self.method, self.weights, len(self.classes_), X.shape[1], self.at, transform=self.feature_transform,
                center=self.feature_center,
            )  # fmt: skip
        except ValueError as error:  # in the words of this class
            message = str(error)
            named = f"feature_{message}" if message.startswith(("center: ", "transform: ")) else message
            raise ValueError(named) from None
        self.method_, self.learner_ = chosen.method, chosen.learner
        self.temperature_ = chosen.temperature if self.temperature is None else self.temperature
        self._known_proportions()
        self.support_ = torch.from_numpy(np.array(X))
        self.support_labels_ = torch.from_numpy(labels.reshape(-1).astype(np.int64))
        return self

    def predict_proba(self, X: Any) -> np.ndarray[Any, Any]:
        """Probabilities [n, C], in the order of ``classes_``. Warns where a transductive answer is doubtful."""
        check_is_fitted(self)
        known = self._known_proportions()
        X = validate_data(self, _array(X), dtype=_DTYPES, reset=False)
        query = torch.from_numpy(np.array(X)).to(self.support_.dtype)
        if self.transductive:
            doubt = doubts(self.learner_, self.support_, self.support_labels_, query, self.classes_.tolist(), known)
            if doubt is not None:
                warnings.warn(doubt, UserWarning, stacklevel=2)
        found = probabilities(
            self.learner_, self.support_, self.support_labels_, query, transductive=self.transductive,
            temperature=self.temperature_, proportions=known,
        )  # fmt: skip
        return found.double().numpy()

    def _known_proportions(self) -> Proportions | None:
        """As they are set now. Raises ValueError."""
        chosen = Chosen(self.method_, self.learner_, "")
        given = self.proportions is not None or self.counts is not None
        check_use(chosen, transductive=self.transductive, proportions=given)
        return proportions_of(self.proportions, self.counts, self.classes_.tolist())

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """The most probable label of each row, [n]."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]


_DTYPES = (np.float64, np.float32)


def _labels(y: Any) -> Any:
    """Labels as they are. A list that holds numbers and text, of which NumPy makes text, or None is refused."""
    if isinstance(y, (list, tuple)) and all(np.ndim(value) == 0 for value in y):
        missing = [row for row, label in enumerate(y) if label is None]
        if missing:
            raise ValueError(f"y: row {missing[0]} has no label (None)")
        y = as_array(y)
        texts = sum(isinstance(value, str) for value in y.tolist())
        if y.dtype == object and 0 < texts < len(y):
            raise ValueError("y: some labels are numbers and some are text; give all of them as one or the other")
        return np.asarray(y.tolist()) if y.dtype == object else y
    return _array(y)


def _array(values: Any) -> Any:
    """Tensors as NumPy arrays, what NumPy has no type for in float32; anything else as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
