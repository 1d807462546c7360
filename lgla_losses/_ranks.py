"""The ranks of a data-parallel job: their number, their sums, and their messages."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Added to the extra number by a rank with bad values; larger than the digests of 65,536 ranks together.
_BAD = 1 << 40


class RanksOf:
    """Hold the process group of a module: copies of the module share it, because it cannot be copied."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> RanksOf:
        return self

    def __reduce__(self) -> tuple[type[RanksOf], tuple[None]]:
        if self.group is not None:
            raise TypeError(
                "process_group: expected a loss over all ranks (None) to pickle, got one with a group, "
                "which belongs to this process; save the state_dict and construct a new loss"
            )
        return RanksOf, (None,)


class Ranks(NamedTuple):
    """Hold the ranks that share the samples of a step, and what this rank sends besides its numbers.

    Attributes:
        number: number of ranks; 1 if nothing is shared.
        group: the ranks; None means all.
        digest: digest of the constants that must be the same on all ranks, or 0; see :func:`digest_of`.
        read: check the received values, which waits for a GPU; the same on all ranks.
    """

    number: int = 1
    group: ProcessGroup | None = None
    digest: int = 0
    read: bool = False

    def sum(self, values: Tensor) -> Tensor:
        """Sum the values over the ranks; return ``values`` itself if there is one rank.

        Raises:
            ValueError: received values are checked, and another rank has bad values or other constants.
        """
        if self.number == 1:
            return values
        packed = torch.cat([values.flatten(), values.new_full((1,), self.digest)])
        dist.all_reduce(packed, group=self.group)
        if self.read and packed[-1] != self.number * self.digest:
            self._explain(packed[-1] >= _BAD, values)
        return packed[:-1].view_as(values)

    def add_(self, values: Tensor) -> Tensor:
        """Sum the values over the ranks in place, and send nothing else."""
        if self.number > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Give the values of all ranks ``[R, ...]``."""
        if self.number == 1:
            return values[None]
        every = values.new_empty(self.number, *values.shape)
        dist.all_gather(list(every), values, group=self.group)
        return every

    def gather_number(self, number: int, like: Tensor) -> list[int]:
        """Give a number of every rank, sent through the device of ``like``."""
        if self.number == 1:
            return [number]
        numbers = torch.zeros(self.number, dtype=torch.int64, device=like.device)
        numbers[dist.get_rank(self.group)] = number
        found: list[int] = self.add_(numbers).tolist()
        return found

    def global_ranks(self) -> list[int]:
        """Give the global numbers of these ranks in the job."""
        return dist.get_process_group_ranks(self.group) if self.number > 1 else [0]

    def refuse(self, problem: ValueError, numbers: int, device: torch.device) -> NoReturn:
        """Raise for bad values of this rank, after telling the others, which wait for numbers.

        Args:
            problem: the error to raise.
            numbers: how many numbers the next :meth:`sum` adds; 0 if there is no sum.
            device: device of that sum.
        """
        if self.number == 1:
            raise problem
        if numbers:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            packed = torch.zeros(numbers + 1, dtype=dtype, device=device)
            packed[-1] = _BAD
            dist.all_reduce(packed, group=self.group)
            self.gather_number(-1, packed)
        who = f"rank {dist.get_rank()}: "
        raise ValueError(who + str(problem).removeprefix(who)) from problem

    def _explain(self, bad: bool | Tensor, like: Tensor) -> NoReturn:
        """Raise on every rank that has no bad values itself."""
        digests, ranks = self.gather_number(self.digest, like), self.global_ranks()
        if bad:
            named = [rank for rank, value in zip(ranks, digests, strict=True) if value < 0]
            raise ValueError(
                f"rank {dist.get_rank()}: expected finite logits or features and valid targets on all ranks, "
                f"got others on rank {', '.join(map(str, named))}; see the error of that rank"
            )
        named = [rank for rank, value in zip(ranks, digests, strict=True) if value != digests[0]]
        raise ValueError(
            "class_counts, adjustment: expected the same class counts, groups, adjustments and options on "
            f"all ranks, got others on rank {', '.join(map(str, named))} than on rank {ranks[0]}; construct "
            "the loss from the same class counts and arguments everywhere"
        )


def digest_of(constants: Iterable[Tensor]) -> int:
    """Make a positive 24-bit number that very likely differs if one of the tensors differs."""
    digest = 0
    for tensor in constants:
        if not tensor.is_meta:
            digest = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), digest)
    return max(1, digest & 0xFFFFFF)


def group_size(process_group: ProcessGroup | None) -> int:
    """Count the ranks of a group that contains this rank; 1 outside distributed training."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    num_ranks = dist.get_world_size(process_group)
    if num_ranks < 1:
        raise ValueError(
            "process_group: expected a group that contains this rank, got one without rank "
            f"{dist.get_rank()}; pass every rank its own training group, or sync=False"
        )
    return num_ranks


def refuse_data_parallel(module: torch.nn.Module) -> NoReturn:
    """Refuse copies by torch.nn.DataParallel, which calls ``_replicate_for_data_parallel`` for them."""
    raise TypeError(
        f"{type(module).__name__}: expected one process per device, got torch.nn.DataParallel, whose copies "
        "see only their part of the batch; use DistributedDataParallel under torchrun"
    )
