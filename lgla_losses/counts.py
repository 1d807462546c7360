"""Samples per class: counted from labels, and checked wherever they enter the library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lgla_losses.checks import finite_float, positive_int

#: A vector of samples per class, or of labels.
ArrayLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]


def count_classes(labels: ArrayLike | Dataset[Any], num_classes: int) -> Tensor:
    r"""Count the samples of every class, :math:`n_j` of Eq. 4.

    Args:
        labels: class indices ``[N]`` as a list, an array or a tensor, or a data set that keeps
            them in ``targets`` or ``labels`` (as torchvision's do), or a ``Subset`` of one.
        num_classes: number of classes ``C``; classes without a sample count 0.

    Returns:
        int64 ``[C]`` on the CPU.

    Raises:
        TypeError: labels are not integers, or the data set does not keep them.
        ValueError: labels are not 1-D, or one lies outside ``0..C-1``.

    Example:
        >>> count_classes([0, 0, 2], num_classes=4)
        tensor([2, 0, 1, 0])
    """
    num_classes = positive_int("num_classes", num_classes, "give the number of classes")
    array = label_array(labels)
    if array.ndim != 1:
        raise ValueError(f"labels: expected 1-D class indices, got shape {list(array.shape)}; flatten them")
    if array.size == 0:
        return torch.zeros(num_classes, dtype=torch.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"labels: expected integer class indices, got {array.dtype}; "
            "map names or one-hot rows to indices first, for example with np.unique(..., return_inverse=True)"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels: expected class indices 0..{num_classes - 1}, got {low if low < 0 else high}; "
            "leave ignored samples out, or raise num_classes"
        )
    return torch.from_numpy(np.bincount(array, minlength=num_classes).astype(np.int64))


def label_array(labels: ArrayLike | Dataset[Any]) -> npt.NDArray[Any]:
    """``labels`` as an array, from a vector or from the data set that keeps them."""
    if isinstance(labels, Subset):
        return label_array(labels.dataset)[np.asarray(labels.indices, dtype=np.int64)]
    for attribute in ("targets", "labels"):
        if hasattr(labels, attribute):
            return label_array(getattr(labels, attribute))
    if isinstance(labels, Dataset):
        raise TypeError(
            f"labels: expected a data set with an attribute targets or labels, got {type(labels).__name__}; "
            "pass the labels themselves: count_classes([y for _, y in dataset], num_classes)"
        )
    return to_numpy("labels", labels)


def as_class_counts(class_counts: ArrayLike) -> Tensor:
    """``class_counts`` as a new CPU tensor ``[C]``, int64 or float64, positive and finite."""
    array = to_numpy("class_counts", class_counts)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            "class_counts: expected a non-empty 1-D vector [C] of samples per class, "
            f"got shape {list(array.shape)}; count_classes(labels, num_classes) makes one"
        )
    if np.issubdtype(array.dtype, np.integer):
        exact = array.astype(np.int64)
        if (exact != array).any():
            raise ValueError("class_counts: expected counts below 2**63, got a larger one; pass floats")
    elif np.issubdtype(array.dtype, np.floating):
        exact = array.astype(np.float64)
    else:
        raise TypeError(
            f"class_counts: expected integers or floats, got {array.dtype}; "
            "count_classes(labels, num_classes) counts labels"
        )
    wrong = ~(np.isfinite(exact) & (exact > 0))
    if wrong.any():
        j = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"class_counts: expected positive, finite counts, got {exact[j]} for class {j} "
            f"({int(wrong.sum())} such of {exact.size}); leave classes without samples out of the label "
            "space, or give them a small positive count"
        )
    total = sum(exact.tolist())
    if not math.isfinite(total) or (exact.dtype == np.int64 and total >= 2**63):
        raise ValueError(
            f"class_counts: expected counts whose sum fits {exact.dtype}, got a sum of {total:.3g}; "
            "divide all counts by the same number"
        )
    return torch.from_numpy(exact)


def shot_splits(class_counts: Tensor, many: float, few: float) -> Tensor:
    """Many-, medium- and few-shot classes, bool ``[3, C]``; counts of ``many`` and ``few`` are medium."""
    many = finite_float("many", many, low=0, high=math.inf, expected="a finite number >= 0")
    few = finite_float("few", few, low=0, high=many, expected=f"a number in 0..many={many:g}")
    is_many, is_few = class_counts > many, class_counts < few
    return torch.stack([is_many, ~(is_many | is_few), is_few])


def to_numpy(name: str, values: Any) -> npt.NDArray[Any]:
    """``values`` as an array, from a list, an array or a tensor on any device."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16; every half-precision number is a float32.
        return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: expected a 1-D vector of numbers, got uneven rows") from error


def integer_array(name: str, values: ArrayLike, way_out: str) -> npt.NDArray[np.int64]:
    """``values`` as a vector of integers; an empty list is one."""
    array = to_numpy(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D vector, got shape {list(array.shape)}; flatten it")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {array.dtype}; {way_out}")
    return array.astype(np.int64)
