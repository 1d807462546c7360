"""The angles between samples and the centres of their classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from lgla_losses import functional
from lgla_losses._checks import floating_tensor, positive_int, target_tensor, target_values
from lgla_losses.grouping import ClassGrouper, check_grouper
from lgla_losses.plot.canvas import describe_panels, given_figure, panels
from lgla_losses.plot.style import LINES, Numbers, color, expert_names, ink, numbers

Panels: TypeAlias = npt.NDArray[np.object_]

#: With more groups, every group has its own row of panels.
FEW_GROUPS = 3


def plot_angles(
    angles: Tensor,
    target: Tensor,
    grouper: ClassGrouper,
    *,
    ignore_index: int = -100,
    bins: int = 40,
    figure: Figure | None = None,
) -> Figure:
    """Plot histograms of the angles between samples and their class centres, by group and expert.

    A vertical line marks the reference angle of the group, its mean. Samples to the right of it have larger
    weights.

    Source: Tao et al., ICCV 2023, section 3.3, Eqs. 7 and 8.

    Args:
        angles: radians in 0..pi ``[N, K]``, as from :func:`lgla_losses.functional.angles_from_features`.
        target: class indices, int64 ``[N]``.
        grouper: the groups.
        ignore_index: the target of samples to leave out.
        bins: number of bins from the smallest to the largest angle.
        figure: where to draw; None makes one.

    Returns:
        The figure, percent of the group's samples by angle. With up to 3 groups it has a panel for each
        expert; with more groups it has a row of panels for each group, and a column for each expert.

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
            f"angles: expected one sample or more that is not ignored, got none in {list(angles.shape)}"
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

    is_grid = grouper.num_groups > FEW_GROUPS
    if is_grid:
        figure, grid = _grid(figure, names, grouper.num_groups)
    else:
        figure, drawn = panels(figure, names, (3.6, 3.5))
        grid = np.tile(np.array(drawn), (grouper.num_groups, 1))

    for (g, k), axes in np.ndenumerate(grid):
        own = numbers(values[group == g, k])
        if own.size:
            _draw_group(axes, g, own, edges, float(references[g, k]), fill=is_grid)
        elif is_grid:
            axes.text(
                0.5, 0.5, "no samples", transform=axes.transAxes, ha="center", va="center", color=ink(axes)
            )

    handles = [] if is_grid else grid[0, 0].get_legend_handles_labels()[0]
    mark = {"color": ink(grid[0, 0]), "linestyle": "none", "marker": "|", "markersize": 14}
    handles.append(Line2D([], [], label="reference angle", **mark))
    place = {"loc": "outside upper right"} if is_grid else {}
    describe_panels(
        figure, "angle to the class centre (radians)", "samples of the group (%)", handles, **place
    )
    return figure


def _grid(figure: Figure | None, experts: Sequence[str], num_groups: int) -> tuple[Figure, Panels]:
    """Make a row of panels for each group and a column for each expert, on the same scales."""
    figure = given_figure(figure, (1.9 * len(experts) + 0.8, 1.2 * num_groups + 1.1))
    grid: Panels = figure.subplots(num_groups, len(experts), squeeze=False, sharex=True, sharey=True)
    for axes, expert in zip(grid[0], experts, strict=True):
        axes.set_title(expert, fontsize="medium")
    for g, axes in enumerate(grid[:, -1]):
        axes.yaxis.set_label_position("right")
        axes.set_ylabel(f"group {g + 1}")
    return figure, grid


def _draw_group(axes: Axes, g: int, own: Numbers, edges: Numbers, reference: float, fill: bool) -> None:
    """Draw the histogram of a group and its reference angle: an area, or a line among others."""
    share = 100 * np.histogram(own, edges)[0] / own.size
    if fill:
        axes.stairs(share, edges, fill=True, alpha=0.6, color=color(g))
        axes.axvline(reference, linewidth=1.2, color=ink(axes))
        return
    style: dict[str, Any] = {"color": color(g), "linestyle": LINES[g % len(LINES)] if g else "solid"}
    axes.stairs(share, edges, linewidth=1.8, label=f"group {g + 1}", **style)
    axes.axvline(reference, linewidth=1.2, **style)
