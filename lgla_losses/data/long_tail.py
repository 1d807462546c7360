"""How many samples each class of a long-tailed data set keeps, and which ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lgla_losses._checks import describe, finite_float, integer, one_of, positive_int
from lgla_losses._counts import ArrayLike, integer_array
from lgla_losses._labels import count_classes, label_array


def long_tailed_counts(n_max: int, num_classes: int, imbalance_factor: float, kind: str = "exp") -> Tensor:
    r"""Compute the samples per class of a long-tailed data set; class 0 is the largest.

    ``"exp"``: :math:`n_j = \lfloor n_{max} \, IF^{-j / (C - 1)} \rfloor`. ``"step"``: the first half of
    the classes keeps :math:`n_{max}`, the second :math:`\lfloor n_{max} / IF \rfloor`. At least 1 each.

    Source: Cui et al., CVPR 2019, section 5.1 (``"exp"``); Cao et al., NeurIPS 2019, section 4.2 (both;
    ``"step"`` is from Buda et al., Neural Networks 106, 2018). Rounded down, as in the code of Cao et al.

    Args:
        n_max: samples of the largest class: 500 for CIFAR-100, 5000 for CIFAR-10.
        num_classes: number of classes ``C``.
        imbalance_factor: largest class over smallest, at least 1.
        kind: ``"exp"`` or ``"step"``.

    Returns:
        int64 ``[C]``.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of its range, or ``kind`` is another word.

    Example:
        >>> long_tailed_counts(500, num_classes=5, imbalance_factor=100)
        tensor([500, 158,  50,  15,   5])
    """
    n_max = positive_int("n_max", n_max, "give the samples of the largest class")
    num_classes = positive_int("num_classes", num_classes, "give the number of classes")
    expected = "a finite number >= 1, the largest class over the smallest"
    factor = finite_float("imbalance_factor", imbalance_factor, low=1.0, high=math.inf, expected=expected)
    if one_of("kind", kind, ("exp", "step")) == "exp":
        # Same order of operations as in the published code: with 1 / IF not first, a count could round
        # differently.
        counts = [int(n_max * (1 / factor) ** (j / max(1.0, num_classes - 1.0))) for j in range(num_classes)]
    else:
        head = (num_classes + 1) // 2
        counts = [n_max] * head + [int(n_max / factor)] * (num_classes - head)
    return torch.tensor(counts).clamp_min(1)


def long_tailed_indices(labels: ArrayLike | Dataset[Any], counts: ArrayLike, seed: int = 0) -> Tensor:
    """Draw the samples of a long-tailed subset; for equal seeds the same as the usual CIFAR-LT.

    One legacy NumPy generator shuffles the samples of class 0, of class 1, and so on; the first of each class
    are taken. The global NumPy generator is not changed.

    Source: the code of Cao et al., NeurIPS 2019, which seeds with 0.

    Args:
        labels: labels, as for :func:`~lgla_losses.count_classes`.
        counts: samples to take from every class, positive integers ``[C]``.
        seed: 0 to 2**32 - 1.

    Returns:
        Indices of samples, int64, class by class.

    Raises:
        TypeError: labels or counts are not integers.
        ValueError: a label lies outside ``0..C-1``, a count is below 1, or a class has too few samples.

    Example:
        >>> long_tailed_indices([1, 0, 0, 1], counts=[2, 1])
        tensor([2, 1, 0])
    """
    wanted = integer_array("counts", counts, "long_tailed_counts makes them", by_class=True)
    seed = integer("seed", seed, "it seeds NumPy's legacy generator")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer 0..2**32 - 1, got {seed}")
    if len(wanted) == 0 or wanted.min() < 1:
        raise ValueError(f"counts: expected at least 1 of every class [C], got {describe(wanted.tolist())}")

    array = label_array(labels)
    held = count_classes(array, len(wanted)).numpy()
    short = np.flatnonzero(held < wanted)
    if short.size:
        j = short[0]
        raise ValueError(
            f"counts: expected at most as many as there are, got {wanted[j]} for class {j}, which has "
            f"{held[j]} ({len(short)} of {len(wanted)} classes are too small); lower n_max of "
            "long_tailed_counts"
        )

    generator = np.random.RandomState(seed)
    chosen = []
    for j, count in enumerate(wanted.tolist()):
        index = np.flatnonzero(array == j)
        generator.shuffle(index)
        chosen.append(index[:count])
    return torch.from_numpy(np.concatenate(chosen).astype(np.int64))
