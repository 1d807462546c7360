"""K copies of a module as one, which looks like one copy with a leading expert dimension on every tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Attributes that every module has; the others are its options.
MODULE_INTERNALS = frozenset(vars(nn.Module()))

Module = TypeVar("Module", bound=nn.Module)

#: A layer's ``_parameters`` or ``_buffers``.
Store = dict[str, Any]
#: A place in the stores of all layers: number of the store, name there.
Slot = tuple[int, str]


def stack_modules(copies: Sequence[nn.Module]) -> nn.Module:
    """The first copy, which takes the parameters and buffers of all, stacked on a new first dimension.

    Raises:
        ValueError: the copies differ in more than the values of their tensors, or a layer reads a
            parameter from elsewhere than where it is registered.
    """
    _check_exchangeable(copies[0])
    for same in zip(*(e.named_modules(remove_duplicate=False) for e in copies), strict=False):
        configurations = [_configuration(layer) for _, layer in same]
        names = dict.fromkeys(name for configuration in configurations for name in configuration)
        for name in names:
            first, *others = (configuration.get(name, configuration) for configuration in configurations)
            if any(other != first for other in others):
                path, layer = same[0]
                raise ValueError(
                    f"stage: expected experts that are alike, got layers {path!r} of type "
                    f"{type(layer).__name__} that differ in {name!r}; register a constant as a buffer, "
                    "delete what is of a batch only, or use layout='independent'"
                )
    if len({tuple(named_tensors(expert)) for expert in copies}) > 1:
        raise ValueError(
            "stage: expected experts that are alike, got parameters tied in some and not in others; "
            "use layout='independent'"
        )
    tensors = zip(*(named_tensors(expert).values() for expert in copies), strict=True)
    stacks = {t[0]: _like(t[0], torch.stack([entry.detach() for entry in t])) for t in tensors}
    stacked = copies[0]
    layers = list(stacked.modules())
    stores = stores_of(layers)
    fill(stores, exchanged(slots_of(stores), stacks))
    for layer in recurrent_layers(layers):
        layer._flat_weights = [None if t is None else stacks[t] for t in layer._flat_weights]
    return stacked


def _check_exchangeable(module: nn.Module) -> None:
    """Raise where tensors in the places of parameters and buffers would not make another copy."""
    paths = {tensor: path for path, tensor in named_tensors(module).items()}
    memory: dict[int, str] = {}
    for tensor, path in paths.items():
        pointer = tensor.data_ptr() if tensor.numel() > 0 and not tensor.is_meta else 0
        if pointer and memory.setdefault(pointer, path) != path:
            raise ValueError(
                "stage: expected parameters and buffers that are one tensor or lie apart, got "
                f"{memory[pointer]!r} and {path!r}, two tensors in one place of memory; register one tensor "
                "twice, or use layout='independent'"
            )
    for path, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"stage: expected layers of Python, got {path!r}, which is compiled; compile the whole "
                "network, or use layout='independent'"
            )
        for name, value in own_attributes(layer).items():
            is_renewed = isinstance(layer, nn.RNNBase) and name == "_flat_weights"
            for leaf in [] if is_renewed else pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf in paths:
                    raise ValueError(
                        f"stage: expected layers that read {paths[leaf]!r} from where it is registered, got "
                        f"{path!r} of type {type(layer).__name__}, which keeps it in {name!r} as well; use "
                        "an nn.ParameterList or a property there, or layout='independent'"
                    )


def _configuration(layer: nn.Module) -> dict[str, object]:
    """What must agree between copies for one of them to stand for all."""
    options = {name: _option(value) for name, value in own_attributes(layer).items()}
    for hook in layer._forward_pre_hooks.values():  # those of pruning and of the old weight norm
        options.pop(getattr(hook, "name", getattr(hook, "_tensor_name", "")), None)
    tensors = {
        name: None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad)
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items())
    }
    # By name: parametrizations make a class of their own for every module.
    kind = {"class": type(layer).__qualname__, "training": layer.training, "_modules": list(layer._modules)}
    return kind | options | tensors


def own_attributes(layer: nn.Module) -> dict[str, Any]:
    """Attributes of a layer that not every module has."""
    return {name: value for name, value in vars(layer).items() if name not in MODULE_INTERNALS}


def _option(value: object) -> object:
    """Something to compare by; objects of unknown kinds by their type alone."""
    if type(value) is Tensor and value.is_leaf and value.layout == torch.strided and not value.is_meta:
        return value.dtype, value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), value.shape
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.dtype, value.tobytes(), value.shape
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device | None):
        return value
    if isinstance(value, tuple | list):
        return [_option(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _option(entry) for name, entry in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)


def unstack_module(stacked: nn.Module, num_experts: int) -> list[nn.Module]:
    """New modules, one for every entry of the first dimension; nothing is shared."""
    tensors = named_tensors(stacked).values()
    return [
        copy_module(stacked, {id(tensor): _like(tensor, tensor[k].detach().clone()) for tensor in tensors})
        for k in range(num_experts)
    ]


def copy_module(module: Module, memo: dict[int, object] | None = None) -> Module:
    """A deep copy, also of modules that :func:`copy.deepcopy` refuses.

    What a layer keeps of a batch loses its graph. Where a hook cannot be copied, as one that holds a lock or
    a file, the copies share the hooks.

    Args:
        module: what to copy.
        memo: by the ``id`` of an object what takes its place.
    """
    leaves = (leaf for layer in module.modules() for leaf in pytree.tree_leaves(own_attributes(layer)))
    kept = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_leaf]
    memo = {id(tensor): tensor.detach().clone() for tensor in kept} | (memo or {})
    try:
        return copy.deepcopy(module, memo.copy())
    except Exception:  # of whatever kind: it is what the hooks' owners hold
        hooks = _hooks_from_outside(module)
        if not hooks:
            raise
        return copy.deepcopy(module, memo | {id(hook): hook for hook in hooks})


def _hooks_from_outside(module: nn.Module) -> list[object]:
    """Hooks of all layers but those that are methods of one."""
    layers = {id(layer): layer for layer in module.modules()}
    kinds = [name for name in MODULE_INTERNALS if name.endswith("_hooks")]
    hooks = [hook for layer in layers.values() for kind in kinds for hook in getattr(layer, kind).values()]
    return [hook for hook in hooks if id(getattr(hook, "__self__", None)) not in layers]


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


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the tree by its path, tied ones once, in a fixed order."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _like(tensor: Tensor, converted: Tensor) -> Tensor:
    """``converted`` as a parameter where ``tensor`` is one."""
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(converted, tensor.requires_grad) if is_parameter else converted


def recurrent_layers(layers: Sequence[nn.Module]) -> list[nn.RNNBase]:
    """Layers that list their weights once more, in ``_flat_weights``."""
    return [layer for layer in layers if isinstance(layer, nn.RNNBase)]


def stores_of(layers: Sequence[nn.Module]) -> list[Store]:
    """Where the layers keep parameters and buffers."""
    return [store for layer in layers for store in (layer._parameters, layer._buffers)]


def slots_of(stores: list[Store]) -> dict[Slot, Tensor | None]:
    """What stands in the stores."""
    return {(i, name): tensor for i, store in enumerate(stores) for name, tensor in store.items()}


def fill(stores: list[Store], slots: dict[Slot, Tensor | None]) -> None:
    """Put tensors into the stores."""
    for (i, name), tensor in slots.items():
        stores[i][name] = tensor


def exchanged(slots: dict[Slot, Tensor | None], tensors: dict[Tensor, Tensor]) -> dict[Slot, Tensor | None]:
    """Slots with other tensors in the places of the stacked ones; ties stay ties."""
    return {slot: None if tensor is None else tensors[tensor] for slot, tensor in slots.items()}
