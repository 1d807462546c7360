# Needs: cli.py, sampling.py.
"""The recipe of a run: network, loss, optimizer and learning rates."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cli import InputError
from sampling import Sample
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, default_collate

from lgla_losses import ClassGrouper, ExpertOutput, GroupConvExperts, LGLALoss, split_backbone


class Task(NamedTuple):
    """The network of a script, and its data.

    Attributes:
        make_network: makes the network to split, a new one at every call; or, with ``split`` false, the
            model, whose output is an ``ExpertOutput``.
        pretrained: whether experts keep the network's weights, or start with their own new weights.
        train: samples to learn from.
        val: samples to evaluate on.
        train_labels: class of every sample of ``train``.
        class_names: one name per class.
        libraries: packages whose versions are recorded.
        collate: makes a batch from samples.
        keep: writes the files that a checkpoint needs besides itself.
        split: whether the network is to be split into a trunk and experts.
        augment: augments the inputs of every training batch, and in evaluation mode prepares those of
            ``val``. Then samples are the same in every epoch, and all randomness is here. None if the samples
            are random themselves.
        gradient: for cosine classifiers, as in GroupConvExperts; ``"exact"`` as in the paper.
    """

    make_network: Callable[[], nn.Module]
    pretrained: bool
    train: Dataset[Sample]
    val: Dataset[Sample]
    train_labels: list[int]
    class_names: list[str]
    libraries: tuple[str, ...]
    collate: Callable[[list[Sample]], Any] = default_collate
    keep: Callable[[Path], object] = lambda folder: None
    split: bool = True
    augment: nn.Module | None = None
    gradient: str = "bounded"

    def prepared(self, inputs: list[Tensor], training: bool) -> list[Tensor]:
        """Prepare the inputs for the network."""
        if self.augment is None:
            return inputs
        augment = self.augment.train(training)
        return [augment(tensor) for tensor in inputs]


class ExpertModel(nn.Module):
    """A shared trunk and K experts."""

    def __init__(self, trunk: nn.Module, experts: GroupConvExperts) -> None:
        super().__init__()
        self.trunk = trunk
        self.experts = experts

    def forward(self, *inputs: Tensor) -> ExpertOutput:
        """Compute the outputs of every expert."""
        output: ExpertOutput = self.experts(self.trunk(*inputs))
        return output


def build_model(task: Task, options: argparse.Namespace) -> nn.Module:
    """Split the network, and try the parts on two samples."""
    if not task.split:
        return task.make_network()

    def split() -> tuple[nn.Module, nn.Module]:
        return split_backbone(task.make_network(), options.split_at, head=options.head)

    try:
        trunk, stage = split()
        experts = GroupConvExperts(
            stage if task.pretrained else lambda: split()[1],
            options.num_experts,
            len(task.class_names),
            classifier=options.classifier,
            scale=options.scale,
            layout=options.layout,
            reset=False,
            gradient=task.gradient,
        )
        model = ExpertModel(trunk, experts)
        with torch.no_grad():
            inputs = task.collate([task.val[0]] * 2)[0]
            model.eval()(*task.prepared(inputs, training=False))
    except InputError:
        raise
    except Exception as error:  # any kind, because the network's code runs here
        raise InputError(f"--split-at {options.split_at}: {error}") from error
    return model


def build_criterion(class_counts: Tensor, options: argparse.Namespace) -> LGLALoss:
    """Make the loss that the options name."""
    groups: dict[str, Any] = {"class_counts": class_counts, "num_experts": options.num_experts}
    if options.groups == "shots":
        shots = (class_counts <= 100).long() + (class_counts < 20)
        sizes = dict(zip(("many-shot", "medium-shot", "few-shot"), shots.bincount(minlength=3), strict=True))
        empty = [name for name, size in sizes.items() if size == 0]
        if empty:
            raise InputError(
                f"--groups shots: expected classes of each kind, got no {' and no '.join(empty)} ones"
            )
        groups = {"grouper": ClassGrouper.from_groups(class_counts, shots)}
    try:
        return LGLALoss(
            **groups,
            tau=options.tau,
            aaw=options.aaw,
            scale=options.scale if options.classifier == "cosine" else None,
            adjustment=options.adjustment,
            validate_args=False,  # the loop checks the loss, and names epoch and step
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict[str, Any]]:
    """Group all parameters; biases and norms have no weight decay, unless all have it.

    Chosen by layer and name, not by dimension, because grouped experts have one dimension more.
    """
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = name.endswith("bias") or "Norm" in type(module).__name__
            (kept if exempt and not decay_all else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW."""
    groups = parameter_groups(model, options.weight_decay, options.decay_all)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)


def make_schedule(
    optimizer: torch.optim.Optimizer, options: argparse.Namespace, num_steps: int
) -> LRScheduler:
    """Learning rates by step, ``num_steps`` per epoch: a rise, then a cosine or steps.

    The rise is linear by step; with ``--warmup-start``, linear by epoch from that value.
    """
    warmup, total = options.warmup_epochs * num_steps, options.epochs * num_steps
    start, end = options.warmup_start, options.final_lr / options.lr if options.lr else 0.0

    def factor(step: int) -> float:
        if step < warmup and start is None:
            return float((step + 1) / (warmup + 1))
        if step < warmup:
            return float(start + (1 - start) * (step // num_steps) / options.warmup_epochs)
        if options.schedule == "cosine":
            fall = max(total - warmup, 1)  # 0 if the rate rises until the last step
            return float(end + (1 - end) * (1 + math.cos(math.pi * (step - warmup) / fall)) / 2)
        return float(0.1 ** sum(step >= epoch * num_steps for epoch in options.milestones))

    return LambdaLR(optimizer, factor)
