"""The engine for CPUs: native.c, called with pointers.

C sees nothing of a tensor but where it begins, so every address is taken by :func:`_address`, which first
holds the tensor to what C takes it for.
"""

from __future__ import annotations

import ctypes
import importlib.util

import torch
from torch import Tensor

from lgla_losses._checks import describe
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


def load(path: str) -> ctypes.CDLL:
    """Load a compiled native.c.

    Raises:
        OSError: it does not load, or was compiled from other sources.
        AttributeError: it lacks a function.
    """
    # After torch, whose OpenMP threads it shares.
    library = ctypes.CDLL(path)
    for function, arguments in (
        (library.lgla_cross_entropy, _Batch),
        (library.lgla_statistics, _Angles),
        (library.lgla_weights, _Angles),
    ):
        function.argtypes = [ctypes.POINTER(arguments)]
        function.restype = ctypes.c_int
    library.lgla_layout.restype = _I
    if library.lgla_layout() != 1000 * ctypes.sizeof(_Batch) + ctypes.sizeof(_Angles):
        raise OSError("it was compiled from other sources; install the package anew")
    return library


def _installed() -> tuple[ctypes.CDLL | None, str]:
    spec = importlib.util.find_spec("lgla_losses.kernels._native")
    if spec is None or spec.origin is None:
        return (
            None,
            "it was not compiled when lgla-losses was installed, which takes a C compiler with OpenMP",
        )
    try:
        return load(spec.origin), ""
    except (OSError, AttributeError) as error:
        return None, f"{spec.origin} does not load: {error}"


#: The library, or None and the reason.
LIBRARY, MISSING = _installed()


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
    angles, parts = _angles_for(source, scale), _sums_for(source, num_groups)
    target, group_index = target.contiguous(), _indices(group_index)
    batch = _batch(source, target, group_index, angles, parts, scale=scale, ignore_index=ignore_index)
    _raise_for(_library().lgla_statistics(batch), check)
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
    angles, parts = angles.contiguous(), parts.sum(dim=0, keepdim=True)
    target, group_index = target.contiguous(), _indices(group_index)
    result, samples = torch.empty_like(angles), angles.new_empty(())
    batch = _batch(
        angles, target, group_index, angles, parts, result, samples,
        ignore_index=ignore_index, num_ranks=num_ranks,
    )  # fmt: skip
    _library().lgla_weights(batch)
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
    angles, parts = _angles_for(source, scale), _sums_for(source, num_groups)
    target, group_index = target.contiguous(), _indices(group_index)
    result, samples = torch.empty_like(angles), angles.new_empty(())
    batch = _batch(
        source, target, group_index, angles, parts, result, samples, scale=scale, ignore_index=ignore_index
    )
    _raise_for(_library().lgla_statistics(batch), check)
    _library().lgla_weights(batch)
    return result, samples


def _angles_for(source: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return source.contiguous()
    return source.new_empty(source.shape[:2], dtype=compute_dtype(source.dtype))


def _indices(group_index: Tensor) -> Tensor:
    return group_index.to(torch.int64).contiguous()


def _sums_for(source: Tensor, num_groups: int) -> Tensor:
    return source.new_empty((1, num_groups, source.shape[1] + 1), dtype=torch.float64)


def _batch(
    source: Tensor,
    target: Tensor,
    group_index: Tensor,
    angles: Tensor,
    parts: Tensor,
    weights: Tensor | None = None,
    samples: Tensor | None = None,
    *,
    scale: float | None = None,
    ignore_index: int,
    num_ranks: int = 1,
) -> _Angles:
    """Of cosine logits, or without a scale of the angles themselves."""
    (n, k), c, g = source.shape[:2], len(group_index), parts.shape[1]
    code, exact = _code(source.dtype), compute_dtype(source.dtype)
    logits: int | None = None
    strides: tuple[int, ...] = (0, 0, 0)
    if scale is not None:
        logits, strides = _address("logits", source, source.dtype, (n, k, c), dense=False), source.stride()
    return _Angles(
        logits,
        _address("target", target, torch.int64, (n,)),
        _address("group_index", group_index, torch.int64, (c,)),
        _address("angles", angles, exact, (n, k)),
        _address("parts", parts, torch.float64, (1, g, k + 1)),
        None if weights is None else _address("weights", weights, exact, (n, k)),
        None if samples is None else _address("samples", samples, exact, ()),
        n, k, c, g, *strides, _int64("ignore_index", ignore_index), code, _int64("num_ranks", num_ranks),
        scale or 0.0,
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
    code, exact = _code(logits.dtype), compute_dtype(logits.dtype)
    target = target.contiguous()
    table, weights = _dense(table, torch.float64, (k, c)), _dense(weights, exact, (n, k))
    threads = torch.get_num_threads() if logits.numel() >= _WORTH_THREADS else 1
    place = _address("logits", logits, logits.dtype, (n, k, c), dense=False)

    out, fresh, fresh_bytes = None, None, 0
    out_strides: tuple[int, ...] = (0, 0, 0)
    if gradient is not None:
        out = _address("gradient", gradient, logits.dtype, (n, k, c), dense=False)
        out_strides, memory = gradient.stride(), gradient.untyped_storage()
        if out != place and memory.nbytes() >= _WORTH_LARGE_PAGES:
            fresh, fresh_bytes = memory.data_ptr(), memory.nbytes()

    batch = _Batch(
        place,
        _address("target", target, torch.int64, (n,)),
        None if table is None else _address("table", table, torch.float64, (k, c)),
        None if weights is None else _address("weights", weights, exact, (n, k)),
        None if upstream is None else _address("upstream", upstream, exact, (n,), dense=False),
        None if losses is None else _address("losses", losses, exact, (n, k)),
        None if total is None else _address("total", total, exact, ()),
        _address("state", state, exact, (n, k, 2)),
        out,
        n, k, c, *logits.stride(), *out_strides, 0 if upstream is None else upstream.stride(0),
        _int64("ignore_index", ignore_index), code, check, min(threads, max(1, n * k)), label_smoothing,
        divisor, fresh, fresh_bytes,
    )  # fmt: skip
    _raise_for(_library().lgla_cross_entropy(batch), check)


def _dense(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).expand(shape).contiguous()


def _address(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], dense: bool = True
) -> int:
    """Where a tensor's memory begins, if it is of this dtype and shape, on the CPU and there at all.

    Without ``dense`` it may have any strides. What has no strides, as a sparse one, raises by itself.
    """
    if (
        tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and (not dense or tensor.is_contiguous())
    ):
        address = tensor.data_ptr()
        if address or not tensor.numel():
            return address
    raise ValueError(
        f"{name}: expected a {dtype} tensor of shape {list(shape)} in the memory of the CPU"
        f"{', without gaps' if dense else ''}, got {describe(tensor)}"
    )


def _int64(name: str, value: int) -> int:
    """``value`` itself: ctypes would wrap what does not fit."""
    if -(1 << 63) <= value < 1 << 63:
        return value
    raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")


def _code(dtype: torch.dtype) -> int:
    """What C calls the dtype of logits."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    raise TypeError(f"logits: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")


def _library() -> ctypes.CDLL:
    if LIBRARY is None:
        raise RuntimeError(f"the native engine cannot run: {MISSING}")
    return LIBRARY


def _raise_for(status: int, check: bool) -> None:
    if status & _OUT_OF_MEMORY:
        raise MemoryError("lgla_losses: no memory for a row of logits")
    if status & _TARGET_OUT_OF_RANGE or (check and status):
        raise BadValuesError("target: a class index is out of range; validate_args=True says which")
