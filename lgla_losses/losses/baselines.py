r"""The losses that LGLA is compared with, on the same fused cross entropy.

Each takes the logits of one model, ``[N, C]``, or of K experts like :class:`~lgla_losses.LGLALoss`, and sums
their losses. So one network and one learning rate serve all losses. The formulas are for one model; n_j is
the number of training samples of class j. The arguments, shapes and errors that all losses share are
described in :class:`~lgla_losses.losses.adjusted.AdjustedLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._buffers import scalar
from lgla_losses._checks import describe, finite_float, positive_float
from lgla_losses._counts import ArrayLike, as_class_weight
from lgla_losses.adjustment import check_tau
from lgla_losses.losses.adjusted import AdjustedLoss, Options


class FocalLoss(AdjustedLoss):
    r"""Compute the focal loss: easy samples weigh less.

    .. math:: -(1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(v)

    This is the multi-class form with softmax probabilities that long-tailed learning uses; the paper has one
    sigmoid per class. For class weights from counts see :class:`ClassBalancedLoss`.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 3.2, Eq. 4.

    Args:
        gamma: focusing parameter, at least 0; 0 is cross entropy.
        alpha: weights of the classes ``[C]``, :math:`\alpha_t` of Eq. 5. ``"mean"`` divides by the number of
            samples, not by their weights.
        options: as in :class:`~lgla_losses.adjusted.AdjustedLoss`.

    Example:
        >>> FocalLoss(gamma=2.0)(torch.zeros(8, 2), torch.arange(8) % 2)
        tensor(0.1733)
    """

    def __init__(
        self, gamma: float = 2.0, alpha: ArrayLike | None = None, **options: Unpack[Options]
    ) -> None:
        if alpha is not None:
            if options.get("class_weight") is not None:
                raise ValueError(
                    "alpha, class_weight: expected one of them, got both, which mean the same; drop one"
                )
            options["class_weight"] = as_class_weight(alpha, name="alpha")
        super().__init__(**options)
        self._divides_by_weights &= alpha is None
        expected = "a finite number >= 0 (class counts are an argument of ClassBalancedLoss)"
        self.focusing = finite_float("gamma", gamma, low=0.0, high=math.inf, expected=expected)


class ClassBalancedLoss(AdjustedLoss):
    r"""Compute the class-balanced loss: each class weighs the inverse of its effective number of samples.

    .. math:: w_y \, L(v, y), \qquad w_j \propto \frac{1 - \beta}{1 - \beta^{n_j}}, \qquad \sum_j w_j = C

    :math:`L` is softmax cross entropy, or with ``gamma`` the softmax :class:`FocalLoss`. ``"mean"`` divides
    by the number of samples, as the authors' code does, not by the sum of their weights. So a sample of a
    class weighs the same in every batch.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 4,
    Eqs. 6 and 8. With ``gamma`` it is their Eq. 13 with softmax probabilities instead of sigmoids.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0.
        beta: how fast further samples of a class lose value, in ``[0, 1)``: 0 weighs all classes equally, a
            value close to 1 by their inverse counts.
        gamma: focusing parameter of the focal loss, at least 0; None means cross entropy.
        options: as in :class:`FocalLoss`.

    Attributes:
        class_weight: the weights, float64 ``[C]``, with mean 1; times your own ``class_weight``.

    Example:
        >>> ClassBalancedLoss([3, 1], beta=0.5).class_weight
        tensor([0.7273, 1.2727], dtype=torch.float64)
    """

    def __init__(
        self,
        class_counts: ArrayLike,
        beta: float = 0.9999,
        gamma: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(_given(class_counts), {"beta": _check_beta(beta)}, **options)
        if gamma is not None:
            expected = "a finite number >= 0 (None is cross entropy)"
            self.focusing = finite_float("gamma", gamma, low=0.0, high=math.inf, expected=expected)

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the weights."""
        return {"class_weight": _effective_weights(counts, numbers["beta"])}


class LogitAdjustedLoss(AdjustedLoss):
    r"""Compute cross entropy with logit adjustment: rare classes must win by a larger margin.

    .. math:: -\log \frac{\exp(v^y + \tau \log \pi_y)}{\sum_j \exp(v^j + \tau \log \pi_j)},
        \qquad \pi_j = \frac{n_j}{\sum_c n_c}

    Predict with the unadjusted logits.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 5.1
    and Eq. 10 of arXiv:2007.07314.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0.
        tau: strength, at least 0; 0 is cross entropy; 1 is consistent for the balanced error.
        options: as in :class:`FocalLoss`.

    Attributes:
        table: the adjustments :math:`\tau \log(n_j / n_{max})`, float64 ``[C]``. Dividing by :math:`n_{max}`
            shifts all of them and does not change the softmax.

    Example:
        >>> criterion = LogitAdjustedLoss([300, 100])
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))  # -log(100 / 400)
        tensor(1.3863)
    """

    def __init__(self, class_counts: ArrayLike, tau: float = 1.0, **options: Unpack[Options]) -> None:
        super().__init__(_given(class_counts), {"tau": check_tau(tau)}, **options)

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the adjustments."""
        return {"table": functional.log_prior_table(counts, 1, numbers["tau"])[0]}


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    r"""Compute balanced softmax: training adds the log prior to the logits, for a test set without it.

    .. math:: -\log \frac{n_y \exp(v^y)}{\sum_j n_j \exp(v^j)}

    It is :class:`LogitAdjustedLoss` with :math:`\tau = 1`. The paper's meta sampler is not part of it.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020,
    section 3.1, Theorem 1 and Eq. 4.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0.
        options: as in :class:`FocalLoss`.

    Attributes:
        table: as in :class:`LogitAdjustedLoss`.

    Example:
        >>> criterion = BalancedSoftmaxLoss([300, 100])
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))  # -log(100 / 400)
        tensor(1.3863)
    """

    def __init__(self, class_counts: ArrayLike, **options: Unpack[Options]) -> None:
        AdjustedLoss.__init__(self, _given(class_counts), **options)

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the adjustments."""
        return super().constants(counts, tau=1.0)


class VSLoss(LogitAdjustedLoss):
    r"""Compute the vector-scaling loss: the logits of each class are multiplied and shifted.

    .. math:: -\log \frac{\exp(\Delta_y v^y + \iota_y)}{\sum_j \exp(\Delta_j v^j + \iota_j)}, \qquad
        \Delta_j = \left(\frac{n_j}{n_{max}}\right)^\gamma, \quad \iota_j = \tau \log \pi_j

    The weights :math:`\omega_y` of its general form are 1, the default of the authors' code. Predict with the
    unadjusted logits.

    Source: Kini et al., "Label-Imbalanced and Group-Sensitive Classification under Overparameterization",
    NeurIPS 2021, the VS-loss of several classes, with the parameters of the authors' code for label
    imbalance.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0.
        gamma: strength of the multiplicative adjustment, at least 0; 0 is :class:`LogitAdjustedLoss`. The
            paper tunes it for every data set, so tune it on yours. The default is small on purpose: it trains
            as well as balanced softmax, while 0.3, the default of the authors' code, is worse than plain
            softmax on most real data sets.
        tau: strength of the additive adjustment, at least 0.
        options: as in :class:`FocalLoss`.

    Attributes:
        multiplier: :math:`\Delta_j`, float64 ``[C]``.
        table: as in :class:`LogitAdjustedLoss`.

    Example:
        >>> VSLoss([400, 100], gamma=0.5).multiplier
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self, class_counts: ArrayLike, gamma: float = 0.05, tau: float = 1.0, **options: Unpack[Options]
    ) -> None:
        gamma = finite_float("gamma", gamma, low=0.0, high=math.inf, expected="a finite number >= 0")
        numbers = {"gamma": gamma, "tau": check_tau(tau)}
        AdjustedLoss.__init__(self, _given(class_counts), numbers, **options)

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the adjustments and the multipliers."""
        multiplier = functional.log_prior_table(counts, 1, numbers["gamma"])[0].exp()
        return super().constants(counts, **numbers) | {"multiplier": multiplier}

    @property
    def multiplier(self) -> Tensor:
        """The factors of the logits ``[C]``."""
        return self._read("multiplier")


class LDAMLoss(AdjustedLoss):
    r"""Compute the label-distribution-aware margin (LDAM) loss, with deferred re-weighting (DRW).

    .. math:: -w_y \log \frac{\exp(v^y - s \Delta_y)}{\exp(v^y - s \Delta_y) + \sum_{j \ne y} \exp(v^j)},
        \qquad \Delta_j \propto n_j^{-1/4}, \quad \max_j \Delta_j = m

    The logits are the scaled logits of a cosine head, :math:`v = s \cos`, as for
    :class:`~lgla_losses.LGLALoss`; the authors' code takes the cosines and scales them itself. For a linear
    head set ``scale=1``. With any other ``scale`` the loss warns once, on a CPU, if the logits are not
    cosines times ``scale``.

    The weights :math:`w` are 1 until :meth:`reweight` switches them to those of :class:`ClassBalancedLoss`,
    as the authors' code does at epoch 160 of 200; the paper's algorithm weighs by :math:`1 / n_j`, the limit
    of these weights as ``beta`` approaches 1. ``"mean"`` divides by the sum of the samples' weights, as
    ``torch.nn.CrossEntropyLoss(weight=w)`` does in the authors' code, so their learning rates can be used.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS
    2019, section 3.2, Eqs. 12 and 13 (LDAM), and section 3.3, Algorithm 1 (DRW).

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0.
        max_margin: margin ``m`` of the rarest class, in cosines, at least 0.
        scale: the factor ``s`` of the cosine head.
        beta: ``beta`` of the weights after :meth:`reweight`, as in :class:`ClassBalancedLoss`.
        options: as in :class:`FocalLoss`.

    Attributes:
        margins: :math:`\Delta_j`, float64 ``[C]``.
        class_weight: the weights after :meth:`reweight`, float64 ``[C]``, with mean 1; times your own
            ``class_weight``.
        reweighting: whether the weights are on, a bool scalar tensor, saved in the ``state_dict``.

    Example:
        >>> criterion = LDAMLoss([160_000, 10_000])
        >>> criterion.margins
        tensor([0.2500, 0.5000], dtype=torch.float64)
        >>> for epoch in range(200):
        ...     criterion.reweight(epoch >= 160)
    """

    divides_by_weights = True
    _without_cosines = "the margins, made for cosines times scale, do not fit"
    _for_linear_heads = "scale=1"

    def __init__(
        self,
        class_counts: ArrayLike,
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float = 0.9999,
        **options: Unpack[Options],
    ) -> None:
        self._arrange(class_counts, scale, options, max_margin=max_margin, beta=beta)

    def _arrange(self, class_counts: ArrayLike, scale: float, options: Options, **numbers: float) -> None:
        """Check and keep the arguments; ``numbers`` are those that the constants of a subclass need."""
        numbers["max_margin"] = finite_float(
            "max_margin", numbers["max_margin"], low=0.0, high=math.inf, expected="a finite number >= 0"
        )
        numbers["beta"] = _check_beta(numbers["beta"])
        AdjustedLoss.__init__(self, _given(class_counts), numbers, **options)
        self._keep("reweighting", scalar(0.0))  # not a bool: weight averaging cannot average bools
        self.scale = positive_float("scale", scale, "1 for a linear head")

    @property
    def _cosine_scale(self) -> float | None:  # type: ignore[override]
        return None if self.scale == 1 else self.scale

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the margins and the weights."""
        return {
            "margins": numbers["max_margin"] * (0.25 * (counts.min().log() - counts.log())).exp(),
            "class_weight": _effective_weights(counts, numbers["beta"]),
        }

    @property
    def margins(self) -> Tensor:
        """The margins, in cosines ``[C]``."""
        return self._read("margins")

    @property
    def reweighting(self) -> Tensor:
        """Whether the weights are on."""
        return self._read("reweighting") > 0

    def reweight(self, enabled: bool = True) -> None:
        """Switch the re-weighting on or off. Call it before any epoch or step, as often as you like."""
        if not isinstance(enabled, bool | np.bool_):
            raise TypeError(
                f"enabled: expected True or False, got {describe(enabled)}; compare the epoch, as in "
                "criterion.reweight(epoch >= 160)"
            )
        self._keep("reweighting", scalar(enabled))

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        enabled = self._current(state, "reweighting")
        if enabled not in (0, 1):
            raise ValueError(f"reweighting: expected 0 or 1, got {float(enabled):.4g}")
        return super()._restored(state, state_dict, prefix)

    def _terms(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # The flag stays on its device: no step waits for it, and a compiled step sees it change.
        table = self.constant("table") if "table" in self._exact else None
        weight = self.constant("class_weight") ** self.constant("reweighting")  # one kernel: w or 1
        if "own_class_weight" in self._exact:
            weight = weight * self.constant("own_class_weight")
        return table, weight, self.scale * self.constant("margins")

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"{super().extra_repr()}, max_margin={self._numbers['max_margin']}, scale={self.scale}"


def _given(class_counts: ArrayLike | None) -> ArrayLike:
    if class_counts is None:
        raise TypeError("class_counts: expected samples per class [C], got None; count_classes computes them")
    return class_counts


def _check_beta(beta: float) -> float:
    high = math.nextafter(1.0, 0.0)
    return finite_float("beta", beta, low=0.0, high=high, expected="a number in [0, 1), such as 0.9999")


def _effective_weights(counts: Tensor, beta: float) -> Tensor:
    """Compute the inverse effective numbers of samples ``[C]``, scaled to mean 1."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    # 1 - beta cancels; expm1 keeps the digits of 1 - beta^n when it is small.
    weights = -1 / torch.expm1(counts * log_beta)
    return weights / weights.mean()
