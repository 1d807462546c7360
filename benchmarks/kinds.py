"""What the losses take beside stacked logits and class indices, each kind of input with its plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import torch
import torch.nn.functional as F
from peers import SCALE, Batch, Column, Loss, PlainLoop, Shape, class_counts, criterion_of
from torch import Generator, Tensor

from lgla_losses import ExpertOutput, baselines
from lgla_losses.functional import angles_from_features, angles_from_logits, angles_of, unit_vectors

#: Of the features that come with the logits of an ``ExpertOutput``.
WIDTH = 64


class Way(NamedTuple):
    """A way to compute a loss: what is made of it once, and what is called every step."""

    make: Callable[[Shape, str], Any]
    call: Callable[[Any, Batch], Tensor]

    def loss(self, shape: Shape, device: str) -> Loss:
        """The loss of a batch."""
        made, call = self.make(shape, device), self.call
        return lambda batch: call(made, batch)


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
        inputs: makes it of a batch of stacked logits.
        ours: the library's loss.
        plain: the loop that a user would write without it, the yardstick.
        name: of the library's loss, as the record calls it.
        one_model: whether the loss is that of one model.
        lacks: what ``plain`` leaves out; the empty text where both are the same loss.
        whole: the loop with all of it, where ``plain`` leaves something out.
    """

    inputs: Callable[[Batch, Generator], Batch]
    ours: Way
    plain: Way
    name: str = "LGLALoss"
    one_model: bool = False
    lacks: str = ""
    whole: Way | None = None


# What is made of a batch of stacked logits


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _k_tensors(batch: Batch, generator: Generator) -> Batch:
    return batch._replace(leaves=tuple(map(_leaf, batch.leaves[0].unbind(1))))


def _expert_output(batch: Batch, generator: Generator) -> Batch:
    (logits,) = batch.leaves
    n, k, c = logits.shape
    empty = logits.new_empty(n, k, WIDTH), logits.new_empty(k, c, WIDTH)
    features, weight = (tensor.uniform_(-1, 1, generator=generator) for tensor in empty)
    cosines = torch.einsum("nkd,kcd->nkc", unit_vectors(features), unit_vectors(weight))
    return batch._replace(leaves=(_leaf(SCALE * cosines),), extras=(features, weight))


def _sample_weights(batch: Batch, generator: Generator) -> Batch:
    worth = torch.linspace(0.5, 1.5, len(batch.target), device=batch.target.device)
    return batch._replace(extras=(worth,))


def _mixup(batch: Batch, generator: Generator) -> Batch:
    one_hot = F.one_hot(batch.target, batch.leaves[0].shape[2]).float()
    return batch._replace(extras=(0.7 * one_hot + 0.3 * one_hot.roll(1, 0),))


def _one_model(batch: Batch, generator: Generator) -> Batch:
    return batch._replace(leaves=(_leaf(batch.leaves[0][:, 0]),))


# What is called every step


def _call(criterion: Any, batch: Batch) -> Tensor:
    result: Tensor = criterion(batch.leaves[0], batch.target)
    return result


def _call_with_features(criterion: Any, batch: Batch) -> Tensor:
    result: Tensor = criterion(ExpertOutput(batch.leaves[0], *batch.extras), batch.target)
    return result


def _plain_of_features(loop: PlainLoop, batch: Batch) -> Tensor:
    features, weight = batch.extras
    return loop(batch.leaves[0], batch.target, angles_from_features(features, weight, batch.target))


def _plain_of_sample_weights(loop: PlainLoop, batch: Batch) -> Tensor:
    (logits,), target, (worth,) = batch
    return loop(logits, target, angles_from_logits(logits, target, SCALE), worth)


def _soft_cross_entropies(loop: PlainLoop, batch: Batch) -> Tensor:
    return loop.cross_entropies(batch.leaves[0], batch.extras[0]).sum(dim=-1).mean()


def _plain_of_probabilities(loop: PlainLoop, batch: Batch) -> Tensor:
    (logits,), (probabilities,) = batch.leaves, batch.extras
    return loop.of_probabilities(logits, probabilities, angles_of(logits.detach(), SCALE))


# The losses of one model as their authors' code has them


def _log_counts(shape: Shape, device: str) -> Tensor:
    return class_counts(shape).double().log().float().to(device)


def _balanced_softmax(log_counts: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(batch.leaves[0] + log_counts, batch.target)


def _focal(gamma: float, batch: Batch) -> Tensor:
    cross_entropy = F.cross_entropy(batch.leaves[0], batch.target, reduction="none")
    p = torch.exp(-cross_entropy)
    return ((1 - p) ** gamma * cross_entropy).mean()


def _effective_weights(shape: Shape, device: str) -> Tensor:
    beta = 0.9999
    weights = (1 - beta) / (1 - beta ** class_counts(shape).double())
    return (weights / weights.sum() * shape.classes).float().to(device)


def _class_balanced(class_weight: Tensor, batch: Batch) -> Tensor:
    (logits,), target, _ = batch
    total = F.cross_entropy(logits, target, weight=class_weight.to(logits.dtype), reduction="sum")
    return total / len(target)


def _margins(shape: Shape, device: str) -> Tensor:
    margins = class_counts(shape).double() ** -0.25
    return (SCALE * 0.5 / margins.max() * margins).float().to(device)


def _ldam(margins: Tensor, batch: Batch) -> Tensor:
    (logits,), target, _ = batch
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target[:, None], True)
    margin = torch.matmul(margins[None, :], own.float().transpose(0, 1)).view(-1, 1)
    return F.cross_entropy(torch.where(own, logits - margin, logits), target)


def _of_counts(loss: Callable[[Tensor], torch.nn.Module]) -> Way:
    return Way(lambda shape, device: loss(class_counts(shape)).to(device), _call)


#: By name; a further kind is an entry.
KINDS = {
    "ExpertOutput": Kind(
        _expert_output,
        ours=Way(criterion_of, _call_with_features),
        plain=Way(PlainLoop, _plain_of_features),
    ),
    "K tensors": Kind(
        _k_tensors,
        ours=Way(criterion_of, lambda loss, b: loss(b.leaves, b.target)),
        plain=Way(
            PlainLoop, lambda loop, b: loop(b.leaves, b.target, angles_from_logits(b.leaves, b.target, SCALE))
        ),
    ),
    "sample weights": Kind(
        _sample_weights,
        ours=Way(criterion_of, lambda loss, b: loss(b.leaves[0], b.target, sample_weight=b.extras[0])),
        plain=Way(PlainLoop, _plain_of_sample_weights),
    ),
    "probabilities": Kind(
        _mixup,
        ours=Way(criterion_of, lambda loss, b: loss(b.leaves[0], b.extras[0])),
        plain=Way(PlainLoop, _soft_cross_entropies),
        lacks="no AAW",
        whole=Way(PlainLoop, _plain_of_probabilities),
    ),
    "one model: balanced softmax": Kind(
        _one_model,
        ours=_of_counts(baselines.BalancedSoftmaxLoss),
        plain=Way(_log_counts, _balanced_softmax),
        name="BalancedSoftmaxLoss",
        one_model=True,
    ),
    "one model: focal": Kind(
        _one_model,
        ours=_of_counts(lambda counts: baselines.FocalLoss(gamma=2.0)),
        plain=Way(lambda shape, device: 2.0, _focal),
        name="FocalLoss",
        one_model=True,
    ),
    "one model: class-balanced": Kind(
        _one_model,
        ours=_of_counts(baselines.ClassBalancedLoss),
        plain=Way(_effective_weights, _class_balanced),
        name="ClassBalancedLoss",
        one_model=True,
    ),
    "one model: LDAM": Kind(
        _one_model,
        ours=_of_counts(lambda counts: baselines.LDAMLoss(counts, scale=SCALE)),
        plain=Way(_margins, _ldam),
        name="LDAMLoss",
        one_model=True,
    ),
}

WHOLE = "plain loop with AAW"


def shapes_of(shape: Shape) -> list[Shape]:
    """The same size with every kind of input."""
    return [
        shape._replace(kind=name, experts=1 if kind.one_model else shape.experts)
        for name, kind in KINDS.items()
    ]


def make_batches(
    shape: Shape, dtype: torch.dtype, device: str, number: int = 1, seed: int = 0
) -> list[Batch]:
    """Batches of a shape's kind of input; without one those of :func:`peers.make_batches`."""
    batches = peers.make_batches(shape, dtype, device, number, seed)
    if not shape.kind:
        return batches
    generator = Generator(device).manual_seed(seed)
    return [KINDS[shape.kind].inputs(batch, generator) for batch in batches]


def columns_for(shape: Shape, device: str, compiler: str = "inductor") -> list[Column]:
    """All that is measured for a shape and its kind of input, ours first."""
    if not shape.kind:
        return peers.columns_for(shape, device, compiler)
    kind = KINDS[shape.kind]
    # The training step alone, as a compiler takes seconds for each of the two.
    compiled_loop = peers.compiled(kind.plain.loss, compiler)
    same = not kind.lacks
    columns = [
        Column(kind.name, peers.eager(kind.ours.loss), ours=True),
        Column(peers.PLAIN, peers.eager(kind.plain.loss), equal=same, note=kind.lacks),
        Column(
            f"{peers.PLAIN}, compiled",
            lambda shape, device: compiled_loop(shape, device)._replace(forward=None),
            equal=same,
            note=kind.lacks,
            compiled=True,
        ),
    ]
    if kind.whole is not None:
        columns.insert(2, Column(WHOLE, peers.eager(kind.whole.loss)))
    return columns
