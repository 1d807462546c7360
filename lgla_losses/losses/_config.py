"""What the losses of K experts share: their configuration, their weights and their divisor."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lgla_losses import functional
from lgla_losses._buffers import refuse_assignment, unregister
from lgla_losses._checks import (
    WAY_OUT,
    boolean,
    dense_tensor,
    finite_float,
    floating_tensor,
    gathered_weight,
    one_of,
    positive_float,
    positive_int,
    values_readable,
)
from lgla_losses._counts import ArrayLike, as_class_counts
from lgla_losses._ranks import Note, digest_of, refuse_data_parallel, tell_and_raise
from lgla_losses.adjustment import CLALogitAdjuster, strength
from lgla_losses.grouping import ClassGrouper, check_grouper
from lgla_losses.kernels import Engine, autograd
from lgla_losses.weighting import AAWWeighter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ADJUSTMENTS = ("lgla", "softmax", "balanced", "logit")
BACKENDS = ("auto", "reference", "fused", "triton")
REDUCTIONS = ("mean", "sum", "none")


class ExpertLossOptions(TypedDict, total=False):
    """What every loss of K experts takes by keyword, wherever its classes are."""

    grouper: ClassGrouper | None
    aaw: bool
    adjustment: str | Tensor
    reduction: str
    ignore_index: int
    label_smoothing: float
    sync: bool
    validate_args: bool | None


class LossOptions(ExpertLossOptions, total=False):
    """What a loss takes by keyword whose classes are in one place."""

    process_group: ProcessGroup | None
    backend: str


class ExpertLoss(nn.Module):
    """The arguments of :class:`LGLALoss`, checked and kept, and what every loss makes of them."""

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        num_experts: int | None = None,
        tau: float | None = None,
        *,
        grouper: ClassGrouper | None = None,
        aaw: bool = True,
        scale: float | None = 30.0,
        adjustment: str | Tensor = "lgla",
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        sync: bool = True,
        process_group: ProcessGroup | None = None,
        validate_args: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(adjustment, Tensor):
            one_of("adjustment", adjustment, ADJUSTMENTS)
        self.aaw = boolean("aaw", aaw)
        needs_groups = self.aaw or (isinstance(adjustment, str) and adjustment == "lgla")
        num_experts = _number_of_experts(num_experts, grouper, adjustment, needs_groups)
        if grouper is None:
            grouper = _group_classes(class_counts, num_experts, needs_groups)
        elif class_counts is not None:
            raise ValueError("grouper: expected class_counts or a grouper, got both; drop class_counts")
        else:
            grouper = copy.deepcopy(grouper)  # as set_adjustment changes its own
        self.adjuster = make_adjuster(grouper, num_experts, adjustment, tau)
        self.weighter = AAWWeighter(
            grouper,
            ignore_index=ignore_index,
            sync=sync,
            process_group=process_group,
            validate_args=validate_args,
        )
        unregister(self.weighter, "grouper")  # the adjuster has it
        if not self.aaw:
            unregister(self, "weighter")
        self.scale = None if scale is None else positive_float("scale", scale, "None means a linear head")
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.label_smoothing = finite_float(
            "label_smoothing", label_smoothing, low=0.0, high=1.0, expected="a number in 0..1"
        )
        self.validate_args = self.weighter.validate_args
        self.backend = runnable_backend(backend)
        self._compared = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give every loss a constructor of its own name, as Python's errors say that of the function."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            own = renamed(cast(FunctionType, cls.__init__), f"{cls.__qualname__}.__init__")
            cls.__init__ = own  # type: ignore[method-assign]

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts, groups and adjustments during training: a schedule of tau, streaming data.

        In place, so that compiled steps compile nothing anew and CUDA graphs see it. On a GPU it waits for
        the device. Under DDP every rank calls it, and the next step compares what they have.

        Args:
            class_counts: training samples per class ``[C]`` of the same classes, positive; None keeps them.
                The classes are grouped anew; groups of your own (:meth:`ClassGrouper.from_groups`) and a
                table of your own stay.
            tau: strength, as in the constructor; None keeps it.

        Raises:
            TypeError: counts or ``tau`` are no numbers.
            ValueError: counts are not positive or of other classes, ``tau`` is out of range, or the
                adjustment has none.
        """
        self.adjuster.set_adjustment(class_counts, tau)
        self._compared = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("adjustment", "grouper"):
            refuse_assignment(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if "grouper" not in self.weighter._modules:  # version 0.1.0 saved the groups twice
            for key in [key for key in state_dict if key.startswith(f"{prefix}weighter.grouper.")]:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def ignore_index(self) -> int:
        """Target of samples that count nothing."""
        return self.weighter.ignore_index

    @property
    def grouper(self) -> ClassGrouper:
        """The groups of the classes."""
        return self.adjuster.grouper

    @property
    def adjustment(self) -> str:
        """The kind of adjustment as given, ``"table"`` for one of one's own."""
        return self.adjuster.adjustment

    @property
    def num_experts(self) -> int:
        """Number of experts ``K``."""
        return self.adjuster.num_experts

    @property
    def num_classes(self) -> int:
        """Number of classes ``C``."""
        return self.grouper.num_classes

    @property
    def _table(self) -> Tensor:
        """The adjustments ``[K, C]``."""
        return self.adjuster.constant("table")

    def _engine(self, first: Tensor, *others: object) -> Engine | None:
        """What computes for such inputs; None stands for plain PyTorch."""
        table = self._table
        unfit = autograd.unfit(first, *others, table, self.grouper.constant("group_index"))
        if unfit is None and table.requires_grad:
            unfit = "the adjustments are constant to it, and this table wants a gradient"
        return choose_engine(self.backend, unfit, first.device)

    def _weights(
        self,
        engine: Engine | None,
        source: Tensor,
        target: Tensor,
        *,
        scale: float | None,
        check: bool,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Eq. 8 ``[N, K]``, and the number of samples a rank.

        ``source`` is the angles, or with ``scale`` cosine logits ``[N, K, C]``.
        """
        num_ranks = self.weighter.num_ranks()
        if scale is None and num_ranks > 1:
            try:
                self.weighter.check_values(source, target)
            except ValueError as problem:
                self._refuse(problem, target.device)
        if engine is not None and sample_weight is None and self.weighter.is_plain():
            if not torch.compiler.is_compiling():
                note = self._note(target)
                found = self.weighter.of_batch(
                    source, target, scale=scale, engine=engine, check=check, note=note
                )
                self._has_compared(note)
                return found
            if num_ranks == 1 and not values_readable(target, self.validate_args):
                grouper, ignore_index = self.weighter.grouper, self.ignore_index
                return autograd.compiled_weights(source, target, grouper, scale, ignore_index, self.backend)
        if scale is not None:
            source = functional.angles_from_logits(source, self._own_class(target), scale)
        statistics = self._sum_over_ranks(
            self.weighter.local_statistics(source, target, sample_weight), target
        )
        weights = self.weighter(source, target, statistics)
        if sample_weight is not None:
            weights = weights * sample_weight[:, None].to(weights.dtype)
        return weights, self._samples_a_rank(statistics[:, -1].sum())

    def _samples_a_rank(self, samples: Tensor) -> Tensor:
        """The samples of all ranks over the number of ranks; 1 where there are none to divide by."""
        samples = samples.to(functional.widest_dtype(samples.device))
        samples = samples + (samples == 0)
        num_ranks = self.weighter.num_ranks()
        return samples if num_ranks == 1 else samples / num_ranks

    def _sum_over_ranks(self, values: Tensor, target: Tensor) -> Tensor:
        """The sum of a step's numbers, with what the ranks tell each other beside them."""
        note = self._note(target)
        total = self.weighter.sum_over_ranks(values.to(functional.widest_dtype(values.device)), note)
        self._has_compared(note)
        return total

    def _has_compared(self, note: Note) -> None:
        if note.digest:  # else nothing is written, which exporters would take for a side effect
            self._compared = True

    def _compares(self, target: Tensor) -> bool:
        """Whether the ranks compare their constants in this step: the first that all of them end well.

        On a GPU that step waits for it, once, unless it is recorded; compiled steps compare nothing.
        """
        # The compiler first: it would compile anew for every change of the others.
        if torch.compiler.is_compiling() or self._compared or self.validate_args is False:
            return False
        if self.weighter.num_ranks() == 1:
            return False
        return not (target.is_cuda and torch.cuda.is_current_stream_capturing())

    def _note(self, target: Tensor) -> Note:
        """What this rank tells the others: in the first step, what constants it holds."""
        if self._compares(target):
            options = [self.scale or 0.0, self.label_smoothing, float(self.ignore_index)]
            grouped = self.grouper.constant("class_counts"), self.grouper.constant("group_index")
            return Note(digest_of((*grouped, self._table, torch.tensor(options))), read=True)
        return Note(read=values_readable(target, self.validate_args))

    def _refuse(self, problem: ValueError, device: torch.device, communicates: bool = True) -> NoReturn:
        """Raise for bad values of this rank; other ranks that wait for its numbers are told."""
        num_ranks = self.weighter.num_ranks()
        if num_ranks > 1 and communicates:
            numbers = self.grouper.num_groups * (self.num_experts + 1) if self.aaw else 1
            tell_and_raise(problem, numbers, num_ranks, self.weighter.process_group, device)
        if num_ranks > 1:
            raise ValueError(f"rank {dist.get_rank()}: {problem}") from problem
        raise  # the problem, which callers handle: compilers of PyTorch 2.11 raise none by its name

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)

    def _own_class(self, target: Tensor) -> Tensor:
        """The targets; ignored samples have no class, so any stands in, as their weight is 0."""
        # A launch less than torch.where, which first makes a tensor of the 0.
        return target * (target != self.ignore_index)

    def _divisor(
        self,
        target: Tensor,
        normalizer: float | Tensor | None,
        samples: Tensor | None,
        dtype: torch.dtype,
        sample_weight: Tensor | None = None,
    ) -> Tensor | None:
        """What the sum over the batch is divided by: by default the samples not ignored, a rank's share."""
        if samples is None and self._communicates(target, normalizer):
            counts = target != self.ignore_index
            if sample_weight is not None:
                counts = counts * sample_weight.to(functional.widest_dtype(sample_weight.device))
            number = counts.sum(dtype=functional.widest_dtype(target.device))
            samples = self._samples_a_rank(self._sum_over_ranks(number, target))
        if self.reduction != "mean":
            return None
        if normalizer is not None:
            return scalar_on(target.device, normalizer, dtype)
        return None if samples is None else samples.to(dtype)

    def _communicates(self, target: Tensor, normalizer: float | Tensor | None) -> bool:
        """Whether this step's samples are counted over the ranks, or their constants compared."""
        return self.aaw or (self.reduction == "mean" and normalizer is None) or self._compares(target)

    def _reduced(self, losses: Tensor, divisor: Tensor | None) -> Tensor:
        """The losses ``[N]`` as ``reduction`` says."""
        if self.reduction == "none":
            return losses
        return autograd.total(losses, divisor)

    def _engine_adds_up(self, engine: Engine | None, divisor: Tensor | None) -> bool:
        """Not where the divisor wants a gradient too."""
        learns = divisor is not None and divisor.requires_grad
        return self.reduction != "none" and engine is not None and not learns

    def _check_features(self, features: Tensor, weight: Tensor, samples: Sequence[int]) -> None:
        n, *maps = samples
        floating_tensor("features", features, f"[N, K, d{', S' * len(maps)}]")
        floating_tensor("weight", weight, "[K, C, d]")
        gathered_weight(weight)
        k, c = self.num_experts, self.num_classes
        d = features.shape[2]
        if list(features.shape) != [n, k, d, *maps] or list(weight.shape) != [k, c, d]:
            of_maps = "".join(f", {size}" for size in maps)
            raise ValueError(
                f"features, weight: expected shapes [{n}, {k}, d{of_maps}] and [{k}, {c}, d], "
                f"got {list(features.shape)} and {list(weight.shape)}"
            )

    def extra_repr(self) -> str:
        """Configuration shown by ``repr``."""
        return (
            f"adjustment={self.adjustment!r}, aaw={self.aaw}, scale={self.scale}, "
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, backend={self.backend!r}"
        )


def renamed(function: FunctionType, name: str) -> FunctionType:
    """The same function under another name."""
    code, names, defaults = function.__code__, function.__globals__, function.__defaults__
    twin = FunctionType(code, names, function.__name__, defaults, function.__closure__)
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, function.__annotations__
    twin.__doc__, twin.__module__, twin.__qualname__ = function.__doc__, function.__module__, name
    return twin


def refuse_unknown(loss: object, options: Mapping[str, object], known: type) -> None:
    """Raise for options that a loss does not have, by the name of the loss."""
    for name in options.keys() - known.__annotations__:
        near = difflib.get_close_matches(name, known.__annotations__, 1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise TypeError(
            f"{type(loss).__name__}: expected options among {', '.join(known.__annotations__)}, "
            f"got {name!r}; {hint}"
        )


def _number_of_experts(
    num_experts: int | None,
    grouper: ClassGrouper | None,
    adjustment: str | Tensor,
    needs_groups: bool,
) -> int:
    """K, from whichever arguments fix it; those that disagree raise."""
    fixed = {}
    if num_experts is not None:
        fixed["num_experts"] = positive_int("num_experts", num_experts, "the paper uses 3")
    if grouper is not None:
        fixed["grouper (num_groups + 1)"] = check_grouper(grouper).num_groups + 1
    if isinstance(adjustment, Tensor) and dense_tensor("adjustment table", adjustment).dim() > 0:
        fixed["adjustment table"] = adjustment.shape[0]
    if len(set(fixed.values())) > 1:
        got = ", ".join(f"{number} from {name}" for name, number in fixed.items())
        raise ValueError(f"num_experts: expected one number of experts, got {got}; drop num_experts")
    number = next(iter(fixed.values()), 3)
    if number == 1 and needs_groups:
        raise ValueError(
            f"num_experts: expected at least 2 for adjustment='lgla' or aaw=True, got {number}; "
            "one expert goes with adjustment='softmax', 'balanced' or 'logit' and aaw=False"
        )
    return number


def _group_classes(class_counts: ArrayLike | None, num_experts: int, needs_groups: bool) -> ClassGrouper:
    """One group a local expert; without need of groups as many as the classes allow."""
    if class_counts is None:
        raise TypeError("class_counts: expected samples per class [C], got None; or pass a grouper")
    counts = as_class_counts(class_counts)
    num_groups = num_experts - 1
    if needs_groups and num_groups > len(counts):
        raise ValueError(
            f"num_experts: expected at most C + 1 = {len(counts) + 1} for {len(counts)} classes, as each "
            f"local expert owns a group of classes, got {num_experts}; use fewer experts"
        )
    return ClassGrouper(counts, max(1, min(num_groups, len(counts))))


def runnable_backend(backend: str) -> str:
    """``backend`` if there is such a one, and it can run."""
    one_of("backend", backend, BACKENDS)
    missing = autograd.triton_missing() if backend == "triton" else None
    if missing is not None:
        raise ValueError(f"backend: 'triton' cannot run here: {missing}; 'auto' takes the fastest that can")
    return backend


def choose_engine(backend: str, unfit: str | None, device: torch.device) -> Engine | None:
    """What computes for a backend, or plain PyTorch (None) where the inputs are ``unfit`` for an engine."""
    if backend == "reference" or unfit is None:
        return autograd.engine_for(backend, device)
    if backend != "auto":
        raise ValueError(f"backend: {backend!r} cannot run, as {unfit}; 'auto' takes what can")
    autograd.log_once(f"backend 'auto' takes 'reference', as {unfit}")
    return None


def scalar_on(device: torch.device, number: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a scalar on a device, which it does not wait for, and which may record it in a graph."""
    if isinstance(number, Tensor):
        on_cpu = number.device.type == "cpu" and device.type == "cuda"
        if not on_cpu or number.requires_grad or torch.compiler.is_compiling():
            return number.to(device, dtype)
        number = number.item()
    if torch.compiler.is_compiling():  # to which a number that is filled in would be a constant
        return number * torch.ones((), dtype=dtype, device=device)
    return torch.full((), number, dtype=dtype, device=device)


def target_logits(experts: Sequence[Tensor], target: Tensor, ignore_index: int) -> list[Tensor]:
    """Every expert's logits of the targets, ignored ones left out, once all of K tensors are checked.

    Args:
        experts: ``K`` tensors ``[N, C, ...]``.
        target: class indices ``[N, ...]``, or probabilities ``[N, C, ...]``, which give the least and the
            largest of the logits where they are above 0.
        ignore_index: target of samples that count nothing.
    """
    soft = target.is_floating_point()
    kept = target > 0 if soft else (target != ignore_index)[:, None]
    index = target if soft else torch.where(kept, target[:, None], 0)
    chosen = []
    for k, expert in enumerate(experts):
        if expert.numel() == 0:
            continue
        expert = expert.detach()
        own = torch.stack(torch.where(kept, expert, 0.0).aminmax()) if soft else expert.gather(1, index)[kept]
        # The maximum carries NaN and +inf of the whole batch; -inf may mask other classes.
        if not (own.isfinite().all() and expert.amax() < float("inf")):
            raise ValueError(
                f"logits: expected no NaN or +inf, and no -inf on the target, got one from expert {k}; "
                f"{WAY_OUT}"
            )
        chosen.append(own)
    return chosen


def make_adjuster(
    grouper: ClassGrouper, num_experts: int, adjustment: str | Tensor, tau: float | None
) -> CLALogitAdjuster:
    """The adjustments of a loss, by their name or a table ``[K, C]``."""
    if isinstance(adjustment, Tensor):
        strength("table", tau)
        return CLALogitAdjuster.from_table(grouper, adjustment)
    if adjustment == "lgla":
        return CLALogitAdjuster(grouper, tau)
    return CLALogitAdjuster.of_prior(grouper, num_experts, adjustment, tau)
