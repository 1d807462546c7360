"""The benchmark of methods: a miniature of it, and networks side by side."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
MODULES = ("methods", "methods_tables", "side_by_side", "trials", "prediction", "real_data", "prior_shift")


@pytest.fixture
def script(monkeypatch):
    """The benchmark, with data sets that are made up: features with a natural tail, and images."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import methods
    import real_data

    def pool(size, shape, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), size, True, generator=generator)
        inputs = torch.randn(size, *shape, generator=generator)
        inputs.view(size, -1)[torch.arange(size), labels] += 3
        return real_data.Pool(inputs, labels.numpy())

    sets = {
        "features": real_data.DataSet(lambda _: (pool(150, (8,), 0), None), None, batch=16),
        "images": real_data.DataSet(
            lambda _: (pool(200, (3, 16, 16), 1), pool(60, (3, 16, 16), 2)), 40, imbalance=4.0, batch=16
        ),
    }
    for module in (methods, real_data):
        monkeypatch.setattr(module, "DATA_SETS", sets)
    monkeypatch.setattr(methods, "SETS", tuple(sets))
    monkeypatch.setattr(methods, "EPOCHS", 1)
    monkeypatch.setattr(methods, "BUDGETS", (("cosine", 1), ("linear", 1)))
    monkeypatch.setattr(methods, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(
        methods, "costs", lambda: [cost(methods, name) for g in methods.GROUPS.values() for name in g.methods]
    )
    yield methods
    for name in MODULES:
        sys.modules.pop(name, None)


class InThisProcess:
    """Has the interface of a pool of processes, in which what is made up here is known."""

    def __init__(self, *_):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def cost(methods, name):
    return {
        "method": name,
        "parameters": 10,
        "training_ms": [1.0, 2.0, 3.0],
        "prediction_ms": [1.0, 1.0, 1.0],
    }


def test_units_that_are_kept_are_not_repeated_and_tables_and_picture_are_made(
    script, tmp_path, capsys, monkeypatch
):
    units, output, picture = tmp_path / "units", tmp_path / "record.json", tmp_path / "picture.png"
    options = [str(tmp_path), "--units", str(units), "--output", str(output), "--seeds", "1"]
    script.main([*options, "--minutes", "-1"])
    assert list(units.iterdir()) == []
    assert "left for later" in capsys.readouterr().out
    assert json.loads(output.read_text())["rows"] == []

    script.main([*options, "--picture", str(picture)])
    rows = json.loads(output.read_text())["rows"]
    number = len(script.GROUPS) * len(script.BUDGETS) * 2
    kept = {path: path.stat().st_mtime_ns for path in units.iterdir()}
    assert len(kept) == number
    assert {row["method"] for row in rows} >= {"LGLA", "SADE, aggregated", "softmax, cRT", "NCL", "RIDE"}
    assert {row["head"] for row in rows if "tau-normalised" in row["method"]} == {"linear"}
    assert picture.stat().st_size > 10_000

    capsys.readouterr()
    script.main(options)
    assert json.loads(output.read_text())["rows"] == rows
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    plain = [
        row["plain"][0]
        for row in rows
        if (row["method"], row["head"], row["times"]) == ("balanced softmax x3", "cosine", 1)
    ]
    assert f"\n| balanced softmax x3 | {statistics.mean(plain):.1f} |  | " in capsys.readouterr().out

    # A part is told as far as it goes.
    for path in units.glob("more_images_linear_*"):
        path.unlink()
    script.main([*options, "--minutes", "-1"])
    linear = capsys.readouterr().out.partition("linear heads, 1 epochs")[2].partition("\n\ncost")[0]
    assert "| LGLA |" in linear
    assert "| SADE |" not in linear

    # What is trained in another way is another unit.
    monkeypatch.setattr(script, "EPOCHS", 2)
    unit = script.Unit("one", "features", "cosine", 1, 1)
    assert not (units / unit.file).exists()


def test_a_method_has_the_colour_of_its_family_in_every_picture(script):
    from methods_tables import color

    from lgla_losses.plot.style import METHODS

    families = {
        "softmax": ["softmax", "softmax x3", "softmax, cRT"],
        "balanced softmax": ["balanced softmax", "balanced softmax x3, twice the loss"],
        "LGLA": ["LGLA", "LGLA, input dropout", "CLA"],
    }
    for family, names in families.items():
        assert {color(name) for name in names} == {METHODS[family]}
    assert {color(name) for name in ("class-balanced", "logit adjustment x3, tau = 1.5", "NCL")} == {"black"}


def test_networks_side_by_side_are_what_each_is_alone(script):
    """In a group or alone a method gives the same network."""
    from real_data import split_of
    from side_by_side import Group, train

    methods = {
        "softmax": script.GROUPS["one"].methods["softmax"],
        "LDAM": script.GROUPS["LDAM"].methods["LDAM-DRW"],
    }
    for data in ("features", "images"):
        split = split_of(data, Path(), seed=0)
        for head in ("cosine", "linear"):
            together, _ = train(split, Group(methods, 1), head, seed=3, epochs=2, batch=16)
            outputs = together(split.test_inputs)
            for output, (name, method) in zip(outputs, methods.items(), strict=True):
                alone, _ = train(split, Group({name: method}, 1), head, seed=3, epochs=2, batch=16)
                torch.testing.assert_close(
                    output.logits, alone(split.test_inputs)[0].logits, rtol=1e-3, atol=1e-3
                )


def test_a_network_is_the_librarys_experts_on_a_trunk(script):
    from side_by_side import FEATURES, HIDDEN, SideBySide

    from lgla_losses import GroupConvExperts

    torch.manual_seed(0)
    inputs = torch.randn(5, 8)
    network = SideBySide(2, 3, inputs, 4, "cosine").eval()
    index = 1
    trunk = nn.Linear(8, HIDDEN)
    trunk.load_state_dict({"weight": network.trunk.weight[index], "bias": network.trunk.bias[index]})
    experts = GroupConvExperts(
        lambda: nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.ReLU()), 3, 4, num_features=FEATURES
    ).eval()
    stages = (
        network.stages.weight[index].view(3, FEATURES, HIDDEN),
        network.stages.bias[index].view(3, FEATURES),
    )
    parameters = dict(experts.named_parameters())
    with torch.no_grad():
        for value in (*stages, network.heads.weight.view(2, 3, 4, FEATURES)[index]):
            (name,) = (
                n for n, p in parameters.items() if p.numel() == value.numel() and p.dim() == value.dim()
            )
            parameters.pop(name).view(value.shape).copy_(value)
        expected = experts(trunk(inputs).relu())
        got = network(inputs)[index]
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.features, expected.features)


def test_the_gradient_of_every_network_is_clipped_by_its_own_norm(script):
    from side_by_side import SideBySide

    torch.manual_seed(0)
    network = SideBySide(2, 1, torch.randn(4, 8), 3, "linear")
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
        parameter.grad.view(2, -1)[1] *= 1e-4
    before = [p.grad.view(2, -1).clone() for p in network.parameters()]
    network.clip(1.0)
    after = [p.grad.view(2, -1) for p in network.parameters()]
    assert torch.cat([g[0] for g in after]).norm().item() == pytest.approx(1.0, rel=1e-4)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(before, after, strict=True))


def test_mixup_mixes_inputs_and_classes_by_the_same_share(script):
    from side_by_side import mixed

    inputs, target = torch.eye(6), torch.arange(6) % 3
    got, probabilities = mixed(inputs, target, 3, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(got.sum(1), torch.ones(6))
    torch.testing.assert_close(probabilities, got @ F.one_hot(target, 3).float())
    again, _ = mixed(inputs, target, 3, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(got, again)


def test_scores_are_means_over_classes_and_over_thirds_of_them(script):
    counts = torch.tensor([5, 50, 500])  # the frequent class is the last
    target = torch.tensor([2, 2, 2, 2, 1, 1, 0])
    predicted = torch.tensor([2, 2, 2, 0, 1, 0, 1])
    probabilities = 0.7 * F.one_hot(predicted, 3).double() + 0.1
    accuracy, head, middle, tail, nll, ece = script.scores_of(probabilities, target, counts)
    assert (head, middle, tail) == pytest.approx((75, 50, 0))
    assert accuracy == pytest.approx(125 / 3)
    of_right, of_wrong = -torch.tensor([0.8, 0.1]).double().log()
    assert nll == pytest.approx(float((1.25 * of_right + 1.75 * of_wrong) / 3))
    assert ece == pytest.approx(100 * (0.8 - 1.25 / 3))


def test_a_gain_is_a_mean_of_pairs_with_the_error_of_the_mean_over_the_data_sets(script):
    from methods_tables import Results, told

    def row(method, data, seed, accuracy):
        scores = [accuracy, 0, 0, 0, 0, 0]
        return {"head": "cosine", "times": 1, "method": method, "data": data, "seed": seed, "plain": scores}

    # The seeds differ by much, the methods by 1 and 3 points, and by 2 twice.
    values = {("a", 1): (10, 11), ("a", 2): (50, 53), ("b", 1): (30, 32), ("b", 2): (70, 72)}
    rows = [
        row(method, data, seed, accuracy)
        for (data, seed), pair in values.items()
        for method, accuracy in zip(("balanced softmax x3", "other"), pair, strict=True)
    ]
    # Seeds of one method alone are no pairs.
    rows += [row("other", "a", 3, 100), row("balanced softmax x3", "a", 4, 0), row("alone", "a", 1, 0)]
    results = Results({"rows": rows, "costs": []})
    # Variances of the means: 2 / 2 of a, 0 of b; the mean of both has a quarter of their sum.
    assert results.gain(("cosine", 1), "other", "plain") == pytest.approx((2.0, 0.5))
    assert results.gain(("cosine", 1), "other", "plain", sets=["a"]) == pytest.approx((2.0, 1.0))
    assert results.compared(("cosine", 1)) == ["balanced softmax x3", "other"]
    assert told((2.0, 0.5)) == "+2.00\u00a0±\u00a00.50"


def test_every_method_has_a_cost(script, monkeypatch):
    monkeypatch.undo()
    names = [name for group in script.GROUPS.values() for name in group.methods]
    for cost, name in zip(script.costs(repeats=2), names, strict=True):
        assert cost["method"] == name
        for what in ("training_ms", "prediction_ms"):
            low, median, high = cost[what]
            assert 0 < low <= median <= high


def test_a_rule_finds_temperature_and_prior_and_no_more(script):
    """Logits twice too large that hold the training prior, beside a term that says nothing."""
    from trials import fitted

    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([800.0, 150.0, 50.0])
    log_prior = (counts / counts.sum()).log()

    def draw(number, prior):
        target = torch.multinomial(prior, number, True, generator=generator)
        likelihood = (torch.eye(3)[target] * 2 + torch.randn(number, 3, generator=generator)) * 2
        noise = torch.randn(number, 3, generator=generator)
        return torch.stack(
            [2 * (likelihood + log_prior), counts.log().expand(number, 3), noise], dim=1
        ), target

    validation, target = draw(20_000, counts / counts.sum())
    test, expected = draw(20_000, torch.ones(3) / 3)
    logits = fitted(validation, target, test, counts)
    likelihood = test[:, 0] / 2 - log_prior
    best = (likelihood.argmax(1) == expected).double().mean()
    assert (logits.argmax(1) == expected).double().mean() > best - 0.01
    assert (test[:, 0].argmax(1) == expected).double().mean() < best - 0.05
    centred = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(
        centred, (likelihood - likelihood.mean(1, keepdim=True)).double(), atol=0.5, rtol=0.1
    )


def test_trials_are_made_and_told(script, monkeypatch, tmp_path, capsys):
    import trials

    monkeypatch.setattr(trials, "SETS", ("features",))
    monkeypatch.setattr(trials, "DATA_SETS", script.DATA_SETS)
    output = tmp_path / "record.json"
    trials.main([str(tmp_path), "--units", str(tmp_path / "units"), "--output", str(output), "--seeds", "1"])
    rows = json.loads(output.read_text())["rows"]
    names = {row["method"] for row in rows}
    assert names >= {"LGLA, rising tau", "LGLA, mixup 1", "LGLA: own group's expert", "LGLA, distilled"}
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names if name != "balanced softmax x3")


def test_the_page_says_what_the_records_hold(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from methods_tables import BUDGETS, Results
    from trials import SETS as TRIED

    results = Results(json.loads((BENCHMARKS / "results" / "methods.json").read_text(encoding="utf-8")))
    page = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    cosine, linear, long = BUDGETS
    three, one = "balanced softmax x3", "balanced softmax"

    def gain(method, over=three, budget=cosine, way="plain", sets=()):
        return results.gain(budget, method, way, over, sets)[0]

    def mean(method, score, way, budget=long):
        return results.mean(budget, method, score, way)

    by_budget = [gain(one, "softmax", budget) for budget in (cosine, linear)]
    assert (
        "gains {:.1f} over softmax with cosine heads and {:.1f} with linear ones".format(*by_budget) in page
    )
    singles = [
        "focal",
        "class-balanced",
        "VS",
        "LDAM-DRW",
        *(m for m in results.methods if "softmax, " in m[:9]),
    ]
    assert (
        "LDAM-DRW is level ({:.1f} ± {:.1f})".format(*results.gain(linear, "LDAM-DRW", "plain", one)) in page
    )
    assert all(sum(results.gain(linear, m, "plain", one)) < 0 for m in singles if m != "LDAM-DRW")
    assert f"With cosine heads LDAM-DRW is {gain('LDAM-DRW', one):.1f} ahead" in page
    focal = [gain("focal", "softmax", budget) for budget in (cosine, linear, long)]
    assert f"gains at most {max(focal[:2]):.1f} over softmax for 8 epochs and loses {-focal[2]:.1f}" in page
    assert max(gain("class-balanced", one, budget) for budget in BUDGETS) < -0.8
    behind = [-gain("softmax, logit adjustment", one, budget) for budget in (cosine, linear)]
    assert (
        "within {:.1f} of balanced softmax with cosine heads and {:.1f} with linear".format(*behind) in page
    )
    assert f"With cosine heads they gain {gain(three, one):.1f} over one model" in page
    assert "they gain nothing: {:.1f} ± {:.1f}".format(*results.gain(linear, three, "plain", one)) in page
    better = [
        name
        for name in results.sets
        if results.mean(cosine, three, "accuracy", "plain", name)
        > results.mean(linear, one, "accuracy", "plain", name) + 0.5
    ]
    assert better == ["small CIFAR-10"]
    level = ["LGLA", "CLA", "logit adjustment x3, tau = 1.5", "SADE", "softmax x3"]
    largest = max(abs(gain(method, way="calibrated")) for method in level)
    assert f"are within {math.ceil(10 * largest) / 10} of balanced softmax" in page
    for method, name in (
        ("RIDE", "RIDE"),
        ("NCL", "NCL"),
        (f"{three}, twice the loss", "with the loss doubled"),
    ):
        assert "{} ({:.1f} ± {:.1f})".format(name, *results.gain(cosine, method, "calibrated")) in page
    for method in ("softmax x3", "RIDE", "SADE"):
        mean_gain, error = results.gain(linear, method, "calibrated")
        assert mean_gain < -2 * error
    longer = results.gain(long, "LGLA", "plain")
    assert "For 32 epochs LGLA gains {:.1f} ± {:.1f} over balanced softmax".format(*longer) in page
    assert f"SADE {gain('SADE', budget=long):.1f} and CLA {gain('CLA', budget=long):.1f}" in page
    assert f"For 8 epochs LGLA gains nothing, and SADE loses {-gain('SADE'):.1f}" in page
    assert abs(gain("LGLA")) < 0.1
    assert f"without calibration it gains {longer[0]:.1f} points in long training" in page
    assert max(abs(gain("LGLA", budget=budget, way="calibrated")) for budget in (cosine, long)) < 0.15
    assert max(abs(gain(m, budget=long, way="calibrated")) for m in level) < 0.15
    dropout = {name: f"{name}, input dropout" for name in (three, "LGLA")}
    low, high = (gain(own, name, long, "calibrated") for name, own in dropout.items())
    assert f"it gains {low:.1f} for balanced softmax and {high:.1f} for LGLA: more than any loss" in page
    losses = [m for m in results.compared(long) if m not in dropout.values()]
    assert max(gain(method, budget=long, way="calibrated") for method in losses) < low
    assert max(gain(own, name, way="calibrated") for name, own in dropout.items()) < -0.5
    for name, own in dropout.items():
        ahead = [d for d in results.sets if gain(own, name, long, "calibrated", [d]) > 0]
        assert ahead == [d for d in results.sets if d != "small CIFAR-10"]
        assert gain(own, name, long, "calibrated", ["small CIFAR-10"]) < -1
    rest = [name for name in results.sets if name not in TRIED]
    assert len(rest) == 3
    untried = gain(dropout[three], budget=long, way="calibrated", sets=rest)
    assert f"loses on CIFAR-10, {untried:.1f} in the mean for 32 epochs" in page
    for method in set(results.methods) - {three}:
        budgets = [budget for budget in BUDGETS if method in results.compared(budget)]
        assert (
            min(gain(method, budget=b, way="calibrated", sets=[d]) for b in budgets for d in results.sets) < 0
        )
    tried = Results(json.loads((BENCHMARKS / "results" / "trials.json").read_text(encoding="utf-8")))

    def best(*names):
        trials = [f"{base}{name}" for base in (three, "LGLA") for name in names]
        known = [trial for trial in trials if trial in tried.methods]
        return max(tried.gain(budget, trial, "calibrated")[0] for budget in (cosine, long) for trial in known)

    assert (
        best(": a weight for each expert", ": own group's expert", ": agreement")
        < best(": shift alone") + 0.05
    )
    assert round(best(", distilled", ", drawn apart", ", rising tau"), 1) == 0.2
    assert best(", hard classes") < best(", twice the loss") > best(", four times the loss")
    nll, ece = ([mean(three, score, way) for way in ("plain", "calibrated")] for score in ("nll", "ece"))
    assert "from {:.1f} to {:.1f} and their calibration error".format(*nll) in page
    assert "calibration error from {:.0f} % to {:.0f} %".format(*ece) in page
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"balanced softmax gains {by_budget[0]:.1f} points of balanced accuracy over softmax" in readme
    assert f"three experts with cosine heads {gain(three, one):.1f} more" in readme
    assert f"LGLA gains {longer[0]:.1f} over balanced softmax for 32 epochs" in readme
    assert f"gains {low:.1f} to {high:.1f} there, more than any loss, and loses on CIFAR-10" in readme
    assert {row["seed"] for row in results.rows.values()} == {1, 2, 3, 4, 5}
