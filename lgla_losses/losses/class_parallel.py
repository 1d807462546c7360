"""Classes spread over the ranks of a job: the loss of a classifier that is too large for one device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lgla_losses import functional
from lgla_losses._batch import Batch
from lgla_losses._buffers import moved
from lgla_losses._checks import (
    finite_tensors,
    integer,
    positive_int,
)
from lgla_losses._counts import ArrayLike, Ruled
from lgla_losses._ranks import Ranks, RanksOf, digest_of, group_size
from lgla_losses._torch import values_readable
from lgla_losses.adjustment import strength
from lgla_losses.grouping import ClassGrouper, regrouped, same_classes
from lgla_losses.kernels import Engine, Samples, chunked
from lgla_losses.kernels.autograd import evaluate
from lgla_losses.kernels.blockwise import Blockwise
from lgla_losses.kernels.class_parallel import ClassParallelCrossEntropy
from lgla_losses.kernels.linear import as_autocast_would
from lgla_losses.losses._base import ExpertLoss, Loss
from lgla_losses.losses._config import ExpertLossOptions, make_adjuster, refuse_unknown
from lgla_losses.losses.linear import check_bias, same_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SAME_SAMPLES = (
    "give these ranks the same batches (let the sampler use the data-parallel rank) and the same random "
    "numbers for dropout, and split the batch over data_group"
)

#: Tolerance for the sketches of the same features, relative to their lengths: ranks may round differently.
_SAME_FEATURES = 0.02
#: Tolerance for the sketches of the same targets and sample weights.
_SAME_TARGETS = 1e-3
#: Target of samples of other ranks' classes, and of ignored ones.
_ELSEWHERE = -1

__all__ = ["ClassParallelLGLALoss", "class_shard"]


def class_shard(num_classes: int, rank: int, num_ranks: int) -> slice:
    """Cut the classes as :func:`torch.chunk` does; the last ranks may have fewer, or none.

    Args:
        num_classes: number of classes ``C``, at least 1.
        rank: rank of this process, 0 to ``num_ranks - 1``.
        num_ranks: number of ranks that share the classes, at least 1.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> [class_shard(5, rank, 4) for rank in range(4)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    num_classes = positive_int("num_classes", num_classes, "give the number of classes")
    num_ranks = positive_int("num_ranks", num_ranks, "give the size of the group that shares the classes")
    rank = integer("rank", rank, "give the number of this process in the group that shares the classes")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank: expected 0..{num_ranks - 1} of {num_ranks} ranks, got {rank}")
    size = -(-num_classes // num_ranks)
    return slice(min(rank * size, num_classes), min((rank + 1) * size, num_classes))


class ClassParallelLGLALoss(Loss, Ruled):
    r"""Compute the LGLA loss of classifiers whose classes are spread over ranks.

    Its loss and gradients equal those of :class:`~lgla_losses.LinearLGLALoss` in one process. Features and
    targets are the same on all ranks of ``process_group``. Each rank holds the weights of its own classes and
    computes only their logits, a chunk of samples at a time. The ranks exchange the weights of Eq. 8, the
    logarithm of their sums of exponentials and the target's logit: a few numbers per sample and expert, for
    any number of classes. In ``backward`` they exchange one sum of the features' gradients ``[N, K, d]``. So
    the memory of each rank falls with the number of ranks.

    Every rank of the group then has the whole gradient of the features and the gradient of its own weights.
    The layers before the classifier are replicated, or data parallel over ``data_group``: on a device mesh of
    two dimensions, data and classes, a batch is split along the first, and reference angles and ``"mean"``
    are over the whole batch.

    Each rank keeps the adjustments of its own classes only. They are not buffers: DistributedDataParallel
    would send those of rank 0 to all ranks, and a checkpoint would hold those of one rank only. To restore
    the loss, construct it from the same counts again. Construct it after ``init_process_group``.

    Source: Tao et al., ICCV 2023, Eq. 9.

    Args:
        class_counts: training samples of all classes ``[C]``, as in :class:`~lgla_losses.LGLALoss`.
        num_experts: as in :class:`~lgla_losses.LGLALoss`.
        tau: as in :class:`~lgla_losses.LGLALoss`; by default ``K - 1``, because ``scale=None`` means linear
            heads.
        scale: the factor of cosine classifiers, :math:`v = s \cos(W, f)`, which have no bias; None for linear
            classifiers.
        process_group: the ranks that share the classes; None means all.
        data_group: the ranks that share the batch, each with its own samples; None means that every rank has
            the whole batch.
        options: ``grouper``, ``zero_counts``, ``background``, ``aaw``, ``adjustment``, ``reduction``,
            ``ignore_index``, ``label_smoothing``, ``sync`` (over ``data_group``) and ``validate_args`` of
            :class:`~lgla_losses.LGLALoss`.

    Attributes:
        classes: the slice of this rank's classes.
        table: their adjustments ``[K, C_r]``.
        class_counts: their training samples ``[C_r]``.
        group_index: their groups ``[C_r]``.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or shapes or devices do not fit. Where values may be read,
            also on all ranks that share the classes: their targets, sample weights or features differ, or a
            rank has bad values. In the first step: the ranks constructed the loss from different arguments.

    Shape:
        - features: ``[N, K, d]``
        - weight: ``[K, C_r, d]``, a ``DTensor`` sharded on dimension 1 or this rank's part
        - target: int64 ``[N]``, of all classes, or their probabilities ``[N, C]`` (mixup, distillation)
        - sample_weight: ``[N]``
        - bias: ``[K, C_r]``, of the same kind, or None
        - result: as of :class:`~lgla_losses.LGLALoss`, the same on all ranks of the group

    Example:
        >>> criterion = ClassParallelLGLALoss([500, 100, 20])  # alone it has all classes
        >>> features = torch.randn(8, 3, 16, requires_grad=True)
        >>> weight = torch.randn(3, 3, 16, requires_grad=True)
        >>> criterion(features, weight, torch.arange(8) % 3).backward()
    """

    _explains_first = True

    class_counts: Tensor
    group_index: Tensor
    table: Tensor

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        num_experts: int | None = None,
        tau: float | None = None,
        *,
        scale: float | None = None,
        process_group: ProcessGroup | None = None,
        data_group: ProcessGroup | None = None,
        **options: Unpack[ExpertLossOptions],
    ) -> None:
        super().__init__()
        refuse_unknown(self, options, ExpertLossOptions)
        if data_group is not None and process_group is None:
            raise ValueError(
                "process_group: expected the ranks that share the classes, as data_group is given, got None; "
                'on a device mesh they are mesh["classes"].get_group() and mesh["data"].get_group()'
            )
        whole = ExpertLoss(class_counts, num_experts, tau, scale=scale, **options)
        self._take_options(
            whole.reduction,
            whole.ignore_index,
            whole.label_smoothing,
            whole.sync,
            process_group,
            whole.validate_args,
            backend="auto",
        )
        self._data_ranks = RanksOf(data_group)

        self.num_classes, self.num_experts = whole.num_classes, whole.num_experts
        self.num_groups = whole.grouper.num_groups
        self.scale, self.aaw = whole.scale, whole.aaw
        self.num_ranks, self.rank = self._place()
        self.classes = class_shard(whole.num_classes, self.rank, self.num_ranks)
        self.adjustment = whole.adjustment

        # set_adjustment starts from the counts; a table of all classes would be K times as large.
        self._rules, self._all_counts = whole.grouper._rules, whole.grouper.on_cpu("class_counts").clone()
        self._own_groups = whole.grouper.on_cpu("group_index").clone() if whole.grouper.is_own else None
        self._tau = None if whole.adjuster.tau is None else float(whole.adjuster.tau)
        self._take(whole.grouper, {"table": whole.adjuster.on_cpu("table")})

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts, groups and adjustments, as :meth:`~lgla_losses.LGLALoss.set_adjustment` does.

        Call it on every rank with the counts of all classes; the next step compares them.

        Args:
            class_counts: training samples per class ``[C]`` of the same classes; None keeps them.
            tau: strength, as in the constructor; None keeps it.

        Raises:
            TypeError: counts or ``tau`` are not numbers.
            ValueError: counts are not positive or are of other classes, ``tau`` is out of range, or the
                adjustment has no ``tau``.
        """
        counts = self._all_counts
        if class_counts is not None:
            counts = same_classes(class_counts, self.num_classes, self._rules)
        grouper = self._grouper_of(counts)
        tau = strength(self.adjustment, tau)

        constants = {}
        if self.adjustment != "table":  # your own table stays
            tau = self._tau if tau is None else tau
            adjuster = make_adjuster(grouper, self.num_experts, self.adjustment, tau)
            constants["table"] = adjuster.on_cpu("table")

        self._all_counts, self._tau = counts.clone(), tau
        self._take(grouper, constants)

    def _grouper_of(self, counts: Tensor) -> ClassGrouper:
        """Group all classes by their counts ``[C]``, or as the user grouped them."""
        index = regrouped(counts, self.num_groups, self._rules, self._own_groups)
        return ClassGrouper._of_checked(counts, index, self._rules)

    def implied_prior(self, fusion: Tensor | Sequence[float] | None = None) -> Tensor:
        """Compute the prior of all classes that the fused logits hold, without communication.

        Args:
            fusion: as in :meth:`LGLALoss.implied_prior <lgla_losses.LGLALoss.implied_prior>`.

        Returns:
            float64 ``[C]``, summing to 1.

        Raises:
            TypeError: the weights are not numbers.
            ValueError: the weights are wrong, or the adjustment is your own table.
        """
        if self.adjustment == "table":
            raise ValueError(
                "adjustment: expected one that is made from class counts, got your own table, of which a "
                "rank keeps its own classes only; CLALogitAdjuster.from_table(grouper, "
                "table).implied_prior() takes all"
            )
        grouper = self._grouper_of(self._all_counts)
        adjuster = make_adjuster(grouper, self.num_experts, self.adjustment, self._tau)
        return adjuster.implied_prior(fusion).to(self.table.device)

    def _training_counts(self) -> Tensor:
        return self._all_counts.to(self.table.device, torch.float64, copy=True)

    def _take(self, grouper: ClassGrouper, constants: dict[str, Tensor]) -> None:
        """Keep the constants of this rank's classes; reuse the memory of the old ones."""
        constants |= {name: grouper.on_cpu(name) for name in ("class_counts", "group_index")}
        for name, value in constants.items():
            # Copies, so that the other ranks' classes take no memory.
            own, before = value[..., self.classes].detach().clone(), getattr(self, name, None)
            if before is not None and before.dtype == own.dtype:
                before.copy_(own)
            else:
                setattr(self, name, own if before is None else own.to(before.device))
        numbers = torch.tensor([self.scale or 0.0, self.label_smoothing, float(self.ignore_index)])
        self._digest = digest_of([*constants.values(), numbers])
        self._compared = False

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the classes; None means all."""
        return self._ranks.group

    @property
    def data_group(self) -> ProcessGroup | None:
        """The ranks that share the batch, or None."""
        return self._data_ranks.group

    def _place(self) -> tuple[int, int]:
        """Give the number of ranks that share the classes, and the rank of this process among them."""
        num_ranks = group_size(self.process_group)
        return num_ranks, dist.get_rank(self.process_group) if num_ranks > 1 else 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name in ("class_counts", "group_index", "table"):
            constant: Tensor = getattr(self, name)
            there = moved(constant, fn)
            if not there.is_meta:  # take no values: those of to_empty are undefined
                setattr(self, name, constant.to(there.device, there.dtype))
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Compute Eq. 9 of a batch.

        Args:
            features: inputs of the classifiers ``[N, K, d]``, the same on all ranks of the group.
            weight: weights of the classifiers of this rank's classes ``[K, C_r, d]``.
            target: class indices ``[N]`` or probabilities of all classes ``[N, C]``, the same on all ranks of
                the group.
            bias: bias of the classifiers of this rank's classes ``[K, C_r]``; -inf masks a class.
            sample_weight: as in :meth:`LGLALoss.forward <lgla_losses.LGLALoss.forward>`, the same on all
                ranks of the group.
            normalizer: as in :meth:`LGLALoss.forward <lgla_losses.LGLALoss.forward>`.
        """
        weight = self._own_part("weight", weight)
        bias = None if bias is None else self._own_part("bias", bias)
        batch = self._batch(features, weight, target, bias, sample_weight)
        if isinstance(normalizer, Tensor) and normalizer.requires_grad:
            raise ValueError(
                "normalizer: expected a number without gradient, got one that requires it; detach it"
            )

        compares = self._compares(batch.target)
        found, ranks, _ = self._step(batch, normalizer, self.table, self.group_index)
        engine = found or chunked
        if compares:
            self._class_ranks()._replace(digest=self._digest, read=True).sum(batch.target.new_zeros(1))

        mine = self._mine(batch)
        weights, samples = self._weights(engine, mine, ranks)  # Eqs. 7 and 8
        rows = self._rows(
            engine, batch, ranks, normalizer, samples=samples, table=self.table, weights=weights
        )  # with the divisor
        rows = rows._replace(target=mine.target, ignore_index=_ELSEWHERE)
        self._compared |= compares  # all ranks have compared, now that the sums are done

        if self.num_ranks > 1 and torch.is_grad_enabled():
            features = _Shared.apply(features, self._class_ranks())  # type: ignore[no-untyped-call]
        inputs = as_autocast_would(features, weight, bias)
        same_dtype(*inputs[:2])

        problem = functools.partial(
            ClassParallelCrossEntropy,
            scale=self.scale,
            ranks=self._class_ranks(),
            num_classes=self.num_classes,
            kept=self._kept(batch, inputs[0]),
            reads=values_readable(batch.target, self.validate_args),
        )
        return evaluate(engine, rows, inputs, problem)  # Eq. 9

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward
    else:  # ranks wait for each other here, and a compiler cannot trace that
        forward = torch.compiler.disable(forward)

    def _own_part(self, name: str, tensor: Tensor) -> Tensor:
        """Give the part of a ``DTensor`` that is on this rank; give any other tensor unchanged."""
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.device_mesh.ndim != 1 or list(tensor.placements) != [Shard(1)]:
            raise ValueError(
                f"{name}: expected a DTensor sharded on dimension 1, the classes, of a mesh with one "
                f"dimension, got placements {tensor.placements} on a mesh {tuple(tensor.device_mesh.shape)}; "
                'for a mesh with more pass mesh["classes"]'
            )
        return tensor.to_local()

    def _batch(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        sample_weight: Tensor | None,
    ) -> Batch:
        """Check the inputs of the loss; weight and bias are those of this rank's classes."""
        try:
            batch = Batch.of_features(features, weight, target, self.table, sample_weight, self.num_classes)
        except ValueError as problem:
            if weight.shape[1:2] == self.class_counts.shape:
                raise
            raise ValueError(
                f"{problem}; rank {self.rank} of {self.num_ranks} has {len(self.class_counts)} of "
                f"{self.num_classes} classes, starting at class {self.classes.start}, as torch.chunk cuts "
                "them"
            ) from None

        check_bias(bias, weight, self.scale, "[K, C_r]")

        if self._place() != (self.num_ranks, self.rank):
            raise ValueError(
                f"process_group: expected rank {self.rank} of {self.num_ranks}, as at the construction of "
                f"the loss, got rank {self._place()[1]} of {self._place()[0]}; construct it after "
                "init_process_group"
            )
        return batch

    def _mine(self, batch: Batch) -> Batch:
        """Give the batch of this rank: it ignores samples of other ranks' classes."""
        if batch.is_soft:
            return batch._replace(target=batch.target[:, self.classes])
        place = batch.target - self.classes.start
        is_mine = (place >= 0) & (place < len(self.class_counts)) & (batch.target != self.ignore_index)
        return batch._replace(target=torch.where(is_mine, place, _ELSEWHERE))

    def _kept(self, batch: Batch, features: Tensor) -> Tensor:
        """Sum the probabilities of each sample ``[N]``: 1, or 0 for an ignored one."""
        dtype = functional.compute_dtype(features.dtype)
        if batch.is_soft:
            return batch.target.sum(dim=1, dtype=dtype)
        return (batch.target != self.ignore_index).to(dtype)

    def _class_ranks(self) -> Ranks:
        """Give the ranks that share the classes."""
        return Ranks(self.num_ranks, self.process_group)

    def _ranks_of_step(self, target: Tensor, readable: bool) -> Ranks:
        """Give the ranks that share the batch."""
        shared = self.data_group is not None and self.sync and torch.is_grad_enabled()
        number = group_size(self.data_group) if shared else 1
        if number == 1 or not self._compares(target):
            return Ranks(number, self.data_group, read=readable)
        return Ranks(number, self.data_group, self._digest, read=True)

    def _numbers_summed(self) -> int:
        return self.num_groups * (self.num_experts + 1) if self.aaw else 1

    def _communicates(self, normalizer: float | Tensor | None, ranks: Ranks) -> bool:
        return self.aaw or super()._communicates(normalizer, ranks)

    def _explain(self, batch: Batch) -> None:
        """Raise, on all ranks that share the classes, if one has bad values or a different batch."""
        ranks, who = self._class_ranks(), f"rank {dist.get_rank()}: " if self.num_ranks > 1 else ""
        problem = None
        try:
            batch._replace(weight=None).explain(self.ignore_index, self.num_classes, self._masked())
            finite_tensors(features=batch.features)
        except ValueError as error:
            problem = error

        found = ranks.gather_number(-1 if problem else len(batch.target), batch.target)
        if problem is not None:
            raise ValueError(f"{who}{problem}") from problem

        if min(found) < 0:
            bad = [rank for rank, number in zip(ranks.global_ranks(), found, strict=True) if number < 0]
            raise ValueError(
                f"{who}features, target: expected finite features and valid targets on all ranks, got "
                f"others on rank {', '.join(map(str, bad))}; see the error of that rank"
            )
        if len(set(found)) > 1:
            raise ValueError(
                f"{who}features, target: expected the same samples on all ranks that share the classes, got "
                f"{found} samples on its ranks; {_SAME_SAMPLES}"
            )

        others = _found_apart(ranks.gather(_marks(batch))) if ranks.number > 1 else []
        if others:
            raise ValueError(
                f"{who}features, target: expected the same on all ranks that share the classes, got other "
                f"{' and '.join(others)} on some; {_SAME_SAMPLES}"
            )

    def _masked(self) -> Tensor | None:
        return self._all_counts == 0 if self.zero_counts == "mask" else None

    def _weights(self, engine: Engine, batch: Batch, ranks: Ranks) -> tuple[Tensor | None, Tensor | None]:
        """Compute Eqs. 7 and 8, each rank for its own classes, as :meth:`ExpertLoss._weights` does."""
        if not self.aaw:
            return batch.weights_of_experts(self.num_experts), None
        group_index, of_classes = self.group_index, self._class_ranks()
        if not len(group_index):
            batch, group_index = _with_a_class(batch), group_index.new_zeros(1)
        if batch.is_soft:  # whose angles to all classes are many
            engine = Blockwise(engine)

        samples = Samples(batch.target, group_index, self.num_groups, batch.sample_weight, _ELSEWHERE)
        angles, parts = engine.statistics(batch.angles(self.scale), samples)  # Eq. 7
        parts = self._summed(of_classes.add_(parts.sum(dim=0, keepdim=True)), ranks)
        weights, number = engine.weights(angles, samples, parts, ranks.number)  # Eq. 8
        return of_classes.add_(weights), number

    def extra_repr(self) -> str:
        """Show the configuration."""
        return (
            f"classes={self.classes.start}..{self.classes.stop - 1} of {self.num_classes}, "
            f"{self._rules.shown()}aaw={self.aaw}, "
            f"scale={self.scale}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"
        )


def _with_a_class(batch: Batch) -> Batch:
    """Give a rank without classes one class that no sample belongs to, because engines need at least one."""
    target = batch.target.new_zeros((len(batch.target), 1)) if batch.is_soft else batch.target
    weight = cast(Tensor, batch.weight)
    return batch._replace(target=target, weight=weight.new_zeros(weight.shape[0], 1, weight.shape[2]))


def _marks(batch: Batch) -> Tensor:
    """Compute numbers ``[N, 2 + 2 K]`` that show whether ranks have the same batch.

    They stand for the target, the sample's weight, every expert's features and the features' lengths.
    """
    features = cast(Tensor, batch.features).detach()
    dtype = functional.compute_dtype(features.dtype)
    target = _sketch(batch.target.to(dtype)) if batch.is_soft else batch.target.to(dtype)
    weight = torch.ones_like(target) if batch.sample_weight is None else batch.sample_weight.to(dtype)
    features = features.to(dtype)
    lengths = torch.linalg.vector_norm(features, dim=-1)
    return torch.cat([target[:, None], weight[:, None], _sketch(features), lengths], dim=1)


def _sketch(vectors: Tensor) -> Tensor:
    """Compute one number for each vector ``[..., d]``; for different vectors it is very likely different."""
    return vectors @ torch.arange(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device).cos()


def _found_apart(marks: Tensor) -> list[str]:
    """Name the inputs that differ between ranks, by their marks ``[R, N, 2 + 2 K]``."""
    apart = (marks - marks[0]).abs()
    num_experts = marks.shape[2] // 2 - 1
    lengths = marks[..., 2 + num_experts :].amax(dim=0)
    differs = {
        "features": apart[..., 2 : 2 + num_experts] > _SAME_FEATURES * lengths,
        "targets": apart[..., 0] > _SAME_TARGETS,
        "sample weights": apart[..., 1] > _SAME_TARGETS,
    }
    return [name for name, found in differs.items() if found.any()]


class _Shared(torch.autograd.Function):
    """Pass on features that every rank of a group reads; sum the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Sum in a wider dtype, and round once.
        wide = gradient.new_empty(gradient.shape, dtype=functional.compute_dtype(gradient.dtype))
        return ctx.ranks.add_(wide.copy_(gradient)).to(gradient.dtype), None
