"""Accuracy over the prior that is taken out of the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from lgla_losses._checks import describe, floating_tensor, target_tensor, target_values
from lgla_losses._counts import ArrayLike, as_class_counts
from lgla_losses.calibration import Calibration
from lgla_losses.experts.output import ExpertOutput
from lgla_losses.functional import compute_dtype
from lgla_losses.plot.canvas import given_axes
from lgla_losses.plot.recall import all_and_shot_splits, draw_recalls, mean_recalls, number_grid
from lgla_losses.plot.style import REFERENCE, ink, legend, numbers


def plot_prior_shift(
    logits: Tensor | ExpertOutput,
    target: Tensor,
    class_counts: ArrayLike,
    exponents: Sequence[float] | None = None,
    *,
    calibration: Calibration | None = None,
    many: float = 100,
    few: float = 20,
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the accuracy by split as the prior :math:`n^s` is taken out of the logits, over :math:`s`.

    The prediction is the largest of :math:`v_j - s \log n_j`. Where "all classes" is highest, the logits hold
    about :math:`n^s`. One line marks 0, the logits as they are, another the exponent of the calibration. A
    split without test samples has no line. Choose ``s`` on validation data, not on the test set.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Eq. 9 of arXiv:2007.07314.

    Args:
        logits: ``[N, C]``, or an :class:`~lgla_losses.ExpertOutput`, whose ensemble is taken.
        target: class indices, int64 ``[N]``.
        class_counts: training samples per class ``[C]``, at least 0; a class without samples is few-shot and
            never predicted.
        exponents: the values of ``s`` ``[W]``; None for -1, -0.9 to 2.
        calibration: the result of :func:`lgla_losses.calibration.fit`.
        many: many-shot classes have more training samples.
        few: few-shot classes have fewer; at most ``many``.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with mean per-class recalls in percent.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, there is no sample, or a value is out of range.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [1.0, 0.0]])
        >>> axes = plot_prior_shift(logits, torch.tensor([0, 1]), [500, 5], [0.0, 1.0, 2.0])
        >>> [line.get_ydata().tolist() for line in axes.get_lines() if line.get_label() == "all classes"]
        [[50.0, 100.0, 50.0]]
    """
    counts = as_class_counts(class_counts, "mask")
    if isinstance(logits, ExpertOutput):
        logits = logits.ensemble()
    floating_tensor("logits", logits, "[N, C]")
    if len(logits) == 0 or logits.shape[1] != len(counts):
        raise ValueError(
            f"logits: expected shape [N, {len(counts)}] as class_counts says, of one sample or more, got "
            f"{list(logits.shape)}"
        )
    target = target_tensor(target, logits.shape[:1]).cpu()
    target_values(target, len(counts))
    if logits.isnan().any() or logits.isposinf().any():
        raise ValueError("logits: expected finite values, or -inf for masked classes, got NaN or +inf")
    if exponents is None:
        exponents = [i / 10 for i in range(-10, 21)]
    grid = number_grid(
        "exponents", exponents, "exponent", low=-math.inf, high=math.inf, expected="finite exponents of n"
    )
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(
            "calibration: expected what lgla_losses.calibration.fit returns, or None, got "
            f"{describe(calibration)}"
        )

    splits = all_and_shot_splits(counts, many, few)
    values = logits.detach().to(compute_dtype(logits.dtype))
    values = values.masked_fill((counts == 0).to(values.device), -math.inf)
    log_counts = torch.where(counts > 0, counts, 1).log().to(values)
    recalls = [mean_recalls((values - s * log_counts).argmax(dim=1).cpu(), target, splits) for s in grid]

    axes = given_axes(ax)
    unused = calibration is not None and not calibration.used
    label = f"logits as they are: s = 0{', calibration not used' if unused else ''}"
    axes.axvline(0, color=REFERENCE, linewidth=1.5, label=label)
    if calibration is not None and calibration.used:
        found = calibration.exponent
        label = f"found by calibration: s = {found:.2f}"
        axes.axvline(found, color=ink(axes), linewidth=1.2, linestyle="dashdot", label=label)
    draw_recalls(axes, grid, numbers(100 * torch.stack(recalls)))
    axes.set_xlabel("s, where the prior n^s is taken out of the logits")
    axes.set_ylabel("mean per-class accuracy (%)")
    legend(axes)
    return axes
