"""Plain numbers at logarithmic axes, and the room that texts beside ticks take."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator

import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullFormatter

#: Width of a letter and height of a line, as shares of the size of the font.
LETTER, LINE = 0.65, 1.6


def plain_numbers(axis: Axis, least: float = 0.0) -> None:
    """Write plain numbers, as 1,000, at a logarithmic axis, as many as fit; none is below ``least``."""
    axis.set_major_locator(_LogTicks(least))
    axis.set_major_formatter(FuncFormatter(_label))
    axis.set_minor_formatter(NullFormatter())
    if least:
        axis.set_minor_locator(FixedLocator([]))


def plain_number(value: float, digits: int = 4) -> str:
    """Write a number without an exponent, unless it is very small; below 1 it has so many digits at most.

    Example:
        >>> [plain_number(value) for value in (1e6, 0.5, 0.0001, 1.5e-6, 1e-7, 0)]
        ['1,000,000', '0.5', '0.0001', '0.0000015', '1e-07', '0']
    """
    if value >= 1:
        return f"{value:,.10g}" if value < 1e10 else f"{value:,.0f}"
    if value >= 0.999e-6:  # ticks have rounding errors
        return np.format_float_positional(value, digits, fractional=False, trim="-")
    return f"{value:.{digits}g}"


def letters(text: str) -> int:
    """Count letters, and wide ones, as in Chinese, Japanese and Korean, twice."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def text_inches(axis: Axis, text: str) -> float:
    """Estimate the width of a text in the font of the ticks; add a space for a gap to the next."""
    return LETTER * letters(text) * _font_inches(axis)


def line_inches(axis: Axis) -> float:
    """Give the height of a line in the font of the ticks, with a gap to the next."""
    return LINE * _font_inches(axis)


def axis_inches(axis: Axis) -> float:
    """Measure an axis, before a layout makes room for legends."""
    box = axis.axes.bbox
    return float((box.width if _is_horizontal(axis) else box.height) / axis.axes.figure.dpi)


def _is_horizontal(axis: Axis) -> bool:
    return axis is axis.axes.xaxis


def _font_inches(axis: Axis) -> float:
    return float(axis.get_major_ticks(1)[0].label1.get_fontsize()) / 72


def _label(value: float, _: int | None = None) -> str:
    """Write a tick; its digits tell it from its neighbours."""
    return plain_number(value, 10)


class _LogTicks(Locator):
    """Choose the densest of several sets of round numbers whose labels do not touch."""

    axis: Axis

    def __init__(self, least: float) -> None:
        self.least = least

    def __call__(self) -> list[float]:
        """Give the ticks of the axis as it is now."""
        low, high = sorted(self.axis.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Give the ticks between two positive numbers."""
        for candidates in _candidates(vmin, vmax):
            ticks = [tick for tick in candidates if max(vmin, self.least) <= tick <= vmax]
            if ticks and self._fit(ticks, axis_inches(self.axis) / math.log(vmax / vmin)):
                return ticks
        return []

    def _fit(self, ticks: list[float], inches: float) -> bool:
        """Say whether the labels fit where the axis has so many inches for a factor of e."""
        if _is_horizontal(self.axis):
            sizes = np.array([text_inches(self.axis, _label(tick) + " ") for tick in ticks])
        else:
            sizes = np.full(len(ticks), line_inches(self.axis))
        return bool(np.all(inches * np.diff(np.log(ticks)) >= (sizes[:-1] + sizes[1:]) / 2))


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
