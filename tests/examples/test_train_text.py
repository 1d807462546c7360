"""examples/train_text.py: what it adds to training.py, which test_train_images.py tests."""

import itertools
import json
import os
import signal

import pytest
import torch
import training
import transformers
from scripts import load
from texts import COUNTS, topic_rows, write_csv

train_text = load("examples/train_text.py")

TINY = {
    "model_type": "distilbert",
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 40,
    "dropout": 0.3,
}


@pytest.fixture
def rows():
    return topic_rows()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def run(data, log_dir, *options):
    defaults = [
        "--epochs",
        "2",
        "--max-length",
        "16",
        "--vocabulary",
        "120",
        "--workers",
        "0",
        "--lr",
        "0.01",
    ]
    train_text.main([str(data), "--log-dir", str(log_dir), *defaults, *map(str, options)])
    return json.loads((log_dir / "result.json").read_text())


def test_it_learns(rows, tmp_path):
    """With the small BERT, which begins from nothing."""
    options = ["--lr", "0.001", "--epochs", "8", "--batch-size", "8"]
    record = run(write_csv(tmp_path / "data.csv", rows), tmp_path / "run", *options)
    assert record["final"]["scores"]["ensemble"]["balanced"] > 0.9
    assert record["class_counts"] == {"fruit": 32, "metal": 16, "river": 8}
    assert record["configuration"]["split_at"] == "encoder.layer.2"
    assert record["versions"].keys() == {"python", "torch", "transformers", "lgla_losses"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run", local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Apple")["input_ids"]) == ["[CLS]", "apple", "[SEP]"]


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_interrupted_in_mid_epoch_and_resumed(rows, config, tmp_path, monkeypatch, layout):
    data, whole, parts = write_csv(tmp_path / "data.csv", rows), tmp_path / "whole", tmp_path / "in parts"
    options = ["--config", config, "--layout", layout, "--batch-size", "8", "--accumulate", "2"]
    record = run(data, whole, *options)
    original, count = training.Trainer._train_step, itertools.count(1)

    def train_step(self, *arguments):
        if next(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(training.Trainer, "_train_step", train_step)
    with pytest.raises(SystemExit) as stopped:
        run(data, parts, *options)
    assert stopped.value.code == 130
    assert run(data, parts, *options, "--resume")["curve"] == record["curve"]
    weights = [torch.load(path / "last.pt", weights_only=True)["model"] for path in (whole, parts)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_padding_changes_no_accuracy(rows, config, tmp_path, monkeypatch):
    """Texts evaluated one by one, without padding, and in one batch."""
    data = write_csv(tmp_path / "data.csv", rows)
    captured = {}
    monkeypatch.setattr(training.Trainer, "fit", lambda self: captured.update(trainer=self))
    train_text.main(
        [str(data), "--config", str(config), "--max-length", "16", "--log-dir", str(tmp_path / "run")]
    )
    trainer = captured["trainer"]
    val = trainer.val_loader.dataset
    (ids, mask), _ = train_text.pad([val[i] for i in range(len(val))], padding=0)
    assert not mask.all()
    trainer.model.eval()
    with torch.no_grad():
        together = trainer.model(ids, mask).logits
        alone = torch.cat(
            [
                trainer.model(text[None][:, :n], m[None][:, :n]).logits
                for text, m, n in zip(ids, mask, mask.sum(1), strict=True)
            ]
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_read_with_its_tokenizer(rows, tmp_path):
    """Every expert begins with the weights of the checkpoint; a rate of 0 leaves them so."""
    tokenizer = train_text.new_tokenizer([text for text, _ in rows], 120)
    config = transformers.DistilBertConfig(**{**TINY, "vocab_size": len(tokenizer)})
    model = transformers.AutoModel.from_config(config)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "checkpoint")
    data = write_csv(tmp_path / "data.csv", rows)
    run(data, tmp_path / "run", "--checkpoint", tmp_path / "checkpoint", "--lr", "0")
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    name = "transformer.layer.1.ffn.lin1.weight"
    for expert in trained[f"experts.stage.{name}"]:
        assert torch.equal(expert, model.get_parameter(name))


def test_a_validation_file_and_other_columns(rows, config, tmp_path):
    header = ("id", "Kategorie", "Inhalt")
    data = write_csv(
        tmp_path / "data.csv", [(i, label, text) for i, (text, label) in enumerate(rows)], header
    )
    val = write_csv(tmp_path / "val.csv", [(0, "river", "one of nile")], header)
    columns = ["--text-column", "Inhalt", "--label-column", "Kategorie"]
    record = run(data, tmp_path / "run", "--val", val, "--config", config, *columns)
    assert record["class_counts"] == COUNTS


def test_labels_are_stripped_and_texts_may_be_long(tmp_path):
    long = "x " * 100_000
    data = write_csv(tmp_path / "data.csv", [(long, "a"), ("y", " a"), ("z", "a ")])
    columns = train_text.argparse.Namespace(text_column="text", label_column="label")
    assert train_text.read_rows(data, columns) == [(long, "a"), ("y", "a"), ("z", "a")]


SMALL_ROBERTA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SMALL_ROBERTA |= {"max_position_embeddings": 40, "vocab_size": 99}


def test_positions_behind_the_paddings_are_counted(rows, tmp_path, capsys):
    """RoBERTa numbers its tokens from 2 on, so 40 positions hold 38."""
    (tmp_path / "roberta.json").write_text(transformers.RobertaConfig(**SMALL_ROBERTA).to_json_string())
    data = write_csv(tmp_path / "data.csv", rows)
    options = ["--config", tmp_path / "roberta.json"]
    with pytest.raises(SystemExit):
        run(data, tmp_path / "run", *options, "--max-length", "40")
    limit = int(capsys.readouterr().err.partition("expected at most ")[2].partition(",")[0])
    assert limit < 40
    run(data, tmp_path / "run", *options, "--max-length", limit, "--epochs", "1", "--warmup-epochs", "0")


def test_the_split_is_stratified_and_of_the_seed(rows, tmp_path, config):
    options = train_text.argparse.Namespace(seed=0, val_fraction=0.25, data="data.csv")
    splits = []
    for options.seed in (0, 0, 1):
        train, val = train_text.hold_out([*rows, ("alone", "single")], options)
        assert sorted([*train, *val]) == sorted([*rows, ("alone", "single")])
        assert [sum(label == name for _, label in val) for name in (*COUNTS, "single")] == [10, 5, 2, 0]
        splits.append(val)
    assert splits[0] == splits[1] != splits[2]


SHORT = ("--max-length", "16")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "expected a CSV file in UTF-8, got [Errno 2]"),
        (b"", [], "expected the columns text and label, got an empty file"),
        (b"\xff\xfetext", [], "expected a CSV file in UTF-8, got 'utf-8' codec"),
        (b"text,label\n", [], "expected rows below the header, got none"),
        (b"text,topic\na,b\n", [], "expected the columns text and label, got text, topic; --text-column"),
        (b"text,label\na,b\n  ,b\nc,\nd\n", [], "got rows without: 2, 3, 4"),
        (b"text,label\nhello, world,b\n", [], "got rows with more: 1; quote"),
        (b"text,label\na,b\nc,d\n", [], "expected enough rows to hold some out, got 2; pass --val"),
        (b"text,label\na,b\nc,d\n", ["--val", "VAL"], "expected labels of "),
        (b"text,label\na,b\nc,d\n", ["--val", "VAL"], "got new"),
        ("rows", ["--config", "bart!"], "expected a .json file or a model type, got bart!; close types: "),
        ("rows", ["--config", "VAL"], "expected a configuration of transformers, got "),
        ("rows", ["--checkpoint", "some/model"], "--checkpoint: expected a local folder, got some/model"),
        ("rows", ["--checkpoint", "."], "expected a tokenizer of transformers, got "),
        (
            "rows",
            ["--config", "CONFIG", "--max-length", "41"],
            "--max-length: expected at most 40, ",
        ),
        (
            "rows",
            ["--config", "CONFIG", *SHORT, "--split-at", "layer.7"],
            "--split-at layer.7: at: expected the path",
        ),
        ("rows", ["--config", "CONFIG", "--checkpoint", "."], "not allowed with argument --config"),
    ],
)
def test_wrong_input_is_refused(rows, config, tmp_path, capsys, content, options, message):
    data = tmp_path / "data.csv"
    if content == "rows":
        write_csv(data, rows)
    elif content is not None:
        data.write_bytes(content)
    places = {"VAL": write_csv(tmp_path / "val.csv", [("text", "new")]), "CONFIG": config, ".": tmp_path}
    options = [str(places.get(option, option)) for option in options]
    with pytest.raises(SystemExit) as stopped:
        train_text.main([str(data), "--log-dir", str(tmp_path / "run"), "--workers", "0", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_first_try_of_one_epoch_trains_and_saves(rows, config, tmp_path):
    data = write_csv(tmp_path / "data.csv", rows)
    assert len(run(data, tmp_path / "run", "--config", config, "--epochs", "1")["curve"]) == 1


def test_a_pipe_as_texts_is_refused_instead_of_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "pipe.csv", tmp_path / "run")
    assert stopped.value.code == 2
    assert "pipe.csv: expected a CSV file, got a pipe or device" in capsys.readouterr().err


def test_a_wrong_path_is_told_before_what_an_earlier_run_left(rows, config, tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", rows)
    run(data, tmp_path / "run", "--config", config, "--epochs", "1")
    for path, message in (
        (tmp_path / "nowhere.csv", "nowhere.csv: expected a CSV file"),
        (data, "add --resume to continue"),
    ):
        with pytest.raises(SystemExit):
            run(path, tmp_path / "run", "--config", config, "--epochs", "1")
        assert message in capsys.readouterr().err
