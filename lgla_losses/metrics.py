"""Accuracy by shots and scores of class probabilities, as torchmetrics metrics.

They need torchmetrics: ``pip install torchmetrics``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lgla_losses._checks import (
    describe,
    floating_tensor,
    one_of,
    positive_int,
    same_device,
    target_tensor,
    target_values,
)
from lgla_losses._counts import ArrayLike, as_class_counts, shot_splits
from lgla_losses._scores import AVERAGES, ScoreSums, check_predictions, score_sums, scores
from lgla_losses._torch import values_readable

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        f"lgla_losses.metrics needs torchmetrics ({error}): pip install torchmetrics"
    ) from error

__all__ = ["ProbabilityScores", "ShotAccuracy"]

#: The rows of ``ShotAccuracy.splits``.
SPLITS = ("many", "medium", "few")


class _MayBeEmpty(Metric):
    """Return NaN without a batch, instead of the warning of torchmetrics."""

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        def without_warning(*args: Any, **kwargs: Any) -> Any:
            # A rank may have no batch at all; NaN says so.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
                return wrapped(*args, **kwargs)

        return without_warning


class ShotAccuracy(_MayBeEmpty):
    """Compute the mean per-class recall over all classes, and over many-, medium- and few-shot classes.

    The splits follow the training samples: more than ``many``, fewer than ``few``, and the rest between.
    Classes without test samples are left out, so on a balanced test set the means are accuracies. With
    several ranks the samples of all are counted.

    Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019.

    Args:
        class_counts: training samples per class ``[C]``, at least 0; a class without samples is few-shot.
        many: many-shot classes have more training samples than this.
        few: few-shot classes have fewer training samples than this; at most ``many``.
        kwargs: arguments of ``torchmetrics.Metric``, such as ``process_group``.

    Attributes:
        correct: correctly predicted samples of every class, int64 ``[C]``.
        total: samples of every class, int64 ``[C]``.
        splits: which classes are many-, medium- and few-shot, bool ``[3, C]``.

    Raises:
        TypeError: an argument, ``pred`` or ``target`` is of another type.
        ValueError: a threshold, shape or class index is out of range, or a score is NaN; values are checked
            on the CPU only.

    Shape:
        - pred: class indices int64 ``[N]``, or scores ``[N, C]``, of which the largest predicts
        - target: class indices int64 ``[N]``
        - output: a dict of scalars ``all``, ``many``, ``medium``, ``few``; NaN without classes

    Example:
        >>> metric = ShotAccuracy([500, 50, 5])
        >>> metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2]))
        >>> metric.compute()
        {'all': tensor(0.6667), 'many': tensor(1.), 'medium': tensor(1.), 'few': tensor(0.)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor
    splits: Tensor

    def __init__(self, class_counts: ArrayLike, many: float = 100, few: float = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        counts = as_class_counts(class_counts, "mask")  # classes without samples are few-shot
        self.register_buffer("splits", shot_splits(counts, many, few), persistent=False)
        self.many, self.few = float(many), float(few)
        for name in ("correct", "total"):
            zeros = torch.zeros(len(counts), dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count a batch."""
        target = target_tensor(target)
        pred = self._class_indices(pred, len(target))
        same_device(pred=pred, target=target, metric=self.total)
        num_classes = len(self.total)
        if values_readable(target, None):
            target_values(target, num_classes)
            wrong = pred[(pred < 0) | (pred >= num_classes)]
            if len(wrong):
                raise ValueError(
                    f"pred: expected class indices 0..{num_classes - 1}, got {int(wrong[0])}; number them "
                    "as in class_counts"
                )
        self.correct = self.correct.index_add(0, target, (pred == target).long())
        self.total = self.total.index_add(0, target, torch.ones_like(target))

    def _class_indices(self, pred: Tensor, num_samples: int) -> Tensor:
        if isinstance(pred, Tensor) and pred.is_floating_point():
            shape = (num_samples, len(self.total))
            if floating_tensor("pred", pred, "[N, C]").shape != shape:
                raise ValueError(
                    f"pred: expected scores {list(shape)}, to fit target and class_counts, got "
                    f"{list(pred.shape)}"
                )
            if values_readable(pred, None) and pred.isnan().any():
                raise ValueError("pred: expected scores, got NaN, which argmax would take as a prediction")
            return pred.argmax(dim=1)
        if not isinstance(pred, Tensor) or pred.dtype != torch.int64:
            raise TypeError(
                "pred: expected int64 class indices [N] or floating-point scores [N, C], got "
                f"{describe(pred)}; convert other integers with pred.long()"
            )
        if pred.shape != (num_samples,):
            raise ValueError(
                f"pred: expected one class index per sample, shape [{num_samples}], got {list(pred.shape)}"
            )
        return pred

    def compute(self) -> dict[str, Tensor]:
        """Compute the mean recalls ``all``, ``many``, ``medium``, ``few``."""
        recall = self.correct / self.total
        means = {name: recall[split].nanmean() for name, split in zip(SPLITS, self.splits, strict=True)}
        return {"all": recall.nanmean(), **means}

    def per_class(self) -> Tensor:
        """Compute the recall of every class ``[C]`` over all ranks; NaN without test samples.

        With several ranks it is a collective: call it on all of them.
        """
        # Inside a sync_context of the caller the states already hold all ranks.
        synced = self._is_synced
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not synced,
            should_unsync=not synced,
        ):
            return self.correct / self.total


class ProbabilityScores(_MayBeEmpty):
    r"""Compute negative log likelihood, expected calibration error and Brier score of class probabilities.

    With :math:`p_{ij}` the probability of class :math:`j` for sample :math:`i` and :math:`w_i` the weights
    of the samples, which sum to 1,

    .. math::
        \mathrm{nll} = -\sum_i w_i \log p_{i y_i}, \quad
        \mathrm{brier} = \sum_i w_i \sum_j (p_{ij} - [j = y_i])^2, \quad
        \mathrm{ece} = \sum_b \Big|\sum_{i \in b} w_i ([\hat y_i = y_i] - \max_j p_{ij})\Big|,

    where the bins :math:`b` divide the largest probability in equal steps. For all three, lower is better. A
    label with probability 0 makes ``nll`` infinite; compute the softmax in float32 or wider, because float16
    rounds small probabilities to 0. With several ranks the samples of all are counted. Sums are kept in
    float64, which MPS lacks: there keep the metric on the CPU.

    With ``average="samples"``, ``ece`` equals ``MulticlassCalibrationError`` of torchmetrics, except for
    confidences on the edge of a bin, including 1. That metric keeps every sample and has no weights.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Eq. 3; Brier, "Verification of
    Forecasts Expressed in Terms of Probability", Monthly Weather Review 78(1), 1950.

    Args:
        num_classes: ``C``.
        average: ``"samples"`` weighs all samples equally. ``"classes"`` gives all classes with samples the
            same weight: on a long-tailed validation split these are the scores under the uniform prior.
        bins: number of bins of the calibration error.
        kwargs: arguments of ``torchmetrics.Metric``, such as ``process_group``.

    Attributes:
        samples: samples by label and bin, int64 ``[C, B]``.
        correct: correctly predicted samples among these, int64 ``[C, B]``.
        confidence: sum of the largest probability of these samples, float64 ``[C, B]``.
        nll: sum of the negative log likelihoods by label, float64 ``[C]``.
        brier: sum of the Brier scores by label, float64 ``[C]``.

    Raises:
        TypeError: an argument, ``probabilities`` or ``target`` is of another type.
        ValueError: an argument, shape or class index is out of range, or rows are not probabilities; values
            are checked on the CPU only.

    Shape:
        - probabilities: ``[N, C]``, rows that sum to 1
        - target: class indices int64 ``[N]``
        - output: a dict of scalars ``nll``, ``ece``, ``brier``; NaN without samples

    Example:
        >>> metric = ProbabilityScores(2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> metric.compute()
        {'nll': tensor(0.8370), 'ece': tensor(0.2500), 'brier': tensor(0.6250)}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    samples: Tensor
    correct: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor

    def __init__(self, num_classes: int, *, average: str = "samples", bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = positive_int("num_classes", num_classes, "it is the number of classes")
        self.average = one_of("average", average, AVERAGES)
        self.bins = positive_int("bins", bins, "it is the number of bins of confidence")
        cells, labels = (self.num_classes, self.bins), (self.num_classes,)
        empty = ScoreSums(
            samples=torch.zeros(cells, dtype=torch.int64),
            correct=torch.zeros(cells, dtype=torch.int64),
            confidence=torch.zeros(cells, dtype=torch.float64),
            nll=torch.zeros(labels, dtype=torch.float64),
            brier=torch.zeros(labels, dtype=torch.float64),
        )
        for name, zeros in empty._asdict().items():
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add a batch."""
        probabilities, target = check_predictions(probabilities, target, self.num_classes)
        same_device(probabilities=probabilities, metric=self.samples)
        batch = score_sums(probabilities, target, self.bins)
        for name, sums in batch._asdict().items():
            setattr(self, name, getattr(self, name) + sums)

    def compute(self) -> dict[str, Tensor]:
        """Compute ``nll``, ``ece`` and ``brier``."""
        sums = ScoreSums(*(getattr(self, name) for name in ScoreSums._fields))
        return {name: value.float() for name, value in scores(sums, self.average).items()}
