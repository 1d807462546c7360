# Needs no other file.
"""Train LGLA beside its baselines on real long-tailed images: scikit-learn's handwritten digits.

Prints a table and draws a picture. Run it with --help for what can be changed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--imbalance", type=float, default=50.0, help="largest over smallest class")
    add("--seeds", type=int, default=5, help="number of seeds")
    add("--epochs", type=int, default=50, help="epochs a run")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--output", type=Path, default=Path("quickstart.png"), help="the picture")
    return parser


try:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
    from tqdm import tqdm

    from lgla_losses import ClassGrouper, ExpertOutput, GroupConvExperts, LGLALoss
    from lgla_losses.data import long_tailed_counts
    from lgla_losses.plot.style import COLORS, color, ink, line_styles
    from lgla_losses.plot.style import METHODS as METHOD_COLORS
except ImportError as error:
    if __name__ != "__main__":
        raise
    parser = make_parser()
    parser.parse_known_args()  # which answers --help
    way_out = "pip install matplotlib scikit-learn tqdm rich"
    if error.name == "lgla_losses":
        way_out = "run `pip install .` in the clone of lgla-losses"
    parser.exit(2, f"{parser.prog}: error: {error}: {way_out}\n")

NUM_CLASSES = 10
LARGEST_CLASS = 150
TEST_PER_CLASS = 24
SCALE = 16.0  # of the cosine logits: ten classes need less than the paper's 30

#: Name, number of experts and arguments of the loss, from one model to LGLA.
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "Softmax": (1, {"adjustment": "softmax", "aaw": False}),
    "BALMS x1": (1, {"adjustment": "balanced", "aaw": False}),
    "Softmax x3": (3, {"adjustment": "softmax", "aaw": False}),
    "BALMS x3": (3, {"adjustment": "balanced", "aaw": False}),
    "CLA": (3, {"adjustment": "lgla", "aaw": False}),
    "LGLA": (3, {"adjustment": "lgla", "aaw": True}),
}


class Split(NamedTuple):
    """A long-tailed training set and a balanced test set of images ``[N, 1, 8, 8]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class DigitsNet(nn.Module):
    """A shared convolution and K grouped experts with cosine classifiers."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.experts = GroupConvExperts(DigitsStage, num_experts, NUM_CLASSES, scale=SCALE)

    def forward(self, images: Tensor) -> ExpertOutput:
        """What every expert makes of the images."""
        output: ExpertOutput = self.experts(self.trunk(images))
        return output


class DigitsStage(nn.Module):
    """A residual block that halves the resolution; every expert has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
        )
        self.shortcut = nn.Conv2d(16, 32, 1, stride=2, bias=False)

    def forward(self, shared: Tensor) -> Tensor:
        """Features ``[N, 32, 4, 4]``."""
        return torch.relu(self.body(shared) + self.shortcut(shared))


def digit_counts(imbalance: float) -> list[int]:
    """Exponentially falling counts: digit 0 is the most frequent."""
    counts: list[int] = long_tailed_counts(LARGEST_CLASS, NUM_CLASSES, imbalance).tolist()
    return counts


def long_tailed_digits(imbalance: float, seed: int, device: str) -> Split:
    """Draw a balanced test set, then as many training images of every class as it is allowed."""
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    generator = np.random.default_rng(seed)
    train, test = [], []
    for digit, count in enumerate(digit_counts(imbalance)):
        index = generator.permutation(np.flatnonzero(digits.target == digit))
        test.append(index[:TEST_PER_CLASS])
        train.append(index[TEST_PER_CLASS : TEST_PER_CLASS + count])
    split = [(images[i], labels[i]) for i in (np.concatenate(train), np.concatenate(test))]
    return Split(*(tensor.to(device) for pair in split for tensor in pair))


def fit(
    num_experts: int,
    arguments: dict[str, Any],
    split: Split,
    class_counts: list[int],
    epochs: int,
    on_epoch: Callable[[], None],
) -> DigitsNet:
    """Train a network of so many experts with a loss of such arguments."""
    device = split.train_images.device
    model = DigitsNet(num_experts).to(device)
    criterion = LGLALoss(class_counts, num_experts, scale=SCALE, **arguments).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(split.train_labels), device=device).split(64):
            optimizer.zero_grad()
            criterion(model(split.train_images[batch]), split.train_labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
        on_epoch()

    return model.eval()


def train(
    method: str, split: Split, class_counts: list[int], epochs: int, on_epoch: Callable[[], None]
) -> Tensor:
    """Train one method; accuracy per class of the ensemble and of each expert, ``[1 + K, C]``."""
    model = fit(*METHODS[method], split, class_counts, epochs, on_epoch)
    with torch.no_grad():
        output = model(split.test_images)
    predictions = torch.cat([output.ensemble()[:, None], output.logits], dim=1).argmax(-1)
    correct = (predictions == split.test_labels[:, None]).float().cpu()
    per_class = [correct[split.test_labels.cpu() == digit].mean(0) for digit in range(NUM_CLASSES)]
    return torch.stack(per_class, dim=1)


def shot_columns(class_counts: list[int]) -> dict[str, Tensor]:
    """Which classes every column of the table averages (many > 100, few < 20 training images)."""
    counts = torch.tensor(class_counts)
    return {
        "balanced": counts > 0,
        "many": counts > 100,
        "medium": (counts >= 20) & (counts <= 100),
        "few": counts < 20,
        "3 rarest": torch.arange(NUM_CLASSES) >= NUM_CLASSES - 3,
    }


def print_table(accuracy: dict[str, Tensor], class_counts: list[int], title: str) -> None:
    """Mean and standard deviation over the seeds, in percent."""
    table = Table(title=title)
    table.add_column("method")
    columns = shot_columns(class_counts)
    for column in columns:
        table.add_column(column, justify="right")
    for method, per_class in accuracy.items():
        cells = []
        for members in columns.values():
            scores = 100 * per_class[:, 0, members].mean(-1)
            spread = f" ±{scores.std():.1f}" if len(scores) > 1 else ""
            cells.append(f"{scores.mean():.1f}{spread}" if members.any() else "-")
        table.add_row(method, *cells)
    Console(width=80).print(table)


def mean_and_deviation(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Average over the seeds ``[S, ...]``, with the standard deviation, which is 0 for one seed."""
    return scores.mean(0), scores.std(0) if len(scores) > 1 else torch.zeros_like(scores[0])


def draw_images(axes: Axes, class_counts: list[int]) -> None:
    """Draw the class frequencies, in the colors of the groups."""
    group = ClassGrouper(class_counts, num_groups=2).group_index
    digits = np.arange(NUM_CLASSES)
    for g, name in enumerate(("head group", "tail group")):
        own = np.array(class_counts)[group == g]
        bars = axes.bar(digits[group == g], own, color=color(g), label=f"{name}, {own.sum()} images")
        axes.bar_label(bars)
    axes.set(title="Training images of each digit", yscale="log", ylim=(1, 3 * class_counts[0]))
    axes.set(xticks=digits, xlabel="digit", ylabel="images")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()


def method_color(method: str) -> str:
    """Give the color of a method; CLA is LGLA without its weights, and has the same."""
    names = {"softmax": "softmax", "balanced": "balanced softmax", "lgla": "LGLA"}
    return METHOD_COLORS[names[METHODS[method][1]["adjustment"]]]


def draw_methods(axes: Axes, accuracy: dict[str, Tensor], class_counts: list[int]) -> None:
    """Draw the accuracy of all digits and of the rarest: a row for each method, in its color."""
    columns = shot_columns(class_counts)
    for column, label, marker, inside, above in (
        ("balanced", "all digits", "o", "white", 0.1),
        ("3 rarest", "3 rarest digits", "D", None, -0.1),
    ):
        for row, (method, per_class) in enumerate(accuracy.items()):
            mean, deviation = mean_and_deviation(100 * per_class[:, 0, columns[column]].mean(-1))
            tone = method_color(method)
            axes.errorbar(mean, row - above, xerr=deviation, fmt=marker, color=tone, mfc=inside or tone)
        axes.plot([], [], marker, color=ink(axes), mfc=inside or ink(axes), label=label)  # for the legend
    axes.set(title="Accuracy of each method", xlabel="accuracy (%)", ylim=(len(accuracy) - 0.4, -0.6))
    axes.set_yticks(range(len(accuracy)), accuracy)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(loc="lower left")


def draw_experts(axes: Axes, per_class: Tensor) -> None:
    """Draw what each expert is good at; a local one has the color of its group, the others are black."""
    mean, deviation = mean_and_deviation(100 * per_class[:, [1, 2, 3, 0]])
    names = ("local expert, head group", "local expert, tail group", "global expert", "ensemble")
    colors = (*COLORS[:2], ink(axes))
    looks = line_styles(axes, names, NUM_CLASSES, colors)
    looks[2] |= {"linewidth": 1.3, "markersize": 6, "mfc": "white"}  # apart from the ensemble, also black
    looks[3] |= {"linewidth": 2.6, "markersize": 7}
    for k, look in enumerate(looks):
        digits = np.arange(NUM_CLASSES) + 0.08 * (k - 1.5)  # side by side, for the bars
        axes.errorbar(digits, mean[k], yerr=deviation[k], elinewidth=1.0, **look)
    axes.set(title="LGLA: what each expert is good at", xticks=range(NUM_CLASSES), ylim=(0, 108))
    axes.set(xlabel="digit, from the most to the least frequent", ylabel="accuracy (%)")
    axes.legend(loc="lower center", ncols=2, handlelength=3.5)


def draw(accuracy: dict[str, Tensor], class_counts: list[int], path: Path) -> None:
    """Draw class frequencies by group, accuracy by method, and what each expert is good at."""
    figure = Figure(figsize=(9, 6.8), layout="constrained")  # its text can be read at 800 pixels
    axes = figure.subplot_mosaic([["images", "methods"], ["experts", "experts"]])
    draw_images(axes["images"], class_counts)
    draw_methods(axes["methods"], accuracy, class_counts)
    draw_experts(axes["experts"], accuracy["LGLA"])
    seeds = len(accuracy["LGLA"])
    if seeds > 1:
        figure.supxlabel(f"Markers: mean over {seeds} seeds. Bars: ± one standard deviation.", fontsize=10)
    figure.savefig(path, dpi=200)


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what could not be trained or written, before any training."""
    for name in ("imbalance", "seeds", "epochs"):
        if not 1 <= getattr(options, name) < math.inf:
            parser.error(f"--{name}: expected a number from 1 on, got {getattr(options, name)}")
    if options.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--output: expected a .png, .pdf or .svg file, got {options.output}")
    if not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")
    try:
        torch.zeros(1, device=options.device).cpu()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {error}".partition("\n")[0])


def main(arguments: list[str] | None = None) -> None:
    """Train every method on every seed and report the last epoch."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    check(options, parser)

    class_counts = digit_counts(options.imbalance)
    accuracy: dict[str, list[Tensor]] = {method: [] for method in METHODS}
    steps = options.seeds * len(METHODS) * options.epochs
    with tqdm(total=steps, unit="epoch", mininterval=0.1 if sys.stderr.isatty() else 10.0) as bar:
        for seed in range(options.seeds):
            split = long_tailed_digits(options.imbalance, seed, options.device)
            for method, results in accuracy.items():
                torch.manual_seed(seed)
                bar.set_description(f"{method}, seed {seed}")
                results.append(train(method, split, class_counts, options.epochs, bar.update))

    stacked = {method: torch.stack(results) for method, results in accuracy.items()}
    title = (
        f"Accuracy (%) on long-tailed digits, {class_counts[0]} to {class_counts[-1]} images a class, "
        f"{options.seeds} seeds"
    )
    print_table(stacked, class_counts, title)
    draw(stacked, class_counts, options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    # One thread is as fast as two for such small batches. On a busy machine two wait for each other.
    torch.set_num_threads(1)
    main()
