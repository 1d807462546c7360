"""Gradients: numerically, twice, and against the closed form."""

import pytest
import reference
import torch
from torch.autograd import gradcheck, gradgradcheck

from lgla_losses import LGLALoss

COUNTS = [40, 9, 5, 1]
TARGET = torch.tensor([0, 3, 1, -100, 2])


def cosine_logits(device="cpu"):
    return (60 * torch.rand(5, 3, 4, dtype=torch.float64) - 30).to(device).requires_grad_()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("adjustment", ["lgla", "balanced"])
def test_gradcheck_without_aaw(reduction, smoothing, adjustment, device):
    criterion = LGLALoss(
        COUNTS, aaw=False, reduction=reduction, label_smoothing=smoothing, adjustment=adjustment
    ).to(device)
    target = TARGET.to(device)
    assert gradcheck(criterion, (cosine_logits(device), target))
    assert gradgradcheck(criterion, (cosine_logits(device), target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_with_fixed_angles(reduction, device):
    """The weights are constants to autograd; features that do not move keep them so."""
    criterion = LGLALoss(COUNTS, scale=None, reduction=reduction).to(device)
    features, weight = torch.randn(5, 3, 6).to(device), torch.randn(3, 4, 6).to(device)
    target = TARGET.to(device)

    def loss(logits):
        return criterion(logits, target, features=features, weight=weight)

    assert gradcheck(loss, (cosine_logits(device),))
    assert gradgradcheck(loss, (cosine_logits(device),))


@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_gradient_with_aaw_is_the_closed_form(num_experts, close, device):
    """w_ik (softmax(v + T) - onehot), times an upstream gradient that is not one."""
    criterion = LGLALoss(COUNTS, num_experts, reduction="none").to(device)
    logits = (60 * torch.rand(6, num_experts, 4, dtype=torch.float64) - 30).to(device).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, -100, 3], device=device)
    upstream = torch.randn(6, dtype=torch.float64, device=device)
    criterion(logits, target).backward(upstream)
    own = logits.detach().gather(2, target.clamp(min=0)[:, None, None].expand(-1, num_experts, 1))
    angles = (own.squeeze(2) / 30).acos()
    weights = reference.weights(angles.tolist(), target.tolist(), criterion.grouper.group_index.tolist())
    adjusted = (logits.detach() + criterion.adjuster.table).tolist()
    expected = [
        [
            [
                upstream[i].item() * weights[i][k] * g
                for g in reference.logit_gradient(adjusted[i][k], max(y, 0))
            ]
            for k in range(num_experts)
        ]
        for i, y in enumerate(target.tolist())
    ]
    close(logits.grad, expected)


def test_gradient_reaches_a_head_through_its_logits():
    """features and weight give the angles only; the logits carry the gradient to both."""
    features = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    criterion = LGLALoss(COUNTS, scale=None)
    logits = torch.einsum("nkd,kcd->nkc", features, weight)
    criterion(logits, TARGET, features=features, weight=weight).backward()
    fixed = logits.detach().requires_grad_()
    criterion(fixed, TARGET, features=features, weight=weight).backward()
    torch.testing.assert_close(features.grad, torch.einsum("nkc,kcd->nkd", fixed.grad, weight.detach()))
    torch.testing.assert_close(weight.grad, torch.einsum("nkc,nkd->kcd", fixed.grad, features.detach()))


@pytest.mark.parametrize("aaw", [True, False])
def test_gradients_of_a_row_sum_to_zero(aaw):
    """A shift of the logits changes no softmax."""
    logits = cosine_logits()
    LGLALoss(COUNTS, aaw=aaw)(logits, TARGET).backward()
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(5, 3, dtype=torch.float64))
