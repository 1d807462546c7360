"""Classes spread over the ranks of a job: the loss of a classifier that is too large for one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lgla_losses import functional
from lgla_losses._buffers import moved
from lgla_losses._checks import (
    WAY_OUT,
    finite_tensors,
    floating_tensor,
    integer,
    normalizer_value,
    positive_int,
    same_device,
    target_tensor,
    target_values,
)
from lgla_losses._counts import ArrayLike
from lgla_losses._ranks import (
    Ranks,
    RanksOf,
    digest_of,
    gather_number,
    group_size,
    refuse_data_parallel,
)
from lgla_losses._torch import values_readable
from lgla_losses.adjustment import strength
from lgla_losses.grouping import ClassGrouper, same_classes
from lgla_losses.kernels import autograd
from lgla_losses.kernels.linear import (
    add_product,
    as_autocast_would,
    chunks_of,
    directions,
    through_directions_,
)
from lgla_losses.losses._base import ExpertLoss, scalar_on
from lgla_losses.losses._config import ExpertLossOptions, make_adjuster, refuse_unknown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SAME_SAMPLES = (
    "give these ranks the same batches (a sampler by the data-parallel rank, not by the rank) and the same "
    "random numbers for dropout, and split the batch over data_group"
)

#: How far the sketches of the same features may be apart, in their lengths: ranks may round otherwise.
_SAME_FEATURES = 0.02

__all__ = ["ClassParallelLGLALoss", "class_shard"]


def class_shard(num_classes: int, rank: int, num_ranks: int) -> slice:
    """Cut the classes as :func:`torch.chunk` does; the last ranks may have fewer, or none.

    Args:
        num_classes: number of classes ``C``, at least 1.
        rank: of this process, 0 to ``num_ranks - 1``.
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


class ClassParallelLGLALoss(nn.Module):
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

    Adjustments are kept for the rank's own classes only. They are no buffers, as
    DistributedDataParallel would send those of rank 0 to all, and a checkpoint hold those of one rank:
    construct the loss from the same counts again. Construct it after ``init_process_group``.

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
        ValueError: an argument is out of range, or shapes or devices do not fit; and, on all ranks that share
            the classes alike, where values may be read: targets or features differ between them, or a rank
            has bad values. In the first step: they were constructed from other arguments.

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
                "process_group: expected the ranks that share the classes beside a data_group, got None; on "
                'a device mesh they are mesh["classes"].get_group() and mesh["data"].get_group()'
            )
        whole = ExpertLoss(class_counts, num_experts, tau, scale=scale, **options)
        self._ranks, self._data_ranks = RanksOf(process_group), RanksOf(data_group)
        self.num_classes, self.num_experts = whole.num_classes, whole.num_experts
        self.num_groups = whole.grouper.num_groups
        self.scale, self.aaw, self.reduction = whole.scale, whole.aaw, whole.reduction
        self.ignore_index, self.label_smoothing = whole.ignore_index, whole.label_smoothing
        self.sync, self.validate_args = whole.sync, whole.validate_args
        self.num_ranks, self.rank = self._place()
        self.classes = class_shard(whole.num_classes, self.rank, self.num_ranks)
        self.adjustment = whole.adjustment
        # What set_adjustment starts from; a table of all classes is K times as large.
        self._all_counts = whole.grouper.on_cpu("class_counts").clone()
        self._own_groups = whole.grouper.on_cpu("group_index").clone() if whole.grouper.is_own else None
        self._tau = None if whole.adjuster.tau is None else float(whole.adjuster.tau)
        self._take(whole.grouper, {"table": whole.adjuster.on_cpu("table")})

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts, groups and adjustments, as :meth:`~lgla_losses.LGLALoss.set_adjustment` does.

        Every rank calls it, with the counts of all classes; the next step compares them.

        Args:
            class_counts: training samples per class ``[C]`` of the same classes; None keeps them.
            tau: strength, as in the constructor; None keeps it.

        Raises:
            TypeError: counts or ``tau`` are no numbers.
            ValueError: counts are not positive or of other classes, ``tau`` is out of range, or the
                adjustment has none.
        """
        counts = self._all_counts if class_counts is None else same_classes(class_counts, self.num_classes)
        if self._own_groups is None:
            grouper = ClassGrouper(counts, self.num_groups)
        else:
            grouper = ClassGrouper.from_groups(counts, self._own_groups)
        tau = strength(self.adjustment, tau)
        constants = {}
        if self.adjustment != "table":  # one of the caller's own stays
            tau = self._tau if tau is None else tau
            adjuster = make_adjuster(grouper, self.num_experts, self.adjustment, tau)
            constants["table"] = adjuster.on_cpu("table")
        self._all_counts, self._tau = counts.clone(), tau
        self._take(grouper, constants)

    def _take(self, grouper: ClassGrouper, constants: dict[str, Tensor]) -> None:
        """Keep the constants of this rank's classes, in the memory of those before."""
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
        """Number of ranks that share the classes, and the number of this one among them."""
        num_ranks = group_size(self.process_group)
        return num_ranks, dist.get_rank(self.process_group) if num_ranks > 1 else 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name in ("class_counts", "group_index", "table"):
            constant: Tensor = getattr(self, name)
            there = moved(constant, fn)
            if not there.is_meta:  # the values are not taken: to_empty has none
                setattr(self, name, constant.to(there.device, there.dtype))
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

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
        normalizer_value(normalizer, self.reduction, self.validate_args, target.device)
        if isinstance(normalizer, Tensor) and normalizer.requires_grad:
            raise ValueError(
                "normalizer: expected a number without gradient, got one that wants it; detach it"
            )
        readable = values_readable(features, self.validate_args)
        shared = self.data_group is not None and self.sync and torch.is_grad_enabled()
        num_data_ranks = group_size(self.data_group) if shared else 1
        counts = self.reduction == "mean" and normalizer is None
        # What the ranks that share the batch wait for.
        numbers = self.num_groups * (self.num_experts + 1) if self.aaw else int(counts)
        if readable:
            self._agree(features, target, numbers if num_data_ranks > 1 else 0, num_data_ranks)
        note = self._compare_once(target, readable)

        place, size = target - self.classes.start, len(self.class_counts)
        own = _Own(place.clamp(0, max(size - 1, 0)), (place >= 0) & (place < size))
        weights = samples = None
        if self.aaw:
            angles, group = self._angles(features, weight, target, own)
            local = functional.aaw_statistics(angles, group, self.num_groups)
            statistics = note._replace(number=num_data_ranks, group=self.data_group).sum(local)
            weights, samples = functional.aaw_weights(angles, group, statistics), statistics[:, -1].sum()
        elif counts:
            count = (target != self.ignore_index).sum().to(functional.widest_dtype(target.device))
            samples = note._replace(number=num_data_ranks, group=self.data_group).sum(count)
        self._compared |= note.digest > 0  # by all ranks, now that the sums are done
        features, weight, bias = as_autocast_would(features, weight, bias)
        if weight.dtype != features.dtype:
            raise ValueError(
                f"weight: expected the features' dtype {features.dtype}, got {weight.dtype}; convert one of "
                "them, or train under torch.autocast, which leaves float64 as it is"
            )
        divisor, dtype = None, functional.compute_dtype(features.dtype)
        if normalizer is not None:
            divisor = scalar_on(target.device, normalizer, dtype)
        elif counts and samples is not None:
            divisor = (samples.clamp(min=1) / num_data_ranks).to(dtype)
        problem = _ClassParallel(self, target, own, weights, divisor, readable)
        inputs = features, weight, bias
        if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
            loss: Tensor = _Differentiable.apply(problem, *inputs)  # type: ignore[no-untyped-call]
            return loss
        return problem.reduced(problem.run(inputs, (False, False, False))[0])

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

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
        if self._place() != (self.num_ranks, self.rank):
            raise ValueError(
                f"process_group: expected this to be rank {self.rank} of {self.num_ranks}, as when the loss "
                f"was constructed, got rank {self._place()[1]} of {self._place()[0]}; construct it after "
                "init_process_group"
            )

    def _compare_once(self, target: Tensor, readable: bool) -> Ranks:
        """In the first step: the ranks have the same constants.

        Returns:
            What goes to the data-parallel ranks with the step's own numbers.
        """
        recorded = target.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._compared or recorded or self.validate_args is False:
            return Ranks(read=readable)
        note = Ranks(self.num_ranks, self.process_group, self._digest, read=True)
        if self.num_ranks > 1:
            note.sum(target.new_zeros(1))
        return note

    def _agree(self, features: Tensor, target: Tensor, numbers: int, num_data_ranks: int) -> None:
        """Raise on all ranks that share the classes if one has bad values, or another number of samples.

        And on those that share the batch, which wait for so many numbers.
        """
        problem = None
        try:
            target_values(target, self.num_classes, self.ignore_index)
            finite_tensors(features=features)
        except ValueError as error:
            problem = error
        found = [-1 if problem else len(target)]
        if self.num_ranks > 1:
            found = gather_number(found[0], self.num_ranks, self.process_group, target)
        if problem is None and min(found) < 0:
            bad = [rank for rank, number in zip(self._global_ranks(), found, strict=True) if number < 0]
            problem = ValueError(
                "features, target: expected finite features and valid targets on all ranks, got others on "
                f"rank {', '.join(map(str, bad))}, whose own error says which"
            )
        elif problem is None and len(set(found)) > 1:
            problem = ValueError(
                "features, target: expected the same samples on all ranks that share the classes, got "
                f"{found} samples on its ranks; {_SAME_SAMPLES}"
            )
        if problem is not None and numbers:
            Ranks(num_data_ranks, self.data_group).refuse(problem, numbers, target.device)
        if problem is not None and self.num_ranks > 1:
            raise ValueError(f"rank {dist.get_rank()}: {problem}") from problem
        if problem is not None:
            raise problem

    def _global_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.process_group) if self.num_ranks > 1 else [0]

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
                        shares, log_sums[rows, k], entropy = self._exchange(
                            logits, own, self.target[rows], features[rows, k]
                        )
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

    def _exchange(
        self, logits: Tensor, own: _Own, target: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        told = [logits.sum(dim=1)] if smoothing else []
        if self.readable:
            told += [target.to(logits.dtype), *_sketch(features)]
        shares = logits.sub_(peak).exp_()
        log_sum = peak[:, 0] + shares.sum(dim=1).log()
        mine = torch.stack([log_sum, own_logit, *told])
        every = mine[None]
        if loss.num_ranks > 1:
            every = mine.new_empty(loss.num_ranks, *mine.shape)
            dist.all_gather(list(every), mine, group=loss.process_group)
        if self.readable:
            self._check_exchanged(every, target)
        log_sum, own_logit = every[:, 0].logsumexp(dim=0), every[:, 1].sum(dim=0)
        entropy = (1 - smoothing) * (log_sum - own_logit)
        if smoothing:
            entropy = entropy + smoothing * (log_sum - every[:, 2].sum(dim=0) / loss.num_classes)
        return shares.mul_((peak - log_sum[:, None]).exp()), log_sum, entropy

    def _check_exchanged(self, every: Tensor, target: Tensor) -> None:
        targets, sketches, lengths = every[:, -3], every[:, -2], every[:, -1]
        others = (sketches - sketches[0]).abs() > _SAME_FEATURES * lengths.amax(dim=0)
        if (targets != targets[0]).any() or others.any():
            raise ValueError(
                "features, target: expected the same on all ranks that share the classes, got other "
                f"{'features' if others.any() else 'targets'} on some; {_SAME_SAMPLES}"
            )
        kept = target != self.loss.ignore_index
        log_sum, own_logit = every[:, 0, kept], every[:, 1, kept]
        bad = (log_sum.isnan() | (log_sum == torch.inf) | ~own_logit.isfinite()).any(dim=1)
        if bad.any():
            named = [str(r) for r, b in zip(self.loss._global_ranks(), bad.tolist(), strict=True) if b]
            raise ValueError(
                "weight, bias: expected finite logits on the targets, no NaN or +inf elsewhere, got others "
                f"on rank {', '.join(named)}; {WAY_OUT}"
            )

    def reduced(self, losses: Tensor) -> Tensor:
        """The losses ``[N]`` as ``reduction`` says."""
        return losses if self.loss.reduction == "none" else autograd.total(losses, self.divisor)

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


def _sketch(features: Tensor) -> tuple[Tensor, Tensor]:
    """A number of features ``[n, d]`` by which ranks tell whether theirs are the same, and their length."""
    exact = features.to(functional.compute_dtype(features.dtype))
    direction = torch.arange(exact.shape[1], dtype=exact.dtype, device=exact.device).cos()
    return exact @ direction, torch.linalg.vector_norm(exact, dim=1)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: _ClassParallel, *inputs: Tensor | None) -> Tensor:
        wanted, reduction = ctx.needs_input_grad[1:], problem.loss.reduction
        at_once = reduction != "none" and not any(v is not None and v.dtype == torch.float16 for v in inputs)
        losses, log_sums, gradients = problem.run(inputs, [w and at_once for w in wanted])
        ctx.problem, ctx.gradients = problem, gradients if at_once else None
        # Saved, so that a change of any before backward raises there.
        ctx.save_for_backward(log_sums, problem.target, problem.weights, problem.divisor, *inputs)
        return problem.reduced(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ClassParallelLGLALoss has no second derivative: expected backward without create_graph; "
                "LinearLGLALoss has one"
            )
        problem, wanted = ctx.problem, ctx.needs_input_grad[1:]
        log_sums, _, _, _, *inputs = ctx.saved_tensors
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
