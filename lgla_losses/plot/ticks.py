"""Ticks of logarithmic axes: plain numbers that never touch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from matplotlib import rcParams
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullFormatter

#: Width of a digit and height of a line, as shares of the size of the font.
DIGIT, LINE = 0.65, 1.6


def plain_numbers(axis: Axis, least: float = 0.0) -> None:
    """Write plain numbers, as 1,000, at a logarithmic axis, as many as fit; none is below ``least``."""
    axis.set_major_locator(_LogTicks(axis, least))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_formatter(NullFormatter())
    if least:
        axis.set_minor_locator(FixedLocator([]))


def plain_number(value: float) -> str:
    """Write a number without an exponent, unless it is very small.

    Example:
        >>> [plain_number(value) for value in (1e6, 0.5, 0.0001, 1e-7)]
        ['1,000,000', '0.5', '0.0001', '1e-07']
    """
    if value >= 1:
        return f"{value:,.10g}" if value < 1e10 else f"{value:,.0f}"
    return f"{value:.6f}".rstrip("0") if value > 0.9e-6 else f"{value:.0e}"


class _LogTicks(Locator):
    """Choose the densest of several sets of round numbers whose labels do not touch."""

    def __init__(self, owner: Axis, least: float) -> None:
        self.owner, self.least = owner, least
        self.is_x = owner is owner.axes.xaxis
        size = rcParams["xtick.labelsize"] if self.is_x else rcParams["ytick.labelsize"]
        self.font_inches = FontProperties(size=size).get_size_in_points() / 72

    def __call__(self) -> list[float]:
        """Give the ticks of the axis as it is now."""
        low, high = sorted(self.owner.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Give the ticks between two positive numbers."""
        for candidates in _candidates(vmin, vmax):
            ticks = [tick for tick in candidates if max(vmin, self.least) <= tick <= vmax]
            if ticks and self._fit(ticks, vmin, vmax):
                return ticks
        return []

    def _fit(self, ticks: list[float], vmin: float, vmax: float) -> bool:
        axes = self.owner.axes
        inches = (axes.bbox.width if self.is_x else axes.bbox.height) / axes.figure.dpi
        places = [math.log(tick / vmin) / math.log(vmax / vmin) * inches for tick in ticks]
        lengths = [DIGIT * (1 + len(plain_number(tick))) if self.is_x else LINE for tick in ticks]
        sizes = self.font_inches * np.array(lengths)
        return bool(np.all(np.diff(places) >= (sizes[:-1] + sizes[1:]) / 2))


def _candidates(vmin: float, vmax: float) -> Iterator[list[float]]:
    """Give sets of round numbers that cover a range, the densest first."""
    if vmin <= 0 or vmax <= vmin:
        return

    if vmax / vmin < 10:
        for number in (5, 3, 2):
            yield list(MaxNLocator(number, steps=[1, 2, 5, 10]).tick_values(vmin, vmax))
    first, last = math.floor(math.log10(vmin)), math.ceil(math.log10(vmax))
    yield [step * 10.0**decade for decade in range(first, last + 1) for step in (1, 2, 5)]
    for every in range(1, last - first + 2):
        # From 1 where it is in sight, whatever the ends are.
        yield [10.0**decade for decade in range(every * (first // every), last + 1, every)]
