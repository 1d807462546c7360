"""The losses: LGLA from logits, from inputs of classifiers and over ranks; what it is compared with."""

from lgla_losses.losses.lgla import LGLALoss
from lgla_losses.losses.linear import LinearLGLALoss

__all__ = ["LGLALoss", "LinearLGLALoss"]
