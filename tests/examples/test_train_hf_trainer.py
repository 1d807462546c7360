"""examples/train_hf_trainer.py: the Trainer of transformers trains, logs, saves and resumes with the loss."""

import functools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_hf_trainer
from curves import curves
from safetensors.torch import load_file
from scripts import ROOT, load
from texts import COUNTS, topic_rows, write_csv

import lgla_losses

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "num_train_epochs": 1}


@pytest.fixture
def data(tmp_path):
    return write_csv(tmp_path / "data.csv", topic_rows())


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train_hf_trainer, "SMALL_BERT", TINY)


def run(data, folder, **options):
    """The weights of the last checkpoint."""
    options = {"vocabulary": 120, "max_length": 16, "use_cpu": True, "disable_tqdm": True} | options
    options = [f"--{name}={value}" for name, value in options.items()]
    train_hf_trainer.main([str(data), f"--output_dir={folder}", *options])
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return load_file(last / "model.safetensors")


def test_it_learns_and_logs_what_the_loss_does(data, tmp_path, capsys):
    options = {"learning_rate": 0.01, "warmup_steps": 0, "per_device_train_batch_size": 8}
    run(data, tmp_path / "run", num_train_epochs=10, logging_steps=7, **options)
    logged = curves(tmp_path / "run")
    assert logged["eval/all"][-1][1] > 0.9
    assert logged["train/loss"][-1][1] < 0.5 * logged["train/loss"][0][1]
    steps = [step for step, _ in logged["angle/expert 1"]]
    assert len(steps) >= 5
    assert steps[0] == 7
    assert all(step % 7 == 0 for step in steps)
    assert logged["angle/expert 1"][-1][1] < logged["angle/expert 1"][0][1] < math.pi
    for name in ("hard share/expert 2", "weight/expert 3", "accuracy/ensemble/group 1"):
        assert len(logged[name]) == len(steps), name
    printed = capsys.readouterr().out
    means = [
        f"{name} {100 * logged[f'eval/{name}'][-1][1]:.1f}"
        for name in ("all", "many", "medium", "few")
        if f"eval/{name}" in logged
    ]
    assert printed.splitlines()[-1].endswith(f": {', '.join(means)}")


def test_the_counts_are_those_of_the_training_texts(data, tmp_path, monkeypatch):
    made = []

    def noted(*arguments):
        made.append(lgla_losses.LGLALoss(*arguments))
        return made[-1]

    monkeypatch.setattr(train_hf_trainer, "LGLALoss", noted)
    run(data, tmp_path / "run", num_train_epochs=1, num_experts=2)
    assert made[0].grouper.class_counts.tolist() == [count * 4 // 5 for count in COUNTS.values()]
    assert made[0].num_experts == 2
    assert not made[0]._forward_hooks  # the monitor is gone


def test_accumulated_gradients_are_those_of_the_whole_batch(data, tmp_path, monkeypatch):
    """Of 56 texts in steps of 20, so that the last has micro-batches of 10 and 6."""
    monkeypatch.setattr(train_hf_trainer, "SMALL_BERT", TINY | NO_DROPOUT)
    monkeypatch.setattr(train_hf_trainer, "LGLALoss", functools.partial(lgla_losses.LGLALoss, aaw=False))
    whole, parts = (
        run(
            data,
            tmp_path / str(accumulate),
            per_device_train_batch_size=20 // accumulate,
            gradient_accumulation_steps=accumulate,
            **SGD,
        )
        for accumulate in (1, 2)
    )
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_killed_run_resumes(data, tmp_path, monkeypatch):
    """To the bit, in the middle of an epoch."""
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = run(data, tmp_path / "whole", **options)

    def killed(self, args, state, control, **others):
        if state.global_step == 6:
            raise OSError("killed")

    monkeypatch.setattr(train_hf_trainer.LogLoss, "on_step_end", killed)
    with pytest.raises(OSError, match="killed"):
        run(data, tmp_path / "parts", **options)
    monkeypatch.undo()
    monkeypatch.setattr(train_hf_trainer, "SMALL_BERT", TINY)
    before = tmp_path / "parts" / "checkpoint-4"
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == [before.name]
    resumed = run(data, tmp_path / "parts", **options, resume_from_checkpoint=before)
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)


@pytest.mark.slow
def test_ranks_equal_one_process(data, tmp_path):
    """Two processes on gloo: with weights, and with two micro-batches a step."""
    worker = load("tests/helpers/hf_trainer_worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, worker.__file__, data, tmp_path / "ranks"],
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output
    for case, (_, accumulate) in worker.CASES.items():
        worker.train(case, data, tmp_path / "alone", batch_size=14 * accumulate, accumulate=1)
        alone, together = (
            load_file(next((tmp_path / folder / case).glob("checkpoint-*")) / "model.safetensors")
            for folder in ("alone", "ranks")
        )
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
        assert curves(tmp_path / "ranks" / case)["angle/expert 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere.csv"}, "No such file or directory: 'nowhere.csv'"),
        (
            {"label_column": "topic"},
            "there is no column 'topic'; --text_column and --label_column name others",
        ),
        ({"num_experts": 9}, "num_experts: expected at most C + 1 = 4 for 3 classes"),
        ({"abacus": 1}, "are not used by the HfArgumentParser: ['--abacus=1']"),
        ({"eval_strategy": "abacus"}, "abacus"),
    ],
)
def test_wrong_input_is_refused(data, tmp_path, capsys, options, message):
    data = Path(options.pop("data", data))
    with pytest.raises(SystemExit) as stopped:
        run(data, tmp_path / "run", **options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_rows_too_few_to_hold_one_out_are_refused(tmp_path, capsys):
    few = write_csv(tmp_path / "few.csv", [("a text", "fruit"), ("another", "metal")] * 4)
    with pytest.raises(SystemExit) as stopped:
        run(few, tmp_path / "run")
    assert stopped.value.code == 2
    assert "expected a label with at least 5 rows, to hold one out, got 8 rows" in capsys.readouterr().err


def test_the_rate_reaches_its_height_in_a_short_run(data, tmp_path):
    run(data, tmp_path / "run", num_train_epochs=1, per_device_train_batch_size=4, logging_steps=1)
    rates = [rate for _, rate in curves(tmp_path / "run")["train/learning_rate"]]
    assert max(rates) == pytest.approx(train_hf_trainer.DEFAULTS["learning_rate"])
