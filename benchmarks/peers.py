"""What the benchmark of the losses compares: the same loss computed in several ways, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lgla_losses import ClassGrouper, LGLALoss, LinearLGLALoss, functional

IMBALANCE = 100.0
LARGEST_CLASS = 500
SCALE = 30.0
TAU = 2.5

PLAIN = "plain loop"
PRODUCTS = "matrix products"
CLONE = "logits.clone()"


class Shape(NamedTuple):
    """A size to measure; with ``features`` the loss starts at the head's inputs."""

    name: str
    samples: int
    experts: int
    classes: int
    features: int | None = None

    @property
    def label(self) -> str:
        """``name N x K x C``, and ``d`` of a linear loss."""
        width = "" if self.features is None else f", d = {self.features}"
        return f"{self.name} {self.samples} x {self.experts} x {self.classes}{width}"


class Batch(NamedTuple):
    """Tensors that want gradients, logits or features and class weights, and the target."""

    leaves: tuple[Tensor, ...]
    target: Tensor


class Step(NamedTuple):
    """What is timed: the loss without gradients, and a training step; either may be missing."""

    forward: Callable[[Batch], object] | None
    train: Callable[[Batch], object]


class Column(NamedTuple):
    """One way to compute the loss.

    Attributes:
        name: as the record calls it.
        make: from shape and device.
        ours: whether it is this library.
        equal: whether it computes the whole loss, so that it may be compared by time alone.
        note: what it is or lacks.
        compiled: whether its first step waits for a compiler.
    """

    name: str
    make: Callable[[Shape, str], Step]
    ours: bool = False
    equal: bool = True
    note: str = ""
    compiled: bool = False


class MissingError(Exception):
    """A peer that cannot run here; the message says why."""


def class_counts(shape: Shape) -> Tensor:
    """An exponential long tail, int64 ``[C]``."""
    rank = torch.arange(shape.classes, dtype=torch.float64) / max(shape.classes - 1, 1)
    return (LARGEST_CLASS * IMBALANCE**-rank).round().long()


def make_batches(
    shape: Shape, dtype: torch.dtype, device: str, number: int = 1, seed: int = 0
) -> list[Batch]:
    """Cosine logits, or features and weights of such size that their products are like logits."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*sizes: int, bound: float) -> Tensor:
        values = torch.empty(sizes, device=device, dtype=dtype)
        return values.uniform_(-bound, bound, generator=generator).requires_grad_()

    n, k, c, d = shape[1:]
    frequency = class_counts(shape).double().to(device)
    batches = []
    for _ in range(number):
        # As drawn from the long-tailed training data.
        target = torch.multinomial(frequency, n, replacement=True, generator=generator)
        if d is None:
            leaves: tuple[Tensor, ...] = (uniform(n, k, c, bound=SCALE),)
        else:
            leaves = uniform(n, k, d, bound=1.0), uniform(k, c, d, bound=SCALE / d)
        batches.append(Batch(leaves, target))
    return batches


def step_of(loss: Callable[[Batch], Tensor]) -> Step:
    """Forward and backward of a loss."""

    def forward(batch: Batch) -> Tensor:
        with torch.no_grad():
            return loss(batch)

    def train(batch: Batch) -> None:
        # The backward of `torch.Tensor`, which is not typed.
        torch.autograd.backward(loss(batch))

    return Step(forward, train)


def _table(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Eq. 4 in float32, and the group of every class."""
    grouper = ClassGrouper(class_counts(shape), shape.experts - 1)
    table = functional.cla_table(grouper.class_counts, grouper.group_index, TAU)
    return table.float().to(device), grouper.group_index.to(device)


# Losses of logits


def lgla(shape: Shape, device: str, backend: str = "auto") -> Callable[[Batch], Tensor]:
    """This library's criterion, its checks of arguments and values included."""
    criterion = LGLALoss(class_counts(shape), shape.experts, TAU, scale=SCALE, backend=backend).to(device)
    return lambda batch: criterion(batch.leaves[0], batch.target)


def plain_loop(shape: Shape, device: str) -> Callable[[Batch], Tensor]:
    """``F.cross_entropy(logits[:, k] + table[k])`` expert by expert, with AAW, and no checks."""
    table, group_index = _table(shape, device)

    def loss(batch: Batch) -> Tensor:
        (logits,), target = batch
        angles = functional.angles_from_logits(logits, target, SCALE)
        return functional.lgla_loss(
            logits, target, table, _weights(angles, target, group_index, shape)
        ).mean()

    return loss


def _weights(angles: Tensor, target: Tensor, group_index: Tensor, shape: Shape) -> Tensor:
    group = group_index[target]
    statistics = functional.aaw_statistics(angles, group, shape.experts - 1)
    return functional.aaw_weights(angles, group, statistics)


def papers_formula(shape: Shape, device: str) -> Callable[[Batch], Tensor]:
    """Eqs. 3, 4 and 7 to 9 written down as they stand in the paper."""
    counts = class_counts(shape).to(device).float()
    group_index = _table(shape, device)[1]
    log_n, log_max = counts.log(), counts.max().log()
    local = [torch.where(group_index == k, log_n, log_max) for k in range(shape.experts - 1)]
    adjustments = [*local, TAU * log_n]

    def loss(batch: Batch) -> Tensor:
        (logits,), target = batch
        one_hot = F.one_hot(target, shape.classes).float()
        group = group_index[target]
        total = logits.new_zeros((), dtype=torch.float32)
        for k, adjustment in enumerate(adjustments):
            v = logits[:, k].float()
            log_p = torch.log(torch.softmax(v + adjustment, dim=1))
            with torch.no_grad():
                angle = torch.acos((one_hot * v).sum(dim=1) / SCALE)
                reference = torch.zeros_like(angle)
                for g in range(shape.experts - 1):
                    in_group = group == g
                    if in_group.any():
                        reference[in_group] = angle[in_group].mean()
                weight = torch.where(angle > reference, 1 + angle - reference, 1.0)
            total = total - (weight * (one_hot * log_p).sum(dim=1)).mean()
        return total

    return loss


def liger(shape: Shape, device: str) -> Step:
    """Liger-Kernel's cross entropy of all experts as one batch."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError as error:
        raise MissingError("not installed (liger-kernel)") from error

    own: dict[int, Tensor] = {}

    def loss(batch: Batch) -> Tensor:
        # It writes the gradient over its input, so it gets logits of its own.
        if id(batch) not in own:
            own[id(batch)] = batch.leaves[0].detach().clone().requires_grad_()
        logits = own[id(batch)]
        logits.grad = None
        target = batch.target.repeat_interleave(shape.experts)
        result: Tensor = liger_cross_entropy(logits.view(-1, shape.classes), target)
        return result

    return step_of(loss)


def clone(shape: Shape, device: str) -> Step:
    """A copy into fresh memory, which every gradient needs as well."""
    return Step(None, lambda batch: batch.leaves[0].detach().clone())


# Losses of features and class weights


def linear_lgla(shape: Shape, device: str) -> Callable[[Batch], Tensor]:
    """This library's linear loss, its checks included."""
    criterion = LinearLGLALoss(class_counts(shape), shape.experts, TAU, scale=None).to(device)

    def loss(batch: Batch) -> Tensor:
        features, weight = batch.leaves
        return criterion(features, weight, batch.target)

    return loss


def head_then_lgla(shape: Shape, device: str) -> Callable[[Batch], Tensor]:
    """A linear head, then this library's criterion on its logits."""
    criterion = LGLALoss(class_counts(shape), shape.experts, TAU, scale=None).to(device)

    def loss(batch: Batch) -> Tensor:
        features, weight = batch.leaves
        logits = torch.bmm(features.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        result: Tensor = criterion(logits, batch.target, features=features, weight=weight)
        return result

    return loss


def linear_plain_loop(shape: Shape, device: str) -> Callable[[Batch], Tensor]:
    """A linear head, then ``F.cross_entropy(logits + table[k])``, expert by expert, with AAW."""
    table, group_index = _table(shape, device)

    def loss(batch: Batch) -> Tensor:
        (features, weight), target = batch
        logits = [F.linear(features[:, k], weight[k]) for k in range(shape.experts)]
        angles = functional.angles_from_features(features, weight, target)
        return functional.lgla_loss(
            logits, target, table, _weights(angles, target, group_index, shape)
        ).mean()

    return loss


def _over_experts(loss_of_expert: Callable[[Tensor, Tensor, Tensor], Any]) -> Step:
    """A loss ``(features [N, d], weight [C, d], target)`` summed over the experts."""

    def loss(batch: Batch) -> Tensor:
        features, weight = batch.leaves
        # As contiguous as the kernels of peers want them.
        rows = features.transpose(0, 1).contiguous()
        losses = [loss_of_expert(rows[k], weight[k], batch.target) for k in range(len(weight))]
        return torch.stack(losses).sum()

    return step_of(loss)


def torch_linear(shape: Shape, device: str) -> Step:
    """PyTorch's own linear cross entropy, on a GPU in chunks of the batch."""
    if not hasattr(F, "linear_cross_entropy"):
        raise MissingError(f"not in torch {torch.__version__}")
    # On a CPU its chunks take several times as long as the whole.
    options = torch.nn.LinearCrossEntropyOptions() if torch.device(device).type == "cuda" else None
    return _over_experts(lambda f, w, y: F.linear_cross_entropy(f, w, y, options=options))


def liger_linear(shape: Shape, device: str) -> Step:
    """Liger-Kernel's linear cross entropy."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise MissingError("not installed (liger-kernel)") from error
    return _over_experts(lambda f, w, y: liger_fused_linear_cross_entropy(f, w, y))


def cut_linear(shape: Shape, device: str) -> Step:
    """Apple's cut cross entropy."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise MissingError("not installed (cut-cross-entropy)") from error
    return _over_experts(lambda f, w, y: linear_cross_entropy(f, w, y))


def matrix_products(shape: Shape, device: str) -> Step:
    """The products that no linear loss can avoid, into warm memory, expert by expert."""
    memory: dict[str, Tensor] = {}

    def logits_of(batch: Batch, k: int) -> Tensor:
        features, weight = (leaf.detach() for leaf in batch.leaves)
        if not memory:
            memory["logits"] = features.new_empty(shape.samples, shape.classes)
            memory["features"] = features.new_empty(features[:, 0].shape)
            memory["weight"] = torch.empty_like(weight[0])
        return torch.mm(features[:, k], weight[k].T, out=memory["logits"])

    def forward(batch: Batch) -> None:
        for k in range(shape.experts):
            logits_of(batch, k)

    def train(batch: Batch) -> None:
        features, weight = (leaf.detach() for leaf in batch.leaves)
        for k in range(shape.experts):
            logits = logits_of(batch, k)
            torch.mm(logits, weight[k], out=memory["features"])
            torch.mm(logits.T, features[:, k], out=memory["weight"])

    return Step(forward, train)


def columns_for(shape: Shape, device: str, compiler: str = "inductor") -> list[Column]:
    """All that is measured for a shape, ours first."""
    cuda = torch.device(device).type == "cuda"
    no_adjustments = "no adjustments, no AAW"

    def eager(make: Callable[..., Callable[[Batch], Tensor]], *more: Any) -> Callable[[Shape, str], Step]:
        return lambda shape, device: step_of(make(shape, device, *more))

    def compiled(make: Callable[[Shape, str], Callable[[Batch], Tensor]]) -> Callable[[Shape, str], Step]:
        # One graph, for this shape alone.
        return lambda shape, device: step_of(
            torch.compile(make(shape, device), fullgraph=True, dynamic=False, backend=compiler)
        )

    if shape.features is not None:
        columns = [
            Column("LinearLGLALoss", eager(linear_lgla), ours=True),
            Column("LinearLGLALoss, compiled", compiled(linear_lgla), ours=True, compiled=True),
            Column("head + LGLALoss", eager(head_then_lgla), ours=True),
            Column(PLAIN, eager(linear_plain_loop)),
            Column("plain loop, compiled", compiled(linear_plain_loop), compiled=True),
            Column("F.linear_cross_entropy", torch_linear, equal=False, note=no_adjustments),
        ]
        if cuda:
            columns += [
                Column("liger-kernel", liger_linear, equal=False, note=no_adjustments),
                Column(
                    "cut-cross-entropy",
                    cut_linear,
                    equal=False,
                    note=f"{no_adjustments}; leaves out small gradients",
                ),
            ]
        return [*columns, Column(PRODUCTS, matrix_products, equal=False, note="the floor: no loss at all")]

    columns = [
        Column("LGLALoss", eager(lgla), ours=True),
        Column("LGLALoss, reference", eager(lgla, "reference"), ours=True, note="plain PyTorch with checks"),
        Column("LGLALoss, compiled", compiled(lgla), ours=True, compiled=True),
        Column(PLAIN, eager(plain_loop)),
        Column("plain loop, compiled", compiled(plain_loop), compiled=True),
        Column("paper's formula", eager(papers_formula), note="one-hot targets, log of softmax, masks"),
    ]
    if cuda:
        chunks = Column("LGLALoss, fused", eager(lgla, "fused"), ours=True, note="PyTorch in chunks")
        columns.insert(1, chunks)
        columns.append(
            Column("liger-kernel", liger, equal=False, note=f"{no_adjustments}; writes over the logits")
        )
    return [*columns, Column(CLONE, clone, equal=False, note="a copy into fresh memory; no loss at all")]
