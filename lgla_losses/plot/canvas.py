"""Where a picture is drawn: the caller's axes or figure, or new ones that pyplot does not know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lgla_losses._checks import describe
from lgla_losses.plot.style import ink


def given_axes(ax: Axes | None) -> Axes:
    """Check the caller's axes of a picture of one panel, or make them."""
    if ax is None:
        return Figure(figsize=(8.5, 4.2), layout="constrained").add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected the Axes of matplotlib, or None for new ones, got {describe(ax)}")
    return ax


def given_figure(figure: Figure | None, size: tuple[float, float], layout: Any = "constrained") -> Figure:
    """Check the caller's figure, or make one."""
    if figure is None:
        return Figure(figsize=size, layout=layout)
    if not isinstance(figure, Figure):
        raise TypeError(
            f"figure: expected a Figure of matplotlib, or None for a new one, got {describe(figure)}"
        )
    return figure


def panels(
    figure: Figure | None, titles: Sequence[str], panel_size: tuple[float, float], square: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a panel for each title in a figure, four in a row at most, on the same scales."""
    rows = math.ceil(len(titles) / 4)
    columns = math.ceil(len(titles) / rows)
    width, height = panel_size
    size = width * columns + 1.2, height * rows + (1.0 if square else 0.3)
    # Constrained layout would not see how much smaller panels of a fixed aspect get.
    figure = given_figure(figure, size, "compressed" if square else "constrained")
    drawn: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for spare in drawn[len(titles) :]:
        spare.remove()
    del drawn[len(titles) :]
    for axes, title in zip(drawn, titles, strict=True):
        axes.set_title(title, fontsize="medium")
    for lowest in drawn[-columns:]:
        lowest.xaxis.set_tick_params(labelbottom=True)
    return figure, drawn


def describe_panels(
    figure: Figure, xlabel: str, ylabel: str, handles: Sequence[Artist], **legend: Any
) -> None:
    """Write the labels and the legend that all panels share."""
    color = ink(figure.axes[-1])
    figure.supxlabel(xlabel, fontsize="medium", color=color)
    figure.supylabel(ylabel, fontsize="medium", color=color)
    options = {"loc": "outside right upper", "frameon": False, "labelcolor": color} | legend
    figure.legend(handles=handles, **options)
