"""The library's inner choices that benchmarks and checks vary: whatever names may move stand here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import arguments  # noqa: F401  (finds the package)

from lgla_losses.kernels import autograd, linear

#: Enters a choice; what was chosen before holds again afterwards.
Choice = Callable[[], AbstractContextManager[None]]


@contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _chunks_of(size: int) -> Choice:
    return partial(_set, linear, "_CHUNK_BYTES", {"cpu": size, "cuda": size})


#: When the gradient of a scalar loss is computed.
gradient_at_once: Choice = partial(_set, autograd, "_AT_ONCE", True)
gradient_in_backward: Choice = partial(_set, autograd, "_AT_ONCE", False)

#: How the linear loss adds its products, aligns its rows of logits, and divides the batch.
two_kernels_to_add: Choice = partial(_set, linear, "_ADD_AT_ONCE", False)
rows_end_to_end: Choice = partial(_set, linear, "_ROW_BYTES", {})
chunks_of_32_mb: Choice = _chunks_of(1 << 25)
#: The least there is: 64 samples.
small_chunks: Choice = _chunks_of(1)


#: Plans of Triton's kernels beside the default, and the numbers of classes for which each differs from it.
OTHER_PLANS = {
    "resident": range(2_049, 16_385),
    "two-rows": range(16_385, 1 << 31),
}


def other_plans(num_classes: int) -> list[str]:
    """The names of what Triton's kernels may be compiled as otherwise, for so many classes."""
    return [plan for plan, where in OTHER_PLANS.items() if num_classes in where]


def has_triton() -> bool:
    """Whether Triton's kernels can be compiled at all."""
    try:
        import_module("lgla_losses.kernels.triton")
    except ImportError:
        return False
    return True


@contextmanager
def use_plan(plan: str) -> Iterator[None]:
    """Compile Triton's kernels as the plan says."""
    kernels = import_module("lgla_losses.kernels.triton")
    before = kernels.use(plan)
    try:
        yield
    finally:
        kernels.use(before)
