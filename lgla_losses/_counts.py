"""Vectors by class, such as samples per class: sorted and checked where they enter the library."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgla_losses._checks import class_index, describe, finite_float, one_of


class Column(Protocol):
    """Describe a column of a table, such as a pandas ``Series``."""

    def to_numpy(self) -> npt.NDArray[Any]:
        """Return its values."""
        ...


#: A vector of samples per class, or of labels. Mappings and columns with an index hold values by class: their
#: keys are the class numbers ``0..C-1`` in any order. The index of a column of labels is ignored.
ArrayLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any] | Mapping[int, Any] | Column


#: Ways to treat classes without samples.
ZERO_COUNTS = ("error", "smooth", "mask")


class ClassRules(NamedTuple):
    """Say which classes are adjusted: those with samples that are not background.

    Attributes:
        zero_counts: ``"error"`` refuses classes without samples, ``"smooth"`` adds one sample to every class,
            ``"mask"`` takes classes without samples out of the softmax.
        background: indices of the classes that are left out of the adjustment.
        are_options: whether the user can choose them, so that errors may suggest them.
    """

    zero_counts: str = "error"
    background: tuple[int, ...] = ()
    are_options: bool = True

    @classmethod
    def of(
        cls, class_counts: ArrayLike, zero_counts: str, background: int | Iterable[int] | None
    ) -> tuple[Self, Tensor]:
        """Check the options of a loss; give them with its class counts ``[C]``.

        Raises:
            TypeError: counts are not numbers, or an option is of a wrong type.
            ValueError: counts are wrong, ``zero_counts`` is another word, or ``background`` is not a class,
                names one twice, or leaves none.
        """
        counts = as_class_counts(class_counts, one_of("zero_counts", zero_counts, ZERO_COUNTS))
        rules = cls(zero_counts, _background_classes(background, len(counts)))
        return rules, rules._with_samples(counts, int(zero_counts == "smooth"))

    def counts(self, class_counts: ArrayLike) -> Tensor:
        """Check class counts from the user; give those to compute with, on the CPU ``[C]``."""
        counts = as_class_counts(class_counts, self.zero_counts if self.are_options else None)
        return self._with_samples(counts, int(self.zero_counts == "smooth"))

    def saved(self, class_counts: ArrayLike) -> Tensor:
        """Check class counts that a loss has used, such as those of a state; give them ``[C]``."""
        zero_counts = "mask" if self.zero_counts == "mask" else "error" if self.are_options else None
        return self._with_samples(as_class_counts(class_counts, zero_counts), 0)

    def _with_samples(self, counts: Tensor, added: int) -> Tensor:
        """Raise if no class to adjust has samples, without those added by smoothing."""
        if not (self.adjusted(counts) & (counts > added)).any():
            besides = f" besides background={list(self.background)}" if self.background else ""
            raise ValueError(
                f"class_counts: expected a class with samples{besides}, got none of {len(counts)}; "
                "count_classes(labels, num_classes) counts labels"
            )
        return counts

    def adjusted(self, counts: Tensor) -> Tensor:
        """Say which classes are adjusted, bool ``[C]``."""
        adjusted = counts > 0
        if self.background:
            index = torch.tensor(self.background, dtype=torch.int64, device=counts.device)
            adjusted.index_fill_(0, index, False)
        return adjusted

    def spread(self, values: Tensor, counts: Tensor, *, masked: float, background: float) -> Tensor:
        """Put values of the adjusted classes in their places among all classes.

        Args:
            values: values of the adjusted classes ``[..., A]``.
            counts: samples per class ``[C]``.
            masked: value of the classes without samples.
            background: value of the background classes that have samples.

        Returns:
            ``[..., C]``
        """
        spread = values.new_full((*values.shape[:-1], len(counts)), background)
        spread[..., counts == 0] = masked
        spread[..., self.adjusted(counts)] = values
        return spread

    def check_smoothing(self, label_smoothing: float) -> None:
        """Raise if label smoothing would give masked classes a share of every target."""
        if self.zero_counts == "mask" and label_smoothing > 0:
            raise ValueError(
                f"label_smoothing: expected 0 with zero_counts='mask', got {label_smoothing}, which gives "
                "every class a share of the target, even masked ones; set zero_counts='smooth' or "
                "label_smoothing=0"
            )

    def shown(self) -> str:
        """Name the options that differ from the default, for a ``repr``; each ends with a comma."""
        zero_counts = f"zero_counts={self.zero_counts!r}, " if self.zero_counts != "error" else ""
        return zero_counts + (f"background={list(self.background)}, " if self.background else "")


class Ruled:
    """Show the rules by which adjustments are made from class counts."""

    #: Which classes are adjusted.
    _rules = ClassRules()

    @property
    def zero_counts(self) -> str:
        """How classes without samples are treated, as given."""
        return self._rules.zero_counts

    @property
    def background(self) -> tuple[int, ...]:
        """The classes that are left out of the adjustment, in order."""
        return self._rules.background


def _background_classes(background: int | Iterable[int] | None, num_classes: int) -> tuple[int, ...]:
    """Check that ``background`` holds class indices, each once; return them sorted."""
    if background is None:
        return ()
    # Tensors without dimensions look iterable but are not.
    many = isinstance(background, Iterable) and getattr(background, "ndim", 1) > 0
    many = many and not isinstance(background, str)  # the letters of a string are not classes
    given: list[Any] = list(background) if many else [background]  # type: ignore[arg-type]
    for index in given:  # a boolean would pass as 0 or 1
        if getattr(index, "dtype", type(index)) in (bool, np.bool_, torch.bool):
            raise TypeError(
                f"background: expected integers, the indices of classes, got {describe(index)}; for a mask "
                "pass mask.nonzero().flatten()"
            )
    classes = sorted(class_index("background", index, num_classes) for index in given)
    for before, index in itertools.pairwise(classes):
        if before == index:
            raise ValueError(f"background: expected each class once, got class {index} twice; drop one")
    if len(classes) == num_classes:
        raise ValueError(
            f"background: expected at least one other class, got all {num_classes} classes; leave one to "
            "adjust"
        )
    return tuple(classes)


def as_class_counts(class_counts: ArrayLike, zero_counts: str | None = None) -> Tensor:
    """Convert ``class_counts`` to a new CPU tensor ``[C]``, int64 or float64, positive and finite.

    Args:
        class_counts: samples per class.
        zero_counts: as in :class:`ClassRules`, if the caller has that option. With ``"smooth"`` every class
            gets one more sample, with ``"mask"`` counts may be 0.
    """
    array = to_numpy("class_counts", class_counts)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            "class_counts: expected a non-empty 1-D vector [C] of samples per class, got shape "
            f"{list(array.shape)}; count_classes(labels, num_classes) computes it"
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

    _check_each_count(exact, zero_counts)

    more = int(zero_counts == "smooth")
    total = sum(exact.tolist())
    if more and exact.dtype == np.float64 and 0 < total < 1.001:
        raise ValueError(
            "class_counts: expected numbers of samples with zero_counts='smooth', got frequencies, with "
            f"sum {total:.3g}; one more sample per class would distort them: pass counts, or "
            "zero_counts='mask'"
        )
    total += more * exact.size
    if not math.isfinite(total) or (exact.dtype == np.int64 and total >= 2**63):
        raise ValueError(
            f"class_counts: expected counts whose sum fits {exact.dtype}, got a sum of {total:.3g}; "
            "divide all counts by the same number"
        )

    return torch.from_numpy(exact + more)


def _check_each_count(counts: npt.NDArray[Any], zero_counts: str | None) -> None:
    """Raise for counts that are not finite, negative, or 0 where 0 is not allowed."""
    takes_zeros = zero_counts in ("smooth", "mask")
    wrong = ~(np.isfinite(counts) & ((counts >= 0) if takes_zeros else (counts > 0)))
    if not wrong.any():
        return

    expected = "finite counts >= 0" if takes_zeros else "positive, finite counts"
    by_hand = "leave classes without samples out of the label space, or set a small positive count"
    way_out = {
        None: by_hand,
        "error": (
            "zero_counts='smooth' adds one sample to every class, zero_counts='mask' takes classes without "
            f"samples out of the softmax; or {by_hand}"
        ),
    }.get(zero_counts, "count_classes(labels, num_classes) counts labels")
    j = int(np.flatnonzero(wrong)[0])
    raise ValueError(
        f"class_counts: expected {expected}, got {counts[j]} for class {j} ({int(wrong.sum())} of "
        f"{counts.size} classes are wrong); {way_out}"
    )


def as_class_weight(
    class_weight: ArrayLike, of_classes: Tensor | None = None, name: str = "class_weight"
) -> Tensor:
    """Convert weights of classes to a new float64 CPU tensor ``[C]``, finite and at least 0.

    Args:
        class_weight: the weights.
        of_classes: a vector with the same number of classes, or None for any number.
        name: name of the argument.
    """
    array = to_numpy(name, class_weight)
    expected = "[C]" if of_classes is None else f"[{len(of_classes)}]"
    num_classes = array.size if of_classes is None else len(of_classes)
    if array.shape != (num_classes,) or array.size == 0:
        raise ValueError(
            f"{name}: expected one weight per class, shape {expected}, got shape {list(array.shape)}; to "
            "use one number for all classes multiply the loss"
        )
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise TypeError(f"{name}: expected integers or floats, got {array.dtype}")
    weights = array.astype(np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"{name}: expected finite weights >= 0, got {weights.min()} to {weights.max()}")
    return torch.from_numpy(weights)


def shot_splits(class_counts: Tensor, many: float, few: float) -> Tensor:
    """Find many-, medium- and few-shot classes, bool ``[3, C]``; ``many`` and ``few`` are medium."""
    many = finite_float("many", many, low=0, high=math.inf, expected="a finite number >= 0")
    few = finite_float("few", few, low=0, high=many, expected=f"a number in 0..many={many:g}")
    counts = class_counts.double()  # PyTorch compares integers with a float in float32
    is_many, is_few = counts > many, counts < few
    return torch.stack([is_many, ~(is_many | is_few), is_few])


def to_numpy(name: str, values: Any) -> npt.NDArray[Any]:
    """Convert a vector by class to an array, in class order."""
    return as_array(name, in_class_order(name, values))


def in_class_order(name: str, values: Any) -> Any:
    """Sort the values of a mapping or of a pandas ``Series`` by their keys; leave others unchanged."""
    if isinstance(values, Mapping):
        keys, entries = list(values), list(values.values())
    elif _is_series(values):
        keys, entries = list(values.index), values.to_numpy()
    else:
        return values
    num_classes = len(keys)
    numbered = all(isinstance(key, int | np.integer) and not isinstance(key, bool) for key in keys)
    if not numbered or sorted(keys) != list(range(num_classes)):
        way_out = f"pass the values in the order of your classes, as [{name}[key] for key in class_names]"
        if numbered:
            way_out = (
                "number the classes from 0 and give each an entry, for example with "
                ".reindex(range(num_classes), fill_value=1) of pandas"
            )
        elif all(isinstance(key, float | np.floating) for key in keys):
            way_out = "convert the labels with .astype(int) before you count them"
        raise ValueError(
            f"{name}: expected the class numbers 0..C-1 as keys or index, got {reprlib.repr(keys)}; {way_out}"
        )
    order = np.argsort(keys)
    return [entries[place] for place in order]


def _is_series(values: Any) -> bool:
    """Say whether it is like a pandas ``Series``: one value per entry of an index."""
    has_index = hasattr(values, "to_numpy") and hasattr(getattr(values, "index", None), "__iter__")
    return has_index and getattr(values, "ndim", 1) == 1


def as_array(name: str, values: Any) -> npt.NDArray[Any]:
    """Convert a list, an array, a column of a table or a tensor on any device to an array."""
    if isinstance(values, Tensor):
        return _tensor_array(name, values)
    try:
        array = np.asarray(values)
        # Tables store integer columns that allow missing values as objects.
        return np.asarray(array.tolist()) if array.dtype == object else array
    except ValueError as error:
        raise ValueError(
            f"{name}: expected a 1-D vector of numbers, got rows of different lengths"
        ) from error


def _tensor_array(name: str, values: Tensor) -> npt.NDArray[Any]:
    if values.is_meta or values.is_nested or values.layout != torch.strided:
        kind = "meta" if values.is_meta else "nested" if values.is_nested else str(values.layout)
        raise TypeError(f"{name}: expected a dense tensor with values, got one of kind {kind}")
    values = values.detach().cpu()
    # NumPy has no bfloat16 and no 8-bit floats; float32 holds them exactly.
    narrow = values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64)
    return np.asarray(values.float() if narrow else values)


def integer_array(
    name: str, values: ArrayLike, way_out: str, *, by_class: bool = False
) -> npt.NDArray[np.int64]:
    """Convert ``values`` to a vector of integers, by class or in any order; it may be empty."""
    array = to_numpy(name, values) if by_class else as_array(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D vector, got shape {list(array.shape)}; flatten it")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {array.dtype}; {way_out}")
    return array.astype(np.int64)
