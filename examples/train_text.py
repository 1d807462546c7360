# Needs: cli.py, files.py, graphs.py, recipe.py, sampling.py, training.py.
"""Train LGLA on a CSV file of texts and labels, with a transformers text encoder from local files.

Without --checkpoint or --config the encoder is a small BERT with new weights; without --checkpoint the
vocabulary is made of word pieces of the training texts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cli import InputError, Parser, add_options, needs, number, shortened, start
from files import kind_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FILE.csv", help="texts and labels")
    texts = parser.add_argument_group("texts")
    add = texts.add_argument
    add("--text-column", default="text", help="its name")
    add("--label-column", default="label", help="its name")
    add("--val", type=Path, metavar="FILE.csv", help="validation texts; None holds some out")
    add(
        "--val-fraction",
        type=number(float, 0.01, 0.99),
        default=0.2,
        help="validation share of every label, without --val",
    )
    source = texts.add_mutually_exclusive_group().add_argument
    source("--config", metavar="FILE.json|TYPE", help="an encoder with new weights; None is a small BERT")
    source("--checkpoint", type=Path, metavar="DIR", help="a local checkpoint with its tokenizer")
    add("--vocabulary", type=number(int, 100, 10**7), default=8000, help="word pieces, without --checkpoint")
    add("--max-length", type=number(int, 3), default=128, help="tokens per text; the rest is cut off")
    add_options(parser)
    parser.set_defaults(epochs=10, batch_size=32, optimizer="adamw", lr=5e-4, weight_decay=0.01)
    return parser


with needs("text", make_parser, __name__):
    import transformers
    import transformers.modeling_utils  # imports torchvision if installed, and would hide why that fails
    from recipe import Task
    from sampling import Sample, mixed_seed
    from training import run

#: The encoder without --checkpoint or --config.
SMALL_BERT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}

#: A text and its label.
Row = tuple[str, str]


class TextSet(Dataset[Sample]):
    """Token ids of texts and their classes."""

    def __init__(self, rows: list[Row], class_names: list[str], encode: Callable[[list[str]], Any]) -> None:
        self.ids: list[list[int]] = encode([text for text, _ in rows])["input_ids"]
        self.labels = [class_names.index(label) for _, label in rows]

    def __getitem__(self, index: int) -> Sample:
        return (torch.tensor(self.ids[index]),), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


def pad(samples: list[Sample], padding: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Make a batch: token ids and attention mask, as long as its longest text, and classes."""
    ids = [tokens for (tokens,), _ in samples]
    mask = pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True)
    labels = torch.tensor([label for _, label in samples])
    return (pad_sequence(ids, batch_first=True, padding_value=padding), mask), labels


def read_rows(path: Path, options: argparse.Namespace) -> list[Row]:
    """The texts and labels of a CSV file."""
    csv.field_size_limit(sys.maxsize)
    if kind_of(path) == "a pipe or device":  # it could be read only once, and --resume reads again
        raise InputError(
            f"{path}: expected a CSV file, got a pipe or device; write the texts to a file first"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            table = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: expected a CSV file in UTF-8, got {error}") from error
    missing = [name for name in (options.text_column, options.label_column) if name not in columns]
    if missing:
        raise InputError(
            f"{path}: expected the columns {options.text_column} and {options.label_column}, got "
            f"{shortened(columns) or 'an empty file'}; --text-column and --label-column name others"
        )
    if not table:
        raise InputError(f"{path}: expected rows below the header, got none")
    longer = [number for number, row in enumerate(table, 1) if None in row]
    if longer:
        raise InputError(
            f"{path}: expected as many fields as columns, got rows with more: {shortened(longer)}; quote "
            "texts that hold a comma"
        )
    rows = [(row[options.text_column], row[options.label_column]) for row in table]
    empty = [
        number for number, row in enumerate(rows, 1) if not all(value and value.strip() for value in row)
    ]
    if empty:
        raise InputError(
            f"{path}: expected a text and a label in every row, got rows without: {shortened(empty)}"
        )
    return [(text, label.strip()) for text, label in rows]


def hold_out(rows: list[Row], options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Training and validation rows: the same fraction of every label, keeping one row to train."""
    generator = torch.Generator().manual_seed(mixed_seed(options.seed))
    train, val = [], []
    for name in sorted({label for _, label in rows}):
        own = [row for row in rows if row[1] == name]
        num_val = min(round(options.val_fraction * len(own)), len(own) - 1)
        order = torch.randperm(len(own), generator=generator).tolist()
        val += [own[i] for i in order[:num_val]]
        train += [own[i] for i in order[num_val:]]
    if not val:
        raise InputError(
            f"{options.data}: expected enough rows to hold some out, got {len(rows)}; pass --val"
        )
    return train, val


def local(what: str, load: Callable[..., Any], path: object) -> Any:
    """Read a local file or folder with transformers."""
    try:
        return load(path, local_files_only=True)
    except Exception as error:  # any kind: there are many readers
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: expected {what} of transformers, got {reason}") from error


def new_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A tokenizer of lower-case word pieces of the texts."""
    return transformers.BertTokenizer().train_new_from_iterator(texts, vocabulary, show_progress=False)


def read_config(options: argparse.Namespace) -> Any:
    """The configuration of an encoder with new weights."""
    if options.config is None:
        return transformers.BertConfig.from_dict(SMALL_BERT)
    if Path(options.config).is_file():
        return local("a configuration", transformers.AutoConfig.from_pretrained, options.config)
    known = list(transformers.CONFIG_MAPPING)
    if options.config not in known:
        close = ", ".join(get_close_matches(options.config, known)) or "none"
        raise InputError(
            f"--config: expected a .json file or a model type, got {options.config}; close types: {close}"
        )
    return transformers.AutoConfig.for_model(options.config)


def middle_layer(encoder: nn.Module, num_layers: int) -> str:
    """The path of the first layer of the upper half."""
    for path, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return f"{path}.{num_layers // 2}"
    top = ", ".join(name for name, _ in encoder.named_children())
    raise InputError(f"--split-at: required for a {type(encoder).__name__}, whose modules are {top}")


def prepare(options: argparse.Namespace) -> Task:
    """Prepare texts, tokenizer and the encoder that the options name."""
    if options.checkpoint is not None and not options.checkpoint.is_dir():
        raise InputError(f"--checkpoint: expected a local folder, got {options.checkpoint}")
    rows = read_rows(options.data, options)
    train, val = (rows, read_rows(options.val, options)) if options.val else hold_out(rows, options)
    names = sorted({label for _, label in train})
    unknown = sorted({label for _, label in val}.difference(names))
    if unknown:
        raise InputError(f"{options.val}: expected labels of {options.data}, got {shortened(unknown)}")

    make_network: Callable[[], nn.Module]
    if options.checkpoint is None:
        tokenizer = new_tokenizer([text for text, _ in train], options.vocabulary)
        config = read_config(options)
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        make_network = partial(transformers.AutoModel.from_config, config)
    else:
        folder = options.checkpoint
        tokenizer = local("a tokenizer", transformers.AutoTokenizer.from_pretrained, folder)
        config = local("a configuration", transformers.AutoConfig.from_pretrained, folder)
        load = partial(transformers.AutoModel.from_pretrained, dtype=torch.float32)
        make_network = partial(local, "a model", load, folder)
    network = make_network()
    positions = getattr(getattr(network, "embeddings", None), "position_embeddings", None)
    # RoBERTa and similar models count positions after that of the padding.
    offset = getattr(positions, "padding_idx", None)
    limit = getattr(config, "max_position_embeddings", options.max_length) - (
        0 if offset is None else offset + 1
    )
    if options.max_length > limit:
        raise InputError(
            f"--max-length: expected at most {limit}, the encoder's positions, got {options.max_length}"
        )
    options.split_at = options.split_at or middle_layer(network, config.num_hidden_layers)

    def keep(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)

    encode = partial(tokenizer, truncation=True, max_length=options.max_length)
    return Task(
        make_network,
        options.checkpoint is not None,
        TextSet(train, names, encode),
        TextSet(val, names, encode),
        [names.index(label) for _, label in train],
        names,
        ("transformers",),
        partial(pad, padding=tokenizer.pad_token_id),
        keep,
    )


def main(arguments: list[str] | None = None) -> None:
    """Train on texts; --help lists the options."""
    run(make_parser(), arguments, prepare)


if __name__ == "__main__":
    start(main)
