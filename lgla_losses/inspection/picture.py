"""A picture of an inspection: sorted class frequencies, groups and shots; needs matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np

from lgla_losses.grouping import ClassGrouper

#: Of neighbouring groups; Okabe and Ito, colour-blind safe.
SHADES = ("#56B4E9", "#E69F00")


def draw_groups(grouper: ClassGrouper, many: float, few: float, title: str) -> Any:
    """Sorted class frequencies on a log scale, each group shaded with its mass, the shot split as lines.

    Returns:
        A ``matplotlib.figure.Figure``, made without ``pyplot``: no window, no global state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib ({error}): pip install matplotlib") from error
    counts = grouper.class_counts.numpy()
    order = np.argsort(-counts, kind="stable")
    groups = grouper.group_index.numpy()[order]
    total = int(grouper.group_masses.sum())
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(
        np.arange(len(counts) + 1), np.append(counts[order], counts[order][-1]), where="post", color="black"
    )
    axes.set_yscale("log")
    top = float(counts.max())
    axes.set_ylim(max(0.7 * float(counts.min()), 0.5), top * (top / float(counts.min())) ** 0.25 * 2)
    axes.set_xlim(0, len(counts))
    # The head group may be one class among thousands: only a legend has room for every group.
    for group, (size, mass) in enumerate(
        zip(grouper.group_sizes.tolist(), grouper.group_masses.tolist(), strict=True)
    ):
        begin = int(np.searchsorted(groups, group))
        classes = "class" if size == 1 else "classes"
        axes.axvspan(
            begin,
            begin + size,
            color=SHADES[group % len(SHADES)],
            alpha=0.35,
            linewidth=0,
            label=f"group {group}: {size:,} {classes}, {mass:,} samples ({mass / total:.0%})",
        )
    low, high = axes.get_ylim()
    for name, threshold in ((f"many-shot: above {many:g}", many), (f"few-shot: below {few:g}", few)):
        if low < threshold < high:
            # Below the line at the left the curve leaves room.
            axes.axhline(threshold, color="0.3", linestyle="--", linewidth=1)
            axes.annotate(
                name,
                (0, threshold),
                xytext=(4, -3),
                textcoords="offset points",
                va="top",
                color="0.2",
            )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("class, most frequent first")
    axes.set_ylabel("samples")
    # A dollar sign in a file name is no mathematics.
    axes.set_title(title.replace("$", r"\$"))
    axes.legend(loc="upper right")
    return figure
