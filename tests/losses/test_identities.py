"""Special cases that must equal known functions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lgla_losses import CLALogitAdjuster, ClassGrouper, LGLALoss
from lgla_losses.baselines import BalancedSoftmaxLoss

LOGITS = st.integers(0, 10**6).map(
    lambda seed: (
        60 * torch.rand(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 30
    )
)
COUNTS = st.lists(st.integers(1, 10**5), min_size=4, max_size=4)
TARGET = torch.tensor([0, 1, 2, 3, 3])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def log_prior(counts):
    return torch.tensor(counts, dtype=torch.float64).log()


@given(LOGITS, st.integers(1, 1000), st.sampled_from(["lgla", "softmax", "balanced", "logit"]))
def test_equal_counts_without_aaw_are_k_times_cross_entropy(logits, count, adjustment):
    loss = LGLALoss([count] * 4, aaw=False, adjustment=adjustment)(logits, TARGET)
    expected = sum(F.cross_entropy(logits[:, k], TARGET) for k in range(3))
    torch.testing.assert_close(loss, expected, **CLOSE)


@given(LOGITS, COUNTS, st.floats(0, 4))
def test_two_experts_are_balanced_softmax_plus_gla(logits, counts, tau):
    """With one group the local expert's margins are those of Ren et al., 2020."""
    loss = LGLALoss(counts, 2, tau, aaw=False)(logits[:, :2], TARGET)
    balanced = F.cross_entropy(logits[:, 0] + log_prior(counts), TARGET)
    gla = F.cross_entropy(logits[:, 1] + tau * log_prior(counts), TARGET)
    torch.testing.assert_close(loss, balanced + gla, **CLOSE)


@given(LOGITS, COUNTS)
def test_two_experts_at_tau_one_are_two_of_balanced_softmax(logits, counts):
    """In loss and gradients, and in what their mean is said to hold."""
    logits = logits[:, :2].requires_grad_()
    criterion = LGLALoss(counts, 2, 1.0, aaw=False)
    balanced = BalancedSoftmaxLoss(counts)
    loss, expected = criterion(logits, TARGET), sum(balanced(v, TARGET) for v in logits.unbind(1))
    torch.testing.assert_close(loss, expected, **CLOSE)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, **CLOSE)
    torch.testing.assert_close(
        criterion.adjuster.implied_prior(), torch.full((4,), 0.25, dtype=torch.float64), **CLOSE
    )


@given(LOGITS, COUNTS)
def test_tau_zero_makes_the_global_expert_plain_softmax(logits, counts):
    criterion = LGLALoss(counts, 3, 0.0, aaw=False)
    local = sum(F.cross_entropy(logits[:, k] + criterion.adjuster.table[k], TARGET) for k in range(2))
    plain = F.cross_entropy(logits[:, 2], TARGET)
    torch.testing.assert_close(criterion(logits, TARGET), local + plain, **CLOSE)


@given(LOGITS, COUNTS, st.lists(st.floats(-9, 9), min_size=3, max_size=3))
def test_shifting_the_table_changes_nothing(logits, counts, shift):
    table = CLALogitAdjuster(ClassGrouper(counts, 2)).table
    shifted = table + torch.tensor(shift, dtype=torch.float64)[:, None]
    losses = [LGLALoss(counts, adjustment=t)(logits, TARGET) for t in (table, shifted)]
    torch.testing.assert_close(losses[0], losses[1], **CLOSE)
    torch.testing.assert_close(losses[0], LGLALoss(counts)(logits, TARGET), **CLOSE)


@given(LOGITS, COUNTS, st.integers(1, 3))
def test_balanced_is_balanced_softmax_for_one_expert_or_more(logits, counts, num_experts):
    logits = logits[:, :num_experts]
    loss = LGLALoss(counts, num_experts, adjustment="balanced", aaw=False)(logits, TARGET)
    expected = sum(F.cross_entropy(logits[:, k] + log_prior(counts), TARGET) for k in range(num_experts))
    torch.testing.assert_close(loss, expected, **CLOSE)


@given(LOGITS, COUNTS, st.floats(0, 3))
def test_logit_is_logit_adjustment(logits, counts, tau):
    """Menon et al., 2021; tau = 1 is the default."""
    loss = LGLALoss(counts, 1, tau, adjustment="logit", aaw=False)(logits[:, :1], TARGET)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 0] + tau * log_prior(counts), TARGET), **CLOSE)
    default = LGLALoss(counts, 1, adjustment="logit", aaw=False)
    balanced = LGLALoss(counts, 1, adjustment="balanced", aaw=False)
    assert torch.equal(default.adjuster.table, balanced.adjuster.table)


@given(LOGITS, COUNTS)
def test_softmax_is_cross_entropy(logits, counts):
    loss = LGLALoss(counts, 1, adjustment="softmax", aaw=False)(logits[:, :1], TARGET)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 0], TARGET), **CLOSE)


def test_aaw_goes_with_every_adjustment():
    """BALMS + AAW is the fourth row of the paper's Table 5."""
    logits = 30 * torch.rand(12, 3, 4, dtype=torch.float64)
    target = torch.arange(12) % 4
    for adjustment in ("softmax", "balanced", "logit", "lgla"):
        criterion = LGLALoss([9, 5, 2, 1], adjustment=adjustment, reduction="none")
        plain = LGLALoss([9, 5, 2, 1], adjustment=adjustment, reduction="none", aaw=False)
        angles = (logits.gather(2, target[:, None, None].expand(12, 3, 1)).squeeze(2) / 30).acos()
        weights = criterion.weighter(angles, target)
        per_expert = torch.stack(
            [
                F.cross_entropy(logits[:, k] + plain.adjuster.table[k], target, reduction="none")
                for k in range(3)
            ],
            dim=1,
        )
        torch.testing.assert_close(criterion(logits, target), (weights * per_expert).sum(1), **CLOSE)
        assert (criterion(logits, target) > plain(logits, target)).any()


@pytest.mark.parametrize("num_experts", range(2, 8))
def test_an_expert_that_learns_the_true_posterior_makes_a_balanced_ensemble(num_experts):
    """The derivation of the implied prior, on a distribution whose posterior is known.

    Each expert's optimum is log p(x|j) + log n_j - T(k, j); their mean at tau = K - 1 must rank the
    classes by likelihood alone.
    """
    counts = [64, 32, 16, 8, 4, 2]
    likelihood = torch.rand(50, 6, dtype=torch.float64).log()
    criterion = LGLALoss(counts, num_experts, num_experts - 1, aaw=False)
    optimum = likelihood[:, None] + log_prior(counts) - criterion.adjuster.table
    fused = optimum.mean(1)
    assert torch.equal(fused.argmax(1), likelihood.argmax(1))
    # It is an optimum: with the posterior as soft target the gradient of every expert vanishes.
    logits = optimum.clone().requires_grad_()
    adjusted = logits + criterion.adjuster.table
    posterior = (likelihood + log_prior(counts)).softmax(1)
    sum(F.cross_entropy(adjusted[:, k], posterior) for k in range(num_experts)).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), **CLOSE)
