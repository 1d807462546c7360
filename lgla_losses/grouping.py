"""Groups of classes with equal sample mass (section 3.2)."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgla_losses._buffers import ConstantBuffers
from lgla_losses._checks import positive_int, target_tensor, target_values
from lgla_losses._counts import ArrayLike, ClassRules, Ruled, to_numpy
from lgla_losses._torch import values_readable
from lgla_losses.functional import partition_classes


class ClassGrouper(ConstantBuffers, Ruled):
    r"""Divide the classes into groups :math:`C_1, \dots, C_{K-1}` of equal sample mass.

    The classes are sorted by count, largest first, ties by class index, and cut into non-empty contiguous
    groups that minimise the sum of squared group masses. Without constraints, equal masses are the optimum.
    Among equal optima the lexicographically smallest cuts are taken. The result is exact for any number of
    classes.

    Source: Tao et al., ICCV 2023, section 3.2.

    Args:
        class_counts: samples per class :math:`n_j` ``[C]``, finite, positive unless ``zero_counts`` allows 0:
            a list, an array or a tensor of integers or floats.
        num_groups: number of groups ``G = K - 1``, at most ``C``.
        zero_counts: what to do about classes without samples: ``"error"`` refuses them; ``"smooth"`` adds one
            sample to every class (Laplace's rule); ``"mask"`` groups only the other classes, and puts these
            into the last group.
        background: one or more classes to leave out, such as "other": only the remaining classes are grouped.
            Background classes are put into the first group, so that their samples use its reference angles.

    Attributes:
        class_counts: the counts ``[C]``, int64, or float64 if floats were given; with ``"smooth"`` including
            the added samples.
        group_index: group of every class, int64 ``[C]``, 0 for the head.
        group_sizes: classes per group, int64 ``[G]``, without background and masked classes.
        group_masses: samples per group ``[G]``, in the dtype of the counts, without the background's.

    All of these are read only; ``set_adjustment`` of a loss changes them.

    Raises:
        TypeError: counts are not numbers, or ``num_groups`` is not an integer.
        ValueError: counts are empty, not 1-D, not positive or not finite, there are fewer classes than
            groups, or ``background`` is not a class, names one twice or leaves none.

    Shape:
        - target: int64 ``[N]``
        - output: int64 ``[N]``, the group of each sample

    Example:
        >>> grouper = ClassGrouper([500, 300, 150, 50], num_groups=2)
        >>> grouper.group_index
        tensor([0, 1, 1, 1])
        >>> grouper.group_masses
        tensor([500, 500])
    """

    #: Whether the groups are the user's own; new counts do not change them.
    is_own = False

    def __init__(
        self,
        class_counts: ArrayLike,
        num_groups: int,
        *,
        zero_counts: str = "error",
        background: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._rules, counts = ClassRules.of(class_counts, zero_counts, background)
        num_groups = positive_int("num_groups", num_groups, "it is the number of local experts, K - 1")
        self.keep(counts, grouped(counts, num_groups, self._rules))

    @classmethod
    def from_groups(
        cls,
        class_counts: ArrayLike,
        group_index: ArrayLike,
        *,
        zero_counts: str = "error",
        background: int | Sequence[int] | None = None,
    ) -> ClassGrouper:
        """Use your own groups, for example many-, medium- and few-shot classes.

        Args:
            class_counts: samples per class ``[C]``.
            group_index: group of every class ``[C]``, integers ``0..G-1``, 0 for the head; every group holds
                a class that is adjusted. The groups of background and masked classes stay as given.
            zero_counts: as in the constructor.
            background: as in the constructor.

        Raises:
            TypeError: the groups are not integers.
            ValueError: there is not one group per class, or a group below the largest is empty.
        """
        rules, counts = ClassRules.of(class_counts, zero_counts, background)
        index = _group_index(to_numpy("group_index", group_index), counts, rules)
        return cls._of_checked(counts, index, rules, is_own=True)

    @classmethod
    def _of_checked(
        cls, counts: Tensor, index: Tensor, rules: ClassRules, *, is_own: bool = False
    ) -> ClassGrouper:
        """Make a grouper from checked counts ``[C]`` and groups ``[C]``."""
        grouper = cls.__new__(cls)
        ConstantBuffers.__init__(grouper)
        grouper.is_own, grouper._rules = is_own, rules
        grouper.keep(counts, index)
        return grouper

    def regrouped(self, counts: Tensor) -> Tensor:
        """Group the classes by new counts ``[C]``: give the groups ``[C]``. The user's own groups stay."""
        own = self.on_cpu("group_index") if self.is_own else None
        return regrouped(counts, self.num_groups, self._rules, own)

    @property
    def class_counts(self) -> Tensor:
        """Samples per class ``[C]``."""
        return self._read("class_counts")

    @property
    def group_index(self) -> Tensor:
        """Group of every class ``[C]``, 0 for the head."""
        return self._read("group_index")

    @property
    def group_sizes(self) -> Tensor:
        """Classes per group ``[G]``."""
        return self._read("group_sizes")

    @property
    def group_masses(self) -> Tensor:
        """Samples per group ``[G]``."""
        return self._read("group_masses")

    @property
    def num_classes(self) -> int:
        """Number of classes ``C``."""
        return self.constant("group_index").shape[0]

    @property
    def num_groups(self) -> int:
        """Number of groups ``G``."""
        return self.constant("group_sizes").shape[0]

    @property
    def imbalance_factor(self) -> float:
        """Count of the largest adjusted class over that of the smallest (IF, section 4.1)."""
        counts = self.constant("class_counts")
        counts = counts[self._rules.adjusted(counts)]
        return float(counts.max()) / float(counts.min())

    def forward(self, target: Tensor) -> Tensor:
        """Look up the group of each sample ``[N]``; targets out of range raise on the CPU."""
        target = target_tensor(target)
        if values_readable(target, None):
            target_values(target, self.num_classes)
        return self.constant("group_index")[target]

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _take_what_is_written(self) -> None:
        """Do nothing: the adjuster takes the constants written into the buffers.

        Averaging of weights could write counts that look right alone; the adjuster also has the table.
        """

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        counts = self._rules.saved(self._current(state, "class_counts"))
        index = _group_index(
            to_numpy("group_index", self._current(state, "group_index")),
            counts,
            self._rules,
            "construct the loss with zero_counts and background of the saved one",
        )
        if int(index.max()) + 1 != self.num_groups:
            raise ValueError(f"group_index: expected {self.num_groups} groups, got {int(index.max()) + 1}")
        if self.is_own and not torch.equal(index, self.on_cpu("group_index")):
            raise ValueError(
                "group_index: expected the groups given to the loss, got others; construct it with the "
                "groups of the state, or from class counts alone, which takes any groups"
            )
        return _constants(counts, index, self._rules)

    def keep(self, counts: Tensor, index: Tensor) -> None:
        """Set class counts ``[C]`` and groups ``[C]``, already checked, in place."""
        super()._keep_all(_constants(counts, index, self._rules))

    def _keep_all(self, constants: Mapping[str, Tensor]) -> None:
        """Take the constants of a state.

        Groups that do not follow from the counts of the state are treated as the user's own from then on.
        """
        names = "class_counts", "group_index"
        known = all(torch.equal(constants[name], self.on_cpu(name)) for name in names)
        if not (known or self.is_own):
            counts, index = (constants[name] for name in names)
            self.is_own = not torch.equal(index, grouped(counts, self.num_groups, self._rules))
        super()._keep_all(constants)

    def extra_repr(self) -> str:
        """Show the configuration."""
        sizes = f"{self._rules.shown()}num_classes={self.num_classes}, num_groups={self.num_groups}"
        known = not self.constant("class_counts").is_meta
        return f"{sizes}, imbalance_factor={self.imbalance_factor:.4g}" if known else sizes


def same_classes(class_counts: ArrayLike, num_classes: int, rules: ClassRules) -> Tensor:
    """Check that ``class_counts`` has as many classes as before; return it as a CPU tensor ``[C]``."""
    counts = rules.counts(class_counts)
    if len(counts) != num_classes:
        raise ValueError(
            f"class_counts: expected counts of {num_classes} classes as before, got {len(counts)}; for "
            "other classes make a new loss"
        )
    return counts


def grouped(counts: Tensor, num_groups: int, rules: ClassRules) -> Tensor:
    """Group the adjusted classes; background goes first, masked classes last: int64 ``[C]``.

    Raises:
        ValueError: there are fewer adjusted classes than groups.
    """
    adjusted = rules.adjusted(counts)
    number = int(adjusted.sum())
    if num_groups > number:
        raise ValueError(
            f"num_groups: expected at most one group per class, {number} here, got {num_groups}; use fewer "
            "experts"
        )
    index = partition_classes(counts[adjusted], num_groups)
    return rules.spread(index, counts, masked=num_groups - 1, background=0)


def regrouped(counts: Tensor, num_groups: int, rules: ClassRules, own: Tensor | None) -> Tensor:
    """Group the classes by new counts ``[C]``: give the groups ``[C]``; ``own`` groups stay."""
    if own is None:
        return grouped(counts, num_groups, rules)
    return _group_index(own.numpy(), counts, rules)


def _group_index(
    index: npt.NDArray[Any],
    counts: Tensor,
    rules: ClassRules,
    way_out: str = "number them without gaps from 0, the head",
) -> Tensor:
    """Check that ``index`` numbers groups of adjusted classes without gaps; return it as int64 ``[C]``."""
    num_classes = len(counts)
    if index.shape != (num_classes,):
        raise ValueError(
            f"group_index: expected one group per class, shape [{num_classes}], got {list(index.shape)}"
        )
    if not np.issubdtype(index.dtype, np.integer):
        raise TypeError(f"group_index: expected integers 0..G-1, got {index.dtype}")
    present = np.unique(index[rules.adjusted(counts).numpy()]).tolist()
    if index.min() < 0 or len(present) != int(index.max()) + 1:
        besides = "" if rules == ClassRules() else " that has samples and is not background"
        raise ValueError(
            f"group_index: expected groups 0..G-1 with a class in each{besides}, "
            f"got groups {reprlib.repr(present)}; {way_out}"
        )
    return torch.from_numpy(index.astype(np.int64))


def _constants(counts: Tensor, index: Tensor, rules: ClassRules) -> dict[str, Tensor]:
    num_groups, adjusted = int(index.max()) + 1, rules.adjusted(counts)
    members = index[adjusted]
    return {
        "class_counts": counts,
        "group_index": index,
        "group_sizes": torch.bincount(members, minlength=num_groups),
        "group_masses": counts.new_zeros(num_groups).index_add_(0, members, counts[adjusted]),
    }


def check_grouper(grouper: object) -> ClassGrouper:
    """Check that ``grouper`` is a :class:`ClassGrouper`; return it."""
    if not isinstance(grouper, ClassGrouper):
        raise TypeError(
            f"grouper: expected a ClassGrouper, got {type(grouper).__name__}; make one with "
            "ClassGrouper(class_counts, num_groups)"
        )
    return grouper
