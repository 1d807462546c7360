"""The adjustments of the logits in training, and the margins that they make."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product

import numpy as np
import torch
from matplotlib.axes import Axes

from lgla_losses._checks import class_index
from lgla_losses.adjustment import CLALogitAdjuster, check_adjuster
from lgla_losses.plot.canvas import given_axes
from lgla_losses.plot.class_axis import (
    Indices,
    by_frequency,
    class_axis,
    class_name,
    class_names,
    mark_groups,
    refuse_classes_without_samples,
)
from lgla_losses.plot.style import Numbers, expert_names, ink, legend, line_styles, numbers
from lgla_losses.plot.ticks import plain_number, plain_numbers


def plot_table(
    adjuster: CLALogitAdjuster, *, names: Iterable[str] | None = None, ax: Axes | None = None
) -> Axes:
    r"""Plot the adjustments :math:`T(k, j)` of the logits in training: one line for each expert.

    The line of a local expert falls with the frequency inside its group and is 0 outside. The line of the
    global expert falls everywhere, ``tau`` times as much. A background has 0. Classes without samples are not
    drawn.

    Source: Tao et al., ICCV 2023, Eq. 4, shifted as in :class:`~lgla_losses.CLALogitAdjuster`.

    Args:
        adjuster: of ``K`` experts and ``C`` classes.
        names: of the classes ``[C]``, shown in place of their indices; None shows indices.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with adjustments in nats by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is not one name for each class.

    Example:
        >>> from lgla_losses import ClassGrouper
        >>> adjuster = CLALogitAdjuster(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> [line.get_label() for line in plot_table(adjuster).get_lines()]
        ['local expert 1', 'local expert 2', 'global expert']
    """
    check_adjuster(adjuster)
    names = class_names(names, adjuster.grouper.num_classes)
    axes = given_axes(ax)
    order, _, group = by_frequency(adjuster.grouper)
    ranks = np.arange(len(order)) + 1
    experts = expert_names(adjuster.num_experts, adjuster.tau is not None)
    styles = line_styles(axes, experts, len(order))
    for row, style in zip(numbers(adjuster.table)[:, order], styles, strict=True):
        axes.plot(ranks, row, drawstyle="steps-mid", **style)
    axes.set_ylabel("adjustment T(k, j) (nats)")
    axes.margins(y=0.12)
    class_axis(axes, order, group, names)
    legend(axes)
    return axes


def plot_margins(
    adjuster: CLALogitAdjuster,
    target_class: int,
    *,
    names: Iterable[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the margins :math:`M(y, j, k)` of a class ``y`` over every rival ``j``: one line for each expert.

    A margin is how much larger the logit of ``y`` must be. A positive margin moves the boundary towards
    ``y``, a negative one towards the rival. The cases are those of Eq. 6. Local expert: both classes are in
    its group (1), only ``y`` (2), only the rival (3), neither (4). Global expert: (5). With two groups or
    more all five occur if ``y`` is not alone in its group. Classes without samples are no rivals.

    Source: Tao et al., ICCV 2023, Eq. 6.

    Args:
        adjuster: of ``K`` experts and ``C`` classes, two or more.
        target_class: the class ``y`` of the sample, in ``0..C-1``.
        names: of the classes ``[C]``; the legend then names ``y``.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with margins in nats by the rivals' training samples (logarithmic).

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``target_class`` is no class, or has no samples or no rival; or there is not one name for
            each class.

    Example:
        >>> from lgla_losses import ClassGrouper
        >>> adjuster = CLALogitAdjuster(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> axes = plot_margins(adjuster, target_class=2)
        >>> sorted(text.get_text() for text in axes.texts if "case" in text.get_text())
        ['case 1', 'case 2', 'case 3', 'case 4', 'case 5']
    """
    check_adjuster(adjuster)
    target_class = class_index("target_class", target_class, adjuster.grouper.num_classes)
    names = class_names(names, adjuster.grouper.num_classes)
    refuse_classes_without_samples("target_class", [target_class], adjuster.grouper)
    order, counts, group = by_frequency(adjuster.grouper)
    if len(order) == 1:
        raise ValueError("adjuster: expected two classes or more with samples, got one, which has no rival")

    axes = given_axes(ax)
    is_own = order == target_class
    own_count, own_group = counts[is_own].item(), int(group[is_own].item())
    # Room on either side for the numbers of the cases, and an axis where all counts are equal.
    room = max((counts[0] / counts[-1]) ** 0.12, 1.5)
    axes.set_xlim(counts[-1] / room, counts[0] * room)

    rivals, counts, group = order[~is_own], counts[~is_own], group[~is_own]
    target = torch.tensor([target_class], device=adjuster.table.device)
    margins = numbers(adjuster.margin(target)[0])[:, rivals]

    experts = expert_names(adjuster.num_experts, adjuster.tau is not None)
    styles = line_styles(axes, experts, len(rivals))
    for row, style in zip(margins, styles, strict=True):
        axes.plot(counts, row, **style)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set(xlabel="training samples of the rival class j", ylabel=f"margin M({target_class}, j, k) (nats)")

    axes.axvline(own_count, color=ink(axes), ymax=0.94, linewidth=0.8, linestyle=":")
    axes.margins(y=0.17)

    if adjuster.tau is not None and np.ptp(margins) > 0:
        _number_cases(axes, counts, margins, group, own_group)

    inner = np.sqrt(counts[:-1] * counts[1:])
    mark_groups(axes, np.array([counts[0], *inner, counts[-1]]), group)

    legend(axes, f"{class_name(target_class, names)}: {plain_number(own_count)} samples")
    return axes


def _number_cases(axes: Axes, counts: Numbers, margins: Numbers, group: Indices, own_group: int) -> None:
    """Write the case of Eq. 6 beside a line where it holds, where the other lines are far.

    A background, of group -1, is outside all groups, and is not adjusted by the global expert, so case 5 is
    not of it.
    """
    last, none = len(margins) - 1, np.zeros(len(group), dtype=bool)
    others = [k for k in range(last) if k != own_group]
    of_own = [own_group] if own_group >= 0 else []
    cases = {
        1: [(k, group == k) for k in of_own],
        2: [(k, group != k) for k in of_own],
        3: [(k, group == k) for k in others],
        4: [(k, group != k) for k in others],
        5: [(last, group >= 0 if of_own else none)],
    }

    position = np.log(counts / counts[-1]) / max(math.log(counts[0] / counts[-1]), 1e-9)
    height, width = 0.05 * max(np.ptp(margins), 1e-9), 0.1
    named: dict[int, tuple[float, float]] = {}

    for case, places in cases.items():
        clearances = {}

        for k, where in places:
            found = np.flatnonzero(where)
            # No margin falls with the rival's count inside a case: the line leaves room on its left above
            # (1), and on its right below (-1).
            for j, side in product(found[:: len(found) // 50 + 1], (1, -1)):
                x, y = position[j] - side * width / 2, margins[k, j] + side * height
                # Rather on a line, another or this one where it is of another case, than on another text.
                is_free = all(abs(u - x) > 1.5 * width or abs(v - y) > height for u, v in named.values())
                near = abs(position - x) <= 0.501 * width
                lines = [np.delete(margins, k, axis=0)[:, near].ravel(), margins[k, near & ~where]]
                clearance = np.abs(np.concatenate(lines) - y).min(initial=np.inf)
                clearances[k, j, side] = (is_free, clearance)

        if not clearances:
            continue

        k, j, side = max(clearances, key=lambda place: clearances[place])
        named[case] = (position[j] - side * width / 2, margins[k, j] + side * height)
        axes.annotate(
            f"case {case}",
            (counts[j], margins[k, j]),
            (0, 4 * side),
            textcoords="offset points",
            ha="right" if side > 0 else "left",
            va="bottom" if side > 0 else "top",
            fontsize="small",
            color=ink(axes),
        )
