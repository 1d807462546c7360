"""Draw hero.png, README's first picture: what LGLA makes of the class counts of CIFAR-100-LT.

The library computes and draws all of it; `make hero` draws it anew. The background is white whatever the
page's, so that it can be read on dark ones too.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lgla_losses import LGLALoss
from lgla_losses.data import long_tailed_counts
from lgla_losses.plot import plot_boundaries, plot_groups, plot_implied_prior, plot_table

#: The most frequent class, the rarest of its group, and the rarest of all: 500, 260 and 5 samples.
CLASSES = (0, 14, 99)
WIDTH = 10.5  # inches
DPI = 180


def draw(path: Path) -> None:
    """Groups, adjustments and the ensemble's prior; below them what the experts' boundaries become."""
    adjuster = LGLALoss(long_tailed_counts(500, num_classes=100, imbalance_factor=100)).adjuster
    with mpl.rc_context(mpl.rcParamsDefault | {"font.size": 9.5, "axes.titlesize": 11}):
        top = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        left, middle, right = top.subplots(1, 3)
        _finish(plot_groups(adjuster.grouper, ax=left), "Groups of equal mass", "upper right")
        _finish(plot_table(adjuster, ax=middle), "Each expert's adjustments", "lower left")
        _finish(plot_implied_prior(adjuster, ax=right), "The prior of their mean", "lower left")
        bottom = Figure(figsize=(WIDTH, 3.9), layout="compressed")
        plot_boundaries(adjuster, CLASSES, figure=bottom)
        picture = np.concatenate([_pixels(top), _pixels(bottom)])
    image.imsave(path, picture)


def _finish(axes: Axes, title: str, place: Any) -> None:
    """The title, and the legend in a corner that the curves leave free."""
    axes.set_title(title)
    for text in axes.texts:  # the groups' numbers, over narrow groups
        text.set_fontsize("x-small")
    axes.legend(loc=place, bbox_to_anchor=(0, 0, 1, 0.94), frameon=False, fontsize="small", handlelength=3)


def _pixels(figure: Figure) -> npt.NDArray[Any]:
    file = BytesIO()
    figure.savefig(file, dpi=DPI)
    file.seek(0)
    return np.asarray(image.imread(file, format="png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("hero.png"))
    draw(parser.parse_args().output)
