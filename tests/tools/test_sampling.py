"""The sampler draws classes as its equation says, alike on all ranks, and tells what it leaves."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from lgla_losses import LGLALoss
from lgla_losses.data import ClassBalancedSampler

COUNTS = [60, 25, 0, 10, 5]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))


def drawn(sampler, epochs=1):
    return [index for _ in range(epochs) for index in sampler]


@pytest.mark.parametrize("power", [1, 0.5, 0, -1])
def test_classes_are_drawn_in_proportion_to_powers_of_their_counts(power):
    """And the samples of a class alike, by chi-square."""
    sampler = ClassBalancedSampler(LABELS, power=power, num_samples=20_000)
    weights = [n**power if n else 0.0 for n in COUNTS]
    expected = [20_000 * weight / sum(weights) for weight in weights]
    assert sampler.class_counts.dtype == torch.float64
    assert sampler.class_counts.tolist() == pytest.approx(expected)

    times = np.bincount(drawn(sampler), minlength=len(LABELS))
    each = np.array(expected)[LABELS] / np.array(COUNTS)[LABELS]
    assert times.sum() == 20_000
    assert ((times - each) ** 2 / each).sum() < 99 + 4 * math.sqrt(2 * 99)


def test_the_largest_powers_of_large_counts_are_finite():
    for power, favourite in ((16, 0), (-16, 1)):
        sampler = ClassBalancedSampler([0] * 10_000 + [1] * 10, power=power)
        assert sampler.class_counts.isfinite().all()
        assert set(sampler.labels[drawn(sampler)].tolist()) == {favourite}


def test_a_power_of_1_leaves_the_counts_to_the_bit():
    assert ClassBalancedSampler(LABELS, power=1).class_counts.tolist() == COUNTS


@pytest.mark.parametrize(
    "labels",
    [LABELS.tolist(), torch.tensor(LABELS), TensorDataset(torch.zeros(100, 2), torch.tensor(LABELS))],
    ids=["list", "tensor", "data set"],
)
def test_labels_come_as_count_classes_takes_them(labels):
    sampler = ClassBalancedSampler(labels, num_classes=7)
    assert sampler.labels.tolist() == LABELS.tolist()
    assert sampler.class_counts.tolist() == [25.0, 25.0, 0.0, 25.0, 25.0, 0.0, 0.0]
    assert drawn(sampler) == drawn(ClassBalancedSampler(LABELS))


def test_every_seed_and_epoch_has_an_order_of_its_own_that_comes_again():
    orders = []
    for seed in range(3):
        sampler = ClassBalancedSampler(LABELS, seed=seed)
        orders += [drawn(sampler) for _ in range(3)]  # nobody calls set_epoch
        assert sampler.epoch == 3
        sampler.set_epoch(1)
        assert drawn(sampler) == orders[-2]
        assert drawn(sampler) == orders[-1]
    assert len({tuple(order) for order in orders}) == 9


def test_a_copy_or_another_of_the_same_epoch_goes_on_where_the_sampler_stood():
    sampler = ClassBalancedSampler(LABELS)
    drawn(sampler, epochs=2)
    resumed = ClassBalancedSampler(LABELS)
    resumed.set_epoch(2)
    others = [resumed, copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    third = drawn(sampler)
    assert [drawn(other) for other in others] == [third] * 3


@pytest.mark.parametrize(("num_ranks", "num_samples"), [(2, 100), (3, 100), (4, 2)])
def test_ranks_together_draw_what_one_process_draws(num_ranks, num_samples):
    """And some more, where the ranks do not divide an epoch, so that all have the same number."""
    one = ClassBalancedSampler(LABELS, num_samples=num_samples)
    ranks = [
        ClassBalancedSampler(LABELS, num_samples=num_samples, num_replicas=num_ranks, rank=rank)
        for rank in range(num_ranks)
    ]
    for _ in range(2):
        parts = [drawn(sampler) for sampler in ranks]
        assert {len(part) for part in parts} == {len(ranks[0])} == {math.ceil(num_samples / num_ranks)}
        together = [index for step in zip(*parts, strict=True) for index in step]
        assert together[:num_samples] == drawn(one)
    assert ranks[0].class_counts.tolist() == one.class_counts.tolist()


def test_ranks_of_torch_distributed_are_found_when_an_epoch_begins(monkeypatch):
    sampler = ClassBalancedSampler(LABELS)
    alone = ClassBalancedSampler(LABELS, num_replicas=1, rank=0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    whole = drawn(alone)
    assert len(whole) == len(alone) == 100
    assert len(sampler) == 25
    assert drawn(sampler) == whole[3::4]


def test_accelerate_shares_the_batches_of_a_sampler_that_knows_of_no_ranks():
    def batches(**place):
        sampler = ClassBalancedSampler(LABELS, num_replicas=1, rank=0)
        whole = BatchSampler(sampler, 10, drop_last=False)
        return list(BatchSamplerShard(whole, **place) if place else whole)

    parts = [batches(num_processes=2, process_index=rank) for rank in range(2)]
    assert [batch for step in zip(*parts, strict=True) for batch in step] == batches()


def test_a_loader_with_workers_draws_on_from_epoch_to_epoch():
    dataset = TensorDataset(torch.arange(100), torch.tensor(LABELS))
    sampler = ClassBalancedSampler(dataset)
    loader = DataLoader(dataset, 10, sampler=sampler, num_workers=1, persistent_workers=True)
    epochs = [[index for indices, _ in loader for index in indices.tolist()] for _ in range(2)]
    again = ClassBalancedSampler(LABELS)
    assert epochs == [drawn(again), drawn(again)]


def test_the_counts_that_are_left_are_those_of_a_loss():
    sampler = ClassBalancedSampler([0] * 60 + [1] * 30 + [2] * 10)
    criterion = LGLALoss([60, 30, 10])
    criterion.set_adjustment(class_counts=sampler.class_counts)
    assert torch.equal(criterion.adjuster.table, LGLALoss(sampler.class_counts).adjuster.table)
    assert criterion.adjuster.table.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ClassBalancedSampler([]), ValueError, "labels: expected at least one label, got none"),
        (
            lambda: ClassBalancedSampler([0, 3], 3),
            ValueError,
            r"labels: expected class indices 0\.\.2, got 3",
        ),
        (lambda: ClassBalancedSampler([0, -1]), ValueError, "labels: expected class indices .* got -1"),
        (lambda: ClassBalancedSampler([0.5]), TypeError, "labels: expected integer class indices, got float"),
        (lambda: ClassBalancedSampler([[0, 1]]), ValueError, r"labels: expected 1-D .* got shape \[1, 2\]"),
        (lambda: ClassBalancedSampler([0], 0), ValueError, "num_classes: expected an integer >= 1, got 0"),
        (
            lambda: ClassBalancedSampler([0], power=math.nan),
            ValueError,
            r"power: expected a number in -16\.\.16: 1 keeps the class frequencies, .* got nan",
        ),
        (lambda: ClassBalancedSampler([0], power=17), ValueError, "power: expected a number .* got 17"),
        (lambda: ClassBalancedSampler([0], power="sqrt"), TypeError, "power: expected a number"),
        (lambda: ClassBalancedSampler([0], num_samples=0), ValueError, "num_samples: .* >= 1, got 0; give"),
        (lambda: ClassBalancedSampler([0], seed=-1), ValueError, "seed: expected an integer >= 0, got -1"),
        (
            lambda: ClassBalancedSampler([0], num_replicas=2, rank=2),
            ValueError,
            r"rank: expected 0\.\.1, got 2; num_replicas=2",
        ),
        (
            lambda: ClassBalancedSampler([0], rank=0),
            ValueError,
            "num_replicas, rank: expected both or neither, got None and 0",
        ),
        (lambda: ClassBalancedSampler([0]).set_epoch(-1), ValueError, "epoch: expected an integer >= 0"),
    ],
)
def test_wrong_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
