"""The arguments of the losses: their names, their checks, and how one follows from another."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from lgla_losses._checks import dense_tensor, one_of, positive_int
from lgla_losses._counts import ArrayLike, ClassRules
from lgla_losses.adjustment import NUM_SADE_EXPERTS, CLALogitAdjuster, strength
from lgla_losses.grouping import ClassGrouper, check_grouper, grouped
from lgla_losses.kernels.autograd import triton_missing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ADJUSTMENTS = ("lgla", "softmax", "balanced", "logit", "sade")
BACKENDS = ("auto", "reference", "fused", "triton")
REDUCTIONS = ("mean", "sum", "none")


class ExpertLossOptions(TypedDict, total=False):
    """Name the options of every loss of K experts."""

    grouper: ClassGrouper | None
    zero_counts: str
    background: int | Sequence[int] | None
    aaw: bool
    adjustment: str | Tensor
    reduction: str
    ignore_index: int
    label_smoothing: float
    sync: bool
    validate_args: bool | None


class LossOptions(ExpertLossOptions, total=False):
    """Name the options of the losses that have all classes in one place."""

    process_group: ProcessGroup | None
    backend: str


def renamed(function: FunctionType, name: str) -> FunctionType:
    """Copy a function under another name."""
    code, names, defaults = function.__code__, function.__globals__, function.__defaults__
    twin = FunctionType(code, names, function.__name__, defaults, function.__closure__)
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, function.__annotations__
    twin.__doc__, twin.__module__, twin.__qualname__ = function.__doc__, function.__module__, name
    return twin


def refuse_unknown(loss: object, options: Mapping[str, object], known: type) -> None:
    """Raise for options that a loss does not have; the error names the loss."""
    for name in options.keys() - known.__annotations__:
        # At the usual cutoff "background" would be suggested for "backend".
        near = difflib.get_close_matches(name, known.__annotations__, 1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise TypeError(
            f"{type(loss).__name__}: expected options among {', '.join(known.__annotations__)}, "
            f"got {name!r}; {hint}"
        )


def check_adjustment(adjustment: str | Tensor) -> None:
    """Raise for what is neither a table nor the name of an adjustment."""
    if isinstance(adjustment, list | tuple):
        raise TypeError(
            f"adjustment: expected one of {', '.join(map(repr, ADJUSTMENTS))} or a tensor [K, C], got a "
            f"{type(adjustment).__name__}; pass torch.tensor(adjustment)"
        )
    if not isinstance(adjustment, Tensor):
        one_of("adjustment", adjustment, ADJUSTMENTS)


def number_of_experts(
    num_experts: int | None,
    grouper: ClassGrouper | None,
    adjustment: str | Tensor,
    needs_groups: bool,
) -> int:
    """Find K from the arguments that determine it; raise if they disagree."""
    fixed = {}
    if num_experts is not None:
        fixed["num_experts"] = positive_int("num_experts", num_experts, "the paper uses 3")
    if grouper is not None:
        fixed["grouper (num_groups + 1)"] = check_grouper(grouper).num_groups + 1
    if isinstance(adjustment, Tensor) and dense_tensor("adjustment table", adjustment).dim() > 0:
        fixed["adjustment table"] = adjustment.shape[0]
    elif isinstance(adjustment, str) and adjustment == "sade":
        fixed["adjustment='sade'"] = NUM_SADE_EXPERTS
    if len(set(fixed.values())) > 1:
        got = ", ".join(f"{number} from {name}" for name, number in fixed.items())
        raise ValueError(f"num_experts: expected one number of experts, got {got}; drop num_experts")
    number = next(iter(fixed.values()), 3)
    if number == 1 and needs_groups:
        raise ValueError(
            f"num_experts: expected at least 2 for adjustment='lgla' or aaw=True, got {number}; for one "
            "model use BalancedSoftmaxLoss(class_counts), or adjustment='softmax', 'balanced' or 'logit' "
            "with aaw=False"
        )
    return number


def group_classes(
    class_counts: ArrayLike | None,
    num_experts: int,
    needs_groups: bool,
    zero_counts: str,
    background: int | Sequence[int] | None,
) -> ClassGrouper:
    """Divide the classes into one group for each local expert.

    If no groups are needed, there may be fewer groups, at most one per class.
    """
    if class_counts is None:
        raise TypeError("class_counts: expected samples per class [C], got None; or pass a grouper")
    rules, counts = ClassRules.of(class_counts, zero_counts, background)
    num_groups, number = num_experts - 1, int(rules.adjusted(counts).sum())
    if needs_groups and num_groups > number:
        left_out = "" if number == len(counts) else f" that are adjusted, of {len(counts)}"
        raise ValueError(
            f"num_experts: expected at most C + 1 = {number + 1} for {number} classes{left_out}, because "
            f"each local expert has its own group of classes, got {num_experts}; use fewer experts"
        )
    num_groups = max(1, min(num_groups, number))
    return ClassGrouper._of_checked(counts, grouped(counts, num_groups, rules), rules)


def runnable_backend(backend: str) -> str:
    """Check that ``backend`` exists and can run; return it."""
    one_of("backend", backend, BACKENDS)
    missing = triton_missing() if backend == "triton" else None
    if missing is not None:
        raise ValueError(
            f"backend: 'triton' cannot run here: {missing}; 'auto' takes the fastest that can run"
        )
    return backend


def make_adjuster(
    grouper: ClassGrouper, num_experts: int, adjustment: str | Tensor, tau: float | None
) -> CLALogitAdjuster:
    """Make the adjustments of a loss from their name or from a table ``[K, C]``."""
    if isinstance(adjustment, Tensor):
        strength("table", tau)
        return CLALogitAdjuster.from_table(grouper, adjustment)
    if adjustment == "lgla":
        return CLALogitAdjuster(grouper, tau)
    return CLALogitAdjuster.of_prior(grouper, num_experts, adjustment, tau)
