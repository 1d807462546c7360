"""Losses for samples with several labels, one sigmoid per class, that serve rare classes too.

Each takes the logits of one model, ``[N, C]``, or of K experts, ``[N, K, C]``, and sums their losses, as the
other losses do; n_j is the number of training samples that have class j.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from lgla_losses import functional
from lgla_losses._batch import Batch, one_or_more_experts
from lgla_losses._buffers import scalar
from lgla_losses._checks import (
    finite_float,
    finite_tensors,
    multi_hot_tensor,
    multi_hot_values,
    positive_float,
    same_device,
    sample_weight_tensor,
    sample_weight_values,
)
from lgla_losses._counts import ArrayLike, ClassRules, as_class_counts
from lgla_losses._ranks import Ranks
from lgla_losses.adjustment import check_tau
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.losses._base import scalar_on
from lgla_losses.losses._config import refuse_unknown
from lgla_losses.losses.adjusted import AdjustedLoss
from lgla_losses.losses.baselines import _check_beta, _effective_weights, _given

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MultiLabelOptions(TypedDict, total=False):
    """Name the options of :class:`MultiLabelLoss`, besides its constants."""

    class_weight: ArrayLike | None
    reduction: str
    label_smoothing: float
    sync: bool
    process_group: ProcessGroup | None
    validate_args: bool | None


class MultiLabelLoss(AdjustedLoss):
    r"""Compute binary cross entropy of adjusted logits, weighted by class, summed over the experts.

    .. math:: \sum_k w_j \big( q_j \, (1 - p_{kj})^\gamma (-\log p_{kj})
        + (1 - q_j) \, p_{kj}^\gamma (-\log (1 - p_{kj})) \big), \qquad p_k = \sigma(v_k + T)

    Here :math:`q_j` says whether a sample has class j. A subclass gives the constants :math:`T` and :math:`w`
    by ``constants``, and the exponent :math:`\gamma`. It computes in plain PyTorch, in float32 or wider.

    Args:
        class_counts: training samples that have each class ``[C]``, positive.
        numbers: further arguments of ``constants``, by name.
        options: ``class_weight``, your own finite weights >= 0 of the classes ``[C]``, which multiply those
            that the loss makes; ``reduction``: ``"mean"`` over samples and classes, as in
            ``torch.nn.BCEWithLogitsLoss``, for any class weights, ``"sum"``, or ``"none"``;
            ``label_smoothing`` e in 0..1, which makes the targets :math:`(1 - e) q + e / 2`; ``sync``,
            ``process_group`` and ``validate_args`` as in :class:`~lgla_losses.LGLALoss`.

    Raises:
        TypeError: an argument is of a wrong type, or an option is unknown.
        ValueError: an argument is out of range, or shapes, devices or values do not fit.

    Shape:
        - output: logits ``[N, C]``; ``[N, K, C]``, K tensors ``[N, C]`` or an
          :class:`~lgla_losses.ExpertOutput`
        - target: ``[N, C]`` of 0 and 1, bool, integers or floats; floats may lie between
        - sample_weight: ``[N]``
        - result: float32 (float64 for float64 logits) scalar, or ``[N, C]`` without reduction
    """

    def __init__(
        self,
        class_counts: ArrayLike,
        numbers: Mapping[str, float],
        **options: Unpack[MultiLabelOptions],
    ) -> None:
        refuse_unknown(self, options, MultiLabelOptions)
        super().__init__(as_class_counts(_given(class_counts)), numbers, **options)
        self._rules = ClassRules(are_options=False)

    def forward(
        self,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of a batch, a scalar or ``[N, C]``, in float32 (float64 for float64 logits).

        Args:
            output: logits of one model ``[N, C]``; of K experts ``[N, K, C]``, K tensors ``[N, C]`` or an
                :class:`~lgla_losses.ExpertOutput`, whose losses are summed.
            target: which classes each sample has ``[N, C]``, 1 or 0, or a number between.
            sample_weight: weight of each sample ``[N]``: a sample of weight 2 counts as two samples in the
                losses and in the number that ``"mean"`` divides by. Finite, at least 0, without gradient.
            normalizer: number of samples for ``"mean"``, which divides by this number times C, instead of the
                number in the batch. For gradient accumulation see :meth:`LGLALoss.forward
                <lgla_losses.LGLALoss.forward>`.
        """
        table, class_weight, _ = self._terms()
        batch = self._batch(output, target, table if table is not None else class_weight, sample_weight)
        _, ranks, _ = self._step(batch, normalizer)

        losses = self._losses(batch, table, class_weight)
        samples = self._samples(batch, ranks, normalizer)
        if samples is None:
            return losses if self.reduction == "none" else losses.sum()
        divisor = losses.shape[1] * torch.where(samples == 0, 1.0, samples)
        return losses.sum() / divisor.to(losses.dtype)

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _batch(
        self,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        constant: Tensor | None,
        sample_weight: Tensor | None,
    ) -> Batch:
        """Check the inputs of a call, and convert the target to the dtype of the loss."""
        blocks, of_one = one_or_more_experts(output, self._num_classes)
        first = blocks[0]
        target = multi_hot_tensor(target, first.shape[0], first.shape[-1])
        if sample_weight is not None:
            sample_weight_tensor(sample_weight, first.shape[:1])
        same_device(logits=first, target=target, sample_weight=sample_weight, criterion=constant)

        target = target.to(functional.compute_dtype(first.dtype))
        return Batch(blocks, target, sample_weight=sample_weight, of_one=of_one)

    def _losses(self, batch: Batch, table: Tensor | None, class_weight: Tensor | None) -> Tensor:
        """Compute the losses of every sample and class ``[N, C]``, summed over the experts."""
        target, dtype = batch.target, batch.target.dtype
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * target + self.label_smoothing / 2
        if not batch.of_one:
            target = target[:, None]

        adjusted = [block.to(dtype) for block in batch.logits]
        if table is not None:
            adjusted = [block + table.to(dtype) for block in adjusted]
        by_block = [binary_cross_entropy(block, target, self.focusing) for block in adjusted]
        losses = sum(by_block[1:], by_block[0]) if batch.of_one else by_block[0].sum(dim=1)

        if class_weight is not None:
            losses = losses * class_weight.to(dtype)
        if batch.sample_weight is not None:
            losses = losses * batch.sample_weight[:, None].to(dtype)
        return losses

    def _samples(self, batch: Batch, ranks: Ranks, normalizer: float | Tensor | None) -> Tensor | None:
        """Count the samples of a mean, on all ranks divided by their number; None if there is no mean."""
        device = batch.target.device
        dtype, samples = functional.widest_dtype(device), None
        if self._communicates(normalizer, ranks):
            weights = batch.sample_weight
            number = batch.target.shape[0] if weights is None else weights.sum(dtype=dtype)
            samples = scalar_on(device, number, dtype)
            if ranks.number > 1:
                samples = self._summed(samples[None], ranks)[0] / ranks.number
        if normalizer is not None:
            samples = scalar_on(device, normalizer, dtype)
        return samples if self.reduction == "mean" else None

    def _training_counts(self) -> NoReturn:
        raise ValueError(
            f"criterion: expected a loss for one class per sample, got {type(self).__name__}, for several "
            "labels per sample, whose logits hold no prior over the classes; each class has its own prior, "
            "the share of samples that have it"
        )

    def _engine(self, *batch_and_constants: object) -> None:
        """Choose plain PyTorch."""

    def _explain(self, batch: Batch) -> None:
        multi_hot_values(batch.target)
        if batch.sample_weight is not None:
            sample_weight_values(batch.sample_weight)
        for block in batch.logits:
            finite_tensors(logits=block)

    def extra_repr(self) -> str:
        """Show the configuration."""
        return super().extra_repr().removesuffix(f", backend={self.backend!r}")


class SigmoidAdjustedLoss(MultiLabelLoss):
    r"""Compute logit adjustment of each class against its absence: rare classes count as much as common ones.

    .. math:: -q_j \log \sigma(v_j + T_j) - (1 - q_j) \log (1 - \sigma(v_j + T_j)), \qquad
        T_j = \tau \log \frac{\pi_j}{1 - \pi_j}, \quad \pi_j = \frac{n_j}{N}

    Each class is a problem with two classes, present and absent, with priors :math:`\pi_j` and :math:`1 -
    \pi_j`. Where the loss is lowest, :math:`v_j + T_j` is the log odds :math:`\log \frac{p(x | 1)}{p(x | 0)}
    + \log \frac{\pi_j}{1 - \pi_j}`, so with :math:`\tau = 1` the logit :math:`v_j` is the log likelihood
    ratio: :math:`\sigma(v_j) > 0.5` is Bayes' decision for a test set in which class j is present half of the
    time. It maximises balanced accuracy, class by class. Predict with the unadjusted logits.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Eq. 10 of arXiv:2007.07314,
    for two classes whose logits differ by :math:`v_j`. (Its use for each class is ours.)

    Args:
        class_counts: training samples that have each class ``[C]``, such as ``targets.sum(dim=0)``; positive
            and below ``num_samples``.
        num_samples: number of training samples ``N``.
        tau: strength, at least 0; 0 is binary cross entropy.
        options: as in :class:`~lgla_losses.losses.multi_label.MultiLabelLoss`.

    Attributes:
        table: the adjustments :math:`T_j`, float64 ``[C]``.

    Example:
        >>> criterion = SigmoidAdjustedLoss([50, 10], num_samples=100)
        >>> criterion.table.exp()
        tensor([1.0000, 0.1111], dtype=torch.float64)
        >>> criterion(torch.zeros(4, 2), torch.eye(2).repeat(2, 1))
        tensor(0.9486)
    """

    def __init__(
        self,
        class_counts: ArrayLike,
        num_samples: float,
        tau: float = 1.0,
        **options: Unpack[MultiLabelOptions],
    ) -> None:
        numbers = {"tau": check_tau(tau), "num_samples": _check_samples(num_samples)}
        super().__init__(class_counts, numbers, **options)

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the adjustments."""
        absent = numbers["num_samples"] - counts
        if (absent <= 0).any():
            j = int(absent.argmin())
            raise ValueError(
                "class_counts, num_samples: expected fewer samples of a class than "
                f"num_samples={numbers['num_samples']:g}, got {float(counts[j]):g} for class {j}; "
                "num_samples is the number of rows of the targets; leave out a class that all of them have"
            )
        table = numbers["tau"] * (counts.log() - absent.log())
        return {"table": table, "num_samples": scalar(numbers["num_samples"])}

    def set_adjustment(
        self,
        class_counts: ArrayLike | None = None,
        tau: float | None = None,
        num_samples: float | None = None,
    ) -> None:
        """Change class counts and adjustments during training, in place, without a new compilation.

        Args:
            class_counts: training samples that have each class ``[C]``; None keeps them.
            tau: strength; None keeps it.
            num_samples: number of training samples; None keeps it.

        Raises:
            TypeError: counts, ``tau`` or ``num_samples`` are not numbers.
            ValueError: counts are not positive, are of other classes or not below ``num_samples``, or ``tau``
                is negative or not finite.
        """
        kept = float(self.on_cpu("num_samples"))
        self._of_samples(kept if num_samples is None else _check_samples(num_samples))
        super().set_adjustment(class_counts, tau)

    @property
    def num_samples(self) -> Tensor:
        """Number of training samples, a scalar."""
        return self._read("num_samples")

    def _of_samples(self, num_samples: float) -> None:
        """Set the number of samples for the next computation of the constants."""
        self._numbers["num_samples"] = num_samples

    def _inferred(self) -> frozenset[str]:
        return frozenset()

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        self._of_samples(_check_samples(float(self._current(state, "num_samples"))))
        return super()._restored(state, state_dict, prefix)


class ClassBalancedBCELoss(MultiLabelLoss):
    r"""Compute class-balanced binary cross entropy: a class weighs the inverse of its effective number.

    .. math:: w_j \, L(v_j, q_j), \qquad w_j \propto \frac{1 - \beta}{1 - \beta^{n_j}}, \qquad \sum_j w_j = C

    :math:`L` is binary cross entropy, or with ``gamma`` the focal loss of one sigmoid per class. The weight
    of a class is the same for samples with and without it, so its probabilities stay those of the training
    set: the weights say which classes a network serves first, but move no threshold.
    :class:`SigmoidAdjustedLoss` moves the thresholds.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 4,
    Eqs. 6 and 8, of the sigmoid losses of Eqs. 11 to 13. There a sample has one class, and all its terms have
    the weight of that class; here each term has the weight of its own class. The focal loss is Lin et al.,
    "Focal Loss for Dense Object Detection", ICCV 2017, Eq. 4.

    Args:
        class_counts: training samples that have each class ``[C]``, such as ``targets.sum(dim=0)``; positive.
        beta: how fast further samples of a class lose value, in ``[0, 1)``: 0 weighs all classes equally, a
            value close to 1 by their inverse counts.
        gamma: focusing parameter of the focal loss, at least 0; None means binary cross entropy.
        options: as in :class:`~lgla_losses.losses.multi_label.MultiLabelLoss`.

    Attributes:
        class_weight: the weights, float64 ``[C]``, with mean 1; times your own ``class_weight``.

    Example:
        >>> criterion = ClassBalancedBCELoss([3, 1], beta=0.5)
        >>> criterion.class_weight
        tensor([0.7273, 1.2727], dtype=torch.float64)
        >>> criterion(torch.zeros(4, 2), torch.eye(2).repeat(2, 1))
        tensor(0.6931)
    """

    def __init__(
        self,
        class_counts: ArrayLike,
        beta: float = 0.9999,
        gamma: float | None = None,
        **options: Unpack[MultiLabelOptions],
    ) -> None:
        super().__init__(class_counts, {"beta": _check_beta(beta)}, **options)
        if gamma is not None:
            expected = "a finite number >= 0 (None is binary cross entropy)"
            self.focusing = finite_float("gamma", gamma, low=0.0, high=math.inf, expected=expected)

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the weights."""
        return {"class_weight": _effective_weights(counts, numbers["beta"])}


def binary_cross_entropy(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Compute binary cross entropies, or focal losses for ``gamma`` > 0, of logits and targets in 0..1."""
    if gamma == 0:
        return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    present, absent = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return target * functional.focal(present, gamma) + (1 - target) * functional.focal(absent, gamma)


def _check_samples(num_samples: float) -> float:
    return positive_float("num_samples", num_samples, "the number of training samples, rows of the targets")
