"""K classifiers, one an expert, as one batched matrix product."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lgla_losses.functional import compute_dtype, unit_vectors


class ExpertClassifiers(nn.Module):
    r"""Hold the last layer :math:`W_k` of every expert (section 3.1).

    Cosine: :math:`v_k^j = s \cos(W_k^j, f_k)`, without bias, as in the authors' code. Linear:
    :math:`v_k^j = W_k^j \cdot f_k + b_k^j`.

    Args:
        num_experts: ``K``.
        num_features: ``d``.
        num_classes: ``C``.
        scale: the factor ``s`` of cosine classifiers; None for linear ones.
        like: a tensor whose dtype and device the parameters take; None for torch's defaults.

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
    ) -> None:
        super().__init__()
        self.scale = scale
        new = torch.empty if like is None else like.detach().new_empty
        self.weight = nn.Parameter(new((num_experts, num_classes, num_features)))
        self.bias = nn.Parameter(new((num_experts, num_classes))) if scale is None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights: linear as :class:`torch.nn.Linear`, cosine of length 1 and uniform directions."""
        with torch.no_grad():
            if self.bias is None:
                self.weight.copy_(unit_vectors(self.weight.normal_()))
            else:
                bound = 1 / math.sqrt(self.weight.shape[-1])
                self.weight.uniform_(-bound, bound)
                self.bias.uniform_(-bound, bound)

    def only(self, expert: int) -> ExpertClassifiers:
        """Take the classifier of one expert, ``K = 1``; a new module."""
        _, num_classes, num_features = self.weight.shape
        single = ExpertClassifiers(1, num_features, num_classes, self.scale, like=self.weight)
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
            features, weight = self.scale * _directions(features), _directions(weight)
        rows, columns = features.transpose(0, 1), weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(rows, columns).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], rows, columns).transpose(0, 1)

    def extra_repr(self) -> str:
        """Describe the configuration, as ``repr`` shows it."""
        num_experts, num_classes, num_features = self.weight.shape
        kind = "linear" if self.scale is None else f"cosine, scale={self.scale}"
        return f"{num_experts} x {num_features} -> {num_classes}, {kind}"


def _directions(vectors: Tensor) -> Tensor:
    # The squares of half-precision numbers would over- or underflow.
    return unit_vectors(vectors.to(compute_dtype(vectors.dtype))).to(vectors.dtype)
