"""A network under DDP and FSDP2 on R ranks equals one process on the concatenated batch."""

from ranks import run_ranks


def test_ranks_train_as_one_process(tmp_path):
    """Uneven and empty shares, momentum, accumulated gradients, and class weights that FSDP2 took away."""
    # No exit codes: FSDP2 on a CPU at times aborts as the interpreter ends.
    run_ranks("data_parallel_worker.py", 2, tmp_path, exit_codes=False)
