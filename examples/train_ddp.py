# Needs: cli.py, files.py, graphs.py, quickstart.py, recipe.py, sampling.py, shares.py, training.py.
"""Train LGLA on several GPUs or CPU processes, with DistributedDataParallel or FSDP2 (--fsdp).

torchrun --nproc-per-node 2 examples/train_ddp.py [FILE.npz]: arrays as in train_images.py, or scikit-learn's
long-tailed digits without a file. Loss and gradients equal those of one process on the whole batch, for
shares of any size; with --norm batch each rank has its own statistics. Continue a killed run with --resume.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cli import InputError, Parser, needs, number, start
from files import check_log_dir, load_plain, make_folder, write_whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, nargs="?", metavar="FILE.npz", help="the images; None is long-tailed digits")
    add("--fsdp", action="store_true", help="shard parameters, gradients and optimizer with FSDP2")
    add("--norm", choices=("batch", "group"), default="batch", help="group uses no batch statistics")
    add("--epochs", type=number(int, 1), default=30, help="passes over the training data")
    add("--batch-size", type=number(int, 1), default=64, help="samples per step on all ranks together")
    add("--lr", type=number(float, 0), default=0.1, help="highest learning rate of a cosine schedule")
    add("--clip-norm", type=number(float, 0), default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights and order")
    add(
        "--timeout",
        type=number(float, 1, 1e9),
        default=600.0,
        help="seconds that a rank waits for others; must exceed the time to write a checkpoint",
    )
    add(
        "--log-dir",
        type=Path,
        default=Path("runs", "train_ddp"),
        help="folder that all ranks see, for checkpoint and record",
    )
    add("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    return parser


with needs("train", make_parser, __name__):
    from recipe import ExpertModel
    from sampling import mixed_seed
    from shares import Images, Shares, loader, read_data
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm
    from training import percent

    from lgla_losses import GroupConvExperts, LGLALoss, count_classes
    from lgla_losses.metrics import ShotAccuracy

#: Options that a checkpoint does not depend on.
FREE_OPTIONS = {"data", "fsdp", "timeout", "log_dir", "resume"}

#: Checkpoints hold whole tensors, so that a run can continue on another number of ranks, with or without
#: --fsdp.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build_model(classes: int, norm: str) -> ExpertModel:
    """A small network: replace it by yours, split with split_backbone."""
    make_norm = nn.BatchNorm2d if norm == "batch" else lambda width: nn.GroupNorm(8, width)

    def layer(width: int, out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, bias=False), make_norm(out), nn.ReLU())

    return ExpertModel(layer(3, 32, 1), GroupConvExperts(lambda: layer(32, 64, 2), 3, classes))


def distribute(model: ExpertModel, device: torch.device, fsdp: bool) -> nn.Module:
    """Wrap the model for training on all ranks."""
    if not fsdp:
        # Running statistics are averaged at the end of an epoch, instead of sending those of rank 0 in every
        # step. Its replacement is newer than torch 2.6.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(model.to(device), broadcast_buffers=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(model.trunk, mesh=mesh, shard_placement_fn=placement)
    # The angles read the class weights after forward, so their unit must not free them then.
    fully_shard(model, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=False)
    # The logits are a view, and nothing writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    return model


def placement(parameter: nn.Parameter) -> Shard | None:
    """Shard the largest dimension that the ranks divide: the first, of experts, may be too small."""
    divided = [d for d, size in enumerate(parameter.shape) if size % dist.get_world_size() == 0]
    return Shard(max(divided, key=lambda d: parameter.shape[d])) if divided else None


class Run:
    """A run on all ranks; rank 0 writes the files."""

    def __init__(self, options: argparse.Namespace, train: Images, val: Images) -> None:
        self.options = options
        self.is_writer = dist.get_rank() == 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of main's choice
        self.class_counts = count_classes(train.labels, num_classes(train))
        torch.manual_seed(options.seed)  # the same weights on every rank
        self.model = distribute(build_model(len(self.class_counts), options.norm), self.device, options.fsdp)
        self.criterion = LGLALoss(self.class_counts).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.shares = Shares(len(train), options.batch_size, options.seed)
        self.train_loader = loader(train, self.shares)
        self.val_loader = loader(val, Shares(len(val), options.batch_size))
        num_steps = options.epochs * len(self.shares)
        self.schedule = LambdaLR(self.optimizer, lambda step: (1 + math.cos(math.pi * step / num_steps)) / 2)
        self.curve: list[dict[str, Any]] = []

    def fit(self) -> None:
        """Train to the last epoch, and save after every epoch."""
        folder = self.options.log_dir
        if self.is_writer:
            make_folder("--log-dir", folder)
        writer = SummaryWriter(folder, purge_step=len(self.curve) + 1) if self.is_writer else None
        while len(self.curve) < self.options.epochs:
            loss = self._train_epoch()
            self.curve.append({"epoch": len(self.curve) + 1, "loss": loss, "scores": self._evaluate()})
            self._save(folder / "last.pt")
            if writer is not None:
                writer.add_scalar("loss", loss, len(self.curve))
                for name, accuracy in self.curve[-1]["scores"].items():
                    writer.add_scalar(name, accuracy, len(self.curve))
        if writer is not None:
            writer.close()
            run = description(self.options, self.class_counts)
            record = json.dumps({"run": run, "ranks": dist.get_world_size(), "curve": self.curve}, indent=1)
            write_whole(folder / "result.json", lambda file: file.write(record.encode()))
            print(*(f"{name} {percent(value)}" for name, value in self.curve[-1]["scores"].items()), sep=", ")

    def _train_epoch(self) -> float:
        """One pass over the training set; the mean loss."""
        self.shares.epoch = len(self.curve)
        # Makes random layers, such as dropout, a function of epoch and rank, also after --resume.
        torch.manual_seed(mixed_seed(self.options.seed, self.shares.epoch, dist.get_rank()))
        self.model.train()
        total = torch.zeros((), device=self.device)
        bar = tqdm(
            self.train_loader,
            desc=f"epoch {self.shares.epoch + 1}/{self.options.epochs}",
            unit="step",
            disable=not self.is_writer,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        for (images, target), step in zip(bar, self.shares.steps(), strict=True):
            output = self.model(images.to(self.device, non_blocking=True))
            loss = self.criterion(output, target.to(self.device, non_blocking=True))
            self.optimizer.zero_grad()
            loss.backward()
            if self.options.clip_norm:  # the norm over all ranks, including FSDP's shards
                nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach() * len(step)
        # The mean of the ranks' losses is the loss of the whole batch.
        total /= self.shares.num_samples
        mean_over_ranks(total)
        for buffer in self.model.buffers():
            if buffer.is_floating_point():  # running statistics
                mean_over_ranks(buffer)
        if not total.isfinite():
            raise SystemExit(
                f"epoch {self.shares.epoch + 1}: expected a finite loss, got {total}; lower --lr"
            )
        return total.item()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Accuracies on the samples of all ranks, for the columns that have classes."""
        metric = ShotAccuracy(self.class_counts).to(self.device)
        self.model.eval()
        for images, target in self.val_loader:
            metric.update(self.model(images.to(self.device)).ensemble(), target.to(self.device))
        return {name: value.item() for name, value in metric.compute().items() if not value.isnan()}

    def _save(self, path: Path) -> None:
        """Gather the state from all ranks; rank 0 writes it, whole or not at all."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=WHOLE)
        if self.is_writer:
            state = {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}
            checkpoint = state | {"curve": self.curve, "run": description(self.options, self.class_counts)}
            write_whole(path, lambda file: torch.save(checkpoint, file))

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        try:
            model, optimizer = checkpoint["model"], checkpoint["optimizer"]
            set_state_dict(
                self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=WHOLE
            )
            self.schedule.load_state_dict(checkpoint["schedule"])
            self.curve = checkpoint["curve"]
        except Exception as error:  # any kind: any part may be damaged
            raise InputError(
                f"--resume: expected a checkpoint of this script, got a damaged one in {self.options.log_dir}"
                f" ({error!r}); begin a run in another --log-dir"
            ) from error


def mean_over_ranks(values: Tensor) -> None:
    """In place."""
    dist.all_reduce(values)
    values /= dist.get_world_size()


def description(options: argparse.Namespace, class_counts: Tensor) -> dict[str, Any]:
    """Settings that must be the same in a checkpoint and in the run that continues it."""
    return {
        **{name: value for name, value in vars(options).items() if name not in FREE_OPTIONS},
        "class_counts": class_counts.tolist(),
    }


def num_classes(train: Images) -> int:
    """Number of classes; every class must have a sample."""
    return int(train.labels.max()) + 1


def check(options: argparse.Namespace, train: Images) -> dict[str, Any] | None:
    """Refuse wrong options before ranks wait for each other; return the checkpoint to continue, if any."""
    ranks, last = int(os.environ["WORLD_SIZE"]), options.log_dir / "last.pt"
    smallest = len(train) // math.ceil(len(train) / options.batch_size)
    if options.norm == "batch" and smallest < ranks:
        raise InputError(
            f"--batch-size {options.batch_size}: expected at least one sample per rank in every step for "
            f"--norm batch, got steps of {smallest} for {ranks} ranks; raise it, or use --norm group"
        )
    check_log_dir(options.log_dir, "last.pt", options.resume and last.exists())
    if not last.exists():
        return None
    checkpoint = load_plain(last)
    if not isinstance(checkpoint, dict) or not {"curve", "run"} <= checkpoint.keys():
        raise InputError(f"--resume: expected a checkpoint of this script, got another file as {last}")
    then, now = checkpoint["run"], description(options, count_classes(train.labels, num_classes(train)))
    other = [
        f"{name} {then.get(name)}, now {value}" for name, value in now.items() if then.get(name) != value
    ]
    if other:
        raise InputError(
            f"--resume: {last} belongs to another run: {'; '.join(other)}; choose another --log-dir"
        )
    return checkpoint


def main(arguments: list[str] | None = None) -> None:
    """One rank of a run; --help lists the options."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" not in os.environ:
        parser.error(
            "expected a start with torchrun --nproc-per-node 2 examples/train_ddp.py, got one without it"
        )
    try:
        train, val = read_data(options.data)
        checkpoint = check(options, train)
    except InputError as error:
        parser.error(str(error))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout))
    run = Run(options, train, val)
    try:
        if checkpoint is not None:
            run.resume(checkpoint)
        run.fit()
    except InputError as error:
        parser.error(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    start(main)
