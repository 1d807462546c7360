"""K copies of a module as one: parameters stacked, run together under ``torch.func.vmap``.

A stacked module looks like one copy, with a leading expert dimension on every parameter and
buffer. vmap turns its convolutions into K-fold grouped ones and knows the rule of every other
layer, so no layer needs code of its own, and channels of one expert cannot reach another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


def stack_modules(copies: Sequence[nn.Module]) -> nn.Module:
    """A new module with the copies' parameters and buffers stacked on a new first dimension.

    Raises:
        ValueError: the copies differ in more than the values of their tensors.
    """
    for layers in zip(*(expert.named_modules() for expert in copies), strict=False):
        first, *others = (_configuration(layer) for _, layer in layers)
        if any(other != first for other in others):
            path, layer = layers[0]
            raise ValueError(
                f"stage: expected experts that are alike, got layers {path!r} of type {type(layer).__name__} "
                "that differ in type, options or parameters; use layout='independent'"
            )
    slots = {id(first): rest for first, *rest in zip(*(_tensors(e) for e in copies), strict=True)}
    return _rebuild(copies[0], lambda t: torch.stack([t, *slots[id(t)]]))


def _configuration(layer: nn.Module) -> tuple[object, ...]:
    """What must agree between copies for one of them to stand for all."""
    plain = (bool, int, float, str, type(None))
    options = {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, plain)
        or (isinstance(value, tuple) and all(isinstance(entry, plain) for entry in value))
    }
    tensors = [
        (name, tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad))
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items())
    ]
    return type(layer), options, tensors, list(layer._modules)


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
