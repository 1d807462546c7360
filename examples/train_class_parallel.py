# Needs: cli.py.
"""Train a classifier whose classes are spread over the ranks: torchrun --nproc-per-node 4 [this script].

Every rank holds only the weights of its own classes, with their gradients and optimizer state. With
--data-ranks 2 the ranks form a mesh: 2 parts of the batch by half as many parts of the classes. The samples
are artificial, noisy views of one random prototype per class, because this library has no data with 200,000
classes; the class counts follow an exponential long tail. With more steps or fewer classes it learns more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from cli import Parser, needs, number, start
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--classes", type=number(int, 2), default=200_000, help="classes of all ranks together")
    add(
        "--imbalance",
        type=number(float, 1),
        default=1000.0,
        help="count of the most frequent class over the rarest",
    )
    add("--num-experts", type=number(int, 2), default=3, help="the paper's K")
    add(
        "--data-ranks",
        type=number(int, 1),
        default=1,
        help="parts of the batch; must divide the number of ranks",
    )
    add("--batch-size", type=number(int, 1), default=256, help="samples per step on all ranks together")
    add("--steps", type=number(int, 1), default=30, help="steps of the optimizer")
    add("--lr", type=number(float, 0), default=0.01, help="learning rate of Adam")
    add("--clip-norm", type=number(float, 0), default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--seed", type=number(int, 1), default=1, help="seed of weights and samples")
    add("--timeout", type=number(float, 1, 1e9), default=600.0, help="seconds that a rank waits for others")
    return parser


with needs("train", make_parser, __name__):
    from tqdm import tqdm

    from lgla_losses.data import long_tailed_counts
    from lgla_losses.distributed import ClassParallelLGLALoss

#: Length of an input, and of a feature vector.
INPUTS, FEATURES = 32, 64


class Samples:
    """Artificial samples: prototypes of the classes, with noise."""

    def __init__(self, class_counts: Tensor, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)  # the same prototypes on every rank
        self.prototypes = torch.randn(len(class_counts), INPUTS, generator=generator).to(device)
        self.frequency = class_counts.double()

    def draw(self, size: int, seed: int, balanced: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs ``[N, INPUTS]`` and classes ``[N]``, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        frequency = torch.ones_like(self.frequency) if balanced else self.frequency
        # Not torch.multinomial, which takes at most 2 ** 24 classes.
        edges = frequency.cumsum(0)
        drawn = torch.rand(size, generator=generator, dtype=torch.float64) * edges[-1]
        target = torch.searchsorted(edges, drawn, right=True).clamp(max=len(edges) - 1)
        noise = torch.randn(size, INPUTS, generator=generator)
        target = target.to(self.prototypes.device)
        return self.prototypes[target] + 0.3 * noise.to(target.device), target


class Experts(nn.Module):
    """Layers before the classifiers: inputs to the features of K experts ``[N, K, FEATURES]``."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, num_experts * FEATURES))

    def forward(self, inputs: Tensor) -> Tensor:
        """Features of every expert."""
        features: Tensor = self.layers(inputs).unflatten(1, (-1, FEATURES))
        return features


class Ranks(NamedTuple):
    """This rank's part of the batch and of the classes."""

    mesh: DeviceMesh
    device: torch.device

    @property
    def data(self) -> dist.ProcessGroup:
        """The ranks that share the batch."""
        return self.mesh["data"].get_group()

    @property
    def classes(self) -> dist.ProcessGroup:
        """The ranks that share the classes."""
        return self.mesh["classes"].get_group()


def train(options: argparse.Namespace, ranks: Ranks) -> None:
    """Train some steps, and report the result."""
    is_writer = dist.get_rank() == 0
    samples = Samples(long_tailed_counts(1000, options.classes, options.imbalance), ranks.device)
    class_counts = samples.frequency
    criterion = ClassParallelLGLALoss(
        class_counts, options.num_experts, scale=30.0, process_group=ranks.classes, data_group=ranks.data
    ).to(ranks.device)
    own = len(criterion.class_counts)
    torch.manual_seed(options.seed)
    experts = DistributedDataParallel(Experts(options.num_experts).to(ranks.device))
    torch.manual_seed(options.seed + 1 + ranks.mesh.get_local_rank("classes"))
    weight = nn.Parameter(torch.randn(options.num_experts, own, FEATURES, device=ranks.device))
    optimizer = torch.optim.Adam([*experts.parameters(), weight], options.lr)

    mine = ranks.mesh.get_local_rank("data")
    num_data_ranks = ranks.mesh["data"].size()
    losses = []
    begun = time.monotonic()
    for step in tqdm(range(options.steps), unit="step", disable=not (is_writer and sys.stderr.isatty())):
        # All ranks that share the classes draw the same part of the batch.
        inputs, target = samples.draw(options.batch_size, seed=options.seed + step)
        inputs, target = inputs.tensor_split(num_data_ranks)[mine], target.tensor_split(num_data_ranks)[mine]
        loss = criterion(experts(inputs), weight, target)
        optimizer.zero_grad()
        loss.backward()
        if num_data_ranks > 1 and weight.grad is not None:  # as DDP does for the experts
            dist.all_reduce(weight.grad, group=ranks.data)
            weight.grad /= num_data_ranks
        if options.clip_norm:
            clip_gradients(experts, weight, options.clip_norm, ranks)
        optimizer.step()
        losses.append(loss.detach())
    seconds = (time.monotonic() - begun) / options.steps
    hits = accuracy(experts, weight, criterion, samples, ranks, options)
    if is_writer:
        print(
            f"{options.classes} classes, {own} of them on this rank: {1e3 * seconds:.0f} ms a step, loss "
            f"{float(losses[0]):.2f} -> {float(losses[-1]):.2f}, balanced accuracy {100 * hits:.2f} % "
            f"(chance {100 / options.classes:.4f} %)"
        )


@torch.no_grad()
def clip_gradients(experts: nn.Module, weight: nn.Parameter, max_norm: float, ranks: Ranks) -> None:
    """Clip by the norm of all gradients, including those of the other ranks' classes.

    With its own norm every rank would clip the shared parameters differently, and they would drift apart.
    """
    square = torch.zeros((), device=ranks.device)
    if weight.grad is not None:
        square += weight.grad.square().sum()
    dist.all_reduce(square, group=ranks.classes)

    shared = nn.utils.get_total_norm([p.grad for p in experts.parameters() if p.grad is not None])
    total = (square + shared**2).sqrt()
    nn.utils.clip_grads_with_norm_([*experts.parameters(), weight], max_norm, total)


@torch.no_grad()
def accuracy(
    experts: nn.Module,
    weight: Tensor,
    criterion: ClassParallelLGLALoss,
    samples: Samples,
    ranks: Ranks,
    options: argparse.Namespace,
) -> float:
    """Accuracy of the ensemble on new samples: each rank finds its best class, then the ranks compare."""
    inputs, target = samples.draw(options.batch_size, seed=options.seed - 1, balanced=True)
    cosines = nn.functional.normalize(experts(inputs), dim=-1)
    found = torch.full((len(target), 2), -torch.inf, dtype=torch.float64, device=target.device)
    if weight.shape[1]:
        # The mean of the experts' cosines is one product of vectors that are K times as long.
        centres = nn.functional.normalize(weight, dim=-1).transpose(0, 1).flatten(1)
        best = (cosines.flatten(1) @ centres.T).max(dim=1)
        found = torch.stack([best.values.double(), (best.indices + criterion.classes.start).double()], dim=1)
    every = [torch.empty_like(found) for _ in range(criterion.num_ranks)]
    dist.all_gather(every, found, group=ranks.classes)
    stacked = torch.stack(every)
    winner = stacked[..., 0].argmax(dim=0)
    prediction = stacked[winner, torch.arange(len(target), device=target.device), 1]
    return float((prediction == target).double().mean())


def main(arguments: list[str] | None = None) -> None:
    """One rank of a run; --help lists the options."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" not in os.environ:
        parser.error("expected a start with torchrun --nproc-per-node 4, got one without it")
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % options.data_ranks:
        parser.error(
            f"--data-ranks: expected a number that divides {world_size} ranks, got {options.data_ranks}"
        )
    if options.num_experts > options.classes + 1:
        parser.error(
            f"--num-experts: expected at most {options.classes + 1} for {options.classes} classes, got "
            f"{options.num_experts}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout))
    shape = (options.data_ranks, world_size // options.data_ranks)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "classes"))
    train(options, Ranks(mesh, device))
    dist.destroy_process_group()


if __name__ == "__main__":
    start(main)
