"""Kronecker-factored preconditioning of a linearised network's least squares, by curvlinops.

With the squared error a linearised network's curvature is ``J^T J + l I`` wherever its weights are, so that one
preconditioner, made at w0, serves all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from kernelmeta.linear.lqf import Linearised

MOST_OTHERS = 8192


class KroneckerPreconditioner:
    """``(P + damping I)^-1``, P made of blocks of ``J^T J``, a block a layer: what gradients are multiplied by.

    P has a Kronecker product for every linear layer and convolution (K-FAC, "expand"; Martens & Grosse 2015,
    Eschenhagen et al. 2023), with the exact derivatives of all outputs, by curvlinops. All other parameters, those of
    normalisation for example, have their own block of ``J^T J`` as it is. The loss is ``|f - y|^2 / 2`` summed over
    rows, or its mean with a learning rate as many times larger.

    A convolution's factors take the places of an image for independent, which they are not: the largest eigenvalue of
    ``P^-1 J^T J`` can be in the hundreds. :meth:`largest_rate` is what learning rates must stay below; with momentum m
    that is 1 + m times as much. Conjugate gradients need no rate.

    Args:
        model: linearised at w0.
        rows: [n, ...], what it is trained on.
        damping: what is added to P; ten times the weight decay of the summed loss is a good start.

    Raises:
        ImportError: curvlinops is not installed.
        ValueError: damping that is not positive; too many parameters outside of linear layers and convolutions.
    """

    def __init__(self, model: Linearised, rows: Tensor, *, damping: float) -> None:
        try:
            from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
        except ImportError as error:
            raise ImportError(
                "curvlinops, for Kronecker-factored preconditioning, is not installed: pip install 'kernelmeta[lqf]'"
            ) from error
        if not damping > 0:
            raise ValueError(f"damping: expected a positive number, got {damping}")
        self._network, self._rows, self._names = model.frozen, rows, list(model.names)
        own = dict(self._network.named_parameters())
        layers = [p for p in self._network.modules() if isinstance(p, nn.Linear | nn.Conv2d)]
        of_layers = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        self._factored = [name for name in self._names if id(own[name]) in of_layers]
        self._others = [name for name in self._names if name not in self._factored]
        if sum(own[name].numel() for name in self._others) > MOST_OTHERS:
            raise ValueError(
                f"model: expected at most {MOST_OTHERS} parameters outside of linear layers and convolutions, got "
                f"{', '.join(self._others)}"
            )
        self._inverse: Any = None
        if self._factored:
            with torch.no_grad():
                targets = torch.zeros_like(self._network(rows))
            for name in self._factored:
                own[name].requires_grad_(True)
            try:
                # The squared error of curvlinops is twice ours, and so is its curvature.
                curvature = KFACLinearOperator(
                    self._network, nn.MSELoss(reduction="sum"), [own[name] for name in self._factored],
                    [(rows, targets)], fisher_type="type-2", kfac_approx="expand", separate_weight_and_bias=False,
                    check_deterministic=False,
                )  # fmt: skip
                curvature.compute_kronecker_factors()
            finally:
                self._network.requires_grad_(False)
            self._inverse = KFACInverseLinearOperator(curvature, damping=2 * damping, use_exact_damping=True)
        if self._others:
            J = self._jacobian()
            block = J.mT @ J
            block.diagonal().add_(damping)
            self._block = torch.linalg.cholesky(block)

    def _jacobian(self) -> Tensor:
        """[n C, parameters of no layer], float64."""
        origin = dict(self._network.named_parameters())

        def one(moved: dict[str, Tensor], row: Tensor) -> Tensor:
            found: Tensor = functional_call(self._network, origin | moved, (row.unsqueeze(0),))
            return found.squeeze(0)

        at = {name: origin[name] for name in self._others}
        found = vmap(jacrev(one), (None, 0), chunk_size=50)(at, self._rows)
        return torch.cat([found[name].flatten(0, 1).flatten(1) for name in self._others], 1).double()

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """What they become, in the same order.

        Args:
            gradients: of ``model.moved``, one a parameter, in its order.
        """
        given = dict(zip(self._names, gradients, strict=True))
        done: dict[str, Tensor] = {}
        if self._factored:
            made = self._inverse @ [given[name] for name in self._factored]
            done |= {name: 2 * v for name, v in zip(self._factored, made, strict=True)}
        if self._others:
            flat = torch.cat([given[name].flatten() for name in self._others]).double()
            solved = torch.cholesky_solve(flat.unsqueeze(1), self._block).squeeze(1)
            parts = solved.split([given[name].numel() for name in self._others])
            done |= {
                name: v.view_as(given[name]).to(given[name].dtype) for name, v in zip(self._others, parts, strict=True)
            }
        return [done[name] for name in self._names]

    @torch.no_grad()
    def largest_rate(self, weight_decay: float = 0.0, *, iterations: int = 30) -> float:
        """Twice the inverse of the largest eigenvalue of ``P^-1 (J^T J + weight_decay I)``, by the power method.

        Args:
            weight_decay: l of the loss ``|f - y|^2 / 2 + l |w - w0|^2 / 2``.
            iterations: of the power method, each as dear as a gradient step.
        """
        origin = {name: p for name, p in self._network.named_parameters() if name in self._names}

        def outputs(at: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(self._network, at, self._rows)
            return found

        pull = vjp(outputs, origin)[1]
        generator = torch.Generator().manual_seed(0)
        x = [torch.randn(origin[n].shape, generator=generator).to(origin[n]) for n in self._names]
        largest = torch.ones(())
        for _ in range(iterations):
            along = jvp(outputs, (origin,), (dict(zip(self._names, x, strict=True)),))[1]
            back = pull(along)[0]
            y = self([back[name] + weight_decay * v for name, v in zip(self._names, x, strict=True)])
            largest = torch.stack([v.square().sum() for v in y]).sum().sqrt()
            x = [v / largest for v in y]
        return 2 / float(largest)
