"""A loss warns where a sampler has balanced the classes whose counts it corrects, and nowhere else."""

import copy
import functools
import math
import pickle
import re
import warnings

import pytest
import torch

from lgla_losses import LGLALoss, LinearLGLALoss, create_loss
from lgla_losses._ranks import Ranks
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
)
from lgla_losses.data import ClassBalancedSampler, long_tailed_counts
from lgla_losses.losses._seen import MOST_LOOKS, SeenLabels, next_look

COUNTS = [400, 200, 60, 20, 10, 4]
LABELS = torch.arange(6).repeat_interleave(torch.tensor(COUNTS))
#: Batches after which balanced ones of 32 are told.
ENOUGH = 150
TWICE = r"class_counts: the rarer half .* correction twice: .* sampler\.class_counts"


def batches(sampler, size=32):
    """Labels, epoch after epoch, without end."""
    while True:
        yield from LABELS[torch.tensor(list(sampler))].split(size)


def balanced(power=0.0):
    return batches(ClassBalancedSampler(LABELS, power=power))


def shuffled(generator=None):
    while True:
        yield from LABELS[torch.randperm(len(LABELS), generator=generator)].split(32)


def train(criterion, labels, steps=ENOUGH, prepare=lambda labels: labels, **options):
    """So many steps with logits of the shape that the loss takes."""
    experts = (3,) if isinstance(criterion, LGLALoss) else ()
    for _, target in zip(range(steps), labels, strict=False):
        logits = torch.zeros(len(target), *experts, 6, requires_grad=True)
        criterion(logits, prepare(target), **options)


def told(call):
    """Whether somebody is told of a sampler."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return any(re.search(TWICE, str(warning.message)) for warning in caught)


LOSSES = {
    "LGLALoss": functools.partial(LGLALoss, COUNTS),
    "LGLALoss without aaw": functools.partial(LGLALoss, COUNTS, aaw=False),
    "reference": functools.partial(LGLALoss, COUNTS, backend="reference"),
    "BalancedSoftmaxLoss": functools.partial(BalancedSoftmaxLoss, COUNTS),
    "ClassBalancedLoss": functools.partial(ClassBalancedLoss, COUNTS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_corrects_what_a_sampler_has_corrected_tells_so_once(name):
    criterion = LOSSES[name]()
    keys, labels = set(criterion.state_dict()), balanced()
    with pytest.warns(UserWarning, match=TWICE) as record:
        train(criterion, labels)
    assert len(record) == 1
    assert record[0].filename == __file__
    assert set(criterion.state_dict()) == keys
    for twin in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert not told(lambda twin=twin: train(twin, labels))


def test_a_loss_of_features_tells_so():
    criterion, labels = LinearLGLALoss(COUNTS), balanced()

    def steps():
        weight = torch.randn(3, 6, 4, requires_grad=True)
        for _ in range(ENOUGH):
            target = next(labels)
            criterion(torch.randn(len(target), 3, 4), weight, target)

    assert told(steps)


def test_the_message_says_what_was_seen():
    with pytest.warns(
        UserWarning, match=r"half of the classes is (4|5)\d% of the labels seen so far, but 4\.9% of"
    ):
        train(BalancedSoftmaxLoss(COUNTS), balanced())


SILENT = {
    "the counts that the sampler leaves": (
        BalancedSoftmaxLoss(ClassBalancedSampler(LABELS).class_counts),
        {},
    ),
    "no adjustment": (LGLALoss(COUNTS, adjustment="softmax"), {}),
    "tau of 0": (LogitAdjustedLoss(COUNTS, tau=0), {}),
    "a table of one's own, which may be right": (LGLALoss(COUNTS, adjustment=torch.rand(3, 6)), {}),
    "no counts": (FocalLoss(alpha=[1.0, 1.0, 2.0, 4.0, 8.0, 9.0]), {}),
    "class weights that are off": (LDAMLoss(COUNTS, scale=1.0), {}),
    "no checks": (BalancedSoftmaxLoss(COUNTS, validate_args=False), {}),
    "eval mode": (BalancedSoftmaxLoss(COUNTS).eval(), {}),
    "probabilities": (
        BalancedSoftmaxLoss(COUNTS),
        {"prepare": lambda labels: torch.nn.functional.one_hot(labels, 6).float()},
    ),
    "all rare labels are ignored": (
        BalancedSoftmaxLoss(COUNTS),
        {"prepare": lambda labels: torch.where(labels < 3, labels, -100)},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_balanced_batches_are_right_with(name):
    criterion, options = SILENT[name]
    assert not told(lambda: train(criterion, balanced(), **options))


def test_samples_that_a_weight_counts_are_not_judged():
    criterion, labels = BalancedSoftmaxLoss(COUNTS), balanced()

    def steps():
        for _ in range(ENOUGH):
            target = next(labels)
            weight = torch.tensor(COUNTS)[target].float()  # which undoes the sampler
            criterion(torch.zeros(len(target), 6, requires_grad=True), target, sample_weight=weight)

    assert not told(steps)


def test_validation_is_not_judged():
    criterion, labels = BalancedSoftmaxLoss(COUNTS), balanced()
    with torch.no_grad():
        assert not told(lambda: train(criterion, labels))

    def of_constants():
        for _ in range(ENOUGH):
            target = next(labels)
            criterion(torch.zeros(len(target), 6), target)

    assert not told(of_constants)


def test_a_loss_under_torch_func_tells_nothing_and_keeps_nothing_of_it():
    criterion, labels = BalancedSoftmaxLoss(COUNTS), balanced()

    def steps():
        for _ in range(ENOUGH):
            target = next(labels)
            torch.func.grad(lambda logits, target=target: criterion(logits, target))(
                torch.zeros(len(target), 6)
            )

    assert not told(steps)
    assert told(lambda: train(copy.deepcopy(criterion), labels, 2 * ENOUGH))


def test_a_compiled_loss_compiles_once_and_tells_nothing():
    compiled = torch.compile(BalancedSoftmaxLoss(COUNTS, validate_args=True), backend="eager")
    labels = (target for target in balanced() if len(target) == 32)
    torch._dynamo.reset()  # of what other tests have compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not told(lambda: train(compiled, labels))


def test_new_counts_are_judged_anew():
    criterion, labels = BalancedSoftmaxLoss(COUNTS), shuffled(torch.Generator().manual_seed(0))
    assert not told(lambda: train(criterion, labels))
    criterion.set_adjustment(class_counts=[10, 400, 300, 200, 20, 4])  # of which class 0 is not
    assert told(lambda: train(criterion, labels))


@pytest.mark.parametrize("natural", [20, 100, 300])
def test_a_sampler_that_comes_late_is_told_of(natural):
    criterion = BalancedSoftmaxLoss(COUNTS)
    assert not told(lambda: train(criterion, shuffled(), natural))
    assert told(lambda: train(criterion, balanced(), 1500))


@pytest.mark.parametrize("turns", [2, 3])
def test_natural_and_balanced_batches_by_turns_tell_nothing(turns):
    def mixed():
        natural, even = shuffled(), balanced()
        while True:
            yield next(even)
            yield from (next(natural) for _ in range(turns - 1))

    assert not told(lambda: train(BalancedSoftmaxLoss(COUNTS), mixed(), 3000))


def test_classes_that_are_masked_or_background_are_not_judged():
    masked = [500, 100, 50, 10, 0, 0, 0, 0, 0, 0]
    background = [500, 100, 50, 10, 100_000]

    def steps(criterion, weights, number=400):
        weights = torch.tensor(weights, dtype=torch.float)
        for _ in range(number):
            logits = torch.zeros(128, len(criterion.class_counts), requires_grad=True)
            criterion(logits, torch.multinomial(weights, 128, replacement=True))

    for name in ("softmax", "focal", "ldam", "logit"):
        options = {"ldam": {"scale": 1.0}, "logit": {"tau": 0.0}}.get(name, {})
        criterion = create_loss(name, masked, zero_counts="mask", **options)
        assert not told(lambda criterion=criterion: steps(criterion, [1] * 4)), name
    assert told(lambda: steps(BalancedSoftmaxLoss(masked, zero_counts="mask"), [1] * 4))

    # A whole epoch has the background's samples as well.
    labels = [1, 1, 1, 1, 16], 1900
    assert told(lambda: steps(BalancedSoftmaxLoss(background, background=4), *labels))
    assert not told(lambda: steps(create_loss("softmax", background, background=4), *labels))


def test_labels_beside_ignored_ones_are_judged():
    def some(labels):
        return torch.where(torch.arange(len(labels)) < 5, -100, labels)

    assert told(lambda: train(BalancedSoftmaxLoss(COUNTS), balanced(), 2 * ENOUGH, some))


def test_the_samples_of_all_ranks_make_an_epoch(monkeypatch):
    for number in (1, 8):
        criterion = BalancedSoftmaxLoss([10 * count for count in COUNTS], reduction="sum")
        monkeypatch.setattr(criterion, "_ranks_of_step", lambda *_, n=number: Ranks(n))
        assert told(lambda criterion=criterion: train(criterion, balanced())) == (number == 8)


def test_a_loss_can_be_traced():
    logits, target = torch.randn(9, 3, requires_grad=True), torch.arange(9) % 3
    criterion = BalancedSoftmaxLoss([5, 4, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(criterion, (logits, target))  # compares two traces
    torch.testing.assert_close(traced(logits, target), criterion(logits, target))


def test_one_batch_again_and_again_tells_nothing():
    """As in a loop that shows how the loss is called, or that measures it."""
    target = torch.arange(60) % 6
    assert not told(lambda: train(BalancedSoftmaxLoss(COUNTS), iter([target] * 300), 300))


def test_epochs_that_are_shuffled_and_classes_that_come_in_order_tell_nothing():
    """The real loss; many more of them below."""
    orders = [shuffled(), (part for _ in range(99) for part in LABELS.split(32))]
    orders.append(part for _ in range(99) for part in LABELS.flip(0).split(32))
    for labels in orders:
        assert not told(lambda labels=labels: train(BalancedSoftmaxLoss(COUNTS), labels, 260))


VECTORS = {
    "CIFAR-100-LT": long_tailed_counts(500, 100, 100),
    "factor 10": long_tailed_counts(500, 100, 10),
    "steps": long_tailed_counts(500, 20, 100, "step"),
    "two": torch.tensor([950, 50]),
    "zipf": torch.tensor([max(1, 3000 // (j + 1)) for j in range(300)]),
    "few rare": torch.tensor([300] * 50 + [2] * 50),
}


def first_alarm(counts, size, epoch, last=1 << 12):
    """The step at which labels are judged balanced, or None; ``epoch`` gives the labels of one."""
    seen, of_epoch, per_epoch, step = (
        SeenLabels(counts, counts > 0),
        None,
        math.ceil(int(counts.sum()) / size),
        1,
    )
    now = -1
    while step <= last:
        before, (now, place) = now, divmod(step - 1, per_epoch)
        of_epoch = epoch() if now != before else of_epoch
        seen.add(of_epoch[place * size : (place + 1) * size], step, 1)
        if seen.problem() is not None:
            return step
        step = next_look(step)
    return None


@pytest.mark.parametrize("name", VECTORS)
def test_no_order_of_a_whole_epoch_raises_an_alarm_but_a_sampler_does(name):
    counts = VECTORS[name]
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    classes = torch.randperm(len(counts))
    orders = {
        "shuffled": lambda: labels[torch.randperm(len(labels))],
        "head first": lambda: labels,
        "tail first": lambda: labels.flip(0),
        "another order of the classes": lambda: torch.cat([labels[labels == j] for j in classes]),
    }
    for size in (1, 8, 33, 128):
        for order, epoch in orders.items():
            for _ in range(5 if order == "shuffled" else 1):
                assert first_alarm(counts, size, epoch) is None, (order, size)

    samplers = [ClassBalancedSampler(labels, seed=seed) for seed in range(6)]
    alarms = [first_alarm(counts, 128, lambda draw=draw: labels[list(draw)], 1 << 11) for draw in samplers]
    assert sum(alarm is not None for alarm in alarms) >= 5  # chance may differ too much between looks


def is_balanced(counts, share, size=200, looks=10, num_ranks=1):
    """Whether so many looks with this share of rare labels are judged balanced; class 1 is rare."""
    counts = torch.tensor(counts)
    seen, rare = SeenLabels(counts, counts > 0), round(share * size)
    for step in range(looks):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(step))
        seen.add((order < rare).long(), step + 1, num_ranks)
    return seen.problem() is not None


def test_how_many_rare_labels_are_too_many():
    """Above the bounds, and by more than chance."""
    assert [is_balanced([95, 5], share) for share in (0.14, 0.18, 0.88, 0.92)] == [False, True, True, False]
    assert [is_balanced([70, 30], share) for share in (0.43, 0.47)] == [False, True]
    assert [is_balanced([70, 30], 0.5, 20, looks) for looks in (11, 60)] == [False, True]
    assert [is_balanced([99, 1], 0.5, 16, looks) for looks in (12, 13)] == [False, True]


def test_how_many_batches_are_judged():
    """Ten of an epoch or more, of 8 labels or more."""
    assert [is_balanced([95, 5], 0.5, looks=looks) for looks in (9, 10)] == [False, True]
    assert [is_balanced([950, 50], 0.5, size, 200) for size in (6, 8)] == [False, True]
    epoch = [2850, 150]  # is that of 16 batches, and the first is where it begins
    assert [is_balanced(epoch, 0.5, looks=looks) for looks in (15, 16)] == [False, True]
    assert is_balanced(epoch, 0.5, looks=10, num_ranks=2)


def test_looks_are_few():
    counts = torch.tensor([95, 5])
    seen, step, number = SeenLabels(counts, counts > 0), 1, 0
    while step < 20_000:
        seen.add(torch.tensor([0] * 19 + [1]), step, 1)
        step, number = next_look(step), number + 1
    assert len(seen._looks) == MOST_LOOKS < number < 250
