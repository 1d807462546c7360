"""The loss as Triton kernels, for CUDA and ROCm.

Plain tensors in and out: no autograd, no checks of arguments, no waiting for the device, no atomics and
no tuning at run time, so that results have the same bits in every run and a step can be captured in a
CUDA graph. A row is the ``C`` logits of one sample and one expert. Up to a limit on ``C`` it stays in
registers, so that each logit is read once and its gradient written once; longer rows are swept in blocks.

Arithmetic is in float64 for float64 logits, else in float32. The number of classes, the stand-in for
ignored targets, the scale and the label smoothing are compiled in: a new value compiles anew.

Symbols: ``N`` samples, ``K`` experts, ``G`` groups, ``C`` classes, ``B`` blocks of samples.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgla_losses.functional import compute_dtype

__all__ = [
    "PLANS",
    "backward",
    "fits_one_block",
    "forward",
    "plan",
    "rescale_",
    "statistics",
    "use",
    "weights",
    "weights_of",
]

#: Ways to compute the loss that :func:`use` chooses between, so that a benchmark can hold one to another:
#:
#: - ``"0.1"`` is that of the first release. Rows of one tile take as many registers as the compiler likes;
#:   of longer rows a program takes four at a time, with a maximum across each block of their classes.
#: - ``"resident"`` limits the registers, so that a multiprocessor runs 32 warps; of longer rows a program of
#:   32 warps takes one at a time (:func:`_forward_streamed`).
#: - ``"ahead"`` loads the next row of one tile before it computes with the last, in the registers that the
#:   adjustments had, which it reads anew for every row.
#: - ``"paired"`` differs from ``"resident"`` in longer rows: programs of 16 warps, of which a multiprocessor
#:   runs two.
#:
#: Measured on an H200, at 4,096 x 3 x 8,142 in float32: 0.24 ms of 0.19 that a copy takes with two programs
#: on a multiprocessor, 0.34 with one, which is what the registers of ``"0.1"`` may come to. Rows read ahead
#: into shared memory took 0.26, as those that begin at 8 bytes are copied there in small pieces.
#: Not measured yet: ``"ahead"``, and longer rows, of which 26 MB wait for their second read at 50,000 classes
#: in float32, instead of the 154 MB of ``"0.1"``, which no L2 cache holds.
PLANS = ("0.1", "resident", "ahead", "paired")

_plan = "resident"


def plan() -> str:
    """The name of the plan in use."""
    return _plan


def use(name: str) -> str:
    """Choose one of :data:`PLANS` for all launches from now on.

    Returns:
        The name of the plan before, for ``use`` again.

    Raises:
        ValueError: there is no such plan.
    """
    global _plan
    if name not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(map(repr, PLANS))}, got {name!r}")
    before, _plan = _plan, name
    return before


class Tile(NamedTuple):
    """What one program holds at a time: so many rows of a block of classes (or experts).

    Attributes:
        rows: rows of the tile.
        block: its columns.
        num_warps: warps of a program, on NVIDIA.
        registers: the most that a thread may take, on NVIDIA; None leaves it to the compiler.
        ahead: load the next tile before computing with the last.
    """

    rows: int
    block: int
    num_warps: int
    registers: int | None = None
    ahead: bool = False

    def options(self, architecture: int | None) -> dict[str, int]:
        """What Triton's compiler is told.

        AMD, here None, runs up to 16 warps, and has no limit of registers to ask for. From sm_100 on the
        compiler spills at 64 registers and 16 elements a thread, so that a thread has 8.
        """
        if architecture is None:
            return {"num_warps": min(16, self.num_warps)}
        if self.registers is None:
            return {"num_warps": self.num_warps}
        more = 2 if architecture >= 100 and self.block // (32 * self.num_warps) >= 16 else 1
        return {"num_warps": min(32, more * self.num_warps), "maxnreg": self.registers}


# The sizes below give a thread 8 to 32 elements, all in registers: benchmarks/kernel_resources.py prints
# what they need. With 64 registers a thread an NVIDIA multiprocessor runs 32 warps, whatever programs they
# belong to.


def forward_tile(num_classes: int, dtype: torch.dtype) -> Tile:
    """Whole rows up to 16,384 classes (4,096 in float64), else blocks."""
    return _forward_tile(num_classes, dtype, _plan)


@lru_cache(maxsize=256)
def _forward_tile(num_classes: int, dtype: torch.dtype, plan: str) -> Tile:
    wide = 2 if dtype == torch.float64 else 1
    block = _power_of_two(num_classes, least=16)
    whole = wide**2 * block <= 16384
    rows = max(1, 1024 // (wide * block))
    if plan == "0.1" or wide == 2:
        if not whole:
            return Tile(4, 1024, 8) if wide == 1 else Tile(1, 2048, 8)
        return Tile(rows, block, max(4, min(16, wide * block // 512)))
    if not whole:
        return Tile(1, 2048, 16, 64) if plan == "paired" else Tile(1, 4096, 32, 64)
    num_warps = max(4, block // 512)
    # Small tiles take few registers, or leave the compiler no choice.
    return Tile(rows, block, num_warps, 64 if num_warps > 4 else None, plan == "ahead" and num_warps > 4)


@lru_cache(maxsize=256)
def backward_tile(num_classes: int, dtype: torch.dtype) -> Tile:
    """Blocks of up to 2,048 classes (half in float64), as nothing is summed over a row."""
    elements = 1024 if dtype == torch.float64 else 2048
    block = min(_power_of_two(num_classes, least=16), elements)
    return Tile(max(1, elements // 2 // block), block, 4)


@lru_cache(maxsize=256)
def sample_tile(num_experts: int) -> Tile:
    """Samples, and their experts with a column that counts them."""
    block = _power_of_two(num_experts + 1)
    return Tile(max(1, 4096 // block), block, 16)


#: Elements that a program sums, or rescales, at a time.
FLAT_TILE = Tile(1, 1024, 4)


def _power_of_two(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


@lru_cache(maxsize=64)
def _architecture(device: torch.device) -> int | None:
    """Ten times the compute capability of NVIDIA, None of AMD, 0 of Triton's interpreter."""
    if torch.version.hip is not None:
        return None
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=256)
def _options(tile: Tile, device: torch.device) -> dict[str, int]:
    """What Triton's compiler is told for a device."""
    return tile.options(_architecture(device))


def flushes(architecture: int | None, dtype: torch.dtype) -> bool:
    """Whether exponentials below the normal numbers may be 0; see :func:`_exp`."""
    return bool(architecture) and dtype == torch.float32 and _plan != "0.1"


@lru_cache(maxsize=64)
def _resident_programs(device: torch.device, num_warps: int) -> int:
    """As many programs as the device runs at once with 64 registers a thread; each takes several tiles."""
    if device.type != "cuda":
        return 16 // num_warps + 2  # Triton's interpreter, one program after the other
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * max(1, 32 // num_warps)


# --- Angles and weights -------------------------------------------------------------------------------------


@triton.jit
def _arccos(x):
    """In x's precision, by the rational approximation of arcsin of FreeBSD's msun (fdlibm); NaN stays NaN."""
    size = tl.abs(x)
    central = size < 0.5
    z = tl.where(central, x * x, 0.5 - 0.5 * size)
    s = tl.where(central, x, tl.sqrt(tl.where(central, 0.0, z)))
    p = 7.91534994289814532176e-04 + z * 3.47933107596021167570e-05
    p = 2.01212532134862925881e-01 + z * (-4.00555345006794114027e-02 + z * p)
    p = z * (1.66666666666666657415e-01 + z * (-3.25565818622400915405e-01 + z * p))
    q = 2.02094576023350569471e00 + z * (-6.88283971605453293030e-01 + z * 7.70381505559019352791e-02)
    arcsine = s + s * (p / (1.0 + z * (-2.40339491173441421878e00 + z * q)))
    outer = tl.where(x < 0, 3.14159265358979311600e00 - 2.0 * arcsine, 2.0 * arcsine)
    return tl.where(central, 1.57079632679489655800e00 - arcsine, outer)


@triton.jit
def _target_angles(source, n, k, y, here, stride_n, stride_k, stride_c, scale: tl.constexpr):
    """The angles of samples ``n`` ``[n, 1]`` and experts ``k`` ``[1, k]``: cosine logits over the scale."""
    offset = n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k + y * stride_c
    angles = tl.load(source + offset, mask=here, other=0.0)
    if source.dtype.element_ty != tl.float64:
        angles = angles.to(tl.float32)
    if scale is not None:
        cosine = angles / scale
        # Comparisons that NaN fails, so that it passes.
        angles = _arccos(tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine)))
    return angles


@triton.jit
def _group_of(group_index, y, valid, num_classes: tl.constexpr):
    """The group of every target; -1 for those ignored."""
    return tl.load(group_index + y, mask=valid & (y >= 0) & (y < num_classes), other=-1)


@triton.jit
def _statistics(
    source, target, group_index, angles, parts,
    num_samples, stride_n, stride_k, stride_c,
    num_groups: tl.constexpr, num_experts: tl.constexpr, num_classes: tl.constexpr,
    ignore_index: tl.constexpr, scale: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of samples: angles ``[N, K]``, and sums ``[B, G, K + 1]`` of them and of ones by group."""
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, block)
    y = tl.load(target + n, mask=n < num_samples, other=ignore_index)
    valid = y != ignore_index
    group = _group_of(group_index, y, valid, num_classes)
    read = (group >= 0)[:, None] & (k < num_experts)[None, :]
    values = _target_angles(
        source, n[:, None], k[None, :], y[:, None], read, stride_n, stride_k, stride_c, scale
    )
    if angles is not None:
        out = angles + n.to(tl.int64)[:, None] * num_experts + k[None, :]
        tl.store(out, values, mask=(n < num_samples)[:, None] & (k < num_experts)[None, :])
    values = tl.where((k < num_experts)[None, :], values, 1.0).to(tl.float64)
    for g in range(num_groups):
        sums = tl.sum(tl.where((group == g)[:, None], values, 0.0), axis=0)
        own = parts + (tl.program_id(0) * num_groups + g) * (num_experts + 1) + k
        tl.store(own, sums, mask=k <= num_experts)


@triton.jit
def _weights(
    source, target, group_index, parts, weights, divisor,
    num_samples, num_blocks, stride_n, stride_k, stride_c,
    num_groups: tl.constexpr, num_experts: tl.constexpr, num_classes: tl.constexpr,
    ignore_index: tl.constexpr, num_ranks: tl.constexpr, scale: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The weights of a block of samples; without ``parts`` their sums are its own."""
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, block)
    y = tl.load(target + n, mask=n < num_samples, other=ignore_index)
    valid = y != ignore_index
    group = _group_of(group_index, y, valid, num_classes)
    read = (group >= 0)[:, None] & (k < num_experts)[None, :]
    angles = _target_angles(
        source, n[:, None], k[None, :], y[:, None], read, stride_n, stride_k, stride_c, scale
    ).to(tl.float64)
    reference = tl.zeros([rows, block], tl.float64)
    samples = tl.sum(tl.zeros([block], tl.float64), axis=0)
    for g in range(num_groups):
        if parts is None:
            values = tl.where((k < num_experts)[None, :], angles, 1.0)
            sums = tl.sum(tl.where((group == g)[:, None], values, 0.0), axis=0)
        else:
            sums = tl.zeros([block], tl.float64)
            for start in range(0, num_blocks, 16):
                b = start + tl.arange(0, 16)
                address = parts + (b * num_groups + g)[:, None] * (num_experts + 1) + k[None, :]
                mask = (b < num_blocks)[:, None] & (k <= num_experts)[None, :]
                sums += tl.sum(tl.load(address, mask=mask, other=0.0), axis=0)
        count = tl.sum(tl.where(k == num_experts, sums, 0.0), axis=0)
        samples += count
        mean = sums / tl.maximum(count, 1.0)
        reference = tl.where((group == g)[:, None], mean[None, :], reference)
    excess = angles - reference
    values = tl.where(valid[:, None], 1.0 + tl.where(excess < 0.0, 0.0, excess), 0.0)
    out = weights + n.to(tl.int64)[:, None] * num_experts + k[None, :]
    tl.store(out, values, mask=(n < num_samples)[:, None] & (k < num_experts)[None, :])
    if tl.program_id(0) == 0:
        tl.store(divisor, tl.maximum(samples, 1.0) / num_ranks)


# --- Losses and gradients -----------------------------------------------------------------------------------


@triton.jit
def _exp(x, flush: tl.constexpr):
    """The exponential; with ``flush``, on NVIDIA, in half the instructions and 0 below the normal numbers."""
    if flush:
        powers = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [x * 1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        powers = tl.exp(x)
    return powers


@triton.jit
def _target_logits(logits, table, row, k, y, known, num_classes: tl.constexpr, stride_c, dtype: tl.constexpr):
    """The adjusted logits of the targets; NaN where a target is no class."""
    known = known & (y >= 0) & (y < num_classes)
    own = tl.load(logits + row + y * stride_c, mask=known, other=float("nan")).to(dtype)
    if table is not None:
        own += tl.load(table + k * num_classes + y, mask=known, other=0.0).to(dtype)
    return own


@triton.jit
def _adjustment(table, k, j, num_classes: tl.constexpr, dtype: tl.constexpr, often: tl.constexpr):
    """The classes' adjustments ``[1, block]`` of expert k; those read often stay in the caches.

    Beyond the last class it is -inf, so that padding adds nothing to a sum.
    """
    j = j[None, :]
    if table is None:
        values = tl.where(j < num_classes, 0.0, -float("inf")).to(dtype)
    else:
        policy: tl.constexpr = "evict_last" if often else ""
        address = table + k * num_classes + j
        values = tl.load(address, mask=j < num_classes, other=-float("inf"), eviction_policy=policy).to(dtype)
    return values


@triton.jit
def _logits(
    logits, row, j, here, num_classes: tl.constexpr, stride_c, again: tl.constexpr, last: tl.constexpr
):
    """A tile of logits, 0 beyond the last class.

    What is read again passes by the L1 cache; what is read for the last time leaves the L2 cache first.
    """
    mask = here[:, None] & (j < num_classes)[None, :]
    address = logits + row[:, None] + (j.to(tl.int64) * stride_c)[None, :]
    modifier: tl.constexpr = ".cg" if again else ""
    policy: tl.constexpr = "evict_first" if last else ""
    return tl.load(address, mask=mask, other=0.0, cache_modifier=modifier, eviction_policy=policy)


@triton.jit
def _adjusted_logits(
    logits, row, j, here, num_classes: tl.constexpr, stride_c, adjustment,
    again: tl.constexpr, last: tl.constexpr,
):  # fmt: skip
    """A tile of adjusted logits, -inf beyond the last class, as its adjustment is."""
    return _logits(logits, row, j, here, num_classes, stride_c, again, last).to(adjustment.dtype) + adjustment


@triton.jit
def _store_gradient(
    gradient, row, j, here, exponentials, total, y, valid, factor,
    num_classes: tl.constexpr, stride_c, smoothing: tl.constexpr, last: tl.constexpr,
):  # fmt: skip
    """``factor * (softmax - e / C - (1 - e) [j = y])``, rounded once; zeros for ignored rows.

    With ``last`` it leaves the L2 cache early, which then has room for logits.
    """
    factor = tl.where(valid, factor, 0.0)
    scale = tl.where(valid, factor / total, 0.0)
    others = -factor * (smoothing / num_classes)
    # In 32 bits, as the comparison of every class with a target in 64 takes registers (but in float64).
    if exponentials.dtype != tl.float64:
        y = tl.where((y >= 0) & (y < num_classes), y, -1).to(tl.int32)
    shift = tl.where(
        j[None, :] == y[:, None], (others - factor * (1.0 - smoothing))[:, None], others[:, None]
    )
    # NaN of an ignored row becomes 1, times 0; of another row the total is NaN as well.
    values = tl.where(exponentials <= 1.0, exponentials, 1.0) * scale[:, None] + shift
    mask = here[:, None] & (j < num_classes)[None, :]
    address = gradient + row[:, None] + (j.to(tl.int64) * stride_c)[None, :]
    policy: tl.constexpr = "evict_first" if last else ""
    tl.store(address, values, mask=mask, eviction_policy=policy)


@triton.jit
def _factor(weights, n, k, here, num_experts: tl.constexpr, dtype: tl.constexpr):
    """The weights of samples n and expert k; ones without."""
    if weights is None:
        values = tl.full(n.shape, 1.0, dtype)
    else:
        values = tl.load(weights + n * num_experts + k, mask=here, other=0.0).to(dtype)
    return values


@triton.jit
def _divisor(divisor, dtype: tl.constexpr):
    """A scalar; 1 without."""
    return tl.full((), 1.0, dtype) if divisor is None else tl.load(divisor).to(dtype)


@triton.jit
def _forward(
    logits, target, table, weights, divisor, losses, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c,
    num_experts: tl.constexpr, num_classes: tl.constexpr, ignore_index: tl.constexpr,
    smoothing: tl.constexpr, reduce: tl.constexpr, align: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, ahead: tl.constexpr, flush: tl.constexpr,
):  # fmt: skip
    """Rows that fit a tile, of one expert: losses (or a sum of them), state and gradient in one pass."""
    dtype: tl.constexpr = state.dtype.element_ty
    k = (tl.program_id(0) % num_experts).to(tl.int64)
    begin = tl.program_id(0) // num_experts * rows
    step = tl.num_programs(0) // num_experts * rows
    j = tl.arange(0, block)
    adjustment = _adjustment(table, k, j, num_classes, dtype, False)
    shares = _divisor(divisor, dtype)
    total = tl.zeros([rows], tl.float64)
    if ahead:
        n = begin + tl.arange(0, rows).to(tl.int64)
        row = (n * stride_n + k * stride_k) * align
        loaded = _logits(logits, row, j, n < num_samples, num_classes, stride_c, False, False)
    for start in range(begin, num_samples, step):
        n = start + tl.arange(0, rows).to(tl.int64)
        here = n < num_samples
        y = tl.load(target + n, mask=here, other=ignore_index)
        valid = y != ignore_index
        row = (n * stride_n + k * stride_k) * align
        # Before the gradient, which may overwrite it.
        own = _target_logits(logits, table, row, k, y, valid, num_classes, stride_c, dtype)
        factor = _factor(weights, n, k, here, num_experts, dtype)

        if ahead:
            x = loaded.to(dtype) + _adjustment(table, k, j, num_classes, dtype, True)
            later = n + step
            row = (later * stride_n + k * stride_k) * align
            loaded = _logits(logits, row, j, later < num_samples, num_classes, stride_c, False, False)
        else:
            x = _adjusted_logits(logits, row, j, here, num_classes, stride_c, adjustment, False, False)
        peak = tl.max(x, axis=1)
        x -= peak[:, None]
        exponentials = _exp(x, flush)
        sums = tl.sum(exponentials, axis=1)
        loss = tl.log(sums) - (own - peak)
        if smoothing != 0.0:
            mean = tl.sum(tl.where((j < num_classes)[None, :], x, 0.0), axis=1) / num_classes
            loss = (1.0 - smoothing) * loss + smoothing * (tl.log(sums) - mean)
        loss = tl.where(valid, factor * loss, 0.0)

        out = state + (n * num_experts + k) * 2
        tl.store(out, peak, mask=here)
        tl.store(out + 1, sums, mask=here)
        if reduce:
            total += loss
        else:
            tl.store(losses + n * num_experts + k, loss, mask=here)
        if gradient is not None:
            factor *= 1.0 / shares  # as backward has it
            row = (n * out_n + k * out_k) * align
            _store_gradient(
                gradient, row, j, here, exponentials, sums, y, valid, factor,
                num_classes, out_c, smoothing, False,
            )  # fmt: skip
    if reduce:
        tl.store(losses + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _forward_blocked(
    logits, target, table, weights, divisor, losses, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c,
    num_experts: tl.constexpr, num_classes: tl.constexpr, ignore_index: tl.constexpr,
    smoothing: tl.constexpr, reduce: tl.constexpr, align: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """As :func:`_forward` for longer rows: a sweep for the sums, and one for the gradient."""
    dtype: tl.constexpr = state.dtype.element_ty
    k = (tl.program_id(0) % num_experts).to(tl.int64)
    step = tl.num_programs(0) // num_experts * rows
    shares = _divisor(divisor, dtype)
    total = tl.zeros([rows], tl.float64)
    for start in range(tl.program_id(0) // num_experts * rows, num_samples, step):
        n = start + tl.arange(0, rows).to(tl.int64)
        here = n < num_samples
        y = tl.load(target + n, mask=here, other=ignore_index)
        valid = y != ignore_index
        row = (n * stride_n + k * stride_k) * align
        own = _target_logits(logits, table, row, k, y, valid, num_classes, stride_c, dtype)
        factor = _factor(weights, n, k, here, num_experts, dtype)

        peak = tl.full([rows], -float("inf"), dtype)
        exponentials = tl.zeros([rows, block], dtype)
        # The mean is taken of differences to a logit of the row: of the logits it would lose their digits.
        origin = tl.zeros([rows], dtype)
        distance = tl.zeros([rows], dtype)
        for first in range(0, num_classes, block):
            j = first + tl.arange(0, block)
            adjustment = _adjustment(table, k, j, num_classes, dtype, False)
            x = _adjusted_logits(logits, row, j, here, num_classes, stride_c, adjustment, False, False)
            higher = tl.maximum(peak, tl.max(x, axis=1))
            # As long as all is -inf any finite number serves; -inf - -inf would be NaN.
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            exponentials = exponentials * tl.exp(peak - safe)[:, None] + tl.exp(x - safe[:, None])
            peak = higher
            if smoothing != 0.0:
                origin = tl.where(first == 0, safe, origin)
                distance += tl.sum(tl.where((j < num_classes)[None, :], x - origin[:, None], 0.0), axis=1)
        sums = tl.sum(exponentials, axis=1)
        loss = tl.log(sums) - (own - peak)
        if smoothing != 0.0:
            mean = distance / num_classes + (origin - peak)
            loss = (1.0 - smoothing) * loss + smoothing * (tl.log(sums) - mean)
        loss = tl.where(valid, factor * loss, 0.0)

        out = state + (n * num_experts + k) * 2
        tl.store(out, peak, mask=here)
        tl.store(out + 1, sums, mask=here)
        if reduce:
            total += loss
        else:
            tl.store(losses + n * num_experts + k, loss, mask=here)
        if gradient is not None:
            factor *= 1.0 / shares  # as backward has it
            out_row = (n * out_n + k * out_k) * align
            for first in range(0, num_classes, block):
                j = first + tl.arange(0, block)
                adjustment = _adjustment(table, k, j, num_classes, dtype, False)
                x = _adjusted_logits(logits, row, j, here, num_classes, stride_c, adjustment, False, False)
                _store_gradient(
                    gradient, out_row, j, here, tl.exp(x - peak[:, None]), sums, y, valid, factor,
                    num_classes, out_c, smoothing, False,
                )  # fmt: skip
    if reduce:
        tl.store(losses + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _forward_streamed(
    logits, target, table, weights, divisor, losses, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c,
    num_experts: tl.constexpr, num_classes: tl.constexpr, ignore_index: tl.constexpr,
    smoothing: tl.constexpr, reduce: tl.constexpr, align: tl.constexpr, lowest: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, flush: tl.constexpr,
):  # fmt: skip
    """As :func:`_forward` for longer rows: a sweep for the sums, and one back for the gradient.

    Every lane keeps the maximum and the sum of its own classes, so that the first sweep has no reduction
    and no barrier, and takes one exponential a logit. The second goes from the last block, which the caches
    still hold, to the first, where the next row begins in the table. The table may stay in the L1 cache,
    which the logits pass by; what will not be read again leaves the L2 cache first.
    """
    dtype: tl.constexpr = state.dtype.element_ty
    num_blocks: tl.constexpr = (num_classes + block - 1) // block
    num_pairs: tl.constexpr = (num_blocks + 1) // 2
    k = (tl.program_id(0) % num_experts).to(tl.int64)
    step = tl.num_programs(0) // num_experts * rows
    shares = _divisor(divisor, dtype)
    total = tl.zeros([rows], tl.float64)
    for start in range(tl.program_id(0) // num_experts * rows, num_samples, step):
        n = start + tl.arange(0, rows).to(tl.int64)
        here = n < num_samples
        y = tl.load(target + n, mask=here, other=ignore_index)
        valid = y != ignore_index
        row = (n * stride_n + k * stride_k) * align
        # Before the gradient, which may overwrite it.
        own = _target_logits(logits, table, row, k, y, valid, num_classes, stride_c, dtype)
        factor = _factor(weights, n, k, here, num_experts, dtype)

        # From the lowest finite number, as -inf - -inf would be NaN.
        peaks = tl.full([rows, block], lowest, dtype)
        exponentials = tl.zeros([rows, block], dtype)
        # The mean is taken of differences to a logit of the row: of the logits it would lose their digits.
        origin = tl.where(own == -float("inf"), 0.0, own)
        distances = tl.zeros([rows, block], dtype)
        for i in tl.range(0, num_blocks, loop_unroll_factor=2):
            j = i * block + tl.arange(0, block)
            adjustment = _adjustment(table, k, j, num_classes, dtype, True)
            x = _adjusted_logits(logits, row, j, here, num_classes, stride_c, adjustment, True, False)
            excess = x - peaks
            ratio = _exp(-tl.abs(excess), flush)
            higher = excess > 0.0
            exponentials = tl.where(higher, exponentials * ratio + 1.0, exponentials + ratio)
            peaks = tl.where(higher, x, peaks)
            if smoothing != 0.0:
                distances += tl.where((j < num_classes)[None, :], x - origin[:, None], 0.0)
        # A lane that met nothing but -inf has no maximum.
        peaks = tl.where(exponentials == 0.0, -float("inf"), peaks)
        peak = tl.max(peaks, axis=1)
        safe = tl.where(peak == -float("inf"), 0.0, peak)
        sums = tl.sum(exponentials * tl.exp(peaks - safe[:, None]), axis=1)
        loss = tl.log(sums) - (own - peak)
        if smoothing != 0.0:
            mean = tl.sum(distances, axis=1) / num_classes + (origin - peak)
            loss = (1.0 - smoothing) * loss + smoothing * (tl.log(sums) - mean)
        loss = tl.where(valid, factor * loss, 0.0)

        out = state + (n * num_experts + k) * 2
        tl.store(out, peak, mask=here)
        tl.store(out + 1, sums, mask=here)
        if reduce:
            total += loss
        else:
            tl.store(losses + n * num_experts + k, loss, mask=here)
        if gradient is not None:
            factor *= 1.0 / shares  # as backward has it
            out_row = (n * out_n + k * out_k) * align
            for i in range(num_pairs):
                j = (num_pairs - 1 - i) * 2 * block + tl.arange(0, 2 * block)
                adjustment = _adjustment(table, k, j, num_classes, dtype, True)
                x = _adjusted_logits(logits, row, j, here, num_classes, stride_c, adjustment, False, True)
                _store_gradient(
                    gradient, out_row, j, here, _exp(x - peak[:, None], flush), sums, y, valid, factor,
                    num_classes, out_c, smoothing, True,
                )  # fmt: skip
    if reduce:
        tl.store(losses + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _backward(
    logits, target, table, weights, upstream, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c, stride_upstream,
    num_experts: tl.constexpr, num_classes: tl.constexpr, ignore_index: tl.constexpr,
    smoothing: tl.constexpr, align: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of classes of one expert."""
    dtype: tl.constexpr = state.dtype.element_ty
    num_blocks: tl.constexpr = (num_classes + block - 1) // block
    first = tl.program_id(0) % num_blocks * block
    k = (tl.program_id(0) // num_blocks % num_experts).to(tl.int64)
    begin = tl.program_id(0) // (num_blocks * num_experts) * rows
    step = tl.num_programs(0) // (num_blocks * num_experts) * rows
    j = first + tl.arange(0, block)
    adjustment = _adjustment(table, k, j, num_classes, dtype, False)
    for start in range(begin, num_samples, step):
        n = start + tl.arange(0, rows).to(tl.int64)
        here = n < num_samples
        y = tl.load(target + n, mask=here, other=ignore_index)
        factor = _factor(weights, n, k, here, num_experts, dtype)
        factor *= tl.load(upstream + n * stride_upstream, mask=here, other=0.0).to(dtype)
        saved = state + (n * num_experts + k) * 2
        peak = tl.load(saved, mask=here, other=0.0)
        sums = tl.load(saved + 1, mask=here, other=1.0)
        row = (n * stride_n + k * stride_k) * align
        x = _adjusted_logits(logits, row, j, here, num_classes, stride_c, adjustment, False, False)
        row = (n * out_n + k * out_k) * align
        _store_gradient(
            gradient, row, j, here, tl.exp(x - peak[:, None]), sums, y, y != ignore_index, factor,
            num_classes, out_c, smoothing, False,
        )  # fmt: skip


@triton.jit
def _total(values, divisor, total, number, block: tl.constexpr):
    """The sum of float64 values, over the divisor, by one program, in the same order every time."""
    sums = tl.zeros([block], tl.float64)
    for start in range(0, number, block):
        i = start + tl.arange(0, block)
        sums += tl.load(values + i, mask=i < number, other=0.0)
    tl.store(total, tl.sum(sums, axis=0) / _divisor(divisor, tl.float64))


@triton.jit
def _rescale(values, factor, number, block: tl.constexpr):
    """Multiply in place; nothing but a look at the factor where it is 1."""
    if values.dtype.element_ty == tl.float64:
        scale = tl.load(factor).to(tl.float64)
    else:
        scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * block, number, tl.num_programs(0) * block):
            i = start + tl.arange(0, block)
            value = tl.load(values + i, mask=i < number, other=0.0).to(scale.dtype)
            tl.store(values + i, value * scale, mask=i < number)


# --- Launchers ----------------------------------------------------------------------------------------------


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
    """What a batch contributes to the reference angles.

    Args:
        source: cosine logits ``[N, K, C]``, or with ``scale=None`` angles ``[N, K]``.
        target: class indices ``[N]``.
        group_index: group of every class ``[C]``.
        num_groups: ``G``.
        scale: factor of the cosine classifier.
        ignore_index: target of samples that enter nothing.
        check: has no effect here, as a look at values would wait for the device.

    Returns:
        The angles ``[N, K]``, or ``source`` itself if it is those, of no meaning for ignored samples; and
        float64 ``[B, G, K + 1]``, which summed over the blocks is :func:`functional.aaw_statistics`.
    """
    num_samples, num_experts = source.shape[:2]
    tile = sample_tile(num_experts)
    num_blocks = -(-num_samples // tile.rows)
    shape = (max(1, num_blocks), num_groups, num_experts + 1)
    made = None if scale is None else _empty(source, (num_samples, num_experts), compute_dtype(source.dtype))
    angles = source if made is None else made
    if num_samples == 0:
        return angles, torch.zeros(shape, dtype=torch.float64, device=source.device)
    parts = _empty(source, shape, torch.float64)
    _launch(
        _statistics, num_blocks, tile,
        source, target.contiguous(), group_index.contiguous(), made, parts,
        num_samples, *_target_strides(source),
        num_groups=num_groups, num_experts=num_experts, num_classes=len(group_index),
        ignore_index=ignore_index, scale=scale, rows=tile.rows, block=tile.block,
    )  # fmt: skip
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
    """Eq. 8 from the sums of :func:`statistics`.

    Args:
        angles: radians ``[N, K]``.
        target: class indices ``[N]``.
        group_index: group of every class ``[C]``.
        parts: ``[B, G, K + 1]``, of this batch or, summed, of all ranks.
        ignore_index: target of samples with weight 0.
        num_ranks: number of ranks in ``parts``.

    Returns:
        ``[N, K]``, and the divisor of a mean: samples not ignored, at least 1, over the ranks.
    """
    return _launch_weights(angles, target, group_index, parts, parts.shape[1], None, ignore_index, num_ranks)


def fits_one_block(num_samples: int, num_experts: int) -> bool:
    """Whether :func:`weights_of` needs one launch only."""
    return num_samples <= sample_tile(num_experts).rows


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
    """:func:`statistics` and :func:`weights` of one rank: in one launch, if the batch fits one block."""
    if not fits_one_block(*source.shape[:2]):
        angles, parts = statistics(
            source, target, group_index, num_groups, scale=scale, ignore_index=ignore_index
        )
        return weights(angles, target, group_index, parts, ignore_index=ignore_index, num_ranks=1)
    return _launch_weights(source, target, group_index, None, num_groups, scale, ignore_index, 1)


def _launch_weights(
    source: Tensor,
    target: Tensor,
    group_index: Tensor,
    parts: Tensor | None,
    num_groups: int,
    scale: float | None,
    ignore_index: int,
    num_ranks: int,
) -> tuple[Tensor, Tensor]:
    num_samples, num_experts = source.shape[:2]
    tile = sample_tile(num_experts)
    dtype = compute_dtype(source.dtype)
    result = _empty(source, (num_samples, num_experts), dtype)
    divisor = _empty(source, (), dtype)
    # An empty batch has its program too: the divisor counts the samples of all ranks.
    _launch(
        _weights, max(1, -(-num_samples // tile.rows)), tile,
        source, target.contiguous(), group_index.contiguous(), parts, result, divisor,
        num_samples, 0 if parts is None else len(parts), *_target_strides(source),
        num_groups=num_groups, num_experts=num_experts, num_classes=len(group_index),
        ignore_index=ignore_index, num_ranks=num_ranks, scale=scale, rows=tile.rows, block=tile.block,
    )  # fmt: skip
    return result, divisor


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
    """Eq. 9, and its gradient in the same pass.

    Args:
        logits: ``[N, K, C]`` of any strides.
        target: class indices ``[N]``.
        table: adjustments ``[K, C]``; None for none.
        weights: ``[N, K]``; None for ones.
        divisor: scalar; None for 1.
        ignore_index: target of samples with loss 0.
        label_smoothing: of the adjusted logits, 0 to 1.
        reduce: sum the losses and divide by the divisor.
        gradient: receives the gradient of the sum over the divisor; shape and dtype of the logits, whose
            memory it may share.
        check: has no effect here, as a look at values would wait for the device.

    Returns:
        The losses ``[N]`` or their scalar, and each row's maximum and its sum of exponentials
        relative to that ``[N, K, 2]``, which :func:`backward` takes.
    """
    num_samples, num_experts, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    state = _empty(logits, (num_samples, num_experts, 2), dtype)
    if num_samples == 0:
        return torch.zeros(() if reduce else 0, dtype=dtype, device=logits.device), state
    tile = forward_tile(num_classes, dtype)
    programs = _programs(logits, num_samples, num_experts, tile)
    table, weights = _constants(logits, table, weights)
    kernel, more, table = _form(tile, num_classes, dtype, _architecture(logits.device), table)
    if reduce:
        losses = _empty(logits, (programs,), torch.float64)
    else:
        losses = _empty(logits, (num_samples, num_experts), dtype)
    _launch(
        kernel, programs, tile,
        logits, target.contiguous(), table, weights, divisor,
        losses, state, gradient, num_samples,
        *(strides := _strides(logits, gradient))[1:],
        num_experts=num_experts, num_classes=num_classes, ignore_index=ignore_index,
        smoothing=float(label_smoothing), reduce=reduce, align=strides[0],
        rows=tile.rows, block=tile.block, **more,
    )  # fmt: skip
    if not reduce:
        return (losses.view(num_samples) if num_experts == 1 else losses.sum(dim=1)), state
    total = _empty(logits, (), dtype)
    _launch(_total, 1, FLAT_TILE, losses, divisor, total, programs, block=FLAT_TILE.block)
    return total, state


def _form(
    tile: Tile, num_classes: int, dtype: torch.dtype, architecture: int | None, table: Tensor | None
) -> tuple[Any, dict[str, float], Tensor | None]:
    """The kernel for rows of so many classes, its constants, and the table as it reads it.

    A kernel that reads the table for every row, not once a program, reads half the bytes in float32. A launch
    a step makes the copy, which so is never out of date.
    """
    whole, flush = tile.block >= num_classes, flushes(architecture, dtype)
    if not whole and _plan == "0.1":
        return _forward_blocked, {}, table
    if table is not None and (tile.ahead or not whole):
        table = table.to(dtype)
    if whole:
        return _forward, {"ahead": tile.ahead, "flush": flush}, table
    return _forward_streamed, {"lowest": torch.finfo(dtype).min, "flush": flush}, table


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
    """The gradient of the losses ``[N]`` for any upstream gradient ``[N]``; see :func:`forward`."""
    num_samples, num_experts, num_classes = logits.shape
    if num_samples == 0:
        return
    tile = backward_tile(num_classes, state.dtype)
    row_blocks = num_experts * -(-num_classes // tile.block)
    _launch(
        _backward, _programs(logits, num_samples, row_blocks, tile), tile,
        logits, target.contiguous(), *_constants(logits, table, weights), upstream,
        state, gradient, num_samples,
        *(strides := _strides(logits, gradient))[1:], upstream.stride(0),
        num_experts=num_experts, num_classes=num_classes, ignore_index=ignore_index,
        smoothing=float(label_smoothing), align=strides[0], rows=tile.rows, block=tile.block,
    )  # fmt: skip


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient by a scalar on its device, in place; next to nothing where that is 1."""
    number = gradient.numel()
    if number == 0:
        return
    if not _is_dense(gradient):
        gradient.copy_(gradient.to(compute_dtype(gradient.dtype)) * factor)
        return
    programs = min(-(-number // FLAT_TILE.block), _resident(gradient, FLAT_TILE))
    _launch(_rescale, programs, FLAT_TILE, gradient, factor, number, block=FLAT_TILE.block)


_HERE = nullcontext()


def _launch(kernel: Any, programs: int, tile: Tile, first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run so many programs on the device of the first argument."""
    device: AbstractContextManager[Any] = _HERE
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        device = torch.cuda.device(first.device)
    with device:
        kernel[(programs,)](first, *arguments, **_options(tile, first.device), **constants)


def _programs(like: Tensor, num_samples: int, columns: int, tile: Tile) -> int:
    """A multiple of the columns, each with as many programs as run at once or as it has tiles."""
    return columns * min(-(-num_samples // tile.rows), max(1, _resident(like, tile) // columns))


def _resident(like: Tensor, tile: Tile) -> int:
    return _resident_programs(like.device, _options(tile, like.device)["num_warps"])


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _constants(
    logits: Tensor, table: Tensor | None, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Table ``[K, C]`` and weights ``[N, K]`` as the kernels read them, whatever a hook made of them."""
    num_samples, num_experts, num_classes = logits.shape
    return _filled(table, (num_experts, num_classes)), _filled(weights, (num_samples, num_experts))


def _filled(tensor: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Expanded and contiguous; a tensor that is both is not asked to be, which takes microseconds."""
    if tensor is None or (tensor.shape == shape and tensor.is_contiguous()):
        return tensor
    return tensor.expand(shape).contiguous()


def _target_strides(source: Tensor) -> tuple[int, ...]:
    """Of logits, or of angles, which the target does not move."""
    return source.stride() if source.dim() == 3 else (*source.stride(), 0)


def _strides(logits: Tensor, gradient: Tensor | None) -> tuple[int, ...]:
    """A power of two, and the strides of both, those of samples and experts in units of it.

    The compiler sees from it which of the elements can be read together.
    """
    n, k, c = logits.stride()
    out_n, out_k, out_c = (n, k, c) if gradient is None else gradient.stride()
    common = math.gcd(n, k, out_n, out_k, 16)
    return common, n // common, k // common, c, out_n // common, out_k // common, out_c


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
