"""K copies of a module as one: parameters stacked, run together under ``torch.func.vmap``.

A stacked module looks like one copy, with a leading expert dimension on every parameter and
buffer. vmap turns its convolutions into K-fold grouped ones and has rules for the other layers, so
none needs code of its own but for autocast's casts, and channels of one expert cannot reach another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

#: What :class:`_AutocastUnderVmap` runs in low precision, and what in float32.
MATRIX_PRODUCTS = {
    F.linear,
    F.scaled_dot_product_attention,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.matmul,
    torch.bmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
BATCH_NORMS = {F.batch_norm, F.instance_norm}

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


def run_stacked(stacked: nn.Module, num_experts: int, inputs: Tensor) -> Tensor:
    """Run every copy on the same inputs ``[N, ...]``: ``[K, N, ...]``.

    Random layers draw independently per copy, and every copy updates its own running statistics.

    Raises:
        ValueError: a layer has no rule under vmap; the message names its path and type.
    """
    parameters: dict[str, Tensor] = dict(stacked.named_parameters())
    buffers = dict(stacked.named_buffers())

    def one_copy(_: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        with _autocast(inputs.device.type):
            return functional_call(stacked, (parameters, buffers), (inputs,))  # type: ignore[no-any-return]

    # The index gives vmap its size also where a stage has no parameters.
    index = torch.arange(num_experts, device=inputs.device)
    try:
        return vmap(one_copy, randomness="different")(index, parameters, buffers)
    except (RuntimeError, ValueError) as error:
        if torch.compiler.is_compiling() or not _runs_alone(stacked, parameters, buffers, inputs):
            raise
        path, layer = _innermost_layer(stacked, error.__traceback__)
        raise ValueError(
            f"stage: layer {path!r} of type {type(layer).__name__} cannot run grouped ({error}); "
            "use layout='independent'"
        ) from error


def _autocast(device_type: str) -> AbstractContextManager[object]:
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return _AutocastUnderVmap(torch.get_autocast_dtype(device_type))


class _AutocastUnderVmap(TorchFunctionMode):
    """Casts what autocast no longer sees once vmap has unfolded it.

    Convolutions and matrix products take low precision; batch norms, whose unfolded form takes no mixed
    one, float32, and give back what they got.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in MATRIX_PRODUCTS:
            args = tuple(_cast(value, self.dtype) for value in args)
            kwargs = {name: _cast(value, self.dtype) for name, value in kwargs.items()}
        elif func in BATCH_NORMS:
            inputs, *rest = args or (kwargs.pop("input"),)
            return _cast(func(_cast(inputs, torch.float32), *rest, **kwargs), inputs.dtype)
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, but no float64, which autocast leaves alone, in ``dtype``."""
    is_castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_castable else value


def _runs_alone(
    stacked: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor
) -> bool:
    """Whether a single copy takes these inputs, so that an error came from running K at once."""
    first = {name: t[0].clone() for name, t in {**parameters, **buffers}.items()}
    try:
        with torch.no_grad():
            functional_call(stacked, first, (inputs,))
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
