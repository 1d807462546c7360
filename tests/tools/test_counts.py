"""Vectors by class keep their classes, however they are ordered where they come from."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from lgla_losses import ClassGrouper, LGLALoss, LinearLGLALoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedBCELoss,
    ClassBalancedLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    NCLLoss,
    RIDELoss,
    VSLoss,
)
from lgla_losses.data import long_tailed_indices
from lgla_losses.inspection import gini_coefficient, inspect_counts
from lgla_losses.label_shift import estimate_prior, shift_prior
from lgla_losses.metrics import ShotAccuracy
from lgla_losses.plot import fusion_sweep, plot_weight_norms

#: Class 1 is the most frequent, so value_counts begins with it.
LABELS = pd.Series([1, 1, 1, 0, 2, 2])
COUNTS = [1, 3, 2]
LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.tensor([0, 1, 2, 2])
SWEPT = torch.stack([LOGITS, LOGITS.flip(1)], dim=1)

BY_CLASS = {
    "value_counts": LABELS.value_counts(),
    "value_counts of Int64": LABELS.astype("Int64").value_counts(),
    "value_counts of a category": LABELS.astype("category").value_counts(),
    "codes of names": LABELS.map({0: "ant", 1: "bee", 2: "cat"}).astype("category").cat.codes.value_counts(),
    "Counter": Counter(LABELS.tolist()),
    "dict": {np.int64(2): 2, 1: 3, 0: 1},
}

TAKERS = {
    "ClassGrouper": lambda counts: ClassGrouper(counts, 2).class_counts,
    "LGLALoss": lambda counts: LGLALoss(counts, 2).adjuster.table,
    "LinearLGLALoss": lambda counts: LinearLGLALoss(counts, 2).adjuster.table,
    "BalancedSoftmaxLoss": lambda counts: BalancedSoftmaxLoss(counts)(LOGITS, TARGET),
    "ClassBalancedLoss": lambda counts: ClassBalancedLoss(counts)(LOGITS, TARGET),
    "LDAMLoss": lambda counts: LDAMLoss(counts)(LOGITS, TARGET),
    "LogitAdjustedLoss": lambda counts: LogitAdjustedLoss(counts)(LOGITS, TARGET),
    "NCLLoss": lambda counts: NCLLoss(counts)(LOGITS, TARGET),
    "RIDELoss": lambda counts: RIDELoss(counts)(LOGITS, TARGET),
    "VSLoss": lambda counts: VSLoss(counts)(LOGITS, TARGET),
    "shift_prior": lambda prior: shift_prior(LOGITS, prior, [1, 1, 1]),
    "new_prior": lambda prior: shift_prior(LOGITS, [1, 1, 1], prior),
    "estimate_prior": lambda prior: estimate_prior(LOGITS, prior),
    "ShotAccuracy": lambda counts: ShotAccuracy(counts, many=2, few=2).splits,
    "long_tailed_indices": lambda counts: long_tailed_indices([0, 0, 1, 1, 1, 2, 2, 2], counts),
    "inspect_counts": lambda counts: inspect_counts(counts).largest.number,
    "gini_coefficient": gini_coefficient,
    "fusion_sweep": lambda counts: fusion_sweep(SWEPT, TARGET, counts, many=2, few=2),
    "plot_weight_norms": lambda counts: (
        plot_weight_norms(torch.ones(2, 3, 2) * torch.arange(1, 4)[:, None], counts)
        .get_lines()[0]
        .get_ydata()
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("kind", BY_CLASS)
def test_value_counts_of_pandas_keep_their_classes(taker, kind):
    found, expected = TAKERS[taker](BY_CLASS[kind]), TAKERS[taker](COUNTS)
    assert np.array_equal(np.asarray(found), np.asarray(expected), equal_nan=taker == "fusion_sweep")


def test_groups_by_class_keep_their_classes():
    grouper = ClassGrouper.from_groups(LABELS.value_counts(), pd.Series({1: 0, 2: 0, 0: 1}))
    assert grouper.group_index.tolist() == [1, 0, 0]
    assert grouper.group_masses.tolist() == [5, 1]


def test_a_prior_by_class_keeps_its_classes():
    frequencies = LABELS.value_counts(normalize=True)
    assert torch.equal(shift_prior(LOGITS, frequencies, COUNTS), shift_prior(LOGITS, COUNTS, COUNTS))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (LABELS[LABELS > 0].value_counts(), r"got \[1, 2\]; number the classes from 0 .* \.reindex\(range"),
        ((LABELS + 1).value_counts(), r"got \[2, 3, 1\]; number the classes from 0"),
        (pd.Series([5, 4], index=[0, 0]), r"got \[0, 0\]"),
        (
            LABELS.astype(float).value_counts(),
            r"got \[1\.0, 2\.0, 0\.0\]; convert the labels with \.astype\(int\)",
        ),
        (
            pd.Series(["b", "b", "a"]).value_counts(),
            r"got \['b', 'a'\]; pass .* \[class_counts\[key\] for key",
        ),
        (pd.DataFrame({"y": LABELS}).value_counts(), r"got \[\(1,\), \(2,\), \(0,\)\]; pass"),
        ({"0": 3, "1": 2}, r"got \['0', '1'\]; pass the values in the order"),
        ({False: 3, True: 2}, r"got \[False, True\]"),
        (Counter(torch.tensor([1, 0])), r"got \[tensor\(1\), tensor\(0\)\]"),
    ],
)
def test_counts_of_an_unknown_order_are_refused(counts, words):
    with pytest.raises(ValueError, match=f"class_counts: expected the class numbers 0..C-1 .* {words}"):
        LGLALoss(counts, 2)


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        (torch.ones(3, device="meta"), "meta"),
        (torch.ones(3).to_sparse(), "torch.sparse_coo"),
        (torch.ones(3).to_mkldnn(), "torch._mkldnn"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    ],
)
def test_counts_without_plain_values_are_refused(counts, kind):
    with pytest.raises(TypeError, match=f"class_counts: expected a dense tensor .* got one of kind {kind}"):
        ClassGrouper(counts, 1)


def test_only_what_takes_counts_of_zero_on_request_says_so():
    with pytest.raises(ValueError, match=r"zero_counts='smooth' .* zero_counts='mask' .* label space"):
        LGLALoss([3, 0, 2], 2)
    criterion = ClassBalancedBCELoss(COUNTS)
    state = criterion.state_dict() | {"class_counts": torch.tensor([3.0, 0.0, 2.0])}
    for call in (
        lambda: ClassBalancedBCELoss([3, 0, 2]),
        lambda: criterion.set_adjustment([3, 0, 2]),
        lambda: criterion.load_state_dict(state),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"for class 1 .*; leave") as caught:
            call()
        assert "zero_counts" not in str(caught.value)


def test_classes_without_samples_are_few_shot_classes_of_the_metrics():
    metric = ShotAccuracy([300, 0, 50])
    metric.update(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]))
    assert metric.compute()["few"] == 1.0
    logits = torch.eye(3).expand(3, 3, 3)
    assert fusion_sweep(logits, torch.arange(3), [300, 0, 50], weights=[0.5]).shape == (2, 1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float64])
def test_counts_may_be_floats_of_any_precision(dtype):
    assert ClassGrouper(torch.tensor([8, 4, 2]).to(dtype), 1).class_counts.tolist() == [8, 4, 2]
