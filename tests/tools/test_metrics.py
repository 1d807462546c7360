"""Accuracy by shots, as a metric of torchmetrics; what runs over ranks is in helpers/metrics_worker.py."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torchmetrics import MetricCollection

from lgla_losses.metrics import ShotAccuracy

COUNTS = [500, 101, 100, 20, 19, 1]
NAMES = {"all", "many", "medium", "few"}


def by_hand(counts, pred, target, many=100, few=20):
    """The means in plain NumPy, and the recall of every class."""
    counts, pred, target = np.array(counts), np.asarray(pred), np.asarray(target)
    recall = np.array(
        [np.mean(pred[target == j] == j) if (target == j).any() else np.nan for j in range(len(counts))]
    )
    splits = {
        "all": counts > 0,
        "many": counts > many,
        "medium": (few <= counts) & (counts <= many),
        "few": counts < few,
    }
    tested = ~np.isnan(recall)
    means = {
        name: recall[split & tested].mean() if (split & tested).any() else np.nan
        for name, split in splits.items()
    }
    return means, recall


def assert_agrees(metric, means, recall):
    result = metric.compute()
    assert set(result) == NAMES
    assert all(value.shape == () for value in result.values())
    for name, value in result.items():
        assert value.item() == pytest.approx(means[name], rel=1e-5, nan_ok=True), name
    assert metric.per_class().cpu().numpy() == pytest.approx(recall, rel=1e-5, nan_ok=True)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.integers(1, 200), min_size=1, max_size=8))
    label = st.integers(0, len(counts) - 1)
    batches = draw(st.lists(st.lists(st.tuples(label, label), max_size=12), max_size=3))
    return counts, batches


@given(cases())
def test_it_agrees_with_numpy(case):
    counts, batches = case
    metric = ShotAccuracy(counts)
    for batch in batches:
        pairs = torch.tensor(batch, dtype=torch.int64).reshape(-1, 2)
        metric.update(pairs[:, 0], pairs[:, 1])
    pairs = np.array([pair for batch in batches for pair in batch], dtype=int).reshape(-1, 2)
    assert_agrees(metric, *by_hand(counts, pairs[:, 0], pairs[:, 1]))


def test_scores_and_thresholds(device):
    scores, target = torch.randn(200, 6), torch.randint(6, (200,))
    metric = ShotAccuracy(COUNTS, many=50, few=50).to(device)
    for part in range(2):
        metric.update(scores[part::2].to(device), target[part::2].to(device))
    assert metric.compute()["all"].device.type == device
    means, recall = by_hand(COUNTS, scores.argmax(1), target, many=50, few=50)
    assert np.isnan(means["medium"])
    assert_agrees(metric, means, recall)


def test_without_samples_all_are_nan():
    metric = ShotAccuracy(COUNTS)
    for _ in range(2):
        assert_agrees(metric, dict.fromkeys(NAMES, np.nan), np.full(6, np.nan))
        metric.update(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    metric.update(torch.tensor([0]), torch.tensor([0]))
    assert metric.compute()["all"] == 1
    metric.reset()
    assert metric.compute()["all"].isnan()


def test_forward_gives_the_batch():
    metric = ShotAccuracy([500, 5])
    first = metric(torch.tensor([0, 0]), torch.tensor([0, 1]))
    second = metric(torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert (first["all"], first["many"], first["few"]) == (0.5, 1, 0)
    assert second["few"] == 1
    assert second["many"].isnan()
    assert metric.compute()["few"].item() == pytest.approx(2 / 3)
    assert metric.total.tolist() == [1, 3]


def test_copies_and_state():
    metric = ShotAccuracy(COUNTS)
    pred, target = torch.randint(6, (2, 100))
    metric.update(pred, target)
    expected = by_hand(COUNTS, pred, target)
    for other in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert_agrees(other, *expected)
        other.reset()
        assert other.compute()["all"].isnan()  # without the warning, which pickling must not bring back
    metric.persistent(True)
    other = ShotAccuracy(COUNTS)
    other.load_state_dict(metric.state_dict())
    assert_agrees(other, *expected)
    other.half()  # counts are no floats
    assert_agrees(other, *expected)


def test_in_a_collection():
    """The two share their states, as torchmetrics sees that they are alike."""
    collection = MetricCollection(
        {"usual": ShotAccuracy(COUNTS), "split": ShotAccuracy(COUNTS, many=50, few=50)}
    )
    pred, target = torch.randint(6, (2, 100))
    for part in range(2):
        collection.update(pred[part::2], target[part::2])
    result = collection.compute()
    means = {"usual": by_hand(COUNTS, pred, target)[0], "split": by_hand(COUNTS, pred, target, 50, 50)[0]}
    assert set(result) == {f"{metric}_{name}" for metric in means for name in NAMES}
    for key, value in result.items():
        metric, _, name = key.partition("_")
        assert value.item() == pytest.approx(means[metric][name], rel=1e-5, nan_ok=True)
    assert set(MetricCollection([ShotAccuracy(COUNTS)], prefix="val/").compute()) == {
        f"val/{n}" for n in NAMES
    }


def test_ranks_are_counted_together(tmp_path):
    """Two processes on gloo, of which the last has no sample."""
    run_ranks("metrics_worker.py", 2, tmp_path)


def test_without_torchmetrics_the_error_says_what_to_install():
    code = """
import sys
sys.modules["torchmetrics"] = None
import lgla_losses
try:
    import lgla_losses.metrics
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install torchmetrics" in result.stdout


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("error", "message", "pred", "target"),
    [
        (TypeError, "target: expected an int64 tensor", LABELS, [0, 1]),
        (ValueError, "target: expected class indices 0..5, got 6", LABELS, LABELS + 5),
        (ValueError, "pred: expected class indices 0..5, got 6", LABELS + 5, LABELS),
        (ValueError, "pred: expected class indices 0..5, got -1", LABELS - 1, LABELS),
        (
            ValueError,
            r"pred: expected one class index per sample, shape \[2\], got \[1\]",
            LABELS[:1],
            LABELS,
        ),
        (ValueError, r"pred: expected scores \[2, 6\].* got \[2, 5\]", torch.zeros(2, 5), LABELS),
        (ValueError, r"pred: expected shape \[N, C\], got \[2\]", torch.zeros(2), LABELS),
        (TypeError, "pred: expected int64 class indices .* pred.long()", LABELS.int(), LABELS),
        (TypeError, "pred: expected int64 class indices .* got .0, 1.", [0, 1], LABELS),
        (
            ValueError,
            "expected scores, got NaN",
            torch.full((3, len(COUNTS)), torch.nan),
            torch.tensor([0, 1, 2]),
        ),
    ],
)
def test_bad_batches(error, message, pred, target):
    metric = ShotAccuracy(COUNTS)
    with pytest.raises(error, match=message):
        metric.update(pred, target)
    assert metric.total.sum() == 0


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "class_counts: expected finite counts >= 0", {"class_counts": [1, -1]}),
        (ValueError, "many: expected a finite number", {"many": float("nan")}),
        (ValueError, r"few: expected a number in 0..many=100, got 200", {"few": 200}),
        (TypeError, "few: expected a number", {"few": "20"}),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        ShotAccuracy(**{"class_counts": COUNTS, **arguments})
