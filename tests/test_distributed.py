"""R ranks equal one process on the concatenated batch."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(world_size, tmp_path):
    """Loss, gradients, DDP, the number of collectives, process groups and torch.compile, on gloo."""
    worker = Path(__file__).with_name("distributed_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(world_size), tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"rank {rank} agrees" in output
