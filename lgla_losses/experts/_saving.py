"""Write a model of experts into a folder, and load it again from there."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lgla_losses._checks import describe
from lgla_losses.experts.backbone import check_network, is_transformers_model

if TYPE_CHECKING:
    from lgla_losses.experts.model import ExpertModel

#: Files in a folder, beside the ``config.json`` of transformers.
WEIGHTS, RECORD = "model.safetensors", "experts.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Origin:
    """Record from which network a model of experts was made, and where it was split."""

    network: str
    head: str
    at: str | None
    config: Any = None
    #: Whether transformers has this class, so that its config is enough to make one.
    in_transformers: bool = False

    @classmethod
    def of(cls, network: nn.Module, head: str, at: str | None) -> Origin:
        """Note the class of the network, and for transformers its config."""
        kind = type(network)
        config = copy.deepcopy(network.config) if is_transformers_model(network) else None
        return cls(
            kind.__qualname__, head, at, config, in_transformers=kind.__module__.startswith("transformers.")
        )


def save(model: ExpertModel, directory: str | os.PathLike[str]) -> None:
    """Write weights, record and config beside the existing files, then rename each."""
    folder, origin = _folder(directory), model._origin
    if origin is None:
        raise ValueError(
            "model: expected one made by from_model, got an ExpertModel made from parts, which a record "
            "cannot rebuild; save its state_dict() and load it into a model made from the same parts"
        )
    safetensors = _imported("safetensors.torch")
    record = {
        "network": origin.network,
        "in_transformers": origin.in_transformers,
        "options": _options(model, origin),
    }
    weights = _weights_of(model)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        new = Path(name)
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if origin.config is not None:
            _config_of(model, origin).save_pretrained(new)
        safetensors.save_file(weights, new / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(new / RECORD, new / WEIGHTS)  # safetensors writes a file that only its owner can read

        for file in (CONFIG, RECORD, WEIGHTS):
            if (new / file).exists():
                (new / file).replace(folder / file)


def _options(model: ExpertModel, origin: Origin) -> dict[str, Any]:
    """Read the arguments for from_model off the model in its current state."""
    experts, classifiers = model.experts, model.experts.classifiers
    options = {
        "num_experts": experts.num_experts,
        "num_classes": classifiers.weight.shape[1],
        "at": origin.at,
        "head": origin.head or "auto",  # if the network is a single linear layer, the path is empty
        "layout": experts.layout,
        "eval_output": model.eval_output,
        "classifier": "linear" if classifiers.scale is None else "cosine",
        "gradient": classifiers.gradient,
    }
    return options if classifiers.scale is None else {**options, "scale": classifiers.scale}


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the state, each tensor into its own memory; tied weights under their last name."""
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: expected a state of tensors, got {describe(value)} as {name!r}; save it by "
                "torch.save(model.state_dict(), path)"
            )

    untied = {id(tensor): (name, tensor) for name, tensor in state.items()}
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in untied.values()
    }


def _config_of(model: ExpertModel, origin: Origin) -> Any:
    """Give the config of the network, with the architecture, classes and precision of the model."""
    # The trunk's config holds later changes, such as those of resize_token_embeddings.
    config = copy.deepcopy(model.trunk.config if is_transformers_model(model.trunk) else origin.config)
    weight = model.experts.classifiers.weight
    if config.num_labels != weight.shape[1]:
        config.num_labels = weight.shape[1]
    config.architectures = [origin.network]
    config.dtype = str(weight.dtype).removeprefix("torch.")
    return config


def load(cls: type[ExpertModel], directory: str | os.PathLike[str], network: nn.Module | None) -> ExpertModel:
    """Make a model from the record, and load the weights."""
    folder = _folder(directory)
    record = _record(folder)
    weights = _read_weights(folder / WEIGHTS)

    made = _network(folder, record) if network is None else network
    _check_has_values(made)
    model = _made_of(cls, made, record["options"], folder)

    _load_weights(model, weights, folder)
    return model.eval()


def _folder(directory: object) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory: expected the path of a folder, got {describe(directory)}")
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory: expected a folder, got the file {str(folder)!r}; name another path")
    return folder


def _record(folder: Path) -> dict[str, Any]:
    missing = [name for name in (RECORD, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"directory: expected a folder that save_pretrained wrote, got {str(folder)!r} without "
            f"{' and '.join(missing)}; a checkpoint of Trainer holds only weights: make the model as before "
            "and load them by load_state_dict"
        )
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if {"network", "in_transformers", "options"} <= record.keys():
            return record
        raise ValueError(f"it has {', '.join(record)}")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"directory: expected the record of save_pretrained in {str(folder / RECORD)!r}, got another "
            f"file ({error}); save the model again"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    load_file = _imported("safetensors.torch").load_file
    try:
        weights: dict[str, Tensor] = load_file(path)
        return weights
    except _imported("safetensors").SafetensorError as error:
        raise ValueError(
            f"directory: expected weights in {str(path)!r}, got a damaged file ({error}); save the model "
            "again"
        ) from error


def _network(folder: Path, record: dict[str, Any]) -> nn.Module:
    """Make a network of transformers from its config."""
    name = record["network"]
    transformers: Any = _imported("transformers") if record["in_transformers"] else None
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"model: expected a {name}, got None; it is not one of transformers' own models; make one as "
            f"for from_model and pass it: from_pretrained({str(folder)!r}, model=network)"
        )
    made: Any = kind
    try:
        # from_pretrained would use the default config if the file is missing.
        config = made.config_class.from_dict(json.loads((folder / CONFIG).read_text()))
    except Exception as error:  # the checks of transformers raise their own error classes
        raise ValueError(
            f"directory: expected the config of a {name} in {str(folder / CONFIG)!r}, got none or a damaged "
            f"one ({error}); save the model again, or make a {name} and pass it as model="
        ) from error
    network: nn.Module = made(config)
    return network


def _check_has_values(network: nn.Module) -> None:
    """Refuse the meta device, also inside from_model: loading would leave tensors without values."""
    check_network(network)
    if any(tensor.is_meta for tensor in (torch.empty(0), *network.parameters(), *network.buffers())):
        raise ValueError(
            "model: expected a network on a device that holds values, got meta; make it on the CPU, and call "
            'from_pretrained outside torch.device("meta")'
        )


def _made_of(cls: type[ExpertModel], network: nn.Module, options: Any, folder: Path) -> ExpertModel:
    """Call from_model as the record says."""
    path = str(folder / RECORD)
    try:
        return cls.from_model(network, **options, reset=False)
    except TypeError as error:
        raise ValueError(
            f"directory: expected options of from_model in {path!r}, got {options} ({error}); another "
            "version of lgla_losses wrote it: load it with that version"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"model: expected a network that fits the record {path!r}, got another: {error} (these "
            "arguments are from the record); make it as for from_model and pass it as model=, or load it "
            "with the version of lgla_losses that saved it"
        ) from error


def _load_weights(model: nn.Module, saved: dict[str, Tensor], folder: Path) -> None:
    """Load all weights, in their saved precision."""
    own = model.state_dict(keep_vars=True)
    for name in saved.keys() & own.keys():
        data = own[name].data.to(saved[name].dtype)
        own[name].data = (
            data.contiguous() if 0 in data.stride() else data
        )  # expanded tensors cannot be loaded into

    # Tied weights are saved under one name.
    tied = {id(own[name]): tensor for name, tensor in saved.items() if name in own}
    aliases = {name: tied[id(tensor)] for name, tensor in own.items() if id(tensor) in tied}
    try:
        model.load_state_dict({**aliases, **saved})
    except RuntimeError as error:
        raise ValueError(
            f"model: expected the network of the weights in {str(folder)!r}, got another: {error}; make it "
            "as for from_model and pass it as model="
        ) from error


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{name} cannot be imported ({error}): pip install {package}") from error
