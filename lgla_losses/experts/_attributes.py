"""Python attributes of the layers in a stack, such as caches and counters: every copy has its own."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Key under which the root of a stack holds its :class:`CopiesAttributes`.
KEY = "_attributes_of_copies"
#: Attributes that every module has; all others are the layer's own.
MODULE_INTERNALS = frozenset(vars(nn.Module()))
#: Attributes that copies do not exchange; those of recurrent layers follow the parameters.
NOT_EXCHANGED = MODULE_INTERNALS | {KEY, "_flat_weights", "_flat_weight_refs"}
CONTAINERS = (dict, list, tuple, set, deque)

#: The own attributes of every layer.
Attributes = dict[nn.Module, dict[str, Any]]


def own_attributes(layer: nn.Module) -> dict[str, Any]:
    """Give the attributes of a layer that not every module has."""
    return {name: v for name, v in vars(layer).items() if name not in MODULE_INTERNALS and name != KEY}


def read(layers: Sequence[nn.Module]) -> Attributes:
    """Read the attributes of layers that copies exchange."""
    return {
        layer: {name: value for name, value in vars(layer).items() if name not in NOT_EXCHANGED}
        for layer in layers
    }


def write(attributes: Attributes) -> None:
    """Set the attributes of layers to exactly these."""
    for layer, values in attributes.items():
        present = vars(layer)
        for name in present.keys() - values.keys() - NOT_EXCHANGED:
            del present[name]
        present.update(values)


def replaced(attributes: Attributes, memo: dict[int, Any]) -> Attributes:
    """Put the same attributes into new containers; for ``memo`` see :func:`copied`."""
    return {
        layer: {name: copied(value, memo) for name, value in values.items()}
        for layer, values in attributes.items()
    }


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy containers and the containers inside them; anything else stays the same object.

    Args:
        value: of any type.
        memo: maps the ``id`` of an object to its replacement; each container is copied once.
    """
    if id(value) in memo:
        return memo[id(value)]
    if not isinstance(value, CONTAINERS):
        return value
    if type(value) is set:
        new: Any = set(value)
    elif type(value) is list:
        new = [copied(entry, memo) for entry in value]
    elif type(value) is tuple:
        new = tuple(copied(entry, memo) for entry in value)
        new = value if all(map(operator.is_, new, value)) else new
    else:
        entries, structure = pytree.tree_flatten(value, is_leaf=lambda entry: entry is not value)
        is_known = not structure.is_leaf()
        new = pytree.tree_unflatten([copied(e, memo) for e in entries], structure) if is_known else value
    memo[id(value)] = new
    return new


def _same(value: Any, other: Any) -> bool:
    """Say whether two containers hold the same objects."""
    if value is other or type(value) is not type(other) or not isinstance(value, CONTAINERS):
        return value is other
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_same(v, other[key]) for key, v in value.items())
    if isinstance(value, set):
        return bool(value == other)
    return len(value) == len(other) and all(map(_same, value, other))


def _only(attributes: Attributes, names: Mapping[nn.Module, set[str]]) -> Attributes:
    return {
        layer: {name: value for name, value in values.items() if name in names.get(layer, ())}
        for layer, values in attributes.items()
    }


class CopiesAttributes:
    """Keep the attributes of K copies that share the layers of a stack.

    Between two calls the layers hold the attributes of the last copy, or stacks of all if the copies ran
    together. A change made between the calls, such as a cache that ``train()`` clears, changes every copy.

    Args:
        stacked: the stack.
        num_experts: number of copies ``K``.
        shared: containers that the copies have in common.
    """

    def __init__(self, stacked: nn.Module, num_experts: int, shared: Sequence[Any] = ()) -> None:
        self.stacked = stacked
        self.shared = list(shared)
        self.copies: list[Attributes] = [{} for _ in range(num_experts)]
        self.left: Attributes = {}  # as the last copy left them
        self.stacks: list[Tensor] = []  # tensors that layers keep since the copies ran together

    def __getstate__(self) -> dict[str, Any]:
        if self.stacks:
            return vars(self)
        self.follow()
        # Leave out what a user has deleted, and what only the layers know.
        differing = {
            layer: {
                name
                for name, value in values.items()
                if not all(name in own[layer] and _same(value, own[layer][name]) for own in self.copies)
            }
            for layer, values in self.left.items()
        }
        copies = [_only(attributes, differing) for attributes in self.copies]
        return vars(self) | {"copies": copies, "left": _only(self.left, differing)}

    def memo(self, old: Sequence[Tensor] = (), new: Sequence[Tensor] = ()) -> dict[int, Any]:
        """Make a memo for :func:`copied`: it replaces tensors and keeps the containers that copies share."""
        kept = {id(value): value for value in self.shared}
        return kept | {id(before): after for before, after in zip(old, new, strict=True)}

    def follow(self) -> None:
        """Pass on to every copy what has changed since the last run."""
        stacks = [(stack, stack.unbind()) for stack in self.stacks]
        differences = self._note()
        memos: list[dict[int, Any]] = [{} for _ in self.copies]
        # Only if needed: the compiler of PyTorch 2.11 does not support `id` of a tuple.
        if any(changed for changed, _ in differences.values()):
            memos = [
                self.memo([stack for stack, _ in stacks], [entries[k] for _, entries in stacks])
                for k in range(len(self.copies))
            ]

        for layer, (changed, gone) in differences.items():
            for attributes, memo in zip(self.copies, memos, strict=True):
                own = attributes.setdefault(layer, {})
                if not changed and not gone:
                    continue
                kept = {name: v for name, v in own.items() if name not in gone}
                is_last = attributes is self.copies[-1] and not stacks
                new = changed if is_last else {name: copied(v, memo) for name, v in changed.items()}
                attributes[layer] = kept | new

        self.stacks = []

    def _note(self) -> dict[nn.Module, tuple[dict[str, Any], set[str]]]:
        """Find what has changed in layers, and which attributes are gone, since the last time."""
        differences = {}
        for layer, values in read(self._layers()).items():
            left = self.left.setdefault(layer, {})
            changed = {n: v for n, v in values.items() if n not in left or not _same(v, left[n])}
            gone = left.keys() - values.keys()
            differences[layer] = changed, gone
            if changed or gone:
                for name in gone:
                    del left[name]
                left.update({name: copied(value, {}) for name, value in changed.items()})
        return differences

    @contextmanager
    def turn(self, k: int) -> Iterator[None]:
        """Give the layers the attributes of copy ``k``, and store the result of its run.

        Copies take turns in order; afterwards the layers keep the attributes of the last one.
        """
        layers, last = self._layers(), len(self.copies) - 1
        write({layer: self.copies[k][layer] for layer in layers})
        try:
            yield
        except BaseException:
            self.copies[k].update(read(layers))
            write({layer: self.copies[last][layer] for layer in layers})
            raise
        self.copies[k].update(read(layers))
        if k == last:
            self._note()

    def _layers(self) -> list[nn.Module]:
        """List the layers that exchange attributes; while compiling without PyTorch's own, to save time."""
        layers = list(self.stacked.modules())
        if torch.compiler.is_compiling():
            layers = [layer for layer in layers if not type(layer).__module__.startswith("torch.nn.")]
        return layers

    def gather(self) -> list[Tensor]:
        """Stack the tensors that copies keep, and give the stacks to the layers.

        Raises:
            ValueError: the copies keep something that cannot be stacked.
        """
        if not self.left:  # they have not run one by one
            return self.stacks

        self.follow()

        stacks: dict[int, Tensor] = {}
        for path, layer in self.stacked.named_modules():
            sets = [attributes[layer] for attributes in self.copies]
            for name in dict.fromkeys(name for values in sets for name in values):
                flat = [pytree.tree_flatten(values.get(name, KEY)) for values in sets]

                for entries in zip(*(leaves for leaves, _ in flat), strict=False):
                    if all(entry is entries[0] for entry in entries):
                        continue
                    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
                    if len(tensors) == len(entries) and len({t.shape for t in tensors}) == 1:
                        stacks[id(entries[-1])] = torch.stack(tensors)
                    elif tensors or any(entry != entries[0] for entry in entries):
                        flat = []
                        break

                if not flat or any(structure != flat[0][1] for _, structure in flat):
                    raise ValueError(
                        f"experts.together: expected attributes that can be stacked, got {name!r} of layer "
                        f"{path!r}, type {type(layer).__name__}, which differs between copies; run the "
                        "experts one by one (experts.together = False), or use layout='independent'"
                    )

        write(replaced(self.copies[-1], self.memo() | stacks))
        self.stacks = list(stacks.values())
        self.copies, self.left = [{} for _ in self.copies], {}
        return self.stacks


def hand_on(kept: CopiesAttributes | None, stacked: nn.Module | None) -> None:
    """Restore the attributes of the copies in a stack that was copied without them, as by torch.fx."""
    if kept is not None and stacked is not None:
        vars(stacked).setdefault(KEY, kept)


def attributes_of(stacked: nn.Module, num_experts: int) -> CopiesAttributes:
    """Give the attributes of the copies in a stack."""
    if KEY not in vars(stacked):
        vars(stacked)[KEY] = CopiesAttributes(stacked, num_experts)
    kept: CopiesAttributes = vars(stacked)[KEY]
    return kept
