"""Vectors by class, such as samples per class: put in order and checked wherever they enter the library."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgla_losses._checks import finite_float


class Column(Protocol):
    """Describe a column of a table, such as a pandas ``Series``."""

    def to_numpy(self) -> npt.NDArray[Any]:
        """Give its values."""
        ...


#: A vector of samples per class, or of labels. Mappings and columns with an index are for what goes by class:
#: their keys are the class numbers ``0..C-1`` in any order. The index of a column of labels means nothing.
ArrayLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any] | Mapping[int, Any] | Column


def as_class_counts(class_counts: ArrayLike) -> Tensor:
    """Convert ``class_counts`` to a new CPU tensor ``[C]``, int64 or float64, positive and finite."""
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


def as_class_weight(
    class_weight: ArrayLike, of_classes: Tensor | None = None, name: str = "class_weight"
) -> Tensor:
    """Take weights of classes as a new float64 CPU tensor ``[C]``, finite and at least 0.

    Args:
        class_weight: the weights.
        of_classes: a vector of as many classes, or None for any number.
        name: of the argument.
    """
    array = to_numpy(name, class_weight)
    expected = "[C]" if of_classes is None else f"[{len(of_classes)}]"
    num_classes = array.size if of_classes is None else len(of_classes)
    if array.shape != (num_classes,) or array.size == 0:
        raise ValueError(
            f"{name}: expected one weight a class, shape {expected}, got shape {list(array.shape)}; for a "
            "number that all classes share multiply the loss"
        )
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise TypeError(f"{name}: expected integers or floats, got {array.dtype}")
    weights = array.astype(np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"{name}: expected finite weights >= 0, got {weights.min()} to {weights.max()}")
    return torch.from_numpy(weights)


def shot_splits(class_counts: Tensor, many: float, few: float) -> Tensor:
    """Split off many-, medium- and few-shot classes, bool ``[3, C]``; ``many`` and ``few`` are medium."""
    many = finite_float("many", many, low=0, high=math.inf, expected="a finite number >= 0")
    few = finite_float("few", few, low=0, high=many, expected=f"a number in 0..many={many:g}")
    counts = class_counts.double()  # PyTorch compares integers with a float in float32
    is_many, is_few = counts > many, counts < few
    return torch.stack([is_many, ~(is_many | is_few), is_few])


def to_numpy(name: str, values: Any) -> npt.NDArray[Any]:
    """Convert a vector by class to an array, in class order."""
    return as_array(name, in_class_order(name, values))


def in_class_order(name: str, values: Any) -> Any:
    """Sort the values of a mapping or of a pandas ``Series`` by their keys; others stay as they are."""
    if isinstance(values, Mapping):
        keys, entries = list(values), list(values.values())
    elif _is_series(values):
        keys, entries = list(values.index), values.to_numpy()
    else:
        return values
    num_classes = len(keys)
    numbered = all(isinstance(key, int | np.integer) and not isinstance(key, bool) for key in keys)
    if not numbered or sorted(keys) != list(range(num_classes)):
        way_out = f"give the values in the order of your classes, as [{name}[key] for key in class_names]"
        if numbered:
            way_out = (
                "number the classes from 0 and give each an entry, as "
                ".reindex(range(num_classes), fill_value=1) of pandas does"
            )
        elif all(isinstance(key, float | np.floating) for key in keys):
            way_out = "convert the labels by .astype(int) before you count them"
        raise ValueError(
            f"{name}: expected the class numbers 0..C-1 as keys or index, got {reprlib.repr(keys)}; {way_out}"
        )
    order = np.argsort(keys)
    return [entries[place] for place in order]


def _is_series(values: Any) -> bool:
    """Tell whether it is a pandas ``Series``, or alike: one value for each entry of an index."""
    has_index = hasattr(values, "to_numpy") and hasattr(getattr(values, "index", None), "__iter__")
    return has_index and getattr(values, "ndim", 1) == 1


def as_array(name: str, values: Any) -> npt.NDArray[Any]:
    """Convert a list, an array, a column of a table or a tensor on any device to an array."""
    if isinstance(values, Tensor):
        return _tensor_array(name, values)
    try:
        array = np.asarray(values)
        # Tables keep integers with the option of a missing one as objects.
        return np.asarray(array.tolist()) if array.dtype == object else array
    except ValueError as error:
        raise ValueError(f"{name}: expected a 1-D vector of numbers, got uneven rows") from error


def _tensor_array(name: str, values: Tensor) -> npt.NDArray[Any]:
    if values.is_meta or values.is_nested or values.layout != torch.strided:
        kind = "meta" if values.is_meta else "nested" if values.is_nested else str(values.layout)
        raise TypeError(f"{name}: expected a dense tensor that holds values, got one of kind {kind}")
    values = values.detach().cpu()
    # NumPy has neither bfloat16 nor floats of 8 bits; each of them is a float32.
    narrow = values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64)
    return np.asarray(values.float() if narrow else values)


def integer_array(
    name: str, values: ArrayLike, way_out: str, *, by_class: bool = False
) -> npt.NDArray[np.int64]:
    """Convert ``values`` to a vector of integers, by class or in an order of their own; may be empty."""
    array = to_numpy(name, values) if by_class else as_array(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D vector, got shape {list(array.shape)}; flatten it")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {array.dtype}; {way_out}")
    return array.astype(np.int64)
