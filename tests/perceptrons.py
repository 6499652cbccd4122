"""Random perceptrons and rows for the tests of neural tangent kernels, and the network as a function of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, jacrev, vmap


class Rows(NamedTuple):
    support: Tensor
    query: Tensor
    weights: list[Tensor]
    biases: list[Tensor] | None

    def leaves(self) -> list[Tensor]:
        return [self.support, self.query, *self.weights, *(self.biases or ())]

    def fresh(self, dtype: torch.dtype | None = None) -> Rows:
        """Copies that require gradients, perhaps in another precision."""

        def copy(t: Tensor) -> Tensor:
            return t.detach().to(dtype or t.dtype).clone().requires_grad_()

        biases = None if self.biases is None else [copy(b) for b in self.biases]
        return Rows(copy(self.support), copy(self.query), [copy(w) for w in self.weights], biases)


def draw(
    widths: Sequence[int] = (11, 13, 12, 4), T: int = 2, S: int = 7, Q: int = 9, *, biased: bool = True, seed: int = 0
) -> Rows:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    weights = [normal(n, m) / m**0.5 for m, n in pairwise(widths)]
    biases = [0.3 * normal(n) for n in widths[1:]] if biased else None
    return Rows(normal(T, S, widths[0]), normal(T, Q, widths[0]), weights, biases)


# How rows may be out of the ordinary: what is done to support and query rows, and the network's widths.
UNUSUAL = {
    "one feature": ((1, 5, 3), lambda s, q: (s, q)),
    "one output": ((11, 13, 1), lambda s, q: (s, q)),
    "repeated rows": ((11, 13, 4), lambda s, q: (s[:, [0, 0, 1, 1, 2, 2, 2]], torch.cat([s[:, :2], q[:, :1]], 1))),
    "collinear rows": ((11, 13, 4), lambda s, q: (s[:, :1] * torch.tensor([1.0, 3, -1, 0.5, -2, 7, 2])[:, None], q)),
    "zero rows": ((11, 13, 4), lambda s, q: (s * (torch.arange(7) > 2)[:, None], q * (torch.arange(9) > 3)[:, None])),
    "huge rows": ((11, 13, 4), lambda s, q: (1e8 * s, 1e8 * q)),
    "tiny rows": ((11, 13, 4), lambda s, q: (1e-8 * s, 1e-8 * q)),
}


def unusual(name: str) -> Rows:
    """Rows of `UNUSUAL`, and a network with biases for them."""
    widths, change = UNUSUAL[name]
    rows = draw(widths)
    support, query = change(rows.support, rows.query)
    return rows._replace(support=support, query=query).fresh()


@st.composite
def sizes(draw: Any) -> dict[str, Any]:
    """Arguments of `draw`, and ``slope``."""
    widths = draw(st.lists(st.integers(1, 40), min_size=2, max_size=5))
    return {
        "widths": (*widths[:-1], min(widths[-1], 6)), "T": draw(st.integers(1, 3)), "S": draw(st.integers(1, 20)),
        "Q": draw(st.integers(1, 20)), "biased": draw(st.booleans()), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def network(rows: Rows, slope: float) -> torch.nn.Sequential:
    """As a module."""
    layers: list[torch.nn.Module] = []
    for i, weight in enumerate(rows.weights):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=rows.biases is not None, dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if rows.biases is not None:
                layer.bias.copy_(rows.biases[i])
        layers += [layer, torch.nn.LeakyReLU(slope)]
    return torch.nn.Sequential(*layers[:-1])


def jacobian(module: torch.nn.Module, x: Tensor) -> Tensor:
    """[rows, N, parameters]."""
    parameters = dict(module.named_parameters())
    found = vmap(jacrev(lambda p, row: functional_call(module, p, (row[None],))[0]), (None, 0))(parameters, x)
    return torch.cat([j.flatten(2) for j in found.values()], -1)
