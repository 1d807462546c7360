"""The axis that most pictures share: the classes from the most to the least frequent, and their groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lgla_losses._checks import describe
from lgla_losses.grouping import ClassGrouper
from lgla_losses.plot.style import Numbers, ink, numbers
from lgla_losses.plot.ticks import axis_inches, letters, line_inches, plain_numbers, text_inches

Indices = npt.NDArray[np.int64]

#: Up to this many classes, each class has its tick.
FEW_CLASSES = 20
#: A group of a smaller share of the classes would be a mere line: ranks then are logarithmic.
VISIBLE_SHARE = 0.03
#: Letters of a name that are shown, wide ones counted twice.
NAME_LENGTH = 20


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


def class_names(names: Iterable[str] | None, num_classes: int) -> list[str] | None:
    """Check the caller's names of the classes, and shorten them."""
    if names is None:
        return None
    try:
        given = None if isinstance(names, str) else list(names)
    except TypeError:
        given = None
    if given is None or not all(isinstance(name, str) for name in given):
        raise TypeError(
            "names: expected the names of the classes, texts [C], "
            f"got {describe(names if given is None else given)}; "
            "pass them in the order of the class indices, as in dataset.classes"
        )
    if len(given) != num_classes:
        raise ValueError(f"names: expected one for each of {num_classes} classes, got {len(given)}")
    return [shortened(name) for name in given]


def shortened(name: str) -> str:
    """Leave out the middle of a long name, as its ends tell it from others; dollars are no mathematics.

    Example:
        >>> shortened("European herring gull, second winter")
        'European h…nd winter'
    """
    if letters(name) > NAME_LENGTH:
        begin = end = name
        while letters(begin) > NAME_LENGTH // 2:
            begin = begin[:-1]
        while letters(end) >= NAME_LENGTH // 2:
            end = end[1:]
        name = f"{begin.rstrip()}…{end.lstrip()}"
    return name.replace("$", r"\$")


def class_name(index: int, names: Sequence[str] | None) -> str:
    """Call a class by its name, or by its index."""
    return f"class {index}" if names is None else names[index]


def class_edges(num_classes: int) -> Numbers:
    """Place where the classes meet on the axis, and its ends."""
    return np.linspace(0.5, num_classes + 0.5, num_classes + 1)


def class_axis(
    axes: Axes, order: Indices, group: Indices | None = None, names: Sequence[str] | None = None
) -> None:
    """Write along the axis which class is where, and the groups of the classes along the top.

    Names are written where there are any, and as many as fit; else the indices of few classes, or the ranks
    of many.
    """
    axes.set_xlim(0.5, len(order) + 0.5)
    is_narrow = group is not None and np.bincount(group[group >= 0]).min() < VISIBLE_SHARE * len(group)
    is_log = is_narrow and len(order) > FEW_CLASSES
    if is_log:
        axes.set_xscale("log")
        plain_numbers(axes.xaxis, least=1)

    if names is not None:
        _write_names(axes, [names[j] for j in order.tolist()])
        axes.set_xlabel("class, the most frequent first")
    elif len(order) <= FEW_CLASSES:
        longest = text_inches(axes.xaxis, f"{order.max()} ")
        every = math.ceil(len(order) * longest / axis_inches(axes.xaxis))
        axes.set_xticks(np.arange(1, len(order) + 1, every), [str(j) for j in order[::every].tolist()])
        axes.set_xlabel("class index, the most frequent first")
    elif is_log:
        axes.set_xlabel("rank of the class, the most frequent first (logarithmic)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.set_xlabel("rank of the class, the most frequent first")
    if group is not None:
        mark_groups(axes, class_edges(len(order)), group)


def _write_names(axes: Axes, names: Sequence[str]) -> None:
    """Write names level where all fit, else slanted, and leave out those that would touch the one before."""
    ranks = np.arange(1, len(names) + 1)
    places = _places(axes, ranks) * axis_inches(axes.xaxis)
    longest = max(text_inches(axes.xaxis, name + " ") for name in names)
    if np.diff(places).min(initial=np.inf) > longest:
        axes.set_xticks(ranks, names)
        return

    distance = math.sqrt(2) * line_inches(axes.xaxis)
    shown = [0]
    for i in range(1, len(names)):
        if places[i] - places[shown[-1]] >= distance:
            shown.append(i)
    kept = [names[i] for i in shown]
    axes.set_xticks(ranks[shown], kept, rotation=45, ha="right", rotation_mode="anchor")


def mark_groups(axes: Axes, edges: Numbers, group: Indices) -> None:
    """Number the groups along the top, where classes lie between these edges; every second is shaded.

    Background, of group -1, has no number.
    """
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
    longest: dict[int, tuple[float, float]] = {}

    places = _places(axes, edges)

    for i, (start, stop) in enumerate(pairwise(cuts)):
        low, high = sorted((places[start], places[stop]))
        # Your own groups may be scattered over the frequencies: they would only make stripes.
        if i % 2 and len(cuts) <= 2 * FEW_CLASSES:
            axes.axvspan(edges[start], edges[stop], color=ink(axes), alpha=0.07, linewidth=0)
        g = int(group[start])
        if g < 0:
            continue
        if g not in longest or high - low > longest[g][1] - longest[g][0]:
            longest[g] = (low, high)

    for g, (low, high) in longest.items():
        room = (high - low) * axis_inches(axes.xaxis)
        fitting = [text for text in (f"group {g + 1}", str(g + 1)) if text_inches(axes.xaxis, text) <= room]
        if not fitting:
            continue
        axes.text(
            (low + high) / 2,
            0.985,
            fitting[0],
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize="small",
            color=ink(axes),
        )


def _places(axes: Axes, values: Numbers | Indices) -> Numbers:
    """Find where values of the x axis are, from 0 at the left end to 1 at the right end."""
    axes.get_xlim()  # settles the limits, which matplotlib puts off
    to_axes = axes.transData + axes.transAxes.inverted()
    placed: Numbers = to_axes.transform(np.stack([values, np.ones_like(values)], axis=1))[:, 0]
    return placed
