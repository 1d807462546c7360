"""The engines as operators of PyTorch, for :func:`torch.compile`, which cannot see into them.

They are defined by hand, because PyTorch's decorator costs tens of microseconds per call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._torch import unfit
from lgla_losses.kernels import OPTIONS, TENSORS, Engine, Rows, autograd, chunked, with_fields
from lgla_losses.kernels.autograd import CrossEntropy, Inputs, evaluate, per_sample, total, with_experts
from lgla_losses.kernels.blockwise import Blockwise
from lgla_losses.kernels.linear import LinearCrossEntropy

_OPERATORS = torch.library.Library("lgla_losses", "DEF")

#: The fields of ``Rows``, in order.
_ROWS = (
    "Tensor target, Tensor? table, Tensor? weights, Tensor? divisor, Tensor? class_weight, Tensor? margin, "
    "SymInt ignore_index, float label_smoothing, float gamma, bool reduce"
)
_IN_ORDER = torch.Tag.needs_fixed_stride_order


def _engine(backend: str, device: torch.device) -> Engine:
    return autograd.engine_for(backend, device) or chunked


def _define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    gradients: Callable[..., Any],
    save: Callable[..., None] | None = None,
) -> None:
    """Define an operator: its function, the result that a compiler expects, and its derivative."""
    _OPERATORS.define(f"{name}({schema}", tags=_IN_ORDER)
    _OPERATORS.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lgla_losses::{name}", shapes, lib=_OPERATORS)
    torch.library.register_autograd(f"lgla_losses::{name}", gradients, setup_context=save, lib=_OPERATORS)


# --- Eq. 9 of logits ----------------------------------------------------------------------------------------


def fused_loss(logits: Sequence[Tensor], rows: Rows, backend: str) -> Tensor:
    """Compute Eq. 9 for logits ``[*B, k, C]``, with an engine that can run."""
    constants = [value for value in rows if isinstance(value, Tensor)]
    why = None if backend == "reference" else unfit(*logits, *constants)
    if backend != "reference" and any(v.requires_grad for v in constants if v is not rows.divisor):
        why = "it treats the table and weights as constants, but one requires a gradient"
    if why is not None:
        autograd.without_engine(backend, why)
    engine = autograd.engine_for(backend, logits[0].device) if why is None else None
    if logits[0].dim() > 3 and engine is not None:
        engine = None if torch.compiler.is_compiling() else Blockwise(engine)
    return evaluate(engine, rows, logits, CrossEntropy, cross_entropies, backend)


class _Call(NamedTuple):
    """Name the arguments of the operator of Eq. 9."""

    logits: Tensor
    rows: Rows
    backend: str

    @classmethod
    def of(cls, logits: Tensor, *arguments: Any) -> _Call:
        *rows, backend = arguments
        return cls(logits, Rows(*rows), backend)


def cross_entropies(logits: Inputs, rows: Rows, backend: str) -> Tensor:
    """Compute Eq. 9 for logits ``[N, k, C]``, with one operator call for each tensor."""
    losses: list[Tensor] = []
    begin = 0
    for block in logits if logits[0].dim() > 2 else with_experts(logits):
        experts = slice(begin, begin := begin + block.shape[1])
        own = with_fields(
            rows,
            table=None if rows.table is None else rows.table[experts],
            weights=None if rows.weights is None else rows.weights[:, experts],
        )
        loss, _ = torch.ops.lgla_losses.cross_entropy(block, *own, backend)
        losses.append(loss)
    return functools.reduce(torch.add, losses)


def _cross_entropy(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Compute the loss, and a state from which ``backward`` computes the gradient.

    The gradient is not computed here: a compiler would have to copy it, which takes longer.
    """
    call = _Call.of(*arguments)
    problem = CrossEntropy(_engine(call.backend, call.logits.device), call.rows)
    loss, _, state = problem.run([call.logits], [False])
    return loss, state


def _cross_entropy_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call.of(*arguments)
    samples, experts, _ = call.logits.shape
    dtype = functional.compute_dtype(call.logits.dtype)
    return (
        call.logits.new_empty(() if call.rows.reduce else (samples,), dtype=dtype),
        call.logits.new_empty((samples, experts, 2), dtype=dtype),
    )


def _cross_entropy_backward(upstream: Tensor, state: Tensor, *arguments: Any) -> Tensor | None:
    call = _Call.of(*arguments)
    problem = CrossEntropy(_engine(call.backend, call.logits.device), call.rows)
    upstream = per_sample(call.rows, upstream)
    return problem.gradients([call.logits], upstream, state, [True])[0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call, (_, state) = _Call.of(*inputs), output
    ctx.mark_non_differentiable(state)
    ctx.options, ctx.backend = tuple(call.rows)[OPTIONS], call.backend
    ctx.save_for_backward(state, call.logits, *tuple(call.rows)[TENSORS])


def _gradients(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.lgla_losses.cross_entropy_backward(
        upstream, *ctx.saved_tensors, *ctx.options, ctx.backend
    )
    return gradient, *[None] * (len(Rows._fields) + 1)


def _refuse_second_derivative(ctx: Any, *upstream: Tensor) -> None:
    raise RuntimeError(
        "the compiled loss of lgla_losses has no second derivative; do not compile it, or construct it "
        "with backend='reference'"
    )


_define(
    "cross_entropy",
    f"Tensor logits, {_ROWS}, str backend) -> (Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_shapes,
    _gradients,
    _save,
)
_define(
    "cross_entropy_backward",
    f"Tensor upstream, Tensor state, Tensor logits, {_ROWS}, str backend) -> Tensor",
    _cross_entropy_backward,
    lambda upstream, state, logits, *_: torch.empty_like(logits),
    _refuse_second_derivative,
)


# --- Eq. 9 of features and class weights --------------------------------------------------------------------


class _LinearCall(NamedTuple):
    """Name the arguments of the operator of the linear loss."""

    inputs: tuple[Tensor, Tensor, Tensor | None]
    rows: Rows
    scale: float | None
    backend: str

    @classmethod
    def of(cls, features: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> _LinearCall:
        *rows, scale, backend = arguments
        return cls((features, weight, bias), Rows(*rows), scale, backend)

    def problem(self) -> LinearCrossEntropy:
        return LinearCrossEntropy(_engine(self.backend, self.inputs[0].device), self.rows, self.scale)


def linear_cross_entropy(
    inputs: Sequence[Tensor | None], rows: Rows, backend: str, *, scale: float | None
) -> Tensor:
    """Compute Eq. 9 from features ``[N, K, d]``, weights ``[K, C, d]`` and a bias ``[K, C]`` or None."""
    own = with_fields(rows, divisor=None, reduce=False)
    losses: Tensor = torch.ops.lgla_losses.linear_cross_entropy(*inputs, *own, scale, backend)
    return total(losses, rows.divisor) if rows.reduce else losses


def _linear(*arguments: Any) -> Tensor:
    call = _LinearCall.of(*arguments)
    return call.problem().run(call.inputs, (False, False, False))[0]


def _linear_shape(features: Tensor, *_: object) -> Tensor:
    return features.new_empty(len(features), dtype=functional.compute_dtype(features.dtype))


def _linear_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = _LinearCall.of(*arguments)
    wanted = True, True, call.inputs[2] is not None
    found = call.problem().gradients(call.inputs, upstream, None, wanted)
    return tuple(upstream.new_empty(0) if gradient is None else gradient for gradient in found)


def _linear_backward_shapes(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    absent = upstream.new_empty(0)
    return tuple(absent if v is None else v.new_empty(v.shape) for v in _LinearCall.of(*arguments).inputs)


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = _LinearCall.of(*inputs)
    ctx.options, ctx.scale, ctx.backend = tuple(call.rows)[OPTIONS], call.scale, call.backend
    ctx.has_bias = call.inputs[2] is not None
    ctx.save_for_backward(*call.inputs, *tuple(call.rows)[TENSORS])


def _linear_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, for_bias = torch.ops.lgla_losses.linear_cross_entropy_backward(
        upstream, *ctx.saved_tensors, *ctx.options, ctx.scale, ctx.backend
    )
    return *gradients, for_bias if ctx.has_bias else None, *[None] * (len(Rows._fields) + 2)


_LINEAR = f"Tensor features, Tensor weight, Tensor? bias, {_ROWS}, float? scale, str backend"
_define(
    "linear_cross_entropy", f"{_LINEAR}) -> Tensor", _linear, _linear_shape, _linear_gradients, _linear_save
)
_define(
    "linear_cross_entropy_backward",
    f"Tensor upstream, {_LINEAR}) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_shapes,
    _refuse_second_derivative,
)
