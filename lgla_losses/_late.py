"""A look at probabilities on a GPU for which nothing waits: a later call says what was wrong."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lgla_losses._checks import SUM_TOLERANCE, no_probabilities
from lgla_losses._torch import unfit

#: What was wrong is told in the calls whose number this divides, and in those that look.
TELLS_AT = 16


class Event(Protocol):
    """Describe what tells whether a device has come to a point in its work, as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Say whether it has."""
        ...


class LateLook:
    """Look at batches 1, 2, 4, 8 and so on of the probabilities that one loss gets.

    It belongs to its loss in this process: copies and pickles of the loss begin anew.
    """

    def __init__(self) -> None:
        self._seen = 0
        #: What is on its way from the device: an event behind it, the numbers, and how far they may be off.
        self._pending: tuple[Event, Tensor, float] | None = None

    def __call__(self, target: Tensor) -> None:
        """Look at the probabilities ``[*B, C]`` of a batch if it is its turn.

        Raises:
            ValueError: those of an earlier batch sum to more than 1, or one was negative. Sums below 1 are
                no sign of several classes a sample.
        """
        self._seen += 1
        is_turn = not self._seen & (self._seen - 1)
        # Not at any call: ranks that raise do so in the same step, or some would wait for the others.
        if is_turn or self._seen % TELLS_AT == 0:
            self._tell()
        if is_turn and self._pending is None and target.numel():
            numbers = _extremes(target).to("cpu", non_blocking=True)  # such a copy goes to pinned memory
            self._pending = recorded_event(target.device), numbers, _tolerance(target)

    def _tell(self) -> None:
        """Raise if what has arrived from the device is wrong."""
        if self._pending is None or not self._pending[0].query():
            return
        _, numbers, tolerance = self._pending
        self._pending = None
        lowest, least, most = numbers.tolist()
        if lowest < -tolerance or most > 1 + tolerance:
            raise ValueError(
                f"{no_probabilities(lowest, least, most)} (found in an earlier batch, as no step waits for a "
                "GPU; validate_args=False looks at none, True at every batch at once)"
            )

    def __deepcopy__(self, memo: dict[int, object]) -> LateLook:
        return LateLook()

    def __reduce__(self) -> tuple[type[LateLook], tuple[()]]:
        return LateLook, ()


def can_look(target: Tensor) -> bool:
    """Say whether a look at a tensor is possible: on a GPU, where nothing records or transforms the step."""
    # The compiler first: it would compile anew for every change of the others.
    return (
        not torch.compiler.is_compiling()
        and target.is_cuda
        and unfit(target) is None
        and not torch.cuda.is_current_stream_capturing()
    )


def recorded_event(device: torch.device) -> Event:
    """Record an event behind the work that a GPU has been given."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _extremes(target: Tensor) -> Tensor:
    """Compute the lowest value, the lowest sum and the highest sum of probabilities ``[*B, C]``."""
    sums = target.sum(dim=-1, dtype=torch.float32)
    return torch.stack([target.amin().float(), *sums.aminmax()])


def _tolerance(target: Tensor) -> float:
    """Say how far sums of probabilities ``[*B, C]`` may be off; 16 bits round small ones to steps."""
    precision = torch.finfo(target.dtype)
    return SUM_TOLERANCE + precision.eps * (1 + precision.smallest_normal * target.shape[-1])
