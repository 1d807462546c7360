"""PyTorch's private names: they stand in one module, and tell there what they are used for."""

import re
from pathlib import Path

import torch
from torch import nn

import lgla_losses
from lgla_losses import _torch

PACKAGE = Path(lgla_losses.__file__).parent
#: Names that begin with an underscore, behind torch or its parts.
PRIVATE = re.compile(
    r"\btorch(?:\.\w+)*\._\w+|from torch(?:\.\w+)*(?:\._\w+)+ import|\b_functorch\b|_global_forward"
)
#: `torch._assert` is an operation of traced graphs.
KNOWN = {"torch._assert"}


def test_private_names_stand_in_one_module():
    found = {
        (path.name, name)
        for path in PACKAGE.rglob("*.py")
        for name in PRIVATE.findall(path.read_text(encoding="utf-8"))
        if name not in KNOWN
    }
    assert {file for file, _ in found} == {"_torch.py"}, found


def test_a_mode_that_watches_every_operation_is_seen():
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    seen = []
    with Mode():
        seen.append(_torch.unfit(torch.ones(1)))
    torch.jit.trace(lambda x: (seen.append(_torch.unfit(torch.ones(1))), x)[1], torch.ones(1))
    assert seen[0] == seen[1] == "operations are being traced"
    assert _torch.unfit(torch.ones(1)) is None


def test_forward_mode_derivatives_are_seen():
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in _torch.unfit(torch.ones(1))


def test_tensors_in_transforms_are_seen():
    seen = []

    def look(x):
        seen.append((_torch.is_wrapped(x), _torch.is_mapped(), _torch.unfit(x)))
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    assert [wrapped for wrapped, *_ in seen] == [True, True]
    assert [mapped for _, mapped, _ in seen] == [True, False]
    assert all("torch.func" in why for *_, why in seen)


def test_batched_gradients_are_seen():
    """As those of ``torch.autograd.grad(..., is_grads_batched=True)``."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            seen.append(_torch.unfit(upstream))
            return upstream

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Look.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert all("torch.func" in why for why in seen)
    assert seen


def test_hooks_on_a_module_are_seen():
    module = nn.Identity()
    assert not _torch.is_watched(module)
    handle = module.register_forward_hook(lambda *_: None)
    assert _torch.is_watched(module)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert _torch.is_watched(module)
    handle.remove()
    module.forward = lambda x: x
    assert _torch.is_watched(module)
