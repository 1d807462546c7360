"""The loss from the inputs of the classifiers, for more classes than there is memory for logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._checks import (
    WAY_OUT,
    finite_tensors,
    floating_tensor,
    normalizer_value,
    same_device,
    sample_weight_tensor,
    sample_weight_values,
    target_tensor,
    target_values,
    values_readable,
)
from lgla_losses._counts import ArrayLike
from lgla_losses.kernels import autograd, chunked
from lgla_losses.losses._config import ExpertLoss, LossOptions, refuse_unknown

#: Logits in memory at a time, in bytes. A matrix product is as fast as ever with these many. Few enough to
#: stay in a GPU's cache would spare each logit 10 to 12 bytes of traffic (bfloat16), but each chunk costs
#: 12 d bytes a class, for the weights and their gradient: so a chunk has d samples at least, better more.
_CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
#: But never fewer samples than these: the classes' weights are read anew for every chunk.
_LEAST_SAMPLES = 64
#: Rows of logits begin at multiples of so many bytes. A GPU's fast matrix products want multiples of 16; rows
#: of 8,142 classes in bfloat16, close together, would begin at multiples of 4.
_ROW_BYTES = {"cuda": 128}
#: Whether 16-bit products are added to a float32 sum by the product itself, where PyTorch can: a chunk then
#: reads and writes the sum once, instead of twice each with a product beside it.
_ADD_AT_ONCE = True
#: Numbers that are widened to float32 at a time, of the weights of cosine classifiers.
_WIDENED = 1 << 24


class LinearLGLALoss(ExpertLoss):
    r"""The LGLA loss of classifiers :math:`v_k^j = W_k^j \cdot f_k + b_k^j`, from f, W and b.

    Equal to :class:`LGLALoss` of the logits, which are never all in memory: they are made a chunk at a
    time, and where the loss is a scalar, the gradients of features, weights and bias with them, by
    three matrix products as ever. Gradients are added up over the chunks in float32 at least.

    Source: Tao et al., ICCV 2023, Eq. 9.

    Args:
        class_counts: as in :class:`LGLALoss`.
        num_experts: as in :class:`LGLALoss`.
        tau: as in :class:`LGLALoss`.
        scale: the factor of cosine classifiers, :math:`v = s \cos(W, f)`, which have no bias; None
            for linear ones.
        options: the other arguments of :class:`LGLALoss`.

    Shape:
        - features: ``[N, K, d]``, inputs of the classifiers
        - weight: ``[K, C, d]``
        - target: int64 ``[N]``
        - bias: ``[K, C]``, or None
        - result: as of :class:`LGLALoss`

    Example:
        >>> criterion = LinearLGLALoss([500, 100, 20], num_experts=3)
        >>> features = torch.randn(8, 3, 16, requires_grad=True)
        >>> weight = torch.randn(3, 3, 16, requires_grad=True)
        >>> criterion(features, weight, torch.arange(8) % 3).backward()
    """

    def __init__(
        self,
        class_counts: ArrayLike | None = None,
        num_experts: int | None = None,
        tau: float | None = None,
        *,
        scale: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        refuse_unknown(self, options, LossOptions)
        super().__init__(class_counts, num_experts, tau, scale=scale, **options)

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Eq. 9 of a batch.

        Args:
            features: inputs of the classifiers ``[N, K, d]``.
            weight: weights of the classifiers ``[K, C, d]``.
            target: class indices ``[N]``.
            bias: of the classifiers ``[K, C]``; -inf masks a class.
            sample_weight: as in :meth:`LGLALoss.forward`.
            normalizer: as in :meth:`LGLALoss.forward`.
        """
        self._check_inputs(features, weight, target, bias, sample_weight, normalizer)
        readable = values_readable(features, self.validate_args)
        if readable:
            try:
                self._check_values(features, target, sample_weight)
            except ValueError as problem:
                self._refuse(problem, target.device, communicates=self._communicates(target, normalizer))
        inputs = features, weight, target, bias, sample_weight, normalizer
        engine = self._engine(*inputs)
        if engine is None and self.backend != "reference" and autograd.unfit(*inputs) is None:
            engine = chunked
        weights = samples = None
        if self.aaw:
            angles = functional.angles_from_features(features, weight, self._own_class(target))
            weights, samples = self._weights(
                engine, angles, target, scale=None, check=False, sample_weight=sample_weight
            )
        elif sample_weight is not None:
            weights = sample_weight[:, None].expand(-1, self.num_experts)
        features, weight, bias = as_autocast_would(features, weight, bias)
        if weight.dtype != features.dtype:
            raise ValueError(
                f"weight: expected the features' dtype {features.dtype}, got {weight.dtype}; "
                "convert one of them, or train under torch.autocast, which leaves float64 as it is"
            )
        dtype = functional.compute_dtype(features.dtype)
        divisor = self._divisor(target, normalizer, samples, dtype, sample_weight)
        compiling = torch.compiler.is_compiling()
        reduce = self._engine_adds_up(engine, divisor) and not compiling
        call = autograd.Call(
            engine or chunked,
            target,
            self._table,
            weights,
            divisor if reduce else None,
            self.ignore_index,
            self.label_smoothing,
            reduce,
        )
        if engine is None:
            loss = LinearCrossEntropy(call, self.scale).differentiable((features, weight, bias))
        elif compiling:
            loss = _compiled(call, features, weight, bias, self.scale, self.backend)
        else:
            loss = autograd.evaluate(LinearCrossEntropy(call, self.scale), features, weight, bias)
        if not reduce:
            loss = self._reduced(loss, divisor)
        if readable:
            try:
                self._check_loss(loss.detach())
            except ValueError as problem:  # too late to tell other ranks, which soon miss this one
                self._refuse(problem, target.device, communicates=False)
        return loss

    if TYPE_CHECKING:
        # nn.Module declares it as returning Any.
        __call__ = forward

    def _check_values(self, features: Tensor, target: Tensor, sample_weight: Tensor | None) -> None:
        target_values(target, self.num_classes, self.ignore_index)
        if sample_weight is not None:
            sample_weight_values(sample_weight)
        finite_tensors(features=features)

    def _check_loss(self, loss: Tensor) -> None:
        # Smoothing makes a loss infinite where a class is masked, and rightly so.
        wrong = loss.isnan() if self.label_smoothing else ~loss.isfinite()
        if wrong.any():
            raise ValueError(
                "features, weight, bias: expected finite logits on the targets, no NaN or +inf elsewhere; "
                f"{WAY_OUT}"
            )

    def _check_inputs(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        sample_weight: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> None:
        target_tensor(target)
        self._check_features(features, weight, target.shape)
        if sample_weight is not None:
            sample_weight_tensor(sample_weight, target.shape)
        if bias is not None:
            floating_tensor("bias", bias, "[K, C]")
            if bias.shape != weight.shape[:2]:
                raise ValueError(f"bias: expected shape {list(weight.shape[:2])}, got {list(bias.shape)}")
            if self.scale is not None:
                raise ValueError(f"bias: expected None with scale={self.scale}: cosine classifiers have none")
        same_device(
            features=features,
            target=target,
            weight=weight,
            bias=bias,
            sample_weight=sample_weight,
            criterion=self._table,
        )
        normalizer_value(normalizer, self.reduction, self.validate_args, target.device)


def as_autocast_would(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The inputs of a matrix product in the dtype it runs in."""
    device = next(t.device.type for t in tensors if t is not None)
    # The meta device has no autocast to ask for. (Compilers of PyTorch 2.11 cannot ask whether a device has.)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


class LinearCrossEntropy(NamedTuple):
    """Eq. 9 for features ``[N, K, d]``, weights ``[K, C, d]`` and a bias ``[K, C]`` or None."""

    call: autograd.Call
    scale: float | None

    def run(
        self, inputs: autograd.Inputs, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """As in :class:`~lgla_losses.kernels.autograd.Fusible`."""
        losses, gradients = self._experts(inputs, wanted, self.call.weights, self.call.divisor)
        return self.call.reduced(losses), gradients, None

    def gradients(
        self, inputs: autograd.Inputs, upstream: Tensor, state: Any, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """As in :class:`~lgla_losses.kernels.autograd.Fusible`."""
        weights = self.call.per_sample(upstream)[:, None]
        if self.call.weights is None:
            weights = weights.expand(-1, inputs[0].shape[1])
        else:
            weights = weights * self.call.weights
        return self._experts(inputs, wanted, weights, None)[1]

    def differentiable(self, inputs: autograd.Inputs) -> Tensor:
        """As in :class:`~lgla_losses.kernels.autograd.Fusible`; holds all logits."""
        features, weight, bias = inputs
        if self.scale is not None:
            dtype = functional.compute_dtype(features.dtype)
            features = self.scale * functional.unit_vectors(features.to(dtype))
            weight = functional.unit_vectors(weight.to(dtype))
        logits = torch.bmm(features.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        return autograd.CrossEntropy(self.call).differentiable((logits if bias is None else logits + bias,))

    def _experts(
        self, inputs: autograd.Inputs, wanted: Sequence[bool], weights: Tensor | None, divisor: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The losses ``[N]``, and the gradients of their sum over the divisor."""
        features, weight, _ = inputs
        losses = features.new_zeros(len(features), dtype=functional.compute_dtype(features.dtype))
        chunks = chunks_of(features, num_classes=weight.shape[1])
        # Without samples no chunk fills them.
        new = torch.empty_like if chunks else torch.zeros_like
        gradients = [
            new(v, memory_format=torch.contiguous_format) if w else None
            for v, w in zip(inputs, wanted, strict=True)
        ]
        if not chunks:
            return losses, gradients

        # One memory for all chunks, which is warm from the second on.
        buffer = logits_memory(features, chunks[0].stop, weight.shape[1])
        # As engines want an expert's weights: copied here for all of them, or there for every chunk.
        columns = None if weights is None else weights.T.contiguous()[:, :, None]
        with torch.autocast(features.device.type, enabled=False):
            for k in range(features.shape[1]):
                column = None if columns is None else columns[k]
                self._expert(k, inputs, gradients, losses, column, divisor, chunks, buffer)
        return losses, gradients

    def _expert(
        self,
        k: int,
        inputs: autograd.Inputs,
        gradients: Sequence[Tensor | None],
        losses: Tensor,
        weights: Tensor | None,
        divisor: Tensor | None,
        chunks: Sequence[slice],
        buffer: Tensor,
    ) -> None:
        """Add expert k to the losses, and fill its part of the gradients."""
        features, weight = inputs[0][:, k], inputs[1][k]
        bias = None if inputs[2] is None else inputs[2][k]
        for_features = None if gradients[0] is None else gradients[0][:, k]
        for_weight, for_bias = (None if v is None else v[k] for v in gradients[1:])
        call, exact = self.call, losses.dtype
        table = call.table[k : k + 1] if bias is None else call.table[k : k + 1] + bias
        rows_of, centres = features, weight
        if self.scale is not None:
            rows_of = (self.scale * directions(features, exact)).to(features.dtype)
            centres = rounded_directions(weight, exact)
        weight_sum = for_weight
        if (
            for_weight is not None
            and for_weight.dtype != exact
            and (len(chunks) > 1 or self.scale is not None)
        ):
            weight_sum = torch.empty_like(for_weight, dtype=exact)
        bias_sum = None if for_bias is None else torch.zeros_like(for_bias, dtype=exact)

        for rows in chunks:
            some = rows_of[rows]
            block = buffer[: len(some)]
            logits = torch.mm(some, centres.T, out=block[:, 0])
            # From here on the gradient of the logits lies where they were.
            loss, _ = call.engine.forward(
                block,
                call.target[rows],
                table,
                None if weights is None else weights[rows],
                divisor,
                ignore_index=call.ignore_index,
                label_smoothing=call.label_smoothing,
                reduce=False,
                gradient=None if for_features is for_weight is for_bias is None else block,
            )
            losses[rows].add_(loss)
            if for_features is not None:
                torch.mm(logits, centres, out=for_features[rows])
            if weight_sum is not None:
                add_product(weight_sum, logits.T, some, first=rows.start == 0)
            if bias_sum is not None:
                bias_sum += logits.sum(dim=0, dtype=exact)

        if self.scale is not None and for_features is not None:
            wide = for_features.to(exact) * self.scale
            for_features.copy_(through_directions_(wide, features.to(exact)))
        if self.scale is not None and weight_sum is not None:
            for some in widened_at_a_time(weight):
                through_directions_(weight_sum[some], weight[some].to(exact))
        if for_weight is not None and weight_sum is not None and weight_sum is not for_weight:
            for_weight.copy_(weight_sum)
        if for_bias is not None and bias_sum is not None:
            for_bias.copy_(bias_sum)


def chunks_of(features: Tensor, num_classes: int) -> list[slice]:
    """Slices of the samples, of about equal size."""
    num_samples = len(features)
    most = _CHUNK_BYTES.get(features.device.type, 1 << 28) // (num_classes * features.element_size())
    number = -(-num_samples // max(most, _LEAST_SAMPLES))
    size = -(-num_samples // max(number, 1))
    return [slice(start, min(start + size, num_samples)) for start in range(0, num_samples, max(size, 1))]


def logits_memory(features: Tensor, num_samples: int, num_classes: int) -> Tensor:
    """Memory for logits ``[n, 1, C]`` of one expert, whose rows begin where matrix products like it."""
    aligned = max(1, _ROW_BYTES.get(features.device.type, 1) // features.element_size())
    width = -(-num_classes // aligned) * aligned
    return features.new_empty((num_samples, 1, width))[..., :num_classes]


def widened_at_a_time(vectors: Tensor) -> list[slice]:
    """Slices of the first dimension of ``[C, d]``."""
    size = max(1, _WIDENED // max(1, vectors.shape[1]))
    return [slice(start, start + size) for start in range(0, len(vectors), size)]


def rounded_directions(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors ``[C, d]``, computed in ``dtype`` some at a time, in the dtype of the vectors."""
    result = torch.empty_like(vectors)
    for some in widened_at_a_time(vectors):
        result[some] = directions(vectors[some], dtype)
    return result


def directions(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors, computed in ``dtype``."""
    return functional.unit_vectors(vectors.to(dtype))


def through_directions_(gradient: Tensor, vectors: Tensor) -> Tensor:
    """The gradient of the vectors, in place of that of their directions."""
    directions = functional.unit_vectors(vectors)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    along = torch.linalg.vecdot(directions, gradient)[..., None]
    return gradient.addcmul_(directions, along, value=-1).div_(torch.where(length == 0, torch.inf, length))


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``total += left @ right``, or for the first ``total = left @ right``, in the total's precision."""
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
    """Whether PyTorch adds a product of 16-bit matrices to a float32 one; its first versions refuse."""
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    part = total.to(dtype)
    try:
        torch.addmm(total, part, part, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _compiled(
    call: autograd.Call,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """Eq. 9 of every sample ``[N]``, for :func:`torch.compile`."""
    losses: Tensor = torch.ops.lgla_losses.linear_cross_entropy(
        features,
        weight,
        bias,
        call.target,
        call.table,
        call.weights,
        scale,
        call.ignore_index,
        call.label_smoothing,
        backend,
    )
    return losses


_ARGUMENTS = (
    "Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor table, Tensor? weights, "
    "float? scale, SymInt ignore_index, float label_smoothing, str backend"
)
_OPERATORS = torch.library.Library("lgla_losses", "FRAGMENT")
_OPERATORS.define(f"linear_cross_entropy({_ARGUMENTS}) -> Tensor")
_OPERATORS.define(f"linear_cross_entropy_backward(Tensor upstream, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")


def _problem(
    target: Tensor,
    table: Tensor,
    weights: Tensor | None,
    scale: float | None,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
) -> LinearCrossEntropy:
    engine = autograd.engine_for(backend, target.device) or chunked
    call = autograd.Call(engine, target, table, weights, None, ignore_index, label_smoothing, reduce=False)
    return LinearCrossEntropy(call, scale)


def _operator(features: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return _problem(*rest).run((features, weight, bias), (False, False, False))[0]


def _operator_backward(
    upstream: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wanted = True, True, bias is not None
    found = _problem(*rest).gradients((features, weight, bias), upstream, None, wanted)
    return tuple(upstream.new_empty(0) if gradient is None else gradient for gradient in found)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.ignore_index, ctx.label_smoothing, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, for_bias = torch.ops.lgla_losses.linear_cross_entropy_backward(
        upstream, *ctx.saved_tensors, ctx.scale, ctx.ignore_index, ctx.label_smoothing, ctx.backend
    )
    return *gradients, None if ctx.saved_tensors[2] is None else for_bias, *[None] * 7


def _shape(features: Tensor, *_: object) -> Tensor:
    return features.new_empty(len(features), dtype=functional.compute_dtype(features.dtype))


def _shapes(
    upstream: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, *_: object
) -> tuple[Tensor, ...]:
    absent = upstream.new_empty(0)
    return tuple(absent if v is None else v.new_empty(v.shape) for v in (features, weight, bias))


_OPERATORS.impl("linear_cross_entropy", _operator, "CompositeExplicitAutograd")
_OPERATORS.impl("linear_cross_entropy_backward", _operator_backward, "CompositeExplicitAutograd")
torch.library.register_fake("lgla_losses::linear_cross_entropy", _shape, lib=_OPERATORS)
torch.library.register_fake("lgla_losses::linear_cross_entropy_backward", _shapes, lib=_OPERATORS)
torch.library.register_autograd(
    "lgla_losses::linear_cross_entropy", _gradients, setup_context=_save, lib=_OPERATORS
)
torch.library.register_autograd(
    "lgla_losses::linear_cross_entropy_backward", autograd.refuse_second_derivative, lib=_OPERATORS
)
