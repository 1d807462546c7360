"""The pictures of calibration hold what the metrics compute; style and layout are in test_plot.py."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba

from lgla_losses import ExpertOutput, plot
from lgla_losses.calibration import fit
from lgla_losses.metrics import ProbabilityScores, ShotAccuracy
from lgla_losses.plot.style import METHODS, REFERENCE

COUNTS = [900, 300, 90, 40, 8]
AVERAGES = ["samples", "classes"]


def samples(num_samples=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(5, (num_samples,), generator=generator)
    logits = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    logits += 2 * torch.nn.functional.one_hot(target, 5) + torch.tensor(COUNTS).log()
    return logits, target


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


@given(
    num_samples=st.integers(1, 60),
    bins=st.integers(1, 20),
    average=st.sampled_from(AVERAGES),
    seed=st.integers(0, 99),
)
def test_points_and_shares_of_a_reliability_diagram(num_samples, bins, average, seed):
    """Each against plain NumPy; the distances from the diagonal, weighed by the shares, are the error."""
    logits, target = samples(num_samples, seed)
    probabilities = logits.softmax(1)
    axes = plot.plot_reliability(probabilities, target, average=average, bins=bins)
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    weight = np.ones(num_samples)
    if average == "classes":
        weight = 1 / np.bincount(target.numpy())[target.numpy()]
    weight /= weight.sum()
    place = np.ceil(confidence * bins) - 1
    points, shares = [], []
    for b in range(bins):
        own = place == b
        shares.append(100 * weight[own].sum())
        if own.any():
            right = predicted[own] == target.numpy()[own]
            points.append(
                [100 * np.average(values, weights=weight[own]) for values in (confidence[own], right)]
            )
    np.testing.assert_allclose(lines_of(axes)["network"].get_xydata(), points)
    np.testing.assert_allclose(axes.patches[-1].get_data().values, shares, atol=1e-10)
    error = np.abs(np.diff(points, axis=1)[:, 0]) @ np.array(shares)[np.array(shares) > 0] / 100
    assert axes.get_title() == f"expected calibration error {error:.1f} %"


@pytest.mark.parametrize("average", AVERAGES)
def test_several_networks_in_a_reliability_diagram(average, device):
    logits, target = (values.to(device) for values in samples())
    named = {
        "sharp": (3 * logits).softmax(1),
        "flat": (0.2 * logits).softmax(1),
        "as it is": logits.softmax(1),
    }
    axes = plot.plot_reliability(named, target, average=average)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    for name, probabilities in named.items():
        metric = ProbabilityScores(5, average=average).to(device)
        metric.update(probabilities, target)
        assert f"{name}:\ncalibration error {100 * metric.compute()['ece']:.1f} %" in labels
    assert {"perfect calibration", "share of the samples"} <= set(labels)
    assert not axes.get_title()
    looks = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in axes.get_lines()[1:]}
    assert len(looks) == 3  # told apart in grey
    colors = [line.get_color() for line in axes.get_lines()]
    assert colors == [REFERENCE] * 3 + ["black"]  # the last is the most important


def test_methods_have_their_colours_in_a_reliability_diagram():
    """Wherever they stand; other curves, five here, differ by line style or marker."""
    logits, target = samples()
    names = ["LGLA", "first", "softmax", "second", "third", "balanced softmax", "fourth", "fifth"]
    axes = plot.plot_reliability({name: logits.softmax(1) for name in names}, target)
    lines = axes.get_lines()[1:]
    colors = dict(zip(names, [line.get_color() for line in lines], strict=True))
    assert {name: colors[name] for name in METHODS} == METHODS
    assert [area.get_edgecolor() for area in axes.patches] == [to_rgba(color) for color in colors.values()]
    assert len({(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}) == len(names)
    axes = plot.plot_reliability({name: logits.softmax(1) for name in ("softmax", "LGLA")}, target)
    assert [line.get_color() for line in axes.get_lines()[1:]] == [METHODS["softmax"], METHODS["LGLA"]]


def test_a_calibrated_network_lies_on_the_diagonal():
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(50_000, 4, generator=generator)).softmax(1)
    target = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    axes = plot.plot_reliability(probabilities, target)
    shares = axes.patches[-1].get_data().values
    points = lines_of(axes)["network"].get_xydata()[shares[shares > 0] > 1]  # but for bins of few samples
    assert len(points) > 8
    np.testing.assert_allclose(points[:, 1], points[:, 0], atol=4)


def test_long_names_are_not_cut_off():
    logits, target = samples()
    named = {"plain mean of three experts": logits.softmax(1), "calibrated, uniform prior": logits.softmax(1)}
    for axes in (plot.plot_reliability(named, target), plot.plot_prior_shift(logits, target, COUNTS)):
        axes.figure.savefig(io.BytesIO())
        width, height = axes.figure.get_size_inches()
        left, bottom, right, top = axes.figure.get_tightbbox().extents
        assert min(left, bottom, width - right, height - top) > -0.01


@pytest.mark.parametrize("used", [True, False])
def test_accuracy_over_the_exponent(used, device):
    logits, target = (values.to(device) for values in samples())
    grid = [-0.5, 0.0, 0.7, 1.3]
    calibration = fit(logits, target, class_counts=COUNTS, validation_prior="uniform")
    calibration = replace(calibration, exponent=0.62, used=used)
    axes = plot.plot_prior_shift(logits, target, COUNTS, grid, calibration=calibration)
    lines = lines_of(axes)
    for i, s in enumerate(grid):
        metric = ShotAccuracy(COUNTS).to(device)
        metric.update(logits - s * torch.tensor(COUNTS).log().to(device), target)
        for name, value in metric.compute().items():
            line = lines["all classes" if name == "all" else f"{name}-shot"]
            assert line.get_xdata()[i] == s
            assert line.get_ydata()[i] == pytest.approx(100 * float(value), abs=1e-4)
    as_they_are = f"logits as they are: s = 0{'' if used else ', calibration not used'}"
    assert lines[as_they_are].get_xdata() == [0, 0]
    if used:
        assert lines["found by calibration: s = 0.62"].get_xdata() == [0.62, 0.62]
    axes.figure.savefig(io.BytesIO())


def test_the_exponent_that_the_logits_hold_is_about_the_best():
    """The simulated logits hold the prior n^1."""
    logits, target = samples(20_000)
    line = lines_of(plot.plot_prior_shift(logits, target, COUNTS))["all classes"]
    assert line.get_xdata()[line.get_ydata().argmax()] == pytest.approx(1, abs=0.21)


def test_an_expert_output_counts_as_its_ensemble():
    logits, target = samples()
    experts = logits[:, None] + torch.tensor([-1.0, 0.0, 1.0])[:, None]
    output = ExpertOutput(experts, experts[..., :1], experts[0, :, :1])
    drawn = [lines_of(plot.plot_prior_shift(given, target, COUNTS)) for given in (output, logits)]
    for label, line in drawn[0].items():
        np.testing.assert_array_equal(line.get_ydata(), drawn[1][label].get_ydata())


def test_a_class_without_training_samples_is_never_predicted():
    logits, target = torch.eye(3), torch.arange(3)
    lines = lines_of(plot.plot_prior_shift(logits, target, [500, 50, 0], [-1.0, 0.0, 1.0]))
    assert lines["few-shot"].get_ydata().tolist() == [0, 0, 0]
    assert lines["all classes"].get_ydata()[1] == pytest.approx(200 / 3)


def test_frequencies_shift_as_counts_do():
    logits, target = samples()
    shares = torch.tensor(COUNTS) / sum(COUNTS)
    drawn = [
        lines_of(plot.plot_prior_shift(logits, target, counts))["all classes"].get_ydata()
        for counts in (COUNTS, shares)
    ]
    np.testing.assert_array_equal(*drawn)


def test_a_split_without_test_samples_has_no_line():
    logits, _ = samples()
    target = torch.zeros(len(logits), dtype=torch.int64)
    assert "few-shot" not in lines_of(plot.plot_prior_shift(logits, target, COUNTS))
