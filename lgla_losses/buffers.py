"""Constant tensors that travel with a module, and that nothing done to the module changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lgla_losses.checks import describe


class ConstantBuffers(nn.Module):
    """A module whose constants are buffers to everybody else, and exact whatever happens to these.

    They follow ``.to(device)`` and stand in the ``state_dict``. But casts of a model round buffers, averages
    of its weights (EMA, SWA) truncate integers, ``to_empty`` and ``from_pretrained`` leave them empty, and
    each of these would silently change the loss. So every constant is there twice: as the buffer that others
    see, and exact, for what computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}
        #: The buffers as this class made them; another one in their place is somebody's on purpose.
        self._shown: dict[str, Tensor] = {}

    def constant(self, name: str) -> Tensor:
        """A constant on the device of the module, for reading: nothing may be written into it.

        Where :func:`torch.func.functional_call` puts a tensor in its place, that tensor.
        """
        buffer: Tensor = self._buffers[name]  # type: ignore[assignment]
        if buffer is not self._shown[name]:
            return buffer
        exact = self._exact[name]
        if exact.device != buffer.device:  # FSDP moves buffers by itself
            exact = exact.to(buffer.device)
            if not buffer.is_meta:
                self._exact[name] = exact = _fixed(exact)
        return exact

    def on_cpu(self, name: str) -> Tensor:
        """A constant on the CPU, for reading; also of a module on the meta device."""
        return self._exact[name].cpu()

    def _read(self, name: str) -> Tensor:
        """A constant as users read it: a copy that refuses to be written into."""
        copied = self.constant(name).detach().clone()
        return copied if torch.compiler.is_compiling() else copied.as_subclass(ReadOnlyTensor)

    @torch.no_grad()
    def _keep(self, name: str, value: Tensor) -> None:
        """Set a constant, in the memory of the one before where it fits."""
        exact = self._exact.get(name)
        device = torch.get_default_device() if exact is None else self._shown[name].device
        if exact is not None and (exact.shape, exact.dtype) == (value.shape, value.dtype):
            exact.copy_(value)
        else:
            with torch.inference_mode(False):  # its tensors could never be written again
                self._exact[name] = _fixed(value.to("cpu" if device.type == "meta" else device, copy=True))
        self._show(name, device)

    def _show(self, name: str, device: torch.device) -> None:
        self._buffers[name] = self._shown[name] = self._exact[name].to(device, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda t: moved(t, fn), recurse)  # type: ignore[no-untyped-call]
        for name, exact in self._exact.items():
            buffer: Tensor = self._buffers[name]  # type: ignore[assignment]
            self._shown[name] = buffer
            if not buffer.is_meta:
                self._exact[name] = _fixed(exact.to(buffer.device, buffer.dtype))
                self._show(name, buffer.device)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        shown = self.__dict__.get("_shown", {}).get(name)
        if shown is None:
            super().__setattr__(name, value)  # type: ignore[arg-type]
        elif shown.is_meta and isinstance(value, Tensor):
            # Loaders fill a model of the meta device so, with what they have or with empty memory.
            self._show(name, value.device)
        else:
            raise AttributeError(
                f"{name}: expected it to be read only, as other constants follow from it, got an assignment; "
                "set_adjustment() of the loss changes class counts and tau, or construct it anew"
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            # Copies, as averages of a model's weights are written into its state_dict.
            destination.update({prefix + name: self.constant(name).detach().clone() for name in self._exact})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + name: name for name in self._exact}
        report = missing_keys, unexpected_keys, error_msgs
        self._non_persistent_buffers_set.update(self._exact)  # those are not for PyTorch to load
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *report)
        self._non_persistent_buffers_set.difference_update(self._exact)
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]

        state = {name: state_dict[key] for key, name in own.items() if key in state_dict}
        if strict:
            missing_keys += [key for key, n in own.items() if n not in state and n not in self._inferred()]
        if not state or any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
            return
        try:
            restored = self.restored_from(state_dict, prefix)
        except (TypeError, ValueError) as problem:
            error_msgs.append(f"{prefix}{problem}")
            self._keep_all(state_dict, prefix)
            return

        for name, value in restored.items():
            self._keep(name, value)
            if local_metadata.get("assign_to_params_buffers") and self._shown[name].is_meta and name in state:
                self._show(name, state[name].device)

    def _keep_all(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Let a state change nothing of this module's parts either, which would not fit each other."""
        for key, value in self.state_dict(prefix=prefix).items():
            if key in state_dict:
                state_dict[key] = value

    def _inferred(self) -> frozenset[str]:
        """Constants that a state may lack, as they follow from the others."""
        return frozenset()

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        """The constants that a state stands for.

        Args:
            state: this module's constants that the state holds, on the CPU.
            state_dict: all of the state.
            prefix: of this module's names there.

        Raises:
            ValueError: they are not what the constructor was given.
        """
        raise NotImplementedError

    def _current(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        """A constant as a state has it, or else as it is."""
        return state[name] if name in state else self.on_cpu(name)

    def restored_from(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        """Read the constants of a ``state_dict``, or those that are here where it has none."""
        state = {name: state_dict[prefix + name] for name in self._exact if prefix + name in state_dict}
        for name, value in state.items():
            expected = list(self._exact[name].shape)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
            if list(value.shape) != expected:
                raise ValueError(
                    f"{name}: size mismatch, expected shape {expected}, got {list(value.shape)}; construct "
                    "the loss for as many classes and experts as the saved one"
                )
        return self._restored({n: v.detach().cpu() for n, v in state.items()}, state_dict, prefix)


class ReadOnlyTensor(Tensor):
    """A copy of a constant; writing into it is an error, and what is computed from it are plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        in_place = name in ("__setitem__", "__set__") or name.rstrip("_") + "_" == name
        written = kwargs.get("out", args[0] if in_place and args else None)
        if isinstance(written, cls):
            raise TypeError(
                f"{name}: expected a tensor to write into, got a read-only constant of a loss; its "
                "set_adjustment() changes class counts and tau, and .clone() gives a tensor of your own"
            )
        with torch._C.DisableTorchFunctionSubclass():
            plain = [value.as_subclass(Tensor) if isinstance(value, cls) else value for value in args]
            return func(*plain, **kwargs)


def _fixed(tensor: Tensor) -> nn.Parameter:
    """A tensor whose shape compilers take for fixed, as that of a buffer; module trees do not see it."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def scalar(number: float) -> Tensor:
    """A float64 scalar on the CPU, whatever the default device."""
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def same_constants(actual: Tensor, expected: Tensor) -> bool:
    """Whether they agree to the digits of float32, in which Apple's MPS keeps them."""
    return torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def moved(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Where ``fn`` takes the buffer, but in its own precision."""
    try:
        there = fn(buffer)
    except TypeError:
        # Apple's MPS has no float64; float32 is the full precision there.
        return fn(buffer.float())
    return there if there.dtype == buffer.dtype else buffer.to(there.device)


def unregister(module: nn.Module, child: str) -> None:
    """Keep a child as a plain attribute, where it is no part of the module's tree or stands there already."""
    module.__dict__[child] = module._modules.pop(child)
