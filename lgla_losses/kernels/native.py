"""The engine for CPUs: native.c, called with pointers."""

from __future__ import annotations

import ctypes
import importlib.util

import torch
from torch import Tensor

from lgla_losses.functional import compute_dtype

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_P, _I, _R = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
#: A second thread would begin when fewer logits than these are done.
_WORTH_THREADS = 1 << 14
#: Memory of this size is fresh from the operating system each time.
_WORTH_LARGE_PAGES = 1 << 23

# What native.c returns, in bits.
_TARGET_OUT_OF_RANGE, _OUT_OF_MEMORY = 1, 8


class BadValuesError(IndexError):
    """A target is out of range; or, where that is to be checked, a logit is not finite or not a cosine's."""


class _Batch(ctypes.Structure):
    _fields_ = [
        *(
            (name, _P)
            for name in (
                "logits",
                "target",
                "table",
                "weights",
                "upstream",
                "losses",
                "total",
                "state",
                "gradient",
            )
        ),
        *(
            (name, _I)
            for name in (
                "n",
                "k",
                "c",
                "vn",
                "vk",
                "vc",
                "gn",
                "gk",
                "gc",
                "un",
                "ignore_index",
                "dtype",
                "check",
                "threads",
            )
        ),
        *(("smoothing", _R), ("divisor", _R), ("fresh", _P), ("fresh_bytes", _I)),
    ]


class _Angles(ctypes.Structure):
    _fields_ = [
        *(
            (name, _P)
            for name in ("logits", "target", "group_index", "angles", "statistics", "weights", "samples")
        ),
        *((name, _I) for name in ("n", "k", "c", "g", "vn", "vk", "vc", "ignore_index", "dtype", "ranks")),
        ("scale", _R),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    spec = importlib.util.find_spec("lgla_losses.kernels._native")
    if spec is None or spec.origin is None:
        return (
            None,
            "it was not compiled when lgla-losses was installed, which takes a C compiler with OpenMP",
        )
    try:
        # After torch, whose OpenMP threads it shares.
        library = ctypes.CDLL(spec.origin)
        for function, arguments in (
            (library.lgla_cross_entropy, _Batch),
            (library.lgla_statistics, _Angles),
            (library.lgla_weights, _Angles),
        ):
            function.argtypes = [ctypes.POINTER(arguments)]
            function.restype = ctypes.c_int
        library.lgla_layout.restype = _I
        if library.lgla_layout() != 1000 * ctypes.sizeof(_Batch) + ctypes.sizeof(_Angles):
            return None, f"{spec.origin} was compiled from other sources; install the package anew"
    except (OSError, AttributeError) as error:
        return None, f"{spec.origin} does not load: {error}"
    return library, ""


#: The library, or None and the reason.
LIBRARY, MISSING = _load()


def statistics(
    source: Tensor,
    target: Tensor,
    group_index: Tensor,
    num_groups: int,
    *,
    scale: float | None,
    ignore_index: int,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Angles and their sums by group; ``check`` finds logits beyond the scale."""
    angles = _angles_for(source, scale)
    parts = _sums_for(angles, num_groups)
    memory = [target.contiguous(), _indices(group_index), angles, parts]
    _raise_for(_library().lgla_statistics(_batch(source, memory, scale, ignore_index, 1)), check)
    return angles, parts


def weights(
    angles: Tensor,
    target: Tensor,
    group_index: Tensor,
    parts: Tensor,
    *,
    ignore_index: int,
    num_ranks: int,
) -> tuple[Tensor, Tensor]:
    """Eq. 8 and the samples per rank."""
    result, samples = torch.empty_like(angles), angles.new_empty(())
    memory = [target.contiguous(), _indices(group_index), angles, parts.contiguous(), result, samples]
    _library().lgla_weights(_batch(angles, memory, None, ignore_index, num_ranks))
    return result, samples


def weights_of(
    source: Tensor,
    target: Tensor,
    group_index: Tensor,
    num_groups: int,
    *,
    scale: float | None,
    ignore_index: int,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both, for one rank."""
    angles = _angles_for(source, scale)
    parts, result, samples = _sums_for(angles, num_groups), torch.empty_like(angles), angles.new_empty(())
    memory = [target.contiguous(), _indices(group_index), angles, parts, result, samples]
    batch = _batch(source, memory, scale, ignore_index, 1)
    _raise_for(_library().lgla_statistics(batch), check)
    _library().lgla_weights(batch)
    return result, samples


def _angles_for(source: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return source.contiguous()
    return source.new_empty(source.shape[:2], dtype=compute_dtype(source.dtype))


def _sums_for(angles: Tensor, num_groups: int) -> Tensor:
    return angles.new_empty((1, num_groups, angles.shape[1] + 1), dtype=torch.float64)


def _indices(group_index: Tensor) -> Tensor:
    return group_index.to(torch.int64).contiguous()


def _batch(
    source: Tensor, memory: list[Tensor], scale: float | None, ignore_index: int, num_ranks: int
) -> _Angles:
    """Of targets, groups, angles, sums, and weights and the samples where they are wanted."""
    logits, strides = (None, (0, 0, 0)) if scale is None else (source.data_ptr(), source.stride())
    pointers = [tensor.data_ptr() for tensor in memory] + [None] * (6 - len(memory))
    return _Angles(
        logits, *pointers, *source.shape[:2], len(memory[1]), memory[3].shape[1], *strides,
        ignore_index, _DTYPES[source.dtype], num_ranks, scale or 0.0,
    )  # fmt: skip


def forward(
    logits: Tensor,
    target: Tensor,
    table: Tensor | None,
    weights: Tensor | None,
    divisor: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
    gradient: Tensor | None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eq. 9; ``check`` finds logits that are not finite."""
    n, k, _ = logits.shape
    dtype = compute_dtype(logits.dtype)
    losses, state = logits.new_empty((n, k), dtype=dtype), logits.new_empty((n, k, 2), dtype=dtype)
    total = logits.new_empty((), dtype=dtype) if reduce else None
    _run(
        logits, target, table, weights, None, losses, total, state, gradient, ignore_index, label_smoothing,
        1.0 if divisor is None else divisor.item(), check,
    )  # fmt: skip
    return (losses.sum(dim=1) if total is None else total), state


def backward(
    logits: Tensor,
    target: Tensor,
    table: Tensor | None,
    weights: Tensor | None,
    upstream: Tensor,
    state: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    gradient: Tensor,
) -> None:
    """The gradient from the state."""
    upstream = upstream.to(state.dtype).resolve_neg()
    _run(
        logits, target, table, weights, upstream, None, None, state, gradient, ignore_index, label_smoothing,
        1.0, False,
    )  # fmt: skip


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """In place, and nothing for 1."""
    number = factor.item()
    if number != 1.0:
        gradient.mul_(number)


def _run(
    logits: Tensor,
    target: Tensor,
    table: Tensor | None,
    weights: Tensor | None,
    upstream: Tensor | None,
    losses: Tensor | None,
    total: Tensor | None,
    state: Tensor,
    gradient: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    divisor: float,
    check: bool,
) -> None:
    n, k, c = logits.shape
    target = target.contiguous()
    table, weights = _dense(table, torch.float64, (k, c)), _dense(weights, state.dtype, (n, k))
    threads = torch.get_num_threads() if logits.numel() >= _WORTH_THREADS else 1
    fresh, fresh_bytes = None, 0
    if gradient is not None and gradient.data_ptr() != logits.data_ptr():
        fresh_bytes = gradient.untyped_storage().nbytes()
        fresh = gradient.untyped_storage().data_ptr() if fresh_bytes >= _WORTH_LARGE_PAGES else None
    status = _library().lgla_cross_entropy(
        _Batch(
            logits.data_ptr(), target.data_ptr(), _pointer(table), _pointer(weights), _pointer(upstream),
            _pointer(losses), _pointer(total), state.data_ptr(), _pointer(gradient),
            n, k, c, *logits.stride(), *((0, 0, 0) if gradient is None else gradient.stride()),
            0 if upstream is None else upstream.stride(0), ignore_index, _DTYPES[logits.dtype], check,
            min(threads, max(1, n * k)), label_smoothing, divisor, fresh, fresh_bytes,
        )
    )  # fmt: skip
    _raise_for(status, check)


def _dense(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).expand(shape).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _library() -> ctypes.CDLL:
    if LIBRARY is None:
        raise RuntimeError(f"the native engine cannot run: {MISSING}")
    return LIBRARY


def _raise_for(status: int, check: bool) -> None:
    if status & _OUT_OF_MEMORY:
        raise MemoryError("lgla_losses: no memory for a row of logits")
    if status & _TARGET_OUT_OF_RANGE or (check and status):
        raise BadValuesError("target: a class index is out of range; validate_args=True says which")
