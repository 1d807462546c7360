r"""The fit of temperature and exponent to labelled logits, and its test on held-out folds.

With :math:`a = 1 / t` and :math:`x_j = v_j - \log \pi_j`, the logits without the prior of theory, the
posterior of :mod:`lgla_losses.calibration` is :math:`\mathrm{softmax}_j(a x_j + b \log n_j + \log q_j)`: a
logistic regression with two coefficients, whose log likelihood is concave.

Labels with prior :math:`q` tell much about frequent classes and little about rare ones, but under a uniform
prior all are equally important. So samples have weights :math:`\propto q_y^{-1/2}`, which makes their prior
:math:`\propto q^{1/2}`, half way between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lgla_losses._scores import ScoreSums, score_sums
from lgla_losses.functional import widest_dtype

#: The prior for trained networks, before any label is seen: log a is normal around log 0.75,
USUAL, SPREAD_OF_LOG = 0.75, 0.5
#: and b around (a - 1) / 2, half of its value if v + T(k, j) is calibrated.
SPREAD_OF_SHIFT = 0.2

FOLDS = 5
MOST_STEPS = 100
#: A fit has converged if a step lowers the objective by less than this share, or by less than rounding.
TOLERANCE = 1e-10
#: Logits are read in parts of this many numbers.
PART = 1 << 22


class Point(NamedTuple):
    """The coefficients of the regression."""

    a: float
    b: float


START = Point(USUAL, (USUAL - 1) / 2)


class Labelled(NamedTuple):
    """Hold logits ``[M, C]`` and labels ``[M]``, and log priors ``[C]``.

    Attributes:
        logits: in any floating-point dtype.
        target: class indices.
        weight: weight of every sample ``[M]``.
        implied: log of the prior that the logits hold in theory.
        log_counts: log of the class counts, with mean 0.
        split: log of the prior of the labels.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor
    implied: Tensor
    log_counts: Tensor
    split: Tensor

    def chosen(self, which: Tensor) -> Labelled:
        """Select the samples of a mask."""
        samples = {"logits": self.logits, "target": self.target, "weight": self.weight}
        return self._replace(**{name: values[which] for name, values in samples.items()})

    def ranked(self) -> Labelled:
        """Give the same without a prior to remove, so that a fit keeps the ranking of the logits."""
        zeros = torch.zeros_like(self.log_counts)
        return self._replace(implied=zeros, log_counts=zeros)

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over ``x``, labels and weights, in parts that fit into memory."""
        rows = max(1, PART // self.logits.shape[1])
        for logits, target, weight in zip(
            self.logits.split(rows), self.target.split(rows), self.weight.split(rows), strict=True
        ):
            x = logits.to(self.implied.dtype) - self.implied
            yield x - x.amax(dim=1, keepdim=True), target, weight


def sample_weights(split: Tensor, target: Tensor) -> Tensor:
    """Compute weights ``[M]``; their sum is the effective number of samples (Kish, 1965)."""
    weight = (-split[target] / 2).exp()
    return weight * weight.sum() / weight.square().sum()


def objective(data: Labelled, point: Point) -> tuple[float, Tensor, Tensor]:
    """Compute the negative log of likelihood times prior, its gradient and a positive Hessian."""
    log_counts = data.log_counts
    value, gradient, hessian = (log_counts.new_zeros(shape) for shape in ((), (2,), (2, 2)))

    for x, target, weight in data.parts():
        log_p = (point.a * x + point.b * log_counts + data.split / 2).log_softmax(dim=1)
        value -= log_p.gather(1, target[:, None])[:, 0] @ weight

        # Means and covariance of the two features, x_j and log n_j, under the posterior of every sample.
        p = log_p.exp()
        means = torch.stack([(p * x).sum(1), p @ log_counts])
        at_label = torch.stack([x.gather(1, target[:, None])[:, 0], log_counts[target]])
        mixed = (p * x) @ log_counts
        squares = torch.stack([(p * x.square()).sum(1), mixed, mixed, p @ log_counts.square()])
        gradient += (means - at_label) @ weight
        hessian += (squares @ weight).view(2, 2) - means * weight @ means.T

    residuals = gradient.new_tensor(
        [math.log(point.a / USUAL) / SPREAD_OF_LOG, (point.b - (point.a - 1) / 2) / SPREAD_OF_SHIFT]
    )
    slopes = gradient.new_tensor(
        [[1 / (SPREAD_OF_LOG * point.a), 0.0], [-0.5 / SPREAD_OF_SHIFT, 1 / SPREAD_OF_SHIFT]]
    )
    value += residuals.square().sum() / 2
    hessian += slopes.T @ slopes
    # Below the usual value, log a curves more than its slope shows; above, it curves less, and a step may be
    # short.
    hessian[0, 0] += max(0.0, -math.log(point.a / USUAL)) / (SPREAD_OF_LOG * point.a) ** 2
    # Two numbers are too little work for a device.
    return float(value), (gradient + residuals @ slopes).cpu(), hessian.cpu()


def fitted_point(data: Labelled, start: Point | None = None) -> Point | None:
    """Find the most likely coefficients by Newton's method; None if it does not converge."""
    point = start or START
    value, gradient, hessian = objective(data, point)
    tolerance = max(TOLERANCE, 10 * torch.finfo(gradient.dtype).eps)

    for _ in range(MOST_STEPS):
        step = torch.linalg.solve(hessian, gradient)
        descent = float(gradient @ step)
        if not (math.isfinite(value) and math.isfinite(descent)):
            return None
        if descent <= tolerance * max(1.0, abs(value)):
            return point

        length = 1.0
        while length > 1e-9:
            trial = Point(point.a - length * float(step[0]), point.b - length * float(step[1]))
            if trial.a > 0:
                found = objective(data, trial)
                if found[0] <= value - 1e-4 * length * descent:
                    break
            length /= 2
        else:
            return None
        point, (value, gradient, hessian) = trial, found

    return None


class Outcome(NamedTuple):
    """Hold how good the predictions of labelled samples are.

    Attributes:
        right: whether the most likely class under the uniform prior is the label ``[M]``.
        sums: sums from which the scores under another prior follow.
    """

    right: Tensor
    sums: ScoreSums


def outcome(data: Labelled, point: Point, prior: Tensor) -> Outcome:
    """Predict the samples at ``point``; ``prior`` is the log prior for the scores ``[C]``."""
    rights, sums = [], []
    for x, target, _ in data.parts():
        scores = point.a * x + point.b * data.log_counts
        rights.append(scores.argmax(dim=1) == target)
        sums.append(score_sums((scores + prior).softmax(dim=1), target, bins=15))
    return Outcome(torch.cat(rights), total(sums))


def total(sums: list[ScoreSums]) -> ScoreSums:
    """Add up the sums of several parts."""
    return ScoreSums(*(torch.stack(values).sum(0) for values in zip(*sums, strict=True)))


def log_likelihood(data: Labelled, point: Point) -> Tensor:
    """Compute the log probability of every label, under the prior of the weighted samples ``[M]``."""
    parts = []
    for x, target, _ in data.parts():
        log_p = (point.a * x + point.b * data.log_counts + data.split / 2).log_softmax(dim=1)
        parts.append(log_p.gather(1, target[:, None])[:, 0])
    return torch.cat(parts)


class Judgement(NamedTuple):
    """Hold the results on held-out folds.

    Attributes:
        calibrated: the outcome of all samples, each calibrated with the other folds.
        likelihood: gain in mean log likelihood of the labels over a temperature alone, and its standard
            error.
        accuracy: gain in balanced accuracy over the logits, and its standard error.
        converged: whether every fit converged.
    """

    calibrated: Outcome
    likelihood: tuple[float, float]
    accuracy: tuple[float, float]
    converged: bool


def judge(data: Labelled, near: Point | None = None, near_alone: Point | None = None) -> Judgement:
    """Compare the calibration with a temperature alone, on folds that neither was fitted on.

    The result does not depend on the points ``near``; starting there, Newton's method needs fewer steps.
    """
    fold = folds(data.target)
    likelier, right = torch.zeros_like(data.weight), torch.zeros_like(data.target, dtype=torch.bool)
    sums, converged = [], True

    for held_out in range(int(fold.max()) + 1):
        here = fold == held_out
        rest, part = data.chosen(~here), data.chosen(here)
        alone, both = fitted_point(rest.ranked(), near_alone), fitted_point(rest, near)
        converged = converged and alone is not None and both is not None

        likelier[here] = log_likelihood(part, both or START) - log_likelihood(part.ranked(), alone or START)
        calibrated = outcome(part, both or START, data.split)
        right[here] = calibrated.right
        sums.append(calibrated.sums)

    change = right.to(likelier.dtype) - (data.logits.argmax(dim=1) == data.target).to(likelier.dtype)
    by_sample, by_class = data.weight / data.weight.sum(), class_shares(data.target)
    likelihood, accuracy = likelier @ by_sample, change @ by_class
    errors = [
        ((likelier - likelihood) * by_sample).norm(),
        ((change - accuracy) * by_class).norm(),
        # Classes with one or two samples have no useful variance: the variance of all samples replaces it.
        change.var(correction=0).sqrt() * by_class.norm(),
    ]
    return Judgement(
        calibrated=Outcome(right, total(sums)),
        likelihood=(float(likelihood), float(errors[0])),
        accuracy=(float(accuracy), float(max(errors[1:]))),
        converged=converged,
    )


def folds(target: Tensor) -> Tensor:
    """Distribute the samples of every class over the folds ``[M]``, at random but equal in every run."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shuffled = torch.randperm(len(target), generator=generator, device="cpu").to(target.device)
    dealt = shuffled[target[shuffled].argsort(stable=True)]
    fold = torch.empty_like(target)
    fold[dealt] = torch.arange(len(target), device=target.device) % min(FOLDS, len(target))
    return fold


def class_shares(target: Tensor) -> Tensor:
    """Give weights ``[M]`` that sum to 1 and are equal in total for every class with samples."""
    share = torch.bincount(target)[target].to(widest_dtype(target.device)).reciprocal()
    return share / share.sum()
