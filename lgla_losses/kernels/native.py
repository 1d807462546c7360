"""The engine for CPUs: native.c, called with pointers.

C sees nothing of a tensor but where it begins, what its numbers are and how far apart. Every address is
taken by :func:`_array`, which first holds the tensor to what C takes it for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lgla_losses._checks import describe
from lgla_losses.functional import compute_dtype
from lgla_losses.kernels import Angles, Rows, Samples

_FLOATS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_INDEX = {torch.int64: 4}
#: The one dtype that will do.
_ONLY = {dtype: {dtype: code} for dtype, code in _FLOATS.items()}
_EXACT = {dtype: compute_dtype(dtype) for dtype in _FLOATS}
#: A second thread would begin when fewer numbers than these are done.
_WORTH_THREADS = 1 << 14

# A Vector, a Matrix and a Cube of native.c that are not given.
_NO_VECTOR, _NO_MATRIX, _NO_CUBE = (0,) * 3, (0,) * 4, (0,) * 5
# How many numbers its other structures have, without blocks: doubles, which come first, and others.
_BATCH, _SAMPLES, _COUNT, _BLOCK = (2, 34), (1, 39), (0, 15), (0, 11)


def load(path: str) -> ctypes.CDLL:
    """Load a compiled native.c.

    Raises:
        OSError: it does not load, or was compiled from other sources.
        AttributeError: it lacks a function.
    """
    # After torch, whose OpenMP threads it shares.
    library = ctypes.CDLL(path)
    for function in (
        library.lgla_cross_entropy,
        library.lgla_statistics,
        library.lgla_weights,
        library.lgla_count,
    ):
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int
    library.lgla_parts.argtypes = [ctypes.c_int64]
    library.lgla_parts.restype = library.lgla_layout.restype = ctypes.c_int64
    if library.lgla_layout() != _layout():
        raise OSError("it was compiled from other sources; install the package anew")
    return library


def _layout() -> int:
    batch, samples, count, block = (8 * sum(numbers) for numbers in (_BATCH, _SAMPLES, _COUNT, _BLOCK))
    return 1_000_000 * batch + 1000 * samples + count + block


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


def statistics(angles: Angles, samples: Samples) -> tuple[Angles, Tensor]:
    """Eq. 7 and its sums by group, in parts whose number follows from the sizes."""
    library = _library()
    source, exact, n, k, work = _source(angles, samples)
    parts = torch.empty(library.lgla_parts(work), samples.num_groups, k + 1, dtype=torch.float64)
    written = None
    if angles.angles is None and not samples.target.is_floating_point():
        written = torch.empty(n, k, dtype=exact)
    _call(
        library.lgla_statistics,
        _SAMPLES,
        _samples(angles, samples, source, exact, n, k, work, parts, written=written),
    )
    return (angles if written is None else Angles(angles=written)), parts


def weights(angles: Angles, samples: Samples, parts: Tensor, num_ranks: int = 1) -> tuple[Tensor, Tensor]:
    """Eq. 8 and the samples per rank."""
    source, exact, n, k, work = _source(angles, samples)
    result, total = torch.empty(n, k, dtype=exact), torch.empty((), dtype=torch.float64)
    packed = _samples(
        angles, samples, source, exact, n, k, work, parts, weights=result, total=total, num_ranks=num_ranks
    )
    _call(_library().lgla_weights, _SAMPLES, packed)
    return result, total


def _source(angles: Angles, samples: Samples) -> tuple[tuple[int, ...], torch.dtype, int, int, int]:
    """Where angles come from, for C; the dtype of angles; ``N``, ``K``; how many numbers are read."""
    cosines, _, features, weight, given = angles
    n, c = samples.target.shape[0], samples.group_index.shape[0]
    if given is not None:
        k = given.shape[1]
        source = (*_NO_CUBE, *_NO_CUBE, *_array("angles", given, (n, k)))
        exact, work = _EXACT[given.dtype], n * k
    elif features is not None and weight is not None:
        k, d = features.shape[1:]
        source = (
            *_array("features", features, (n, k, d)),
            *_array("weight", weight, (k, c, d)),
            *_NO_MATRIX,
        )
        exact, work = compute_dtype(torch.promote_types(features.dtype, weight.dtype)), n * k * d
    else:
        k = sum([block.shape[1] for block in cosines])
        source = (*_NO_CUBE, *_NO_CUBE, *_NO_MATRIX)
        exact, work = _exact(cosines[0].dtype), n * k
    return source, exact, n, k, n * c if samples.target.is_floating_point() else work


def _samples(
    angles: Angles,
    samples: Samples,
    source: tuple[int, ...],
    exact: torch.dtype,
    n: int,
    k: int,
    work: int,
    parts: Tensor,
    *,
    written: Tensor | None = None,
    weights: Tensor | None = None,
    total: Tensor | None = None,
    num_ranks: int = 1,
) -> tuple[float, ...]:
    """The structure Samples of native.c."""
    target, group_index, g, sample_weight, ignore_index = samples
    c, d = group_index.shape[0], 0 if angles.features is None else angles.features.shape[2]
    cosines = angles.cosines if angles.features is None and angles.angles is None else ()
    if not parts.is_contiguous():
        parts = parts.contiguous()
    return (
        angles.scale,
        *_target(target, n, c),
        *_array("group_index", group_index, (c,), _INDEX),
        *(_NO_VECTOR if sample_weight is None else _array("sample_weight", sample_weight, (n,))),
        *source,
        0 if written is None else written.data_ptr(),
        _array("parts", parts, (parts.shape[0], g, k + 1), _ONLY[torch.float64])[0],
        0 if weights is None else weights.data_ptr(),
        0 if total is None else total.data_ptr(),
        n, k, c, g, d, parts.shape[0], _int64("ignore_index", ignore_index), _FLOATS[exact],
        _threads(work), _int64("num_ranks", num_ranks),
        *_blocks(cosines, (None,) * len(cosines), n, c),
    )  # fmt: skip


def count(
    target: Tensor, sample_weight: Tensor | None, class_weight: Tensor | None, ignore_index: int
) -> Tensor:
    """The sum of the samples' weights."""
    n, soft = target.shape[0], target.is_floating_point()
    c = target.shape[1] if soft else (1 << 62) if class_weight is None else class_weight.shape[0]
    result = torch.empty((), dtype=torch.float64)
    structure = (
        *_target(target, n, c),
        *(_NO_VECTOR if sample_weight is None else _array("sample_weight", sample_weight, (n,))),
        *(_NO_VECTOR if class_weight is None else _array("class_weight", class_weight, (c,))),
        result.data_ptr(), n, c, _int64("ignore_index", ignore_index), _threads(n * c if soft else n),
    )  # fmt: skip
    _call(_library().lgla_count, _COUNT, structure)
    return result


def forward(
    logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Eq. 9, with its gradient."""
    exact = _exact(logits[0].dtype)
    n, k = logits[0].shape[0], sum([block.shape[1] for block in logits])
    result = torch.empty(() if rows.reduce else n, dtype=exact)
    state = torch.empty(n, k, 2, dtype=exact)
    _run(logits, rows, gradients, k, exact, result.data_ptr(), state.data_ptr(), _NO_VECTOR)
    return result, state


def backward(
    logits: Sequence[Tensor],
    rows: Rows,
    upstream: Tensor,
    state: Tensor,
    gradients: Sequence[Tensor | None],
) -> None:
    """The gradient from the state."""
    exact = _exact(logits[0].dtype)
    n, k = logits[0].shape[0], sum([block.shape[1] for block in logits])
    if upstream.is_neg():
        upstream = upstream.resolve_neg()
    if not state.is_contiguous():
        state = state.contiguous()
    place = _array("state", state, (n, k, 2), _ONLY[exact])[0]
    _run(logits, rows, gradients, k, exact, 0, place, _array("upstream", upstream, (n,)))


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """In place, and nothing for 1."""
    number = factor.item()
    if number != 1.0:
        gradient.mul_(number)


def _run(
    logits: Sequence[Tensor],
    rows: Rows,
    gradients: Sequence[Tensor | None],
    k: int,
    exact: torch.dtype,
    result: int,
    state: int,
    upstream: tuple[int, ...],
) -> None:
    """Call C with the structure Batch; addresses of what is written may be 0."""
    target, table, weights, divisor, class_weight, margin, ignore_index, smoothing, gamma, reduce = rows
    n, _, c = logits[0].shape
    structure = (
        smoothing, gamma,
        *_target(target, n, c),
        *(_NO_MATRIX if table is None else _array("table", table, (k, c))),
        *(_NO_MATRIX if weights is None else _array("weights", weights, (n, k))),
        *(_NO_VECTOR if class_weight is None else _array("class_weight", class_weight, (c,))),
        *(_NO_VECTOR if margin is None else _array("margin", margin, (c,))),
        *(_NO_VECTOR if divisor is None else (*_array("divisor", divisor, ()), 0)),
        *upstream,
        result, state, n, k, c, _int64("ignore_index", ignore_index), _FLOATS[logits[0].dtype],
        _threads(n * k * c), reduce,
        *_blocks(logits, gradients, n, c),
    )  # fmt: skip
    _call(_library().lgla_cross_entropy, _BATCH, structure)


def _target(target: Tensor, n: int, c: int) -> tuple[int, ...]:
    """Class indices or probabilities, as a Matrix."""
    if target.dtype in _FLOATS:
        return _array("target", target, (n, c))
    return (*_array("target", target, (n,), _INDEX), 0)


def _blocks(logits: Sequence[Tensor], gradients: Sequence[Tensor | None], n: int, c: int) -> tuple[int, ...]:
    """Logits of all experts and their gradients, with their number."""
    packed: tuple[int, ...] = (len(logits),)
    for block, gradient in zip(logits, gradients, strict=True):
        codes, k = _ONLY[logits[0].dtype], block.shape[1]
        packed += _array("logits", block, (n, k, c), codes)
        packed += _NO_CUBE if gradient is None else _array("gradient", gradient, (n, k, c), codes)
        packed += (k,)
    return packed


def _array(
    name: str, tensor: Tensor, shape: tuple[int, ...], codes: Mapping[torch.dtype, int] = _FLOATS
) -> tuple[int, ...]:
    """Where a tensor's memory begins, its dtype and strides, if it is on the CPU and there at all.

    What has no strides, as a sparse one, raises by itself.
    """
    code = codes.get(tensor.dtype)
    if code is not None and tensor.shape == shape and tensor.is_cpu:
        address = tensor.data_ptr()
        if address or not tensor.numel():
            return (address, code, *tensor.stride())
    raise ValueError(
        f"{name}: expected a tensor of shape {list(shape)} and dtype {' or '.join(map(str, codes))} in the "
        f"memory of the CPU, got {describe(tensor)}"
    )


def _int64(name: str, value: int) -> int:
    """``value`` itself, if it fits."""
    if -(1 << 63) <= value < 1 << 63:
        return value
    raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic of logits."""
    if dtype in _EXACT:
        return _EXACT[dtype]
    raise TypeError(f"logits: expected one of {', '.join(map(str, _FLOATS))}, got {dtype}")


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_THREADS else 1


def _library() -> ctypes.CDLL:
    if LIBRARY is None:
        raise RuntimeError(f"the native engine cannot run: {MISSING}")
    return LIBRARY


def _call(function: Any, numbers: tuple[int, int], structure: tuple[float, ...]) -> None:
    """Hand a structure to C, whose blocks come last."""
    doubles = numbers[0]
    if function(struct.pack(f"{doubles}d{len(structure) - doubles}q", *structure)):
        raise MemoryError("lgla_losses: no memory for a row of logits")
