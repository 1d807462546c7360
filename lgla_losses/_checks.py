"""Argument checks shared by the modules: every error says what was expected, what came, and the way out."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from lgla_losses._torch import is_wrapped, values_readable

#: Way out for numbers that are not finite.
WAY_OUT = (
    "lower the learning rate, clip gradients, or look for a division by zero upstream "
    "(validate_args=False skips this check)"
)
#: Losses for targets that the losses of one class per sample refuse.
SEVERAL_LABELS = (
    "for rows with several classes per sample (multi-hot) use SigmoidAdjustedLoss and ClassBalancedBCELoss "
    "of lgla_losses.baselines"
)
#: How far from 1 the sum of probabilities may be: 16-bit values are rounded.
SUM_TOLERANCE = 0.01
#: The dtypes that the losses can compute with.
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """Describe a value in a few words, for the "got" part of an error."""
    if isinstance(value, Tensor):
        if value.is_nested:  # reading its sizes raises
            return f"a nested {value.dtype} tensor on {value.device}"
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        return f"a {layout}{value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    try:
        text = reprlib.repr(value)
    except ValueError:
        text = "a number of thousands of digits"  # Python does not print such numbers
    return f"{text} of type {type(value).__name__}"


def integer(name: str, value: int, way_out: str) -> int:
    """Check that ``value`` is a 64-bit integer; return it as an int.

    Booleans and floats raise.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {describe(value)}; {way_out}") from None
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {describe(value)}; {way_out}")
    return number


def positive_int(name: str, value: int, way_out: str) -> int:
    """Check that ``value`` is an integer of at least 1; return it as an int."""
    number = integer(name, value, way_out)
    if number < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {number}; {way_out}")
    return number


def class_index(name: str, value: int, num_classes: int) -> int:
    """Check that ``value`` is the index of one of ``num_classes`` classes; return it as an int."""
    index = integer(name, value, "it is the index of a class")
    if not 0 <= index < num_classes:
        raise ValueError(
            f"{name}: expected class indices 0..{num_classes - 1}, got {index}; classes are counted from 0"
        )
    return index


def finite_float(name: str, value: float, *, low: float, high: float, expected: str) -> float:
    """Check that ``value`` is a number from ``low`` to ``high``; return it as a float.

    ``expected`` is text for the error: which numbers are allowed, and what to do.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}") from None
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def positive_float(name: str, value: float, way_out: str) -> float:
    """Check that ``value`` is a positive, finite number; return it as a float."""
    expected = f"a positive, finite number ({way_out})"
    number = finite_float(name, value, low=0.0, high=math.inf, expected=expected)
    if number == 0.0:
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def dense_tensor(name: str, value: Tensor) -> Tensor:
    """Check that ``value`` is dense: not sparse, nested or in a special layout; return it."""
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got {describe(value)}; convert it with "
            "torch.nested.to_padded_tensor"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got {describe(value)}; convert it with {name}.to_dense()"
        )
    return value


def computable_tensor(name: str, value: object, shape: str | list[int]) -> Tensor:
    """Check that ``value`` is a dense floating-point tensor with 16 bits or more; return it.

    The losses can compute only with such tensors. ``shape`` is not checked; it is text for the error.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor {shape}, got {describe(value)}")
    if dense_tensor(name, value).dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected a floating-point tensor {shape} of 16 bits or more, got {describe(value)}; "
            f"convert it with {name}.float()"
        )
    return value


def floating_tensor(name: str, value: object, shape: str) -> Tensor:
    """Check that ``value`` is a floating-point tensor; return it.

    It must have as many dimensions as ``shape`` names, and a dtype that the losses can compute with.
    """
    value = computable_tensor(name, value, shape)
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
    return value


def gathered_weight(weight: Tensor) -> None:
    """Raise for class weights that are not in memory, because FSDP2 has sharded or freed them.

    The answer does not depend on the batch, so all ranks raise together.
    """
    if torch.compiler.is_compiling():
        return
    sharded = hasattr(weight, "device_mesh")
    freed = (
        type(weight) in (Tensor, torch.nn.Parameter)
        and not is_wrapped(weight)
        and not weight.is_meta
        and weight.numel() > 0
        and weight.untyped_storage().size() == 0
    )
    if sharded or freed:
        raise ValueError(
            f"weight: expected the class weights in memory, got {'a DTensor' if sharded else 'none there'}, "
            "as from an FSDP2 unit that reshards after forward; use fully_shard(unit, "
            "reshard_after_forward=False) for the unit that holds the whole GroupConvExperts"
        )


def target_tensor(target: object, samples: Sequence[int] | None = None) -> Tensor:
    """Check that ``target`` holds int64 class indices of shape ``samples``, by default ``[N]``; return it.

    The values are not read.
    """
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target: expected an int64 tensor [N] of class indices, got {describe(target)}; "
            "wrap it in torch.as_tensor(target)"
        )
    dense_tensor("target", target)
    dimensions = 1 if samples is None else len(samples)
    if target.is_floating_point() and target.dim() == dimensions + 1:
        raise TypeError(
            f"target: expected an int64 tensor [N] of class indices, got {describe(target)}, class "
            "probabilities by their shape; pass them to a loss, or pass the most likely classes, "
            "target.argmax(dim=1)"
        )
    are_rows = target.dim() == dimensions + 1 and target.shape[1] > 1
    if target.dtype != torch.int64 and not are_rows:
        raise TypeError(
            f"target: expected an int64 tensor [N] of class indices, got {target.dtype}; convert other "
            "whole numbers with target.long()"
        )
    if (target.dim() != 1) if samples is None else (tuple(target.shape) != tuple(samples)):
        size = "[N]" if samples is None else str(list(samples))
        way_out = "flatten it, or check the batch dimension"
        if are_rows:
            way_out = f"convert one-hot rows with target.long().argmax(dim=1); {SEVERAL_LABELS}"
        raise ValueError(
            f"target: expected shape {size}, one class index per sample, got {list(target.shape)} of "
            f"{target.dtype}; {way_out}"
        )
    return target


def probability_tensor(target: Tensor, samples: Sequence[int], num_classes: int) -> Tensor:
    """Check that ``target`` has the shape of class probabilities ``[N, C, ...]``; return it.

    The values are not read.
    """
    shape = [samples[0], num_classes, *samples[1:]]
    computable_tensor("target", target, shape)
    if list(target.shape) != shape:
        raise ValueError(
            f"target: expected class probabilities of shape {shape}, got {list(target.shape)}; class indices "
            "are int64"
        )
    if target.requires_grad:
        raise ValueError(
            "target: expected probabilities without gradient, got some that require one; detach them"
        )
    return target


def probability_values(target: Tensor) -> None:
    """Check that the probabilities ``[*B, C]`` of a sample are >= 0 and sum to 1, or to 0 to ignore it.

    This reads the values.
    """
    if target.numel() == 0:
        return
    sums = target.sum(dim=-1, dtype=torch.promote_types(target.dtype, torch.float32))
    low, high = map(_number, sums.aminmax())  # NaN stays NaN
    if low == 0:
        low = _number(torch.where(sums == 0, 1.0, sums).amin())
    if not (low >= 1 - SUM_TOLERANCE and high <= 1 + SUM_TOLERANCE and _number(target.amin()) >= 0):
        raise ValueError(no_probabilities(float(target.min()), float(sums.min()), float(sums.max())))


def no_probabilities(lowest: float, least: float, most: float) -> str:
    """Say what is wrong with probabilities that have these values and sums."""
    return (
        "target: expected class probabilities >= 0 that sum to 1 over the classes (dimension 1), or to 0 "
        f"for a sample to ignore, got values from {lowest:.4g} and sums from {least:.4g} to {most:.4g}; "
        f"softmax(dim=1) makes probabilities; {SEVERAL_LABELS}"
    )


def multi_hot_tensor(target: object, num_samples: int, num_classes: int) -> Tensor:
    """Check that ``target`` holds a number for every class of a sample, ``[N, C]``; return it.

    The values are not read.
    """
    shape = [num_samples, num_classes]
    if not isinstance(target, Tensor) or target.is_complex():
        raise TypeError(
            f"target: expected a tensor {shape} of 0 and 1, one for every class of a sample, got "
            f"{describe(target)}; wrap it in torch.as_tensor(target)"
        )
    if target.is_floating_point():
        computable_tensor("target", target, shape)
    if list(dense_tensor("target", target).shape) != shape:
        way_out = f"convert class indices with torch.nn.functional.one_hot(target, {num_classes})"
        if target.dim() == 2:
            way_out = "logits are [N, C] or [N, K, C], so pass a stack [K, N, C] as logits.transpose(0, 1)"
        raise ValueError(
            f"target: expected shape {shape} as for the logits, a 0 or 1 for every class of a sample, got "
            f"{list(target.shape)}; {way_out}"
        )
    if target.requires_grad:
        raise ValueError("target: expected numbers without gradient, got some that require one; detach them")
    return target


def multi_hot_values(target: Tensor) -> None:
    """Check that all numbers are in 0..1. This reads the values."""
    if target.numel() == 0:
        return
    low, high = map(_number, target.aminmax())  # NaN stays NaN
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"target: expected 0 or 1, or numbers between, for every class, got {low:.4g} to {high:.4g}; "
            "for unknown labels set 0, and mask the losses of reduction='none'"
        )


def _number(scalar: Tensor) -> float | Tensor:
    """Read a scalar: comparing numbers is faster; a compiler breaks its graph in both cases."""
    return scalar if torch.compiler.is_compiling() else scalar.item()


def sample_weight_tensor(sample_weight: object, samples: Sequence[int]) -> Tensor:
    """Check that ``sample_weight`` holds one constant per sample; return it.

    The values are not read.
    """
    sample_weight = computable_tensor("sample_weight", sample_weight, list(samples))
    if tuple(sample_weight.shape) != tuple(samples):
        raise ValueError(
            f"sample_weight: expected shape {list(samples)}, one weight per sample, got "
            f"{list(sample_weight.shape)}"
        )
    if sample_weight.requires_grad:
        raise ValueError(
            "sample_weight: expected weights without gradient, got some that require one; detach them, or "
            "multiply the losses of reduction='none' by them"
        )
    return sample_weight


def sample_weight_values(sample_weight: Tensor) -> None:
    """Check that all weights are finite and at least 0. This reads the values."""
    if sample_weight.numel() == 0:
        return
    low, high = map(_number, sample_weight.aminmax())  # NaN stays NaN
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"sample_weight: expected finite numbers >= 0, got {low:.4g} to {high:.4g}")


def same_device(**tensors: Tensor | None) -> None:
    """Check that all given tensors are on one device."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            break
    else:
        return
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if devices:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(
            f"expected all tensors on one device, got {where}; move the inputs and the loss module with "
            ".to(device)"
        )


def finite_tensors(**tensors: Tensor | None) -> None:
    """Check that the tensors hold no NaN and no infinity. This reads the values."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity; {WAY_OUT}")


def target_values(target: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Check that every target is a class index or ``ignore_index``. This reads the values."""
    wrong = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        position = first[0] if len(first) == 1 else first
        ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(
            f"target: expected class indices 0..{num_classes - 1}{ignored}, got {int(target[first])} at "
            f"position {position}; for labels that start at 1 pass target - 1"
        )


def normalizer_value(
    normalizer: float | Tensor | None,
    reduction: str,
    validate_args: bool | None,
    device: torch.device | None = None,
) -> None:
    """Check that ``normalizer`` is None or a positive number.

    It divides the sum of the losses, which are on ``device``.
    """
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer: expected None with reduction={reduction!r}, got {describe(normalizer)}; it is the "
            "divisor for reduction='mean'; leave it out"
        )
    if not isinstance(normalizer, Tensor):
        if not torch.compiler.is_compiling():  # a compiler does not know the value
            positive_float("normalizer", normalizer, "the number of samples to divide by")
        return
    dense_tensor("normalizer", normalizer)
    if normalizer.dim() > 0 or normalizer.is_complex():
        raise ValueError(f"normalizer: expected a number or a real scalar tensor, got {describe(normalizer)}")
    if normalizer.is_meta and device is not None and device.type != "meta":
        raise ValueError(
            f"normalizer: expected a number or a scalar tensor with a value, got {describe(normalizer)}"
        )
    if values_readable(normalizer, validate_args):
        positive_float("normalizer", normalizer.item(), "the number of samples to divide by")


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Check that ``value`` is one of the allowed words; return it."""
    if not isinstance(value, str) or value not in allowed:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {describe(value)}")
    return value


def boolean(name: str, value: bool) -> bool:
    """Check that ``value`` is True or False; return it as a bool.

    Strings and numbers raise, although Python would accept them as true or false.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def validation(value: bool | None) -> bool | None:
    """Check that ``validate_args`` is True, False or None; return it."""
    if value is not None and not isinstance(value, bool | np.bool_):
        raise TypeError(f"validate_args: expected True, False or None, got {describe(value)}")
    return value
