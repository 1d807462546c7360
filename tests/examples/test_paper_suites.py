"""examples/paper/suites.toml and train_paper.py --suite: what they run, and what they refuse."""

import json
import shlex
import signal
import sys
import tomllib
from pathlib import Path

import make_data
import paper_recipes
import pytest
import train_paper
from scripts import ROOT

SUITES = tomllib.loads((ROOT / "examples" / "paper" / "suites.toml").read_text())
RECORDS = ROOT / "benchmarks" / "results" / "paper"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["examples/train_paper.py"])


def said(arguments):
    options = train_paper.command_parser().parse_args(arguments)
    return options.recipes, options.set, options.seeds or [0], options.name


@pytest.mark.parametrize("suite", SUITES["suites"])
def test_a_suite_runs_what_make_ran_in_its_loops(suite):
    lines = map(shlex.split, Path(__file__).with_name("paper_commands.txt").read_text().splitlines())
    before = [said(arguments) for name, *arguments in lines if name == suite]
    assert [said(arguments) for arguments in paper_recipes.suite_commands(suite, {})] == before


def test_the_suite_of_a_cpu_makes_the_committed_records():
    """Each of them, and no other, with the settings that it was made with."""
    made = {}
    for arguments in paper_recipes.suite_commands("cpu", {}):
        cell = train_paper.read_cell(train_paper.command_parser(), arguments)
        made[cell.name] = cell.settings
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*_cpu_*.json")}
    assert made.keys() == records.keys()
    for name, record in records.items():
        assert made[name] | record["settings"] == made[name], name


@pytest.mark.parametrize("suite", SUITES["suites"])
def test_every_cell_is_read_and_has_a_record_of_its_own(suite, tmp_path):
    where = ["--runs", str(tmp_path), "--records", str(tmp_path)]
    commands = paper_recipes.suite_commands(suite, {})
    cells = [train_paper.read_cell(train_paper.command_parser(), [*command, *where]) for command in commands]
    assert len({cell.record for cell in cells}) == len(cells)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_commands_that_run_a_cell_each(tmp_path, capsys):
    arguments = ["--suite", "cpu", "--files", "tiny=my images.npz", "--set", "epochs=5", "--seeds", "7"]
    train_paper.main([*arguments, "--records", str(tmp_path), "--dry-run"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 29
    assert {tuple(line[:2]) for line in lines} == {("python", "examples/train_paper.py")}
    options = train_paper.command_parser().parse_args(lines[1][2:])
    assert (options.name, options.seeds, options.records) == ("tiny_cpu_table5_softmax", [7], tmp_path)
    assert options.set == ["data=my images.npz", "amp=bf16", "epochs=5"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "table5"], "--suite: expected one of smoke, cpu, gpu, got table5"),
        (["--suite", "cpu", "examples/paper/gpu.toml"], "--suite: expected no recipes and no --name"),
        (["--suite", "cpu", "--name", "mine"], "--suite: expected no recipes and no --name"),
        (
            ["--suite", "cpu", "--files", "cifar=a.npz"],
            "expected names among digits, cifar10, tiny, got cifar",
        ),
        (["--suite", "cpu", "--files", "cifar10.npz"], "--files: expected NAME=PATH, got cifar10.npz"),
        (["examples/paper/cpu.toml", "--files", "tiny=a.npz"], "--files: expected --suite as well"),
        (["--suite", "cpu", "--set", "epochs=0"], "--epochs: expected a number from 1 to inf, got 0"),
        (["--suite", "cpu", "--seeds", "1", "1"], "--seeds: expected each only once, got 1, 1"),
        (["--suite", "cpu", "--files", "cifar10=nowhere.npz", "tiny=nowhere.npz"], "nowhere.npz"),
    ],
)
def test_what_no_suite_can_run_is_refused_before_training(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_paper.main([*arguments, "--runs", str(tmp_path), "--records", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_a_suite_trains_its_cells_and_goes_on_after_control_c(tmp_path, monkeypatch, capsys):
    """Interrupted in the second cell; the command that it says leaves the first as it is."""
    digits = tmp_path / "digits.npz"
    make_data.main(["digits", str(digits), "--imbalance", "20"])
    monkeypatch.setitem(SUITES["suites"]["smoke"]["runs"][0], "cells", ["table5_softmax", "table5_lgla"])
    monkeypatch.setattr(
        paper_recipes,
        "read_toml",
        lambda path, read=paper_recipes.read_toml: SUITES if path.name == "suites.toml" else read(path),
    )
    small = ["backbone=resnet8", "epochs=1", "warmup_epochs=0", "evaluate_every=1", "workers=0"]
    arguments = ["--suite", "smoke", "--files", f"digits={digits}", "--seeds", "0", "--set", *small]
    arguments += ["--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records")]
    step = train_paper.Trainer._train_step

    def interrupted(trainer, *given):
        if "lgla" in str(trainer.options.log_dir):
            signal.raise_signal(signal.SIGINT)
        return step(trainer, *given)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(train_paper.Trainer, "_train_step", interrupted)
            with pytest.raises(SystemExit) as stopped:
                train_paper.main(arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    first = tmp_path / "runs" / "table5_softmax-cpu" / "seed0" / "result.json"
    trained = first.stat().st_mtime_ns
    assert [path.stem for path in (tmp_path / "records").iterdir()] == ["table5_softmax-cpu"]

    python, script, *to_go_on = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (python, script, to_go_on) == ("python", "examples/train_paper.py", arguments)
    train_paper.main(to_go_on)
    assert first.stat().st_mtime_ns == trained
    record = json.loads((tmp_path / "records" / "table5_lgla-cpu.json").read_text())
    assert record["command"].startswith("python examples/train_paper.py examples/paper/table5_lgla.toml")
