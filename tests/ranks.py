"""Starts the ranks of a job on this machine, each of which compares its part with one process."""

import subprocess
import sys
from pathlib import Path


def run_ranks(worker, world_size, folder, *, exit_codes=True):
    """Runs a script of tests/ once a rank, on gloo; every rank must say that it agrees, and end well."""
    script = Path(__file__).with_name(worker)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world_size), folder / "store"],
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
        assert f"rank {rank} agrees" in output, output
        assert process.returncode == 0 or not exit_codes, output
