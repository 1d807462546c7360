# Needs: cli.py, files.py, graphs.py, recipe.py, sampling.py, training.py.
"""Train LGLA on a folder or an .npz file of images, with a network of torchvision or timm.

A folder has train/ and val/ (or test/) with one folder per class. A file has the arrays train_images,
train_labels, val_images and val_labels: images uint8 [N, H, W, 3] or [N, H, W], labels integers [N]; or
encoded images as in lgla_losses.data.read_npz.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from cli import InputError, Parser, add_options, library, needs, number, shortened, start
from files import kind_of, load_plain
from torch import nn
from torch.utils.data import Dataset


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR_OR_NPZ", help="the images")
    add = parser.add_argument_group("images").add_argument
    add("--backbone", default="torchvision:resnet18", help="torchvision:NAME or timm:NAME")
    add(
        "--pretrained",
        type=Path,
        metavar="FILE",
        help="a state_dict of the backbone, .pt, .pth or .safetensors",
    )
    add(
        "--image-size",
        type=number(int, 1, 2**14),
        help="pixels; None is the first image's shorter side, at most 224",
    )
    add("--small-images", action="store_true", help="a ResNet whose stem keeps the resolution")
    add(
        "--augment",
        choices=("none", "flip", "randaugment", "autoaugment"),
        default="flip",
        help="flip crops and mirrors; the others do more",
    )
    add("--cutout", type=number(int, 0), default=0, metavar="N", help="blank a square with sides of N pixels")
    add("--skip-corrupt", action="store_true", help="leave out images that cannot be read")
    add_options(parser)
    return parser


with needs("vision", make_parser, __name__):
    from recipe import Task
    from sampling import Sample
    from torchvision.transforms import v2
    from tqdm import tqdm
    from training import differing_tensors, run

    from lgla_losses import split_backbone
    from lgla_losses.data import ImageData, read_image, read_npz
    from lgla_losses.inspection.sources import IMAGE_SUFFIXES

#: For each family, where it lists its networks, and how to make one with new weights.
FAMILIES = {"torchvision": ("torchvision.models", "get_model"), "timm": ("timm", "create_model")}

#: Mean and deviation of ImageNet's channels: pretrained networks expect these, unless they name others, as
#: timm's do.
NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

#: Images up to this size are cropped from a padded frame, larger images at random scales.
SMALL = 64


class ImageSet(Dataset[Sample]):
    """Transformed images and their classes, in the form for a model."""

    def __init__(self, data: ImageData, transform: Callable[[Any], Any]) -> None:
        self.data = data
        self.transform = transform

    def __getitem__(self, index: int) -> Sample:
        image, label = self.data[index]
        return (self.transform(image),), label

    def __len__(self) -> int:
        return len(self.data)


def read_folder(root: Path, skip_corrupt: bool) -> tuple[ImageData, ImageData, list[str]]:
    """Training and validation images of a folder, and the names of its classes."""
    halves = [root / "train", root / ("val" if (root / "val").is_dir() else "test")]
    if not all(half.is_dir() for half in halves):
        got = shortened(sorted(path.name for path in root.iterdir())) or "an empty folder"
        raise InputError(f"{root}: expected folders train/ and val/ or test/ in it, got {got}")
    files = [list_images(half, skip_corrupt) for half in halves]
    names = sorted(files[0])
    for half, of_class in zip(halves, files, strict=True):
        if not any(of_class.values()):
            endings = ", ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(f"{half}: expected images ({endings}) in one folder a class, got none")
    empty = [name for name in names if not files[0][name]]
    if empty:
        raise InputError(f"{halves[0]}: expected images of every class, got none of {shortened(empty)}")
    unknown = [name for name in files[1] if name not in names]
    if unknown:
        raise InputError(f"{halves[1]}: expected classes of {halves[0]}, got {shortened(unknown)}")
    train, val = (
        ImageData(
            [path for name in names for path in of_class.get(name, [])],
            [label for label, name in enumerate(names) for _ in of_class.get(name, [])],
        )
        for of_class in files
    )
    return train, val, names


def list_images(half: Path, skip_corrupt: bool) -> dict[str, list[Path]]:
    """The readable images of every class."""
    folders = sorted(path for path in half.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {
        folder.name: sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        for folder in folders
    }
    paths = [path for of_class in files.values() for path in of_class]
    with ThreadPoolExecutor() as pool:
        readable = list(tqdm(pool.map(is_readable, paths), f"reading {half}", len(paths), leave=False))
    corrupt = [path for path, intact in zip(paths, readable, strict=True) if not intact]
    if corrupt and not skip_corrupt:
        raise InputError(
            f"{half}: {len(corrupt)} corrupt images: {shortened(corrupt)}; repair them, or leave them out "
            "with --skip-corrupt"
        )
    if corrupt:
        print(f"{half}: left out {len(corrupt)} corrupt images: {shortened(corrupt, len(corrupt))}")
    good = set(paths).difference(corrupt)
    return {name: [path for path in of_class if path in good] for name, of_class in files.items()}


def is_readable(path: Path) -> bool:
    """Say whether an image can be decoded completely."""
    if not path.is_file():  # reading a pipe would wait
        return False
    try:
        read_image(path)
    except Exception:  # decoders raise many kinds
        return False
    return True


def read_arrays(path: Path) -> tuple[ImageData, ImageData, list[str]]:
    """Training and validation images of an .npz file, and the numbers of its classes as names."""
    try:
        data = read_npz(path)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    return data["train"], data["val"], data["train"].classes or []


def make_transforms(network: nn.Module, options: argparse.Namespace) -> tuple[Any, Any]:
    """Make the transforms of training and of validation images."""
    size: int = options.image_size
    whole = [v2.ToImage(), v2.Resize(size), v2.CenterCrop(size)]
    expected = NORMALISATION | getattr(network, "pretrained_cfg", {})
    normalise = v2.Normalize(expected["mean"], expected["std"])
    finish = [v2.ToDtype(torch.float32, scale=True), normalise]
    augment = whole
    if options.augment != "none":
        crop = [*whole, v2.RandomCrop(size, padding=size // 8)]
        if size > SMALL:
            crop = [v2.ToImage(), v2.RandomResizedCrop(size)]
        learnt = v2.AutoAugmentPolicy.CIFAR10 if size <= SMALL else v2.AutoAugmentPolicy.IMAGENET
        policies = {"randaugment": [v2.RandAugment()], "autoaugment": [v2.AutoAugment(learnt)]}
        policy = policies.get(options.augment, [])
        augment = [*crop, v2.RandomHorizontalFlip(), *policy]
    erased = (options.cutout / size) ** 2
    cutout = [v2.RandomErasing(p=1, scale=(erased, erased), ratio=(1, 1))] if options.cutout else []
    return v2.Compose([*augment, *finish, *cutout]), v2.Compose([*whole, *finish])


def network_factory(options: argparse.Namespace) -> Callable[[], nn.Module]:
    """Give a function that makes the network that ``--backbone`` names."""
    family, _, name = options.backbone.partition(":")
    if family not in FAMILIES:
        raise InputError(f"--backbone: expected torchvision:NAME or timm:NAME, got {options.backbone}")
    package, function = FAMILIES[family]
    models = library(package, "vision")
    known = models.list_models()
    architecture = name.partition(".")[0] if family == "timm" else name  # timm adds a tag for the weights
    if architecture not in known:
        close = ", ".join(get_close_matches(name, known)) or "none"
        raise InputError(
            f"--backbone: {family} has no {name!r}; close names: {close}; "
            f"all: python -c 'import {package} as models; print(models.list_models())'"
        )

    def make_network() -> nn.Module:
        network: nn.Module = getattr(models, function)(name)
        if options.small_images:
            use_small_stem(network)
        return network

    return make_network


def use_small_stem(network: nn.Module) -> None:
    """Keep the resolution of small images in a ResNet: start with a 3x3 convolution, no stride or pooling."""
    stem = getattr(network, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or not hasattr(network, "maxpool"):
        raise InputError(
            "--small-images: expected a ResNet with one convolution before its pooling, got a "
            f"{type(network).__name__} with another stem; leave it out"
        )
    network.conv1 = nn.Conv2d(3, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def load_pretrained(network: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Load the weights of a file into the network, except its classifier, which experts do not use."""
    path: Path = options.pretrained
    weights = load_plain(path)
    if not isinstance(weights, dict):
        raise InputError(f"--pretrained {path}: expected a state_dict, got a {type(weights).__name__}")
    parts = split_backbone(network, options.split_at, head=options.head)
    needed = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
    unexpected = [name for name in weights if name not in network.state_dict()]
    problems = [
        differing_tensors(needed, weights),
        f"unexpected: {shortened(unexpected)}" if unexpected else "",
    ]
    if any(problems):
        raise InputError(
            f"--pretrained {path}: expected the state_dict of {options.backbone}, got one that differs; "
            f"{'; '.join(filter(None, problems))}"
        )
    network.load_state_dict({name: weights[name] for name in needed}, strict=False)
    return network


def prepare(options: argparse.Namespace) -> Task:
    """Prepare images, transforms and the network that the options name."""
    make_network = network_factory(options)
    data: Path = options.data
    got = kind_of(data)
    if got == "nothing":
        raise InputError(f"{data}: expected a folder or file, got none")
    if got not in ("a folder", "a file"):
        raise InputError(f"{data}: expected a folder or an .npz file of images, got {got}")
    train, val, names = read_folder(data, options.skip_corrupt) if data.is_dir() else read_arrays(data)
    options.image_size = options.image_size or min(224, *read_image(train.images[0]).size)
    if options.cutout >= options.image_size:
        raise InputError(
            f"--cutout: expected less than --image-size {options.image_size}, got {options.cutout}"
        )
    network = make_network()
    if options.split_at is None and not hasattr(network, "layer3"):
        top = ", ".join(name for name, _ in network.named_children())
        raise InputError(f"--split-at: required for {options.backbone}, whose modules are {top}")
    options.split_at = options.split_at or "layer3"
    train_transform, val_transform = make_transforms(network, options)
    return Task(
        make_network if options.pretrained is None else lambda: load_pretrained(make_network(), options),
        options.pretrained is not None,
        ImageSet(train, train_transform),
        ImageSet(val, val_transform),
        train.targets,
        names,
        ("torchvision", *re.findall("^timm", options.backbone)),
    )


def main(arguments: list[str] | None = None) -> None:
    """Train on images; --help lists the options."""
    run(make_parser(), arguments, prepare)


if __name__ == "__main__":
    start(main)
