"""Starts the ranks of a job on this machine, each of which compares its part with one process."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def serve(check):
    """Of such a script: ``check(rank, world_size)`` on the rank that its arguments name."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank, world_size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    check(rank, world_size)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} agrees", flush=True)


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
