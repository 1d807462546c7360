"""The losses: LGLA from logits, from the classifiers' inputs, over ranks; the losses to compare with."""

from lgla_losses.losses.lgla import LGLALoss
from lgla_losses.losses.linear import LinearLGLALoss

__all__ = ["LGLALoss", "LinearLGLALoss"]
