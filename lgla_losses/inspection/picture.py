"""A picture of an inspection: sorted class frequencies, groups and shots; needs matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np

from lgla_losses.grouping import ClassGrouper

#: Of neighbouring groups; Okabe and Ito, colour-blind safe.
SHADES = ("#56B4E9", "#E69F00")

#: A group with a smaller share of the classes would be a mere line: the classes then get a log scale.
VISIBLE_SHARE = 0.03


def draw_groups(grouper: ClassGrouper, many: float, few: float, title: str) -> Any:
    """Sorted class frequencies on a log scale, each group shaded with its mass, the shot split as lines.

    Returns:
        A ``matplotlib.figure.Figure``, made without ``pyplot``: no window, no global state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib ({error}): pip install 'lgla-losses[plot]'") from error
    counts = np.sort(grouper.class_counts.numpy())[::-1]
    num_classes, high, low = len(counts), float(counts[0]), float(counts[-1])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(np.arange(1, num_classes + 2), np.append(counts, counts[-1]), where="post", color="black")
    log_ranks = float(grouper.group_sizes.min()) < VISIBLE_SHARE * num_classes
    if log_ranks:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    axes.set_xlim(1, num_classes + 1)
    # Above the curve the legend has room.
    axes.set_ylim(0.7 * low, 2 * high * (high / low) ** 0.25)
    begin = 1
    total = int(grouper.group_masses.sum())
    masses = grouper.group_masses.tolist()
    for group, (size, mass) in enumerate(zip(grouper.group_sizes.tolist(), masses, strict=True)):
        classes = "class" if size == 1 else "classes"
        axes.axvspan(
            begin,
            begin + size,
            color=SHADES[group % len(SHADES)],
            alpha=0.35,
            linewidth=0,
            label=f"group {group + 1}: {size:,} {classes}, {mass:,} samples ({mass / total:.0%})",
        )
        begin += size
    for text, threshold in ((f"many-shot: above {many:g}", many), (f"few-shot: below {few:g}", few)):
        if 0.7 * low < threshold < high:
            axes.axhline(threshold, color="0.3", linestyle="--", linewidth=1)
            rank = 1 + int((counts > threshold).sum())
            crossing = np.log(rank) / np.log(num_classes + 1) if log_ranks else rank / (num_classes + 1)
            # On the side of the line that the curve leaves free.
            is_left = crossing > 0.5
            axes.annotate(
                text,
                (0 if is_left else 1, threshold),
                xycoords=("axes fraction", "data"),
                xytext=(4, -3) if is_left else (-4, 3),
                textcoords="offset points",
                ha="left" if is_left else "right",
                va="top" if is_left else "bottom",
                color="0.2",
            )
    axes.set_xlabel("rank of the class, most frequent first" + (" (log scale)" if log_ranks else ""))
    axes.set_ylabel("samples (log scale)")
    # A dollar sign in a file name is no mathematics.
    axes.set_title(title.replace("$", r"\$"))
    axes.legend(loc="upper right")
    return figure
