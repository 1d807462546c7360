"""Terms between experts, to add to their loss: diversity, and mutual distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgla_losses._batch import one_or_more_experts, stack
from lgla_losses._checks import computable_tensor, positive_float, same_device
from lgla_losses._torch import values_readable
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.losses._base import scalar_on


def expert_diversity(output: ExpertOutput | ExpertLogits, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Compute how far the experts are from their mean, for every sample; subtract it from a loss.

    .. math:: \bar T^2 \sum_k \mathrm{KL}\Big(\mathrm{softmax}\Big(\frac{\bar v}{T}\Big) \Big\|
        \mathrm{softmax}\Big(\frac{v_k}{T}\Big)\Big), \qquad \bar v = \frac{1}{K} \sum_k v_k

    :math:`T` may differ by class, and :math:`\bar T` is its mean. No gradient flows through the experts' mean
    :math:`\bar v`, as in the authors' code. A single expert gives 0.

    Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021,
    the distribution-aware diversity loss, as the authors' code computes it.

    Args:
        output: logits of K experts ``[N, K, C]``, K tensors ``[N, C]`` or an
            :class:`~lgla_losses.ExpertOutput`.
        temperature: a positive number for all classes, or a tensor ``[C]`` with one number per class.

    Returns:
        ``[N]`` in float32 (float64 for float64 logits), at least 0.

    Raises:
        TypeError: the logits or the temperature are of a wrong type.
        ValueError: shapes or devices do not fit, or a temperature is not positive and finite.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]]])
        >>> expert_diversity(logits)
        tensor([0.8676, 0.0000])
    """
    logits = _stacked(output)
    if isinstance(temperature, Tensor):
        _check_temperatures(temperature, logits)
    elif not torch.compiler.is_compiling():  # a compiler does not know the value
        positive_float("temperature", temperature, "or a tensor [C] with one number per class")
    temperature = scalar_on(logits.device, temperature, logits.dtype)
    return diversity_of(logits, temperature, temperature.mean())


def expert_distillation(output: ExpertOutput | ExpertLogits) -> Tensor:
    r"""Compute how far the experts are from each other, for every sample; add it to a loss.

    .. math:: \frac{1}{K - 1} \sum_{k \ne l} \mathrm{KL}(p_k \,\|\, p_l), \qquad p_k = \mathrm{softmax}(v_k)

    Gradients flow through both sides of every pair, as in the authors' code. A single expert gives 0.

    Source: Li et al., "Nested Collaborative Learning for Long-Tailed Visual Recognition", CVPR 2022, nested
    balanced online distillation. There the logits are adjusted, :math:`v + \log n`.

    Args:
        output: as in :func:`expert_diversity`.

    Returns:
        ``[N]`` in float32 (float64 for float64 logits), at least 0.

    Raises:
        TypeError: the logits are of a wrong type.
        ValueError: their shapes do not fit.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]]])
        >>> expert_distillation(logits)
        tensor([3.0464, 0.0000])
    """
    return distillation_of(_stacked(output))


def diversity_of(logits: Tensor, temperature: Tensor, mean_temperature: Tensor) -> Tensor:
    """Compute :func:`expert_diversity` of logits ``[*B, K, C]`` in the dtype of a loss: ``[*B]``."""
    of_mean = (logits.detach().mean(dim=-2, keepdim=True) / temperature).log_softmax(dim=-1)
    of_experts = (logits / temperature).log_softmax(dim=-1)
    each = of_mean.exp() * _finite_difference(of_mean, of_experts)
    return mean_temperature.square() * each.sum(dim=(-2, -1))


def distillation_of(logits: Tensor) -> Tensor:
    """Compute :func:`expert_distillation` of logits ``[*B, K, C]`` in the dtype of a loss: ``[*B]``."""
    num_experts = logits.shape[-2]
    if num_experts == 1:
        return logits.new_zeros(logits.shape[:-2])
    # The sum over all pairs is K times the sum over every expert and the mean of the logarithms.
    log_p = logits.log_softmax(dim=-1)
    each = log_p.exp() * _finite_difference(log_p, log_p.mean(dim=-2, keepdim=True))
    return num_experts / (num_experts - 1) * each.sum(dim=(-2, -1))


def _finite_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Compute :math:`\log p - \log q`, and 0 for a class masked by -inf, whose :math:`p` is 0."""
    return torch.where(log_p == -torch.inf, 0.0, log_p - log_q)


def _check_temperatures(temperature: Tensor, logits: Tensor) -> None:
    """Check the temperature, a number or ``[C]``, for logits ``[*B, K, C]``."""
    num_classes = logits.shape[-1]
    computable_tensor("temperature", temperature, [num_classes])
    same_device(logits=logits, temperature=temperature)
    if temperature.shape not in ((), (num_classes,)):
        raise ValueError(
            f"temperature: expected a number, or one per class with shape [{num_classes}], got "
            f"{list(temperature.shape)}"
        )
    if values_readable(temperature, None):
        low, high = temperature.detach().aminmax()  # NaN stays NaN
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"temperature: expected positive, finite numbers, got {low:.4g} to {high:.4g}; 1 leaves the "
                "logits as they are"
            )


def _stacked(output: ExpertOutput | ExpertLogits) -> Tensor:
    """Check and stack the logits of one model or of K experts: ``[N, K, C]`` in the dtype of a loss."""
    return stack(*one_or_more_experts(output, None))
