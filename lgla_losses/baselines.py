"""The losses that LGLA is compared with, by their names."""

from lgla_losses.losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lgla_losses.losses.multi_label import ClassBalancedBCELoss, SigmoidAdjustedLoss

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedBCELoss",
    "ClassBalancedLoss",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "SigmoidAdjustedLoss",
    "VSLoss",
]
