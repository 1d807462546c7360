"""K copies of a module as one: parameters stacked, run together or one after another.

A stacked module looks like one copy, with a leading expert dimension on every parameter and buffer.
Together its copies run under ``torch.func.vmap``, which turns convolutions into K-fold grouped ones and
has rules for the other layers: none but batch norm needs code of its own, and channels of one expert
cannot reach another.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

#: What autocast runs in low precision, for :class:`_UnderVmap`.
MATRIX_PRODUCTS = {
    F.linear,
    F.multi_head_attention_forward,
    F.prelu,
    F.scaled_dot_product_attention,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.addmm,
    torch.matmul,
    torch.bmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
#: New tensors, which layers fill with random numbers; see :class:`_UnderVmap`.
FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}
BATCH_NORM = inspect.signature(F.batch_norm)

#: Attributes that every module has; the others are its options.
MODULE_INTERNALS = frozenset(vars(nn.Module()))


def stack_modules(copies: Sequence[nn.Module]) -> nn.Module:
    """A new module with the copies' parameters and buffers stacked on a new first dimension.

    Raises:
        ValueError: the copies differ in more than the values of their tensors.
    """
    for layers in zip(*(e.named_modules(remove_duplicate=False) for e in copies), strict=False):
        first, *others = (_configuration(layer) for _, layer in layers)
        if any(other != first for other in others):
            path, layer = layers[0]
            raise ValueError(
                f"stage: expected experts that are alike, got layers {path!r} of type {type(layer).__name__} "
                "that differ in type, options or parameters; use layout='independent'"
            )
    tensors = [list(_tensors(expert)) for expert in copies]
    if len(set(map(len, tensors))) > 1:
        raise ValueError(
            "stage: expected experts that are alike, got parameters tied in some and not in others; "
            "use layout='independent'"
        )
    slots = {id(first): rest for first, *rest in zip(*tensors, strict=True)}
    return _rebuild(copies[0], lambda t: torch.stack([t, *slots[id(t)]]))


def _configuration(layer: nn.Module) -> tuple[object, ...]:
    """What must agree between copies for one of them to stand for all."""
    own = {name: value for name, value in vars(layer).items() if name not in MODULE_INTERNALS}
    options = {name: _option(value) for name, value in own.items()}
    tensors = [
        (name, tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad))
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items())
    ]
    # By name: parametrizations make a class of their own for every module.
    return type(layer).__qualname__, layer.training, options, tensors, list(layer._modules)


def _option(value: object) -> object:
    """Something to compare by; objects of unknown kinds by their type alone."""
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device | None):
        return value
    if isinstance(value, tuple | list):
        return [_option(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _option(entry) for name, entry in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)


def unstack_module(stacked: nn.Module, num_experts: int) -> list[nn.Module]:
    """New modules, one for every entry of the first dimension; nothing is shared."""
    return [_rebuild(stacked, lambda t, k=k: t[k].clone()) for k in range(num_experts)]  # type: ignore[misc]


def apply_per_copy(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn`` of a stacked tensor, as :meth:`torch.nn.Module.to` applies it.

    A stack of 4-D weights is 5-D and has no channels_last format, though each copy has.
    """
    try:
        return fn(tensor)
    except RuntimeError:
        if tensor.dim() != 5:
            raise
        return torch.stack([fn(entry) for entry in tensor.unbind()])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer of the tree, tied ones once, in a fixed order."""
    yield from module.parameters()
    yield from module.buffers()


@torch.no_grad()
def _rebuild(template: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of the template with every parameter and buffer converted; ties stay ties."""
    memo: dict[int, object] = {}
    for tensor in _tensors(template):
        converted = convert(tensor)
        if isinstance(tensor, nn.Parameter):
            converted = nn.Parameter(converted, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = converted
    return copy.deepcopy(template, memo)


def run_separately(stacked: nn.Module, num_experts: int, inputs: tuple[Any, ...]) -> list[Any]:
    """Run the copies one after another on the same inputs: K outputs."""
    slices = {name: parameter.unbind() for name, parameter in stacked.named_parameters()}
    outputs = []
    for k in range(num_experts):
        parameters = {name: copies[k] for name, copies in slices.items()}
        # Views, through which every copy updates its own running statistics.
        buffers = {name: buffer[k] for name, buffer in stacked.named_buffers()}
        outputs.append(functional_call(stacked, (parameters, buffers), inputs))
    return outputs


def run_together(stacked: nn.Module, num_experts: int, inputs: tuple[Any, ...]) -> Tensor:
    """Run the copies at once on the same inputs: one output ``[K, ...]``.

    Random layers draw independently per copy, and every copy updates its own running statistics.

    Raises:
        ValueError: a layer has no rule under vmap; the message names its path and type.
    """
    return _run_together(stacked, num_experts, inputs, dict(stacked.named_buffers()))


def check_runs_together(stacked: nn.Module, num_experts: int, inputs: tuple[Any, ...]) -> None:
    """Raise what :func:`run_together` would; the stage and random numbers stay as they are."""
    # A copy that shares the tensors: what its layers keep in attributes is its own.
    trial = copy.deepcopy(stacked, {id(tensor): tensor for tensor in _tensors(stacked)})
    for layer in trial.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    _refuse_new_buffers(trial)
    buffers = {name: buffer.clone() for name, buffer in trial.named_buffers()}
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        _disable_current_modes(),  # a counter of operations should not count these
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        _run_together(trial, num_experts, inputs, buffers)


def _refuse_new_buffers(trial: nn.Module) -> None:
    """A stack keeps what layers write into its buffers, not what they put in their place."""
    before: dict[str, Tensor] = {}

    def compare(layer: nn.Module, *_: object) -> None:
        replaced = [name for name, buffer in layer.named_buffers() if buffer is not before[name]]
        if replaced:
            raise ValueError(
                f"stage: expected buffers that forward writes into, got {replaced[0]!r}, which it replaces; "
                "use self.buffer.copy_(new) there, or layout='independent'"
            )

    trial.register_forward_pre_hook(lambda layer, _: before.update(layer.named_buffers()))
    trial.register_forward_hook(compare)


def _run_together(
    stacked: nn.Module, num_experts: int, inputs: tuple[Any, ...], buffers: dict[str, Tensor]
) -> Tensor:
    parameters: dict[str, Tensor] = dict(stacked.named_parameters())
    device = next(value.device for value in inputs if isinstance(value, Tensor))

    def one_copy(index: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        with _UnderVmap(index):
            return functional_call(stacked, (parameters, buffers), inputs)  # type: ignore[no-any-return]

    # The index gives vmap its size also where a stage has no parameters.
    index = torch.arange(num_experts, device=device)
    try:
        return vmap(one_copy, randomness="different")(index, parameters, buffers)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        if torch.compiler.is_compiling() or not _runs_alone(stacked, parameters, buffers, inputs):
            raise
        path, layer = _innermost_layer(stacked, error.__traceback__)
        raise ValueError(
            f"stage: layer {path!r} of type {type(layer).__name__} cannot run grouped ({error}); "
            "use layout='independent'"
        ) from error


class _UnderVmap(TorchFunctionMode):
    """What vmap does badly: batch norms, random fills, the casts of autocast, which sees what it unfolds.

    New tensors become one a copy, so that each fills its own. Convolutions and matrix products take low
    precision; instance norms, whose unfolded form takes no mixed one, float32, and give back what they got.

    Args:
        index: the copy's number, under vmap.
    """

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.zero = 0 * index
        device_type = index.device.type
        enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type) if enabled else None

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.batch_norm:
            call = BATCH_NORM.bind(*args, **kwargs)
            call.apply_defaults()
            return _BatchNorm.apply(*call.args)  # type: ignore[no-untyped-call]
        if func is F.group_norm:  # it asks for the memory format, which vmap refuses to tell
            inputs, *rest = args or (kwargs.pop("input"),)
            args = (inputs.contiguous(), *rest)
        if func in FACTORIES:
            new = func(*args, **kwargs)
            return new + self.zero.to(new.device, new.dtype)
        if self.dtype is not None and func in MATRIX_PRODUCTS:
            args = tuple(_cast(value, self.dtype) for value in args)
            kwargs = {name: _cast(value, self.dtype) for name, value in kwargs.items()}
        elif self.dtype is not None and func is F.instance_norm:
            inputs, *rest = args or (kwargs.pop("input"),)
            return _cast(func(_cast(inputs, torch.float32), *rest, **kwargs), inputs.dtype)
        return func(*args, **kwargs)


class _BatchNorm(torch.autograd.Function):
    """K batch norms as one with K times the channels.

    vmap's own rule applies weight and bias in passes of their own and fixes the batch size. Autograd
    records what the rule below calls; there is no other way into this function.
    """

    @staticmethod
    def forward(*_: Any) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def setup_context(*_: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], inputs: Tensor, *rest: Any) -> tuple[Tensor, int]:
        *vectors, training, momentum, eps = rest
        if in_dims[0] is None:
            channels = inputs[:, None].expand(-1, info.batch_size, *inputs.shape[1:])
        else:
            channels = inputs.movedim(in_dims[0], 1)
        stacks = [
            None if vector is None else vector.movedim(dim, 0).flatten()
            for vector, dim in zip(vectors, in_dims[1:5], strict=True)
        ]
        mean, variance, weight, bias = stacks
        channels = channels.flatten(1, 2)
        output = F.batch_norm(channels, mean, variance, weight, bias, training, momentum, eps)
        return output.unflatten(1, (info.batch_size, -1)), 1


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, but no float64, which autocast leaves alone, in ``dtype``."""
    is_castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_castable else value


def _runs_alone(
    stacked: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: tuple[Any, ...]
) -> bool:
    """Whether a single copy takes these inputs, so that an error came from running K at once."""
    first = {name: t[0].clone() for name, t in {**parameters, **buffers}.items()}
    try:
        with torch.no_grad():
            functional_call(stacked, first, inputs)
    except (RuntimeError, ValueError):
        return False
    return True


def _innermost_layer(root: nn.Module, traceback: TracebackType | None) -> tuple[str, nn.Module]:
    """Path and module of the deepest layer of ``root`` that an exception passed through."""
    paths = {id(module): path for path, module in root.named_modules()}
    found: tuple[str, nn.Module] = ("", root)
    while traceback is not None:
        layer = traceback.tb_frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and id(layer) in paths:
            found = (paths[id(layer)], layer)
        traceback = traceback.tb_next
    return found
