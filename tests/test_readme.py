"""README: its example runs as shown, its commands exist, its figures are those of the records."""

import json
import re

import report
import torch
from scripts import ROOT

README = (ROOT / "README.md").read_text()


def test_the_drop_in_example_runs_and_learns():
    example, own_heads, backbone, monitored, over_ranks, unknown_prior, many_classes = re.findall(
        r"```python\n(.*?)```", README, re.DOTALL
    )
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert (names["prediction"] == names["labels"]).double().mean() > 0.5
    assert names["prediction"].shape == torch.Size([143])
    exec(compile(own_heads, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert names["prediction"].shape == torch.Size([16])
    exec(compile(backbone, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert names["output"].features.shape == torch.Size([2, 3, 2048])
    exec(compile(monitored, "README.md", "exec"), names)
    exec(compile(over_ranks, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    section = README.partition("## In Lightning")[2].partition("\n## ")[0]
    named = re.findall(r"\(`(\w+/[^`]+)`\)", section)
    assert len(named) == 3
    assert set(named) <= set(names["scalars"])
    exec(compile(unknown_prior, "README.md", "exec"), names)
    assert names["train_index"].shape == torch.Size([10_847])
    assert names["metric"].compute().keys() == {"all", "many", "medium", "few"}
    exec(compile(many_classes, "README.md", "exec"), names)
    assert names["weight"].grad.isfinite().all()
    assert len([line for line in backbone.splitlines() if line.strip()]) <= 10
    assert len([line for line in example.splitlines() if line.strip() and line[0] != "#"]) <= 20


def test_every_make_command_is_a_target():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(
        r"(?:^|`)make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert {"demo", "test"} <= set(commands)
    assert set(commands) <= set(targets)


def test_links_lead_to_files():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_demos_table_is_the_recorded_one():
    assert (ROOT / "benchmarks" / "results" / "quickstart_cpu.txt").read_text().strip() in README


def test_the_cost_of_the_layouts_is_the_recorded_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "expert_layouts_cpu.json").read_text())
    for row in record["rows"]:
        low, median, high = (f"{rate:.1f}" for rate in row["images_per_second_quartiles"])
        cells = (row["network"], row["batch"], row["layout"], f"{median} ({low} to {high})")
        assert f"| {' | '.join(map(str, cells))} | {row['peak_mib_median']:.0f} |" in README


def test_the_cost_of_the_losses_is_the_recorded_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "losses_cpu.json").read_text())
    tables = {title: text for title, text in report.markdown(record).items() if title.split(", ")[0] in (
        "logits: forward + backward", "linear: forward + backward",
        "logits: peak memory of forward + backward", "linear: peak memory of forward + backward",
    )}  # fmt: skip
    assert len(tables) == 4
    assert all(text in README for text in tables.values())


def test_the_accuracies_of_the_training_scripts_are_the_recorded_ones():
    record = json.loads((ROOT / "benchmarks" / "results" / "examples_cpu.json").read_text())
    for run in record["runs"]:
        scores = run["final"]["scores"]["ensemble"]
        cells = [f"{100 * scores[column]:.1f}" for column in ("balanced", "many", "medium", "few")]
        assert f"| {run['data']} | {run['method']} | {' | '.join(cells)} |" in README
