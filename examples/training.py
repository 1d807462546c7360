# Needs: cli.py, files.py, graphs.py, recipe.py, sampling.py.
"""The loop of train_images.py and train_text.py: steps, evaluation, checkpoints and the record."""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import reprlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from cli import AMP_DTYPES, InputError, parse_options, shortened
from files import check_log_dir, load_plain, make_folder, write_whole
from graphs import GraphedPass
from recipe import Task, build_criterion, build_model, make_optimizer, make_schedule
from rich.console import Console
from rich.table import Table
from sampling import EpochOrder, Seeded, ignore_interrupts, mixed_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lgla_losses import ExpertOutput, GroupConvExperts, count_classes
from lgla_losses.metrics import ShotAccuracy

#: Options that may change when a run is resumed.
FREE_OPTIONS = {"data", "device", "workers", "log_dir", "resume"}

#: Accuracies by row (ensemble, expert 1, ...) and column; None if a column has no class.
Scores = dict[str, dict[str, float | None]]


def score(metric: Any) -> dict[str, float | None]:
    """Accuracies of all samples counted so far, by column."""
    means = metric.compute()
    columns = {
        "balanced": means["all"],
        "many": means["many"],
        "medium": means["medium"],
        "few": means["few"],
    }
    columns["top-1"] = metric.correct.sum() / metric.total.sum()
    return {name: None if value.isnan() else value.item() for name, value in columns.items()}


def differing_tensors(expected: dict[str, Tensor], got: dict[str, Any]) -> str:
    """Missing entries of a state_dict, and entries with another shape; empty if it fits."""
    missing = [name for name in expected if name not in got]
    shapes = [
        f"{name} {list(getattr(got[name], 'shape', []))}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and getattr(got[name], "shape", None) != tensor.shape
    ]
    problems = {"missing": missing, "of another shape": shapes}
    return "; ".join(f"{kind}: {shortened(names)}" for kind, names in problems.items() if names)


class Interruption:
    """Record Ctrl-C, so that the loop can end a step and save; a second Ctrl-C stops at once."""

    def __enter__(self) -> Self:
        self.requested = False
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.before)


@dataclass
class Progress:
    """Progress of a run, in plain values.

    Attributes:
        epoch: epochs done.
        step: steps done of the next epoch.
        loss: sum of the loss over the samples of these steps.
        rate: learning rate of the last step.
        seconds: time of the run so far.
        curve: loss, learning rate and scores of every epoch done; no scores for epochs without evaluation.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    rate: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any]:
        """The first epoch with the highest balanced accuracy."""
        return max(
            filter(operator.itemgetter("scores"), self.curve),
            key=lambda entry: entry["scores"]["ensemble"]["balanced"],
        )


class Trainer:
    """Train, evaluate and keep the record in OUTPUT_DIR; ``to_go_on`` is the command to resume."""

    def __init__(self, task: Task, options: argparse.Namespace, to_go_on: str) -> None:
        self.task = task
        self.options = options
        self.to_go_on = to_go_on
        self.device = torch.device(options.device)
        self.class_counts = count_classes(task.train_labels, len(task.class_names))
        self.configuration = {
            **{
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(options).items()
            },
            "classes": task.class_names,
            "class_counts": self.class_counts.tolist(),
        }
        self.libraries = ("torch", *task.libraries, "lgla_losses")
        self.criterion = build_criterion(self.class_counts, options).to(self.device)
        self.model = build_model(task, options).to(self.device)
        if task.augment is not None:
            task.augment.to(self.device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.compile:
            self.model.compile()
        if options.cuda_graphs:  # for small networks: their experts run faster together in a graph
            for module in self.model.modules():
                if isinstance(module, GroupConvExperts):
                    module.together = True
        # None, not a method of this object: loaders in a reference cycle end their workers late and out of
        # order.
        self.graphed_pass = GraphedPass(self._pass, self.model) if options.cuda_graphs else None
        self.order = EpochOrder(len(task.train_labels), options)
        self.optimizer = make_optimizer(self.model, options)
        self.schedule = make_schedule(self.optimizer, options, self.order.num_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        loading: dict[str, Any] = {
            "collate_fn": task.collate,
            "num_workers": options.workers,
            "persistent_workers": options.workers > 0,
            "worker_init_fn": ignore_interrupts,
            "pin_memory": self.device.type == "cuda",
            # A loader draws a seed for its workers, but not from the generator of dropout.
            "generator": torch.Generator(),
        }
        samples = Seeded(task.train, options.seed if task.augment is None else None)
        self.train_loader = DataLoader(samples, batch_sampler=self.order, **loading)
        self.val_loader = DataLoader(task.val, options.batch_size, **loading)
        self.progress = Progress()

    def fit(self) -> None:
        """Train from the current state to the last epoch, then write the record."""
        options, progress = self.options, self.progress
        begun = time.monotonic() - progress.seconds
        make_folder("--log-dir", options.log_dir)
        self.task.keep(options.log_dir)
        with (
            Interruption() as interruption,
            SummaryWriter(options.log_dir, purge_step=progress.epoch + 1) as writer,
        ):
            while progress.epoch < options.epochs:
                self._train_epoch(interruption)
                if not interruption.requested:
                    self._end_epoch(writer)
                progress.seconds = time.monotonic() - begun
                if (
                    progress.step == 0
                    and progress.curve[-1]["scores"]
                    and progress.best is progress.curve[-1]
                ):
                    self._save("best.pt")
                self._save("last.pt")
                if interruption.requested:
                    print(f"stopped after a step and saved; continue with:\n{self.to_go_on}")
                    raise SystemExit(128 + signal.SIGINT)
        self._report()

    def _train_epoch(self, interruption: Interruption) -> None:
        """Do the remaining steps of the epoch, or those before an interruption."""
        progress = self.progress
        self.order.epoch, self.order.steps_done = progress.epoch, progress.step
        self.model.train()
        if self.task.augment is not None and progress.step == 0:
            # Networks of different methods draw different amounts of random numbers; the images must be the
            # same.
            torch.manual_seed(mixed_seed(self.options.seed, progress.epoch, 1))
        batches = iter(self.train_loader)
        shots = self._shots()
        with tqdm(
            desc=f"epoch {progress.epoch + 1}/{self.options.epochs}",
            total=self.order.num_steps,
            initial=progress.step,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        ) as bar:
            for step in self.order.steps():
                num_samples = sum(map(len, step))
                loss = self._train_step(batches, len(step), num_samples)
                progress.step += 1
                progress.loss += loss * num_samples
                bar.set_postfix({"loss": f"{loss:.3f}", **shots}, refresh=False)
                bar.update()
                if interruption.requested:
                    return

    def _shots(self) -> dict[str, str]:
        """The last evaluation, for the progress bar."""
        evaluations = [entry["scores"] for entry in self.progress.curve if entry["scores"]]
        scores = evaluations[-1]["ensemble"] if evaluations else {}
        return {name: percent(scores[name]) for name in ("many", "medium", "few") if name in scores}

    def _train_step(self, batches: Iterator[Any], num_batches: int, num_samples: int) -> float:
        """One step of the optimizer: the mean loss over the samples of its batches."""
        total = torch.zeros((), device=self.device)
        run_pass = self.graphed_pass or self._pass
        for _ in range(num_batches):
            inputs, target = self._to_device(next(batches))
            # A recorded step has one batch; its mean is that of the loss.
            normalizer = () if self.options.cuda_graphs else (num_samples,)
            total += run_pass(inputs, target, *normalizer)
        if not total.isfinite():
            raise SystemExit(
                f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}: expected a finite loss, "
                f"got {total.item()}; lower --lr or --clip-norm, or use --amp bf16 or none. Saved files in "
                f"{self.options.log_dir} are kept"
            )
        self.scaler.unscale_(self.optimizer)
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=not self.options.cuda_graphs)
        return total.item()

    def _pass(self, inputs: list[Tensor], target: Tensor, normalizer: int | None = None) -> Tensor:
        """Compute the loss of a batch, and add its gradients to those of the parameters."""
        loss: Tensor = self.criterion(self._forward(inputs), target, normalizer=normalizer)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _to_device(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        inputs, target = batch
        inputs = [tensor.to(self.device, non_blocking=True) for tensor in inputs]
        inputs = self.task.prepared(inputs, self.model.training)
        return inputs, target.to(self.device, non_blocking=True)

    def _forward(self, inputs: list[Tensor]) -> ExpertOutput:
        dtype = AMP_DTYPES[self.options.amp]
        # A cast weight in the cache would not belong to the recorded step.
        cache = not self.options.cuda_graphs
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=cache):
            output: ExpertOutput = self.model(*inputs)
        return output

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[ExpertOutput, Tensor]]:
        """The experts' outputs for the validation set, and its classes, a batch at a time."""
        self.model.eval()
        for batch in self.val_loader:
            inputs, target = self._to_device(batch)
            yield self._forward(inputs), target

    @torch.no_grad()
    def evaluate(self) -> Scores:
        """Accuracies on the validation set."""
        rows = ["ensemble", *(f"expert {k + 1}" for k in range(self.options.num_experts))]
        metrics = {row: ShotAccuracy(self.class_counts).to(self.device) for row in rows}
        for output, target in self.outputs():
            # In float32: means in bfloat16 tie, and ties go to the class with the lower index, in the head.
            output = output._replace(logits=output.logits.float())
            for metric, logits in zip(
                metrics.values(), [output.ensemble(), *output.logits.unbind(1)], strict=True
            ):
                metric.update(logits, target)
        return {row: score(metric) for row, metric in metrics.items()}

    def _end_epoch(self, writer: SummaryWriter) -> None:
        """Evaluate if the epoch is due, and count it as done."""
        progress, options = self.progress, self.options
        due = (progress.epoch + 1) % options.evaluate_every == 0 or progress.epoch + 1 == options.epochs
        scores = self.evaluate() if due else {}
        loss = progress.loss / self.order.num_samples
        progress.epoch, progress.step, progress.loss = progress.epoch + 1, 0, 0.0
        progress.curve.append({"epoch": progress.epoch, "loss": loss, "lr": progress.rate, "scores": scores})
        writer.add_scalar("loss", loss, progress.epoch)
        writer.add_scalar("lr", progress.rate, progress.epoch)
        for row, columns in scores.items():
            for column, accuracy in columns.items():
                if accuracy is not None:
                    writer.add_scalar(f"{column}/{row}", accuracy, progress.epoch)

    def _parts(self) -> dict[str, Any]:
        """The objects with a state_dict."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }

    def _save(self, name: str) -> None:
        """Write a checkpoint, whole or not at all."""
        path = self.options.log_dir / name
        checkpoint = {
            **{part: holder.state_dict() for part, holder in self._parts().items()},
            "progress": asdict(self.progress),
            "configuration": self.configuration,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        write_whole(path, lambda file: torch.save(checkpoint, file))

    def resume(self) -> None:
        """Continue from last.pt."""
        path = self.options.log_dir / "last.pt"
        checkpoint = load_plain(path)
        parts = {"configuration", "progress", *self._parts()}
        if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
            raise InputError(f"--resume: expected a checkpoint of this script, got another file as {path}")
        try:
            problem = self._difference(checkpoint)
            if not problem:
                self._restore(checkpoint)
        except Exception as error:  # any kind: any part may be damaged
            raise InputError(
                f"--resume: expected a checkpoint of this script, got a damaged one as {path} ({error!r}); "
                "start a run in another --log-dir"
            ) from error
        if problem:
            raise InputError(
                f"--resume: {path} belongs to another run: {problem}; pass the options it was started with, "
                "or another --log-dir"
            )

    def _difference(self, checkpoint: dict[str, Any]) -> str:
        """Differences between a checkpoint and this run; empty if it belongs to this run."""
        then = checkpoint["configuration"]
        differing = [
            f"{name} {reprlib.repr(then.get(name))}, now {reprlib.repr(self.configuration.get(name))}"
            for name in then.keys() | self.configuration.keys()
            if name not in FREE_OPTIONS and then.get(name) != self.configuration.get(name)
        ]
        return shortened(sorted(differing)) or differing_tensors(self.model.state_dict(), checkpoint["model"])

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Restore everything that a checkpoint holds."""
        for part, holder in self._parts().items():
            holder.load_state_dict(checkpoint[part])
        self.progress = Progress(**checkpoint["progress"])
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and checkpoint["cuda_rng"]:
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])

    def _report(self) -> None:
        """Print the table and write result.json."""
        final, best = self.progress.curve[-1], self.progress.best
        best_accuracy = best["scores"]["ensemble"]["balanced"]
        print_scores(
            final["scores"],
            f"Accuracy (%) after the last epoch, {final['epoch']}",
            f"best epoch, chosen on these data: {best['epoch']}, balanced {percent(best_accuracy)}",
        )
        record = {
            "configuration": self.configuration,
            "versions": {
                "python": platform.python_version(),
                # From the package itself: a checkout that is not installed has no metadata.
                **{name: import_module(name).__version__ for name in self.libraries},
            },
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{platform.machine()}, {torch.get_num_threads()} threads",
            "seed": self.options.seed,
            "class_counts": dict(zip(self.configuration["classes"], self.class_counts.tolist(), strict=True)),
            "curve": self.progress.curve,
            "final": final,
            "best": best,
            "best_is": "the epoch of the highest balanced accuracy on the validation set",
            "seconds": round(self.progress.seconds, 1),
        }
        path = self.options.log_dir / "result.json"
        content = json.dumps(record, indent=1) + "\n"
        write_whole(path, lambda file: file.write(content.encode()))
        print(f"record: {path}")


def percent(accuracy: float | None) -> str:
    """Format an accuracy for tables."""
    return "-" if accuracy is None else f"{100 * accuracy:.1f}"


def print_scores(scores: Scores, title: str, caption: str | None = None) -> None:
    """A table of accuracies, in percent."""
    table = Table(title=title, caption=caption)
    table.add_column("")
    for column in scores["ensemble"]:
        table.add_column(column, justify="right")
    for row, columns in scores.items():
        table.add_row(row, *map(percent, columns.values()))
    Console(width=80).print(table)


def run(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    prepare: Callable[[argparse.Namespace], Task],
) -> None:
    """Train the task that ``prepare`` makes from the options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(parser, arguments)
    given = [argument for argument in arguments if argument != "--resume"]
    to_go_on = shlex.join(["python", sys.argv[0], *given, "--resume"])
    torch.manual_seed(options.seed)
    try:
        if os.path.exists(options.data):  # else prepare() reports it first
            check_log_dir(options.log_dir, "last.pt", options.resume)
        trainer = Trainer(prepare(options), options, to_go_on)
        if options.resume:
            trainer.resume()
        trainer.fit()
    except InputError as error:
        parser.error(str(error))
