"""The adjusted cross entropy as an operator: one read of the logits, one write of the gradient.

Where the loss is a scalar its gradient is computed together with it, and ``backward`` hands it over.
Elsewhere ``backward`` computes it from the logits and two numbers a row: without reduction; for
float16, whose small gradients must meet the loss's scale before they are rounded; the second time
through a retained graph; and on a GPU under ``torch.compile``. Until ``backward`` the graph of a scalar
loss holds its gradient, which saved-tensor hooks (offloading) do not see. A 16-bit gradient is rounded
once, and once more where the gradient of the loss is no power of two, as those of loss scaling are.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses.grouping import ClassGrouper
from lgla_losses.kernels import Engine, chunked, native

logger = logging.getLogger(__name__)

#: The tensors whose gradients may be asked for; None for those that a loss goes without.
Inputs: TypeAlias = Sequence[Any]


def engine_for(backend: str, device: torch.device) -> Engine | None:
    """What computes for a backend on a device; None stands for plain PyTorch.

    Raises:
        ValueError: ``"triton"`` cannot run; the message says what is missing.
    """
    if backend == "reference":
        return None
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        missing = triton_missing(device)
        if missing is None:
            from lgla_losses.kernels import triton

            return triton
        if backend == "triton":
            raise ValueError(f"backend: 'triton' cannot run: {missing}; 'auto' takes the fastest that can")
        log_once(f"backend 'triton' cannot run: {missing}; plain PyTorch runs instead")
    elif device.type == "cpu":
        if native.LIBRARY is not None:
            return native
        log_once(f"the C library of backend 'fused' cannot run: {native.MISSING}; PyTorch runs instead")
    elif backend == "auto":
        log_once(f"there is no engine for {device.type}; plain PyTorch runs instead")
    return chunked if backend == "fused" else None


def unfit(*inputs: object) -> str | None:
    """Why no engine takes such tensors, or None: an engine reads memory, and nobody sees it do so."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return "operations are being traced"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    for tensor in inputs:
        if not isinstance(tensor, Tensor):
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, got one of type {type(tensor).__name__}"
        functorch = torch._C._functorch
        if functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor):
            return "it does not run under torch.func transforms"
        if tensor.is_meta or tensor.is_neg():
            return "it reads memory, got a tensor without any, or one that is a negated view of it"
    return None


def triton_missing(device: torch.device | None = None) -> str | None:
    """Why Triton cannot run, or None; without a device, whether it could on any."""
    if importlib.util.find_spec("triton") is None:
        return "it is not installed (pip install triton, or a PyTorch with CUDA)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if device is not None and device.type != "cuda":
        return f"it takes tensors on CUDA devices, got logits on {device}"
    return None


def log_once(message: str) -> None:
    """Say at level INFO what is slower than it might be; not to a compiler, which cannot trace that."""
    if not torch.compiler.is_compiling():
        _log_once(message)


@cache
def _log_once(message: str) -> None:
    logger.info(message)


def total(losses: Tensor, divisor: Tensor | None) -> Tensor:
    """The sum of the losses ``[N]`` over the divisor; None stands for 1."""
    return losses.sum() if divisor is None else losses.sum() / divisor


class Call(NamedTuple):
    """Everything but the logits.

    Attributes:
        engine: what computes.
        target: class indices ``[N]``, or what ``lgla_losses.losses._targets`` says.
        table: adjustments ``[K, C]``.
        weights: constants ``[N, K]``, or None for ones.
        divisor: scalar that a reduced loss is divided by, or None for 1.
        ignore_index: target of samples that count nothing.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        reduce: one sum instead of a loss a sample.
        check: as in :class:`~lgla_losses.kernels.Engine`.
    """

    engine: Engine
    target: Tensor
    table: Tensor
    weights: Tensor | None
    divisor: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduce: bool
    check: bool = False

    def reduced(self, losses: Tensor) -> Tensor:
        """The losses ``[N]`` as they are, or their sum over the divisor."""
        return total(losses, self.divisor) if self.reduce else losses

    def per_sample(self, upstream: Tensor) -> Tensor:
        """The gradient of every sample's loss ``[N]``, given that of the result."""
        if not self.reduce:
            return upstream
        upstream = upstream if self.divisor is None else upstream / self.divisor
        return upstream.expand(self.target.shape[: -1 if self.target.is_floating_point() else None])


class Fusible(Protocol):
    """A loss whose gradient can be computed together with it."""

    @property
    def call(self) -> Call:
        """Everything but the inputs."""

    def run(
        self, inputs: Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """The loss, the gradients that are wanted, and a state that may help to compute them later."""

    def gradients(
        self,
        inputs: Inputs,
        upstream: Tensor,
        state: Any,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients for that of the loss."""

    def differentiable(self, inputs: Inputs) -> Tensor:
        """The loss in plain PyTorch, for derivatives of derivatives."""


#: Whether the gradient of a scalar loss is computed with it: logits are read and a gradient is written, two
#: passes over memory, and two more where the upstream gradient is not 1, as under loss scaling. In `backward`
#: it takes three, whatever the upstream gradient.
_AT_ONCE = True


def evaluate(problem: Fusible, *inputs: Tensor | None) -> Tensor:
    """The loss; its graph, where a gradient can be asked for, holds the gradients themselves."""
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
        loss: Tensor = _Fused.apply(problem, *inputs)  # type: ignore[no-untyped-call]
        return loss
    return problem.run(inputs, [False] * len(inputs))[0]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Fusible, *inputs: Tensor | None) -> Tensor:
        wanted, call = ctx.needs_input_grad[1:], problem.call
        half = any(v is not None and v.dtype == torch.float16 for v in inputs)
        at_once = _AT_ONCE and call.reduce and not half
        loss, gradients, state = problem.run(inputs, [w and at_once for w in wanted])
        ctx.problem, ctx.gradients = problem, gradients if at_once else None
        # Saved, so that a change of any before `backward` needs it raises there. What was made in
        # inference mode knows of no changes, and cannot be saved.
        constants = [
            None if v is None or v.is_inference() else v
            for v in (call.target, call.table, call.weights, call.divisor)
        ]
        ctx.save_for_backward(state, *constants, *inputs)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or unfit(upstream):
            return None, *_differentiable_gradients(ctx.problem, ctx.saved_tensors[5:], upstream, wanted)
        # From now on they are the caller's; a second backward computes its own.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            state, _, _, _, _, *inputs = ctx.saved_tensors
            return None, *ctx.problem.gradients(inputs, upstream, state, wanted)
        for gradient in gradients:
            if gradient is not None:
                ctx.problem.call.engine.rescale_(gradient, upstream)
        return None, *gradients


def _differentiable_gradients(
    problem: Fusible, inputs: Inputs, upstream: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    chosen = [v for v, w in zip(inputs, wanted, strict=True) if w and v is not None]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = problem.differentiable(inputs)
    found = iter(torch.autograd.grad(loss, chosen, upstream, create_graph=twice))
    return [next(found) if w else None for w in wanted]


class CrossEntropy(NamedTuple):
    """Eq. 9 for logits ``[N, K, C]``."""

    call: Call

    def run(
        self, inputs: Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """As in :class:`Fusible`."""
        logits, call = inputs[0], self.call
        gradient = torch.empty_like(logits) if wanted[0] else None
        loss, state = call.engine.forward(
            logits,
            call.target,
            call.table,
            call.weights,
            call.divisor,
            ignore_index=call.ignore_index,
            label_smoothing=call.label_smoothing,
            reduce=call.reduce,
            gradient=gradient,
            check=call.check,
        )
        return loss, [gradient], state

    def gradients(
        self,
        inputs: Inputs,
        upstream: Tensor,
        state: Any,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """As in :class:`Fusible`."""
        logits, call = inputs[0], self.call
        gradient = torch.empty_like(logits)
        call.engine.backward(
            logits,
            call.target,
            call.table,
            call.weights,
            call.per_sample(upstream),
            state,
            ignore_index=call.ignore_index,
            label_smoothing=call.label_smoothing,
            gradient=gradient,
        )
        return [gradient]

    def differentiable(self, inputs: Inputs) -> Tensor:
        """As in :class:`Fusible`."""
        call = self.call
        losses = functional.lgla_loss(
            inputs[0],
            call.target,
            call.table,
            call.weights,
            ignore_index=call.ignore_index,
            label_smoothing=call.label_smoothing,
        )
        return call.reduced(losses)


def compiled_weights(
    source: Tensor,
    target: Tensor,
    grouper: ClassGrouper,
    scale: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``weights_of`` of an engine, for :func:`torch.compile`."""
    weights: tuple[Tensor, Tensor] = torch.ops.lgla_losses.angular_weights(
        source, target, grouper.constant("group_index"), grouper.num_groups, scale, ignore_index, backend
    )
    return weights


def cross_entropy(call: Call, logits: Tensor, backend: str) -> Tensor:
    """Eq. 9 for logits ``[N, K, C]``: an operator for :func:`torch.compile`, else as autograd sees it."""
    if not torch.compiler.is_compiling():
        return evaluate(CrossEntropy(call), logits)
    # Field by field: the compiler of PyTorch 2.6 takes no slice of a named tuple.
    result: tuple[Tensor, Tensor] = torch.ops.lgla_losses.cross_entropy(
        logits,
        call.target,
        call.table,
        call.weights,
        call.divisor,
        call.ignore_index,
        call.label_smoothing,
        call.reduce,
        torch.is_grad_enabled() and logits.requires_grad,
        backend,
    )
    return result[0]


# For torch.compile. Defined by hand, as the decorator for it costs tens of microseconds a call.
_OPERATORS = torch.library.Library("lgla_losses", "DEF")
_ARGUMENTS = (
    "Tensor logits, Tensor target, Tensor table, Tensor? weights, Tensor? divisor, SymInt ignore_index, "
    "float label_smoothing, bool reduce, bool learns, str backend"
)
_OPERATORS.define(
    "angular_weights(Tensor source, Tensor target, Tensor group_index, SymInt num_groups, float? scale, "
    "SymInt ignore_index, str backend) -> (Tensor, Tensor)"
)
_OPERATORS.define(f"cross_entropy({_ARGUMENTS}) -> (Tensor, Tensor)", tags=torch.Tag.needs_fixed_stride_order)
_OPERATORS.define(
    f"cross_entropy_backward(Tensor upstream, Tensor state, {_ARGUMENTS}) -> Tensor",
    tags=torch.Tag.needs_fixed_stride_order,
)


def _weights(source: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *batch, scale, ignore_index, backend = arguments
    engine = engine_for(backend, source.device) or chunked
    return engine.weights_of(source, *batch, scale=scale, ignore_index=ignore_index)


def _weights_shapes(source: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = functional.compute_dtype(source.dtype)
    return source.new_empty(source.shape[:2], dtype=dtype), source.new_empty((), dtype=dtype)


def _call(logits: Tensor, *arguments: Any) -> Call:
    *others, _learns, backend = arguments
    return Call(engine_for(backend, logits.device) or chunked, *others)


def _operator(logits: Tensor, *arguments: Any) -> tuple[Tensor, Any]:
    """The loss, and the state for its gradient."""
    call, learns = _call(logits, *arguments), arguments[-2]
    # A compiler knows no way to give a gradient to an operator that hands it on, so the state, which it
    # keeps, carries it as an attribute; where that is lost, backward computes the gradient again. On a
    # GPU it always does: that moves no more bytes, and CUDA graphs replay no attributes.
    at_once = learns and call.reduce and call.engine is native and logits.dtype != torch.float16
    state: Any
    loss, (gradient,), state = CrossEntropy(call).run([logits], [at_once])
    state.gradient = gradient
    return loss, state


def _operator_backward(upstream: Tensor, state: Any, logits: Tensor, *arguments: Any) -> Any:
    call = _call(logits, *arguments)
    # From now on it is the caller's; a second backward computes its own.
    gradient, state.gradient = getattr(state, "gradient", None), None
    if gradient is None:
        return CrossEntropy(call).gradients([logits], upstream, state, [True])[0]
    call.engine.rescale_(gradient, upstream)
    return gradient


def _shapes(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    samples, experts, _classes = logits.shape
    reduce, dtype = arguments[-3], functional.compute_dtype(logits.dtype)
    return (
        logits.new_empty(() if reduce else (samples,), dtype=dtype),
        logits.new_empty((samples, experts, 2), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.reduce, ctx.learns, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _gradients(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    options = ctx.ignore_index, ctx.label_smoothing, ctx.reduce, ctx.learns, ctx.backend
    gradient = torch.ops.lgla_losses.cross_entropy_backward(upstream, *ctx.saved_tensors, *options)
    return gradient, *[None] * 9


def refuse_second_derivative(ctx: Any, *upstream: Tensor) -> None:
    """The derivative of an operator's backward."""
    raise RuntimeError(
        "the compiled loss of lgla_losses has no second derivative; leave it out of torch.compile, or "
        "construct it with backend='reference'"
    )


_OPERATORS.impl("angular_weights", _weights, "CompositeExplicitAutograd")
_OPERATORS.impl("cross_entropy", _operator, "CompositeExplicitAutograd")
_OPERATORS.impl("cross_entropy_backward", _operator_backward, "CompositeExplicitAutograd")
torch.library.register_fake("lgla_losses::angular_weights", _weights_shapes, lib=_OPERATORS)
torch.library.register_fake("lgla_losses::cross_entropy", _shapes, lib=_OPERATORS)
torch.library.register_fake(
    "lgla_losses::cross_entropy_backward",
    lambda upstream, state, logits, *_: torch.empty_like(logits),
    lib=_OPERATORS,
)
torch.library.register_autograd("lgla_losses::cross_entropy", _gradients, setup_context=_save, lib=_OPERATORS)
torch.library.register_autograd(
    "lgla_losses::cross_entropy_backward", refuse_second_derivative, lib=_OPERATORS
)
