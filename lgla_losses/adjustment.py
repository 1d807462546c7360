"""Class-aware logit adjustment: what each expert learns to do well (Eqs. 4 to 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._batch import check_logits, refuse_masked
from lgla_losses._buffers import ConstantBuffers, same_constants, scalar
from lgla_losses._checks import finite_float, floating_tensor, same_device, target_tensor, target_values
from lgla_losses._counts import ArrayLike, ClassRules
from lgla_losses._torch import values_readable
from lgla_losses.experts.output import ExpertLogits, ExpertOutput, normalized_fusion
from lgla_losses.grouping import ClassGrouper, check_grouper, same_classes
from lgla_losses.suggestion import suggest

#: Adjustments that have a strength.
WITH_TAU = ("lgla", "logit", "sade")

#: Default strengths of the adjustments by the class prior.
_USUAL_TAU = {"logit": 1.0, "sade": 2.0}

#: Number of rows in the table of ``"sade"``.
NUM_SADE_EXPERTS = 3


class CLALogitAdjuster(ConstantBuffers):
    r"""Add the class-aware logit adjustment :math:`T(k, j)` of every expert.

    Local experts (LLA) k = 0..K-2: :math:`T = \log(n_j / n_{max})` for the classes of group k and 0
    for the others. The last expert is the global one (GLA): :math:`T = \tau \log(n_j / n_{max})`. This is Eq.
    4 shifted by a constant per expert, :math:`\log n_{max}` and :math:`\tau \log n_{max}`. The shift does not
    change the softmax, and loses fewer digits in low precision. Classes that the grouper leaves out as
    background have :math:`T = 0`, classes that it masks :math:`T = -\infty`, for every expert.

    Source: Tao et al., ICCV 2023, Eqs. 4 to 6.

    Args:
        grouper: the groups; ``K = num_groups + 1``.
        tau: strength of the global adjustment, at least 0. None means ``1.25 * (K - 1)``: the paper's 2.5 at
            K = 3, in proportion to the number of local experts. :func:`suggest` says when another value is
            better; :class:`LGLALoss` uses it for linear heads and label smoothing. With K = 2 and ``tau=1``
            both rows of the table are those of balanced softmax.

    Attributes:
        table: the adjustments, float64 ``[K, C]`` with maximum 0; read only.
        tau: float64 scalar tensor, or None for your own table; read only.
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

    read_only = ("grouper",)

    def __init__(self, grouper: ClassGrouper, tau: float | None = None) -> None:
        super().__init__()
        self.grouper = check_grouper(grouper)
        num_experts = grouper.num_groups + 1
        self._arrange("lgla", num_experts, suggest(num_experts).tau if tau is None else tau)

    @classmethod
    def from_table(cls, grouper: ClassGrouper, table: Tensor) -> CLALogitAdjuster:
        """Adjust by your own table.

        Args:
            grouper: holds the class counts.
            table: finite adjustments ``[K, C]``, one row per expert; copied.

        Raises:
            TypeError: the table is not a floating-point tensor.
            ValueError: the table is not 2-D, does not have C columns or is not finite, or the grouper leaves
                classes out.
        """
        floating_tensor("adjustment table", table, "[K, C]")
        num_classes = check_grouper(grouper).num_classes
        if grouper.background or grouper.zero_counts == "mask":
            raise ValueError(
                "adjustment table: expected one made from class counts with "
                f"{grouper._rules.shown().rstrip(', ')}, got your own table, which is used as given; write "
                "0 into it for a background, and add -inf to the logits of classes to mask"
            )
        if table.is_meta:
            raise ValueError(
                "adjustment table: expected values, got a tensor on meta, which has none; move it to "
                "another device"
            )
        if table.shape[0] == 0 or table.shape[1] != num_classes:
            raise ValueError(f"adjustment table: expected shape [K, {num_classes}], got {list(table.shape)}")
        adjuster = cls.__new__(cls)
        ConstantBuffers.__init__(adjuster)
        adjuster.grouper = grouper
        adjuster._adjustment = "table"
        adjuster._keep("table", _finite(table.detach().to("cpu", torch.float64)))
        return adjuster

    @classmethod
    def of_prior(
        cls, grouper: ClassGrouper, num_experts: int, adjustment: str, tau: float | None = None
    ) -> CLALogitAdjuster:
        """Adjust by the class prior alone: every expert in the same way, or SADE's three experts.

        Args:
            grouper: holds the class counts.
            num_experts: number of experts ``K``.
            adjustment: ``"softmax"``, ``"balanced"``, ``"logit"`` or ``"sade"``, as in :class:`LGLALoss`.
            tau: strength of ``"logit"`` (None: 1) and ``"sade"`` (None: 2), at least 0; others have none.

        Raises:
            TypeError: ``tau`` is not a number.
            ValueError: ``tau`` is negative or not finite, or given for an adjustment that has none; or
                ``"sade"`` has a number of experts other than 3.
        """
        if adjustment == "sade" and num_experts != NUM_SADE_EXPERTS:
            raise ValueError(
                f"num_experts: expected {NUM_SADE_EXPERTS} with adjustment='sade', one per adjustment, got "
                f"{num_experts}; for another number use 'lgla'"
            )
        adjuster = cls.__new__(cls)
        ConstantBuffers.__init__(adjuster)
        adjuster.grouper = check_grouper(grouper)
        adjuster._arrange(adjustment, num_experts, _USUAL_TAU.get(adjustment) if tau is None else tau)
        return adjuster

    def _arrange(self, adjustment: str, num_experts: int, tau: float | None) -> None:
        self._adjustment = adjustment
        tau = strength(adjustment, tau)
        if tau is not None:
            self._keep("tau", scalar(tau))
        counts, index = self.grouper.on_cpu("class_counts"), self.grouper.on_cpu("group_index")
        self._keep("table", _table_of(adjustment, counts, index, num_experts, tau, self.grouper._rules))

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts and strength in place, as :meth:`LGLALoss.set_adjustment` does."""
        tau = strength(self._adjustment, tau)
        if tau is None and "tau" in self._exact:
            tau = float(self.on_cpu("tau"))
        grouper = self.grouper
        if class_counts is None:
            counts, index = grouper.on_cpu("class_counts"), grouper.on_cpu("group_index")
        else:
            counts = same_classes(class_counts, grouper.num_classes, grouper._rules)
            index = grouper.regrouped(counts)

        if self._adjustment != "table":
            table = _table_of(self._adjustment, counts, index, self.num_experts, tau, grouper._rules)
            self._keep("table", table)
        if tau is not None:
            self._keep("tau", scalar(tau))
        if class_counts is not None:
            grouper.keep(counts, index)

    @property
    def adjustment(self) -> str:
        """The kind of adjustment, as in :class:`LGLALoss`."""
        return self._adjustment

    @property
    def table(self) -> Tensor:
        """The adjustments ``[K, C]``."""
        return self._read("table")

    @property
    def tau(self) -> Tensor | None:
        """Strength of the adjustment, a scalar; None if it has none."""
        return self._read("tau") if "tau" in self._exact else None

    @property
    def num_experts(self) -> int:
        """Number of experts ``K``."""
        return self.constant("table").shape[0]

    def forward(self, logits: ExpertOutput | ExpertLogits) -> Tensor:
        """Add the adjustments to the logits: return :math:`v + T`, a new tensor."""
        if isinstance(logits, ExpertOutput):
            logits = logits.logits
        table = self.constant("table")
        checked = check_logits(logits, *table.shape)
        stacked = checked if isinstance(checked, Tensor) else torch.stack(tuple(checked), dim=1)
        same_device(logits=stacked, table=table)
        return stacked + table.to(functional.compute_dtype(stacked.dtype))

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def margin(self, target: Tensor) -> Tensor:
        r"""Compute the margins :math:`M(y_i, j, k) = T(k, j) - T(k, y_i)` of Eq. 6.

        Args:
            target: class indices, int64 ``[N]``.

        Returns:
            float64 ``[N, K, C]``.
        """
        target, table = target_tensor(target), self.constant("table")
        if values_readable(target, None):
            target_values(target, table.shape[1])
            if self.grouper.zero_counts == "mask":
                refuse_masked(target, self.grouper.constant("class_counts") == 0)
        return functional.cla_margin(table, target)

    def implied_prior(self, fusion: Tensor | Sequence[float] | None = None) -> Tensor:
        r"""Compute the prior for which the fused logits are log-likelihood plus log prior.

        It is proportional to :math:`\exp \sum_k f_k (\log n_j - T(k, j))`. With equal fusion of the LGLA
        experts it is :math:`n_j^{(K - 1 - \tau) / K}`: uniform exactly at :math:`\tau = K - 1`, biased to the
        head below and to the tail above. This is our derivation, for cross entropy at its minimum with
        ``aaw=False`` and without label smoothing, where the softmax of :math:`v + T` is calibrated. Trained
        networks are usually overconfident, and lean more to the head (see :func:`suggest`);
        :func:`calibration.fit <lgla_losses.calibration.fit>` measures how much. Masked classes have prior 0.
        A background keeps its own :math:`n_j`, beside :math:`n_{max} (n_j / n_{max})^{(K - 1 - \tau) / K}` of
        the other classes.

        Args:
            fusion: one non-negative weight per expert ``[K]``, divided by their sum; None for equal weights.

        Returns:
            float64 ``[C]``, summing to 1.
        """
        table = self.constant("table")
        weights = normalized_fusion(fusion, self.num_experts, table.device).to(table.device)
        return functional.implied_prior(table, self.grouper.constant("class_counts"), weights)

    def _inferred(self) -> frozenset[str]:
        return frozenset({"tau"})  # states of version 0.1.0 lack it for adjustment="logit"

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        table = self._current(state, "table")
        exact = table.double()
        if self._adjustment == "table":
            return {"table": _finite(exact)}

        groups = self.grouper.restored_from(state_dict, prefix + "grouper.")
        counts, index = groups["class_counts"], groups["group_index"]
        _finite(exact.masked_fill(counts == 0, 0.0))
        tau = None
        if "tau" in self._exact:
            tau = self._strength_in(state, table, counts)
        expected = _table_of(self._adjustment, counts, index, self.num_experts, tau, self.grouper._rules)
        if not same_constants(table, expected):
            raise ValueError(
                f"table: expected the table of adjustment={self._adjustment!r} for the class counts and tau "
                "in the same state, got another; load all constants of a state at once into a loss with "
                "the arguments of the saved one (zero_counts and background too), or pass the saved table "
                "as adjustment="
            )
        whole = exact if table.dtype == torch.float64 else expected
        return {"table": whole} if tau is None else {"table": whole, "tau": scalar(tau)}

    def _strength_in(self, state: Mapping[str, Tensor], table: Tensor, counts: Tensor) -> float:
        """Find the tau of a state; if the state has none, compute it from the table.

        If the tau of the state is the current one, rounded, give the current one.
        """
        if "tau" not in state:
            return check_tau(strength_of(table[-1].double(), counts, self.grouper._rules))
        own, tau = self.on_cpu("tau"), state["tau"]
        return check_tau(float(own if own.to(tau.dtype) == tau else tau))

    def extra_repr(self) -> str:
        """Show the configuration."""
        known = "tau" in self._exact and not self.constant("tau").is_meta
        tau = f", tau={float(self.on_cpu('tau')):.4g}" if known else ""
        return f"num_experts={self.num_experts}{tau}"


def _table_of(
    adjustment: str, counts: Tensor, index: Tensor, num_experts: int, tau: float | None, rules: ClassRules
) -> Tensor:
    """Compute the adjustments ``[K, C]`` of one kind."""
    adjusted = rules.adjusted(counts)
    if adjustment == "lgla" and tau is not None:
        table = functional.cla_table(counts[adjusted], index[adjusted], tau)
    elif adjustment == "sade" and tau is not None:
        table = functional.sade_table(counts[adjusted], tau)
    else:
        factor = {"softmax": 0.0, "balanced": 1.0}.get(adjustment, tau)
        table = functional.log_prior_table(counts[adjusted], num_experts, factor or 0.0)
    return rules.spread(table, counts, masked=-math.inf, background=0.0)


def strength_of(adjustment: Tensor, counts: Tensor, rules: ClassRules) -> float:
    """Compute tau from adjustments ``tau * log(n_j / n_max)`` ``[C]``; give 1 if all counts are equal."""
    adjusted = rules.adjusted(counts)
    adjustment, log_prior = adjustment[adjusted], functional.log_prior_table(counts[adjusted], 1)[0]
    rarest = log_prior.argmin()
    return float(adjustment[rarest] / log_prior[rarest]) if log_prior[rarest] < 0 else 1.0


def _finite(table: Tensor) -> Tensor:
    if not table.isfinite().all():
        raise ValueError("adjustment table: expected finite values, got NaN or infinity")
    return table


def strength(adjustment: str, tau: float | None) -> float | None:
    """Check that ``tau`` is None, or a strength for an adjustment that has one; return it."""
    if tau is None:
        return None
    if adjustment not in WITH_TAU:
        raise ValueError(
            f"tau: expected None with adjustment={adjustment!r}, which has no tau, got {tau}; leave it out, "
            "or use 'lgla', 'logit' or 'sade'"
        )
    return check_tau(tau)


def check_tau(tau: float) -> float:
    """Check that ``tau`` is a finite number of at least 0; return it as a float."""
    return finite_float("tau", tau, low=0.0, high=math.inf, expected="a finite number >= 0")


def check_adjuster(adjuster: object) -> CLALogitAdjuster:
    """Check that ``adjuster`` is a :class:`CLALogitAdjuster`; return it."""
    if not isinstance(adjuster, CLALogitAdjuster):
        raise TypeError(
            f"adjuster: expected a CLALogitAdjuster, got {type(adjuster).__name__}; take criterion.adjuster "
            "of a loss, or make CLALogitAdjuster(ClassGrouper(class_counts, num_groups))"
        )
    return adjuster
