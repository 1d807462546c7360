r"""Calibrated probabilities under any test prior, from logits and labels of a validation split.

The logits :math:`v` of a trained network hold a class prior, and they are overconfident or underconfident.
One number describes each: an exponent :math:`s` and a temperature :math:`t`. With these,

.. math:: p_q(j | x) = \mathrm{softmax}_j\bigl((v_j - s \log n_j) / t + \log q_j\bigr)

is the posterior under any class prior :math:`q`. :func:`fit` finds the two numbers that make the validation
labels most likely.

In theory, for cross entropy at its minimum, :math:`t = 1`, and :math:`s` follows from the loss, whose
``implied_prior()`` is :math:`\propto n^s`: 1 for softmax, 0 for balanced softmax,
:math:`1 - (1 + \tau) / K` for LGLA. Networks that are trained for long have a larger :math:`t`, and with it a
larger :math:`s`: if a temperature :math:`t` calibrates :math:`v + T(k, j)`, LGLA has :math:`s = t - (1 +
\tau) / K`. A fit usually lies between these two.

Sources: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, for the temperature; Menon et al.,
"Long-tail learning via logit adjustment", ICLR 2021, for the prior. The joint fit is our own.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lgla_losses._checks import (
    describe,
    floating_tensor,
    one_of,
    same_device,
    target_tensor,
    target_values,
)
from lgla_losses._counts import ArrayLike
from lgla_losses._fitting import (
    Judgement,
    Labelled,
    Outcome,
    Point,
    class_shares,
    fitted_point,
    judge,
    objective,
    outcome,
    sample_weights,
)
from lgla_losses._scores import scores
from lgla_losses._torch import values_readable
from lgla_losses.experts.output import ExpertOutput
from lgla_losses.functional import compute_dtype, widest_dtype
from lgla_losses.label_shift import class_prior, estimate_prior
from lgla_losses.losses._base import Loss

__all__ = ["Calibration", "Report", "Scores", "fit"]

#: Names for priors of a test set.
PRIORS = ("uniform", "estimated")
#: Standard deviations above which a chi-square statistic is not taken for chance.
BEYOND_CHANCE = 10
OTHER_FREQUENCIES = (
    "the labels do not have the class frequencies of training; if the split is balanced, pass "
    "validation_prior='uniform', else its frequencies"
)


class Scores(NamedTuple):
    """Hold the scores of predictions.

    Attributes:
        nll: mean negative log likelihood of the labels, in nats.
        ece: expected calibration error, 15 bins of equal width (Guo et al., 2017), 0 to 1.
        brier: mean squared distance from the one-hot label (Brier, 1950), 0 to 2.
        accuracy: share of the samples whose most likely class is the label.
        balanced_accuracy: mean of that share over classes, for predictions under the uniform prior.
    """

    nll: float
    ece: float
    brier: float
    accuracy: float
    balanced_accuracy: float


@dataclass(frozen=True)
class Report:
    """Report how a calibration performs on held-out folds of the validation split.

    Attributes:
        reason: why the calibration is used or not.
        num_samples: samples of the validation split.
        missing_classes: classes without samples in it.
        plain: scores of the softmax of the logits.
        calibrated: scores of the calibrated probabilities under the prior of the validation split, even if
            they are not used.
        gain: balanced accuracy that the calibration adds (or would add), over the classes with samples.
        standard_error: standard error of ``gain``. So few samples cannot show a true gain or loss below about
            twice this size.
    """

    reason: str
    num_samples: int
    missing_classes: tuple[int, ...]
    plain: Scores
    calibrated: Scores
    gain: float
    standard_error: float

    def __str__(self) -> str:
        missing = f", {len(self.missing_classes)} classes without any" if self.missing_classes else ""
        lines = [
            f"{self.num_samples} samples{missing}; {self.reason}",
            f"{'on held-out folds':20}{'plain':>10}{'calibrated':>12}",
        ]
        for name, before, after in zip(Scores._fields, self.plain, self.calibrated, strict=True):
            lines.append(f"{name.replace('_', ' '):20}{before:10.3f}{after:12.3f}")
        return "\n".join([*lines, f"{'gain':20}{self.gain:22.3f} +- {self.standard_error:.3f}"])


@dataclass(frozen=True)
class Calibration:
    """Turn logits into calibrated probabilities under a test prior; :func:`fit` makes one.

    It holds plain numbers: you can save it with pickle or ``torch.save``.

    Attributes:
        temperature: t, which divides the logits after their prior is removed; above 1 if they are
            overconfident. If ``used`` is False, it is fitted alone, and is 1 if that does not converge.
        exponent: s of n^s, the fitted prior of the logits; 0 if ``used`` is False. If the prior of the loss
            has another form, it is the slope over log n.
        used: False if held-out folds show no gain. Then the classes keep the order of their logits. The
            logits are taken to hold the prior of theory, or the uniform prior if that makes the labels more
            likely; a given or estimated prior replaces it.
        report: how the calibration performs on held-out folds.
        log_prior: log of the prior that the logits hold, ``C`` numbers with mean 0; -inf for masked classes.
    """

    temperature: float
    exponent: float
    used: bool
    report: Report
    log_prior: tuple[float, ...] = field(repr=False)

    def __str__(self) -> str:
        found = f"temperature {self.temperature:.2f}, exponent {self.exponent:.2f}"
        return f"{found}{'' if self.used else ', not used'}\n{self.report}"

    def logits(self, logits: Tensor | ExpertOutput, prior: ArrayLike | str | None = None) -> Tensor:
        """Compute the logarithm of the probabilities, up to a constant per sample.

        Args:
            logits: ``[N, C]`` of the calibrated network, or an :class:`~lgla_losses.ExpertOutput`, whose
                ensemble is used.
            prior: class prior of the test set, ``[C]``, at least 0; values of masked classes are ignored.
                With None or ``"uniform"`` all classes are equally frequent. With ``"estimated"``,
                :func:`~lgla_losses.label_shift.estimate_prior` finds the prior; then pass the whole test set
                in one call.

        Returns:
            ``[N, C]`` in float32, or float64 for float64 logits; -inf for masked classes.

        Raises:
            TypeError: logits are not a floating-point tensor, or a prior is not numbers.
            ValueError: the number of classes differs, or logits or a prior are out of range; values of logits
                are checked on the CPU only.
        """
        logits = logits.ensemble() if isinstance(logits, ExpertOutput) else logits
        logits = floating_tensor("logits", logits, "[N, C]")
        num_classes = len(self.log_prior)
        if logits.shape[1] != num_classes:
            raise ValueError(
                f"logits: expected [N, {num_classes}], the shape that the calibration was fitted to, got "
                f"{list(logits.shape)}"
            )

        dtype = compute_dtype(logits.dtype)
        held = torch.tensor(self.log_prior, dtype=dtype, device=logits.device)
        masked = held == -math.inf
        held = held.masked_fill(masked, 0.0)
        values = logits.to(dtype).masked_fill(masked, -math.inf)
        if values_readable(logits, None) and not (values < math.inf).all():
            raise ValueError(
                "logits: expected finite values, or -inf for masked classes, got NaN or infinity"
            )

        likelihood = (values - held) / self.temperature if self.used else values / self.temperature - held

        if prior is None or (isinstance(prior, str) and one_of("prior", prior, PRIORS) == "uniform"):
            return likelihood if self.used else values / self.temperature
        if isinstance(prior, str):
            found = likelihood.new_zeros(num_classes)
            uniform = torch.ones(int((~masked).sum()), device="cpu")
            found[~masked] = estimate_prior(likelihood[:, ~masked], uniform).to(dtype)
            return likelihood + found.log()

        given = class_prior("prior", prior, num_classes, logits, zeros=True)
        if not given[~masked].any():
            raise ValueError(
                "prior: expected a positive value for a class with training samples, got 0 for all of "
                f"them: {describe(given.tolist())}"
            )
        return likelihood + given.log().to(dtype)

    def probabilities(self, logits: Tensor | ExpertOutput, prior: ArrayLike | str | None = None) -> Tensor:
        """Compute class probabilities ``[N, C]`` under a test prior, from the arguments of :meth:`logits`."""
        return self.logits(logits, prior).softmax(dim=1)


@torch.no_grad()
def fit(
    logits: Tensor | ExpertOutput,
    target: Tensor,
    *,
    criterion: Loss | None = None,
    implied_prior: ArrayLike | None = None,
    class_counts: ArrayLike | None = None,
    validation_prior: ArrayLike | str | None = None,
) -> Calibration:
    r"""Fit temperature and exponent to a validation split, and judge them on held-out folds.

    The network must not have been trained on these samples. They are drawn like the training samples, so the
    classes have the training frequencies; if they have others, pass ``validation_prior``. Logits of
    cross-fitting also work: the logits of each sample come from a network that has not seen it.

    If the split is small, a weak prior on the two numbers decides: a normal distribution around values usual
    for trained networks. Each of five folds is predicted by a fit to the other four. The calibration is used
    if two conditions hold: the held-out labels are more likely, by more than the standard error, than if the
    logits held the uniform prior; and balanced accuracy does not fall by more than its standard error.

    Args:
        logits: ``[M, C]``, finite; or an :class:`~lgla_losses.ExpertOutput`, whose ensemble is used.
        target: class indices, int64 ``[M]``. Classes may be missing; rare ones often are.
        criterion: the loss that the network was trained with; it provides the next two arguments.
        implied_prior: the prior that the logits hold in theory ``[C]``, such as
            ``criterion.implied_prior()``: the training frequencies for softmax, equal numbers for balanced
            softmax. None means softmax.
        class_counts: training samples per class ``[C]``. A class with count 0 is masked: its probability is
            0.
        validation_prior: class prior of the validation samples: ``"uniform"``, or ``[C]``. None means that of
            training. Labels far from it give a warning, and the calibration is not used.

    Returns:
        The calibration; its ``report`` has scores, missing classes and the standard error of the gain.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there are fewer than two samples, or only one class; shapes do not fit; a value is out of
            range; there is neither ``criterion`` nor ``class_counts``, or ``criterion`` together with an
            argument that it provides.

    Example:
        >>> target = torch.arange(4).repeat_interleave(torch.tensor([80, 40, 20, 10]))
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 4 * (torch.eye(4)[target] + torch.randn(150, 4, generator=generator))
        >>> calibration = fit(logits, target, class_counts=[800, 400, 200, 100], implied_prior=[1, 1, 1, 1])
        >>> calibration.temperature > 2
        True
        >>> calibration.probabilities(logits[:2], prior=[0.4, 0.3, 0.2, 0.1]).shape
        torch.Size([2, 4])
    """
    logits = _ensemble_logits(logits, criterion)
    num_classes = logits.shape[1]
    target = target_tensor(target, [len(logits)])
    _check_samples(logits, target)
    counts, implied = _training_priors(criterion, class_counts, implied_prior, logits)
    split = _split_prior(validation_prior, counts, logits)

    kept = (counts > 0) & (implied > 0)
    _check_possible(target, kept & (split > 0))
    missing = (torch.bincount(target, minlength=num_classes) == 0).nonzero()[:, 0]

    # Masked classes are left out: the others get new numbers.
    own = (kept.cumsum(0) - 1)[target]
    log_counts, log_split = counts[kept].log(), split[kept].log()
    data = Labelled(
        logits=logits[:, kept],
        target=own,
        weight=sample_weights(log_split, own),
        implied=implied[kept].log(),
        log_counts=log_counts - log_counts.mean(),
        split=log_split,
    )
    if not data.logits.isfinite().all():
        raise ValueError(
            "logits: expected finite values, got NaN or infinity; leave such samples out, and mark masked "
            "classes by a class count of 0"
        )

    both, alone, as_it_is = fitted_point(data), fitted_point(data.ranked()), Point(1.0, 0.0)
    judged = judge(data, both, alone)
    unused = _why_unused(judged, both is not None and alone is not None)
    if validation_prior is None and _has_other_frequencies(own, log_split):
        unused = f"not used: {OTHER_FREQUENCIES}"
        warnings.warn(f"calibration.fit: {OTHER_FREQUENCIES}", stacklevel=3)

    if unused:
        log_prior, point = _as_they_are(data, alone)
    else:
        point = both or as_it_is
        log_prior = data.implied - point.b / point.a * data.log_counts
    whole = torch.full_like(counts, -math.inf)
    whole[kept] = log_prior - log_prior.mean()

    plain = outcome(data.ranked(), as_it_is, torch.zeros_like(data.split))
    report = Report(
        reason=unused or "used: held-out labels are more likely than under the uniform prior",
        num_samples=len(target),
        missing_classes=tuple(missing.tolist()),
        plain=_scores(plain, own),
        calibrated=_scores(judged.calibrated, own),
        gain=judged.accuracy[0],
        standard_error=judged.accuracy[1],
    )
    exponent = 0.0 if unused else _slope(log_prior, data.log_counts)
    return Calibration(1 / point.a, exponent, unused is None, report, tuple(whole.tolist()))


def _as_they_are(data: Labelled, alone: Point | None) -> tuple[Tensor, Point]:
    """Give the log prior of unchanged logits, uniform or of theory, and their temperature."""
    uniform, of_theory = data.ranked(), data.ranked()._replace(split=data.split - 2 * data.implied)
    found = [
        (objective(view, point)[0], log_prior, point)
        for view, log_prior, point in (
            (uniform, torch.zeros_like(data.implied), alone),
            (of_theory, data.implied, fitted_point(of_theory)),
        )
        if point is not None
    ]
    if not found:
        return data.implied, Point(1.0, 0.0)
    _, log_prior, point = min(found, key=lambda item: item[0])
    return log_prior, point


def _has_other_frequencies(target: Tensor, log_split: Tensor) -> bool:
    """Say whether the class frequencies of labels differ from those of training, far beyond chance."""
    expected = log_split.softmax(dim=0) * len(target)
    found = torch.bincount(target, minlength=len(expected))
    # Classes with few expected samples are counted together, as a chi-square test requires.
    few = expected < 5
    expected, found = (
        torch.cat([values[~few], values[few].sum(dim=0, keepdim=True)]) for values in (expected, found)
    )
    statistic = float(((found - expected).square() / expected.clamp_min(5)).sum())
    freedom = len(expected) - 1
    return statistic > freedom + BEYOND_CHANCE * math.sqrt(2 * max(1, freedom))


def _why_unused(judged: Judgement, converged: bool) -> str | None:
    """Say why to keep the order of the logits; None if the calibration gains."""
    if not (converged and judged.converged):
        return "not used: a fit did not converge"
    if judged.likelihood[0] <= judged.likelihood[1] + 1e-9:  # equal models differ by rounding
        return "not used: held-out labels are not clearly more likely than under the uniform prior"
    if judged.accuracy[0] < -judged.accuracy[1]:
        return "not used: balanced accuracy falls on held-out folds"
    return None


def _slope(values: Tensor, log_counts: Tensor) -> float:
    """Compute the slope of values ``[C]`` over log counts with mean 0; 0 if all counts are equal."""
    square = float(log_counts.square().sum())
    return float(values @ log_counts) / square if square > 1e-12 else 0.0


def _scores(found: Outcome, target: Tensor) -> Scores:
    means = scores(found.sums, "samples")
    accuracy = int(found.sums.correct.sum()) / len(target)
    balanced = class_shares(target)[found.right].sum()
    return Scores(
        *(float(value) for value in (means["nll"], means["ece"], means["brier"], accuracy, balanced))
    )


def _ensemble_logits(logits: Tensor | ExpertOutput, criterion: Loss | None) -> Tensor:
    """Check the logits and the loss; give the logits of the ensemble ``[M, C]``."""
    if criterion is not None and not isinstance(criterion, Loss):
        raise TypeError(
            f"criterion: expected a loss of lgla_losses, got {describe(criterion)}; for another loss pass "
            "class_counts=, and implied_prior= if it is not softmax cross entropy"
        )
    if isinstance(logits, ExpertOutput):
        num_experts = getattr(criterion, "num_experts", None)
        if num_experts is not None and logits.logits.shape[1] != num_experts:
            raise ValueError(
                f"logits: expected [M, {num_experts}, C] of {num_experts} experts, as criterion has, got "
                f"{list(logits.logits.shape)}"
            )
        logits = logits.ensemble()
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits: expected a tensor [M, C], got {describe(logits)}; convert an array with "
            "torch.as_tensor(logits), and pass the mean of several networks"
        )
    if logits.dim() > 2:
        raise ValueError(
            f"logits: expected the ensemble's [M, C], got {list(logits.shape)}; pass output.ensemble(), or "
            "logits.mean(dim=1) of [M, K, C], and for maps logits.movedim(1, -1).flatten(0, -2)"
        )
    if logits.is_meta:
        raise ValueError("logits: expected values, got a tensor on meta, which has none")
    return floating_tensor("logits", logits, "[M, C]")


def _check_samples(logits: Tensor, target: Tensor) -> None:
    num_samples, num_classes = logits.shape
    if num_classes < 2:
        raise ValueError(f"logits: expected at least two classes [M, C], got {list(logits.shape)}")
    if num_samples < 2:
        raise ValueError(f"logits: expected at least two samples, got {num_samples}; hold out a few hundred")
    same_device(logits=logits, target=target)
    target_values(target, num_classes)
    if (target == target[0]).all():
        raise ValueError(
            f"target: expected at least two classes, got {num_samples} samples of class {int(target[0])}; "
            "hold out samples at random"
        )


def _training_priors(
    criterion: Loss | None, class_counts: ArrayLike | None, implied_prior: ArrayLike | None, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the training frequencies and the prior that the logits hold in theory, ``[C]`` each."""
    num_classes = logits.shape[1]
    if criterion is None:
        if class_counts is None:
            raise ValueError(
                f"class_counts: expected the training samples per class, shape [{num_classes}], got None; "
                "pass class_counts= and implied_prior=, or criterion="
            )
        counts = class_prior("class_counts", class_counts, num_classes, logits, zeros=True)
        if implied_prior is None:
            return counts, counts
        return counts, class_prior("implied_prior", implied_prior, num_classes, logits, zeros=True)

    if class_counts is not None or implied_prior is not None:
        raise ValueError(
            "criterion: expected None together with class_counts or implied_prior, which it provides, got "
            "both; leave one out"
        )
    counts, implied = criterion._training_counts(), criterion.implied_prior()
    if len(counts) != num_classes:
        raise ValueError(
            f"logits: expected [M, {len(counts)}] for the {len(counts)} classes of criterion, got "
            f"{list(logits.shape)}"
        )
    counts, implied = (values.to(logits.device, widest_dtype(logits.device)) for values in (counts, implied))
    return counts / counts.sum(), implied


def _split_prior(validation_prior: ArrayLike | str | None, counts: Tensor, logits: Tensor) -> Tensor:
    """Give the class prior of the validation samples ``[C]``."""
    if validation_prior is None:
        return counts
    if isinstance(validation_prior, str):
        if validation_prior != "uniform":
            raise ValueError(
                f"validation_prior: expected 'uniform', frequencies [C], or None for those of training, got "
                f"{validation_prior!r}"
            )
        return torch.full_like(counts, 1 / len(counts))
    return class_prior("validation_prior", validation_prior, len(counts), logits, zeros=True)


def _check_possible(target: Tensor, possible: Tensor) -> None:
    wrong = target[~possible[target]]
    if len(wrong):
        raise ValueError(
            "target: expected classes whose class count, implied prior and validation prior are above 0, got "
            f"class {int(wrong[0])} ({len(wrong)} such samples); leave them out"
        )


# Let torch.load read these classes without weights_only=False.
torch.serialization.add_safe_globals([Calibration, Report, Scores])
