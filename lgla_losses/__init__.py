"""Local and Global Logit Adjustments for long-tailed learning, in PyTorch.

The parts of the paper: :class:`ClassGrouper` (section 3.2), :class:`CLALogitAdjuster` (Eqs. 4 to 6),
:class:`AAWWeighter` (Eqs. 7 and 8), :class:`LGLALoss` (Eq. 9), or :class:`LinearLGLALoss` if the logits of
all classes do not fit into memory, and :class:`GroupConvExperts` (section 4.4), for which
:func:`split_backbone` splits a network; :class:`ExpertModel` does both in one call. :func:`suggest` says
which tau to start with. :mod:`lgla_losses.functional` holds the equations.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from lgla_losses import functional
from lgla_losses._labels import count_classes
from lgla_losses.adjustment import CLALogitAdjuster
from lgla_losses.experts import (
    ExpertModel,
    ExpertOutput,
    GroupConvExperts,
    parameter_groups,
    split_backbone,
    split_points,
)
from lgla_losses.grouping import ClassGrouper
from lgla_losses.losses.create import create_loss
from lgla_losses.losses.lgla import LGLALoss
from lgla_losses.losses.linear import LinearLGLALoss
from lgla_losses.suggestion import suggest
from lgla_losses.weighting import AAWWeighter

__version__ = "0.2.0"

__all__ = [
    "AAWWeighter",
    "CLALogitAdjuster",
    "ClassGrouper",
    "ExpertModel",
    "ExpertOutput",
    "GroupConvExperts",
    "LGLALoss",
    "LinearLGLALoss",
    "count_classes",
    "create_loss",
    "functional",
    "parameter_groups",
    "split_backbone",
    "split_points",
    "suggest",
]

#: Modules that are imported at first use: ``metrics`` and ``plot`` need other packages.
_MODULES = (
    "adjusted",
    "aggregation",
    "baselines",
    "calibration",
    "data",
    "distributed",
    "inspection",
    "label_shift",
    "metrics",
    "monitor",
    "plot",
    "stages",
)

if TYPE_CHECKING:
    from lgla_losses import adjusted as adjusted
    from lgla_losses import aggregation as aggregation
    from lgla_losses import baselines as baselines
    from lgla_losses import calibration as calibration
    from lgla_losses import data as data
    from lgla_losses import distributed as distributed
    from lgla_losses import inspection as inspection
    from lgla_losses import label_shift as label_shift
    from lgla_losses import metrics as metrics
    from lgla_losses import monitor as monitor
    from lgla_losses import plot as plot
    from lgla_losses import stages as stages
else:  # else type checkers would accept any name

    def __getattr__(name: str) -> ModuleType:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
