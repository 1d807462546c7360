# Needs no other file.
"""Train LGLA with the Trainer of transformers on a CSV file of texts and labels.

The parts for LGLA are the two parts of the model, compute_loss, and a callback that shows the loss's angles
and weights in TensorBoard; all options of TrainingArguments work. The encoder is a small BERT with new
weights; its vocabulary is made of word pieces of the training texts.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def make_parser(**keywords: Any) -> argparse.ArgumentParser:
    """The options besides those of TrainingArguments."""
    parser = argparse.ArgumentParser(description=__doc__, **keywords)
    add = parser.add_argument
    add("data", type=Path, metavar="FILE.csv", help="texts and labels")
    add("--text_column", default="text", help="its name")
    add("--label_column", default="label", help="its name")
    add("--num_experts", type=int, default=3, help="the paper's K")
    add("--max_length", type=int, default=32, help="tokens per text; the rest is cut off")
    add("--vocabulary", type=int, default=8000, help="word pieces")
    return parser


try:
    import accelerate  # type: ignore[import-untyped]  # noqa: F401  (Trainer imports it late)
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"expected transformers 5 or newer, got {transformers.__version__}")
    from torch.utils.tensorboard import SummaryWriter
    from transformers import (
        AutoModel,
        BertConfig,
        BertTokenizer,
        EvalPrediction,
        HfArgumentParser,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )
    from transformers.integrations.integration_utils import TensorBoardCallback
    from transformers.utils.generic import ModelOutput

    from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss, count_classes, split_backbone
    from lgla_losses.metrics import ShotAccuracy
    from lgla_losses.monitor import LossMonitor
except ImportError as error:
    if __name__ != "__main__":
        raise
    parser = make_parser()
    parser.parse_known_args()  # answers --help
    way_out = "pip install 'transformers>=5' accelerate torchmetrics tqdm rich tensorboard"
    if error.name == "lgla_losses":
        way_out = "run `pip install .` in the clone of lgla-losses"
    parser.exit(2, f"{parser.prog}: error: {error}: {way_out}\n")

SMALL_BERT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}

DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/train_hf_trainer",
    "num_train_epochs": 6,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,  # also Trainer's default: several experts with cosine heads need clipping
    "warmup_steps": 0.1,  # share of all steps
    "lr_scheduler_type": "cosine",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_steps": 10,
    "label_names": ["labels"],  # the model does not take them: they go to compute_loss
    "ddp_find_unused_parameters": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": ["none"],  # main() adds TensorBoard
}


#: A text and its label.
Row = tuple[str, str]


@dataclass
class ExpertModelOutput(ModelOutput):
    """The fields of an ExpertOutput: logits ``[N, K, C]``, features ``[N, K, d]``, weight ``[K, C, d]``."""

    logits: Tensor | None = None
    features: Tensor | None = None
    weight: Tensor | None = None


class TextExperts(nn.Module):
    """The shared lower half of an encoder, and K experts with an upper half each."""

    def __init__(self, config: BertConfig, num_classes: int, num_experts: int = 3) -> None:
        super().__init__()
        encoder = AutoModel.from_config(config)
        at = f"encoder.layer.{config.num_hidden_layers // 2}"
        self.trunk, _ = split_backbone(encoder, at)
        self.experts = GroupConvExperts(
            # New weights for each expert; GroupConvExperts(stage, ..., reset=False) keeps pretrained weights.
            lambda: split_backbone(AutoModel.from_config(config), at)[1],
            num_experts,
            num_classes,
            reset=False,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ExpertModelOutput:
        """Compute the outputs of every expert."""
        output: ExpertOutput = self.experts(self.trunk(input_ids, attention_mask))
        return ExpertModelOutput(**output._asdict())


def compute_loss(
    outputs: ExpertModelOutput,
    labels: Tensor,
    num_items_in_batch: Tensor | None = None,
    *,
    criterion: LGLALoss,
) -> Tensor:
    """Compute the loss of a micro-batch, as its part of the mean over all samples of the step.

    Trainer counts these samples over the accumulated batches and all ranks, and multiplies the loss by the
    number of ranks, because DDP averages gradients over the ranks. So the normalizer is the full number of
    samples.
    """
    loss: Tensor = criterion(ExpertOutput(**outputs), labels, normalizer=num_items_in_batch)
    return loss


def ensemble_scores(outputs: Any, labels: Tensor) -> Tensor:
    """Keep the ensemble's logits of a batch for evaluation, without the class weights."""
    return ExpertOutput(*outputs).ensemble()


def compute_metrics(prediction: EvalPrediction, class_counts: Tensor) -> dict[str, float]:
    """Compute accuracy over all, many-, medium- and few-shot classes, if there are any."""
    metric = ShotAccuracy(class_counts)
    metric.update(torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids))
    return {name: mean.item() for name, mean in metric.compute().items() if not mean.isnan()}


class LogLoss(TrainerCallback):
    """Write the monitor's scalars of the loss whenever Trainer logs."""

    def __init__(self, monitor: LossMonitor, writer: SummaryWriter) -> None:
        self.monitor = monitor
        self.writer = writer

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write the scalars since the last time."""
        if control.should_log:
            self.monitor.write(self.writer, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop watching."""
        self.monitor.close()


def read_rows(path: Path, text_column: str, label_column: str) -> list[Row]:
    """The texts and labels of a CSV file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [(row[text_column], row[label_column]) for row in csv.DictReader(file)]


def hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training and validation rows: every fifth row of each label is held out."""
    train, val = [], []
    for name in sorted({label for _, label in rows}):
        own = [row for row in rows if row[1] == name]
        val += own[4::5]
        train += [row for i, row in enumerate(own) if i % 5 != 4]
    if not val:
        raise ValueError(
            f"expected a label with at least 5 rows, to hold one out, got {len(rows)} rows in total"
        )
    return train, val


def main(arguments: list[str] | None = None) -> None:
    """Train; --help lists the options."""
    parents = [make_parser(add_help=False)]
    parser = HfArgumentParser(TrainingArguments, description=__doc__, parents=parents)  # type: ignore[arg-type]
    parser.set_defaults(**DEFAULTS)
    try:
        args, options = parser.parse_args_into_dataclasses(arguments)
        train, val = hold_out(read_rows(options.data, options.text_column, options.label_column))
        names = sorted({label for _, label in train})
        class_counts = count_classes([names.index(label) for _, label in train], len(names))
        criterion = LGLALoss(class_counts, options.num_experts).to(args.device)
    except KeyError as error:
        parser.error(
            f"{options.data}: there is no column {error}; --text_column and --label_column name others"
        )
    except (OSError, ValueError, csv.Error) as error:
        parser.error(str(error))
    if args.n_gpu > 1:
        parser.error(
            f"expected one GPU per process, got {args.n_gpu}; start it with torchrun --nproc-per-node"
        )

    set_seed(args.seed)
    texts = [text for text, _ in train]
    tokenizer = BertTokenizer().train_new_from_iterator(texts, options.vocabulary, show_progress=False)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = BertConfig.from_dict(SMALL_BERT | sizes)

    def samples(rows: list[Row]) -> Any:  # which Trainer's own collator pads
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=options.max_length)[
            "input_ids"
        ]
        labels = [names.index(label) for _, label in rows]
        return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]

    train_set, val_set = samples(train), samples(val)
    trainer = Trainer(
        TextExperts(config, len(names), options.num_experts),
        args,
        train_dataset=train_set,
        eval_dataset=val_set,
        processing_class=tokenizer,
        compute_loss_func=partial(compute_loss, criterion=criterion),
        compute_metrics=partial(compute_metrics, class_counts=class_counts),
        preprocess_logits_for_metrics=ensemble_scores,
    )
    if trainer.is_world_process_zero():
        writer = SummaryWriter(args.output_dir)
        trainer.add_callback(TensorBoardCallback(writer))
        trainer.add_callback(LogLoss(LossMonitor(criterion), writer))

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    scores = trainer.predict(val_set, metric_key_prefix="").metrics or {}
    if trainer.is_world_process_zero():
        means = {name: scores.get(f"_{name}") for name in ("all", "many", "medium", "few")}
        shown = [f"{name} {100 * mean:.1f}" for name, mean in means.items() if mean is not None]
        print(f"accuracy (%) after step {trainer.state.global_step}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
