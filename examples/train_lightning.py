# Needs no other file.
"""Train LGLA in Lightning, with the loss's angles and weights in TensorBoard.

The parts for LGLA are the last two lines of layers in the model, the loss, and a callback; Lightning handles
checkpoints, resuming, devices and strategies. Gradients accumulated by Lightning are means of the batches'
means. The images come from a file for lgla_losses.data.read_npz, or without a file from scikit-learn's
digits, cut to a long tail: pip install lightning torchmetrics tensorboard scikit-learn
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {number}")
    return number


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "data", type=Path, nargs="?", metavar="FILE.npz", help="the images; without a file long-tailed digits"
    )
    add("--epochs", type=positive, default=30, help="passes over the training data")
    add("--batch-size", type=positive, default=64, help="samples per step and device")
    add("--lr", type=float, default=0.1, help="highest learning rate")
    add(
        "--clip-norm",
        type=float,
        default=1.0,
        help="largest norm of the gradient; 0: no limit, needed for FSDP",
    )
    add("--devices", default="auto", help="Lightning's option: a number, or auto")
    add("--strategy", default="auto", help="Lightning's option, such as ddp")
    add("--log-every", type=positive, default=5, help="steps from one log to the next")
    add("--log-dir", type=Path, default=Path("runs/train_lightning"), help="checkpoints and curves")
    add("--resume", action="store_true", help="continue the run in --log-dir")
    return parser


try:
    import lightning

    if [int(number) for number in lightning.__version__.split(".")[:2]] < [2, 4]:
        raise ImportError(f"expected lightning 2.4 or newer, got {lightning.__version__}")
    from lightning import Callback, LightningModule, Trainer, seed_everything
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss, count_classes
    from lgla_losses.data import ImageData, long_tailed_counts, long_tailed_indices, read_npz
    from lgla_losses.metrics import ShotAccuracy
    from lgla_losses.monitor import LossMonitor
except ImportError as error:
    if __name__ != "__main__":
        raise
    parser = make_parser()
    parser.parse_known_args()  # answers --help
    way_out = "pip install 'lightning>=2.4' torchmetrics tqdm rich tensorboard"
    if error.name == "lgla_losses":
        way_out = "run `pip install .` in the clone of lgla-losses"
    parser.exit(2, f"{parser.prog}: error: {error}: {way_out}\n")


class LongTailedClassifier(LightningModule):
    """A shared convolution, K experts, the loss, and accuracy by shots; images ``[N, 3, H, W]``."""

    def __init__(self, class_counts: list[int], num_experts: int = 3, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        stage = nn.Sequential(
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.experts = GroupConvExperts(stage, num_experts, len(class_counts), reset=True)
        # As a part of the module, the loss moves to its device and is saved in its checkpoints.
        self.criterion = LGLALoss(class_counts, num_experts)
        self.accuracy = ShotAccuracy(class_counts)

    def forward(self, images: Tensor) -> ExpertOutput:
        """Compute the outputs of every expert."""
        output: ExpertOutput = self.experts(self.trunk(images))
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Compute the loss; over several devices it is the loss of the whole batch."""
        images, labels = batch
        loss: Tensor = self.criterion(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count the correct predictions of the ensemble."""
        images, labels = batch
        output = self(images)
        # In float32: means in bfloat16 tie, and ties go to the class with the lower index, in the head.
        self.accuracy.update(output._replace(logits=output.logits.float()).ensemble(), labels)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy over all, many-, medium- and few-shot classes, if there are any."""
        means = self.accuracy.compute()
        self.accuracy.reset()
        scores = {f"accuracy/{name}": mean for name, mean in means.items() if not mean.isnan()}
        # The metric has already counted the samples of all devices; without sync_dist Lightning warns.
        self.log_dict(scores, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """SGD with a cosine schedule."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class LogLoss(Callback):
    """Write the monitor's scalars of ``module.criterion`` to the trainer's loggers, whenever they log."""

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Start to watch."""
        self.monitor = LossMonitor(module.criterion, self.every)
        self.interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.due = trainer.global_step + self.interval

    def on_train_batch_end(self, trainer: Trainer, *batch: Any) -> None:
        """Log the scalars since the last time."""
        if trainer.global_step >= self.due:
            self.due += self.interval
            for logger in trainer.loggers:
                logger.log_metrics(self.monitor.compute(), trainer.global_step)
            self.monitor.reset()

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Stop watching."""
        self.monitor.close()


def long_tailed_digits() -> dict[str, ImageData]:
    """24 images of each digit to validate, and from the rest 150 zeros, 97 ones, ... and 3 nines to train."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = ImageData((digits.images * 255 / 16).round().astype(np.uint8), digits.target)
    val = long_tailed_indices(images.targets, [24] * 10)
    rest = images.subset(np.setdiff1d(np.arange(len(images)), val))
    class_counts = long_tailed_counts(150, num_classes=10, imbalance_factor=50)
    train = long_tailed_indices(rest.targets, class_counts)
    return {"train": rest.subset(train), "val": images.subset(val)}


def read_images(path: Path | None) -> tuple[ImageData, ImageData]:
    """Training and validation images."""
    data = long_tailed_digits() if path is None else read_npz(path)
    for half in data.values():
        half.transform = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return data["train"], data["val"]


def main(arguments: list[str] | None = None) -> None:
    """Train; --help lists the options."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    last = options.log_dir / "last.ckpt"
    if options.resume and not last.is_file():
        parser.error(f"--resume: there is no {last}; leave out --resume to start a run")
    if last.exists() and not options.resume:
        parser.error(
            f"--log-dir: {last} belongs to an earlier run; add --resume to continue it, or choose another "
            "folder"
        )

    seed_everything(0)
    try:
        train, val = read_images(options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: pass FILE.npz, or pip install scikit-learn")
    class_counts = count_classes(train.targets, max(train.targets) + 1).tolist()
    model = LongTailedClassifier(class_counts, lr=options.lr)
    if options.resume:  # Lightning would continue with the options of the checkpoint
        then = torch.load(last, weights_only=True)["hyper_parameters"]
        other = [f"{name} differs" for name, value in model.hparams.items() if then.get(name) != value]
        if other:
            parser.error(
                f"--resume: {last} belongs to another run: {', '.join(other)}; choose another --log-dir"
            )

    checkpoints = [
        ModelCheckpoint(options.log_dir, "last", enable_version_counter=False),
        ModelCheckpoint(options.log_dir, "best", "accuracy/all", mode="max", enable_version_counter=False),
    ]
    try:
        trainer = Trainer(
            devices=options.devices,
            strategy=options.strategy,
            max_epochs=options.epochs,
            gradient_clip_val=options.clip_norm,
            log_every_n_steps=options.log_every,
            logger=TensorBoardLogger(options.log_dir, name=None),
            callbacks=[*checkpoints, LogLoss(every=options.log_every)],
        )
    except (ValueError, TypeError, OverflowError, MisconfigurationException) as error:
        parser.error(f"--devices {options.devices:.20} --strategy {options.strategy:.20}: {error}")

    loaders = DataLoader(train, options.batch_size, shuffle=True), DataLoader(val, options.batch_size)
    trainer.fit(model, *loaders, ckpt_path=last if options.resume else None)
    trainer.validate(model, loaders[1])


if __name__ == "__main__":
    main()
