"""From a pair of raw ops, one forward and one backward, to something that every part of PyTorch can differentiate.

A raw op is an entry of ``torch.ops.kernelmeta``: its schema and fake kernel are declared in Python, its kernels are
registered by the compiled library or, where that is missing, by the reference. :class:`DifferentiableOp` puts around it

* a plain ``torch.autograd.Function`` for eager code, with as little Python in it as possible;
* a second one with ``setup_context`` and ``vmap`` rules for ``torch.func``;
* an autograd formula of the raw op itself, for whoever calls ``torch.ops.kernelmeta.*`` and for ``torch.compile``;
* for the backward op a formula that raises, so that a second derivative is an error and never silently zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]

LIBRARY = torch.library.Library("kernelmeta", "FRAGMENT")


def is_traced() -> bool:
    """Inside torch.compile or a torch.func transform: what runs must be plain PyTorch or one of our ops."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class DifferentiableOp:
    """A raw op, its backward op, and the derivative that joins them.

    Args:
        name: name of the op in ``torch.ops.kernelmeta``; the backward op is ``<name>_backward``.
        schema, backward_schema: arguments and returns, without the name; tensors come before other arguments.
        fake, fake_backward: shapes of the results, for tracing.
        fallback, fallback_backward: the same in plain PyTorch, for devices without a compiled kernel.
        differentiable: positions of the arguments that get gradients, in the order in which the backward op
            returns them.
        n_outputs: how many of the results, from the first on, are differentiable.
        n_private: how many of the results, from the last back, only the backward op needs: eager code does not
            see them.
        backward_args: ``(args, residuals, grads, needs) -> args`` of the backward op. ``residuals`` are the results
            that are not differentiable, ``grads`` has one entry (None: no gradient arrived) for each that is,
            ``needs`` one flag for each argument.
        save: ``(args) -> args`` with the op told to keep what its backward needs.
        kernels: what runs on every device without a compiled kernel, forward and backward; the fallbacks if None.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        backward_schema: str,
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any],
        fallback: Callable[..., Any],
        fallback_backward: Callable[..., Any],
        differentiable: Sequence[int],
        n_outputs: int,
        n_private: int = 0,
        backward_args: Callable[[Args, Args, Args, Sequence[bool]], Args],
        save: Callable[[Args], Args] = lambda args: args,
        kernels: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        declaration = {key: value for key, value in locals().items() if key not in ("self", "name", "kernels")}
        self._declaration = declaration
        self._on: dict[str, DifferentiableOp] = {}
        self.name = name
        self.differentiable = tuple(differentiable)
        self.n_outputs = n_outputs
        self.n_private = n_private
        self.n_tensors = schema.partition("->")[0].count("Tensor")
        self.backward_args = backward_args
        self.save = save
        self.fallback = fallback
        kernel, kernel_backward = kernels or (fallback, fallback_backward)
        for full_name, declared, fake_kernel, implementation in (
            (name, schema, fake, kernel),
            (f"{name}_backward", backward_schema, fake_backward, kernel_backward),
        ):
            LIBRARY.define(full_name + declared)
            LIBRARY.impl(full_name, implementation, "CompositeExplicitAutograd")
            torch.library.register_fake(f"kernelmeta::{full_name}", on_one_device(fake_kernel), lib=LIBRARY)
            for device in ("cpu", "cuda"):
                torch.library.register_autocast(f"kernelmeta::{full_name}", device, torch.float32, lib=LIBRARY)
        self.raw = getattr(torch.ops.kernelmeta, name).default
        self.raw_backward = getattr(torch.ops.kernelmeta, f"{name}_backward").default
        # What their __call__ calls.
        self._run, self._run_backward = self.raw._op, self.raw_backward._op
        self._register_formulas()
        self._eager, self._functional = _functions(self)

    def __call__(self, *args: Any) -> Any:
        """The results of the raw op (in eager code without the private ones), differentiable wherever it is called."""
        if torch.compiler.is_compiling():
            # torch.compile(torch.func.grad(...)) drops the backward of a Function without a word: there the
            # plain PyTorch form is traced.
            functional = torch._C._are_functorch_transforms_active()
            return self.fallback(*args) if functional else self.raw(*self.save(args))
        if torch._C._are_functorch_transforms_active():
            return self._functional.apply(*self.save(args))
        if torch.is_grad_enabled():
            for tensor in args[: self.n_tensors]:
                if tensor is not None and tensor.requires_grad:
                    args = self.save(args)
                    return self._eager(args[self.n_tensors :], *args[: self.n_tensors])
        with torch._C._AutoDispatchBelowAutograd():
            return self._run(*args)

    def define_on(self, backend: str, kernel: Callable[..., Any], kernel_backward: Callable[..., Any]) -> None:
        """The same op under the name ``<backend>_<name>``, for a backend that `backends.select` may choose.

        It is an op of its own, so that the backward pass runs where the forward pass did, compiled or not.
        """
        name = f"{backend}_{self.name}"
        self._on[backend] = DifferentiableOp(name, **self._declaration, kernels=(kernel, kernel_backward))

    def on(self, backend: str) -> DifferentiableOp:
        """The op as that backend runs it."""
        return self._on.get(backend, self)

    def gradients(self, grads: Any, args: Args, needs: Sequence[bool]) -> list[Any]:
        """One gradient (or None) for each argument from the results of the backward op."""
        result = self._placed(grads, len(args), needs)
        return [g if g is None or g.dtype is a.dtype else g.to(a.dtype) for g, a in zip(result, args, strict=True)]

    def _placed(self, grads: Any, count: int, needs: Sequence[bool]) -> list[Any]:
        """The same in the precision of the backward op."""
        result: list[Any] = [None] * count
        for position, grad in zip(self.differentiable, _as_tuple(grads), strict=True):
            if needs[position]:
                result[position] = grad
        return result

    def _register_formulas(self) -> None:
        def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
            _remember(ctx, self, inputs, _as_tuple(output))

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            args, residuals = _recall(ctx)
            call = self.backward_args(args, residuals, grads[: self.n_outputs], ctx.needs_input_grad)
            return tuple(self.gradients(self.raw_backward(*call), args, ctx.needs_input_grad))

        def refuse(ctx: Any, *grads: Any) -> Any:
            raise _second_derivative_error(self)

        torch.library.register_autograd(f"kernelmeta::{self.name}", backward, setup_context=setup_context, lib=LIBRARY)
        torch.library.register_autograd(f"kernelmeta::{self.name}_backward", refuse, lib=LIBRARY)


def _functions(op: DifferentiableOp) -> tuple[Callable[..., Any], type[torch.autograd.Function]]:
    """The two autograd Functions around an op: what applies the one for eager code, and the one for torch.func."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op.raw_backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise _second_derivative_error(op)

        @staticmethod
        def vmap(info: Any, in_dims: Args, *args: Any) -> Any:
            return _one_by_one(Backward, info.batch_size, in_dims, args)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, constants: Args, *tensors: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                results = op._run(*tensors, *constants)
            residuals = _as_tuple(results)[op.n_outputs :]
            ctx.mark_non_differentiable(*residuals)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *residuals)
            ctx.constants = constants
            return results[: -op.n_private] if op.n_private else results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors
            args = (*saved[: op.n_tensors], *ctx.constants)
            needs = ctx.needs_input_grad[1:]
            call = op.backward_args(args, saved[op.n_tensors :], grads[: op.n_outputs], needs)
            if torch.is_grad_enabled():  # create_graph=True
                results = Backward.apply(*call)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    results = op._run_backward(*call)
            return (None, *op._placed(results, op.n_tensors, needs))  # the engine converts what has another dtype

    class Functional(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op.raw(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
            _remember(ctx, op, inputs, _as_tuple(output))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            args, residuals = _recall(ctx)
            call = op.backward_args(args, residuals, grads[: op.n_outputs], ctx.needs_input_grad)
            return tuple(op.gradients(Backward.apply(*call), args, ctx.needs_input_grad))

        @staticmethod
        def vmap(info: Any, in_dims: Args, *args: Any) -> Any:
            return _one_by_one(Functional, info.batch_size, in_dims, args)

    # Function.apply looks after torch.func's transforms first; none is active where the eager one is called.
    return super(torch.autograd.Function, Eager).apply, Functional


def on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher calls a fake kernel even if only one tensor is a meta tensor: kernels see all others' devices."""

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        devices = {a.device for a in args if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"tensors are on {' and '.join(sorted(map(str, devices)))}: all must be on one device")
        return fake(*args)

    return checked


def _one_by_one(function: Any, batch_size: int, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """The vmap rule: one call for each entry of the batch. (Tasks are a batch already; vmap adds one around them.)"""
    calls = [  # (of a list of numbers, in_dims is a list of None)
        _as_tuple(
            function.apply(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
        )
        for i in range(batch_size)
    ]
    stacked = tuple(torch.stack(results) for results in zip(*calls, strict=True))
    return (stacked, (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)


def _second_derivative_error(op: DifferentiableOp) -> RuntimeError:
    return RuntimeError(
        f"kernelmeta::{op.name} has no second derivative: its backward pass is a fused kernel. (The meta-gradient "
        "through all inner steps is its first derivative.) For a second one use kernelmeta.use_backend('reference')."
    )


def _as_tuple(results: Any) -> Args:
    return results if isinstance(results, tuple) else (results,)


def _remember(ctx: Any, op: DifferentiableOp, args: Args, results: Args) -> None:
    """Save tensors where autograd checks that nobody modified them, and everything else beside them."""
    residuals = results[op.n_outputs :]
    ctx.mark_non_differentiable(*residuals)
    ctx.set_materialize_grads(False)
    tensors = [a if isinstance(a, Tensor) else None for a in args]
    ctx.save_for_backward(*tensors, *residuals)
    ctx.constants = [a if t is None else None for a, t in zip(args, tensors, strict=True)]


def _recall(ctx: Any) -> tuple[Args, Args]:
    saved = ctx.saved_tensors
    n = len(ctx.constants)
    args = tuple([c if t is None else t for t, c in zip(saved, ctx.constants, strict=False)])
    return args, saved[n:]
