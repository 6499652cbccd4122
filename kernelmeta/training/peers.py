"""Methods without anything to train: `kernelmeta compare` sets them beside the learners, and they answer for rows that
nobody has labelled.

To add one: a function in `kernelmeta.transductive` and an entry in `PEERS`, with settings to choose from in
`candidates.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelmeta import transductive
from kernelmeta.transforms import Transform


@dataclass(frozen=True)
class PeerKind:
    """One method.

    Args:
        title: as tables print it.
        method: f(support, support_labels, query, n_way=...) -> scores, other keywords are its settings.
        assumes_even: it takes the classes to have equally many query rows.
        takes_proportions: it takes their proportions instead, where they are known.
        transductive: it looks at the query rows.
    """

    title: str
    method: Callable[..., Tensor]
    assumes_even: bool = False
    takes_proportions: bool = False
    transductive: bool = True


PEERS: dict[str, PeerKind] = {
    "logistic_regression": PeerKind("logistic regression", transductive.logistic_regression, transductive=False),
    "laplacian_shot": PeerKind("LaplacianShot", transductive.laplacian_shot),
    "bd_cspn": PeerKind("BD-CSPN", transductive.bd_cspn, assumes_even=True),
    "alpha_tim": PeerKind("alpha-TIM", transductive.alpha_tim),
    "tim": PeerKind("TIM", transductive.tim, assumes_even=True, takes_proportions=True),
    "sinkhorn_kmeans": PeerKind(
        "Sinkhorn k-means", transductive.sinkhorn_kmeans, assumes_even=True, takes_proportions=True
    ),
    "pt_map": PeerKind("PT-MAP", transductive.pt_map, assumes_even=True, takes_proportions=True),
}
# Settings of the features, which every method without training takes.
TRANSFORM = ("transform", "center")


class Peer:
    """A method with its settings, called like a learner.

    Args:
        name: in `PEERS`.
        n_way: N.
        settings: of the method.

    Attributes:
        takes_proportions: it may be called with ``proportions``, [T, N].

    Raises:
        ValueError, TypeError: a setting that cannot be, named.
        ImportError: the method's package is not installed.
    """

    def __init__(self, name: str, n_way: int, settings: Mapping[str, Any]) -> None:
        kind = PEERS[name]
        known = set(inspect.signature(kind.method).parameters) - {"support", "support_labels", "query", "n_way"}
        for setting in settings:
            if setting not in known - {"proportions", "ragged"}:
                raise ValueError(f"{setting}: no such setting")
        self.kind, self.n_way, self.settings = kind, n_way, dict(settings)
        self.takes_proportions = kind.takes_proportions
        no_task = torch.zeros(0, n_way, 1)
        self(no_task, torch.zeros(0, n_way, dtype=torch.int64), no_task)  # looks at the settings

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, **more: Tensor) -> Tensor:
        return self.kind.method(support, labels, query, n_way=self.n_way, **self.settings, **more)


class Transformed:
    """A method on transformed features.

    Args:
        head: called like a learner.
        transform: of the features.
    """

    def __init__(self, head: Callable[..., Tensor], transform: Transform) -> None:
        self.head, self.transform = head, transform
        self.takes_proportions = getattr(head, "takes_proportions", False)

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, **more: Any) -> Tensor:
        support, query = self.transform(support, query, more.get("ragged"))
        return self.head(support, labels, query, **more)


class PeerLearner(Transformed):
    """A method with its settings and those of the features, as modules of `kernelmeta.nn` are called.

    Args:
        name: in `PEERS`.
        n_way: N.
        settings: of the method and of `TRANSFORM`, but for ``center="train"``, for which there are no training rows.

    Attributes:
        n_way: N.
        assumes_even, takes_proportions, transductive: see `PeerKind`.
        takes_ragged: it takes tasks of unequal size.

    Raises:
        ValueError, TypeError, ImportError: see `Peer` and `Transform`.
    """

    takes_ragged = True

    def __init__(self, name: str, n_way: int, settings: Mapping[str, Any]) -> None:
        own = {setting: value for setting, value in settings.items() if setting not in TRANSFORM}
        of_features = {setting: value for setting, value in settings.items() if setting in TRANSFORM}
        super().__init__(Peer(name, n_way, own), Transform(**of_features))
        kind = PEERS[name]
        self.n_way, self.assumes_even = n_way, kind.assumes_even
        self.transductive = kind.transductive or self.transform.center == "task"

    def from_bank(self, bank: Tensor, support: Tensor, labels: Tensor, query: Tensor, **more: Any) -> Tensor:
        """Rows by their numbers in the bank [n, D]."""
        return self(bank[support], labels, bank[query], **more)

    def eval(self) -> PeerLearner:
        return self

    def to(self, device: object) -> PeerLearner:
        return self
