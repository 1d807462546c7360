"""How temperature and exponent are fitted and judged, beside plain float64 equations, sample by sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgla_losses import _fitting as fitting
from lgla_losses._fitting import (
    Labelled,
    Point,
    fitted_point,
    folds,
    judge,
    objective,
    sample_weights,
)


@st.composite
def labelled(draw, most_samples=12):
    """Draw a few samples of two classes or more, whose logits say something of the labels."""
    num_classes, num_samples = draw(st.integers(2, 6)), draw(st.integers(2, most_samples))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(num_classes, (num_samples,), generator=generator)
    logits = draw(st.floats(0.1, 8)) * normal(num_samples, num_classes)
    logits[range(num_samples), target] += draw(st.floats(0, 3))
    log_counts, implied, split = (2 * normal(num_classes) for _ in range(3))
    return Labelled(
        logits, target, sample_weights(split, target), implied, log_counts - log_counts.mean(), split
    )


POINTS = st.builds(Point, st.floats(0.05, 4), st.floats(-2, 2))


def likelihood_term(data, a, b):
    """The sum over samples of weight times -log of the posterior under the prior of the weighted samples."""
    square_roots = [math.exp(float(-data.split[y]) / 2) for y in data.target]
    weights = [w * sum(square_roots) / sum(v * v for v in square_roots) for w in square_roots]
    total = 0.0
    for v, y, weight in zip(data.logits, data.target, weights, strict=True):
        scores = a * (v.double() - data.implied) + b * data.log_counts + 0.5 * data.split
        total = total + weight * (scores.logsumexp(0) - scores[y])
    return total


def residuals(a, b):
    """How far a and b are from the usual, in standard deviations."""
    return torch.stack([(a / 0.75).log() / 0.5, (b - (a - 1) / 2) / 0.2])


def plain_objective(data, point):
    a, b = point[0], point[1]
    return likelihood_term(data, a, b) + residuals(a, b).square().sum() / 2


@given(labelled(), POINTS)
def test_value_gradient_and_hessian_are_those_of_the_equations(data, point):
    """That of the penalty is its own below the usual a; above, where it may be negative, Gauss-Newton's."""
    value, gradient, hessian = objective(data, point)
    at = torch.tensor(point, dtype=torch.float64)
    torch.testing.assert_close(value, float(plain_objective(data, at)), rtol=1e-10, atol=1e-10)
    expected = torch.autograd.functional.jacobian(lambda p: plain_objective(data, p), at)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    slopes = torch.autograd.functional.jacobian(lambda p: residuals(p[0], p[1]), at)
    expected = torch.autograd.functional.hessian(lambda p: likelihood_term(data, p[0], p[1]), at)
    expected += slopes.T @ slopes
    if point[0] < 0.75:
        of_penalty = torch.autograd.functional.hessian(lambda p: residuals(*p).square().sum() / 2, at)
        expected += of_penalty - slopes.T @ slopes
    torch.testing.assert_close(hessian, expected, rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(hessian).min() > 0


@given(labelled())
def test_no_point_nearby_or_on_a_grid_is_likelier(data):
    point = fitted_point(data)
    assert point is not None
    lowest = float(plain_objective(data, torch.tensor(point, dtype=torch.float64)))
    near = [Point(point.a * (1 + da), point.b + db) for da in (-0.02, 0, 0.02) for db in (-0.02, 0, 0.02)]
    grid = [Point(a, b) for a in (0.1, 0.3, 0.6, 1.0, 2.0) for b in (-1.0, -0.5, 0.0, 0.5)]
    for other in near + grid:
        assert float(plain_objective(data, torch.tensor(other, dtype=torch.float64))) >= lowest - 1e-6


@settings(max_examples=15)
@given(labelled(), st.randoms(use_true_random=False))
def test_neither_the_order_of_samples_nor_a_constant_of_each_nor_parts_count(data, random):
    point = fitted_point(data)
    order = list(range(len(data.target)))
    random.shuffle(order)
    constant = torch.linspace(-50, 50, len(order), dtype=torch.float64)[:, None]
    for same in (data.chosen(torch.tensor(order)), data._replace(logits=data.logits + constant)):
        assert fitted_point(same) == pytest.approx(point, rel=1e-6, abs=1e-6)
    whole = judge(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "PART", 2 * data.logits.shape[1] + 1)  # two samples
        assert len(list(data.parts())) == math.ceil(len(order) / 2)
        assert fitted_point(data) == pytest.approx(point, rel=1e-6, abs=1e-6)
        parts = judge(data)
    assert parts.likelihood == pytest.approx(whole.likelihood, rel=1e-6, abs=1e-6)
    assert parts.accuracy == pytest.approx(whole.accuracy)
    torch.testing.assert_close(parts.calibrated.sums.nll, whole.calibrated.sums.nll, rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=80))
def test_folds_have_equally_many_samples_of_every_class(labels):
    target = torch.tensor(labels)
    fold = folds(target)
    num_folds = min(5, len(labels))
    for chosen in (fold, *(fold[target == j] for j in target.unique())):
        sizes = chosen.bincount(minlength=num_folds)
        assert len(sizes) == num_folds
        assert sizes.max() - sizes.min() <= 1


def test_folds_do_not_follow_the_order_of_the_samples():
    """Neighbours are often alike, as frames of a film are."""
    fold = folds(torch.zeros(500, dtype=torch.int64))
    assert len({tuple(fold[i : i + 5].tolist()) for i in range(0, 500, 5)}) > 50


@settings(max_examples=12)
@given(labelled(most_samples=30))
def test_what_is_judged_is_predicted_without_its_own_label(data):
    """By hand: each fold by fits to the other folds; balanced accuracy under the uniform prior."""
    judged, fold = judge(data), folds(data.target)
    gains, rights = [], []
    for i, y in enumerate(data.target):
        others = fold != fold[i]
        a, b = fitted_point(data.chosen(others))
        alone, shift = fitted_point(data.ranked().chosen(others))
        scores = a * (data.logits[i] - data.implied) + b * data.log_counts
        calibrated = (scores + data.split / 2).log_softmax(0)[y]
        gains.append(float(calibrated - (alone * data.logits[i] + data.split / 2).log_softmax(0)[y]))
        assert shift == pytest.approx((alone - 1) / 2, abs=1e-3)  # it multiplies zeros, so the usual one
        rights.append(int(scores.argmax() == y) - int(data.logits[i].argmax() == y))

    weight, classes = data.weight.tolist(), data.target.unique()
    expected = sum(w * g for w, g in zip(weight, gains, strict=True)) / sum(weight)
    assert judged.converged
    assert judged.likelihood[0] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    by_class = [[right for right, y in zip(rights, data.target, strict=True) if y == j] for j in classes]
    accuracy = sum(sum(r) / len(r) for r in by_class) / len(classes)
    assert judged.accuracy[0] == pytest.approx(accuracy)

    squares = [(w / sum(weight) * (g - expected)) ** 2 for w, g in zip(weight, gains, strict=True)]
    assert judged.likelihood[1] == pytest.approx(math.sqrt(sum(squares)), rel=1e-4, abs=1e-9)
    shares = [1 / (len(classes) * int((data.target == y).sum())) for y in data.target]
    mean = sum(rights) / len(rights)
    pooled = math.sqrt(sum((r - mean) ** 2 for r in rights) / len(rights) * sum(s * s for s in shares))
    own = math.sqrt(sum((s * (r - accuracy)) ** 2 for r, s in zip(rights, shares, strict=True)))
    assert judged.accuracy[1] == pytest.approx(max(pooled, own), abs=1e-12)


@pytest.mark.parametrize("failing", range(4))
def test_one_fold_that_does_not_converge_is_seen(monkeypatch, failing):
    """Two samples are two folds, of two fits each."""
    zeros = torch.zeros(2, dtype=torch.float64)
    data = Labelled(torch.eye(2), torch.arange(2), zeros + 1, zeros, zeros, zeros)
    assert judge(data).converged
    points = [Point(1.0, 0.0)] * 4
    points[failing] = None
    monkeypatch.setattr(fitting, "fitted_point", lambda *_: points.pop(0))
    assert not judge(data).converged


def long_tail(num_samples, seed):
    """Logits of balanced softmax that are twice too sure, and labels of a long tail."""
    generator = torch.Generator().manual_seed(seed)
    log_counts = torch.linspace(1.5, -1.5, 5, dtype=torch.float64)
    split = log_counts.log_softmax(0)
    target = torch.multinomial(split.exp(), num_samples, replacement=True, generator=generator)
    noise = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    logits = 4 * (torch.eye(5)[target] + noise / 2 + 0.2 * log_counts)
    return Labelled(logits, target, sample_weights(split, target), torch.zeros_like(split), log_counts, split)


def test_errors_are_those_of_weighted_means_and_shrink_with_the_samples():
    once, four = (judge(long_tail(m, seed=3)) for m in (200, 800))
    for errors in ((once.likelihood[1], four.likelihood[1]), (once.accuracy[1], four.accuracy[1])):
        assert 1.3 < errors[0] / errors[1] < 3, errors


def test_where_newton_begins_does_not_matter():
    data = long_tail(200, seed=4)
    expected = judge(data)
    for start in (Point(0.2, 0.3), Point(2.0, -1.0)):
        assert fitted_point(data, start) == pytest.approx(fitted_point(data), abs=1e-4)
        found = judge(data, start, start)
        assert found.likelihood == pytest.approx(expected.likelihood, abs=1e-5)
        assert found.accuracy == pytest.approx(expected.accuracy)
