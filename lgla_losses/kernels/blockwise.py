"""An engine for maps, as in segmentation: samples with several dimensions, a block at a time.

Logits ``[*B, K, C]`` are a view of maps ``[N, K, C, *S]`` with ``B = [N, *S]``, in which a row is not
contiguous in memory. Blocks of samples are copied, never the whole map, and another engine computes with each
block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses.kernels import Angles, Engine, Rows, Samples, with_fields
from lgla_losses.kernels.autograd import total

#: Logits per block: few enough to stay in a processor's cache, many compared with the cost of a call.
_CPU_BLOCK, _BLOCK = 1 << 19, 1 << 24

#: Slices of the first dimensions of the samples.
Block = tuple[slice, ...]


@dataclass(frozen=True)
class Blockwise:
    """Run an :class:`~lgla_losses.kernels.Engine` on samples of several dimensions."""

    engine: Engine

    def statistics(self, angles: Angles, samples: Samples) -> tuple[Angles, Tensor]:
        """Compute Eq. 7; for class indices the samples of the angles lie in one dimension ``[M, K]``."""
        found = [self.engine.statistics(*block) for block in _in_blocks(angles, samples)]
        parts = torch.cat([part for _, part in found])
        if samples.target.is_floating_point():
            return angles, parts
        return Angles(angles=torch.cat([own.angles for own, _ in found if own.angles is not None])), parts

    def weights(
        self, angles: Angles, samples: Samples, parts: Tensor | None = None, num_ranks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Compute Eq. 8 for all samples ``[*B, K]``, and count them."""
        if parts is None:
            angles, parts = self.statistics(angles, samples)
        target, parts = samples.target, parts.sum(dim=0, keepdim=True)
        if not target.is_floating_point():
            flat = _samples_of(samples, (slice(None),))
            weights, number = self.engine.weights(angles, flat, parts, num_ranks)
            return weights.view(*target.shape, weights.shape[1]), number
        found = [self.engine.weights(*block, parts, num_ranks) for block in _in_blocks(angles, samples)]
        weights = torch.cat([weights for weights, _ in found])
        return weights.view(*target.shape[:-1], weights.shape[1]), found[0][1]

    def count(
        self,
        target: Tensor,
        sample_weight: Tensor | None,
        class_weight: Tensor | None,
        ignore_index: int,
    ) -> Tensor:
        """Sum the weights of the samples."""
        found = [
            self.engine.count(
                _rows(target, block, 1 if target.is_floating_point() else 0),
                None if sample_weight is None else sample_weight[block].flatten(),
                class_weight,
                ignore_index,
            )
            for block in _blocks(target, target.shape[-1] if target.is_floating_point() else 1)
        ]
        return torch.stack(found).sum()

    def forward(
        self, logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Compute Eq. 9. The state is not needed and stays empty."""
        losses = self._losses(logits, rows, gradients)
        return total(losses, rows.divisor) if rows.reduce else losses, losses.new_empty(0)

    def backward(
        self,
        logits: Sequence[Tensor],
        rows: Rows,
        upstream: Tensor,
        state: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Write the gradients of the logits, from those of the samples' losses, ``upstream`` ``[*B]``."""
        num_experts = sum(block.shape[-2] for block in logits)
        weights = upstream[..., None].expand(*upstream.shape, num_experts)
        if rows.weights is not None:
            weights = weights * rows.weights
        self._losses(logits, rows._replace(weights=weights, divisor=None), gradients)

    def rescale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiply a gradient by a scalar in place."""
        self.engine.rescale_(gradient, factor)

    def _losses(self, logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]) -> Tensor:
        """Compute the losses ``[*B]``, and write the gradients of their sum over the divisor."""
        first, soft = logits[0], rows.target.is_floating_point()
        losses = first.new_zeros(first.shape[:-2], dtype=functional.compute_dtype(first.dtype))
        width = sum(block.shape[-2] for block in logits) * first.shape[-1]
        for block in _blocks(rows.target, width):
            # Copies, which the gradients overwrite.
            parts = [v[block].clone(memory_format=torch.contiguous_format) for v in logits]
            flat = [part.flatten(0, -3) for part in parts]
            here = rows._replace(
                target=_rows(rows.target, block, int(soft)),
                weights=None if rows.weights is None else _rows(rows.weights, block, 1),
                reduce=False,
            )
            wanted = [None if g is None else v for g, v in zip(gradients, flat, strict=True)]
            loss, _ = self.engine.forward(flat, here, wanted)

            losses[block] = loss.view(parts[0].shape[:-2])
            for gradient, part in zip(gradients, parts, strict=True):
                if gradient is not None:
                    gradient[block] = part
        return losses


def _blocks(target: Tensor, width: int) -> Iterator[Block]:
    """Cut samples of ``width`` numbers each into blocks of limited size.

    An empty batch gives one block, and a compiler gets one.
    """
    samples = target.shape[:-1] if target.is_floating_point() else target.shape
    if torch.compiler.is_compiling() or 0 in samples:
        yield (slice(None),)
        return
    most = max(1, (_CPU_BLOCK if target.device.type == "cpu" else _BLOCK) // max(1, width))
    of_item = math.prod(samples[1:])
    if of_item <= most:
        step = most // of_item
        yield from ((slice(n, n + step),) for n in range(0, samples[0], step))
        return
    lines = max(1, most * samples[1] // of_item)
    for n in range(samples[0]):
        yield from ((slice(n, n + 1), slice(s, s + lines)) for s in range(0, samples[1], lines))


def _rows(tensor: Tensor, block: Block, trailing: int) -> Tensor:
    """Put the samples of a block in one dimension; give a view if the memory allows."""
    part = tensor[block]
    return part.flatten(0, part.dim() - trailing - 1)


def _width(angles: Angles) -> int:
    """Count the numbers needed for the angles of one sample."""
    if angles.features is not None and angles.weight is not None:
        return angles.features.shape[-2] * max(angles.weight.shape[1:])
    return sum(block.shape[-2:].numel() for block in angles.cosines)


def _in_blocks(angles: Angles, samples: Samples) -> Iterator[tuple[Angles, Samples]]:
    """Cut angles and samples into blocks, in each of which the samples lie in one dimension."""
    for block in _blocks(samples.target, _width(angles)):
        yield _angles_of(angles, samples, block), _samples_of(samples, block)


def _samples_of(samples: Samples, block: Block) -> Samples:
    soft = samples.target.is_floating_point()
    weight = samples.sample_weight
    return with_fields(
        samples,
        target=_rows(samples.target, block, int(soft)),
        sample_weight=None if weight is None else weight[block].flatten(),
    )


def _angles_of(angles: Angles, samples: Samples, block: Block) -> Angles:
    """Give the source of a block's angles, with the samples in one dimension.

    For cosine logits with class indices, only the targets' logits are read.
    """
    soft = samples.target.is_floating_point()
    if angles.features is not None and angles.weight is not None:
        features = _rows(angles.features, block, 2)
        if soft:
            return Angles([functional.class_cosines(features, angles.weight)])
        return with_fields(angles, features=features)
    if soft:
        return with_fields(angles, cosines=[_rows(v, block, 2) for v in angles.cosines])

    target = samples.target[block]
    known = (target >= 0) & (target < angles.cosines[0].shape[-1])  # ignored samples have any angle
    index = (target * known)[..., None, None]
    own = [v[block].gather(-1, index.expand(*v[block].shape[:-1], 1)).squeeze(-1) for v in angles.cosines]
    return Angles(angles=functional.angles_of(torch.cat(own, dim=-1).flatten(0, -2), angles.scale))
