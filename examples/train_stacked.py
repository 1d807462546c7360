# Needs: augment.py, cli.py, device_augment.py, device_steps.py, files.py, graphs.py, paper_recipes.py,
# recipe.py, resnet32.py, sampling.py, stacked.py, stacked_kernels.py, stacked_runs.py, train_images.py,
# train_paper.py, training.py.
"""Train several methods of one seed together: CIFAR-10-LT with the paper's recipe, on the device.

Data, augmentation and learning rates are on the device, and on a GPU a step of all methods is one CUDA graph.
The script first measures the fastest way to compute the networks. Every method gets a record like those of
train_paper.py, and its test logits.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cli import InputError, Parser, check_device, needs, number, parse_options, shortened, start
from files import check_output, make_folder, write_whole
from paper_recipes import ABOUT, RECIPES, as_arguments, read_recipe
from torch import Tensor

#: Options of a run by method, on top of the recipe; 3.0 is the authors' tau for CIFAR-10.
METHODS: dict[str, dict[str, Any]] = {
    "softmax": {"recipe": "softmax"},
    "balms1": {"recipe": "balms", "row": "BALMS x1", "num_experts": 1},
    "balms3": {"recipe": "balms"},
    "cla": {"recipe": "cla", "tau": 3.0, "column": "tau = 3"},
    "lgla": {"recipe": "lgla", "tau": 3.0, "column": "tau = 3"},
    "lgla2": {"recipe": "lgla", "tau": 2.0, "column": "tau = 2"},
    "lgla2.5": {"recipe": "lgla", "tau": 2.5, "column": "tau = 2.5"},
}
FIVE = ["softmax", "balms1", "balms3", "cla", "lgla"]

#: Options that --quick sets.
QUICK = {"backbone": "resnet8", "batch_size": 16, "image_size": 8}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="an .npz file for read_npz, already long-tailed; --quick makes its own images",
    )
    add("--dataset", default="CIFAR-10-LT", help="its name in the records")
    add("--out", type=Path, default=Path("runs", "stacked"), help="records, test logits and checkpoints")
    add("--prefix", default="stacked", help="prefix of the records' names, PREFIX_METHOD.json")
    add("--methods", choices=tuple(METHODS), nargs="+", default=FIVE, help=f"(default: {' '.join(FIVE)})")
    add("--seeds", type=number(int, 0), nargs="+", default=[0], help="one after another (default 0)")
    add("--epochs", type=number(int, 1), help="(default 400, with --quick 2)")
    add("--evaluate-every", type=number(int, 1), default=20, help="epochs from one evaluation to the next")
    add(
        "--seconds",
        type=number(float, 1),
        help="time limit for everything: trains as many eighths of the epochs as fit, then ends",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--amp", choices=("none", "bf16"), help="precision of convolutions (default bf16 on a GPU)")
    add(
        "--forms",
        nargs="+",
        metavar="FORM",
        help="ways to compute the networks; the fastest is used (default: all)",
    )
    add("--compile", action="store_true", help="add a form: torch.compile fuses the layers of the first form")
    add(
        "--measure-seconds",
        type=number(float, 0),
        default=20.0,
        help="no further form starts after this time",
    )
    add("--no-graph", action="store_true", help="run steps without a CUDA graph")
    add("--resume", action="store_true", help="continue from the checkpoints in OUT")
    add("--quick", action="store_true", help="a dry run: small networks and few images")
    return parser


with needs("vision", make_parser, __name__):
    import numpy as np
    import train_paper
    from recipe import build_criterion
    from stacked import FORMS
    from stacked_runs import Ending, Run, Stack, device_name, form_of, versions

    from lgla_losses.data import ImageData, read_npz


def read_images(options: argparse.Namespace) -> tuple[ImageData, ImageData]:
    """Training and test images in memory."""
    if options.data is None:
        if not options.quick:
            raise InputError("--data: expected an .npz file of images, got none; --quick needs none")
        generator = np.random.default_rng(0)
        targets = np.repeat(np.arange(10), (20, 16, 13, 10, 8, 7, 5, 4, 3, 2)), np.arange(40) % 10
        draw = (generator.integers(256, size=(len(y), 8, 8, 3), dtype=np.uint8) for y in targets)
        return tuple(ImageData(x, y) for x, y in zip(draw, targets, strict=True))  # type: ignore[return-value]
    try:
        data = read_npz(options.data)
        train, val = data["train"], data["val"]
        if options.quick:
            train = train.subset([int(i) for j in set(train.targets) for i in _first(train.targets, j)])
            val = val.subset(range(0, len(val.targets), max(1, len(val.targets) // 100)))
        size = QUICK["image_size"] if options.quick else 32
        return train_paper.decoded(train, size), train_paper.decoded(val, size)  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def _first(targets: list[int], target: int) -> Any:
    """A few samples of a class; more of the frequent classes."""
    found = np.flatnonzero(np.asarray(targets) == target)
    return found[: 2 + 20 // (1 + target)]


def make_run(method: str, epochs: int, counts: Tensor, options: argparse.Namespace) -> Run:
    """Make the run of a method with the paper's recipe."""
    said = dict(METHODS[method])
    settings = {
        **read_recipe(RECIPES / "data" / "cifar.toml"),
        **read_recipe(RECIPES / "methods" / f"{said.pop('recipe')}.toml"),
        "dataset": options.dataset,
        "column": "accuracy",
        "format": "npz",
        "data": str(options.data or "random images"),
        "epochs": epochs,
        # A shorter run also has fewer warm-up epochs.
        "warmup_epochs": min(5, math.ceil(epochs / 20), epochs - 1),
        "evaluate_every": options.evaluate_every,
        "device": options.device,
        "amp": options.amp,
        "cuda_graphs": options.device.startswith("cuda") and not options.no_graph,
        "channels_last": True,
        **(QUICK if options.quick else {}),
        **said,
    }
    parser = train_paper.make_parser()
    run_options = parse_options(parser, as_arguments(parser, settings))
    blocks = train_paper.SMALL_NETWORKS[run_options.backbone]
    return Run(method, settings, run_options, blocks, build_criterion(counts, run_options))


def write_records(stacks: list[Stack], options: argparse.Namespace, command: str) -> None:
    """Write one record per method of the seeds so far, like train_paper.py; none for a diverged method."""
    for index, method in enumerate(options.methods):
        name = f"{options.prefix}_{method}"
        if any(method in stack.diverged for stack in stacks):
            print(f"{name}: no record, because its loss was not finite")
            continue
        for stack in stacks:
            stack.keep_outputs(index, options.out / name / f"seed{stack.seed}" / "outputs.npz")
        runs = [stack.record(index) for stack in stacks]
        settings = stacks[0].runs[index].settings
        record = {
            "name": name,
            **{key: settings.get(key) for key in ABOUT[1:]},
            "command": command,
            "commit": train_paper.commit(),
            "settings": {key: value for key, value in settings.items() if key not in ABOUT},
            "configuration": {
                k: v for k, v in runs[0]["configuration"].items() if k not in ("seed", "log_dir")
            },
            "together": list(options.methods),
            "finished": all(stack.epoch == stack.epochs for stack in stacks),
            "summary": train_paper.summary(runs),
            "runs": [train_paper.shortened_run(run) for run in runs],
        }
        write_json(options.out / f"{name}.json", record)


def write_overview(stacks: list[Stack], options: argparse.Namespace, command: str) -> None:
    """Write the measurements and the total time: stacked.json."""
    on_gpu = stacks[0].device.type == "cuda"
    kernels: Any = sys.modules.get("stacked_kernels")
    chosen = {} if kernels is None else kernels.FASTEST
    seeds = [
        {
            "seed": stack.seed,
            "form": stack.form,
            "forms": stack.measured,
            "graph": stack.steps.graph is not None,
            "milliseconds_per_step": round(1000 * stack.seconds_per_step, 3),
            "seconds_per_evaluation": round(stack.seconds_per_evaluation, 3),
            "steps_per_epoch": stack.steps_per_epoch,
            "epochs": stack.epochs,
            "epochs_done": stack.epoch,
            "seconds": round(stack.seconds, 1),
            "diverged": stack.diverged,
        }
        for stack in stacks
    ]
    record = {
        "command": command,
        "commit": train_paper.commit(),
        "device": device_name(stacks[0].device),
        "versions": versions(),
        "methods": list(options.methods),
        "epochs_asked": options.epochs,
        "convolutions": {
            " ".join(map(str, key)): "PyTorch's" if which else "own" for key, which in chosen.items()
        },
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "seeds": seeds,
    }
    write_json(options.out / "stacked.json", record)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, and print its path."""
    content = json.dumps(record, indent=1) + "\n"
    write_whole(path, lambda file: file.write(content.encode()))
    print(f"record: {path}", flush=True)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that cannot be used, and fill in those that follow from others."""
    check_device(parser, options.device)
    for name in ("methods", "seeds"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name}: expected each only once, got {shortened(values)}")
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(torch.device(options.device).index or 0)  # streams are made there
    options.epochs = options.epochs or (2 if options.quick else 400)
    options.amp = options.amp or ("bf16" if on_gpu else "none")
    names = options.forms or [name for name, form in FORMS.items() if on_gpu or not (form.fused or form.own)]
    if options.compile:
        names.insert(1, f"{names[0]}-compiled")
    options.forms = {name: form_of(name) for name in names}
    check_output("--out", options.out, folder=True)
    for seed in options.seeds:
        checkpoint = options.out / f"seed{seed}.pt"
        if checkpoint.exists() and not options.resume:
            raise InputError(f"--out: {checkpoint} belongs to an earlier run; add --resume to continue it")


def main(arguments: list[str] | None = None) -> None:
    """Train every seed, and write the records after each."""
    begun = time.monotonic()
    parser = make_parser()
    options = parser.parse_args(arguments)
    command = shlex.join(["python", sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)])
    stacks: list[Stack] = []

    def make_runs(epochs: int, counts: Tensor) -> list[Run]:
        return [make_run(method, epochs, counts, options) for method in options.methods]

    with Ending() as ending:
        try:
            check(parser, options)
            data = read_images(options)
            make_folder("--out", options.out)
            for i, seed in enumerate(options.seeds):
                stack = Stack(data, seed, options, make_runs)
                left = begun + (options.seconds or math.inf) - time.monotonic()
                stack.fit(ending, left / (len(options.seeds) - i))
                stacks.append(stack)
                write_overview(stacks, options, command)
                if stack.epoch == 0:
                    raise SystemExit("no time was left for an epoch; raise --seconds")
                write_records(stacks, options, command)
                if ending.signal:
                    raise SystemExit(128 + ending.signal)
        except InputError as error:
            parser.error(str(error))


if __name__ == "__main__":
    start(main)
