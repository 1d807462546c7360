"""The adjusted cross entropy as autograd sees it: one read of the logits, one write of the gradient.

If the loss is a scalar, its gradient is computed together with it, and ``backward`` passes it on. Otherwise
``backward`` computes it from the logits and two numbers per row: without reduction; for float16, where small
gradients must be multiplied by the loss scale before rounding; the second time through a retained graph; and
under ``torch.compile``. Until ``backward``, the graph of a scalar loss holds its gradient, which saved-tensor
hooks (offloading) do not see. A 16-bit gradient is rounded once, and once more if the gradient of the loss is
not a power of two; loss scaling uses powers of two.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._torch import unfit
from lgla_losses.kernels import TENSORS, Engine, Rows, chunked, native, with_fields

logger = logging.getLogger(__name__)

#: Looked up here, because a compiler of PyTorch before 2.13 cannot trace ``find_spec``.
_HAS_TRITON = importlib.util.find_spec("triton") is not None

#: The tensors whose gradients may be needed; None for those that a loss does not use.
Inputs: TypeAlias = Sequence[Any]


def without_engine(backend: str, unfit: str) -> None:
    """Log once that plain PyTorch computes the loss; ``unfit`` says why no engine can.

    Raises:
        ValueError: the backend is not ``"auto"``.
    """
    if backend != "auto":
        raise ValueError(f"backend: {backend!r} cannot run: {unfit}; 'auto' takes what can run")
    log_once(f"backend 'auto' takes 'reference': {unfit}")


def engine_for(backend: str, device: torch.device) -> Engine | None:
    """Choose the engine of a backend on a device; None stands for plain PyTorch.

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
            raise ValueError(
                f"backend: 'triton' cannot run: {missing}; 'auto' takes the fastest that can run"
            )
        log_once(f"backend 'triton' cannot run: {missing}; plain PyTorch runs instead")
    elif device.type == "cpu":
        if native.LIBRARY is not None:
            return native
        log_once(f"the C library of backend 'fused' cannot run: {native.MISSING}; PyTorch runs instead")
    elif backend == "auto":
        log_once(f"no engine runs on {device.type}; plain PyTorch runs instead")
    return chunked if backend == "fused" else None


def triton_missing(device: torch.device | None = None) -> str | None:
    """Say why Triton cannot run on a device; give None if it can.

    Without a device, say why it cannot run on any.
    """
    if not _HAS_TRITON:
        return "it is not installed (pip install triton, or a PyTorch with CUDA)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if device is not None and device.type != "cuda":
        return f"it takes tensors on CUDA devices, got logits on {device}"
    return None


def log_once(message: str) -> None:
    """Log once, at level INFO, what is slower than it could be.

    Under a compiler it does nothing, because logging cannot be traced.
    """
    if not torch.compiler.is_compiling():
        _log_once(message)


@cache
def _log_once(message: str) -> None:
    logger.info(message)


class Problem(Protocol):
    """Describe a loss whose gradient can be computed together with it."""

    @property
    def rows(self) -> Rows:
        """Everything that the loss reads, except the inputs."""

    @property
    def engine(self) -> Engine:
        """The engine that computes."""

    def run(
        self, inputs: Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor | None], Tensor | None]:
        """Compute the loss, the required gradients, and a state that helps to compute gradients later."""

    def gradients(
        self, inputs: Inputs, upstream: Tensor, state: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of the inputs from those of the samples' losses, ``upstream`` ``[*B]``."""

    def differentiable(self, inputs: Inputs) -> Tensor:
        """Compute the loss in plain PyTorch, which second derivatives need."""


#: Whether the gradient of a scalar loss is computed with it: logits are read and a gradient is written, two
#: passes over memory, and two more if the upstream gradient is not 1, as under loss scaling. In `backward` it
#: takes three for any upstream gradient.
_AT_ONCE = True


def evaluate(
    engine: Engine | None,
    rows: Rows,
    inputs: Inputs,
    problem: Callable[[Engine, Rows], Problem],
    operator: Callable[[Inputs, Rows, str], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute a loss. If a gradient may be needed, the graph holds the gradients themselves.

    Args:
        engine: the engine that computes; None for plain PyTorch.
        rows: everything that the loss reads, except the inputs; ``reduce`` says whether the losses are added
            up.
        inputs: the tensors whose gradients may be needed.
        problem: makes the problem that autograd sees.
        operator: the operator that a compiler sees; None for a loss that is not compiled.
        backend: backend by which the operator chooses its engine.
    """
    divisor, reduce = rows.divisor, rows.reduce
    # An engine treats the divisor as a constant.
    if engine is None or (divisor is not None and divisor.requires_grad):
        rows = with_fields(rows, reduce=False, divisor=None)

    if engine is None:
        loss = problem(chunked, rows).differentiable(inputs)
    elif operator is not None and torch.compiler.is_compiling():
        loss = operator(inputs, rows, backend)
    elif torch.is_grad_enabled():
        loss = _Fused.apply(problem(engine, rows), *inputs)  # type: ignore[no-untyped-call]
    else:  # here autograd's function would still report that a gradient is needed
        loss = problem(engine, rows).run(inputs, [False] * len(inputs))[0]
    return total(loss, divisor) if reduce and not rows.reduce else loss


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, *inputs: Tensor | None) -> Tensor:
        wanted, rows = ctx.needs_input_grad[1:], problem.rows
        at_once = _AT_ONCE and rows.reduce and inputs[0].dtype != torch.float16  # type: ignore[union-attr]
        loss, gradients, state = problem.run(inputs, wanted if at_once else [False] * len(inputs))

        ctx.problem, ctx.gradients = problem, gradients if at_once else None
        # Saved, so that `backward` raises if any of them has changed. Tensors made in inference mode do not
        # count changes, and cannot be saved.
        constants = []
        for value in tuple(rows)[TENSORS]:
            if isinstance(value, Tensor) and not value.is_inference():
                constants.append(value)
        ctx.save_for_backward(state, *inputs, *constants)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        problem, wanted = ctx.problem, ctx.needs_input_grad[1:]
        state, *saved = ctx.saved_tensors
        inputs = saved[: len(wanted)]
        if torch.is_grad_enabled() or unfit(upstream):
            return None, *_differentiable_gradients(problem, inputs, upstream, wanted)

        # From now on they belong to the caller; a second backward computes its own.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            upstream = per_sample(problem.rows, upstream)
            return None, *problem.gradients(inputs, upstream, state, wanted)
        for gradient in gradients:
            if gradient is not None:
                problem.engine.rescale_(gradient, upstream)
        return None, *gradients


def _differentiable_gradients(
    problem: Problem, inputs: Inputs, upstream: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    chosen = [v for v, w in zip(inputs, wanted, strict=True) if w and v is not None]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = problem.differentiable(inputs)
    found = iter(torch.autograd.grad(loss, chosen, upstream, create_graph=twice))
    return [next(found) if w else None for w in wanted]


def per_sample(rows: Rows, upstream: Tensor) -> Tensor:
    """Compute the gradient of every sample's loss ``[*B]`` from that of the result."""
    if not rows.reduce:
        return upstream
    target = rows.target
    if rows.divisor is not None:
        upstream = (upstream / nonzero(rows.divisor)).to(upstream.dtype)
    return upstream.expand(target.shape[:-1] if target.is_floating_point() else target.shape)


def nonzero(divisor: Tensor) -> Tensor:
    """Replace a divisor of 0 by 1: without samples all losses are 0."""
    return divisor + (divisor == 0)


def total(losses: Tensor, divisor: Tensor | None) -> Tensor:
    """Add up the losses ``[*B]`` and divide by the divisor; None stands for 1."""
    return losses.sum() if divisor is None else losses.sum() / nonzero(divisor).to(losses.dtype)


def with_experts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Add a dimension of experts to tensors ``[*B, C]`` of one expert each: ``[*B, 1, C]``."""
    return [tensor.unsqueeze(-2) for tensor in tensors]


class CrossEntropy(NamedTuple):
    """Compute Eq. 9 for logits ``[*B, k, C]``, or with ``of_one`` for one tensor ``[*B, C]`` per expert."""

    engine: Engine
    rows: Rows
    of_one: bool = False

    def run(
        self, inputs: Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor | None], Tensor | None]:
        """Compute the loss, as in :class:`Problem`."""
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, logits in enumerate(inputs):
            if wanted[i]:
                gradients[i] = torch.empty_like(logits)
        blocks, into = inputs, gradients
        if self.of_one:
            # Inside autograd's function a view costs almost nothing, outside it an operation in `backward`.
            blocks, into = with_experts(inputs), [None if v is None else v.unsqueeze(-2) for v in gradients]
        loss, state = self.engine.forward(blocks, self.rows, into)
        return loss, gradients, state

    def gradients(
        self, inputs: Inputs, upstream: Tensor, state: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Compute the gradients, as in :class:`Problem`."""
        gradients = [torch.empty_like(v) if w else None for v, w in zip(inputs, wanted, strict=True)]
        blocks, into = inputs, gradients
        if self.of_one:
            blocks, into = with_experts(inputs), [None if v is None else v.unsqueeze(-2) for v in gradients]
        self.engine.backward(blocks, self.rows, upstream, state, into)
        return gradients

    def differentiable(self, inputs: Inputs) -> Tensor:
        """Compute the loss in plain PyTorch, as in :class:`Problem`."""
        return plain_cross_entropy(with_experts(inputs) if self.of_one else inputs, self.rows)


def plain_cross_entropy(logits: Sequence[Tensor], rows: Rows) -> Tensor:
    """Compute Eq. 9 for logits ``[*B, k, C]`` in plain, differentiable PyTorch."""
    target, table = rows.target, rows.table
    experts = [v.movedim(-1, 1) for block in logits for v in block.unbind(-2)]
    if table is None:
        table = target.new_zeros((len(experts), experts[0].shape[1]), dtype=experts[0].dtype)
    elif torch.compiler.is_compiling() and not table.requires_grad:
        # Else a compiler converts it again for every sample; a value seen through strides is computed first.
        table = table.to(functional.compute_dtype(experts[0].dtype)).contiguous()
        table = table.as_strided(table.shape, table.stride())
    losses = functional.lgla_loss(
        experts,
        target.movedim(-1, 1) if target.is_floating_point() else target,
        table,
        rows.weights,
        class_weight=rows.class_weight,
        margin=rows.margin,
        gamma=rows.gamma,
        ignore_index=rows.ignore_index,
        label_smoothing=rows.label_smoothing,
    )
    return total(losses, rows.divisor) if rows.reduce else losses
