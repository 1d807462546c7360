"""Pictures of the loss on one's own data: groups, adjustments, margins, boundaries, priors, experts.

Needs matplotlib: ``pip install "lgla-losses[plot]"``. A picture of one panel is drawn on ``ax`` and its
``Axes`` returned, one of several panels on ``figure``, which is returned. Without them a new ``Figure`` is
made that pyplot does not know: it has ``savefig``, and in a notebook that has imported pyplot
``plot_groups(grouper).figure`` shows itself; for ``pyplot.show`` pass an ``ax`` or ``figure`` of pyplot.
Legends stand beside the axes, for which a figure with ``layout="constrained"`` makes room.

Experts and groups are counted from 1, group 1 is the head. Colours are Okabe and Ito's, which the
colour-blind tell apart; line styles and markers tell the same in grey. The rest is the style of the
caller's matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses.adjustment import CLALogitAdjuster
from lgla_losses.checks import (
    describe,
    finite_float,
    floating_tensor,
    integer,
    positive_int,
    target_tensor,
    target_values,
)
from lgla_losses.counts import ArrayLike, as_class_counts, integer_array, shot_splits, to_numpy
from lgla_losses.grouping import ClassGrouper, check_grouper
from lgla_losses.output import ExpertLogits, ExpertOutput, expert_blocks

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        f'lgla_losses.plot needs matplotlib ({error}): pip install "lgla-losses[plot]"'
    ) from error

__all__ = [
    "fusion_sweep",
    "plot_angles",
    "plot_boundaries",
    "plot_fusion_sweep",
    "plot_groups",
    "plot_implied_prior",
    "plot_margins",
    "plot_table",
    "plot_weight_norms",
]

Numbers: TypeAlias = npt.NDArray[np.float64]

#: Okabe and Ito's without black, which a dark background hides, and yellow, which a light one does.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
LINES = ((0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5)), (0, (7, 2, 1.5, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "v", "D", "P", "X")
#: Up to so many classes every one has its tick and its marker.
FEW_CLASSES = 20
#: From so many classes on, noisy curves are smoothed.
MANY_CLASSES = 100
#: The rows of :func:`fusion_sweep`.
SPLITS = ("all", "many", "medium", "few")


def plot_groups(grouper: ClassGrouper, *, ax: Axes | None = None) -> Axes:
    r"""The partition of the classes over their frequencies: one area a group.

    The legend holds the classes and the mass of every group, which the partition makes as equal as it can.

    Source: Tao et al., ICCV 2023, section 3.2.

    Args:
        grouper: the groups of ``C`` classes.
        ax: where to draw; None makes a figure.

    Returns:
        The axes: training samples (logarithmic) by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.

    Example:
        >>> axes = plot_groups(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['group 1: 1 class\n500 samples (50 %)', 'group 2: 3 classes\n500 samples (50 %)']
    """
    check_grouper(grouper)
    axes = _axes(ax)
    order, counts = _by_frequency(grouper.class_counts)
    group = grouper.group_index.cpu().numpy()[order]
    edges = _class_edges(len(counts))
    bottom = counts.min() / 1.6
    sizes, masses = grouper.group_sizes.tolist(), grouper.group_masses.tolist()
    for g, (size, mass) in enumerate(zip(sizes, masses, strict=True)):
        label = (
            f"group {g + 1}: {size:,} {'class' if size == 1 else 'classes'}\n"
            f"{mass:,.10g} samples ({100 * mass / sum(masses):.0f} %)"
        )
        own = np.where(group == g, counts, np.nan)
        axes.stairs(own, edges, baseline=bottom, fill=True, color=_color(g), alpha=0.75, label=label)
    axes.stairs(counts, edges, baseline=None, color=_ink(axes), linewidth=1.2)
    axes.set_yscale("log")
    axes.set(ylabel="training samples", ylim=(bottom, counts.max() * (counts.max() / bottom) ** 0.12))
    _class_axis(axes, order)
    _mark_groups(axes, edges, group)
    _legend(axes)
    return axes


def plot_table(adjuster: CLALogitAdjuster, *, ax: Axes | None = None) -> Axes:
    r"""The adjustments :math:`T(k, j)` that every expert's logits get in training: a line an expert.

    A local expert's line falls with the frequency inside its own group and is 0 outside; the global
    expert's falls everywhere, by ``tau`` times as much.

    Source: Tao et al., ICCV 2023, Eq. 4, shifted as in :class:`CLALogitAdjuster`.

    Args:
        adjuster: of ``K`` experts and ``C`` classes.
        ax: where to draw; None makes a figure.

    Returns:
        The axes: adjustments in nats by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.

    Example:
        >>> adjuster = CLALogitAdjuster(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> [line.get_label() for line in plot_table(adjuster).get_lines()]
        ['local expert 1', 'local expert 2', 'global expert']
    """
    _check_adjuster(adjuster)
    axes = _axes(ax)
    order, _ = _by_frequency(adjuster.grouper.class_counts)
    ranks = np.arange(len(order)) + 1
    for row, style in zip(_numbers(adjuster.table)[:, order], _expert_styles(axes, adjuster), strict=True):
        axes.plot(ranks, row, drawstyle="steps-mid", **style)
    axes.set_ylabel("adjustment T(k, j) (nats)")
    _class_axis(axes, order)
    axes.margins(y=0.12)
    _mark_groups(axes, _class_edges(len(order)), _group_of(adjuster)[order])
    _legend(axes)
    return axes


def plot_margins(adjuster: CLALogitAdjuster, target_class: SupportsIndex, *, ax: Axes | None = None) -> Axes:
    r"""The margins :math:`M(y, j, k)` of one class ``y`` against every rival class ``j``: a line an expert.

    By so much must a sample of the class win over the rival: a positive margin moves the boundary towards
    the class, a negative one towards the rival. The cases of Eq. 6 are numbered as there: local expert, both
    classes in its group (1), only the sample's (2), only the rival's (3), neither (4); global expert (5).
    With two groups or more all five occur if the class shares its group.

    Source: Tao et al., ICCV 2023, Eq. 6.

    Args:
        adjuster: of ``K`` experts and ``C`` classes, two or more.
        target_class: the class ``y`` of the sample, in ``0..C-1``.
        ax: where to draw; None makes a figure.

    Returns:
        The axes: margins in nats by the rivals' training samples (logarithmic).

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``target_class`` is no class, or has no rival.

    Example:
        >>> adjuster = CLALogitAdjuster(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> axes = plot_margins(adjuster, target_class=2)
        >>> sorted(text.get_text() for text in axes.texts if "case" in text.get_text())
        ['case 1', 'case 2', 'case 3', 'case 4', 'case 5']
    """
    _check_adjuster(adjuster)
    num_classes = adjuster.grouper.num_classes
    target_class = _class_index("target_class", target_class, num_classes)
    if num_classes == 1:
        raise ValueError("adjuster: expected two classes or more, got one, which has no rival")
    axes = _axes(ax)
    order, counts = _by_frequency(adjuster.grouper.class_counts)
    own_count = counts[order == target_class].item()
    rivals, counts = order[order != target_class], counts[order != target_class]
    target = torch.tensor([target_class], device=adjuster.table.device)
    margins = _numbers(adjuster.margin(target)[0])[:, rivals]
    styles = _expert_styles(axes, adjuster, len(rivals))
    for row, style in zip(margins, styles, strict=True):
        axes.plot(counts, row, **style)
    axes.set_xscale("log")
    axes.set(
        xlabel="training samples of the rival class j",
        ylabel=f"margin M({target_class}, j, k) (nats)",
    )
    axes.axvline(own_count, color=_ink(axes), linewidth=0.8, linestyle=":")
    axes.margins(x=0.1, y=0.17)
    group = _group_of(adjuster)
    if adjuster.tau is not None:
        _number_cases(axes, counts, margins, group[rivals], group[target_class])
    inner = np.sqrt(counts[:-1] * counts[1:])
    _mark_groups(axes, np.array([counts[0], *inner, counts[-1]]), group[rivals])
    _legend(axes, f"class {target_class}: {own_count:,.10g} samples")
    return axes


def plot_boundaries(
    adjuster: CLALogitAdjuster,
    classes: ArrayLike,
    centres: ArrayLike | None = None,
    *,
    figure: Figure | None = None,
) -> Figure:
    r"""Where each class wins in training, with its adjustments and without: a panel an expert.

    The logits of a 2-D feature ``x`` are those of round classes of unit deviation,
    :math:`v_j = -|x - c_j|^2 / 2`. Areas show the largest of the adjusted logits
    :math:`v_j + M(y, j, k)`, dashed lines the boundaries of the unadjusted ones. A boundary that has come
    nearer to a class asks more of its samples, so that what is learned leaves that class more room.

    Source: Tao et al., ICCV 2023, Fig. 4 and Eqs. 5 and 6.

    Args:
        adjuster: of ``K`` experts and ``C`` classes.
        classes: the classes to compare ``[M]``, two or more; of a pair the titles say the margin.
        centres: their centres ``[M, 2]``, in deviations of a class; None puts them on a circle, so far
            apart that no boundary passes a centre.
        figure: where to draw; None makes one.

    Returns:
        The figure, with ``K`` panels.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there are fewer than two different classes, or not one centre for each.

    Example:
        >>> adjuster = CLALogitAdjuster(ClassGrouper([500, 300, 150, 50], num_groups=2))
        >>> figure = plot_boundaries(adjuster, classes=[0, 3])
        >>> [axes.get_title().splitlines()[1] for axes in figure.axes]
        ['M(0, 3) = +0.00 nats', 'M(0, 3) = -2.30 nats', 'M(0, 3) = -5.76 nats']
    """
    _check_adjuster(adjuster)
    chosen = integer_array("classes", classes, "they are class indices")
    indices = [_class_index("classes", j, adjuster.grouper.num_classes) for j in chosen.tolist()]
    if len(set(indices)) < 2 or len(set(indices)) < len(indices):
        raise ValueError(f"classes: expected two or more different classes, got {indices}")
    target = torch.tensor(indices, device=adjuster.table.device)
    margins = _numbers(adjuster.margin(target))[:, :, indices]
    points = _centres(centres, len(indices), margins)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    half = 1.25 * np.ptp(points, axis=0).max()
    xs, ys = (np.linspace(m - half, m + half, 201) for m in middle)
    plane = np.stack(np.meshgrid(xs, ys), axis=-1)
    logits = -((plane[:, :, None] - points) ** 2).sum(axis=-1) / 2
    names = _expert_names(adjuster)
    figure = _figure(figure, len(names), (3.4, 4.6), square=True)
    panels = _panels(figure, len(names), sharex=True, sharey=True)
    counts = adjuster.grouper.class_counts[target].tolist()
    for k, (axes, name) in enumerate(zip(panels, names, strict=True)):
        ink = _ink(axes)
        adjusted = logits + margins[0, k]
        axes.imshow(
            adjusted.argmax(axis=-1),
            extent=(xs[0], xs[-1], ys[0], ys[-1]),
            origin="lower",
            cmap=ListedColormap([_color(m) for m in range(len(indices))]),
            vmin=-0.5,
            vmax=len(indices) - 0.5,
            alpha=0.45,
            interpolation="nearest",
        )
        for values, style, width in ((logits, "dashed", 1.2), (adjusted, "solid", 2.2)):
            for difference in _leads(values):
                axes.contour(
                    xs, ys, difference, levels=[0.0], colors=[ink], linestyles=style, linewidths=width
                )
        for m, (j, point, count) in enumerate(zip(indices, points, counts, strict=True)):
            axes.plot(*point, MARKERS[m % len(MARKERS)], color=ink, markersize=6)
            # Outwards, away from the boundaries.
            right, up = (point - middle) / half
            axes.annotate(
                f"class {j}\n{count:,.10g} samples",
                point,
                (0, 8 if up >= 0 else -8),
                textcoords="offset points",
                ha="center" if abs(right) < 0.1 else ("left" if right > 0 else "right"),
                va="bottom" if up >= 0 else "top",
                fontsize="small",
                color=ink,
            )
        margin = (
            f"\nM({indices[0]}, {indices[1]}) = {margins[0, k, 1]:+.2f} nats" if len(indices) == 2 else ""
        )
        axes.set_title(name + margin, fontsize="medium")
        axes.set_aspect("equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.grid(False)
    figure.supxlabel("feature 1 (deviations of a class)", fontsize="medium", color=ink)
    figure.supylabel("feature 2 (deviations of a class)", fontsize="medium", color=ink)
    lines = [
        Line2D([], [], color=ink, linestyle="dashed", linewidth=1.2, label="boundary without adjustment"),
        Line2D([], [], color=ink, linewidth=2.2, label="boundary in training"),
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False, labelcolor=ink)
    return figure


def plot_weight_norms(weight: Tensor, class_counts: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """The L2 norms of the class weights of linear heads: a line an expert, and their mean.

    A larger norm favours its class. Of many classes the norms are drawn faint, and in full the means over
    neighbours in frequency, a fiftieth of the classes.

    Source: Tao et al., ICCV 2023, Fig. 3.

    Args:
        weight: class weights of the heads ``[K, C, d]``; one head's also ``[1, C, d]``.
        class_counts: training samples per class ``[C]``, positive.
        ax: where to draw; None makes a figure.

    Returns:
        The axes: norms by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, a weight is not finite, or counts are not positive.

    Example:
        >>> axes = plot_weight_norms(torch.eye(3).expand(2, 3, 3), class_counts=[50, 20, 5])
        >>> [line.get_label() for line in axes.get_lines()]
        ['local expert 1', 'global expert', 'mean of the experts']
    """
    counts = as_class_counts(class_counts)
    floating_tensor("weight", weight, "[K, C, d]")
    if weight.shape[0] == 0 or weight.shape[1] != len(counts):
        raise ValueError(
            f"weight: expected shape [K, {len(counts)}, d] as class_counts says, got {list(weight.shape)}; "
            "stack the weights of K heads by torch.stack(weights)"
        )
    _finite("weight", weight)
    axes = _axes(ax)
    order, _ = _by_frequency(counts)
    ranks = np.arange(len(order)) + 1
    norms = _numbers(torch.linalg.vector_norm(weight.detach().double(), dim=-1))[:, order]
    styles = _styles(axes, _names(len(norms), True), len(order))
    if len(norms) > 1:
        norms = np.concatenate([norms, norms.mean(axis=0, keepdims=True)])
        mean = {"color": _ink(axes), "linestyle": "dotted", "linewidth": 2.5, "label": "mean of the experts"}
        styles.append(mean)
    for row, style in zip(norms, styles, strict=True):
        if len(row) < MANY_CLASSES:
            axes.plot(ranks, row, **style)
            continue
        axes.plot(ranks, row, color=style["color"], linewidth=0.6, alpha=0.3, zorder=1.5)
        axes.plot(ranks, _smoothed(row), **style)
    axes.set_ylabel("L2 norm of the class weights")
    _class_axis(axes, order)
    _legend(axes)
    return axes


def plot_implied_prior(
    adjuster: CLALogitAdjuster,
    fusion: Tensor | Sequence[float] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """The class prior that fused experts carry, beside that of the training data and the uniform one.

    Where it lies above the uniform prior the ensemble leans to a class, below it leans away.

    Source: our derivation, see :meth:`CLALogitAdjuster.implied_prior`.

    Args:
        adjuster: of ``K`` experts and ``C`` classes.
        fusion: one non-negative weight an expert ``[K]``; None for equal weights.
        ax: where to draw; None makes a figure.

    Returns:
        The axes: probabilities (logarithmic) by class, the most frequent first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a weight is negative or not finite, all are zero, or there are not K.

    Example:
        >>> adjuster = CLALogitAdjuster(ClassGrouper([90, 10], num_groups=2), tau=2.0)
        >>> axes = plot_implied_prior(adjuster)
        >>> [line.get_ydata().round(2).tolist() for line in axes.get_lines()]
        [[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]
    """
    _check_adjuster(adjuster)
    implied = _numbers(adjuster.implied_prior(fusion))
    axes = _axes(ax)
    order, counts = _by_frequency(adjuster.grouper.class_counts)
    ranks = np.arange(len(order)) + 1
    uniform = np.full(len(order), 1 / len(order))
    lines = (counts / counts.sum(), "training data"), (uniform, "uniform"), (implied[order], "fused experts")
    for k, (prior, label) in enumerate(lines):
        style = _style(axes, k if k < 2 else None, len(order), stagger=k)
        axes.plot(ranks, prior, **style | {"label": label})
    axes.set_yscale("log")
    axes.set_ylabel("prior probability of the class")
    _class_axis(axes, order)
    _legend(axes)
    return axes


def fusion_sweep(
    logits: ExpertOutput | ExpertLogits,
    target: Tensor,
    class_counts: ArrayLike,
    weights: Sequence[float] | None = None,
    *,
    many: float = 100,
    few: float = 20,
) -> Tensor:
    r"""Accuracy of the ensemble as one local expert's fusion weight grows, by split.

    The local experts share a weight of 1, of which one has ``w`` and the others the rest in equal parts. The
    global expert's is fixed at what a local expert has in the mean, :math:`1 / (K - 1)`; with K = 2 it has
    the rest.

    Source: Tao et al., ICCV 2023, section 4.4 and Fig. 6.

    Args:
        logits: unadjusted test logits ``[N, K, C]``, K tensors ``[N, C]`` or an :class:`ExpertOutput`, of two
            experts or more.
        target: class indices, int64 ``[N]``.
        class_counts: training samples per class ``[C]``, positive.
        weights: the values of ``w`` in 0..1 ``[W]``; None for 0.1, 0.2 to 0.9.
        many: many-shot classes have more training samples.
        few: few-shot classes have fewer; at most ``many``.

    Returns:
        Mean per-class recalls, float64 ``[K - 1, W, 4]`` on the CPU: of all, many-, medium- and few-shot
        classes; NaN for a split without test samples.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, there is one expert or no sample, or a value is out of range.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
        >>> fusion_sweep(logits, torch.tensor([1]), [500, 5], weights=[0.2, 0.8])[:, :, 0]
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    counts = as_class_counts(class_counts)
    blocks = expert_blocks(logits, len(counts))
    experts = [expert for block in blocks for expert in block.detach().unbind(dim=1)]
    num_experts, num_samples = len(experts), len(experts[0])
    if num_experts < 2:
        raise ValueError("logits: expected two experts or more, whose weights can differ, got one")
    if num_samples == 0:
        raise ValueError("logits: expected one test sample or more, got none")
    target = target_tensor(target, (num_samples,)).cpu()
    target_values(target, len(counts))
    for expert in experts:
        if expert.isnan().any() or expert.isposinf().any():
            raise ValueError("logits: expected finite values, or -inf for masked classes, got NaN or +inf")
    splits = torch.cat([torch.ones(1, len(counts), dtype=torch.bool), shot_splits(counts, many, few)])
    total = target.bincount(minlength=len(counts))
    grid = _sweep_weights(weights)
    result = torch.full((num_experts - 1, len(grid), len(splits)), math.nan, dtype=torch.float64)
    for k in range(num_experts - 1):
        for i, w in enumerate(grid):
            fusion = [(1 - w) / max(1, num_experts - 2)] * (num_experts - 1)
            fusion[k] = w
            fusion.append(1 / (num_experts - 1) if num_experts > 2 else 1 - w)
            # An expert without weight takes no part, even where it masks a class with -inf.
            parts = [
                f * v.to(functional.compute_dtype(v.dtype)) for f, v in zip(fusion, experts, strict=True) if f
            ]
            right = target[sum(parts[1:], parts[0]).argmax(dim=1).cpu() == target]
            recall = right.bincount(minlength=len(counts)) / total.double()
            result[k, i] = torch.stack([recall[split].nanmean() for split in splits])
    return result


def plot_fusion_sweep(
    logits: ExpertOutput | ExpertLogits,
    target: Tensor,
    class_counts: ArrayLike,
    weights: Sequence[float] | None = None,
    *,
    many: float = 100,
    few: float = 20,
    figure: Figure | None = None,
) -> Figure:
    """Accuracy by split as the fusion weight of one local expert grows: a panel an expert.

    Test logits of several seeds are pooled by ``torch.cat``, and so are their targets. A split without test
    samples has no line.

    Source: Tao et al., ICCV 2023, section 4.4 and Fig. 6; :func:`fusion_sweep` computes it.

    Args:
        logits: unadjusted test logits ``[N, K, C]``, K tensors ``[N, C]`` or an :class:`ExpertOutput`, of two
            experts or more.
        target: class indices, int64 ``[N]``.
        class_counts: training samples per class ``[C]``, positive.
        weights: fusion weights in 0..1 ``[W]``; None for 0.1, 0.2 to 0.9.
        many: many-shot classes have more training samples.
        few: few-shot classes have fewer; at most ``many``.
        figure: where to draw; None makes one.

    Returns:
        The figure, with ``K - 1`` panels.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, there is one expert or no sample, or a value is out of range.

    Example:
        >>> logits = torch.eye(4).expand(3, 4, 4)
        >>> figure = plot_fusion_sweep(logits, torch.tensor([0, 1, 2]), [500, 50, 5, 1])
        >>> [axes.get_title() for axes in figure.axes]
        ['local expert 1', 'local expert 2', 'local expert 3']
    """
    percent = 100 * fusion_sweep(logits, target, class_counts, weights, many=many, few=few)
    grid = _sweep_weights(weights)
    figure = _figure(figure, len(percent), (3.6, 3.5))
    panels = _panels(figure, len(percent), sharex=True, sharey=True)
    for k, (axes, rows) in enumerate(zip(panels, _numbers(percent), strict=True)):
        for s, name in enumerate(SPLITS):
            if not np.isnan(rows[:, s]).all():
                style = _style(axes, s - 1 if s else None, FEW_CLASSES)
                axes.plot(
                    grid, rows[:, s], **style | {"label": f"{name} classes" if s == 0 else f"{name}-shot"}
                )
        axes.set_title(f"local expert {k + 1}", fontsize="medium")
    ink = _ink(axes)
    figure.supxlabel("fusion weight of the local expert", fontsize="medium", color=ink)
    figure.supylabel("mean per-class accuracy (%)", fontsize="medium", color=ink)
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside right upper", frameon=False, labelcolor=ink)
    return figure


def plot_angles(
    angles: Tensor,
    target: Tensor,
    grouper: ClassGrouper,
    *,
    ignore_index: int = -100,
    bins: SupportsIndex = 40,
    figure: Figure | None = None,
) -> Figure:
    """Histograms of the samples' angles to their class centres by group, a panel an expert.

    A vertical line marks the group's reference angle, its mean: samples to the right of it weigh more.

    Source: Tao et al., ICCV 2023, section 3.3, Eqs. 7 and 8.

    Args:
        angles: radians in 0..pi ``[N, K]``, as of :func:`lgla_losses.functional.angles_from_features`.
        target: class indices, int64 ``[N]``.
        grouper: the groups.
        ignore_index: target of samples that are left out.
        bins: number of bins from the smallest to the largest angle.
        figure: where to draw; None makes one.

    Returns:
        The figure, with ``K`` panels: percent of the group's samples by angle.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes do not fit, a value is out of range, or no sample is left.

    Example:
        >>> angles = torch.tensor([[0.2, 0.4], [0.6, 0.4], [0.9, 1.2]])
        >>> figure = plot_angles(angles, torch.tensor([0, 0, 1]), ClassGrouper([9, 1], num_groups=1), bins=4)
        >>> [round(axes.get_lines()[0].get_xdata()[0], 4) for axes in figure.axes]  # the references
        [0.5667, 0.6667]
    """
    check_grouper(grouper)
    floating_tensor("angles", angles, "[N, K]")
    target = target_tensor(target, angles.shape[:1]).cpu()
    target_values(target, grouper.num_classes, ignore_index)
    bins = positive_int("bins", bins, "it is the number of bins of a histogram")
    group = functional.target_groups(target, grouper.group_index.cpu(), ignore_index)
    values = angles.detach().cpu().double()
    seen = _numbers(values[group >= 0])
    if seen.size == 0:
        raise ValueError(
            f"angles: expected angles of a sample or more that is not ignored, got {list(angles.shape)}"
        )
    # Angles in float32 or less may round above pi.
    if not ((seen >= 0) & (seen <= math.pi + 0.01)).all():
        raise ValueError(
            f"angles: expected radians in 0..pi, got {seen.min():.4g} to {seen.max():.4g}; "
            "torch.deg2rad converts degrees"
        )
    references = functional.aaw_references(functional.aaw_statistics(values, group, grouper.num_groups))
    edges = np.histogram_bin_edges(seen, bins)
    num_experts = angles.shape[1]
    figure = _figure(figure, num_experts, (3.6, 3.5))
    panels = _panels(figure, num_experts, sharex=True, sharey=True)
    names = _names(num_experts, num_experts == grouper.num_groups + 1)
    for k, (axes, name) in enumerate(zip(panels, names, strict=True)):
        for g in range(grouper.num_groups):
            own = _numbers(values[group == g, k])
            if own.size == 0:
                continue
            share = 100 * np.histogram(own, edges)[0] / own.size
            style: dict[str, Any] = {"color": _color(g), "linestyle": LINES[g % len(LINES)] if g else "solid"}
            axes.stairs(share, edges, linewidth=1.8, label=f"group {g + 1}", **style)
            axes.axvline(float(references[g, k]), linewidth=1.2, **style)
        axes.set_title(name, fontsize="medium")
    ink = _ink(axes)
    figure.supxlabel("angle to the class centre (radians)", fontsize="medium", color=ink)
    figure.supylabel("samples of the group (%)", fontsize="medium", color=ink)
    handles, _ = axes.get_legend_handles_labels()
    line = Line2D([], [], color=ink, linestyle="none", marker="|", markersize=14, label="its reference angle")
    figure.legend(handles=[*handles, line], loc="outside right upper", frameon=False, labelcolor=ink)
    return figure


def _check_adjuster(adjuster: object) -> None:
    if not isinstance(adjuster, CLALogitAdjuster):
        raise TypeError(
            f"adjuster: expected a CLALogitAdjuster, got {type(adjuster).__name__}; a loss keeps it as "
            "criterion.adjuster, and CLALogitAdjuster(ClassGrouper(class_counts, num_groups)) makes one"
        )


def _class_index(name: str, value: SupportsIndex, num_classes: int) -> int:
    index = integer(name, value, "it is the index of a class")
    if not 0 <= index < num_classes:
        raise ValueError(
            f"{name}: expected class indices 0..{num_classes - 1}, got {index}; classes are counted from 0"
        )
    return index


def _finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity; training has diverged")


def _sweep_weights(weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [i / 10 for i in range(1, 10)]
    grid = to_numpy("weights", weights)
    if grid.ndim != 1 or grid.size == 0:
        raise ValueError(f"weights: expected one fusion weight or more [W], got shape {list(grid.shape)}")
    return [
        finite_float("weights", w, low=0.0, high=1.0, expected="fusion weights in 0..1")
        for w in grid.tolist()
    ]


def _centres(centres: ArrayLike | None, number: int, margins: Numbers) -> Numbers:
    """The class centres ``[M, 2]``: the caller's, or on a circle around the origin."""
    if centres is None:
        # A margin moves a boundary by itself over the distance of the centres: here by 0.3 of that at most.
        distance = max(2.0, math.sqrt(np.abs(margins).max() / 0.3))
        turn = -math.pi / 2 + 2 * math.pi * np.arange(number) / number
        return distance / 2 / math.sin(math.pi / number) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    points = to_numpy("centres", centres)
    if points.dtype.kind not in "iuf":
        raise TypeError(f"centres: expected real numbers [M, 2], got {points.dtype}")
    if points.shape != (number, 2):
        raise ValueError(
            f"centres: expected a point for each of {number} classes, shape [{number}, 2], "
            f"got {list(points.shape)}"
        )
    if not np.isfinite(points).all() or len(np.unique(points, axis=0)) < number:
        raise ValueError(f"centres: expected finite, different points, got {describe(points.tolist())}")
    return points.astype(np.float64)


def _leads(values: Numbers) -> list[Numbers]:
    """The lead of every class over the best other, where it changes sign; every boundary is in one alone."""
    leads = []
    for m in range(values.shape[-1] - 1):
        others = values.copy()
        others[..., m] = -np.inf
        lead = values[..., m] - others.max(axis=-1)
        lead[others.argmax(axis=-1) < m] = np.nan
        if np.nanmin(lead) < 0 < np.nanmax(lead):
            leads.append(lead)
    return leads


def _numbers(values: Tensor) -> Numbers:
    return values.detach().cpu().double().numpy()


def _by_frequency(class_counts: Tensor) -> tuple[npt.NDArray[np.int64], Numbers]:
    """The classes from the most to the least frequent, ties by index, and their counts in that order."""
    counts = class_counts.cpu()
    order = counts.argsort(descending=True, stable=True)
    return order.numpy(), _numbers(counts[order])


def _group_of(adjuster: CLALogitAdjuster) -> npt.NDArray[np.int64]:
    group: npt.NDArray[np.int64] = adjuster.grouper.group_index.cpu().numpy()
    return group


def _smoothed(row: Numbers) -> Numbers:
    """Means over a fiftieth of the classes around each; fewer at the ends."""
    window = np.ones(2 * (len(row) // 100) + 1)
    return np.convolve(row, window, "same") / np.convolve(np.ones_like(row), window, "same")


def _axes(ax: Axes | None) -> Axes:
    if ax is None:
        return Figure(figsize=(8.5, 4.2), layout="constrained").add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected the Axes of matplotlib, or None for new ones, got {describe(ax)}")
    return ax


def _figure(
    figure: Figure | None, panels: int, panel_size: tuple[float, float], square: bool = False
) -> Figure:
    if figure is None:
        rows, columns = _grid(panels)
        width, height = panel_size
        size = width * columns + 1.2, height * rows + 0.3
        # Constrained layout would not see how much smaller panels of a fixed aspect get.
        return Figure(figsize=size, layout="compressed" if square else "constrained")
    if not isinstance(figure, Figure):
        raise TypeError(
            f"figure: expected a Figure of matplotlib, or None for a new one, got {describe(figure)}"
        )
    return figure


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns of so many panels, four in a row at most."""
    rows = math.ceil(panels / 4)
    return rows, math.ceil(panels / rows)


def _panels(figure: Figure, panels: int, **options: Any) -> list[Axes]:
    rows, columns = _grid(panels)
    drawn: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in drawn[panels:]:
        spare.remove()
    for lowest in drawn[max(0, panels - columns) : panels]:
        lowest.xaxis.set_tick_params(labelbottom=True)
    return drawn[:panels]


def _ink(axes: Axes) -> Any:
    """What the style of these axes writes with: black, or white on a dark background."""
    return axes.xaxis.label.get_color()


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _style(axes: Axes, index: int | None, points: int, stagger: int = 0) -> dict[str, Any]:
    """How the line of this index looks; None is the most important one, in full."""
    # Of many points only some have a marker, and others on the next line, so that equal lines show both.
    every = 1 if points <= FEW_CLASSES else (0.02 + 0.03 * (stagger % 5), 0.15)
    common = {"markersize": 5, "markevery": every}
    if index is None:
        return common | {"color": _ink(axes), "linestyle": "solid", "marker": MARKERS[-1], "linewidth": 1.5}
    look = {"linestyle": LINES[index % len(LINES)], "marker": MARKERS[index % (len(MARKERS) - 1)]}
    return common | look | {"color": _color(index), "linewidth": 2.0}


def _names(num_experts: int, local_and_global: bool) -> list[str]:
    if not local_and_global or num_experts == 1:
        return [f"expert {k + 1}" for k in range(num_experts)]
    return [*(f"local expert {k + 1}" for k in range(num_experts - 1)), "global expert"]


def _expert_names(adjuster: CLALogitAdjuster) -> list[str]:
    """A table of one's own makes no expert local or global."""
    return _names(adjuster.num_experts, adjuster.tau is not None)


def _styles(axes: Axes, names: list[str], points: int) -> list[dict[str, Any]]:
    last = len(names) - 1
    return [
        _style(axes, k if k < last else None, points, stagger=k) | {"label": name}
        for k, name in enumerate(names)
    ]


def _expert_styles(axes: Axes, adjuster: CLALogitAdjuster, points: int | None = None) -> list[dict[str, Any]]:
    return _styles(axes, _expert_names(adjuster), points or adjuster.grouper.num_classes)


def _class_axis(axes: Axes, order: npt.NDArray[np.int64]) -> None:
    """Ranks by frequency; of few classes their indices."""
    axes.set_xlim(0.5, len(order) + 0.5)
    if len(order) <= FEW_CLASSES:
        axes.set_xticks(np.arange(len(order)) + 1, [str(j) for j in order.tolist()])
        axes.set_xlabel("class index, the most frequent first")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("rank of the class, the most frequent first")


def _class_edges(num_classes: int) -> Numbers:
    return np.linspace(0.5, num_classes + 0.5, num_classes + 1)


def _mark_groups(axes: Axes, edges: Numbers, group: npt.NDArray[np.int64]) -> None:
    """Number the groups along the top, where classes lie between these edges; every second is shaded."""
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
    longest: dict[int, tuple[float, float]] = {}
    axes.get_xlim()  # settles the limits, which matplotlib puts off
    to_axes = axes.transData + axes.transAxes.inverted()
    places = to_axes.transform(np.stack([edges, np.ones_like(edges)], axis=1))[:, 0]
    for i, (start, stop) in enumerate(pairwise(cuts)):
        low, high = sorted((places[start], places[stop]))
        # Groups of one's own that are scattered over the frequencies would only make stripes.
        if i % 2 and len(cuts) <= 2 * FEW_CLASSES:
            axes.axvspan(edges[start], edges[stop], color=_ink(axes), alpha=0.07, linewidth=0)
        g = int(group[start])
        if g not in longest or high - low > longest[g][1] - longest[g][0]:
            longest[g] = (low, high)
    for g, (low, high) in longest.items():
        if high - low < 0.015:
            continue  # too narrow for its number
        axes.text(
            (low + high) / 2,
            0.985,
            f"group {g + 1}" if high - low > 0.1 else str(g + 1),
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize="small",
            color=_ink(axes),
        )


def _number_cases(
    axes: Axes,
    counts: Numbers,
    margins: Numbers,
    group: npt.NDArray[np.int64],
    own_group: int,
) -> None:
    """Write the case of Eq. 6 beside the first line where it holds, where the other lines are far."""
    last = len(margins) - 1
    places = [(1, own_group, group == own_group), (2, own_group, group != own_group)]
    places += [(3, k, group == k) for k in range(last) if k != own_group]
    places += [(4, k, group != k) for k in range(last) if k != own_group]
    places.append((5, last, np.ones(len(group), dtype=bool)))
    position = np.log(counts / counts[-1]) / max(math.log(counts[0] / counts[-1]), 1e-9)
    height, width = 0.05 * max(np.ptp(margins), 1e-9), 0.1
    named: dict[int, tuple[float, float]] = {}
    for case, k, where in places:
        found = np.flatnonzero(where)
        if case in named or len(found) == 0:
            continue
        clearances = {}
        for j in found[:: math.ceil(len(found) / 50)]:
            # What is behind the text: the other lines, this one where it is of another case, other texts.
            behind = (position <= position[j]) & (position >= position[j] - width)
            lines = [np.delete(margins, k, axis=0)[:, behind].ravel(), margins[k, behind & ~where]]
            texts = [y + height for x, y in named.values() if abs(x - position[j]) < 1.5 * width]
            near = np.concatenate([*lines, texts])
            clearances[j] = np.abs(near - margins[k, j] - height).min(initial=np.inf)
        j = max(clearances, key=lambda j: clearances[j])
        named[case] = (position[j], margins[k, j])
        axes.annotate(
            f"case {case}",
            (counts[j], margins[k, j]),
            (0, 4),
            textcoords="offset points",
            # No margin falls with the rival's count inside a case: the left of the line is free.
            ha="right",
            va="bottom",
            fontsize="small",
            color=_ink(axes),
        )


def _legend(axes: Axes, title: str | None = None) -> None:
    """Beside the axes, where it covers nothing."""
    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        handlelength=3.5,
        labelcolor=_ink(axes),
        title=title,
    )
    legend.get_title().set_color(_ink(axes))
