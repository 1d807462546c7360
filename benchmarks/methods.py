"""Which method wins: losses, ensembles and stages on real long-tailed data, with paired seeds.

A unit is a group of methods, a data set, a kind of heads, a number of epochs and a seed. All methods train
on the same batches and from the same first weights. The scores of a unit are kept in a folder, and a unit
that is there is not repeated, so that the whole can be made in parts. The classes of the test set count
alike, for the networks as they are, and calibrated on a tenth of the training samples, which no network is
trained on. No test set chooses anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import methods_tables
import torch
import torch.nn.functional as F
from arguments import positive, record_file
from measure import made_here, quartiles
from methods_tables import BUDGETS
from real_data import DATA_SETS, Split, split_of
from recording import rounded, unit_file, write_whole
from side_by_side import SCALE, Group, Method, SideBySide, class_counts, dropped, optimizer_of, train
from torch import Tensor, nn

from lgla_losses import ExpertOutput
from lgla_losses._fitting import class_shares
from lgla_losses._scores import score_sums
from lgla_losses._scores import scores as mean_scores
from lgla_losses.aggregation import self_supervised_weights
from lgla_losses.calibration import fit
from lgla_losses.data import ClassBalancedSampler
from lgla_losses.experts import ExpertClassifiers
from lgla_losses.stages import tau_normalize

RESULTS = Path(__file__).parent / "results"
SETS = ("Fashion-MNIST", "small CIFAR-10", "Debian sections", "docstrings", "WordNet topics", "Unicode names")
EXPERTS, EPOCHS = 3, 8


OF_EXPERTS, NO_SCALE = {"num_experts": EXPERTS}, {"scale": None}
BALANCED, LGLA = Method("balanced", OF_EXPERTS), Method("lgla", OF_EXPERTS, linear=NO_SCALE)
GROUPS = {
    "one": Group(
        {
            "softmax": Method("softmax"),
            "focal": Method("focal"),
            "class-balanced": Method("class_balanced"),
            "VS": Method("vs"),
            "balanced softmax": Method("balanced"),
        },
        experts=1,
    ),
    "LDAM": Group({"LDAM-DRW": Method("ldam", linear={"scale": 1.0}, deferred=True)}, experts=1),
    "three": Group(
        {
            "softmax x3": Method("softmax", OF_EXPERTS),
            "balanced softmax x3": BALANCED,
            "logit adjustment x3, tau = 1.5": Method("logit", {**OF_EXPERTS, "tau": 1.5}),
            "NCL": Method("ncl"),
            "CLA": Method("cla", OF_EXPERTS, linear=NO_SCALE),
            "LGLA": LGLA,
        },
        experts=EXPERTS,
    ),
    "more": Group(
        {
            "balanced softmax x3, twice the loss": BALANCED._replace(factor=2.0),
            "RIDE": Method("ride", linear=NO_SCALE, deferred=True),
            "SADE": Method("sade"),
        },
        experts=EXPERTS,
    ),
    "dropout": Group(
        {"balanced softmax x3, input dropout": BALANCED, "LGLA, input dropout": LGLA},
        experts=EXPERTS,
        dropped=0.2,
    ),
}


class Logits(NamedTuple):
    """Logits ``[M, C]`` of a prediction, and the class prior ``[C]`` that they hold in theory."""

    validation: Tensor
    test: Tensor
    implied_prior: Tensor


@torch.no_grad()
def outputs_of(network: SideBySide, inputs: Tensor) -> list[ExpertOutput]:
    """Give what every network makes of all inputs."""
    parts = zip(*(network(part) for part in inputs.split(1000)), strict=True)
    return [
        ExpertOutput(torch.cat([p.logits for p in of]), torch.cat([p.features for p in of]), of[0].weight)
        for of in parts
    ]


def predictions(
    split: Split, group: Group, head: str, seed: int, epochs: int, batch: int
) -> Iterator[tuple[str, Logits]]:
    """Train a group; give the logits of each method, and of what follows on some after training."""
    network, criteria = train(split, group, head, seed, epochs, batch)
    names = list(group.methods)
    outputs = {
        name: (validation, test)
        for name, validation, test in zip(
            names,
            outputs_of(network, split.validation_inputs),
            outputs_of(network, split.test_inputs),
            strict=True,
        )
    }
    for name, (validation, test) in outputs.items():
        yield name, Logits(validation.ensemble(), test.ensemble(), criteria[name].implied_prior())

    counts = class_counts(split)
    even = torch.ones(len(counts))
    if "softmax" in names:
        validation, test = outputs["softmax"]
        adjusted = Logits(validation.ensemble() - counts.log(), test.ensemble() - counts.log(), even)
        yield "softmax, logit adjustment", adjusted

        index = names.index("softmax")
        with torch.no_grad():
            features = network.features(split.inputs)[:, [index]]
        heads = {"softmax, cRT": retrained(features, split.labels, head, seed, batch, len(counts))}
        if head == "linear":
            heads["softmax, tau-normalised, tau = 1"] = tau_normalize(network.heads.only(index))
        for name, classifier in heads.items():
            with torch.no_grad():
                first, second = (classifier(output.features)[:, 0] for output in (validation, test))
            yield name, Logits(first, second, even)
    if "SADE" in names:
        # The weights are for a test set of equally frequent classes, as the scores are.
        generator = torch.Generator().manual_seed(seed)
        shares = class_shares(split.test_labels)
        drawn = torch.multinomial(shares, len(shares), replacement=True, generator=generator)
        views = two_views(split.test_inputs[drawn], generator)
        weights = self_supervised_weights(*(outputs_of(network, v)[names.index("SADE")] for v in views))
        first, second = (output.ensemble(weights) for output in outputs["SADE"])
        yield "SADE, aggregated", Logits(first, second, criteria["SADE"].implied_prior(weights))


def two_views(inputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make two views of test samples: an image and its mirror image, or features of which a tenth is 0."""
    if inputs.dim() == 4:
        return inputs, inputs.flip(3)
    first, second = (dropped(inputs, 0.1, generator) for _ in range(2))
    return first, second


def retrained(
    features: Tensor, target: Tensor, head: str, seed: int, batch: int, num_classes: int
) -> ExpertClassifiers:
    """Train a new classifier on what a network gives, with classes that are drawn equally often (cRT)."""
    torch.manual_seed(seed)
    classifier = ExpertClassifiers(1, features.shape[2], num_classes, SCALE if head == "cosine" else None)
    optimizer, schedule = optimizer_of(classifier, EPOCHS * math.ceil(len(target) / batch))
    sampler = ClassBalancedSampler(target, num_classes, power=0.0, seed=seed)
    for _ in range(EPOCHS):
        for chosen in torch.tensor(list(sampler)).split(batch):
            loss = F.cross_entropy(classifier(features[chosen])[:, 0], target[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return classifier


def scores(logits: Logits, split: Split) -> dict[str, Any]:
    """Score the test set: as the network is, and calibrated on the validation part."""
    counts = class_counts(split)
    calibration = fit(
        logits.validation, split.validation_labels, class_counts=counts, implied_prior=logits.implied_prior
    )
    calibrated = calibration.probabilities(logits.test)
    return {
        "plain": scores_of(logits.test.softmax(1), split.test_labels, counts),
        "calibrated": scores_of(calibrated, split.test_labels, counts),
        "temperature": calibration.temperature,
        "exponent": calibration.exponent,
        "used": calibration.used,
    }


def scores_of(probabilities: Tensor, target: Tensor, counts: Tensor) -> list[float]:
    """Compute methods_tables.SCORES, in percent but for the likelihood; all classes count alike."""
    right = (probabilities.argmax(1) == target).double()
    samples = torch.bincount(target, minlength=len(counts))
    recall = torch.bincount(target, right, len(counts)) / samples
    # Frequent, middle and rare classes are a third of the classes each.
    parts = counts.argsort(descending=True, stable=True).tensor_split(3)
    means = mean_scores(score_sums(probabilities, target, bins=15), "classes")
    accuracies = [recall[part].nanmean() for part in (torch.arange(len(counts)), *parts)]
    return [*(100 * mean.item() for mean in accuracies), means["nll"].item(), 100 * means["ece"].item()]


class Unit(NamedTuple):
    """A group, what it is trained on, and how; ``times`` as many epochs as usual."""

    group: str
    data: str
    head: str
    times: int
    seed: int

    @property
    def file(self) -> str:
        """The name of the file that keeps its scores."""
        return unit_file(self, (GROUPS[self.group], EPOCHS, DATA_SETS[self.data].batch))


def keep(unit: Unit, folder: Path, units: Path, end: float) -> float | None:
    """Train and score a unit and keep its rows; give the seconds, or None where time is up."""
    begin = time.monotonic()
    if begin > end:
        return None
    torch.set_num_threads(1)
    split = split_of(unit.data, folder, unit.seed)
    epochs, batch = EPOCHS * unit.times, DATA_SETS[unit.data].batch
    rows = [
        {"method": name, **unit._asdict(), **scores(logits, split)}
        for name, logits in predictions(split, GROUPS[unit.group], unit.head, unit.seed, epochs, batch)
    ]
    write_whole(units / unit.file, json.dumps(rows))
    return time.monotonic() - begin


def sizes(name: str, folder: Path) -> dict[str, Any]:
    """Count the samples and classes of a data set, those of the first seed."""
    split = split_of(name, folder, seed=1)
    counts = class_counts(split)
    return {
        "data": name,
        "classes": len(counts),
        "training": len(split.labels),
        "calibration": len(split.validation_labels),
        "test": len(split.test_labels),
        "most_frequent": int(counts.max()),
        "rarest": int(counts.min()),
    }


def costs(repeats: int = 100) -> list[dict[str, Any]]:
    """Measure a training step of every method alone, and a prediction: quartiles in milliseconds.

    A batch is 128 samples of 256 numbers and 50 classes. Rounds go through all methods, so that drift of the
    machine meets all of them.
    """
    torch.manual_seed(0)
    inputs, target, counts = (
        torch.randn(128, 256),
        torch.randint(50, (128,)),
        torch.logspace(3, 1, 50).round(),
    )
    steps: dict[str, Any] = {}
    for group in GROUPS.values():
        for name, method in group.methods.items():
            network = SideBySide(1, group.experts, inputs, len(counts), "cosine")
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
            steps[name] = network, method.criterion(counts, "cosine"), optimizer

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, (network, criterion, optimizer) in steps.items():
            begin = time.perf_counter()
            optimizer.zero_grad()
            criterion(network(inputs)[0], target).backward()
            network.clip()
            optimizer.step()
            middle = time.perf_counter()
            with torch.no_grad():
                network(inputs)[0].ensemble()
            times[name].append((middle - begin, time.perf_counter() - middle))
    return [
        {
            "method": name,
            "parameters": sum(p.numel() for p in steps[name][0].parameters()),
            **{
                f"{what}_ms": [1e3 * t for t in quartiles([pair[i] for pair in pairs])]
                for i, what in enumerate(("training", "prediction"))
            },
        }
        for name, pairs in times.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Train what the folder lacks; write the record of what it has, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder that benchmarks/real_data.py describes")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--processes", type=positive, default=2, help="each of one thread")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no unit after these")
    parser.add_argument(
        "--units", type=Path, default=Path("runs/methods"), help="where their scores are kept"
    )
    parser.add_argument("--output", type=record_file, default=RESULTS / "methods.json")
    parser.add_argument("--picture", type=record_file, help="a .png file; none without")
    options = parser.parse_args(arguments)
    options.units.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes

    seeds = range(1, options.seeds + 1)
    units = [
        Unit(group, data, head, times, seed)
        for head, times in BUDGETS
        for seed in seeds
        for data in options.sets
        for group in GROUPS
    ]
    missing = [unit for unit in units if not (options.units / unit.file).exists()]
    make = functools.partial(keep, folder=options.data, units=options.units, end=end)
    # Processes of their own: a forked one would wait for threads that it does not have.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for unit, seconds in zip(missing, pool.map(make, missing), strict=True):
            print(*unit, "left for later" if seconds is None else f"{seconds:.0f} s", flush=True)

    kept = [options.units / unit.file for unit in units]
    rows = [row for path in kept if path.exists() for row in json.loads(path.read_text())]
    what = "classes count alike; a tenth of the training samples is for the calibration alone"
    record = {"what": what, "command": shlex.join(["python", *sys.argv]), **made_here(), "epochs": EPOCHS}
    torch.set_num_threads(1)
    sets = [sizes(name, options.data) for name in options.sets]
    write_record(
        options.output, {**record, "sets": sets, "costs": rounded(costs(), 3), "rows": rounded(rows, 3)}
    )
    results = methods_tables.Results(json.loads(options.output.read_text(encoding="utf-8")))
    if options.picture is not None:
        methods_tables.draw(results, options.picture)
    print(methods_tables.all_of(results))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, of its lists a line an entry."""
    lines = [f"{json.dumps(key)}: {in_lines(value)}" for key, value in record.items()]
    write_whole(path, "{" + ",\n".join(lines) + "}\n")


def in_lines(value: Any) -> str:
    """Give JSON of a value, of a list a line an entry."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"


if __name__ == "__main__":
    main()
