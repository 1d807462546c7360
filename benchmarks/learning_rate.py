"""What the usual learning rate makes of three experts: with cosine heads' exact and bounded gradient.

Trains small networks on long-tailed data at one learning rate with a cosine schedule, and compares them with
one model's balanced softmax: as they are, with the gradient's norm clipped at 1, and with three epochs of
warm-up. Every seed draws data for training and for the test of its own. Beside the balanced accuracy the
record has what grows: the gradient of the first step, and the mean length of the class centres at the end.
It is written after every run, and a run that it has is not repeated; where code or settings change, start a
new one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from arguments import positive, record_file
from expert_layouts import Block
from measure import made_here
from recording import write_whole
from sklearn.datasets import load_digits
from tables import grid
from torch import Tensor, nn

from lgla_losses import GroupConvExperts, LGLALoss
from lgla_losses.baselines import BalancedSoftmaxLoss
from lgla_losses.data import ImageData, long_tailed_counts, long_tailed_indices, read_npz

RESULTS = Path(__file__).parent / "results"
CLASSES, EXPERTS, PIXELS = 10, 3, 16


class Split(NamedTuple):
    """Inputs and labels for training and for the test."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class Setting(NamedTuple):
    """A network on its data, and how it is trained."""

    parts: Callable[[], tuple[nn.Module, Callable[[], nn.Module], int]]
    images: bool
    optimizer: str
    rate: float
    epochs: int
    batch: int


class Method(NamedTuple):
    """A loss and its head, and what is done about the learning rate."""

    loss: str
    gradient: str = "bounded"
    scale: float = 30.0
    clip: float | None = None
    warmup: int = 0


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps."""

    def forward(self, maps: Tensor) -> Tensor:
        """The normalised maps."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, a layer norm and two pointwise convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            ChannelNorm(width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """The block's feature map."""
        result: Tensor = maps + self.body(maps)
        return result


class Attention(nn.Module):
    """Self-attention over tokens, and a perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.project = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """The block's tokens ``[N, T, width]``."""
        query, key, value = self.mix(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.project(seen)
        result: Tensor = tokens + self.perceptron(tokens)
        return result


class Patches(nn.Module):
    """Tokens of patches of 4 x 4 pixels, each with a vector of its place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, (PIXELS // 4) ** 2, width))

    def forward(self, maps: Tensor) -> Tensor:
        """Tokens ``[N, T, width]``."""
        result: Tensor = self.patches(maps).flatten(2).transpose(1, 2) + self.places
        return result


class Mean(nn.Module):
    """The mean of the tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Features ``[N, width]``."""
        return tokens.mean(1)


def resnet() -> tuple[nn.Module, Callable[[], nn.Module], int]:
    """Trunk, maker of a stage and its width: three stages of one block, the last one an expert's own."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, Block(16, 16, 1, 1), Block(16, 32, 2, 1)), lambda: Block(32, 64, 2, 1), 64


def convnext() -> tuple[nn.Module, Callable[[], nn.Module], int]:
    """Trunk, maker of a stage and its width: blocks of ConvNeXt without layer scale."""
    trunk = nn.Sequential(nn.Conv2d(3, 32, 2, 2), ChannelNorm(32), ConvNeXtBlock(32), ConvNeXtBlock(32))

    def stage() -> nn.Module:
        downsampling = (ChannelNorm(32), nn.Conv2d(32, 64, 2, 2))
        return nn.Sequential(
            *downsampling, ConvNeXtBlock(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(64)
        )

    return trunk, stage, 64


def vit() -> tuple[nn.Module, Callable[[], nn.Module], int]:
    """Trunk, maker of a stage and its width: a ViT of three blocks."""
    trunk = nn.Sequential(Patches(64), Attention(64), Attention(64))
    return trunk, lambda: nn.Sequential(Attention(64), nn.LayerNorm(64), Mean()), 64


def perceptron() -> tuple[nn.Module, Callable[[], nn.Module], int]:
    """Trunk, maker of a stage and its width: linear layers without any norm."""
    trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return trunk, lambda: nn.Sequential(nn.Linear(128, 64), nn.ReLU()), 64


SETTINGS = {
    "MLP, SGD 0.1, 30 epochs": Setting(perceptron, False, "sgd", 0.1, 30, 32),
    "ResNet, SGD 0.1, 15 epochs": Setting(resnet, True, "sgd", 0.1, 15, 64),
    "ResNet, SGD 0.1, 60 epochs": Setting(resnet, True, "sgd", 0.1, 60, 64),
    "ViT, SGD 0.1, 30 epochs": Setting(vit, True, "sgd", 0.1, 30, 64),
    "ViT, AdamW 1e-3, 30 epochs": Setting(vit, True, "adamw", 1e-3, 30, 64),
    "ConvNeXt, SGD 0.1, 30 epochs": Setting(convnext, True, "sgd", 0.1, 30, 64),
    "ConvNeXt, AdamW 1e-3, 30 epochs": Setting(convnext, True, "adamw", 1e-3, 30, 64),
}
METHODS = {
    "balanced softmax, one model": Method("balanced"),
    "balanced softmax, one model, clipped": Method("balanced", clip=1.0),
    "LGLA": Method("lgla"),
    "LGLA, clipped": Method("lgla", clip=1.0),
    "LGLA, warm-up": Method("lgla", warmup=3),
    "LGLA, scale 10, clipped": Method("lgla", scale=10.0, clip=1.0),
    "LGLA, exact gradient": Method("lgla", "exact"),
    "LGLA, exact gradient, clipped": Method("lgla", "exact", clip=1.0),
    "LGLA, exact gradient, warm-up": Method("lgla", "exact", warmup=3),
}


def digits(seed: int) -> Split:
    """scikit-learn's digits, of which the classes keep 90 to 2 for training and 80 for the test."""
    data, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(data).float() / 16
    order = np.random.default_rng(seed).permutation(len(labels))
    test = np.concatenate([order[labels[order] == c][:80] for c in range(CLASSES)])
    rest = np.setdiff1d(order, test)
    kept = rest[long_tailed_indices(labels[rest], long_tailed_counts(90, CLASSES, 45.0), seed=seed)]
    mean, deviation = inputs[kept].mean(0), inputs[kept].std()
    inputs = (inputs - mean) / deviation
    target = torch.from_numpy(labels)
    return Split(inputs[kept], target[kept], inputs[test], target[test])


def images(data: dict[str, ImageData], seed: int) -> Split:
    """Images in 16 x 16 pixels: 400 to 4 a class for training, 200 for the test."""
    labels = {half: np.asarray(data[half].targets) for half in data}
    kept = long_tailed_indices(labels["train"], long_tailed_counts(400, CLASSES, 100.0), seed=seed)
    test = long_tailed_indices(labels["val"], [200] * CLASSES, seed=seed)

    inputs, test_inputs = _small(data["train"], kept), _small(data["val"], test)
    mean, deviation = inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    halves = [(part - mean) / deviation for part in (inputs, test_inputs)]
    targets = [
        torch.from_numpy(labels[half][chosen]).long() for half, chosen in (("train", kept), ("val", test))
    ]
    return Split(halves[0], targets[0], halves[1], targets[1])


def _small(data: ImageData, chosen: Any) -> Tensor:
    """The chosen images ``[N, 3, 16, 16]``."""
    whole = torch.stack([torch.from_numpy(np.array(data[int(i)][0])) for i in chosen])
    return F.interpolate(whole.movedim(-1, 1).float() / 255, size=PIXELS, mode="area")


def augmented(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Images flipped one by one and shifted together; other inputs as they are."""
    if batch.dim() == 2:
        return batch
    flips = torch.rand(len(batch), generator=generator) < 0.5
    shifts = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.where(flips[:, None, None, None], batch.flip(3), batch).roll(shifts, (2, 3))


def rate_at(step: int, steps: int, warmup: int) -> float:
    """The part of the learning rate that the schedule leaves."""
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * step / steps))


def gradient_norm(module: nn.Module) -> float:
    """The norm of all gradients of a module."""
    return float(nn.utils.get_total_norm(p.grad for p in module.parameters() if p.grad is not None))


def make(setting: Setting, method: Method, counts: Tensor) -> tuple[nn.Module, GroupConvExperts, nn.Module]:
    """Trunk, experts and loss."""
    trunk, stage, width = setting.parts()
    if method.loss == "balanced":
        experts = GroupConvExperts(stage, 1, CLASSES, num_features=width, classifier="linear")
        return trunk, experts, BalancedSoftmaxLoss(counts)
    experts = GroupConvExperts(
        stage, EXPERTS, CLASSES, num_features=width, scale=method.scale, gradient=method.gradient
    )
    return trunk, experts, LGLALoss(counts, EXPERTS, scale=method.scale)


def train(setting: Setting, method: Method, split: Split, seed: int) -> dict[str, float]:
    """One run: balanced accuracy in percent, first gradients, and the class centres' length at the end."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    trunk, experts, criterion = make(setting, method, torch.bincount(split.labels, minlength=CLASSES))
    parameters = [*trunk.parameters(), *experts.parameters()]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, momentum=0.9, weight_decay=5e-4)
        if setting.optimizer == "sgd"
        else torch.optim.AdamW(parameters, weight_decay=0.05)
    )
    batches = math.ceil(len(split.labels) / setting.batch)
    steps, step = batches * setting.epochs, 0
    first: dict[str, float] = {}

    for _ in range(setting.epochs):
        for chosen in torch.randperm(len(split.labels), generator=generator).split(setting.batch):
            optimizer.param_groups[0]["lr"] = setting.rate * rate_at(step, steps, batches * method.warmup)

            output = experts(trunk(augmented(split.inputs[chosen], generator)))
            logits = output.logits[:, 0] if method.loss == "balanced" else output
            optimizer.zero_grad()
            criterion(logits, split.labels[chosen]).backward()

            first = first or {
                "first_gradient_trunk": gradient_norm(trunk),
                "first_gradient_heads": gradient_norm(experts.classifiers),
            }
            if method.clip is not None:
                nn.utils.clip_grad_norm_(parameters, method.clip)
            optimizer.step()
            step += 1

    length = float(experts.classifiers.weight.detach().norm(dim=-1).mean())
    return {"balanced_accuracy": accuracy(trunk, experts, split), "class_centres_length": length, **first}


@torch.no_grad()
def accuracy(trunk: nn.Module, experts: GroupConvExperts, split: Split) -> float:
    """Percent of the test samples that the ensemble tells; their classes are of one size."""
    trunk.eval(), experts.eval()
    parts = [experts(trunk(part)).ensemble().argmax(1) for part in split.test_inputs.split(500)]
    return 100 * float((torch.cat(parts) == split.test_labels).double().mean())


def scores(record: dict[str, Any], what: str = "balanced_accuracy") -> dict[tuple[str, str], list[float]]:
    """A number of every seed, by setting and method, in the order of the lists above."""
    found: dict[tuple[str, str], list[float]] = {key: [] for key in itertools.product(SETTINGS, METHODS)}
    for run in record["runs"]:
        found[run["setting"], run["method"]].append(run[what])
    return {key: values for key, values in found.items() if values}


def markdown(record: dict[str, Any]) -> str:
    """A row a setting and method: mean and standard deviation over seeds, and the means of what grows."""
    grown = [
        scores(record, name)
        for name in ("first_gradient_trunk", "first_gradient_heads", "class_centres_length")
    ]
    rows = []
    for key, values in scores(record).items():
        spread = f"\u00a0±\u00a0{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        means = (f"{statistics.mean(numbers[key]):.2f}" for numbers in grown)
        rows.append([*key, len(values), f"{statistics.mean(values):.1f}{spread}", *means])
    header = ["network", "method", "seeds", "accuracy", "gradient: trunk", "heads", "centres"]
    return grid(header, rows, texts=2)


def main(arguments: list[str] | None = None) -> None:
    """Train what the record lacks, write it after every run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="CIFAR-10 in an .npz file; without it the MLP alone is trained"
    )
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--first-seed", type=positive, default=1)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=record_file, default=RESULTS / "learning_rate_cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    record: dict[str, Any] = {
        "what": f"{EXPERTS} experts, balanced accuracy in percent, cosine schedule, one thread",
        **made_here(),
        "runs": [],
    }
    if options.output.exists():
        record = json.loads(options.output.read_text(encoding="utf-8"))
    there = {(run["setting"], run["method"], run["seed"]) for run in record["runs"]}

    settings = [name for name in options.settings if options.data or not SETTINGS[name].images]
    data = read_npz(options.data) if options.data else {}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for setting, seed in itertools.product(settings, seeds):
        split = images(data, seed) if SETTINGS[setting].images else digits(seed)
        for method in options.methods:
            if (setting, method, seed) in there:
                continue
            made = train(SETTINGS[setting], METHODS[method], split, seed)
            record["runs"].append({"setting": setting, "method": method, "seed": seed, **made})
            write_whole(options.output, json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
