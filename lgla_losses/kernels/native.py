"""The engine for CPUs: native.c, called with pointers.

C knows only where a tensor starts, its dtype and its strides. Every address comes from :func:`_array`, which
first checks that the tensor is what C expects.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lgla_losses._checks import describe
from lgla_losses.functional import compute_dtype
from lgla_losses.kernels import Angles, Rows, Samples

_FLOATS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_INDEX = {torch.int64: 4}
#: The only dtype allowed.
_ONLY = {dtype: {dtype: code} for dtype, code in _FLOATS.items()}
_TARGETS = _FLOATS | _INDEX


class _Exact(dict[torch.dtype, torch.dtype]):
    """Map the dtype of logits to the dtype to compute in."""

    def __missing__(self, dtype: torch.dtype) -> torch.dtype:
        raise TypeError(f"logits: expected one of {', '.join(map(str, self))}, got {dtype}")


_EXACT = _Exact({dtype: compute_dtype(dtype) for dtype in _FLOATS})
#: With fewer numbers than this, a second thread would start after the work is done.
_WORTH_THREADS = 1 << 14
#: From this many numbers on, sums are made in parts; their number does not depend on the threads.
_WORTH_PARTS, _PARTS = 1 << 16, 64

# A Vector, a Matrix and a Cube of native.c that are not given.
_NO_VECTOR, _NO_MATRIX, _NO_CUBE = (0,) * 3, (0,) * 4, (0,) * 5
# Sizes of its other structures without blocks: number of doubles, which come first, and of others.
_BATCH, _SAMPLES, _COUNT, _BLOCK = (2, 34), (1, 39), (0, 15), (0, 11)


def load(path: str) -> ctypes.CDLL:
    """Load the library that is compiled from native.c.

    Raises:
        OSError: it does not load, or was compiled from other sources.
        AttributeError: it lacks a function.
    """
    library = _open(path)
    for function in (
        library.lgla_cross_entropy,
        library.lgla_statistics,
        library.lgla_weights,
        library.lgla_count,
    ):
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int
    library.lgla_layout.restype = ctypes.c_int64
    if library.lgla_layout() != _layout():
        raise OSError("it was compiled from other sources; install the package again")
    return library


def _open(path: str) -> ctypes.CDLL:
    """Open a library that is not linked with OpenMP and shares PyTorch's."""
    try:
        return ctypes.CDLL(path)  # where import torch made its OpenMP visible to all libraries
    except OSError as error:
        try:
            ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            reason = f"{error}; it needs GNU OpenMP, on Debian and Ubuntu: apt install libgomp1"
            raise OSError(reason) from error
    return ctypes.CDLL(path)


def _openmp() -> str:
    """Find the OpenMP that is loaded already, under any name: a second one would start its own threads."""
    loaded = re.search(r"/.*/libgomp[^/\n]*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return loaded[0] if loaded else "libgomp.so.1"


def _layout() -> int:
    batch, samples, count, block = (8 * sum(numbers) for numbers in (_BATCH, _SAMPLES, _COUNT, _BLOCK))
    return 1_000_000 * batch + 1000 * samples + count + block


def _installed() -> tuple[ctypes.CDLL | None, str]:
    path = Path(__file__).with_name("_native.so")
    if not path.exists():
        return (
            None,
            "this installation has no C library; installing from source on Linux with a C compiler that has "
            "OpenMP, such as gcc, builds it",
        )
    try:
        return load(str(path)), ""
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load: {error}"


#: The library, or None and the reason.
LIBRARY, MISSING = _installed()


def statistics(angles: Angles, samples: Samples) -> tuple[Angles, Tensor]:
    """Compute Eq. 7 and its sums by group; the number of parts depends only on the sizes."""
    found, parts = _run_angles("lgla_statistics", angles, samples, None, 1)
    return (angles if found is None else Angles(angles=found)), parts


def weights(
    angles: Angles, samples: Samples, parts: Tensor | None = None, num_ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute Eq. 8 and the number of samples per rank."""
    if parts is None:
        angles, parts = statistics(angles, samples)
    found, number = _run_angles("lgla_weights", angles, samples, parts, num_ranks)
    return cast(Tensor, found), number


def _run_angles(
    function: str, angles: Angles, samples: Samples, parts: Tensor | None, num_ranks: int
) -> tuple[Tensor | None, Tensor]:
    """Call C with the structure Samples.

    Without ``parts`` it computes the angles and parts, else the weights.
    """
    cosines, scale, features, weight, given = angles
    target, group_index, g, sample_weight, ignore_index = samples
    n, c, d, soft = target.shape[0], group_index.shape[0], 0, target.is_floating_point()

    source: tuple[int, ...] = (*_NO_CUBE, *_NO_CUBE, *_NO_MATRIX)
    if given is not None:
        k, cosines, exact = given.shape[1], (), _EXACT[given.dtype]
        source = (*_NO_CUBE, *_NO_CUBE, *_array("angles", given, (n, k)))
    elif features is not None and weight is not None:
        k, d = features.shape[1:]
        cosines, exact = (), _EXACT[torch.promote_types(features.dtype, weight.dtype)]
        source = (
            *_array("features", features, (n, k, d)),
            *_array("weight", weight, (k, c, d)),
            *_NO_MATRIX,
        )
    else:
        k = cosines[0].shape[1] if len(cosines) == 1 else sum([block.shape[1] for block in cosines])
        exact = _EXACT[cosines[0].dtype]

    work = n * c if soft else n * k * max(1, d)
    found, result, into, total = None, 0, 0, None
    if parts is not None:
        found = torch.empty(n, k, dtype=exact, device="cpu")
        total = torch.empty((), dtype=torch.float64, device="cpu")
        into, parts = found.data_ptr(), parts.contiguous()
    else:
        number = _PARTS if work >= _WORTH_PARTS else 1
        parts = torch.empty(number, g, k + 1, dtype=torch.float64, device="cpu")
        if given is not None:
            found = given
        elif not soft:
            found = torch.empty(n, k, dtype=exact, device="cpu")
            result = found.data_ptr()

    structure = (
        scale,
        *_array("target", target, (n, c)[: target.dim()], _TARGETS, 4),
        *_array("group_index", group_index, (c,), _INDEX),
        *(_NO_VECTOR if sample_weight is None else _array("sample_weight", sample_weight, (n,))),
        *source,
        result,
        _array("parts", parts, (parts.shape[0], g, k + 1), _ONLY[torch.float64])[0],
        into,
        0 if total is None else total.data_ptr(),
        n, k, c, g, d, parts.shape[0], ignore_index, _FLOATS[exact],
        torch.get_num_threads() if work >= _WORTH_THREADS else 1, num_ranks,
        *_blocks(cosines, (None,) * len(cosines), n, c),
    )  # fmt: skip
    _call(function, _SAMPLES, structure)
    return found, parts if total is None else total


def count(
    target: Tensor, sample_weight: Tensor | None, class_weight: Tensor | None, ignore_index: int
) -> Tensor:
    """Sum the samples' weights."""
    n, soft = target.shape[0], target.is_floating_point()
    c = target.shape[1] if soft else (1 << 62) if class_weight is None else class_weight.shape[0]
    result = torch.empty((), dtype=torch.float64, device="cpu")
    structure = (
        *_array("target", target, (n, c)[: target.dim()], _TARGETS, 4),
        *(_NO_VECTOR if sample_weight is None else _array("sample_weight", sample_weight, (n,))),
        *(_NO_VECTOR if class_weight is None else _array("class_weight", class_weight, (c,))),
        result.data_ptr(), n, c, ignore_index,
        torch.get_num_threads() if soft and n * c >= _WORTH_THREADS else 1,
    )  # fmt: skip
    _call("lgla_count", _COUNT, structure)
    return result


def forward(
    logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Compute Eq. 9, with its gradient."""
    exact, n = _EXACT[logits[0].dtype], logits[0].shape[0]
    k = logits[0].shape[1] if len(logits) == 1 else sum([block.shape[1] for block in logits])
    result = torch.empty(() if rows.reduce else n, dtype=exact, device="cpu")
    state = torch.empty(n, k, 2, dtype=exact, device="cpu")
    _run(logits, rows, gradients, k, exact, result.data_ptr(), state.data_ptr(), _NO_VECTOR)
    return result, state


def backward(
    logits: Sequence[Tensor],
    rows: Rows,
    upstream: Tensor,
    state: Tensor,
    gradients: Sequence[Tensor | None],
) -> None:
    """Compute the gradient from the state."""
    exact, n = _EXACT[logits[0].dtype], logits[0].shape[0]
    k = logits[0].shape[1] if len(logits) == 1 else sum([block.shape[1] for block in logits])
    if upstream.is_neg():
        upstream = upstream.resolve_neg()
    if not state.is_contiguous():
        state = state.contiguous()
    place = _array("state", state, (n, k, 2), _ONLY[exact])[0]
    _run(logits, rows, gradients, k, exact, 0, place, _array("upstream", upstream, (n,)))


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient in place; do nothing for 1."""
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
    """Call C with the structure Batch; an output whose address is 0 is not written."""
    target, table, weights, divisor, class_weight, margin, ignore_index, smoothing, gamma, reduce = rows
    n, _, c = logits[0].shape
    structure = (
        smoothing, gamma,
        *_array("target", target, (n, c)[: target.dim()], _TARGETS, 4),
        *(_NO_MATRIX if table is None else _array("table", table, (k, c))),
        *(_NO_MATRIX if weights is None else _array("weights", weights, (n, k))),
        *(_NO_VECTOR if class_weight is None else _array("class_weight", class_weight, (c,))),
        *(_NO_VECTOR if margin is None else _array("margin", margin, (c,))),
        *(_NO_VECTOR if divisor is None else (*_array("divisor", divisor, ()), 0)),
        *upstream,
        result, state, n, k, c, ignore_index, _FLOATS[logits[0].dtype],
        torch.get_num_threads() if n * k * c >= _WORTH_THREADS else 1, reduce,
        *_blocks(logits, gradients, n, c),
    )  # fmt: skip
    _call("lgla_cross_entropy", _BATCH, structure)


def _blocks(logits: Sequence[Tensor], gradients: Sequence[Tensor | None], n: int, c: int) -> tuple[int, ...]:
    """Describe for C the memory of all logits and gradients, after the number of their tensors."""
    packed: tuple[int, ...] = (len(logits),)
    for block, gradient in zip(logits, gradients, strict=True):
        codes, k = _ONLY[logits[0].dtype], block.shape[1]
        packed += _array("logits", block, (n, k, c), codes)
        packed += _NO_CUBE if gradient is None else _array("gradient", gradient, (n, k, c), codes)
        packed += (k,)
    return packed


def _array(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    codes: Mapping[torch.dtype, int] = _FLOATS,
    size: int = 5,
) -> tuple[int, ...]:
    """Describe a tensor for C: where its memory begins, its dtype and strides.

    Raise unless it is on the CPU and has memory. Missing numbers up to the ``size`` of a Matrix are filled
    up. A tensor without strides, such as a sparse one, raises itself.
    """
    code = codes.get(tensor.dtype)
    if code is not None and tensor.shape == shape and tensor.is_cpu:
        address = tensor.data_ptr()
        if address or not tensor.numel():
            packed = (address, code, *tensor.stride())
            return packed if size == 5 or len(packed) == size else (*packed, 0)
    raise ValueError(
        f"{name}: expected a tensor of shape {list(shape)} and dtype {' or '.join(map(str, codes))} in the "
        f"memory of the CPU, got {describe(tensor)}"
    )


def _call(function: str, numbers: tuple[int, int], structure: tuple[float, ...]) -> None:
    """Pass a structure to a function of C; its blocks come last."""
    if LIBRARY is None:
        raise RuntimeError(f"the native engine cannot run: {MISSING}")
    doubles = numbers[0]
    try:
        packed = struct.pack(f"{doubles}d{len(structure) - doubles}q", *structure)
    except struct.error as error:
        wrong = next(v for v in structure[doubles:] if not -(1 << 63) <= v < 1 << 63)
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {wrong}") from error
    if getattr(LIBRARY, function)(packed):
        raise MemoryError("lgla_losses: no memory for a row of logits")
