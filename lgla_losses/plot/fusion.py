"""Accuracy over the fusion weights of the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lgla_losses import functional
from lgla_losses._batch import one_or_more_experts
from lgla_losses._checks import target_tensor, target_values
from lgla_losses._counts import ArrayLike, as_class_counts
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.plot.canvas import describe_panels, panels
from lgla_losses.plot.recall import all_and_shot_splits, draw_recalls, mean_recalls, number_grid
from lgla_losses.plot.style import expert_names, numbers


def fusion_sweep(
    logits: ExpertOutput | ExpertLogits,
    target: Tensor,
    class_counts: ArrayLike,
    weights: Sequence[float] | None = None,
    *,
    many: float = 100,
    few: float = 20,
) -> Tensor:
    r"""Compute the accuracy of the ensemble by split as the fusion weight of one local expert grows.

    The weights of the local experts sum to 1: one has ``w``, the others share the rest equally. The global
    expert has :math:`1 / (K - 1)`, the mean of the local ones; with K = 2 it has the rest.

    Source: Tao et al., ICCV 2023, section 4.4 and Fig. 6.

    Args:
        logits: unadjusted test logits ``[N, K, C]``, K tensors ``[N, C]`` or an
            :class:`~lgla_losses.ExpertOutput`, of two experts or more.
        target: class indices, int64 ``[N]``.
        class_counts: training samples per class ``[C]``, at least 0; a class without samples is few-shot.
        weights: the values of ``w`` in 0..1 ``[W]``; None for 0.1, 0.2 to 0.9.
        many: many-shot classes have more training samples.
        few: few-shot classes have fewer; at most ``many``.

    Returns:
        Mean per-class recalls, float64 ``[K - 1, W, 4]`` on the CPU, of all, many-, medium- and few-shot
        classes; NaN for a split without test samples.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, there is one expert or no sample, or a value is out of range.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
        >>> fusion_sweep(logits, torch.tensor([1]), [500, 5], weights=[0.2, 0.8])[:, :, 0]
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    counts = as_class_counts(class_counts, "mask")  # classes without samples are few-shot
    blocks, of_one = one_or_more_experts(logits, len(counts))
    experts = [block.detach() for block in blocks] if of_one else list(blocks[0].detach().unbind(dim=1))
    num_experts, num_samples = len(experts), len(experts[0])
    if num_experts < 2:
        raise ValueError("logits: expected two experts or more, whose weights can differ, got one")
    if num_samples == 0:
        raise ValueError("logits: expected one test sample or more, got none")

    target = target_tensor(target, (num_samples,)).cpu()
    target_values(target, len(counts))
    for expert in experts:
        if expert.isnan().any() or expert.isposinf().any():
            raise ValueError("logits: expected finite values, or -inf for masked classes, got NaN or +inf")

    splits = all_and_shot_splits(counts, many, few)
    grid = _sweep_weights(weights)
    result = torch.full((num_experts - 1, len(grid), len(splits)), math.nan, dtype=torch.float64)

    for k in range(num_experts - 1):
        for i, w in enumerate(grid):
            fusion = [(1 - w) / max(1, num_experts - 2)] * (num_experts - 1)
            fusion[k] = w
            fusion.append(1 / (num_experts - 1) if num_experts > 2 else 1 - w)
            # An expert without weight takes no part, even where it masks a class with -inf.
            parts = [
                f * v.to(functional.compute_dtype(v.dtype)) for f, v in zip(fusion, experts, strict=True) if f
            ]
            result[k, i] = mean_recalls(sum(parts[1:], parts[0]).argmax(dim=1).cpu(), target, splits)
    return result


def plot_fusion_sweep(
    logits: ExpertOutput | ExpertLogits,
    target: Tensor,
    class_counts: ArrayLike,
    weights: Sequence[float] | None = None,
    *,
    many: float = 100,
    few: float = 20,
    figure: Figure | None = None,
) -> Figure:
    """Plot the accuracy by split as the fusion weight of one local expert grows: one panel for each.

    To pool several seeds, join their logits and their targets by ``torch.cat``. A split without test samples
    has no line.

    Source: Tao et al., ICCV 2023, section 4.4 and Fig. 6; :func:`fusion_sweep` computes it.

    Args:
        logits: unadjusted test logits ``[N, K, C]``, K tensors ``[N, C]`` or an
            :class:`~lgla_losses.ExpertOutput`, of two experts or more.
        target: class indices, int64 ``[N]``.
        class_counts: training samples per class ``[C]``, at least 0; a class without samples is few-shot.
        weights: fusion weights in 0..1 ``[W]``; None for 0.1, 0.2 to 0.9.
        many: many-shot classes have more training samples.
        few: few-shot classes have fewer; at most ``many``.
        figure: where to draw; None makes one.

    Returns:
        The figure, with ``K - 1`` panels.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, there is one expert or no sample, or a value is out of range.

    Example:
        >>> logits = torch.eye(4).expand(3, 4, 4)
        >>> figure = plot_fusion_sweep(logits, torch.tensor([0, 1, 2]), [500, 50, 5, 1])
        >>> [axes.get_title() for axes in figure.axes]
        ['local expert 1', 'local expert 2', 'local expert 3']
    """
    percent = 100 * fusion_sweep(logits, target, class_counts, weights, many=many, few=few)
    grid = _sweep_weights(weights)
    figure, drawn = panels(figure, expert_names(len(percent) + 1)[:-1], (3.6, 3.5))
    for axes, recalls in zip(drawn, numbers(percent), strict=True):
        draw_recalls(axes, grid, recalls)
    handles, _ = axes.get_legend_handles_labels()
    describe_panels(figure, "fusion weight of the local expert", "mean per-class accuracy (%)", handles)
    return figure


def _sweep_weights(weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [i / 10 for i in range(1, 10)]
    return number_grid(
        "weights", weights, "fusion weight", low=0.0, high=1.0, expected="fusion weights in 0..1"
    )
