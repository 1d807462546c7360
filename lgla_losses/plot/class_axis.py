"""The axis that most pictures share: the classes from the most to the least frequent, and their groups."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lgla_losses.grouping import ClassGrouper
from lgla_losses.plot.style import Numbers, ink, numbers, plain_numbers

Indices = npt.NDArray[np.int64]

#: Up to so many classes every one has its tick.
FEW_CLASSES = 20
#: A group of a smaller share of the classes would be a mere line: ranks then are logarithmic.
VISIBLE_SHARE = 0.03


def by_frequency(grouper: ClassGrouper) -> tuple[Indices, Numbers, Indices]:
    """Sort the classes that have samples from the most to the least frequent, ties by index.

    Returns:
        The classes, their counts, and their groups (-1 for background, which is in none).
    """
    counts, group = grouper.class_counts.cpu(), grouper.group_index.cpu().clone()
    group[list(grouper.background)] = -1
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    return order.numpy(), numbers(counts[order]), group[order].numpy()


def refuse_classes_without_samples(name: str, classes: list[int], grouper: ClassGrouper) -> None:
    """Raise if one of the classes is masked, so that it has no margins."""
    counts = grouper.class_counts
    for j in classes:
        if counts[j] == 0:
            raise ValueError(
                f"{name}: expected classes with training samples, got class {j}, which has none and is "
                "masked; take another class, or zero_counts='smooth'"
            )


def class_edges(num_classes: int) -> Numbers:
    """Place where the classes meet on the axis, and its ends."""
    return np.linspace(0.5, num_classes + 0.5, num_classes + 1)


def class_axis(axes: Axes, order: Indices, group: Indices | None = None) -> None:
    """Write ranks by frequency, or few classes' indices, and the groups of the classes along the top."""
    axes.set_xlim(0.5, len(order) + 0.5)
    if len(order) <= FEW_CLASSES:
        every = math.ceil(len(order) * 0.22 / _inches(axes))  # which the labels need
        axes.set_xticks(np.arange(1, len(order) + 1, every), [str(j) for j in order[::every].tolist()])
        axes.set_xlabel("class index, the most frequent first")
    elif group is not None and np.bincount(group[group >= 0]).min() < VISIBLE_SHARE * len(group):
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_xlabel("rank of the class, the most frequent first (logarithmic)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.set_xlabel("rank of the class, the most frequent first")
    if group is not None:
        mark_groups(axes, class_edges(len(order)), group)


def mark_groups(axes: Axes, edges: Numbers, group: Indices) -> None:
    """Number the groups along the top, where classes lie between these edges; every second is shaded.

    Background, of group -1, has no number.
    """
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
    longest: dict[int, tuple[float, float]] = {}

    axes.get_xlim()  # settles the limits, which matplotlib puts off
    to_axes = axes.transData + axes.transAxes.inverted()
    places = to_axes.transform(np.stack([edges, np.ones_like(edges)], axis=1))[:, 0]

    for i, (start, stop) in enumerate(pairwise(cuts)):
        low, high = sorted((places[start], places[stop]))
        # Groups of one's own that are scattered over the frequencies would only make stripes.
        if i % 2 and len(cuts) <= 2 * FEW_CLASSES:
            axes.axvspan(edges[start], edges[stop], color=ink(axes), alpha=0.07, linewidth=0)
        g = int(group[start])
        if g < 0:
            continue
        if g not in longest or high - low > longest[g][1] - longest[g][0]:
            longest[g] = (low, high)

    for g, (low, high) in longest.items():
        room = (high - low) * _inches(axes)
        if room < 0.1 * len(str(g + 1)):
            continue  # too narrow for its number
        axes.text(
            (low + high) / 2,
            0.985,
            f"group {g + 1}" if room > 0.65 else str(g + 1),
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize="small",
            color=ink(axes),
        )


def _inches(axes: Axes) -> float:
    """Measure the width of the axes, before a layout makes room for legends."""
    return float(axes.bbox.width / axes.figure.dpi)
