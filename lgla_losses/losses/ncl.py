"""NCL's loss: balanced softmax over all classes and over hard classes, and mutual distillation."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from lgla_losses._batch import Batch
from lgla_losses._checks import finite_float
from lgla_losses._counts import ArrayLike
from lgla_losses.functional import widest_dtype
from lgla_losses.losses.adjusted import Options
from lgla_losses.losses.baselines import BalancedSoftmaxLoss
from lgla_losses.losses.between import distillation_of


class NCLLoss(BalancedSoftmaxLoss):
    r"""Compute NCL's loss of K experts: balanced softmax over all and over hard classes, and distillation.

    .. math:: \sum_{S \in \{\text{all}, H\}} \Big( \sum_k -\log p_k^S(y)
        + \frac{\lambda}{K - 1} \sum_{k \ne l} \mathrm{KL}(p_k^S \,\|\, p_l^S) \Big), \qquad
        p_k^S(j) = \frac{n_j \exp(v_k^j)}{\sum_{l \in S} n_l \exp(v_k^l)}

    The hard classes :math:`H` of a sample are its own class and the other classes with the highest logits of
    the first expert. The second term is :func:`~lgla_losses.baselines.expert_distillation`. Expect twice the
    loss of :class:`BalancedSoftmaxLoss`, and more at the start. For a single model only the first term
    remains. The paper's contrastive branch is not part of the loss: it needs two views of every image and a
    momentum copy of the network.

    ``class_weight`` multiplies all terms of a sample, and ``label_smoothing`` is over the classes of each
    softmax. With both, the smoothed part over all classes weighs each of them by its own weight, as in
    PyTorch; the part over hard classes weighs all by the weight of the sample's class.

    Source: Li et al., "Nested Collaborative Learning for Long-Tailed Visual Recognition", CVPR 2022: nested
    individual learning, nested balanced online distillation, and hard category mining. The softmax over hard
    classes follows the paper; the authors' code keeps the other classes in it, with a logit of 0.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0.
        distillation: :math:`\lambda`, at least 0. The default is that of the authors' configurations.
        hard_share: share of the unmasked classes that are hard, in ``(0, 1]``; the number is rounded and at
            least two. The default is that of the authors' configurations.
        options: as in :class:`FocalLoss`. Targets must be class indices.

    Attributes:
        table: as in :class:`LogitAdjustedLoss`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, shapes, devices or values do not fit, or the targets are
            class probabilities.

    Example:
        >>> criterion = NCLLoss([300, 100])
        >>> criterion(torch.zeros(1, 3, 2), torch.tensor([1]))  # of three experts: -6 log(100 / 400)
        tensor(8.3178)
    """

    _adds = True

    def __init__(
        self,
        class_counts: ArrayLike,
        distillation: float = 0.6,
        hard_share: float = 0.3,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(class_counts, **options)
        self.distillation = finite_float(
            "distillation", distillation, low=0.0, high=math.inf, expected="a finite number >= 0"
        )
        low = math.nextafter(0.0, 1.0)
        self.hard_share = finite_float(
            "hard_share", hard_share, low=low, high=1.0, expected="a number in (0, 1], such as 0.3"
        )

    def _added(self, batch: Batch) -> Tensor:
        if batch.is_soft:
            raise ValueError(
                f"target: expected class indices, from which {type(self).__name__} finds the hard classes, "
                "got probabilities; for these add expert_distillation to the loss of BalancedSoftmaxLoss"
            )
        logits = batch.stacked(self.ignore_index)
        table = self.constant("table").to(logits.dtype)
        adjusted = logits + table
        own = batch.own_class(logits.shape[-1])
        hard = self._hard_classes(logits[..., 0, :].detach(), own, table)
        of_hard = adjusted.gather(-1, hard[..., None, :].expand(*adjusted.shape[:-1], hard.shape[-1]))
        if self.zero_counts == "mask":  # on the device: no step waits for the number of classes
            kept = (table > -math.inf).sum(dtype=widest_dtype(table.device))
            number = (self.hard_share * kept).round().clamp_min(2)
            place = torch.arange(hard.shape[-1], device=hard.device)
            of_hard = torch.where(place < number, of_hard, -math.inf)

        log_p = of_hard.log_softmax(dim=-1)
        losses = -log_p[..., 0].sum(dim=-1)
        if self.label_smoothing > 0:
            losses = torch.lerp(losses, -log_p.mean(dim=-1).sum(dim=-1), self.label_smoothing)
        if self.distillation > 0:
            losses = losses + self.distillation * (distillation_of(adjusted) + distillation_of(of_hard))
        return losses

    def _hard_classes(self, logits: Tensor, own: Tensor, table: Tensor) -> Tensor:
        """Choose the hard classes ``[*B, H]`` by logits ``[*B, C]``: first the sample's own class."""
        num_classes = logits.shape[-1]
        number = min(num_classes, max(2, round(self.hard_share * num_classes)))
        scores = torch.where(table == -math.inf, -math.inf, logits).scatter(-1, own[..., None], math.inf)
        return scores.topk(number, dim=-1).indices

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"{super().extra_repr()}, distillation={self.distillation}, hard_share={self.hard_share}"
