"""The one collective of the loss: sums over the ranks of a data-parallel job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def ranks_to_sync(sync: bool, process_group: ProcessGroup | None) -> int:
    """Number of ranks that share this step; 1 unless ``sync`` holds in distributed training.

    Without gradients, as in validation on one rank, nothing may wait for other ranks.
    """
    if not (sync and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return 1
    num_ranks = dist.get_world_size(process_group)
    if num_ranks < 1:
        raise ValueError(
            f"process_group: expected a group that holds this rank, got one without rank {dist.get_rank()}; "
            "give every rank the group it trains in, or sync=False"
        )
    return num_ranks


def sum_over_ranks(values: Tensor, num_ranks: int, process_group: ProcessGroup | None) -> Tensor:
    """The elementwise sum over the ranks; ``values`` itself where there is one rank."""
    if num_ranks == 1:
        return values
    total = values.clone()
    dist.all_reduce(total, group=process_group)
    return total
