"""A picture of an inspection: class frequencies, groups and shots; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lgla_losses.grouping import ClassGrouper


def draw_groups(
    grouper: ClassGrouper,
    class_numbers: Sequence[int],
    many: float,
    few: float,
    title: str,
    names: Sequence[str] | None = None,
) -> Any:
    """Draw the groups over the class frequencies, and the shot split as lines.

    The classes have their names, or else the numbers of the source, which also numbers classes without
    samples. A class keeps its number where the fonts lack a letter of its name. Many classes without names
    have ranks.

    Returns:
        A ``matplotlib.figure.Figure``, made without ``pyplot``, so without a window or global state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from lgla_losses.plot import plot_groups
    from lgla_losses.plot.class_axis import FEW_CLASSES
    from lgla_losses.plot.style import ink, legend

    shown: list[str] | None = None
    if names is not None:
        letters = _letters_of_the_fonts()
        pairs = zip(names, class_numbers, strict=True)
        shown = [name if letters.issuperset(map(ord, name)) else str(number) for name, number in pairs]
    elif grouper.num_classes <= FEW_CLASSES:
        shown = [str(number) for number in class_numbers]
    axes = plot_groups(grouper, names=shown)

    bottom, top = axes.get_ylim()
    for label, threshold, line in (("many-shot: above", many, "--"), ("few-shot: below", few, ":")):
        if bottom < threshold < top:
            axes.axhline(threshold, color=ink(axes), linestyle=line, label=f"{label} {threshold:,g}")

    legend(axes)
    # A dollar sign in a file name is no mathematics.
    axes.set_title(title.replace("$", r"\$"))
    return axes.figure


def _letters_of_the_fonts() -> set[int]:
    """Collect the letters of all families of ``font.family``; matplotlib falls back from one to the next."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found = []
    for family in FontProperties().get_family():
        with suppress(ValueError):  # not installed
            found.append(findfont(FontProperties(family=family), fallback_to_default=False))
    paths = found or [findfont(FontProperties())]
    return {letter for path in paths for letter in get_font(path).get_charmap()}
