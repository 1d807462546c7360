# Needs: cli.py, resnet32.py, stacked.py, stacked_kernels.py.
"""Training steps with data, order and learning rates on the device: one CUDA graph, no wait.

A step reads its number on the device, and from tables there its images and learning rate. So the same
recording works for every step. It also augments the images of the next step: many small kernels, which a GPU
runs in parallel with those of the networks. On a CPU the steps run without a recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from stacked import SeparateNetworks, StackedNetworks
from torch import Tensor, nn

#: Number of test images at once.
EVALUATED_AT_ONCE = 2000


class DeviceSGD:
    """:class:`torch.optim.SGD` with Nesterov momentum and a learning rate on the device.

    Low-precision weights are rounded copies of the weights that are trained.

    Args:
        net: network to train.
        dtype: dtype of the convolutions' weights.
        momentum: factor of earlier gradients; 0 for none.
        weight_decay: weight decay of all parameters.
    """

    def __init__(
        self,
        net: StackedNetworks | SeparateNetworks,
        dtype: torch.dtype,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
    ) -> None:
        self.parameters = list(net.parameters())
        exact = [parameter.detach().clone() for parameter in self.parameters]
        net.lower(dtype)
        pairs = list(zip(self.parameters, exact, strict=True))
        self.lowered = [i for i, (parameter, weight) in enumerate(pairs) if parameter.dtype != weight.dtype]
        self.weights = [weight if i in self.lowered else p.detach() for i, (p, weight) in enumerate(pairs)]
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]
        self.gradients = [torch.zeros_like(exact[i]) for i in self.lowered]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """Update the parameters by their gradients, which are overwritten.

        Args:
            rate: the learning rate, a scalar.
        """
        gradients: list[Any] = [parameter.grad for parameter in self.parameters]
        if self.lowered:
            torch._foreach_copy_(self.gradients, [gradients[i] for i in self.lowered])
            for i, gradient in zip(self.lowered, self.gradients, strict=True):
                gradients[i] = gradient

        torch._foreach_add_(gradients, self.weights, alpha=self.weight_decay)
        torch._foreach_mul_(self.momenta, self.momentum)
        torch._foreach_add_(self.momenta, gradients)
        torch._foreach_add_(gradients, self.momenta, alpha=self.momentum)
        torch._foreach_mul_(gradients, rate)
        torch._foreach_sub_(self.weights, gradients)
        if self.lowered:
            weights = [self.weights[i] for i in self.lowered]
            torch._foreach_copy_([self.parameters[i].detach() for i in self.lowered], weights)


class Tables(NamedTuple):
    """The values that the steps of a run read, on the device.

    Attributes:
        images: uint8 ``[N, 3, H, W]``.
        targets: classes of the images, int64 ``[N]``.
        order: the images of every step, and one more row, int64 ``[steps + 1, B]``.
        rates: learning rate of every step, float32 ``[steps]``.
    """

    images: Tensor
    targets: Tensor
    order: Tensor
    rates: Tensor


class Steps:
    """The steps of all runs together.

    Args:
        net: networks of the runs, on the device.
        criteria: the loss of every run.
        optimizer: optimizer of the networks' parameters.
        augment: makes normalised images from uint8 ones, with the device's default generator.
        tables: data, order and learning rates.
        steps_per_epoch: the losses are summed by epoch.
    """

    def __init__(
        self,
        net: StackedNetworks | SeparateNetworks,
        criteria: Sequence[nn.Module],
        optimizer: DeviceSGD,
        augment: Callable[[Tensor], Tensor],
        tables: Tables,
        steps_per_epoch: int,
    ) -> None:
        self.net, self.criteria, self.optimizer = net, criteria, optimizer
        self.augment, self.tables, self.steps_per_epoch = augment, tables, steps_per_epoch
        device = tables.images.device
        epochs = -(-len(tables.rates) // steps_per_epoch)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(len(criteria), device=device)
        self.sums = torch.zeros(epochs, len(criteria), device=device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.images, self.target = self._batch(self.step)
        self.graph: torch.cuda.CUDAGraph | None = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, on the device."""
        optimizer = self.optimizer
        named = {"weight": optimizer.weights, "momentum": optimizer.momenta, "buffer": self.net.buffers()}
        tensors = {f"{name} {i}": tensor for name, group in named.items() for i, tensor in enumerate(group)}
        lowered = {f"lowered {i}": optimizer.parameters[i].detach() for i in optimizer.lowered}
        own = {name: getattr(self, name) for name in ("step", "losses", "sums", "images", "target")}
        return {**tensors, **lowered, **own}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the values of :meth:`state`, in the memory that a recording uses."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def record(self) -> None:
        """Record a step as a CUDA graph; afterwards only the random state has changed."""
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.backends.cudnn.benchmark = True
        try:
            with torch.cuda.stream(stream):  # libraries choose and compile kernels before the recording
                for debugging in ("default", "default", "error"):
                    # Report operations that wait here: they would break a recording and everything after it.
                    torch.cuda.set_sync_debug_mode(debugging)
                    self.step.zero_()
                    self.run()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that pin memory, may go on allocating.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.backends.cudnn.benchmark = False
        self.graph = graph
        self.restore(before)

    def advance(self) -> None:
        """Do a step; on a GPU it may still run when this returns."""
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    @torch.no_grad()
    def prime(self) -> None:
        """Augment the images of the next step again; a step does this for the step after it."""
        images, target = self._batch(self.step)
        self.images.copy_(images)
        self.target.copy_(target)

    @torch.no_grad()
    def _batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        index = self.tables.order.index_select(0, step).squeeze(0)
        images = self.augment(self.tables.images.index_select(0, index))
        return images, self.tables.targets.index_select(0, index)

    def run(self) -> None:
        """Do a step without a recording; no operation waits for the device."""
        if self.side is None:
            following = self._batch(self.step + 1)
            self._learn()
        else:
            here = torch.cuda.current_stream()
            self.side.wait_stream(here)
            with torch.cuda.stream(self.side):
                following = self._batch(self.step + 1)
            self._learn()
            here.wait_stream(self.side)

        self.images.copy_(following[0])
        self.target.copy_(following[1])
        self.step.add_(1)

    def _learn(self) -> None:
        """Update the parameters by the current batch."""
        for parameter in self.optimizer.parameters:
            parameter.grad = None  # the gradients of a recording are in its own memory
        logits = self.net(self.images)
        losses = [criterion(v, self.target) for criterion, v in zip(self.criteria, logits, strict=True)]
        total = torch.stack(losses)
        total.sum().backward()
        self.optimizer.step(self.tables.rates.index_select(0, self.step).squeeze(0))

        self.losses.copy_(total.detach())
        self.sums.index_add_(0, self.step // self.steps_per_epoch, self.losses[None])

    def trial(self, number: int) -> tuple[list[list[float]], float]:
        """Measure the losses of the first two steps, and the time of a step; then restore everything.

        The random numbers start again, so every form of the networks has the same losses.
        """
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        torch.manual_seed(0)
        self.step.zero_()
        self.prime()
        losses = []
        for _ in range(2):
            self._advance_first()
            losses.append(self.losses.tolist())
        self._wait()
        begun = time.perf_counter()
        for _ in range(number):
            self._advance_first()
        self._wait()
        seconds = (time.perf_counter() - begun) / number
        self.restore(before)
        return losses, seconds

    def _advance_first(self) -> None:
        """Do the first step again, because a short run has no others."""
        self.step.zero_()
        self.advance()

    def _wait(self) -> None:
        if self.step.is_cuda:
            torch.cuda.synchronize()

    @torch.no_grad()
    def logits(self, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The logits ``[N, K, C]`` of every run for images, on the CPU.

        Args:
            images: uint8 ``[N, 3, H, W]``.
            prepare: makes normalised images from them.
        """
        self.net.eval()
        parts = [self.net(prepare(part)) for part in images.split(EVALUATED_AT_ONCE)]
        self.net.train()
        return [torch.cat(run).float().cpu() for run in zip(*parts, strict=True)]
