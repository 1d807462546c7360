"""The loss as Triton kernels, for CUDA and ROCm: choice of kernel, tiles and arguments.

Plain tensors in and out: no autograd, no checks of arguments, no waiting for the device, no atomics and no
tuning at run time. So results have the same bits in every run, and a step can be captured in a CUDA graph. A
row is the ``C`` logits of one sample and one expert. Up to a limit on ``C`` it stays in registers, so that
each logit is read once and its gradient written once; longer rows are swept in blocks.

The functions are those of :class:`lgla_losses.kernels.Engine`; the kernels and the meaning of the symbols are
in :mod:`lgla_losses.kernels._triton_kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lgla_losses.functional import compute_dtype
from lgla_losses.kernels import Angles, Rows, Samples
from lgla_losses.kernels import _triton_kernels as kernels

__all__ = [
    "PLANS",
    "backward",
    "count",
    "forward",
    "plan",
    "rescale_",
    "statistics",
    "use",
    "weights",
]

#: Ways to compute the loss on NVIDIA; :func:`use` chooses one, so that a benchmark can compare them. They
#: differ for plain rows (:func:`_form_of`) of 2,049 classes and more, except in float64:
#:
#: - ``"wide"``: a row of one tile takes fewer instructions (``_forward_lean``), by threads of 32 elements in
#:   float32 and of 64 in 16 bits. Longer rows are those of ``"resident"``.
#: - ``"resident"`` is the older plan: threads of 16 elements; a multiprocessor runs 32 warps of them. Longer
#:   rows take a program of 32 warps, one at a time (``_forward_streamed``). AMD has only this plan.
#: - ``"two-rows"``, which no GPU has run yet: as ``"wide"``, but a program takes two longer rows at a time.
#:   It reads the table, as many bytes as a float32 row, once for both. But more rows wait in the caches for
#:   their second read.
#:
#: An H200 took, at 4,096 x 3 x 8,142 in float32, 0.24 ms by either, and a copy 0.19; in bfloat16 0.134 by
#: ``"wide"``, 0.173 by ``"resident"``, and a copy 0.096. In float32 three or four programs on a
#: multiprocessor were slower, and so were rows loaded ahead; longer rows gained nothing by fewer
#: instructions.
PLANS = ("wide", "resident", "two-rows")

_plan = "wide"


def plan() -> str:
    """Give the name of the plan in use."""
    return _plan


def use(name: str) -> str:
    """Choose one of :data:`PLANS` for all launches from now on.

    Returns:
        The name of the plan before, to pass to ``use`` later.

    Raises:
        ValueError: there is no such plan.
    """
    global _plan
    if name not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(map(repr, PLANS))}, got {name!r}")
    before, _plan = _plan, name
    return before


#: Registers of an NVIDIA multiprocessor.
_REGISTERS = 65_536


class Tile(NamedTuple):
    """Describe the part that one program holds at a time: some rows of a block of classes (or experts).

    Attributes:
        rows: rows of the tile.
        block: columns of the tile.
        num_warps: warps of a program, on NVIDIA.
        registers: most registers of a thread, on NVIDIA; None leaves it to the compiler.
        lean: take fewer instructions, for rows that are plain; the tile is one row.
        keep: keep the adjustments of whole rows in registers; else they are read for every row.
    """

    rows: int
    block: int
    num_warps: int
    registers: int | None = None
    lean: bool = False
    keep: bool = True

    def options(self, architecture: int | None) -> dict[str, int]:
        """Give the options for Triton's compiler.

        AMD, here None, runs up to 16 warps, and has no option to limit registers. From sm_100 on, the
        compiler spills if a thread has 64 registers and 16 elements, so it has half of 16 and more there.
        """
        if architecture is None:
            return {"num_warps": min(16, self.num_warps)}
        if self.registers is None:
            return {"num_warps": self.num_warps}
        more = 2 if architecture >= 100 and self.block // (32 * self.num_warps) >= 16 else 1
        num_warps = min(32, more * self.num_warps)
        return {"num_warps": num_warps, "maxnreg": min(self.registers, _REGISTERS // (32 * num_warps))}


# The sizes below give a thread 8 to 64 elements, all in registers: benchmarks/kernel_resources.py prints
# what they need. With 64 registers per thread an NVIDIA multiprocessor runs 32 warps, of any number of
# programs.


def forward_tile(
    num_classes: int, dtype: torch.dtype, form: str = "plain", architecture: int | None = 0
) -> Tile:
    """Choose a tile: whole rows up to 16,384 classes (4,096 in float64), else blocks.

    Rows that are not plain (:func:`_form_of`) take more registers: for them, whole rows up to 8,192. The
    architecture is that of :func:`_architecture`.
    """
    if form in SHARED:
        return _shared_tile(num_classes, dtype, form)
    if form == "own" and dtype != torch.float64:
        return _own_tile(num_classes)
    return _forward_tile(num_classes, dtype, "resident" if architecture is None else _plan)


@lru_cache(maxsize=256)
def _forward_tile(num_classes: int, dtype: torch.dtype, plan: str) -> Tile:
    wide = 2 if dtype == torch.float64 else 1
    block = _power_of_two(num_classes, least=16)
    whole = wide**2 * block <= 16384
    rows = max(1, 1024 // (wide * block))
    if wide == 2:
        return Tile(rows, block, max(4, block // 256)) if whole else Tile(1, 2048, 8)
    if not whole:
        rows = 2 if plan == "two-rows" else 1
        return Tile(rows, 4096 // rows, 32, 64)
    if block <= 2048:  # few registers needed, or no choice for the compiler
        return Tile(rows, block, 4)

    if plan == "resident":
        return Tile(1, block, block // 512, 64)
    # In float32 threads of 64 elements spill at 16,384 classes, and were not faster at 8,142.
    elements = 64 if dtype.itemsize == 2 else 32
    return Tile(1, block, max(4, block // (32 * elements)), 128, lean=True, keep=elements == 32)


@lru_cache(maxsize=256)
def _own_tile(num_classes: int) -> Tile:
    block = _power_of_two(num_classes, least=16)
    if block > 8192:
        return Tile(1, 2048, 16, 128)
    num_warps = max(4, block // 256)
    return Tile(max(1, 1024 // block), block, num_warps, 64 if num_warps > 4 else None)


@lru_cache(maxsize=256)
def _shared_tile(num_classes: int, dtype: torch.dtype, form: str) -> Tile:
    wide = (2 if dtype == torch.float64 else 1) * (2 if form == "shared focal" else 1)
    block = _power_of_two(num_classes, least=16)
    if wide * block > 8192:
        return Tile(1, 4096 // wide, 16, 128)  # without a limit the compiler takes fewer, and spills
    return Tile(max(1, 1024 // (wide * block)), block, max(4, min(32, wide * block // 256)))


@lru_cache(maxsize=256)
def backward_tile(num_classes: int, dtype: torch.dtype) -> Tile:
    """Choose blocks of up to 2,048 classes (half in float64): nothing is summed over a row."""
    elements = 1024 if dtype == torch.float64 else 2048
    block = min(_power_of_two(num_classes, least=16), elements)
    return Tile(max(1, elements // 2 // block), block, 4)


@lru_cache(maxsize=256)
def sample_tile(num_experts: int, num_samples: int) -> Tile:
    """Choose a tile of samples by experts; one more column counts the samples.

    Up to 128 programs share the samples, and more only if the tile has its largest size: each program adds
    the sums of all.
    """
    block = _power_of_two(num_experts + 1)
    rows = max(1, min(4096 // block, max(32, _power_of_two(-(-num_samples // 128)))))
    return Tile(rows, block, max(1, min(16, rows * block // 256)))


@lru_cache(maxsize=256)
def batch_tile(num_experts: int, num_samples: int) -> Tile:
    """Choose a tile of all samples by experts; one more column counts the samples."""
    rows, block = _power_of_two(num_samples), _power_of_two(num_experts + 1)
    return Tile(rows, block, max(1, min(8, rows * block // 128)))


@lru_cache(maxsize=256)
def feature_tile(num_experts: int) -> Tile:
    """Choose a tile of a few samples by experts; one more column counts the samples.

    A program reads :data:`DEPTH` features at a time.
    """
    block = _power_of_two(num_experts + 1)
    return Tile(max(1, 32 // block), block, 4)


#: Features that a program reads at a time.
DEPTH = 64


@lru_cache(maxsize=256)
def class_tile(num_experts: int, num_classes: int) -> Tile:
    """Choose a tile of one sample's classes by experts; one more column counts the samples."""
    block = _power_of_two(num_experts + 1)
    rows = min(_power_of_two(num_classes, least=16), max(16, 2048 // block))
    return Tile(rows, block, max(4, min(8, rows * block // 256)), 128)


#: Forms of rows in which every class may have a share; see :func:`_form_of`.
SHARED = ("shared", "shared focal")

#: Elements that a program sums, or rescales, at a time.
FLAT_TILE = Tile(1, 1024, 4)

#: Most elements of a tile whose weights one program computes alone, which is 256 samples of three experts:
#: sums in float64 are slow on many GPUs.
AT_ONCE = 1024

#: Most targets that one program counts alone.
COUNTED_AT_ONCE = 16_384


def _power_of_two(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


@lru_cache(maxsize=64)
def _architecture(device: torch.device) -> int | None:
    """Give ten times the compute capability of NVIDIA, None for AMD, 0 for Triton's interpreter."""
    if torch.version.hip is not None:
        return None
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=256)
def _options(tile: Tile, device: torch.device) -> dict[str, int]:
    """Give the options for Triton's compiler on a device."""
    return tile.options(_architecture(device))


def flushes(architecture: int | None, dtype: torch.dtype) -> bool:
    """Say whether exponentials below the normal numbers may become 0; see ``_exp``."""
    return bool(architecture) and dtype == torch.float32


@lru_cache(maxsize=64)
def _resident_programs(device: torch.device, num_warps: int, registers: int) -> int:
    """Count the programs that the device runs at once with this many registers per thread.

    Each of them takes several tiles.
    """
    if device.type != "cuda":
        return 16 // num_warps + 2  # Triton's interpreter, one program after the other
    on_one = max(1, _REGISTERS // (32 * num_warps * registers))
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * on_one


# --- Angles and weights -------------------------------------------------------------------------------------


def statistics(angles: Angles, samples: Samples) -> tuple[Angles, Tensor]:
    """Compute Eq. 7 and sum it by group; see :class:`lgla_losses.kernels.Engine`."""
    target, num_groups = samples.target, samples.num_groups
    if target.dim() == 2:
        return angles, _soft_statistics(angles, samples)
    source = _first(angles)
    num_samples, num_experts = len(target), _num_experts(angles)
    tile = sample_tile(num_experts, num_samples) if angles.weight is None else feature_tile(num_experts)
    num_blocks = -(-num_samples // tile.rows)
    made = angles.angles
    if made is None:
        made = _empty(source, (num_samples, num_experts), _angle_dtype(angles))
    parts = _parts(source, num_blocks, num_groups, num_experts)
    if num_samples == 0:
        return Angles(angles=made), parts

    # In this order: each counts the samples in the column after its experts; only the last count stays.
    for first, one in _by_expert(angles.cosines or (source,)):
        weight, scale = angles.weight, angles.scale if angles.cosines else None
        _launch(
            kernels._statistics, num_blocks, tile,
            one, weight, target, samples.sample_weight, samples.group_index.contiguous(),
            None if angles.angles is not None else _from(first, made), _from(first, parts, dim=2),
            num_samples, 0 if weight is None else one.shape[2], *_three(one.stride()),
            *((0, 0, 0) if weight is None else weight.stride()),
            target.stride(0), _stride(samples.sample_weight),
            num_groups=num_groups, num_experts=one.shape[1], all_experts=num_experts,
            num_classes=len(samples.group_index), ignore_index=samples.ignore_index, scale=scale,
            rows=tile.rows, block=tile.block, depth=DEPTH,
        )  # fmt: skip
    return Angles(angles=made), parts


def _soft_statistics(angles: Angles, samples: Samples) -> Tensor:
    target, num_groups = samples.target, samples.num_groups
    num_samples, num_classes = target.shape
    num_experts = _num_experts(angles)
    tile = class_tile(num_experts, num_classes)
    programs = min(num_samples, _resident(target, tile))
    parts = _parts(target, programs, num_groups, num_experts)
    if num_samples == 0:
        return parts
    # In this order: each counts in the column after its experts; only the last count stays.
    for first, cosines in _by_expert(angles.cosines):
        _launch(
            kernels._soft_statistics, programs, tile,
            cosines, target, samples.sample_weight, samples.group_index.contiguous(),
            _from(first, parts, dim=2),
            num_samples, *cosines.stride(), *target.stride(), _stride(samples.sample_weight),
            num_groups=num_groups, num_experts=cosines.shape[1], all_experts=num_experts,
            num_classes=num_classes, scale=angles.scale,
            groups=_power_of_two(num_groups), rows=tile.rows, block=tile.block,
        )  # fmt: skip
    return parts


def weights(
    angles: Angles, samples: Samples, parts: Tensor | None = None, num_ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute Eq. 8 from what :func:`statistics` returns; see :class:`lgla_losses.kernels.Engine`.

    Without ``parts`` one launch computes a small batch, where launches are most of the time.
    """
    target, num_groups = samples.target, samples.num_groups
    num_samples, num_experts = len(target), _num_experts(angles)
    if parts is None and not _fits_one_program(angles, samples):
        angles, parts = statistics(angles, samples)
    source = _first(angles)
    result = _empty(source, (num_samples, num_experts), _angle_dtype(angles))
    divisor = _empty(source, (), torch.float64)
    parts, group_index = _filled(parts), samples.group_index.contiguous()
    shared = {
        "num_groups": num_groups, "num_classes": len(group_index), "num_ranks": num_ranks,
    }  # fmt: skip
    # An empty batch also needs a program: the divisor counts the samples of all ranks.
    if target.dim() == 1:
        scale = angles.scale if angles.angles is None else None
        tile = (
            batch_tile(num_experts, num_samples) if parts is None else sample_tile(num_experts, num_samples)
        )
        _launch(
            kernels._weights, max(1, -(-num_samples // tile.rows)), tile,
            source, target, samples.sample_weight, group_index, parts, result, divisor,
            num_samples, 0 if parts is None else len(parts), *_three(source.stride()),
            target.stride(0), _stride(samples.sample_weight),
            num_experts=num_experts, ignore_index=samples.ignore_index, scale=scale,
            rows=tile.rows, block=tile.block, **shared,
        )  # fmt: skip
        return result, divisor

    parts = cast(Tensor, parts)
    tile = class_tile(num_experts, len(group_index))
    for first, cosines in _by_expert(angles.cosines):
        _launch(
            kernels._soft_weights, max(1, min(num_samples, _resident(source, tile))), tile,
            cosines, target, samples.sample_weight, group_index,
            _from(first, parts, dim=2), _from(first, result), divisor,
            num_samples, len(parts), num_experts - first,
            *cosines.stride(), *target.stride(), _stride(samples.sample_weight),
            num_experts=cosines.shape[1], all_experts=num_experts, scale=angles.scale,
            groups=_power_of_two(num_groups), rows=tile.rows, block=tile.block, **shared,
        )  # fmt: skip
    return result, divisor


def _fits_one_program(angles: Angles, samples: Samples) -> bool:
    """Say whether one program can compute Eqs. 7 and 8: for class indices, of few samples.

    Features are too many for one, and so are the classes of probabilities.
    """
    if samples.target.dim() != 1 or angles.features is not None or len(angles.cosines) > 1:
        return False
    tile = batch_tile(_num_experts(angles), len(samples.target))
    return tile.rows * tile.block <= AT_ONCE


def count(
    target: Tensor, sample_weight: Tensor | None, class_weight: Tensor | None, ignore_index: int
) -> Tensor:
    """Sum the weights of the samples; see :class:`lgla_losses.kernels.Engine`.

    It takes one launch, or two for many targets.
    """
    number = target.numel()
    total = _empty(target, (), torch.float64)
    programs = max(1, min(-(-number // COUNTED_AT_ONCE), _resident(target, FLAT_TILE)))
    sums = total if programs == 1 else _empty(target, (programs,), torch.float64)
    columns = 1 if target.dim() == 1 else target.shape[1]
    _launch(
        kernels._count, programs, FLAT_TILE,
        target, sample_weight, _filled(class_weight), sums,
        number, target.stride(0), 0 if target.dim() == 1 else target.stride(1), _stride(sample_weight),
        num_classes=columns if class_weight is None else len(class_weight), columns=columns,
        ignore_index=ignore_index, block=FLAT_TILE.block,
    )  # fmt: skip
    if programs > 1:
        _launch(kernels._total, 1, FLAT_TILE, sums, None, total, programs, block=FLAT_TILE.block)
    return total


def _first(angles: Angles) -> Tensor:
    """Give the tensor that the angles come from, or the first of several."""
    if angles.angles is not None:
        return angles.angles
    return angles.cosines[0] if angles.features is None else angles.features


def _num_experts(angles: Angles) -> int:
    return sum(v.shape[1] for v in angles.cosines) if angles.cosines else _first(angles).shape[1]


def _angle_dtype(angles: Angles) -> torch.dtype:
    dtype = _first(angles).dtype
    return compute_dtype(dtype if angles.weight is None else torch.promote_types(dtype, angles.weight.dtype))


def _parts(like: Tensor, num_blocks: int, num_groups: int, num_experts: int) -> Tensor:
    """Make memory for the sums of blocks of samples; without samples, make one block of zeros."""
    shape = (max(1, num_blocks), num_groups, num_experts + 1)
    if num_blocks == 0:
        return torch.zeros(shape, dtype=torch.float64, device=like.device)
    return _empty(like, shape, torch.float64)


# --- Losses and gradients -----------------------------------------------------------------------------------


def forward(
    logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Compute Eq. 9, and its gradient in the same pass; see :class:`lgla_losses.kernels.Engine`.

    There is one launch for each tensor of logits, and one that adds the losses of samples or programs.
    """
    like, num_experts = logits[0], sum(v.shape[1] for v in logits)
    num_samples, _, num_classes = like.shape
    dtype = compute_dtype(like.dtype)
    state = _empty(like, (num_samples, num_experts, 2), dtype)
    if num_samples == 0:
        return torch.zeros(() if rows.reduce else 0, dtype=dtype, device=like.device), state

    form = _form_of(rows)
    architecture = _architecture(like.device)
    shared, tile = form in SHARED, forward_tile(num_classes, like.dtype, form, architecture)
    programs = [_programs(v, num_samples, v.shape[1], tile) for v in logits]
    if rows.reduce:
        losses = _empty(like, (sum(programs),), torch.float64)
        places = [_from(sum(programs[:i]), losses, dim=0) for i in range(len(programs))]
    else:
        losses = _empty(like, (num_samples, num_experts), dtype)
        places = [_from(first, losses) for first, _ in _by_expert(logits)]

    constants = _Constants(rows, num_experts, num_classes)
    kernel, more = _form(tile, num_classes, dtype, architecture, constants, shared)
    for (first, one), gradient, number, place in zip(
        _by_expert(logits), gradients, programs, places, strict=True
    ):
        align, *strides = _strides(one, gradient)
        _launch(
            kernel, number, tile,
            one, rows.target, *constants.of(first), rows.divisor, *constants.of_classes,
            place, _from(first, state), gradient, *((None,) if shared else ()),
            num_samples, *strides, *constants.strides, *((_target_c(rows), 0) if shared else ()),
            num_experts=one.shape[1], all_experts=num_experts, num_classes=num_classes,
            gamma=float(rows.gamma), reduce=rows.reduce, align=align, **constants.compiled,
            rows=tile.rows, block=tile.block, **more,
        )  # fmt: skip
    if not rows.reduce:
        return (losses.view(num_samples) if num_experts == 1 else losses.sum(dim=1)), state
    total = _empty(like, (), dtype)
    _launch(kernels._total, 1, FLAT_TILE, losses, rows.divisor, total, len(losses), block=FLAT_TILE.block)
    return total, state


def backward(
    logits: Sequence[Tensor],
    rows: Rows,
    upstream: Tensor,
    state: Tensor,
    gradients: Sequence[Tensor | None],
) -> None:
    """Compute the gradient for any upstream gradient ``[N]``; see :class:`lgla_losses.kernels.Engine`."""
    num_samples, num_experts, _ = state.shape
    num_classes = logits[0].shape[2]
    if num_samples == 0:
        return
    # With gamma, the gradient of a class needs the target's logit. If the gradient overwrites the logits, it
    # may be gone: then a program takes whole rows.
    form = SHARED[1] if rows.gamma != 0 else _form_of(rows)
    shared, tile = form in SHARED, backward_tile(num_classes, state.dtype)
    if shared:
        tile = forward_tile(num_classes, state.dtype, form)
    constants = _Constants(rows, num_experts, num_classes)
    compiled: dict[str, Any] = {
        "num_classes": num_classes,
        **constants.compiled,
        "rows": tile.rows,
        "block": tile.block,
    }
    for (first, one), gradient in zip(_by_expert(logits), gradients, strict=True):
        if gradient is None:
            continue
        align, *strides = _strides(one, gradient)
        compiled |= {"num_experts": one.shape[1], "all_experts": num_experts, "align": align}
        common = one, rows.target, *constants.of(first)
        if shared:
            _launch(
                kernels._shared, _programs(one, num_samples, one.shape[1], tile), tile,
                *common, None, *constants.of_classes, None, _from(first, state), gradient, upstream,
                num_samples, *strides, *constants.strides, _target_c(rows), upstream.stride(0),
                gamma=float(rows.gamma), reduce=False, **compiled,
            )  # fmt: skip
        else:
            columns = one.shape[1] * -(-num_classes // tile.block)
            _launch(
                kernels._backward, _programs(one, num_samples, columns, tile), tile,
                *common, *constants.of_classes, upstream, _from(first, state), gradient,
                num_samples, *strides, *constants.strides, upstream.stride(0), **compiled,
            )  # fmt: skip


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient in place by a scalar on its device; for 1 this costs next to nothing."""
    number = gradient.numel()
    if number == 0:
        return
    if not _is_dense(gradient):
        gradient.copy_(gradient.to(compute_dtype(gradient.dtype)) * factor)
        return
    programs = min(-(-number // FLAT_TILE.block), _resident(gradient, FLAT_TILE))
    _launch(kernels._rescale, programs, FLAT_TILE, gradient, factor, number, block=FLAT_TILE.block)


def _form_of(rows: Rows) -> str:
    """Say which kind of kernel the losses of the rows need.

    ``"plain"``: only class indices, table, weights and label smoothing. ``"own"``: class weights, margins or
    gamma without label smoothing; they affect only the target's class. :data:`SHARED`: every class may have a
    share, without gamma or with it.
    """
    if rows.target.dim() == 1:
        if rows.class_weight is None and rows.margin is None and rows.gamma == 0:
            return "plain"
        if rows.label_smoothing == 0:
            return "own"
    return SHARED[rows.gamma != 0]


def _target_c(rows: Rows) -> int:
    return rows.target.stride(1) if rows.target.dim() == 2 else 0


class _Constants:
    """Hold what the kernels read besides logits, in the form that they need.

    Attributes:
        strides: strides of targets and weights.
        of_classes: class weights and margins.
        compiled: values that are compiled into the kernel.
    """

    def __init__(self, rows: Rows, num_experts: int, num_classes: int) -> None:
        table, weights = rows.table, rows.weights
        self._one_for_all = False
        if table is not None and num_experts > 1 and table.stride(0) == 0:
            self._one_for_all, table = True, table[:1]
        self._table, self._weights = _filled(table), weights
        self.strides = (rows.target.stride(0), *((0, 0) if weights is None else weights.stride()))
        self.of_classes = _filled(rows.class_weight), _filled(rows.margin)
        self.compiled: dict[str, Any] = {
            "table_k": 0 if self._one_for_all else num_classes,
            "ignore_index": rows.ignore_index,
            "smoothing": float(rows.label_smoothing),
        }

    def of(self, first: int) -> tuple[Tensor | None, Tensor | None]:
        """Give the table and the weights of the experts from ``first`` on."""
        table, weights = self._table, self._weights
        return (
            table if table is None or self._one_for_all else _from(first, table, dim=0),
            weights if weights is None else _from(first, weights),
        )

    def round_table(self, dtype: torch.dtype) -> None:
        """Round the table, which is read for every row; in float32 it then has half the bytes.

        Each step makes a new copy with one launch, so the copy is never out of date.
        """
        if self._table is not None:
            self._table = self._table.to(dtype)


def _form(
    tile: Tile,
    num_classes: int,
    dtype: torch.dtype,
    architecture: int | None,
    constants: _Constants,
    shared: bool,
) -> tuple[Any, dict[str, Any]]:
    """Choose the kernel for rows with this many classes, and its constants; for some, round the table."""
    if shared:
        return kernels._shared, {}
    whole, flush = tile.block >= num_classes, flushes(architecture, dtype)
    if not tile.keep or not whole:
        constants.round_table(dtype)
    if tile.lean:
        return kernels._forward_lean, {"keep": tile.keep, "flush": flush}
    if whole:
        return kernels._forward, {"flush": flush}
    return kernels._forward_streamed, {"lowest": torch.finfo(dtype).min, "flush": flush}


# --- Launches -----------------------------------------------------------------------------------------------


_HERE = nullcontext()


def _launch(kernel: Any, programs: int, tile: Tile, first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a number of programs of a kernel on the device of the first argument."""
    device: AbstractContextManager[Any] = _HERE
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        device = torch.cuda.device(first.device)
    with device:
        kernel[(programs,)](first, *arguments, **_options(tile, first.device), **constants)


def _programs(like: Tensor, num_samples: int, columns: int, tile: Tile) -> int:
    """Choose the number of programs: a multiple of ``columns``.

    If possible, they are no more than run at once; a column has no more programs than tiles.
    """
    return columns * min(-(-num_samples // tile.rows), max(1, _resident(like, tile) // columns))


def _resident(like: Tensor, tile: Tile) -> int:
    options = _options(tile, like.device)
    return _resident_programs(like.device, options["num_warps"], options.get("maxnreg", 64))


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _by_expert(tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Give the tensors ``[N, k, ...]``, each with the number of its first expert."""
    first = 0
    for tensor in tensors:
        yield first, tensor
        first += tensor.shape[1]


def _from(first: int, tensor: Tensor, dim: int = 1) -> Tensor:
    """Give a view from ``first`` on; for 0 give the tensor itself, because a view takes microseconds."""
    return tensor if first == 0 else tensor.narrow(dim, first, tensor.shape[dim] - first)


def _filled(tensor: Tensor | None) -> Tensor | None:
    """Make a tensor contiguous; skip the call, which takes microseconds, if it is so already."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _three(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Give three strides, as logits and features have; angles have no classes, and get a 0."""
    return strides if len(strides) == 3 else (*strides, 0)


def _strides(logits: Tensor, gradient: Tensor | None) -> tuple[int, ...]:
    """Give a power of two, and the strides of logits and gradient.

    The strides of samples and experts are in units of it. So the compiler sees which elements it can read
    together.
    """
    n, k, c = logits.stride()
    out_n, out_k, out_c = (n, k, c) if gradient is None else gradient.stride()
    common = math.gcd(n, k, out_n, out_k, 16)
    return common, n // common, k // common, c, out_n // common, out_k // common, out_c


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill their memory without gaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
