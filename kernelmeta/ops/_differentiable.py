"""From a pair of raw ops, one forward and one backward, to something that every part of PyTorch can differentiate.

A raw op is an entry of ``torch.ops.kernelmeta``: its schema and fake kernel are declared in Python, its kernels are
registered by the compiled library or, where that is missing, by the plain form. :class:`DifferentiableOp` puts around
it

* a plain ``torch.autograd.Function`` for eager code, with as little Python in it as possible;
* a second one with ``setup_context`` and ``vmap`` rules for ``torch.func``;
* an autograd formula of the raw op itself, for whoever calls ``torch.ops.kernelmeta.*`` and for ``torch.compile``;
* for the backward op a formula that raises, so that a second derivative is an error and never silently zero.

Forward-mode derivatives go through the plain form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from kernelmeta.ops import _checks
from kernelmeta.ops._flops import count_flops
from kernelmeta.ops._signature import Args, Signature
from kernelmeta.ops._trace import traced_size
from kernelmeta.reference.task_rows import gathered

LIBRARY = torch.library.Library("kernelmeta", "FRAGMENT")


def define(schema: str) -> None:
    """Declare a raw op.

    Raises:
        ImportError: it is declared already, by an earlier import of this module.
    """
    try:
        LIBRARY.define(schema)
    except RuntimeError as error:
        name = schema.partition("(")[0]
        raise ImportError(
            f"kernelmeta::{name} is registered already: PyTorch takes an op once a process, so kernelmeta cannot be "
            "imported a second time or reloaded; start a new process"
        ) from error


class DifferentiableOp:
    """A raw op, its backward op, and the derivative that joins them.

    Both are declared by the op's arguments: the backward op, ``<name>_backward``, takes the gradient of every output
    (that of the first always, of the others as ``Tensor?``), the trace, the arguments, and one flag for each of
    ``rows``, whether its gradient is needed; it returns the gradients of what is differentiable, in the order of the
    arguments.

    Args:
        name: name of the op in ``torch.ops.kernelmeta``.
        arguments: as in a schema; see `Signature`.
        options: arguments that only the forward op takes.
        results: names of what the op returns.
        outputs: how many of them, from the first on, are differentiable.
        trace: ``(call) -> elements`` of the trace that the op leaves for its backward op, where the argument
            ``save_trace``, the last one, tells it to; not asked where tasks differ in size. Nobody else sees the
            trace. Without this argument the op leaves none.
        differentiable: names of the arguments that get gradients.
        rows: names of features among them -> of the index that may point into them, or None. A gradient is that of
            the gathered rows.
        fake: ``(call) -> results`` as empty tensors, for tracing; ``call`` has the arguments by name.
        plain: ``(call) -> results`` in plain PyTorch, None where one was not asked for; what runs where there is no
            kernel, and what is differentiated there.
        reference: the same, nearer to the paper, for `use_backend`; it may call autograd itself. ``plain`` if None.
        work: ``(call) -> multiplications`` of the forward pass, roughly; the backward pass takes twice as many.
        kernels: forward and backward of another backend, for `define_on`; each takes the arguments by name.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        options: str = "",
        results: Sequence[str],
        outputs: int = 1,
        trace: Callable[[Any], Any] | None = None,
        differentiable: Sequence[str],
        rows: Mapping[str, str | None],
        fake: Callable[[Any], tuple[Tensor, ...]],
        plain: Callable[[Any], tuple[Tensor | None, ...]],
        reference: Callable[[Any], tuple[Tensor | None, ...]] | None = None,
        work: Callable[[Any], int],
        kernels: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        self._declaration = {k: v for k, v in locals().items() if k not in ("self", "name", "kernels")}
        self._on: dict[str, DifferentiableOp] = {}
        self.name = name
        self.n_outputs = outputs
        self.has_trace, self._trace = trace is not None, trace
        # The last argument of the raw op, where it has one: whether to leave a trace.
        self._traced: Args = (True,) if self.has_trace else ()
        self._untraced: Args = (False,) if self.has_trace else ()
        self._results, self._rows = tuple(results), dict(rows)
        self._fake, self._plain, self._reference, self._work = fake, plain, reference or plain, work
        self.shared = Signature(arguments)
        self.signature = Signature(f"{arguments}, {options}" if options else arguments)
        self.arguments = self.signature.pack
        self._differentiable = tuple(i for i, n in enumerate(self.shared.names) if n in differentiable)
        self._features = tuple(self.shared.at(row) for row in rows)
        self._indexed = tuple((self.shared.at(row), self.shared.at(index)) for row, index in rows.items() if index)
        # Computed in one precision: what is differentiable, and statistics.
        self._computed = tuple(
            i
            for i, n in enumerate(self.shared.names)
            if (n in differentiable or n == "running_stats") and i not in self._features
        )
        self._declare(kernels)
        self._register_formulas()
        self._eager, self._functional = _functions(self)

    def _declare(self, kernels: tuple[Callable[..., Any], Callable[..., Any]] | None) -> None:
        first, *others = (f"grad_{result}" for result in self._results[: self.n_outputs])
        trace = ["Tensor trace"] if self.has_trace else []
        grads = [f"Tensor {first}", *(f"Tensor? {other}" for other in others), *trace]
        needs = [f"bool need_{row}" for row in self._rows]
        forward = Signature(", ".join([self.signature.text, *(["bool save_trace"] if self.has_trace else [])]))
        backward = Signature(", ".join([*grads, self.shared.text, *needs]))
        self.n_tensors = self.shared.n_tensors
        self.forward_signature, self.backward_signature = forward, backward
        implementations: list[Callable[..., Any]] = [self.plain_forward, self.plain_backward]
        if kernels is not None:
            implementations = [
                by_name(signature, kernel) for signature, kernel in zip((forward, backward), kernels, strict=True)
            ]
        self.raw = self._define(
            self.name, forward, len(self._results) + self.has_trace, self._fake_forward, implementations[0]
        )
        self.raw_backward = self._define(
            f"{self.name}_backward", backward, len(self._differentiable), self._fake_backward, implementations[1]
        )
        count_flops(self.raw.overloadpacket, self._flops)
        count_flops(self.raw_backward.overloadpacket, self._flops_backward)
        # What their __call__ calls.
        self._run, self._run_backward = self.raw._op, self.raw_backward._op

    def _define(
        self, name: str, signature: Signature, n_results: int, fake: Callable[..., Any], kernel: Callable[..., Any]
    ) -> Any:
        returns = "Tensor" if n_results == 1 else f"({', '.join(['Tensor'] * n_results)})"
        define(f"{name}({signature.text}) -> {returns}")
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kernelmeta::{name}", on_one_device(fake), lib=LIBRARY)
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(f"kernelmeta::{name}", device, torch.float32, lib=LIBRARY)
        return getattr(torch.ops.kernelmeta, name).default

    def __call__(self, args: Args) -> Any:
        """The results of the raw op, but for the trace, differentiable wherever it is called.

        Args:
            args: what `arguments` made of them; all in a precision that the kernels take, as `cast` gives it.
        """
        if torch.compiler.is_compiling():
            # torch.compile(torch.func.grad(...)) drops the backward of a Function without a word: there the
            # plain PyTorch form is traced.
            if torch._C._are_functorch_transforms_active():
                return self._without_trace(self.plain_forward(*args, *self._untraced))
            return self._without_trace(self.raw(*self._gathered(args), *self._traced))
        if torch._C._are_functorch_transforms_active():
            if any(level.key() == TransformType.Jvp for level in get_interpreter_stack()):
                return self._without_trace(self.plain_forward(*args, *self._untraced))
            return self._without_trace(self._functional.apply(*self._gathered(args), *self._traced))
        if forward_ad._current_level >= 0 and self._has_tangent(args):
            return self._without_trace(self.plain_forward(*args, *self._untraced))
        if torch.is_grad_enabled():
            for tensor in args[: self.n_tensors]:
                if tensor is not None and tensor.requires_grad:
                    args = self._gathered(args)
                    return self._eager((*args[self.n_tensors :], *self._traced), *args[: self.n_tensors])
        with torch._C._AutoDispatchBelowAutograd():
            return self._without_trace(self._run(*args, *self._untraced))

    def run(self, backend: str, args: Args) -> Any:
        """The same on a backend, in the precision that the arguments promote to."""
        precision = self.precision(args)
        if precision is None:
            return self.compute(backend, args)
        compute, result_type = precision
        results = self.compute(backend, self.cast(args, compute))
        if isinstance(results, Tensor):
            return results.to(result_type)
        return tuple(r.to(result_type) if i < self.n_outputs else r for i, r in enumerate(results))

    def precision(self, args: Args) -> tuple[torch.dtype, torch.dtype] | None:
        """See `_checks.precisions`."""
        return _checks.precisions([args[i] for i in self._differentiable])

    def compute(self, backend: str, args: Args) -> Any:
        """The same of arguments in one precision, as `cast` gives them."""
        if backend != "reference":
            return self._on.get(backend, self)(args)
        results = self._filled(self._reference(self.signature.call(*args)))
        return results if len(results) > 1 else results[0]

    def cast(self, args: Args, compute: torch.dtype) -> Args:
        """The arguments with all parameters in the type to compute in, float32 or float64.

        Features stay in what they are stored in, unless float64 is computed in.
        """
        changed = list(args)
        for i in (*self._computed, *(self._features if compute is torch.float64 else ())):
            if changed[i] is not None:
                changed[i] = changed[i].to(compute)
        return tuple(changed)

    def define_on(
        self,
        backend: str,
        kernel: Callable[[Any], Any],
        kernel_backward: Callable[[Any], Any],
        trace: Callable[[Any], Any] | None,
    ) -> None:
        """The same op under the name ``<backend>_<name>``, for a backend that `backends.select` may choose.

        It is an op of its own, so that the backward pass runs where the forward pass did, compiled or not, and leaves
        a trace of its own.
        """
        declaration = self._declaration | {"trace": trace, "kernels": (kernel, kernel_backward)}
        self._on[backend] = DifferentiableOp(f"{backend}_{self.name}", **declaration)

    def on(self, backend: str) -> DifferentiableOp:
        """The op as that backend runs it."""
        return self._on.get(backend, self)

    def plain_forward(self, *args: Any) -> Any:
        """The raw op in plain PyTorch, without a trace."""
        call = self.signature.call(*args[: len(self.signature.names)])
        results = self._filled(self._plain(call))
        if self.has_trace:
            results = (*results, results[0].new_empty(0))
        return results if len(results) > 1 else results[0]

    def plain_backward(self, *args: Any) -> Any:
        """The raw backward op in plain PyTorch: the plain form, differentiated."""
        grads, rest = args[: self.n_outputs], args[self.n_outputs + self.has_trace :]
        call = dict(zip(self.shared.names, rest, strict=False))
        needs = dict(zip(self._rows, rest[len(self.shared.names) :], strict=True))
        with _where_autograd_is(), torch.enable_grad():
            for row, index in self._rows.items():
                if index is not None and call[index] is not None:
                    call[row], call[index] = gathered(call[row], call[index], row), None
                call[row] = call[row].to(grads[0].dtype)
            names = [self.shared.names[i] for i in self._differentiable]
            wanted = {n: call[n].detach().requires_grad_() for n in names if call[n] is not None and needs.get(n, True)}
            options = dict.fromkeys(self.signature.names[len(self.shared.names) :], False)
            results = self._plain(self.signature.call(**(call | wanted | options)))
            pairs = [(r, g) for r, g in zip(results, grads, strict=False) if g is not None and r is not None]
            pairs = [(r, g) for r, g in pairs if r.requires_grad]
            found: Sequence[Any] = [None] * len(wanted)
            if pairs and wanted:
                outputs, gradients = zip(*pairs, strict=True)
                found = torch.autograd.grad(outputs, list(wanted.values()), gradients, allow_unused=True)
        of = dict(zip(wanted, found, strict=True))
        gradients = tuple(
            grads[0].new_empty(0)
            if n not in wanted
            else torch.zeros_like(wanted[n])
            if of[n] is None
            else of[n].contiguous()
            for n in names
        )
        return gradients if len(gradients) > 1 else gradients[0]

    def _filled(self, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Contiguous, and an empty tensor for what was not asked for."""
        first = results[0]
        assert first is not None
        return tuple(first.new_empty(0) if r is None else r.contiguous() for r in results)

    def _without_trace(self, results: Any) -> Any:
        if not self.has_trace:
            return results
        return results[:-1] if len(results) > 2 else results[0]

    def _flops(self, *args: Any, out_val: Any) -> int:
        """For `torch.utils.flop_counter`: a multiplication and an addition each."""
        return 2 * self._work(self.signature.call(*args[: len(self.signature.names)]))

    def _flops_backward(self, *args: Any, out_val: Any) -> int:
        rest = args[self.n_outputs + self.has_trace :][: len(self.shared.names)]
        options = dict.fromkeys(self.signature.names[len(self.shared.names) :], False)
        return 4 * self._work(self.signature.call(*rest, **options))

    def _gathered(self, args: Args) -> Args:
        """With the rows themselves in the place of a bank that needs a gradient, and its index."""
        for row, index in self._indexed:
            if args[index] is not None and args[row].requires_grad:
                changed = list(args)
                changed[row], changed[index] = gathered(args[row], args[index], self.shared.names[row]), None
                args = tuple(changed)
        return args

    def _has_tangent(self, args: Args) -> bool:
        return any(
            args[i] is not None and forward_ad.unpack_dual(args[i]).tangent is not None for i in self._differentiable
        )

    def _fake_forward(self, *args: Any) -> Any:
        results = self._fake(self.signature.call(*args[: len(self.signature.names)]))
        if self._trace is not None:
            trace = self._trace
            call = self.signature.call(*args[: len(self.signature.names)])
            size: Any = 0
            if args[-1]:
                shapes = tuple(n for a in args if isinstance(a, Tensor) for n in a.shape)
                ragged = getattr(call, "support_offsets", None) is not None
                size = traced_size(results[0], shapes, None if ragged else lambda: trace(call))
            results = (*results, results[0].new_empty(size))
        return results if len(results) > 1 else results[0]

    def _fake_backward(self, *args: Any) -> Any:
        rest = args[self.n_outputs + self.has_trace :]
        call = self.shared.call(*rest[: len(self.shared.names)])
        needs = dict(zip(self._rows, rest[len(self.shared.names) :], strict=True))
        shapes: list[Any] = []
        for i in self._differentiable:
            name, given = self.shared.names[i], call[i]
            index_name = self._rows.get(name)
            index = None if index_name is None else getattr(call, index_name)
            if given is None or not needs.get(name, True):
                shapes.append((0,))
            elif index is not None:
                shapes.append((*index.shape, given.shape[-1]))
            else:
                shapes.append(given.shape)
        results = tuple(args[0].new_empty(shape) for shape in shapes)
        return results if len(results) > 1 else results[0]

    def _backward_call(self, args: Args, trace: Args, grads: Args, needs: Sequence[bool]) -> Args:
        """The arguments of the backward op. ``grads``: one for each output, None where no gradient arrived."""
        first, *others = grads
        if first is None or others.count(None) < len(others):
            first, *others = self._filled_in(args, first, others)
        needed = [bool(needs[i]) for i in self._features]
        return (first, *others, *trace, *args[: len(self.shared.names)], *needed)

    def _filled_in(self, args: Args, first: Tensor | None, others: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients of the outputs as the backward op takes them: all but the first there, or None (or empty)."""
        absent = [g is None or (g.dim() == 1 and g.shape[0] == 0) for g in others]
        if first is not None and all(absent):
            return (first, *[None] * len(others))
        zeros = [torch.zeros_like(f) for f in self._fake(self.signature.call(*args[: len(self.signature.names)]))]
        first = zeros[0] if first is None else first
        if all(absent):
            return (first, *[None] * len(others))
        return (first, *(z if a else g for z, a, g in zip(zeros[1:], absent, others, strict=False)))

    def _trace_of(self, residuals: Sequence[Tensor]) -> Args:
        return tuple(residuals[-1:]) if self.has_trace else ()

    def _gradients(self, grads: Any, args: Args, needs: Sequence[bool]) -> list[Any]:
        """One gradient (or None) for each argument from the results of the backward op."""
        result = self._placed(grads, len(args), needs)
        return [g if g is None or g.dtype is a.dtype else g.to(a.dtype) for g, a in zip(result, args, strict=True)]

    def _placed(self, grads: Any, count: int, needs: Sequence[bool]) -> list[Any]:
        """The same in the precision of the backward op."""
        result: list[Any] = [None] * count
        for position, grad in zip(self._differentiable, _as_tuple(grads), strict=True):
            if needs[position]:
                result[position] = grad
        return result

    def _register_formulas(self) -> None:
        def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
            _remember(ctx, self, inputs, _as_tuple(output))

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            args, residuals = _recall(ctx)
            needs = ctx.needs_input_grad
            call = self._backward_call(args, self._trace_of(residuals), grads[: self.n_outputs], needs)
            return tuple(self._gradients(self.raw_backward(*call), args, needs))

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
            return op._without_trace(results)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors
            args = (*saved[: op.n_tensors], *ctx.constants)
            needs = ctx.needs_input_grad[1:]
            call = op._backward_call(args, op._trace_of(saved), grads[: op.n_outputs], needs)
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
            needs = ctx.needs_input_grad
            call = op._backward_call(args, op._trace_of(residuals), grads[: op.n_outputs], needs)
            return tuple(op._gradients(Backward.apply(*call), args, needs))

        @staticmethod
        def vmap(info: Any, in_dims: Args, *args: Any) -> Any:
            return _one_by_one(Functional, info.batch_size, in_dims, args)

    # Function.apply looks after torch.func's transforms first; none is active where the eager one is called.
    return super(torch.autograd.Function, Eager).apply, Functional


def by_name(signature: Signature, kernel: Callable[[Any], Any]) -> Callable[..., Any]:
    """A raw op's implementation that takes its arguments by name."""
    return lambda *args: kernel(signature.call(*args))


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


def _where_autograd_is() -> Any:
    """Raw ops are called below autograd; a formula that differentiates needs it back."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


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
