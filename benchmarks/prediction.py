"""What calibrated prediction gains over the plain mean of three experts, on real long-tailed data.

Trains three experts on every data set, with every loss, head and seed, and keeps the logits of each run in a
folder; a run that is there is not repeated. Every seed draws the training samples, a tenth of them for validation,
and the first weights. The calibration is fitted to that tenth and judged on the test set, whose classes count
alike; no test set chooses anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import positive, record_file
from measure import made_here
from real_data import DATA_SETS, Split, split_of
from recording import write_whole
from tables import grid
from torch import Tensor, nn

from lgla_losses import GroupConvExperts, LGLALoss
from lgla_losses._scores import score_sums
from lgla_losses._scores import scores as mean_scores
from lgla_losses.calibration import fit

RESULTS = Path(__file__).parent / "results"
EXPERTS = 3
LOSSES: dict[str, dict[str, Any]] = {
    "softmax x3": {"adjustment": "softmax", "aaw": False},
    "balanced softmax x3": {"adjustment": "balanced", "aaw": False},
    "LGLA, tau = K - 1": {"tau": EXPERTS - 1.0},
}
HEADS = ("cosine", "linear")

#: What a run is named by: data set, loss, head and seed.
Key = tuple[str, str, str, int]


def network(inputs: Tensor) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Trunk and maker of a stage of 128 features: two convolutions for images, a linear layer for features."""
    if inputs.dim() == 2:
        trunk = nn.Sequential(nn.Linear(inputs.shape[1], 256), nn.ReLU())
        return trunk, lambda: nn.Sequential(nn.Linear(256, 128), nn.ReLU())
    layers: list[nn.Module] = []
    for narrow, wide in ((3, 24), (24, 48)):
        layers += [nn.Conv2d(narrow, wide, 3, 2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten()), lambda: nn.Sequential(nn.Linear(768, 128), nn.ReLU())


def train(
    split: Split, loss: dict[str, Any], head: str, seed: int, epochs: int, batch: int
) -> dict[str, Any]:
    """Train one ensemble; give its logits of the validation and the test part, and what a calibration needs."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    num_classes = int(split.test_labels.max()) + 1
    # A class whose samples are all held out counts as one.
    counts = torch.bincount(split.labels, minlength=num_classes).clamp_min(1)
    trunk, stage = network(split.inputs)
    cosine = head == "cosine"
    experts = GroupConvExperts(
        stage,
        EXPERTS,
        num_classes,
        num_features=128,
        classifier=head,
        gradient="bounded" if cosine else "exact",
    )
    criterion = LGLALoss(counts, EXPERTS, scale=30.0 if cosine else None, **loss)
    parameters = [*trunk.parameters(), *experts.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * math.ceil(len(split.labels) / batch)
    )

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


def scores(run: dict[str, Tensor]) -> dict[str, Any]:
    """Fit the calibration of a run, and score the test set with and without; all in percent but the NLL."""
    calibration = fit(
        run["validation_logits"],
        run["validation_target"],
        class_counts=run["class_counts"],
        implied_prior=run["implied_prior"],
    )
    logits, target = run["test_logits"], run["test_target"]
    predictions = {"plain": logits.softmax(1), "calibrated": calibration.probabilities(logits)}
    found: dict[str, Any] = {}
    for name, probabilities in predictions.items():
        means = mean_scores(score_sums(probabilities, target, bins=15), "classes")
        found[name] = {
            "balanced_accuracy": balanced_accuracy(probabilities, target),
            "nll": float(means["nll"]),
            "ece": 100 * float(means["ece"]),
        }
    return {
        **found,
        "temperature": calibration.temperature,
        "exponent": calibration.exponent,
        "used": calibration.used,
        "training_accuracy": 100 * float(run["training_accuracy"]),
        "validation_samples": len(run["validation_target"]),
    }


def balanced_accuracy(predictions: Tensor, target: Tensor) -> float:
    """Mean over classes of the part that is right, in percent."""
    share = 1 / torch.bincount(target)[target].double()
    return 100 * float((predictions.argmax(1) == target).double() @ share / share.sum())


def keys(seeds: int) -> Iterator[Key]:
    """All runs, seed by seed."""
    for seed in range(1, seeds + 1):
        for name, loss, head in itertools.product(DATA_SETS, LOSSES, HEADS):
            yield name, loss, head, seed


def gains(record: dict[str, Any], loss: str, head: str, name: str) -> list[float]:
    """What calibrated prediction gains in balanced accuracy, for every seed."""
    return [
        run["calibrated"]["balanced_accuracy"] - run["plain"]["balanced_accuracy"]
        for run in record["runs"]
        if (run["loss"], run["head"], run["data"]) == (loss, head, name)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Train what the folder lacks, and write the record of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of benchmarks/real_data.py")
    parser.add_argument(
        "--logits", type=Path, default=Path("runs/prediction"), help="where the runs are kept"
    )
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--output", type=record_file, default=RESULTS / "prediction_cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.logits.mkdir(parents=True, exist_ok=True)

    split: tuple[tuple[str, int], Split] | None = None
    rows = []
    for key in keys(options.seeds):
        name, loss, head, seed = key
        if name not in options.sets:
            continue
        path = options.logits / ("_".join(map(str, key)).replace(" ", "-") + ".pt")
        if not path.exists():
            if split is None or split[0] != (name, seed):
                split = (name, seed), split_of(name, options.data, seed)
            data = DATA_SETS[name]
            torch.save(train(split[1], LOSSES[loss], head, seed, data.epochs, data.batch), path)
        run = torch.load(path, weights_only=True)
        rows.append({"data": name, "loss": loss, "head": head, "seed": seed, **scores(run)})
        print(
            *key,
            {
                k: round(v["balanced_accuracy"], 2) if isinstance(v, dict) else round(v, 2)
                for k, v in rows[-1].items()
                if k in ("plain", "calibrated", "temperature", "exponent", "used", "training_accuracy")
            },
            flush=True,
        )

    record = {
        "what": f"{EXPERTS} experts, classes of the test set count alike, one thread",
        **made_here(),
        "runs": rows,
    }
    write_whole(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
