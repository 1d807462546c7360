"""A sampler that balances classes, and gives the class counts after sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

from lgla_losses._checks import finite_float, integer, positive_int
from lgla_losses._counts import ArrayLike
from lgla_losses._labels import count_classes, label_array


class ClassBalancedSampler(Sampler[int]):
    r"""Draw a class with a given probability, then a sample of that class, for a ``DataLoader``.

    .. math:: p_j = \frac{n_j^q}{\sum_c n_c^q}

    Here :math:`n_j` is the number of samples of class j, and :math:`q` is ``power``. The samples of a class
    are equally likely, and every draw is independent of the others, so a sample may appear twice in an epoch.
    Classes without samples are never drawn.

    The losses correct the class prior themselves. With a sampler they must know the prior after sampling:
    ``LGLALoss(sampler.class_counts)``, or in training
    ``criterion.set_adjustment(class_counts=sampler.class_counts)``. With the counts of the data set they
    would correct it twice.

    In distributed training all ranks draw the same sequence, and each takes every R-th sample of it, so R
    ranks see what one process sees. If R does not divide the epoch, further draws fill it up.

    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020,
    section 4.1, Eq. 1. The power -1 is the reversed sampler of Zhou et al., "BBN", CVPR 2020.

    Args:
        labels: labels, as for :func:`~lgla_losses.count_classes`: class indices ``[N]``, or a data set that
            holds them.
        num_classes: number of classes ``C``; None means the largest label plus one.
        power: the exponent :math:`q`: 1 keeps the class frequencies, 0.5 is square-root sampling, 0 makes all
            classes equally likely.
        num_samples: samples per epoch, all ranks together; None means the number of labels.
        seed: seed of the draws; the same on all ranks.
        num_replicas: number of ranks R; None takes those of ``torch.distributed`` when an iteration starts,
            or 1 if it is not initialised.
        rank: rank of this process; given together with ``num_replicas``.

    Attributes:
        class_counts: expected draws of each class in an epoch, float64 ``[C]``: the prior after sampling. A
            class without samples has 0.
        labels: the labels, int64 ``[N]``.
        epoch: the number of the next iteration. Each iteration increases it by 1; :meth:`set_epoch` sets it.
        power: as given.
        num_samples: samples per epoch, all ranks together.
        seed: as given.

    Raises:
        TypeError: labels are not integers, or another argument is of a wrong type.
        ValueError: there are no labels, one lies outside ``0..C-1``, or an argument is out of range.

    Example:
        >>> sampler = ClassBalancedSampler([0, 0, 0, 0, 0, 0, 1, 1], power=0.0)
        >>> sampler.class_counts
        tensor([4., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        labels: ArrayLike | Dataset[Any],
        num_classes: int | None = None,
        *,
        power: float = 0.0,
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        array = label_array(labels)
        counts = _counted(array, num_classes)
        expected = "a number in -16..16: 1 keeps the class frequencies, 0 draws all classes equally"
        self.power = finite_float("power", power, low=-16, high=16, expected=expected)
        way_out = "give the samples per epoch, or None for the number of labels"
        self.num_samples = (
            len(array) if num_samples is None else positive_int("num_samples", num_samples, way_out)
        )
        self.seed = _not_negative("seed", seed, "it seeds the draws")
        self._place = _checked_place(num_replicas, rank)
        self.epoch = 0

        self.labels = torch.from_numpy(array.astype(np.int64))
        weights = np.power(counts, self.power, where=counts > 0, out=np.zeros(len(counts)))
        self.class_counts = torch.from_numpy(weights * (self.num_samples / weights.sum()))

        # Small integers are sorted by radix sort: O(C + N).
        small = array.astype(np.min_scalar_type(len(counts) - 1))
        self._by_class = np.argsort(small, kind="stable")
        self._counts, self._first = counts, np.cumsum(counts) - counts

    def __len__(self) -> int:
        """Count the samples of this rank in an epoch."""
        return -(-self.num_samples // self._ranks()[0])

    def __iter__(self) -> Iterator[int]:
        """Draw an epoch, and give this rank's samples."""
        num_replicas, rank = self._ranks()
        epoch, self.epoch = self.epoch, self.epoch + 1
        drawn = self._draw(epoch, len(self) * num_replicas)
        return iter(drawn[rank::num_replicas].tolist())

    def _draw(self, epoch: int, number: int) -> npt.NDArray[np.int64]:
        """Draw sample indices; a smaller ``number`` gives the first ones of a larger ``number``."""
        uniform = np.random.default_rng((self.seed, epoch)).random((number, 2))
        ends = np.cumsum(self.class_counts.numpy())
        classes = np.searchsorted(ends / ends[-1], uniform[:, 0], side="right")

        places = (uniform[:, 1] * self._counts[classes]).astype(np.int64)
        drawn: npt.NDArray[np.int64] = self._by_class[self._first[classes] + places]
        return drawn

    def _ranks(self) -> tuple[int, int]:
        """Give the number of ranks, and the rank of this process."""
        if self._place is not None:
            return self._place
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next iteration, which determines its draws.

        Args:
            epoch: at least 0; the same on all ranks.

        Raises:
            TypeError: ``epoch`` is not an integer.
            ValueError: it is negative.
        """
        self.epoch = _not_negative("epoch", epoch, "it is the number of the next iteration")


def _counted(labels: npt.NDArray[Any], num_classes: int | None) -> npt.NDArray[np.int64]:
    """Count the labels by class ``[C]``; there must be some."""
    if labels.size == 0:
        raise ValueError("labels: expected at least one label, got none; pass the labels of the training set")
    if num_classes is None:
        is_integer = np.issubdtype(labels.dtype, np.integer)
        num_classes = max(1, int(labels.max()) + 1) if is_integer else 1  # other labels are refused below
    counts: npt.NDArray[np.int64] = count_classes(labels, num_classes).numpy()
    return counts


def _checked_place(num_replicas: int | None, rank: int | None) -> tuple[int, int] | None:
    """Check the number of ranks and the rank, which go together."""
    if num_replicas is None and rank is None:
        return None
    if num_replicas is None or rank is None:
        raise ValueError(
            f"num_replicas, rank: expected both or neither, got {num_replicas} and {rank}; leave out both "
            "to take those of torch.distributed"
        )
    number = positive_int("num_replicas", num_replicas, "it is the number of ranks")
    if not 0 <= integer("rank", rank, "it is one of the ranks") < number:
        raise ValueError(
            f"rank: expected 0..{number - 1}, got {rank}; num_replicas={number} is the number of ranks"
        )
    return number, int(rank)


def _not_negative(name: str, value: int, way_out: str) -> int:
    number = integer(name, value, way_out)
    if number < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {number}; {way_out}")
    return number
