"""Scores of class probabilities against plain NumPy; over ranks in test_metrics.py."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from lgla_losses.metrics import ProbabilityScores

NAMES = ["nll", "ece", "brier"]
AVERAGES = ["samples", "classes"]


def by_hand(probabilities, target, average, bins=15):
    """The scores in plain loops over the samples, in float64."""
    weights = np.ones(len(target))
    if average == "classes":
        weights = np.array([1 / np.sum(target == y) for y in target])
    weights = weights / weights.sum()
    nll = brier = 0.0
    gaps = np.zeros(bins)
    for weight, row, y in zip(weights, probabilities.astype(np.float64), target, strict=True):
        nll -= weight * np.log(row[y])
        brier += weight * np.sum((row - np.eye(len(row))[y]) ** 2)
        upper_edges = np.linspace(0, 1, bins + 1)[1:-1]
        gaps[np.sum(row.max() > upper_edges)] += weight * ((row.argmax() == y) - row.max())
    return {"nll": nll, "ece": np.abs(gaps).sum(), "brier": brier}


def samples(num_samples, num_classes, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64)
    share = 0.6 ** torch.arange(num_classes)  # a long tail
    return logits.softmax(dim=1), torch.multinomial(share, num_samples, True, generator=generator)


def assert_agrees(metric, expected):
    result = metric.compute()
    assert list(result) == NAMES
    assert all(value.shape == () for value in result.values())
    for name, value in result.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-6, abs=1e-7, nan_ok=True), name


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    num_classes=st.integers(1, 6),
    bins=st.integers(1, 20),
    average=st.sampled_from(AVERAGES),
    sharpness=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_it_agrees_with_numpy(sizes, num_classes, bins, average, sharpness, seed):
    """However the samples come in batches, and with classes that have none."""
    probabilities, target = samples(sum(sizes), num_classes, seed, sharpness)
    metric = ProbabilityScores(num_classes, average=average, bins=bins)
    for rows, labels in zip(probabilities.split(sizes), target.split(sizes), strict=True):
        metric.update(rows, labels)
    assert_agrees(metric, by_hand(probabilities.numpy(), target.numpy(), average, bins))


def test_the_calibration_error_is_that_of_torchmetrics():
    probabilities, target = samples(500, 5)
    metric, peer = ProbabilityScores(5, bins=10), MulticlassCalibrationError(5, n_bins=10)
    for part in range(2):
        metric.update(probabilities[part::2], target[part::2])
        peer.update(probabilities[part::2], target[part::2])
    torch.testing.assert_close(metric.compute()["ece"], peer.compute().float(), rtol=1e-5, atol=0)


def test_of_sure_and_right_predictions_all_scores_are_0():
    metric = ProbabilityScores(3)
    metric.update(torch.eye(3), torch.arange(3))
    assert metric.compute() == {"nll": 0, "ece": 0, "brier": 0}


@pytest.mark.parametrize("average", AVERAGES)
def test_a_label_of_probability_0_makes_the_nll_infinite(average):
    metric = ProbabilityScores(3, average=average)
    metric.update(torch.eye(3)[:2], torch.tensor([0, 0]))
    assert metric.compute() == {"nll": float("inf"), "ece": 0.5, "brier": 1}


def test_classes_count_alike_however_many_samples_they_have():
    """The head's samples, repeated, change the mean over samples and not that over classes."""
    probabilities, target = samples(60, 3)
    head = (target == 0).nonzero()[:, 0]
    more = torch.cat([torch.arange(60), head.repeat(9)])
    result = {}
    for average in AVERAGES:
        metric, longer = ProbabilityScores(3, average=average), ProbabilityScores(3, average=average)
        metric.update(probabilities, target)
        longer.update(probabilities[more], target[more])
        result[average] = metric.compute(), longer.compute()
    for name in NAMES:
        once, repeated = (scores[name].item() for scores in result["classes"])
        assert once == pytest.approx(repeated, rel=1e-6)
        once, repeated = (scores[name].item() for scores in result["samples"])
        assert once != pytest.approx(repeated, rel=1e-2)


def test_uniform_weights_tell_a_model_of_the_uniform_prior_from_one_of_the_training_prior():
    """On a long-tailed split the posterior of each prior is the best under its own average."""
    generator = torch.Generator().manual_seed(0)
    prior = torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)
    target = torch.multinomial(prior, 20_000, True, generator=generator)
    points = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    points += 2 * torch.eye(3, dtype=torch.float64)[target]
    uniform = (2 * points).softmax(dim=1)
    training = (2 * points + prior.log()).softmax(dim=1)
    results = {}
    for average in AVERAGES:
        for name, rows in (("uniform", uniform), ("training", training)):
            metric = ProbabilityScores(3, average=average)
            metric.update(rows, target)
            results[average, name] = metric.compute()
    for score in NAMES:
        assert results["samples", "training"][score] < results["samples", "uniform"][score]
        assert results["classes", "uniform"][score] < results["classes", "training"][score]
    assert results["samples", "training"]["ece"] < 0.02
    assert results["classes", "uniform"]["ece"] < 0.04


@pytest.mark.parametrize("average", AVERAGES)
def test_without_samples_all_are_nan(average, recwarn):
    metric = ProbabilityScores(3, average=average)
    for _ in range(2):
        assert_agrees(metric, dict.fromkeys(NAMES, np.nan))
        metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    metric.update(torch.eye(3), torch.arange(3))
    assert metric.compute()["brier"] == 0
    metric.reset()
    assert metric.compute()["brier"].isnan()
    assert not recwarn


def test_many_batches_lose_no_digits():
    """Terms that float32 would round beside a large sum; ``half()`` leaves the sums as they are."""
    metric = ProbabilityScores(2)
    metric.nll = torch.tensor([2.0**24, 0.0], dtype=torch.float64)
    metric.samples[0, 0] = 1
    rows, target = torch.full((10, 2), 0.5), torch.zeros(10, dtype=torch.int64)
    for _ in range(10):
        metric.update(rows, target)
    assert metric.half().nll[0].item() == pytest.approx(2**24 + 100 * np.log(2), rel=1e-14)


def test_probabilities_of_low_precision(device):
    probabilities, target = samples(200, 6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = probabilities.to(dtype)
        metric = ProbabilityScores(6, average="classes").to(device)
        metric.update(rows.to(device), target.to(device))
        assert metric.compute()["nll"].device.type == device
        assert_agrees(metric, by_hand(rows.double().numpy(), target.numpy(), "classes"))


def test_forward_copies_and_states():
    probabilities, target = samples(50, 4)
    metric = ProbabilityScores(4, average="classes")
    step = metric(probabilities[:20], target[:20])
    assert step["nll"].item() == pytest.approx(
        by_hand(probabilities[:20].numpy(), target[:20].numpy(), "classes")["nll"]
    )
    metric(probabilities[20:], target[20:])
    expected = by_hand(probabilities.numpy(), target.numpy(), "classes")
    for other in (metric, pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert_agrees(other, expected)
    metric.persistent(True)
    other = ProbabilityScores(4, average="classes")
    other.load_state_dict(metric.state_dict())
    assert_agrees(other, expected)


def test_in_a_collection():
    """Both averages share their states, as torchmetrics sees that they are alike."""
    probabilities, target = samples(100, 4)
    collection = MetricCollection({name: ProbabilityScores(4, average=name) for name in AVERAGES})
    for part in range(3):
        collection.update(probabilities[part::3], target[part::3])
    result = collection.compute()
    assert set(result) == {f"{average}_{name}" for average in AVERAGES for name in NAMES}
    for average in AVERAGES:
        expected = by_hand(probabilities.numpy(), target.numpy(), average)
        for name in NAMES:
            assert result[f"{average}_{name}"].item() == pytest.approx(expected[name], rel=1e-6), name


def test_probabilities_that_want_a_gradient():
    logits = torch.randn(5, 3, requires_grad=True)
    metric = ProbabilityScores(3)
    metric.update(logits.softmax(dim=1), torch.zeros(5, dtype=torch.int64))
    assert not metric.nll.requires_grad


ROWS, LABELS = torch.eye(3)[:2], torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("error", "message", "probabilities", "target"),
    [
        (TypeError, "target: expected an int64 tensor", ROWS, [0, 1]),
        (ValueError, "target: expected class indices 0..2, got 3", ROWS, LABELS + 2),
        (ValueError, "target: expected class indices 0..2, got -1", ROWS, LABELS - 1),
        (TypeError, "probabilities: expected a floating-point tensor", ROWS.long(), LABELS),
        (TypeError, "probabilities: expected a floating-point tensor", [[1.0, 0, 0]] * 2, LABELS),
        (ValueError, r"probabilities: expected shape \[N, C\], got \[2\]", ROWS[:, 0], LABELS),
        (ValueError, r"probabilities: expected shape \[2, 3\].* got \[2, 2\]", ROWS[:, :2], LABELS),
        (ValueError, r"probabilities: expected shape \[2, 3\].* got \[1, 3\]", ROWS[:1], LABELS),
        (ValueError, r"sums from 3 to 3; logits.softmax\(dim=1\)", torch.ones(2, 3), LABELS),
        (ValueError, "got values from -1 and sums", torch.tensor([[2.0, -1, 0]] * 2), LABELS),
        (ValueError, "got values from nan", torch.full((2, 3), torch.nan), LABELS),
        (ValueError, "expected all tensors on one device", ROWS.to("meta"), LABELS),
    ],
)
def test_bad_batches(error, message, probabilities, target):
    metric = ProbabilityScores(3)
    with pytest.raises(error, match=message):
        metric.update(probabilities, target)
    assert metric.samples.sum() == 0


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "num_classes: expected an integer >= 1, got 0", {"num_classes": 0}),
        (TypeError, "num_classes: expected an integer", {"num_classes": 2.0}),
        (ValueError, "average: expected one of 'samples', 'classes', got 'macro'", {"average": "macro"}),
        (ValueError, "bins: expected an integer >= 1, got 0", {"bins": 0}),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        ProbabilityScores(**{"num_classes": 3, **arguments})
