"""Parameter groups with and without weight decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lgla_losses._checks import finite_float
from lgla_losses.experts.group_conv import GroupConvExperts


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide parameters into those without and those with weight decay, for an optimizer.

    Norms and biases get none, as in ``timm.optim.param_groups_weight_decay``, which recognises them by their
    single dimension. In :class:`GroupConvExperts` those of the experts are stacked to ``[K, d]``: here they
    are treated as the vectors that they are for each expert.

    Args:
        model: any network, with experts or without.
        weight_decay: weight decay of all other parameters.

    Returns:
        Two groups of the parameters that require a gradient; the first has no weight decay.

    Raises:
        TypeError: ``weight_decay`` is not a number.
        ValueError: it is negative or not finite.

    Example:
        >>> import torch
        >>> stage = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
        >>> experts = GroupConvExperts(stage, num_experts=3, num_classes=10, reset=True)
        >>> groups = parameter_groups(experts, weight_decay=5e-4)
        >>> [[list(p.shape) for p in group["params"]] for group in groups]
        [[[3, 16], [3, 16], [3, 16]], [[3, 16, 8, 3, 3], [3, 10, 16]]]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    decay = finite_float(
        "weight_decay", weight_decay, low=0.0, high=math.inf, expected="a number >= 0, such as 5e-4"
    )
    stacked = {
        id(parameter)
        for experts in model.modules()
        if isinstance(experts, GroupConvExperts)
        for part in (experts.classifiers, experts.stage)
        if part is not None and not isinstance(part, nn.ModuleList)
        for parameter in part.parameters()
    }

    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": decay},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = parameter.dim() - (id(parameter) in stacked)
            decays = dimensions > 1 and name.rpartition(".")[2] != "bias"
            groups[decays]["params"].append(parameter)
    return groups
