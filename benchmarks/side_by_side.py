"""Networks of several methods that train side by side, on the same batches and from the same first weights.

The layers of all networks lie in one tensor each, so that a step of all takes little more than the sum of
their products. Every network is what :class:`~lgla_losses.GroupConvExperts` with this trunk and stage is, its
gradient is clipped by its own norm, and none knows of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import arguments  # noqa: F401  the package of this checkout
import torch
import torch.nn.functional as F
from real_data import Split
from torch import Tensor, nn

from lgla_losses import ExpertOutput, create_loss
from lgla_losses.baselines import expert_distillation
from lgla_losses.experts import ExpertClassifiers

#: Numbers between the trunk and a stage, and between a stage and its classifier.
HIDDEN, FEATURES = 256, 128
SCALE = 30.0
#: Share of the epochs after which LDAM-DRW and RIDE weigh the classes: where the learning rate has halved.
DEFERRED = 0.5
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Method(NamedTuple):
    """A loss, by the name and the options that ``create_loss`` takes.

    Attributes:
        linear: further options where the heads are linear.
        deferred: whether it weighs classes in the second half of the epochs, as LDAM-DRW.
        factor: of the loss: twice the loss is about twice the learning rate, but for clipped gradients.
        distillation: factor of the distillation between experts that is added; below 0 it draws them apart.
        rising: whether tau rises from epoch to epoch, to that of the options in the last.
    """

    loss: str
    options: Mapping[str, Any] = NOTHING
    linear: Mapping[str, Any] = NOTHING
    deferred: bool = False
    factor: float = 1.0
    distillation: float = 0.0
    rising: bool = False

    def criterion(self, counts: Tensor, head: str) -> Any:
        """Make the loss for a kind of heads."""
        loss = create_loss(self.loss, counts, **self.options, **(self.linear if head == "linear" else {}))
        return Distilled(loss, self.distillation) if self.distillation else loss


class Distilled(nn.Module):
    """A loss of experts, and what they learn from each other.

    With its adjustments every expert predicts under the prior of training, so these predictions should agree.
    """

    def __init__(self, loss: Any, distillation: float) -> None:
        super().__init__()
        self.loss, self.distillation = loss, distillation

    def forward(self, output: ExpertOutput, target: Tensor) -> Tensor:
        """Add the distillation to the loss of a batch."""
        adjusted = output.logits + self.loss.adjuster.table.to(output.logits)
        loss: Tensor = self.loss(output, target)
        return loss + self.distillation * expert_distillation(adjusted).mean()

    def implied_prior(self) -> Tensor:
        """Give that of the loss."""
        prior: Tensor = self.loss.implied_prior()
        return prior


class Group(NamedTuple):
    """Methods whose networks train side by side, of ``experts`` experts each.

    Attributes:
        mixup: the parameter of mixup's Beta distribution; 0 is none.
        dropped: share of the inputs that are 0 in training; of images, a share of the pixels.
    """

    methods: Mapping[str, Method]
    experts: int
    mixup: float = 0.0
    dropped: float = 0.0


class Layers(nn.Module):
    """A linear layer of every network: ``[M, N, a]`` to ``[M, N, b]``, or ``[N, a]`` that all share."""

    def __init__(self, networks: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(networks, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(networks, outputs).uniform_(-bound, bound))

    if TYPE_CHECKING:

        def __call__(self, inputs: Tensor) -> Tensor:
            """Give the outputs, as :meth:`forward`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply every network's own layer."""
        if inputs.dim() == 2:
            together = F.linear(inputs, self.weight.flatten(0, 1), self.bias.flatten())
            return together.view(len(inputs), *self.bias.shape).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], inputs, self.weight.transpose(1, 2))


class Convolutions(nn.Module):
    """Two convolutions of every network, of images that all share: ``[N, 3, 16, 16]`` to ``[M, N, 192]``."""

    def __init__(self, networks: int) -> None:
        super().__init__()
        self.networks = networks
        narrow, wide = 24 * networks, 48 * networks
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, narrow, 3, 2, padding=1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()),
            nn.Conv2d(narrow, wide, 3, 2, padding=1, bias=False, groups=networks),
            *(nn.BatchNorm2d(wide), nn.ReLU(), nn.AvgPool2d(2)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Apply every network's own convolutions."""
        maps: Tensor = self.layers(images)
        return maps.reshape(len(images), self.networks, -1).transpose(0, 1)


class SideBySide(nn.Module):
    """``M`` networks, each of a trunk, ``K`` stages and ``K`` classifiers."""

    def __init__(self, networks: int, experts: int, inputs: Tensor, num_classes: int, head: str) -> None:
        super().__init__()
        self.networks, self.experts = networks, experts
        images = inputs.dim() == 4
        self.trunk = Convolutions(networks) if images else Layers(networks, inputs.shape[1], HIDDEN)
        self.stages = Layers(networks, 192 if images else HIDDEN, experts * FEATURES)
        scale = SCALE if head == "cosine" else None
        self.heads = ExpertClassifiers(networks * experts, FEATURES, num_classes, scale)

    @torch.no_grad()
    def begin_alike(self, one: SideBySide) -> None:
        """Give every network the weights of a single one."""
        for parameter, first in zip(self.parameters(), one.parameters(), strict=True):
            parameter.view(self.networks, -1).copy_(first.view(1, -1))

    def features(self, inputs: Tensor) -> Tensor:
        """Compute what the classifiers take: ``[N, M * K, d]``."""
        features: Tensor = self.stages(self.trunk(inputs).relu()).relu()
        return features.transpose(0, 1).reshape(len(inputs), -1, FEATURES)

    if TYPE_CHECKING:

        def __call__(self, inputs: Tensor) -> list[ExpertOutput]:
            """Give the outputs, as :meth:`forward`."""

    def forward(self, inputs: Tensor) -> list[ExpertOutput]:
        """Give the output of every network."""
        features = self.features(inputs)
        logits = self.heads(features)
        parts = [slice(first, first + self.experts) for first in range(0, logits.shape[1], self.experts)]
        return [ExpertOutput(logits[:, k], features[:, k], self.heads.weight[k]) for k in parts]

    def clip(self, largest: float = 1.0) -> None:
        """Scale down the gradient of every network whose norm is larger."""
        gradients = [p.grad.view(self.networks, -1) for p in self.parameters() if p.grad is not None]
        norms = torch.stack([g.square().sum(1) for g in gradients]).sum(0).sqrt()
        factors = (largest / (norms + 1e-6)).clamp(max=1.0)[:, None]
        for gradient in gradients:
            gradient.mul_(factors)


def train(
    split: Split, group: Group, head: str, seed: int, epochs: int, batch: int
) -> tuple[SideBySide, dict[str, Any]]:
    """Train the networks of a group; give them and their losses."""
    counts = class_counts(split)
    torch.manual_seed(seed)
    first = SideBySide(1, group.experts, split.inputs, len(counts), head)
    network = SideBySide(len(group.methods), group.experts, split.inputs, len(counts), head)
    network.begin_alike(first)
    criteria = {name: method.criterion(counts, head) for name, method in group.methods.items()}
    factors = torch.tensor([method.factor for method in group.methods.values()])
    steps = epochs * math.ceil(len(split.labels) / batch)
    optimizer, schedule = optimizer_of(network, steps)
    # The order of the samples is the same in all groups.
    order, mixing = (torch.Generator().manual_seed(base + seed) for base in (1000, 2000))

    for epoch in range(epochs):
        for name, method in group.methods.items():
            if method.deferred:
                criteria[name].reweight(epoch >= DEFERRED * epochs)
            if method.rising:
                criteria[name].set_adjustment(tau=method.options["tau"] * (epoch + 1) / epochs)
        for chosen in torch.randperm(len(split.labels), generator=order).split(batch):
            inputs, target = split.inputs[chosen], split.labels[chosen]
            if inputs.dim() == 4 and torch.rand((), generator=order) < 0.5:
                inputs = inputs.flip(3)
            if group.mixup > 0:
                inputs, target = mixed(inputs, target, len(counts), group.mixup, mixing)
            if group.dropped > 0:
                inputs = dropped(inputs, group.dropped, mixing)
            outputs = network(inputs)
            losses = [loss(output, target) for loss, output in zip(criteria.values(), outputs, strict=True)]
            optimizer.zero_grad()
            (torch.stack(losses) @ factors).backward()
            network.clip()
            optimizer.step()
            schedule.step()
    return network.eval(), criteria


def class_counts(split: Split) -> Tensor:
    """Count the training samples; a class whose samples are all held out counts as one."""
    return torch.bincount(split.labels, minlength=int(split.test_labels.max()) + 1).clamp_min(1)


def optimizer_of(
    network: nn.Module, steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.CosineAnnealingLR]:
    """Make the optimizer of all trainings, and its schedule."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def mixed(
    inputs: Tensor, target: Tensor, num_classes: int, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix every sample with another of the batch; the targets become class probabilities."""
    # Of two Gamma distributions, as PyTorch's Beta takes no generator.
    sides = torch._standard_gamma(torch.tensor([alpha, alpha]), generator)
    share = float(sides[0] / sides.sum())
    other = torch.randperm(len(inputs), generator=generator)
    one_hot = F.one_hot(target, num_classes).float()
    return inputs.lerp(inputs[other], 1 - share), one_hot.lerp(one_hot[other], 1 - share)


def dropped(inputs: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set a share of the inputs to 0, of images whole pixels; the others grow, so that sums stay alike."""
    size = (len(inputs), 1, *inputs.shape[2:]) if inputs.dim() == 4 else inputs.shape
    return inputs * (torch.rand(size, generator=generator) >= share) / (1 - share)
