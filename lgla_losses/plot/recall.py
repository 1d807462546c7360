"""The parts that pictures of accuracy over a number share: mean recalls by split, their lines, the grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lgla_losses._checks import finite_float
from lgla_losses._counts import shot_splits, to_numpy
from lgla_losses.plot.style import SHOTS, Numbers, line_styles

#: The lines of a panel.
SPLITS = ("many-shot", "medium-shot", "few-shot", "all classes")


def all_and_shot_splits(counts: Tensor, many: float, few: float) -> Tensor:
    """Give all classes, then the many-, medium- and few-shot ones, bool ``[4, C]``."""
    return torch.cat([torch.ones(1, len(counts), dtype=torch.bool), shot_splits(counts, many, few)])


def mean_recalls(predicted: Tensor, target: Tensor, splits: Tensor) -> Tensor:
    """Compute the mean per-class recall of every split, float64; NaN without samples.

    Args:
        predicted: class indices ``[N]``.
        target: class indices ``[N]``.
        splits: which classes are in each, bool ``[S, C]``.
    """
    num_classes = splits.shape[1]
    right = target[predicted == target].bincount(minlength=num_classes)
    recall = right / target.bincount(minlength=num_classes).double()
    return torch.stack([recall[split].nanmean() for split in splits])


def draw_recalls(axes: Axes, grid: Sequence[float], percent: Numbers) -> None:
    """Draw the recalls ``[W, 4]`` of :func:`all_and_shot_splits` over ``grid``.

    A split without samples has no line.
    """
    # The most important line last, above the others.
    rows = np.roll(percent, -1, axis=1).T
    for accuracies, style in zip(rows, line_styles(axes, SPLITS, len(grid), SHOTS), strict=True):
        if not np.isnan(accuracies).all():
            axes.plot(grid, accuracies, **style)


def number_grid(
    name: str, values: Sequence[float], kind: str, *, low: float, high: float, expected: str
) -> list[float]:
    """Check numbers from ``low`` to ``high``, at least one.

    ``kind``, in the singular, and ``expected`` are text for the errors.
    """
    grid = to_numpy(name, values)
    if grid.ndim != 1 or grid.size == 0:
        raise ValueError(f"{name}: expected one {kind} or more [W], got shape {list(grid.shape)}")
    return [finite_float(name, value, low=low, high=high, expected=expected) for value in grid.tolist()]
