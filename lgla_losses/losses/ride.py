"""RIDE's loss: a margin loss for every expert, and a term that keeps the experts apart."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from lgla_losses._batch import Batch
from lgla_losses._checks import finite_float
from lgla_losses._counts import ArrayLike
from lgla_losses.losses.adjusted import Options
from lgla_losses.losses.baselines import LDAMLoss
from lgla_losses.losses.between import diversity_of


class RIDELoss(LDAMLoss):
    r"""Compute RIDE's loss of K experts: LDAM of each, minus their diversity.

    .. math:: \sum_k L_{LDAM}(v_k, y) - \lambda \bar T^2 \sum_k \mathrm{KL}\Big(\mathrm{softmax}\Big(
        \frac{\bar v}{T}\Big) \Big\| \mathrm{softmax}\Big(\frac{v_k}{T}\Big)\Big), \qquad
        T_j = \frac{t_j}{\max_l t_l}, \quad t_j = \gamma \frac{C n_j}{\sum_l n_l} + 1 - \gamma

    The second term is :func:`~lgla_losses.baselines.expert_diversity`. As in the authors' code, all
    temperatures are 1 until :meth:`~lgla_losses.baselines.LDAMLoss.reweight` switches on the class
    temperatures, together with LDAM's class weights. These weights do not apply to the second term, which
    ``"mean"`` divides by the number of samples. RIDE's routing of samples and its distillation from a larger
    model are not part of the loss.

    The first term is bounded below and the second is not: with a large ``diversity`` training diverges.

    Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021,
    the loss of the first stage, with the temperatures of the authors' code, which divides them by the
    largest.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0.
        diversity: :math:`\lambda`, at least 0; 0 is :class:`LDAMLoss`. The default is that of the authors'
            configuration for CIFAR-100-LT; the default of their code is 0.2.
        max_margin: as in :class:`LDAMLoss`; None means 0.5, or no margin with ``scale=None``.
        scale: the factor of the cosine head, as in :class:`LDAMLoss`; None is for linear heads, and uses
            cross entropy instead of LDAM.
        gamma: how far the temperatures of rare classes lie below that of the most frequent class, in ``[0,
            1)``.
        beta: as in :class:`LDAMLoss`.
        options: as in :class:`FocalLoss`.

    Attributes:
        temperature: :math:`T` after :meth:`~lgla_losses.baselines.LDAMLoss.reweight`, float64 ``[C]``.
        margins: as in :class:`LDAMLoss`, like ``class_weight`` and ``reweighting``.

    Example:
        >>> criterion = RIDELoss([300, 100], diversity=0.2, gamma=0.5)
        >>> criterion.temperature
        tensor([1.0000, 0.6000], dtype=torch.float64)
        >>> criterion(torch.zeros(8, 3, 2), torch.arange(8) % 2) > 0  # of three experts
        tensor(True)
    """

    _for_linear_heads = "scale=None"
    _weighs_added = False

    def __init__(
        self,
        class_counts: ArrayLike,
        diversity: float = 0.45,
        max_margin: float | None = None,
        scale: float | None = 30.0,
        gamma: float = 0.05,
        beta: float = 0.9999,
        **options: Unpack[Options],
    ) -> None:
        high = math.nextafter(1.0, 0.0)
        gamma = finite_float("gamma", gamma, low=0.0, high=high, expected="a number in [0, 1)")
        if scale is None:  # without margins it is cross entropy
            if max_margin is not None:
                raise ValueError(
                    "max_margin, scale: expected no margin with scale=None, which uses cross entropy "
                    f"instead of LDAM, got max_margin={max_margin}; leave it out, or set scale=1 for "
                    "margins in units of a linear head's logits"
                )
            max_margin, scale = 0.0, 1.0
        elif max_margin is None:
            max_margin = 0.5
        self._arrange(class_counts, scale, options, max_margin=max_margin, beta=beta, gamma=gamma)
        expected = "a finite number >= 0"
        self.diversity = finite_float("diversity", diversity, low=0.0, high=math.inf, expected=expected)
        self._adds = self.diversity > 0

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the margins, the weights and the temperatures."""
        gamma = numbers["gamma"]
        temperature = gamma * counts / counts.mean() + (1 - gamma)
        return super().constants(counts, **numbers) | {"temperature": temperature / temperature.max()}

    @property
    def temperature(self) -> Tensor:
        """The temperatures of the classes after :meth:`~lgla_losses.baselines.LDAMLoss.reweight` ``[C]``."""
        return self._read("temperature")

    def _added(self, batch: Batch) -> Tensor:
        logits = batch.stacked(self.ignore_index)
        # As in LDAMLoss, no step waits for the flag.
        temperature = torch.where(self.constant("reweighting") > 0, self.constant("temperature"), 1.0)
        temperature = temperature.to(logits.dtype)
        mean = temperature.mean()
        if "table" in self._exact:  # it masks classes
            table = self.constant("table").to(logits.dtype)
            logits = logits + table
            mean = torch.where(table == -math.inf, math.nan, temperature).nanmean()
        return -self.diversity * diversity_of(logits, temperature, mean)

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"{super().extra_repr()}, diversity={self.diversity}"
