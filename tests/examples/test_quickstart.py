"""The demo: what a newcomer runs first."""

import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from scripts import ROOT, load

from lgla_losses.plot.style import COLORS, METHODS


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_a_table_and_a_picture_without_a_terminal(tmp_path):
    picture = tmp_path / "picture.png"
    result = run("--seeds", "2", "--epochs", "1", "--imbalance", "20", "--output", str(picture))
    assert result.returncode == 0, result.stderr
    for method in ("Softmax", "BALMS x1", "Softmax x3", "BALMS x3", "CLA", "LGLA"):
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"│ {method} "))
        assert row.count("±") == 5
    assert max(map(len, result.stdout.splitlines())) <= max(80, len(f"picture: {picture}"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "100%" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected a number from 1 on, got 0"),
        (["--imbalance", "0.5"], "--imbalance: expected a number from 1 on, got 0.5"),
        (["--imbalance", "nan"], "--imbalance: expected a number from 1 on, got nan"),
        (["--output", "/nowhere/at/all.png"], "no folder /nowhere/at"),
        (["--output", "picture.xyz"], "expected a .png"),
        (["--device", "meta"], "--device meta: "),
        (["--device", "abacus"], "--device abacus: "),
        (["--device", "cuda:99"], "--device cuda:99: "),
    ],
)
def test_wrong_arguments_end_before_any_training(arguments, message, capsys):
    quickstart = load("examples/quickstart.py")
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_argument_ends_the_script_without_a_traceback():
    result = run("--seeds", "0")
    assert result.returncode == 2
    assert "--seeds: expected a number from 1 on, got 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_caller_of_main_keeps_its_threads(tmp_path, monkeypatch):
    quickstart = load("examples/quickstart.py")
    monkeypatch.setattr(
        quickstart, "train", lambda method, *_: torch.ones(1 + quickstart.METHODS[method][0], 10)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quickstart.main(["--seeds", "1", "--output", str(tmp_path / "picture.png")])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_its_picture_has_the_colours_of_all_pictures():
    """A method and an expert have a colour; the global expert and the ensemble, both black, look apart."""
    quickstart = load("examples/quickstart.py")
    accuracy = {name: torch.rand(2, 1 + experts, 10) for name, (experts, _) in quickstart.METHODS.items()}
    methods, experts = Figure().subplots(1, 2)
    quickstart.draw_methods(methods, accuracy, quickstart.digit_counts(50.0))
    colors = [bars.lines[0].get_color() for bars in methods.containers]
    softmax, balanced, lgla = METHODS.values()
    assert colors == 2 * [softmax, balanced, softmax, balanced, lgla, lgla]
    quickstart.draw_experts(experts, accuracy["LGLA"])
    lines = [bars.lines[0] for bars in experts.containers]
    assert [line.get_color() for line in lines] == [*COLORS[:2], "black", "black"]
    assert lines[2].get_markerfacecolor() == "white" != lines[3].get_markerfacecolor()
    assert lines[2].get_linewidth() < lines[3].get_linewidth()


@pytest.mark.slow
def test_lgla_gains_on_the_rarest_classes(device):
    """What the demo is there to show, on seeds that its table does not use."""
    quickstart = load("examples/quickstart.py")
    counts = quickstart.digit_counts(50.0)
    assert (counts[0], counts[-1]) == (150, 3)
    scores = {"Softmax": [], "LGLA": []}
    for seed in (100, 101, 102):
        split = quickstart.long_tailed_digits(50.0, seed, device)
        for method, results in scores.items():
            torch.manual_seed(seed)
            per_class = quickstart.train(method, split, counts, 50, lambda: None)
            assert per_class.shape == (1 + quickstart.METHODS[method][0], 10)
            results.append(per_class[0])
    gain = torch.stack(scores["LGLA"]).mean(0) - torch.stack(scores["Softmax"]).mean(0)
    assert gain.mean() > 0.04
    assert gain[-3:].mean() > 0.12
