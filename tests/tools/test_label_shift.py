"""The prior of a test set without labels."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lgla_losses import LGLALoss
from lgla_losses.label_shift import estimate_prior, shift_prior

COUNTS = torch.tensor([400.0, 90.0, 30.0, 10.0], dtype=torch.float64)
SHIFTED = torch.tensor([0.1, 0.15, 0.25, 0.5], dtype=torch.float64)
CENTRES = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]], dtype=torch.float64)


def sample(prior, num_samples):
    """Samples of Gaussian classes: the exact log p(x|j) ``[N, C]``, up to a constant, and the labels."""
    target = torch.multinomial(prior, num_samples, replacement=True)
    x = CENTRES[target] + torch.randn(num_samples, 2, dtype=torch.float64)
    return -0.5 * torch.cdist(x, CENTRES).square(), target


def log_likelihood(likelihood, p):
    """Mean over the samples of log p(x) under the prior ``p``, up to a constant."""
    return torch.logsumexp(likelihood + torch.as_tensor(p).log(), dim=1).mean().item()


def test_a_known_shift_is_found():
    likelihood, target = sample(SHIFTED, 20_000)
    prior = COUNTS / COUNTS.sum()
    found = estimate_prior(likelihood + prior.log(), prior)
    assert found.dtype == torch.float64
    assert found.sum().item() == pytest.approx(1.0, abs=1e-12)
    drawn = target.bincount(minlength=4) / len(target)
    torch.testing.assert_close(found, drawn.double(), rtol=0, atol=0.02)


def test_without_a_shift_the_prior_stays():
    prior = COUNTS / COUNTS.sum()
    likelihood, _ = sample(prior, 20_000)
    torch.testing.assert_close(estimate_prior(likelihood + prior.log(), prior), prior, rtol=0, atol=0.02)


def test_an_lgla_ensemble_gives_its_own_prior():
    """Exact experts: each learnt log p(x|j) + log n_j - T(k, j)."""
    adjuster = LGLALoss(COUNTS, num_experts=3, tau=1.0).adjuster
    likelihood, target = sample(SHIFTED, 20_000)
    experts = likelihood[:, None] + COUNTS.log() - adjuster.table
    logits, prior = experts.mean(dim=1), adjuster.implied_prior()
    found = estimate_prior(logits, prior)
    torch.testing.assert_close(found, SHIFTED, rtol=0, atol=0.02)
    torch.testing.assert_close(found, estimate_prior(likelihood, torch.ones(4)), rtol=0, atol=1e-4)
    before, after = (
        (v.argmax(1) == target).double().mean() for v in (logits, shift_prior(logits, prior, found))
    )
    assert after > before + 0.02


def test_the_likelihood_never_falls():
    likelihood, _ = sample(SHIFTED, 300)
    logits = likelihood + COUNTS.log()
    steps = [estimate_prior(logits, COUNTS, max_steps=n, tolerance=0) for n in range(1, 40)]
    values = [log_likelihood(likelihood, p) for p in (COUNTS / COUNTS.sum(), *steps)]
    assert all(after >= before - 1e-12 for before, after in pairwise(values))
    assert values[-1] > values[0]


def test_a_step_is_the_mean_posterior():
    likelihood, _ = sample(SHIFTED, 50)
    logits, p = likelihood + COUNTS.log(), COUNTS
    for n in range(1, 6):
        p = torch.softmax(logits + p.log() - COUNTS.log(), dim=1).mean(dim=0)
        found = estimate_prior(logits, COUNTS, max_steps=n, tolerance=0)
        torch.testing.assert_close(found, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_fixed_point_is_the_maximum(smoothing):
    """Against all priors of three classes on a fine grid, then a finer one around the best."""
    likelihood, _ = sample(SHIFTED, 200)
    likelihood = likelihood[:, :3]
    found = estimate_prior(likelihood, torch.ones(3), smoothing=smoothing, max_steps=20_000, tolerance=1e-12)
    centre, width = np.array([0.5, 0.5]), 0.5
    for _ in range(8):
        first, second = (np.linspace(c - width, c + width, 41) for c in centre)
        grid = np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2)
        grid = grid[(grid > 0).all(axis=1) & (grid.sum(axis=1) < 1)]
        priors = torch.from_numpy(np.c_[grid, 1 - grid.sum(axis=1)])
        values = (likelihood.exp() @ priors.T).log().mean(dim=0) + smoothing * priors.log().mean(dim=1)
        centre, width = grid[int(values.argmax())], width / 5
    best = np.array([*centre, 1 - centre.sum()])
    assert found.numpy() == pytest.approx(best, abs=1e-4)
    if not smoothing:
        assert log_likelihood(likelihood, found) >= log_likelihood(likelihood, best) - 1e-12


def test_smoothing_holds_the_estimate_back():
    """From the likelihood's prior to the uniform one."""
    likelihood, _ = sample(SHIFTED, 500)
    estimates = [estimate_prior(likelihood, [1] * 4, smoothing=s) for s in (0.0, 0.3, 3.0, 1e9)]
    away = [(estimate - 0.25).abs().sum().item() for estimate in estimates]
    assert away == sorted(away, reverse=True)
    assert away[0] > 0.2
    assert away[-1] < 1e-6


@given(
    st.integers(1, 6).flatmap(
        lambda c: st.tuples(
            st.lists(st.lists(st.floats(-500, 500), min_size=c, max_size=c), min_size=1, max_size=6),
            st.lists(st.floats(1e-100, 1e100), min_size=c, max_size=c),
        )
    )
)
def test_it_is_a_prior_whatever_the_logits(case):
    logits, prior = case
    found = estimate_prior(torch.tensor(logits, dtype=torch.float64), prior, max_steps=50)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert found.sum().item() == pytest.approx(1.0, abs=1e-9)


def test_half_precision_and_gradients(device):
    logits = torch.randn(20, 4, dtype=torch.float16, device=device, requires_grad=True)
    found = estimate_prior(logits, COUNTS)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found, estimate_prior(logits.double(), COUNTS.tolist()))
    shifted = shift_prior(logits, COUNTS, found)
    assert shifted.dtype == torch.float16
    shifted.sum().backward()
    assert (logits.grad == 1).all()


def test_shift_prior(close):
    logits = torch.randn(5, 4)
    new = torch.tensor([1.0, 0.0, 2.0, 1.0])
    shifted = shift_prior(logits, COUNTS, new)
    posterior = torch.softmax(logits.double(), dim=1) / (COUNTS / COUNTS.sum()) * new
    close(torch.softmax(shifted, dim=1), posterior / posterior.sum(dim=1, keepdim=True))
    assert (shifted[:, 1] == -torch.inf).all()
    close(shift_prior(shift_prior(logits, COUNTS, SHIFTED), SHIFTED, COUNTS), logits)
    assert torch.equal(shift_prior(shifted, new + 1, new)[:, 1], shifted[:, 1])


def test_empty_batches_are_shifted():
    assert shift_prior(torch.zeros(0, 4), COUNTS, SHIFTED).shape == (0, 4)


ROW = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("error", "message", "logits", "prior"),
    [
        (TypeError, "logits: expected a floating-point tensor", ROW.long(), [1, 1]),
        (ValueError, r"logits: expected shape \[N, C\], got \[2\]", ROW[0], [1, 1]),
        (ValueError, r"logits: expected \[N, C\] with a class or more, got \[1, 0\]", ROW[:, :0], []),
        (ValueError, "logits: expected finite values, .*got NaN or infinity", ROW.log().neg(), [1, 1]),
        (ValueError, "logits: expected finite values, .*got NaN or infinity", ROW / 0, [1, 1]),
        (ValueError, r"prior: expected one .* of 2 classes, .* got \[3\]", ROW, [1, 1, 1]),
        (ValueError, r"prior: expected finite, positive values, got \[1.0, 0.0\]", ROW, [1, 0]),
        (ValueError, "prior: expected finite, positive values", ROW, [1, torch.inf]),
        (TypeError, "prior: expected 2 real numbers, got <U1", ROW, ["a", "b"]),
        (TypeError, "prior: expected 2 real numbers, got bool", ROW, torch.tensor([True, True])),
    ],
)
def test_bad_logits_and_priors(error, message, logits, prior):
    with pytest.raises(error, match=message):
        estimate_prior(logits, prior)
    with pytest.raises(error, match=message):
        shift_prior(logits, prior, [1, 1])


@pytest.mark.parametrize("new_prior", [[0, 0], [-1, 2], [torch.nan, 1]])
def test_bad_new_priors(new_prior):
    with pytest.raises(
        ValueError, match="new_prior: expected finite, non-negative values, not all zero, got"
    ):
        shift_prior(ROW, [1, 1], new_prior)


def test_bad_options():
    with pytest.raises(ValueError, match="logits: expected at least one sample"):
        estimate_prior(ROW[:0], [1, 1])
    with pytest.raises(ValueError, match="finite values, got NaN or infinity; leave masked classes out"):
        estimate_prior(ROW.log(), [1, 1])
    with pytest.raises(ValueError, match="max_steps: expected an integer >= 1, got 0"):
        estimate_prior(ROW, [1, 1], max_steps=0)
    with pytest.raises(ValueError, match="smoothing: expected a finite number >= 0, got -1"):
        estimate_prior(ROW, [1, 1], smoothing=-1)
    with pytest.raises(ValueError, match="tolerance: expected a finite number >= 0, got -1"):
        estimate_prior(ROW, [1, 1], tolerance=-1)
