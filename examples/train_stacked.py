"""Train several methods of one seed together: CIFAR-10-LT by the paper's recipe, on the device.

The data, the augmentation and the learning rates lie on the device, and on a GPU a step of all methods is one
CUDA graph. How the networks are computed is measured first. Every method gets a record as train_paper.py
writes it, and its test logits.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import operator
import platform
import reprlib
import shlex
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from cli import AMP_DTYPES, InputError, Parser, check_device, needs, number, parse_options, shortened, start
from files import check_output, load_plain, make_folder, write_whole
from torch import Tensor

#: A run's options by method, over those of the recipe.
METHODS: dict[str, dict[str, Any]] = {
    "softmax": {"recipe": "softmax"},
    "balms1": {"recipe": "balms", "row": "BALMS x1", "num_experts": 1},
    "balms3": {"recipe": "balms"},
    "cla": {"recipe": "cla", "tau": 2.5, "column": "tau = 2.5"},
    "lgla": {"recipe": "lgla", "tau": 2.5, "column": "tau = 2.5"},
    "lgla2": {"recipe": "lgla", "tau": 2.0, "column": "tau = 2"},
    "lgla3": {"recipe": "lgla", "tau": 3.0, "column": "tau = 3"},
}
FIVE = ["softmax", "balms1", "balms3", "cla", "lgla"]

#: Steps from one look at the losses to the next, for which the host waits.
STEPS_A_LOOK = 100

#: Seconds from one checkpoint to the next, and those kept for the last evaluation and the records.
CHECKPOINT_EVERY, RESERVE = 30.0, 10.0

#: What --quick sets.
QUICK = {"backbone": "resnet8", "batch_size": 16, "image_size": 8}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--data", type=Path, help="an .npz file of read_npz, long-tailed already; --quick makes images itself"
    )
    add("--dataset", default="CIFAR-10-LT", help="its name in the records")
    add("--out", type=Path, default=Path("runs", "stacked"), help="records, test logits and checkpoints")
    add("--prefix", default="stacked", help="of the records' names, PREFIX_METHOD.json")
    add("--methods", choices=tuple(METHODS), nargs="+", default=FIVE, help=f"(default: {' '.join(FIVE)})")
    add("--seeds", type=number(int, 0), nargs="+", default=[0], help="one after another (default 0)")
    add("--epochs", type=number(int, 1), help="(default 400, with --quick 2)")
    add("--evaluate-every", type=number(int, 1), default=20, help="epochs from one evaluation to the next")
    add(
        "--seconds", type=number(float, 1), help="time for all: epochs are halved until they fit, and it ends"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--amp", choices=("none", "bf16"), help="precision of convolutions (default bf16 on a GPU)")
    add("--forms", nargs="+", metavar="FORM", help="how networks are computed; the fastest is taken (all)")
    add(
        "--compile", action="store_true", help="let torch.compile fuse the first form's layers; one form more"
    )
    add("--measure-seconds", type=number(float, 0), default=20.0, help="no further form is begun after these")
    add("--no-graph", action="store_true", help="run steps without a CUDA graph")
    add("--resume", action="store_true", help="go on from the checkpoints in OUT")
    add("--quick", action="store_true", help="a dry run: small networks and few images")
    return parser


with needs("vision", make_parser, __name__):
    import numpy as np
    import train_paper
    from device_steps import DeviceSGD, Steps, Tables
    from recipe import build_criterion, make_schedule
    from resnet32 import ResNet32
    from sampling import mixed_seed
    from stacked import FORMS, Form, stack
    from training import score

    import lgla_losses
    from lgla_losses import LGLALoss, count_classes
    from lgla_losses.data import ImageData, read_npz
    from lgla_losses.metrics import ShotAccuracy


class Ending:
    """Notes SIGTERM and Ctrl-C, so that the loop can save; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self.before = {kind: signal.signal(kind, self._note) for kind in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


class Run(NamedTuple):
    """A method of one seed: settings of its recipe, options of its run, its loss."""

    method: str
    settings: dict[str, Any]
    options: argparse.Namespace
    criterion: LGLALoss


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
            few = [int(i) for j in sorted(set(train.targets)) for i in _first(train.targets, j)]
            train, val = (
                train.subset(few),
                val.subset(range(0, len(val.targets), max(1, len(val.targets) // 100))),
            )
        size = QUICK["image_size"] if options.quick else 32
        return train_paper.decoded(train, size), train_paper.decoded(val, size)  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def _first(targets: list[int], target: int) -> Any:
    """A few samples of a class; of the frequent ones more."""
    found = np.flatnonzero(np.asarray(targets) == target)
    return found[: 2 + 20 // (1 + target)]


def make_run(method: str, epochs: int, counts: Tensor, options: argparse.Namespace) -> Run:
    """What a method of the paper's recipe is."""
    recipes = Path(__file__).parent / "paper"
    said = dict(METHODS[method])
    settings = {
        **train_paper.read_recipe(recipes / "data" / "cifar.toml"),
        **train_paper.read_recipe(recipes / "methods" / f"{said.pop('recipe')}.toml"),
        "dataset": options.dataset,
        "column": "accuracy",
        "format": "npz",
        "data": str(options.data or "random images"),
        "epochs": epochs,
        # A shorter run warms up in fewer epochs, as it falls in fewer.
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
    run_options = parse_options(parser, train_paper.as_arguments(parser, settings))
    return Run(method, settings, run_options, build_criterion(counts, run_options))


def make_network(run: Run, seed: int, num_classes: int) -> ResNet32:
    """The network that a run of its own would begin with."""
    torch.manual_seed(seed)
    options = run.options
    blocks = train_paper.SMALL_NETWORKS[options.backbone]
    return ResNet32(num_classes, options.num_experts, scale=options.scale, blocks=blocks)


def make_order(num_samples: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """The images of an epoch's steps ``[steps, B]``: all of them, and those that fill the last batch twice.

    A CUDA graph has batches of one size.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    order = torch.randperm(num_samples, generator=generator)
    num_steps = math.ceil(num_samples / batch_size)
    return order[torch.arange(num_steps * batch_size) % num_samples].view(num_steps, batch_size)


def make_rates(options: argparse.Namespace, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr)
    factor: Any = make_schedule(optimizer, options, steps_per_epoch).lr_lambdas[0]  # type: ignore[attr-defined]
    return [options.lr * factor(step) for step in range(options.epochs * steps_per_epoch)]


def on_device(images: Any, device: torch.device) -> Tensor:
    """Images ``[N, H, W, 3]`` as uint8 ``[N, 3, H, W]`` there."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous().to(device)


class Stack:
    """The methods of one seed: trains and evaluates them together, and keeps checkpoints.

    Attributes:
        epoch: epochs done.
        seconds: time that they have taken, of all methods together.
        evaluations: scores of every method, by epoch.
        logits: of the last evaluation, ``[N, K, C]`` a method.
    """

    def __init__(self, data: tuple[ImageData, ImageData], seed: int, options: argparse.Namespace) -> None:
        train, val = data
        self.options, self.seed, self.device = options, seed, torch.device(options.device)
        self.counts = count_classes(train.targets, max(train.targets) + 1)
        self.classes = [str(name) for name in train.classes or range(len(self.counts))]
        self.val_targets = torch.as_tensor(val.targets)
        images, self.val_images = (on_device(half.images, self.device) for half in data)
        augmentation = import_module("device_augment")
        self.augment = augmentation.DeviceAugment(size=images.shape[-1], strong=True).to(self.device)
        self.normalised = augmentation.normalised

        self.epochs = options.epochs
        self.runs = self._runs()
        first = self.runs[0].options
        orders = [
            make_order(len(train.targets), first.batch_size, seed, epoch) for epoch in range(self.epochs)
        ]
        self.steps_per_epoch = len(orders[0])
        rates = torch.tensor(make_rates(first, self.steps_per_epoch), device=self.device)
        targets = torch.as_tensor(train.targets).to(self.device)
        self.tables = Tables(images, targets, torch.cat(orders).to(self.device), rates)

        self.form, self.measured = "", dict[str, Any]()
        self.seconds_per_step = self.seconds_per_evaluation = math.nan
        self.epoch, self.seconds = 0, 0.0
        self.evaluations: dict[int, list[Any]] = {}
        self.logits: list[Tensor] = []

    def _runs(self) -> list[Run]:
        return [make_run(method, self.epochs, self.counts, self.options) for method in self.options.methods]

    def shorten(self, epochs: int) -> None:
        """Take fewer epochs, of the same order, and let the learning rates fall in them."""
        self.epochs = epochs
        self.runs = self._runs()
        rates = torch.tensor(make_rates(self.runs[0].options, self.steps_per_epoch), device=self.device)
        self.tables.rates[: len(rates)].copy_(rates)

    def make_steps(self, form: Form, graph: bool) -> Steps:
        """The steps in a form, from the networks' beginning."""
        options = self.runs[0].options
        networks = [make_network(run, self.seed, len(self.counts)) for run in self.runs]
        net = stack(networks, form, self.device)
        dtype = AMP_DTYPES[options.amp] or torch.float32
        optimizer = DeviceSGD(net, dtype, options.momentum, options.weight_decay)
        criteria = [run.criterion.to(self.device) for run in self.runs]
        steps = Steps(net, criteria, optimizer, self.augment, self.tables, self.steps_per_epoch)
        if graph:
            steps.record()
        return steps

    def choose(self, forms: dict[str, Form], graph: bool) -> None:
        """Measure the forms, and keep the fastest; a form that fails is out, whatever it fails by."""
        begun, fastest = time.monotonic(), math.inf
        expected: list[list[float]] = []
        for name, form in forms.items():
            late = time.monotonic() - begun > self.options.measure_seconds
            if late and fastest < math.inf and not form.compiled:
                self.measured[name] = "not measured: --measure-seconds were over"
                continue
            try:
                steps = self.make_steps(form, graph)
                losses, seconds = steps.trial(20 if self.device.type == "cuda" else 1)
                expected = expected or losses
                if not all(np.isfinite(losses).flat) or not np.allclose(losses, expected, rtol=0.05):
                    raise ArithmeticError(f"expected the losses {expected}, got {losses}")
            except Exception as error:  # of whatever kind: libraries and compilers have many
                self.measured[name] = f"failed: {type(error).__name__}: {error}".partition("\n")[0]
            else:
                self.measured[name] = {"milliseconds_per_step": round(1000 * seconds, 3)}
                if seconds < fastest:
                    fastest, self.form, self.steps = seconds, name, steps
                del steps  # whose recording holds much memory
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{name}: {self.measured[name]}", flush=True)
        if fastest == math.inf:
            raise InputError(f"--forms: none of {', '.join(forms)} runs: {self.measured}")
        self.seconds_per_step = fastest
        for _ in range(2):  # the first loads kernels
            begun = time.monotonic()
            self._scores()
            self.seconds_per_evaluation = time.monotonic() - begun

    def seconds_of(self, epochs: int) -> float:
        """How long so many epochs take, with evaluations, and a fiftieth for checkpoints."""
        evaluations: int = math.ceil(epochs / self.options.evaluate_every)
        seconds = epochs * self.steps_per_epoch * self.seconds_per_step
        seconds += evaluations * self.seconds_per_evaluation
        return 1.02 * seconds

    def train(self, ending: Ending, deadline: float) -> None:
        """Train to the last epoch, to a signal, or to the deadline, and evaluate."""
        begun, saved = time.monotonic() - self.seconds, time.monotonic()
        while self.epoch < self.epochs and not ending.signal:
            if time.monotonic() + self.steps_per_epoch * self.seconds_per_step > deadline:
                break
            # So that the augmentation of an epoch is the same after an interruption.
            torch.manual_seed(mixed_seed(self.seed, self.epoch, 1))
            for step in range(self.epoch * self.steps_per_epoch, (self.epoch + 1) * self.steps_per_epoch):
                self.steps.advance()
                if (step + 1) % STEPS_A_LOOK == 0:
                    self._look(step + 1, time.monotonic() - begun)
            self.epoch += 1
            if self.epoch % self.options.evaluate_every == 0:
                self.evaluate()
            self.seconds = time.monotonic() - begun
            if time.monotonic() - saved > CHECKPOINT_EVERY:
                self.save()
                saved = time.monotonic()
        if self.epoch > 0 and (self.epoch not in self.evaluations or not self.logits):
            self._look(self.epoch * self.steps_per_epoch, time.monotonic() - begun)
            self.evaluate()
        self.save()

    def _look(self, step: int, seconds: float) -> None:
        """Wait for the losses of a step, show them, and stop where one is not finite."""
        losses = dict(zip(self.options.methods, self.steps.losses.tolist(), strict=True))
        shown = ", ".join(f"{method} {loss:.3f}" for method, loss in losses.items())
        print(f"epoch {step // self.steps_per_epoch}/{self.epochs}, {seconds:.0f} s: {shown}", flush=True)
        if not all(map(math.isfinite, losses.values())):
            raise SystemExit(
                f"step {step}: expected finite losses, got {shown}; train the others alone by --methods, or "
                "all by --amp none. The last checkpoint is kept"
            )

    def evaluate(self) -> None:
        """Accuracies of every method on the test images."""
        self.evaluations[self.epoch] = self._scores()
        shown = (
            f"{method} {100 * scores['ensemble']['balanced']:.1f}"
            for method, scores in zip(self.options.methods, self.evaluations[self.epoch], strict=True)
        )
        print(f"epoch {self.epoch}, balanced accuracy: {', '.join(shown)}", flush=True)

    def _scores(self) -> list[dict[str, Any]]:
        self.logits = self.steps.logits(self.val_images, self.normalised)
        scores: list[dict[str, Any]] = [{} for _ in self.logits]
        for of_run, logits in zip(scores, self.logits, strict=True):
            rows = {"ensemble": logits.mean(dim=1)}
            rows |= {f"expert {k + 1}": expert for k, expert in enumerate(logits.unbind(1))}
            for row, values in rows.items():
                metric = ShotAccuracy(self.counts)
                metric.update(values, self.val_targets)
                of_run[row] = score(metric)
        return scores

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        options = self.options
        return {
            "methods": list(options.methods),
            "seed": self.seed,
            "amp": options.amp,
            "quick": options.quick,
            "class_counts": self.counts.tolist(),
        }

    @property
    def checkpoint(self) -> Path:
        """The file of the seed's checkpoint."""
        path: Path = self.options.out / f"seed{self.seed}.pt"
        return path

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        content = {
            "identity": self.identity(),
            "state": {name: tensor.cpu() for name, tensor in self.steps.state().items()},
            "epochs": self.epochs,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "form": self.form,
            "measured": self.measured,
        }
        write_whole(self.checkpoint, lambda file: torch.save(content, file))

    def resume(self, graph: bool) -> None:
        """Go on where the checkpoint ends, in its form."""
        saved = load_plain(self.checkpoint)
        identity = saved.get("identity") if isinstance(saved, dict) else None
        if identity != self.identity():
            raise InputError(
                f"--resume: expected {self.checkpoint} to be of {reprlib.repr(self.identity())}, got "
                f"{reprlib.repr(identity)}; give what it was begun with, or another --out"
            )
        if saved["epochs"] < self.epochs:
            self.shorten(saved["epochs"])
        self.choose({saved["form"]: form_of(saved["form"])}, graph)
        self.steps.restore(saved["state"])
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]
        self.evaluations, self.measured = saved["evaluations"], saved["measured"]

    def record(self, index: int) -> dict[str, Any]:
        """What a run of one method gave, as training.py records it; and its test logits beside it."""
        options = self.runs[index].options
        losses = (self.steps.sums[:, index] / self.steps_per_epoch).tolist()
        rates = self.tables.rates.tolist()
        curve = [
            {
                "epoch": epoch,
                "loss": losses[epoch - 1],
                "lr": rates[epoch * self.steps_per_epoch - 1],
                "scores": self.evaluations[epoch][index] if epoch in self.evaluations else {},
            }
            for epoch in range(1, self.epoch + 1)
        ]
        evaluated = list(filter(operator.itemgetter("scores"), curve))
        configuration = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
        return {
            "configuration": configuration | {"classes": self.classes, "class_counts": self.counts.tolist()},
            "versions": versions(),
            "device": device_name(self.device),
            "seed": self.seed,
            "curve": curve,
            "final": evaluated[-1],
            "best": max(evaluated, key=lambda entry: entry["scores"]["ensemble"]["balanced"]),
            "seconds": round(self.seconds, 1),
        }

    def keep_outputs(self, index: int, path: Path) -> None:
        """Write what train_paper.py keeps of a run: test logits, classes, lengths of the class weights."""
        norms = self.steps.net.class_weights()[index].detach().float().norm(dim=-1)
        arrays = {
            "logits": self.logits[index].half().numpy(),
            "target": self.val_targets.numpy(),
            "norms": norms.cpu().numpy(),
            "class_counts": self.counts.numpy(),
            "implied_prior": self.runs[index].criterion.adjuster.implied_prior().cpu().numpy(),
        }
        make_folder("--out", path.parent)
        write_whole(path, lambda file: np.savez(file, **arrays))


def versions() -> dict[str, str]:
    """Of what computes."""
    modules = {"torch": torch, "numpy": np, "lgla_losses": lgla_losses}
    return {"python": platform.python_version()} | {name: m.__version__ for name, m in modules.items()}


def device_name(device: torch.device) -> str:
    """The device's name, or the machine's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def form_of(name: str) -> Form:
    """The form of a name, which may end in -compiled."""
    plain = name.removesuffix("-compiled")
    if plain not in FORMS:
        raise InputError(f"--forms: expected some of {', '.join(FORMS)}, got {name!r}")
    return FORMS[plain]._replace(compiled=plain != name)


def fitting_epochs(asked: int, seconds_of: Callable[[int], float], left: float) -> int:
    """The epochs asked for, halved until they take no longer than there is left."""
    epochs = asked
    while epochs > 1 and seconds_of(epochs) > left:
        epochs //= 2
    return epochs


def write_records(stacks: list[Stack], options: argparse.Namespace, command: str) -> None:
    """A record a method of the seeds so far, as train_paper.py writes it."""
    for index, method in enumerate(options.methods):
        name = f"{options.prefix}_{method}"
        for stack in stacks:
            stack.keep_outputs(index, options.out / name / f"seed{stack.seed}" / "outputs.npz")
        runs = [stack.record(index) for stack in stacks]
        settings = stacks[0].runs[index].settings
        record = {
            "name": name,
            **{key: settings.get(key) for key in train_paper.ABOUT[1:]},
            "command": command,
            "commit": train_paper.commit(),
            "settings": {key: value for key, value in settings.items() if key not in train_paper.ABOUT},
            "configuration": {
                k: v for k, v in runs[0]["configuration"].items() if k not in ("seed", "log_dir")
            },
            "together": list(options.methods),
            "finished": all(stack.epoch == options.epochs for stack in stacks),
            "summary": train_paper.summary(runs),
            "runs": [train_paper.shortened_run(run) for run in runs],
        }
        write_json(options.out / f"{name}.json", record)


def write_overview(stacks: list[Stack], options: argparse.Namespace, command: str) -> None:
    """What was measured, and how long all took together: stacked.json."""
    on_gpu = stacks[0].device.type == "cuda"
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
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "seeds": seeds,
    }
    write_json(options.out / "stacked.json", record)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, and say where."""
    content = json.dumps(record, indent=1) + "\n"
    write_whole(path, lambda file: file.write(content.encode()))
    print(f"record: {path}", flush=True)


def train_seed(stack: Stack, ending: Ending, left: float) -> None:
    """Measure, and train as long as ``left`` allows; or go on from a checkpoint."""
    options, deadline = stack.options, time.monotonic() + left - min(RESERVE, 0.1 * left)
    graph = stack.device.type == "cuda" and not options.no_graph
    if options.resume and stack.checkpoint.exists():
        stack.resume(graph)
    else:
        stack.choose(options.forms, graph)
        fitting = fitting_epochs(options.epochs, stack.seconds_of, deadline - time.monotonic())
        if fitting < options.epochs:
            needed = stack.seconds_of(options.epochs)
            print(f"{options.epochs} epochs take {needed:.0f} s: {fitting} instead", flush=True)
            stack.shorten(fitting)
    stack.train(ending, deadline)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be used, and fill in what follows from the rest."""
    check_device(parser, options.device)
    for name in ("methods", "seeds"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name}: expected each but once, got {shortened(values)}")
    on_gpu = options.device.startswith("cuda")
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
            raise InputError(f"--out: {checkpoint} is of an earlier run; --resume continues it")


def main(arguments: list[str] | None = None) -> None:
    """Train every seed, and write the records after each."""
    begun = time.monotonic()
    parser = make_parser()
    options = parser.parse_args(arguments)
    command = shlex.join(["python", sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)])
    stacks: list[Stack] = []
    with Ending() as ending:
        try:
            check(parser, options)
            data = read_images(options)
            make_folder("--out", options.out)
            for i, seed in enumerate(options.seeds):
                stack = Stack(data, seed, options)
                left = begun + (options.seconds or math.inf) - time.monotonic()
                train_seed(stack, ending, left / (len(options.seeds) - i))
                stacks.append(stack)
                write_overview(stacks, options, command)
                if stack.epoch == 0:
                    raise SystemExit("no time was left for an epoch; give more --seconds")
                write_records(stacks, options, command)
                if ending.signal:
                    raise SystemExit(128 + ending.signal)
        except InputError as error:
            parser.error(str(error))


if __name__ == "__main__":
    start(main)
