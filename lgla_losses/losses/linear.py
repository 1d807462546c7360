"""The loss from the inputs of the classifiers, for more classes than there is memory for logits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Unpack

from torch import Tensor

from lgla_losses._batch import Batch
from lgla_losses._checks import WAY_OUT, finite_tensors, floating_tensor, same_device
from lgla_losses._counts import ArrayLike
from lgla_losses._ranks import Ranks
from lgla_losses._torch import unfit, values_readable
from lgla_losses.kernels import Engine, chunked
from lgla_losses.kernels.autograd import evaluate
from lgla_losses.kernels.linear import LinearCrossEntropy, as_autocast_would
from lgla_losses.kernels.operators import linear_cross_entropy
from lgla_losses.losses._base import ExpertLoss
from lgla_losses.losses._config import LossOptions, refuse_unknown


class LinearLGLALoss(ExpertLoss):
    r"""Compute the LGLA loss of classifiers :math:`v_k^j = W_k^j \cdot f_k + b_k^j`, from f, W and b.

    It equals :class:`LGLALoss` of the logits, but the logits are never all in memory: they are computed a
    chunk at a time. If the loss is a scalar, the gradients of features, weights and bias are computed with
    them, by the usual three matrix products. Gradients are summed over the chunks in float32 or wider.

    Source: Tao et al., ICCV 2023, Eq. 9.

    Args:
        class_counts: as in :class:`LGLALoss`.
        num_experts: as in :class:`LGLALoss`.
        tau: as in :class:`LGLALoss`; by default ``K - 1``, because ``scale=None`` means linear heads.
        scale: the factor of cosine classifiers, :math:`v = s \cos(W, f)`, which have no bias; None for linear
            classifiers.
        options: the other arguments of :class:`LGLALoss`.

    Shape:
        - features: ``[N, K, d]``, inputs of the classifiers
        - weight: ``[K, C, d]``
        - target: int64 ``[N]``, or class probabilities ``[N, C]``
        - bias: ``[K, C]``, or None
        - result: as of :class:`LGLALoss`

    Example:
        >>> import torch
        >>> criterion = LinearLGLALoss([500, 100, 20], num_experts=3)
        >>> features = torch.randn(8, 3, 16, requires_grad=True)
        >>> weight = torch.randn(3, 3, 16, requires_grad=True)
        >>> criterion(features, weight, torch.arange(8) % 3).backward()
    """

    _explains_first = True

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        num_experts: int | None = None,
        tau: float | None = None,
        *,
        scale: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        refuse_unknown(self, options, LossOptions)
        super().__init__(class_counts, num_experts, tau, scale=scale, **options)

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Compute Eq. 9 of a batch.

        Args:
            features: inputs of the classifiers ``[N, K, d]``.
            weight: weights of the classifiers ``[K, C, d]``.
            target: class indices ``[N]``, or class probabilities ``[N, C]``.
            bias: bias of the classifiers ``[K, C]``; -inf masks a class.
            sample_weight: as in :meth:`LGLALoss.forward`.
            normalizer: as in :meth:`LGLALoss.forward`.
        """
        table = self.adjuster.constant("table")
        batch = Batch.of_features(features, weight, target, table, sample_weight)
        check_bias(bias, weight, self.scale, "[K, C]")
        group_index = self.adjuster.grouper.constant("group_index")
        engine, ranks, _ = self._step(batch, normalizer, table, group_index)

        weights, samples = self._weights(engine, batch, ranks, table, group_index)  # Eqs. 7 and 8
        rows = self._rows(
            engine, batch, ranks, normalizer, samples=samples, table=table, weights=weights
        )  # with the divisor
        inputs = as_autocast_would(features, weight, bias)
        same_dtype(*inputs[:2])
        problem = functools.partial(LinearCrossEntropy, scale=self.scale)
        operator = functools.partial(linear_cross_entropy, scale=self.scale)
        loss = evaluate(engine, rows, inputs, problem, operator, self.backend)  # Eq. 9

        if values_readable(features, self.validate_args):
            self._check_loss(loss.detach(), batch, ranks)
        return loss

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _engine(
        self, batch: Batch, normalizer: float | Tensor | None, *constants: Tensor | None
    ) -> Engine | None:
        engine = super()._engine(batch, normalizer, *constants)
        if (
            engine is None
            and self.backend == "auto"
            and unfit(batch.target, batch.features, batch.weight, batch.sample_weight, *constants) is None
            and not any(v is not None and v.requires_grad for v in constants)
        ):
            engine = chunked  # saves memory where no engine is faster
        return engine

    def _is_seen_through(self, batch: Batch) -> bool:
        return False

    def _explain(self, batch: Batch) -> None:
        batch._replace(weight=None).explain(self.ignore_index, self.num_classes, self._masked())
        finite_tensors(features=batch.features)

    def _check_loss(self, loss: Tensor, batch: Batch, ranks: Ranks) -> None:
        # With label smoothing and a masked class the loss is rightly infinite.
        wrong = loss.isnan() if self.label_smoothing else ~loss.isfinite()
        if not wrong.any():
            return
        if ranks.number == 1 and self.aaw and not batch.is_soft:
            batch.check_angles(self.ignore_index)
        problem = ValueError(
            "features, weight, bias: expected finite logits on the targets, no NaN or +inf elsewhere; "
            f"{WAY_OUT}"
        )
        ranks.refuse(
            problem, 0, loss.device
        )  # too late to tell the other ranks, which will soon notice that this one is missing


def check_bias(bias: Tensor | None, weight: Tensor, scale: float | None, shape: str) -> None:
    """Check that a bias, if there is one, fits weights ``[K, C, d]``; cosine classifiers must have none."""
    if bias is None:
        return
    floating_tensor("bias", bias, shape)
    if bias.shape != weight.shape[:2]:
        raise ValueError(f"bias: expected shape {list(weight.shape[:2])}, got {list(bias.shape)}")
    if scale is not None:
        raise ValueError(
            f"bias: expected None with scale={scale}: cosine classifiers have no bias; leave it out"
        )
    same_device(weight=weight, bias=bias)


def same_dtype(features: Tensor, weight: Tensor) -> None:
    """Check that the weights have the dtype of the features."""
    if weight.dtype != features.dtype:
        raise ValueError(
            f"weight: expected the features' dtype {features.dtype}, got {weight.dtype}; convert one of "
            "them, or train under torch.autocast, which does not convert float64"
        )
