"""The base of losses of one's own: :class:`AdjustedLoss`."""

from lgla_losses.losses.adjusted import AdjustedLoss

__all__ = ["AdjustedLoss"]
