"""The record of the learning rate: what it says, and that it grows a run at a time."""

import json
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
    options = ["--settings", "MLP, SGD 0.1, 30 epochs", "--methods", "LGLA", "--output", str(path)]
    script.main([*options, "--seeds", "1"])
    first = json.loads(path.read_text())["runs"]
    script.main([*options, "--seeds", "2"])
    runs = json.loads(path.read_text())["runs"]
    assert runs[:1] == first
    assert [run["seed"] for run in runs] == [1, 2]
    assert "| MLP, SGD 0.1, 30 epochs | LGLA | 2 |" in capsys.readouterr().out


def test_a_record_of_other_settings_is_not_shown_as_an_empty_table(script):
    run = {"setting": "MLP, SGD 1", "method": "LGLA", "seed": 1, "balanced_accuracy": 50.0}
    with pytest.raises(KeyError, match="MLP, SGD 1"):
        script.markdown({"runs": [run]})
