"""Class labels: find them in vectors and data sets, and count them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lgla_losses._checks import boolean, describe, positive_int
from lgla_losses._counts import ArrayLike, as_array

#: Attributes that hold one label per sample; those with an underscore are torchvision's.
LABELS = ("targets", "labels", "_labels", "y")

#: Attributes that hold pairs of an input and its label.
PAIRS = ("samples", "_samples", "_flat_character_images")

#: Where torchvision's data sets with several kinds of targets keep class indices.
TARGET_TYPES: dict[str, Callable[[Any], Any]] = {
    "category": lambda dataset: dataset.y if hasattr(dataset, "y") else dataset._labels,
    "binary-category": attrgetter("_bin_labels"),
    "attr": attrgetter("attr"),
    "identity": lambda dataset: dataset.identity[:, 0],
    "full": lambda dataset: [category for category, _ in dataset.index],
}

WAY_OUT = "pass the labels themselves, or iterate=True, which reads every sample"


def count_classes(labels: ArrayLike | Iterable[Any], num_classes: int, *, iterate: bool = False) -> Tensor:
    r"""Count the samples of every class, :math:`n_j` of Eq. 4.

    For a data set, the labels that it holds are counted, after its ``target_transform``; no sample is read.
    They are its ``targets`` or ``labels``, the equivalent in torchvision's data sets, the second of the two
    tensors of a ``TensorDataset``, or the column ``label`` or ``labels`` of a Hugging Face data set. If
    ``__getitem__`` changes labels in another way, pass ``iterate=True``.

    Args:
        labels: class indices ``[N]`` as a list, an array, a tensor or a column of a table (its index is
            ignored); a data set that holds them; a ``Subset`` or ``ConcatDataset`` of such; or a
            ``DataLoader`` over one, whose data set is counted. A warning tells you if a
            :class:`~lgla_losses.data.ClassBalancedSampler` or ``WeightedRandomSampler`` draws the classes in
            other shares: the losses need the counts after sampling.
        num_classes: number of classes ``C``; classes without samples get 0.
        iterate: read every sample of the data set for its label. This is slow, but works for any data set of
            pairs ``(input, label)`` or of mappings with a ``label``.

    Returns:
        int64 ``[C]`` on the CPU.

    Raises:
        TypeError: labels are not integers, or the data set does not hold them.
        ValueError: labels are not 1-D, one lies outside ``0..C-1``, the number of labels of the data set is
            not its number of samples, or a ``DataLoader`` has a ``ClassBalancedSampler`` with other labels.

    Example:
        >>> count_classes([0, 0, 2], num_classes=4)
        tensor([2, 0, 1, 0])
    """
    num_classes = positive_int("num_classes", num_classes, "give the number of classes")
    array = label_array(labels, iterate=boolean("iterate", iterate))
    if array.ndim != 1:
        raise ValueError(
            f"labels: expected 1-D class indices, got shape {list(array.shape)}; flatten a column of them, "
            "take .argmax(1) of one-hot rows; for rows with several classes (multi-hot) the class counts "
            "are targets.sum(dim=0)"
        )
    if array.size == 0:
        return torch.zeros(num_classes, dtype=torch.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"labels: expected integer class indices, got {array.dtype}; leave out samples without a label, "
            "and map names or one-hot rows to indices first, for example with np.unique(..., "
            "return_inverse=True), or .cat.codes of pandas"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels: expected class indices 0..{num_classes - 1}, got {low if low < 0 else high}; leave "
            "out ignored samples, or raise num_classes"
        )
    array = array.astype(np.int64)
    counts = np.bincount(array, minlength=num_classes)
    if isinstance(labels, DataLoader):
        change = _change_by_sampler(labels, array, counts)
        if change is not None:
            warnings.warn(change, stacklevel=2)
    return torch.from_numpy(counts)


def _change_by_sampler(
    loader: DataLoader[Any], labels: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> str | None:
    """Say that a loader's sampler draws the classes in other shares than the data set has, or None."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    balanced = getattr(sys.modules.get("lgla_losses.data.sampling"), "ClassBalancedSampler", None)
    drawn = np.zeros(len(counts))
    if balanced and isinstance(sampler, balanced):
        _same_labels(sampler.labels.numpy(), labels)
        known = sampler.class_counts.numpy()[: len(counts)]  # the other classes have no samples
        drawn[: len(known)] = known
        way_out = "the losses need sampler.class_counts"
    elif isinstance(sampler, WeightedRandomSampler) and sampler.replacement:
        weights = sampler.weights.detach().cpu().numpy()[: len(labels)]
        drawn += np.bincount(labels[: len(weights)], weights, minlength=len(counts))
        way_out = (
            "the losses need torch.bincount(labels, weights=sampler.weights), or use "
            "lgla_losses.data.ClassBalancedSampler and its class_counts"
        )
    else:
        return None

    if np.allclose(drawn * counts.sum(), drawn.sum() * counts, rtol=0.01, atol=0):
        return None
    return (
        f"labels: these are the counts of the data set, but the {type(sampler).__name__} of the DataLoader "
        f"draws the classes in other shares; {way_out}"
    )


def _same_labels(of_sampler: npt.NDArray[np.int64], of_dataset: npt.NDArray[np.int64]) -> None:
    """Check that the labels of a sampler equal those of its data set."""
    if np.array_equal(of_sampler, of_dataset):
        return
    if len(of_sampler) != len(of_dataset):
        got = f"one with {len(of_sampler)} labels for {len(of_dataset)} samples"
    else:
        i = int(np.flatnonzero(of_sampler != of_dataset)[0])
        got = f"one with label {of_sampler[i]} for sample {i} of class {of_dataset[i]}"
    raise ValueError(
        f"labels: expected a ClassBalancedSampler for the data set of the DataLoader, got {got}; construct "
        "it from that data set or its labels"
    )


def label_array(labels: Any, *, iterate: bool = False) -> npt.NDArray[Any]:
    """Convert ``labels`` to an array, from a vector or from the data set that holds them."""
    if isinstance(labels, DataLoader):
        return label_array(labels.dataset, iterate=iterate)
    if iterate:
        return as_array("labels", _iterated(labels))

    if isinstance(labels, Subset | ConcatDataset) and not _changes_labels(labels):
        if isinstance(labels, Subset):
            return _taken(label_array(labels.dataset), labels.indices)
        return np.concatenate([label_array(one) for one in labels.datasets])
    if isinstance(labels, Mapping):
        raise TypeError(
            "labels: expected one label per sample, got a mapping; if it holds counts by class, pass it to "
            "the losses directly"
        )

    # Vectors first: a table column may have a row called targets.
    if not isinstance(labels, Dataset) and hasattr(labels, "__array__"):
        return as_array("labels", labels)
    kept = _kept_labels(labels)
    if kept is not None:
        return _checked(labels, *kept)

    if isinstance(labels, Dataset) or not isinstance(labels, Sequence):
        raise TypeError(
            "labels: expected labels, or a data set that holds them as targets or labels, got "
            f"{type(labels).__name__}; {WAY_OUT}"
        )
    return as_array("labels", labels)


def _changes_labels(part: Subset[Any] | ConcatDataset[Any]) -> bool:
    """Say whether a user's class may change the labels of the data sets inside it."""
    kind = Subset if isinstance(part, Subset) else ConcatDataset
    own = hasattr(part, "target_transform") or any(hasattr(part, name) for name in LABELS)
    return own or type(part).__getitem__ is not kind.__getitem__


def _kept_labels(dataset: Any) -> tuple[str, Any] | None:
    """Find where a data set holds its labels, and read them."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list):
        return _column(dataset, columns)
    types = getattr(dataset, "target_type", None) or getattr(dataset, "_target_types", None)
    if types:
        (kind, *others) = [types] if isinstance(types, str) else types
        if not others and kind in TARGET_TYPES:
            with suppress(AttributeError):  # a data set may use the name for something else
                return f"target type {kind!r}", TARGET_TYPES[kind](dataset)
    for name in LABELS[:2] if types else LABELS:
        if getattr(dataset, name, None) is not None:
            return name, getattr(dataset, name)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return "tensors[1]", dataset.tensors[1]
    for name in PAIRS:
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            return name, [label for _, label in pairs]
    return None


def _column(dataset: Any, columns: list[str]) -> tuple[str, Any] | None:
    """Read the labels of a Hugging Face data set."""
    for name in ("label", "labels"):
        if name in columns and hasattr(dataset, "__len__"):
            if dataset.format["type"] == "custom":
                raise TypeError(
                    "labels: expected a data set whose labels no transform may change, got one with a "
                    f"transform; if it leaves labels unchanged, pass dataset.with_format(None)[{name!r}], "
                    "else iterate=True, which reads every sample"
                )
            # A slice is read at once, items would be read one by one.
            return f"column {name!r}", dataset[name][:]
    return None


def _checked(dataset: Any, place: str, labels: Any) -> npt.NDArray[Any]:
    """Check the labels that a data set holds, one per sample, and apply its transform."""
    array = as_array("labels", labels)
    if hasattr(dataset, "__len__") and array.shape[:1] != (len(dataset),):
        raise ValueError(
            f"labels: expected one per sample, {len(dataset)} in the {type(dataset).__name__}, got shape "
            f"{list(array.shape)} in its {place}; Subset(dataset, indices) takes a part of a data set; "
            f"{WAY_OUT}"
        )
    folder = getattr(sys.modules.get("torchvision.datasets"), "DatasetFolder", None)
    if folder and isinstance(dataset, folder) and [y for _, y in dataset.samples] != array.tolist():
        raise ValueError(
            f"labels: expected the same in targets and samples of the {type(dataset).__name__}, got "
            f"different ones; its items come from samples: change both; {WAY_OUT}"
        )
    transform = _target_transform(dataset)
    if transform is None:
        return array
    given = array.tolist() if array.ndim == 1 else list(labels)
    return as_array("labels", [transform(label) for label in given])


def _target_transform(dataset: Any) -> Callable[[Any], Any] | None:
    """Find the transform that a data set applies to its labels."""
    own: Callable[[Any], Any] | None = getattr(dataset, "target_transform", None)
    vision = getattr(sys.modules.get("torchvision.datasets"), "VisionDataset", None)
    joint = getattr(dataset, "transforms", None) if vision and isinstance(dataset, vision) else None
    if joint is not None and getattr(joint, "target_transform", joint) is not own:
        raise ValueError(
            "labels: expected a data set that changes labels only by its target_transform, got "
            f"{type(dataset).__name__} with transforms of another kind; {WAY_OUT}"
        )
    return own


def _taken(array: npt.NDArray[Any], indices: Any) -> npt.NDArray[Any]:
    try:
        return array[np.asarray(indices, dtype=np.int64)]
    except IndexError as error:
        raise ValueError(f"labels: expected a Subset of existing samples, got {error}") from error


def _iterated(dataset: Any) -> list[Any]:
    """Read the label of every sample of a data set."""
    by_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if by_index and not isinstance(dataset, IterableDataset):
        # A loop over the data set itself would not end if it raises no IndexError.
        samples: Iterable[Any] = (dataset[index] for index in range(len(dataset)))
    else:
        samples = dataset
    return [_label_of(index, sample) for index, sample in enumerate(samples)]


def _label_of(index: int, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        for name in ("label", "labels"):
            if name in sample:
                return sample[name]
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[1]
    raise TypeError(
        f"labels: expected samples (input, label), or mappings with a label, got {describe(sample)} "
        f"at {index}; pass the labels themselves"
    )
