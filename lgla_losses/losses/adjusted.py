"""What the losses of one model or of any number of experts share: adjust, weigh, sum."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._buffers import ConstantBuffers, same_constants, scalar
from lgla_losses._checks import (
    integer,
    one_of,
    same_device,
    target_tensor,
    target_values,
    validation,
)
from lgla_losses._counts import ArrayLike, as_class_counts
from lgla_losses._torch import values_readable
from lgla_losses.adjustment import check_tau, strength_of
from lgla_losses.experts.output import ExpertLogits, ExpertOutput, expert_blocks
from lgla_losses.grouping import same_classes
from lgla_losses.kernels import Engine, autograd, native
from lgla_losses.losses._config import REDUCTIONS, choose_engine, runnable_backend, target_logits
from lgla_losses.losses.lgla import WORTH_AN_OPERATOR, converted_once, worth_joining


class Options(TypedDict, total=False):
    """What :class:`AdjustedLoss` takes beside its constants."""

    reduction: str
    ignore_index: int
    validate_args: bool | None
    backend: str


class AdjustedLoss(ConstantBuffers):
    r"""Cross entropy of adjusted logits, weighted by class, summed over one model or any number of experts.

    .. math:: \sum_k w_y \, (1 - e^{-L_k})^\gamma L_k, \qquad
        L_k = -\log \mathrm{softmax}_y(a(v_k) + T)

    A subclass gives the constants :math:`T` and :math:`w` by :meth:`constants`, the exponent :math:`\gamma`,
    and what :math:`a` does to the logits.

    Args:
        class_counts: training samples per class ``[C]``, positive; None for a loss that needs none.
        numbers: what :meth:`constants` takes beside them, by name.
        reduction: ``"mean"`` over the samples not ignored, ``"sum"``, or ``"none"``.
        ignore_index: target of samples that count nothing.
        validate_args: as in :class:`~lgla_losses.LGLALoss`.
        backend: as in :class:`~lgla_losses.LGLALoss`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or shapes, devices or values do not fit.

    Shape:
        - output: logits ``[N, C]``; ``[N, K, C]``, K tensors ``[N, C]`` or an
          :class:`~lgla_losses.ExpertOutput`
        - target: int64 ``[N]``
        - result: float32 (float64 for float64 logits) scalar, or ``[N]`` without reduction
    """

    #: The exponent, that of the focal loss; 0 is cross entropy.
    focusing = 0.0
    #: Whether ``"mean"`` divides by the sum of the samples' weights, not by their number.
    divides_by_weights = False

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        numbers: Mapping[str, float] | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        validate_args: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.ignore_index = integer("ignore_index", ignore_index, "-100 is usual")
        self.validate_args = validation(validate_args)
        self.backend = runnable_backend(backend)
        #: As constructed; a tau may have changed since, and is a constant as well.
        self._numbers = dict(numbers or {})
        if class_counts is not None:
            counts = as_class_counts(class_counts).double()
            self._keep_all(self._all_constants(counts, self._numbers))

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute what the loss holds of the class counts.

        Args:
            counts: training samples per class, float64 ``[C]`` on the CPU.
            numbers: as the constructor was given.

        Returns:
            ``table`` (:math:`T`) and ``class_weight`` (:math:`w`), float64 ``[C]``, each optional, and
            further constants of the subclass.
        """
        return {}

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts and adjustments during training, in place: compiled steps compile nothing anew.

        Args:
            class_counts: training samples per class ``[C]`` of the same classes, positive; None keeps them.
            tau: strength, of a loss that has one; None keeps it.

        Raises:
            TypeError: counts or ``tau`` are no numbers.
            ValueError: counts are not positive or of other classes, ``tau`` is negative or not finite, or the
                loss has no counts or no ``tau``.
        """
        kind = type(self).__name__
        if "class_counts" not in self._exact:
            raise ValueError(
                f"class_counts, tau: expected a loss of class counts, got {kind}, which has none"
            )
        numbers = self._numbers
        if "tau" in numbers:
            numbers = numbers | {"tau": float(self.on_cpu("tau")) if tau is None else check_tau(tau)}
        elif tau is not None:
            raise ValueError(f"tau: expected None for {kind}, which has no strength, got {tau}")
        if class_counts is None:
            counts = self.on_cpu("class_counts")
        else:
            counts = same_classes(class_counts, len(self.on_cpu("class_counts"))).double()

        self._keep_all(self._all_constants(counts, numbers))

    def _all_constants(self, counts: Tensor, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        """The constants that follow from class counts and numbers, with these."""
        strength = {"tau": scalar(numbers["tau"])} if "tau" in numbers else {}
        return {"class_counts": counts} | strength | self.constants(counts, **numbers)

    @property
    def class_counts(self) -> Tensor | None:
        """Training samples per class ``[C]``, or None."""
        return self._read("class_counts") if "class_counts" in self._exact else None

    @property
    def table(self) -> Tensor | None:
        """Adjustments :math:`T` ``[C]``, or None for zeros."""
        return self._read("table") if "table" in self._exact else None

    @property
    def class_weight(self) -> Tensor | None:
        """Weights :math:`w` of the classes ``[C]``, or None for ones."""
        return self._read("class_weight") if "class_weight" in self._exact else None

    def _inferred(self) -> frozenset[str]:
        return frozenset({"tau"})  # states of version 0.1.0 have none

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        counts = as_class_counts(self._current(state, "class_counts")).double()
        numbers = self._numbers
        if "tau" in numbers:
            table = self._current(state, "table").double()
            tau = float(state["tau"]) if "tau" in state else strength_of(table, counts)
            numbers = numbers | {"tau": check_tau(tau)}
        expected = self._all_constants(counts, numbers)
        for name, value in expected.items():
            if name in state and not same_constants(state[name], value):
                raise ValueError(
                    f"{name}: expected what {type(self).__name__} makes of the class counts beside it, "
                    "got others; load all constants of a state at once, and construct it as the saved one was"
                )
        # As they are saved; those of fewer digits are computed anew.
        saved = {n: v for n, v in state.items() if n not in expected or v.dtype == torch.float64}
        return expected | {name: value.to(self._exact[name].dtype) for name, value in saved.items()}

    def forward(self, output: ExpertOutput | ExpertLogits, target: Tensor) -> Tensor:
        """The loss of a batch, a scalar or ``[N]``, in float32 (float64 for float64 logits).

        Args:
            output: logits of one model ``[N, C]``; of K experts ``[N, K, C]``, K tensors ``[N, C]`` or an
                :class:`~lgla_losses.ExpertOutput`, whose losses are summed.
            target: class indices, int64 ``[N]``.
        """
        counts = self.constant("class_counts") if "class_counts" in self._exact else None
        blocks = expert_blocks(output, None if counts is None else len(counts))
        first = blocks[0]
        target_tensor(target, first.shape[:1])
        same_device(logits=first, target=target, criterion=counts)
        engine = self._engine(blocks, target)
        if engine is not None and self.focusing == 0 and worth_joining(blocks):
            blocks = [torch.cat(blocks, dim=1)]
        readable = values_readable(first, self.validate_args)
        # The C library reads every value anyway and tells when one is wrong.
        tells = readable and engine is native and not torch.compiler.is_compiling()
        if readable:
            target_values(target, first.shape[2], self.ignore_index)
        if readable and not tells:
            self._check_logits(blocks, target)
        try:
            return self._loss(engine, blocks, target, check=tells)
        except native.BadValuesError:
            if not tells:
                raise
            self._check_logits(blocks, target)
        return self._loss(engine, blocks, target, check=False)

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _engine(self, blocks: list[Tensor], target: Tensor) -> Engine | None:
        few = blocks[0].shape[2] < WORTH_AN_OPERATOR
        if self.backend == "auto" and few and torch.compiler.is_compiling():
            return None
        constants = [self.constant(name) for name in self._exact]
        return choose_engine(self.backend, autograd.unfit(*blocks, target, *constants), blocks[0].device)

    def _check_logits(self, blocks: list[Tensor], target: Tensor) -> None:
        target_logits([v for block in blocks for v in block.unbind(1)], target, self.ignore_index)

    def _loss(self, engine: Engine | None, blocks: list[Tensor], target: Tensor, check: bool) -> Tensor:
        dtype = functional.compute_dtype(blocks[0].dtype)
        kept = target != self.ignore_index
        # Ignored samples have no class; any stands in, as they count nothing.
        own = target * kept
        weights = self._weights(own)
        if weights is not None:
            weights = (weights * kept).to(dtype)
        divisor = self._divisor(kept, weights, dtype)
        if self.focusing > 0:
            # The factor is of every expert's own probability.
            blocks = [expert for block in blocks for expert in block.split(1, dim=1)]
        reduce = engine is not None and self.reduction != "none" and self.focusing == 0
        parts = []
        for block in blocks:
            logits = self._adjusted(block, own)
            table = self._table(logits)
            weight = None if weights is None else weights[:, None].expand(-1, logits.shape[1])
            inner = None if self.focusing > 0 else weight
            if engine is None:
                if torch.compiler.is_compiling():
                    table = converted_once(table, dtype)
                loss = functional.lgla_loss(logits, target, table, inner, ignore_index=self.ignore_index)
            else:
                inside = divisor if reduce else None
                call = autograd.Call(
                    engine, target, table, inner, inside, self.ignore_index, 0.0, reduce, check
                )
                loss = autograd.cross_entropy(call, logits, self.backend)
            if self.focusing > 0:
                loss = _focal(loss, self.focusing)
                loss = loss if weights is None else weights * loss
            parts.append(loss)
        loss = functools.reduce(torch.add, parts)
        return loss if reduce or self.reduction == "none" else autograd.total(loss, divisor)

    def _adjusted(self, logits: Tensor, own: Tensor) -> Tensor:
        """The logits ``[N, K, C]`` but for the table; ``own`` are the classes of the samples ``[N]``."""
        return logits

    def _table(self, logits: Tensor) -> Tensor:
        if "table" in self._exact:
            return self.constant("table").expand(logits.shape[1:])
        dtype = functional.widest_dtype(logits.device)
        return torch.zeros(logits.shape[1:], dtype=dtype, device=logits.device)

    def _weights(self, own: Tensor) -> Tensor | None:
        """Weights of the samples ``[N]``, or None for ones."""
        return self.constant("class_weight")[own] if "class_weight" in self._exact else None

    def _divisor(self, kept: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if self.reduction != "mean":
            return None
        if self.divides_by_weights and weights is not None:
            total = weights.sum()
            return total + (total == 0)
        return kept.sum(dtype=dtype).clamp(min=1)

    def extra_repr(self) -> str:
        """Configuration shown by ``repr``."""
        counts = self.class_counts
        classes = "" if counts is None else f"num_classes={len(counts)}, "
        focal = f"gamma={self.focusing}, " if self.focusing > 0 else ""
        return f"{classes}{focal}reduction={self.reduction!r}, backend={self.backend!r}"


def _focal(losses: Tensor, gamma: float) -> Tensor:
    """The cross entropies times ``(1 - p) ** gamma``, where p is the exponential of minus them."""
    # expm1 keeps the digits of 1 - p near 0. Its power has no derivative at 0 for gamma < 1, and there the
    # product's is 0: that of a constant.
    missing = (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).tiny)
    return missing**gamma * losses
