# Needs no other file.
"""Training passes as CUDA graphs: for a small network, launching kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GraphedPass:
    """Forward and backward pass, recorded once for every shape of a batch and then replayed.

    Gradients are set to zero inside the recording and never replaced, so that the recordings of all shapes
    write into the same tensors.

    Args:
        run: computes the loss of a batch on the device and adds its gradients; it must not wait for the
            device.
        model: the model that ``run`` trains. The warm-up of a recording does not change its buffers.
    """

    def __init__(self, run: Callable[[list[Tensor], Tensor], Tensor], model: nn.Module) -> None:
        self.run = run
        self.model = model
        self.recordings: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool: Any = None

    def __call__(self, inputs: list[Tensor], target: Tensor) -> Tensor:
        """Compute the loss of a batch; the parameters' gradients are those of this batch only."""
        batch = [*inputs, target]
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in self.recordings:
            self.recordings[shapes] = self._record(batch)
        graph, static, loss = self.recordings[shapes]
        for memory, tensor in zip(static, batch, strict=True):
            memory.copy_(tensor, non_blocking=True)
        graph.replay()
        return loss.clone()

    def _record(self, batch: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        static = [tensor.clone() for tensor in batch]
        for parameter in self.model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        before = [buffer.clone() for buffer in self.model.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose kernels and allocate before the recording
            for _ in range(3):
                self._run_again(static)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # The thread that pins batches allocates at the same time, which the mode "global" forbids.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self._run_again(static)
        self.pool = graph.pool()
        return graph, static, loss

    def _run_again(self, batch: list[Tensor]) -> Tensor:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        *inputs, target = batch
        return self.run(inputs, target)
