"""The prior of a test set without labels."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prior_shift import gains

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
    found = estimate_prior(likelihood + prior.log(), prior, smoothing=0.0)
    assert found.dtype == torch.float64
    assert found.sum().item() == pytest.approx(1.0, abs=1e-12)
    drawn = target.bincount(minlength=4) / len(target)
    torch.testing.assert_close(found, drawn.double(), rtol=0, atol=0.02)


def test_without_a_shift_the_prior_stays():
    prior = COUNTS / COUNTS.sum()
    likelihood, _ = sample(prior, 20_000)
    found = estimate_prior(likelihood + prior.log(), prior, smoothing=0.0)
    torch.testing.assert_close(found, prior, rtol=0, atol=0.02)


def test_an_lgla_ensemble_gives_its_own_prior():
    """Exact experts: each learnt log p(x|j) + log n_j - T(k, j)."""
    adjuster = LGLALoss(COUNTS, num_experts=3, tau=1.0).adjuster
    likelihood, target = sample(SHIFTED, 20_000)
    experts = likelihood[:, None] + COUNTS.log() - adjuster.table
    logits, prior = experts.mean(dim=1), adjuster.implied_prior()
    found = estimate_prior(logits, prior, smoothing=0.0)
    torch.testing.assert_close(found, SHIFTED, rtol=0, atol=0.02)
    alone = estimate_prior(likelihood, torch.ones(4), smoothing=0.0)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
    before, after = (
        (v.argmax(1) == target).double().mean() for v in (logits, shift_prior(logits, prior, found))
    )
    assert after > before + 0.02


def test_the_likelihood_never_falls():
    likelihood, _ = sample(SHIFTED, 300)
    logits = likelihood + COUNTS.log()
    steps = [estimate_prior(logits, COUNTS, smoothing=0.0, max_steps=n, tolerance=0) for n in range(1, 40)]
    values = [log_likelihood(likelihood, p) for p in (COUNTS / COUNTS.sum(), *steps)]
    assert all(after >= before - 1e-12 for before, after in pairwise(values))
    assert values[-1] > values[0]


def test_a_step_is_the_mean_posterior():
    likelihood, _ = sample(SHIFTED, 50)
    logits, p = likelihood + COUNTS.log(), COUNTS
    for n in range(1, 6):
        p = torch.softmax(logits + p.log() - COUNTS.log(), dim=1).mean(dim=0)
        found = estimate_prior(logits, COUNTS, smoothing=0.0, max_steps=n, tolerance=0)
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


def network(num_classes, num_features, spread, seed=0, largest=200, imbalance=50):
    """Logits of nearest centres, learnt from few samples: of 200 test samples a class, and for validation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows):
        return torch.randn(rows, num_features, generator=generator, dtype=torch.float64)

    centres = spread * normal(num_classes)
    counts = (largest * imbalance ** -torch.linspace(0, 1, num_classes)).long()
    learnt = torch.stack(
        [centre + normal(n).mean(dim=0) for centre, n in zip(centres, counts.tolist(), strict=True)]
    )

    def draw(class_counts):
        target = torch.arange(num_classes).repeat_interleave(class_counts)
        return -0.5 * torch.cdist(centres[target] + normal(len(target)), learnt).square(), target

    return counts, draw(torch.full_like(counts, 200)), draw((counts // 4).clamp(min=1))


WEAK = {"six classes": (6, 3, 1.0), "twenty classes": (20, 40, 0.3), "fifty classes": (50, 40, 0.5)}


def gained(logits, target, counts, **options):
    prior = torch.ones(len(counts)) / len(counts)
    return gains(
        logits,
        target,
        prior,
        counts,
        lambda sample, held: estimate_prior(sample, held, **options),
        sizes=(300, 3000),
    )


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", WEAK)
def test_the_default_does_not_lose(name, labelled):
    """Expectation maximisation believes the errors of such networks."""
    counts, test, validation = network(*WEAK[name])
    by_default = gained(*test, counts, **({"validation": validation} if labelled else {}))
    maximised = gained(*test, counts, smoothing=0.0)
    assert min(gain for gain, _ in maximised.values()) < -1.5
    assert min(gain for gain, _ in by_default.values()) > -1.0
    assert by_default["mean"][0] > max(0.5, maximised["mean"][0])


def test_large_shifts_are_kept():
    counts, test, validation = network(10, 20, 0.5)
    for options in ({}, {"validation": validation}):
        row = gained(*test, counts, **options)
        for name in ("head first, IF 50", "Dirichlet(0.3)"):
            gain, most = row[name]
            assert gain > 0.4 * most > 1.0, (name, row)


@given(st.integers(0, 10_000))
def test_no_shift_gives_the_uniform_prior(seed):
    torch.manual_seed(seed)
    likelihood, _ = sample(torch.full((4,), 0.25, dtype=torch.float64), 400)
    torch.testing.assert_close(
        estimate_prior(likelihood + COUNTS.log(), COUNTS), torch.full((4,), 0.25, dtype=torch.float64)
    )


def test_few_samples_give_the_uniform_prior():
    """Five certain samples of ten classes are no evidence of what the other classes are."""
    likelihood = 50 * torch.eye(10, dtype=torch.float64)[:5]
    uniform = torch.full((10,), 0.1, dtype=torch.float64)
    torch.testing.assert_close(estimate_prior(likelihood, uniform), uniform)
    assert estimate_prior(likelihood.repeat(100, 1), uniform)[:5].sum() > 0.9


def in_plain_loops(likelihood, validation=None):
    """The default in float64 numbers: mean posterior, rates, and the power that holds it back."""
    posterior = likelihood.softmax(dim=1).tolist()
    n, classes = len(posterior), range(len(posterior[0]))
    p = q = [sum(row[j] for row in posterior) / n for j in classes]
    if validation is not None:
        known, labels = validation[0].softmax(dim=1).tolist(), validation[1].tolist()
        rates = []
        for j in classes:
            rate = [5 * sum(row[j] * row[c] for row in posterior) / (n * q[j]) for c in classes]
            for row, label in zip(known, labels, strict=True):
                if label == j:
                    rate = [a + b for a, b in zip(rate, row, strict=True)]
            rates.append([r / sum(rate) for r in rate])
        p = [1 / len(q)] * len(q)
        for _ in range(3000):
            mixed = [sum(p[j] * rates[j][c] for j in classes) for c in classes]
            p = [p[j] * sum(q[c] * rates[j][c] / mixed[c] for c in classes) + 0.05 / len(q) for j in classes]
            p = [value / sum(p) for value in p]
    distance = 2 * sum(value * math.log(value * len(q)) for value in p)
    chance = (len(q) * sum(value**2 for row in posterior for value in row) / n - 1) / n
    powers = [value ** max(0, 1 - (0.05 + chance) / max(distance, 0.05)) for value in p]
    return torch.tensor([value / sum(powers) for value in powers], dtype=torch.float64)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_default_in_plain_loops(labelled):
    likelihood, _ = sample(SHIFTED, 60)
    known, target = sample(COUNTS / COUNTS.sum(), 40)
    validation = (known, target) if labelled else None
    held = None if validation is None else (known + COUNTS.log(), target)
    found = estimate_prior(likelihood + COUNTS.log(), COUNTS, validation=held, max_steps=3000, tolerance=0.0)
    expected = in_plain_loops(likelihood, validation)
    assert (expected - 0.25).abs().max() > 0.03
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_labelled_samples_show_the_errors_of_the_logits():
    """Far too confident logits that lean to the first classes mislead all but the rates."""
    lean = torch.tensor([3.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    likelihood, target = sample(SHIFTED, 20_000)
    known = sample(COUNTS / COUNTS.sum(), 20_000)
    wrong = 4 * likelihood + lean
    options = {"validation": (4 * known[0] + lean, known[1]), "smoothing": 0.0}
    drawn = target.bincount(minlength=4).double() / len(target)
    uniform = torch.full((4,), 0.25)
    away = [
        (estimate_prior(wrong, uniform, **o) - drawn).abs().sum() / 2 for o in ({"smoothing": 0.0}, options)
    ]
    assert away[0] > 0.1 > 0.03 > away[1], away


@pytest.mark.parametrize("labelled_classes", [0, 1, 2])
def test_classes_without_labelled_samples(labelled_classes):
    """What the network believes stands in for them."""
    likelihood, _ = sample(SHIFTED, 2000)
    known, target = sample(COUNTS / COUNTS.sum(), 2000)
    few = target <= labelled_classes
    found = estimate_prior(likelihood, torch.ones(4), validation=(known[few], target[few]))
    assert (found - SHIFTED).abs().sum() < 0.9 * (SHIFTED - 0.25).abs().sum()
    assert torch.equal(found.argsort(), SHIFTED.argsort())


def test_the_order_of_classes_does_not_matter():
    likelihood, _ = sample(SHIFTED, 300)
    known, target = sample(COUNTS / COUNTS.sum(), 100)
    order = torch.tensor([2, 0, 3, 1])
    found = estimate_prior(likelihood, COUNTS, validation=(known, target))
    permuted = estimate_prior(
        likelihood[:, order], COUNTS[order], validation=(known[:, order], order.argsort()[target])
    )
    torch.testing.assert_close(permuted, found[order])


@given(
    st.integers(1, 6).flatmap(
        lambda c: st.tuples(
            st.lists(st.lists(st.floats(-500, 500), min_size=c, max_size=c), min_size=1, max_size=6),
            st.lists(st.floats(1e-100, 1e100), min_size=c, max_size=c),
            st.sampled_from(["default", "maximised", "labelled", "labelled and maximised"]),
        )
    )
)
def test_it_is_a_prior_whatever_the_logits(case):
    rows, prior, way = case
    logits = torch.tensor(rows, dtype=torch.float64)
    labelled = {"validation": (logits.flip(0), torch.arange(len(logits)) % len(prior))}
    options = (labelled if "labelled" in way else {}) | ({"smoothing": 0.0} if "maximised" in way else {})
    found = estimate_prior(logits, prior, max_steps=50, **options)
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
        (ValueError, r"logits: expected \[N, C\] with at least one class, got \[1, 0\]", ROW[:, :0], []),
        (ValueError, "logits: expected finite values, .*got NaN or infinity", ROW.log().neg(), [1, 1]),
        (ValueError, "logits: expected finite values, .*got NaN or infinity", ROW / 0, [1, 1]),
        (ValueError, r"prior: expected one .* per class, shape \[2\], got \[3\]", ROW, [1, 1, 1]),
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


@pytest.mark.parametrize(
    ("error", "message", "validation"),
    [
        (TypeError, r"validation: expected \(logits, target\) of labelled samples, got", ROW),
        (TypeError, r"validation: expected \(logits, target\)", (ROW,)),
        (TypeError, "validation logits: expected a floating-point tensor", (ROW.long(), torch.tensor([0]))),
        (ValueError, r"validation logits: expected the 2 classes .*got \[1, 3\]", (torch.zeros(1, 3), ROW)),
        (
            ValueError,
            "validation logits: expected at least one",
            (ROW[:0], torch.zeros(0, dtype=torch.int64)),
        ),
        (ValueError, "validation logits: expected finite", (ROW.log(), torch.tensor([0]))),
        (ValueError, r"target: expected shape \[1\]", (ROW, torch.tensor([0, 1]))),
        (TypeError, "target: expected an int64 tensor", (ROW, [0])),
        (ValueError, "target: .*2", (ROW, torch.tensor([2]))),
        (ValueError, "target: .*-100", (ROW, torch.tensor([-100]))),
    ],
)
def test_bad_validation(error, message, validation):
    with pytest.raises(error, match=message):
        estimate_prior(ROW, [1, 1], validation=validation)
