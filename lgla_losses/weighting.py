"""Adaptive angular weights: more weight on hard samples (section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from lgla_losses import functional
from lgla_losses._checks import (
    boolean,
    floating_tensor,
    integer,
    same_device,
    target_tensor,
    target_values,
    validation,
)
from lgla_losses._ranks import Ranks, RanksOf, group_size, refuse_data_parallel
from lgla_losses._torch import values_readable
from lgla_losses.grouping import ClassGrouper, check_grouper

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AAWWeighter(nn.Module):
    r"""Weight every sample by how far its angle exceeds the mean angle of its group.

    .. math:: g = 1 + \max(0, \theta_k^{y_i} - \theta_k^{ref})

    There is one reference angle per expert and group: the batch mean of that expert's angles over the samples
    whose own label lies in the group, for the global expert too. The paper leaves this open; the authors'
    released code does it so. A group absent from the batch has no effect. Ignored targets have weight 0 and
    are left out of the means. No gradient flows through the weights.

    Under an initialised ``torch.distributed``, with ``sync`` and gradients enabled, the means are over the
    global batch, so R ranks give the same as one process. This takes one collective of ``(K + 1)(K - 1) + 1``
    numbers. Without gradients the ranks never communicate.

    Source: Tao et al., ICCV 2023, Eqs. 7 and 8.

    Args:
        grouper: the groups of the classes.
        ignore_index: target value of samples to ignore.
        sync: take the means over all ranks of a distributed job.
        process_group: the ranks that share the means; None means all.
        validate_args: check values, as in :class:`LGLALoss`.

    Raises:
        TypeError: angles or targets are of a wrong type.
        ValueError: their shapes or devices do not fit, a target is out of range or an angle not
            finite, or this rank is not in ``process_group``.

    Shape:
        - angles: radians ``[N, K]``
        - target: int64 ``[N]``
        - output: ``[N, K]`` in float32, or float64 for float64 angles

    Example:
        >>> import torch
        >>> weighter = AAWWeighter(ClassGrouper([100, 10], num_groups=1))
        >>> weighter(torch.tensor([[0.5], [1.5]]), torch.tensor([0, 1]))
        tensor([[1.0000],
                [1.5000]])
    """

    def __init__(
        self,
        grouper: ClassGrouper,
        *,
        ignore_index: int = -100,
        sync: bool = True,
        process_group: ProcessGroup | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        self.grouper = check_grouper(grouper)
        self.ignore_index = integer("ignore_index", ignore_index, "as in torch.nn.CrossEntropyLoss")
        self.sync = boolean("sync", sync)
        self._ranks = RanksOf(process_group)
        self.validate_args = validation(validate_args)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that the means are taken over; None means all."""
        return self._ranks.group

    def statistics(self, angles: Tensor, target: Tensor) -> Tensor:
        """Sum the angles ``[G, K]`` and count the samples ``[G, 1]`` of every group, over all ranks.

        The sums divided by the counts are the reference angles, which are useful to log. The counts also give
        the number of samples in the global batch without a second collective.

        Args:
            angles: radians ``[N, K]``.
            target: class indices, int64 ``[N]``.
        """
        self._check_inputs(angles, target)
        return self._summed(angles, target)

    def _summed(self, angles: Tensor, target: Tensor) -> Tensor:
        group = functional.target_groups(target, self.grouper.constant("group_index"), self.ignore_index)
        local = functional.aaw_statistics(angles, group, self.grouper.num_groups)
        number = group_size(self.process_group) if self.sync and torch.is_grad_enabled() else 1
        return Ranks(number, self.process_group).sum(local)

    def forward(self, angles: Tensor, target: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Compute Eq. 8. Pass ``statistics`` from the method of that name to avoid computing them again."""
        self._check_inputs(angles, target)
        angles = angles.to(functional.compute_dtype(angles.dtype))
        if statistics is None:
            statistics = self._summed(angles, target)
        group = functional.target_groups(target, self.grouper.constant("group_index"), self.ignore_index)
        return functional.aaw_weights(angles, group, statistics)

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)

    def _check_inputs(self, angles: Tensor, target: Tensor) -> None:
        floating_tensor("angles", angles, "[N, K]")
        target_tensor(target, angles.shape[:1])
        same_device(angles=angles, target=target, grouper=self.grouper.constant("group_index"))
        self.check_values(angles, target)

    def check_values(self, angles: Tensor, target: Tensor) -> None:
        """Raise for targets out of range and for angles that are not finite, if values may be read."""
        if not values_readable(target, self.validate_args):
            return
        target_values(target, self.grouper.num_classes, self.ignore_index)
        if not angles[target != self.ignore_index].isfinite().all():
            raise ValueError(
                "angles: expected finite radians, got NaN or infinity; look for them in the features and "
                "class weights of the angles"
            )

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"ignore_index={self.ignore_index}, sync={self.sync}"
