"""What learners share whose training step is one launch."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.amp import GradScaler

from kernelmeta import ops
from kernelmeta.nn.learner import Learner


class TrainsAtOnce(Learner):
    """A learner that gives the mean cross entropy of the query rows and its gradients without autograd."""

    _looked_for_scaler = False

    def gradients(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_labels: Tensor,
        *,
        support_index: Tensor | None = None,
        query_index: Tensor | None = None,
        accumulate: bool = False,
        loss_scale: float | Tensor | None = None,
        process_group: Any = None,
    ) -> ops.SIBGradients | ops.HeadGradients:
        """A training step's worth in one launch, outside of autograd.

        The mean cross entropy of the query rows, and its gradient in every parameter, which becomes its ``grad``.
        Then comes the optimizer's step. What needs autograd is not for this method, and it says so: features that
        require a gradient, hooks of parameters, `torch.nn.parallel.DistributedDataParallel`.

        Args:
            support: [T, S, D]; or a bank [n, D], with ``support_index`` [T, S] int64.
            support_labels: [T, S] int64 in 0..N-1.
            query: [T, Q, D]; or a bank [n, D], with ``query_index`` [T, Q] int64.
            query_labels: [T, Q] int64 in 0..N-1.
            accumulate: add to the gradients that are there, as ``backward()`` does. Otherwise none may be there.
            loss_scale: what the loss is multiplied with before its gradient is taken: ``scaler.get_scale()`` of a
                `torch.amp.GradScaler`, whose ``step`` divides by it. 1 if None; and then the first call looks whether
                the process has a scaler.
            process_group: where several processes train together (`torch.distributed` is initialised), the group whose
                mean the gradients become; "local" if each process keeps its own.

        Returns:
            ``loss`` [], ``accuracy`` [], ``logits`` [T, Q, N] and ``gradients``, those of the op (of the loss itself,
            of this process): :func:`kernelmeta.ops.sib_gradients`, :func:`kernelmeta.ops.linear_head_gradients`.

        Raises:
            ValueError: features that require a gradient; a parameter that has a gradient already, or hooks; several
                processes, or a gradient scaler, without a word about them.
            ValueError, TypeError: as that op.
        """
        self._check_processes(process_group)
        if loss_scale is None:
            self._check_scaler()
            loss_scale = 1
        parameters = self._trained()
        for parameter in parameters:
            if parameter.requires_grad:
                self._check_parameter(parameter, accumulate)
        support, query, index = self._transformed(
            support, support_labels, query, support_index=support_index, query_index=query_index
        )
        results, gradients = self._gradients(support, support_labels, query, query_labels, **index)
        wanted = [(p, g) for p, g in zip(parameters, gradients, strict=True) if p.requires_grad]
        if process_group is not None and process_group != "local":
            wanted = _averaged(wanted, process_group)
        scaled = not isinstance(loss_scale, (int, float)) or loss_scale != 1
        for parameter, gradient in wanted:
            if scaled:
                gradient = gradient * loss_scale
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return results

    def _check_parameter(self, parameter: Tensor, accumulate: bool) -> None:
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            fault = "has hooks, which gradients() does not call; use the module and loss.backward()"
        elif parameter.grad is not None and not accumulate:
            fault = "has a gradient already: optimizer.zero_grad() takes it away, accumulate=True adds to it"
        else:
            return
        name = next((name for name, own in self.named_parameters() if own is parameter), "a parameter")
        raise ValueError(f"{name} {fault}")

    @staticmethod
    def _check_processes(process_group: Any) -> None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and process_group is None and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "process_group: several processes train; give the group to average the gradients over "
                "(torch.distributed.group.WORLD), or 'local', or use DistributedDataParallel and loss.backward()"
            )

    def _check_scaler(self) -> None:
        """Once a module, since looking takes as long as some hundred steps."""
        if self._looked_for_scaler or torch.compiler.is_compiling():
            return
        classes = (GradScaler, *GradScaler.__subclasses__())
        # There is no list of them but the garbage collector's.
        if any(isinstance(s, GradScaler) and s.is_enabled() for s in gc.get_referrers(*classes)):
            raise ValueError(
                "loss_scale: a torch.amp.GradScaler is in use, and its step() divides gradients by its scale; give "
                "loss_scale=scaler.get_scale(), or 1 if it is not for this module"
            )
        self._looked_for_scaler = True

    @abstractmethod
    def _trained(self) -> Sequence[Tensor]:
        """The parameters that get a gradient."""

    @abstractmethod
    def _gradients(
        self, support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, **index: Any
    ) -> tuple[Any, Sequence[Tensor]]:
        """The op's results, and the gradient of each of these parameters."""


def _averaged(gradients: list[tuple[Tensor, Tensor]], group: Any) -> list[tuple[Tensor, Tensor]]:
    """The gradients' mean over the processes of a group, in one message."""
    parameters, own = zip(*gradients, strict=True)
    flat = torch.cat([g.reshape(-1) for g in own])
    torch.distributed.all_reduce(flat, group=group)
    flat /= torch.distributed.get_world_size(group)
    means = flat.split([g.numel() for g in own])
    return [(p, m.view_as(g)) for p, m, g in zip(parameters, means, own, strict=True)]
