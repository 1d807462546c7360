"""The Triton kernels that :mod:`lgla_losses.kernels.triton` launches.

Arithmetic is in float64 for float64 logits, else in float32. The number of classes, the value of ignored
targets, the scale, label smoothing and gamma are compiled in: a new value needs a new compilation. So does an
argument that is None: its part is left out.

Symbols: ``N`` samples, ``K`` experts, ``G`` groups, ``C`` classes, ``d`` features, ``B`` blocks of samples.
A kernel may get only some of the experts (``num_experts``); tensors with one value per expert have the
strides of all (``all_experts``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# --- Angles and weights -------------------------------------------------------------------------------------


@triton.jit
def _arccos(x):
    """Compute the arc cosine in the precision of ``x``; NaN stays NaN.

    It uses the rational approximation of arcsin of FreeBSD's msun (fdlibm).
    """
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
def _angles_of_cosines(cosine):
    """Compute the angles of cosines; clamp cosines that rounding puts beyond 1 or -1."""
    # NaN fails these comparisons and so stays NaN.
    return _arccos(tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine)))


@triton.jit
def _angles(address, read, scale: tl.constexpr):
    """Load cosine logits and compute their angles; without ``scale`` they are angles already."""
    angles = tl.load(address, mask=read, other=0.0)
    if angles.dtype != tl.float64:
        angles = angles.to(tl.float32)
    if scale is not None:
        angles = _angles_of_cosines(angles / scale)
    return angles


@triton.jit
def _feature_angles(
    features, weight, n, k, y, read, num_features,
    stride_n, stride_k, stride_d, weight_k, weight_c, weight_d, depth: tl.constexpr,
):  # fmt: skip
    """Compute the angles between features of samples n ``[n, 1]`` and weights of their classes y.

    Experts are k ``[1, k]``. A vector whose length rounds to 0 is orthogonal to all others.
    """
    wide: tl.constexpr = features.dtype.element_ty == tl.float64 or weight.dtype.element_ty == tl.float64
    dtype: tl.constexpr = tl.float64 if wide else tl.float32
    first = features + n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k
    second = weight + k.to(tl.int64) * weight_k + y * weight_c
    product = tl.zeros(read.shape, dtype)
    own = tl.zeros(read.shape, dtype)
    others = tl.zeros(read.shape, dtype)
    for start in range(0, num_features, depth):
        i = (start + tl.arange(0, depth).to(tl.int64))[None, None, :]
        mask = read[:, :, None] & (i < num_features)
        x = tl.load(first[:, :, None] + i * stride_d, mask=mask, other=0.0).to(dtype)
        w = tl.load(second[:, :, None] + i * weight_d, mask=mask, other=0.0).to(dtype)
        product += tl.sum(x * w, axis=2)
        own += tl.sum(x * x, axis=2)
        others += tl.sum(w * w, axis=2)
    # One length after the other: their product may overflow or underflow.
    cosine = product * _inverse_root(own) * _inverse_root(others)
    return _angles_of_cosines(cosine)


@triton.jit
def _inverse_root(square):
    return tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0.0, 1.0, square)))


@triton.jit
def _group_of(group_index, y, valid, num_classes: tl.constexpr):
    """Look up the group of every target; give -1 for ignored ones."""
    return tl.load(group_index + y, mask=valid & (y >= 0) & (y < num_classes), other=-1)


@triton.jit
def _sample_weight(sample_weight, n, stride, here):
    """Load the weights of the samples n."""
    return tl.load(sample_weight + n.to(tl.int64) * stride, mask=here, other=0.0).to(tl.float64)


@triton.jit
def _statistics(
    source, weight, target, sample_weight, group_index, angles, parts,
    num_samples, num_features, stride_n, stride_k, stride_c, weight_k, weight_c, weight_d,
    target_n, sample_n,
    num_groups: tl.constexpr, num_experts: tl.constexpr, all_experts: tl.constexpr,
    num_classes: tl.constexpr, ignore_index: tl.constexpr, scale: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Compute the angles ``[N, K]`` of a block of samples, and their sums by group ``[B, G, K + 1]``.

    The last column of the sums counts the samples.
    """
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, block)
    y = tl.load(target + n.to(tl.int64) * target_n, mask=n < num_samples, other=ignore_index)
    valid = y != ignore_index
    group = _group_of(group_index, y, valid, num_classes)

    read = (group >= 0)[:, None] & (k < num_experts)[None, :]
    if weight is None:
        row = n.to(tl.int64) * stride_n + y * stride_c
        values = _angles(source + row[:, None] + (k.to(tl.int64) * stride_k)[None, :], read, scale)
    else:
        values = _feature_angles(
            source, weight, n[:, None], k[None, :], y[:, None], read, num_features,
            stride_n, stride_k, stride_c, weight_k, weight_c, weight_d, depth,
        )  # fmt: skip
    if angles is not None:
        out = angles + n.to(tl.int64)[:, None] * all_experts + k[None, :]
        tl.store(out, values, mask=(n < num_samples)[:, None] & (k < num_experts)[None, :])

    values = tl.where((k < num_experts)[None, :], values, 1.0).to(tl.float64)
    if sample_weight is not None:
        values *= _sample_weight(sample_weight, n, sample_n, n < num_samples)[:, None]
    for g in range(num_groups):
        sums = tl.sum(tl.where((group == g)[:, None], values, 0.0), axis=0)
        own = parts + (tl.program_id(0) * num_groups + g) * (all_experts + 1) + k
        tl.store(own, sums, mask=k <= num_experts)


@triton.jit
def _sums_of_parts(
    parts, num_blocks, g, k, last,
    num_groups: tl.constexpr, num_experts: tl.constexpr, all_experts: tl.constexpr,
):  # fmt: skip
    """Sum a group's angles for every expert; the column after the experts counts the samples."""
    # With few experts take many blocks at a time, because each turn waits for memory.
    together: tl.constexpr = 256 // k.shape[0] if k.shape[0] < 16 else 16
    sums = tl.zeros(k.shape, tl.float64)
    for start in range(0, num_blocks, together):
        b = start + tl.arange(0, together)
        column = tl.where(k < num_experts, k, last)
        address = parts + (b * num_groups + g)[:, None] * (all_experts + 1) + column[None, :]
        mask = (b < num_blocks)[:, None] & (k <= num_experts)[None, :]
        sums += tl.sum(tl.load(address, mask=mask, other=0.0), axis=0)
    return sums


@triton.jit
def _mean_angles(sums, k, num_experts: tl.constexpr):
    """Compute a group's mean angle for every expert, and its number of samples."""
    count = tl.sum(tl.where(k == num_experts, sums, 0.0), axis=0)
    return sums / tl.where(count == 0.0, 1.0, count), count


@triton.jit
def _weights(
    source, target, sample_weight, group_index, parts, weights, divisor,
    num_samples, num_blocks, stride_n, stride_k, stride_c, target_n, sample_n,
    num_groups: tl.constexpr, num_experts: tl.constexpr, num_classes: tl.constexpr,
    ignore_index: tl.constexpr, num_ranks: tl.constexpr, scale: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute the weights of a block of samples from their angles.

    Without ``parts`` the block has all samples, and the program sums their angles itself.
    """
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, block)
    y = tl.load(target + n.to(tl.int64) * target_n, mask=n < num_samples, other=ignore_index)
    valid = y != ignore_index
    group = _group_of(group_index, y, valid, num_classes)

    read = (group >= 0)[:, None] & (k < num_experts)[None, :]
    row = n.to(tl.int64) * stride_n + y * stride_c
    angles = _angles(source + row[:, None] + (k.to(tl.int64) * stride_k)[None, :], read, scale)
    factor = tl.full([rows], 1.0, tl.float64)
    if sample_weight is not None:
        factor = _sample_weight(sample_weight, n, sample_n, n < num_samples)
    reference = tl.zeros([rows, block], tl.float64)
    samples = tl.sum(tl.zeros([block], tl.float64), axis=0)
    counted = tl.where((k < num_experts)[None, :], angles, 1.0).to(tl.float64) * factor[:, None]
    for g in range(num_groups):
        if parts is None:
            sums = tl.sum(tl.where((group == g)[:, None], counted, 0.0), axis=0)
        else:
            sums = _sums_of_parts(parts, num_blocks, g, k, num_experts, num_groups, num_experts, num_experts)
        mean, count = _mean_angles(sums, k, num_experts)
        samples += count
        reference = tl.where((group == g)[:, None], mean[None, :], reference)

    excess = angles.to(tl.float64) - reference
    values = tl.where(valid[:, None], 1.0 + tl.where(excess < 0.0, 0.0, excess), 0.0) * factor[:, None]
    out = weights + n.to(tl.int64)[:, None] * num_experts + k[None, :]
    tl.store(out, values, mask=(n < num_samples)[:, None] & (k < num_experts)[None, :])
    if tl.program_id(0) == 0:
        tl.store(divisor, samples / num_ranks)


# Probabilities: a sample belongs to every class by its probability. A program takes one sample after the
# other, and only its blocks of classes with a probability.


@triton.jit
def _soft_statistics(
    source, target, sample_weight, group_index, parts,
    num_samples, stride_n, stride_k, stride_c, target_n, target_c, sample_n,
    num_groups: tl.constexpr, num_experts: tl.constexpr, all_experts: tl.constexpr,
    num_classes: tl.constexpr, scale: tl.constexpr,
    groups: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sum the angles by group ``[B, G, K + 1]``, each times its probability.

    The last column sums the probabilities alone.
    """
    k = tl.arange(0, block)
    g = tl.arange(0, groups)
    sums = tl.zeros([groups, block], tl.float64)
    for n in range(tl.program_id(0).to(tl.int64), num_samples, tl.num_programs(0)):
        own = source + n * stride_n + (k.to(tl.int64) * stride_k)[None, :]
        counts = tl.full((), 1.0, tl.float64)
        if sample_weight is not None:
            counts = tl.load(sample_weight + n * sample_n).to(tl.float64)
        for first in range(0, num_classes, rows):
            j = first + tl.arange(0, rows).to(tl.int64)
            share = tl.load(target + n * target_n + j * target_c, mask=j < num_classes, other=0.0)
            used = share != 0.0
            share = share.to(tl.float64) * counts
            if tl.max(used.to(tl.int32), axis=0) > 0:
                group = _group_of(group_index, j, used, num_classes)
                read = used[:, None] & (k < num_experts)[None, :]
                values = _angles(own + (j * stride_c)[:, None], read, scale)
                values = share[:, None] * tl.where((k < num_experts)[None, :], values, 1.0).to(tl.float64)
                for one in range(num_groups):
                    more = tl.sum(tl.where((group == one)[:, None], values, 0.0), axis=0)
                    sums += tl.where((g == one)[:, None], more[None, :], 0.0)

    out = parts + (tl.program_id(0) * num_groups + g)[:, None] * (all_experts + 1) + k[None, :]
    tl.store(out, sums, mask=(g < num_groups)[:, None] & (k <= num_experts)[None, :])


@triton.jit
def _soft_weights(
    source, target, sample_weight, group_index, parts, weights, divisor,
    num_samples, num_blocks, last, stride_n, stride_k, stride_c, target_n, target_c, sample_n,
    num_groups: tl.constexpr, num_experts: tl.constexpr, all_experts: tl.constexpr,
    num_classes: tl.constexpr, num_ranks: tl.constexpr, scale: tl.constexpr,
    groups: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute the weights of some samples: sum the weights of their classes, each times its probability."""
    k = tl.arange(0, block)
    g = tl.arange(0, groups)
    references = tl.zeros([groups, block], tl.float64)
    samples = tl.sum(tl.zeros([block], tl.float64), axis=0)
    for one in range(num_groups):
        sums = _sums_of_parts(parts, num_blocks, one, k, last, num_groups, num_experts, all_experts)
        mean, count = _mean_angles(sums, k, num_experts)
        samples += count
        references = tl.where((g == one)[:, None], mean[None, :], references)

    for n in range(tl.program_id(0).to(tl.int64), num_samples, tl.num_programs(0)):
        total = tl.zeros([block], tl.float64)
        own = source + n * stride_n + (k.to(tl.int64) * stride_k)[None, :]
        for first in range(0, num_classes, rows):
            j = first + tl.arange(0, rows).to(tl.int64)
            share = tl.load(target + n * target_n + j * target_c, mask=j < num_classes, other=0.0)
            used = share != 0.0
            if tl.max(used.to(tl.int32), axis=0) > 0:
                group = _group_of(group_index, j, used, num_classes)
                read = used[:, None] & (k < num_experts)[None, :]
                excess = _angles(own + (j * stride_c)[:, None], read, scale).to(tl.float64)
                for one in range(num_groups):
                    mean = tl.sum(tl.where((g == one)[:, None], references, 0.0), axis=0)
                    excess -= tl.where((group == one)[:, None], mean[None, :], 0.0)
                values = 1.0 + tl.where(excess < 0.0, 0.0, excess)
                total += tl.sum(share.to(tl.float64)[:, None] * values, axis=0)
        if sample_weight is not None:
            total *= tl.load(sample_weight + n * sample_n).to(tl.float64)
        tl.store(weights + n * all_experts + k, total, mask=k < num_experts)
    if tl.program_id(0) == 0:
        tl.store(divisor, samples / num_ranks)


@triton.jit
def _count(
    target, sample_weight, class_weight, sums,
    number, target_n, target_c, sample_n,
    num_classes: tl.constexpr, columns: tl.constexpr, ignore_index: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Count the samples of targets ``[N, columns]``, times their weights; each program counts a part."""
    total = tl.zeros([block], tl.float64)
    for start in range(tl.program_id(0).to(tl.int64) * block, number, tl.num_programs(0) * block):
        i = start + tl.arange(0, block)
        n = i // columns
        j = i % columns
        if target.dtype.element_ty == tl.int64:
            j = tl.load(target + n * target_n, mask=i < number, other=ignore_index)
            share = (j != ignore_index).to(tl.float64)
        else:
            share = tl.load(target + n * target_n + j * target_c, mask=i < number, other=0.0).to(tl.float64)
        if sample_weight is not None:
            share *= _sample_weight(sample_weight, n, sample_n, i < number)
        if class_weight is not None:
            mask = (i < number) & (share != 0.0) & (j >= 0) & (j < num_classes)
            share *= tl.load(class_weight + j, mask=mask, other=0.0)
        total += share
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


# --- Losses and gradients -----------------------------------------------------------------------------------


@triton.jit
def _exp(x, flush: tl.constexpr):
    """Compute the exponential.

    With ``flush``, on NVIDIA, it takes half the instructions and gives 0 below the normal numbers.
    """
    if flush:
        # x is a difference to a maximum: the product of a logit itself may overflow.
        x *= 1.4426950408889634
        powers = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        powers = tl.exp(x)
    return powers


@triton.jit
def _class_constant(values, y, num_classes: tl.constexpr, dtype: tl.constexpr):
    """Load a constant ``[C]`` for the classes y; give 0 where y is not a class."""
    return tl.load(values + y, mask=(y >= 0) & (y < num_classes), other=0.0).to(dtype)


@triton.jit
def _target_logits(
    logits, table, margin, row, k, y, known,
    num_classes: tl.constexpr, stride_c, table_k: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Compute the adjusted logits of the targets; give NaN where a target is not a class."""
    known = known & (y >= 0) & (y < num_classes)
    own = tl.load(logits + row + y * stride_c, mask=known, other=float("nan")).to(dtype)
    if table is not None:
        own += tl.load(table + k * table_k + y, mask=known, other=0.0).to(dtype)
    if margin is not None:
        own -= _class_constant(margin, y, num_classes, dtype)
    return own


@triton.jit
def _adjustment(
    table, k, j, num_classes: tl.constexpr, table_k: tl.constexpr, dtype: tl.constexpr, often: tl.constexpr
):
    """Load the adjustments ``[1, block]`` of the classes j for expert k.

    Beyond the last class they are -inf, so that padding adds nothing to a sum. If they are read ``often``,
    they stay in the caches.
    """
    j = j[None, :]
    if table is None:
        values = tl.where(j < num_classes, 0.0, -float("inf")).to(dtype)
    else:
        policy: tl.constexpr = "evict_last" if often else ""
        address = table + k * table_k + j
        values = tl.load(address, mask=j < num_classes, other=-float("inf"), eviction_policy=policy).to(dtype)
    return values


@triton.jit
def _logits(
    logits, row, j, here, num_classes: tl.constexpr, stride_c, again: tl.constexpr, last: tl.constexpr
):
    """Load a tile of logits; give 0 beyond the last class.

    What is read ``again`` bypasses the L1 cache; what is read for the ``last`` time leaves the L2 cache
    first.
    """
    mask = here[:, None] & (j < num_classes)[None, :]
    address = logits + row[:, None] + (j.to(tl.int64) * stride_c)[None, :]
    modifier: tl.constexpr = ".cg" if again else ""
    policy: tl.constexpr = "evict_first" if last else ""
    return tl.load(address, mask=mask, other=0.0, cache_modifier=modifier, eviction_policy=policy)


@triton.jit
def _is_target(j, y, num_classes: tl.constexpr, dtype: tl.constexpr):
    """Say which classes j are the targets y: ``[rows, block]``."""
    # In 32 bits (except for float64): comparing every class with a target in 64 bits takes registers.
    if dtype != tl.float64:
        y = tl.where((y >= 0) & (y < num_classes), y, -1).to(tl.int32)
    return j[None, :] == y[:, None]


@triton.jit
def _adjusted(values, adjustment, margin, j, y, num_classes: tl.constexpr):
    """Compute a tile of adjusted logits; beyond the last class they are -inf, as the adjustments are."""
    x = values.to(adjustment.dtype) + adjustment
    if margin is not None:
        less = _class_constant(margin, y, num_classes, x.dtype)
        x = tl.where(_is_target(j, y, num_classes, x.dtype), x - less[:, None], x)
    return x


@triton.jit
def _store_gradient(
    gradient, row, j, here, exponentials, total, y, valid, factor,
    num_classes: tl.constexpr, stride_c, smoothing: tl.constexpr, last: tl.constexpr,
):  # fmt: skip
    """Store ``factor * (softmax - e / C - (1 - e) [j = y])``, rounded once; zeros for ignored rows.

    ``e`` is the label smoothing. With ``last`` the gradient leaves the L2 cache early, which then has room
    for logits.
    """
    factor = tl.where(valid, factor, 0.0)
    scale = tl.where(valid, factor / total, 0.0)
    others = -factor * (smoothing / num_classes)
    own = _is_target(j, y, num_classes, exponentials.dtype)
    shift = tl.where(own, (others - factor * (1.0 - smoothing))[:, None], others[:, None])
    # NaN of an ignored row becomes 1, times 0; for another row the total is NaN too.
    values = tl.where(exponentials <= 1.0, exponentials, 1.0) * scale[:, None] + shift
    mask = here[:, None] & (j < num_classes)[None, :]
    address = gradient + row[:, None] + (j.to(tl.int64) * stride_c)[None, :]
    policy: tl.constexpr = "evict_first" if last else ""
    tl.store(address, values, mask=mask, eviction_policy=policy)


@triton.jit
def _factor(weights, n, k, here, stride_n, stride_k, dtype: tl.constexpr):
    """Load the weights of samples n and expert k; give ones if there are none."""
    if weights is None:
        values = tl.full(n.shape, 1.0, dtype)
    else:
        values = tl.load(weights + n * stride_n + k * stride_k, mask=here, other=0.0).to(dtype)
    return values


@triton.jit
def _divisor(divisor, dtype: tl.constexpr):
    """Load the divisor; give 1 if it is 0 or if there is none."""
    if divisor is None:
        value = tl.full((), 1.0, dtype)
    else:
        value = tl.load(divisor).to(dtype)
        value = tl.where(value == 0.0, 1.0, value)
    return value


@triton.jit
def _focal(entropy, gamma: tl.constexpr):
    """Compute the focal loss ``(1 - p) ** gamma * ce`` of ``ce = -log p``, and its derivative by ``ce``."""
    if gamma == 0.0:
        loss = entropy
        slope = tl.full(entropy.shape, 1.0, entropy.dtype)
    else:
        p = tl.exp(-entropy)
        # 1 - p loses its digits near 0; there the series x (1 - x/2 (1 - x/3 (...))) is used.
        series = tl.full(entropy.shape, 1.0, entropy.dtype)
        terms: tl.constexpr = 12 if entropy.dtype == tl.float64 else 7
        for i in tl.static_range(terms, 1, -1):
            series = 1.0 - entropy * (1.0 / i) * series
        missing = tl.where(entropy < 0.25, entropy * series, 1.0 - p)
        # Its power has no derivative at 0 for gamma < 1, but there the product has that of a constant.
        tiny: tl.constexpr = (
            2.2250738585072014e-308 if entropy.dtype == tl.float64 else 1.1754943508222875e-38
        )
        power = tl.exp(gamma * tl.log(tl.maximum(missing, tiny)))
        loss = power * entropy
        # An infinite cross entropy times p, which is 0, would be NaN.
        varies = (missing > tiny) & (p > 0.0)
        slope = power + tl.where(varies, gamma * power / tl.where(varies, missing, 1.0) * p * entropy, 0.0)
    return loss, slope


@triton.jit
def _store_state(state, n, k, here, peak, sums, all_experts: tl.constexpr):
    """Store the values of a row that the backward pass reads; for an ignored row they may be anything."""
    out = state + (n * all_experts + k) * 2
    tl.store(out, peak, mask=here)
    tl.store(out + 1, sums, mask=here)


@triton.jit
def _add_losses(losses, total, n, k, here, loss, all_experts: tl.constexpr, reduce: tl.constexpr):
    """Store the losses of rows; with ``reduce`` add them to ``total`` instead. Return ``total``."""
    if reduce:
        total += loss
    else:
        tl.store(losses + n * all_experts + k, loss, mask=here)
    return total


@triton.jit
def _weighed(class_weight, y, valid, loss, factor, num_classes: tl.constexpr, gamma: tl.constexpr):
    """Weight the cross entropies of rows; also give the factor of ``softmax - one-hot`` in their gradient.

    Label smoothing stays in the kernels: if its mean were passed through here, registers would spill.
    """
    if class_weight is not None:
        factor *= _class_constant(class_weight, y, num_classes, factor.dtype)
    slope = factor
    if gamma != 0.0:
        loss, derivative = _focal(loss, gamma)
        slope = factor * derivative
    return tl.where(valid, factor * loss, 0.0), slope


@triton.jit
def _forward(
    logits, target, table, weights, divisor, class_weight, margin, losses, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c, target_n, weight_n, weight_k,
    num_experts: tl.constexpr, all_experts: tl.constexpr, num_classes: tl.constexpr,
    table_k: tl.constexpr, ignore_index: tl.constexpr, smoothing: tl.constexpr, gamma: tl.constexpr,
    reduce: tl.constexpr, align: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, flush: tl.constexpr,
):  # fmt: skip
    """Compute losses (or their sum), state and gradient in one pass, for rows that fit a tile.

    Each program has one expert.
    """
    dtype: tl.constexpr = state.dtype.element_ty
    k = (tl.program_id(0) % num_experts).to(tl.int64)
    begin = tl.program_id(0) // num_experts * rows
    step = tl.num_programs(0) // num_experts * rows
    j = tl.arange(0, block)
    adjustment = _adjustment(table, k, j, num_classes, table_k, dtype, False)
    shares = _divisor(divisor, dtype)
    total = tl.zeros([rows], tl.float64)
    for start in range(begin, num_samples, step):
        n = start + tl.arange(0, rows).to(tl.int64)
        here = n < num_samples
        y = tl.load(target + n * target_n, mask=here, other=ignore_index)
        valid = y != ignore_index
        row = (n * stride_n + k * stride_k) * align
        # Before the gradient, which may overwrite it.
        own = _target_logits(logits, table, margin, row, k, y, valid, num_classes, stride_c, table_k, dtype)
        factor = _factor(weights, n, k, here, weight_n, weight_k, dtype)

        values = _logits(logits, row, j, here, num_classes, stride_c, False, False)
        x = _adjusted(values, adjustment, margin, j, y, num_classes)
        peak = tl.max(x, axis=1)
        x -= peak[:, None]
        exponentials = _exp(x, flush)
        sums = tl.sum(exponentials, axis=1)
        loss = tl.log(sums) - (own - peak)
        if smoothing != 0.0:
            mean = tl.sum(tl.where((j < num_classes)[None, :], x, 0.0), axis=1) / num_classes
            loss = (1.0 - smoothing) * loss + smoothing * (tl.log(sums) - mean)
        loss, factor = _weighed(class_weight, y, valid, loss, factor, num_classes, gamma)

        _store_state(state, n, k, here, peak, sums, all_experts)
        total = _add_losses(losses, total, n, k, here, loss, all_experts, reduce)
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
def _forward_lean(
    logits, target, table, weights, divisor, class_weight, margin, losses, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c, target_n, weight_n, weight_k,
    num_experts: tl.constexpr, all_experts: tl.constexpr, num_classes: tl.constexpr,
    table_k: tl.constexpr, ignore_index: tl.constexpr, smoothing: tl.constexpr, gamma: tl.constexpr,
    reduce: tl.constexpr, align: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    keep: tl.constexpr, flush: tl.constexpr,
):  # fmt: skip
    """Compute the same as :func:`_forward` with fewer instructions, for plain rows, one at a time.

    No class is compared with the target: the extra part of the target's class is stored separately, one turn
    later and after a barrier. Values of a target are read one turn ahead. Without ``keep`` the table is read
    for every row.
    """
    tl.static_assert(rows == 1)
    dtype: tl.constexpr = state.dtype.element_ty
    k = (tl.program_id(0) % num_experts).to(tl.int64)
    begin = tl.program_id(0) // num_experts
    step = tl.num_programs(0) // num_experts
    j = tl.arange(0, block)
    inside = j < num_classes
    offsets = j.to(tl.int64)
    if keep:
        adjustment = tl.ravel(_adjustment(table, k, j, num_classes, table_k, dtype, False))
    shares = _divisor(divisor, dtype)
    total = tl.zeros((), tl.float64)

    n = begin.to(tl.int64)
    row = (n * stride_n + k * stride_k) * align
    y = tl.load(target + n * target_n, mask=n < num_samples, other=ignore_index)
    factor = _factor(weights, n, k, n < num_samples, weight_n, weight_k, dtype)
    known = y != ignore_index
    own = _target_logits(logits, table, margin, row, k, y, known, num_classes, stride_c, table_k, dtype)
    late = n < 0
    late_place = n
    late_value = tl.zeros((), dtype)
    for start in range(begin, num_samples, step):
        n = start + tl.zeros((), tl.int64)  # in the interpreter it is a plain number
        row = (n * stride_n + k * stride_k) * align
        if not keep:
            adjustment = tl.ravel(_adjustment(table, k, j, num_classes, table_k, dtype, False))
        values = tl.load(logits + row + offsets * stride_c, mask=inside, other=0.0, cache_modifier=".cg")
        valid = y != ignore_index
        after = n + step
        more = after < num_samples
        next_y = tl.load(target + after * target_n, mask=more, other=ignore_index)
        next_factor = _factor(weights, after, k, more, weight_n, weight_k, dtype)

        x = values.to(dtype) + adjustment
        peak = tl.max(x, axis=0)
        if gradient is not None:
            tl.debug_barrier()
            tl.store(gradient + late_place, late_value, mask=late)
        row = (after * stride_n + k * stride_k) * align
        known = next_y != ignore_index
        next_own = _target_logits(
            logits, table, margin, row, k, next_y, known, num_classes, stride_c, table_k, dtype
        )
        x -= peak
        exponentials = _exp(x, flush)
        sums = tl.sum(exponentials, axis=0)
        loss = tl.log(sums) - (own - peak)
        if smoothing != 0.0:
            mean = tl.sum(tl.where(inside, x, 0.0), axis=0) / num_classes
            loss = (1.0 - smoothing) * loss + smoothing * (tl.log(sums) - mean)
        loss = tl.where(valid, factor * loss, 0.0)

        _store_state(state, n, k, True, peak, sums, all_experts)
        total = _add_losses(losses, total, n, k, True, loss, all_experts, reduce)
        if gradient is not None:
            row = (n * out_n + k * out_k) * align
            address = gradient + row + offsets * out_c
            factor *= 1.0 / shares  # as backward has it
            scale = factor / sums
            others = -factor * (smoothing / num_classes)
            if valid:
                tl.store(address, exponentials * scale + others, mask=inside)
            else:
                tl.store(address, tl.zeros([block], dtype), mask=inside)
            late = valid & (y >= 0) & (y < num_classes)
            late_place = row + y * out_c
            late_value = _exp(own - peak, flush) * scale + (others - factor * (1.0 - smoothing))
        y = next_y
        factor = next_factor
        own = next_own
    if gradient is not None:
        tl.debug_barrier()
        tl.store(gradient + late_place, late_value, mask=late)
    if reduce:
        tl.store(losses + tl.program_id(0), total)


@triton.jit
def _forward_streamed(
    logits, target, table, weights, divisor, class_weight, margin, losses, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c, target_n, weight_n, weight_k,
    num_experts: tl.constexpr, all_experts: tl.constexpr, num_classes: tl.constexpr,
    table_k: tl.constexpr, ignore_index: tl.constexpr, smoothing: tl.constexpr, gamma: tl.constexpr,
    reduce: tl.constexpr, align: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    lowest: tl.constexpr, flush: tl.constexpr,
):  # fmt: skip
    """Compute the same as :func:`_forward` for longer rows: sweep for the sums, and back for the gradient.

    Every lane keeps the maximum and the sum of its own classes, so the first sweep has no reduction and no
    barrier, and takes one exponential per logit. The second sweep goes from the last block, which the caches
    still hold, to the first, where the next row starts in the table. The table may stay in the L1 cache,
    which the logits bypass. Values that are not read again leave the L2 cache first.
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
        y = tl.load(target + n * target_n, mask=here, other=ignore_index)
        valid = y != ignore_index
        row = (n * stride_n + k * stride_k) * align
        # Before the gradient, which may overwrite it.
        own = _target_logits(logits, table, margin, row, k, y, valid, num_classes, stride_c, table_k, dtype)
        factor = _factor(weights, n, k, here, weight_n, weight_k, dtype)

        # Start from the lowest finite number, because -inf - -inf would be NaN.
        peaks = tl.full([rows, block], lowest, dtype)
        exponentials = tl.zeros([rows, block], dtype)
        # Take the mean of differences to a logit of the row: the mean of the logits would lose digits.
        origin = tl.where(own == -float("inf"), 0.0, own)
        distances = tl.zeros([rows, block], dtype)
        for i in tl.range(0, num_blocks, loop_unroll_factor=2):
            j = i * block + tl.arange(0, block)
            adjustment = _adjustment(table, k, j, num_classes, table_k, dtype, True)
            values = _logits(logits, row, j, here, num_classes, stride_c, True, False)
            x = _adjusted(values, adjustment, margin, j, y, num_classes)
            excess = x - peaks
            ratio = _exp(-tl.abs(excess), flush)
            higher = excess > 0.0
            exponentials = tl.where(higher, exponentials * ratio + 1.0, exponentials + ratio)
            peaks = tl.where(higher, x, peaks)
            if smoothing != 0.0:
                distances += tl.where((j < num_classes)[None, :], x - origin[:, None], 0.0)
        # A lane that met only -inf has no maximum.
        peaks = tl.where(exponentials == 0.0, -float("inf"), peaks)
        peak = tl.max(peaks, axis=1)
        safe = tl.where(peak == -float("inf"), 0.0, peak)
        sums = tl.sum(exponentials * tl.exp(peaks - safe[:, None]), axis=1)
        loss = tl.log(sums) - (own - peak)
        if smoothing != 0.0:
            mean = tl.sum(distances, axis=1) / num_classes + (origin - peak)
            loss = (1.0 - smoothing) * loss + smoothing * (tl.log(sums) - mean)
        loss, factor = _weighed(class_weight, y, valid, loss, factor, num_classes, gamma)

        _store_state(state, n, k, here, peak, sums, all_experts)
        total = _add_losses(losses, total, n, k, here, loss, all_experts, reduce)
        if gradient is not None:
            factor *= 1.0 / shares  # as backward has it
            out_row = (n * out_n + k * out_k) * align
            for i in range(num_pairs):
                j = (num_pairs - 1 - i) * 2 * block + tl.arange(0, 2 * block)
                adjustment = _adjustment(table, k, j, num_classes, table_k, dtype, True)
                values = _logits(logits, row, j, here, num_classes, stride_c, False, True)
                x = _adjusted(values, adjustment, margin, j, y, num_classes)
                _store_gradient(
                    gradient, out_row, j, here, _exp(x - peak[:, None], flush), sums, y, valid, factor,
                    num_classes, out_c, smoothing, True,
                )  # fmt: skip
    if reduce:
        tl.store(losses + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _backward(
    logits, target, table, weights, class_weight, margin, upstream, state, gradient,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c, target_n, weight_n, weight_k,
    stride_upstream,
    num_experts: tl.constexpr, all_experts: tl.constexpr, num_classes: tl.constexpr,
    table_k: tl.constexpr, ignore_index: tl.constexpr, smoothing: tl.constexpr, align: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of classes of one expert."""
    dtype: tl.constexpr = state.dtype.element_ty
    num_blocks: tl.constexpr = (num_classes + block - 1) // block
    first = tl.program_id(0) % num_blocks * block
    k = (tl.program_id(0) // num_blocks % num_experts).to(tl.int64)
    begin = tl.program_id(0) // (num_blocks * num_experts) * rows
    step = tl.num_programs(0) // (num_blocks * num_experts) * rows
    j = first + tl.arange(0, block)
    adjustment = _adjustment(table, k, j, num_classes, table_k, dtype, False)
    for start in range(begin, num_samples, step):
        n = start + tl.arange(0, rows).to(tl.int64)
        here = n < num_samples
        y = tl.load(target + n * target_n, mask=here, other=ignore_index)
        valid = y != ignore_index
        factor = _factor(weights, n, k, here, weight_n, weight_k, dtype)
        if class_weight is not None:
            factor *= _class_constant(class_weight, y, num_classes, dtype)
        factor *= tl.load(upstream + n * stride_upstream, mask=here, other=0.0).to(dtype)

        saved = state + (n * all_experts + k) * 2
        peak = tl.load(saved, mask=here, other=0.0)
        sums = tl.load(saved + 1, mask=here, other=1.0)
        row = (n * stride_n + k * stride_k) * align
        values = _logits(logits, row, j, here, num_classes, stride_c, False, False)
        x = _adjusted(values, adjustment, margin, j, y, num_classes)
        row = (n * out_n + k * out_k) * align
        _store_gradient(
            gradient, row, j, here, tl.exp(x - peak[:, None]), sums, y, valid, factor,
            num_classes, out_c, smoothing, False,
        )  # fmt: skip


# Rows in which every class may have a share: with probabilities, and with class indices if label smoothing is
# combined with class weights, margins or gamma.


@triton.jit
def _probabilities(target, n, j, y, here, num_classes: tl.constexpr, target_n, target_c, dtype: tl.constexpr):
    """Load a tile of the targets' probabilities; class indices become ones and zeros."""
    if target.dtype.element_ty == tl.int64:
        q = _is_target(j, y, num_classes, dtype).to(dtype)
    else:
        mask = here[:, None] & (j < num_classes)[None, :]
        address = target + (n * target_n)[:, None] + (j.to(tl.int64) * target_c)[None, :]
        q = tl.load(address, mask=mask, other=0.0).to(dtype)
    return q


@triton.jit
def _class_shares(q, mass, class_weight, j, num_classes: tl.constexpr, smoothing: tl.constexpr):
    """Compute the share of each class in a row's loss: smoothed probability times class weight."""
    shares = q
    if smoothing != 0.0:
        spread = (1.0 - smoothing) * q + (mass * (smoothing / num_classes))[:, None]
        shares = tl.where((j < num_classes)[None, :], spread, 0.0)
    if class_weight is not None:
        address = class_weight + tl.broadcast_to(j[None, :], q.shape)
        shares *= tl.load(address, mask=shares != 0.0, other=0.0).to(q.dtype)
    return shares


@triton.jit
def _shared_logits(
    logits, table, margin, row, k, j, here, q,
    num_classes: tl.constexpr, stride_c, table_k: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Compute a tile of adjusted logits, each less the margin of its class times its probability."""
    adjustment = _adjustment(table, k, j, num_classes, table_k, dtype, False)
    x = _logits(logits, row, j, here, num_classes, stride_c, False, False).to(dtype) + adjustment
    if margin is not None:
        x -= q * tl.load(margin + j, mask=j < num_classes, other=0.0).to(dtype)[None, :]
    return x


@triton.jit
def _shared(
    logits, target, table, weights, divisor, class_weight, margin, losses, state, gradient, upstream,
    num_samples, stride_n, stride_k, stride_c, out_n, out_k, out_c, target_n, weight_n, weight_k,
    target_c, stride_upstream,
    num_experts: tl.constexpr, all_experts: tl.constexpr, num_classes: tl.constexpr,
    table_k: tl.constexpr, ignore_index: tl.constexpr, smoothing: tl.constexpr, gamma: tl.constexpr,
    reduce: tl.constexpr, align: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute losses, state and gradient of rows in which every class may have a share.

    With ``upstream`` it computes only the gradient, from the state. There is a sweep for the sums, for some
    losses one for the derivatives, and one for loss and gradient. If a row fits the block, the compiler
    merges their loads into one.
    """
    dtype: tl.constexpr = state.dtype.element_ty
    soft: tl.constexpr = target.dtype.element_ty != tl.int64
    # Without gamma all derivatives are 1, and their sum is that of the shares.
    sums_shares: tl.constexpr = gamma == 0.0 and (smoothing == 0.0 or class_weight is None)
    k = (tl.program_id(0) % num_experts).to(tl.int64)
    step = tl.num_programs(0) // num_experts * rows
    total = tl.zeros([rows], tl.float64)
    for start in range(tl.program_id(0) // num_experts * rows, num_samples, step):
        n = start + tl.arange(0, rows).to(tl.int64)
        here = n < num_samples
        y = n
        if not soft:
            y = tl.load(target + n * target_n, mask=here, other=ignore_index)
        row = (n * stride_n + k * stride_k) * align
        factor = _factor(weights, n, k, here, weight_n, weight_k, dtype)

        masses = tl.zeros([rows, block], dtype)
        slopes = tl.zeros([rows], dtype)
        some = tl.zeros([rows], tl.int32)
        peak = tl.full([rows], -float("inf"), dtype)
        sums = tl.zeros([rows], dtype)
        for first in range(0, num_classes, block):
            j = first + tl.arange(0, block)
            q = _probabilities(target, n, j, y, here, num_classes, target_n, target_c, dtype)
            masses += q
            some = tl.maximum(some, tl.max((q != 0.0).to(tl.int32), axis=1))
            if sums_shares:
                slopes += tl.sum(_class_shares(q, peak, class_weight, j, num_classes, 0.0), axis=1)
            if upstream is None:
                x = _shared_logits(
                    logits, table, margin, row, k, j, here, q, num_classes, stride_c, table_k, dtype
                )
                higher = tl.maximum(peak, tl.max(x, axis=1))
                # While all are -inf, any finite number works; -inf - -inf would be NaN.
                safe = tl.where(higher == -float("inf"), 0.0, higher)
                sums = sums * tl.exp(peak - safe) + tl.sum(tl.exp(x - safe[:, None]), axis=1)
                peak = higher
        # Summed by lane: a sum by block that is used twice crashes the compiler of Triton 3.7.
        mass = tl.sum(masses, axis=1)
        valid = some > 0
        if not soft:
            valid = y != ignore_index
        if upstream is not None:
            saved = state + (n * all_experts + k) * 2
            peak = tl.load(saved, mask=here, other=0.0)
            sums = tl.load(saved + 1, mask=here, other=1.0)
        log = tl.log(sums)

        if not sums_shares:
            for first in range(0, num_classes, block):
                j = first + tl.arange(0, block)
                q = _probabilities(target, n, j, y, here, num_classes, target_n, target_c, dtype)
                shares = _class_shares(q, mass, class_weight, j, num_classes, smoothing)
                if gamma != 0.0:
                    x = _shared_logits(
                        logits, table, margin, row, k, j, here, q, num_classes, stride_c, table_k, dtype
                    )
                    _, slope = _focal(log[:, None] - (x - peak[:, None]), gamma)
                    shares = tl.where(shares != 0.0, shares * slope, 0.0)
                slopes += tl.sum(shares, axis=1)

        if upstream is None:
            scale = factor / _divisor(divisor, dtype)
        else:
            scale = factor * tl.load(upstream + n * stride_upstream, mask=here, other=0.0).to(dtype)
        loss = tl.zeros([rows], dtype)
        out_row = (n * out_n + k * out_k) * align
        for first in range(0, num_classes, block):
            j = first + tl.arange(0, block)
            q = _probabilities(target, n, j, y, here, num_classes, target_n, target_c, dtype)
            shares = _class_shares(q, mass, class_weight, j, num_classes, smoothing)
            x = _shared_logits(
                logits, table, margin, row, k, j, here, q, num_classes, stride_c, table_k, dtype
            )
            distance = x - peak[:, None]
            values, slope = _focal(log[:, None] - distance, gamma)
            loss += tl.sum(tl.where(shares != 0.0, shares * values, 0.0), axis=1)
            if gradient is not None:
                softmax = tl.exp(distance) / sums[:, None]
                values = scale[:, None] * (
                    softmax * slopes[:, None] - tl.where(shares != 0.0, shares * slope, 0.0)
                )
                mask = here[:, None] & (j < num_classes)[None, :]
                address = gradient + out_row[:, None] + (j.to(tl.int64) * out_c)[None, :]
                tl.store(address, tl.where(valid[:, None], values, 0.0), mask=mask)

        if upstream is None:
            if not soft:
                loss = tl.where((y >= 0) & (y < num_classes), loss, float("nan"))
            loss = tl.where(valid, factor * loss, 0.0)
            _store_state(state, n, k, here, peak, sums, all_experts)
            total = _add_losses(losses, total, n, k, here, loss, all_experts, reduce)
    if reduce:
        tl.store(losses + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _total(values, divisor, total, number, block: tl.constexpr):
    """Sum float64 values in one program, always in the same order, and divide by the divisor."""
    sums = tl.zeros([block], tl.float64)
    for start in range(0, number, block):
        i = start + tl.arange(0, block)
        sums += tl.load(values + i, mask=i < number, other=0.0)
    tl.store(total, tl.sum(sums, axis=0) / _divisor(divisor, tl.float64))


@triton.jit
def _rescale(values, factor, number, block: tl.constexpr):
    """Multiply by a factor in place; if it is 1, read nothing but the factor."""
    if values.dtype.element_ty == tl.float64:
        scale = tl.load(factor).to(tl.float64)
    else:
        scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * block, number, tl.num_programs(0) * block):
            i = start + tl.arange(0, block)
            value = tl.load(values + i, mask=i < number, other=0.0).to(scale.dtype)
            tl.store(values + i, value * scale, mask=i < number)
