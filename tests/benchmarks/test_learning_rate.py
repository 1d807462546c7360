"""The record of the learning rate: what it says, and that it grows a run at a time."""

import json
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import learning_rate

    yield learning_rate
    sys.modules.pop("learning_rate")


def test_a_run_that_the_record_has_is_not_repeated(script, tmp_path, capsys):
    path = tmp_path / "record.json"
    options = ["--settings", "MLP, SGD 0.1", "--methods", "LGLA", "--output", str(path)]
    script.main([*options, "--seeds", "1"])
    first = json.loads(path.read_text())["runs"]
    script.main([*options, "--seeds", "2"])
    runs = json.loads(path.read_text())["runs"]
    assert runs[:1] == first
    assert [run["seed"] for run in runs] == [0, 1]
    assert "| MLP, SGD 0.1 | LGLA | 2 |" in capsys.readouterr().out


def scores_of(setting):
    """Balanced accuracies by method."""
    runs = json.loads((BENCHMARKS / "results" / "learning_rate_cpu.json").read_text())["runs"]
    scores = {}
    for run in runs:
        if run["setting"] == setting:
            scores.setdefault(run["method"], []).append(run["balanced_accuracy"])
    return scores


def test_the_page_tells_what_the_bounded_gradient_is_worth():
    gains = [
        statistics.mean(scores["LGLA"]) - statistics.mean(scores["LGLA, exact gradient"])
        for scores in map(scores_of, ("MLP, SGD 0.1", "ResNet, SGD 0.1"))
    ]
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"the bounded gradient is worth {gains[0]:.0f} and {gains[1]:.0f} points" in page


@pytest.mark.parametrize("setting", ["MLP, SGD 0.1", "ResNet, SGD 0.1"])
def test_lgla_beats_one_models_balanced_softmax_at_the_usual_rate_in_the_record(setting):
    scores = scores_of(setting)
    assert all(len(scores[name]) >= 5 for name in ("LGLA", "balanced softmax, one model"))
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    assert mean["LGLA"] > mean["balanced softmax, one model"] + 2
    assert mean["LGLA"] > max(mean[name] for name in mean if name.startswith("LGLA, exact")) - 2
