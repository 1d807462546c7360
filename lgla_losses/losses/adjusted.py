"""The base of the losses of one model or of any number of experts: adjust, weigh, sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._batch import Batch
from lgla_losses._buffers import ConstantBuffers, read_only, same_constants, scalar
from lgla_losses._counts import ArrayLike, ClassRules, Ruled, as_class_weight
from lgla_losses._ranks import Ranks
from lgla_losses._torch import values_readable
from lgla_losses.adjustment import check_tau, strength_of
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.grouping import same_classes
from lgla_losses.kernels import Rows
from lgla_losses.kernels.autograd import CrossEntropy, evaluate, total
from lgla_losses.kernels.operators import cross_entropies
from lgla_losses.losses._base import Loss, if_corrected

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


#: Values of a constant for the classes that it is not computed for: masked classes, and the background.
_LEFT_OUT = {
    "table": (-math.inf, 0.0),
    "class_weight": (1.0, 1.0),
    "multiplier": (1.0, 1.0),
    "margins": (0.0, 0.0),
    "temperature": (1.0, 1.0),
}


class Options(TypedDict, total=False):
    """Name the options of :class:`AdjustedLoss`, besides its constants."""

    class_weight: ArrayLike | None
    zero_counts: str
    background: int | Sequence[int] | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    sync: bool
    process_group: ProcessGroup | None
    validate_args: bool | None
    backend: str


class AdjustedLoss(ConstantBuffers, Loss, Ruled):
    r"""Compute cross entropy of adjusted logits, weighted by class, summed over one model or several experts.

    .. math:: \sum_k \sum_y q_y w_y \, (1 - p_{ky})^\gamma (-\log p_{ky}), \qquad
        p_k = \mathrm{softmax}(a(v_k) + T - m q)

    Here :math:`q` is 1 for the class of a sample, or holds its class probabilities; label smoothing changes
    it everywhere but in the margin. A subclass gives the constants :math:`T` and :math:`w` by
    :meth:`constants`, the margins :math:`m`, the exponent :math:`\gamma`, and the factors of the logits,
    :math:`a`.

    Args:
        class_counts: training samples per class ``[C]``, positive unless ``zero_counts`` allows 0; None for a
            loss that needs none.
        numbers: further arguments of :meth:`constants`, by name.
        class_weight: your own weights of the classes ``[C]``, finite and at least 0, as in
            :class:`torch.nn.CrossEntropyLoss`; they multiply the weights that the loss makes.
        reduction: ``"mean"`` over the samples not ignored, ``"sum"``, or ``"none"``. With ``class_weight``
            the mean divides by the sum of the samples' weights, as PyTorch does for class indices, unless a
            loss says otherwise. The weight of a sample with probabilities is the mean of its classes'
            weights.
        zero_counts: as in :class:`~lgla_losses.LGLALoss`, what to do about classes without samples.
            ``"mask"`` computes every constant from the other classes only.
        background: as in :class:`~lgla_losses.LGLALoss`, classes left out of the adjustment: their adjustment
            and margin are 0, their weight and factor 1.
        ignore_index: target value of samples to ignore.
        label_smoothing: as in :class:`torch.nn.CrossEntropyLoss`, of the adjusted logits.
        sync: as in :class:`~lgla_losses.LGLALoss`, for the number that ``"mean"`` divides by.
        process_group: as in :class:`~lgla_losses.LGLALoss`.
        validate_args: as in :class:`~lgla_losses.LGLALoss`.
        backend: as in :class:`~lgla_losses.LGLALoss`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, or shapes, devices or values do not fit.

    Shape:
        - output: logits ``[N, C]``; ``[N, K, C]``, K tensors ``[N, C]`` or an
          :class:`~lgla_losses.ExpertOutput`
        - target: int64 ``[N]``, or class probabilities ``[N, C]`` (mixup, distillation)
        - sample_weight: ``[N]``
        - result: float32 (float64 for float64 logits) scalar, or ``[N]`` without reduction
        - maps, as in segmentation, have further dimensions at the end of all: logits ``[N, C, H, W]`` or
          ``[N, K, C, H, W]``, target ``[N, H, W]`` or ``[N, C, H, W]``
    """

    #: The exponent of the focal loss; 0 is cross entropy.
    focusing = 0.0
    #: Whether ``"mean"`` divides by the sum of the samples' weights, not by their number.
    divides_by_weights = False
    #: The factor of the cosine logits that the loss expects; None if it takes any logits.
    _cosine_scale: float | None = None
    #: Whether a subclass adds a term to the loss of a sample, and whether class weights multiply that term.
    _adds, _weighs_added = False, True

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        numbers: Mapping[str, float] | None = None,
        *,
        class_weight: ArrayLike | None = None,
        zero_counts: str = "error",
        background: int | Sequence[int] | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        sync: bool = True,
        process_group: ProcessGroup | None = None,
        validate_args: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._take_options(
            reduction, ignore_index, label_smoothing, sync, process_group, validate_args, backend
        )
        #: As constructed. A tau may change later; its current value is a constant.
        self._numbers = dict(numbers or {})
        if class_counts is not None:
            self._rules, counts = ClassRules.of(class_counts, zero_counts, background)
            self._rules.check_smoothing(self.label_smoothing)
            self._keep_all(self._all_constants(counts.double(), self._numbers))
        elif zero_counts != "error" or background is not None:
            raise ValueError(
                f"zero_counts, background: expected neither for {type(self).__name__} without class counts, "
                f"got {zero_counts!r} and {background}; leave them out"
            )
        if class_weight is not None:
            of_classes = self._exact.get("class_counts")
            self._keep("own_class_weight", as_class_weight(class_weight, of_classes))
        first = next(iter(self._exact.values()), None)
        self._num_classes = None if first is None else len(first)
        only_own = "own_class_weight" in self._exact and "class_weight" not in self._exact
        self._divides_by_weights = self.divides_by_weights or only_own

    def constants(self, counts: Tensor, **numbers: float) -> dict[str, Tensor]:
        """Compute the constants of the loss from the class counts.

        Args:
            counts: training samples per class, float64 ``[C]`` on the CPU; of the adjusted classes only,
                without background and masked classes.
            numbers: those given to the constructor.

        Returns:
            ``table`` (:math:`T`), ``class_weight`` (:math:`w`), ``multiplier`` (the factor of the logits) and
            ``margins``, float64 of as many classes, each optional, and further constants of the subclass,
            which are kept as they are.
        """
        return {}

    def set_adjustment(self, class_counts: ArrayLike | None = None, tau: float | None = None) -> None:
        """Change class counts and adjustments during training, in place, without a new compilation.

        Args:
            class_counts: training samples per class ``[C]`` of the same classes, positive unless
                ``zero_counts`` allows 0; None keeps them.
            tau: strength, if the loss has one; None keeps it.

        Raises:
            TypeError: counts or ``tau`` are not numbers.
            ValueError: counts are not positive or are of other classes, ``tau`` is negative or not finite, or
                the loss has no counts or no ``tau``.
        """
        kind = type(self).__name__
        if "class_counts" not in self._exact:
            raise ValueError(
                f"class_counts, tau: expected a loss with class counts, got {kind}, which has none; pass "
                "class_counts= when you make the loss"
            )
        numbers = self._numbers
        if "tau" in numbers:
            numbers = numbers | {"tau": float(self.on_cpu("tau")) if tau is None else check_tau(tau)}
        elif tau is not None:
            raise ValueError(f"tau: expected None for {kind}, which has no tau, got {tau}; leave it out")
        if class_counts is None:
            counts = self.on_cpu("class_counts")
        else:
            counts = same_classes(class_counts, len(self.on_cpu("class_counts")), self._rules).double()

        self._keep_all(self._all_constants(counts, numbers))
        self._compared = False

    def _all_constants(self, counts: Tensor, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        """Compute all constants from class counts and numbers; the counts and tau are among them."""
        constants = {"class_counts": counts}
        if "tau" in numbers:
            constants["tau"] = scalar(numbers["tau"])
        adjusted = counts[self._rules.adjusted(counts)]
        made = self.constants(adjusted, **numbers)
        if self.zero_counts == "mask":  # even if no class is masked now: other counts may mask some
            made = {"table": torch.zeros_like(adjusted)} | made

        for name, value in made.items():
            if name in _LEFT_OUT:
                masked, background = _LEFT_OUT[name]
                value = self._rules.spread(value, counts, masked=masked, background=background)
            constants[name] = value
        return constants

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
        """Weights of the classes ``[C]``, made by the loss, given to it, or their product; None for ones."""
        made, given = "class_weight" in self._exact, "own_class_weight" in self._exact
        if made and given:
            return read_only(self._read("class_weight") * self._read("own_class_weight"))
        return self._read("class_weight" if made else "own_class_weight") if made or given else None

    def implied_prior(self) -> Tensor:
        r"""Compute the class prior that the logits hold where the loss is lowest.

        .. math:: v_j = \log p(x | j) + \log p_j + c(x), \qquad p_j \propto n_j \, w_j \exp(-T_j)

        This is our derivation: at its minimum a cross entropy weighted by :math:`w` has
        :math:`\mathrm{softmax}(v + T)_j \propto n_j \, w_j \, p(x | j)`. It holds without label smoothing and
        sample weights; with experts, for each of them and for their mean under any fusion. Trained networks
        are usually overconfident and hold another prior, which :func:`calibration.fit
        <lgla_losses.calibration.fit>` measures. The theory is approximate for

        - a focal exponent above 0: the probabilities are less confident than the posterior, in the same
          order;
        - factors of the logits (:class:`~lgla_losses.baselines.VSLoss`): the logits times their factors hold
          the prior, the logits themselves only if the factors are close to 1;
        - margins (:class:`~lgla_losses.baselines.LDAMLoss`), which have no such theory and are left out. The
          weights are included once they are on;
        - terms between experts (:class:`~lgla_losses.baselines.RIDELoss`) and over hard classes
          (:class:`~lgla_losses.baselines.NCLLoss`), which are left out as well.

        Returns:
            float64 ``[C]``, summing to 1; 0 for masked classes and for those of weight 0.

        Raises:
            ValueError: the loss has no class counts, its samples have several labels, or every class has the
                weight 0.

        Example:
            >>> from lgla_losses.baselines import BalancedSoftmaxLoss
            >>> AdjustedLoss([300, 100]).implied_prior()
            tensor([0.7500, 0.2500], dtype=torch.float64)
            >>> BalancedSoftmaxLoss([300, 100]).implied_prior()
            tensor([0.5000, 0.5000], dtype=torch.float64)
        """
        counts = self._training_counts()
        table, weight, _ = self._terms()
        table = torch.zeros_like(counts) if table is None else table
        if weight is not None:  # a weight w acts like the adjustment -log w
            table = table - weight.log()
        prior = functional.implied_prior(table[None], counts, counts.new_ones(1))
        if values_readable(prior, True) and prior.isnan().any():
            raise ValueError(
                "class_weight: expected a positive weight for at least one class with samples, got none, "
                "so that the logits hold no prior; give a class a positive weight"
            )
        return prior

    def _training_counts(self) -> Tensor:
        if "class_counts" not in self._exact:
            raise ValueError(
                f"class_counts: expected counts in {type(self).__name__}, because the prior follows from "
                "them, got None; pass class_counts= when you make the loss (count_classes computes them)"
            )
        return self.constant("class_counts").detach().clone()

    def _inferred(self) -> frozenset[str]:
        return frozenset({"tau"})  # states of version 0.1.0 have none

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        if "own_class_weight" in state:
            state = state | {"own_class_weight": as_class_weight(state["own_class_weight"])}
        if "class_counts" not in self._exact:
            return state
        counts = self._rules.saved(self._current(state, "class_counts")).double()
        numbers = self._numbers
        if "tau" in numbers:
            table = self._current(state, "table").double()
            tau = float(state["tau"]) if "tau" in state else strength_of(table, counts, self._rules)
            numbers = numbers | {"tau": check_tau(tau)}
        expected = self._all_constants(counts, numbers)
        for name, value in expected.items():
            if name in state and not same_constants(state[name], value):
                raise ValueError(
                    f"{name}: expected the values that {type(self).__name__} computes from the class counts "
                    "in the same state, got others; load all constants of a state at once into a loss with "
                    "the arguments of the saved one"
                )
        # Keep them as saved; those saved with fewer digits are computed again.
        saved = {n: v for n, v in state.items() if n not in expected or v.dtype == torch.float64}
        return expected | {name: value.to(self._exact[name].dtype) for name, value in saved.items()}

    def forward(
        self,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of a batch, a scalar or ``[N]``, in float32 (float64 for float64 logits).

        Args:
            output: logits of one model ``[N, C]``; of K experts ``[N, K, C]``, K tensors ``[N, C]`` or an
                :class:`~lgla_losses.ExpertOutput`, whose losses are summed. Maps have further dimensions.
            target: class indices, int64 ``[N]``, or class probabilities ``[N, C]``; of maps ``[N, ...]`` or
                ``[N, C, ...]``.
            sample_weight: as in :meth:`LGLALoss.forward <lgla_losses.LGLALoss.forward>`.
            normalizer: as in :meth:`LGLALoss.forward <lgla_losses.LGLALoss.forward>`.
        """
        table, class_weight, margin = self._terms()
        criterion = table if table is not None else class_weight
        batch = Batch.of_any(output, target, self._num_classes, sample_weight, criterion)
        engine, ranks, readable = self._step(batch, normalizer, table, class_weight, margin)

        logits = batch.logits
        if "multiplier" in self._exact:
            multiplier = self.constant("multiplier").to(functional.compute_dtype(logits[0].dtype))
            logits = [block * multiplier for block in logits]
        num_experts = len(logits) if batch.of_one else logits[0].shape[-2]
        rows = self._rows(
            engine,
            batch,
            ranks,
            normalizer,
            counted=class_weight if self._divides_by_weights else None,
            table=None if table is None else table.expand(num_experts, -1),
            weights=batch.weights_of_experts(num_experts),
            class_weight=class_weight,
            margin=margin,
            gamma=self.focusing,
        )
        problem = functools.partial(CrossEntropy, of_one=batch.of_one)
        loss = evaluate(engine, rows, logits, problem, cross_entropies, self.backend)

        if self._adds:
            loss = loss + self._reduced(self._added(batch), batch, rows, ranks, normalizer)

        if readable:
            self._explain_unless_finite(batch, loss)
        if self._cosine_scale is not None and values_readable(batch.target, self.validate_args):
            self._look_at_scale(batch, self._cosine_scale, output)
        return loss

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _added(self, batch: Batch) -> Tensor:
        """Compute what a subclass adds to the loss of every sample ``[*B]``."""
        raise NotImplementedError

    def _reduced(
        self,
        losses: Tensor,
        batch: Batch,
        rows: Rows,
        ranks: Ranks,
        normalizer: float | Tensor | None,
    ) -> Tensor:
        """Weigh losses of samples ``[*B]`` as the cross entropy is weighed, and reduce them."""
        amounts = batch.amounts(self.ignore_index, self._terms()[1] if self._weighs_added else None)
        losses = torch.where(amounts == 0, 0.0, losses) * amounts.to(losses.dtype)
        if self.reduction == "none":
            return losses

        divisor = rows.divisor
        if divisor is not None and normalizer is None and self._divides_by_weights and not self._weighs_added:
            divisor = amounts.sum()
            if ranks.number > 1:
                divisor = self._summed(divisor[None], ranks)[0] / ranks.number
        return total(losses, divisor)

    def _terms(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Give the adjustments, weights and margins of the classes ``[C]``; each may be None."""
        table = self.constant("table") if "table" in self._exact else None
        weight = self.constant("class_weight") if "class_weight" in self._exact else None
        if "own_class_weight" in self._exact:
            own = self.constant("own_class_weight")
            weight = own if weight is None else weight * own
        return table, weight, None

    def _corrected_counts(self) -> tuple[Tensor, Tensor] | None:
        if "class_counts" not in self._exact:
            return None
        table, weight, _ = self._terms()
        return if_corrected(self.constant("class_counts"), self._rules, table, weight)

    def _masked(self) -> Tensor | None:
        return self.constant("class_counts") == 0 if self.zero_counts == "mask" else None

    def _constants(self) -> list[Tensor]:
        return [self.constant(name) for name in self._exact]

    def extra_repr(self) -> str:
        """Show the configuration."""
        counts = self.class_counts
        classes = "" if counts is None else f"num_classes={len(counts)}, "
        focal = f"gamma={self.focusing}, " if self.focusing > 0 else ""
        return f"{classes}{self._rules.shown()}{focal}reduction={self.reduction!r}, backend={self.backend!r}"
