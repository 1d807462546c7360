"""Changes to a classifier after training, for two-stage methods."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from lgla_losses._checks import describe, finite_float
from lgla_losses.experts import ExpertClassifiers
from lgla_losses.functional import compute_dtype

__all__ = ["tau_normalize"]

Head = TypeVar("Head", nn.Linear, ExpertClassifiers)


def tau_normalize(head: Head, tau: float = 1.0) -> Head:
    r"""Make the lengths of the class weights of a trained linear head more equal.

    .. math:: \tilde w_j = \frac{w_j}{\lVert w_j \rVert^\tau}

    Networks trained on long-tailed data have longer weights for frequent classes. The bias becomes 0, as in
    the authors' code. Choose ``tau`` on a validation split. The logits of cosine heads do not depend on the
    length of their weights, so there is nothing to normalise.

    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020,
    section 4.2, the :math:`\tau`-normalised classifier.

    Args:
        head: a linear head: a :class:`torch.nn.Linear`, or the
            :class:`~lgla_losses.experts.ExpertClassifiers` of K experts with ``scale=None``, each normalised
            separately.
        tau: strength, at least 0; 0 changes no weight, 1 makes all lengths 1.

    Returns:
        A new module of the same kind, which shares nothing with ``head``.

    Raises:
        TypeError: ``head`` is not such a module or ``tau`` not a number.
        ValueError: the head is a cosine head, or its weight is computed from other parameters, or ``tau`` is
            negative or not finite.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> head.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "bias": torch.ones(2)})
        <All keys matched successfully>
        >>> tau_normalize(head).weight
        Parameter containing:
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]], requires_grad=True)
    """
    if not isinstance(head, nn.Linear | ExpertClassifiers):
        raise TypeError(
            f"head: expected a torch.nn.Linear or the ExpertClassifiers of K experts, got {describe(head)}; "
            "for an ExpertModel pass model.experts.classifiers"
        )
    if isinstance(head, ExpertClassifiers) and head.scale is not None:
        raise ValueError(
            f"head: expected a linear head, got cosine classifiers with scale={head.scale:g}, whose logits "
            'do not depend on the length of their weights; make the experts with classifier="linear"'
        )
    if not {"weight", "bias"} <= head._parameters.keys():
        raise ValueError(
            "head: expected a weight and a bias that are plain parameters, got one that is computed from "
            "others, as by weight_norm; make it plain first with "
            "torch.nn.utils.parametrize.remove_parametrizations(head, 'weight'), or for the older "
            "torch.nn.utils.weight_norm with torch.nn.utils.remove_weight_norm(head)"
        )
    tau = finite_float("tau", tau, low=0.0, high=math.inf, expected="a finite number >= 0")

    normalized = copy.deepcopy(head)
    with torch.no_grad():
        weight = normalized.weight.to(compute_dtype(normalized.weight.dtype))
        length = weight.norm(dim=-1, keepdim=True)
        normalized.weight.copy_(weight / torch.where(length == 0, 1.0, length) ** tau)
        if normalized.bias is not None:
            normalized.bias.zero_()
    return normalized
