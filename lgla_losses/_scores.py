"""Negative log likelihood, calibration error and Brier score of probabilities, from sums over samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgla_losses._checks import SUM_TOLERANCE, floating_tensor, same_device, target_tensor, target_values
from lgla_losses._torch import values_readable
from lgla_losses.functional import widest_dtype

#: What the scores average over: all samples weigh the same, or all classes do.
AVERAGES = ("samples", "classes")


class ScoreSums(NamedTuple):
    """Hold sums over samples by label; the scores follow from them.

    Attributes:
        samples: number of samples by label and bin of confidence, int64 ``[C, B]``.
        correct: number of correctly predicted ones, int64 ``[C, B]``.
        confidence: sum of the largest probabilities, ``[C, B]``.
        nll: sum of the negative log likelihoods by label ``[C]``.
        brier: sum of the Brier scores by label ``[C]``.
    """

    samples: Tensor
    correct: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor


def check_predictions(
    probabilities: Tensor, target: Tensor, num_classes: int | None = None, validate_args: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Check class probabilities ``[N, C]`` and labels ``[N]``; return them.

    Values are checked if :func:`values_readable` allows it for ``validate_args``.
    """
    target = target_tensor(target)
    floating_tensor("probabilities", probabilities, "[N, C]")
    shape = [len(target), probabilities.shape[1] if num_classes is None else num_classes]
    if list(probabilities.shape) != shape or shape[1] == 0:
        raise ValueError(
            f"probabilities: expected shape [{shape[0]}, {shape[1] or 'C'}], one row per sample of target "
            f"and one column per class, got {list(probabilities.shape)}"
        )
    same_device(probabilities=probabilities, target=target)
    if len(target) and values_readable(probabilities, validate_args):
        lowest = float(probabilities.min())
        dtype = torch.promote_types(probabilities.dtype, torch.float32)
        least, most = map(float, probabilities.sum(dim=1, dtype=dtype).aminmax())
        # With NaN every comparison is false.
        if not (lowest >= 0 and least >= 1 - SUM_TOLERANCE and most <= 1 + SUM_TOLERANCE):
            raise ValueError(
                "probabilities: expected class probabilities >= 0 that sum to 1 over the classes, got "
                f"values from {lowest:.4g} and sums from {least:.4g} to {most:.4g}; logits.softmax(dim=1) "
                "makes them"
            )
    if values_readable(target, validate_args):
        target_values(target, shape[1])
    return probabilities, target


def score_sums(probabilities: Tensor, target: Tensor, bins: int) -> ScoreSums:
    """Sum over the samples; bin ``b`` of ``B`` holds confidences above ``b / B``, up to ``(b + 1) / B``."""
    probabilities = probabilities.to(widest_dtype(probabilities.device))
    num_classes = probabilities.shape[1]
    confidence, predicted = probabilities.max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    cell = target * bins + torch.bucketize(confidence, edges[1:-1])

    def by_cell(values: Tensor) -> Tensor:
        return values.new_zeros(num_classes * bins).index_add(0, cell, values).view(num_classes, bins)

    def by_label(values: Tensor) -> Tensor:
        return values.new_zeros(num_classes).index_add(0, target, values)

    label = target[:, None]
    of_label = probabilities.gather(1, label)
    error = probabilities.scatter_add(1, label, -torch.ones_like(of_label))
    return ScoreSums(
        samples=by_cell(torch.ones_like(target)),
        correct=by_cell((predicted == target).long()),
        confidence=by_cell(confidence),
        nll=by_label(-of_label[:, 0].log()),
        brier=by_label(error.square().sum(dim=1)),
    )


def label_weights(sums: ScoreSums, average: str) -> Tensor:
    """Give the weight of a sample by its label ``[C]``; the weights of all samples sum to 1."""
    samples = sums.samples.sum(dim=1).to(sums.nll.dtype)
    if average == "samples":
        return samples.sum().reciprocal().expand_as(samples)
    return (samples.clamp(min=1) * (samples > 0).sum()).reciprocal()


def scores(sums: ScoreSums, average: str) -> dict[str, Tensor]:
    """Compute the means ``nll``, ``ece`` and ``brier``; NaN without samples."""
    weights = label_weights(sums, average)
    gaps = weights @ (sums.correct - sums.confidence)
    return {"nll": weights @ sums.nll, "ece": gaps.abs().sum(), "brier": weights @ sums.brier}
