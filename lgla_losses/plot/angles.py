"""The angles between samples and the centres of their classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from lgla_losses import functional
from lgla_losses._checks import floating_tensor, positive_int, target_tensor, target_values
from lgla_losses.grouping import ClassGrouper, check_grouper
from lgla_losses.plot.canvas import describe_panels, panels
from lgla_losses.plot.style import LINES, color, expert_names, ink, numbers


def plot_angles(
    angles: Tensor,
    target: Tensor,
    grouper: ClassGrouper,
    *,
    ignore_index: int = -100,
    bins: int = 40,
    figure: Figure | None = None,
) -> Figure:
    """Plot histograms of the samples' angles to their class centres by group: a panel an expert.

    A vertical line marks the group's reference angle, its mean: samples to the right of it weigh more.

    Source: Tao et al., ICCV 2023, section 3.3, Eqs. 7 and 8.

    Args:
        angles: radians in 0..pi ``[N, K]``, as of :func:`lgla_losses.functional.angles_from_features`.
        target: class indices, int64 ``[N]``.
        grouper: the groups.
        ignore_index: target of samples that are left out.
        bins: number of bins from the smallest to the largest angle.
        figure: where to draw; None makes one.

    Returns:
        The figure, with ``K`` panels. They show percent of the group's samples by angle.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, a value is out of range, or no sample is left.

    Example:
        >>> import torch
        >>> angles = torch.tensor([[0.2, 0.4], [0.6, 0.4], [0.9, 1.2]])
        >>> figure = plot_angles(angles, torch.tensor([0, 0, 1]), ClassGrouper([9, 1], num_groups=1), bins=4)
        >>> [round(axes.get_lines()[0].get_xdata()[0], 4) for axes in figure.axes]  # the references
        [0.5667, 0.6667]
    """
    check_grouper(grouper)
    floating_tensor("angles", angles, "[N, K]")
    target = target_tensor(target, angles.shape[:1]).cpu()
    target_values(target, grouper.num_classes, ignore_index)
    bins = positive_int("bins", bins, "it is the number of bins of a histogram")

    group = functional.target_groups(target, grouper.group_index.cpu(), ignore_index)
    values = angles.detach().cpu().double()
    seen = numbers(values[group >= 0])
    if seen.size == 0:
        raise ValueError(
            f"angles: expected angles of a sample or more that is not ignored, got {list(angles.shape)}"
        )

    # Angles in float32 or less may round above pi.
    if not ((seen >= 0) & (seen <= math.pi + 0.01)).all():
        raise ValueError(
            f"angles: expected radians in 0..pi, got {seen.min():.4g} to {seen.max():.4g}; "
            "torch.deg2rad converts degrees"
        )

    references = functional.aaw_references(functional.aaw_statistics(values, group, grouper.num_groups))
    edges = np.histogram_bin_edges(seen, bins)
    num_experts = angles.shape[1]
    names = expert_names(num_experts, num_experts == grouper.num_groups + 1)

    figure, drawn = panels(figure, names, (3.6, 3.5))
    for k, axes in enumerate(drawn):
        for g in range(grouper.num_groups):
            own = numbers(values[group == g, k])
            if own.size == 0:
                continue
            share = 100 * np.histogram(own, edges)[0] / own.size
            style: dict[str, Any] = {"color": color(g), "linestyle": LINES[g % len(LINES)] if g else "solid"}
            axes.stairs(share, edges, linewidth=1.8, label=f"group {g + 1}", **style)
            axes.axvline(float(references[g, k]), linewidth=1.2, **style)

    mark = {"color": ink(axes), "linestyle": "none", "marker": "|", "markersize": 14}
    handles, _ = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], label="its reference angle", **mark))
    describe_panels(figure, "angle to the class centre (radians)", "samples of the group (%)", handles)
    return figure
