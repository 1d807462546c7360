# Needs: cli.py, device_augment.py, device_steps.py, files.py, graphs.py, recipe.py, resnet32.py, sampling.py,
# stacked.py, stacked_kernels.py, training.py.
"""The methods of one seed as one training run: it measures the fastest form and can be interrupted."""

from __future__ import annotations

import argparse
import gc
import math
import operator
import platform
import reprlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from cli import AMP_DTYPES, InputError
from device_augment import DeviceAugment, normalised
from device_steps import DeviceSGD, Steps, Tables
from files import load_plain, make_folder, write_whole
from recipe import make_schedule
from resnet32 import ResNet32
from sampling import mixed_seed
from stacked import FORMS, Form, stack
from torch import Tensor
from training import score

import lgla_losses
from lgla_losses import LGLALoss, count_classes
from lgla_losses.data import ImageData
from lgla_losses.metrics import ShotAccuracy

#: Steps between two looks at the losses, for which the host waits.
STEPS_A_LOOK = 100

#: Seconds between two checkpoints, and seconds reserved for the last evaluation and the records.
CHECKPOINT_EVERY, RESERVE = 30.0, 10.0


class Ending:
    """Record SIGTERM and Ctrl-C, so that the loop can save; a second one stops at once."""

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
    """A method of one seed: settings of its recipe, options of its run, blocks of its network, and loss."""

    method: str
    settings: dict[str, Any]
    options: argparse.Namespace
    blocks: int
    criterion: LGLALoss


def make_network(run: Run, seed: int, num_classes: int) -> ResNet32:
    """The network that a separate run would start with."""
    torch.manual_seed(seed)
    options = run.options
    return ResNet32(num_classes, options.num_experts, scale=options.scale, blocks=run.blocks)


def make_order(num_samples: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """The images of an epoch's steps ``[steps, B]``: all images, and some twice to fill the last batch.

    A CUDA graph needs batches of one size.
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

    Args:
        data: training and test images.
        seed: seed of networks, order and augmentation.
        options: options of train_stacked.py.
        make_runs: makes the methods' runs for a number of epochs and the class counts.

    Attributes:
        epochs: epochs to do.
        epoch: epochs done.
        seconds: time of these epochs, all methods together.
        diverged: methods whose losses were not finite, with the step.
        evaluations: scores of every method, by epoch.
        logits: logits of the last evaluation, ``[N, K, C]`` per method.
    """

    def __init__(
        self,
        data: tuple[ImageData, ImageData],
        seed: int,
        options: argparse.Namespace,
        make_runs: Callable[[int, Tensor], list[Run]],
    ) -> None:
        train, val = data
        self.make_runs = make_runs
        self.options, self.seed, self.device = options, seed, torch.device(options.device)
        self.counts = count_classes(train.targets, max(train.targets) + 1)
        self.classes = [str(name) for name in train.classes or range(len(self.counts))]
        self.val_targets = torch.as_tensor(val.targets)
        images, self.val_images = (on_device(half.images, self.device) for half in data)
        self.augment = DeviceAugment(size=images.shape[-1]).to(self.device)

        self.epochs = options.epochs
        self.runs = make_runs(self.epochs, self.counts)
        first = self.runs[0].options
        orders = [
            make_order(len(train.targets), first.batch_size, seed, epoch) for epoch in range(self.epochs)
        ]
        self.steps_per_epoch = len(orders[0])
        rates = torch.tensor(make_rates(first, self.steps_per_epoch), device=self.device)
        targets = torch.as_tensor(train.targets).to(self.device)
        order = torch.cat([*orders, orders[0][:1]]).to(self.device)
        self.tables = Tables(images, targets, order, rates)

        self.form, self.measured = "", dict[str, Any]()
        self.seconds_per_step = self.seconds_per_evaluation = math.nan
        self.epoch, self.seconds = 0, 0.0
        self.diverged: dict[str, int] = {}
        self.evaluations: dict[int, list[Any]] = {}
        self.logits: list[Tensor] = []

    def shorten(self, epochs: int) -> None:
        """Take fewer epochs, in the same order, and shorten the schedule of learning rates."""
        self.epochs = epochs
        self.runs = self.make_runs(epochs, self.counts)
        rates = torch.tensor(make_rates(self.runs[0].options, self.steps_per_epoch), device=self.device)
        self.tables.rates[: len(rates)].copy_(rates)

    def make_steps(self, form: Form, graph: bool) -> Steps:
        """Make the steps in a form, from the initial networks."""
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

    def fit(self, ending: Ending, left: float) -> None:
        """Measure the forms and train as long as ``left`` allows, or continue from a checkpoint."""
        options, deadline = self.options, time.monotonic() + left - min(RESERVE, 0.1 * left)
        graph = self.device.type == "cuda" and not options.no_graph
        if options.resume and self.checkpoint.exists():
            self.resume(graph)
        else:
            try:
                self.choose(options.forms, graph)
            except InputError as error:
                if not graph:
                    raise
                print(f"{error}; without CUDA graphs:", flush=True)
                self.choose(options.forms, graph=False)
            fitting = fitting_epochs(options.epochs, self.seconds_of, deadline - time.monotonic())
            if fitting < options.epochs:
                needed = self.seconds_of(options.epochs)
                print(f"{options.epochs} epochs take {needed:.0f} s: {fitting} instead", flush=True)
                self.shorten(fitting)
        self.train(ending, deadline)

    def choose(self, forms: dict[str, Form], graph: bool) -> None:
        """Measure the forms, and keep the fastest; a form that fails for any reason is left out."""
        begun, fastest = time.monotonic(), math.inf
        expected: list[list[float]] = []
        steps: Steps | None = None
        for name, form in forms.items():
            late = time.monotonic() - begun > self.options.measure_seconds
            if late and fastest < math.inf and not form.compiled:
                self.measured[name] = "not measured: no --measure-seconds left"
                continue
            try:
                steps = self.make_steps(form, graph)
                losses, seconds = steps.trial(20 if self.device.type == "cuda" else 1)
                expected = expected or losses
                if not all(np.isfinite(losses).flat) or not np.allclose(losses, expected, rtol=0.05):
                    raise ArithmeticError(f"expected the losses {expected}, got {losses}")
            except Exception as error:  # any kind: libraries and compilers raise many
                self.measured[name] = f"failed: {type(error).__name__}: {error}".partition("\n")[0]
            else:
                self.measured[name] = {"milliseconds_per_step": round(1000 * seconds, 3)}
                if seconds < fastest:
                    fastest, self.form, self.steps = seconds, name, steps
            steps = None  # its recording holds much memory
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
        self.logits = []  # logits of untrained networks

    def seconds_of(self, epochs: int) -> float:
        """Seconds for a number of epochs, with evaluations, and a fiftieth for checkpoints."""
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
            # This makes the augmentation of an epoch the same after an interruption.
            torch.manual_seed(mixed_seed(self.seed, self.epoch, 1))
            if self.epoch == 0:
                self.steps.prime()
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
        """Wait for the losses of a step, print them, and record the runs with losses that are not finite.

        Runs are independent unless they share groups of convolutions, so the others continue.
        """
        losses = dict(zip(self.options.methods, self.steps.losses.tolist(), strict=True))
        shown = ", ".join(f"{method} {loss:.3f}" for method, loss in losses.items())
        print(f"epoch {step // self.steps_per_epoch}/{self.epochs}, {seconds:.0f} s: {shown}", flush=True)
        for method, loss in losses.items():
            if not math.isfinite(loss):
                self.diverged.setdefault(method, step)
        if len(self.diverged) == len(losses):
            raise SystemExit(
                f"step {step}: expected finite losses, got {shown}; run it again with --amp none or --forms "
                "grouped. The last checkpoint is kept"
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
        self.logits = [v.nan_to_num() for v in self.steps.logits(self.val_images, normalised)]
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
        """Settings that a checkpoint must have been made with."""
        options = self.options
        free = ("epochs", "warmup_epochs", "data", "device", "cuda_graphs")
        return {
            "settings": [{k: v for k, v in run.settings.items() if k not in free} for run in self.runs],
            "methods": list(options.methods),
            "seed": self.seed,
            "epochs": options.epochs,
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
            "diverged": self.diverged,
            "evaluations": self.evaluations,
            "form": self.form,
            "measured": self.measured,
        }
        write_whole(self.checkpoint, lambda file: torch.save(content, file))

    def resume(self, graph: bool) -> None:
        """Continue from the checkpoint, in its form."""
        saved = load_plain(self.checkpoint)
        identity = saved.get("identity") if isinstance(saved, dict) else None
        if identity != self.identity():
            raise InputError(
                f"--resume: expected {self.checkpoint} to be of {reprlib.repr(self.identity())}, got "
                f"{reprlib.repr(identity)}; pass the options it was started with, or another --out"
            )
        if saved["epochs"] < self.epochs:
            self.shorten(saved["epochs"])
        self.choose({saved["form"]: form_of(saved["form"])}, graph)
        self.steps.restore(saved["state"])
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]
        self.evaluations, self.measured = saved["evaluations"], saved["measured"]
        self.diverged = saved["diverged"]

    def record(self, index: int) -> dict[str, Any]:
        """Record the run of one method as training.py does, and write its test logits next to it."""
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
        """Write the outputs that train_paper.py keeps: test logits, classes, lengths of the class weights."""
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
    """Versions of the software."""
    modules = {"torch": torch, "numpy": np, "lgla_losses": lgla_losses}
    return {"python": platform.python_version()} | {name: m.__version__ for name, m in modules.items()}


def device_name(device: torch.device) -> str:
    """Name of the device, or of the machine with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def form_of(name: str) -> Form:
    """Find the form by its name, which may end in -compiled."""
    plain = name.removesuffix("-compiled")
    if plain not in FORMS:
        raise InputError(f"--forms: expected some of {', '.join(FORMS)}, got {name!r}")
    return FORMS[plain]._replace(compiled=plain != name)


def fitting_epochs(asked: int, seconds_of: Callable[[int], float], left: float) -> int:
    """The most eighths of the requested epochs that fit into the time left; at least one epoch."""
    fewer = [asked * eighths // 8 for eighths in range(8, 0, -1)] + [
        asked >> halvings for halvings in range(4, 64)
    ]
    return next((epochs for epochs in fewer if epochs > 0 and seconds_of(epochs) <= left), 1)
