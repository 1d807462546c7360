"""What PyTorch tells by private names only. A test holds every name to what it is used for here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass, _functorch
from torch.nn.modules import module

__all__ = [
    "DisableTorchFunctionSubclass",
    "is_being_traced",
    "is_mapped",
    "is_watched",
    "is_wrapped",
    "takes_forward_derivatives",
    "values_readable",
]

_EVERY_MODULES_HOOKS = module._global_forward_hooks, module._global_forward_pre_hooks


def is_being_traced() -> bool:
    """Say whether :func:`torch.jit.trace`, or a mode as that of ``make_fx``, watches every operation."""
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0


def takes_forward_derivatives() -> bool:
    """Say whether forward-mode derivatives are on."""
    return torch.autograd.forward_ad._current_level >= 0


def is_wrapped(tensor: Tensor) -> bool:
    """Say whether a tensor stands for another in a transform of :mod:`torch.func`."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def is_mapped() -> bool:
    """Say whether :func:`torch.vmap` maps a function over a batch, whose values have no number each."""
    if _functorch.peek_interpreter_stack() is None:
        return False
    vmap = _functorch.TransformType.Vmap
    return any(level.key() == vmap for level in _functorch.get_interpreter_stack())


def values_readable(tensor: Tensor, validate_args: bool | None) -> bool:
    """Say whether checks may read values: ``None`` means on the CPU and outside a compiler.

    Where nobody can, on the meta device and under :func:`torch.vmap`, they do not.
    """
    if torch.compiler.is_compiling():
        return validate_args is True
    if validate_args is False or tensor.is_meta or is_mapped():
        return False
    return validate_args is True or tensor.device.type == "cpu"


def is_watched(watched: nn.Module) -> bool:
    """Say whether somebody looks at, or changes, what passes through ``forward``."""
    # Not `vars(self)`, which the compiler of PyTorch 2.6 does not know.
    hooks = watched._forward_hooks, watched._forward_pre_hooks, *_EVERY_MODULES_HOOKS
    return "forward" in watched.__dict__ or any(hooks)
