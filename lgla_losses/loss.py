"""The LGLA loss: class-aware logit adjustment with adaptive angular weights (Eq. 9)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor, nn

from lgla_losses import functional
from lgla_losses.adjustment import CLALogitAdjuster, check_tau
from lgla_losses.checks import (
    describe,
    finite_float,
    floating_tensor,
    one_of,
    positive_float,
    positive_int,
    same_device,
    target_tensor,
    target_values,
    values_readable,
)
from lgla_losses.collectives import ranks_to_sync, sum_over_ranks
from lgla_losses.counts import ArrayLike, as_class_counts
from lgla_losses.grouping import ClassGrouper, check_grouper
from lgla_losses.output import ExpertLogits, ExpertOutput, check_logits
from lgla_losses.weighting import AAWWeighter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ADJUSTMENTS = ("lgla", "softmax", "balanced", "logit")
BACKENDS = ("auto", "reference", "fused", "triton")
REDUCTIONS = ("mean", "sum", "none")


class LGLALoss(nn.Module):
    r"""Local and Global Logit Adjustments for long-tailed learning.

    .. math::
        L = -\frac{1}{N} \sum_{k=1}^K \sum_{i=1}^N g(\theta_k^{y_i}, \theta_k^{ref})
        \log \frac{\exp(v_{i,k}^{y_i} + T(k, y_i))}{\sum_j \exp(v_{i,k}^j + T(k, j))}

    K experts on a shared backbone all learn from every sample. The margins of the K - 1 local
    experts make each excel on one group of classes, those of the global expert make it excel on
    the inversely long-tailed distribution, and samples harder than their group's mean weigh more.
    For inference average the experts' unadjusted logits: :meth:`ExpertOutput.ensemble`. The loss is a
    sum over the experts: expect about K times a single model's. A loaded ``state_dict`` brings its own
    class counts and adjustments.

    Source: Tao et al., ICCV 2023, Eq. 9.

    Args:
        class_counts: training samples per class ``[C]``, positive; :func:`count_classes` makes them.
        num_experts: number of experts ``K``, at least 2 for ``"lgla"``. None means 3, or what
            ``grouper`` or an adjustment table fixes.
        tau: strength of the global adjustment for ``"lgla"`` (None: ``1.25 * (K - 1)``), and of
            every expert's for ``"logit"`` (None: 1). Other adjustments have none.
        grouper: groups of one's own instead of ``class_counts``; ``K = num_groups + 1``.
        aaw: weight hard samples (Eq. 8). Without it the loss is CLA of the paper's Table 5.
        scale: factor of cosine logits, ``v = scale * cos``; None for a linear head.
        adjustment: ``"lgla"`` (Eq. 4); ``"softmax"`` (none); ``"balanced"``
            (:math:`\log n_j` for every expert, balanced softmax); ``"logit"`` (:math:`\tau \log n_j`);
            or a finite tensor ``[K, C]``.
        reduction: ``"mean"`` over the samples not ignored, ``"sum"``, or ``"none"``.
        ignore_index: target of samples that count nothing.
        label_smoothing: as in :class:`torch.nn.CrossEntropyLoss`, of ``v + T``; it never enters
            the weights.
        sync: under an initialised ``torch.distributed`` with gradients enabled, take the angles'
            means over the global batch, and let ``"mean"`` divide by the global number of samples
            over the number of ranks, so that DDP's averaged gradients are those of the whole batch.
        process_group: the ranks for ``sync``; None means all.
        validate_args: check the values of targets and logits, which waits for a GPU. None means
            on the CPU only, and not while compiling.
        backend: ``"reference"`` is plain differentiable PyTorch; ``"auto"`` takes the fastest that
            can run, in this version the same.

    Attributes:
        adjuster: the :class:`CLALogitAdjuster`.
        weighter: the :class:`AAWWeighter`; it stands by without ``aaw``.
        ignore_index: as given.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or shapes, devices or values do not fit.

    Shape:
        - output: an :class:`ExpertOutput`, logits ``[N, K, C]``, or K tensors ``[N, C]``
        - target: int64 ``[N]``
        - features: ``[N, K, d]``, weight: ``[K, C, d]``, for the angles of Eq. 7 of any head
        - result: float32 (float64 for float64 logits) scalar, or ``[N]`` without reduction

    Example:
        >>> criterion = LGLALoss([500, 100, 20], num_experts=3)
        >>> cosine_logits = 30 * torch.zeros(8, 3, 3, requires_grad=True)
        >>> criterion(cosine_logits, torch.arange(8) % 3).backward()
    """

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        num_experts: SupportsIndex | None = None,
        tau: float | None = None,
        *,
        grouper: ClassGrouper | None = None,
        aaw: bool = True,
        scale: float | None = 30.0,
        adjustment: str | Tensor = "lgla",
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        sync: bool = True,
        process_group: ProcessGroup | None = None,
        validate_args: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(adjustment, Tensor):
            one_of("adjustment", adjustment, ADJUSTMENTS)
        self.adjustment = "table" if isinstance(adjustment, Tensor) else adjustment
        needs_groups = aaw or self.adjustment == "lgla"
        num_experts = _number_of_experts(num_experts, grouper, adjustment, needs_groups)
        if grouper is None:
            grouper = _group_classes(class_counts, num_experts, needs_groups)
        elif class_counts is not None:
            raise ValueError("grouper: expected class_counts or a grouper, got both; drop class_counts")
        self.adjuster = _make_adjuster(grouper, num_experts, adjustment, tau)
        self.aaw = aaw
        self.weighter = AAWWeighter(
            grouper,
            ignore_index=ignore_index,
            sync=sync,
            process_group=process_group,
            validate_args=validate_args,
        )
        self.scale = None if scale is None else positive_float("scale", scale, "None means a linear head")
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.label_smoothing = finite_float(
            "label_smoothing", label_smoothing, low=0.0, high=1.0, expected="a number in 0..1"
        )
        self.validate_args = validate_args
        self.backend = _runnable_backend(backend)
        self._warned_of_scale = False

    @property
    def ignore_index(self) -> int:
        """Target of samples that count nothing."""
        return self.weighter.ignore_index

    @property
    def grouper(self) -> ClassGrouper:
        """The groups of the classes."""
        return self.adjuster.grouper

    @property
    def num_experts(self) -> int:
        """Number of experts ``K``."""
        return self.adjuster.num_experts

    @property
    def num_classes(self) -> int:
        """Number of classes ``C``."""
        return self.grouper.num_classes

    def forward(
        self,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        *,
        features: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Eq. 9 of a batch.

        Args:
            output: what the experts gave.
            target: class indices ``[N]``.
            features: inputs of the classifiers ``[N, K, d]``, where ``output`` is logits.
            weight: weights of the classifiers ``[K, C, d]``, where ``output`` is logits.
            normalizer: divisor for ``"mean"``, taken as it is, instead of the number of samples. For
                gradient accumulation the samples of all micro-batches, under DDP divided by the number
                of ranks; exact without ``aaw``, whose references are those of each micro-batch.
        """
        if isinstance(output, ExpertOutput):
            if features is not None or weight is not None:
                raise ValueError("features, weight: expected none beside an ExpertOutput, which holds them")
            output, features, weight = output
        logits = check_logits(output, self.num_experts, self.num_classes)
        first = logits if isinstance(logits, Tensor) else logits[0]
        self._check_inputs(first, target, features, weight, normalizer)
        if values_readable(first, self.validate_args):
            self._check_values(logits, target, from_logits=features is None)

        statistics = weights = None
        if self.aaw:
            angles = self._angles(logits, target, features, weight)
            statistics = self.weighter.statistics(angles, target)
            weights = self.weighter(angles, target, statistics)
        losses = functional.lgla_loss(
            logits,
            target,
            self.adjuster.table,
            weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        if normalizer is None:
            normalizer = self._samples_per_rank(target, statistics, losses.dtype)
        elif isinstance(normalizer, Tensor):
            normalizer = normalizer.to(losses.dtype)
        return losses.sum() / normalizer

    def _angles(
        self, logits: ExpertLogits, target: Tensor, features: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        # Ignored samples have no class; any stands in, as their weight is 0.
        target = torch.where(target == self.ignore_index, 0, target)
        if features is not None and weight is not None:
            return functional.angles_from_features(features, weight, target)
        if self.scale is None:
            raise ValueError(
                "features, weight: expected features [N, K, d] and weight [K, C, d], got none, and logits of "
                "a linear head (scale=None) do not give the angles of Eq. 7; pass them as "
                "criterion(logits, target, features=f, weight=w) or an ExpertOutput, or set aaw=False"
            )
        return functional.angles_from_logits(logits, target, self.scale)

    def _samples_per_rank(self, target: Tensor, statistics: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Samples not ignored over the ranks, divided by their number; at least 1 over it."""
        group = self.weighter.process_group
        num_ranks = ranks_to_sync(self.weighter.sync, group)
        if statistics is None:
            count = sum_over_ranks((target != self.ignore_index).sum(), num_ranks, group)
        else:
            count = statistics[:, -1].sum()
        return count.clamp(min=1).to(dtype) / num_ranks

    def _check_inputs(
        self,
        logits: Tensor,
        target: Tensor,
        features: Tensor | None,
        weight: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> None:
        target_tensor(target, num_samples=logits.shape[0])
        if (features is None) != (weight is None):
            raise ValueError("features, weight: expected both or neither, got one; Eq. 7 needs both")
        if features is not None and weight is not None:
            floating_tensor("features", features, "[N, K, d]")
            floating_tensor("weight", weight, "[K, C, d]")
            sizes = (len(target), self.num_experts, self.num_classes)
            if (*features.shape[:2], weight.shape[1]) != sizes or weight.shape[::2] != features.shape[1:]:
                n, k, c = sizes
                raise ValueError(
                    f"features, weight: expected shapes [{n}, {k}, d] and [{k}, {c}, d], "
                    f"got {list(features.shape)} and {list(weight.shape)}"
                )
        same_device(
            logits=logits, target=target, features=features, weight=weight, criterion=self.adjuster.table
        )
        if normalizer is not None:
            self._check_normalizer(normalizer)

    def _check_normalizer(self, normalizer: float | Tensor) -> None:
        if self.reduction != "mean":
            raise ValueError(
                f"normalizer: expected None with reduction={self.reduction!r}, got {describe(normalizer)}; "
                "it is the divisor of reduction='mean'"
            )
        if not isinstance(normalizer, Tensor):
            positive_float("normalizer", normalizer, "the number of samples to divide by")
        elif normalizer.dim() > 0 or normalizer.is_complex():
            raise ValueError(
                f"normalizer: expected a number or a real scalar tensor, got {describe(normalizer)}"
            )
        elif values_readable(normalizer, self.validate_args):
            positive_float("normalizer", normalizer.item(), "the number of samples to divide by")

    def _check_values(self, logits: ExpertLogits, target: Tensor, from_logits: bool) -> None:
        target_values(target, self.num_classes, self.ignore_index)
        kept = target != self.ignore_index
        index = torch.where(kept, target, 0)[:, None]
        for k, expert in enumerate(functional.expert_logits(logits)):
            if expert.numel() == 0:
                continue
            own = expert.detach().gather(1, index)[kept[:, None]]
            # The maximum carries NaN and +inf of the whole batch; -inf may mask other classes.
            if not (own.isfinite().all() and expert.detach().amax() < float("inf")):
                raise ValueError(
                    f"logits: expected no NaN or +inf, and no -inf on the target, got one from expert {k}; "
                    "lower the learning rate, clip gradients, or look for a division by zero upstream "
                    "(validate_args=False skips this check)"
                )
            if from_logits and self.aaw and self.scale is not None:
                self._warn_of_scale(own, self.scale)

    def _warn_of_scale(self, target_logits: Tensor, scale: float) -> None:
        if self._warned_of_scale or not (target_logits > 1.05 * scale).any():
            return
        self._warned_of_scale = True
        warnings.warn(
            f"a target logit of {float(target_logits.max()):.4g} exceeds scale={scale}: these are no "
            "cosine logits, so their angles, and with them the adaptive angular weights, are wrong; with "
            "a linear head set scale=None and pass features and weight",
            stacklevel=6,
        )

    def extra_repr(self) -> str:
        """Configuration shown by ``repr``."""
        return (
            f"adjustment={self.adjustment!r}, aaw={self.aaw}, scale={self.scale}, "
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, backend={self.backend!r}"
        )


def _number_of_experts(
    num_experts: SupportsIndex | None,
    grouper: ClassGrouper | None,
    adjustment: str | Tensor,
    needs_groups: bool,
) -> int:
    """K, from whichever arguments fix it; those that disagree raise."""
    fixed = {}
    if num_experts is not None:
        fixed["num_experts"] = positive_int("num_experts", num_experts, "the paper uses 3")
    if grouper is not None:
        fixed["grouper (num_groups + 1)"] = check_grouper(grouper).num_groups + 1
    if isinstance(adjustment, Tensor) and adjustment.dim() > 0:
        fixed["adjustment table"] = adjustment.shape[0]
    if len(set(fixed.values())) > 1:
        got = ", ".join(f"{number} from {name}" for name, number in fixed.items())
        raise ValueError(f"num_experts: expected one number of experts, got {got}; drop num_experts")
    number = next(iter(fixed.values()), 3)
    if number == 1 and needs_groups:
        raise ValueError(
            f"num_experts: expected at least 2 for adjustment='lgla' or aaw=True, got {number}; "
            "one expert goes with adjustment='softmax', 'balanced' or 'logit' and aaw=False"
        )
    return number


def _group_classes(class_counts: ArrayLike | None, num_experts: int, needs_groups: bool) -> ClassGrouper:
    """One group a local expert; without need of groups as many as the classes allow."""
    if class_counts is None:
        raise TypeError("class_counts: expected samples per class [C], got None; or pass a grouper")
    counts = as_class_counts(class_counts)
    num_groups = num_experts - 1
    if needs_groups and num_groups > len(counts):
        raise ValueError(
            f"num_experts: expected at most C + 1 = {len(counts) + 1} for {len(counts)} classes, as each "
            f"local expert owns a group of classes, got {num_experts}; use fewer experts"
        )
    return ClassGrouper(counts, max(1, min(num_groups, len(counts))))


def _runnable_backend(backend: str) -> str:
    one_of("backend", backend, BACKENDS)
    if backend in ("fused", "triton"):
        raise ValueError(
            f"backend: expected one that can run, got {backend!r}, which is not part of this version; "
            "use 'auto' or 'reference'"
        )
    return backend


def _make_adjuster(
    grouper: ClassGrouper, num_experts: int, adjustment: str | Tensor, tau: float | None
) -> CLALogitAdjuster:
    if isinstance(adjustment, Tensor):
        return CLALogitAdjuster.from_table(grouper, adjustment)
    if adjustment == "lgla":
        return CLALogitAdjuster(grouper, tau)
    strength = {"softmax": 0.0, "balanced": 1.0, "logit": 1.0 if tau is None else check_tau(tau)}[adjustment]
    table = functional.log_prior_table(grouper.class_counts, num_experts, strength)
    return CLALogitAdjuster.from_table(grouper, table)
