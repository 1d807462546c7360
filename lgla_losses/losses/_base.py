"""The steps that all losses share: Eqs. 7 and 8, the divisor, Eq. 9, and the search for wrong values."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lgla_losses import functional
from lgla_losses._batch import Batch
from lgla_losses._buffers import read_only, refuse_assignment, unregister
from lgla_losses._checks import (
    boolean,
    finite_float,
    integer,
    normalizer_value,
    one_of,
    positive_float,
    validation,
)
from lgla_losses._counts import ArrayLike, ClassRules
from lgla_losses._late import LateLook, can_look
from lgla_losses._ranks import Ranks, RanksOf, digest_of, group_size, refuse_data_parallel
from lgla_losses._torch import is_watched, unfit, values_readable
from lgla_losses.experts._running import is_tracing
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.grouping import ClassGrouper
from lgla_losses.kernels import Engine, Rows, Samples, autograd, chunked
from lgla_losses.kernels.autograd import without_engine
from lgla_losses.kernels.blockwise import Blockwise
from lgla_losses.losses._config import (
    REDUCTIONS,
    check_adjustment,
    group_classes,
    make_adjuster,
    number_of_experts,
    renamed,
    runnable_backend,
)
from lgla_losses.losses._seen import SeenLabels, next_look
from lgla_losses.suggestion import suggest
from lgla_losses.weighting import AAWWeighter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: With fewer classes, code made by the compiler is faster than a call of an operator it cannot see into.
WORTH_AN_OPERATOR = 512

#: After this many batches, trained cosine logits are larger than cosines without a scale.
_SETTLED = 16

_ALONE = Ranks()


class Loss(nn.Module):
    """Hold the options of every loss, and the steps from a batch to its loss."""

    #: Whether bad values are reported before anything is computed, because the loss may not show them.
    _explains_first = False
    #: Number of batches whose logits were compared with the scale of cosine logits.
    _batches = 0
    #: Checks probabilities on a GPU; made at the first batch that has some.
    _late: LateLook | None = None
    #: Number of training batches, and the next one whose labels are compared with the class counts; none
    #: after a warning.
    _steps = 0
    _next_look: float = 1
    _seen: SeenLabels | None = None
    #: What is wrong if the logits are not cosines times ``scale``, and what to set for a linear head.
    _without_cosines = "their angles, and with them the adaptive angular weights, are wrong"
    _for_linear_heads = "scale=None and pass features and weight"

    def _take_options(
        self,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        sync: bool,
        process_group: ProcessGroup | None,
        validate_args: bool | None,
        backend: str,
    ) -> None:
        """Check and keep the options of every loss."""
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.ignore_index = integer("ignore_index", ignore_index, "as in torch.nn.CrossEntropyLoss")
        self.label_smoothing = finite_float(
            "label_smoothing", label_smoothing, low=0.0, high=1.0, expected="a number in 0..1"
        )
        self.sync = boolean("sync", sync)
        self._ranks = RanksOf(process_group)
        self.validate_args = validation(validate_args)
        self.backend = runnable_backend(backend)
        #: Whether the ranks have compared their constants.
        self._compared = False

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that compute a step together; None means all."""
        return self._ranks.group

    def _constants(self) -> list[Tensor]:
        """List the tensors that must be the same on all ranks."""
        raise NotImplementedError

    def _numbers_summed(self) -> int:
        """Count the numbers of a step that the ranks add up."""
        return 1

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts and strength in place."""
        raise NotImplementedError

    def implied_prior(self) -> Tensor:
        """Compute the class prior that the logits hold where the loss is lowest."""
        raise NotImplementedError

    def _training_counts(self) -> Tensor:
        """Give the training samples of all classes ``[C]``, in float64 (float32 on MPS).

        Raises:
            ValueError: the loss has none, or its samples have several labels.
        """
        raise NotImplementedError

    # --- Before the computation ----------------------------------------------------------------------------

    def _step(
        self, batch: Batch, normalizer: float | Tensor | None, *constants: Tensor | None
    ) -> tuple[Engine | None, Ranks, bool]:
        """Choose the engine and the ranks of a step; say whether a wrong loss must be explained.

        Args:
            batch: the inputs of the loss.
            normalizer: divisor of a mean, or None.
            constants: the constants that the loss reads.

        Returns:
            The engine (None for plain PyTorch), the ranks, and whether to look for the cause if the loss is
            not finite.

        Raises:
            ValueError: a value is wrong, and the loss may not show it or it cannot be found later; or the
                probabilities of an earlier batch on a GPU were wrong.
        """
        target = batch.target
        if normalizer is not None:
            normalizer_value(normalizer, self.reduction, self.validate_args, target.device)
        engine = self._engine(batch, normalizer, *constants)
        readable = values_readable(target, self.validate_args)
        ranks = self._ranks_of_step(target, readable)
        if not readable:
            if batch.is_soft and self.validate_args is None and can_look(target):
                if self._late is None:
                    self._late = LateLook()
                self._late(target)
            return engine, ranks, False

        # Check first: other ranks wait for this rank's numbers, and PyTorch would raise errors of its own.
        first = ranks.number > 1 or engine is None or torch.compiler.is_compiling()
        if not (first or self._explains_first):
            if batch.is_soft or batch.sample_weight is not None:
                batch.check_weights()
            return engine, ranks, True
        try:
            self._explain(batch)
        except ValueError as problem:
            if ranks.number == 1:
                raise
            told = self._numbers_summed() if self._communicates(normalizer, ranks) else 0
            ranks.refuse(problem, told, target.device)
        return engine, ranks, False

    def _engine(
        self, batch: Batch, normalizer: float | Tensor | None, *constants: Tensor | None
    ) -> Engine | None:
        """Choose the engine; None stands for plain PyTorch."""
        device, compiling = batch.target.device, torch.compiler.is_compiling()
        if self.backend == "reference" or (compiling and self._is_seen_through(batch)):
            return None
        inputs = batch.logits, batch.target, batch.features, batch.weight, batch.sample_weight
        others = normalizer if isinstance(normalizer, Tensor) else None
        why = unfit(*inputs[0], *inputs[1:], *constants, others)
        for constant in constants:
            # torch.func.functional_call can replace a constant by a tensor that requires a gradient.
            if constant is not None and constant.requires_grad:
                why = "it treats the adjustments as constants, but these require a gradient"
        if why is not None:
            without_engine(self.backend, why)
            return None
        engine = autograd.engine_for(self.backend, device)
        return Blockwise(engine) if engine is not None and batch.is_map else engine

    def _is_seen_through(self, batch: Batch) -> bool:
        """Say whether a compiler should see PyTorch's own operations instead of an engine."""
        return batch.is_map or (self.backend == "auto" and batch.logits[0].shape[-1] < WORTH_AN_OPERATOR)

    def _ranks_of_step(self, target: Tensor, readable: bool) -> Ranks:
        """Find the ranks that share the samples of this step, and what this rank sends to the others.

        Without gradients, as in validation on one rank, nothing may wait for other ranks.
        """
        if not (self.sync and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
            return _ALONE
        number, group = group_size(self.process_group), self.process_group
        if number == 1:
            return _ALONE
        if not self._compares(target):
            return Ranks(number, group, 0, readable)
        options = [getattr(self, "scale", None) or 0.0, self.label_smoothing, float(self.ignore_index)]
        return Ranks(number, group, digest_of([*self._constants(), torch.tensor(options)]), True)

    def _compares(self, target: Tensor) -> bool:
        """Say whether the ranks compare their constants in this step.

        They do so until one step has succeeded on all of them. On a GPU such a step waits for the device.
        Compiled steps and steps recorded in a CUDA graph compare nothing.
        """
        # Ask about the compiler first: else it would compile again whenever one of the others changes.
        if torch.compiler.is_compiling() or self._compared or self.validate_args is False:
            return False
        return not (target.is_cuda and torch.cuda.is_current_stream_capturing())

    def _communicates(self, normalizer: float | Tensor | None, ranks: Ranks) -> bool:
        """Say whether this step counts samples over the ranks or compares their constants."""
        return (self.reduction == "mean" and normalizer is None) or ranks.digest > 0

    def _explain(self, batch: Batch) -> None:
        """Raise if a value of the batch makes its loss wrong."""
        batch.explain(self.ignore_index, None, self._masked())

    def _masked(self) -> Tensor | None:
        """Say which classes are masked for lack of training samples ``[C]``; None if none can be masked."""
        raise NotImplementedError

    # --- The steps ----------------------------------------------------------------------------------------

    def _summed(self, values: Tensor, ranks: Ranks) -> Tensor:
        """Sum the parts ``[B, ...]`` of this step's numbers, over the ranks as well: ``[1, ...]``."""
        values = ranks.sum(values.sum(dim=0, keepdim=True))
        if ranks.digest:  # write only if needed: exporters see a write as a side effect
            self._compared = True
        return values

    def _rows(
        self,
        engine: Engine | None,
        batch: Batch,
        ranks: Ranks,
        normalizer: float | Tensor | None,
        *,
        samples: Tensor | None = None,
        counted: Tensor | None = None,
        **fields: Any,
    ) -> Rows:
        """Collect what Eq. 9 reads besides the logits, with the divisor of the sum of the losses.

        By default the divisor is the number of samples on all ranks, divided by the number of ranks.

        Args:
            engine: what computes; None for plain PyTorch.
            batch: the inputs of the loss.
            ranks: the ranks of this step.
            normalizer: the divisor of a mean that the user gave, or None.
            samples: the divisor if it is known, or None.
            counted: class weights ``[C]`` that samples are counted with, or None.
            fields: fields of :class:`~lgla_losses.kernels.Rows` that only this loss has.
        """
        # No function call, because this runs for every batch. Ask about the compiler first: else it would
        # compile again for every number.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            step = self.__dict__["_steps"] = self._steps + 1
            if step >= self._next_look:
                self._look_at_labels(batch, step, ranks.number)

        if samples is None and self._communicates(normalizer, ranks):
            # A compiler can see into PyTorch's own operations only.
            counter = engine if engine is not None and not torch.compiler.is_compiling() else _chunked(batch)
            samples = counter.count(batch.target, batch.sample_weight, counted, self.ignore_index)
            if ranks.number > 1:
                samples = self._summed(samples[None], ranks)[0] / ranks.number
        if normalizer is not None:
            device = batch.target.device
            samples = scalar_on(device, normalizer, functional.widest_dtype(device))
        return Rows(
            batch.target,
            divisor=samples if self.reduction == "mean" else None,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduce=self.reduction != "none",
            **fields,
        )

    def _explain_unless_finite(self, batch: Batch, loss: Tensor) -> None:
        """Raise if the loss is NaN or infinite because of a wrong value."""
        finite = math.isfinite(loss.item()) if loss.dim() == 0 else loss.detach().isfinite().all()
        if not finite:
            self._explain(batch)

    def _look_at_scale(
        self, batch: Batch, scale: float | None, output: ExpertOutput | ExpertLogits | None = None
    ) -> None:
        """Warn once if the logits are not cosines times ``scale``, which is None for linear heads.

        It looks only at batches whose number is a power of two. ``output`` may have the features and class
        weights that the batch lacks.
        """
        # Ask about the compiler first: else it would compile again whenever the number changes.
        if torch.compiler.is_compiling() or scale is None or self._batches < 0:
            return
        seen = self._batches + 1
        self.__dict__["_batches"] = seen  # setting an attribute of a module takes longer
        if seen & (seen - 1) or is_tracing() or not batch.target.numel():
            return

        if isinstance(output, ExpertOutput):
            batch = batch.with_classifiers(output)
        problem = self._misfit(batch, scale, seen)
        if problem is not None:
            self._batches = -1  # once warned
            warnings.warn(problem, stacklevel=5)

    def _misfit(self, batch: Batch, scale: float, seen: int) -> str | None:
        """Say how the logits differ from cosines times ``scale``; None if they do not."""
        if batch.features is not None and batch.weight is not None:
            share, multiple = batch.compared_with_cosines()
            are_bare = multiple < 1.1
            if share > 0.02:  # rounding to bfloat16 gives 0.004
                return (
                    f"scale={scale}: expected the logits of a cosine head, got logits of which {share:.0%} "
                    "is not a multiple of the cosines of features and weight, as from a linear head or "
                    "after something was added to the logits; use a cosine head, which the margins are "
                    f"made for, or for a linear head set {self._for_linear_heads}"
                )
        else:
            largest = batch.largest_target_logit(self.ignore_index)
            if largest > 1.05 * scale:
                return (
                    f"a target logit of {largest:.4g} exceeds scale={scale}: these are not cosine logits, "
                    f"so {self._without_cosines}; for a linear head set {self._for_linear_heads}"
                )
            # Scaled cosines of many features and new weights are small too, but only at first; with new
            # experts and a low learning rate for longer.
            are_bare = seen >= _SETTLED and batch.is_unlike_new_experts()
        if scale >= 10 and are_bare and batch.is_within(1.01):
            return (
                f"all logits of the batch lie within [-1, 1] under scale={scale}, as cosines without the "
                f"scale do, and a softmax learns almost nothing from them; pass {scale:g} * cosines, or for "
                f"a linear head set {self._for_linear_heads}"
            )
        return None

    def _look_at_labels(self, batch: Batch, step: int, num_ranks: int) -> None:
        """Warn once if a sampler balances the classes whose counts the loss corrects."""
        self._next_look = next_look(step)
        inputs = (*batch.logits, batch.features, batch.weight)
        learns = self.training and any(v is not None and v.requires_grad for v in inputs)
        plain = not (batch.is_soft or batch.is_map or batch.sample_weight is not None)
        if not (learns and plain and values_readable(batch.target, self.validate_args)):
            return
        # Ask this first, because a trace must be the same in every call.
        if unfit(*inputs, batch.target) is not None:
            return
        corrected = self._corrected_counts()
        if corrected is None:
            return

        counts, adjusted = corrected
        if self._seen is None or not self._seen.are_for(counts):
            self._seen, self._steps, step = SeenLabels(counts, adjusted), 1, 1
            self._next_look = next_look(step)
        self._seen.add(batch.target[batch.target != self.ignore_index], step, num_ranks)
        problem = self._seen.problem()
        if problem is not None:
            self._seen, self._next_look = None, math.inf
            warnings.warn(problem, stacklevel=6)

    def _corrected_counts(self) -> tuple[Tensor, Tensor] | None:
        """Give the class counts ``[C]`` and the classes that the loss corrects; None if it corrects none."""
        return None

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)


class ExpertLoss(Loss):
    """Check and keep the arguments of :class:`LGLALoss`, and compute Eqs. 7 and 8."""

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        num_experts: int | None = None,
        tau: float | None = None,
        *,
        grouper: ClassGrouper | None = None,
        zero_counts: str = "error",
        background: int | Sequence[int] | None = None,
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
        check_adjustment(adjustment)
        self.aaw = boolean("aaw", aaw)
        is_lgla = isinstance(adjustment, str) and adjustment == "lgla"
        needs_groups = self.aaw or is_lgla
        num_experts = number_of_experts(num_experts, grouper, adjustment, needs_groups)
        if grouper is None:
            grouper = group_classes(class_counts, num_experts, needs_groups, zero_counts, background)
        elif class_counts is not None:
            raise ValueError("grouper: expected class_counts or a grouper, got both; drop class_counts")
        elif zero_counts != "error" or background is not None:
            raise ValueError(
                "zero_counts, background: expected neither together with a grouper, which has its own, got "
                f"{zero_counts!r} and {background}; give them to ClassGrouper"
            )
        else:
            grouper = copy.deepcopy(grouper)  # set_adjustment changes it

        if tau is None and is_lgla:
            classifier = "linear" if scale is None else "cosine"
            tau = suggest(num_experts, classifier=classifier, label_smoothing=label_smoothing).tau
        self.adjuster = make_adjuster(grouper, num_experts, adjustment, tau)
        self._take_options(
            reduction, ignore_index, label_smoothing, sync, process_group, validate_args, backend
        )
        grouper._rules.check_smoothing(self.label_smoothing)
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give every loss a constructor that bears its name, because Python's errors show that name."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            own = renamed(cast(FunctionType, cls.__init__), f"{cls.__qualname__}.__init__")
            cls.__init__ = own  # type: ignore[method-assign]

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts, groups and adjustments in training, as for a tau schedule or streaming data.

        The change is made in place: compiled steps need no new compilation, and CUDA graphs see it. On a GPU
        it waits for the device. Under DDP call it on every rank; the next step compares their values.

        Args:
            class_counts: training samples per class ``[C]`` of the same classes, positive unless
                ``zero_counts`` allows 0; None keeps them. The classes are grouped again; your own groups
                (:meth:`ClassGrouper.from_groups`) and your own table stay.
            tau: strength, as in the constructor; None keeps it.

        Raises:
            TypeError: counts or ``tau`` are not numbers.
            ValueError: counts are not positive or are of other classes, ``tau`` is out of range, or the
                adjustment has no ``tau``.
        """
        self.adjuster.set_adjustment(class_counts, tau)
        self._compared = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("adjustment", "class_counts", "grouper"):
            refuse_assignment(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if "grouper" not in self.weighter._modules:  # version 0.1.0 saved the groups twice
            for key in [key for key in state_dict if key.startswith(f"{prefix}weighter.grouper.")]:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def grouper(self) -> ClassGrouper:
        """The groups of the classes."""
        return self.adjuster.grouper

    @property
    def class_counts(self) -> Tensor:
        """Training samples per class ``[C]``, including those that ``zero_counts="smooth"`` adds."""
        return read_only(self._training_counts())

    @property
    def zero_counts(self) -> str:
        """How classes without samples are handled, as given."""
        return self.grouper.zero_counts

    @property
    def background(self) -> tuple[int, ...]:
        """The classes that are left out of the adjustment, in order."""
        return self.grouper.background

    @property
    def adjustment(self) -> str:
        """The kind of adjustment as given; ``"table"`` for your own table."""
        return self.adjuster.adjustment

    @property
    def num_experts(self) -> int:
        """Number of experts ``K``."""
        return self.adjuster.constant("table").shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes ``C``."""
        return self.grouper.num_classes

    def implied_prior(self, fusion: Tensor | Sequence[float] | None = None) -> Tensor:
        """Compute the class prior that the fused logits hold where the loss is lowest.

        It follows from the adjustments. :meth:`CLALogitAdjuster.implied_prior
        <lgla_losses.CLALogitAdjuster.implied_prior>` says for which losses it is exact.

        Args:
            fusion: as in :meth:`ExpertOutput.ensemble <lgla_losses.ExpertOutput.ensemble>`: one weight per
                expert ``[K]``; None for equal weights.

        Returns:
            float64 ``[C]``, summing to 1.

        Raises:
            TypeError: the weights are not numbers.
            ValueError: a weight is negative or not finite, all are zero, or their number is not K.
        """
        return self.adjuster.implied_prior(fusion)

    def _training_counts(self) -> Tensor:
        counts = self.grouper.constant("class_counts")
        return counts.to(functional.widest_dtype(counts.device), copy=True)

    def _constants(self) -> list[Tensor]:
        grouper = self.grouper
        return [
            self.adjuster.constant("table"),
            grouper.constant("group_index"),
            grouper.constant("class_counts"),
        ]

    def _numbers_summed(self) -> int:
        return self.grouper.num_groups * (self.num_experts + 1) if self.aaw else 1

    def _communicates(self, normalizer: float | Tensor | None, ranks: Ranks) -> bool:
        return self.aaw or super()._communicates(normalizer, ranks)

    def _corrected_counts(self) -> tuple[Tensor, Tensor] | None:
        if self.adjustment == "table":  # your own table, which may not correct the counts
            return None
        counts, table = self.grouper.constant("class_counts"), self.adjuster.constant("table")
        return if_corrected(counts, self.grouper._rules, table)

    def _explain(self, batch: Batch) -> None:
        # The logits of an ensemble are not adjusted, so they include masked classes.
        of_ensemble = batch.of_one and len(batch.logits) == 1 < self.num_experts
        batch.explain(self.ignore_index, self.num_classes, None if of_ensemble else self._masked())

    def _masked(self) -> Tensor | None:
        return self.grouper.constant("class_counts") == 0 if self.zero_counts == "mask" else None

    def _weights(
        self, engine: Engine | None, batch: Batch, ranks: Ranks, table: Tensor, group_index: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute Eqs. 7 and 8: the weights ``[*B, K]`` or None, and the number of samples, if known."""
        num_experts, compiling = table.shape[0], torch.compiler.is_compiling()
        if not self.aaw:
            return batch.weights_of_experts(num_experts), None
        samples = Samples(batch.target, group_index, num_experts - 1, batch.sample_weight, self.ignore_index)
        angles = batch.angles(self.scale)
        if engine is None or compiling:
            engine = _chunked(batch)
        if batch.is_soft and batch.features is not None:  # angles to all classes take much memory
            engine = Blockwise(engine)

        is_own = not batch.is_soft and (is_watched(self.weighter) or type(self.weighter) is not AAWWeighter)
        if ranks.number == 1 and not is_own:
            return engine.weights(angles, samples)  # Eqs. 7 and 8

        angles, parts = engine.statistics(angles, samples)  # Eq. 7
        parts = self._summed(parts, ranks) if ranks.number > 1 else parts
        weights, number = engine.weights(angles, samples, parts, ranks.number)  # Eq. 8
        if is_own and angles.angles is not None:
            own = self.weighter(angles.angles, batch.target.flatten(), parts.sum(dim=0))
            # A hook may give one column for all experts.
            weights = own.reshape(*batch.target.shape, own.shape[-1]).expand_as(weights)
            if batch.sample_weight is not None:
                weights = weights * batch.sample_weight[..., None].to(weights.dtype)
        return weights, number

    def extra_repr(self) -> str:
        """Show the configuration."""
        return (
            f"adjustment={self.adjustment!r}, aaw={self.aaw}, scale={self.scale}, "
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, backend={self.backend!r}"
        )


def _chunked(batch: Batch) -> Engine:
    """Choose the engine in plain PyTorch that fits the batch."""
    return Blockwise(chunked) if batch.is_map else chunked


def if_corrected(
    counts: Tensor, rules: ClassRules, *constants: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Give counts and adjusted classes ``[C]`` if the constants ``[..., C]`` differ between these."""
    adjusted = rules.adjusted(counts)
    own = [constant[..., adjusted] for constant in constants if constant is not None]
    return (counts, adjusted) if any(bool((v != v[..., :1]).any()) for v in own) else None


def scalar_on(device: torch.device, number: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Put a number on a device without waiting for the device, so that a CUDA graph can record it."""
    if isinstance(number, Tensor):
        on_cpu = number.device.type == "cpu" and device.type == "cuda"
        if not on_cpu or number.requires_grad or torch.compiler.is_compiling():
            return number.to(device, dtype)
        number = number.item()
    if torch.compiler.is_compiling():  # a compiler would take the filled-in number as a constant
        return number * torch.ones((), dtype=dtype, device=device)
    return torch.full((), number, dtype=dtype, device=device)
