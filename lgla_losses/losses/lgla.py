"""The LGLA loss: class-aware logit adjustment with adaptive angular weights (Eq. 9)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lgla_losses._batch import Batch, is_of_ensemble
from lgla_losses._torch import values_readable
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.kernels.autograd import CrossEntropy, evaluate
from lgla_losses.kernels.operators import cross_entropies
from lgla_losses.losses._base import ExpertLoss


class LGLALoss(ExpertLoss):
    r"""Compute the loss of Local and Global Logit Adjustments for long-tailed learning.

    .. math::
        L = -\frac{1}{N} \sum_{k=1}^K \sum_{i=1}^N g(\theta_k^{y_i}, \theta_k^{ref})
        \log \frac{\exp(v_{i,k}^{y_i} + T(k, y_i))}{\sum_j \exp(v_{i,k}^j + T(k, j))}

    K experts on a shared backbone all learn from every sample. The margins make each of the K - 1 local
    experts strong on one group of classes, and the global expert strong on the inverse of the long-tailed
    distribution. Samples that are harder than the mean of their group weigh more. For inference average the
    experts' unadjusted logits: :meth:`ExpertOutput.ensemble`. The loss is a sum over the experts: expect
    about K times the loss of a single model. Loading a ``state_dict`` also loads its class counts and
    adjustments.

    The loss of experts is the same with and without gradients, with its hard-sample weights. To validate,
    pass the ensemble's logits ``[N, C]`` without a gradient: the loss is then their cross entropy, without
    adjustments and weights.

    Source: Tao et al., ICCV 2023, Eq. 9.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0;
            :func:`count_classes` computes them.
        num_experts: number of experts ``K``, at least 2 for ``"lgla"``. None means 3, or the number that
            ``grouper`` or an adjustment table has.
        tau: strength of the global expert's adjustment for ``"lgla"``, of every expert's for ``"logit"``
            (None: 1), and of the third expert's for ``"sade"`` (None: 2). Other adjustments have none. For
            ``"lgla"`` None means the value of :func:`suggest`: ``K - 1`` with ``scale=None`` or
            ``label_smoothing > 0``, else ``1.25 * (K - 1)``. With K = 2, ``tau=1, aaw=False`` is balanced
            softmax of two experts.
        grouper: your own groups instead of ``class_counts``; ``K = num_groups + 1``.
        zero_counts: what to do about classes without samples. ``"error"`` refuses them; ``"smooth"`` first
            adds one sample to every class (Laplace's rule); ``"mask"`` takes them out of the softmax in
            training, :math:`T = -\infty`: they get no gradient, and the loss is that of the other classes
            only. No target may be a masked class, and ``label_smoothing`` must be 0.
        background: one or more classes, such as "background" or "other", to leave out of the adjustment:
            :math:`T = 0` for every expert, and the groups and adjustments are computed from the other classes
            only. For reference angles, background samples belong to the first group.
        aaw: weight hard samples (Eq. 8). Without it the loss is CLA in the paper's Table 5.
        scale: factor of cosine logits, ``v = scale * cos``. None is for linear heads, and also changes the
            default of ``tau``.
        adjustment: ``"lgla"`` (Eq. 4); ``"softmax"`` (none); ``"balanced"``
            (:math:`\log n_j` for every expert, balanced softmax); ``"logit"`` (:math:`\tau \log n_j`);
            ``"sade"`` (SADE's three experts, :func:`functional.sade_table
            <lgla_losses.functional.sade_table>`); or a finite tensor ``[K, C]``.
        reduction: ``"mean"`` over the samples not ignored, ``"sum"``, or ``"none"``.
        ignore_index: target value of samples to ignore.
        label_smoothing: as in :class:`torch.nn.CrossEntropyLoss`, of ``v + T``; it does not change the
            weights.
        sync: under an initialised ``torch.distributed`` with gradients enabled, take the mean angles over the
            global batch, and let ``"mean"`` divide by the global number of samples per rank, so that DDP's
            averaged gradients are those of the whole batch.
        process_group: the ranks for ``sync``; None means all.
        validate_args: check the values of targets and logits; on a GPU the check waits for the device. None
            means on the CPU only, and not while compiling. Nothing is checked under :func:`torch.func.vmap`.
        backend: ``"fused"`` reads the logits once and writes their gradient once, in C on the CPU
            and in chunks of PyTorch elsewhere; ``"triton"`` does so in GPU kernels; ``"reference"`` is
            plain differentiable PyTorch; ``"auto"`` takes the fastest that can run, and logs once why a
            faster one cannot run.

    Attributes:
        adjuster: the :class:`CLALogitAdjuster`.
        weighter: the :class:`AAWWeighter`; it is not used without ``aaw``.
        ignore_index: as given.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or shapes, devices or values do not fit.

    Shape:
        - output: an :class:`ExpertOutput`, logits ``[N, K, C]``, or K tensors ``[N, C]``; without a gradient
          an ensemble's ``[N, C]``
        - target: int64 ``[N]``, or class probabilities ``[N, C]`` (mixup, distillation)
        - features: ``[N, K, d]``, weight: ``[K, C, d]``, for the angles of Eq. 7 of any head
        - sample_weight: ``[N]``
        - result: float32 (float64 for float64 logits) scalar, or ``[N]`` without reduction
        - maps, as in segmentation, add dimensions at the end of all these, except the classifiers' weight:
          logits ``[N, K, C, H, W]``, target ``[N, H, W]`` or ``[N, C, H, W]``; every position is a sample

    Example:
        >>> criterion = LGLALoss([500, 100, 20], num_experts=3)
        >>> cosine_logits = 30 * torch.zeros(8, 3, 3, requires_grad=True)
        >>> criterion(cosine_logits, torch.arange(8) % 3).backward()
    """

    def forward(
        self,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        *,
        features: Tensor | None = None,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Compute Eq. 9 of a batch.

        Args:
            output: the output of the experts; or, without a gradient, the ensemble's logits: the loss is then
                their cross entropy.
            target: class indices ``[N]``, or class probabilities ``[N, C]``.
            features: inputs of the classifiers ``[N, K, d]``, if ``output`` is logits.
            weight: weights of the classifiers ``[K, C, d]``, if ``output`` is logits.
            sample_weight: weight of each sample ``[N]``: a sample of weight 2 counts as two samples in the
                loss, in the reference angles and in the number that ``"mean"`` divides by. Finite, at least
                0, without gradient.
            normalizer: divisor for ``"mean"``, used as given, instead of the number of samples. For gradient
                accumulation pass the number of samples in all micro-batches, under DDP divided by the number
                of ranks. This is exact only without ``aaw``: its reference angles are those of each
                micro-batch.
        """
        table = self.adjuster.constant("table")
        if (
            isinstance(output, Tensor)
            and not (output.requires_grad and torch.is_grad_enabled())
            and features is None
            and weight is None
            and is_of_ensemble(output, target, table.shape[1])
        ):
            return self._of_ensemble(output, target, table, sample_weight, normalizer)

        group_index = self.adjuster.grouper.constant("group_index")
        batch = Batch.of_experts(
            output,
            target,
            table,
            features=features,
            weight=weight,
            sample_weight=sample_weight,
            needs_angles=self.aaw,
        )
        engine, ranks, readable = self._step(batch, normalizer, table, group_index)

        weights, samples = self._weights(engine, batch, ranks, table, group_index)  # Eqs. 7 and 8
        rows = self._rows(
            engine, batch, ranks, normalizer, samples=samples, table=table, weights=weights
        )  # with the divisor
        problem = functools.partial(CrossEntropy, of_one=batch.of_one)
        loss = evaluate(engine, rows, batch.logits, problem, cross_entropies, self.backend)  # Eq. 9

        if readable:
            self._explain_unless_finite(batch, loss)
        if self.aaw and values_readable(batch.target, self.validate_args):
            self._look_at_scale(batch, self.scale)
        return loss

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    @torch.no_grad()  # without gradients it waits for no other rank
    def _of_ensemble(
        self,
        logits: Tensor,
        target: Tensor,
        table: Tensor,
        sample_weight: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> Tensor:
        """Compute the cross entropy of an ensemble's logits ``[N, C]``; ``table`` tells the classes."""
        batch = Batch.of_any(logits, target, table.shape[1], sample_weight, table)
        engine, ranks, readable = self._step(batch, normalizer)

        rows = self._rows(engine, batch, ranks, normalizer, weights=batch.weights_of_experts(1))
        problem = functools.partial(CrossEntropy, of_one=batch.of_one)
        loss = evaluate(engine, rows, batch.logits, problem, cross_entropies, self.backend)

        if readable:
            self._explain_unless_finite(batch, loss)
        return loss
