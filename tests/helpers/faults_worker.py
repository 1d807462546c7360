"""Training jobs whose processes are forked here: killing one and starting it again costs no imports.

Every job trains a small data set with dropout, is killed at random moments and while it writes a checkpoint,
goes on from the last whole one, and must end with the weights of a job that was left alone.
"""

import contextlib
import io
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torchvision_shim  # noqa: F401
import train_ddp
import train_images
from torch import nn

torch.set_num_threads(1)

EPOCHS = 20


def with_dropout(build):
    def build_model(*arguments):
        model = build(*arguments)
        model.trunk.append(nn.Dropout(0.3))
        return model

    return build_model


def tiny_network():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7)),
    )


def write_half(marker):
    """Save half of a checkpoint, and then no more."""
    save = torch.save

    def half(content, file):
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        marker.touch()
        time.sleep(600)

    return half


class Job:
    """A script on R ranks, each a process."""

    def __init__(self, script, arguments, num_ranks, log_dir):
        self.script = script
        self.arguments = [*map(str, arguments), "--log-dir", str(log_dir)]
        self.num_ranks = num_ranks
        self.log_dir = log_dir

    def start(self, write_half_of=None):
        """Begin, or go on; the checkpoint of that number is written by half."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        resume = ["--resume"] if (self.log_dir / "last.pt").exists() else []
        self.processes = [
            self._fork(rank, port, [*self.arguments, *resume], write_half_of)
            for rank in range(self.num_ranks)
        ]

    def _fork(self, rank, port, arguments, write_half_of):
        process = os.fork()
        if process:
            return process
        status = 1
        with contextlib.suppress(BaseException), (self.log_dir.parent / f"rank{rank}.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.num_ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if write_half_of is not None:
                save, half, count = torch.save, write_half(self.marker), itertools.count(1)
                torch.save = lambda *args: (half if next(count) == write_half_of else save)(*args)
            # Renews PyTorch's thread pool, which threads of its own would race to do after a fork.
            torch.set_num_threads(1)
            try:
                self.script.main(arguments)
                status = 0
            except BaseException:
                traceback.print_exc(file=log)
                raise
        os._exit(status)

    @property
    def marker(self):
        return self.log_dir.parent / "half written"

    def wait(self):
        """Until all ranks have ended by themselves."""
        assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in self.processes] == [
            0
        ] * self.num_ranks

    def wait_for_checkpoints(self, number):
        """Until it has written so many more, or ended."""
        last, deadline = self.log_dir / "last.pt", time.monotonic() + 60
        for _ in range(number):
            written = last.stat().st_mtime_ns
            while last.stat().st_mtime_ns == written and not (self.log_dir / "result.json").exists():
                assert time.monotonic() < deadline, "no checkpoint was written"
                time.sleep(0.002)

    def kill(self, first):
        """One rank, then the others, as torchrun does when one is lost; whether it still ran."""
        ran = os.waitpid(self.processes[first], os.WNOHANG)[0] == 0
        for process in [self.processes[first]] * ran + self.processes[:first] + self.processes[first + 1 :]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        return ran

    def kill_while_writing(self, number):
        """While it writes its file of that number; what it wrote before is whole."""
        self.start(write_half_of=number)
        deadline = time.monotonic() + 60
        while not self.marker.exists():
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.01)
        self.kill(first=0)
        self.marker.unlink()
        half = list(self.log_dir.glob("*.tmp"))
        assert len(half) == 1, half
        try:
            torch.load(half[0], weights_only=True)
        except Exception:  # of whatever kind: torch.load has many
            pass
        else:
            raise AssertionError("the half-written checkpoint was whole")
        last = self.log_dir / "last.pt"
        assert last.exists() == (number > 1)
        if last.exists():
            torch.load(last, weights_only=True)

    def result(self):
        """The weights, and the curve."""
        record = json.loads((self.log_dir / "result.json").read_text())
        return torch.load(self.log_dir / "last.pt", weights_only=True)["model"], record["curve"]


def check_kills(script, arguments, num_ranks, folder, seed, num_kills=3):
    whole, killed = (Job(script, arguments, num_ranks, folder / name) for name in ("whole", "killed"))
    folder.mkdir()
    begun = time.monotonic()
    whole.start()
    whole.wait()
    seconds = time.monotonic() - begun
    generator = random.Random(seed)
    killed.kill_while_writing(number=1)
    killed.kill_while_writing(number=3)
    hits = 0
    for _ in range(num_kills):
        killed.start()
        killed.wait_for_checkpoints(generator.randrange(3))
        time.sleep(2 * generator.random() * seconds / EPOCHS)
        hits += killed.kill(first=generator.randrange(num_ranks))
    assert hits > 0
    killed.start()
    killed.wait()
    (weights, curve), (other, others) = whole.result(), killed.result()
    assert curve == others
    torch.testing.assert_close(weights, other, rtol=0, atol=0)
    assert not list((folder / "killed").glob("*.tmp"))
    print(f"{folder.name}: {hits} kills of {num_kills} in mid-training, {seconds:.1f} s a run", flush=True)


def check_numbers_of_ranks(folder, data):
    """Without statistics of a batch one rank, two, and two that shard train alike, with empty shares too."""
    curves = []
    for name, num_ranks, options in (("one", 1, []), ("two", 2, []), ("sharded", 2, ["--fsdp"])):
        # 16 steps, of which the last has one sample for two ranks.
        arguments = [data, "--norm", "group", "--epochs", 2, "--batch-size", 2, "--lr", 0.02, *options]
        job = Job(train_ddp, arguments, num_ranks, folder / name)
        job.start()
        job.wait()
        curves.append(job.result()[1])
    for curve in curves[1:]:
        losses = [[entry["loss"] for entry in each] for each in (curve, curves[0])]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    print("one rank and two agree", flush=True)


def main(kind, data, folder):
    folder = Path(folder)
    train_ddp.build_model = with_dropout(build_model := train_ddp.build_model)
    train_images.network_factory = lambda options: tiny_network
    epochs = ["--epochs", EPOCHS, "--batch-size", 8]
    if kind == "images":
        single = [data, *epochs, "--split-at", 4, "--workers", 0, "--device", "cpu"]
        check_kills(train_images, single, 1, folder / "images", seed=0)
    else:
        check_kills(train_ddp, [data, *epochs], 2, folder / "ddp", seed=1)
        check_kills(train_ddp, [data, *epochs, "--fsdp"], 2, folder / "fsdp", seed=2, num_kills=1)
        train_ddp.build_model = build_model
        check_numbers_of_ranks(folder, data)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(*sys.argv[1:])
