"""Class-aware logit adjustment: what each expert is made good at (Eqs. 4 to 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses.buffers import ConstantBuffers
from lgla_losses.checks import (
    finite_float,
    floating_tensor,
    same_device,
    target_tensor,
    target_values,
    values_readable,
)
from lgla_losses.grouping import ClassGrouper, check_grouper
from lgla_losses.output import ExpertLogits, ExpertOutput, check_logits, normalized_fusion


class CLALogitAdjuster(ConstantBuffers):
    r"""Adds the class-aware logit adjustment :math:`T(k, j)` of every expert.

    Local experts (LLA) k = 0..K-2: :math:`T = \log(n_j / n_{max})` for the classes of group k and 0
    for the others. The global expert (GLA), the last: :math:`T = \tau \log(n_j / n_{max})`. This is
    Eq. 4 shifted by a constant per expert, :math:`\log n_{max}` and :math:`\tau \log n_{max}`: softmax
    cannot see the shift, and low precision keeps its digits.

    Source: Tao et al., ICCV 2023, Eqs. 4 to 6.

    Args:
        grouper: the groups; ``K = num_groups + 1``.
        tau: strength of the global adjustment, at least 0. None means ``1.25 * (K - 1)``, the
            paper's 2.5 at K = 3 in proportion to the number of local experts; the ensemble is
            uniform at ``K - 1`` and leans to the tail above (see :meth:`implied_prior`).

    Attributes:
        table: the adjustments, float64 ``[K, C]`` with maximum 0.
        tau: float64 scalar tensor, or None for a table of one's own.
        grouper: the groups.

    Raises:
        TypeError: ``grouper`` is not a :class:`ClassGrouper` or ``tau`` not a number.
        ValueError: ``tau`` is negative or not finite.

    Shape:
        - logits: ``[N, K, C]``, K tensors ``[N, C]`` or an :class:`ExpertOutput`
        - output: ``[N, K, C]`` in float32, or float64 for float64 logits

    Example:
        >>> adjuster = CLALogitAdjuster(ClassGrouper([100, 10], num_groups=1), tau=2.0)
        >>> adjuster.table.exp()
        tensor([[1.0000, 0.1000],
                [1.0000, 0.0100]], dtype=torch.float64)
    """

    table: Tensor
    tau: Tensor | None

    def __init__(self, grouper: ClassGrouper, tau: float | None = None) -> None:
        check_grouper(grouper)
        if tau is None:
            tau = 1.25 * grouper.num_groups
        tau = check_tau(tau)
        table = functional.cla_table(grouper.class_counts, grouper.group_index, tau)
        self._register(grouper, table, torch.tensor(tau, dtype=torch.float64))

    @classmethod
    def from_table(cls, grouper: ClassGrouper, table: Tensor) -> CLALogitAdjuster:
        """Adjust by a table of one's own.

        Args:
            grouper: holds the class counts.
            table: finite adjustments ``[K, C]``, one row an expert; copied.

        Raises:
            TypeError: the table is not a floating-point tensor.
            ValueError: it is not 2-D, has not C columns or is not finite.
        """
        floating_tensor("adjustment table", table, "[K, C]")
        num_classes = check_grouper(grouper).num_classes
        if table.shape[0] == 0 or table.shape[1] != num_classes:
            raise ValueError(f"adjustment table: expected shape [K, {num_classes}], got {list(table.shape)}")
        if not table.isfinite().all():
            raise ValueError("adjustment table: expected finite values, got NaN or infinity")
        adjuster = cls.__new__(cls)
        adjuster._register(grouper, table.detach().to(torch.float64, copy=True), None)
        return adjuster

    def _register(self, grouper: ClassGrouper, table: Tensor, tau: Tensor | None) -> None:
        ConstantBuffers.__init__(self)
        self.grouper = grouper
        self.register_buffer("table", table)
        self.register_buffer("tau", tau)

    @property
    def num_experts(self) -> int:
        """Number of experts ``K``."""
        return self.table.shape[0]

    def forward(self, logits: ExpertOutput | ExpertLogits) -> Tensor:
        """The adjusted logits :math:`v + T`, a new tensor."""
        if isinstance(logits, ExpertOutput):
            logits = logits.logits
        checked = check_logits(logits, self.num_experts, self.table.shape[1])
        stacked = checked if isinstance(checked, Tensor) else torch.stack(tuple(checked), dim=1)
        same_device(logits=stacked, table=self.table)
        return stacked + self.table.to(functional.compute_dtype(stacked.dtype))

    def margin(self, target: Tensor) -> Tensor:
        r"""The margins :math:`M(y_i, j, k) = T(k, j) - T(k, y_i)` of Eq. 6.

        Args:
            target: class indices, int64 ``[N]``.

        Returns:
            float64 ``[N, K, C]``.
        """
        target = target_tensor(target)
        if values_readable(target, None):
            target_values(target, self.table.shape[1])
        return functional.cla_margin(self.table, target)

    def implied_prior(self, fusion: Tensor | Sequence[float] | None = None) -> Tensor:
        r"""The prior under which fused logits are log-likelihood plus log prior.

        Proportional to :math:`\exp \sum_k f_k (\log n_j - T(k, j))`; with equal fusion of the LGLA
        experts that is :math:`n_j^{(K - 1 - \tau) / K}`, so the ensemble is uniform exactly at
        :math:`\tau = K - 1`, biased to the head below and to the tail above. Our derivation, for
        cross entropy at its minimum with ``aaw=False`` and without label smoothing; hard-sample
        weights, on by default, move the logits by some more that is not counted here.

        Args:
            fusion: one non-negative weight an expert ``[K]``, divided by their sum; None for
                equal weights.

        Returns:
            float64 ``[C]``, summing to 1.
        """
        weights = normalized_fusion(fusion, self.num_experts).to(self.table.device)
        return functional.implied_prior(self.table, self.grouper.class_counts, weights)

    def extra_repr(self) -> str:
        """Configuration shown by ``repr``."""
        tau = "" if self.tau is None or self.tau.is_meta else f", tau={float(self.tau):.4g}"
        return f"num_experts={self.num_experts}{tau}"


def check_tau(tau: float) -> float:
    """``tau`` if it is finite and at least 0."""
    return finite_float("tau", tau, low=0.0, high=math.inf, expected="a finite number >= 0")


def check_adjuster(adjuster: object) -> CLALogitAdjuster:
    """``adjuster`` if it is a :class:`CLALogitAdjuster`."""
    if not isinstance(adjuster, CLALogitAdjuster):
        raise TypeError(
            f"adjuster: expected a CLALogitAdjuster, got {type(adjuster).__name__}; a loss keeps it as "
            "criterion.adjuster, and CLALogitAdjuster(ClassGrouper(class_counts, num_groups)) makes one"
        )
    return adjuster
