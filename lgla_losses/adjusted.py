"""The base class for your own losses: :class:`AdjustedLoss`."""

from lgla_losses.losses.adjusted import AdjustedLoss

__all__ = ["AdjustedLoss"]
