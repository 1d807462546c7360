"""Facts that PyTorch gives only under private names. A test checks the use of every name here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import _functorch
from torch.nn.modules import module

_EVERY_MODULES_HOOKS = module._global_forward_hooks, module._global_forward_pre_hooks


def unfit(*inputs: Tensor | None) -> str | None:
    """Say why no engine takes these tensors, or None: an engine reads memory, and PyTorch cannot trace it."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return "operations are being traced"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"

    for tensor in inputs:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"it takes plain tensors, got one of type {type(tensor).__name__}"
        if _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor):
            return "it does not run under torch.func transforms"
        if tensor.is_meta or tensor.is_neg():
            return "it reads memory, got a tensor without memory, or a negated view"
    return None


def is_wrapped(tensor: Tensor) -> bool:
    """Say whether a tensor wraps another in a transform of :mod:`torch.func`."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def is_mapped() -> bool:
    """Say whether :func:`torch.vmap` maps a function over a batch, so that values cannot be read."""
    vmap = _functorch.TransformType.Vmap
    return any(level.key() == vmap for level in _functorch.get_interpreter_stack())


def values_readable(tensor: Tensor, validate_args: bool | None) -> bool:
    """Say whether checks may read values; ``None`` means on the CPU and outside a compiler.

    On the meta device and under :func:`torch.vmap` values cannot be read, so the checks are skipped.
    """
    if torch.compiler.is_compiling():
        return validate_args is True
    if validate_args is False or tensor.is_meta:
        return False
    if _functorch.peek_interpreter_stack() is not None and is_mapped():
        return False
    return validate_args is True or tensor.device.type == "cpu"


def is_watched(watched: nn.Module) -> bool:
    """Say whether a hook or wrapper sees or changes what passes through ``forward``."""
    # Not `vars(self)`, which the compiler of PyTorch 2.6 does not support.
    hooks = watched._forward_hooks, watched._forward_pre_hooks, *_EVERY_MODULES_HOOKS
    return "forward" in watched.__dict__ or any(hooks)
