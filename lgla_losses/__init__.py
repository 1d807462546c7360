"""Local and Global Logit Adjustments for long-tailed learning, in PyTorch.

The modules compose the paper: :class:`ClassGrouper` (section 3.2), :class:`CLALogitAdjuster`
(Eqs. 4 to 6), :class:`AAWWeighter` (Eqs. 7 and 8), :class:`LGLALoss` (Eq. 9), or
:class:`LinearLGLALoss` for more classes than there is memory for logits, and
:class:`GroupConvExperts` (section 4.4), for which :func:`split_backbone` divides a network.
:mod:`lgla_losses.functional` holds the equations.
"""

from lgla_losses import functional
from lgla_losses.adjustment import CLALogitAdjuster
from lgla_losses.backbone import split_backbone
from lgla_losses.experts import GroupConvExperts
from lgla_losses.grouping import ClassGrouper
from lgla_losses.labels import count_classes
from lgla_losses.linear import LinearLGLALoss
from lgla_losses.loss import LGLALoss
from lgla_losses.output import ExpertOutput
from lgla_losses.weighting import AAWWeighter

__version__ = "0.1.0"

__all__ = [
    "AAWWeighter",
    "CLALogitAdjuster",
    "ClassGrouper",
    "ExpertOutput",
    "GroupConvExperts",
    "LGLALoss",
    "LinearLGLALoss",
    "count_classes",
    "functional",
    "split_backbone",
]
