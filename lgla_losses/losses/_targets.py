"""Targets that are no class index a sample: maps of them, as in segmentation, and class probabilities.

Here samples come first and may have several dimensions ``B``: logits ``[B, K, C]`` are a view of maps
``[N, K, C, *S]`` with ``B = [N, *S]``. Blocks of samples are copied, never the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses.kernels import autograd
from lgla_losses.weighting import AAWWeighter

#: Logits a block: few enough to stay in a processor's cache, and many beside the cost of a call.
_CPU_BLOCK, _BLOCK = 1 << 19, 1 << 24

#: Slices of the first dimensions of the samples.
Block = tuple[slice, ...]


def samples_first(logits: Tensor) -> Tensor:
    """``[N, *S, K, C]`` as a view of ``[N, K, C, *S]``."""
    return logits.movedim((1, 2), (-2, -1))


def blocks_of(samples: Sequence[int], width: int, device: torch.device) -> Iterator[Block]:
    """Blocks of samples that have so many logits each; one of an empty batch, and one for a compiler."""
    if torch.compiler.is_compiling() or 0 in samples:
        yield (slice(None),)
        return
    most = max(1, (_CPU_BLOCK if device.type == "cpu" else _BLOCK) // max(1, width))
    of_item = math.prod(samples[1:])
    if of_item <= most:
        step = most // of_item
        yield from ((slice(n, n + step),) for n in range(0, samples[0], step))
        return
    lines = max(1, most * samples[1] // of_item)
    for n in range(samples[0]):
        yield from ((slice(n, n + 1), slice(s, s + lines)) for s in range(0, samples[1], lines))


def rows_of(tensor: Tensor, trailing: int) -> Tensor:
    """The samples in one dimension; a view where the memory allows."""
    return tensor.flatten(0, tensor.dim() - trailing - 1)


def own_angles(experts: Sequence[Tensor], target: Tensor, scale: float) -> Tensor:
    """The angles of Eq. 7 ``[M, K]`` from cosine logits, tensors ``[B, k, C]`` of all K experts together."""
    own = [
        v.detach().gather(-1, target[..., None, None].expand(*v.shape[:-1], 1)).squeeze(-1) for v in experts
    ]
    return functional.angles_of(rows_of(torch.cat(own, dim=-1), 1), scale)


def own_angles_from_features(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The angles of Eq. 7 ``[M, K]`` from features ``[B, K, d]`` and weights ``[K, C, d]``."""
    blocks = blocks_of(target.shape, features.shape[-2:].numel(), features.device)
    angles = [
        functional.angles_from_features(rows_of(features[block], 2), weight, target[block].flatten())
        for block in blocks
    ]
    return torch.cat(angles)


def class_angles(experts: Sequence[Tensor], scale: float) -> Callable[[Block], Tensor]:
    """Of a block the angles to every class ``[M, K, C]``, from cosine logits."""

    def angles(block: Block) -> Tensor:
        return functional.angles_of(torch.cat([rows_of(v.detach()[block], 2) for v in experts], dim=1), scale)

    return angles


def class_angles_from_features(features: Tensor, weight: Tensor) -> Callable[[Block], Tensor]:
    """Of a block the angles to every class ``[M, K, C]``, from features and weights."""
    dtype = functional.compute_dtype(torch.promote_types(features.dtype, weight.dtype))
    centres = functional.unit_vectors(weight.detach().to(dtype))

    def angles(block: Block) -> Tensor:
        rows = functional.unit_vectors(rows_of(features.detach()[block], 2).to(dtype))
        return torch.einsum("nkd,kcd->nkc", rows, centres).clamp(-1.0, 1.0).acos()

    return angles


def soft_statistics(
    angles: Callable[[Block], Tensor],
    blocks: Sequence[Block],
    probabilities: Tensor,
    sample_weight: Tensor | None,
    weighter: AAWWeighter,
    num_experts: int,
) -> Tensor:
    """``functional.soft_aaw_statistics`` of probabilities ``[B, C]``, a block at a time."""
    grouper = weighter.grouper
    dtype = functional.widest_dtype(probabilities.device)
    total = probabilities.new_zeros((grouper.num_groups, num_experts + 1), dtype=dtype)
    for block in blocks:
        total = total + functional.soft_aaw_statistics(
            angles(block),
            rows_of(probabilities[block], 1),
            grouper.constant("group_index"),
            grouper.num_groups,
            None if sample_weight is None else sample_weight[block].flatten(),
        )
    return total


def soft_weights(
    angles: Callable[[Block], Tensor],
    blocks: Sequence[Block],
    probabilities: Tensor,
    statistics: Tensor,
    group_index: Tensor,
) -> Tensor:
    """``functional.soft_aaw_weights`` of probabilities ``[B, C]``, a block at a time: ``[B, K]``."""
    weights = [
        functional.soft_aaw_weights(angles(block), rows_of(probabilities[block], 1), group_index, statistics)
        for block in blocks
    ]
    return torch.cat(weights).view(*probabilities.shape[:-1], statistics.shape[1] - 1)


class BlockwiseCrossEntropy(NamedTuple):
    """Eq. 9 for logits ``[B, k, C]``, in one tensor or several that hold all K experts together.

    Targets are class indices ``[B]`` or probabilities ``[B, C]``, weights ``[B, K]``, losses ``[B]``.
    """

    call: autograd.Call

    def run(
        self, inputs: autograd.Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """As in :class:`~lgla_losses.kernels.autograd.Fusible`."""
        losses, gradients = self._in_blocks(inputs, wanted, self.call.weights, self.call.divisor)
        return self.call.reduced(losses), gradients, None

    def gradients(
        self, inputs: autograd.Inputs, upstream: Tensor, state: Any, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """As in :class:`~lgla_losses.kernels.autograd.Fusible`."""
        call, upstream = self.call, self.call.per_sample(upstream)
        weights = upstream[..., None].expand(*upstream.shape, len(call.table))
        if call.weights is not None:
            weights = weights * call.weights
        return self._in_blocks(inputs, wanted, weights, None)[1]

    def differentiable(self, inputs: autograd.Inputs) -> Tensor:
        """As in :class:`~lgla_losses.kernels.autograd.Fusible`."""
        call = self.call
        target = call.target
        experts = [v.movedim(-1, 1) for part in inputs for v in part.unbind(-2)]
        losses = functional.lgla_loss(
            experts,
            target.movedim(-1, 1) if target.is_floating_point() else target,
            call.table,
            call.weights,
            ignore_index=call.ignore_index,
            label_smoothing=call.label_smoothing,
        )
        return call.reduced(losses)

    def _in_blocks(
        self, inputs: autograd.Inputs, wanted: Sequence[bool], weights: Tensor | None, divisor: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The losses ``[B]``, and the gradients of their sum over the divisor."""
        samples, num_classes = inputs[0].shape[:-2], inputs[0].shape[-1]
        losses = inputs[0].new_zeros(samples, dtype=functional.compute_dtype(inputs[0].dtype))
        gradients = [torch.empty_like(v) if w else None for v, w in zip(inputs, wanted, strict=True)]
        for block in blocks_of(samples, len(self.call.table) * num_classes, losses.device):
            begin = 0
            for logits, gradient in zip(inputs, gradients, strict=True):
                experts = slice(begin, begin := begin + logits.shape[-2])
                # A copy, over which the gradient is written.
                part = logits[block].clone(memory_format=torch.contiguous_format)
                loss = self._rows(
                    rows_of(part, 2),
                    self.call.target[block],
                    self.call.table[experts],
                    None if weights is None else rows_of(weights[block], 1)[:, experts],
                    divisor,
                    gradient is not None,
                )
                losses[block] += loss.view(part.shape[:-2])
                if gradient is not None:
                    gradient[block] = part
        return losses, gradients

    def _rows(
        self,
        logits: Tensor,
        target: Tensor,
        table: Tensor,
        weights: Tensor | None,
        divisor: Tensor | None,
        differentiate: bool,
    ) -> Tensor:
        """The losses ``[M]`` of logits ``[M, k, C]``, which make way for their gradient."""
        call = self.call
        if not target.is_floating_point():
            losses, _ = call.engine.forward(
                logits,
                target.flatten(),
                table,
                weights,
                divisor,
                ignore_index=call.ignore_index,
                label_smoothing=call.label_smoothing,
                reduce=False,
                gradient=logits if differentiate else None,
            )
            return losses
        dtype = functional.compute_dtype(logits.dtype)
        smoothed = functional.smoothed_probabilities(rows_of(target, 1).to(dtype), call.label_smoothing, -1)
        smoothed = smoothed[:, None]
        values = torch.log_softmax(logits + table.to(dtype), dim=-1)
        loss = -(torch.where(smoothed == 0, 0.0, values) * smoothed).sum(dim=-1)
        if differentiate:
            factor = torch.ones_like(loss) if weights is None else weights.to(dtype)
            factor = factor if divisor is None else factor / divisor
            values.exp_().mul_(smoothed.sum(dim=-1, keepdim=True)).sub_(smoothed).mul_(factor[..., None])
            logits.copy_(values)
        return (loss if weights is None else weights.to(dtype) * loss).sum(dim=-1)
