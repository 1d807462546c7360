"""The numbers of an inspection: imbalance, shots, groups, margins, warnings, where to start.

Sentences count groups and experts from 1, as people do; indices count from 0, as ``group_index`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lgla_losses._checks import positive_int
from lgla_losses._counts import ArrayLike, integer_array, shot_splits, to_numpy
from lgla_losses.adjustment import CLALogitAdjuster
from lgla_losses.grouping import ClassGrouper
from lgla_losses.suggestion import suggest

#: The numbers of experts K to inspect, from the paper's Fig. 7; elsewhere the paper has three.
EXPERTS = range(2, 8)
PAPER_EXPERTS = 3

#: A warning names groups that more than this share of the batches miss.
OFTEN_MISSED = 0.01


@dataclass(frozen=True)
class ClassInfo:
    """Name a class by its number in the source."""

    number: int
    name: str | None
    count: int


@dataclass(frozen=True)
class Shot:
    """Count the many-, medium- or few-shot classes and their samples."""

    name: str
    num_classes: int
    class_share: float
    num_samples: int
    sample_share: float


@dataclass(frozen=True)
class Group:
    """Describe the classes of one local expert; ``index`` 0 is the head."""

    index: int
    classes: list[int]
    class_share: float
    largest_count: int
    smallest_count: int
    mass: int
    mass_share: float
    miss_probability: float


@dataclass(frozen=True)
class Margin:
    r"""Give the largest margin of an expert, Eq. 6: how far ``target``'s logit must exceed ``rival``'s.

    If several rivals share it, ``rival`` is the most frequent. Both are None if all margins are 0.
    """

    expert: int
    is_global: bool
    margin: float
    target: ClassInfo | None
    rival: ClassInfo | None


@dataclass(frozen=True)
class Grouping:
    """Give the groups and margins of K experts, at the default ``tau``."""

    num_experts: int
    tau: float
    groups: list[Group]
    margins: list[Margin]


@dataclass(frozen=True)
class Notice:
    """Warn before training: a stable code, a sentence, and the indices that it concerns."""

    code: str
    message: str
    cases: list[dict[str, Any]]


@dataclass(frozen=True)
class Suggestion:
    """Suggest where to start."""

    num_experts: int
    tau: float
    uniform_tau: float
    reason: str
    python: str


@dataclass(frozen=True)
class Inspection:
    """Hold all numbers; classes without samples are in ``zero_count_classes`` only."""

    num_classes: int
    num_samples: int
    largest: ClassInfo
    smallest: ClassInfo
    imbalance_factor: float
    gini: float
    many: float
    few: float
    shots: list[Shot]
    batch_size: int
    groupings: list[Grouping]
    zero_count_classes: list[ClassInfo]
    warnings: list[Notice]
    suggestion: Suggestion


def inspect_counts(
    counts: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    many: float = 100,
    few: float = 20,
    batch_size: int = 128,
    expression: str = "class_counts",
) -> Inspection:
    """Compute what LGLA makes of class counts.

    Args:
        counts: samples per class ``[C]``, integers; classes with 0 are left out with a warning.
        names: of the classes ``[C]``.
        many: many-shot classes have more samples.
        few: few-shot classes have fewer, at most ``many``.
        batch_size: samples per batch.
        expression: Python for the positive counts, for the suggested line of code.

    Returns:
        All numbers, warnings and a suggestion.

    Raises:
        TypeError: counts are not integers, or an option is no number.
        ValueError: counts are negative or all 0, there is not one name a class, or an option is out of range.
    """
    array = integer_array("counts", counts, "give the number of samples of every class", by_class=True)
    if (array < 0).any() or not (array > 0).any():
        raise ValueError(
            "counts: expected counts >= 0, and at least one above 0, "
            f"got {f'a least of {array.min()}' if array.size and array.min() < 0 else 'none above 0'}"
        )
    if names is not None and len(names) != len(array):
        raise ValueError(f"names: expected one for each of {len(array)} classes, got {len(names)}")
    batch_size = positive_int("batch_size", batch_size, "give the samples per batch")

    def info(number: int) -> ClassInfo:
        return ClassInfo(number, None if names is None else names[number], int(array[number]))

    present = np.flatnonzero(array)
    kept = array[present]
    splits = shot_splits(torch.from_numpy(kept), many, few).numpy()
    infos = [info(int(number)) for number in present]

    groupings = []
    for num_experts in EXPERTS:
        if num_experts <= len(kept) + 1:
            grouper = ClassGrouper(kept, num_experts - 1)
            groupings.append(_grouping(CLALogitAdjuster(grouper), infos, batch_size))

    absent = [info(int(number)) for number in np.flatnonzero(array == 0)]
    return Inspection(
        num_classes=len(kept),
        num_samples=int(kept.sum()),
        largest=infos[int(kept.argmax())],
        smallest=infos[int(kept.argmin())],
        imbalance_factor=int(kept.max()) / int(kept.min()),
        gini=gini_coefficient(kept),
        many=float(many),
        few=float(few),
        shots=_shots(kept, splits),
        batch_size=batch_size,
        groupings=groupings,
        zero_count_classes=absent,
        warnings=_warnings(groupings, infos, absent, batch_size),
        suggestion=_suggestion(groupings, batch_size, expression),
    )


def gini_coefficient(counts: ArrayLike) -> float:
    r"""Measure how unequal counts are: 0 for equal ones, near 1 where one class has nearly all samples.

    The mean difference of two counts over twice their mean,
    :math:`\sum_{i,j} |n_i - n_j| \,/\, 2 C \sum_j n_j`.

    Example:
        >>> gini_coefficient([3, 1])
        0.25
    """
    ascending = np.sort(to_numpy("counts", counts).astype(np.float64))
    num_classes = len(ascending)
    ranks = np.arange(1, num_classes + 1)
    return float(((2 * ranks - num_classes - 1) * ascending).sum() / (num_classes * ascending.sum()))


def _shots(counts: npt.NDArray[np.int64], splits: npt.NDArray[np.bool_]) -> list[Shot]:
    total = int(counts.sum())
    return [
        Shot(
            name=name,
            num_classes=int(split.sum()),
            class_share=int(split.sum()) / len(counts),
            num_samples=int(counts[split].sum()),
            sample_share=int(counts[split].sum()) / total,
        )
        for name, split in zip(("many", "medium", "few"), splits, strict=True)
    ]


def _grouping(adjuster: CLALogitAdjuster, infos: Sequence[ClassInfo], batch_size: int) -> Grouping:
    grouper = adjuster.grouper
    counts, index = grouper.class_counts.numpy(), grouper.group_index.numpy()
    numbers = np.array([one.number for one in infos])
    total = int(grouper.group_masses.sum())

    groups = []
    for group, mass in enumerate(grouper.group_masses.tolist()):
        inside = index == group
        groups.append(
            Group(
                index=group,
                classes=numbers[inside].tolist(),
                class_share=int(inside.sum()) / len(counts),
                largest_count=int(counts[inside].max()),
                smallest_count=int(counts[inside].min()),
                mass=mass,
                mass_share=mass / total,
                miss_probability=(1 - mass / total) ** batch_size,
            )
        )

    margins = [_largest_margin(adjuster, expert, infos) for expert in range(adjuster.num_experts)]
    tau = 0.0 if adjuster.tau is None else float(adjuster.tau)
    return Grouping(adjuster.num_experts, tau, groups, margins)


def _largest_margin(adjuster: CLALogitAdjuster, expert: int, infos: Sequence[ClassInfo]) -> Margin:
    """Find the largest M(y, j, k) = T(k, j) - T(k, y): from the least to the greatest T."""
    target = int(adjuster.table[expert].argmin())
    margins = adjuster.margin(torch.tensor([target]))[0, expert]
    margin = float(margins.max())
    rivals = (margins == margins.max()).nonzero().flatten().tolist()
    is_global = expert == adjuster.num_experts - 1
    if margin <= 0:
        return Margin(expert, is_global, 0.0, None, None)
    rival = max(rivals, key=lambda j: infos[j].count)
    return Margin(expert, is_global, margin, infos[target], infos[rival])


def _warnings(
    groupings: Sequence[Grouping], infos: Sequence[ClassInfo], absent: Sequence[ClassInfo], batch_size: int
) -> list[Notice]:
    notices = []
    if absent:
        cases: list[dict[str, Any]] = [{"class": one.number, "name": one.name} for one in absent]
        one_absent = len(absent) == 1
        message = (
            f"{len(absent)} {'class has' if one_absent else 'classes have'} no samples and "
            f"{'is' if one_absent else 'are'} left out: {_listed([class_label(one) for one in absent])}. "
            "Class numbers here are those of the source. The losses expect labels 0..C-1 of the classes that "
            "remain, or zero_counts='smooth' or 'mask'."
        )
        notices.append(Notice("zero_count_classes", message, cases))

    if len(infos) == 1:
        notices.append(Notice("one_class", "There is only one class: nothing to classify.", []))
    elif len({one.count for one in infos}) == 1:
        message = (
            "All classes have the same count: every margin is 0 and LGLA is plain cross entropy of K experts."
        )
        notices.append(Notice("balanced", message, []))

    groups = [(grouping.num_experts, group) for grouping in groupings for group in grouping.groups]
    alone = [
        {"num_experts": k, "group": group.index, "class": group.classes[0]}
        for k, group in groups
        if len(group.classes) == 1
    ]
    if alone and len(infos) > 1:
        message = (
            f"Groups of one class: {_by_experts(alone)}. The local expert of such a group adjusts only the "
            "logit of that class, or none if the class is the most frequent one."
        )
        notices.append(Notice("single_class_groups", message, alone))

    missed = [
        {"num_experts": k, "group": group.index, "probability": group.miss_probability}
        for k, group in groups
        if group.miss_probability > OFTEN_MISSED
    ]
    if missed:
        worst = max(case["probability"] for case in missed)
        message = (
            f"More than 1 % of the batches of {batch_size} have no sample of a group: {_by_experts(missed)}; "
            f"at worst {worst:.0%}. The group then has no reference angle. Use larger batches or fewer "
            "experts."
        )
        notices.append(Notice("missed_groups", message, missed))

    return notices


def _by_experts(cases: Sequence[dict[str, Any]]) -> str:
    """List the groups of every K, as in ``K = 3: group 1; K = 4: groups 1, 2``."""
    groups: dict[int, list[str]] = {}
    for case in cases:
        groups.setdefault(case["num_experts"], []).append(str(case["group"] + 1))
    return "; ".join(
        f"K = {k}: {'group' if len(of_k) == 1 else 'groups'} {', '.join(of_k)}" for k, of_k in groups.items()
    )


def _suggestion(groupings: Sequence[Grouping], batch_size: int, expression: str) -> Suggestion:
    by_experts = {grouping.num_experts: grouping for grouping in groupings}
    chosen, problem = by_experts[min(by_experts)], ""

    paper = by_experts.get(PAPER_EXPERTS)
    if paper is None:
        why = "K = 2, because one class makes one group."
    else:
        sizes = [len(group.classes) for group in paper.groups]
        missed = [group for group in paper.groups if group.miss_probability > OFTEN_MISSED]
        if 1 in sizes:
            lone = paper.groups[sizes.index(1)]
            problem = f"group {lone.index + 1} would be class {lone.classes[0]} alone"
        elif missed:
            rare = missed[0]
            share = f"{rare.miss_probability:.0%} of the batches of {batch_size}"
            problem = f"{share} would miss group {rare.index + 1}"
        if problem:
            why = f"K = 2 rather than the paper's 3, because {problem}."
        else:
            chosen = paper
            why = (
                f"K = 3 as in the paper: its groups have {sizes[0]} and {sizes[1]} classes, and batches of "
                f"{batch_size} rarely miss one."
            )

    if not any(margin.margin for margin in chosen.margins):
        why = f"All margins are 0: there is nothing to adjust, so use plain cross entropy. Otherwise {why}"

    num_experts = chosen.num_experts
    usual, linear = suggest(num_experts), suggest(num_experts, classifier="linear")
    long = suggest(num_experts, training="long")
    reason = (
        f"{why} {usual.reason} K - 1 = {linear.tau:g} suits linear heads, label smoothing and underfit "
        f"networks, and {long.tau:.4g} suits long training."
    )

    line = f"criterion = LGLALoss({expression}, num_experts={num_experts}, tau={usual.tau:g})"
    return Suggestion(num_experts, usual.tau, float(num_experts - 1), reason, line)


def class_label(one: ClassInfo) -> str:
    """Give the number of a class, and its name if it has another one."""
    return f"{one.number}" if one.name in (None, str(one.number)) else f"{one.number} ({one.name})"


def _listed(labels: Sequence[str], most: int = 5) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more
