"""An installed kernelmeta, outside its source tree: the ops of the backend named, against the reference."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

import kernelmeta as km
from kernelmeta.backends import select
from kernelmeta.mlp_parameters import MLPParameters

expected = sys.argv[1]
root = Path(__file__).resolve().parents[1]
assert root not in Path(km.__file__).resolve().parents, f"imported from the source tree: {km.__file__}"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert select("cpu") == expected, km.backends()["cpu"].reason
assert len(caught) == (expected == "reference"), [str(w.message) for w in caught]

T, S, Q, N, D, H, K = 3, 5, 12, 5, 37, 40, 3
torch.manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) / 3


mlp = MLPParameters(
    random(H, N), random(H), 1 + random(H), random(H),
    random(H, H), random(H), 1 + random(H), random(H),
    random(N, H), random(N),
)  # fmt: skip
support, query = random(T, S, D), random(T, Q, D)
labels = torch.arange(S).expand(T, S) % N
weight, scale, bias = 1 + random(D), torch.full((1,), 10.0).double(), random(1)
leaves = [support, query, weight, scale, bias, *mlp]
for leaf in leaves:
    leaf.requires_grad_()


def results() -> list[torch.Tensor]:
    logits = km.ops.sib(support, labels, query, weight, scale, bias, mlp, steps=K, inner_lr=0.1)
    guess = km.ops.synthetic_gradient_mlp(logits.detach(), mlp)
    theta0 = km.ops.class_means(support, labels, N, weight)
    loss = logits.square().mean() + guess.square().mean() + theta0.square().mean()
    return [logits, guess, theta0, *torch.autograd.grad(loss, leaves)]


ours = results()
with km.use_backend("reference"):
    theirs = results()
for mine, reference in zip(ours, theirs, strict=True):
    torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)
print(f"kernelmeta {km.__version__} from {Path(km.__file__).parent}: {expected} agrees with the reference")
