"""K experts on a shared backbone (Fig. 3, section 4.4)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lgla_losses._checks import FLOATING, boolean, describe, integer, one_of, positive_float, positive_int
from lgla_losses._ranks import refuse_data_parallel
from lgla_losses.experts._attributes import KEY, hand_on
from lgla_losses.experts._classifiers import ExpertClassifiers
from lgla_losses.experts._running import is_tracing, run_separately, run_together
from lgla_losses.experts._stacking import apply_per_copy, copy_module, stack_modules, unstack_module
from lgla_losses.experts.output import ExpertOutput

#: Locks of stacks: one thread at a time puts its copies into the layers, and may lock again. They are kept
#: here so that they stay out of copies and pickles.
LOCKS: MutableMapping[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()

#: Whether this process has warned that a module's weights are kept.
_told_what_is_kept = False


class GroupConvExperts(nn.Module):
    """Run K copies of a network's last stage with a classifier each, on shared features.

    ``layout="grouped"`` stacks the parameters of the copies, which run one by one, or together under
    ``torch.func.vmap``, with K-fold grouped convolutions; ``layout="independent"`` runs K modules. Both
    layouts compute the same function, forward and backward. The paper's group convolution (section 4.4) also
    computes it, unless channels leak between experts, as in the shortcuts of the authors' released ResNet-32;
    here they never leak.

    The parameters of the grouped layout have a leading expert dimension. Initialise them through a factory or
    ``init_fn``, which see each copy alone; ``experts.apply(init)`` would compute the fan from the stack. Code
    that selects parameters by dimension, for example for weight decay, should count one dimension less, as
    :func:`~lgla_losses.parameter_groups` does.

    Source: Tao et al., ICCV 2023, Fig. 3 and section 4.4.

    Args:
        stage: the layers that every expert has for itself: a module, copied K times, or a factory of modules,
            called K times. None puts the classifiers on the shared features.
        num_experts: number of experts ``K``.
        num_classes: number of classes ``C``.
        num_features: number of features ``d`` of the stage after pooling. None reads it from the stage or its
            last layer; required without a stage.
        classifier: ``"cosine"`` or ``"linear"`` (with bias).
        scale: factor of cosine logits, as for :class:`LGLALoss`; linear classifiers have none.
        layout: ``"grouped"`` or ``"independent"``.
        reset: True initialises every copy again, by ``reset_parameters()`` of its layers and then
            ``init_fn``; False keeps the weights. None keeps the weights of a module, which may be pretrained,
            and those of a factory; with ``init_fn`` the copies of a module are initialised again.
        init_fn: applied to every layer of every copy, as by :meth:`torch.nn.Module.apply`; needed for new
            weights if a layer with parameters has no ``reset_parameters()``.
        gradient: for cosine classifiers: ``"bounded"``, in training about as large as that of linear ones,
            with class centres that start close to each other, for usual learning rates; or ``"exact"``, as in
            the paper (:class:`~lgla_losses.experts.ExpertClassifiers`).

    Attributes:
        stage: the stacked module, a ``ModuleList`` of K modules, or None.
        classifiers: the K :class:`~lgla_losses.experts.ExpertClassifiers`.
        together: whether stacked copies run together; False (the default) runs them one by one. True is
            faster for narrow layers whose steps a CUDA graph replays, and slower elsewhere. Under
            :func:`torch.jit.trace` they run one by one.

    Raises:
        TypeError: ``stage`` is neither a module nor a factory of modules, another argument is of a wrong
            type, or the stage's output is not a floating-point tensor.
        ValueError: a number is out of range, a layer cannot be initialised, stacked or run together,
            the stage writes into its input (seen in eager mode only), or its output is not a dense
            ``[N, d]``, ``[N, d, H, W]`` or ``[N, d, D, H, W]``.

    Shape:
        - shared features: ``[N, ...]``, the input of the stage; a tuple if it takes several values
        - output: an :class:`ExpertOutput` of logits ``[N, K, C]``, features ``[N, K, d]`` and
          weight ``[K, C, d]``; a 4-D or 5-D stage output is average-pooled

    Example:
        >>> stage = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        >>> experts = GroupConvExperts(stage, num_experts=3, num_classes=10, reset=True)
        >>> output = experts(torch.randn(8, 16, 12, 12))
        >>> output.logits.shape, output.ensemble().shape
        (torch.Size([8, 3, 10]), torch.Size([8, 10]))
    """

    def __init__(
        self,
        stage: nn.Module | Callable[[], nn.Module] | None,
        num_experts: int,
        num_classes: int,
        *,
        num_features: int | None = None,
        classifier: str = "cosine",
        scale: float = 30.0,
        layout: str = "grouped",
        reset: bool | None = None,
        init_fn: Callable[[nn.Module], None] | None = None,
        gradient: str = "bounded",
    ) -> None:
        super().__init__()
        self.num_experts = positive_int("num_experts", num_experts, "the paper uses 3")
        num_classes = positive_int("num_classes", num_classes, "give the number of classes")
        one_of("classifier", classifier, ("cosine", "linear"))
        self.layout = one_of("layout", layout, ("grouped", "independent"))
        scale = positive_float("scale", scale, "the paper's code uses 30")

        if init_fn is not None and not callable(init_fn):
            raise TypeError(f"init_fn: expected a function of a layer or None, got {describe(init_fn)}")

        if reset is not None:
            reset = boolean("reset", reset)
        copies = _make_copies(stage, self.num_experts, reset, init_fn)
        if isinstance(stage, nn.Module) and reset is None and init_fn is None:
            _tell_what_is_kept(stage)
        if num_features is None:
            num_features = _features_of(copies)

        self.stage: nn.Module | None = None
        if copies:
            self.stage = nn.ModuleList(copies) if self.layout == "independent" else stack_modules(copies)
        self._attributes = getattr(self.stage, KEY, None)
        self.together = False
        self.classifiers = ExpertClassifiers(
            self.num_experts,
            positive_int("num_features", num_features, "give the width of the stage's output"),
            num_classes,
            scale if classifier == "cosine" else None,
            like=next(self.parameters(), None),
            gradient=gradient,
        )

    if TYPE_CHECKING:

        def __call__(self, shared: Tensor | tuple[Any, ...]) -> ExpertOutput:
            """Compute logits, features and class centres of every expert, as :meth:`forward`."""

    def forward(self, shared: Tensor | tuple[Any, ...]) -> ExpertOutput:
        """Compute logits, features and class centres of every expert."""
        inputs = shared if isinstance(shared, tuple) else (shared,)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if not tensors or (self.stage is None and len(inputs) > 1):
            raise TypeError(
                "shared: expected a tensor [N, ...] of shared features, or a tuple of the stage's inputs, "
                f"got {describe(shared)}"
            )

        weight: Tensor = self.classifiers.weight
        if any(tensor.is_meta for tensor in tensors) and not weight.is_meta:
            raise ValueError(
                f"shared: expected tensors with values, as the experts' on {weight.device}, got one on "
                "meta; move the experts to meta too, or pass values"
            )

        versions = [_version(tensor) for tensor in tensors]
        features = self._features(inputs)
        if [_version(tensor) for tensor in tensors] != versions:
            raise ValueError(
                "stage: expected a stage that does not change its input, which the experts share, got one "
                "that wrote into it; set inplace=False on its first layer, or move that layer to the end "
                "of the trunk"
            )

        if not is_tracing() and features.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"num_features: expected the width of the stage's output, {features.shape[-1]}, "
                f"got {weight.shape[-1]}; pass num_features={features.shape[-1]}"
            )

        if not is_tracing():  # tracing runs with and without gradients and compares
            # A view: FSDP2 puts hooks on the outputs of a module, and on the parameter the hooks of all steps
            # would add up. Reentrant checkpoints make the outputs part of their graph.
            weight = weight.view_as(weight) if torch.is_grad_enabled() else weight.detach()
        return ExpertOutput(self.classifiers(features), features, weight)

    def _features(self, inputs: tuple[Any, ...]) -> Tensor:
        """Pool the outputs of the stages to ``[N, K, d]``."""
        if self.stage is None:
            pooled = _pool(inputs[0], "shared: expected features")
            return pooled[:, None].expand(-1, self.num_experts, -1)
        if isinstance(self.stage, nn.ModuleList):
            outputs = [expert(*inputs) for expert in self.stage]
        else:
            if not torch.compiler.is_compiling():
                hand_on(self._attributes, self.stage)
            with nullcontext() if torch.compiler.is_compiling() else LOCKS.setdefault(self.stage, RLock()):
                if boolean("experts.together", self.together) and not is_tracing():
                    maps = run_together(self.stage, self.num_experts, inputs)
                    return _pool(maps, leading=2).transpose(0, 1)
                outputs = run_separately(self.stage, self.num_experts, inputs)
        return torch.stack([_pool(output) for output in outputs], dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        per_copy = partial(apply_per_copy, fn=fn) if self.layout == "grouped" else fn
        return cast(Self, super()._apply(per_copy, recurse))  # type: ignore[no-untyped-call]

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel(self)  # it would concatenate the class weights of the replicas

    def to_independent(self) -> GroupConvExperts:
        """Convert to K independent modules with the same function, which share nothing with these."""
        return self._converted("independent")

    def to_grouped(self) -> GroupConvExperts:
        """Convert to one stacked module with the same function, which shares nothing with these."""
        return self._converted("grouped")

    def extract(self, expert: int) -> Expert:
        """Copy one expert into its own module, which shares nothing with these.

        Args:
            expert: its number, 0 to K-1; the global expert is K-1.

        Raises:
            TypeError: ``expert`` is not an integer.
            ValueError: there is no such expert.
        """
        index = integer("expert", expert, f"experts are numbered from 0 to {self.num_experts - 1}")
        if not 0 <= index < self.num_experts:
            raise ValueError(
                f"expert: expected 0 to {self.num_experts - 1}, got {index}; the last is the global expert"
            )

        independent = self.to_independent()
        stage = independent.stage[index] if isinstance(independent.stage, nn.ModuleList) else None
        single = Expert(stage, independent.classifiers.only(index))
        single.training = single.classifier.training = self.training
        return single

    def _converted(self, layout: str) -> GroupConvExperts:
        hand_on(self._attributes, self.stage)
        twin = copy_module(self)
        hand_on(twin._attributes, twin.stage)

        if twin.layout != layout:
            twin.layout = layout
            if isinstance(twin.stage, nn.ModuleList):
                twin.stage = stack_modules(list(twin.stage))
            elif twin.stage is not None:
                twin.stage = nn.ModuleList(unstack_module(twin.stage, self.num_experts))
            twin._attributes = getattr(twin.stage, KEY, None)
        return twin

    def extra_repr(self) -> str:
        """Describe the configuration, as ``repr`` shows it."""
        return f"num_experts={self.num_experts}, layout={self.layout!r}"


class Expert(nn.Module):
    """Run one expert alone: shared features to its logits ``[N, C]``."""

    def __init__(self, stage: nn.Module | None, classifier: ExpertClassifiers) -> None:
        super().__init__()
        self.stage = stage
        self.classifier = classifier

    if TYPE_CHECKING:

        def __call__(self, shared: Tensor | tuple[Any, ...]) -> Tensor:
            """Give logits, as :meth:`forward`."""

    def forward(self, shared: Tensor | tuple[Any, ...]) -> Tensor:
        """Compute the logits from the output of the trunk."""
        inputs = shared if isinstance(shared, tuple) else (shared,)
        if self.stage is None:
            features = _pool(inputs[0], "shared: expected features")
        else:
            features = _pool(self.stage(*inputs))
        return self.classifier(features[:, None])[:, 0]


def _make_copies(
    stage: nn.Module | Callable[[], nn.Module] | None,
    num_experts: int,
    reset: bool | None,
    init_fn: Callable[[nn.Module], None] | None,
) -> list[nn.Module]:
    if stage is None:
        return []
    if isinstance(stage, nn.Module):
        copies = [copy_module(stage) for _ in range(num_experts)]
    elif callable(stage):
        copies = [stage() for _ in range(num_experts)]
    else:
        raise TypeError(f"stage: expected a module, a factory of modules or None, got {describe(stage)}")
    if init_fn is not None and reset is False:
        raise ValueError(
            "init_fn: expected None with reset=False, which keeps the weights, got a function; drop one of "
            "them"
        )
    if reset is None:  # a function that initialises means new weights
        reset = isinstance(stage, nn.Module) and init_fn is not None

    _check_copies(copies)
    for expert in copies:
        if reset:
            _reset(expert)
        if init_fn is not None:
            expert.apply(init_fn)
        if reset:
            _check_initialised(expert)
    return copies


def _tell_what_is_kept(stage: nn.Module) -> None:
    """Warn once per process that a module's weights are kept; version 0.1.0 discarded them."""
    global _told_what_is_kept
    if _told_what_is_kept or next(stage.parameters(), None) is None:
        return
    _told_what_is_kept = True
    warnings.warn(
        "reset: expected True or False with a module as stage, got None, so every expert keeps the "
        "module's weights; version 0.1.0 drew new ones. Keep them with reset=False (a pretrained network), "
        "or draw new ones for each expert with reset=True (a new network)",
        FutureWarning,
        stacklevel=3,
    )


def _check_copies(copies: list[nn.Module]) -> None:
    for expert in copies:
        if not isinstance(expert, nn.Module):
            raise TypeError(f"stage: expected a factory of torch.nn.Module, got {describe(expert)} from it")
        if any(is_lazy(parameter) for parameter in expert.parameters()):
            raise ValueError(
                "stage: expected parameters of known shapes, got a lazy module; first run a batch through it"
            )
    memory = [{_memory(t) for t in (*expert.parameters(), *expert.buffers())} for expert in copies]
    if len(set().union(*memory)) != sum(map(len, memory)):
        raise ValueError(
            "stage: expected a factory that makes a new module at every call, got parameters or buffers "
            "shared between calls; build the layers inside it"
        )


def _memory(tensor: Tensor) -> int:
    """Identify the memory of a tensor; a tensor without memory by its id."""
    return (0 if tensor.is_meta else tensor.untyped_storage().data_ptr()) or id(tensor)


def _reset(module: nn.Module) -> None:
    """Initialise children before their parents; parameters that nothing sets stay NaN."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            nn.init.constant_(parameter, math.nan)
    for layer in reversed(list(module.modules())):
        reset_parameters = getattr(layer, "reset_parameters", None)
        if callable(reset_parameters):
            reset_parameters()


def _check_initialised(module: nn.Module) -> None:
    for path, parameter in module.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and parameter.isnan().any():
            layer = type(module.get_submodule(path.rpartition(".")[0])).__name__
            raise ValueError(
                f"stage: parameter {path!r} of a {layer} is initialised by no reset_parameters(); "
                "pass an init_fn= that sets it, or keep the weights of a module or a factory with reset=False"
            )


def _version(tensor: Tensor) -> int:
    """Count writes into a tensor; compilers and inference mode do not count them."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _features_of(copies: list[nn.Module]) -> int:
    """Find the width of the stage, or else of the last layer that has one."""
    stage_width = getattr(copies[0], "num_features", None) if copies else None
    if isinstance(stage_width, int):
        return stage_width
    for layer in reversed(list(copies[0].modules()) if copies else []):
        for attribute in ("out_channels", "out_features", "num_features", "num_channels"):
            width = getattr(layer, attribute, None)
            if isinstance(width, int):
                return width
    raise ValueError(
        "num_features: expected the width of the stage's output, got None, and no layer has it; pass "
        "num_features="
    )


def _pool(features: Tensor, expected: str = "stage: expected an output", leading: int = 1) -> Tensor:
    """Pool ``[N, d, H, W]`` or ``[N, d, D, H, W]`` to ``[N, d]``, after ``leading`` dimensions."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{expected} [N, d] or [N, d, H, W], got {type(features).__name__}")
    if features.is_nested or features.layout != torch.strided:
        kind = "nested" if features.is_nested else str(features.layout)
        raise ValueError(f"{expected} in a dense tensor, got a {kind} one; make it dense first")
    if features.dtype not in FLOATING:
        raise TypeError(f"{expected} of {', '.join(map(str, FLOATING))}, got {features.dtype}; convert it")
    if features.dim() - leading in (3, 4):
        return features.mean(dim=tuple(range(leading + 1, features.dim())))
    if features.dim() != leading + 1:
        raise ValueError(
            f"{expected} [N, d], [N, d, H, W] or [N, d, D, H, W] for every expert, got "
            f"{['N', *features.shape[leading:]]}; end the stage with its own pooling"
        )
    return features
