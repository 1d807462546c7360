"""Split a network into the trunk that experts share and the stage that each expert copies.

:mod:`torch.fx` traces the network's code, but only that of the modules around the split point and around the
classifier; every other module stays a call in the traced graph. So one mechanism serves torchvision, timm,
transformers and your own networks, and their layers need not be traceable.
"""

from __future__ import annotations

import inspect
import math
import operator
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lgla_losses._checks import describe
from lgla_losses.experts._stacking import copy_module

#: Modules, functions and methods that may follow a classifier.
FOLLOWING_MODULES = (nn.Identity, nn.Flatten, nn.Softmax, nn.LogSoftmax)
#: How to give a network of timm without a classifier one; part of errors.
BEHIND = "nn.Sequential(model, nn.Linear(model.num_features, C))"
#: Calls that may stand between a convolution that classifies and the output.
POOLING_MODULES = (nn.Identity, nn.Flatten, nn.Dropout, nn.ReLU, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
#: Calls that leave features ``[N, d]`` unchanged.
RESHAPING_CALLS = {torch.flatten, torch.squeeze, "flatten", "squeeze"}
FOLLOWING_CALLS = RESHAPING_CALLS | {
    *(torch.softmax, torch.log_softmax, F.softmax, F.log_softmax, "softmax", "log_softmax")
}
#: Products and quotients, with which code scales its logits.
PRODUCTS = {*(operator.mul, operator.imul, torch.mul), *("mul", "mul_")}
QUOTIENTS = {*(operator.truediv, operator.itruediv, torch.div), *("div", "div_")}


class BackbonePart(fx.GraphModule):
    """Run the trunk or the stage of a network: its modules, called as the network's code calls them."""

    @property
    def num_features(self) -> int | None:
        """Give the number of features of a stage after pooling; None if it is unknown."""
        width: int | None = self.meta.get("num_features")
        return width

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (*super().__reduce__(), self.meta)


def _unpickle(rebuild: Callable[..., fx.GraphModule], arguments: Any, meta: dict[str, Any]) -> BackbonePart:
    plain = rebuild(*arguments)
    part = BackbonePart(plain, plain.graph)
    part.meta.update(meta)
    return part


def split_backbone(
    model: nn.Module, at: str, *, head: str | None = "auto"
) -> tuple[BackbonePart, BackbonePart]:
    """Split a network into a shared trunk and the stage that every expert copies.

    The stage is the module at ``at`` and everything that depends on its output, up to the classifier, which
    is dropped; the trunk is the rest. Pooling, norms and class tokens after the last block stay in the stage.
    For a transformers model the encoder is used, and its tokens are averaged where its ``attention_mask`` is
    1; with the path of its classifier as ``head`` it keeps its own pooling.

    Trunk and stage hold the network's modules, not copies, and keep its weights. Experts made by
    ``GroupConvExperts(stage, ..., reset=False)`` keep them too. For experts with new weights, initialised as
    the network initialises itself, make a new stage for each: ``GroupConvExperts(lambda:
    split_backbone(make_network(), at)[1], ...)``.

    Source: Fig. 3 and section 4.2; the authors' code starts the stage of ResNet-50 at ``"layer3"``.

    Args:
        model: a network that takes one tensor and returns one, such as those of torchvision or timm, or a
            text encoder of transformers, with or without a head.
        at: dotted path of the module that starts the stage, as in ``model.named_modules()``.
        head: dotted path of the classifier. ``"auto"`` takes the linear layer that gives the output, whatever
            its name, or your own layer with one weight matrix, such as a normalised one; a factor after it,
            as in ``linear(x) * s``, is removed with it. None says that there is no classifier, as in timm
            with ``num_classes=0``. For a transformers model both mean its encoder; a model for images needs
            the path.

    Returns:
        ``(trunk, stage)``. ``trunk(images)`` or ``trunk(input_ids, attention_mask)`` returns what the stage
        takes, a tensor or a tuple of several values; ``experts(trunk(...))`` works with both. With ``head``
        given, the trunk also takes ``token_type_ids`` if the model does. The keys of their ``state_dict`` are
        the network's.

    Raises:
        TypeError: ``model`` is not a module, or a path is not a string.
        ValueError: there is no module at a path, or forward does not call it; the classifier cannot be found;
            the code around the split point cannot be traced, or does something that the parts would not
            repeat: it draws random numbers, switches gradients off, or writes into a value that is read
            elsewhere.

    Example:
        >>> from lgla_losses import GroupConvExperts
        >>> network = nn.Sequential(
        ...     *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)),
        ...     *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000)),
        ... )
        >>> trunk, stage = split_backbone(network, "2")
        >>> experts = GroupConvExperts(stage, num_experts=3, num_classes=10, reset=False)
        >>> experts(trunk(torch.randn(4, 3, 9, 9))).logits.shape
        torch.Size([4, 3, 10])
    """
    check_network(model)
    wrap: type[Network] = Network
    if is_transformers_model(model):
        if head in ("auto", None) or model.base_model is model:
            return _split_text_encoder(model, at, head)
        wrap = _wrapper_of(model)

    check_path("at", model, at)
    if head is not None and head != "auto":
        check_path("head", model, head)

    if head is None or getattr(model, "num_classes", None) == 0:  # how timm marks a network without one
        root, graph = _trace(model, _ancestors(at))
        return _divide(graph, root, at, _output(graph, model), getattr(model, "num_features", None))

    if head == "auto":
        root, graph, classifier = trace_to_classifier(model, at)
    else:
        opened = _ancestors(at) | {path for path in _ancestors(head) if not is_below(path, at)}
        root, graph = _trace(model, opened, wrap)
        classifier = _call_of(graph, "head", head)

    layer = root.get_submodule(str(classifier.target))
    sizes = sizes_of_classifier(layer)
    width = sizes[0] if sizes else getattr(layer, "in_features", None)
    return _divide(graph, root, at, classifier.all_input_nodes[0], width)


def split_off_classifier(model: nn.Module, head: str) -> BackbonePart:
    """Give the part of a network before its classifier, without later changes to the logits."""
    root, graph = _trace(model, _ancestors(head))
    features = _call_of(graph, "head", head).all_input_nodes[0]
    alive = _needed_for(graph, features)
    _check_replay(list(graph.nodes), root, alive, set())
    nodes = [node for node in graph.nodes if node in alive]
    return _part(root, [], nodes, [features])


def check_network(model: nn.Module) -> None:
    """Raise unless this is a module whose code can be read."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model: expected a plain network, got a {type(model).__name__}; split it before compiling"
        )


def is_transformers_model(model: nn.Module) -> TypeGuard[Any]:
    """Say whether the class of this model is one of transformers, if that is imported."""
    transformers: Any = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _split_text_encoder(model: Any, at: str, head: str | None) -> tuple[BackbonePart, BackbonePart]:
    """Split the encoder of a transformers model, without its heads, with mask-aware pooling."""
    encoder = model.base_model
    if encoder.main_input_name != "input_ids" or encoder.config.is_encoder_decoder:
        raise ValueError(
            "model: expected a text encoder if it is a model of transformers, got a "
            f"{type(model).__name__}, "
            + (
                "which has a decoder; pass its encoder"
                if encoder.config.is_encoder_decoder
                else f"which takes {encoder.main_input_name}; pass the path of its classifier as head=, or "
                "use a network of torchvision or timm"
            )
        )
    if head not in ("auto", None):
        raise ValueError(
            "head: expected 'auto' or None for a model of transformers, whose encoder is used without its "
            f"heads, got {head!r}"
        )

    if isinstance(at, str) and encoder is not model:
        at = at.removeprefix(f"{model.base_model_prefix}.")
    check_path("at", encoder, at)
    root, graph = _trace(encoder, _ancestors(at), TextEncoder)
    return _divide(graph, root, at, _output(graph, encoder), encoder.config.hidden_size)


class Network(nn.Module):
    """Call a network with its one input; optional inputs keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """Return the output of the network."""
        return self.model(images)


class TextEncoder(Network):
    """Call an encoder of transformers and average its tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Give features ``[N, d]`` of token ids ``[N, L]`` and a mask ``[N, L]`` that is 0 at padding."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return mean_of_tokens(output.last_hidden_state, attention_mask)


class ImageClassifier(Network):
    """Call an image classifier of transformers."""

    def forward(self, pixel_values: Tensor) -> Any:
        """Return the logits."""
        return self.model(pixel_values=pixel_values).logits


class TextClassifier(Network):
    """Call a text classifier of transformers."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Return the logits of token ids ``[N, L]`` and a mask ``[N, L]`` that is 0 at padding."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class PairClassifier(Network):
    """Call a text classifier of transformers that can distinguish two sentences."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Any:
        """Return the logits; ``token_type_ids`` ``[N, L]`` say which sentence a token belongs to."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.model(**inputs).logits


def _wrapper_of(model: Any) -> type[Network]:
    """Choose how a classifier of transformers is called."""
    if model.main_input_name == "pixel_values":
        return ImageClassifier
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    return PairClassifier if takes_types else TextClassifier


def mean_of_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Average the tokens ``[N, L, d]`` that a mask ``[N, L]`` keeps to ``[N, d]``; 0 if it keeps none."""
    if mask is None:
        return tokens.mean(dim=1)
    kept = mask.to(tokens.dtype)[..., None]
    return (tokens * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


fx.wrap("mean_of_tokens")


def check_path(name: str, model: nn.Module, path: str) -> None:
    """Raise unless there is a module; the message lists the names at the wrong part of the path."""
    if not isinstance(path, str):
        raise TypeError(f"{name}: expected the dotted path of a module, got {describe(path)}")
    parent, known = model, ""
    for part in path.split("."):
        children = dict(parent.named_children())
        if part not in children:
            near = get_close_matches(path, [p for p, _ in model.named_modules() if p], n=1)
            raise ValueError(
                f"{name}: expected the path of a module of {type(model).__name__}, got {path!r}; there "
                f"{'are ' + ', '.join(known + child for child in children) if children else 'is none below'}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        parent, known = children[part], f"{known}{part}."


def _ancestors(path: str | None) -> set[str]:
    """Give ``{"", "a", "a.b"}`` for ``"a.b.c"``."""
    parts = (path or "").split(".")
    return {".".join(parts[:i]) for i in range(len(parts))}


def is_below(path: str, other: str) -> bool:
    """Say whether a path equals another, or names a module below it."""
    return f"{path}.".startswith(f"{other}.")


class _Value(nn.Module):
    """Give a graph an object of the network's code, such as a configuration."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> object:
        return self.value


class _Mode(nn.Module):
    """Give a graph the value of ``self.training`` when it runs, not when it was traced."""

    def forward(self) -> bool:
        return self.training


def _context() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


class _Tracer(fx.Tracer):
    """Trace into the given modules and no others."""

    def __init__(self, opened: Iterable[str] = (), leaves: Iterable[ModuleType] = ()) -> None:
        super().__init__(autowrap_modules=(math, *leaves))  # type: ignore[arg-type]
        self.opened = opened
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:  # made during the call, as by nn.ReLU()(x)
            if next(mod.parameters(), None) is not None:
                raise
            path: str = self.get_fresh_qualname("_made")
            self.root.add_module(path, mod)
            return path

    def to_bool(self, obj: fx.Proxy) -> bool:
        # Inputs have the dtype of the weights: transformers compares the two and converts.
        operands = [getattr(value, "node", value) for value in obj.node.args]
        left = operands[0] if operands else None
        if obj.node.target is operator.ne and isinstance(left, fx.Node) and left.args[1:] == ("dtype",):
            return False
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        # fx would make a new configuration at every run, and lose what was set on it.
        if is_dataclass(a) and not isinstance(a, type):
            path = self.get_fresh_qualname("_value")
            setattr(self.root, path, _Value(a))
            return self.create_node("call_module", path, (), {})
        return super().create_arg(a)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise RuntimeError("it switches gradients or autocast on or off, and a graph cannot keep that")
        return super().create_node(kind, *args, **kwargs)


def _trace(model: nn.Module, opened: set[str], wrap: type[Network] = Network) -> tuple[Network, fx.Graph]:
    """Trace the calls of a network and what they refer to, with ``self.training`` left open."""
    modules = {f"model.{path}".rstrip("."): model.get_submodule(path) for path in sorted(opened)}
    files = {type(module).__module__ for module in modules.values()}
    # Functions of transformers, which build masks for example, become calls like its modules.
    leaves = [sys.modules[name] for name in sorted(files) if name.startswith("transformers.")]
    traces = []

    for training in (True, False):
        root, random_state = wrap(model), _random_state()
        try:
            with _in_mode(modules.values(), training):
                traces.append((root, _Tracer({"", *modules}, leaves).trace(root)))
            if _random_state() != random_state:
                raise RuntimeError("it draws random numbers, which tracing would fix")
        except Exception as error:  # any kind, because the network's code runs here
            names = ", ".join(type(module).__name__ for module in modules.values())
            raise ValueError(
                "model: expected code that torch.fx can trace in the modules around the split point and "
                f"the classifier ({names}), got {type(error).__name__}: {error}; split elsewhere, or write "
                "trunk and stage as your own modules"
            ) from error

    (root, graph), (other_root, other_graph) = traces
    _leave_mode_open(root, graph, other_root, other_graph)
    root.add_module("_mode", _Mode())
    _see_through_wrappers(graph)
    return root, graph


def _random_state() -> tuple[object, ...]:
    # A network's code would draw from the global generators.
    numpy_state = pickle.dumps(np.random.get_state())  # noqa: NPY002
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()


@contextmanager
def _in_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Set the modules' own flags, not those of the modules below them; undo what their code assigns.

    Their hooks do not run in a trace, because they expect values.
    """
    before = [(module, dict(vars(module))) for module in modules]
    try:
        for module, _ in before:
            module.training = training
            vars(module).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _leave_mode_open(root: Network, train: fx.Graph, other: Network, evaluation: fx.Graph) -> None:
    """Let the first graph read the mode when it runs, wherever the graphs differ by True and False."""
    mode: fx.Node | None = None

    # Graphs of different lengths differ at the output of the shorter one at the latest.
    for node, twin in zip(list(train.nodes), list(evaluation.nodes), strict=False):
        values, spec = pytree.tree_flatten((node.args, node.kwargs))
        others, other_spec = pytree.tree_flatten((twin.args, twin.kwargs))

        reads_mode = [pair == (True, False) for pair in zip(values, others, strict=False)]
        alike = all(r or str(v) == str(o) for r, v, o in zip(reads_mode, values, others, strict=False))
        if alike and node.op == twin.op == "get_attr":
            value, twins_value = (
                operator.attrgetter(str(n.target))(r) for n, r in ((node, root), (twin, other))
            )
            alike = value is twins_value or torch.equal(value, twins_value)

        if not alike or (node.op, node.target, spec) != (twin.op, twin.target, other_spec):
            raise ValueError(
                "model: expected the same calls in train and in eval mode around the split point and the "
                f"classifier, got {_told_difference(node, twin)}, for example of an auxiliary classifier; "
                "switch it off, or write trunk and stage as your own modules"
            )

        if any(reads_mode):
            if mode is None:
                with train.inserting_before(next(iter(train.nodes))):
                    mode = train.create_node("call_module", "_mode")
            values = [mode if r else value for r, value in zip(reads_mode, values, strict=True)]
            node.args, node.kwargs = pytree.tree_unflatten(values, spec)


def _told_difference(train: fx.Node, evaluation: fx.Node) -> str:
    """Name the first call that differs between the modes."""
    told = [_told_call(node) for node in (train, evaluation)]
    if told[0] == told[1]:
        return f"{told[0]} with other inputs in each"
    return f"first {told[0]} in train mode and {told[1]} in eval mode"


def _told_call(node: fx.Node) -> str:
    """Describe a call in the names of the network's code."""
    if node.op == "output":
        return "the output"
    kind = {"call_module": "the module", "get_attr": "the tensor"}.get(node.op, "the function")
    name = str(getattr(node.target, "__name__", node.target)).removeprefix("model.")
    return f"{kind} {name!r}"


def _see_through_wrappers(graph: fx.Graph) -> None:
    """Remove output classes that are only read again: they would keep an unused pooler."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is getattr:
            wrapper, field = node.args
            if isinstance(wrapper.target, type) and isinstance(wrapper.kwargs.get(field), fx.Node):
                node.replace_all_uses_with(wrapper.kwargs[field])


def _output(graph: fx.Graph, model: nn.Module) -> fx.Node:
    """Find the call that gives the network's output."""
    node = next(iter(reversed(graph.nodes))).args[0]
    if not isinstance(node, fx.Node):
        raise ValueError(
            f"model: expected a network that returns one tensor, got one that returns {_told_values(node)}; "
            f"{told_last_layers(model)}; pass the classifier's path as head=, or wrap the network in a "
            "module that picks the tensor"
        )
    return node


def _told_values(values: object) -> str:
    """Describe what a network returns instead of a tensor; tensors in it have no values yet."""
    if isinstance(values, Mapping):
        return f"a dict of {', '.join(map(repr, values))}"
    return f"{len(values)} values" if isinstance(values, list | tuple) else describe(values)


def _call_of(graph: fx.Graph, name: str, path: str) -> fx.Node:
    """Find the first call of a module."""
    target = f"model.{path}"
    calls: list[fx.Node] = [n for n in graph.nodes if n.op == "call_module" and n.target == target]
    if not calls:
        called = sorted(
            str(n.target).removeprefix("model.")
            for n in graph.nodes
            if n.op == "call_module" and str(n.target).startswith("model.")
        )
        raise ValueError(
            f"{name}: expected a module that the network's forward calls, got {path!r}, which it does not "
            f"call; it calls {', '.join(called)}"
        )
    return calls[0]


def _called(node: fx.Node, root: Network) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def trace_to_classifier(model: nn.Module, at: str = "") -> tuple[Network, fx.Graph, fx.Node]:
    """Trace a network, and find the call of the linear layer that gives its output."""
    opened = _ancestors(at)
    while True:
        root, graph = _trace(model, opened)
        node = _output(graph, model)
        module = _called(node, root)
        while (before := _seen_through(node, module)) is not None:
            node = before
            module = _called(node, root)

        if module is not None and sizes_of_classifier(module) is not None:
            return root, graph, node
        path = str(node.target).removeprefix("model.")
        if module is None or not list(module.children()) or is_below(path, at):
            _refuse_convolution(model, root, node)
            raise ValueError(
                "head: expected a network whose output comes from a linear layer, got "
                f"{type(model).__name__}, whose output comes from "
                f"{node.name.removeprefix('model_')!r}{_told_sources(node, model)}; pass the classifier's "
                "path as head=, or head=None to split_backbone if there is no classifier or it was removed "
                "(timm: model.reset_classifier(0))"
            )

        opened = opened | {path}


def _seen_through(node: fx.Node, module: nn.Module | None) -> fx.Node | None:
    """Give the input of a call that may follow a classifier; None for another call."""
    if isinstance(module, FOLLOWING_MODULES) or node.target in FOLLOWING_CALLS:
        return node.all_input_nodes[0]
    return scaled_by_constant(node)


def scaled_by_constant(node: fx.Node) -> fx.Node | None:
    """Give the input of a call that scales it by a number or by parameters; None for another call."""
    if len(node.args) != 2 or node.kwargs:
        return None
    pairs = [node.args]
    if node.target in PRODUCTS:
        pairs.append(node.args[::-1])
    elif node.target not in QUOTIENTS:
        return None

    for value, factor in pairs:
        if isinstance(value, fx.Node) and _reads_input(value) and not _reads_input(factor):
            return value
    return None


def _reads_input(value: object) -> bool:
    """Say whether a value depends on the input of the network."""
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in seen:
            if node.op == "placeholder":
                return True
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return False


def sizes_of_classifier(layer: nn.Module) -> tuple[int, int] | None:
    """Find how many features a classifier takes and how many classes it gives; None for other layers.

    A classifier is a linear layer, or a layer without sublayers and with one weight matrix, its dimensions in
    any order, such as the normalised layers of research code. These are tried on tensors without values.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features

    parameters = list(layer.parameters(recurse=False))
    if list(layer.children()) or any(is_lazy(parameter) for parameter in parameters):
        return None
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    if len(matrices) != 1 or any(parameter.dim() > 2 for parameter in parameters):
        return None

    rows, columns = matrices[0].shape
    for inputs, outputs in ((rows, columns), (columns, rows)):
        samples = torch.empty(3, inputs, dtype=matrices[0].dtype, device="meta")
        if inputs > 1 and _shape_given(layer, samples) == (3, outputs):
            return inputs, outputs
    return None


@torch.no_grad()
def _shape_given(layer: nn.Module, samples: Tensor) -> tuple[int, ...] | None:
    """Give the shape of a layer's output for samples on meta, without its hooks; None if it fails."""
    tensors = (*layer.parameters(), *layer.buffers())
    try:
        # A copy without values: the memo already holds the copies of its tensors.
        twin = copy_module(layer, {id(t): torch.empty_like(t, device="meta") for t in tensors})
        output = twin.forward(samples)
    except Exception:  # any kind, because the layer's own code runs here
        return None
    return tuple(output.shape) if isinstance(output, Tensor) else None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List the layers that could be the classifier, in the network's order."""
    return {path: layer for path, layer in model.named_modules() if sizes_of_classifier(layer) is not None}


def _told_sources(node: fx.Node, model: nn.Module) -> str:
    """Name the layers whose outputs a call combines; if none can classify, name the last that can."""
    sources: dict[str, nn.Module] = {}
    nodes = [] if node.op == "call_module" else [node]
    for source in nodes:  # which grows
        if source.op == "call_module" and str(source.target).startswith("model."):
            path = str(source.target).removeprefix("model.")
            sources[path] = model.get_submodule(path)
        else:
            nodes.extend(before for before in source.all_input_nodes if before not in nodes)

    told = f" of {', '.join(map(repr, sources))}" if sources else ""
    if any(sizes_of_classifier(layer) is not None for layer in sources.values()):
        return told
    return f"{told}; {told_last_layers(model)}"


def told_last_layers(model: nn.Module) -> str:
    """Name the last layers of a network that could be the classifier, for an error."""
    paths = list(linear_layers(model))
    if not paths:
        return "it has no nn.Linear"
    return f"its last linear layers are {', '.join(map(repr, paths[-3:]))}"


def _refuse_convolution(model: nn.Module, root: Network, node: fx.Node) -> None:
    """Raise if a convolution classifies every position of a map, as in SqueezeNet."""
    module = _called(node, root)
    while isinstance(module, POOLING_MODULES):
        node = node.all_input_nodes[0]
        module = _called(node, root)

    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
        raise ValueError(
            f"head: expected a network whose output comes from a linear layer, got {type(model).__name__}, "
            f"whose classifier {str(node.target).removeprefix('model.')!r} is a Conv2d; "
            f"{told_replacement(module)}"
        )


def told_replacement(convolution: nn.Conv2d) -> str:
    """Say what to replace a convolution that classifies by."""
    sizes = f"{convolution.in_channels}, {convolution.out_channels}"
    return (
        "replace it and what follows by nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        f"nn.Linear({sizes})), or, for timm, create the network with num_classes=0 and pass {BEHIND}"
    )


def is_traceable(model: nn.Module) -> bool:
    """Say whether the network's own code, without its layers, can be traced."""
    try:
        _trace(model, _ancestors(""))
    except ValueError:
        return False
    return True


def calls_behind_classifier(model: nn.Module, head: str) -> list[fx.Node]:
    """List the calls after the classifier, such as a softmax; none if the code cannot be traced."""
    try:
        graph = _trace(model, _ancestors(head))[1]
    except ValueError:
        return []
    behind = {_call_of(graph, "head", head)}
    calls = []
    for node in graph.nodes:
        if node.op != "output" and not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
            calls.append(node)
    return calls


def _divide(
    graph: fx.Graph, root: Network, at: str, features: fx.Node, num_features: int | None
) -> tuple[BackbonePart, BackbonePart]:
    """Cut the graph before the first call of ``at`` and after the features."""
    start = _call_of(graph, "at", at)
    alive = _needed_for(graph, features)
    nodes = [node for node in graph.nodes if node in alive]
    stage = {start}
    stage.update(node for node in nodes if not stage.isdisjoint(node.all_input_nodes))

    if features not in stage:
        raise ValueError(
            f"at: expected a module before the classifier, got {at!r}, which the features do not depend on; "
            "to put only classifiers on shared features pass at=None to ExpertModel.from_model, or "
            "stage=None to GroupConvExperts"
        )

    # Parameters that only the stage reads go with it; the mode and configurations are read by both parts.
    sources = [node for node in nodes if not node.all_input_nodes and node.op != "placeholder"]
    stage.update(node for node in sources if stage.issuperset(alive.intersection(node.users)))
    either = {node for node in sources if node.op == "call_module"}

    _check_replay(list(graph.nodes), root, alive, stage)

    crossing = dict.fromkeys(
        value
        for node in (start, *nodes)
        if node in stage
        for value in node.all_input_nodes
        if value not in stage | either
    )

    trunk = _part(root, [], [node for node in nodes if node not in stage], list(crossing))
    experts = _part(root, list(crossing), [node for node in nodes if node in stage | either], [features])
    experts.meta["num_features"] = num_features
    return trunk, experts


def _needed_for(graph: fx.Graph, features: fx.Node) -> set[fx.Node]:
    """Find the calls that the features need, the inputs, and the network's own checks."""
    alive = {features}
    for node in reversed(graph.nodes):
        if node in alive or node.op == "placeholder" or node.target is torch._assert:
            alive.update((node, *node.all_input_nodes))
    return alive


def _check_replay(nodes: list[fx.Node], root: Network, alive: set[fx.Node], stage: set[fx.Node]) -> None:
    """Raise if the parts, run one after the other, would differ from the network's code."""
    begun = False
    for node in nodes:
        begun = begun or node in stage
        module = _called(node, root)
        writes = (
            getattr(module, "inplace", False)
            or node.kwargs.get("inplace")
            or (node.op == "call_method" and str(node.target).rstrip("_") + "_" == node.target)
        )

        # Nothing reads the result, but something reads the value that was written into.
        lost = writes and node not in alive and not alive.isdisjoint(node.all_input_nodes)
        # The trunk would run it first, but the network runs the start of the stage before it.
        layers = module.modules() if module is not None else ()
        writes = writes or any(getattr(layer, "inplace", False) for layer in layers)
        read = any(user in stage for value in node.all_input_nodes for user in value.users)
        early = writes and begun and node in alive and node not in stage and read

        if lost or early:
            raise ValueError(
                f"model: expected code around the split point that assigns its results, got {node.name!r}, "
                "which writes into a value that is read elsewhere; write x = f(x) without inplace=True, or "
                "split elsewhere"
            )

    for target in {node.target for node in stage & alive if node.op == "call_module"}:
        module = root.get_submodule(str(target))
        has_state = next(iter((*module.parameters(), *module.buffers())), None) is not None
        if has_state and any(node.target == target for node in alive - stage if node.op == "call_module"):
            raise ValueError(
                "at: expected a split with every module on one side, got one where "
                f"{str(target).removeprefix('model.')!r} is called on both sides; split elsewhere"
            )


def _part(root: Network, inputs: list[fx.Node], nodes: list[fx.Node], outputs: list[fx.Node]) -> BackbonePart:
    """Make a module from some nodes of a graph, with the paths of the network."""
    graph = fx.Graph(tracer_cls=_Tracer)
    copies = {node: graph.placeholder(node.name) for node in inputs}
    attributes: dict[str, Any] = {}

    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].type = None  # string annotations cannot be pickled
        if node.op in ("call_module", "get_attr"):
            path = str(node.target).removeprefix("model.")
            attributes[path] = _Mode() if path == "_mode" else operator.attrgetter(str(node.target))(root)
            copies[node].target = path

    values = tuple(copies[node] for node in outputs)
    graph.output(values[0] if len(values) == 1 else values)
    part = BackbonePart(attributes, graph)

    saved = {name.removeprefix("model.") for name in root.state_dict()}
    for path in part.state_dict().keys() - saved:
        owner, _, name = path.rpartition(".")
        module = part.get_submodule(owner)
        module.register_buffer(name, module.get_buffer(name), persistent=False)

    modes = {path: module.training for path, module in root.model.named_modules()}
    for path, module in part.named_modules():
        module.training = modes.get(path, root.model.training)
    return part
