"""Pictures of your own data: groups, adjustments, margins, priors, experts, calibration.

Needs matplotlib: ``pip install matplotlib``.

- **Where.** A picture with one panel is drawn on ``ax`` and returns its ``Axes``. A picture with several
  panels is drawn on ``figure`` and returns it. Without them the function makes a new ``Figure``, which pyplot
  does not know. Save it by ``savefig``; in a notebook, after ``%matplotlib inline``,
  ``plot_groups(grouper).figure`` shows it. For ``pyplot.show`` pass an ``ax`` or ``figure`` of pyplot.
- **Legends** stand beside the axes. A figure with ``layout="constrained"`` makes room for them.
- **Names.** ``names=`` writes the names of the classes in place of their indices. Long names lose their
  middle, and of many names only some are written. Where the font lacks letters, set ``font.family``.
  ``plot_angles``, ``plot_fusion_sweep``, ``plot_prior_shift`` and ``plot_reliability`` show no classes, so
  they have no ``names=``.
- **Colours.** A colour means the same in every picture: a group, its local expert and its classes share one;
  the global expert and the ensemble are black, on a dark background white; grey is what you compare with;
  many-, medium- and few-shot classes are three tones of pink. Line styles, markers and hatches tell
  the same in grey.
- **Numbers.** Experts and groups count from 1; group 1 is the head.

All else is the style of your matplotlib. The background is white and opaque, so pictures are readable on dark
pages too; ``matplotlib.style.context("dark_background")`` makes dark ones.
"""

try:
    import matplotlib.figure  # noqa: F401
except ImportError as error:
    raise ImportError(f"lgla_losses.plot needs matplotlib ({error}): pip install matplotlib") from error

from lgla_losses.plot.adjustment import plot_margins, plot_table
from lgla_losses.plot.angles import plot_angles
from lgla_losses.plot.boundaries import plot_boundaries
from lgla_losses.plot.classes import plot_groups, plot_implied_prior, plot_weight_norms
from lgla_losses.plot.fusion import fusion_sweep, plot_fusion_sweep
from lgla_losses.plot.prior_shift import plot_prior_shift
from lgla_losses.plot.reliability import plot_reliability

__all__ = [
    "fusion_sweep",
    "plot_angles",
    "plot_boundaries",
    "plot_fusion_sweep",
    "plot_groups",
    "plot_implied_prior",
    "plot_margins",
    "plot_prior_shift",
    "plot_reliability",
    "plot_table",
    "plot_weight_norms",
]
