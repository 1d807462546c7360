"""Where classes win in a plane of features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lgla_losses._checks import class_index, describe
from lgla_losses._counts import ArrayLike, integer_array, to_numpy
from lgla_losses.adjustment import CLALogitAdjuster, check_adjuster
from lgla_losses.plot.canvas import describe_panels, panels
from lgla_losses.plot.class_axis import class_name, class_names, refuse_classes_without_samples
from lgla_losses.plot.style import MARKERS, Numbers, color, expert_names, ink, numbers
from lgla_losses.plot.ticks import plain_number


def plot_boundaries(
    adjuster: CLALogitAdjuster,
    classes: ArrayLike,
    centres: ArrayLike | None = None,
    *,
    names: Iterable[str] | None = None,
    figure: Figure | None = None,
) -> Figure:
    r"""Plot where each class wins in training, with the adjustments and without: one panel for each expert.

    The logits of a 2-D feature ``x`` are those of round classes of unit deviation,
    :math:`v_j = -|x - c_j|^2 / 2`. Areas show the largest of the adjusted logits :math:`v_j + M(y, j, k)`,
    in the colour of the class's group. Dashed lines are the boundaries without adjustments. A boundary nearer
    to a class asks more of its samples, so the trained network leaves that class more room.

    Source: Tao et al., ICCV 2023, Fig. 4 and Eqs. 5 and 6.

    Args:
        adjuster: of ``K`` experts and ``C`` classes.
        classes: the classes to compare ``[M]``, two or more; with a pair the titles give the margin.
        centres: their centres ``[M, 2]``, in deviations of a class; None puts them on a circle, so far
            apart that no boundary passes a centre.
        names: of all classes ``[C]``; None shows indices.
        figure: where to draw; None makes one.

    Returns:
        The figure, with ``K`` panels.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there are fewer than two different classes, one has no samples, or there is not one centre
            for each; or there is not one name for each class.

    Example:
        >>> from lgla_losses import ClassGrouper
        >>> adjuster = CLALogitAdjuster(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> figure = plot_boundaries(adjuster, classes=[0, 3])
        >>> [axes.get_title().splitlines()[1] for axes in figure.axes]
        ['M(0, 3) = +0.00 nats', 'M(0, 3) = -2.30 nats', 'M(0, 3) = -5.76 nats']
    """
    check_adjuster(adjuster)
    chosen = integer_array("classes", classes, "they are class indices")
    indices = [class_index("classes", j, adjuster.grouper.num_classes) for j in chosen.tolist()]
    if len(set(indices)) < 2 or len(set(indices)) < len(indices):
        raise ValueError(f"classes: expected two or more different classes, got {indices}")
    refuse_classes_without_samples("classes", indices, adjuster.grouper)
    names = class_names(names, adjuster.grouper.num_classes)

    target = torch.tensor(indices, device=adjuster.table.device)
    margins = numbers(adjuster.margin(target))[:, :, indices]
    points = _centres(centres, len(indices), margins)

    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    half = 1.25 * np.ptp(points, axis=0).max()
    xs, ys = (np.linspace(m - half, m + half, 201) for m in middle)
    plane = np.stack(np.meshgrid(xs, ys), axis=-1)
    logits = -((plane[:, :, None] - points) ** 2).sum(axis=-1) / 2

    titles = expert_names(adjuster.num_experts, adjuster.tau is not None)
    if len(indices) == 2:
        margin = f"M({indices[0]}, {indices[1]})"
        titles = [f"{titles[k]}\n{margin} = {margins[0, k, 1]:+.2f} nats" for k in range(len(titles))]

    figure, drawn = panels(figure, titles, (3.4, 3.9), square=True)
    black = ink(drawn[0])
    counts = adjuster.grouper.class_counts[target].tolist()
    tones = ListedColormap(_tones(adjuster, indices, black))
    for axes, shift in zip(drawn, margins[0], strict=True):
        adjusted = logits + shift
        axes.imshow(
            adjusted.argmax(axis=-1),
            extent=(xs[0], xs[-1], ys[0], ys[-1]),
            origin="lower",
            cmap=tones,
            vmin=-0.5,
            vmax=len(indices) - 0.5,
            interpolation="nearest",
        )

        for values, style, width in ((logits, "dashed", 1.2), (adjusted, "solid", 2.2)):
            for difference in _leads(values):
                axes.contour(
                    xs, ys, difference, levels=[0.0], colors=[black], linestyles=style, linewidths=width
                )

        for m, (j, point, count) in enumerate(zip(indices, points, counts, strict=True)):
            axes.plot(*point, MARKERS[m % len(MARKERS)], color=black, markersize=6)
            # Outwards, away from the boundaries.
            right, up = (point - middle) / half
            axes.annotate(
                f"{class_name(j, names)}\n{plain_number(count)} samples",
                point,
                (0, 8 if up >= 0 else -8),
                textcoords="offset points",
                ha="center" if abs(right) < 0.1 else ("left" if right > 0 else "right"),
                va="bottom" if up >= 0 else "top",
                fontsize="small",
                color=black,
            )

        axes.set_aspect("equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.grid(False)

    lines = [
        Line2D([], [], color=black, linestyle="dashed", linewidth=1.2, label="boundary without adjustment"),
        Line2D([], [], color=black, linewidth=2.2, label="boundary in training"),
    ]
    xlabel, ylabel = (f"feature {i} (deviations of a class)" for i in (1, 2))
    describe_panels(figure, xlabel, ylabel, lines, loc="outside upper center", ncols=2)
    return figure


def _tones(adjuster: CLALogitAdjuster, classes: Sequence[int], black: Any) -> list[Any]:
    """Give every class the colour of its group, the next of the same group a lighter tone."""
    seen: list[int] = []
    tones = []
    for j in classes:
        g = -1 if j in adjuster.grouper.background else int(adjuster.grouper.group_index[j])
        tones.append(to_rgba(black if g < 0 else color(g), 0.6 * 0.55 ** seen.count(g)))
        seen.append(g)
    return tones


def _centres(centres: ArrayLike | None, number: int, margins: Numbers) -> Numbers:
    """Check the caller's class centres ``[M, 2]``, or put them on a circle around the origin."""
    if centres is None:
        # A margin moves a boundary by itself over the distance of the centres: here by 0.3 of that at most.
        distance = max(2.0, math.sqrt(np.abs(margins).max() / 0.3))
        turn = -math.pi / 2 + 2 * math.pi * np.arange(number) / number
        return distance / 2 / math.sin(math.pi / number) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    points = to_numpy("centres", centres)
    if points.dtype.kind not in "iuf":
        raise TypeError(f"centres: expected real numbers [M, 2], got {points.dtype}")
    if points.shape != (number, 2):
        raise ValueError(
            f"centres: expected a point for each of {number} classes, shape [{number}, 2], "
            f"got {list(points.shape)}"
        )
    if not np.isfinite(points).all() or len(np.unique(points, axis=0)) < number:
        raise ValueError(f"centres: expected finite, different points, got {describe(points.tolist())}")
    return points.astype(np.float64)


def _leads(values: Numbers) -> list[Numbers]:
    """Give the lead of every class over the best other where it changes sign; a boundary is in one alone."""
    leads = []
    for m in range(values.shape[-1] - 1):
        others = values.copy()
        others[..., m] = -np.inf
        lead = values[..., m] - others.max(axis=-1)
        lead[others.argmax(axis=-1) < m] = np.nan
        if np.nanmin(lead) < 0 < np.nanmax(lead):
            leads.append(lead)
    return leads
