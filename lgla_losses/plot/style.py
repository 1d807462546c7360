"""How lines, numbers and legends look, and what experts are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogFormatter
from torch import Tensor

Numbers: TypeAlias = npt.NDArray[np.float64]

#: Okabe and Ito's without black, which a dark background hides, and yellow, which a light one does.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
LINES = ((0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5)), (0, (7, 2, 1.5, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "v", "D", "P", "X")
#: Up to so many points every one has its marker.
FEW_POINTS = 20


def numbers(values: Tensor) -> Numbers:
    """Convert a tensor to what matplotlib takes."""
    return values.detach().cpu().double().numpy()


def ink(axes: Axes) -> Any:
    """Give the color that these axes write with: black, or white on a dark background."""
    return axes.xaxis.label.get_color()


def color(index: int) -> str:
    """Give the color of a group, class or expert."""
    return COLORS[index % len(COLORS)]


def line_styles(axes: Axes, names: Sequence[str], num_points: int) -> list[dict[str, Any]]:
    """Give every name the looks of its line; the last is the most important one, in full."""
    styles: list[dict[str, Any]] = []
    for k, name in enumerate(names):
        look = {"linestyle": LINES[k % len(LINES)], "marker": MARKERS[k % (len(MARKERS) - 1)]}
        # Of many points only some have a marker, and others on the next line, so that equal lines show both.
        every = 1 if num_points <= FEW_POINTS else (0.02 + 0.03 * (k % 5), 0.15)
        styles.append(
            look | {"label": name, "color": color(k), "linewidth": 2.0, "markersize": 5, "markevery": every}
        )
    styles[-1] |= {"color": ink(axes), "linestyle": "solid", "linewidth": 1.5, "marker": MARKERS[-1]}
    return styles


class _PlainNumbers(LogFormatter):
    """Write 1,000 rather than a power of ten: narrower inside a decade, and as legends have it."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,.10g}" if super().__call__(x, pos) else ""


def plain_numbers(axis: Axis) -> None:
    """Write plain numbers at the ticks of a logarithmic axis of counts."""
    axis.set_major_formatter(_PlainNumbers())
    axis.set_minor_formatter(_PlainNumbers())


def expert_names(num_experts: int, local_and_global: bool = True) -> list[str]:
    """Name the experts from 1; in a table of one's own none is local or global, nor is a single one."""
    if not local_and_global or num_experts == 1:
        return [f"expert {k + 1}" for k in range(num_experts)]
    return [*(f"local expert {k + 1}" for k in range(num_experts - 1)), "global expert"]


def legend(axes: Axes, title: str | None = None) -> None:
    """Put the legend beside the axes, where it covers nothing."""
    _, labels = axes.get_legend_handles_labels()
    lines = sum(label.count("\n") + 1 for label in labels)
    drawn = axes.legend(
        ncols=math.ceil(lines / 18),  # more would be cut off
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        handlelength=3.5,
        labelcolor=ink(axes),
        title=title,
    )
    drawn.get_title().set_color(ink(axes))
