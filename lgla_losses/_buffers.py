"""Constant tensors that move with a module and that operations on the module do not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lgla_losses._checks import describe
from lgla_losses._torch import DisableTorchFunctionSubclass


class ConstantBuffers(nn.Module):
    """Keep the constants of a module exact, whatever happens to its buffers.

    Every constant exists twice: as a buffer, which others see, and as an exact copy, which the module
    computes with. The buffers follow ``.to(device)`` and are part of the ``state_dict``. But casts of a model
    round buffers, averages of its weights (EMA, SWA) truncate integers, and ``to_empty`` and
    ``from_pretrained`` leave buffers empty. If the loss were computed with the buffers, each of these would
    silently change it.

    New constants may also come from outside: from a ``state_dict``, from a loader that assigns them, or from
    DDP, which writes those of rank 0. The module takes them if they fit each other, which a subclass checks
    in :meth:`_restored`.
    """

    #: Attributes that other constants follow from, so that they cannot be assigned.
    read_only: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}
        #: The buffers as this class made them, and the number of writes to them at that time.
        self._shown: dict[str, Tensor] = {}
        self._writes: dict[str, int] = {}
        #: Tensors that a loader has assigned and that are not used yet.
        self._assigned: dict[str, Tensor] = {}
        #: Whether writes on a device that must be waited for have been checked.
        self._looked = False

    def constant(self, name: str) -> Tensor:
        """Give a constant on the device of the module. It is for reading only: do not write into it.

        If :func:`torch.func.functional_call` has replaced it by a tensor, give that tensor.
        """
        buffer: Tensor = self._buffers[name]  # type: ignore[assignment]
        if buffer is not self._shown[name]:
            return buffer
        if torch.compiler.is_compiling():
            if is_exporting():
                return buffer
        elif buffer._version != self._writes[name] or (self._assigned and not buffer.is_meta):
            # On meta some may not be assigned yet: transformers looks at each before it assigns it.
            self._take_from_outside(name)
        exact = self._exact[name]
        if exact.device != buffer.device:  # FSDP moves buffers itself
            with torch.inference_mode(False):
                exact = exact.to(buffer.device)
            if not buffer.is_meta:
                self._exact[name] = exact = _fixed(exact)
        return exact

    def on_cpu(self, name: str) -> Tensor:
        """Give a constant on the CPU, for reading. This also works for a module on the meta device."""
        self._take_from_outside(name)
        return self._exact[name].cpu()

    def _read(self, name: str) -> Tensor:
        """Give a constant to a user: a copy that raises on a write."""
        return read_only(self.constant(name).detach().clone())

    def _keep(self, name: str, value: Tensor) -> None:
        """Set a constant; reuse the memory of the old one if shape and dtype are the same."""
        exact = self._exact.get(name)
        device = torch.get_default_device() if exact is None else self._shown[name].device
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could never be written again
            if exact is not None and (exact.shape, exact.dtype) == (value.shape, value.dtype):
                exact.copy_(value)
            else:
                self._exact[name] = _fixed(value.to("cpu" if device.type == "meta" else device, copy=True))
        self._show(name, device)

    def _show(self, name: str, device: torch.device) -> None:
        """Copy a constant into its buffer; reuse the buffer's memory if it fits."""
        exact, shown = self._exact[name], self._shown.get(name)
        with torch.inference_mode(False), torch.no_grad():
            kind = exact.shape, exact.dtype, device
            if shown is None or shown.is_inference() or (shown.shape, shown.dtype, shown.device) != kind:
                shown = exact.to(device, copy=True)
            elif not shown.is_meta:
                shown.copy_(exact)
        self._buffers[name] = self._shown[name] = shown
        self._writes[name] = shown._version

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for part in self._parts():
            # Some loaders, such as that of accelerate, put tensors here themselves.
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer is not part._shown.get(name):
                    part._assigned = {**part._exact, **part._assigned, name: buffer}
        for name in self._exact:
            self._take_from_outside(name)
        super()._apply(lambda t: moved(t, fn), recurse)  # type: ignore[no-untyped-call]
        self._looked = False
        for name, exact in self._exact.items():
            own: Tensor = self._buffers[name]  # type: ignore[assignment]
            self._shown[name] = own
            if not own.is_meta:
                with torch.inference_mode(False):
                    self._exact[name] = _fixed(exact.to(own.device, own.dtype))
                self._show(name, own.device)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        shown = self.__dict__.get("_shown", {}).get(name)
        if shown is None and (name not in self.read_only or name not in self._modules):
            super().__setattr__(name, value)  # type: ignore[arg-type]
        elif shown is not None and shown.is_meta and isinstance(value, Tensor):
            # This is how transformers fills a model on the meta device: with loaded tensors, which it marks,
            # or with memory without values.
            if hasattr(value, "_is_hf_initialized"):
                self._assigned[name] = value
            self._show(name, value.device)
        else:
            refuse_assignment(name)

    def _take_from_outside(self, name: str) -> None:
        """Take constants that a loader has assigned, or that something has written into the buffers.

        Raises:
            ValueError: the constants that a loader assigned differ from those given to the constructor.
        """
        if self._assigned and self._exact.keys() - self._inferred() <= self._assigned.keys():
            assigned, self._assigned = self._assigned, {}
            try:
                self._keep_all(self.restored_from(assigned, ""))
            except (TypeError, ValueError):
                self._assigned = assigned  # so that the next call raises too
                raise
            for own, value in assigned.items():
                if self._shown[own].is_meta:
                    self._show(own, value.device)
        shown = self._shown[name]
        if shown._version == self._writes[name] or shown.is_meta:
            return
        if shown.device.type != "cpu":
            recorded = shown.is_cuda and torch.cuda.is_current_stream_capturing()
            if self._looked or recorded:
                return
            self._looked = True
        self._take_what_is_written()

    def _take_what_is_written(self) -> None:
        """Take the values written into the buffers if they are a full set, as DDP writes that of rank 0.

        Averaging of weights writes values that do not fit each other, or that differ only by rounding. Then
        the constants do not change.
        """
        written = {name: buffer.detach().clone() for name, buffer in self.named_buffers()}
        for part in self._parts():
            for name, shown in part._shown.items():
                part._show(name, shown.device)
        same = [same_constants(written[name], exact) for name, exact in self._exact.items()]
        if not all(same):
            with suppress(RuntimeError):
                self.load_state_dict(written)

    def _parts(self) -> list[ConstantBuffers]:
        """List this module and the modules in it that hold constants."""
        return [module for module in self.modules() if isinstance(module, ConstantBuffers)]

    def _keep_all(self, constants: Mapping[str, Tensor]) -> None:
        for name, value in constants.items():
            self._keep(name, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            # Copies, because averaging of weights writes into the state_dict.
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
        self._non_persistent_buffers_set.update(self._exact)  # PyTorch must not load these
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *report)
        finally:
            self._non_persistent_buffers_set.difference_update(self._exact)
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]

        state = {name: state_dict[key] for key, name in own.items() if key in state_dict}
        if strict:
            missing_keys += [key for key, n in own.items() if n not in state and n not in self._inferred()]
        if not any(key.startswith(prefix) for key in state_dict):
            return
        if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
            return
        try:
            self._keep_all(self.restored_from(state_dict, prefix))
        except (TypeError, ValueError) as problem:
            error_msgs.append(f"{prefix}{problem}")
            # Load no parts of this module either: they would not fit each other.
            for key, value in self.state_dict(prefix=prefix).items():
                if key in state_dict:
                    state_dict[key] = value
            return
        for name in state:
            if local_metadata.get("assign_to_params_buffers") and self._shown[name].is_meta:
                self._show(name, state[name].device)

    def _inferred(self) -> frozenset[str]:
        """Name the constants that a state may lack, because they follow from the others."""
        return frozenset()

    def restored_from(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        """Read the constants of a ``state_dict``. Missing ones keep their values."""
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

    def _restored(
        self, state: dict[str, Tensor], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Tensor]:
        """Compute all constants from those that a state holds.

        Args:
            state: this module's constants that the state holds, on the CPU.
            state_dict: all of the state.
            prefix: the start of this module's names in ``state_dict``.

        Raises:
            ValueError: they differ from those given to the constructor.
        """
        raise NotImplementedError

    def _current(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        """Give a constant from a state; if the state lacks it, give the current one."""
        return state[name] if name in state else self.on_cpu(name)


#: Names of the tensor methods that change the tensor.
IN_PLACE = frozenset(
    {"__setitem__", "__set__", "__delitem__"}
    | {name for name in dir(Tensor) if name[-1] == "_" != name[0] or name.startswith("__i")}
) - {"__index__", "__init__", "__init_subclass__", "__int__", "__invert__", "__iter__"}


def read_only(value: Tensor) -> Tensor:
    """Give a tensor that raises on a write; inside a compiler, give a plain tensor."""
    return value if torch.compiler.is_compiling() else value.as_subclass(ReadOnlyTensor)


class ReadOnlyTensor(Tensor):
    """Hold a copy of a constant, and raise on a write.

    Results computed from it are plain tensors.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = kwargs.get("out")
        if args and (func.__name__ in IN_PLACE or func.__name__.startswith("_foreach")):
            written = args[0]
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            written = args[0]
        for tensor in written if isinstance(written, tuple | list) else (written,):
            if isinstance(tensor, cls):
                raise ValueError(
                    f"{func.__name__}: expected a tensor to write into, got a read-only constant of a loss; "
                    "change class counts and tau with set_adjustment(), or get your own tensor with "
                    ".clone()"
                )
        with DisableTorchFunctionSubclass():
            plain = [value.as_subclass(Tensor) if isinstance(value, cls) else value for value in args]
            return func(*plain, **kwargs)


def refuse_assignment(name: str) -> None:
    """Raise for an assignment to an attribute that other constants follow from."""
    raise AttributeError(
        f"{name}: expected no assignment to this read-only value, from which other constants follow, got "
        "one; change class counts and tau with set_adjustment() of the loss, or construct a new loss"
    )


def is_exporting() -> bool:
    """Say whether :func:`torch.export.export` is running; it identifies tensors by buffer names."""
    # PyTorch 2.6 has no such function.
    return torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", lambda: False)()


def _fixed(tensor: Tensor) -> nn.Parameter:
    """Make a tensor whose shape compilers treat as fixed, like the shape of a buffer.

    It is an unregistered ``Parameter``, so that module trees do not contain it.
    """
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def scalar(number: float) -> Tensor:
    """Make a float64 scalar on the CPU, whatever the default device is."""
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def same_constants(actual: Tensor, expected: Tensor) -> bool:
    """Say whether two constants agree to the precision of ``actual``, at most that of float32.

    MPS has no wider dtype than float32.
    """
    digits = max(1e-5, 2 * torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0)
    return torch.allclose(actual.double(), expected.double(), rtol=digits, atol=digits)


def moved(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Move a buffer to the device of ``fn``, but keep its precision."""
    try:
        there = fn(buffer)
    except TypeError:
        # Apple's MPS has no float64; float32 is its full precision.
        return fn(buffer.float())
    return there if there.dtype == buffer.dtype else buffer.to(there.device)


def unregister(module: nn.Module, child: str) -> None:
    """Remove a child from the module's tree, but keep it as a plain attribute."""
    module.__dict__[child] = module._modules.pop(child)
