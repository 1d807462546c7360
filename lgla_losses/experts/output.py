"""The output of K experts, and how it is fused into one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor

from lgla_losses._checks import computable_tensor, dense_tensor, describe
from lgla_losses._counts import ArrayLike
from lgla_losses._torch import values_readable
from lgla_losses.functional import compute_dtype, widest_dtype

#: Logits of K experts: ``[N, K, C]``, or K tensors ``[N, C]``.
ExpertLogits: TypeAlias = Tensor | Sequence[Tensor]


class Calibrated(Protocol):
    """Turn logits into probabilities under a test prior, by a calibration fitted in advance."""

    def probabilities(self, logits: Tensor, prior: ArrayLike | str | None = None) -> Tensor:
        """Compute probabilities ``[N, C]`` from logits ``[N, C]``; ``prior=None`` is uniform."""


class ExpertOutput(NamedTuple):
    """Hold the output of K experts on a batch, the input of :class:`LGLALoss`.

    It is a tuple of tensors, not a tensor. Predict with :meth:`ensemble`:
    ``output.ensemble().argmax(dim=1)``.

    Attributes:
        logits: unadjusted logits ``[N, K, C]``, for maps ``[N, K, C, H, W]``.
        features: inputs of the experts' classifiers ``[N, K, d]``, for maps ``[N, K, d, H, W]``.
        weight: weights of the classifiers ``[K, C, d]``, the class centres of Eq. 7.
    """

    logits: Tensor
    features: Tensor
    weight: Tensor

    def ensemble(self, fusion: Tensor | Sequence[float] | None = None) -> Tensor:
        """Fuse the experts into one prediction: the mean of their logits (section 1, Fig. 6).

        Args:
            fusion: one non-negative weight per expert ``[K]``, divided by their sum; None for equal weights.

        Returns:
            ``[N, C]``, for maps ``[N, C, H, W]``, in the logits' dtype.

        Raises:
            TypeError: the logits or the weights are of a wrong type.
            ValueError: a weight is negative or not finite, all are zero, or their number is not K; or the
                logits have no expert dimension.
        """
        computable_tensor("logits", self.logits, "[N, K, C, ...]")
        if self.logits.dim() < 3:
            raise ValueError(
                "logits: expected shape [N, K, C] or of maps [N, K, C, ...], got "
                f"{list(self.logits.shape)}; the logits of one model need no fusion: predict with them "
                "directly"
            )
        if fusion is None:
            return self.logits.mean(dim=1)

        dtype, device = compute_dtype(self.logits.dtype), self.logits.device
        weights = normalized_fusion(fusion, self.logits.shape[1], device).to(device, dtype)
        weights = weights.view(-1, *[1] * (self.logits.dim() - 2))
        # An expert with weight 0 has no effect, even if it masks a class with -inf.
        logits = torch.where(weights == 0, 0.0, self.logits.to(dtype))
        return (logits * weights).sum(dim=1).to(self.logits.dtype)

    def probabilities(
        self,
        calibration: Calibrated | None = None,
        *,
        prior: ArrayLike | str | None = None,
        fusion: Tensor | Sequence[float] | None = None,
    ) -> Tensor:
        """Compute the class probabilities of the fused experts.

        Args:
            calibration: turns the fused logits into probabilities, fitted on logits with the same ``fusion``;
                None takes their softmax.
            prior: class prior of the test set, for the calibration: ``[C]``, or ``"estimated"`` from the
                samples of this call; None is uniform.
            fusion: as in :meth:`ensemble`.

        Returns:
            ``[N, C]``, for maps ``[N, C, H, W]``; a softmax is in float32, or float64 for float64 logits.

        Raises:
            TypeError: ``calibration`` has no ``probabilities``, or as in :meth:`ensemble`.
            ValueError: there is a ``prior`` without ``calibration``, or as in :meth:`ensemble`.

        Example:
            >>> output = ExpertOutput(torch.zeros(2, 3, 4), torch.zeros(2, 3, 8), torch.zeros(3, 4, 8))
            >>> output.probabilities()[0]
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        if calibration is None and prior is not None:
            raise ValueError(
                "prior: expected None without calibration=, because a softmax uses no prior, got one; fit "
                "a calibration on a validation split and pass it"
            )
        if calibration is not None and not callable(getattr(calibration, "probabilities", None)):
            raise TypeError(
                "calibration: expected an object with probabilities(logits, prior=None), got "
                f"{describe(calibration)}"
            )

        logits = self.ensemble(fusion)
        if calibration is None:
            return logits.softmax(dim=1, dtype=compute_dtype(logits.dtype))
        by_position = logits.movedim(1, -1)  # for maps: a calibration takes each position as a sample
        found = calibration.probabilities(by_position.flatten(0, -2), prior=prior)
        return found.reshape(by_position.shape).movedim(-1, 1)


def _explain_missing(output: ExpertOutput, name: str) -> NoReturn:
    """Raise for an unknown attribute; if tensors have it, say where to find it."""
    problem = f"{type(output).__name__} has no attribute {name!r}"
    if hasattr(Tensor, name) and not name.startswith("_"):
        problem += (
            f": it is a tuple with the outputs of K experts, not a tensor; use output.ensemble().{name} for "
            f"the ensemble's logits [N, C], or output.logits.{name} for those of all experts [N, K, C]"
        )
    raise AttributeError(problem)  # without keywords, which compilers do not support


# Not in the class, because type checkers would then accept every name as an attribute.
ExpertOutput.__getattr__ = _explain_missing  # type: ignore[attr-defined]


def normalized_fusion(
    fusion: Tensor | Sequence[float] | None, num_experts: int, device: torch.device | None = None
) -> Tensor:
    """Divide the fusion weights ``[K]`` by their sum; None gives equal weights.

    Args:
        fusion: the weights.
        num_experts: ``K``.
        device: where the weights are needed; weights on meta cannot be moved there. None leaves them where
            they are.
    """
    if fusion is None:
        return torch.full((num_experts,), 1.0 / num_experts, dtype=torch.float64)

    try:
        weights = fusion if isinstance(fusion, Tensor) else torch.as_tensor(fusion, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"fusion: expected {num_experts} real numbers, got {describe(fusion)}") from error

    if weights.is_complex():
        raise TypeError(f"fusion: expected {num_experts} real numbers, got {weights.dtype}")
    if dense_tensor("fusion", weights).shape != (num_experts,):
        raise ValueError(
            f"fusion: expected one weight per expert, shape [{num_experts}], got shape {list(weights.shape)}"
        )
    if weights.is_meta and (device is None or device.type != "meta"):
        raise ValueError(f"fusion: expected weights with values, got {describe(weights)}")

    weights = weights.to(widest_dtype(weights.device))
    if values_readable(weights, None) and not (
        weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()
    ):
        raise ValueError(
            f"fusion: expected finite, non-negative weights, at least one positive, got {weights.tolist()}; "
            "softmax(weights) gives such weights"
        )

    return weights / weights.sum()
