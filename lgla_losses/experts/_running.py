"""Run K stacked copies of a module: together, or one after another.

Together they run under ``torch.func.vmap``, which turns convolutions into K-fold grouped ones and has rules
for the other layers. Only batch norm needs its own code, and channels of one expert cannot reach another. One
after another, they take turns in the layers of the stack.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from lgla_losses._torch import is_wrapped
from lgla_losses.experts._attributes import attributes_of, own_attributes, read, replaced, write
from lgla_losses.experts._stacking import (
    Slot,
    exchanged,
    fill,
    named_tensors,
    recurrent_layers,
    slots_of,
    stores_of,
)

#: Functions that autocast runs in low precision, for :class:`_UnderVmap`.
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
#: Functions that make new tensors, which layers fill with random numbers; see :class:`_UnderVmap`.
FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}
#: Functions that turn a tensor into a Python value; see :class:`_UnderVmap`.
READERS = {Tensor.__bool__, Tensor.__float__, Tensor.__index__, Tensor.__int__, Tensor.item, Tensor.tolist}
BATCH_NORM = inspect.signature(F.batch_norm)

#: Stacked buffers, and those of their copies; see :func:`_entries`.
ENTRIES: MutableMapping[Tensor, tuple[Tensor, ...]] = WeakTensorKeyDictionary()


def _path(layers: Sequence[nn.Module], slot: Slot) -> str:
    """Give the path of a parameter or buffer."""
    paths = [path for path, _ in layers[0].named_modules()]
    return f"{paths[slot[0] // 2]}.{slot[1]}".removeprefix(".")


def run_separately(stacked: nn.Module, num_experts: int, inputs: tuple[Any, ...]) -> list[Any]:
    """Run the copies one after another on the same inputs: K outputs.

    Raises:
        ValueError: the forward pass changes parameters or buffers in a way that a stack cannot keep.
    """
    layers = list(stacked.modules())
    entries: dict[Tensor, Sequence[Tensor]] = {p: p.unbind() for p in stacked.parameters()}
    # Every copy updates its own running statistics through these.
    entries |= {buffer: _entries(buffer) for buffer in stacked.buffers()}
    in_memory = {tensor: copies for tensor, copies in entries.items() if _is_in_memory(copies[0])}

    attributes = attributes_of(stacked, num_experts)
    attributes.follow()

    outputs, changes = [], []
    for k in range(num_experts):
        addresses = [copies[k].data_ptr() for copies in in_memory.values()]
        try:
            with attributes.turn(k):
                output, changed = _run_copy(layers, {t: copies[k] for t, copies in entries.items()}, inputs)
        except RuntimeError as error:
            if "of Unbind" not in str(error):
                raise
            path, layer = _innermost_layer(stacked, error.__traceback__)
            raise ValueError(
                f"stage: expected parameters that forward reads, got layer {path!r} of type "
                f"{type(layer).__name__}, which writes into a parameter; write into its .data there, or use "
                "layout='independent'"
            ) from error
        for (tensor, copies), address in zip(in_memory.items(), addresses, strict=True):
            if copies[k].data_ptr() != address:  # its .data is another tensor now
                tensor.data[k].copy_(copies[k].data)
        outputs.append(output)
        changes.append(changed)

    slots = slots_of(stores_of(layers))
    for slot in dict.fromkeys(slot for changed in changes for slot in changed):
        old = slots.get(slot)
        new = [changed.get(slot, None if old is None else old[k]) for k, changed in enumerate(changes)]
        _replace(layers, slot, new)
    return outputs


def _entries(buffer: Tensor) -> Sequence[Tensor]:
    """Give a buffer of every copy, in the memory of the stack.

    Autograd counts the writes into each of them separately, from one call to the next. With plain views it
    would refuse what one copy saved for backward as soon as the next copy writes into its own buffer.
    """
    views = buffer.unbind()
    if not _is_in_memory(views[0]) or torch.is_inference_mode_enabled():
        return views
    known = ENTRIES.get(buffer, ())
    if [entry.data_ptr() for entry in known] != [view.data_ptr() for view in views]:
        known = ENTRIES[buffer] = tuple(view.data for view in views)
    return known


def _is_in_memory(tensor: Tensor) -> bool:
    """Say whether a tensor has memory; it has none inside a compiler, an exporter or torch.func."""
    seen = torch.compiler.is_compiling() or is_tracing() or type(tensor) not in (Tensor, nn.Parameter)
    return not seen and not is_wrapped(tensor)


def is_tracing() -> bool:
    """Say whether :func:`torch.jit.trace` is running, as for TensorBoard; it cannot trace vmap."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _replace(layers: Sequence[nn.Module], slot: Slot, entries: Sequence[Tensor | None]) -> None:
    """Replace a buffer by a new stack."""
    tensors = [entry for entry in entries if entry is not None]
    kinds = {(tensor.shape, tensor.dtype) for tensor in tensors}
    if len(kinds) > 1 or len(tensors) < len(entries):
        raise ValueError(
            "stage: expected the same shape and dtype in every copy, got different ones for buffer "
            f"{_path(layers, slot)!r}; use layout='independent'"
        )
    store, name = slot
    stores_of(layers)[store][name] = torch.stack(tensors)


def _run_copy(
    layers: Sequence[nn.Module], tensors: dict[Tensor, Tensor], inputs: tuple[Any, ...]
) -> tuple[Any, dict[Slot, Tensor]]:
    """Run one copy: give its output, and the new tensors that replace buffers.

    It does not use :func:`torch.func.functional_call`, which swaps the tensors of a layer with two paths
    twice, so that they stay swapped, and which refuses to be traced.

    Args:
        layers: the layers of the stack, each once, the stack itself first.
        tensors: the tensors of the copy, for every parameter and buffer of the stack.
        inputs: the inputs of the copies.
    """
    stores, weights = stores_of(layers), [(layer, layer._flat_weights) for layer in recurrent_layers(layers)]
    slots = slots_of(stores)
    own = exchanged(slots, tensors)
    try:
        fill(stores, own)
        output = layers[0](*inputs)
        changed = {slot: t for slot, t in slots_of(stores).items() if t is not own.get(slot)}
    finally:
        for i, name in slots_of(stores).keys() - slots.keys():
            del stores[i][name]
        fill(stores, slots)
        for layer, flat_weights in weights:
            layer._flat_weights = flat_weights

    new = {slot: t for slot, t in changed.items() if t is not None and not t.requires_grad}
    for slot in changed:
        if slot not in new or isinstance(slots.get(slot), nn.Parameter):
            raise ValueError(
                "stage: expected a forward pass that keeps its parameters and sets buffers to tensors "
                f"without a graph, got one that sets {_path(layers, slot)!r} to something else; write into "
                "it by .copy_() under torch.no_grad(), or use layout='independent'"
            )
    return output, new


def run_together(stacked: nn.Module, num_experts: int, inputs: tuple[Any, ...]) -> Tensor:
    """Run the copies together on the same inputs: one output ``[K, ...]``.

    Random layers draw independently per copy, and every copy updates its own running statistics. Tensors in
    attributes of layers are stacked too.

    Raises:
        ValueError: a layer has no rule under vmap; the message names its path and type.
    """
    layers, tensors = list(stacked.modules()), list(named_tensors(stacked).values())
    device = next(value.device for value in inputs if isinstance(value, Tensor))
    slots: list[Slot] = []
    under_vmap: list[Tensor] = []
    copies = None if torch.compiler.is_compiling() else attributes_of(stacked, num_experts)
    stacks = [] if copies is None else copies.gather()
    attributes = {} if copies is None else read(layers)

    def one_copy(
        index: Tensor, entries: list[Tensor], kept: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        before = set(_kept_tensors(layers))
        if copies is not None:
            write(replaced(attributes, copies.memo(stacks, kept)))
        with _UnderVmap(index):
            output, buffers = _run_copy(layers, dict(zip(tensors, entries, strict=True)), inputs)
        slots.extend(buffers)
        under_vmap.extend(dict.fromkeys(t for t in _kept_tensors(layers) if t not in before))
        return output, list(buffers.values()), under_vmap

    # The index gives vmap its size even if a stage has no parameters.
    index = torch.arange(num_experts, device=device)
    try:
        output, buffers, kept = vmap(one_copy, randomness="different")(index, tensors, stacks)
    except BaseException as error:
        write(attributes)
        is_known = isinstance(error, RuntimeError | ValueError) and not isinstance(
            error, torch.OutOfMemoryError
        )
        if copies is None or not is_known or not _runs_alone(stacked, tensors, stacks, inputs):
            raise
        path, layer = _innermost_layer(stacked, error.__traceback__)
        raise ValueError(
            f"stage: layer {path!r} of type {type(layer).__name__} cannot run grouped ({error}); run the "
            "experts one by one (experts.together = False), or use layout='independent'"
        ) from error

    for slot, entries in zip(slots, buffers, strict=True):
        _replace(layers, slot, entries.unbind())

    if copies is not None:
        # What a shared container kept under vmap cannot be used outside.
        useless = set(map(id, under_vmap))
        copies.shared = [v for v in copies.shared if useless.isdisjoint(map(id, pytree.tree_leaves(v)))]
        write(replaced(read(layers), copies.memo(under_vmap, kept)))
        copies.stacks = kept
    return output


def _kept_tensors(layers: Sequence[nn.Module]) -> list[Tensor]:
    """Find tensors of a batch in the layers' attributes; not while compiling."""
    if torch.compiler.is_compiling():
        return []
    attributes = (value for layer in layers for value in own_attributes(layer).values())
    held = [value for value in attributes if isinstance(value, Tensor | list | tuple | dict)]
    return [leaf for leaf in pytree.tree_leaves(held) if isinstance(leaf, Tensor)]


class _UnderVmap(TorchFunctionMode):
    """Handle what vmap handles badly: batch norms, fills, values that are read, and casts of autocast.

    New tensors are made once per copy, so that each copy fills its own. A tensor read as a Python value must
    be the same in all copies, such as the number of batches that a norm has seen. Convolutions and matrix
    products run in low precision. Instance norms run in float32, because their unfolded form takes no mixed
    precision, and return the dtype of their input.

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
        if func is F.group_norm:  # it asks for the memory format, which fails under vmap
            inputs, *rest = args or (kwargs.pop("input"),)
            args = (inputs.contiguous(), *rest)

        if func in FACTORIES:
            new = func(*args, **kwargs)
            return new + self.zero.to(new.device, new.dtype)
        if func in READERS:
            value, *rest = args
            return func(_Agreed.apply(value), *rest)  # type: ignore[no-untyped-call]

        if self.dtype is not None and func in MATRIX_PRODUCTS:
            args = tuple(_cast(value, self.dtype) for value in args)
            kwargs = {name: _cast(value, self.dtype) for name, value in kwargs.items()}
        elif self.dtype is not None and func is F.instance_norm:
            inputs, *rest = args or (kwargs.pop("input"),)
            return _cast(func(_cast(inputs, torch.float32), *rest, **kwargs), inputs.dtype)
        return func(*args, **kwargs)


class _BatchNorm(torch.autograd.Function):
    """Run K batch norms as one with K times the channels.

    vmap's own rule applies weight and bias in separate passes and fixes the batch size. Autograd records what
    the rule below calls; this function is not called in another way.
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
        mean, variance, weight, bias = (
            None if vector is None else vector.movedim(dim, 0).flatten()
            for vector, dim in zip(vectors, in_dims[1:5], strict=True)
        )
        channels = channels.flatten(1, 2)
        output = F.batch_norm(channels, mean, variance, weight, bias, training, momentum, eps)
        return output.unflatten(1, (info.batch_size, -1)), 1


class _Agreed(torch.autograd.Function):
    """Give the tensor that is the same in all copies; outside of vmap the tensor itself.

    Not differentiable: its value is read.
    """

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def setup_context(*_: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], tensor: Tensor) -> tuple[Tensor, None]:
        entries = tensor.detach().movedim(in_dims[0], 0)
        if (entries != entries[:1]).any():
            raise ValueError("it reads a value that differs between the copies")
        return entries[0], None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors to ``dtype``, except float64, which autocast does not change."""
    is_castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_castable else value


def _runs_alone(
    stacked: nn.Module, tensors: Sequence[Tensor], stacks: Sequence[Tensor], inputs: tuple[Any, ...]
) -> bool:
    """Say whether a single copy takes these inputs, so that an error came from running K together."""
    layers = list(stacked.modules())
    attributes = read(layers)
    write(replaced(attributes, {id(stack): stack[0] for stack in stacks}))
    try:
        with torch.no_grad():
            _run_copy(layers, {tensor: tensor[0].clone() for tensor in tensors}, inputs)
    except (RuntimeError, ValueError):
        return False
    finally:
        write(attributes)
    return True


def _innermost_layer(root: nn.Module, traceback: TracebackType | None) -> tuple[str, nn.Module]:
    """Find the path and module of the deepest layer of ``root`` that an exception passed through."""
    paths = {id(module): path for path, module in root.named_modules()}
    found: tuple[str, nn.Module] = ("", root)
    while traceback is not None:
        layer = traceback.tb_frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and id(layer) in paths:
            found = (paths[id(layer)], layer)
        traceback = traceback.tb_next
    return found
