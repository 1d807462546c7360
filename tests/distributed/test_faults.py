"""What is lost when a rank dies or hangs, or a run is killed: time, but no result."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scripts import ROOT, load

train_ddp = load("examples/train_ddp.py")

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests" / "helpers"))),
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


def run(command):
    """Exit code, output and seconds of a Python command."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=200)[0]
    finally:
        process.terminate()  # torchrun ends its ranks
        process.wait()
    return process.returncode, output, time.monotonic() - begun


@pytest.fixture
def data(tmp_path):
    """31 images of 3 classes: no number of ranks divides them, nor does a step of 8."""
    generator = np.random.default_rng(0)
    labels = {"train": np.arange(31) ** 2 % 7 % 3, "val": np.arange(9) % 3}
    arrays = {f"{half}_labels": of_half for half, of_half in labels.items()}
    for half, of_half in labels.items():
        arrays[f"{half}_images"] = generator.integers(0, 256, (len(of_half), 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def torchrun(kind, data, *options):
    """examples/train_ddp.py on two ranks, of which the second is faulty."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    script = [ROOT / "tests" / "helpers" / "faulty_rank.py", kind, data]
    return run(
        [*launcher, *script, "--epochs", 3, "--batch-size", 8, "--log-dir", data.parent / "run", *options]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "ddp"])
def test_a_killed_run_ends_as_one_left_alone(kind, data, tmp_path):
    """By SIGKILL at random moments and while a checkpoint is written; one process, and two ranks."""
    status, output, _ = run([ROOT / "tests" / "helpers" / "faults_worker.py", kind, data, tmp_path])
    assert status == 0, output
    assert "in mid-training" in output


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(data):
    status, output, seconds = torchrun("dies", data)
    assert status != 0
    assert seconds < 60, output
    assert (data.parent / "run" / "last.pt").exists()
    assert not (data.parent / "run" / "result.json").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_when_the_others_lose_patience(data):
    status, output, seconds = torchrun("hangs", data, "--timeout", 5)
    assert status != 0
    assert 5 < seconds < 90, output
    assert "imed out" in output
    assert (data.parent / "run" / "last.pt").exists()
    assert not (data.parent / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--batch-size", "1"],
            "--batch-size 1: expected at least one sample per rank in every step for --norm batch",
        ),
        (["--timeout", "0"], "--timeout: expected a number from 1 to 1e+09, got 0"),
        (["--log-dir", __file__], "--log-dir: expected a folder, got the file "),
        (["no.npz"], "unrecognized arguments: no.npz"),
    ],
)
def test_bad_options_end_every_rank_before_it_waits_for_others(options, message, data, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused([data, *options], message, capsys)


def test_without_torchrun_there_are_no_ranks(capsys):
    refused([], "expected a start with torchrun --nproc-per-node 2", capsys)


def test_what_is_no_checkpoint_of_this_run_is_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    last = tmp_path / "last.pt"
    then = {"norm": "batch", "epochs": 5, "batch_size": 64, "lr": 0.1, "clip_norm": 1.0, "seed": 0}
    then["class_counts"] = [5, 18, 8]
    for content, options, message in (
        ({"curve": [], "run": then}, [], "add --resume to continue it, or choose another folder"),
        (
            {"curve": [], "run": then},
            ["--resume"],
            "to another run: epochs 5, now 30; choose another --log-dir",
        ),
        ({"model": {}}, ["--resume"], "expected a checkpoint of this script, got another file"),
        ({"curve": [], "run": {}}, ["--resume"], "to another run: norm None, now batch"),
    ):
        torch.save(content, last)
        refused([data, "--log-dir", tmp_path, *options], message, capsys)
    last.write_bytes(b"half")
    refused([data, "--log-dir", tmp_path, "--resume"], "expected tensors of torch.save", capsys)


def refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_ddp.main([*map(str, arguments)])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
