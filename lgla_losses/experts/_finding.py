"""Find the classifier of a network, and the points where the network can be split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lgla_losses._checks import describe
from lgla_losses._torch import is_wrapped
from lgla_losses.experts._running import is_tracing
from lgla_losses.experts.backbone import (
    BEHIND,
    RESHAPING_CALLS,
    calls_behind_classifier,
    check_network,
    check_path,
    is_below,
    is_traceable,
    is_transformers_model,
    linear_layers,
    scaled_by_constant,
    sizes_of_classifier,
    split_backbone,
    split_off_classifier,
    told_last_layers,
    told_replacement,
    trace_to_classifier,
)

#: Names of classifiers, or of the modules around them, in torchvision, timm and transformers.
NAMES = ("fc", "classifier", "score", "heads", "head", "classification_head")
#: Containers whose modules follow one another.
LISTS = (nn.Sequential, nn.ModuleList)
#: How the errors end.
WAY_OUT = "pass the path of the linear layer that classifies as head="


def find_classifier(model: nn.Module, head: str = "auto") -> str:
    """Find the path of the linear layer that gives a network's output, perhaps times a constant.

    It asks timm's ``get_classifier()``, else follows the network's code back from its output. If the code
    cannot be traced, it takes the last linear layer, if that has a usual name or a shape that no other has.

    Args:
        model: the network.
        head: the path, if it is known; it is checked.

    Raises:
        TypeError: ``model`` is not a module, or ``head`` not a string.
        ValueError: there is no such layer, or there are several candidates.
    """
    check_network(model)
    if head != "auto":
        check_path("head", model, head)
        layer = model.get_submodule(head)
        if sizes_of_classifier(layer) is None:
            raise ValueError(
                "head: expected the path of an nn.Linear, or of a layer with one weight matrix, got "
                f"{head!r}, a {type(layer).__name__}; "
                + (
                    told_replacement(layer)
                    if isinstance(layer, nn.Conv2d) and not linear_layers(model)
                    else told_last_layers(model)
                )
            )
        return head

    _refuse_two_classifiers(model)
    classifier = _classifier_of(model)
    if isinstance(classifier, nn.Linear):
        return _path_of(model, classifier)
    if isinstance(classifier, nn.Identity):
        raise ValueError(
            f"model: expected a network with one linear classifier, got a {type(model).__name__} whose "
            f"get_classifier() gives {describe(classifier)}; create it with num_classes=, or pass {BEHIND}"
        )

    if not is_transformers_model(model) and is_traceable(model):
        return str(trace_to_classifier(model)[2].target).removeprefix("model.")
    return _path_by_name(model) or _last_linear(model)


def _classifier_of(model: nn.Module) -> Any:
    """Ask timm's ``get_classifier()``; give the network itself if it has no such method."""
    get_classifier = getattr(model, "get_classifier", None)
    return get_classifier() if callable(get_classifier) else model


def _refuse_two_classifiers(model: nn.Module) -> None:
    """Raise for a distilled network, which returns the mean of two classifiers' logits."""
    heads = _classifier_of(model)
    if isinstance(heads, tuple):
        layers = [list(linear_layers(head).values()) for head in heads]
        paths = [_path_of(model, of_head[-1]) for of_head in layers if of_head]
        raise ValueError(
            f"model: expected a network with one linear classifier, got a {type(model).__name__}, whose "
            f"get_classifier() gives {' and '.join(map(repr, paths))}; to use the features of both, create "
            f"it with num_classes=0 and pass {BEHIND}; to use one, pass its path as head= and a split as "
            "at=; or create it without distillation (deit_tiny_patch16_224; LeViT: distilled=False)"
        )


def _path_of(model: nn.Module, layer: nn.Module) -> str:
    return str(next(path for path, module in model.named_modules() if module is layer))


def _path_by_name(model: nn.Module) -> str | None:
    """Find the last linear layer of a module with a usual name, if it is the last of the network."""
    for name in NAMES:
        named = getattr(model, name, None)
        if isinstance(named, nn.Module):
            layers = list(linear_layers(named).values())
            if layers:
                path = _path_of(model, layers[-1])
                # Models of transformers name their classifier, and may have more layers after it.
                is_last = is_transformers_model(model) or path == list(linear_layers(model))[-1]
                return path if is_last else None
    return None


def _last_linear(model: nn.Module) -> str:
    """Take the last linear layer, unless other layers of its shape could be meant too."""
    layers = linear_layers(model)
    shapes = [sizes_of_classifier(layer) for layer in layers.values()]
    # A model of transformers without a head has linear layers, but no classifier.
    if not layers or is_transformers_model(model) or shapes.count(shapes[-1]) > 1:
        raise ValueError(
            f"model: expected a network with one linear classifier, got a {type(model).__name__}, where "
            f"none was found by get_classifier(), by its code, or by the names {', '.join(NAMES)}; "
            f"{told_last_layers(model)}; {WAY_OUT}"
        )
    return list(layers)[-1]


def remove_classifier(model: nn.Module, path: str) -> nn.Module:
    """Replace the classifier, and a softmax after it, by an identity; return the rest.

    If the network's own code scales the logits, the rest is the part before the classifier.

    Raises:
        ValueError: there are two classifiers, or the network's own code changes the logits, for example by a
            softmax.
    """
    if not path:
        return nn.Identity()
    _refuse_two_classifiers(model)

    layers = {f"model.{name}": module for name, module in model.named_modules(remove_duplicate=False)}
    gone, is_scaled = [layers[f"model.{path}"]], False
    # Models of transformers put the logits into an output, or choose tokens.
    for call in [] if is_transformers_model(model) else calls_behind_classifier(model, path):
        layer = layers.get(str(call.target))

        if isinstance(layer, nn.Softmax | nn.LogSoftmax):
            gone.append(layer)
        elif scaled_by_constant(call) is not None:
            is_scaled = True
        elif not isinstance(layer, nn.Identity | nn.Flatten) and call.target not in RESHAPING_CALLS:
            raise ValueError(
                f"model: expected a network that returns the logits of {path!r}, got a "
                f"{type(model).__name__}, whose code changes them "
                f"({call.name.removeprefix('model_')}); remove that, because the losses take logits, or "
                "split the network by at="
            )

    if is_scaled:  # the factor would scale the features
        return split_off_classifier(model, path)
    for name, module in layers.items():
        if module in gone:
            model.set_submodule(name.removeprefix("model."), nn.Identity().train(module.training))
    return model


def check_kept(model: nn.Module, path: str) -> nn.Linear:
    """Give the classifier that the experts start from.

    Raises:
        ValueError: it is not an nn.Linear, or the network's own code scales its logits.
    """
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"keep_head: expected False for a classifier that is not an nn.Linear, got True and {path!r}, a "
            f"{type(layer).__name__}; set keep_head=False: the classifiers are new, with the scale= you pass"
        )

    behind = [] if is_transformers_model(model) or not path else calls_behind_classifier(model, path)
    for call in behind:
        if scaled_by_constant(call) is not None:
            raise ValueError(
                "keep_head: expected False for a network that scales its logits, got True and a "
                f"{type(model).__name__}, whose code scales those of {path!r} "
                f"({call.name.removeprefix('model_')}); set keep_head=False, or multiply the classifier's "
                "weight and bias by the factor"
            )
    return layer


class Watch:
    """Check once in each mode what a network does with its logits: tracing does not see all of it.

    Args:
        path: path of the identity that replaces the classifier.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.unseen = {True, False}

    def run(self, trunk: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
        """Run the trunk. The first run in each mode reads values.

        Raises:
            ValueError: it does not return the output of the identity.
        """
        if torch.compiler.is_compiling() or is_tracing() or trunk.training not in self.unseen:
            return trunk(*inputs, **kwargs)

        given: list[Tensor] = []
        layer = trunk.get_submodule(self.path)
        hook = layer.register_forward_hook(lambda module, args, output: given.append(output.detach().clone()))
        try:
            returned = trunk(*inputs, **kwargs)
        finally:
            hook.remove()

        features = returned["logits"] if isinstance(returned, dict) and "logits" in returned else returned
        if isinstance(features, Tensor) and _has_values(features):
            if not any(_are_rows(features.detach(), logits) for logits in given):
                raise ValueError(
                    f"head: expected a network that returns the logits of {self.path!r} as they are, got a "
                    f"{type(trunk).__name__}, whose code "
                    + ("changes them" if given else "does not call that layer")
                    + "; remove that code, because the losses take logits (the experts have their own "
                    "scale=), or name another layer by head="
                )
            self.unseen.discard(trunk.training)
        return returned


def _has_values(features: Tensor) -> bool:
    is_plain = type(features) is Tensor and not is_wrapped(features) and not features.is_meta
    return (
        is_plain
        and features.numel() > 0
        and not (features.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _are_rows(features: Tensor, logits: Tensor) -> bool:
    """Say whether the first features are among the logits, in the same or another precision."""
    if features.shape[-1] != logits.shape[-1]:
        return False
    few, rows = features.flatten(0, -2)[:4], logits.flatten(0, -2).to(features.dtype)
    same = (few[:, None] == rows) | (few[:, None].isnan() & rows.isnan())
    return bool(same.all(-1).any(-1).all())


def split_points(model: nn.Module) -> list[str]:
    """List where a network can be split: values for ``at`` of :class:`ExpertModel` or :func:`split_backbone`.

    They are the stages or blocks of a network, or its layers if it has no blocks. From such a point on the
    rest can be copied, and before it there are weights left to share. The first in the list is the default
    advice: the last point with a third of the blocks' parameters after it. That is the last stage of a ResNet
    or ConvNeXt, and the last third of the blocks of a ViT or BERT. The others follow in the network's order;
    the authors split a ResNet-50 at ``"layer3"``, which costs more.

    Each point is tried: this runs the code around it, but no layer.

    Args:
        model: a network of torchvision, timm or transformers, or your own.

    Returns:
        Dotted paths; an empty list if the network cannot be split.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is compiled.

    Example:
        >>> layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
        >>> split_points(nn.Sequential(*layers))
        ['2']
    """
    check_network(model)
    try:
        head = find_classifier(model)
    except ValueError:
        head = None

    sizes = _blocks(model, head)
    points = [path for path in sizes if _splits(model, path, head)]

    behind = 0
    for path in reversed(sizes):
        behind += sizes[path]
        if path in points and 3 * behind >= sum(sizes.values()):
            return [path, *(point for point in points if point != path)]
    return points


def _blocks(model: nn.Module, head: str | None) -> dict[str, int]:
    """Find the outermost modules that follow one another, and the numbers of their parameters."""
    path, module = "", model
    while True:
        body = _body(path, module, head)
        is_list = isinstance(module, LISTS) and len(body) > 1
        holders = {} if is_list else {p: child for p, child in body.items() if _holds_blocks(child)}
        if len(holders or body) != 1:
            break
        ((path, module),) = (holders or body).items()

    if not holders and not is_list:  # no blocks: take every layer
        opened = {p: _body(p, child, head) if isinstance(child, LISTS) else {} for p, child in body.items()}
        lists = [children if len(children) > 1 else {p: body[p]} for p, children in opened.items()]
        body = {p: child for children in lists for p, child in children.items()}
    return {p: _size(child) for p, child in (holders or body).items()}


def _body(path: str, module: nn.Module, head: str | None) -> dict[str, nn.Module]:
    """Take the children with parameters, without the one with the classifier if there are others."""
    children = {f"{path}.{name}".lstrip("."): child for name, child in module.named_children()}
    children = {p: child for p, child in children.items() if _size(child) and p != head}
    return {p: child for p, child in children.items() if not (head and is_below(head, p))} or children


def _holds_blocks(module: nn.Module) -> bool:
    """Say whether there is a list of modules that consist of layers themselves."""
    lists = (layer for layer in module.modules() if isinstance(layer, LISTS))
    return any(sum(any(True for _ in child.children()) for child in blocks) > 1 for blocks in lists)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _splits(model: nn.Module, path: str, head: str | None) -> bool:
    try:
        trunk, _ = split_backbone(model, path, head=head)
    except ValueError:
        return False
    return next(trunk.parameters(), None) is not None
