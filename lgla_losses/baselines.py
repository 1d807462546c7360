"""The losses that LGLA is compared with, by their names."""

from lgla_losses.losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lgla_losses.losses.between import expert_distillation, expert_diversity
from lgla_losses.losses.multi_label import ClassBalancedBCELoss, SigmoidAdjustedLoss
from lgla_losses.losses.ncl import NCLLoss
from lgla_losses.losses.ride import RIDELoss

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedBCELoss",
    "ClassBalancedLoss",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "NCLLoss",
    "RIDELoss",
    "SigmoidAdjustedLoss",
    "VSLoss",
    "expert_distillation",
    "expert_diversity",
]
