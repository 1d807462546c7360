"""Constant tensors that travel with a module but never lose precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class ConstantBuffers(nn.Module):
    """A module whose own buffers follow ``.to(device)`` but ignore ``.half()`` and its kin.

    Mixed-precision training casts whole models; class counts or margins rounded to sixteen
    bits would silently change the loss.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda t: moved(t, fn), recurse)  # type: ignore[no-untyped-call, no-any-return]


def moved(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Where ``fn`` takes the buffer, but in its own precision."""
    try:
        there = fn(buffer)
    except TypeError:
        # Apple's MPS has no float64; float32 is the full precision there.
        return fn(buffer.float())
    return there if there.dtype == buffer.dtype else buffer.to(there.device)
