"""K copies of a module as one: it looks like one copy, with a leading expert dimension on every tensor."""

from __future__ import annotations

import copy
import functools
import gc
from collections import deque
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.utils import _pytree as pytree

from lgla_losses.experts._attributes import (
    CONTAINERS,
    KEY,
    MODULE_INTERNALS,
    CopiesAttributes,
    attributes_of,
    own_attributes,
)

#: Attributes in which modules keep hooks.
HOOKS = sorted(name for name in MODULE_INTERNALS if name.endswith("_hooks"))
#: Most objects behind an attribute that are searched for tensors.
MOST_OBJECTS = 10_000

Module = TypeVar("Module", bound=nn.Module)

#: A layer's ``_parameters`` or ``_buffers``.
Store = dict[str, Any]
#: A place in the stores of all layers: number of the store, name in it.
Slot = tuple[int, str]


def stack_modules(copies: Sequence[nn.Module]) -> nn.Module:
    """Stack the parameters and buffers of all copies on a new first dimension, in the first copy.

    Raises:
        ValueError: the copies differ in more than the values of their tensors, or a layer reads a parameter
            from another place than where it is registered.
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
                    "delete values of a single batch, or use layout='independent'"
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
    attributes = CopiesAttributes(stacked, len(copies), _shared_containers(copies))
    vars(stacked)[KEY] = attributes

    stores = stores_of(layers)
    fill(stores, exchanged(slots_of(stores), stacks))
    for layer in recurrent_layers(layers):
        layer._flat_weights = [None if t is None else stacks[t] for t in layer._flat_weights]

    attributes.follow()
    return stacked


def _check_exchangeable(module: nn.Module) -> None:
    """Raise if replacing parameters and buffers would not give another copy."""
    paths = {tensor: path for path, tensor in named_tensors(module).items()}
    memory: dict[int, str] = {}
    for tensor, path in paths.items():
        pointer = tensor.data_ptr() if tensor.numel() > 0 and not tensor.is_meta else 0
        if pointer and memory.setdefault(pointer, path) != path:
            raise ValueError(
                "stage: expected parameters and buffers that are the same tensor or have separate memory, "
                f"got {memory[pointer]!r} and {path!r}, two tensors in the same memory; register one tensor "
                "twice, or use layout='independent'"
            )

    for path, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"stage: expected layers in Python, got {path!r}, which is compiled; compile the whole "
                "network, or use layout='independent'"
            )

    seen = {id(layer) for layer in module.modules()}
    for path, layer in module.named_modules():
        hooks = {name: getattr(layer, name) for name in HOOKS}
        for name, value in (own_attributes(layer) | hooks).items():
            is_renewed = isinstance(layer, nn.RNNBase) and name == "_flat_weights"
            held = [] if is_renewed else [t for t in _reachable(value, seen) if t in paths]
            if held:
                raise ValueError(
                    f"stage: expected layers that read {paths[held[0]]!r} from where it is registered, got "
                    f"{path!r} of type {type(layer).__name__}, which also keeps it in {name!r}; use an "
                    "nn.ParameterList or a property there, or layout='independent'"
                )


def _reachable(root: object, seen: set[int]) -> list[Tensor]:
    """Find tensors that an object holds, skipping objects whose ids are in ``seen``, which grows."""
    tensors, queue, most = [], deque([root]), len(seen) + MOST_OBJECTS
    while queue and len(seen) < most:
        value = queue.popleft()
        if id(value) in seen or isinstance(value, type | ModuleType | CodeType):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, FunctionType):  # not through the global variables of its module
            queue += [value.__closure__, value.__defaults__, value.__kwdefaults__]
        else:
            queue += gc.get_referents(value)
    return tensors


def _shared_containers(copies: Sequence[nn.Module]) -> list[Any]:
    """Find containers in attributes that all copies share, such as one that the user reads."""
    held = [
        {id(v): v for layer in expert.modules() for v in own_attributes(layer).values()} for expert in copies
    ]
    common = set.intersection(*map(set, held)) if len(held) > 1 else set()
    return [value for key, value in held[0].items() if key in common and isinstance(value, CONTAINERS)]


def _configuration(layer: nn.Module) -> dict[str, object]:
    """List what must be equal in all copies, so that one can stand for all."""
    options = {name: _option(value) for name, value in own_attributes(layer).items()}
    for hook in layer._forward_pre_hooks.values():  # hooks of pruning and of the old weight norm
        options.pop(getattr(hook, "name", getattr(hook, "_tensor_name", "")), None)
    tensors = {
        name: None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad)
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items())
    }
    # By name: parametrizations make a new class for every module.
    kind = {"class": type(layer).__qualname__, "training": layer.training, "_modules": list(layer._modules)}
    return kind | options | tensors


def _option(value: object) -> object:
    """Give a value to compare by; objects of unknown kinds are compared by type only."""
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
    """Make new modules, one per entry of the first dimension; nothing is shared."""
    tensors, modules = named_tensors(stacked).values(), []
    attributes = attributes_of(stacked, num_experts)
    attributes.follow()
    for k in range(num_experts):
        own: dict[int, object] = {id(t): _like(t, t[k].detach().clone()) for t in tensors}
        with attributes.turn(k):
            module = copy_module(stacked, own | {id(attributes): None})
        vars(module).pop(KEY, None)  # a torch.fx.GraphModule does not copy unknown attributes
        modules.append(module)
    return modules


def copy_module(module: Module, memo: dict[int, object] | None = None) -> Module:
    """Copy a module deeply, even one that :func:`copy.deepcopy` refuses.

    Tensors of a batch that a layer keeps lose their graph. Hooks from outside, such as a recorder's, are
    shared.

    Args:
        module: what to copy.
        memo: maps the ``id`` of an object to its replacement.
    """
    memo = {id(hook): hook for hook in _hooks_from_outside(module)} | (memo or {})

    for layer in module.modules():
        copies = vars(layer).get(KEY)
        held = [own_attributes(layer), *(copies.copies if copies and id(copies) not in memo else ())]
        for leaf in pytree.tree_leaves(held):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo.setdefault(id(leaf), leaf.detach().clone())
    return copy.deepcopy(module, memo)


def _hooks_from_outside(module: nn.Module) -> list[object]:
    """List the hooks of all layers, except those that belong to a layer, such as its methods."""
    layers = list(module.modules())
    own = {id(value) for layer in layers for value in (layer, *own_attributes(layer).values())}
    hooks = [hook for layer in layers for kind in HOOKS for hook in getattr(layer, kind).values()]
    # A wrapper refers to its layer, so every copy has its own.
    hooks = [hook.hook if isinstance(hook, _WrappedHook) else hook for hook in hooks]
    return [hook for hook in hooks if not _belongs(hook, own)]


def _belongs(hook: object, own: set[int]) -> bool:
    """Say whether a hook is one of these objects (given by id), a method or a partial of one."""
    if isinstance(hook, functools.partial):
        parts = (hook.func, *hook.args, *hook.keywords.values())
        return any(callable(part) and _belongs(part, own) for part in parts)
    return id(hook) in own or id(getattr(hook, "__self__", hook)) in own


def apply_per_copy(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``fn`` to a stacked tensor, as :meth:`torch.nn.Module.to` does.

    A stack of 4-D weights is 5-D and has no channels_last format, although each copy has one.
    """
    try:
        return fn(tensor)
    except RuntimeError:
        if tensor.dim() != 5:
            raise
        return torch.stack([fn(entry) for entry in tensor.unbind()])


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name every parameter and buffer by its path, tied ones once, in a fixed order."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _like(tensor: Tensor, converted: Tensor) -> Tensor:
    """Make ``converted`` a parameter if ``tensor`` is one."""
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(converted, tensor.requires_grad) if is_parameter else converted


def recurrent_layers(layers: Sequence[nn.Module]) -> list[nn.RNNBase]:
    """Find layers that list their weights again, in ``_flat_weights``."""
    return [layer for layer in layers if isinstance(layer, nn.RNNBase)]


def stores_of(layers: Sequence[nn.Module]) -> list[Store]:
    """List the stores in which the layers keep parameters and buffers."""
    return [store for layer in layers for store in (layer._parameters, layer._buffers)]


def slots_of(stores: list[Store]) -> dict[Slot, Tensor | None]:
    """Read the contents of the stores."""
    return {(i, name): tensor for i, store in enumerate(stores) for name, tensor in store.items()}


def fill(stores: list[Store], slots: dict[Slot, Tensor | None]) -> None:
    """Put tensors into the stores."""
    for (i, name), tensor in slots.items():
        stores[i][name] = tensor


def exchanged(slots: dict[Slot, Tensor | None], tensors: dict[Tensor, Tensor]) -> dict[Slot, Tensor | None]:
    """Replace the stacked tensors by others; tied tensors stay tied."""
    return {slot: None if tensor is None else tensors[tensor] for slot, tensor in slots.items()}
