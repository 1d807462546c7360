"""A network under DDP and FSDP2 on R ranks equals one process on the concatenated batch."""

import subprocess
import sys
from pathlib import Path


def test_ranks_train_as_one_process(tmp_path):
    """Uneven and empty shares, momentum, accumulated gradients, and class weights that FSDP2 took away."""
    worker = Path(__file__).with_name("data_parallel_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), "2", tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    # What the ranks report, not their exit codes: FSDP2 on a CPU at times aborts as the interpreter ends.
    for rank, output in enumerate(outputs):
        assert f"rank {rank} agrees" in output, output
