"""Classes spread over the ranks of a job: the loss of a classifier that is too large for one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lgla_losses import functional, fused
from lgla_losses.base import WAY_OUT, ExpertLoss
from lgla_losses.buffers import ConstantBuffers
from lgla_losses.checks import (
    floating_tensor,
    normalizer_value,
    same_device,
    target_tensor,
    target_values,
    values_readable,
)
from lgla_losses.collectives import (
    Note,
    digest_of,
    gather_number,
    ranks_to_sync,
    refuse_data_parallel,
    sum_over_ranks,
)
from lgla_losses.linear import add_product, as_autocast_would, chunks_of, directions, through_directions_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SAME_SAMPLES = (
    "give these ranks the same batches (a sampler by the data-parallel rank, not by the rank), and split the "
    "batch over data_group"
)

__all__ = ["ClassParallelLGLALoss", "class_shard"]


def class_shard(num_classes: int, rank: int, num_ranks: int) -> slice:
    """The classes of a rank, cut as :func:`torch.chunk` cuts; the last ranks may have fewer, or none.

    Example:
        >>> [class_shard(5, rank, 4) for rank in range(4)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = -(-num_classes // num_ranks)
    return slice(min(rank * size, num_classes), min((rank + 1) * size, num_classes))


class ClassParallelLGLALoss(ConstantBuffers):
    r"""The LGLA loss of classifiers whose classes are spread over ranks.

    Equal to :class:`~lgla_losses.LinearLGLALoss` in one process, in loss and gradients. Features and
    targets are the same on all ranks of ``process_group``; each rank holds the weights of its own classes,
    computes its own logits, a chunk of samples at a time, and never sees another's. The ranks exchange the
    angles, the logarithm of their sums of exponentials and the target's logit, a few numbers a sample and
    expert whatever the number of classes, and in ``backward`` one sum of the features' gradients
    ``[N, K, d]``. So memory a rank falls with the number of ranks.

    Every rank of the group then has the whole gradient of the features, as if it were alone, and
    the gradient of its own weights. What precedes the classifier is replicated, or data parallel over
    ``data_group``: on a device mesh of two dimensions, data and classes, a batch is split along the
    first, and reference angles and ``"mean"`` are over all of it.

    Class counts and adjustments are kept for the rank's own classes only, and so is its ``state_dict``.

    Source: Tao et al., ICCV 2023, Eq. 9.

    Args:
        class_counts: of all classes ``[C]``, as in :class:`~lgla_losses.LGLALoss`.
        num_experts: as in :class:`~lgla_losses.LGLALoss`.
        tau: as in :class:`~lgla_losses.LGLALoss`.
        scale: the factor of cosine classifiers, :math:`v = s \cos(W, f)`, which have no bias; None for
            linear ones.
        process_group: the ranks that share the classes; None means all.
        data_group: the ranks that share the batch, each with samples of its own; None means that this is
            the whole batch.
        options: ``grouper``, ``aaw``, ``adjustment``, ``reduction``, ``ignore_index``,
            ``label_smoothing``, ``sync`` (over ``data_group``) and ``validate_args`` of
            :class:`~lgla_losses.LGLALoss`.

    Attributes:
        classes: the slice of this rank's classes.
        table: their adjustments ``[K, C_r]``.
        class_counts: their training samples ``[C_r]``.
        group_index: their groups ``[C_r]``.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, shapes or devices do not fit, or, on all ranks alike where
            values may be read, targets differ between the ranks, or a rank's logits are not finite.

    Shape:
        - features: ``[N, K, d]``
        - weight: ``[K, C_r, d]``, a ``DTensor`` sharded on dimension 1 or this rank's part
        - target: int64 ``[N]``, of all classes
        - bias: ``[K, C_r]``, of the same kind, or None
        - result: as of :class:`~lgla_losses.LGLALoss`, the same on all ranks of the group

    Example:
        >>> criterion = ClassParallelLGLALoss([500, 100, 20])  # alone it has all classes
        >>> features = torch.randn(8, 3, 16, requires_grad=True)
        >>> weight = torch.randn(3, 3, 16, requires_grad=True)
        >>> criterion(features, weight, torch.arange(8) % 3).backward()
    """

    class_counts: Tensor
    group_index: Tensor
    table: Tensor

    def __init__(
        self,
        class_counts: Any = None,
        num_experts: Any = None,
        tau: float | None = None,
        *,
        scale: float | None = None,
        process_group: ProcessGroup | None = None,
        data_group: ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if "backend" in options:
            raise TypeError("backend: expected none, as this loss has but one; leave it out")
        if data_group is not None and process_group is None:
            raise ValueError(
                "process_group: expected the ranks that share the classes beside a data_group, got None; on "
                'a device mesh they are mesh["classes"].get_group() and mesh["data"].get_group()'
            )
        whole = ExpertLoss(class_counts, num_experts, tau, scale=scale, **options)
        grouper, table = whole.grouper, whole.adjuster.table
        self.process_group, self.data_group = process_group, data_group
        self.num_classes, self.num_experts = whole.num_classes, whole.num_experts
        self.num_groups = grouper.num_groups
        self.scale, self.aaw, self.reduction = whole.scale, whole.aaw, whole.reduction
        self.ignore_index, self.label_smoothing = whole.ignore_index, whole.label_smoothing
        self.sync, self.validate_args = whole.weighter.sync, whole.validate_args
        self.classes = class_shard(whole.num_classes, self.rank, self.num_ranks)
        # Copies, so that the other ranks' classes take no memory.
        self.register_buffer("class_counts", grouper.class_counts[self.classes].clone())
        self.register_buffer("group_index", grouper.group_index[self.classes].clone())
        self.register_buffer("table", table[:, self.classes].clone())
        self._digest = digest_of([grouper.class_counts, grouper.group_index, table])
        self._compared = False

    @property
    def num_ranks(self) -> int:
        """Number of ranks that share the classes; 1 outside distributed training."""
        return dist.get_world_size(self.process_group) if _in_distributed_training() else 1

    @property
    def rank(self) -> int:
        """The number of this rank among them."""
        return dist.get_rank(self.process_group) if _in_distributed_training() else 0

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Eq. 9 of a batch.

        Args:
            features: inputs of the classifiers ``[N, K, d]``, the same on all ranks of the group.
            weight: weights of the classifiers of this rank's classes ``[K, C_r, d]``.
            target: class indices ``[N]``, the same on all ranks of the group.
            bias: of the classifiers of this rank's classes ``[K, C_r]``; -inf masks a class.
            normalizer: as in :meth:`LGLALoss.forward <lgla_losses.LGLALoss.forward>`.
        """
        weight = self._own_part("weight", weight)
        bias = None if bias is None else self._own_part("bias", bias)
        self._check_inputs(features, weight, target, bias)
        normalizer_value(normalizer, self.reduction, self.validate_args)
        readable = values_readable(features, self.validate_args)
        if readable:
            target_values(target, self.num_classes, self.ignore_index)
            if not features.isfinite().all():
                raise ValueError(f"features: expected finite numbers, got NaN or infinity; {WAY_OUT}")
        num_data_ranks = 1 if self.data_group is None else ranks_to_sync(self.sync, self.data_group)
        note = self._compare_once(target, num_data_ranks, readable)

        place, size = target - self.classes.start, len(self.class_counts)
        own = _Own(place.clamp(0, max(size - 1, 0)), (place >= 0) & (place < size))
        weights = samples = None
        if self.aaw:
            angles, group = self._angles(features, weight, target, own)
            local = functional.aaw_statistics(angles, group, self.num_groups)
            statistics = sum_over_ranks(local, num_data_ranks, self.data_group, note)
            weights, samples = functional.aaw_weights(angles, group, statistics), statistics[:, -1].sum()
        elif self.reduction == "mean" and normalizer is None:
            count = (target != self.ignore_index).sum()
            samples = sum_over_ranks(count, num_data_ranks, self.data_group, note)
        features, weight, bias = as_autocast_would(features, weight, bias)
        if weight.dtype != features.dtype:
            raise ValueError(
                f"weight: expected the features' dtype {features.dtype}, got {weight.dtype}; convert one of "
                "them, or train under torch.autocast, which leaves float64 as it is"
            )
        divisor = None
        if self.reduction == "mean":
            if normalizer is None and samples is not None:
                normalizer = samples.clamp(min=1).to(functional.widest_dtype(target.device)) / num_data_ranks
            dtype = functional.compute_dtype(features.dtype)
            divisor = torch.as_tensor(normalizer, dtype=dtype, device=target.device)
        problem = _ClassParallel(self, target, own, weights, divisor, readable)
        losses: Tensor = _Differentiable.apply(problem, features, weight, bias)  # type: ignore[no-untyped-call]
        return losses

    def _own_part(self, name: str, tensor: Tensor) -> Tensor:
        """A ``DTensor``'s part on this rank, or the tensor itself."""
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.device_mesh.ndim != 1 or list(tensor.placements) != [Shard(1)]:
            raise ValueError(
                f"{name}: expected a DTensor sharded on dimension 1, the classes, of a mesh with one "
                f"dimension, got placements {tensor.placements} on a mesh {tuple(tensor.device_mesh.shape)}; "
                'take mesh["classes"] of a mesh with more'
            )
        return tensor.to_local()

    def _check_inputs(self, features: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
        floating_tensor("features", features, "[N, K, d]")
        floating_tensor("weight", weight, "[K, C_r, d]")
        n, k, d = features.shape
        expected = [self.num_experts, len(self.class_counts), d]
        if k != self.num_experts or list(weight.shape) != expected:
            raise ValueError(
                f"features, weight: expected shapes [N, {self.num_experts}, d] and {expected}, the "
                f"{expected[1]} of {self.num_classes} classes from {self.classes.start} on for rank "
                f"{self.rank} of {self.num_ranks}, as torch.chunk cuts them, got {[n, k, d]} and "
                f"{list(weight.shape)}"
            )
        target_tensor(target, [n])
        if bias is not None:
            floating_tensor("bias", bias, "[K, C_r]")
            if list(bias.shape) != expected[:2]:
                raise ValueError(f"bias: expected shape {expected[:2]}, got {list(bias.shape)}")
            if self.scale is not None:
                raise ValueError(f"bias: expected None with scale={self.scale}: cosine classifiers have none")
        same_device(features=features, target=target, weight=weight, bias=bias, criterion=self.table)

    def _compare_once(self, target: Tensor, num_data_ranks: int, readable: bool) -> Note:
        """In the first step: the ranks have the same constants, and those of a group as many samples.

        Returns:
            What goes to the data-parallel ranks with the step's own numbers.
        """
        recorded = target.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._compared or recorded or self.validate_args is False:
            return Note(read=readable)
        self._compared = True
        if self.num_ranks > 1:
            note = Note(self._digest, read=True)
            sum_over_ranks(target.new_zeros(1), self.num_ranks, self.process_group, note)
            sizes = gather_number(len(target), self.num_ranks, self.process_group, target)
            if len(set(sizes)) > 1:
                raise ValueError(
                    "features, target: expected the same samples on all ranks that share the classes, got "
                    f"{sizes} samples on its ranks; {_SAME_SAMPLES}"
                )
        return Note(self._digest if num_data_ranks > 1 else 0, read=True)

    def _angles(self, features: Tensor, weight: Tensor, target: Tensor, own: _Own) -> tuple[Tensor, Tensor]:
        """The angles of Eq. 7 ``[N, K]``, and the groups of the samples ``[N]``, -1 for ignored ones.

        One rank knows those of a sample.
        """
        dtype = functional.compute_dtype(torch.promote_types(features.dtype, weight.dtype))
        known = features.new_zeros((len(target), self.num_experts + 1), dtype=dtype)
        if len(self.class_counts):
            angles = functional.angles_from_features(features, weight, own.place)
            known = torch.cat([angles, self.group_index[own.place, None].to(dtype)], dim=1)
            known = torch.where(own.mask[:, None], known, 0.0)
        if self.num_ranks > 1:
            dist.all_reduce(known, group=self.process_group)
        # Where targets differ between ranks a sample may have two groups; `_check_exchanged` tells.
        group = known[:, -1].long().clamp(max=self.num_groups - 1)
        return known[:, :-1], torch.where(target == self.ignore_index, -1, group)

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)

    def extra_repr(self) -> str:
        """Configuration shown by ``repr``."""
        return (
            f"classes={self.classes.start}..{self.classes.stop - 1} of {self.num_classes}, aaw={self.aaw}, "
            f"scale={self.scale}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"
        )


def _in_distributed_training() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Own(NamedTuple):
    """Which samples' classes are this rank's, ``mask [N]``, and where these lie among them, ``place [N]``."""

    place: Tensor
    mask: Tensor


class _ClassParallel(NamedTuple):
    """Eq. 9 from this rank's classes and what the ranks tell each other."""

    loss: ClassParallelLGLALoss
    target: Tensor
    own: _Own
    weights: Tensor | None
    divisor: Tensor | None
    readable: bool

    def run(
        self,
        inputs: Sequence[Any],
        wanted: Sequence[bool],
        upstream: Tensor | None = None,
        log_sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The losses ``[N]``, logarithms of the sums of exponentials over all classes ``[N, K]``, gradients.

        Args:
            inputs: features ``[N, K, d]``, weights ``[K, C_r, d]``, a bias ``[K, C_r]`` or None.
            wanted: which of their gradients; those of the features are only this rank's part.
            upstream: gradient of every sample's loss ``[N]``; None for that of their sum over the divisor.
            log_sums: from an earlier run, which spares the ranks to communicate.
        """
        features, weight, bias = inputs
        loss, scale = self.loss, self.loss.scale
        exact = functional.compute_dtype(features.dtype)
        factor = self._factor(upstream, features, exact)
        losses = features.new_zeros(len(features), dtype=exact)
        known = log_sums is not None
        if log_sums is None:
            log_sums = features.new_empty(features.shape[:2], dtype=exact)
        sums = [
            torch.zeros_like(v, dtype=exact, memory_format=torch.contiguous_format) if w else None
            for v, w in zip(inputs, wanted, strict=True)
        ]
        # As many samples at a time as if this rank had all classes, so that all ranks have as many chunks.
        chunks = chunks_of(features, num_classes=loss.num_classes)
        # One memory for all of them, which is warm from the second on.
        buffer = features.new_empty((chunks[0].stop if chunks else 0, weight.shape[1]))
        with torch.autocast(features.device.type, enabled=False):
            for k in range(loss.num_experts):
                rows_of, centres = features[:, k], weight[k]
                if scale is not None:
                    rows_of = (scale * directions(rows_of, exact)).to(features.dtype)
                    centres = directions(centres, exact).to(weight.dtype)
                table = loss.table[k].to(exact) + (0.0 if bias is None else bias[k].to(exact))
                of_features, of_weight, of_bias = (
                    None if v is None else v[:, k] if v is sums[0] else v[k] for v in sums
                )
                for rows in chunks:
                    own = _Own(self.own.place[rows], self.own.mask[rows])
                    some = rows_of[rows]
                    logits = torch.mm(some, centres.T, out=buffer[: len(some)]).to(exact).add_(table)
                    if known:
                        shares = logits.sub_(log_sums[rows, k, None]).exp_()
                    else:
                        shares, log_sums[rows, k], entropy = self._exchange(logits, own, self.target[rows])
                        losses[rows] += entropy if self.weights is None else self.weights[rows, k] * entropy
                    if not any(wanted):
                        continue
                    gradient = self._logit_gradient(shares, own, factor[rows, k, None]).to(features.dtype)
                    if of_features is not None:
                        of_features[rows] = gradient @ centres
                    if of_weight is not None:
                        add_product(of_weight, gradient.T, some, first=rows.start == 0)
                    if of_bias is not None:
                        of_bias += gradient.sum(dim=0, dtype=exact)
        if scale is not None and sums[0] is not None:
            through_directions_(sums[0].mul_(scale), features.to(exact))
        if scale is not None and sums[1] is not None:
            through_directions_(sums[1], weight.to(exact))
        return losses.masked_fill(self.target == loss.ignore_index, 0.0), log_sums, sums

    def _factor(self, upstream: Tensor | None, features: Tensor, exact: torch.dtype) -> Tensor:
        """The gradient of the result by every row's cross entropy ``[N, K]``."""
        factor = features.new_ones(features.shape[:2], dtype=exact)
        if self.weights is not None:
            factor = self.weights.to(exact)
        if upstream is not None:
            factor = factor * upstream[:, None].to(exact)
        elif self.divisor is not None:
            factor = factor / self.divisor
        return factor.masked_fill((self.target == self.loss.ignore_index)[:, None], 0.0)

    def _exchange(self, logits: Tensor, own: _Own, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one expert's logits ``[n, C_r]`` the probabilities, in the logits' memory.

        And ``[n]`` each, over all classes: the logarithms of the sums of exponentials, the cross entropies.
        """
        loss, smoothing = self.loss, self.loss.label_smoothing
        own_logit = logits.new_zeros(len(logits))
        peak = logits.new_zeros((len(logits), 1))
        if len(loss.class_counts):
            found = logits.gather(1, own.place[:, None])[:, 0]
            own_logit = torch.where(own.mask, found, 0.0)
            peak = logits.amax(dim=1, keepdim=True)
            peak = torch.where(peak == -torch.inf, 0.0, peak)
        total = [logits.sum(dim=1)] if smoothing else []
        shares = logits.sub_(peak).exp_()
        log_sum = peak[:, 0] + shares.sum(dim=1).log()
        mine = torch.stack([log_sum, own_logit, own.mask.to(log_sum.dtype), *total])
        every = mine[None]
        if loss.num_ranks > 1:
            every = mine.new_empty(loss.num_ranks, *mine.shape)
            dist.all_gather(list(every), mine, group=loss.process_group)
        if self.readable:
            self._check_exchanged(every, target)
        log_sum, own_logit = every[:, 0].logsumexp(dim=0), every[:, 1].sum(dim=0)
        entropy = (1 - smoothing) * (log_sum - own_logit)
        if smoothing:
            entropy = entropy + smoothing * (log_sum - every[:, 3].sum(dim=0) / loss.num_classes)
        return shares.mul_((peak - log_sum[:, None]).exp()), log_sum, entropy

    def _check_exchanged(self, every: Tensor, target: Tensor) -> None:
        kept = target != self.loss.ignore_index
        log_sum, own_logit, owners = every[:, 0, kept], every[:, 1, kept], every[:, 2, kept]
        bad = log_sum.isnan() | (log_sum == torch.inf) | ~own_logit.isfinite()
        bad = bad.any(dim=1)
        if bad.any():
            ranks = [0]
            if _in_distributed_training():
                ranks = dist.get_process_group_ranks(self.loss.process_group)
            named = ", ".join(str(rank) for rank, b in zip(ranks, bad.tolist(), strict=True) if b)
            raise ValueError(
                "weight, bias: expected finite logits on the targets, no NaN or +inf elsewhere, got others "
                f"on rank {named}; {WAY_OUT}"
            )
        if (owners.sum(dim=0) != 1).any():
            raise ValueError(
                "target: expected the same class indices on all ranks that share the classes, got others; "
                f"{_SAME_SAMPLES}"
            )

    def _logit_gradient(self, shares: Tensor, own: _Own, factor: Tensor) -> Tensor:
        """That of one expert's logits ``[n, C_r]``, in the memory of its probabilities."""
        smoothing = self.loss.label_smoothing
        if not len(self.loss.class_counts):
            return shares
        if smoothing:
            shares -= smoothing / self.loss.num_classes
        at_own = shares.gather(1, own.place[:, None])
        at_own = torch.where(own.mask[:, None], at_own - (1 - smoothing), at_own) * factor
        return shares.mul_(factor).scatter_(1, own.place[:, None], at_own)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: _ClassParallel, *inputs: Tensor | None) -> Tensor:
        wanted, reduction = ctx.needs_input_grad[1:], problem.loss.reduction
        at_once = reduction != "none" and not any(v is not None and v.dtype == torch.float16 for v in inputs)
        losses, log_sums, gradients = problem.run(inputs, [w and at_once for w in wanted])
        ctx.problem, ctx.gradients = problem, gradients if at_once else None
        ctx.save_for_backward(log_sums, *inputs)
        return losses if reduction == "none" else fused.total(losses, problem.divisor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ClassParallelLGLALoss has no second derivative: expected backward without create_graph; "
                "LinearLGLALoss has one"
            )
        problem, wanted = ctx.problem, ctx.needs_input_grad[1:]
        log_sums, *inputs = ctx.saved_tensors
        # From now on they are the caller's; a second backward computes its own.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            gradients = [v if v is None else v.mul_(upstream.to(v.dtype)) for v in gradients]
        else:
            if problem.loss.reduction != "none":
                upstream = upstream if problem.divisor is None else upstream / problem.divisor
                upstream = upstream.expand(len(problem.target))
            gradients = problem.run(inputs, wanted, upstream, log_sums)[2]
        if gradients[0] is not None and problem.loss.num_ranks > 1:
            dist.all_reduce(gradients[0], group=problem.loss.process_group)
        return None, *(v if v is None else v.to(i.dtype) for v, i in zip(gradients, inputs, strict=True))
