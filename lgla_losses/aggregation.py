"""Weights of experts for a test set with unknown class prior, learned from its unlabelled samples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lgla_losses._batch import one_or_more_experts, stack
from lgla_losses._checks import finite_float, finite_tensors, integer, positive_int, same_device
from lgla_losses.experts.output import ExpertLogits, ExpertOutput

__all__ = ["self_supervised_weights"]

#: The settings of the authors' optimiser, except the learning rate.
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
#: The search ends when an expert has less weight.
SMALLEST_WEIGHT = 0.05


def self_supervised_weights(
    view: ExpertOutput | ExpertLogits,
    other_view: ExpertOutput | ExpertLogits,
    *,
    learning_rate: float = 0.1,
    epochs: int = 5,
    batch_size: int = 128,
    seed: int = 0,
) -> Tensor:
    r"""Learn one weight per expert from two views of unlabelled test samples: SADE's aggregation.

    .. math:: \max_w \frac{1}{N} \sum_i \cos\Big(\mathrm{softmax}\Big(\sum_k w_k v_{ik}\Big),
        \mathrm{softmax}\Big(\sum_k w_k v'_{ik}\Big)\Big), \qquad w = \mathrm{softmax}(a)

    Experts whose predictions agree for both views of a sample get larger weights, because an expert is more
    stable on the classes that it is good at. To get the views, apply a training augmentation to each sample
    twice. The search starts with equal weights and uses stochastic gradient descent with Nesterov momentum
    and weight decay of the numbers :math:`a`, as in the authors' code; it ends after an epoch in which a
    weight has fallen below 0.05. Equal arguments give equal weights.

    Source: Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed
    Recognition", NeurIPS 2022, test-time self-supervised aggregation, with the settings of the authors' code.

    Args:
        view: finite logits ``[N, K, C]`` of the samples in one view, K tensors ``[N, C]`` or an
            :class:`~lgla_losses.ExpertOutput`.
        other_view: logits of the same samples, in the same order, in another view.
        learning_rate: learning rate of the gradient descent.
        epochs: most passes over the samples.
        batch_size: samples per step.
        seed: seed for the order of the samples.

    Returns:
        Positive weights ``[K]`` that sum to 1, on the device of the logits. Pass them as ``fusion`` of
        :meth:`ExpertOutput.ensemble <lgla_losses.ExpertOutput.ensemble>`.

    Raises:
        TypeError: the logits or another argument are of a wrong type.
        ValueError: the views differ in shape or device, there is no sample or a single expert, a logit is
            not finite, or another argument is out of range.

    Example:
        >>> sure, unsure = torch.eye(4).repeat(8, 1) * 5, torch.randn(2, 32, 4)
        >>> view, other_view = ([sure, noise] for noise in unsure)
        >>> weights = self_supervised_weights(view, other_view, epochs=20)
        >>> weights[0] > weights[1]
        tensor(True)
    """
    views = [stack(*one_or_more_experts(output, None)).detach() for output in (view, other_view)]
    _check(views)
    learning_rate = finite_float(
        "learning_rate", learning_rate, low=0.0, high=math.inf, expected="a finite number >= 0"
    )
    epochs = positive_int("epochs", epochs, "the authors take 5")
    batch_size = positive_int("batch_size", batch_size, "the authors take 128")
    generator = torch.Generator().manual_seed(integer("seed", seed, "it orders the samples"))

    num_samples, num_experts, _ = views[0].shape
    # Needed even if the caller has disabled gradients.
    with torch.inference_mode(False), torch.enable_grad():
        free = torch.zeros(num_experts, dtype=views[0].dtype, device=views[0].device, requires_grad=True)
        optimizer = torch.optim.SGD(
            [free], lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        for _ in range(epochs):
            order = torch.randperm(num_samples, generator=generator).to(free.device)
            for rows in order.split(batch_size):
                optimizer.zero_grad()
                weights = free.softmax(dim=0)[:, None]
                one, other = ((logits[rows] * weights).sum(dim=1).softmax(dim=1) for logits in views)
                (-F.cosine_similarity(one, other).mean()).backward()
                optimizer.step()
            if free.softmax(dim=0).min() < SMALLEST_WEIGHT:
                break
        return free.detach().softmax(dim=0)


def _check(views: list[Tensor]) -> None:
    """Raise unless the views ``[N, K, C]`` fit each other and have at least two experts."""
    first, other = views
    if first.shape != other.shape:
        raise ValueError(
            "other_view: expected the same samples, experts and classes as in view, shape "
            f"{list(first.shape)}, got {list(other.shape)}"
        )
    same_device(view=first, other_view=other)
    if first.shape[0] == 0 or first.shape[1] < 2:
        raise ValueError(
            "view: expected logits [N, K, C] of at least one sample and two experts, got "
            f"{list(first.shape)}; a single expert needs no weight"
        )
    finite_tensors(view=first, other_view=other)
