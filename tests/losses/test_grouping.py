"""Section 3.2: groups of equal sample mass."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from lgla_losses import ClassGrouper, count_classes
from lgla_losses._partition import partition_sorted

COUNTS = st.one_of(
    st.lists(st.integers(1, 6), min_size=1, max_size=9),
    st.lists(st.integers(1, 10**17), min_size=1, max_size=9),
    st.lists(st.floats(1e-200, 1e200), min_size=1, max_size=9),
    st.lists(st.sampled_from([1, 2, 3, 10**6, 10**12]), min_size=1, max_size=9),
)


@given(COUNTS, st.data())
def test_partition_is_the_first_of_the_optimal_ones(counts, data):
    num_groups = data.draw(st.integers(1, len(counts)))
    grouper = ClassGrouper(counts, num_groups)
    assert grouper.group_index.tolist() == reference.group_index(counts, num_groups)


@pytest.mark.parametrize(
    ("counts", "num_groups"),
    [
        ([10**16 + n for n in (972, 9, 3, 1, 1, 1)], 5),
        ([10**17 + n for n in (9, 7, 7, 1, 0, 0, 0)], 4),
        ([10**17 + n for n in (7, 3, 2, 2, 1, 1, 1)], 5),
    ],
)
def test_partition_tells_costs_apart_that_float64_cannot(counts, num_groups):
    assert ClassGrouper(counts, num_groups).group_index.tolist() == reference.group_index(counts, num_groups)


@pytest.mark.parametrize("kind", ["pareto", "ties", "floats", "dominant"])
def test_partition_equals_a_quadratic_programme(kind):
    """Sizes at which brute force is out of reach and the search has several levels."""
    generator = np.random.default_rng(0)
    counts = {
        "pareto": (generator.pareto(1, 600) * 10 + 1).astype(np.int64),
        "ties": generator.integers(1, 4, 600),
        "floats": generator.pareto(1, 600) + 1e-3,
        "dominant": np.r_[10**6, generator.integers(1, 9, 599)],
    }[kind]
    counts = np.sort(counts)[::-1]
    prefix = np.r_[0.0, np.cumsum(counts.astype(np.float64))]
    pairs = (prefix[None, :] - prefix[:, None]) ** 2  # [start, end]
    pairs[np.tril_indices(601)] = math.inf
    for num_groups in range(2, 8):
        cost = pairs[0]
        for _ in range(num_groups - 1):
            cost = (cost[:, None] + pairs).min(axis=0)
        edges = prefix[[0, *partition_sorted(counts, num_groups), 600]]
        assert np.sum(np.diff(edges) ** 2) == pytest.approx(cost[600], rel=1e-12)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=30, unique=True), st.randoms(), st.data())
def test_partition_is_permutation_equivariant(counts, random, data):
    num_groups = data.draw(st.integers(1, len(counts)))
    order = list(range(len(counts)))
    random.shuffle(order)
    groups = ClassGrouper(counts, num_groups).group_index
    permuted = ClassGrouper([counts[j] for j in order], num_groups).group_index
    assert permuted.tolist() == groups[order].tolist()


@pytest.mark.parametrize(
    ("counts", "num_groups", "expected"),
    [
        pytest.param([7] * 6, 3, [0, 0, 1, 1, 2, 2], id="equal counts"),
        pytest.param([5, 5, 5], 2, [0, 1, 1], id="ties go by class index, the first cut wins"),
        pytest.param([100] * 3 + [1] * 3, 4, [0, 1, 2, 3, 3, 3], id="step imbalance"),
        pytest.param([10**6, 3, 2, 1], 3, [0, 1, 2, 2], id="one dominant class"),
        pytest.param([1, 2, 3], 3, [2, 1, 0], id="one class a group"),
        pytest.param([4, 4], 1, [0, 0], id="K = 2"),
        pytest.param([9], 1, [0], id="one class"),
    ],
)
def test_counts_on_which_quota_rules_fail(counts, num_groups, expected):
    assert ClassGrouper(counts, num_groups).group_index.tolist() == expected


@pytest.mark.parametrize(("num_groups", "cuts"), [(2, [15]), (3, [9, 24])])
def test_cifar100_lt(num_groups, cuts):
    counts = [int(500 * 100 ** (-j / 99)) for j in range(100)]
    grouper = ClassGrouper(counts, num_groups)
    assert sum(counts) == 10847
    assert grouper.group_sizes.cumsum(0)[:-1].tolist() == cuts


def test_every_number_of_groups_on_cifar10_lt():
    """The authors' rule leaves groups empty here from K = 4 on."""
    counts = [int(5000 * 100 ** (-j / 9)) for j in range(10)]
    for num_groups in range(1, 11):
        assert ClassGrouper(counts, num_groups).group_sizes.min() > 0


@pytest.mark.parametrize("counts", [np.full(20_000, 3), np.arange(20_000, 0, -1) ** 3 / 7.0])
def test_many_classes_are_cut_near_equal_masses(counts):
    masses = ClassGrouper(counts, 7).group_masses.double()
    assert (masses / masses.sum() - 1 / 7).abs().max() < 1e-3


def test_attributes():
    grouper = ClassGrouper([500, 300, 150, 50], 2)
    assert (grouper.num_classes, grouper.num_groups, grouper.imbalance_factor) == (4, 2, 10.0)
    assert grouper.class_counts.tolist() == [500, 300, 150, 50]
    assert grouper.class_counts.dtype == torch.int64
    assert ClassGrouper([0.5, 0.5], 1).class_counts.dtype == torch.float64
    assert grouper.group_index.dtype == torch.int64
    assert grouper.group_index.tolist() == [0, 1, 1, 1]
    assert grouper.group_sizes.tolist() == [1, 3]
    assert grouper.group_masses.tolist() == [500, 500]
    assert grouper(torch.tensor([3, 0, 1])).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "make",
    [list, tuple, np.array, torch.tensor, lambda c: np.array(c, np.float32), lambda c: torch.tensor(c).half(),
     lambda c: torch.tensor(c).bfloat16(), lambda c: np.array(c, np.uint8)],
)  # fmt: skip
def test_counts_may_be_any_vector_of_numbers(make):
    assert ClassGrouper(make([8, 4, 2, 1]), 2).group_index.tolist() == [0, 1, 1, 1]


def test_the_callers_counts_are_copied():
    counts = torch.tensor([8, 4, 2])
    grouper = ClassGrouper(counts, 2)
    counts.zero_()
    assert grouper.class_counts.tolist() == [8, 4, 2]


@pytest.mark.parametrize(
    "counts",
    [
        [10**12] + [1] * 60,
        [1e30] + [1.0] * 60,
        [1e30, 1e30, *[1e12] * 9, *[1.0] * 50],
        [2.0**-j for j in range(60)],
    ],
    ids=["dominant integer", "dominant float", "two levels", "each outweighs the rest"],
)
def test_dominant_classes_stand_alone_and_the_rest_is_cut_evenly(counts):
    """Beside the largest class the others vanish in float64; their own masses cut them all the same."""
    grouper = ClassGrouper(counts, 7)
    alone = sum(n >= sum(counts[j + 1 :]) for j, n in enumerate(counts[:6]))
    assert grouper.group_sizes[:alone].tolist() == [1] * alone
    rest = ClassGrouper(counts[alone:], 7 - alone)
    assert grouper.group_sizes[alone:].tolist() == rest.group_sizes.tolist()


def test_from_groups_copies_the_callers_groups():
    index = torch.tensor([0, 1, 1])
    grouper = ClassGrouper.from_groups([3, 2, 1], index)
    index.zero_()
    assert grouper.group_index.tolist() == [0, 1, 1]


def test_from_groups_takes_any_grouping():
    grouper = ClassGrouper.from_groups([100, 50, 10, 5], [2, 0, 1, 1])
    assert grouper.num_groups == 3
    assert grouper.group_sizes.tolist() == [1, 2, 1]
    assert grouper.group_masses.tolist() == [50, 15, 100]


def test_state_dict_restores_groups_and_float_counts():
    source = ClassGrouper([0.5, 0.3, 0.2], 2)
    loaded = ClassGrouper([5, 900, 7], 2)
    loaded.load_state_dict(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_state_dict_of_other_sizes_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        ClassGrouper([3, 2, 1], 2).load_state_dict(ClassGrouper([3, 2, 1], 3).state_dict())


class Labelled(TensorDataset):
    targets = (0, 2, 2, 1)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2, 2], [1, 0, 2, 0]),
        (np.array([0, 2, 2], np.uint8), [1, 0, 2, 0]),
        (torch.tensor([3, 3], dtype=torch.int32), [0, 0, 0, 2]),
        ([], [0, 0, 0, 0]),
        (Labelled(torch.zeros(4)), [1, 1, 2, 0]),
        (Subset(Subset(Labelled(torch.zeros(4)), [1, 2, 3]), [0, 2]), [0, 1, 1, 0]),
    ],
)
def test_count_classes(labels, expected):
    counts = count_classes(labels, 4)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
