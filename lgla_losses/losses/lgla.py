"""The LGLA loss: class-aware logit adjustment with adaptive angular weights (Eq. 9)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._checks import (
    finite_tensors,
    normalizer_value,
    probability_tensor,
    probability_values,
    same_device,
    sample_weight_tensor,
    sample_weight_values,
    target_tensor,
    target_values,
    values_readable,
)
from lgla_losses.experts.output import ExpertLogits, ExpertOutput, check_logits
from lgla_losses.kernels import Engine, autograd, chunked, native
from lgla_losses.losses import _targets
from lgla_losses.losses._config import ExpertLoss, target_logits

#: With fewer classes a compiler's own code takes less time than the call of an operator opaque to it.
WORTH_AN_OPERATOR = 512


#: Logits of K tensors that an engine takes in one: fewer are copied sooner than kernels for each would start.
_WORTH_JOINING = {"cuda": 1 << 22}


def worth_joining(experts: Sequence[Tensor]) -> bool:
    """Whether an engine had better take the experts' tensors in one."""
    if len(experts) == 1 or torch.compiler.is_compiling():
        return False
    return sum(v.numel() for v in experts) < _WORTH_JOINING.get(experts[0].device.type, 0)


def converted_once(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The adjustments as memory of their own, for a compiler that would convert them anew for every sample.

    It fuses the conversion from float64 into its loops over the logits, which then take up to half as long
    again; what is seen through strides it computes first.
    """
    converted = table.to(dtype).contiguous()
    return converted.as_strided(converted.shape, converted.stride())


class _Batch(NamedTuple):
    """The arguments of :meth:`LGLALoss.forward`, checked."""

    logits: ExpertLogits
    target: Tensor
    features: Tensor | None
    weight: Tensor | None
    sample_weight: Tensor | None
    normalizer: float | Tensor | None


class LGLALoss(ExpertLoss):
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
            on the CPU only, and not while compiling. Nothing is checked under :func:`torch.func.vmap`.
        backend: ``"fused"`` reads the logits once and writes their gradient once, in C on the CPU
            and in chunks of PyTorch elsewhere; ``"triton"`` does so in GPU kernels; ``"reference"`` is
            plain differentiable PyTorch; ``"auto"`` takes the fastest that can run, and logs once why
            a faster one cannot.

    Attributes:
        adjuster: the :class:`CLALogitAdjuster`.
        weighter: the :class:`AAWWeighter`; it stands by without ``aaw``.
        ignore_index: as given.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or shapes, devices or values do not fit.

    Shape:
        - output: an :class:`ExpertOutput`, logits ``[N, K, C]``, or K tensors ``[N, C]``
        - target: int64 ``[N]``, or class probabilities ``[N, C]`` (mixup, distillation)
        - features: ``[N, K, d]``, weight: ``[K, C, d]``, for the angles of Eq. 7 of any head
        - sample_weight: ``[N]``
        - result: float32 (float64 for float64 logits) scalar, or ``[N]`` without reduction
        - maps, as in segmentation, have further dimensions at the end of all but the classifiers' weight:
          logits ``[N, K, C, H, W]``, target ``[N, H, W]`` or ``[N, C, H, W]``; every position is a sample

    Example:
        >>> criterion = LGLALoss([500, 100, 20], num_experts=3)
        >>> cosine_logits = 30 * torch.zeros(8, 3, 3, requires_grad=True)
        >>> criterion(cosine_logits, torch.arange(8) % 3).backward()
    """

    _warned_of_scale = False

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
        """Eq. 9 of a batch.

        Args:
            output: what the experts gave.
            target: class indices ``[N]``, or class probabilities ``[N, C]``.
            features: inputs of the classifiers ``[N, K, d]``, where ``output`` is logits.
            weight: weights of the classifiers ``[K, C, d]``, where ``output`` is logits.
            sample_weight: as how many samples each counts ``[N]``: in its loss, in the reference angles
                and in the number that ``"mean"`` divides by. Finite, at least 0, without gradient.
            normalizer: divisor for ``"mean"``, taken as it is, instead of the number of samples. For
                gradient accumulation the samples of all micro-batches, under DDP divided by the number
                of ranks; exact without ``aaw``, whose references are those of each micro-batch.
        """
        if isinstance(output, ExpertOutput):
            if features is not None or weight is not None:
                raise ValueError("features, weight: expected none beside an ExpertOutput, which holds them")
            output, features, weight = output
        logits = check_logits(output, self.num_experts, self.num_classes, maps=True)
        first = logits if isinstance(logits, Tensor) else logits[0]
        self._check_inputs(logits, target, features, weight, sample_weight, normalizer)
        tensors = [logits] if isinstance(logits, Tensor) else list(logits)
        engine = self._engine(*tensors, target, features, weight, sample_weight, normalizer)
        if engine is not None and worth_joining(tensors):
            logits = torch.stack(tensors, dim=1)
        readable = values_readable(first, self.validate_args)
        plain = target.dim() == 1 and not target.is_floating_point()
        # The C library reads every value of stacked logits anyway and tells when one is wrong.
        tells = readable and plain and sample_weight is None and engine is native and self._is_alone()
        tells = tells and isinstance(logits, Tensor)
        if readable:
            try:
                if sample_weight is not None:
                    sample_weight_values(sample_weight)
                if target.is_floating_point() and self.aaw:  # else the angles are checked
                    finite_tensors(features=features, weight=weight)
                if not tells:
                    self._check_values(logits, target, from_logits=features is None)
                elif features is not None:
                    target_values(target, self.num_classes, self.ignore_index)
            except ValueError as problem:
                self._refuse(problem, target.device, communicates=self._communicates(target, normalizer))
        batch = _Batch(logits, target, features, weight, sample_weight, normalizer)
        if not plain:
            return self._loss_of_maps(engine, batch)
        try:
            return self._loss(engine, batch, check=tells)
        except native.BadValuesError:
            if not readable:
                raise
            self._check_values(logits, target, from_logits=features is None)
        return self._loss(engine, batch, check=False)

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _is_alone(self) -> bool:
        """Whether an error may come late: no rank waits for this one, no hook and no compiler looks on."""
        return (
            self.weighter.num_ranks() == 1 and self.weighter.is_plain() and not torch.compiler.is_compiling()
        )

    def _loss(self, engine: Engine | None, batch: _Batch, check: bool) -> Tensor:
        """Eq. 9, as :meth:`forward` gives it."""
        logits, target, features, weight, sample_weight, normalizer = batch
        first = logits if isinstance(logits, Tensor) else logits[0]
        dtype = functional.compute_dtype(first.dtype)
        weights = samples = None
        if self.aaw:
            source, scale = self._angles(logits, target, features, weight)
            weights, samples = self._weights(
                engine, source, target, scale=scale, check=check, sample_weight=sample_weight
            )
        elif sample_weight is not None:
            weights = sample_weight[:, None].to(dtype).expand(-1, self.num_experts)
        divisor = self._divisor(target, normalizer, samples, dtype, sample_weight)
        table, ignore_index, label_smoothing = self._table, self.ignore_index, self.label_smoothing
        if engine is None:
            if torch.compiler.is_compiling() and not table.requires_grad:
                table = converted_once(table, dtype)
            loss = functional.lgla_loss(
                logits, target, table, weights, ignore_index=ignore_index, label_smoothing=label_smoothing
            )
            return self._reduced(loss, divisor)

        reduce = self._engine_adds_up(engine, divisor)
        blocks = [logits] if isinstance(logits, Tensor) else [expert.unsqueeze(1) for expert in logits]
        parts, begin = [], 0
        for block in blocks:
            experts = slice(begin, begin := begin + block.shape[1])
            call = autograd.Call(
                engine,
                target,
                table[experts],
                None if weights is None else weights[:, experts],
                divisor if reduce else None,
                ignore_index,
                label_smoothing,
                reduce,
                check,
            )
            parts.append(autograd.cross_entropy(call, block, self.backend))
        loss = functools.reduce(torch.add, parts)
        return loss if reduce else self._reduced(loss, divisor)

    def _loss_of_maps(self, engine: Engine | None, batch: _Batch) -> Tensor:
        """Eq. 9 for maps of targets and for class probabilities: samples first, and block by block."""
        logits, target, features, weight, sample_weight, normalizer = batch
        stacked = [logits] if isinstance(logits, Tensor) else [expert.unsqueeze(1) for expert in logits]
        experts = [_targets.samples_first(part) for part in stacked]
        if features is not None:
            features = _targets.samples_first(features)
        soft = target.is_floating_point()
        if soft:
            target = target.movedim(1, -1)
        samples = experts[0].shape[:-2]
        dtype = functional.compute_dtype(experts[0].dtype)
        weights = number = None
        if self.aaw and soft:
            weights, number = self._soft_weights(experts, target, features, weight, sample_weight)
        elif self.aaw:
            own = self._own_class(target)
            if features is not None and weight is not None:
                angles = _targets.own_angles_from_features(features, weight, own)
            else:
                angles = _targets.own_angles(experts, own, self._needed_scale())
            weights, number = self._weights(
                engine,
                angles,
                target.flatten(),
                scale=None,
                check=False,
                sample_weight=None if sample_weight is None else sample_weight.flatten(),
            )
            weights = weights.view(*samples, self.num_experts)
        elif sample_weight is not None:
            weights = sample_weight[..., None].to(dtype).expand(*samples, self.num_experts)
        if number is None and soft and self._communicates(target, normalizer):
            mass = target.sum(dim=-1, dtype=functional.widest_dtype(target.device))
            mass = mass if sample_weight is None else mass * sample_weight
            number = self._samples_a_rank(self._sum_over_ranks(mass.sum(), target))
        divisor = self._divisor(target, normalizer, number, dtype, sample_weight)
        reduce = self._engine_adds_up(engine, divisor) and not torch.compiler.is_compiling()
        call = autograd.Call(
            engine or chunked,
            target,
            self._table,
            weights,
            divisor if reduce else None,
            self.ignore_index,
            self.label_smoothing,
            reduce,
        )
        problem = _targets.BlockwiseCrossEntropy(call)
        if engine is None or torch.compiler.is_compiling():
            loss = problem.differentiable(experts)
        else:
            loss = autograd.evaluate(problem, *experts)
        return loss if reduce else self._reduced(loss, divisor)

    def _soft_weights(
        self,
        experts: Sequence[Tensor],
        probabilities: Tensor,
        features: Tensor | None,
        weight: Tensor | None,
        sample_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The weights of samples that belong to several classes ``[B, K]``, and the samples a rank."""
        if features is not None and weight is not None:
            angles = _targets.class_angles_from_features(features, weight)
        else:
            angles = _targets.class_angles(experts, self._needed_scale())
        width = self.num_experts * self.num_classes
        blocks = list(_targets.blocks_of(probabilities.shape[:-1], width, probabilities.device))
        local = _targets.soft_statistics(
            angles, blocks, probabilities, sample_weight, self.weighter, self.num_experts
        )
        statistics = self._sum_over_ranks(local, probabilities)
        group_index = self.grouper.constant("group_index")
        weights = _targets.soft_weights(angles, blocks, probabilities, statistics, group_index)
        if sample_weight is not None:
            weights = weights * sample_weight[..., None].to(weights.dtype)
        return weights, self._samples_a_rank(statistics[:, -1].sum())

    def _needed_scale(self) -> float:
        if self.scale is None:
            raise ValueError(
                "features, weight: expected features [N, K, d] and weight [K, C, d], got none, and logits of "
                "a linear head (scale=None) do not give the angles of Eq. 7; pass them as "
                "criterion(logits, target, features=f, weight=w) or an ExpertOutput, or set aaw=False"
            )
        return self.scale

    def _angles(
        self, logits: ExpertLogits, target: Tensor, features: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, float | None]:
        """The angles of Eq. 7 ``[N, K]``, or cosine logits and their scale."""
        if features is not None and weight is not None:
            return functional.angles_from_features(features, weight, self._own_class(target)), None
        scale = self._needed_scale()
        if isinstance(logits, Tensor):
            return logits.detach(), scale
        return functional.angles_from_logits(logits, self._own_class(target), scale), None

    def _engine(self, first: Tensor, *others: object) -> Engine | None:
        if self.backend == "auto" and torch.compiler.is_compiling() and self.num_classes < WORTH_AN_OPERATOR:
            return None
        return super()._engine(first, *others)

    def _check_inputs(
        self,
        logits: ExpertLogits,
        target: Tensor,
        features: Tensor | None,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> None:
        first = logits if isinstance(logits, Tensor) else logits[0]
        samples = [first.shape[0], *first.shape[3 if isinstance(logits, Tensor) else 2 :]]
        if isinstance(target, Tensor) and target.is_floating_point() and target.dim() == len(samples) + 1:
            probability_tensor(target, samples, self.num_classes)
        else:
            target_tensor(target, samples)
        if sample_weight is not None:
            sample_weight_tensor(sample_weight, samples)
        if (features is None) != (weight is None):
            raise ValueError("features, weight: expected both or neither, got one; Eq. 7 needs both")
        if features is not None and weight is not None and self.aaw:  # for nothing else are they read
            self._check_features(features, weight, samples)
        same_device(
            logits=first,
            target=target,
            features=features,
            weight=weight,
            sample_weight=sample_weight,
            criterion=self._table,
        )
        normalizer_value(normalizer, self.reduction, self.validate_args, target.device)

    def _check_values(self, logits: ExpertLogits, target: Tensor, from_logits: bool) -> None:
        if target.is_floating_point():
            probability_values(target)
        else:
            target_values(target, self.num_classes, self.ignore_index)
        for own in target_logits(functional.expert_logits(logits), target, self.ignore_index):
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
