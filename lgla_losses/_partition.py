"""The exact partition of sorted classes into groups of equal sample mass (section 3.2)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def partition_sorted(counts: Array, num_groups: int) -> list[int]:
    """Cut a sorted count vector into contiguous groups of masses as equal as possible.

    Minimises the sum of squared group masses over all partitions into ``num_groups``
    non-empty contiguous groups, exactly; among equal optima the lexicographically smallest
    cuts win. The cost of a group is a convex function of its mass, so every layer of the
    dynamic programme is a totally monotone matrix whose row minima take ``O(C log C)``.

    Float64 decides except for near-ties: a first programme in float64 finds all cuts on any path within
    rounding of the optimum, and a second one in exact integers decides between those. Time ``O(G C log C)``,
    memory ``O(G C)``.

    Args:
        counts: positive samples per class, int64 or float64 ``[C]``, already sorted.
        num_groups: number of groups ``G``, ``1 <= G <= C``.

    Returns:
        The ``G - 1`` cut positions. Group ``g`` holds ``counts[cuts[g-1]:cuts[g]]``.
    """
    prefix = np.concatenate(([0], np.cumsum(_as_whole_numbers(counts))))
    alone = _dominant_classes(prefix, num_groups)
    cuts = list(range(1, alone + 1))
    if num_groups - alone > 1:
        prefix = prefix[alone:] - prefix[alone]
        shortlist = _near_optimal_cuts((prefix / prefix[-1]).astype(np.float64), num_groups - alone)
        cuts += [alone + cut for cut in _first_optimal_path(prefix, shortlist)]
    return cuts


def _dominant_classes(prefix: Array, num_groups: int) -> int:
    """Count the first classes that each form a group, because one outweighs all classes after it.

    Let class i < G - 1 (from 0) weigh at least as much as all classes after it, R together. A group that held
    it and a later class would be improved by moving that class on to the next group. Two classes up
    to i in one group would be improved by a cut between them, which saves at least 2 R**2, in exchange
    for one between the groups after i, which costs at most R**2 / 2. Without these classes doubles resolve
    the others, however small their share.
    """
    own, after = np.diff(prefix)[: num_groups - 1], (prefix[-1] - prefix[1:])[: num_groups - 1]
    return int(np.max(np.flatnonzero(own >= after) + 1, initial=0))


def _as_whole_numbers(counts: Array) -> Array:
    """Convert the counts to Python integers in a common unit, a power of two: no rounding."""
    if np.issubdtype(counts.dtype, np.integer):
        return counts.astype(object)
    mantissa, exponent = np.frexp(counts)
    shift = (exponent - exponent.min()).astype(object)
    whole: Array = np.left_shift(np.ldexp(mantissa, 53).astype(np.int64).astype(object), shift)
    return whole


def _near_optimal_cuts(prefix: Array, num_groups: int) -> list[Array]:
    """Find candidates for each cut: positions on a path within rounding of the optimum."""
    size = len(prefix) - 1
    forward = _cheapest_prefixes(prefix, num_groups)
    backward = _cheapest_prefixes(1.0 - prefix[::-1], num_groups)
    # Every one of the G layers and log2(C) levels of the search may lose a few ulps of 1.
    tolerance = 8 * num_groups * (size.bit_length() + 4) * np.finfo(np.float64).eps
    shortlist = []
    for cut in range(1, num_groups):
        # forward[cut - 1] starts at position `cut`; the reversed programme ends there.
        through = forward[cut - 1] + backward[num_groups - cut - 1][::-1]
        shortlist.append(cut + np.flatnonzero(through <= through.min() + tolerance))
    return shortlist


def _cheapest_prefixes(prefix: Array, num_groups: int) -> list[Array]:
    """Compute for g = 1..G-1 the least cost of g groups over classes 0..c, for every feasible c."""
    # With g groups before a cut and G - g after it, the cut lies in g..C-(G-g).
    last = len(prefix) - num_groups
    layers = [prefix[1 : last + 1] ** 2]
    for group in range(2, num_groups):
        ends = prefix[group : last + group]
        starts = prefix[group - 1 : last + group - 1]
        layers.append(_row_minima(ends, starts, layers[-1]))
    return layers


def _first_optimal_path(prefix: Array, shortlist: list[Array]) -> list[int]:
    """Find the lexicographically smallest optimal cuts among the candidates, in exact arithmetic."""
    ends = [prefix[candidates] for candidates in shortlist]
    to_go = [(prefix[-1] - ends[-1]) ** 2]
    for here, after in zip(ends[-2::-1], ends[:0:-1], strict=True):
        to_go.append(_row_minima(here, after, to_go[-1]))
    to_go.reverse()

    cuts: list[int] = []
    start = 0
    for candidates, end, cost in zip(shortlist, ends, to_go, strict=True):
        # An empty group is never cheaper, so a minimum always lies after the last cut.
        cuts.append(int(candidates[np.argmin((end - start) ** 2 + cost)]))
        start = prefix[cuts[-1]]
    return cuts


def _row_minima(rows: Array, columns: Array, values: Array) -> Array:
    """Compute ``min_j values[j] + (rows[i] - columns[j])**2`` for every i, rows and columns ascending.

    The leftmost minimum moves right with i, so the rows of each level search only between the minima of their
    neighbours from the level above. It handles a whole level at a time, with floats or Python integers.
    """
    num_rows = len(rows)
    minima = np.empty(num_rows, dtype=values.dtype)
    # argmin[i + 1] belongs to row i; the ends bound the first and the last row.
    argmin = np.zeros(num_rows + 2, dtype=np.int64)
    argmin[-1] = len(columns) - 1
    stride = 1 << (num_rows.bit_length() - 1)
    while stride:
        level = np.arange(stride, num_rows + 1, 2 * stride)
        low = argmin[level - stride]
        high = argmin[np.minimum(level + stride, num_rows + 1)]
        width = high - low + 1
        offset = np.concatenate(([0], np.cumsum(width)))
        column = np.arange(offset[-1]) + np.repeat(low - offset[:-1], width)
        cost = values[column] + (np.repeat(rows[level - 1], width) - columns[column]) ** 2
        least = np.minimum.reduceat(cost, offset[:-1])
        hits = np.flatnonzero(cost == np.repeat(least, width))
        first = hits[np.searchsorted(hits, offset[:-1])]
        minima[level - 1] = least
        argmin[level] = column[first]
        stride //= 2
    return minima
