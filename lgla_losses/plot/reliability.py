"""Accuracy over the confidence of the predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from lgla_losses._checks import one_of, positive_int
from lgla_losses._scores import AVERAGES, check_predictions, label_weights, score_sums, scores
from lgla_losses.plot.canvas import given_axes
from lgla_losses.plot.style import METHODS, REFERENCE, legend, line_styles, numbers


def plot_reliability(
    probabilities: Tensor | Mapping[str, Tensor],
    target: Tensor,
    *,
    average: str = "samples",
    bins: int = 15,
    ax: Axes | None = None,
) -> Axes:
    """Plot accuracy over confidence, the largest probability: a reliability diagram.

    A point is the mean over the samples of a bin. Below the diagonal the network is overconfident. The steps
    at the bottom show the share of the samples in each bin; a point of few samples says little. The expected
    calibration error is the mean distance from the diagonal, as in
    :class:`~lgla_losses.metrics.ProbabilityScores`.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2 and Fig. 1.

    Args:
        probabilities: class probabilities ``[N, C]``, or several of the same samples by name. The last is
            drawn as the most important, the others are grey; but ``"softmax"``, ``"balanced softmax"`` and
            ``"LGLA"`` have the colours of these methods.
        target: class indices, int64 ``[N]``.
        average: ``"samples"`` weights all samples equally, ``"classes"`` all classes that have samples.
        bins: number of bins of equal width from 0 to 1.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with percent.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, there is no sample, or a row is not a probability vector.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> axes = plot_reliability(probabilities, torch.tensor([0, 1]))
        >>> axes.get_title()
        'expected calibration error 25.0 %'
    """
    named = probabilities if isinstance(probabilities, Mapping) else {"network": probabilities}
    if not named:
        raise ValueError("probabilities: expected class probabilities by name, got an empty mapping")
    one_of("average", average, AVERAGES)
    bins = positive_int("bins", bins, "it is the number of bins of confidence")
    sums = {}
    for name, rows in named.items():
        rows, labels = check_predictions(rows, target, validate_args=True)
        if len(labels) == 0:
            raise ValueError("probabilities: expected one sample or more [N, C], got none")
        sums[name] = score_sums(rows.detach(), labels, bins)

    axes = given_axes(ax)
    axes.set_box_aspect(1)
    axes.plot([0, 100], [0, 100], color=REFERENCE, linewidth=1.0, label="perfect calibration")
    edges = np.linspace(0, 100, bins + 1)
    styles = line_styles(axes, list(sums), bins, [REFERENCE])
    for (name, of_bins), style in zip(sums.items(), styles, strict=True):
        weights = label_weights(of_bins, average)
        share, correct, confidence = (
            numbers(100 * (weights @ by_label.to(weights.dtype))) for by_label in of_bins[:3]
        )
        style["color"] = METHODS.get(name, style["color"])
        error = f"{100 * scores(of_bins, average)['ece']:.1f} %"
        seen = share > 0
        if len(sums) == 1:
            axes.set_title(f"expected calibration error {error}", fontsize="medium")
        else:
            style["label"] = f"{name}:\ncalibration error {error}"
        axes.plot(100 * confidence[seen] / share[seen], 100 * correct[seen] / share[seen], **style)
        axes.stairs(share, edges, color=style["color"], linestyle=style["linestyle"], linewidth=1.0)

    axes.patches[-1].set_label("share of the samples")
    axes.set_xlabel("confidence: the largest probability (%)")
    axes.set_ylabel("accuracy (%)")
    legend(axes)
    return axes
