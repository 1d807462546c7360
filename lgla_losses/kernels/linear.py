"""The adjusted cross entropy from the inputs of the classifiers, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses.kernels import Engine, Rows
from lgla_losses.kernels.autograd import Inputs, plain_cross_entropy, total

#: Logits in memory at a time, in bytes. With this many, a matrix product reaches full speed. Logits that fit
#: a GPU's cache would save 10 to 12 bytes of traffic per logit (bfloat16), but each chunk costs 12 d bytes
#: per class, for the weights and their gradient: so a chunk has at least d samples, better more.
_CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
#: But never fewer samples than this: the classes' weights are read again for every chunk.
_LEAST_SAMPLES = 64
#: Rows of logits start at multiples of this many bytes. A GPU's fast matrix products want multiples of 16;
#: rows of 8,142 classes in bfloat16 without padding would start at multiples of 4.
_ROW_BYTES = {"cuda": 128}
#: Whether the product itself adds 16-bit products to a float32 sum, if PyTorch can: a chunk then reads and
#: writes the sum once, instead of twice each with a separate product.
_ADD_AT_ONCE = True
#: Numbers of the weights of cosine classifiers that are widened to float32 at a time.
_WIDENED = 1 << 24


def as_autocast_would(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast the inputs of a matrix product to the dtype in which autocast would run it."""
    device = next(t.device.type for t in tensors if t is not None)
    # The meta device has no autocast. (Compilers of PyTorch 2.11 cannot ask whether a device has it.)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


class LinearCrossEntropy(NamedTuple):
    """Compute Eq. 9 for features ``[N, K, d]``, weights ``[K, C, d]`` and a bias ``[K, C]`` or None."""

    engine: Engine
    rows: Rows
    scale: float | None

    def run(
        self, inputs: Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Compute the loss, as in :class:`~lgla_losses.kernels.autograd.Problem`."""
        losses, gradients = self._experts(inputs, wanted, self.rows.weights, self.rows.divisor)
        return total(losses, self.rows.divisor) if self.rows.reduce else losses, gradients, None

    def gradients(
        self, inputs: Inputs, upstream: Tensor, state: Any, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Compute the gradients, as in :class:`~lgla_losses.kernels.autograd.Problem`."""
        weights = upstream[:, None].expand(-1, inputs[0].shape[1])
        if self.rows.weights is not None:
            weights = weights * self.rows.weights
        return self._experts(inputs, wanted, weights, None)[1]

    def differentiable(self, inputs: Inputs) -> Tensor:
        """Compute the loss in plain PyTorch, from all logits in memory at once."""
        features, weight, bias = inputs
        if self.scale is not None:
            dtype = functional.compute_dtype(features.dtype)
            features = self.scale * functional.unit_vectors(features.to(dtype))
            weight = functional.unit_vectors(weight.to(dtype))
        logits = torch.bmm(features.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        return plain_cross_entropy((logits if bias is None else logits + bias,), self.rows)

    def _experts(
        self, inputs: Inputs, wanted: Sequence[bool], weights: Tensor | None, divisor: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Compute the losses ``[N]``, and the gradients of their sum over the divisor."""
        table, bias = self.rows.table, inputs[2]
        if bias is not None:
            table = bias.double() if table is None else table + bias
        # In the layout that engines need for one expert: copied here once, or there for every chunk.
        columns = None if weights is None else weights.T.contiguous()[:, :, None]
        constants = self.rows._replace(divisor=divisor, reduce=False)

        def cross_entropy(k: int, rows: slice, logits: Tensor, gradient: Tensor | None) -> Tensor:
            here = constants._replace(
                target=constants.target[rows],
                table=None if table is None else table[k : k + 1],
                weights=None if columns is None else columns[k][rows],
            )
            return self.engine.forward([logits], here, [gradient])[0]

        return sum_over_experts(inputs, wanted, self.scale, inputs[1].shape[1], cross_entropy)


#: Computes the losses ``[n]`` from the logits ``[n, 1, C]`` of expert k and a slice of the samples. Their
#: gradient goes to the given memory, which is that of the logits.
OfChunk: TypeAlias = Callable[[int, slice, Tensor, Tensor | None], Tensor]


def sum_over_experts(
    inputs: Inputs, wanted: Sequence[bool], scale: float | None, num_classes: int, of_chunk: OfChunk
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the classifiers' logits a chunk at a time, and from their gradients those of the inputs.

    Args:
        inputs: features ``[N, K, d]``, weights ``[K, C, d]`` and a bias ``[K, C]`` or None, which is not
            added to the logits here.
        wanted: which of their gradients to compute.
        scale: factor of cosine classifiers; None for linear ones.
        num_classes: number of classes, which sets the size of the chunks.
        of_chunk: computes the losses of a chunk.

    Returns:
        The losses ``[N]``, and the required gradients.
    """
    features, weight, _ = inputs
    losses = features.new_zeros(len(features), dtype=functional.compute_dtype(features.dtype))
    chunks = chunks_of(features, num_classes)
    # Without samples, no chunk fills them.
    new = torch.empty_like if chunks else torch.zeros_like
    gradients = [
        new(v, memory_format=torch.contiguous_format) if w else None
        for v, w in zip(inputs, wanted, strict=True)
    ]
    if not chunks:
        return losses, gradients

    # One memory for all chunks; from the second chunk on it is in the cache.
    buffer = logits_memory(features, chunks[0].stop, weight.shape[1])
    with torch.autocast(features.device.type, enabled=False):
        for k in range(features.shape[1]):
            _add_expert(k, inputs, gradients, losses, scale, chunks, buffer, of_chunk)
    return losses, gradients


def _add_expert(
    k: int,
    inputs: Inputs,
    gradients: Sequence[Tensor | None],
    losses: Tensor,
    scale: float | None,
    chunks: Sequence[slice],
    buffer: Tensor,
    of_chunk: OfChunk,
) -> None:
    """Add expert k to the losses, and fill its part of the gradients."""
    features, weight = inputs[0][:, k], inputs[1][k]
    for_features = None if gradients[0] is None else gradients[0][:, k]
    for_weight, for_bias = (None if v is None else v[k] for v in gradients[1:])
    exact, wanted = losses.dtype, any(v is not None for v in gradients)

    rows_of, centres = features, weight
    if scale is not None:
        rows_of = (scale * directions(features, exact)).to(features.dtype)
        centres = rounded_directions(weight, exact)
    weight_sum = for_weight
    if for_weight is not None and for_weight.dtype != exact and (len(chunks) > 1 or scale is not None):
        weight_sum = torch.empty_like(for_weight, dtype=exact)
    bias_sum = None if for_bias is None else torch.zeros_like(for_bias, dtype=exact)

    for rows in chunks:
        some = rows_of[rows]
        block = buffer[: len(some)]
        logits = torch.mm(some, centres.T, out=block[:, 0])
        # From here on this memory holds the gradient of the logits.
        losses[rows].add_(of_chunk(k, rows, block, block if wanted else None))
        if for_features is not None:
            torch.mm(logits, centres, out=for_features[rows])
        if weight_sum is not None:
            add_product(weight_sum, logits.T, some, first=rows.start == 0)
        if bias_sum is not None:
            bias_sum += logits.sum(dim=0, dtype=exact)

    if scale is not None and for_features is not None:
        wide = for_features.to(exact) * scale
        for_features.copy_(through_directions_(wide, features.to(exact)))
    if scale is not None and weight_sum is not None:
        for some in widened_at_a_time(weight):
            through_directions_(weight_sum[some], weight[some].to(exact))
    if for_weight is not None and weight_sum is not None and weight_sum is not for_weight:
        for_weight.copy_(weight_sum)
    if for_bias is not None and bias_sum is not None:
        for_bias.copy_(bias_sum)


def chunks_of(features: Tensor, num_classes: int) -> list[slice]:
    """Cut the samples into slices of about equal size."""
    num_samples = len(features)
    most = _CHUNK_BYTES.get(features.device.type, 1 << 28) // (num_classes * features.element_size())
    number = -(-num_samples // max(most, _LEAST_SAMPLES))
    size = -(-num_samples // max(number, 1))
    return [slice(start, min(start + size, num_samples)) for start in range(0, num_samples, max(size, 1))]


def logits_memory(features: Tensor, num_samples: int, num_classes: int) -> Tensor:
    """Make memory for logits ``[n, 1, C]`` of one expert; align the rows for fast matrix products."""
    aligned = max(1, _ROW_BYTES.get(features.device.type, 1) // features.element_size())
    width = -(-num_classes // aligned) * aligned
    return features.new_empty((num_samples, 1, width))[..., :num_classes]


def widened_at_a_time(vectors: Tensor) -> list[slice]:
    """Cut the first dimension of ``[C, d]`` into slices that are small enough to widen."""
    size = max(1, _WIDENED // max(1, vectors.shape[1]))
    return [slice(start, start + size) for start in range(0, len(vectors), size)]


def rounded_directions(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute unit vectors ``[C, d]`` in ``dtype``, a slice at a time; round them to the vectors' dtype."""
    result = torch.empty_like(vectors)
    for some in widened_at_a_time(vectors):
        result[some] = directions(vectors[some], dtype)
    return result


def directions(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute unit vectors in ``dtype``."""
    return functional.unit_vectors(vectors.to(dtype))


def through_directions_(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Turn the gradient of unit vectors into that of the vectors, in place."""
    directions = functional.unit_vectors(vectors)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    along = torch.linalg.vecdot(directions, gradient)[..., None]
    return gradient.addcmul_(directions, along, value=-1).div_(torch.where(length == 0, torch.inf, length))


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Compute ``total += left @ right``, or with ``first`` ``total = left @ right``.

    The product has the precision of the total.
    """
    beta = 0 if first else 1
    if left.dtype == total.dtype or not left.is_cuda or "dtype" not in torch.ops.aten.mm.overloads():
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=total)
    elif _ADD_AT_ONCE and adds_to_float32(left.dtype, left.device):
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


@cache
def adds_to_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether PyTorch can add a product of 16-bit matrices to a float32 one; old versions cannot."""
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    part = total.to(dtype)
    try:
        torch.addmm(total, part, part, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
