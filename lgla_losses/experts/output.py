"""What K experts give, and how they are fused into one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from lgla_losses._checks import computable_tensor, dense_tensor, describe
from lgla_losses._torch import values_readable
from lgla_losses.functional import compute_dtype, widest_dtype

#: Logits of K experts: ``[N, K, C]``, or K tensors ``[N, C]``.
ExpertLogits: TypeAlias = Tensor | Sequence[Tensor]


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
