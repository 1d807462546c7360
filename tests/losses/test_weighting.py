"""Eqs. 7 and 8: angles, references and weights."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from lgla_losses import AAWWeighter, ClassGrouper, functional

COUNTS = [50, 20, 20, 5, 4, 1]


def weighter(num_groups=2, **options):
    return AAWWeighter(ClassGrouper(COUNTS, num_groups), **options)


@st.composite
def batches(draw):
    """Angles and targets; some ignored, most batches lack a group, some are empty."""
    num_groups = draw(st.integers(1, 6))
    num_samples = draw(st.integers(0, 8))
    target = draw(st.lists(st.sampled_from([-100, *range(6)]), min_size=num_samples, max_size=num_samples))
    row = st.lists(st.floats(0, math.pi), min_size=num_groups + 1, max_size=num_groups + 1)
    angles = draw(st.lists(row, min_size=num_samples, max_size=num_samples))
    return num_groups, angles, target


@given(batches())
def test_weights_are_eq8(batch):
    num_groups, angles, target = batch
    module = weighter(num_groups)
    expected = reference.weights(angles, target, module.grouper.group_index.tolist())
    actual = module(
        torch.tensor(angles, dtype=torch.float64).reshape(-1, num_groups + 1),
        torch.tensor(target, dtype=torch.int64),
    )
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64).reshape_as(actual), rtol=0, atol=1e-12
    )


@given(batches())
def test_weights_are_one_at_or_below_the_reference_and_at_most_one_plus_pi(batch):
    num_groups, angles, target = batch
    module = weighter(num_groups)
    angles = torch.tensor(angles, dtype=torch.float64).reshape(-1, num_groups + 1)
    target = torch.tensor(target, dtype=torch.int64)
    weights = module(angles, target)
    kept = target >= 0
    assert (weights[~kept] == 0).all()
    assert (weights[kept] >= 1).all()
    assert (weights[kept] <= 1 + math.pi).all()
    statistics = module.statistics(angles, target)
    references = (statistics[:, :-1] / statistics[:, -1:])[module.grouper(target[kept])]
    assert (weights[kept][angles[kept] <= references] == 1).all()
    assert (weights[kept][angles[kept] > references + 1e-9] > 1).all()


def test_equal_angles_weigh_exactly_one(device):
    """The mean of equal numbers must not round below them; float64 sums hold every lower dtype's."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        angles = torch.full((1000, 3), 1.1, dtype=dtype, device=device)
        assert (weighter().to(device)(angles, torch.arange(1000, device=device) % 6) == 1).all()


def test_a_group_absent_from_the_batch_changes_nothing():
    angles = torch.rand(5, 3)
    target = torch.zeros(5, dtype=torch.int64)
    with_tail = weighter()(torch.cat([angles, torch.rand(2, 3)]), torch.cat([target, torch.tensor([4, 5])]))
    assert torch.equal(weighter()(angles, target), with_tail[:5])


def test_ignored_samples_enter_no_mean_whatever_their_angles():
    angles = torch.tensor([[0.5], [math.nan], [1.5]])
    weights = weighter(ignore_index=3)(angles, torch.tensor([0, 3, 1]))
    expected = weighter()(angles[[0, 2]], torch.tensor([0, 1]))
    assert weights[1].item() == 0
    assert torch.equal(weights[[0, 2]], expected)


def test_no_gradient_flows_and_half_angles_give_float32_weights():
    angles = torch.rand(4, 3, requires_grad=True)
    assert not weighter()(angles, torch.arange(4)).requires_grad
    assert weighter()(angles.half(), torch.arange(4)).dtype == torch.float32
    assert weighter()(angles.double(), torch.arange(4)).dtype == torch.float64


def test_references_of_a_million_samples_keep_their_digits():
    """A running float32 sum of a million equal angles would drift by tenths of a percent."""
    angles = torch.full((1_000_000, 1), 1.2345678)
    statistics = weighter(1).statistics(angles, torch.zeros(1_000_000, dtype=torch.int64))
    assert (statistics[0, 0] / statistics[0, 1]).item() == pytest.approx(angles[0, 0].item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_angles_from_features_are_eq7(dtype, close, device):
    features = torch.randn(7, 3, 5, device=device, dtype=dtype)
    weight = torch.randn(3, 4, 5, device=device, dtype=dtype)
    target = torch.arange(7, device=device) % 4
    expected = [
        [reference.angle(features[i, k].tolist(), weight[k, y].tolist()) for k in range(3)]
        for i, y in enumerate(target.tolist())
    ]
    close(functional.angles_from_features(features, weight, target), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cosine_beyond_one_is_clamped(dtype):
    logits = torch.tensor([[[30.5, 0.0]], [[-31.0, 0.0]], [[15.0, 0.0]]], dtype=dtype)
    angles = functional.angles_from_logits(logits, torch.zeros(3, dtype=torch.int64), 30.0)
    assert angles.dtype == functional.compute_dtype(dtype)
    assert angles.flatten().tolist() == pytest.approx([0.0, math.pi, math.pi / 3], rel=1e-6)


def test_angles_of_low_precision_features_are_taken_in_float32():
    features, weight = torch.randn(64, 3, 200), torch.randn(3, 4, 200)
    target = torch.arange(64) % 4
    low = functional.angles_from_features(features.bfloat16(), weight.bfloat16(), target)
    full = functional.angles_from_features(features.bfloat16().float(), weight.bfloat16().float(), target)
    assert torch.equal(low, full)


def test_autocast_rounds_no_cosine(device):
    features, weight = torch.randn(8, 3, 20, device=device), torch.randn(3, 4, 20, device=device)
    expected = functional.class_cosines(features, weight)
    with torch.autocast(features.device.type, torch.bfloat16):
        found = functional.class_cosines(features, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_zero_feature_has_a_finite_angle():
    angles = functional.angles_from_features(torch.zeros(1, 2, 3), torch.randn(2, 4, 3), torch.tensor([1]))
    assert angles.tolist() == [[pytest.approx(math.pi / 2)] * 2]
