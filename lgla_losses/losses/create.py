"""Losses by name, for configuration files."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from lgla_losses._checks import describe, positive_int
from lgla_losses._counts import ArrayLike
from lgla_losses.losses._base import Loss
from lgla_losses.losses._config import LossOptions
from lgla_losses.losses.adjusted import AdjustedLoss, Options
from lgla_losses.losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lgla_losses.losses.lgla import LGLALoss
from lgla_losses.losses.multi_label import (
    ClassBalancedBCELoss,
    MultiLabelLoss,
    MultiLabelOptions,
    SigmoidAdjustedLoss,
)
from lgla_losses.losses.ncl import NCLLoss
from lgla_losses.losses.ride import RIDELoss


class CreateOptions(LossOptions, Options, total=False):
    """Name the options of all losses; each loss has some of them."""

    num_experts: int | None
    tau: float | None
    scale: float | None
    gamma: float | None
    alpha: ArrayLike | None
    beta: float
    max_margin: float
    num_samples: float
    diversity: float
    distillation: float
    hard_share: float


#: The class for each name, and the options that the name fixes.
_LOSSES: dict[str, tuple[type[Loss], dict[str, Any]]] = {
    "lgla": (LGLALoss, {}),
    "cla": (LGLALoss, {"aaw": False}),
    "softmax": (AdjustedLoss, {}),
    "balanced": (BalancedSoftmaxLoss, {}),
    "logit": (LogitAdjustedLoss, {}),
    "focal": (FocalLoss, {}),
    "class_balanced": (ClassBalancedLoss, {}),
    "ldam": (LDAMLoss, {}),
    "vs": (VSLoss, {}),
    "ride": (RIDELoss, {}),
    "ncl": (NCLLoss, {}),
    "sade": (LGLALoss, {"adjustment": "sade", "aaw": False}),
    "sigmoid": (SigmoidAdjustedLoss, {}),
    "class_balanced_bce": (ClassBalancedBCELoss, {}),
}

#: Names that are adjustments of :class:`LGLALoss` as well.
_ADJUSTMENTS = ("softmax", "balanced", "logit")

#: Other names of the losses, for the hint in the error.
_OTHER_NAMES = {
    "ce": "softmax",
    "cross_entropy": "softmax",
    "balms": "balanced",
    "balanced_softmax": "balanced",
    "logit_adjustment": "logit",
    "cb": "class_balanced",
    "vector_scaling": "vs",
    "bce": "class_balanced_bce",
    "multi_label": "sigmoid",
}


def create_loss(name: str, class_counts: ArrayLike | None = None, **options: Unpack[CreateOptions]) -> Loss:
    """Make a loss by its name, for example from a configuration file.

    ============================ ========================================================================
    name                         loss
    ============================ ========================================================================
    ``"lgla"``, ``"cla"``        :class:`LGLALoss` of K experts, with and without hard-sample weights
    ``"softmax"``                cross entropy
    ``"balanced"``               :class:`~lgla_losses.baselines.BalancedSoftmaxLoss`
    ``"logit"``                  :class:`~lgla_losses.baselines.LogitAdjustedLoss`
    ``"focal"``                  :class:`~lgla_losses.baselines.FocalLoss`
    ``"class_balanced"``         :class:`~lgla_losses.baselines.ClassBalancedLoss`
    ``"ldam"``                   :class:`~lgla_losses.baselines.LDAMLoss`
    ``"vs"``                     :class:`~lgla_losses.baselines.VSLoss`
    ``"ride"``                   :class:`~lgla_losses.baselines.RIDELoss` of K experts
    ``"ncl"``                    :class:`~lgla_losses.baselines.NCLLoss` of K experts
    ``"sade"``                   SADE's three experts: :class:`LGLALoss` with that adjustment, ``tau=2``
    ``"sigmoid"``                :class:`~lgla_losses.baselines.SigmoidAdjustedLoss`
    ``"class_balanced_bce"``     :class:`~lgla_losses.baselines.ClassBalancedBCELoss`
    ============================ ========================================================================

    With ``num_experts`` and class counts ``"softmax"``, ``"balanced"`` and ``"logit"`` make an
    :class:`LGLALoss` with that adjustment, by default with ``aaw=False``.

    Args:
        name: one of the names above.
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0;
            :func:`count_classes` computes them. ``"softmax"`` and ``"focal"`` need none.
        options: options of the loss.

    Raises:
        TypeError: the name is not a string, the loss has no such option, or it needs class counts.
        ValueError: there is no such loss, or an option is out of range.

    Example:
        >>> create_loss("lgla", [500, 100, 20], tau=2.0).num_experts
        3
        >>> create_loss(**{"name": "focal", "class_counts": [500, 100, 20], "gamma": 1.0})
        FocalLoss(num_classes=3, gamma=1.0, reduction='mean', backend='auto')
    """
    kind, fixed = _loss_of(name, class_counts, options)
    given: dict[str, Any] = {
        option: value for option, value in options.items() if not _says_nothing(option, value)
    }
    if kind is AdjustedLoss and "num_experts" in given:  # it takes any number
        positive_int("num_experts", given.pop("num_experts"), "leave it out for any number")

    _check_options(name, kind, fixed, given)
    return kind(class_counts=class_counts, **fixed | given)


def _says_nothing(option: str, value: object) -> bool:
    """Say whether an option means the default, as ``tau: null`` in a file."""
    return value is None and option in ("num_experts", "tau", "grouper", "background")


def _loss_of(
    name: str, class_counts: ArrayLike | None, options: CreateOptions
) -> tuple[type[Loss], dict[str, Any]]:
    """Find the class of a name, and the options that the name fixes."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected {_told(_LOSSES)}, got {describe(name)}")
    if name not in _LOSSES:
        raise ValueError(f"name: expected {_told(_LOSSES)}, got {name!r}{_near_name(name)}")
    kind, fixed = _LOSSES[name]

    has_groups = options.get("grouper") is not None
    has_number = options.get("num_experts") is not None and (class_counts is not None or name != "softmax")
    if name in _ADJUSTMENTS and (has_groups or has_number):
        return LGLALoss, {"adjustment": name} | ({} if "aaw" in options else {"aaw": False})
    return kind, fixed


def _near_name(name: str) -> str:
    """Suggest the names that may be meant."""
    names = {**{known: known for known in _LOSSES}, **_OTHER_NAMES}
    names |= {kind.__name__.lower(): known for known, (kind, _) in reversed(_LOSSES.items())}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=3)
    found = dict.fromkeys(names[match] for match in near)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _options_of(kind: type[Loss]) -> set[str]:
    """List the options of a loss."""
    own = {name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD}
    shared = MultiLabelOptions if issubclass(kind, MultiLabelLoss) else Options
    named = shared.__annotations__ if issubclass(kind, AdjustedLoss) else {}
    return (own | set(named)) - {"class_counts", "numbers"}


def _check_options(
    name: str, kind: type[Loss], fixed: Mapping[str, object], options: Mapping[str, object]
) -> None:
    """Raise for an option that the loss does not have, or for a missing one that it needs."""
    known = _options_of(kind) - {option for option in fixed if options.get(option) != fixed[option]}
    for option in options.keys() - known:
        near = difflib.get_close_matches(option, known, n=1)
        way_out = f"did you mean {near[0]!r}?" if near else "leave it out"
        if option == "num_experts":
            way_out = "leave it out: the loss takes the logits of any number of experts"
        elif name in _ADJUSTMENTS and option in ("aaw", "scale"):
            way_out = "for experts pass num_experts and class_counts as well"
        raise TypeError(
            f"{option}: expected an option of the loss {name!r} ({', '.join(sorted(known))}), "
            f"got {describe(options[option])}; {way_out}"
        )

    for option, p in inspect.signature(kind).parameters.items():
        is_needed = p.default is p.empty and p.kind is not p.VAR_KEYWORD and option != "class_counts"
        if is_needed and option not in options:
            raise TypeError(
                f"{option}: expected a value for the loss {name!r}, got none; see {kind.__name__} for what "
                "it is"
            )


def _told(names: Iterable[str]) -> str:
    return f"one of {', '.join(map(repr, names))}"
