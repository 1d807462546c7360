"""The adjusted cross entropy of classes spread over ranks: what each rank computes and sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._checks import WAY_OUT
from lgla_losses._ranks import Ranks
from lgla_losses.kernels import Engine, Rows
from lgla_losses.kernels.autograd import Inputs, nonzero, total
from lgla_losses.kernels.linear import sum_over_experts


class ClassParallelCrossEntropy(NamedTuple):
    """Compute Eq. 9 for features ``[N, K, d]``, weights ``[K, C_r, d]`` and a bias ``[K, C_r]``.

    Weights and bias are those of this rank's classes.

    Attributes:
        engine: the engine that rescales gradients.
        rows: the values that the loss reads for this rank's classes. Class indices start at the first of
            these, and samples of other ranks' classes are ignored.
        scale: factor of cosine classifiers; None for linear classifiers.
        ranks: the ranks that share the classes.
        num_classes: number of classes of all these ranks.
        kept: the sum of each sample's class probabilities over all classes ``A [N]``; 0 for ignored samples.
        reads: check the values that the ranks exchange, which waits for a GPU.
    """

    engine: Engine
    rows: Rows
    scale: float | None
    ranks: Ranks
    num_classes: int
    kept: Tensor
    reads: bool

    def run(
        self, inputs: Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor | None], Tensor | None]:
        """Compute the loss, as in :class:`~lgla_losses.kernels.autograd.Problem`, with all ranks.

        The state is the logarithm of the sum of exponentials over all classes ``[N, K]``.
        """
        features, divisor = inputs[0], self.rows.divisor
        weights = self._weights(features)
        factor = weights if divisor is None else weights / nonzero(divisor).to(weights.dtype)
        log_sums = torch.empty_like(weights)
        table = self._table(inputs)

        def of_chunk(k: int, rows: slice, logits: Tensor, gradient: Tensor | None) -> Tensor:
            adjusted = logits[:, 0].to(weights.dtype).add_(table[k])
            shares, log_sums[rows, k], entropies = self._exchange(adjusted, rows)
            if gradient is not None:
                self._write_gradient(gradient, shares, factor[rows, k], rows)
            return weights[rows, k] * entropies

        losses, gradients = sum_over_experts(inputs, wanted, self.scale, self.num_classes, of_chunk)
        return total(losses, divisor) if self.rows.reduce else losses, gradients, log_sums

    def gradients(
        self, inputs: Inputs, upstream: Tensor, state: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Compute gradients as in :class:`~lgla_losses.kernels.autograd.Problem`, without other ranks."""
        factor = self._weights(inputs[0]) * upstream[:, None]
        table = self._table(inputs)

        def of_chunk(k: int, rows: slice, logits: Tensor, gradient: Tensor | None) -> Tensor:
            adjusted = logits[:, 0].to(factor.dtype).add_(table[k])
            if gradient is not None:
                shares = adjusted.sub_(state[rows, k, None]).exp_()
                self._write_gradient(gradient, shares, factor[rows, k], rows)
            return factor.new_zeros(())

        return sum_over_experts(inputs, wanted, self.scale, self.num_classes, of_chunk)[1]

    def differentiable(self, inputs: Inputs) -> NoReturn:
        """Raise: second derivatives are not supported."""
        raise RuntimeError(
            "ClassParallelLGLALoss has no second derivative: expected backward without create_graph; use "
            "LinearLGLALoss, which has one"
        )

    def _weights(self, features: Tensor) -> Tensor:
        """Give the weights of Eq. 8 ``A [N, K]``; 0 for ignored samples."""
        exact = functional.compute_dtype(features.dtype)
        weights = features.new_ones(features.shape[:2], dtype=exact)
        if self.rows.weights is not None:
            weights = self.rows.weights.to(exact)
        return weights.masked_fill((self.kept == 0)[:, None], 0.0)

    def _table(self, inputs: Inputs) -> Tensor:
        """Sum the adjustments and the bias ``A [K, C_r]``, to add to products of features and weights."""
        weight, bias = inputs[1:]
        table: Tensor = weight.new_zeros(weight.shape[:2], dtype=functional.compute_dtype(weight.dtype))
        for constant in (self.rows.table, bias):
            if constant is not None:
                table = table + constant.to(table.dtype)
        return table

    def _exchange(self, adjusted: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise the adjusted logits of one expert ``[n, C_r]`` over the classes of all ranks.

        Returns:
            The probabilities, in the logits' memory; the logarithms of the sums of exponentials ``[n]``; the
            cross entropies ``[n]``, 0 for ignored samples.
        """
        kept, smoothing = self.kept[rows], self.rows.label_smoothing
        own = _target_logits(adjusted, self.rows.target[rows])
        if smoothing:
            spread = smoothing / self.num_classes * kept
            own = (1 - smoothing) * own + spread * adjusted.sum(dim=1)

        peak = adjusted.new_zeros((len(adjusted), 1))
        if adjusted.shape[1]:
            peak = adjusted.amax(dim=1, keepdim=True)
            peak = torch.where(peak == -torch.inf, 0.0, peak)
        shares = adjusted.sub_(peak).exp_()
        log_sum = peak[:, 0] + shares.sum(dim=1).log()

        every = self.ranks.gather(torch.stack([log_sum, own]))
        if self.reads:
            self._explain(every[:, 0, kept > 0], every[:, 1, kept > 0])
        log_sum, own = every[:, 0].logsumexp(dim=0), every[:, 1].sum(dim=0)
        entropies = (kept * log_sum - own).masked_fill(kept == 0, 0.0)
        return shares.mul_((peak - log_sum[:, None]).exp()), log_sum, entropies

    def _explain(self, log_sums: Tensor, own: Tensor) -> None:
        """Raise on all ranks if logits of one rank are not finite. The arguments are ``[R, n]``."""
        bad = log_sums.isnan() | (log_sums == torch.inf)
        # With label smoothing and a masked class the loss is rightly infinite.
        bad |= own.isnan() if self.rows.label_smoothing else ~own.isfinite()
        if not bad.any():
            return
        of_ranks = zip(self.ranks.global_ranks(), bad.any(dim=1).tolist(), strict=True)
        raise ValueError(
            "weight, bias: expected finite logits on the targets, no NaN or +inf elsewhere, got others "
            f"on rank {', '.join(str(rank) for rank, is_bad in of_ranks if is_bad)}; {WAY_OUT}"
        )

    def _write_gradient(self, gradient: Tensor, shares: Tensor, factor: Tensor, rows: slice) -> None:
        """Write the gradient of one expert's logits ``[n, 1, C_r]`` from the probabilities ``[n, C_r]``."""
        target, kept, smoothing = self.rows.target[rows], self.kept[rows, None], self.rows.label_smoothing
        factor = factor[:, None]
        if target.is_floating_point():
            shares.mul_(kept)
        if smoothing:
            shares.sub_(smoothing / self.num_classes * kept)

        if target.is_floating_point():
            shares.sub_(target, alpha=1 - smoothing).mul_(factor)
        elif shares.shape[1]:
            place, is_own = target.clamp(min=0)[:, None], target[:, None] >= 0
            own = shares.gather(1, place)
            own = torch.where(is_own, own - (1 - smoothing), own) * factor
            shares.mul_(factor).scatter_(1, place, own)
        if shares.dtype != gradient.dtype:  # else they are there already
            gradient[:, 0].copy_(shares)


def _target_logits(adjusted: Tensor, target: Tensor) -> Tensor:
    """Sum the logits ``[n, C_r]`` times the targets' probabilities: ``[n]``; skip probabilities of 0."""
    if target.is_floating_point():
        return torch.where(target == 0, 0.0, adjusted * target.to(adjusted.dtype)).sum(dim=1)
    if not adjusted.shape[1]:
        return adjusted.new_zeros(len(adjusted))
    own = adjusted.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(target >= 0, own, 0.0)
