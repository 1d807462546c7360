"""A picture of an inspection: class frequencies, groups and shots; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lgla_losses.grouping import ClassGrouper


def draw_groups(
    grouper: ClassGrouper, class_numbers: Sequence[int], many: float, few: float, title: str
) -> Any:
    """Draw the groups over the class frequencies, and the shot split as lines.

    Few classes are called by their numbers in the source, which may have others without samples.

    Returns:
        A ``matplotlib.figure.Figure``, made without ``pyplot``, so without a window or global state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from lgla_losses.plot import plot_groups
    from lgla_losses.plot.class_axis import FEW_CLASSES
    from lgla_losses.plot.style import ink, legend

    axes = plot_groups(grouper)

    if grouper.num_classes <= FEW_CLASSES:
        indices = [int(text.get_text()) for text in axes.get_xticklabels()]
        axes.set_xticks(axes.get_xticks(), [str(class_numbers[j]) for j in indices])

    bottom, top = axes.get_ylim()
    for label, threshold, line in (("many-shot: above", many, "--"), ("few-shot: below", few, ":")):
        if bottom < threshold < top:
            axes.axhline(threshold, color=ink(axes), linestyle=line, label=f"{label} {threshold:g}")

    legend(axes)
    # A dollar sign in a file name is no mathematics.
    axes.set_title(title.replace("$", r"\$"))
    return axes.figure
