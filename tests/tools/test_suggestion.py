"""The suggested tau, and the default of the losses, which is the same rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lgla_losses import CLALogitAdjuster, ClassGrouper, LGLALoss, LinearLGLALoss, create_loss, suggest
from lgla_losses.distributed import ClassParallelLGLALoss

COUNTS = [64, 32, 16, 8, 4, 2]
EXPERTS = st.integers(2, 7)


@given(EXPERTS)
def test_what_is_known_decides(k):
    usual, uniform, long = 1.25 * (k - 1), k - 1, pytest.approx(1.6 * k - 1)
    for known, tau in (
        ({}, usual),
        ({"training": "long"}, long),
        ({"training": "underfit"}, uniform),
        ({"label_smoothing": 0.1}, uniform),
        ({"label_smoothing": 0.1, "training": "long"}, uniform),
        ({"classifier": "linear"}, uniform),
        ({"classifier": "linear", "training": "long"}, uniform),
        ({"classifier": "linear", "temperature": 1.8}, uniform),
    ):
        assert suggest(k, **known).tau == tau, known


@given(EXPERTS, st.floats(0.1, 9), st.floats(0, 1), st.sampled_from(["underfit", "usual", "long"]))
def test_a_measured_temperature_goes_before_all_but_linear_heads_and_is_bounded(k, temperature, e, training):
    found = suggest(k, temperature=temperature, label_smoothing=e, training=training)
    assert found.tau == pytest.approx(k * min(max(temperature, 1), 2) - 1)
    assert k - 1 <= found.tau <= 2 * k - 1
    assert ("taken as" in found.reason) == (not 1 <= temperature <= 2)


@given(EXPERTS, st.floats(1, 2))
def test_the_suggested_tau_makes_overconfident_experts_a_uniform_ensemble(k, temperature):
    """Each of them learns v + T = temperature (log p(x|j) + log n_j): the likelihood alone must be left."""
    likelihood = torch.rand(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).log()
    criterion = LGLALoss(COUNTS, k, suggest(k, temperature=temperature).tau)
    log_n = torch.tensor(COUNTS, dtype=torch.float64).log()
    experts = temperature * (likelihood + log_n)[:, None] - criterion.adjuster.table
    ensemble = (experts.mean(dim=1) / temperature).log_softmax(dim=1)
    torch.testing.assert_close(ensemble, likelihood.log_softmax(dim=1), rtol=0, atol=1e-10)


@given(EXPERTS, st.floats(0.5, 2.5))
def test_the_reason_says_the_number_and_two_experts_balanced_softmax(k, temperature):
    for known in ({}, {"temperature": temperature}, {"label_smoothing": 0.1}):
        found = suggest(k, **known)
        assert found.num_experts == k
        assert found.reason.startswith("tau = ")
        assert f"= {found.tau:.4g}, " in found.reason
        assert ("balanced softmax" in found.reason) == (k == 2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [None, 30.0])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_default_of_the_losses_is_the_suggestion_for_their_heads_and_smoothing(k, scale, label_smoothing):
    options = {"scale": scale, "label_smoothing": label_smoothing}
    classifier = "linear" if scale is None else "cosine"
    tau = suggest(k, classifier=classifier, label_smoothing=label_smoothing).tau
    assert tau == (1.25 * (k - 1) if scale and not label_smoothing else k - 1)

    expected = CLALogitAdjuster(ClassGrouper(COUNTS, k - 1), tau=tau).table
    for kind in (LGLALoss, LinearLGLALoss):
        criterion = kind(COUNTS, k, **options)
        assert float(criterion.adjuster.tau) == tau
        assert torch.equal(criterion.adjuster.table, expected)
    parallel = ClassParallelLGLALoss(COUNTS, k, **options)
    assert torch.equal(parallel.table, expected)
    parallel.set_adjustment(COUNTS[::-1])  # the tau stays
    assert torch.equal(parallel.table, CLALogitAdjuster(ClassGrouper(COUNTS[::-1], k - 1), tau=tau).table)
    assert float(create_loss("cla", COUNTS, num_experts=k, **options).adjuster.tau) == tau


def test_a_given_tau_stays_as_it_is():
    for options in ({}, {"label_smoothing": 0.1}, {"scale": None}):
        assert float(LGLALoss(COUNTS, tau=3.3, **options).adjuster.tau) == 3.3


def test_other_adjustments_keep_their_default():
    options = {"label_smoothing": 0.1, "aaw": False, "scale": None}
    assert float(LGLALoss(COUNTS, adjustment="logit", **options).adjuster.tau) == 1.0
    assert LGLALoss(COUNTS, adjustment="balanced", **options).adjuster.tau is None
    assert LGLALoss(COUNTS, adjustment=torch.zeros(3, 6), **options).adjuster.tau is None


def test_a_loaded_state_brings_the_tau_that_it_was_trained_with():
    """A loss with label smoothing had 1.25 (K - 1) in version 0.1.0."""
    before = LGLALoss(COUNTS, tau=2.5, label_smoothing=0.1)
    now = LGLALoss(COUNTS, label_smoothing=0.1)
    assert float(now.adjuster.tau) == 2.0
    now.load_state_dict(before.state_dict())
    assert float(now.adjuster.tau) == 2.5
    assert torch.equal(now.adjuster.table, before.adjuster.table)
