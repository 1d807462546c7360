"""Which tau to start with: one rule for the losses, ``inspect`` and users."""

from __future__ import annotations

from dataclasses import dataclass

from lgla_losses._checks import finite_float, integer, one_of, positive_float

#: The temperature of cosine heads after long training.
_AFTER_LONG_TRAINING = 1.6

#: A measured temperature has an error, and outside this range the law is not checked.
_LOWEST, _HIGHEST = 1.0, 2.0


@dataclass(frozen=True)
class Suggestion:
    """Hold a suggested ``tau`` and the reason for it.

    Attributes:
        num_experts: number of experts ``K``.
        tau: strength of the global adjustment.
        reason: the rule, and what it is based on; at K = 2 a note on balanced softmax.
    """

    num_experts: int
    tau: float
    reason: str


def suggest(
    num_experts: int = 3,
    *,
    classifier: str = "cosine",
    label_smoothing: float = 0.0,
    training: str = "usual",
    temperature: float | None = None,
) -> Suggestion:
    r"""Suggest ``tau`` for :class:`LGLALoss`, from what you know about the network and its training.

    The more confident a network is, the more its ensemble leans to the head. It holds about the prior
    :math:`n_j^s` with :math:`s = t - (1 + \tau) / K`, where the temperature :math:`t` calibrates :math:`v +
    T(k, j)`. So the prior is uniform at :math:`\tau = K t - 1`. The first line that fits decides:

    ============================== ================================================================
    what is known                  tau
    ============================== ================================================================
    linear heads                   ``K - 1`` for any temperature: they do not follow the law
    a measured ``temperature``     ``K * temperature - 1``, the temperature taken as 1 if it is
                                   lower and as 2 if it is higher
    label smoothing                ``K - 1``
    an underfit network            ``K - 1``
    long training                  ``1.6 * K - 1``
    else                           ``1.25 * (K - 1)``, the paper's 2.5 at K = 3
    ============================== ================================================================

    At K = 2 and ``tau=1`` both experts have balanced softmax's adjustment, so without hard-sample weights
    (``aaw=False``) the loss is balanced softmax for two experts.

    Args:
        num_experts: number of experts ``K``, at least 2.
        classifier: ``"cosine"`` or ``"linear"``, the heads.
        label_smoothing: label smoothing of the loss.
        training: ``"underfit"`` ends well before the network fits its training samples, ``"usual"`` when it
            fits nearly all of them, ``"long"`` after several times as many epochs.
        temperature: temperature measured on validation data of such a network: that of a :func:`calibration
            <lgla_losses.calibration.fit>` that is used, from a few hundred samples. It is above 1 if the
            network is overconfident.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> print(suggest(num_experts=3).reason)
        tau = 1.25 (K - 1) = 2.5, for cosine heads that fit nearly all training samples.
        >>> suggest(num_experts=3, label_smoothing=0.1).tau
        2.0
        >>> suggest(num_experts=3, temperature=1.5).tau
        3.5
    """
    way_out = "the paper uses 3; a single model has no global expert and no tau"
    num_experts = integer("num_experts", num_experts, way_out)
    if num_experts < 2:
        raise ValueError(f"num_experts: expected an integer >= 2, got {num_experts}; {way_out}")
    one_of("classifier", classifier, ("cosine", "linear"))
    expected = "a number in 0..1"
    smoothing = finite_float("label_smoothing", label_smoothing, low=0.0, high=1.0, expected=expected)
    one_of("training", training, ("underfit", "usual", "long"))
    if temperature is not None:
        temperature = positive_float("temperature", temperature, "calibration.fit(...).temperature gives one")

    tau, rule, why = _choose(num_experts, classifier == "linear", smoothing > 0, training, temperature)
    reason = f"tau = {rule} = {tau:.4g}, {why}."
    if num_experts == 2:
        reason += " At K = 2 tau = 1 with aaw=False is balanced softmax of two experts."
    return Suggestion(num_experts, tau, reason)


def _choose(
    k: int, is_linear: bool, is_smoothed: bool, training: str, temperature: float | None
) -> tuple[float, str, str]:
    """Give tau, its formula, and the reason."""
    if is_linear:
        return k - 1.0, "K - 1", "because the heads are linear"
    if temperature is not None:
        taken = min(max(temperature, _LOWEST), _HIGHEST)
        bounded = "" if taken == temperature else f", taken as {taken:g}"
        why = f"by the measured temperature of {temperature:.3g}{bounded}"
        return k * taken - 1, f"{taken:.3g} K - 1".removeprefix("1 "), why
    if is_smoothed:
        return k - 1.0, "K - 1", "because of label smoothing"
    if training == "underfit":
        return k - 1.0, "K - 1", "because the network is underfit"
    if training == "long":
        return k * _AFTER_LONG_TRAINING - 1, f"{_AFTER_LONG_TRAINING} K - 1", "because training is long"
    return 1.25 * (k - 1), "1.25 (K - 1)", "for cosine heads that fit nearly all training samples"
