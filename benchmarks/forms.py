"""SIB as plain functions of tensors, as one would write it without this package. The peers are made of these.

Each takes (support, labels, query, weight, scale, bias, mlp) and returns logits; T comes first unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelmeta.mlp_parameters import MLPParameters

Head = Callable[..., Tensor]


def class_means(support: Tensor, labels: Tensor, n_way: int, weight: Tensor) -> Tensor:
    """[..., S, D], [..., S] -> theta0 [..., N, D]."""
    members = F.one_hot(labels, n_way).to(support.dtype)
    sums = members.transpose(-1, -2) @ F.normalize(support, dim=-1)
    return sums / members.sum(-2).unsqueeze(-1) * weight


def mlp_of_batch(logits: Tensor, mlp: MLPParameters) -> Tensor:
    """BatchNorm over all rows of all tasks, by PyTorch's own kernel: what nn.BatchNorm1d calls."""

    def normalise(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return F.batch_norm(h, None, None, gain, shift, training=True, eps=1e-5)

    h = logits.flatten(0, -2)
    h = normalise(F.linear(h, mlp.weight1, mlp.bias1).relu(), mlp.gain1, mlp.shift1)
    h = normalise(F.linear(h, mlp.weight2, mlp.bias2).relu(), mlp.gain2, mlp.shift2)
    return F.linear(h, mlp.weight3, mlp.bias3).view_as(logits)


def mlp_of_task(logits: Tensor, mlp: MLPParameters) -> Tensor:
    """BatchNorm over the rows of each task: the last dimension but one."""

    def normalise(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        variance, mean = torch.var_mean(h, -2, correction=0, keepdim=True)
        return (h - mean) * (torch.rsqrt(variance + 1e-5) * gain) + shift

    h = normalise(F.linear(logits, mlp.weight1, mlp.bias1).relu(), mlp.gain1, mlp.shift1)
    h = normalise(F.linear(h, mlp.weight2, mlp.bias2).relu(), mlp.gain2, mlp.shift2)
    return F.linear(h, mlp.weight3, mlp.bias3)


def published(steps: int, inner_lr: float, mlp_form: Callable[..., Tensor] = mlp_of_batch) -> Head:
    """The published form: D dimensions, the inner gradient by autograd, one graph through all steps.

    As in the published code, rows and theta are normalised wherever the classifier is applied.
    """

    def classify(theta: Tensor, query: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return scale * (bias + F.normalize(query, dim=-1) @ F.normalize(theta, dim=-1).transpose(-1, -2))

    def head(
        support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *mlp: Tensor
    ) -> Tensor:
        parameters = MLPParameters(*mlp)
        theta = class_means(support, labels, parameters.weight1.shape[1], weight)
        meta_learning = torch.is_grad_enabled()
        with torch.enable_grad():
            if not theta.requires_grad:
                theta.requires_grad_()
            for _ in range(steps):
                logits = classify(theta, query, scale, bias)
                guess = mlp_form(logits, parameters)
                (step,) = torch.autograd.grad(logits, theta, guess, create_graph=meta_learning)
                theta = theta - inner_lr * step
                if not meta_learning:
                    theta = theta.detach().requires_grad_()
        return classify(theta, query, scale, bias)

    return head


def functional(steps: int, inner_lr: float) -> Head:
    """The published form with torch.func.vjp for the inner gradient and each task's own statistics.

    Of one task or of many, for vmap and for torch.compile.
    """

    def head(
        support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *mlp: Tensor
    ) -> Tensor:
        parameters = MLPParameters(*mlp)
        theta = class_means(support, labels, parameters.weight1.shape[1], weight)
        rows = F.normalize(query, dim=-1)

        def classify(theta: Tensor) -> Tensor:
            return scale * (bias + rows @ F.normalize(theta, dim=-1).transpose(-1, -2))

        for _ in range(steps):
            logits, pull_back = torch.func.vjp(classify, theta)[:2]
            (step,) = pull_back(mlp_of_task(logits, parameters))
            theta = theta - inner_lr * step
        return classify(theta)

    return head


def dual(steps: int, inner_lr: float) -> Head:
    """The dual form, batched over tasks, theta itself never formed; each task's own statistics."""

    def head(
        support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *mlp: Tensor
    ) -> Tensor:
        parameters = MLPParameters(*mlp)
        theta = class_means(support, labels, parameters.weight1.shape[1], weight)
        rows = F.normalize(query, dim=-1)
        gram = rows @ rows.transpose(-1, -2)
        r2 = theta.square().sum(-1).unsqueeze(-2)
        U = rows @ theta.transpose(-1, -2) / r2.sqrt()
        e = inner_lr * scale
        for _ in range(steps):
            G = mlp_of_task(scale * (U + bias), parameters)
            AG = gram @ G
            dot = (U * G).sum(-2, keepdim=True)
            quad = (G * AG).sum(-2, keepdim=True)
            grown = r2 + e.square() * (quad - dot.square()) / r2
            r, grown_r = r2.sqrt(), grown.sqrt()
            U = (1 + e * dot / r2) * (r / grown_r) * U - e / (r * grown_r) * AG
            r2 = grown
        return scale * (U + bias)

    return head


def jax_loss(steps: int, inner_lr: float, n_way: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """For JAX: logits of one task, and the mean cross entropy of many (vmap) with the logits beside it.

    The published form: the inner gradient by jax.vjp, each task's own statistics. Products in full float32.
    """
    import jax
    import jax.numpy as jnp

    def unit(x: Any) -> Any:
        return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)), 1e-12)

    def mlp_form(z: Any, p: Any) -> Any:
        def normalise(h: Any, gain: Any, shift: Any) -> Any:
            mean, variance = h.mean(0), h.var(0)
            return (h - mean) * jax.lax.rsqrt(variance + 1e-5) * gain + shift

        h = normalise(jax.nn.relu(z @ p[0].T + p[1]), p[2], p[3])
        h = normalise(jax.nn.relu(h @ p[4].T + p[5]), p[6], p[7])
        return h @ p[8].T + p[9]

    def head(features: Any, labels: Any, parameters: Any) -> Any:
        weight, scale, bias, *mlp = parameters
        support, query = (f.astype(weight.dtype) for f in features)
        members = jax.nn.one_hot(labels, n_way, dtype=weight.dtype)
        theta = members.T @ unit(support) / members.sum(0)[:, None] * weight
        rows = unit(query)

        def classify(theta: Any) -> Any:
            return scale * (bias + rows @ unit(theta).T)

        for _ in range(steps):
            logits, pull_back = jax.vjp(classify, theta)
            (step,) = pull_back(mlp_form(logits, mlp))
            theta = theta - inner_lr * step
        return classify(theta)

    heads = jax.vmap(head, in_axes=(0, 0, None))

    def loss(parameters: Any, features: Any, labels: Any, answers: Any) -> Any:
        logits = heads(features, labels, parameters)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], -1)
        return -picked.mean(), logits

    return heads, loss
