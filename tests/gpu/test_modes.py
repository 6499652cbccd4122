"""Modes on a card: under autocast every learner and every plain function computes in the precision of its arguments,
and what plain PyTorch gives there is what it gives on a CPU. Skipped where there is none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from episodes import draw
from nn.test_modules import LEARNERS
from test_plain_functions import CALLS, tensors
from torch import Tensor, nn

import kernelmeta as km

REASON = km.backends()["cuda"].reason
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"needs a GPU: {REASON}")
LOW = (torch.bfloat16, torch.float16)


def on_card(what: Any) -> Any:
    """A tensor or a module there; a call with all that it was given there."""
    if isinstance(what, (Tensor, nn.Module)):
        return what.to("cuda")
    if isinstance(what, partial):
        named = {name: on_card(value) for name, value in what.keywords.items()}
        return partial(on_card(what.func), *map(on_card, what.args), **named)
    return what


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return bool(want) and all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_plain_functions(name: str) -> None:
    of_cpu, call = tensors(CALLS[name](2)()), on_card(CALLS[name](2))
    want = tensors(call())
    for a, b in zip(want, of_cpu, strict=True):
        assert a.is_cuda and a.dtype is b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4 * float(b.detach().double().abs().max()))
    for dtype in LOW:
        with torch.autocast("cuda", dtype):
            assert same(tensors(call()), want), dtype


@pytest.mark.parametrize("learner", LEARNERS)
def test_learners(learner: Any) -> None:
    """A first call in inference mode leaves nothing behind; autocast changes neither logits nor gradients."""
    episode = draw(dtype=torch.float32)
    support, labels, query = episode.support.cuda(), episode.labels.cuda(), episode.query.cuda()
    torch.manual_seed(0)
    head = learner(3, 13).cuda()
    with torch.inference_mode():
        head.eval()(support, labels, query)
    head.train()

    def run() -> list[Tensor]:
        rows = support.detach().requires_grad_(), query.detach().requires_grad_()
        logits = head(rows[0], labels, rows[1])
        leaves = [*rows, *(p for p in head.parameters() if p.requires_grad)]
        found = torch.autograd.grad(logits.square().sum(), leaves, allow_unused=True)
        return [logits.detach(), *(t for t in found if t is not None)]

    want = run()
    assert all(t.isfinite().all() for t in want)
    for dtype in LOW:
        with torch.autocast("cuda", dtype):
            assert same(run(), want), dtype
