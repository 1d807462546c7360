"""What the pictures hold is what the library computes; none touches the caller's matplotlib."""

import io
import itertools
import math
import os
import pickle
import re
import subprocess
import sys

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from reference import assert_raises

from lgla_losses import CLALogitAdjuster, ClassGrouper, ExpertOutput, functional, plot
from lgla_losses.metrics import ShotAccuracy
from lgla_losses.plot import class_axis, style
from lgla_losses.plot.ticks import plain_number, plain_numbers

#: Classes and experts.
SIZES = [(3, 2), (3, 3), (3, 4), (1000, 2), (1000, 3), (1000, 4), (1000, 5)]
sizes = pytest.mark.parametrize(("num_classes", "num_experts"), SIZES)


def counts_of(num_classes):
    """Long-tailed with ties, in no order."""
    counts = [max(1, round(2000 * 500 ** (-j / max(1, num_classes - 1)))) for j in range(num_classes)]
    return np.random.default_rng(0).permutation(counts).tolist()


def adjuster_of(num_classes, num_experts, **options):
    return CLALogitAdjuster(ClassGrouper(counts_of(num_classes), num_experts - 1), **options)


def by_frequency(counts):
    """Classes by falling count, ties by index."""
    return sorted(range(len(counts)), key=lambda j: (-counts[j], j))


def samples(num_classes, num_experts, num_samples=300):
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(num_classes, (num_samples,), generator=generator)
    logits = torch.randn(num_samples, num_experts, num_classes, generator=generator)
    logits[torch.arange(num_samples), :, target] += 2 * torch.rand(num_experts, generator=generator)
    return logits, target


def saved(drawn):
    """The PNG of the figure; a warning, of a layout that failed for one, is an error.

    At the figure's own resolution: matplotlib measures texts at that of the last drawing.
    """
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    return figure


def ydata(axes):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.get_lines()}


def expert_names(num_experts):
    return [*(f"local expert {k + 1}" for k in range(num_experts - 1)), "global expert"]


@sizes
def test_groups(num_classes, num_experts):
    counts = counts_of(num_classes)
    grouper = ClassGrouper(counts, num_experts - 1)
    axes = plot.plot_groups(grouper)
    *areas, curve = axes.patches[:num_experts]
    order = by_frequency(counts)
    np.testing.assert_array_equal(curve.get_data().values, np.array(counts)[order])
    np.testing.assert_array_equal(curve.get_data().edges, np.arange(num_classes + 1) + 0.5)
    for g, (area, text) in enumerate(zip(areas, axes.get_legend().get_texts(), strict=True)):
        drawn = np.nan_to_num(area.get_data().values)
        own = grouper.group_index.numpy()[order] == g
        np.testing.assert_array_equal(drawn, np.where(own, np.array(counts)[order], 0))
        assert f"{int(grouper.group_masses[g]):,} samples" in text.get_text()
        assert f"group {g + 1}: {int(grouper.group_sizes[g]):,} class" in text.get_text()
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < min(counts)
    assert axes.get_ylim()[1] > max(counts)
    saved(axes)


@sizes
def test_table(num_classes, num_experts, device):
    adjuster = adjuster_of(num_classes, num_experts).to(device)
    axes = plot.plot_table(adjuster)
    lines, order = ydata(axes), by_frequency(counts_of(num_classes))
    assert list(lines) == expert_names(num_experts)
    np.testing.assert_array_equal(list(lines.values()), adjuster.table.cpu().numpy()[:, order])
    saved(axes)


@sizes
def test_margins(num_classes, num_experts, device):
    adjuster = adjuster_of(num_classes, num_experts).to(device)
    counts = counts_of(num_classes)
    for target_class in (0, num_classes // 2, num_classes - 1):
        axes = plot.plot_margins(adjuster, target_class)
        rivals = [j for j in by_frequency(counts) if j != target_class]
        expected = adjuster.margin(torch.tensor([target_class], device=device))[0].cpu().numpy()
        for k, line in enumerate(axes.get_lines()[:num_experts]):
            np.testing.assert_array_equal(line.get_xdata(), np.array(counts)[rivals])
            np.testing.assert_array_equal(line.get_ydata(), expected[k, rivals])
    saved(axes)


@pytest.mark.parametrize("num_experts", [3, 4, 5, 7])
def test_margins_name_the_cases_where_they_hold(num_experts):
    """At every number the line is that of Eq. 6's case."""
    adjuster, counts = adjuster_of(1000, num_experts), counts_of(1000)
    tau, largest = float(adjuster.tau), max(counts)
    y = by_frequency(counts)[900]
    axes = plot.plot_margins(adjuster, y)
    cases = {text.get_text(): text.xy for text in axes.texts if "case" in text.get_text()}
    assert sorted(cases) == [f"case {case}" for case in (1, 2, 3, 4, 5)]
    values = {
        "case 1": lambda n: math.log(n / counts[y]),
        "case 2": lambda n: math.log(largest / counts[y]),
        "case 3": lambda n: math.log(n / largest),
        "case 4": lambda n: 0.0,
        "case 5": lambda n: tau * math.log(n / counts[y]),
    }
    for case, (n, margin) in cases.items():
        assert margin == pytest.approx(values[case](n), abs=1e-12), case


def test_the_numbers_of_the_groups_stand_over_their_classes():
    adjuster, counts = adjuster_of(1000, 4), counts_of(1000)
    for name, axes in (("table", plot.plot_table(adjuster)), ("margins", plot.plot_margins(adjuster, 0))):
        saved(axes)
        numbers = [text for text in axes.texts if "case" not in text.get_text()]
        assert [text.get_text().removeprefix("group ") for text in numbers] == ["1", "2", "3"]
        for g, text in enumerate(numbers):
            own = [i for i, j in enumerate(by_frequency(counts)) if adjuster.grouper.group_index[j] == g]
            places = [i + 1 for i in own] if name == "table" else [sorted(counts)[::-1][i] for i in own]
            to_axes = axes.transData + axes.transAxes.inverted()
            ends = to_axes.transform([(places[0], 1), (places[-1], 1)])[:, 0]
            assert text.get_position()[0] == pytest.approx(ends.mean(), abs=0.01), (name, g)


def test_margins_of_a_table_of_ones_own_have_no_cases():
    adjuster = CLALogitAdjuster.from_table(ClassGrouper([9, 3, 1], 2), torch.randn(2, 3))
    axes = plot.plot_margins(adjuster, 1)
    assert not any("case" in text.get_text() for text in axes.texts)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["expert 1", "expert 2"]


@sizes
@pytest.mark.parametrize("pair", [True, False])
def test_boundaries(num_classes, num_experts, pair):
    """Every pixel shows the largest adjusted logit, and on the solid line of a pair both are equal."""
    adjuster, order = adjuster_of(num_classes, num_experts), by_frequency(counts_of(num_classes))
    classes = [order[0], order[-1]] if pair else [order[0], order[num_classes // 2], order[-1]]
    figure = plot.plot_boundaries(adjuster, classes)
    assert len(figure.axes) == num_experts
    for k, axes in enumerate(figure.axes):
        (image,) = axes.images
        left, right, bottom, top = image.get_extent()
        drawn = np.asarray(image.get_array())
        centres = np.array([line.get_xydata()[0] for line in axes.get_lines()])
        xs, ys = np.linspace(left, right, drawn.shape[1]), np.linspace(bottom, top, drawn.shape[0])
        points = np.stack(np.meshgrid(xs, ys), axis=-1)
        plain = -0.5 * np.square(points[:, :, None] - centres).sum(-1)
        probability = torch.softmax(torch.from_numpy(plain) + adjuster.table[k, classes], dim=-1).numpy()
        two = np.sort(probability, axis=-1)
        clear = two[..., -1] - two[..., -2] > 1e-9
        np.testing.assert_array_equal(drawn[clear], probability.argmax(-1)[clear])
        if pair:
            margin = float(adjuster.margin(torch.tensor(classes[:1]))[0, k, classes[1]])
            assert f"{margin:+.2f} nats" in axes.get_title()
            (line,) = (c for c in axes.collections if c.get_linestyle()[0][1] is None)
            ((x, y),) = line.get_paths()[0].vertices[:1]
            logits = [-0.5 * ((x - a) ** 2 + (y - b) ** 2) for a, b in centres]
            assert logits[0] == pytest.approx(logits[1] + margin, abs=1e-6)
    saved(figure)


def test_boundaries_around_centres_of_ones_own():
    adjuster = adjuster_of(10, 3)
    centres = [[0.0, 0.0], [3.0, 0.5], [1.0, 2.0]]
    figure = plot.plot_boundaries(adjuster, torch.tensor([4, 1, 0]), torch.tensor(centres))
    assert [line.get_xydata()[0].tolist() for line in figure.axes[0].get_lines()] == centres
    # A margin larger than the distance bears leaves no boundary in sight, which is no error.
    saved(plot.plot_boundaries(adjuster, [0, 4], [[0.0, 0.0], [1e-3, 0.0]]))


@sizes
def test_weight_norms(num_classes, num_experts, device):
    counts = counts_of(num_classes)
    weight = torch.randn(num_experts, num_classes, 4, device=device, requires_grad=True)
    axes = plot.plot_weight_norms(weight, counts)
    norms = weight.detach().double().norm(dim=-1).cpu().numpy()[:, by_frequency(counts)]
    norms = np.concatenate([norms, norms.mean(0)[None]])
    labelled = {label: row for label, row in ydata(axes).items() if label[0] != "_"}
    assert list(labelled) == [*expert_names(num_experts), "mean of the experts"]
    raw = [line for line in axes.get_lines() if line.get_label()[0] == "_"] or axes.get_lines()
    np.testing.assert_allclose([line.get_ydata() for line in raw], norms, rtol=1e-12)
    if num_classes == 1000:  # the means over 10 neighbours on either side
        smooth = labelled["global expert"]
        assert smooth[500] == pytest.approx(norms[-2, 490:511].mean())
        assert smooth[0] == pytest.approx(norms[-2, :11].mean())
    saved(axes)


def test_weight_norms_of_one_head():
    axes = plot.plot_weight_norms(torch.eye(3)[None], [3, 2, 1])
    assert [line.get_label() for line in axes.get_lines()] == ["expert 1"]


@sizes
@pytest.mark.parametrize("equal", [True, False])
def test_implied_prior(num_classes, num_experts, equal, device):
    adjuster = adjuster_of(num_classes, num_experts).to(device)
    fusion = None if equal else list(range(num_experts))
    axes = plot.plot_implied_prior(adjuster, fusion)
    lines, counts = ydata(axes), counts_of(num_classes)
    order = by_frequency(counts)
    np.testing.assert_array_equal(lines["fused experts"], adjuster.implied_prior(fusion).cpu().numpy()[order])
    np.testing.assert_allclose(lines["training data"], np.array(counts)[order] / sum(counts), rtol=1e-12)
    np.testing.assert_allclose(lines["uniform"], 1 / num_classes)
    assert axes.get_yscale() == "log"
    saved(axes)


@sizes
def test_fusion_sweep(num_classes, num_experts):
    """As many ensembles as the picture has points, and the metric of torchmetrics on each."""
    logits, target = samples(num_classes, num_experts)
    counts, weights = counts_of(num_classes), [0.0, 0.25, 1.0]
    figure = plot.plot_fusion_sweep(logits.unbind(1), target, counts, weights)
    computed = plot.fusion_sweep(logits, target, counts, weights)
    assert len(figure.axes) == num_experts - 1
    output = ExpertOutput(logits.double(), logits[..., :1], logits[0, ..., None])
    for k, axes in enumerate(figure.axes):
        lines = ydata(axes)
        for i, w in enumerate(weights):
            fusion = [(1 - w) / max(1, num_experts - 2)] * (num_experts - 1)
            fusion[k] = w
            fusion.append(1 / (num_experts - 1) if num_experts > 2 else 1 - w)
            metric = ShotAccuracy(counts)
            metric.update(output.ensemble(fusion), target)
            expected = {name: float(value) for name, value in metric.compute().items()}
            assert computed[k, i].tolist() == pytest.approx(list(expected.values()), nan_ok=True, abs=1e-6)
            for name, value in expected.items():
                label = "all classes" if name == "all" else f"{name}-shot"
                if label in lines:
                    assert lines[label][i] == pytest.approx(100 * value, abs=1e-4)
                else:
                    assert math.isnan(value)
    saved(figure)


def test_an_expert_without_weight_takes_no_part():
    """Nor where it masks a class; K = 2 at w = 1 is the local expert alone."""
    logits = torch.tensor([[[1.0, 0.0], [-math.inf, 5.0]]])
    result = plot.fusion_sweep(logits, torch.tensor([0]), [5, 5], [1.0, 0.5])
    assert result[0, :, 0].tolist() == [1.0, 0.0]
    assert result[0, :, 3].tolist() == [1.0, 0.0]
    assert result[0, :, 1].isnan().all()


@sizes
def test_angles(num_classes, num_experts):
    generator = torch.Generator().manual_seed(1)
    grouper = ClassGrouper(counts_of(num_classes), num_experts - 1)
    target = torch.randint(num_classes, (400,), generator=generator)
    angles = 0.4 + torch.rand(400, num_experts, generator=generator)
    target[:3], angles[:3] = -100, math.nan  # ignored, whatever they hold
    figure = plot.plot_angles(angles, target, grouper, bins=17)
    group = functional.target_groups(target, grouper.group_index, -100)
    statistics = functional.aaw_statistics(angles, group, num_experts - 1)
    references = functional.aaw_references(statistics)
    present = [g for g in range(num_experts - 1) if (group == g).any()]
    for k, name in enumerate(expert_names(num_experts)):
        if num_experts <= 4:
            axes = figure.axes[k]
            assert axes.get_title() == name
            assert [patch.get_label() for patch in axes.patches] == [f"group {g + 1}" for g in present]
            drawn = zip(axes.patches, axes.get_lines(), strict=True)
        else:  # a row of panels for each group
            column = figure.axes[k::num_experts]
            assert column[0].get_title() == name
            drawn = [(*axes.patches, *axes.get_lines()) for axes in column]
        for g, (patch, line) in zip(present, drawn, strict=True):
            shares, edges, _ = patch.get_data()
            assert len(shares) == 17
            own = angles[group == g, k].double().numpy()
            np.testing.assert_allclose(shares, 100 * np.histogram(own, edges)[0] / len(own))
            assert shares.sum() == pytest.approx(100)
            assert line.get_xdata()[0] == pytest.approx(float(references[g, k]), abs=1e-6)
    saved(figure)


def test_a_group_without_samples_has_no_angles():
    figure = plot.plot_angles(torch.full((2, 3), 0.5), torch.tensor([0, 0]), ClassGrouper([9, 3, 1], 2))
    assert [len(axes.patches) for axes in figure.axes] == [1, 1, 1]
    saved(figure)
    figure = plot.plot_angles(torch.full((1, 5), 0.5), torch.tensor([0]), ClassGrouper([9, 5, 3, 1], 4))
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [[]] * 5 + [["no samples"]] * 15
    saved(figure)


def test_angles_of_many_groups_are_named_by_row_and_column():
    groups, experts = 6, 7
    target = torch.arange(600) % 60
    figure = saved(plot.plot_angles(torch.rand(600, experts), target, ClassGrouper(range(1, 61), groups)))
    assert len(figure.axes) == groups * experts
    assert [axes.get_title() for axes in figure.axes[:experts]] == expert_names(experts)
    rows = figure.axes[experts - 1 :: experts]
    assert [axes.get_ylabel() for axes in rows] == [f"group {g + 1}" for g in range(groups)]
    fills = [to_hex(axes.patches[0].get_facecolor()) for axes in rows]
    assert fills == [color.lower() for color in style.COLORS]
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.padded(-2).overlaps(b.padded(-2)) for a, b in itertools.combinations(boxes, 2))


def single_panels():
    adjuster = adjuster_of(10, 3)
    weight = torch.ones(3, 10, 2)
    logits, target = samples(10, 1)
    named = {"blurred": (0.5 * logits[:, 0]).softmax(1), "network": logits[:, 0].softmax(1)}
    return {
        "groups": lambda **on: plot.plot_groups(adjuster.grouper, **on),
        "table": lambda **on: plot.plot_table(adjuster, **on),
        "margins": lambda **on: plot.plot_margins(adjuster, 4, **on),
        "norms": lambda **on: plot.plot_weight_norms(weight, counts_of(10), **on),
        "prior": lambda **on: plot.plot_implied_prior(adjuster, **on),
        "reliability": lambda **on: plot.plot_reliability(named, target, **on),
        "shift": lambda **on: plot.plot_prior_shift(logits[:, 0], target, counts_of(10), **on),
    }


def several_panels():
    adjuster = adjuster_of(10, 3)
    logits, target = samples(10, 3)
    angles = torch.rand(300, 3)
    return {
        "boundaries": lambda **on: plot.plot_boundaries(adjuster, [0, 1], **on),
        "sweep": lambda **on: plot.plot_fusion_sweep(logits, target, counts_of(10), **on),
        "angles": lambda **on: plot.plot_angles(angles, target, adjuster.grouper, **on),
    }


@pytest.mark.parametrize("name", single_panels())
def test_ax_is_respected(name):
    figure = Figure(layout="constrained")
    other, axes = figure.subplots(1, 2)
    assert single_panels()[name](ax=axes) is axes
    assert axes.has_data()
    assert not other.has_data()
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert_raises(
        lambda: single_panels()[name](ax=figure), TypeError, "ax: expected the Axes", "got", "Figure"
    )
    saved(figure)


@pytest.mark.parametrize("name", several_panels())
def test_figure_is_respected(name):
    figure = Figure(figsize=(9, 4), layout="constrained")
    assert several_panels()[name](figure=figure) is figure
    assert figure.axes
    assert figure.get_supxlabel()
    assert figure.get_supylabel()
    call = several_panels()[name]
    assert_raises(lambda: call(figure=figure.axes[0]), TypeError, "figure: expected a Figure", "got")


@pytest.mark.parametrize("name", [*single_panels(), *several_panels()])
def test_the_style_is_the_callers(name):
    """On a dark background the most important line, texts and legends are light; nothing global changes."""
    with matplotlib.style.context("dark_background"):
        before = dict(mpl.rcParams)
        drawn = (single_panels() | several_panels())[name]()
        assert dict(mpl.rcParams) == before
    figure = saved(drawn)
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    texts = [text for legend in legends if legend for text in legend.get_texts()]
    texts += [text for axes in figure.axes for text in axes.texts]
    assert texts
    assert {to_hex(text.get_color()) for text in texts} == {"#ffffff"}
    colors = {to_hex(line.get_color()) for axes in figure.axes for line in axes.get_lines()}
    assert "#000000" not in colors


@pytest.mark.parametrize("name", [*single_panels(), *several_panels()])
def test_figures_can_be_pickled(name):
    figure = saved((single_panels() | several_panels())[name]())
    copy = saved(pickle.loads(pickle.dumps(figure)))
    for axes, again in zip(figure.axes, copy.axes, strict=True):
        for labels in ("get_xticklabels", "get_yticklabels"):
            texts = [[text.get_text() for text in getattr(of, labels)()] for of in (axes, again)]
            assert texts[0] == texts[1]


def test_lines_differ_in_more_than_colour():
    """Fourteen experts: each pair by line style or marker, whatever a printer makes of the colours."""
    axes = plot.plot_table(adjuster_of(1000, 15))
    looks = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == 15


def line_colors(axes):
    return {line.get_label(): to_hex(line.get_color()) for line in axes.get_lines()}


def test_one_colour_means_one_thing_in_all_pictures():
    """A group, its local expert and its classes share a colour that nothing else has."""
    counts = counts_of(60)
    adjuster = adjuster_of(60, 4)
    logits, target = samples(60, 4)
    locals_ = {f"local expert {k + 1}": style.COLORS[k].lower() for k in range(3)}
    experts = locals_ | {"global expert": "#000000"}
    pictures = (
        plot.plot_table(adjuster),
        plot.plot_margins(adjuster, 0),
        plot.plot_weight_norms(torch.rand(4, 60, 2), counts),
    )
    for axes in pictures:
        assert experts.items() <= line_colors(axes).items()

    areas = plot.plot_groups(adjuster.grouper).patches[:3]
    histograms = plot.plot_angles(torch.rand(300, 4), target, adjuster.grouper).axes[0].patches
    order = by_frequency(counts)
    (areas_,) = plot.plot_boundaries(adjuster, [order[0], order[-1]]).axes[0].images
    assert [to_hex(area.get_facecolor()) for area in areas] == list(locals_.values())
    assert [to_hex(patch.get_edgecolor()) for patch in histograms] == list(locals_.values())
    assert [to_hex(c) for c in areas_.cmap.colors] == [style.COLORS[0].lower(), style.COLORS[2].lower()]

    shots = dict(zip(("many-shot", "medium-shot", "few-shot"), map(str.lower, style.SHOTS), strict=True))
    shots["all classes"] = "#000000"
    sweep = plot.plot_fusion_sweep(logits, target, counts)
    shift = plot.plot_prior_shift(logits[:, 0], target, counts)
    for axes in (*sweep.axes, shift):
        assert shots.items() <= line_colors(axes).items()

    priors = line_colors(plot.plot_implied_prior(adjuster))
    grey = style.REFERENCE.lower()
    assert priors == {"training data": grey, "uniform": grey, "fused experts": "#000000"}
    colors = [*style.COLORS, *style.SHOTS, *style.METHODS.values()]
    assert len(set(colors)) == len(colors)


def luminance(color):
    """Of WCAG, from 0 for black to 1 for white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_colours_are_seen_on_white_and_black_and_tell_apart_in_grey():
    for color in (*style.COLORS, *style.SHOTS, *style.METHODS.values()):
        assert 1.05 / (luminance(color) + 0.05) > 2, color
        assert (luminance(color) + 0.05) / 0.05 > 1.9, color
    for colors in (style.SHOTS, style.METHODS.values()):  # bars and lines of few kinds
        lightness = sorted(116 * luminance(color) ** (1 / 3) - 16 for color in colors)
        assert min(np.diff(lightness)) > 12
    areas = plot.plot_groups(adjuster_of(1000, 7).grouper).patches[:6]
    assert len({area.get_hatch() for area in areas}) == 6


def test_classes_of_one_group_have_tones_of_its_colour():
    counts = counts_of(60)
    order, adjuster = by_frequency(counts), adjuster_of(60, 3)
    (areas_,) = plot.plot_boundaries(adjuster, [order[0], order[1], order[-1]]).axes[0].images
    first, second, third = areas_.cmap.colors
    assert first[:3] == second[:3] != third[:3]
    assert first[3] > second[3]


NAMED = {
    "groups": lambda adjuster, names: plot.plot_groups(adjuster.grouper, names=names),
    "table": lambda adjuster, names: plot.plot_table(adjuster, names=names),
    "prior": lambda adjuster, names: plot.plot_implied_prior(adjuster, names=names),
    "norms": lambda adjuster, names: plot.plot_weight_norms(
        torch.ones(3, adjuster.grouper.num_classes, 2), adjuster.grouper.class_counts, names=names
    ),
}


def shown_ticks(axes):
    return [label for label in axes.get_xticklabels() if label.get_text()]


@pytest.mark.parametrize("name", NAMED)
def test_classes_have_their_names(name):
    names = ["owl", "a$b$", "hawk", "kite", "emu"]
    adjuster = CLALogitAdjuster(ClassGrouper([5, 90, 40, 3, 60], 2))
    axes = NAMED[name](adjuster, names)
    assert [label.get_text() for label in shown_ticks(axes)] == [r"a\$b\$", "emu", "hawk", "owl", "kite"]
    assert axes.get_xlabel() == "class, the most frequent first"
    saved(axes)
    again = NAMED[name](adjuster, (each for each in names))
    assert [label.get_text() for label in shown_ticks(again)] == [
        label.get_text() for label in shown_ticks(axes)
    ]
    assert_raises(lambda: NAMED[name](adjuster, [*names, "x"]), ValueError, "names", "5 classes, got 6")
    assert_raises(lambda: NAMED[name](adjuster, "abcde"), TypeError, "names", "texts [C]", "'abcde'")


def test_margins_and_boundaries_name_their_classes():
    adjuster, names = adjuster_of(3, 3), ["owl", "hawk", "emu"]
    title = plot.plot_margins(adjuster, 1, names=names).get_legend().get_title().get_text()
    assert title.startswith("hawk: ")
    texts = [text.get_text() for text in plot.plot_boundaries(adjuster, [2, 0], names=names).axes[0].texts]
    assert [text.splitlines()[0] for text in texts] == ["emu", "owl"]
    for draw in (plot.plot_margins, plot.plot_boundaries):
        chosen = 1 if draw is plot.plot_margins else [0, 1]
        assert_raises(lambda: draw(adjuster, chosen, names=["owl"]), ValueError, "names", "3 classes, got 1")  # noqa: B023


@pytest.mark.parametrize("num_classes", [2, 12, 20, 300, 1000])
@pytest.mark.parametrize("name", NAMED)
def test_long_names_are_shortened_and_do_not_touch(name, num_classes):
    names = [f"a species with quite a long name, number {j}" for j in range(num_classes)]
    axes = NAMED[name](adjuster_of(num_classes, 3), names)
    figure = saved(axes)
    labels = shown_ticks(axes)
    assert 2 <= len(labels) <= 21
    for label in labels:
        text = label.get_text()
        assert re.fullmatch("a species….* [0-9]+", text), text
        assert len(text) <= 20
    # Slanted lines of text touch where their distance is less than their height.
    to_pixels = axes.transData.transform
    places = np.sort([to_pixels((tick, 1))[0] for tick in axes.get_xticks()])
    height = labels[0].get_fontsize() / 72 * figure.dpi
    level = labels[0].get_rotation() == 0
    room = max(label.get_window_extent().width for label in labels) if level else 1.4 * height
    assert np.diff(places).min() > room
    assert figure.get_tightbbox().extents[0] > -0.01


def test_wide_letters_count_twice():
    assert class_axis.shortened("부엉이" * 2) == "부엉이" * 2
    assert class_axis.shortened("가나다라마바사아자차카타파하") == "가나다라마…카타파하"


EXTREME = {
    "1 to a million": [10**6, 10**5, 4_000, 90, 7, 1],
    "a million of one": [10**6] + [1] * 40,
    "all equal": [7] * 30,
    "all a million": [10**6] * 4,
    "one class": [1_234_567],
    "nearly equal": [1001, 1000, 999],
    "parts": [0.5, 0.05, 0.002],
    "a billionth": [10**9, 300, 20, 1],
    "nearly equal millions": [1_000_001, 1_000_000, 999_999],
    "parts of a billion": [0.7, 3e-7, 1.5e-9],
}


@pytest.mark.parametrize("width", [8.5, 3.4])
@pytest.mark.parametrize("counts", EXTREME.values(), ids=EXTREME)
def test_ticks_of_extreme_counts_are_plain_and_do_not_touch(counts, width):
    adjuster = CLALogitAdjuster(ClassGrouper(counts, min(2, len(counts))))
    pictures = [lambda ax: plot.plot_groups(adjuster.grouper, ax=ax)]
    pictures += [lambda ax: plot.plot_implied_prior(adjuster, ax=ax)]
    if len(counts) > 1:
        pictures.append(lambda ax: plot.plot_margins(adjuster, 0, ax=ax))
    for draw in pictures:
        axes = Figure(figsize=(width, 3), layout="constrained").add_subplot()
        draw(axes)
        axes.get_legend().remove()
        saved(axes)
        for axis, along in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
            assert shown
            assert not [label for label in axis.get_minorticklabels() if label.get_text()]
            for tick in shown:
                text = tick.label1.get_text()
                assert "$" not in text
                if axis.get_scale() == "log":
                    assert float(text.replace(",", "")) == pytest.approx(tick.get_loc(), rel=1e-3)
            boxes = [tick.label1.get_window_extent() for tick in shown]
            ends = sorted((box.get_points()[0][along], box.get_points()[1][along]) for box in boxes)
            texts = [tick.label1.get_text() for tick in shown]
            assert all(a[1] < b[0] for a, b in itertools.pairwise(ends)), texts
            assert len(set(texts)) == len(texts), texts


@pytest.mark.parametrize("middle", [1e-12, 1e-8, 1e-6, 1e-3, 0.1, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("ratio", [1.001, 1.2, 4, 30, 1e6])
def test_labels_of_a_logarithmic_axis_are_true_and_differ(middle, ratio):
    """The axis of the prior of a million classes for one: 1e-6, hardly more or less."""
    axes = Figure().add_subplot()
    axes.set(yscale="log", ylim=(middle / ratio, middle * ratio))
    plain_numbers(axes.yaxis)
    ticks = axes.get_yticks()
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert texts
    assert len(set(texts)) == len(texts)
    assert [float(text.replace(",", "")) for text in texts] == pytest.approx(ticks, rel=1e-9)


def test_the_prior_of_a_million_classes_has_true_labels():
    axes = plot.plot_implied_prior(CLALogitAdjuster(ClassGrouper([1] * 10**6, 2)))
    axes.figure.draw_without_rendering()
    texts = [label.get_text() for label in axes.get_yticklabels() if label.get_text()]
    assert "0.000001" in texts
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.5e-8, "1.5e-08"),
        (1.5e-6, "0.0000015"),
        (1 / 3, "0.3333"),
        (0.9999999, "1"),
        (1, "1"),
        (1234.5, "1,234.5"),
        (12345678901.2, "12,345,678,901"),
    ],
)
def test_numbers_are_plain(value, text):
    assert plain_number(value) == text


def test_ticks_know_the_size_of_their_letters():
    """Also where it is chosen after drawing."""
    axes = Figure(figsize=(10, 3)).add_subplot()
    plot.plot_margins(adjuster_of(1000, 3), 5, ax=axes)
    axes.tick_params(labelsize=24)
    saved(axes)
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    assert len(boxes) > 1
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("size", [6, 24])
@pytest.mark.parametrize("names", [None, ["an eagle owl", "a red kite", "a hen harrier", "an emu"] * 5])
def test_names_and_indices_know_the_size_of_their_letters(size, names):
    axes = Figure(figsize=(8.5, 5), layout="constrained").add_subplot()
    axes.tick_params(labelsize=size)
    plot.plot_table(adjuster_of(20, 3), names=names, ax=axes)
    saved(axes)
    labels = shown_ticks(axes)
    assert len(labels) == 20 if size == 6 else 2 < len(labels) < 20
    ends = [label.get_window_extent() for label in labels]
    room = np.diff([box.x1 for box in ends]).min()
    assert room > (max(box.width for box in ends) if names is None else 1.4 * size / 72 * axes.figure.dpi)


def test_pictures_are_opaque_so_that_dark_pages_do_not_shine_through():
    file = io.BytesIO()
    plot.plot_groups(ClassGrouper([9, 3, 1], 2)).figure.savefig(file, format="png", dpi=40)
    file.seek(0)
    pixels = image.imread(file, format="png")
    assert (pixels[..., 3] == 1).all()
    assert (pixels[0, :, :3] == 1).all()


def test_many_classes():
    adjuster = adjuster_of(8142, 3)
    for axes in (
        plot.plot_groups(adjuster.grouper),
        plot.plot_table(adjuster),
        plot.plot_margins(adjuster, 9),
    ):
        saved(axes)
        assert len(axes.get_xticks()) < 15


def test_a_head_of_few_among_many_classes_is_seen():
    adjuster = CLALogitAdjuster(ClassGrouper([100_000] + [5] * 999, 3))
    for draw in (plot.plot_groups, plot.plot_table, plot.plot_implied_prior):
        axes = draw(adjuster.grouper if draw is plot.plot_groups else adjuster)
        saved(axes)
        assert axes.get_xscale() == "log"
        assert [text.get_text()[-1] for text in axes.texts] == ["1", "2", "3"]
    assert plot.plot_groups(adjuster_of(1000, 3).grouper).get_xscale() == "linear"


def test_counts_are_written_out():
    axes = plot.plot_groups(ClassGrouper([3000, 200, 10], 2))
    saved(axes)
    labels = [label.get_text() for label in axes.get_yticklabels() if label.get_text()]
    assert {"10", "100", "1,000"} <= set(labels)
    assert not any("$" in label for label in labels)


@pytest.mark.parametrize(
    ("num_classes", "num_experts"),
    [
        (3, 4),
        (20, 3),
        (8142, 7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(20, 7), (1000, 16)]),
    ],
)
def test_nothing_is_cut_off_or_written_over(num_classes, num_experts):
    adjuster = adjuster_of(num_classes, num_experts)
    order = by_frequency(counts_of(num_classes))
    for drawn in (
        plot.plot_groups(adjuster.grouper),
        plot.plot_table(adjuster),
        *(plot.plot_margins(adjuster, order[i]) for i in (0, num_classes // 2, -1)),
        plot.plot_weight_norms(torch.rand(num_experts, num_classes, 2), counts_of(num_classes)),
        plot.plot_implied_prior(adjuster),
        plot.plot_boundaries(adjuster, [order[0], order[1], order[-1]]),
    ):
        figure = saved(drawn)
        width, height = figure.get_size_inches()
        left, bottom, right, top = figure.get_tightbbox().extents
        assert min(left, bottom, width - right, height - top) > -0.01, drawn
        for axes in figure.axes if num_experts < 10 else []:  # more groups are numbered more closely
            for texts in (axes.texts, axes.get_xticklabels()):
                boxes = [text.get_window_extent().padded(-1) for text in texts if text.get_text()]
                # matplotlib keeps ticks beyond the axes, which it does not draw.
                boxes = [box for box in boxes if axes.bbox.x0 - 9 < (box.x0 + box.x1) / 2 < axes.bbox.x1 + 9]
                overlaps = [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
                assert not overlaps, [text.get_text() for text in texts]


def test_the_ticks_of_narrow_axes_fit():
    left, right = Figure(figsize=(9, 3.5), layout="constrained").subplots(1, 2)
    for axes, num_classes in ((left, 20), (right, 8142)):
        plot.plot_implied_prior(adjuster_of(num_classes, 3), ax=axes)
    saved(left)
    for axes in (left, right):
        boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_groups_of_ones_own_that_are_scattered():
    counts = counts_of(1000)
    grouper = ClassGrouper.from_groups(counts, [j % 3 for j in range(1000)])
    axes = plot.plot_groups(grouper)
    assert len(axes.patches) == 4  # an area a group and the curve, no stripes
    saved(plot.plot_margins(CLALogitAdjuster(grouper), 5))


#: Classes 0 and 5 are masked; class 3 is a background, or none is.
SOME = [0, 500, 40, 9_000, 40, 0, 3]


def grouper_of_some(background):
    return ClassGrouper(SOME, 2, zero_counts="mask", background=background)


@pytest.mark.parametrize("background", [None, 3, 6])
def test_pictures_of_masked_classes_and_a_background(background):
    """Masked classes are in none of them; a background is in no group."""
    grouper = grouper_of_some(background)
    adjuster = CLALogitAdjuster(grouper)
    order = [3, 1, 2, 4, 6]
    drawn = {
        "groups": plot.plot_groups(grouper),
        "table": plot.plot_table(adjuster),
        "prior": plot.plot_implied_prior(adjuster),
        "margins": plot.plot_margins(adjuster, 2),
        "boundaries": plot.plot_boundaries(adjuster, order),
    }
    for name, picture in drawn.items():
        saved(picture)
        if name in ("groups", "table", "prior"):
            assert [text.get_text() for text in picture.get_xticklabels()] == [str(j) for j in order]
    for k, name in enumerate(expert_names(3)):
        np.testing.assert_array_equal(ydata(drawn["table"])[name], adjuster.table[k, order])
        rivals = [j for j in order if j != 2]
        expected = adjuster.margin(torch.tensor([2]))[0, k, rivals]
        np.testing.assert_array_equal(ydata(drawn["margins"])[name], expected)
    priors = ydata(drawn["prior"])
    np.testing.assert_allclose(priors["fused experts"], adjuster.implied_prior()[order])
    np.testing.assert_allclose(priors["uniform"], [1 / 5] * 5)


@pytest.mark.parametrize("background", [None, 3, 6])
def test_bars_of_masked_classes_and_a_background(background):
    grouper, order = grouper_of_some(background), [3, 1, 2, 4, 6]
    axes = plot.plot_groups(grouper)
    *areas, curve = [area for area in axes.patches if hasattr(area, "get_data")]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    for g in range(2):
        own = [SOME[j] if grouper.group_index[j] == g and j != background else 0 for j in order]
        np.testing.assert_array_equal(np.nan_to_num(areas[g].get_data().values), own)
        assert f"{sum(own):,} samples" in texts[g]
    np.testing.assert_array_equal(curve.get_data().values, [SOME[j] for j in order])
    assert 0 < axes.get_ylim()[0] < 3
    assert texts[2:] == ([] if background is None else [f"background\n{SOME[background]:,} samples"])


@pytest.mark.parametrize("target_class", [0, 1, 17, 19])
def test_cases_of_eq_6_hold_beside_a_background(target_class):
    """Class 1 is it; where a sample is of it, its own group and the global expert have no case."""
    counts = [900 - 45 * j for j in range(20)]
    counts[1] = 300
    adjuster = CLALogitAdjuster(ClassGrouper(counts, 3, background=1))
    axes = plot.plot_margins(adjuster, target_class)
    cases = {int(text.get_text()[5:]): text.xy for text in axes.texts if "case" in text.get_text()}
    tau, largest, own = float(adjuster.tau), 900, counts[target_class]
    values = {
        1: lambda n: math.log(n / own),
        2: lambda n: math.log(largest / own),
        3: lambda n: math.log(n / largest),
        4: lambda n: 0.0,
        5: lambda n: tau * math.log(n / own),
    }
    assert cases.keys() == ({3, 4} if target_class == 1 else values.keys())
    for case, (n, margin) in cases.items():
        assert margin == pytest.approx(values[case](n), abs=1e-12), case


@pytest.mark.parametrize("background", [None, 3, 6])
def test_pictures_from_outputs_take_masked_classes_and_a_background(background):
    logits, target = torch.eye(7).expand(3, 7, 7).transpose(0, 1), torch.arange(7)
    saved(plot.plot_fusion_sweep(logits, target, SOME))
    saved(plot.plot_angles(torch.rand(7, 3), target, grouper_of_some(background)))


def test_weight_norms_of_classes_without_samples():
    weight = torch.arange(1.0, 8)[:, None].expand(2, 7, 1)
    axes = plot.plot_weight_norms(weight, SOME)
    saved(axes)
    assert ydata(axes)["local expert 1"].tolist() == [4, 2, 3, 5, 7, 1, 6]


def test_one_class():
    grouper = ClassGrouper([7], 1)
    saved(plot.plot_groups(grouper))
    saved(plot.plot_table(CLALogitAdjuster(grouper)))
    saved(plot.plot_implied_prior(CLALogitAdjuster(grouper)))


def test_equal_and_fractional_counts():
    for count in (0.5, 7):
        adjuster = CLALogitAdjuster(ClassGrouper([count] * 3, 2))
        for axes in (
            plot.plot_groups(adjuster.grouper),
            plot.plot_table(adjuster),
            plot.plot_margins(adjuster, 0),
        ):
            saved(axes)
        saved(plot.plot_boundaries(adjuster, [0, 1, 2]))


def test_all_is_sorted():
    assert plot.__all__ == sorted(plot.__all__)
    for name in plot.__all__:
        assert "Source: " in getattr(plot, name).__doc__
        assert "Example:" in getattr(plot, name).__doc__


def run(code):
    """What the code prints where no backend is chosen by the environment, as conftest.py does."""
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_pyplot_is_left_alone():
    """Nothing imports pyplot or chooses a backend; a picture can be saved all the same."""
    code = """
import io, sys
from lgla_losses import ClassGrouper, CLALogitAdjuster, plot
import matplotlib
adjuster = CLALogitAdjuster(ClassGrouper([9, 3, 1], 2))
plot.plot_groups(adjuster.grouper).figure.savefig(io.BytesIO())
plot.plot_boundaries(adjuster, [0, 1]).savefig(io.BytesIO())
print("matplotlib.pyplot" in sys.modules, matplotlib.rcParams._get_backend_or_none())
"""
    assert run(code).split() == ["False", "None"]


def test_without_matplotlib_the_error_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = None
import lgla_losses
try:
    import lgla_losses.plot
except ImportError as error:
    print(error)
"""
    assert "pip install matplotlib" in run(code)
