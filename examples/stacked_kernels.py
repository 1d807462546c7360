# Needs no other file.
"""Triton kernels that train stacked networks: fused batch norms, and grouped convolutions.

Maps are in channels-last memory, ``[P, C]`` of ``P = N * H * W`` pixels. Libraries compute some passes of a
convolution with many small groups one group at a time; the faster of their kernels and ours is used. Networks
are evaluated by PyTorch's own operations.
"""

# Triton's kernels have no types: its compiler decides on their arguments.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Values of a program's tile: for sums, which load the next tiles meanwhile, and for writes.
TILE_OF_SUMS, TILE = 2048, 4096

#: Programs of a sweep over all pixels, as many as run at once on 132 multiprocessors; and of a sweep that
#: leaves sums, which takes more registers.
PROGRAMS, PROGRAMS_OF_SUMS = 528, 396

#: Pixels of a convolution program and its warps, by the wider of inputs and outputs: with these the compiler
#: can keep several programs on a multiprocessor of sm_90.
PIXELS = {16: (256, 8), 32: (128, 8), 64: (64, 4)}

#: For the gradient of a convolution's weights: pixels at a time, and number of programs at once, by inputs
#: times outputs.
PIXELS_AT_ONCE = 64
RESIDENT = {256: 792, 512: 792, 1024: 660, 2048: 396, 4096: 264}


@triton.jit
def _statistics(x, mean, parts, pixels, channels: tl.constexpr, rows: tl.constexpr, width: tl.constexpr):
    """Sums of the differences to the running mean, which keeps the digits, and of their squares."""
    c = tl.arange(0, width)
    here = c < channels
    middle = tl.load(mean + c, mask=here, other=0.0)
    first = tl.zeros([rows, width], tl.float32)
    second = tl.zeros([rows, width], tl.float32)
    for start in tl.range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows, num_stages=4):
        p = start + tl.arange(0, rows)
        mask = (p < pixels)[:, None] & here[None, :]
        value = tl.load(x + p[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - middle[None, :], 0.0)
        first += value
        second += value * value
    out = parts + tl.program_id(0) * 2 * channels + c
    tl.store(out, tl.sum(first, axis=0), mask=here)
    tl.store(out + channels, tl.sum(second, axis=0), mask=here)


@triton.jit
def _sums(parts, c, here, number: tl.constexpr, channels: tl.constexpr, block: tl.constexpr):
    """Both sums of some channels over all programs."""
    first = tl.zeros([block], tl.float32)
    second = tl.zeros([block], tl.float32)
    for start in tl.static_range(0, number, 128):  # unrolled: all loads run at the same time
        i = start + tl.arange(0, 128)
        mask = (i < number)[:, None] & here[None, :]
        at = parts + i[:, None] * 2 * channels + c[None, :]
        first += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        second += tl.sum(tl.load(at + channels, mask=mask, other=0.0), axis=0)
    return first, second


@triton.jit
def _finish_statistics(
    parts, running_mean, running_var, saved, pixels, momentum, eps,
    number: tl.constexpr, channels: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Mean and inverse deviation of every channel, and the running ones."""
    c = tl.program_id(0) * block + tl.arange(0, block)
    here = c < channels
    first, second = _sums(parts, c, here, number, channels, block)
    old_mean = tl.load(running_mean + c, mask=here, other=0.0)
    old_var = tl.load(running_var + c, mask=here, other=1.0)
    above = first / pixels
    var = tl.maximum(second / pixels - above * above, 0.0)
    mean = old_mean + above
    tl.store(saved + c, mean, mask=here)
    tl.store(saved + channels + c, 1.0 / tl.sqrt(var + eps), mask=here)
    tl.store(running_mean + c, old_mean + momentum * above, mask=here)
    unbiased = var * (pixels / (pixels - 1.0))
    tl.store(running_var + c, old_var + momentum * (unbiased - old_var), mask=here)


@triton.jit
def _apply(
    x, residual, saved, weight, bias, y, pixels,
    channels: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Normalise, add the residual if there is one, and rectify."""
    c = tl.arange(0, width)
    here = c < channels
    mean = tl.load(saved + c, mask=here, other=0.0)
    scale = tl.load(saved + channels + c, mask=here, other=0.0) * tl.load(weight + c, mask=here, other=0.0)
    shift = tl.load(bias + c, mask=here, other=0.0) - mean * scale
    for start in range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows):
        p = start + tl.arange(0, rows)
        mask = (p < pixels)[:, None] & here[None, :]
        at = p[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if residual is not None:
            value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + at, tl.maximum(value, 0.0).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _rectified(upstream, x, y, saved, scale, shift, at, mask):
    """The gradient through the rectifier; without ``y`` the output is computed again."""
    gradient = tl.load(upstream + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        passes = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) > 0.0
    else:
        passes = value * scale[None, :] + shift[None, :] > 0.0
    return tl.where(passes, gradient, 0.0), value


@triton.jit
def _gradient_statistics(
    upstream, x, y, saved, weight, bias, parts, pixels,
    channels: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of it times the normalised input."""
    c = tl.arange(0, width)
    here = c < channels
    mean = tl.load(saved + c, mask=here, other=0.0)
    inverse = tl.load(saved + channels + c, mask=here, other=0.0)
    scale = inverse * tl.load(weight + c, mask=here, other=0.0)
    shift = tl.load(bias + c, mask=here, other=0.0) - mean * scale
    first = tl.zeros([rows, width], tl.float32)
    second = tl.zeros([rows, width], tl.float32)
    for start in tl.range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows, num_stages=4):
        p = start + tl.arange(0, rows)
        mask = (p < pixels)[:, None] & here[None, :]
        at = p[:, None] * channels + c[None, :]
        gradient, value = _rectified(upstream, x, y, saved, scale, shift, at, mask)
        first += gradient
        second += gradient * (value - mean[None, :]) * inverse[None, :]
    out = parts + tl.program_id(0) * 2 * channels + c
    tl.store(out, tl.sum(first, axis=0), mask=here)
    tl.store(out + channels, tl.sum(second, axis=0), mask=here)


@triton.jit
def _finish_gradient(
    parts, weight_gradient, bias_gradient,
    number: tl.constexpr, channels: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias."""
    c = tl.program_id(0) * block + tl.arange(0, block)
    here = c < channels
    first, second = _sums(parts, c, here, number, channels, block)
    tl.store(bias_gradient + c, first, mask=here)
    tl.store(weight_gradient + c, second, mask=here)


@triton.jit
def _gradient(
    upstream, x, y, saved, weight, bias, weight_gradient, bias_gradient, out, residual_out, pixels,
    channels: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, and of the residual."""
    c = tl.arange(0, width)
    here = c < channels
    mean = tl.load(saved + c, mask=here, other=0.0)
    inverse = tl.load(saved + channels + c, mask=here, other=0.0)
    scale = inverse * tl.load(weight + c, mask=here, other=0.0)
    shift = tl.load(bias + c, mask=here, other=0.0) - mean * scale
    share = tl.load(bias_gradient + c, mask=here, other=0.0) / pixels
    slope = inverse * tl.load(weight_gradient + c, mask=here, other=0.0) / pixels
    for start in range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows):
        p = start + tl.arange(0, rows)
        mask = (p < pixels)[:, None] & here[None, :]
        at = p[:, None] * channels + c[None, :]
        gradient, value = _rectified(upstream, x, y, saved, scale, shift, at, mask)
        if residual_out is not None:
            tl.store(residual_out + at, gradient.to(residual_out.dtype.element_ty), mask=mask)
        centred = gradient - share[None, :] - (value - mean[None, :]) * slope[None, :]
        tl.store(out + at, (scale[None, :] * centred).to(out.dtype.element_ty), mask=mask)


class _NormRelu(torch.autograd.Function):
    """relu(batch_norm(x) + residual), with batch statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor,
        running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        channels = x.shape[1]
        pixels, sums, tile = x.numel() // channels, _tile(channels, TILE_OF_SUMS), _tile(channels, TILE)
        programs = min(PROGRAMS_OF_SUMS, -(-pixels // sums["rows"]))
        parts = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        saved = torch.empty(2, channels, dtype=torch.float32, device=x.device)
        y = torch.empty_like(x)
        _statistics[(programs,)](x, running_mean, parts, pixels, **sums)
        _finish_statistics[(-(-channels // 16),)](
            parts, running_mean, running_var, saved, pixels, momentum, eps,
            number=programs, channels=channels, block=16, num_warps=4,
        )  # fmt: skip
        _apply[(PROGRAMS,)](x, residual, saved, weight, bias, y, pixels, **tile)
        ctx.save_for_backward(x, None if residual is None else y, saved, weight, bias)
        ctx.programs = programs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, saved, weight, bias = ctx.saved_tensors
        channels = x.shape[1]
        pixels, programs = x.numel() // channels, ctx.programs
        upstream = upstream.contiguous(memory_format=torch.channels_last)
        parts = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        gradients = torch.empty_like(weight), torch.empty_like(bias)
        out = torch.empty_like(x)
        residual_out = None if y is None else torch.empty_like(x)
        _gradient_statistics[(programs,)](
            upstream, x, y, saved, weight, bias, parts, pixels, **_tile(channels, TILE_OF_SUMS)
        )
        _finish_gradient[(-(-channels // 16),)](
            parts, *gradients, number=programs, channels=channels, block=16, num_warps=4
        )
        _gradient[(PROGRAMS,)](
            upstream, x, y, saved, weight, bias, *gradients, out, residual_out, pixels,
            **_tile(channels, TILE),
        )  # fmt: skip
        return out, residual_out, *gradients, None, None, None, None


def _tile(channels: int, values: int) -> dict[str, int]:
    width = triton.next_power_of_2(channels)
    return {"channels": channels, "width": width, "rows": max(1, values // width), "num_warps": 8}


def norm_relu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm in training, plus ``residual`` if there is one, rectified.

    Args:
        x: ``[N, C, H, W]``, in channels-last memory, like ``residual``.
        residual: of the same shape and dtype.
        weight: float32 ``[C]``, like ``bias`` and the running statistics, which are updated.
        bias: of the channels.
        running_mean: of the channels.
        running_var: of the channels.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
    """
    result: Tensor = _NormRelu.apply(x, residual, weight, bias, running_mean, running_var, momentum, eps)
    return result


@triton.jit
def _tap(
    x, p, tap, pixels, channels: tl.constexpr, height: tl.constexpr, wide: tl.constexpr,
    source_height: tl.constexpr, source_wide: tl.constexpr, stride: tl.constexpr, flip: tl.constexpr,
):  # fmt: skip
    """The values that a tap of the pixels ``p`` reads of some channels: 0 beyond the border."""
    n, row, column = p // (height * wide), p // wide % height, p % wide
    if flip:  # from the input back to the outputs that read it
        row, column = row + tap // 3 - 1, column + tap % 3 - 1
        there = (row >= 0) & (column >= 0) & (row % stride == 0) & (column % stride == 0)
        row, column = row // stride, column // stride
    else:
        row, column = row * stride + tap // 3 - 1, column * stride + tap % 3 - 1
        there = (row >= 0) & (column >= 0)
    there = there & (row < source_height) & (column < source_wide) & (p < pixels)
    source = (n * source_height + row) * source_wide + column
    return tl.load(x + source[:, None] * channels, mask=there[:, None], other=0.0)


@triton.jit
def _convolve(
    x, weight, y, pixels, groups: tl.constexpr, inputs: tl.constexpr, outputs: tl.constexpr,
    height: tl.constexpr, wide: tl.constexpr, source_height: tl.constexpr, source_wide: tl.constexpr,
    stride: tl.constexpr, flip: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of pixels of one group; with ``flip``, the gradient of the input."""
    g = tl.program_id(0)  # the groups of a pixel are side by side in memory
    p = tl.program_id(1) * block + tl.arange(0, block)
    i, o = tl.arange(0, inputs), tl.arange(0, outputs)
    # The weights are [g, O, 3, 3, I] of the layer; backwards its outputs come in.
    if flip:
        of_group = weight + g * inputs * 9 * outputs + i[:, None] * 9 * outputs + o[None, :]
    else:
        of_group = weight + g * outputs * 9 * inputs + o[None, :] * 9 * inputs + i[:, None]
    total = tl.zeros([block, outputs], tl.float32)
    of_source = x + g * inputs + i[None, :]
    for row in tl.static_range(3):
        # The loads of a row of taps run at the same time.
        tap = 3 * row
        left = _tap(
            of_source, p, tap, pixels, groups * inputs, height, wide, source_height, source_wide,
            stride, flip,
        )  # fmt: skip
        middle = _tap(
            of_source, p, tap + 1, pixels, groups * inputs, height, wide, source_height, source_wide,
            stride, flip,
        )  # fmt: skip
        right = _tap(
            of_source, p, tap + 2, pixels, groups * inputs, height, wide, source_height, source_wide,
            stride, flip,
        )  # fmt: skip
        first = (8 - tap) * outputs if flip else tap * inputs
        further = -outputs if flip else inputs
        w_left = tl.load(of_group + first)
        w_middle = tl.load(of_group + first + further)
        w_right = tl.load(of_group + first + 2 * further)
        total = tl.dot(left, w_left, total, input_precision="ieee")
        total = tl.dot(middle, w_middle, total, input_precision="ieee")
        total = tl.dot(right, w_right, total, input_precision="ieee")
    out = y + p[:, None] * (groups * outputs) + g * outputs + o[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(p < pixels)[:, None])


@triton.jit
def _weight_gradient(
    x, upstream, parts, pixels, groups: tl.constexpr, inputs: tl.constexpr, outputs: tl.constexpr,
    height: tl.constexpr, wide: tl.constexpr, source_height: tl.constexpr, source_wide: tl.constexpr,
    stride: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A row of three taps of one group's weights, over a part of the pixels."""
    g = tl.program_id(0)
    tap = 3 * tl.program_id(2)
    i, o = tl.arange(0, inputs), tl.arange(0, outputs)
    of_group = x + g * inputs + i[None, :]
    left = tl.zeros([outputs, inputs], tl.float32)
    middle = tl.zeros([outputs, inputs], tl.float32)
    right = tl.zeros([outputs, inputs], tl.float32)
    for start in range(tl.program_id(1) * block, pixels, tl.num_programs(1) * block):
        p = start + tl.arange(0, block)
        at = p[:, None] * (groups * outputs) + g * outputs + o[None, :]
        gradient = tl.trans(tl.load(upstream + at, mask=(p < pixels)[:, None], other=0.0))
        first = _tap(
            of_group, p, tap, pixels, groups * inputs, height, wide, source_height, source_wide,
            stride, False,
        )  # fmt: skip
        second = _tap(
            of_group, p, tap + 1, pixels, groups * inputs, height, wide, source_height, source_wide,
            stride, False,
        )  # fmt: skip
        third = _tap(
            of_group, p, tap + 2, pixels, groups * inputs, height, wide, source_height, source_wide,
            stride, False,
        )  # fmt: skip
        left = tl.dot(gradient, first, left, input_precision="ieee")
        middle = tl.dot(gradient, second, middle, input_precision="ieee")
        right = tl.dot(gradient, third, right, input_precision="ieee")
    # [programs, g, O, 3, 3, I]
    out = parts + (tl.program_id(1) * groups + g) * outputs * 9 * inputs + tap * inputs
    out += o[:, None] * 9 * inputs + i[None, :]
    tl.store(out, left)
    tl.store(out + inputs, middle)
    tl.store(out + 2 * inputs, right)


class _GroupedConvolution(torch.autograd.Function):
    """A grouped 3x3 convolution with padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        size = [-(-side // stride) for side in x.shape[2:]]
        y: Tensor = fastest(
            ("forward", stride, x.dtype, *x.shape, *weight.shape),
            lambda: _convolved(x, weight, size, stride, flip=False),
            lambda: torch.conv2d(x, as_of_pytorch(weight), None, stride, 1, 1, len(weight)),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        stride, upstream = ctx.stride, upstream.contiguous(memory_format=torch.channels_last)
        key = stride, x.dtype, *x.shape, *weight.shape

        def by_pytorch(*wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
            sizes: Any = [stride] * 2, [1, 1], [1, 1], False, [0, 0], len(weight), [*wanted, False]
            kernel = as_of_pytorch(weight)
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
                upstream, x, kernel, None, *sizes
            )
            return result

        of_input: Tensor = fastest(
            ("input", *key),
            lambda: _convolved(upstream, weight, list(x.shape[2:]), stride, flip=True),
            lambda: by_pytorch(True, False)[0],
        )
        of_weight: Tensor = fastest(
            ("weight", *key),
            lambda: _gradient_of_weight(x, upstream, weight, stride),
            lambda: by_pytorch(False, True)[1].permute(0, 2, 3, 1).reshape(weight.shape),
        )
        return of_input, of_weight, None


def as_of_pytorch(weight: Tensor) -> Tensor:
    """Weights ``[g, O, 3, 3, I]`` as ``[g * O, I, 3, 3]``, in channels-last memory."""
    return weight.flatten(0, 1).permute(0, 3, 1, 2)


#: The fastest candidate, by kind of computation.
FASTEST: dict[Any, int] = {}


def fastest(key: Any, *candidates: Callable[[], Tensor]) -> Tensor:
    """Run the fastest candidate: on a GPU measured at the first call, else the first."""
    if key not in FASTEST and torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
        times = [_milliseconds(candidate) for candidate in candidates]
        FASTEST[key] = times.index(min(times))
    return candidates[FASTEST.get(key, 0)]()


def _milliseconds(candidate: Callable[[], Tensor]) -> float:
    """Time of ten calls on the device, all queued before they run: launching them may take longer."""
    try:
        candidate()
    except Exception:  # any kind: a compiler or a library may run out of memory
        return math.inf
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(3_000_000)
    begin.record()
    for _ in range(10):
        candidate()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed


def _gradient_of_weight(x: Tensor, upstream: Tensor, weight: Tensor, stride: int) -> Tensor:
    groups, outputs, _, _, inputs = weight.shape
    n, _, height, wide = upstream.shape
    pixels = n * height * wide
    at_once = RESIDENT.get(inputs * outputs, PROGRAMS)
    programs = min(max(1, at_once // (3 * groups)), -(-pixels // PIXELS_AT_ONCE))
    parts = torch.empty(programs, *weight.shape, dtype=torch.float32, device=x.device)
    _weight_gradient[(groups, programs, 3)](
        x, upstream, parts, pixels, groups=groups, inputs=inputs, outputs=outputs, height=height,
        wide=wide, source_height=x.shape[2], source_wide=x.shape[3], stride=stride,
        block=PIXELS_AT_ONCE, num_warps=8 if inputs * outputs > 2048 else 4,
    )  # fmt: skip
    return parts.sum(0).to(weight.dtype)


def _convolved(x: Tensor, weight: Tensor, size: list[int], stride: int, flip: bool) -> Tensor:
    groups, outputs, _, _, inputs = weight.shape
    if flip:
        outputs, inputs = inputs, outputs
    shape = (x.shape[0], groups * outputs, *size)
    pixels = x.shape[0] * size[0] * size[1]
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    block, num_warps = PIXELS.get(max(inputs, outputs), (64, 4))
    _convolve[(groups, -(-pixels // block))](
        x, weight, y, pixels, groups=groups, inputs=inputs, outputs=outputs, height=size[0], wide=size[1],
        source_height=x.shape[2], source_wide=x.shape[3], stride=stride, flip=flip, block=block,
        num_warps=num_warps,
    )  # fmt: skip
    return y


def grouped_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A grouped 3x3 convolution with padding 1.

    Args:
        x: ``[N, g * I, H, W]``, in channels-last memory.
        weight: ``[g, O, 3, 3, I]``, of the same dtype; I and O are powers of two from 16.
        stride: of the pixels.

    Returns:
        ``[N, g * O, H / stride, W / stride]``, in channels-last memory.
    """
    result: Tensor = _GroupedConvolution.apply(x, weight, stride)
    return result


@triton.jit
def _spread(x, y, run_of, pixels, runs: tl.constexpr, branches: tl.constexpr, width: tl.constexpr,
            rows: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Give every branch the channels of its run."""
    c = tl.arange(0, block)
    here = c < branches * width
    source = tl.load(run_of + c // width, mask=here, other=0) * width + c % width
    for start in range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows):
        p = start + tl.arange(0, rows)
        mask = (p < pixels)[:, None] & here[None, :]
        value = tl.load(x + p[:, None] * (runs * width) + source[None, :], mask=mask, other=0.0)
        tl.store(y + p[:, None] * (branches * width) + c[None, :], value, mask=mask)


@triton.jit
def _collect(gradient, out, first_of, pixels, runs: tl.constexpr, branches: tl.constexpr, width: tl.constexpr,
             most: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Sum over the branches of every run, which are side by side."""
    c = tl.arange(0, block)
    here = c < runs * width
    first = tl.load(first_of + c // width, mask=here, other=0)
    number = tl.load(first_of + c // width + 1, mask=here, other=0) - first
    source = first * width + c % width
    for start in range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows):
        p = start + tl.arange(0, rows)
        inside = (p < pixels)[:, None]
        total = tl.zeros([rows, block], tl.float32)
        for k in tl.static_range(most):
            at = gradient + p[:, None] * (branches * width) + (source + k * width)[None, :]
            total += tl.load(at, mask=inside & (here & (k < number))[None, :], other=0.0).to(tl.float32)
        at = out + p[:, None] * (runs * width) + c[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=inside & here[None, :])


class _Spread(torch.autograd.Function):
    """Copy the maps of runs to their branches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run_of: Tensor, first_of: Tensor, most: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        runs, branches = len(first_of) - 1, len(run_of)
        ctx.save_for_backward(first_of)
        ctx.most, ctx.shape = most, x.shape
        width = x.shape[1] // runs
        shape = (x.shape[0], branches * width, *x.shape[2:])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        tile = _spread_tile(x, branches * width)
        _spread[(PROGRAMS,)](x, y, run_of, runs=runs, branches=branches, width=width, **tile)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (first_of,) = ctx.saved_tensors
        upstream = upstream.contiguous(memory_format=torch.channels_last)
        runs = len(first_of) - 1
        width = ctx.shape[1] // runs
        out = torch.empty(
            ctx.shape, dtype=upstream.dtype, device=upstream.device, memory_format=torch.channels_last
        )
        _collect[(PROGRAMS,)](
            upstream, out, first_of, runs=runs, branches=upstream.shape[1] // width, width=width,
            most=ctx.most, **_spread_tile(upstream, runs * width),
        )  # fmt: skip
        return out, None, None, None


def _spread_tile(x: Tensor, channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {
        "pixels": x.numel() // x.shape[1],
        "rows": max(1, TILE // block),
        "block": block,
        "num_warps": 8,
    }


def spread(x: Tensor, run_of: Tensor, first_of: Tensor, most: int) -> Tensor:
    """Copy the maps of runs to their branches.

    Args:
        x: ``[N, R * c, H, W]``, in channels-last memory.
        run_of: the run of every branch, int32 ``[B]``, rising.
        first_of: the first branch of every run, and in the end their number, int32 ``[R + 1]``.
        most: most branches of a run.

    Returns:
        ``[N, B * c, H, W]``, in channels-last memory.
    """
    result: Tensor = _Spread.apply(x, run_of, first_of, most)
    return result
