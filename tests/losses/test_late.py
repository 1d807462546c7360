"""Multi-hot batches on a GPU: found without a wait, told in a later call. Here a CPU plays the GPU."""

import copy
import pickle

import pytest
import torch

from lgla_losses import LGLALoss, LinearLGLALoss, _late
from lgla_losses.baselines import BalancedSoftmaxLoss
from lgla_losses.losses import _base

COUNTS = [40, 9, 5, 1]
LOGITS = torch.zeros(6, 3, 4)
GOOD = torch.eye(4)[torch.arange(6) % 4]
MULTI_HOT = (GOOD + GOOD.roll(1, dims=1)).roll(1, dims=0)
MULTI_HOT[0] = 0.0  # a sample without a label
TOLD = "several classes per sample .*SigmoidAdjustedLoss and ClassBalancedBCELoss .*earlier batch"


class Device:
    """When it is ``done``, all events that were recorded are."""

    def __init__(self):
        self.done, self.events = False, 0

    def record(self, _):
        self.events += 1
        return self

    def query(self):
        return self.done


@pytest.fixture
def device(monkeypatch):
    fake = Device()
    monkeypatch.setattr(_late, "recorded_event", fake.record)
    return fake


@pytest.fixture
def as_on_a_gpu(device, monkeypatch):
    """Nobody reads values in a step."""
    monkeypatch.setattr(_base, "can_look", lambda target: True)
    monkeypatch.setattr(_base, "values_readable", lambda *_: False)
    return device


LOSSES = {
    "LGLALoss": (LGLALoss(COUNTS), lambda criterion, q: criterion(LOGITS, q)),
    "validation": (LGLALoss(COUNTS), lambda criterion, q: criterion(LOGITS[:, 0], q)),
    "BalancedSoftmaxLoss": (BalancedSoftmaxLoss(COUNTS), lambda criterion, q: criterion(LOGITS[:, 0], q)),
    "LinearLGLALoss": (
        LinearLGLALoss(COUNTS),
        lambda criterion, q: criterion(torch.ones(6, 3, 2), torch.ones(3, 4, 2), q),
    ),
    "maps": (LGLALoss(COUNTS), lambda criterion, q: criterion(LOGITS[..., None], q[..., None])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_multi_hot_batch_is_told_as_soon_as_the_device_has_come_to_it(name, as_on_a_gpu):
    criterion, call = copy.deepcopy(LOSSES[name][0]), LOSSES[name][1]
    for _ in range(3):
        call(criterion, MULTI_HOT)
    assert as_on_a_gpu.events == 1  # the second look would be after the first
    as_on_a_gpu.done = True
    with pytest.raises(ValueError, match=f"target: expected class probabilities .*from 0 to 2; .*{TOLD}"):
        call(criterion, MULTI_HOT)
    call(criterion, GOOD)


def test_some_batches_are_looked_at_and_good_ones_are_never_told(as_on_a_gpu):
    as_on_a_gpu.done = True
    criterion = LGLALoss(COUNTS)
    for _ in range(20):
        criterion(LOGITS, GOOD)
    assert as_on_a_gpu.events == 5  # batches 1, 2, 4, 8 and 16
    for _ in range(11):
        criterion(LOGITS, GOOD)
    criterion(LOGITS, MULTI_HOT)  # batch 32
    for _ in range(15):
        criterion(LOGITS, GOOD)
    with pytest.raises(ValueError, match=TOLD):
        criterion(LOGITS, GOOD)


def test_class_indices_and_losses_that_check_nothing_are_not_looked_at(as_on_a_gpu):
    as_on_a_gpu.done = True
    unchecked, indices = LGLALoss(COUNTS, validate_args=False), LGLALoss(COUNTS)
    for _ in range(3):
        unchecked(LOGITS, MULTI_HOT)
        indices(LOGITS, torch.arange(6) % 4)
    assert as_on_a_gpu.events == 0


def test_a_copy_of_a_loss_begins_anew(as_on_a_gpu):
    criterion = LGLALoss(COUNTS)
    criterion(LOGITS, MULTI_HOT)
    as_on_a_gpu.done = True
    for again in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        again(LOGITS, GOOD)
        assert as_on_a_gpu.events > 1
    assert "_late" not in criterion.state_dict()


def rounded(num_classes, dtype):
    """Probabilities as they come in 16 bits, at worst."""
    even = torch.full((1, num_classes), 1 / num_classes, dtype=torch.float64).to(dtype)
    up = torch.nextafter(even, torch.ones_like(even))
    return torch.cat([even, up])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_classes", [3, 1000, 300_000])
def test_rounded_probabilities_are_good_and_two_classes_are_not(num_classes, dtype, device):
    look, device.done = _late.LateLook(), True
    for probabilities in (rounded(num_classes, dtype), torch.zeros(0, num_classes, dtype=dtype)):
        look(probabilities)
        look(probabilities)
    look = _late.LateLook()
    two = torch.zeros(5, num_classes, dtype=dtype)
    two[3, :2] = 1
    look(two)
    with pytest.raises(ValueError, match="sums from 0 to 2"):
        look(two)


def test_negative_numbers_are_told_and_rounding_below_0_is_not(device):
    look, device.done = _late.LateLook(), True
    look(GOOD - 1e-6)
    look(GOOD - 0.1)
    look(GOOD)
    with pytest.raises(ValueError, match=r"values from -0\.1 "):
        look(GOOD)


def test_only_plain_tensors_on_a_gpu_are_looked_at():
    assert not _late.can_look(GOOD)
    assert not _late.can_look(GOOD.to("meta"))
