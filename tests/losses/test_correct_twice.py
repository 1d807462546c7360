"""A loss warns where a sampler has balanced the classes whose counts it corrects, and nowhere else."""

import copy
import functools
import math
import pickle
import re
import warnings

import pytest
import torch

from lgla_losses import LGLALoss, LinearLGLALoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
)
from lgla_losses.data import ClassBalancedSampler, long_tailed_counts
from lgla_losses.losses._seen import SeenLabels

COUNTS = [400, 200, 60, 20, 10, 4]
LABELS = torch.arange(6).repeat_interleave(torch.tensor(COUNTS))
TWICE = r"class_counts: the rarer half .* correct twice: .* sampler\.class_counts"


def batches(sampler, size=32):
    """Labels, epoch after epoch, without end."""
    while True:
        yield from LABELS[torch.tensor(list(sampler))].split(size)


def balanced(power=0.0):
    return batches(ClassBalancedSampler(LABELS, power=power))


def shuffled(generator=None):
    while True:
        yield from LABELS[torch.randperm(len(LABELS), generator=generator)].split(32)


def train(criterion, labels, steps=70, prepare=lambda labels: labels, **options):
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
    "a table": functools.partial(LGLALoss, COUNTS, adjustment=torch.rand(3, 6)),
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
        for _ in range(70):
            target = next(labels)
            criterion(torch.randn(len(target), 3, 4), weight, target)

    assert told(steps)


def test_the_message_says_what_was_seen():
    with pytest.warns(
        UserWarning, match=r"half of the classes makes (4|5)\d% of the labels that came, but 4\.9% of"
    ):
        train(BalancedSoftmaxLoss(COUNTS), balanced())


SILENT = {
    "the counts that the sampler leaves": (
        BalancedSoftmaxLoss(ClassBalancedSampler(LABELS).class_counts),
        {},
    ),
    "no adjustment": (LGLALoss(COUNTS, adjustment="softmax"), {}),
    "tau of 0": (LogitAdjustedLoss(COUNTS, tau=0), {}),
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
        for _ in range(70):
            target = next(labels)
            weight = torch.tensor(COUNTS)[target].float()  # which undoes the sampler
            criterion(torch.zeros(len(target), 6, requires_grad=True), target, sample_weight=weight)

    assert not told(steps)


def test_validation_is_not_judged():
    criterion, labels = BalancedSoftmaxLoss(COUNTS), balanced()
    with torch.no_grad():
        assert not told(lambda: train(criterion, labels))

    def of_constants():
        for _ in range(70):
            target = next(labels)
            criterion(torch.zeros(len(target), 6), target)

    assert not told(of_constants)


def test_a_loss_under_torch_func_tells_nothing_and_keeps_nothing_of_it():
    criterion, labels = BalancedSoftmaxLoss(COUNTS), balanced()

    def steps():
        for _ in range(70):
            target = next(labels)
            torch.func.grad(lambda logits, target=target: criterion(logits, target))(
                torch.zeros(len(target), 6)
            )

    assert not told(steps)
    assert told(lambda: train(copy.deepcopy(criterion), labels, 130))


def test_a_compiled_loss_compiles_once_and_tells_nothing():
    compiled = torch.compile(BalancedSoftmaxLoss(COUNTS, validate_args=True), backend="eager")
    labels = (target for target in balanced() if len(target) == 32)
    torch._dynamo.reset()  # of what other tests have compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not told(lambda: train(compiled, labels))


def test_new_counts_are_judged_anew():
    criterion = BalancedSoftmaxLoss([100] * 6)
    assert not told(lambda: train(criterion, balanced(), 120))
    criterion.set_adjustment(class_counts=COUNTS)
    assert told(lambda: train(criterion, balanced(), 80))


def test_one_batch_again_and_again_tells_nothing():
    """As in a loop that shows how the loss is called, or that measures it."""
    target = torch.arange(60) % 6
    assert not told(lambda: train(BalancedSoftmaxLoss(COUNTS), iter([target] * 130), 130))


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
    seen, of_epoch, per_epoch, step = SeenLabels(counts), None, math.ceil(int(counts.sum()) / size), 1
    now = -1
    while step <= last:
        before, (now, place) = now, divmod(step - 1, per_epoch)
        of_epoch = epoch() if now != before else of_epoch
        labels = of_epoch[place * size : (place + 1) * size]
        seen.add(labels)
        if seen.problem(step, step * len(labels)) is not None:
            return step
        step *= 2
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
