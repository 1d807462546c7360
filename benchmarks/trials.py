"""What else might beat three balanced-softmax experts: variants of training, and rules of prediction.

The methods of methods.py have seeds 1 to 5; the trials have others, so that what wins here is tested there. A
rule combines the logits of the experts by a few factors, which are fitted to the validation part as those of
the calibration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import methods
import torch
import torch.nn.functional as F
from arguments import positive, record_file
from measure import made_here
from methods import BALANCED, LGLA, OF_EXPERTS, Logits, outputs_of, scores, scores_of
from methods_tables import YARDSTICK, Results, Row, told
from real_data import DATA_SETS, Split, split_of
from recording import rounded, unit_file, write_whole
from side_by_side import Group, Method, class_counts, train
from tables import grid
from torch import Tensor

from lgla_losses import ClassGrouper, ExpertOutput

RESULTS = Path(__file__).parent / "results"
SETS = ("docstrings", "WordNet topics", "Fashion-MNIST")
TIMES = (1, 4)
FIRST_SEED = 6

BOTH = {YARDSTICK: BALANCED, "LGLA": LGLA}
GROUPS = {
    "": Group(
        {
            **BOTH,
            "balanced softmax x3, distilled": BALANCED._replace(distillation=0.6),
            "balanced softmax x3, drawn apart": BALANCED._replace(distillation=-0.1),
            "balanced softmax x3, twice the loss": BALANCED._replace(factor=2.0),
            "balanced softmax x3, four times the loss": BALANCED._replace(factor=4.0),
            "LGLA, twice the loss": LGLA._replace(factor=2.0),
            "balanced softmax x3, hard classes": Method("ncl", {"distillation": 0.0}),
            "LGLA, distilled": LGLA._replace(distillation=0.6),
            "LGLA, rising tau": Method("lgla", {**OF_EXPERTS, "tau": 2.5}, rising=True),
        },
        experts=3,
    ),
    ", mixup 0.2": Group(BOTH, experts=3, mixup=0.2),
    ", mixup 1": Group(BOTH, experts=3, mixup=1.0),
    ", input dropout": Group(BOTH, experts=3, dropped=0.2),
}


def own_group(output: ExpertOutput, counts: Tensor) -> Tensor:
    """How far the local expert of a class's own group is from the mean of the experts: ``[N, 1, C]``."""
    groups = ClassGrouper(counts, output.logits.shape[1] - 1).group_index
    own = output.logits.gather(1, groups.expand(len(output.logits), 1, -1))
    return own - output.logits.mean(1, keepdim=True)


def agreement(output: ExpertOutput, counts: Tensor) -> Tensor:
    """The mean of the experts, times how much their predictions agree: ``[N, 1, C]``."""
    probabilities = output.logits.softmax(-1)
    pairs = probabilities.sum(1).square().sum(-1) - probabilities.square().sum((1, 2))
    number = probabilities.shape[1] * (probabilities.shape[1] - 1)
    return (pairs / number)[:, None, None] * output.logits.mean(1, keepdim=True)


Rule = Callable[[ExpertOutput, Tensor], Tensor]

#: What is added to the mean of the experts and the class prior, each with a factor: ``[N, F, C]``.
RULES: dict[str, Rule] = {
    "shift alone": lambda output, counts: output.logits[:, :0],
    "a weight for each expert": lambda output, counts: output.logits[:, 1:] - output.logits[:, :1],
    "own group's expert": own_group,
    "agreement": agreement,
}


def fitted(validation: Tensor, target: Tensor, test: Tensor, counts: Tensor) -> Tensor:
    """Fit a factor to each of the terms ``[N, F, C]`` of the logits; give the logits of the test set.

    The first term is the mean of the experts without the prior of theory, the second the class prior.

    As in the calibration, labels weigh by the root of their classes' rarity, and a weak prior keeps the
    factors near those that are usual, and 0 for all others.
    """
    prior = (counts / counts.sum()).double()
    weights = prior[target].rsqrt()
    weights *= len(target) / weights.sum()
    usual = torch.zeros(validation.shape[1], dtype=torch.float64)
    usual[:2] = torch.tensor([0.75, -0.125])
    factors = usual.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([factors], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = torch.einsum("f,nfc->nc", factors, validation.double()) + prior.sqrt().log()
        losses = F.cross_entropy(logits, target, reduction="none")
        loss = (weights * losses).sum() + ((factors - usual) / 0.3).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(objective)
    return torch.einsum("f,nfc->nc", factors.detach(), test.double())


def by_rules(
    validation: ExpertOutput, test: ExpertOutput, implied_prior: Tensor, split: Split
) -> Iterator[tuple[str, Tensor]]:
    """Predict the test set by every rule: logits ``[N, C]``."""
    counts = class_counts(split)
    for name, rule in RULES.items():
        parts = []
        for output in (validation, test):
            mean = output.logits.mean(1, keepdim=True) - implied_prior.log()
            shift = counts.log().expand_as(mean)
            parts.append(torch.cat([mean, shift, rule(output, counts)], dim=1))
        yield name, fitted(parts[0], split.validation_labels, parts[1], counts)


def run(data: str, times: int, seed: int, folder: Path) -> Iterator[Row]:
    """Train and score all groups on a data set, with so many times the epochs."""
    split = split_of(data, folder, seed)
    of_all = {"data": data, "head": "cosine", "times": times, "seed": seed}
    for suffix, group in GROUPS.items():
        network, criteria = train(split, group, "cosine", seed, methods.EPOCHS * times, DATA_SETS[data].batch)
        parts = (outputs_of(network, split.validation_inputs), outputs_of(network, split.test_inputs))
        for (name, criterion), validation, test in zip(criteria.items(), *parts, strict=True):
            logits = Logits(validation.ensemble(), test.ensemble(), criterion.implied_prior())
            yield {"method": f"{name}{suffix}", **of_all, **scores(logits, split)}
            if suffix or name not in BOTH:
                continue
            for rule, predicted in by_rules(validation, test, logits.implied_prior, split):
                found = scores_of(predicted.softmax(1), split.test_labels, class_counts(split))
                yield {"method": f"{name}: {rule}", **of_all, "calibrated": found}


def table(results: Results) -> str:
    """How far every trial, calibrated, is from the yardstick, calibrated: accuracy and log likelihood."""
    rows = []
    for method in results.methods:
        if method != YARDSTICK:
            gains = [
                told(results.gain(("cosine", times), method, "calibrated", score=score), digits)
                for times, (score, digits) in itertools.product(TIMES, (("accuracy", 2), ("nll", 3)))
            ]
            rows.append([method, *gains])
    epochs = [f"{methods.EPOCHS * times} epochs" for times in TIMES]
    header = [f"{what}, {number}" for number, what in itertools.product(epochs, ("accuracy", "NLL"))]
    return grid(["trial", *header], rows)


def main(arguments: list[str] | None = None) -> None:
    """Make the trials that the folder lacks, write the record of all, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder that benchmarks/real_data.py describes")
    parser.add_argument("--seeds", type=positive, default=2)
    parser.add_argument("--units", type=Path, default=Path("runs/trials"), help="where scores are kept")
    parser.add_argument("--output", type=record_file, default=RESULTS / "trials.json")
    options = parser.parse_args(arguments)
    options.units.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    rows: list[Row] = []
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    for seed, data, times in itertools.product(seeds, SETS, TIMES):
        how = (GROUPS, tuple(RULES), methods.EPOCHS, DATA_SETS[data].batch)
        path = options.units / unit_file((data, times, seed), how)
        if not path.exists():
            write_whole(path, json.dumps(list(run(data, times, seed, options.data))))
        rows += json.loads(path.read_text(encoding="utf-8"))
        print(seed, data, times, flush=True)
    what = "cosine heads; classes count alike; a tenth of the training samples is for calibration and rules"
    record = {"what": what, "command": shlex.join(["python", *sys.argv]), **made_here(), "costs": []}
    methods.write_record(options.output, {**record, "rows": rounded(rows, 3)})
    print(table(Results(json.loads(options.output.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
