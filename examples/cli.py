# Needs no other file.
"""Start of the scripts, their options, and errors for options that cannot be used."""

from __future__ import annotations

import argparse
import math
import os
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

if find_spec("lgla_losses") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

#: The packages of each extra in pyproject.toml, for the errors.
PACKAGES = {
    "examples": "matplotlib scikit-learn tqdm rich",
    "train": "torchmetrics tqdm rich tensorboard",
    "vision": "torchmetrics tqdm rich tensorboard torchvision timm",
    "text": "torchmetrics tqdm rich tensorboard transformers accelerate",
    "plot": "matplotlib",
    "triton": "triton",
}
#: The oldest versions that the scripts work with, as in pyproject.toml.
OLDEST = {
    "accelerate": "1.1",
    "timm": "1.0.20",
    "torchmetrics": "1.4",
    "torchvision": "0.21",
    "transformers": "5",
}

ADJUSTMENTS = ("lgla", "balanced", "softmax", "logit", "sade")
#: Adjustments that have a strength.
WITH_TAU = ("lgla", "logit", "sade")
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class InputError(ValueError):
    """Report input that cannot be used; shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """Parse options; an error is one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """End the script with the message and exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Leave the error of a full disk to the main thread; TensorBoard's thread passes it on."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def start(main: Callable[[], None]) -> None:
    """Run a script; Ctrl-C, or a file that cannot be read or written, ends it with one line."""
    threading.excepthook = _thread_failed
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (InputError, OSError) as error:
        Parser().error(str(error))


@contextmanager
def needs(extra: str, make_parser: Callable[[], argparse.ArgumentParser], name: str) -> Iterator[None]:
    """Import the packages of an extra; if one is missing, answer --help, or else say what to install.

    Args:
        extra: name of an extra of this library.
        make_parser: makes the parser of the script's options.
        name: ``__name__`` of the importing module; if it is not the script, the error is raised for the
            script.
    """
    try:
        yield
        refuse_old()
    except (ImportError, RuntimeError) as error:
        if name != "__main__":
            raise
        parser = make_parser()
        parser.parse_known_args()
        parser.error(what_to_install(extra, error))


def refuse_old() -> None:
    """Raise ImportError if a loaded package is older than the scripts need."""
    for name, oldest in OLDEST.items():
        got = getattr(sys.modules.get(name), "__version__", oldest)
        numbers, least = (list(map(int, re.findall(r"\d+", text))) for text in (got, oldest))
        if numbers < least:
            raise ImportError(f"expected {name} {oldest} or newer, got {got}: pip install '{name}>={oldest}'")


def what_to_install(extra: str, error: Exception) -> str:
    """Say why an import failed, and give the command that fixes it."""
    try:
        refuse_old()  # an old package may be the reason
    except ImportError as old:
        return str(old)
    if isinstance(error, ImportError):
        return f"{error}: pip install {PACKAGES[extra]}"
    # Its compiled operators were built for another torch.
    return (
        f"the installed torchvision does not fit the installed torch {torch.__version__} ({error}): install "
        "both from the same index, as in pip install --force-reinstall torch torchvision --index-url "
        "https://download.pytorch.org/whl/cpu for a CPU, or https://download.pytorch.org/whl/cu126 and the "
        "like for a GPU"
    )


def library(name: str, extra: str) -> Any:
    """Import a module that only some options need; ``extra`` installs it."""
    try:
        module = import_module(name)
        refuse_old()
        return module
    except (ImportError, RuntimeError) as error:
        raise InputError(what_to_install(extra, error)) from error


def shortened(names: Sequence[object], most: int = 5) -> str:
    """List the names, or the first ones and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def number(kind: type[int | float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """Make a type for argparse: numbers from ``low`` to ``high``, integers within 64 bits."""

    def parse(text: str) -> float:
        shown = reprlib.repr(text)[1:-1]
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: '{shown}'") from error
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {shown}")
        if kind is int and value >= 2**63:
            raise argparse.ArgumentTypeError(f"expected a number below 2 ** 63, got {shown}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both scripts; ``parser.set_defaults`` changes their defaults."""
    add = parser.add_argument_group("experts and loss").add_argument
    add("--split-at", metavar="PATH", help="first module of the stage that each expert has for itself")
    add("--head", default="auto", metavar="PATH", help="the network's classifier, if auto cannot find it")
    add("--num-experts", type=number(int, 1), default=3, help="the paper's K")
    add("--layout", choices=("grouped", "independent"), default="grouped", help="how experts are stored")
    add("--classifier", choices=("cosine", "linear"), default="cosine", help="heads of the experts")
    add("--scale", type=number(float, 1e-6), default=30.0, help="factor of cosine logits")
    add("--adjustment", choices=ADJUSTMENTS, default="lgla", help="adjustment of the logits")
    add(
        "--tau",
        type=number(float, 0),
        help=f"strength of the adjustment, for {', '.join(WITH_TAU)}; None is the default of the loss",
    )
    add(
        "--groups",
        choices=("mass", "shots"),
        default="mass",
        help="classes of the local experts: groups with equal numbers of samples; or many, medium and few, "
        "for 4 experts",
    )
    add("--aaw", action=argparse.BooleanOptionalAction, default=True, help="weight hard samples")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=number(int, 1), default=30, help="passes over the training data")
    add("--batch-size", type=number(int, 1), default=128, help="samples per forward pass")
    add("--accumulate", type=number(int, 1), default=1, help="forward passes per step")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="sgd has Nesterov's momentum")
    add("--lr", type=number(float, 0), default=0.1, help="highest learning rate")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of everything except norms and biases")
    add("--decay-all", action="store_true", help="let norms and biases decay too")
    add("--clip-norm", type=number(float, 0), default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--schedule", choices=("cosine", "step"), default="cosine", help="how the learning rate falls")
    add(
        "--milestones",
        type=number(int, 1),
        nargs="+",
        help="epochs after which step divides the rate by 10; None is 80 and 90 %% of them",
    )
    add(
        "--warmup-epochs",
        type=number(int, 0),
        help="epochs in which the rate rises linearly; None is 1, or 0 for a run of one epoch",
    )
    add(
        "--warmup-start",
        type=number(float, 0, 1),
        help="share of --lr at which the rise starts, then epoch by epoch; None rises from 0 step by step",
    )
    add("--final-lr", type=number(float, 0), default=0.0, help="learning rate at the end of the cosine")

    add = parser.add_argument_group("running").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--amp", choices=tuple(AMP_DTYPES), default="none", help="mixed precision")
    add("--channels-last", action="store_true", help="memory format of convolutions")
    add("--compile", action="store_true", help="compile the model")
    add("--cuda-graphs", action="store_true", help="record a step once and replay it; for small networks")
    add("--evaluate-every", type=number(int, 1), default=1, help="epochs from one evaluation to the next")
    add(
        "--workers", type=number(int, 0), default=min(4, os.cpu_count() or 1), help="processes that load data"
    )
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of everything random")
    add(
        "--log-dir",
        type=Path,
        metavar="OUTPUT_DIR",
        default=Path("runs", Path(parser.prog).stem),
        help="folder of checkpoints, TensorBoard curves and the record",
    )
    add("--resume", action="store_true", help="continue the run in OUTPUT_DIR")


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Refuse a device that PyTorch cannot use."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device}: {error}".partition("\n")[0])


def parse_options(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse the options, and check them as far as possible without data and folders."""
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if options.amp == "fp16" and torch.device(options.device).type == "cpu":
        parser.error("--amp fp16: expected a GPU, got --device cpu; --amp bf16 runs there")
    if options.cuda_graphs:
        on_gpu, scales = torch.device(options.device).type == "cuda", options.amp == "fp16"
        if not on_gpu or scales or options.accumulate > 1 or options.compile:
            parser.error(
                "--cuda-graphs: expected --device cuda, --accumulate 1, --amp none or bf16 and no --compile"
            )
    if options.num_experts == 1 and (options.aaw or options.adjustment == "lgla"):
        parser.error(
            "--num-experts 1: expected --no-aaw and an --adjustment other than lgla, which groups classes"
        )
    if options.groups == "shots" and options.num_experts != 4:
        parser.error(f"--groups shots: expected --num-experts 4, got {options.num_experts}")
    if options.adjustment == "sade" and options.num_experts != 3:
        parser.error(f"--adjustment sade: expected --num-experts 3, got {options.num_experts}")
    if options.tau is not None and options.adjustment not in WITH_TAU:
        parser.error(f"--tau: expected an --adjustment of {', '.join(WITH_TAU)}, got {options.adjustment}")
    if options.milestones is None:
        tenths = {options.epochs * 8 // 10, options.epochs * 9 // 10}
        options.milestones = sorted(epoch for epoch in tenths if epoch > 0)
    if options.warmup_epochs is None:
        options.warmup_epochs = min(1, options.epochs - 1)
    if options.warmup_epochs > options.epochs:
        print(
            f"{parser.prog}: --warmup-epochs {options.warmup_epochs} of --epochs {options.epochs}: the run "
            "ends before the learning rate reaches --lr",
            file=sys.stderr,
        )
    return options
