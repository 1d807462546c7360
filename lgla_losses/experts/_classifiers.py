"""K classifiers, one per expert, as one batched matrix product."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lgla_losses._checks import one_of
from lgla_losses.experts._running import is_tracing
from lgla_losses.functional import compute_dtype, unit_vectors

# These values are compromises between small networks; benchmarks/learning_rate.py shows their effect.
#: Largest gradient of a sample for its features; a row of a new :class:`torch.nn.Linear` has length 0.58.
MOST_PULL = 0.4
#: Largest turn of a class centre by a sample: as with a scale of 3.
MOST_TURN = 3.0
#: Standard deviation of a sample's first logits over classes; a new linear layer has about 0.6. Smaller
#: values slow AdamW down at the low rates of fine-tuning.
FIRST_SPREAD = 0.375


class ExpertClassifiers(nn.Module):
    r"""Hold the last layer :math:`W_k` of every expert (section 3.1).

    Cosine: :math:`v_k^j = s \cos(W_k^j, f_k)`, without bias, as in the authors' code. Linear:
    :math:`v_k^j = W_k^j \cdot f_k + b_k^j`.

    The gradient of a cosine is large: :math:`s / |f|` for features, :math:`s / |W|` for class centres, which
    turn by :math:`s / |W|^2` per step. At a usual learning rate the first steps then lengthen the class
    centres and the convolutions before batch norms, and long vectors change direction only slowly. In
    training mode ``gradient="bounded"`` limits the gradient for the features to 0.4, about that of a new
    linear layer, and turns class centres at most as fast as a scale of 3 would. The factors do not depend on
    the gradient: sums over micro-batches and loss scaling stay exact, and AdamW is hardly affected. In
    addition, the class centres of an expert start close to each other, so that its first logits differ about
    as much as those of a linear layer.

    Args:
        num_experts: ``K``.
        num_features: ``d``.
        num_classes: ``C``.
        scale: the factor ``s`` of cosine classifiers; None for linear classifiers.
        like: a tensor whose dtype and device the parameters take; None for torch's defaults.
        gradient: for cosine classifiers: ``"bounded"`` as above, or ``"exact"``, with class centres that
            start in random directions, as in the authors' code.

    Shape:
        - features: ``[N, K, d]``
        - output: ``[N, K, C]``, a permuted view of ``[K, N, C]``
    """

    def __init__(
        self,
        num_experts: int,
        num_features: int,
        num_classes: int,
        scale: float | None,
        like: Tensor | None = None,
        gradient: str = "bounded",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.gradient = one_of("gradient", gradient, ("bounded", "exact"))
        new = torch.empty if like is None else like.detach().new_empty
        self.weight = nn.Parameter(new((num_experts, num_classes, num_features)))
        self.bias = nn.Parameter(new((num_experts, num_classes))) if scale is None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights: linear as in :class:`torch.nn.Linear`; cosine with length 1, as described above."""
        with torch.no_grad():
            if self.bias is None:
                directions = unit_vectors(self.weight.normal_())
                if self.gradient == "bounded":
                    common = unit_vectors(torch.randn_like(directions[:, :1]))
                    spread = FIRST_SPREAD * math.sqrt(self.weight.shape[-1]) / cast(float, self.scale)
                    directions = unit_vectors(common + spread * directions)
                self.weight.copy_(directions)
            else:
                bound = 1 / math.sqrt(self.weight.shape[-1])
                self.weight.uniform_(-bound, bound)
                self.bias.uniform_(-bound, bound)

    def only(self, expert: int) -> ExpertClassifiers:
        """Copy the classifier of one expert into a new module with ``K = 1``."""
        _, num_classes, num_features = self.weight.shape
        single = ExpertClassifiers(1, num_features, num_classes, self.scale, self.weight, self.gradient)
        one = slice(expert, expert + 1)
        single.load_state_dict({name: tensor[one] for name, tensor in self.state_dict().items()})
        for name, parameter in single.named_parameters():
            parameter.requires_grad_(self.get_parameter(name).requires_grad)
        return single

    if TYPE_CHECKING:

        def __call__(self, features: Tensor) -> Tensor:
            """Give logits, as :meth:`forward`."""

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits of every expert from its own features."""
        weight: Tensor = self.weight
        if self.scale is not None:
            # Not while tracing: it runs with and without gradients and compares.
            bounds = (
                self.training and self.gradient == "bounded" and torch.is_grad_enabled() and not is_tracing()
            )
            pull, turn = (MOST_PULL / self.scale, MOST_TURN / self.scale) if bounds else (None, None)
            features = self.scale * _directions(features, pull, power=1)
            weight = _directions(weight, turn, power=2)

        rows, columns = features.transpose(0, 1), weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(rows, columns).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], rows, columns).transpose(0, 1)

    def extra_repr(self) -> str:
        """Describe the configuration, as ``repr`` shows it."""
        num_experts, num_classes, num_features = self.weight.shape
        kind = "linear" if self.scale is None else f"cosine, scale={self.scale}, gradient={self.gradient!r}"
        return f"{num_experts} x {num_features} -> {num_classes}, {kind}"


def _directions(vectors: Tensor, bound: float | None, power: int) -> Tensor:
    """Divide vectors by their lengths; the gradient is multiplied by ``bound * length**power``, at most 1."""
    # The squares of half-precision numbers would overflow or underflow.
    wide = vectors.to(compute_dtype(vectors.dtype))
    directions = unit_vectors(wide)
    if bound is not None:
        length = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True)
        factor = (bound * length**power).clamp(max=1.0)
        directions = torch.lerp(
            directions.detach(), directions, factor
        )  # both ends are equal: no value changes
    return directions.to(vectors.dtype)
