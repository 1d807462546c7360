"""What calibrated prediction gains over the plain mean of three experts, on real long-tailed data.

Trains three experts on every data set, with every loss, head and seed, and keeps the logits of each run in a
folder; a run that is there is not repeated. Every seed draws the training samples, a tenth of them for
validation, and the first weights. The calibration is fitted to that tenth (where these are too few,
to logits of cross-fitting) and scored on the test set, whose classes count alike. No test set chooses
anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import positive, record_file
from measure import made_here
from prior_shift import gains as gains_of_estimate
from real_data import DATA_SETS, Split, split_of
from recording import rounded, write_whole
from tables import grid
from torch import Tensor, nn

from lgla_losses import GroupConvExperts, LGLALoss
from lgla_losses._fitting import class_shares
from lgla_losses._scores import score_sums
from lgla_losses._scores import scores as mean_scores
from lgla_losses.calibration import Calibration, fit
from lgla_losses.label_shift import estimate_prior

RESULTS = Path(__file__).parent / "results"
EXPERTS, FOLDS = 3, 5
LOSSES: dict[str, dict[str, Any]] = {
    "softmax x3": {"adjustment": "softmax", "aaw": False},
    "balanced softmax x3": {"adjustment": "balanced", "aaw": False},
    "LGLA, tau = K - 1": {"tau": EXPERTS - 1.0},
}
HEADS = ("cosine", "linear")
SETS = ("digits", "Fashion-MNIST", "CIFAR-10", "Debian sections", "docstrings", "WordNet topics")
#: Those that the rules of the calibration were not chosen on.
FRESH = ("Fashion-MNIST", "CIFAR-10", "Debian sections", "docstrings")

#: Logits and labels of a network, class counts and the prior of theory.
Run = dict[str, Tensor]
Record = dict[str, Any]


def network(inputs: Tensor) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Trunk and maker of a stage of 128 features: convolutions for images, a linear layer for features."""
    if inputs.dim() == 2:
        trunk = nn.Sequential(nn.Linear(inputs.shape[1], 256), nn.ReLU())
        return trunk, lambda: nn.Sequential(nn.Linear(256, 128), nn.ReLU())
    layers: list[nn.Module] = []
    for narrow, wide in ((3, 24), (24, 48)):
        layers += [nn.Conv2d(narrow, wide, 3, 2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten()), lambda: nn.Sequential(nn.Linear(768, 128), nn.ReLU())


def train(split: Split, loss: dict[str, Any], head: str, seed: int, epochs: int, batch: int) -> Run:
    """Train one ensemble; give its logits of the validation and the test part."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    num_classes = int(split.test_labels.max()) + 1
    # A class whose samples are all held out counts as one.
    counts = torch.bincount(split.labels, minlength=num_classes).clamp_min(1)
    trunk, stage = network(split.inputs)
    gradient, scale = ("bounded", 30.0) if head == "cosine" else ("exact", None)
    experts = GroupConvExperts(
        stage, EXPERTS, num_classes, num_features=128, classifier=head, gradient=gradient
    )
    criterion = LGLALoss(counts, EXPERTS, scale=scale, **loss)
    parameters = [*trunk.parameters(), *experts.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * math.ceil(len(split.labels) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for _ in range(epochs):
        for chosen in torch.randperm(len(split.labels), generator=generator).split(batch):
            inputs = split.inputs[chosen]
            if inputs.dim() == 4 and torch.rand((), generator=generator) < 0.5:
                inputs = inputs.flip(3)
            optimizer.zero_grad()
            criterion(experts(trunk(inputs)), split.labels[chosen]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()

    trunk.eval(), experts.eval()
    with torch.no_grad():
        fitted, validation, test = (
            torch.cat([experts(trunk(part)).ensemble() for part in inputs.split(500)])
            for inputs in (split.inputs, split.validation_inputs, split.test_inputs)
        )
    return {
        "validation_logits": validation,
        "validation_target": split.validation_labels,
        "test_logits": test,
        "test_target": split.test_labels,
        "class_counts": counts,
        "implied_prior": criterion.implied_prior(),
        "training_accuracy": (fitted.argmax(1) == split.labels).double().mean(),
    }


def cross_fit(split: Split, loss: dict[str, Any], head: str, seed: int, epochs: int, batch: int) -> Run:
    """Train on all samples; their validation logits are of networks that each left a fifth of them out."""
    inputs = torch.cat([split.inputs, split.validation_inputs])
    labels = torch.cat([split.labels, split.validation_labels])
    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) % FOLDS
    logits = torch.empty(len(labels), int(split.test_labels.max()) + 1)

    for left_out in range(FOLDS):
        rest, part = fold != left_out, fold == left_out
        folded = split._replace(inputs=inputs[rest], labels=labels[rest], validation_inputs=inputs[part])
        logits[part] = train(folded, loss, head, seed, epochs, batch)["validation_logits"]

    whole = train(split._replace(inputs=inputs, labels=labels), loss, head, seed, epochs, batch)
    return {**whole, "validation_logits": logits, "validation_target": labels}


def calibrate(run: Run) -> Calibration:
    """Fit the calibration of a run to its validation logits."""
    return fit(
        run["validation_logits"],
        run["validation_target"],
        class_counts=run["class_counts"],
        implied_prior=run["implied_prior"],
    )


def scores(run: Run) -> dict[str, Any]:
    """Score the test set of a run, as it is and calibrated."""
    calibration, counts = calibrate(run), run["class_counts"]
    logits, target = run["test_logits"], run["test_target"]
    plain = logits.softmax(1)
    return {
        "plain": {**scores_of(plain, target), "ece_as_in_training": calibration_error(plain, target, counts)},
        "calibrated": {
            **scores_of(calibration.probabilities(logits), target),
            "ece_as_in_training": calibration_error(
                calibration.probabilities(logits, counts), target, counts
            ),
        },
        "temperature": calibration.temperature,
        "exponent": calibration.exponent,
        "used": calibration.used,
        "training_accuracy": 100 * float(run["training_accuracy"]),
        "validation_samples": len(run["validation_target"]),
        "estimated_priors": estimated_priors(run, calibration),
    }


def estimated_priors(run: Run, calibration: Calibration) -> dict[str, dict[str, float]]:
    """What an estimated class prior gains over the uniform one, by way and kind of test set; in points."""
    known = run["validation_logits"], run["validation_target"]
    ways: dict[str, tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
        "smoothing=0": (run["test_logits"], run["implied_prior"], partial(estimate_prior, smoothing=0.0)),
        "default": (run["test_logits"], run["implied_prior"], estimate_prior),
        "validation=": (run["test_logits"], run["implied_prior"], partial(estimate_prior, validation=known)),
        "calibrated": (
            calibration.logits(run["test_logits"]),
            torch.ones_like(run["implied_prior"]),
            estimate_prior,
        ),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (logits, prior, estimate) in ways.items():
        gained = gains_of_estimate(
            logits, run["test_target"], prior, run["class_counts"], estimate, sizes=(1000,)
        )
        found[name] = {kind: estimated for kind, (estimated, _) in gained.items()}
    return found | {"true prior": {kind: true for kind, (_, true) in gained.items()}}


def scores_of(probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """Score probabilities, in percent but for the likelihood; classes count alike."""
    means = mean_scores(score_sums(probabilities, target, bins=15), "classes")
    right = class_shares(target)[probabilities.argmax(1) == target].sum()
    return {
        "balanced_accuracy": 100 * float(right),
        "nll": float(means["nll"]),
        "ece": 100 * float(means["ece"]),
    }


def calibration_error(probabilities: Tensor, target: Tensor, prior: Tensor) -> float:
    """Compute the expected calibration error, in percent, where the classes have a prior."""
    sums = score_sums(probabilities, target, bins=15)
    samples = sums.samples.sum(1)
    prior = prior.double() * (samples > 0)
    gaps = prior / prior.sum() / samples.clamp_min(1) @ (sums.correct - sums.confidence)
    return 100 * float(gaps.abs().sum())


def runs_of(record: Record, data: str, head: str, loss: str) -> list[dict[str, Any]]:
    """The runs of all seeds."""
    return [run for run in record["runs"] if (run["data"], run["head"], run["loss"]) == (data, head, loss)]


def means(record: Record, data: str, head: str, loss: str, what: str) -> list[float]:
    """A score's mean over seeds: of the plain mean of the experts, and calibrated."""
    runs = runs_of(record, data, head, loss)
    return [statistics.mean(run[which][what] for run in runs) for which in ("plain", "calibrated")]


def gains(record: Record, data: str, head: str, loss: str) -> list[float]:
    """What the calibration gains in balanced accuracy, in points, for every seed."""
    what = "balanced_accuracy"
    return [run["calibrated"][what] - run["plain"][what] for run in runs_of(record, data, head, loss)]


def table(record: Record, cell: Callable[[str, str, str], str]) -> list[list[str]]:
    """A row a data set and head, a column a loss."""
    sets = [name for name in SETS if any(run["data"] == name for run in record["runs"])]
    return [
        [data, head, *(cell(data, head, loss) for loss in LOSSES)]
        for data, head in itertools.product(sets, HEADS)
    ]


def markdown(rows: list[list[str]]) -> str:
    """The rows of :func:`table` below their header; a star marks data that the rules were chosen on."""
    marked = [[data if data in FRESH else f"{data} *", *cells] for data, *cells in rows]
    return grid(["data", "heads", *LOSSES], marked, texts=2)


def mean_gain(record: Record, loss: str, head: str | None = None) -> float:
    """Mean gain over the fresh data sets, of one kind of head or of both."""
    heads = HEADS if head is None else (head,)
    return statistics.mean(statistics.mean(gains(record, data, one, loss)) for data in FRESH for one in heads)


def accuracy_table(record: Record) -> str:
    """Balanced accuracy of the plain mean, and what the calibration gains, with its standard error."""

    def cell(data: str, head: str, loss: str) -> str:
        gained = gains(record, data, head, loss)
        error = f" ± {statistics.stdev(gained) / math.sqrt(len(gained)):.2f}" if len(gained) > 1 else ""
        plain = means(record, data, head, loss, "balanced_accuracy")[0]
        return f"{plain:.1f} {statistics.mean(gained):+.2f}{error}"

    rows = table(record, cell)
    if all(any(run["data"] == name for run in record["runs"]) for name in FRESH):
        for head in (*HEADS, None):
            of_head = (f"{mean_gain(record, loss, head):+.2f}" for loss in LOSSES)
            rows.append(["mean", head or "both", *of_head])
    return markdown(rows).replace("| mean * |", "| mean of those without * |")


def score_table(record: Record, what: str, digits: int) -> str:
    """A score of the plain mean, and calibrated."""

    def cell(data: str, head: str, loss: str) -> str:
        return " → ".join(f"{mean:.{digits}f}" for mean in means(record, data, head, loss, what))

    return markdown(table(record, cell))


def found_table(record: Record) -> str:
    """Temperature, exponent where the calibration is used, and in brackets in how many runs it is."""

    def cell(data: str, head: str, loss: str) -> str:
        runs = runs_of(record, data, head, loss)
        used = [run["exponent"] for run in runs if run["used"]]
        exponent = f"{statistics.mean(used):.2f}" if used else "-"
        temperature = statistics.mean(run["temperature"] for run in runs)
        return f"{temperature:.2f}, {exponent} ({len(used)})".replace(" ", "\u00a0")

    return markdown(table(record, cell))


def fit_table(record: Record) -> str:
    """Part of the training samples that the plain mean gets right, in percent."""

    def cell(data: str, head: str, loss: str) -> str:
        return f"{statistics.mean(r['training_accuracy'] for r in runs_of(record, data, head, loss)):.1f}"

    return markdown(table(record, cell))


def estimate_table(record: Record) -> str:
    """What an estimated prior gains over the uniform one, a row a kind of test set, and the worst run."""
    found = [run["estimated_priors"] for run in record["runs"] if run["data"] in FRESH]
    ways = list(found[0])
    rows = [
        [kind, *(f"{statistics.mean(run[way][kind] for run in found):+.2f}" for way in ways)]
        for kind in found[0]["default"]
    ]
    rows.append(["mean, worst run", *(f"{min(run[way]['mean'] for run in found):+.2f}" for way in ways)])
    return grid(["test set", *ways], rows)


def draw(runs: dict[str, Run], path: Path) -> None:
    """Draw reliability, and accuracy over the exponent: a row a data set, and a legend above each column."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from lgla_losses.plot import plot_prior_shift, plot_reliability

    # Its text can be read at 800 pixels.
    figure = Figure(figsize=(9, 1.2 + 2.7 * len(runs)), layout=ConstrainedLayoutEngine(hspace=0.06))
    panels = figure.subplots(len(runs), 2, sharex="col", squeeze=False, width_ratios=(1, 1.7))
    for (name, run), (left, right) in zip(runs.items(), panels, strict=True):
        calibration, logits, target = calibrate(run), run["test_logits"], run["test_target"]
        predictions = {"plain mean": logits.softmax(1), "calibrated": calibration.probabilities(logits)}
        plot_reliability(predictions, target, average="classes", ax=left)
        plot_prior_shift(logits, target, run["class_counts"], calibration=calibration, ax=right)
        errors = [scores_of(probabilities, target)["ece"] for probabilities in predictions.values()]
        left.set_title(f"{name}\ncalibration error: {errors[0]:.1f} → {errors[1]:.1f} %", fontsize=10)
        found = f"finds s = {calibration.exponent:.2f}" if calibration.used else "is not used"
        right.set_title(f"{name}\ncalibration {found}", fontsize=10)
    for column in panels.T:
        # Not every data set has few-shot classes. What a label says of one data set alone is in its title.
        handles, labels = max((axes.get_legend_handles_labels() for axes in column), key=lambda h: len(h[1]))
        names = [label if "as they are" in label else label.partition(":")[0] for label in labels]
        look = {"ncols": 2, "frameon": False, "handlelength": 3.0}
        for axes in column:
            axes.get_legend().remove()
        column[0].legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.22), **look)
        for axes in column[:-1]:
            axes.set_xlabel("")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Train what the folder lacks, write the record of all, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder that benchmarks/real_data.py describes")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--logits", type=Path, default=Path("runs/prediction"), help="where runs are kept")
    parser.add_argument("--output", type=record_file, default=RESULTS / "prediction_cpu.json")
    parser.add_argument("--picture", type=record_file, help="a .png file; none without")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.logits.mkdir(parents=True, exist_ok=True)

    runs, drawn = [], {}
    for seed, name in itertools.product(range(1, options.seeds + 1), options.sets):
        data, split = DATA_SETS[name], None
        for loss, head in itertools.product(LOSSES, HEADS):
            file = f"{name}_{loss}_{head}_{seed}_{data.epochs}_{data.batch}.pt".replace(" ", "-")
            path = options.logits / file
            if not path.exists():
                split = split or split_of(name, options.data, seed)
                how = cross_fit if data.cross_fit else train
                unfinished = path.with_suffix(".part")
                torch.save(how(split, LOSSES[loss], head, seed, data.epochs, data.batch), unfinished)
                unfinished.replace(path)
            run = torch.load(path, weights_only=True)
            runs.append({"data": name, "loss": loss, "head": head, "seed": seed, **scores(run)})
            if (seed, loss, head) == (1, "LGLA, tau = K - 1", "cosine") and name in FRESH:
                drawn[name] = run
            print(seed, name, loss, head, "" if runs[-1]["used"] else "not used", flush=True)

    what = f"{EXPERTS} experts, one thread; on the test set all classes count alike"
    record = {"what": what, **made_here(), "runs": [rounded(run, 4) for run in runs]}
    write_whole(options.output, json.dumps(record, indent=1) + "\n")
    if options.picture is not None:
        draw(drawn, options.picture)
    print(accuracy_table(record), score_table(record, "ece", 1), sep="\n\n", end="\n\n")
    print(score_table(record, "nll", 2), found_table(record), fit_table(record), sep="\n\n", end="\n\n")
    print(estimate_table(record))


if __name__ == "__main__":
    main()
