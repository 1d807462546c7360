"""Validation with the criterion of the training loop: of an ensemble's logits, and of what experts give."""

import pytest
import torch
import torch.nn.functional as F

from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss
from lgla_losses.baselines import BalancedSoftmaxLoss

COUNTS = [50, 20, 10, 5]
TARGET = torch.tensor([0, 1, 2, 3, -100, 1, 0, 3])
LOSSES = {
    "LGLA": lambda **options: LGLALoss(COUNTS, **options),
    "CLA": lambda **options: LGLALoss(COUNTS, aaw=False, **options),
    "balanced softmax x3": lambda **options: LGLALoss(COUNTS, adjustment="balanced", aaw=False, **options),
    "linear heads": lambda **options: LGLALoss(COUNTS, scale=None, **options),
    "one expert": lambda **options: LGLALoss(COUNTS, 1, adjustment="logit", aaw=False, **options),
}
EVERY_LOSS = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def logits(*shape):
    return 10 * torch.randn(8, 4, *shape, dtype=torch.float64)


@EVERY_LOSS
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_ensembles_logits_give_their_cross_entropy(make, backend, reduction, smoothing, close):
    options = {"reduction": reduction, "label_smoothing": smoothing}
    criterion, v = make(backend=backend, **options), logits()
    close(criterion(v, TARGET), F.cross_entropy(v, TARGET, **options))
    probabilities = torch.rand(8, 4).double().softmax(dim=1)
    close(criterion(v, probabilities), F.cross_entropy(v, probabilities, **options))


@EVERY_LOSS
def test_maps_weights_and_divisors_count_as_in_training(make, close):
    criterion, v, weights = make(), logits(), torch.rand(8, dtype=torch.float64)
    maps, target = logits(2, 3), TARGET[:, None, None].repeat(1, 2, 3)
    close(criterion(maps, target), F.cross_entropy(maps, target))
    close(criterion(maps[..., 0], target[..., 0]), F.cross_entropy(maps[..., 0], target[..., 0]))
    soft = torch.rand_like(maps).softmax(dim=1)
    close(criterion(maps, soft), F.cross_entropy(maps, soft))

    losses = F.cross_entropy(v, TARGET, reduction="none")
    close(criterion(v, TARGET, normalizer=5), losses.sum() / 5)
    weighted = (losses * weights).sum() / (weights * (TARGET >= 0)).sum()
    close(criterion(v, TARGET, sample_weight=weights), weighted)


@EVERY_LOSS
def test_the_usual_validation_loop_runs(make):
    criterion, num_experts = make(), make().num_experts
    experts = GroupConvExperts(None, num_experts, 4, num_features=6)
    with torch.no_grad():
        ensemble = experts(torch.randn(8, 6)).ensemble()
        assert not criterion(ensemble, TARGET).requires_grad
    torch.testing.assert_close(criterion(ensemble, TARGET), F.cross_entropy(ensemble, TARGET))


@EVERY_LOSS
def test_training_by_an_ensembles_logits_names_both_ways_out(make):
    ensemble = logits().requires_grad_()
    with pytest.raises(ValueError, match=r"with a gradient; .*BalancedSoftmaxLoss.*ExpertOutput.*\.ensemble"):
        make()(ensemble, TARGET)
    BalancedSoftmaxLoss(COUNTS)(ensemble, TARGET).backward()  # the first of them works


def test_no_message_leads_in_a_circle():
    """Every way that a message names is walked: none ends at another message."""
    ensemble = logits().requires_grad_()
    with pytest.raises(ValueError, match=r"one model use BalancedSoftmaxLoss\(class_counts\)"):
        LGLALoss(COUNTS)(ensemble[:, None], TARGET)
    with pytest.raises(ValueError, match=r"one model use BalancedSoftmaxLoss\(class_counts\)"):
        LGLALoss(COUNTS, 1)
    with pytest.raises(ValueError, match="predict with them directly"):
        ExpertOutput(ensemble, ensemble, ensemble).ensemble()
    of_one = LGLALoss(COUNTS, 1, adjustment="balanced", aaw=False)
    with pytest.raises(ValueError, match=r"or logits\[:, None\]"):
        of_one(ensemble, TARGET)
    torch.testing.assert_close(
        of_one(ensemble[:, None], TARGET), BalancedSoftmaxLoss(COUNTS)(ensemble, TARGET)
    )
    LGLALoss(COUNTS)(torch.stack([ensemble] * 3, dim=1), TARGET).backward()


def test_experts_before_samples_are_told_to_transpose():
    heads = torch.stack([logits() for _ in range(3)])
    for criterion in (LGLALoss(COUNTS), BalancedSoftmaxLoss(COUNTS)):
        with pytest.raises(ValueError, match=r"logits\.transpose\(0, 1\)"):
            criterion(heads, TARGET)
        criterion(heads.transpose(0, 1), TARGET)


def test_hard_sample_weights_are_the_same_in_validation_as_in_training():
    experts, criterion = GroupConvExperts(None, 3, 4, num_features=6).eval(), LGLALoss(COUNTS)
    shared = torch.randn(8, 6)
    in_training = criterion(experts(shared), TARGET)
    with torch.no_grad():
        in_validation = criterion.eval()(experts(shared), TARGET)
        unweighted = LGLALoss(COUNTS, aaw=False)(experts(shared), TARGET)
    torch.testing.assert_close(in_validation, in_training.detach())
    assert in_validation > unweighted


def test_validation_compiles():
    criterion, v = LGLALoss(COUNTS), logits()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(v, TARGET), criterion(v, TARGET))


def test_logits_made_with_a_gradient_are_validated_under_no_grad():
    logits = torch.randn(4, 4, requires_grad=True) * 2
    target = torch.arange(4)
    with torch.no_grad():
        loss = LGLALoss([9, 5, 3, 1])(logits, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.detach(), target))
