"""What the prose of the docs is held to: the committed records of the paper's experiments."""

import json

from scripts import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def record(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def mean(name, split="balanced"):
    """Accuracy (%) over the seeds, after the last epoch."""
    return record(f"paper/{name}")["summary"]["final"][split]["mean"]


def by_seed(name):
    return [100 * run["final"]["scores"]["ensemble"]["balanced"] for run in record(f"paper/{name}")["runs"]]


def gains(name, over):
    """In pairs of the same seed."""
    return [a - b for a, b in zip(by_seed(name), by_seed(over), strict=True)]


def check_said(found, *numbers):
    """To one place; a half may go either way."""
    assert len(found) == len(numbers), found
    assert all(abs(a - b) < 0.0501 for a, b in zip(found, numbers, strict=True)), found
