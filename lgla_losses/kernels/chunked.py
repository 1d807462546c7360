"""The engine for any device: PyTorch, in chunks of samples, which saves memory rather than time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lgla_losses import functional

#: Logits a chunk: small beside any batch that matters, large beside the cost of a call.
_CPU_CHUNK, _CHUNK = 1 << 18, 1 << 24


def statistics(
    source: Tensor,
    target: Tensor,
    group_index: Tensor,
    num_groups: int,
    *,
    scale: float | None,
    ignore_index: int,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Angles and their sums by group."""
    angles = source
    if scale is not None:
        angles = functional.angles_from_logits(source, torch.where(target == ignore_index, 0, target), scale)
    group = functional.target_groups(target, group_index, ignore_index)
    return angles, functional.aaw_statistics(angles, group, num_groups)[None]


def weights(
    angles: Tensor,
    target: Tensor,
    group_index: Tensor,
    parts: Tensor,
    *,
    ignore_index: int,
    num_ranks: int,
) -> tuple[Tensor, Tensor]:
    """Eq. 8 and the samples per rank."""
    group = functional.target_groups(target, group_index, ignore_index)
    sums = parts.sum(dim=0)
    samples = sums[:, -1].sum().clamp(min=1).to(angles.dtype)
    return functional.aaw_weights(angles, group, sums), samples / num_ranks


def weights_of(
    source: Tensor,
    target: Tensor,
    group_index: Tensor,
    num_groups: int,
    *,
    scale: float | None,
    ignore_index: int,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both, for one rank."""
    angles, parts = statistics(
        source, target, group_index, num_groups, scale=scale, ignore_index=ignore_index, check=check
    )
    return weights(angles, target, group_index, parts, ignore_index=ignore_index, num_ranks=1)


def forward(
    logits: Tensor,
    target: Tensor,
    table: Tensor | None,
    weights: Tensor | None,
    divisor: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
    gradient: Tensor | None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eq. 9, chunk by chunk; the state is not needed and left empty."""
    dtype = functional.compute_dtype(logits.dtype)
    losses = logits.new_empty(logits.shape[0], dtype=dtype)
    for rows in _chunks(logits):
        chunk = _Chunk(logits[rows], target[rows], table, ignore_index)
        weight = chunk.weights(weights, rows)
        loss = (label_smoothing - 1) * chunk.log_softmax.gather(-1, chunk.own)
        if label_smoothing:
            loss -= label_smoothing * chunk.log_softmax.mean(dim=-1, keepdim=True)
        losses[rows] = (weight * loss).masked_fill_(chunk.ignored, 0.0).sum(dim=(1, 2))
        if gradient is not None:
            chunk.write(
                gradient[rows], weight if divisor is None else weight * divisor.reciprocal(), label_smoothing
            )
    state = losses.new_zeros((*logits.shape[:2], 2))
    if not reduce:
        return losses, state
    total = losses.sum()
    return (total if divisor is None else total / divisor), state


def backward(
    logits: Tensor,
    target: Tensor,
    table: Tensor | None,
    weights: Tensor | None,
    upstream: Tensor,
    state: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    gradient: Tensor,
) -> None:
    """The gradient, chunk by chunk."""
    for rows in _chunks(logits):
        chunk = _Chunk(logits[rows], target[rows], table, ignore_index)
        weight = chunk.weights(weights, rows)
        chunk.write(gradient[rows], weight * upstream[rows, None, None].to(weight.dtype), label_smoothing)


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """In place, rounded once; without a look at the factor where that would wait for a device."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    gradient.copy_(gradient.to(factor.dtype) * factor)


def _chunks(logits: Tensor) -> Iterator[slice]:
    samples, row = logits.shape[0], logits.shape[1] * logits.shape[2]
    size = max(1, (_CPU_CHUNK if logits.device.type == "cpu" else _CHUNK) // max(1, row))
    return (slice(start, start + size) for start in range(0, samples, size))


class _Chunk:
    """Log-probabilities of some samples, and their targets as an index into them."""

    def __init__(self, logits: Tensor, target: Tensor, table: Tensor | None, ignore_index: int) -> None:
        dtype = functional.compute_dtype(logits.dtype)
        adjusted = logits.to(dtype) if table is None else logits + table.to(dtype)
        self.log_softmax = torch.log_softmax(adjusted, dim=-1)
        self.ignored = (target == ignore_index)[:, None, None]
        self.own = torch.where(self.ignored, 0, target[:, None, None]).expand(-1, logits.shape[1], -1)

    def weights(self, weights: Tensor | None, rows: slice) -> Tensor:
        if weights is None:
            return self.log_softmax.new_ones((1, 1, 1))
        return weights[rows, :, None].to(self.log_softmax.dtype)

    def write(self, gradient: Tensor, scale: Tensor, label_smoothing: float) -> None:
        """``scale * (softmax - smoothed one-hot)``; the log-probabilities are spent."""
        values = self.log_softmax.exp_()
        smooth = label_smoothing / values.shape[-1]
        own = scale * (values.gather(-1, self.own) - (1 - label_smoothing) - smooth)
        values *= scale
        if label_smoothing:
            values -= scale * smooth
        values.scatter_(-1, self.own, own)
        gradient.copy_(values.masked_fill_(self.ignored, 0.0))
