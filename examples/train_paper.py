# Needs: augment.py, cli.py, device_augment.py, files.py, graphs.py, paper_recipes.py, recipe.py, resnet32.py,
# sampling.py, train_images.py, training.py.
"""Run a recipe of examples/paper, a cell of one of the paper's tables, on one or several seeds.

A recipe is a TOML file of options; --options lists all of them. Later recipes override earlier ones, and
--set overrides all. Finished runs are not repeated, and interrupted runs continue. --suite runs the cells of
a suite of examples/paper/suites.toml one after the other.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cli import InputError, Parser, add_options, library, needs, number, parse_options, shortened, start
from files import check_log_dir, check_output, make_folder, write_whole
from paper_recipes import ABOUT, as_arguments, parse_setting, read_recipe, suite_commands
from torch import nn

#: Networks for small images, and their blocks per stage.
SMALL_NETWORKS = {"resnet32": 5, "resnet20": 3, "resnet8": 1}

#: Augmentations of training images, by data set, weak or strong.
AUGMENTATIONS = ("cifar-weak", "cifar-strong", "imagenet-weak", "imagenet-strong", "places")


def command_parser() -> argparse.ArgumentParser:
    """The options of the command itself."""
    parser = Parser(description=__doc__)
    parser.add_argument("recipes", type=Path, nargs="*", metavar="RECIPE", help="TOML files")
    parser.add_argument(
        "--suite", metavar="NAME", help="cells of examples/paper/suites.toml, instead of recipes"
    )
    parser.add_argument(
        "--files",
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help="files for a suite's data: cifar10=cifar10.npz",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands of a suite, and stop")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", help="default: 0, or those of the suite")
    parser.add_argument("--name", help="name of the cell; default: the recipes' names")
    parser.add_argument("--runs", type=Path, default=Path("runs", "paper"), help="checkpoints and curves")
    parser.add_argument("--records", type=Path, default=Path("runs", "paper"), help="where NAME.json goes")
    parser.add_argument("--options", action="store_true", help="list what a recipe may set, and stop")
    return parser


def make_parser() -> argparse.ArgumentParser:
    """The options that a recipe may set."""
    parser = Parser(prog="RECIPE", usage="options of a recipe; key-name is key_name there")
    add = parser.add_argument_group("data").add_argument
    add(
        "--format",
        choices=("cifar10", "cifar100", "npz", "list", "inaturalist"),
        default="npz",
        help="format of the data: torchvision's folders, a file of arrays or JPEGs, list files, JSON",
    )
    add("--data", type=Path, default=Path("data"), help="folder or file of the images")
    add("--download", action="store_true", help="let torchvision download missing CIFAR files")
    add("--train-list", type=Path, help="list or JSON file of the training images")
    add("--val-list", type=Path, help="list or JSON file of the test images")
    add(
        "--imbalance-factor",
        type=number(float, 1),
        help="make the data long-tailed; None leaves them unchanged",
    )
    add("--imbalance", choices=("exp", "step"), default="exp", help="shape of the tail")
    add("--largest-class", type=number(int, 1), help="training images of class 0; None takes all")
    add("--image-size", type=number(int, 1, 2**14), default=32, help="pixels")
    add("--augment", choices=AUGMENTATIONS, default="cifar-strong", help="augmentation of training images")
    add(
        "--augment-on",
        choices=("loader", "device"),
        default="loader",
        help="loader: image by image; device: whole batches on the training device, for cifar-* only",
    )
    add("--backbone", default="resnet32", help=f"{', '.join(SMALL_NETWORKS)}, torchvision:NAME or timm:NAME")
    add("--leaky", action="store_true", help="grouped experts with the shortcuts of the authors' code")
    add("--pretrained", type=Path, help="a state_dict of a torchvision or timm backbone")
    parser.set_defaults(small_images=False)
    add_options(parser)
    parser.set_defaults(split_at="layer3", clip_norm=None)  # the authors do not clip gradients
    return parser


with needs("vision", command_parser, __name__):
    import numpy as np
    from augment import transforms
    from device_augment import DeviceAugment
    from recipe import Task
    from resnet32 import ResNet32
    from train_images import load_pretrained, network_factory
    from training import FREE_OPTIONS, Trainer

    from lgla_losses.data import (
        ImageData,
        long_tailed_counts,
        long_tailed_indices,
        read_cifar,
        read_image,
        read_inaturalist,
        read_list,
        read_npz,
    )


class Cell(NamedTuple):
    """A cell to run: the arguments of a run without the seed, and the places of its files."""

    name: str
    settings: dict[str, Any]
    arguments: list[str]
    seeds: list[int]
    folder: Path
    record: Path
    command: str


class PaperImages(torch.utils.data.Dataset[Any]):
    """Images in the form of the loop: inputs in a tuple."""

    def __init__(self, images: ImageData, transform: Any) -> None:
        self.images = ImageData(images.images, images.targets, transform)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index]
        return (image,), label

    def __len__(self) -> int:
        return len(self.images)


class RawImages(torch.utils.data.Dataset[Any]):
    """Small images, unchanged, uint8 ``[3, H, W]``, for an augmentation of whole batches."""

    def __init__(self, images: ImageData) -> None:
        self.images = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous()
        self.targets = images.targets

    def __getitem__(self, index: int) -> Any:
        return (self.images[index],), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)


def read_data(options: argparse.Namespace) -> tuple[ImageData, ImageData]:
    """Training images, made long-tailed on request, and test images."""
    try:
        if options.format in ("cifar10", "cifar100"):
            classes = int(options.format[5:])
            train, val = (
                read_cifar(options.data, classes, train, options.download) for train in (True, False)
            )
        elif options.format == "npz":
            train, val = map(read_npz(options.data).__getitem__, ("train", "val"))
        else:
            if options.train_list is None or options.val_list is None:
                raise InputError(f"format {options.format}: expected train_list and val_list, got none")
            if options.format == "list":
                train = read_list(options.train_list, options.data)
                val = read_list(options.val_list, options.data, max(train.targets) + 1)
            else:
                lists = options.train_list, options.val_list
                train, val = (read_inaturalist(file, options.data) for file in lists)
        if options.imbalance_factor is not None:
            num_classes = max(train.targets) + 1
            largest = options.largest_class or train.targets.count(0)
            counts = long_tailed_counts(largest, num_classes, options.imbalance_factor, options.imbalance)
            train = train.subset(long_tailed_indices(train.targets, counts))
        if max(val.targets) > max(train.targets):
            raise InputError(
                f"{options.val_list or options.data}: expected test classes that are trained, "
                f"0..{max(train.targets)}, got {max(val.targets)}"
            )
        if options.augment.startswith("cifar"):
            train, val = (decoded(data, options.image_size) for data in (train, val))
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    return train, val


def decoded(data: ImageData, size: int) -> ImageData:
    """Small images in memory: read and shrunk to their final size only once."""
    box = library("PIL.Image", "vision").Resampling.BOX
    images = [np.asarray(read_image(image).resize((size, size), box)) for image in data.images]
    return ImageData(np.stack(images), data.targets, classes=data.classes)


def prepare(options: argparse.Namespace) -> Task:
    """Prepare the data and network that the options name."""
    small = options.backbone in SMALL_NETWORKS
    if options.leaky and not (small and options.layout == "grouped"):
        raise InputError(f"leaky: expected one of {', '.join(SMALL_NETWORKS)} and layout grouped")
    augment = augment_on_device(options)
    train, val = read_data(options)
    num_classes = max(train.targets) + 1

    def make_small() -> nn.Module:
        layout = "grouped-leaky" if options.leaky else options.layout
        blocks = SMALL_NETWORKS[options.backbone]
        return ResNet32(num_classes, options.num_experts, layout, options.scale, options.classifier, blocks)

    make_network = make_small if small else network_factory(options)
    pretrained = options.pretrained is not None
    pipelines = transforms(options.augment, options.image_size)
    train_set, val_set = (
        PaperImages(images, pipeline) if augment is None else RawImages(images)
        for images, pipeline in zip((train, val), pipelines, strict=True)
    )
    return Task(
        (lambda: load_pretrained(make_network(), options)) if pretrained else make_network,
        pretrained,
        train_set,
        val_set,
        train.targets,
        [str(name) for name in train.classes or range(num_classes)],
        ("torchvision", *(("timm",) if "timm" in options.backbone + options.augment else ())),
        split=not small,
        augment=augment,
        gradient="exact",
    )


def augment_on_device(options: argparse.Namespace) -> DeviceAugment | None:
    """The augmentation of whole batches; None if images are augmented when loaded."""
    if options.augment_on == "loader":
        return None
    if not options.augment.startswith("cifar"):
        raise InputError(
            f"augment_on device: expected augment cifar-weak or cifar-strong, got {options.augment}; use "
            "augment_on loader for the others"
        )
    try:
        return DeviceAugment(options.image_size, options.augment == "cifar-strong")
    except ValueError as error:
        raise InputError(
            f"augment_on device: image_{error}; use augment_on loader for smaller ones"
        ) from error


def run_seed(arguments: list[str], seed: int, folder: Path, to_go_on: str) -> dict[str, Any]:
    """The record of a run, made now or earlier."""
    record, outputs = folder / "result.json", folder / "outputs.npz"
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    options = parse_options(make_parser(), [*arguments, f"--seed={seed}", f"--log-dir={folder}", *resume])
    if record.exists() and outputs.exists():
        refuse_another_run(record, options)
    else:
        check_log_dir(folder, "last.pt", options.resume)
        torch.manual_seed(seed)
        trainer = Trainer(prepare(options), options, to_go_on)  # continues an interrupted run itself
        if resume:
            trainer.resume()
        trainer.fit()
        keep_outputs(trainer, outputs)
    return read_run(record)


def read_run(record: Path) -> dict[str, Any]:
    """Read the record written at the end of a run."""
    try:
        run: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if {"configuration", "curve", "final", "best"} <= run.keys():
            return run
        reason = "another file"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = f"a damaged one ({error})"
    raise InputError(f"{record}: expected the record of a run, got {reason}; delete it")


def refuse_another_run(record: Path, options: argparse.Namespace) -> None:
    """Raise if the earlier run had other settings."""
    then = read_run(record)["configuration"]
    free = FREE_OPTIONS - {"data"}
    differing = [
        f"{name} {then.get(name)}, now {value}"
        for name, value in vars(options).items()
        if name not in free and then.get(name) != (str(value) if isinstance(value, Path) else value)
    ]
    if differing:
        raise InputError(
            f"{record}: expected a run with these settings, got one with {shortened(differing)}; name the "
            "new run with --name, or delete the old one"
        )


def keep_outputs(trainer: Trainer, path: Path) -> None:
    """Write the data for the figures: test logits, classes, and lengths of the class weights."""
    logits, targets = [], []
    for output, target in trainer.outputs():
        logits.append(output.logits.half().cpu().numpy())
        targets.append(target.cpu().numpy())
        norms = output.weight.detach().norm(dim=-1).cpu().numpy()
    arrays = {
        "logits": np.concatenate(logits),
        "target": np.concatenate(targets),
        "norms": norms,
        "class_counts": trainer.class_counts.numpy(),
        "implied_prior": trainer.criterion.adjuster.implied_prior().cpu().numpy(),
    }
    write_whole(path, lambda file: np.savez(file, **arrays))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of the ensemble's accuracies, in percent."""
    columns: dict[str, Any] = {}
    for which in ("final", "best"):
        rows = [run[which]["scores"]["ensemble"] for run in runs]
        for column in rows[0]:
            values = [100 * row[column] for row in rows if row[column] is not None]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                columns.setdefault(which, {})[column] = {
                    "mean": statistics.mean(values),
                    "deviation": deviation,
                }
    return columns


def shortened_run(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run that a cell's record keeps: only the ensemble's curve."""
    curve = [{**entry, "scores": entry["scores"] and entry["scores"]["ensemble"]} for entry in run["curve"]]
    kept = ("seed", "device", "versions", "seconds", "final", "best")
    return {**{key: run[key] for key in kept}, "curve": curve}


def commit() -> str:
    """The commit that runs, or an empty string outside a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def read_cell(parser: argparse.ArgumentParser, arguments: list[str]) -> Cell:
    """Check a command, as far as possible without data."""
    options = parser.parse_args(arguments)
    seeds = options.seeds or [0]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds: expected each only once, got {shortened(seeds)}")

    settings: dict[str, Any] = {}
    for recipe in options.recipes:
        settings |= read_recipe(recipe)
    settings |= dict(map(parse_setting, options.set))
    run_arguments = as_arguments(make_parser(), settings)

    name = options.name or "-".join(path.stem for path in options.recipes)
    record: Path = options.records / f"{name}.json"
    check_output("--runs", options.runs, folder=True)
    check_output("--records", record.parent, folder=True)
    if record.parent.is_dir():
        check_output("--records", record)
    return Cell(name, settings, run_arguments, seeds, options.runs / name, record, command_line(arguments))


def command_line(arguments: list[str]) -> str:
    """The command line that runs this script with these arguments."""
    return shlex.join(["python", sys.argv[0], *arguments])


def run_cell(cell: Cell, to_go_on: str) -> None:
    """Run a recipe on every seed, and write the record of its cell; ``to_go_on`` is the command to resume."""
    runs = []
    for seed in cell.seeds:
        folder = cell.folder / f"seed{seed}"
        print(f"{cell.name}, seed {seed}: {folder}", flush=True)
        runs.append(run_seed(cell.arguments, seed, folder, to_go_on))

    configuration = {
        key: value for key, value in runs[0]["configuration"].items() if key not in ("seed", "log_dir")
    }
    scores = summary(runs)
    record = {
        "name": cell.name,
        **{key: cell.settings.get(key) or None for key in ABOUT[1:]},
        "command": cell.command,
        "commit": commit(),
        "settings": {key: value for key, value in cell.settings.items() if key not in ABOUT},
        "configuration": configuration,
        "summary": scores,
        "runs": [shortened_run(run) for run in runs],
    }
    make_folder("--records", cell.record.parent)
    content = json.dumps(record, indent=1, default=str) + "\n"  # TOML dates as text
    write_whole(cell.record, lambda file: file.write(content.encode()))

    for column, score in scores["final"].items():
        deviation = "" if score["deviation"] is None else f" ± {score['deviation']:.1f}"
        print(f"{column:>9} {score['mean']:.1f}{deviation}")
    print(f"record: {cell.record}", flush=True)


def expand(options: argparse.Namespace) -> list[list[str]]:
    """The arguments of every cell of a suite, with the options given for all of them."""
    if options.recipes or options.name:
        raise InputError(
            "--suite: expected no recipes and no --name, which the suite sets, got some; leave them out"
        )
    files = {name: path for name, _, path in (text.partition("=") for text in options.files)}
    if empty := [name for name, path in files.items() if not path]:
        raise InputError(f"--files: expected NAME=PATH, got {', '.join(empty)}")

    given = ["--runs", str(options.runs), "--records", str(options.records)]
    given += ["--set", *options.set] if options.set else []
    given += ["--seeds", *map(str, options.seeds)] if options.seeds else []
    return [[*command, *given] for command in suite_commands(options.suite, files)]


def main(arguments: list[str] | None = None) -> None:
    """Run a recipe, or all of a suite."""
    parser = command_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.options:
        make_parser().print_help()
        return
    if not options.recipes and options.suite is None:
        parser.error("expected at least one recipe, ls examples/paper, or a --suite")
    if options.files and options.suite is None:
        parser.error("--files: expected --suite as well, got none; for a recipe use --set data=PATH")
    try:
        commands = [arguments] if options.suite is None else expand(options)
        if options.dry_run:
            print(*map(command_line, commands), sep="\n")
            return
        cells = [read_cell(parser, command) for command in commands]  # all, before the first is trained
        for cell in cells:
            run_cell(cell, command_line(arguments))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main)
