"""How lines, numbers and legends look, and what experts are called.

A colour means the same in every picture:

- ``COLORS``: groups of classes. Local expert ``k`` has the colour of its group ``k``, and so have classes.
- ``ink``, black or white: the global expert, the ensemble, all classes together.
- ``SHOTS``: many-, medium- and few-shot classes, in tones of one hue. The rarer, the darker.
- ``METHODS``: methods that are compared.
- ``REFERENCE``, grey: what a picture compares with.

Line styles, markers and hatches say the same without colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from torch import Tensor

Numbers: TypeAlias = npt.NDArray[np.float64]

#: Okabe and Ito's colours without black, which a dark background hides, and yellow, which a light one hides.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SHOTS = ("#EE8FC1", "#C9388F", "#7D0A55")
REFERENCE = "#999999"
METHODS = {"softmax": REFERENCE, "balanced softmax": "#8A6D00", "LGLA": "#4B2E9E"}

LINES = ((0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5)), (0, (7, 2, 1.5, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "v", "D", "P", "X")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "|||")
#: Up to this many points, every point has its marker.
FEW_POINTS = 20


def numbers(values: Tensor) -> Numbers:
    """Convert a tensor to what matplotlib takes."""
    return values.detach().cpu().double().numpy()


def ink(axes: Axes) -> Any:
    """Give the color that these axes write with: black, or white on a dark background."""
    return axes.xaxis.label.get_color()


def color(group: int) -> str:
    """Give the color of a group, which its local expert and its classes share."""
    return COLORS[group % len(COLORS)]


def line_styles(
    axes: Axes, names: Sequence[str], num_points: int, colors: Sequence[str] = COLORS
) -> list[dict[str, Any]]:
    """Give every name the look of its line; the last is the most important one, a solid line of ink."""
    styles: list[dict[str, Any]] = []
    for k, name in enumerate(names):
        look = {"linestyle": LINES[k % len(LINES)], "marker": MARKERS[k % (len(MARKERS) - 1)]}
        # Of many points only some have a marker, and others on the next line, so that equal lines show both.
        every = 1 if num_points <= FEW_POINTS else (0.02 + 0.03 * (k % 5), 0.15)
        look |= {"label": name, "color": colors[k % len(colors)]}
        styles.append(look | {"linewidth": 2.0, "markersize": 5, "markevery": every})
    styles[-1] |= {"color": ink(axes), "linestyle": "solid", "linewidth": 1.5, "marker": MARKERS[-1]}
    return styles


def expert_names(num_experts: int, local_and_global: bool = True) -> list[str]:
    """Name the experts from 1; in your own table none is local or global, and a single one is neither."""
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
