"""Tables and picture of the record of methods.py, of which docs/methods.md is made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import grid

Record = dict[str, Any]
Row = dict[str, Any]

#: Heads, and how many times the epochs.
BUDGETS = (("cosine", 1), ("linear", 1), ("cosine", 4))
SCORES = ("accuracy", "head", "middle", "tail", "nll", "ece")
YARDSTICK = "balanced softmax x3"
#: Of the picture: differences below are arrows.
FARTHEST = -4


class Results:
    """The rows of a record: a score by method, data set and seed."""

    def __init__(self, record: Record) -> None:
        self.epochs, self.sizes = record.get("epochs", 0), record.get("sets", [])
        self.costs = {cost["method"]: cost for cost in record["costs"]}
        self.rows = {key(row): row for row in record["rows"]}
        self.sets, self.methods, self.seeds = (
            list(dict.fromkeys(row[what] for row in record["rows"])) for what in ("data", "method", "seed")
        )

    def of(self, budget: tuple[str, int], method: str, data: str, score: str, way: str) -> dict[int, float]:
        """A score by seed; ``way`` is plain or calibrated."""
        keys = {seed: (*budget, method, data, seed) for seed in self.seeds}
        return {s: self.rows[k][way][SCORES.index(score)] for s, k in keys.items() if k in self.rows}

    def mean(
        self, budget: tuple[str, int], method: str, score: str, way: str, data: str | None = None
    ) -> float:
        """A score's mean over seeds, of a data set or of all."""
        sets = self.sets if data is None else [data]
        means = (statistics.mean(self.of(budget, method, name, score, way).values()) for name in sets)
        return statistics.mean(means)

    def gain(
        self,
        budget: tuple[str, int],
        method: str,
        way: str,
        over: str = YARDSTICK,
        sets: Sequence[str] = (),
        score: str = "accuracy",
    ) -> tuple[float, float]:
        """Mean difference from another method over data sets, and its standard error over the seeds."""
        means, variances = [], []
        for name in sets or self.sets:
            mine, other = (self.of(budget, m, name, score, way) for m in (method, over))
            gained = [mine[seed] - other[seed] for seed in mine if seed in other]
            means.append(statistics.mean(gained))
            variances.append(statistics.variance(gained) / len(gained) if len(gained) > 1 else math.nan)
        return statistics.mean(means), math.sqrt(sum(variances)) / len(means)

    def compared(self, budget: tuple[str, int]) -> list[str]:
        """The methods of a budget that share a seed with the yardstick on every data set."""
        found = {
            (method, data)
            for head, times, method, data, seed in self.rows
            if (head, times) == budget and (head, times, YARDSTICK, data, seed) in self.rows
        }
        return [m for m in self.methods if all((m, data) in found for data in self.sets)]


def key(row: Row) -> tuple[str, int, str, str, int]:
    """What a row is of."""
    return row["head"], row["times"], row["method"], row["data"], row["seed"]


def told(difference: tuple[float, float], digits: int = 2) -> str:
    """A difference and its standard error, which no line break divides."""
    mean, error = difference
    return f"{mean:+.{digits}f}\u00a0±\u00a0{error:.{digits}f}"


def sets(results: Results) -> str:
    """The data sets: classes, samples and imbalance."""
    header = ["data", "classes", "training", "calibration", "test", "most frequent", "rarest"]
    return grid(header, (list(size.values()) for size in results.sizes))


def gains(results: Results, budget: tuple[str, int]) -> str:
    """Balanced accuracy, how far it is from the yardstick's, and on how many data sets it is ahead."""
    rows = []
    for method in results.compared(budget):
        cells = [method]
        for way in ("plain", "calibrated"):
            ahead = sum(results.gain(budget, method, way, sets=[name])[0] > 0 for name in results.sets)
            compared = [told(results.gain(budget, method, way)), f"{ahead} of {len(results.sets)}"]
            cells.append(f"{results.mean(budget, method, 'accuracy', way):.1f}")
            cells += compared if method != YARDSTICK else ["", ""]
        rows.append(cells)
    return grid(["method", *("plain", "difference", "ahead"), *("calibrated", "difference", "ahead")], rows)


def by_set(results: Results, budget: tuple[str, int], way: str = "calibrated") -> str:
    """How far the balanced accuracy of every data set is from the yardstick's, whose own it has first."""
    own = [f"{results.mean(budget, YARDSTICK, 'accuracy', way, data):.1f}" for data in results.sets]
    rows = [[YARDSTICK, *own]]
    for method in results.compared(budget):
        if method != YARDSTICK:
            gained = (results.gain(budget, method, way, sets=[data]) for data in results.sets)
            rows.append([method, *map(told, gained)])
    return grid(["method", *results.sets], rows)


def by_region(results: Results, budget: tuple[str, int]) -> str:
    """Accuracy on frequent, middle and rare classes, a third of the classes each: plain → calibrated."""
    rows = [
        [method, *(arrow(results, budget, method, score, 1) for score in ("head", "middle", "tail"))]
        for method in results.compared(budget)
    ]
    return grid(["method", "head", "middle", "tail"], rows)


def quality(results: Results, budget: tuple[str, int]) -> str:
    """Negative log likelihood, and calibration error in percent; classes count alike: plain → calibrated."""
    rows = [
        [method, arrow(results, budget, method, "nll", 2), arrow(results, budget, method, "ece", 1)]
        for method in results.compared(budget)
    ]
    return grid(["method", "NLL", "ECE"], rows)


def arrow(results: Results, budget: tuple[str, int], method: str, score: str, digits: int) -> str:
    """A score's mean, plain and calibrated."""
    return " → ".join(
        f"{results.mean(budget, method, score, way):.{digits}f}" for way in ("plain", "calibrated")
    )


def costs(results: Results) -> str:
    """Time of a training step and of a prediction, medians with quartiles, and parameters."""
    yardstick = results.costs[YARDSTICK]
    rows = []
    for method, cost in results.costs.items():
        cells = [method, f"{cost['parameters']:,}"]
        for what in ("training_ms", "prediction_ms"):
            low, median, high = cost[what]
            cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
            cells.append(f"{median / yardstick[what][1]:.2f}")
        rows.append(cells)
    header = ["method", "parameters", "training step, ms", "relative", "prediction, ms", "relative"]
    return grid(header, rows)


def budget_name(results: Results, budget: tuple[str, int]) -> str:
    """A budget in words."""
    head, times = budget
    return f"{head} heads, {results.epochs * times} epochs"


def all_of(results: Results) -> str:
    """All tables, each below what it is."""
    parts = []
    for budget in BUDGETS:
        if not results.compared(budget):
            continue
        name = budget_name(results, budget)
        parts += [f"{name}: balanced accuracy, difference from {YARDSTICK}", gains(results, budget)]
        for way in ("plain", "calibrated"):
            parts += [f"{name}: difference by data set, {way}", by_set(results, budget, way)]
        parts += [f"{name}: accuracy by frequency of the classes", by_region(results, budget)]
        parts += [f"{name}: quality of the probabilities", quality(results, budget)]
    return "\n\n".join([*parts, "cost", costs(results)])


def color(method: str) -> str:
    """Give the colour of a method's family; methods of other families are black."""
    from lgla_losses.plot.style import METHODS

    colors = METHODS | {"CLA": METHODS["LGLA"]}
    return next((colors[family] for family in colors if method.startswith(family)), "black")


def draw(results: Results, path: Path) -> None:
    """Draw the differences from the yardstick with two standard errors: a panel a budget."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    budgets = [budget for budget in BUDGETS if results.compared(budget)]
    methods = [method for method in results.methods if method != YARDSTICK]
    figure = Figure(figsize=(9, 9.2), layout="constrained")  # its text can be read at 800 pixels
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    for panel, budget in zip(panels, budgets, strict=True):
        compared = results.compared(budget)
        for row, method in enumerate(methods):
            for way, below in (("plain", -0.15), ("calibrated", 0.15)):
                if method in compared:
                    _mark(panel, row + below, results.gain(budget, method, way), method, way)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.grid(axis="y", alpha=0.4)
        panel.set_title(budget_name(results, budget).replace(", ", "\n"), fontsize=11)
    panels[0].set_yticks(range(len(methods)), [method.replace(", ", ",\n", 1) for method in methods])
    panels[0].set(xlim=(FARTHEST - 0.3, 2), ylim=(len(methods) - 0.5, -0.5))
    panels[0].set_xticks(range(FARTHEST, 3, 2))
    looks: dict[str, dict[str, Any]] = {
        "calibrated": {"marker": "o"},
        "plain": {"marker": "o", "mfc": "white"},
        f"more than {-FARTHEST} points behind": {"marker": "<"},
    }
    handles = [
        Line2D([], [], color="black", linestyle="", label=name, **look) for name, look in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel(f"balanced accuracy in points, less that of {YARDSTICK}", fontsize=11)
    figure.savefig(path, dpi=150)


def _mark(panel: Any, place: float, gain: tuple[float, float], method: str, way: str) -> None:
    """Draw a difference with two standard errors; far behind it would squeeze the others, and is an arrow."""
    mean, error = gain
    look = {"color": color(method), "mfc": color(method) if way == "calibrated" else "white", "markersize": 5}
    if mean > FARTHEST:
        panel.errorbar(mean, place, xerr=2 * error, fmt="o", **look)
    else:
        panel.plot(FARTHEST, place, "<", **look)
