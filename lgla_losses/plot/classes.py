"""Curves over the classes: their groups, the norms of their weights, the prior of an ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lgla_losses._checks import floating_tensor
from lgla_losses._counts import ArrayLike, as_class_counts
from lgla_losses.adjustment import CLALogitAdjuster, check_adjuster
from lgla_losses.grouping import ClassGrouper, check_grouper
from lgla_losses.plot.canvas import given_axes
from lgla_losses.plot.class_axis import by_frequency, class_axis, class_edges, class_names
from lgla_losses.plot.style import (
    HATCHES,
    REFERENCE,
    Numbers,
    color,
    expert_names,
    ink,
    legend,
    line_styles,
    numbers,
)
from lgla_losses.plot.ticks import plain_number, plain_numbers

#: From this many classes on, noisy curves are smoothed.
MANY_CLASSES = 100


def plot_groups(grouper: ClassGrouper, *, names: Iterable[str] | None = None, ax: Axes | None = None) -> Axes:
    r"""Plot the partition of the classes over their frequencies: one area for each group.

    The legend gives the number of classes and of samples of every group. The partition makes the samples as
    equal as it can. A background has its own area. Classes without samples are not drawn.

    Source: Tao et al., ICCV 2023, section 3.2.

    Args:
        grouper: the groups of the classes.
        names: of the classes ``[C]``, shown in place of their indices; None shows indices.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with training samples (logarithmic) by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is not one name for each class.

    Example:
        >>> axes = plot_groups(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['group 1: 1 class\n500 samples (50 %)', 'group 2: 3 classes\n500 samples (50 %)']
    """
    check_grouper(grouper)
    names = class_names(names, grouper.num_classes)
    axes = given_axes(ax)

    order, counts, group = by_frequency(grouper)
    edges = class_edges(len(counts))
    bottom = counts.min() / 1.6

    sizes, masses = grouper.group_sizes.tolist(), grouper.group_masses.tolist()
    for g, (size, mass) in enumerate(zip(sizes, masses, strict=True)):
        label = (
            f"group {g + 1}: {size:,} {'class' if size == 1 else 'classes'}\n"
            f"{plain_number(mass)} samples ({100 * mass / sum(masses):.0f} %)"
        )
        own = np.where(group == g, counts, np.nan)
        look: dict[str, Any] = {"facecolor": color(g), "alpha": 0.75, "hatch": HATCHES[g % len(HATCHES)]}
        look |= {"edgecolor": (1, 1, 1, 0.7), "linewidth": 0}
        axes.stairs(own, edges, baseline=bottom, fill=True, label=label, **look)

    if (group < 0).any():
        left_out = np.where(group < 0, counts, np.nan)
        label = f"background\n{plain_number(np.nansum(left_out))} samples"
        axes.stairs(left_out, edges, baseline=bottom, fill=True, color=ink(axes), alpha=0.25, label=label)

    axes.stairs(counts, edges, baseline=None, color=ink(axes), linewidth=1.2)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set(ylabel="training samples", ylim=(bottom, counts.max() * (counts.max() / bottom) ** 0.12))

    class_axis(axes, order, group, names)
    legend(axes)
    return axes


def plot_weight_norms(
    weight: Tensor,
    class_counts: ArrayLike,
    *,
    names: Iterable[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the L2 norms of the class weights of linear heads: one line for each expert, and their mean.

    A larger norm favours its class. With 100 classes or more, the norms are drawn thin, and thick lines show
    means over neighbours in frequency, a fiftieth of the classes.

    Source: Tao et al., ICCV 2023, Fig. 3.

    Args:
        weight: class weights of the heads ``[K, C, d]``; one head's also ``[1, C, d]``.
        class_counts: training samples per class ``[C]``, at least 0.
        names: of the classes ``[C]``, shown in place of their indices; None shows indices.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with norms by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, a weight is not finite, a count is negative, or there is not one name
            for each class.

    Example:
        >>> axes = plot_weight_norms(torch.eye(3).expand(2, 3, 3), class_counts=[50, 20, 5])
        >>> [line.get_label() for line in axes.get_lines()]
        ['local expert 1', 'global expert', 'mean of the experts']
    """
    counts = as_class_counts(class_counts, "mask")  # classes without samples have weights, too
    floating_tensor("weight", weight, "[K, C, d]")
    if weight.shape[0] == 0 or weight.shape[1] != len(counts):
        raise ValueError(
            f"weight: expected shape [K, {len(counts)}, d] as class_counts says, got {list(weight.shape)}; "
            "stack the weights of K heads by torch.stack(weights)"
        )
    if not weight.isfinite().all():
        raise ValueError("weight: expected finite values, got NaN or infinity; training has diverged")
    names = class_names(names, len(counts))

    axes = given_axes(ax)
    order = counts.argsort(descending=True, stable=True).numpy()
    ranks = np.arange(len(order)) + 1
    norms = numbers(torch.linalg.vector_norm(weight.detach().double(), dim=-1))[:, order]
    styles = line_styles(axes, expert_names(len(norms)), len(order))

    if len(norms) > 1:
        norms = np.concatenate([norms, norms.mean(axis=0, keepdims=True)])
        mean = {"color": ink(axes), "linestyle": "dotted", "linewidth": 2.5, "label": "mean of the experts"}
        styles.append(mean)

    for row, style in zip(norms, styles, strict=True):
        if len(row) < MANY_CLASSES:
            axes.plot(ranks, row, **style)
            continue
        axes.plot(ranks, row, color=style["color"], linewidth=0.6, alpha=0.3, zorder=1.5)
        axes.plot(ranks, _smoothed(row), **style)

    axes.set_ylabel("L2 norm of the class weights")
    class_axis(axes, order, names=names)
    legend(axes)
    return axes


def plot_implied_prior(
    adjuster: CLALogitAdjuster,
    fusion: Tensor | Sequence[float] | None = None,
    *,
    names: Iterable[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the class prior of the ensemble, beside that of the training data and the uniform one.

    Above the uniform prior the ensemble favours a class, below it the ensemble disfavours it. Classes without
    samples are not drawn.

    Source: our derivation, see :meth:`~lgla_losses.CLALogitAdjuster.implied_prior` of the adjuster.

    Args:
        adjuster: of ``K`` experts and ``C`` classes.
        fusion: one non-negative weight for each expert ``[K]``; None for equal weights.
        names: of the classes ``[C]``, shown in place of their indices; None shows indices.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with probabilities (logarithmic) by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a weight is negative or not finite, all are zero, or there are not K; or there is not one
            name for each class.

    Example:
        >>> adjuster = CLALogitAdjuster(ClassGrouper([90, 10], num_groups=2), tau=2.0)
        >>> axes = plot_implied_prior(adjuster)
        >>> [line.get_ydata().round(2).tolist() for line in axes.get_lines()]
        [[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]
    """
    check_adjuster(adjuster)
    names = class_names(names, adjuster.grouper.num_classes)
    implied = numbers(adjuster.implied_prior(fusion))
    axes = given_axes(ax)
    order, counts, group = by_frequency(adjuster.grouper)
    ranks = np.arange(len(order)) + 1
    uniform = np.full(len(order), 1 / len(order))
    priors = counts / counts.sum(), uniform, implied[order]
    labels = ["training data", "uniform", "fused experts"]
    styles = line_styles(axes, labels, len(order), [REFERENCE])
    for prior, style in zip(priors, styles, strict=True):
        axes.plot(ranks, prior, **style)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set_ylabel("prior probability of the class")
    axes.margins(y=0.12)
    class_axis(axes, order, group, names)
    legend(axes)
    return axes


def _smoothed(row: Numbers) -> Numbers:
    """Average a fiftieth of the classes around each; fewer at the ends."""
    window = np.ones(2 * (len(row) // 100) + 1)
    return np.convolve(row, window, "same") / np.convolve(np.ones_like(row), window, "same")
