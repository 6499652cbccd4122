"""Every op that works on tasks, as one function of features and parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from episodes import draw
from torch import Tensor

import kernelmeta as km

ORACLES = list(km.phases.ORACLES)
CLASSIFIERS = ("cosine", "linear", "euclidean")
SUMS = {  # by name: terms, alpha
    "TIM": ("cross_entropy + 0.5*entropy - marginal_entropy", 1.0),
    "alpha-TIM": ("cross_entropy + entropy - marginal_entropy", 2.0),
    "sum of all kinds": ("0.5*squared_error + 0.1*synthetic_gradient@support + 0.2*assignment + hinge", 1.0),
    "weighted entropy": ("-0.5*entropy@support", 1.0),
}
Rows = tuple[Tensor, Tensor, Tensor]


def rows(T: int, S: int, Q: int, D: int, dtype: torch.dtype) -> Rows:
    """Support rows, labels and query rows of tasks of 3 ways."""
    random = torch.Generator().manual_seed(S)
    support, query = (torch.randn(T, n, D, generator=random).to(dtype) for n in (S, Q))
    return support.requires_grad_(), torch.arange(S).remainder(3).repeat(T, 1), query.requires_grad_()


def parameters(D: int, dtype: torch.dtype) -> list[Tensor]:
    """weight, scale, bias and the ten of the MLP, for 3 ways."""
    episode = draw(T=1, S=3, Q=2, N=3, D=D).map(lambda t: t.to(dtype)).fresh()
    return list(episode.leaves()[2:])


def sib(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    weight, scale, bias, *mlp = own
    return km.ops.sib(
        support, labels, query, weight, scale, bias, km.MLPParameters(*mlp), steps=2, inner_lr=0.01
    )  # fmt: skip


def program(oracle: str, of_rows: str | None, classifier: str, alpha: float = 1.0) -> Callable[..., Tensor]:
    """A phase of two steps; ``of_rows`` None: of a sum, whose terms say it."""
    shares = "proportions" in oracle or "assignment" in oracle.replace("soft_assignment", "")

    def run(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
        _, scale, bias, *mlp = own
        options: dict[str, object] = {"scale": scale} if classifier in ("cosine", "euclidean") else {}
        if classifier == "cosine":
            options["bias"] = bias
        if shares:
            options["proportions"] = torch.tensor([0.5, 0.3, 0.2], dtype=query.dtype).expand(query.shape[0], -1)
        if "equivariant_gradient" in oracle:
            with torch.random.fork_rng():
                torch.manual_seed(2)
                mlp = list(km.nn.EquivariantGradientMLP(4).to(query.dtype).tensors())
        marginals = "given" if shares else "none"
        phase = km.nn.Phase(oracle, 2, 0.01, rows=of_rows, marginals=marginals, alpha=alpha)
        return km.ops.program(
            support, labels, query, [phase], n_way=3, classifier=classifier, mlp=km.MLPParameters(*mlp), **options
        )

    return run


def ridge(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    _, scale, bias, *_ = own
    return km.ops.ridge(support, labels, query, scale, scale, bias, n_way=3)


def linear_head(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    start = torch.ones(3, support.shape[-1], dtype=support.dtype)
    return km.ops.linear_head(support, labels, query, start, start[:, 0] * 0, torch.full((2,), 0.1, dtype=start.dtype))


def class_means(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    return km.ops.class_means(support, labels, 3, own[0])


def ntk_gram(support: Tensor, labels: Tensor, query: Tensor, own: Sequence[Tensor]) -> Tensor:
    random, D = torch.Generator().manual_seed(1), support.shape[-1]
    weights = [torch.randn(size, generator=random).to(support.dtype) for size in ((9, D), (3, 9))]
    return km.ops.ntk_gram(support, query, weights).cross


CASES: dict[str, Callable[..., Tensor]] = {
    "sib": sib,
    "ridge": ridge,
    "linear_head": linear_head,
    "class_means": class_means,
    "ntk_gram": ntk_gram,
}
for classifier in CLASSIFIERS:
    for oracle in ORACLES:
        of_labels = oracle in ("cross_entropy", "squared_error", "hinge")
        if oracle != "soft_assignment" or classifier == "cosine":
            CASES[f"{classifier} {oracle}"] = program(oracle, "support" if of_labels else "query", classifier)
    for name, (oracle, alpha) in SUMS.items():
        CASES[f"{classifier} {name}"] = program(oracle, None, classifier, alpha)
for oracle, of_rows in (("cross_entropy", "support"), ("synthetic_gradient", "query")):
    CASES[f"dot {oracle}"] = program(oracle, of_rows, "dot")
