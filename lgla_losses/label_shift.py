r"""The class prior of a test set without labels, and predictions under it.

Both functions hold where the classes look alike in training and test, :math:`p(x|j)` unchanged, and the
logits are calibrated: log-likelihood plus log prior, up to a constant per sample. Overconfident logits, as
of networks trained for long, bias the estimate, and so do hard-sample weights (``aaw=True``); calibrate the
logits on held-out data first. Where classes are many and the model weak, the likelihood alone fits noise:
``smoothing`` holds the estimate back.

Source: Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori
Probabilities: A Simple Procedure", Neural Computation 14(1), 2002.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lgla_losses._checks import describe, finite_float, floating_tensor, positive_int
from lgla_losses._counts import ArrayLike, to_numpy
from lgla_losses._torch import values_readable
from lgla_losses.functional import compute_dtype, widest_dtype

__all__ = ["estimate_prior", "shift_prior"]


@torch.no_grad()
def estimate_prior(
    logits: Tensor,
    prior: ArrayLike,
    *,
    smoothing: float = 0.0,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
) -> Tensor:
    r"""Estimate the class prior under which the samples are most likely, by expectation maximisation.

    From :math:`p = p_{prior}` on, repeats

    .. math:: p_j \leftarrow \frac{1}{N} \sum_i
        \mathrm{softmax}_j(v_i + \log p - \log p_{prior}).

    The likelihood is concave in :math:`p` and never falls, so the limit maximises it. See the module for when
    it is sound.

    Source: Saerens et al., 2002.

    Args:
        logits: finite log-likelihood plus log ``prior`` ``[N, C]``, up to a constant per sample.
        prior: what the logits hold, positive ``[C]``, divided by its sum; of an LGLA ensemble
            ``criterion.adjuster.implied_prior()``.
        smoothing: evenly spread samples that count beside the test samples, per test sample: 0 trusts the
            likelihood alone, 1 weighs it as much as the uniform distribution.
        max_steps: most steps, at least 1.
        tolerance: stops when no probability changes by more.

    Returns:
        Probabilities ``[C]`` in float64 (float32 on MPS), without gradient.

    Raises:
        TypeError: logits are not a floating-point tensor, the prior not numbers.
        ValueError: shapes do not fit, there is no sample, or a value is not finite or not positive.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 9.0]])
        >>> estimate_prior(logits, prior=[0.5, 0.5])
        tensor([0.2499, 0.7501], dtype=torch.float64)
    """
    num_classes = _check_logits(logits)
    max_steps = positive_int("max_steps", max_steps, "it bounds the loop")
    smoothing = finite_float("smoothing", smoothing, low=0.0, high=math.inf, expected="a finite number >= 0")
    tolerance = finite_float("tolerance", tolerance, low=0.0, high=math.inf, expected="a finite number >= 0")
    if len(logits) == 0:
        raise ValueError("logits: expected at least one sample [N, C], got none; leave empty test sets out")
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite values, got NaN or infinity; leave masked classes out")

    p = _check_prior("prior", prior, num_classes, logits)
    log_likelihood = logits.to(p.dtype) - p.log()
    # Every sample's likelihoods are divided by their largest, which the posterior does not see.
    likelihood = (log_likelihood - log_likelihood.amax(dim=1, keepdim=True)).exp()

    for _ in range(max_steps):
        evidence = likelihood @ p
        before, p = p, p * (evidence.reciprocal() @ likelihood) / len(logits) + smoothing / num_classes
        p = p / p.sum()
        if (p - before).abs().max() <= tolerance:
            break

    return p


def shift_prior(logits: Tensor, prior: ArrayLike, new_prior: ArrayLike) -> Tensor:
    r"""Shift logits to another class prior: :math:`v + \log p_{new} - \log p_{prior}`.

    See the module for when it is sound.

    Source: Saerens et al., 2002.

    Args:
        logits: log-likelihood plus log ``prior`` ``[N, C]``; -inf masks a class.
        prior: what the logits hold, positive ``[C]``, divided by its sum.
        new_prior: what they are to hold, non-negative ``[C]``, divided by its sum; a class of
            probability 0 gets -inf.

    Returns:
        ``[N, C]`` in the logits' dtype.

    Raises:
        TypeError: logits are not a floating-point tensor, a prior not numbers.
        ValueError: shapes do not fit, or a value is NaN, infinite or negative; logits are read on the CPU
            only.

    Example:
        >>> shift_prior(torch.zeros(1, 2), prior=[0.5, 0.5], new_prior=[0.5, 0.0])
        tensor([[0.6931,   -inf]])
    """
    num_classes = _check_logits(logits)
    if values_readable(logits, None) and not (logits < math.inf).all():
        raise ValueError("logits: expected finite values, or -inf for masked classes, got NaN or infinity")
    old = _check_prior("prior", prior, num_classes, logits)
    new = _check_prior("new_prior", new_prior, num_classes, logits, zeros=True)
    dtype = compute_dtype(logits.dtype)
    return (logits.to(dtype) + (new.log() - old.log()).to(dtype)).to(logits.dtype)


def _check_logits(logits: Tensor) -> int:
    num_classes = floating_tensor("logits", logits, "[N, C]").shape[1]
    if num_classes == 0:
        raise ValueError(f"logits: expected [N, C] with a class or more, got {list(logits.shape)}")
    return num_classes


def _check_prior(
    name: str, prior: ArrayLike, num_classes: int, logits: Tensor, zeros: bool = False
) -> Tensor:
    """Convert ``prior`` to probabilities in the widest dtype on the logits' device."""
    array = to_numpy(name, prior)
    if not any(np.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(f"{name}: expected {num_classes} real numbers, got {array.dtype}")
    if array.shape != (num_classes,):
        raise ValueError(
            f"{name}: expected one probability for each of {num_classes} classes, shape [{num_classes}], "
            f"got {list(array.shape)}"
        )
    weights = torch.from_numpy(array.astype(np.float64)).to(widest_dtype(logits.device)).to(logits.device)
    enough = (weights >= 0).all() and weights.any() if zeros else (weights > 0).all()
    if not (weights.isfinite().all() and enough):
        expected = "non-negative values, not all zero" if zeros else "positive values"
        raise ValueError(f"{name}: expected finite, {expected}, got {describe(weights.tolist())}")
    # The largest first: the sum of huge counts could overflow.
    weights = weights / weights.max()
    return weights / weights.sum()
