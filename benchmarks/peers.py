"""What the benchmark of the losses compares: the same loss computed in several ways, and its limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import choices
import torch
import torch.nn.functional as F
from choices import Choice
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
    """A size to measure; with ``features`` the loss starts at the head's inputs.

    ``kind`` names another input than stacked logits and class indices, one of ``kinds.KINDS``.
    """

    name: str
    samples: int
    experts: int
    classes: int
    features: int | None = None
    kind: str = ""

    @property
    def label(self) -> str:
        """``name N x K x C``, ``d`` of a linear loss, and the kind of input."""
        width = "" if self.features is None else f", d = {self.features}"
        kind = f", {self.kind}" if self.kind else ""
        return f"{self.name} {self.samples} x {self.experts} x {self.classes}{width}{kind}"


class Batch(NamedTuple):
    """Tensors that want gradients, logits or features and class weights; the target; further inputs."""

    leaves: tuple[Tensor, ...]
    target: Tensor
    extras: tuple[Tensor, ...] = ()


#: A loss of a batch, and what makes one for a shape and a device.
Loss = Callable[[Batch], Tensor]
MakeLoss = Callable[[Shape, str], Loss]


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


def on_gpu(device: str) -> bool:
    """Whether a device is one with a queue of its own."""
    return torch.device(device).type == "cuda"


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

    n, k, c, d = shape[1:5]
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


def step_of(loss: Loss) -> Step:
    """Forward and backward of a loss."""

    def forward(batch: Batch) -> Tensor:
        with torch.no_grad():
            return loss(batch)

    def train(batch: Batch) -> None:
        # The backward of `torch.Tensor`, which is not typed.
        torch.autograd.backward(loss(batch))

    return Step(forward, train)


def _adjustments(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Eq. 4 in float32, and the group of every class."""
    grouper = ClassGrouper(class_counts(shape), shape.experts - 1)
    table = functional.cla_table(grouper.class_counts, grouper.group_index, TAU)
    return table.float().to(device), grouper.group_index.to(device)


class PlainLoop:
    """``F.cross_entropy(logits[:, k] + table[k])`` expert by expert, with AAW, and no checks.

    The yardstick: it stands here, not in the library, so that it is the same whatever becomes of that.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.table, self.group_index = _adjustments(shape, device)
        self.num_groups = shape.experts - 1

    def __call__(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor,
        angles: Tensor,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The mean of Eq. 9, of angles ``[N, K]``."""
        group = self.group_index[target]
        statistics = functional.aaw_statistics(angles, group, self.num_groups, sample_weight)
        weights = functional.aaw_weights(angles, group, statistics)
        losses = self.cross_entropies(logits, target)
        if sample_weight is None:
            return (weights * losses).sum(dim=-1).mean()

        return (weights * sample_weight[:, None] * losses).sum() / sample_weight.sum()

    def of_probabilities(self, logits: Tensor, probabilities: Tensor, angles: Tensor) -> Tensor:
        """The same of class probabilities ``[N, C]``, and of angles to every class ``[N, K, C]``."""
        statistics = functional.soft_aaw_statistics(angles, probabilities, self.group_index, self.num_groups)
        weights = functional.soft_aaw_weights(angles, probabilities, self.group_index, statistics)
        return (weights * self.cross_entropies(logits, probabilities)).sum(dim=-1).mean()

    def cross_entropies(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Of every sample and expert ``[N, K]``; class indices or probabilities."""
        experts = logits.unbind(1) if isinstance(logits, Tensor) else logits
        losses = []
        for v, adjustment in zip(experts, self.table, strict=True):
            dtype = functional.compute_dtype(v.dtype)
            adjusted = v.to(dtype) + adjustment.to(dtype)
            own = target.to(dtype) if target.is_floating_point() else target
            losses.append(F.cross_entropy(adjusted, own, reduction="none"))
        return torch.stack(losses, dim=-1)


# Losses of logits


def criterion_of(shape: Shape, device: str, **options: Any) -> LGLALoss:
    """This library's criterion, its checks of arguments and values included."""
    return LGLALoss(class_counts(shape), shape.experts, TAU, scale=SCALE, **options).to(device)


def lgla(shape: Shape, device: str, backend: str = "auto") -> Loss:
    """The criterion of stacked logits and class indices."""
    criterion = criterion_of(shape, device, backend=backend)
    return lambda batch: criterion(batch.leaves[0], batch.target)


def plain_loop(shape: Shape, device: str) -> Loss:
    """The plain loop of stacked logits and class indices."""
    loop = PlainLoop(shape, device)

    def loss(batch: Batch) -> Tensor:
        (logits,), target, _ = batch
        return loop(logits, target, functional.angles_from_logits(logits, target, SCALE))

    return loss


def papers_formula(shape: Shape, device: str) -> Loss:
    """Eqs. 3, 4 and 7 to 9 written down as they stand in the paper."""
    counts = class_counts(shape).to(device).float()
    group_index = _adjustments(shape, device)[1]
    log_n, log_max = counts.log(), counts.max().log()
    local = [torch.where(group_index == k, log_n, log_max) for k in range(shape.experts - 1)]
    adjustments = [*local, TAU * log_n]

    def loss(batch: Batch) -> Tensor:
        (logits,), target, _ = batch
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

    own: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(batch: Batch) -> Tensor:
        # It writes the gradient over its input, so it gets logits of its own.
        if id(batch) not in own:
            logits = batch.leaves[0].detach().clone().requires_grad_()
            own[id(batch)] = logits, batch.target.repeat_interleave(shape.experts)
        logits, target = own[id(batch)]
        logits.grad = None
        result: Tensor = liger_cross_entropy(logits.view(-1, shape.classes), target)
        return result

    return step_of(loss)


def clone(shape: Shape, device: str) -> Step:
    """A copy into fresh memory, which every gradient needs as well."""
    return Step(None, lambda batch: batch.leaves[0].detach().clone())


# Losses of features and class weights


def linear_lgla(shape: Shape, device: str) -> Loss:
    """This library's linear loss, its checks included."""
    criterion = LinearLGLALoss(class_counts(shape), shape.experts, TAU, scale=None).to(device)

    def loss(batch: Batch) -> Tensor:
        features, weight = batch.leaves
        return criterion(features, weight, batch.target)

    return loss


def head_then_lgla(shape: Shape, device: str) -> Loss:
    """A linear head, then this library's criterion on its logits."""
    criterion = LGLALoss(class_counts(shape), shape.experts, TAU, scale=None).to(device)

    def loss(batch: Batch) -> Tensor:
        features, weight = batch.leaves
        logits = torch.bmm(features.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        result: Tensor = criterion(logits, batch.target, features=features, weight=weight)
        return result

    return loss


def linear_plain_loop(shape: Shape, device: str) -> Loss:
    """A linear head, then the plain loop over its logits."""
    loop = PlainLoop(shape, device)

    def loss(batch: Batch) -> Tensor:
        (features, weight), target, _ = batch
        logits = [F.linear(f, w) for f, w in zip(features.unbind(1), weight.unbind(0), strict=True)]
        return loop(logits, target, functional.angles_from_features(features, weight, target))

    return loss


def _over_experts(loss_of_expert: Callable[[Tensor, Tensor, Tensor], Any]) -> Step:
    """A loss ``(features [N, d], weight [C, d], target)`` summed over the experts."""

    def loss(batch: Batch) -> Tensor:
        features, weight = batch.leaves
        # As contiguous as the kernels of peers want them, and unbound at once: a view an expert would fill
        # the gradient of all of them with zeros each.
        rows = features.transpose(0, 1).contiguous().unbind(0)
        losses = [loss_of_expert(f, w, batch.target) for f, w in zip(rows, weight.unbind(0), strict=True)]
        return torch.stack(losses).sum()

    return step_of(loss)


def torch_linear(shape: Shape, device: str) -> Step:
    """PyTorch's own linear cross entropy, on a GPU in chunks of the batch."""
    if not hasattr(F, "linear_cross_entropy"):
        raise MissingError(f"not in torch {torch.__version__}")
    # On a CPU its chunks take several times as long as the whole.
    options = torch.nn.LinearCrossEntropyOptions() if on_gpu(device) else None
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


# Other choices of the library


def under(choice: Choice, loss: Loss) -> Loss:
    """The loss computed with another of the library's choices, which is as before afterwards."""

    def chosen(batch: Batch) -> Tensor:
        with choice():
            return loss(batch)

    return chosen


#: Where there are more classes than these, a GPU has choices to decide.
_MANY_CLASSES = 2048


def other_plans(name: str, make: MakeLoss, shape: Shape) -> list[Column]:
    """A column for every other plan of the Triton kernels, where it differs."""

    def planned(plan: str, shape: Shape, device: str) -> Step:
        if not choices.has_triton():
            raise MissingError("not installed (triton)")
        return step_of(under(partial(choices.use_plan, plan), make(shape, device)))

    return [
        Column(
            f"{name}, plan {plan}",
            partial(planned, plan),
            ours=True,
            note=f"Triton kernels by the plan {plan}",
        )
        for plan in choices.other_plans(shape.classes)
    ]


#: When the gradient of a loss that is scaled is computed: at once it is read and written again.
SCALED_CHOICES = {
    "LGLALoss, scaled": choices.gradient_at_once,
    "LGLALoss, scaled, gradient in backward": choices.gradient_in_backward,
}
#: What the linear loss could do otherwise.
LINEAR_CHOICES = {
    "LinearLGLALoss, two kernels to add": choices.two_kernels_to_add,
    "LinearLGLALoss, rows end to end": choices.rows_end_to_end,
    "LinearLGLALoss, chunks of 32 MB": choices.chunks_of_32_mb,
}


def _scaled(choice: Choice, shape: Shape, device: str) -> Step:
    loss, upstream = under(choice, lgla(shape, device)), torch.tensor(2.0, device=device)
    return Step(None, lambda batch: torch.autograd.backward(loss(batch), upstream))


def _linear(choice: Choice, shape: Shape, device: str) -> Step:
    return step_of(under(choice, linear_lgla(shape, device)))


def other_choices(shape: Shape) -> list[Column]:
    """A column for every choice that a GPU has yet to decide, where there are many classes."""
    if shape.classes <= _MANY_CLASSES:
        return []
    if shape.features is not None:
        return [Column(name, partial(_linear, choice), ours=True) for name, choice in LINEAR_CHOICES.items()]
    return [
        Column(name, partial(_scaled, choice), ours=True, equal=False, note="an upstream gradient of 2")
        for name, choice in SCALED_CHOICES.items()
    ]


# All of them


def eager(make: Callable[..., Loss], *more: Any) -> Callable[[Shape, str], Step]:
    """The step of a loss as it is."""
    return lambda shape, device: step_of(make(shape, device, *more))


def compiled(make: MakeLoss, compiler: str) -> Callable[[Shape, str], Step]:
    """The step of a loss that is compiled as one graph, for its shape alone."""
    return lambda shape, device: step_of(
        torch.compile(make(shape, device), fullgraph=True, dynamic=False, backend=compiler)
    )


def columns_for(shape: Shape, device: str, compiler: str = "inductor") -> list[Column]:
    """All that is measured of stacked logits, or of features and class weights; ours first."""
    cuda = on_gpu(device)
    no_adjustments = "no adjustments, no AAW"

    if shape.features is not None:
        columns = [
            Column("LinearLGLALoss", eager(linear_lgla), ours=True),
            Column("LinearLGLALoss, compiled", compiled(linear_lgla, compiler), ours=True, compiled=True),
            Column("head + LGLALoss", eager(head_then_lgla), ours=True),
            Column(PLAIN, eager(linear_plain_loop)),
            Column("plain loop, compiled", compiled(linear_plain_loop, compiler), compiled=True),
            Column("F.linear_cross_entropy", torch_linear, equal=False, note=no_adjustments),
        ]
        if cuda:
            columns[1:1] = other_plans("LinearLGLALoss", linear_lgla, shape) + other_choices(shape)
            columns += [
                Column("liger-kernel", liger_linear, equal=False, note=no_adjustments),
                Column(
                    "cut-cross-entropy",
                    cut_linear,
                    equal=False,
                    note=f"{no_adjustments}; leaves out small gradients",
                    compiled=True,  # it sorts by a compiled function
                ),
            ]
        return [*columns, Column(PRODUCTS, matrix_products, equal=False, note="the floor: no loss at all")]

    columns = [
        Column("LGLALoss", eager(lgla), ours=True),
        Column("LGLALoss, reference", eager(lgla, "reference"), ours=True, note="plain PyTorch with checks"),
        Column("LGLALoss, compiled", compiled(lgla, compiler), ours=True, compiled=True),
        Column(PLAIN, eager(plain_loop)),
        Column("plain loop, compiled", compiled(plain_loop, compiler), compiled=True),
        Column("paper's formula", eager(papers_formula), note="one-hot targets, log of softmax, masks"),
    ]
    if cuda:
        chunks = Column("LGLALoss, fused", eager(lgla, "fused"), ours=True, note="PyTorch in chunks")
        columns.insert(1, chunks)
        columns[1:1] = other_plans("LGLALoss", lgla, shape) + other_choices(shape)
        columns.append(
            Column("liger-kernel", liger, equal=False, note=f"{no_adjustments}; writes over the logits")
        )
    return [*columns, Column(CLONE, clone, equal=False, note="a copy into fresh memory; no loss at all")]
