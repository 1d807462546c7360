"""The engine for any device: PyTorch, in chunks of samples, which saves memory rather than time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses.kernels import Angles, Rows, Samples

#: Logits per chunk: small compared with a large batch, large compared with the cost of a call.
_CPU_CHUNK, _CHUNK = 1 << 18, 1 << 24


def statistics(angles: Angles, samples: Samples) -> tuple[Angles, Tensor]:
    """Compute Eq. 7 and the contribution of the batch to the reference angles."""
    if not samples.target.is_floating_point():
        own = _own_angles(angles, samples)
        sums = functional.aaw_statistics(own, _groups(samples), samples.num_groups, samples.sample_weight)
        return Angles(angles=own), sums[None]

    device, num_experts = samples.target.device, sum(v.shape[1] for v in angles.cosines)
    shape, dtype = (samples.num_groups, num_experts + 1), functional.widest_dtype(device)
    sums = torch.zeros(shape, dtype=dtype, device=device)
    for part in _chunks(angles.cosines):
        target = samples.target[part]
        weight = None if samples.sample_weight is None else samples.sample_weight[part]
        own = _class_angles(angles, target, part)
        sums = sums + functional.soft_aaw_statistics(
            own, target, samples.group_index, samples.num_groups, weight
        )
    return angles, sums[None]


def weights(
    angles: Angles, samples: Samples, parts: Tensor | None = None, num_ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute Eq. 8 times the samples' weights; also give the number of samples over ``num_ranks``."""
    if parts is None:
        angles, parts = statistics(angles, samples)
    sums = parts.sum(dim=0)
    if angles.angles is not None:
        result = functional.aaw_weights(angles.angles, _groups(samples), sums)
    else:
        found = []
        for part in _chunks(angles.cosines):
            target = samples.target[part]
            own = _class_angles(angles, target, part)
            found.append(functional.soft_aaw_weights(own, target, samples.group_index, sums))
        result = torch.cat(found)
    if samples.sample_weight is not None:
        result = result * samples.sample_weight[:, None].to(result.dtype)
    return result, sums[:, -1].sum() / num_ranks


def count(
    target: Tensor, sample_weight: Tensor | None, class_weight: Tensor | None, ignore_index: int
) -> Tensor:
    """Sum the weights of the samples that are not ignored, or their number."""
    dtype = functional.widest_dtype(target.device)
    if target.is_floating_point():
        ones = torch.ones(target.shape[1], dtype=dtype, device=target.device)
        factors = ones if class_weight is None else class_weight.to(dtype)
        amounts = torch.cat([target[part].to(dtype) @ factors for part in _chunks([target[:, None]])])
    else:
        amounts = (target != ignore_index).to(dtype)
        if class_weight is not None:
            amounts = amounts * class_weight[_own_classes(target, len(class_weight), ignore_index)]
    return (amounts if sample_weight is None else amounts * sample_weight).sum()


def forward(
    logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Compute Eq. 9, chunk by chunk. The state is not needed and stays empty."""
    num_samples, num_experts = len(rows.target), sum(v.shape[1] for v in logits)
    losses = logits[0].new_zeros(num_samples, dtype=functional.compute_dtype(logits[0].dtype))
    divisor = losses.new_ones(())
    if rows.divisor is not None:
        divisor = torch.where(rows.divisor == 0, 1.0, rows.divisor).to(losses.dtype)

    for part, weight, block, gradient in _blocks(logits, rows, gradients):
        losses[part].add_((weight * block.losses()).masked_fill_(block.ignored, 0.0).sum(dim=(1, 2)))
        if gradient is not None:
            values = block.gradient(weight * divisor.reciprocal())
            gradient.copy_(values.masked_fill_(block.ignored, 0.0))

    state = losses.new_zeros((num_samples, num_experts, 2))
    return losses.sum() / divisor if rows.reduce else losses, state


def backward(
    logits: Sequence[Tensor],
    rows: Rows,
    upstream: Tensor,
    state: Tensor,
    gradients: Sequence[Tensor | None],
) -> None:
    """Write the gradients of the logits, chunk by chunk."""
    for part, weight, block, gradient in _blocks(logits, rows, gradients):
        if gradient is not None:
            values = block.gradient(weight * upstream[part, None, None].to(weight.dtype))
            gradient.copy_(values.masked_fill_(block.ignored, 0.0))


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient in place, rounding once.

    The factor is compared with 1 only if that does not wait for a device.
    """
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    gradient.copy_(gradient.to(factor.dtype) * factor)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Cut the samples of tensors ``[N, k, C]`` into parts.

    An empty batch gives one part, and a compiler gets one.
    """
    if torch.compiler.is_compiling():
        return iter((slice(None),))
    width = sum(v.shape[1] * v.shape[2] for v in tensors)
    size = max(1, (_CPU_CHUNK if tensors[0].device.type == "cpu" else _CHUNK) // max(1, width))
    return (slice(start, start + size) for start in range(0, max(1, len(tensors[0])), size))


def _own_classes(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Give classes that can be looked up: replace ignored targets, and those that are not a class."""
    return target.masked_fill(target == ignore_index, 0).clamp(0, num_classes - 1)


def _groups(samples: Samples) -> Tensor:
    """Look up the group of every sample ``[N]``; give -1 for ignored ones."""
    own = _own_classes(samples.target, len(samples.group_index), samples.ignore_index)
    return samples.group_index[own].masked_fill(samples.target == samples.ignore_index, -1)


def _own_angles(angles: Angles, samples: Samples) -> Tensor:
    """Compute Eq. 7 for class indices ``[N, K]``."""
    if angles.angles is not None:
        return angles.angles
    own = _own_classes(samples.target, len(samples.group_index), samples.ignore_index)
    if angles.features is not None and angles.weight is not None:
        parts = [
            functional.angles_from_features(angles.features[part], angles.weight, own[part])
            for part in _chunks([angles.features])
        ]
        return torch.cat(parts)
    cosines = [v.gather(2, own[:, None, None].expand(-1, v.shape[1], 1)) for v in angles.cosines]
    return functional.angles_of(torch.cat(cosines, dim=1).squeeze(2), angles.scale)


def _class_angles(angles: Angles, probabilities: Tensor, part: slice) -> Tensor:
    """Compute the angles of some samples to every class ``[n, K, C]``; 0 where the probability is 0."""
    cosines = torch.cat([v[part] for v in angles.cosines], dim=1)
    return functional.angles_of(cosines, angles.scale).masked_fill(probabilities[:, None] == 0, 0.0)


def _blocks(
    logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]
) -> Iterator[tuple[slice, Tensor, _Indices | _Mixtures, Tensor | None]]:
    """Cut the rows into blocks; give the samples, weights, loss and part of the gradient of each."""
    first = 0
    for values, gradient in zip(logits, gradients, strict=True):
        experts = slice(first, first + values.shape[1])
        first = experts.stop
        for part in _chunks([values]):
            adjusted = values[part].to(functional.compute_dtype(values.dtype))
            if rows.table is not None:
                adjusted = adjusted + rows.table[experts].to(adjusted.dtype)
            weight = adjusted.new_ones((1, 1, 1))
            if rows.weights is not None:
                weight = rows.weights[part, experts, None].to(adjusted.dtype)
            target = rows.target[part]
            block = _Indices(adjusted, target, rows) if _is_plain(rows) else _Mixtures(adjusted, target, rows)
            yield part, weight, block, None if gradient is None else gradient[part]


def _is_plain(rows: Rows) -> bool:
    indices = not rows.target.is_floating_point()
    return indices and rows.class_weight is None and rows.margin is None and rows.gamma == 0


class _Indices:
    """Compute the cross entropy of adjusted logits ``[n, k, C]`` with class indices ``[n]``."""

    def __init__(self, adjusted: Tensor, target: Tensor, rows: Rows) -> None:
        self._smoothing = rows.label_smoothing
        self.ignored = (target == rows.ignore_index)[:, None, None]
        own = _own_classes(target, adjusted.shape[2], rows.ignore_index)
        self._wrong = (own != target)[:, None, None]
        self._own = own[:, None, None].expand(-1, adjusted.shape[1], 1)
        self._log_softmax = torch.log_softmax(adjusted, dim=-1)

    def losses(self) -> Tensor:
        """Compute the losses ``[n, k, 1]``."""
        losses = (self._smoothing - 1) * self._log_softmax.gather(-1, self._own)
        if self._smoothing:
            losses -= self._smoothing * self._log_softmax.mean(dim=-1, keepdim=True)
        return losses.masked_fill_(self._wrong, torch.nan)

    def gradient(self, scale: Tensor) -> Tensor:
        """Compute ``scale * (softmax - smoothed one-hot)``; this overwrites the log-probabilities."""
        values = self._log_softmax.exp_()
        smooth = self._smoothing / values.shape[-1]
        own = scale * (values.gather(-1, self._own) - (1 - self._smoothing) - smooth)
        values *= scale
        if self._smoothing:
            values -= scale * smooth
        return values.scatter_(-1, self._own, own)


class _Mixtures:
    """Compute the loss of adjusted logits ``[n, k, C]`` in full: every class weighs by its share ``r``.

    Classes without a share add nothing, even where a logit of -inf masks them.
    """

    def __init__(self, adjusted: Tensor, target: Tensor, rows: Rows) -> None:
        probabilities = _probabilities(target, rows.ignore_index, adjusted)
        self.ignored = ~probabilities.any(dim=-1, keepdim=True)
        if rows.margin is not None:
            adjusted = adjusted - rows.margin.to(adjusted.dtype) * probabilities

        self._shares = functional.smoothed_probabilities(probabilities, rows.label_smoothing, dim=-1)
        if rows.class_weight is not None:
            self._shares = self._shares * rows.class_weight.to(adjusted.dtype)
        self._log_softmax = torch.log_softmax(adjusted, dim=-1)
        self._entropies = torch.where(self._shares == 0, 0.0, -self._log_softmax)
        self._gamma = rows.gamma

    def losses(self) -> Tensor:
        """Compute the losses ``[n, k, 1]``."""
        losses = functional.focal(self._entropies, self._gamma)
        return (self._shares * losses).sum(dim=-1, keepdim=True)

    def gradient(self, scale: Tensor) -> Tensor:
        """Compute ``scale * (p_j sum_c r_c h_c - r_j h_j)``; h is the derivative of the focal loss."""
        slopes = self._shares
        if self._gamma > 0:
            slopes = slopes * functional.focal_slope(self._entropies, self._gamma)
        softmax = self._log_softmax.exp_()
        return scale * (softmax * slopes.sum(dim=-1, keepdim=True) - slopes)


def _probabilities(target: Tensor, ignore_index: int, adjusted: Tensor) -> Tensor:
    """Write targets as probabilities ``[n, 1, C]``: 0 for ignored targets, NaN for invalid ones."""
    if target.is_floating_point():
        return target[:, None].to(adjusted.dtype)
    own = _own_classes(target, adjusted.shape[2], ignore_index)
    one_hot = torch.zeros_like(adjusted[:, 0]).scatter_(1, own[:, None], 1.0)
    one_hot.masked_fill_((own != target)[:, None], torch.nan)
    return one_hot.masked_fill_((target == ignore_index)[:, None], 0.0)[:, None]
