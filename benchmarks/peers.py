"""The peers: other ways to compute SIB, each as a runner for one problem.

Every runner does the same work from the same inputs: in mode "forward" the logits; otherwise logits, mean cross
entropy and fresh gradients. It returns (logits, gradients) so that agreement.py can check it before it is timed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import forms
from benchmarks.problem import Inputs, Problem, Size
from kernelmeta import nn, ops
from kernelmeta.mlp_parameters import MLPParameters

Result = tuple[Any, list[Any]]  # logits [T, Q, N]; gradients (none in mode "forward")
PeerRunner = Callable[[int], Result]


class Unavailable(Exception):
    """This peer cannot run this problem; the message says why."""


class Peer(NamedTuple):
    """A way to compute SIB."""

    title: str
    prepare: Callable[[Problem, str], PeerRunner]  # problem, mode -> runner; raises Unavailable
    norm_stats: str = "task"  # whose statistics its BatchNorm uses


def _cross_entropy(logits: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), answers.flatten())


def _ready(inputs: Inputs, mode: str) -> Inputs:
    """The features require gradients in mode "train+features"."""
    wanted = mode == "train+features"
    return inputs._replace(
        support=inputs.support.detach().clone().requires_grad_(wanted),
        query=inputs.query.detach().clone().requires_grad_(wanted),
    )


def _torch_runner(problem: Problem, mode: str, call: Callable[[Inputs], Tensor], leaves: list[Tensor]) -> PeerRunner:
    """Plain autograd around ``call``."""
    batches = [_ready(i, mode) for i in problem.inputs]

    def forward(i: int) -> Result:
        with torch.no_grad():
            return call(batches[i % len(batches)]), []

    def train(i: int) -> Result:
        batch = batches[i % len(batches)]
        learned = leaves if mode == "train" else [*leaves, batch.support, batch.query]
        for leaf in learned:
            leaf.grad = None
        logits = call(batch)
        _cross_entropy(logits, batch.answers).backward()
        return logits.detach(), [leaf.grad for leaf in learned]

    return forward if mode == "forward" else train


def _of_form(head: forms.Head) -> Callable[[Problem, str], PeerRunner]:
    def prepare(problem: Problem, mode: str) -> PeerRunner:
        leaves = problem.parameters.fresh().leaves()
        wide = leaves[0].dtype

        def call(batch: Inputs) -> Tensor:
            return head(batch.support.to(wide), batch.labels, batch.query.to(wide), *leaves)

        return _torch_runner(problem, mode, call, leaves)

    return prepare


def _module(problem: Problem) -> tuple[nn.SIB, list[Tensor]]:
    """km.nn.SIB with the problem's parameters."""
    size = problem.size
    module = nn.SIB(size.N, size.D, size.K, problem.inner_lr).to(problem.parameters.weight)
    leaves = [module.weight, module.scale, module.bias, *module.mlp.tensors()]
    with torch.no_grad():
        for leaf, value in zip(leaves, problem.parameters.leaves(), strict=True):
            leaf.copy_(value)
    return module, leaves


def _kernelmeta(problem: Problem, mode: str) -> PeerRunner:
    module, leaves = _module(problem)
    module.train(mode != "forward")
    return _torch_runner(problem, mode, lambda b: module(b.support, b.labels, b.query), leaves)


def _at_once(problem: Problem, mode: str) -> PeerRunner:
    if mode != "train":
        raise Unavailable("it gives the gradients of the parameters, no more and no less")
    module, leaves = _module(problem)

    def train(i: int) -> Result:
        batch = problem.inputs[i % len(problem.inputs)]
        for leaf in leaves:
            leaf.grad = None
        logits = module.gradients(batch.support, batch.labels, batch.query, batch.answers).logits
        return logits, [leaf.grad for leaf in leaves]

    return train


def parts_of_training(problem: Problem, mode: str) -> dict[str, Callable[[int], Any]]:
    """A training step through autograd, and what it consists of; "mlp": its K passes forward and K back."""
    module, leaves = _module(problem)
    size = problem.size
    weights = MLPParameters(*leaves[3:])
    batches = [_ready(i, mode) for i in problem.inputs]
    own_logits = torch.randn(size.T, size.Q, size.N, requires_grad=True)

    def forward(i: int) -> Tensor:
        batch = batches[i % len(batches)]
        found: Tensor = module(batch.support, batch.labels, batch.query)
        return found

    def loss(logits: Tensor, i: int) -> None:
        batch = batches[i % len(batches)]
        for leaf in (*leaves, own_logits, batch.support, batch.query):
            leaf.grad = None
        _cross_entropy(logits, batch.answers).backward()

    def mlp(_: int) -> None:
        for _ in range(size.K):
            ops.synthetic_gradient_mlp(own_logits, weights).backward(own_logits.detach())

    return {
        "all": lambda i: loss(forward(i), i),
        "forward": forward,
        "cross entropy": partial(loss, own_logits),
        "mlp": mlp,
    }


def _too_large(size: Size, limit: int) -> None:
    if limit < size.T * size.K * size.N:
        raise Unavailable(f"T x K x N = {size.T * size.K * size.N}: left out above {limit} for its memory and time")


def _published(problem: Problem, mode: str) -> PeerRunner:
    _too_large(problem.size, 12_000)
    return _of_form(forms.published(problem.size.K, problem.inner_lr))(problem, mode)


def _dual(problem: Problem, mode: str) -> PeerRunner:
    _too_large(problem.size, 30_000)
    return _of_form(forms.dual(problem.size.K, problem.inner_lr))(problem, mode)


def _compiled(head: Callable[[int, float], forms.Head]) -> Callable[[Problem, str], PeerRunner]:
    def prepare(problem: Problem, mode: str) -> PeerRunner:
        if problem.size.K > 10:
            raise Unavailable("K > 10: unrolled, it compiles for minutes")
        _too_large(problem.size, 30_000)
        torch.compiler.reset()
        compiled = torch.compile(head(problem.size.K, problem.inner_lr), dynamic=False)
        runner = _of_form(compiled)(problem, mode)
        try:
            runner(0)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise Unavailable(f"torch.compile: {str(error).splitlines()[0]}") from error
        return runner

    return prepare


def _vmap(problem: Problem, mode: str) -> PeerRunner:
    """torch.func: vmap over tasks of the functional form, grad around it."""
    size = problem.size
    _too_large(size, 12_000)
    head = forms.functional(size.K, problem.inner_lr)
    leaves = [t.detach() for t in problem.parameters.leaves()]
    wide = leaves[0].dtype
    heads = torch.func.vmap(head, in_dims=(0, 0, 0, *[None] * len(leaves)))

    def loss(
        learned: tuple[Tensor, ...], fixed: tuple[Tensor, ...] | None, labels: Tensor, answers: Tensor
    ) -> tuple[Tensor, Tensor]:
        support, query = fixed or learned[len(leaves) :]
        logits = heads(support.to(wide), labels, query.to(wide), *learned[: len(leaves)])
        return _cross_entropy(logits, answers), logits

    differentiate = torch.func.grad(loss, has_aux=True)

    def forward(i: int) -> Result:
        batch = problem.inputs[i % len(problem.inputs)]
        with torch.no_grad():
            return heads(batch.support.to(wide), batch.labels, batch.query.to(wide), *leaves), []

    def train(i: int) -> Result:
        batch = problem.inputs[i % len(problem.inputs)]
        features = (batch.support, batch.query)
        learned, fixed = (tuple(leaves), features) if mode == "train" else ((*leaves, *features), None)
        gradients, logits = differentiate(learned, fixed, batch.labels, batch.answers)
        return logits, list(gradients)

    return forward if mode == "forward" else train


def _loop(problem: Problem, mode: str) -> PeerRunner:
    """One task after the other, gradients accumulated: how learn2learn's examples are written."""
    size = problem.size
    _too_large(size, 2_000)
    head = forms.published(size.K, problem.inner_lr)
    leaves = problem.parameters.fresh().leaves()
    wide = leaves[0].dtype
    batches = [_ready(i, mode) for i in problem.inputs]

    def train(i: int) -> Result:
        batch = batches[i % len(batches)]
        learned = leaves if mode == "train" else [*leaves, batch.support, batch.query]
        for leaf in learned:
            leaf.grad = None
        found = []
        for t in range(size.T):
            task = slice(t, t + 1)
            logits = head(batch.support[task].to(wide), batch.labels[task], batch.query[task].to(wide), *leaves)
            (_cross_entropy(logits, batch.answers[task]) / size.T).backward()
            found.append(logits.detach())
        return torch.cat(found), [leaf.grad for leaf in learned]

    def forward(i: int) -> Result:
        batch = batches[i % len(batches)]
        with torch.no_grad():
            each = [
                head(support.to(wide), labels, query.to(wide), *leaves)
                for support, labels, query in zip(*(t.split(1) for t in batch[:3]), strict=True)
            ]
        return torch.cat(each), []

    return forward if mode == "forward" else train


def _jax(problem: Problem, mode: str) -> PeerRunner:
    if importlib.util.find_spec("jax") is None:
        raise Unavailable("jax is not installed (pip install jax)")
    if problem.size.K > 10:
        raise Unavailable("K > 10: unrolled, it compiles for minutes")
    _too_large(problem.size, 30_000)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    size = problem.size
    jax.config.update("jax_enable_x64", size.dtype == "float64")

    def array(t: Tensor) -> Any:
        t = t.detach()
        if t.dtype is torch.bfloat16:  # NumPy has none
            return jax.numpy.asarray(t.float().numpy()).astype(jax.numpy.bfloat16)
        return jax.numpy.asarray(t.numpy().copy())

    heads, loss = forms.jax_loss(size.K, problem.inner_lr, size.N)
    parameters = tuple(array(t) for t in problem.parameters.leaves())
    batches = [tuple(array(t) for t in batch) for batch in problem.inputs]
    run_heads = jax.jit(heads)
    wanted = 0 if mode == "train" else (0, 1)
    differentiate = jax.jit(jax.grad(loss, argnums=wanted, has_aux=True))

    def forward(i: int) -> Result:
        support, labels, query, _ = batches[i % len(batches)]
        return jax.block_until_ready(run_heads((support, query), labels, parameters)), []

    def train(i: int) -> Result:
        support, labels, query, answers = batches[i % len(batches)]
        found = differentiate(parameters, (support, query), labels, answers)
        gradients, logits = jax.block_until_ready(found)
        return logits, list(gradients) if mode == "train" else [*gradients[0], *gradients[1]]

    return forward if mode == "forward" else train


# The two ways of calling kernelmeta. What they get wrong is an error; what a peer gets wrong leaves it out.
OWN = ("kernelmeta", "at_once")
PEERS = {
    "kernelmeta": Peer("kernelmeta, km.nn.SIB", _kernelmeta),
    "at_once": Peer("kernelmeta, km.nn.SIB.gradients", _at_once),
    "published": Peer("published form, eager (batch statistics)", _published, "batch"),
    "dual": Peer("dual form, eager, batched", _dual),
    "loop": Peer("published form, eager, task by task", _loop),
    "vmap": Peer("torch.func: grad(vmap)", _vmap),
    "compile-published": Peer("torch.compile of the functional published form", _compiled(forms.functional)),
    "compile-dual": Peer("torch.compile of the dual form", _compiled(forms.dual)),
    "jax": Peer("jax.jit(grad(vmap))", _jax),
}
