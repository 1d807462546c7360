# Needs: cli.py, resnet32.py, stacked_kernels.py.
"""Several runs of the paper's ResNet-32 as one network: R runs of K experts, computed together.

The methods of one seed share the order and the augmentation of their images, so their networks can be placed
side by side in the channels: the trunk has one branch per run, the later stages one branch per expert. A
small network leaves a GPU idle; this one does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cli import library
from resnet32 import BasicBlock, ResNet32
from torch import Tensor, nn

from lgla_losses import ExpertOutput
from lgla_losses.functional import unit_vectors

#: Channels of a branch that go into each stage.
WIDTHS = (16, 16, 32)


class Form(NamedTuple):
    """How the branches are computed; the result is the same.

    Attributes:
        tensor: most channels of the branches that share a tensor; None for all.
        group: most channels of the branches that share a group of a convolution, with zeros between them:
            more to compute, but hardware is faster with wide groups. None for one branch per group.
        streams: run each tensor of a stage on its own stream.
        separate: keep the networks separate, each on its own stream.
        fused: in training, compute a batch norm and the operations after it by kernels of stacked_kernels.py.
        own: in training, also compute a convolution by kernels of stacked_kernels.py, if they are faster.
        compiled: in training, let torch.compile fuse the operations around the convolutions.
    """

    tensor: int | None = None
    group: int | None = None
    streams: bool = False
    separate: bool = False
    fused: bool = False
    own: bool = False
    compiled: bool = False

    def shares(self, branches: int, width: int) -> list[int]:
        """Number of branches of a width in each tensor."""
        number = 1 if self.tensor is None else -(-branches // max(1, self.tensor // width))
        ends = [i * branches // number for i in range(number + 1)]
        return [last - first for first, last in pairwise(ends)]

    def merged(self, branches: int, width: int) -> int:
        """Number of a tensor's branches in a group of its convolutions."""
        most = 1 if self.group is None else max(1, self.group // width)
        return -(-branches // -(-branches // most))


#: Forms by name. The first is plain PyTorch; the others must give its losses, the more promising ones first.
FORMS = {
    "grouped": Form(),
    "kernels": Form(fused=True, own=True),
    "grouped-fused": Form(fused=True),
    "separate": Form(separate=True),
    "grouped-128-fused": Form(group=128, fused=True),
    "dense-streams": Form(tensor=1, streams=True),
    "grouped-64-fused": Form(group=64, fused=True),
    "grouped-64": Form(group=64),
    "tensors-64": Form(tensor=64, group=64),
    "tensors-128": Form(tensor=128, group=128),
    "dense": Form(tensor=1),
    "block-diagonal": Form(group=2**16),
}


def kernels() -> Any:
    """The module of the kernels, which needs Triton."""
    return library("stacked_kernels", "triton")


class Convolution(nn.Module):
    """The 3x3 convolutions of several branches, side by side in the channels.

    Args:
        layers: one per branch, all of one shape.
        merged: branches that share a group, with weights 0 between branches; it must divide their number.
        shared: all branches see the same input.
        own: in training, compute it by kernels of stacked_kernels.py, if they are faster.

    Shape:
        - input: ``[N, g * I, H, W]``, or shared ``[N, I, H, W]``, in channels-last format
        - output: ``[N, g * O, H / stride, W / stride]``, in channels-last format
    """

    diagonal: Tensor

    def __init__(
        self, layers: Sequence[nn.Conv2d], *, merged: int = 1, shared: bool = False, own: bool = False
    ) -> None:
        super().__init__()
        # In the order of channels-last memory, so that no form must convert it: [g, O, 3, 3, I].
        weights = [layer.weight.detach().permute(0, 2, 3, 1) for layer in layers]
        self.weight = nn.Parameter(torch.stack(weights))
        self.stride, self.merged = layers[0].stride, merged
        self.groups = 1 if shared else len(layers) // merged
        self.by_kernel = own and merged == 1 and not shared
        self.register_buffer("diagonal", torch.eye(merged).to(self.weight), persistent=False)

    def lower(self, dtype: torch.dtype) -> None:
        """Round the weights."""
        self.weight.data, self.diagonal = self.weight.data.to(dtype), self.diagonal.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The feature maps of all branches."""
        weight: Tensor = self.weight
        if self.by_kernel and self.training:
            y: Tensor = kernels().grouped_convolution(x, weight, self.stride[0])
            return y
        inputs, m = self.merged * weight.shape[-1], self.merged
        if m > 1:
            # [groups, m, O, 3, 3, m, I], one of the two m is the branch of the input.
            own = weight.unflatten(0, (-1, m)).unsqueeze(5)
            weight = self.diagonal.view(1, m, 1, 1, 1, m, 1) * own
        weight = weight.reshape(-1, 3, 3, inputs).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, None, self.stride, 1, 1, self.groups)


class Norm(nn.Module):
    """The batch norms of several branches, with the operations after them; channels are independent."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layers: Sequence[nn.BatchNorm2d], fused: bool) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.cat([getattr(layer, name).detach() for layer in layers]))
            for name in ("weight", "bias")
        )
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.cat([getattr(layer, name) for layer in layers]))
        self.momentum, self.eps = layers[0].momentum or 0.1, layers[0].eps
        self.fused = fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The normalised channels, plus ``residual`` if there is one, rectified."""
        statistics = self.running_mean, self.running_var
        if self.fused and self.training:
            y: Tensor = kernels().norm_relu(
                x, residual, self.weight, self.bias, *statistics, self.momentum, self.eps
            )
            return y
        y = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.relu(y if residual is None else y + residual)


class StackedBlock(nn.Module):
    """The blocks of several branches; see :class:`BasicBlock`."""

    def __init__(self, blocks: Sequence[BasicBlock], merged: int, form: Form) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            Convolution([getattr(block, name) for block in blocks], merged=merged, own=form.own)
            for name in ("conv1", "conv2")
        )
        self.bn1, self.bn2 = (
            Norm([getattr(block, name) for block in blocks], form.fused) for name in ("bn1", "bn2")
        )
        self.branches, self.stride, self.padding = len(blocks), blocks[0].stride, blocks[0].padding
        maps: Any = torch.compile(self._maps, dynamic=False) if form.compiled else self._maps
        self.in_training: Callable[[Tensor], Tensor] = maps

    def forward(self, x: Tensor) -> Tensor:
        """The blocks' feature maps."""
        return self.in_training(x) if self.training else self._maps(x)

    def _maps(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), self._shortcut(x))
        return y

    def _shortcut(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        if self.padding == 0:
            return x
        # Pad the channels of every branch, not those of all together.
        last = x.permute(0, 2, 3, 1).unflatten(3, (self.branches, -1))
        return F.pad(last, (self.padding, self.padding)).flatten(3).permute(0, 3, 1, 2)


def side_by_side(calls: Sequence[Callable[[], Tensor]], streams: Sequence[torch.cuda.Stream]) -> list[Tensor]:
    """Run the calls, each on the next stream, or one after another without streams."""
    if not streams:
        return [call() for call in calls]
    here, results = torch.cuda.current_stream(), []
    for stream in streams:
        stream.wait_stream(here)
    for i, call in enumerate(calls):
        with torch.cuda.stream(streams[i % len(streams)]):
            results.append(call())
    for stream in streams:
        here.wait_stream(stream)
    return results


def make_bundles(branches: list[Any], form: Form) -> tuple[nn.ModuleList, list[list[int]]]:
    """A chain of blocks for every tensor of a stage, and the branches that each computes.

    If a convolution's groups are not full, copies of the last branch fill them; their output is not used.
    """
    width = branches[0][0].conv1.out_channels
    bundles, members, first = nn.ModuleList(), [], 0
    for number in form.shares(len(branches), width):
        own = list(range(first, first := first + number))
        merged = form.merged(number, width)
        own += own[-1:] * (-number % merged)
        chains = zip(*(branches[i] for i in own), strict=True)
        bundles.append(nn.Sequential(*(StackedBlock(blocks, merged, form) for blocks in chains)))
        members.append(own)
    return bundles, members


class StackedNetworks(nn.Module):
    """Networks of one depth, side by side in the channels of one network.

    Args:
        networks: one per run, with layout ``"grouped"`` or ``"independent"`` and cosine heads; numbers of
            experts may differ. They are copied.
        form: how the branches are computed.

    Shape:
        - images: ``[N, 3, H, W]``
        - output: logits ``[N, K, C]`` of every network
    """

    def __init__(self, networks: Sequence[ResNet32], form: Form) -> None:
        super().__init__()
        trunks: list[Any] = [network.trunk for network in networks]
        experts: list[Any] = [network.experts for network in networks]
        stages = [branch for part in experts for branch in part.to_independent().stage]
        self.stem = Convolution([trunk[0] for trunk in trunks], shared=True)
        self.norm = Norm([trunk[1] for trunk in trunks], form.fused)
        chains = [trunk[3] for trunk in trunks], [s[0] for s in stages], [s[1] for s in stages]
        bundles, self.members = zip(*(make_bundles(branches, form) for branches in chains), strict=True)
        self.stages = nn.ModuleList(bundles)

        self.scale = experts[0].classifiers.scale
        self.weight = nn.Parameter(torch.cat([part.classifiers.weight.detach() for part in experts]))
        self.experts = [part.num_experts for part in experts]
        self.run_of = [run for run, experts in enumerate(self.experts) for _ in range(experts)]
        # If a tensor holds all branches, a kernel copies the map of each run to its branches.
        whole = [list(range(len(self.experts)))], [list(range(len(self.run_of)))]
        self.spreads = form.fused and (self.members[0], self.members[1]) == whole
        first = torch.tensor([0, *accumulate(self.experts)], dtype=torch.int32)
        self.register_buffer("first_of", first, persistent=False)
        self.register_buffer("sources", torch.tensor(self.run_of, dtype=torch.int32), persistent=False)
        self.streams: list[torch.cuda.Stream] = []

    def lower(self, dtype: torch.dtype) -> None:
        """Let convolutions compute in ``dtype``; statistics of batch norms and the heads keep float32."""
        for layer in self.modules():
            if isinstance(layer, Convolution):
                layer.lower(dtype)

    def class_weights(self) -> list[Tensor]:
        """The class centres of every network ``[K, C, d]``."""
        return list(self.weight.split(self.experts))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The logits of every network."""
        x = images.to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self.norm(self.stem(x))
        runs = list(range(len(self.experts)))

        maps = self._stage(0, [x], [runs])
        trunk = self.members[0]
        of_experts = [[self.run_of[i] for i in own] for own in self.members[1]]
        if self.spreads and self.training:
            maps = [kernels().spread(maps[0], self.sources, self.first_of, max(self.experts))]
            maps = self._stage(1, maps, of_experts, of_experts)
        else:
            maps = self._stage(1, maps, trunk, of_experts)
        maps = self._stage(2, maps, self.members[1])

        features = [x.mean(dim=(2, 3), dtype=self.weight.dtype).split(64, dim=1) for x in maps]
        placed = self._by_branch(features, self.members[2])
        rows = unit_vectors(torch.stack([placed[i] for i in range(len(self.run_of))]))
        logits = torch.bmm(self.scale * rows, unit_vectors(self.weight).transpose(1, 2))
        return list(logits.transpose(0, 1).split(self.experts, dim=1))

    def _stage(
        self, number: int, maps: list[Tensor], there: list[list[int]], wanted: list[list[int]] | None = None
    ) -> list[Tensor]:
        """The maps of a stage, from tensors of the branches ``there``; ``wanted`` are its input branches."""
        wanted = self.members[number] if wanted is None else wanted
        if there != wanted:
            parts = self._by_branch([x.split(WIDTHS[number], dim=1) for x in maps], there)
            maps = [torch.cat([parts[i] for i in own], dim=1) for own in wanted]
        bundles: Any = list(self.stages)[number]
        calls = [partial(bundle, x) for bundle, x in zip(bundles, maps, strict=True)]
        return side_by_side(calls, self.streams)

    @staticmethod
    def _by_branch(parts: Sequence[Sequence[Tensor]], members: list[list[int]]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for tensors, own in zip(parts, members, strict=True):
            for branch, tensor in zip(own, tensors, strict=True):
                found.setdefault(branch, tensor)
        return found


class SeparateNetworks(nn.Module):
    """The separate networks, each on its own stream: the simplest form, which the others must equal.

    Args:
        networks: as in :class:`StackedNetworks`; they are copied.

    Shape:
        - as in :class:`StackedNetworks`
    """

    def __init__(self, networks: Sequence[ResNet32]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(copy.deepcopy(network) for network in networks)
        self.networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = torch.float32
        self.streams: list[torch.cuda.Stream] = []

    def lower(self, dtype: torch.dtype) -> None:
        """Let autocast compute in ``dtype``."""
        self.dtype = dtype

    def class_weights(self) -> list[Tensor]:
        """The class centres of every network ``[K, C, d]``."""
        experts: list[Any] = [network.experts for network in self.networks]
        return [part.classifiers.weight for part in experts]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The logits of every network."""
        x = images.contiguous(memory_format=torch.channels_last)
        # A cast weight in the cache would not belong to the recorded step.
        lowers = self.dtype == torch.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=lowers, cache_enabled=False):
            calls = [partial(_logits, network, x) for network in self.networks]
            return [logits.to(x.dtype) for logits in side_by_side(calls, self.streams)]


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    output: ExpertOutput = network(images)
    return output.logits


def stack(
    networks: Sequence[ResNet32], form: Form, device: torch.device
) -> StackedNetworks | SeparateNetworks:
    """The networks in a form, on a device."""
    if form.separate:
        stacked: StackedNetworks | SeparateNetworks = SeparateNetworks(networks)
    else:
        stacked = StackedNetworks(networks, form)
    stacked.to(device)
    if device.type == "cuda" and (form.separate or form.streams):
        stacked.streams = [torch.cuda.Stream(device) for _ in range(min(len(networks), 5))]
    return stacked
