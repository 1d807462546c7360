# Needs: cli.py, quickstart.py.
"""Distil LGLA's experts into one network: accuracy and cost side by side, on long-tailed digits.

The student matches the ensemble's softened probabilities. These hold about the uniform prior, so the student
needs no adjustment. But it sees few images of rare digits, unless all digits are drawn equally often.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cli import Parser, needs, number, start
from torch import Tensor, nn

from lgla_losses import ExpertModel, ExpertOutput, GroupConvExperts, LGLALoss
from lgla_losses.adjusted import AdjustedLoss
from lgla_losses.baselines import BalancedSoftmaxLoss
from lgla_losses.experts import ExpertClassifiers


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--temperatures", type=number(float, 1e-3), nargs="+", default=[4.0], metavar="T", help="of students")
    add(
        "--shares",
        type=number(float, 0, 1),
        nargs="+",
        default=[1.0],
        help="share of the teacher in the loss",
    )
    add("--imbalance", type=number(float, 1), default=50.0, help="largest over smallest class")
    add("--first-seed", type=number(int, 0), default=0, help="first of consecutive seeds")
    add("--seeds", type=number(int, 1), default=10, help="number of seeds")
    add("--epochs", type=number(int, 1), default=50, help="epochs of every run")
    return parser


with needs("examples", make_parser, __name__):
    from quickstart import (
        NUM_CLASSES,
        SCALE,
        DigitsNet,
        DigitsStage,
        Split,
        digit_counts,
        long_tailed_digits,
        shot_columns,
    )
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

NUM_EXPERTS = 3
TEACHER, SHARED = "LGLA x3 (teacher)", "LGLA x3, only heads"

cross_entropy = AdjustedLoss()


def network(num_experts: int) -> ExpertModel:
    """The demo's network."""
    net = DigitsNet(num_experts)
    return ExpertModel(net.trunk, net.experts)


def one_network() -> ExpertModel:
    """The demo's network with one expert: used in every row except two."""
    return network(1)


def network_of_shared_features() -> ExpertModel:
    """One network with K classifiers on its features."""
    trunk = nn.Sequential(DigitsNet(1).trunk, DigitsStage(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    experts = GroupConvExperts(None, NUM_EXPERTS, NUM_CLASSES, num_features=32, scale=SCALE)
    return ExpertModel(trunk, experts)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute the cross entropy of softened probabilities, times T^2.

    The gradient of softened logits is about 1 / T^2 of that at T = 1; the factor corrects this. Source:
    Hinton et al. 2015, section 2, Eqs. 1 to 4.

    Args:
        student: logits ``[N, C]``.
        teacher: logits ``[N, C]``, without a gradient.
        temperature: ``T``.

    Raises:
        ValueError: shapes differ, or a logit is not finite.
    """
    probabilities = (teacher / temperature).softmax(dim=1)
    return temperature**2 * cross_entropy(student / temperature, probabilities)


class Lesson(NamedTuple):
    """A network, and what it learns from: labels, a teacher, or both."""

    make: Callable[[], ExpertModel]
    criterion: Callable[[ExpertOutput, Tensor], Tensor]
    equally: bool = False
    teacher: ExpertModel | None = None
    temperature: float = 1.0
    share: float = 1.0

    def loss(self, output: ExpertOutput, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch: the teacher's times its share, the labels' times the rest."""
        if self.teacher is None:
            return self.criterion(output, labels)

        with torch.no_grad():
            # A calibrated teacher goes here: calibration.logits(self.teacher(images)).
            logits = self.teacher(images)

        taught = distillation_loss(output.ensemble(), logits, self.temperature)
        return self.share * taught + (1 - self.share) * self.criterion(output, labels)


def draw(labels: Tensor, equally: bool) -> Tensor:
    """Indices of an epoch: every image once, or as many images with all digits equally likely."""
    if not equally:
        return torch.randperm(len(labels))
    weights = 1 / torch.bincount(labels)[labels]
    return torch.multinomial(weights, len(labels), replacement=True)


def fit(lesson: Lesson, split: Split, epochs: int) -> ExpertModel:
    """Train as the demo does, by the loss of the lesson."""
    model = lesson.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    for _ in range(epochs):
        model.train()
        for batch in draw(split.train_labels, lesson.equally).split(64):
            images, labels = split.train_images[batch], split.train_labels[batch]
            optimizer.zero_grad()
            lesson.loss(model(images), images, labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()

    return model.eval()


def lessons(
    class_counts: list[int], teacher: ExpertModel, temperatures: list[float], shares: list[float]
) -> dict[str, Lesson]:
    """All rows of the table except the teacher's.

    For every temperature and share, one student draws all digits equally; for the first, another student does
    not.
    """
    balanced, lgla = BalancedSoftmaxLoss(class_counts), LGLALoss(class_counts, NUM_EXPERTS, scale=SCALE)
    table = {
        "Softmax": Lesson(one_network, cross_entropy),
        "Softmax, equal draws": Lesson(one_network, cross_entropy, equally=True),
        "Balanced softmax": Lesson(one_network, balanced),
        SHARED: Lesson(network_of_shared_features, lgla),
    }

    for share in shares:
        for temperature in temperatures:
            of_labels = "" if share == 1 else f" share={share:g}"
            name = f"Student T={temperature:g}{of_labels}"
            # Labels of equally drawn digits need no adjustment.
            taught = Lesson(one_network, cross_entropy, True, teacher, temperature, share)
            if temperature == temperatures[0] and share == shares[0]:
                table[name] = taught._replace(criterion=balanced, equally=False)
            table[f"{name}, equal draws"] = taught
    return table


class OneHead(nn.Module):
    """Hold the mean of K cosine heads on shared features, exactly: a linear layer on unit features.

    Args:
        heads: the K classifiers.

    Shape:
        - features: ``[N, d]``
        - output: ``[N, C]``
    """

    def __init__(self, heads: ExpertClassifiers) -> None:
        super().__init__()
        centres = F.normalize(heads.weight.detach(), dim=-1)  # [K, C, d]
        self.weight = nn.Parameter(SCALE * centres.mean(dim=0))

    def forward(self, features: Tensor) -> Tensor:
        """Compute the ensemble's logits."""
        return F.linear(F.normalize(features, dim=-1), self.weight)


def shipped(model: ExpertModel) -> nn.Module:
    """The network that predicts in the end: with one expert, or with K merged heads."""
    experts = model.experts
    head = OneHead(experts.classifiers) if experts.stage is None else experts.extract(0)
    return nn.Sequential(model.trunk, head).eval()


@torch.inference_mode()
def recalls(model: nn.Module, split: Split) -> Tensor:
    """Accuracy (%) of every class ``[C]``."""
    right = (model(split.test_images).argmax(1) == split.test_labels).double()
    return 100 * torch.stack([right[split.test_labels == digit].mean() for digit in range(NUM_CLASSES)])


@torch.inference_mode()
def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds for one image."""
    from torch.utils.flop_counter import FlopCounterMode  # its import prints that triton is missing

    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    return int(counter.get_total_flops()) // 2


@torch.inference_mode()
def microseconds(models: dict[str, nn.Module], images: Tensor, turns: int) -> dict[str, list[float]]:
    """Processor time per image, all images at once; other work of the machine is not included.

    In every turn the models run in a new order, because each inherits the caches and memory of the one
    before.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    for turn in range(turns + 1):
        for name, model in order.sample(list(models.items()), len(models)):
            begin = time.process_time()
            model(images)
            if turn:  # the first warms up
                times[name].append(1e6 * (time.process_time() - begin) / len(images))
    return times


def mean_and_deviation(values: Tensor, sign: str = "") -> str:
    """Format mean and deviation for a cell."""
    deviation = f" ±{values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


def print_accuracies(accuracy: dict[str, Tensor], class_counts: list[int], title: str) -> None:
    """Print mean and standard deviation over the seeds, and of the differences from the teacher."""
    columns = {name: members for name, members in shot_columns(class_counts).items() if name != "3 rarest"}
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for column in (*columns, "vs teacher"):
        table.add_column(column, justify="right", no_wrap=True)

    best = accuracy[TEACHER].mean(1)
    for name, per_class in accuracy.items():
        cells = [
            mean_and_deviation(per_class[:, members].mean(1)) if members.any() else "-"
            for members in columns.values()
        ]
        difference = "" if name == TEACHER else mean_and_deviation(per_class.mean(1) - best, "+")
        table.add_row(name, *cells, difference)
    Console(width=110).print(table)


def print_costs(models: dict[str, nn.Module], images: Tensor) -> None:
    """Print parameters, multiply-adds and processor time of the networks that predict."""
    table = Table(title=f"Cost of an image, of {len(images)} predicted at once on one core")
    table.add_column("what predicts", no_wrap=True)
    for column in ("parameters", "multiply-adds", "µs (quartiles)"):
        table.add_column(column, justify="right", no_wrap=True)

    times = microseconds(models, images, turns=100)
    for name, model in models.items():
        low, median, high = statistics.quantiles(times[name], n=4, method="inclusive")
        size = sum(parameter.numel() for parameter in model.parameters())
        cost = f"{median:.1f} ({low:.1f} to {high:.1f})"
        table.add_row(name, f"{size:,}", f"{multiply_adds(model, images):,}", cost)
    Console(width=110).print(table)


def provenance() -> str:
    """The processor's name in Linux, the version of torch, and the commit, if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]

    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"{(models or [platform.machine()])[0]}, 1 thread, torch {torch.__version__}, commit {commit}"


def main(arguments: list[str] | None = None) -> None:
    """Train teacher, students and the networks to compare on every seed, and report the last epoch."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    class_counts = digit_counts(options.imbalance)
    seeds = range(options.first_seed, options.first_seed + options.seeds)

    scores: dict[str, list[Tensor]] = {}
    models: dict[str, nn.Module] = {}
    for seed in tqdm(seeds, unit="seed", mininterval=0.1 if sys.stderr.isatty() else 10.0):
        split = long_tailed_digits(options.imbalance, seed, "cpu")
        torch.manual_seed(seed)
        lgla = LGLALoss(class_counts, NUM_EXPERTS, scale=SCALE)
        teacher = fit(Lesson(lambda: network(NUM_EXPERTS), lgla), split, options.epochs)
        models[TEACHER] = teacher

        table = lessons(class_counts, teacher, options.temperatures, options.shares)
        for name, lesson in table.items():
            torch.manual_seed(seed)
            models[name] = shipped(fit(lesson, split, options.epochs))
        for name, model in models.items():
            scores.setdefault(name, []).append(recalls(model, split))

    accuracy = {name: torch.stack(per_seed) for name, per_seed in scores.items()}
    title = (
        f"Accuracy (%) on long-tailed digits, {class_counts[0]} to {class_counts[-1]} images a class, "
        f"seeds {seeds[0]} to {seeds[-1]}"
    )
    print_accuracies(accuracy, class_counts, title)
    student = next(name for name in models if name.startswith("Student"))
    named = {TEACHER: TEACHER, "Student, or any one network": student, f"{SHARED}, merged": SHARED}
    print_costs({name: models[row] for name, row in named.items()}, split.test_images)
    print(provenance())


if __name__ == "__main__":
    start(main)
