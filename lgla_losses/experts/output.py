"""What K experts give, and how they are fused into one prediction."""

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
    """Turn logits into probabilities under a test prior, as a calibration fitted in advance."""

    def probabilities(self, logits: Tensor, prior: ArrayLike | str | None = None) -> Tensor:
        """Give ``[N, C]`` of logits ``[N, C]``; ``prior=None`` is uniform."""


class ExpertOutput(NamedTuple):
    """Hold the output of K experts on a batch; what :class:`LGLALoss` takes.

    It is a tuple of tensors and no tensor: predictions are those of :meth:`ensemble`, as
    ``output.ensemble().argmax(dim=1)``.

    Attributes:
        logits: unadjusted logits ``[N, K, C]``, of maps ``[N, K, C, H, W]``.
        features: inputs of the experts' classifiers ``[N, K, d]``, of maps ``[N, K, d, H, W]``.
        weight: weights of the classifiers ``[K, C, d]``, the class centres of Eq. 7.
    """

    logits: Tensor
    features: Tensor
    weight: Tensor

    def ensemble(self, fusion: Tensor | Sequence[float] | None = None) -> Tensor:
        """Fuse the experts into one prediction: the mean of their logits (section 1, Fig. 6).

        Args:
            fusion: one non-negative weight an expert ``[K]``, divided by their sum; None for
                equal weights.

        Returns:
            ``[N, C]``, of maps ``[N, C, H, W]``, in the logits' dtype.

        Raises:
            TypeError: the logits or the weights are of a wrong type.
            ValueError: a weight is negative or not finite, all are zero, or there are not K; or the logits
                have no dimension of experts.
        """
        computable_tensor("logits", self.logits, "[N, K, C, ...]")
        if self.logits.dim() < 3:
            raise ValueError(
                f"logits: expected shape [N, K, C] or of maps [N, K, C, ...], got {list(self.logits.shape)}; "
                "those of one model need no fusion, predict by them as they are"
            )
        if fusion is None:
            return self.logits.mean(dim=1)

        dtype, device = compute_dtype(self.logits.dtype), self.logits.device
        weights = normalized_fusion(fusion, self.logits.shape[1], device).to(device, dtype)
        weights = weights.view(-1, *[1] * (self.logits.dim() - 2))
        # An expert without weight takes no part, even where it masks a class with -inf.
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
            calibration: what makes them of the fused logits, fitted on logits of the same ``fusion``; None
                takes their softmax.
            prior: of the classes in the test set, for the calibration: ``[C]``, or ``"estimated"`` from the
                samples of this call; None is uniform.
            fusion: as in :meth:`ensemble`.

        Returns:
            ``[N, C]``, of maps ``[N, C, H, W]``; of a softmax in float32, or float64 for float64 logits.

        Raises:
            TypeError: ``calibration`` has no ``probabilities``, or as of :meth:`ensemble`.
            ValueError: a ``prior`` without ``calibration``, or as of :meth:`ensemble`.

        Example:
            >>> output = ExpertOutput(torch.zeros(2, 3, 4), torch.zeros(2, 3, 8), torch.zeros(3, 4, 8))
            >>> output.probabilities()[0]
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        if calibration is None and prior is not None:
            raise ValueError(
                "prior: expected None without calibration=, as a softmax knows no prior, got one; fit a "
                "calibration on a validation split and pass it"
            )
        if calibration is not None and not callable(getattr(calibration, "probabilities", None)):
            raise TypeError(
                "calibration: expected an object with probabilities(logits, prior=None), got "
                f"{describe(calibration)}"
            )

        logits = self.ensemble(fusion)
        if calibration is None:
            return logits.softmax(dim=1, dtype=compute_dtype(logits.dtype))
        by_position = logits.movedim(1, -1)  # of maps, whose positions are samples to a calibration
        found = calibration.probabilities(by_position.flatten(0, -2), prior=prior)
        return found.reshape(by_position.shape).movedim(-1, 1)


def _explain_missing(output: ExpertOutput, name: str) -> NoReturn:
    """Raise for what an output has not; of what tensors have, say where it is."""
    problem = f"{type(output).__name__} has no attribute {name!r}"
    if hasattr(Tensor, name) and not name.startswith("_"):
        problem += (
            f": it is a tuple of what K experts give, no tensor; output.ensemble().{name} is that of the "
            f"ensemble's logits [N, C], output.logits.{name} that of all experts' [N, K, C]"
        )
    raise AttributeError(problem)  # without its keywords, which compilers do not know


# Not in the class, where it would make every name an attribute to type checkers.
ExpertOutput.__getattr__ = _explain_missing  # type: ignore[attr-defined]


def normalized_fusion(
    fusion: Tensor | Sequence[float] | None, num_experts: int, device: torch.device | None = None
) -> Tensor:
    """Divide the fusion weights ``[K]`` by their sum; equal ones for None.

    Args:
        fusion: the weights.
        num_experts: ``K``.
        device: where they are needed, where those of the meta device cannot come; None is not there.
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
            f"fusion: expected one weight for each of {num_experts} experts, shape [{num_experts}], "
            f"got shape {list(weights.shape)}"
        )
    if weights.is_meta and (device is None or device.type != "meta"):
        raise ValueError(f"fusion: expected weights that have values, got {describe(weights)}")

    weights = weights.to(widest_dtype(weights.device))
    if values_readable(weights, None) and not (
        weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()
    ):
        raise ValueError(
            "fusion: expected finite, non-negative weights of which one is positive, "
            f"got {weights.tolist()}; softmax(weights) makes such ones"
        )

    return weights / weights.sum()
