"""A check of probabilities on a GPU without waiting: a later call reports what was wrong."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lgla_losses._checks import SUM_TOLERANCE, no_probabilities
from lgla_losses._torch import unfit

#: Errors are reported in calls whose number is a multiple of this, and in calls that look.
TELLS_AT = 16


class Event(Protocol):
    """Describe an event that says whether a device has reached it, like ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Say whether the device has reached it."""
        ...


class LateLook:
    """Look at batches 1, 2, 4, 8 and so on of the probabilities given to one loss.

    It belongs to its loss in this process: copies and pickles of the loss start again.
    """

    def __init__(self) -> None:
        self._seen = 0
        #: Pending copies from the device: the event after the copy, the numbers, and their tolerance.
        self._pending: tuple[Event, Tensor, float] | None = None

    def __call__(self, target: Tensor) -> None:
        """Look at the probabilities ``[*B, C]`` of a batch if its number is due.

        Raises:
            ValueError: the probabilities of an earlier batch sum to more than 1, or one was negative. Sums
                below 1 do not point to several classes per sample.
        """
        self._seen += 1
        is_turn = not self._seen & (self._seen - 1)
        # Not at every call: all ranks must raise in the same step, or some would wait for the others.
        if is_turn or self._seen % TELLS_AT == 0:
            self._tell()
        if is_turn and self._pending is None and target.numel():
            numbers = _extremes(target).to("cpu", non_blocking=True)  # a copy like this goes to pinned memory
            self._pending = recorded_event(target.device), numbers, _tolerance(target)

    def _tell(self) -> None:
        """Raise if the numbers that arrived from the device are wrong."""
        if self._pending is None or not self._pending[0].query():
            return
        _, numbers, tolerance = self._pending
        self._pending = None
        lowest, least, most = numbers.tolist()
        if lowest < -tolerance or most > 1 + tolerance:
            raise ValueError(
                f"{no_probabilities(lowest, least, most)} (found in an earlier batch, because steps do not "
                "wait for a GPU; validate_args=False checks no batch, True checks every batch at once)"
            )

    def __deepcopy__(self, memo: dict[int, object]) -> LateLook:
        return LateLook()

    def __reduce__(self) -> tuple[type[LateLook], tuple[()]]:
        return LateLook, ()


def can_look(target: Tensor) -> bool:
    """Say whether a tensor can be looked at: on a GPU, and nothing records or transforms the step."""
    # Ask about the compiler first: else it would compile again whenever one of the others changes.
    return (
        not torch.compiler.is_compiling()
        and target.is_cuda
        and unfit(target) is None
        and not torch.cuda.is_current_stream_capturing()
    )


def recorded_event(device: torch.device) -> Event:
    """Record an event after the work queued on a GPU."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _extremes(target: Tensor) -> Tensor:
    """Compute the lowest value, the lowest sum and the highest sum of probabilities ``[*B, C]``."""
    sums = target.sum(dim=-1, dtype=torch.float32)
    return torch.stack([target.amin().float(), *sums.aminmax()])


def _tolerance(target: Tensor) -> float:
    """Give the tolerance for sums of probabilities ``[*B, C]``: 16 bits round small ones coarsely."""
    precision = torch.finfo(target.dtype)
    return SUM_TOLERANCE + precision.eps * (1 + precision.smallest_normal * target.shape[-1])
