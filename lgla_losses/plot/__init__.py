"""Pictures of the loss on one's own data: groups, adjustments, margins, priors, experts, calibration.

Needs matplotlib: ``pip install matplotlib``. A picture of one panel is drawn on ``ax`` and its
``Axes`` returned, one of several panels on ``figure``, which is returned. Without them a new ``Figure`` is
made that pyplot does not know: it has ``savefig``, and in a notebook, after ``%matplotlib inline``,
``plot_groups(grouper).figure`` shows itself; for ``pyplot.show`` pass an ``ax`` or ``figure`` of pyplot.
Legends stand beside the axes, for which a figure with ``layout="constrained"`` makes room.

Experts and groups are counted from 1, group 1 is the head. Colours are Okabe and Ito's, which the
colour-blind tell apart; line styles and markers tell the same in grey. The rest is the style of the
caller's matplotlib.
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
