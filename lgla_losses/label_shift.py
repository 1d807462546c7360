r"""The class prior of a test set without labels, and predictions under it.

Both functions assume that each class looks the same in training and test: :math:`p(x|j)` is unchanged.

Source: Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori
Probabilities: A Simple Procedure", Neural Computation 14(1), 2002. Lipton, Wang and Smola, "Detecting and
Correcting for Label Shift with Black Box Predictors", ICML 2018. Garg, Wu, Balakrishnan and Lipton, "A
Unified View of Label Shift Estimation", NeurIPS 2020.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lgla_losses._checks import (
    describe,
    finite_float,
    floating_tensor,
    positive_int,
    same_device,
    target_tensor,
    target_values,
)
from lgla_losses._counts import ArrayLike, to_numpy
from lgla_losses._torch import values_readable
from lgla_losses.functional import compute_dtype, widest_dtype

__all__ = ["estimate_prior", "shift_prior"]


#: Part of the squared distance from the uniform prior due to errors of trained networks, besides chance. More
#: samples do not reduce it, and unlabelled samples do not show its size: chosen on trained networks.
MARGIN = 0.05
#: The smoothing if rates of labelled samples explain the predictions, chosen in the same way.
SMOOTHING_OF_RATES = 0.05
#: The network's own estimate of its errors weighs as much as this many labelled samples of each class.
BELIEVED_SAMPLES = 5.0


@torch.no_grad()
def estimate_prior(
    logits: Tensor,
    prior: ArrayLike,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    smoothing: float | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
) -> Tensor:
    r"""Estimate the class prior of samples without labels.

    By default it is the mean probability of each class, under the uniform prior,

    .. math:: q = \frac{1}{N} \sum_i \mathrm{softmax}(v_i - \log p_{prior}),

    shrunk towards the uniform prior, and equal to it if q may differ from it by chance or by errors of the
    network: :math:`p \propto q^a` with

    .. math:: a = \max\left(0,\ 1 - \frac{0.05 + z}{2\,\mathrm{KL}(q\,\|\,1/C)}\right),

    where z is the value of the denominator by chance alone, if all classes were equally frequent: with the
    probabilities :math:`s_i` of the samples, :math:`(C \cdot \overline{\lVert s_i \rVert^2} - 1) / N`. Large
    shifts are kept; small ones are dropped, because their estimate is too uncertain.

    With ``validation``, :math:`p` is the prior that best explains how often each class is predicted, given
    the rates :math:`R_{jc}` at which labelled samples of class j are predicted as c. Starting from :math:`p =
    p_{prior}`, the step

    .. math:: p_j \leftarrow p_j \sum_c q_c R_{jc} / \textstyle\sum_l p_l R_{lc}

    is repeated; then :math:`p` is shrunk. The network's own estimate of the rates :math:`R_{jc}` weighs as
    much as five labelled samples of each class: it is the mean probability of c over the test samples,
    weighted by that of j.

    With ``smoothing`` nothing is shrunk. Without ``validation`` it is then expectation maximisation: the
    prior under which the samples are most likely, the fixed point of

    .. math:: p_j \leftarrow \frac{1}{N} \sum_i \mathrm{softmax}_j(v_i + \log p - \log p_{prior}).

    It is better than the default if the logits are exact, and worse if the network is weak.

    Source: expectation maximisation by Saerens et al., 2002; rates by Lipton et al., 2018, fitted by maximum
    likelihood as in "MLLS-CM" of Garg et al., 2020. The exponent is the positive-part factor of James and
    Stein, with a margin.

    Args:
        logits: finite log-likelihood plus log ``prior`` ``[N, C]``, up to a constant per sample.
        prior: the prior that the logits hold, positive ``[C]``, divided by its sum; for an LGLA ensemble, in
            theory, ``criterion.implied_prior()``.
        validation: finite logits ``[M, C]`` of the same network and the classes, int64 ``[M]``, of samples
            that it was not trained on. Their class frequencies do not matter, and classes may be missing.
            This takes memory of ``C x C``.
        smoothing: number of evenly spread extra samples per test sample: 0 uses the likelihood alone, larger
            values move the result towards the uniform prior. None: the default above, with ``validation``
            0.05 before shrinking.
        max_steps: most steps of the repetition, at least 1.
        tolerance: stops when no probability changes by more.

    Returns:
        Probabilities ``[C]`` in float64 (float32 on MPS), without gradient.

    Raises:
        TypeError: logits are not a floating-point tensor, classes not int64, the prior not numbers.
        ValueError: shapes or devices do not fit, there is no sample, or a value is not finite, not positive
            or not a class.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 9.0]]).repeat(100, 1)
        >>> estimate_prior(logits, prior=[0.5, 0.5])
        tensor([0.2936, 0.7064], dtype=torch.float64)
        >>> estimate_prior(logits, prior=[0.5, 0.5], smoothing=0.0)
        tensor([0.2499, 0.7501], dtype=torch.float64)
    """
    num_classes = _check_sample("logits", logits)
    max_steps = positive_int("max_steps", max_steps, "it bounds the loop")
    tolerance = finite_float("tolerance", tolerance, low=0.0, high=math.inf, expected="a finite number >= 0")
    if smoothing is not None:
        expected = "a finite number >= 0"
        smoothing = finite_float("smoothing", smoothing, low=0.0, high=math.inf, expected=expected)

    start = class_prior("prior", prior, num_classes, logits)
    log_likelihood = logits.to(start.dtype) - start.log()
    probabilities = log_likelihood.softmax(dim=1)
    if validation is not None:
        known, target = _check_validation(validation, logits)
        rates = _rates(probabilities, (known.to(start.dtype) - start.log()).softmax(dim=1), target)
        frequency = probabilities.mean(dim=0)
        predicted = frequency > torch.finfo(start.dtype).eps  # evidence for the other classes may be 0
        amount = SMOOTHING_OF_RATES if smoothing is None else smoothing
        p = _most_likely(rates.T[predicted], frequency[predicted], start, amount, max_steps, tolerance)
    elif smoothing is not None:
        # Divide the likelihoods of each sample by the largest; the posterior does not change.
        likelihood = (log_likelihood - log_likelihood.amax(dim=1, keepdim=True)).exp()
        each = start.new_full((len(logits),), 1 / len(logits))
        p = _most_likely(likelihood, each, start, smoothing, max_steps, tolerance)
    else:
        p = probabilities.mean(dim=0)
    return _held_back(p, probabilities) if smoothing is None else p


def _rates(probabilities: Tensor, known: Tensor, target: Tensor) -> Tensor:
    """Return how often class j is predicted as c, ``[j, c]``, from labelled samples and the network."""
    # A class with probability 0 in all samples is assumed to be predicted as itself.
    identity = torch.eye(probabilities.shape[1]).to(probabilities)
    believed = probabilities.T @ probabilities + torch.finfo(probabilities.dtype).tiny * identity
    believed = believed / believed.sum(dim=1, keepdim=True)
    sums = (BELIEVED_SAMPLES * believed).index_add(0, target, known)
    return sums / sums.sum(dim=1, keepdim=True)


def _most_likely(
    likelihood: Tensor, frequency: Tensor, p: Tensor, smoothing: float, max_steps: int, tolerance: float
) -> Tensor:
    """Return the prior under which outcomes ``[O, C]`` of these frequencies are most likely, from ``p``."""
    for _ in range(max_steps):
        evidence = likelihood @ p
        before, p = p, p * ((frequency / evidence) @ likelihood) + smoothing / len(p)
        p = p / p.sum()
        if (p - before).abs().max() <= tolerance:
            break
    return p


def _held_back(p: Tensor, probabilities: Tensor) -> Tensor:
    """Shrink ``p``: keep the part that neither chance nor the network's errors explain."""
    num_classes, num_samples = len(p), len(probabilities)
    distance = 2 * torch.xlogy(p, p * num_classes).sum()
    chance = (num_classes * probabilities.square().sum(dim=1).mean() - 1) / num_samples
    exponent = (1 - (MARGIN + chance) / distance.clamp(min=MARGIN)).clamp(min=0)
    held_back = p**exponent
    return held_back / held_back.sum()


def shift_prior(logits: Tensor, prior: ArrayLike, new_prior: ArrayLike) -> Tensor:
    r"""Shift logits to another class prior: :math:`v + \log p_{new} - \log p_{prior}`.

    The module's description says when this is valid.

    Source: Saerens et al., 2002.

    Args:
        logits: log-likelihood plus log ``prior`` ``[N, C]``; -inf masks a class.
        prior: the prior that the logits hold, positive ``[C]``, divided by its sum.
        new_prior: the prior that they will hold, non-negative ``[C]``, divided by its sum; a class of
            probability 0 gets -inf.

    Returns:
        ``[N, C]`` in the logits' dtype.

    Raises:
        TypeError: logits are not a floating-point tensor, a prior not numbers.
        ValueError: shapes do not fit, or a value is NaN, infinite or negative; values of logits are checked
            on the CPU only.

    Example:
        >>> shift_prior(torch.zeros(1, 2), prior=[0.5, 0.5], new_prior=[0.5, 0.0])
        tensor([[0.6931,   -inf]])
    """
    num_classes = _check_logits("logits", logits)
    if values_readable(logits, None) and not (logits < math.inf).all():
        raise ValueError("logits: expected finite values, or -inf for masked classes, got NaN or infinity")
    old = class_prior("prior", prior, num_classes, logits)
    new = class_prior("new_prior", new_prior, num_classes, logits, zeros=True)
    dtype = compute_dtype(logits.dtype)
    return (logits.to(dtype) + (new.log() - old.log()).to(dtype)).to(logits.dtype)


def _check_logits(name: str, logits: Tensor) -> int:
    num_classes = floating_tensor(name, logits, "[N, C]").shape[1]
    if num_classes == 0:
        raise ValueError(f"{name}: expected [N, C] with at least one class, got {list(logits.shape)}")
    return num_classes


def _check_sample(name: str, logits: Tensor) -> int:
    """Check the logits for an estimate; return the number of classes."""
    num_classes = _check_logits(name, logits)
    if len(logits) == 0:
        raise ValueError(f"{name}: expected at least one sample [N, C], got none; skip empty sets")
    if not logits.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity; leave masked classes out")
    return num_classes


def _check_validation(validation: tuple[Tensor, Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Check labelled logits against those of the test set."""
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError(
            f"validation: expected (logits, target) of labelled samples, got {describe(validation)}"
        )
    known, target = validation
    num_classes = _check_sample("validation logits", known)
    if num_classes != logits.shape[1]:
        raise ValueError(
            f"validation logits: expected the {logits.shape[1]} classes of logits, got {list(known.shape)}; "
            "both must come from one network"
        )
    target_tensor(target, known.shape[:1])
    same_device(logits=logits, validation_logits=known, target=target)
    target_values(target, num_classes)
    return known, target


def class_prior(name: str, prior: ArrayLike, num_classes: int, logits: Tensor, zeros: bool = False) -> Tensor:
    """Convert ``prior`` to probabilities in the widest dtype on the logits' device."""
    array = to_numpy(name, prior)
    if not any(np.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(f"{name}: expected {num_classes} real numbers, got {array.dtype}")
    if array.shape != (num_classes,):
        raise ValueError(
            f"{name}: expected one number per class, shape [{num_classes}], got {list(array.shape)}"
        )
    weights = torch.from_numpy(array.astype(np.float64)).to(widest_dtype(logits.device)).to(logits.device)
    enough = (weights >= 0).all() and weights.any() if zeros else (weights > 0).all()
    if not (weights.isfinite().all() and enough):
        expected = "non-negative values, not all zero" if zeros else "positive values"
        raise ValueError(f"{name}: expected finite, {expected}, got {describe(weights.tolist())}")
    # Divide by the largest first: the sum of huge counts could overflow.
    weights = weights / weights.max()
    return weights / weights.sum()
