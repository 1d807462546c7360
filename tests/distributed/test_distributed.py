"""R ranks equal one process on the concatenated batch."""

import pytest
from ranks import run_ranks


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(world_size, tmp_path):
    """Loss, gradients, DDP, collectives, bad values, process groups and torch.compile, on gloo."""
    run_ranks("distributed_worker.py", world_size, tmp_path)
