# Needs no other file.
"""The paper's ResNet-32 for CIFAR: one trunk, K experts, three layouts.

The stem and the first stage are shared, the second and third belong to each expert at full width.
``grouped`` and ``independent`` compute the same function. ``grouped-leaky`` is the network of the authors'
released code: it zero-pads the shortcuts of all experts' channels at once, so that channels move from one
expert into its neighbours.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lgla_losses import ExpertOutput, GroupConvExperts
from lgla_losses.experts import ExpertClassifiers

LAYOUTS = ("grouped", "independent", "grouped-leaky")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that strides and zero-pads (option A of He et al., 2016).

    Args:
        inputs: input channels, all groups together.
        outputs: output channels, all groups together.
        stride: stride of the first convolution and the shortcut.
        groups: experts side by side in the channels.

    Shape:
        - input: ``[N, inputs, H, W]``
        - output: ``[N, outputs, H / stride, W / stride]``
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        # Half of the new channels go before the old ones, half after: per expert if groups is 1, else for all
        # experts together, which is the leak.
        self.padding = (outputs - inputs) // 2
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The block's feature map."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


def make_stage(inputs: int, outputs: int, stride: int, groups: int = 1, blocks: int = 5) -> nn.Sequential:
    """Blocks, the first with the stride; widths are for one expert."""
    first = BasicBlock(groups * inputs, groups * outputs, stride, groups)
    others = [BasicBlock(groups * outputs, groups * outputs, 1, groups) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


def expert_stages(groups: int = 1, blocks: int = 5) -> nn.Sequential:
    """The second and third stage, which every expert has for itself."""
    return nn.Sequential(make_stage(16, 32, 2, groups, blocks), make_stage(32, 64, 2, groups, blocks))


class LeakyExperts(nn.Module):
    """K experts side by side in the channels, with the shortcuts of the authors' released code.

    Between the stages 2 and 3 the middle one of three experts gets 16 channels from each neighbour.

    Shape:
        - shared features: ``[N, 16, H, W]``
        - output: as in :class:`GroupConvExperts`
    """

    def __init__(
        self, blocks: int, num_experts: int, num_classes: int, *, scale: float, classifier: str
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.stage = expert_stages(num_experts, blocks)
        self.classifiers = ExpertClassifiers(
            num_experts, 64, num_classes, scale if classifier == "cosine" else None, gradient="exact"
        )

    def forward(self, shared: Tensor) -> ExpertOutput:
        """Logits, features and class centres of every expert."""
        maps = self.stage(shared.repeat(1, self.num_experts, 1, 1))
        features = maps.mean(dim=(2, 3)).unflatten(1, (self.num_experts, 64))
        return ExpertOutput(self.classifiers(features), features, self.classifiers.weight)


class ResNet32(nn.Module):
    """ResNet-32 with K experts (section 4.2), or a shallower one with fewer blocks.

    Args:
        num_classes: number of classes ``C``.
        num_experts: number of experts ``K``.
        layout: ``"grouped"``, ``"independent"`` or ``"grouped-leaky"``.
        scale: factor of the cosine logits.
        classifier: ``"cosine"`` or ``"linear"``.
        blocks: blocks per stage; the network has ``6 * blocks + 2`` layers.

    Raises:
        ValueError: an unknown layout.

    Shape:
        - images: ``[N, 3, 32, 32]``
        - output: an :class:`ExpertOutput` of logits ``[N, K, C]``
    """

    def __init__(
        self,
        num_classes: int,
        num_experts: int = 3,
        layout: str = "grouped",
        scale: float = 30.0,
        classifier: str = "cosine",
        blocks: int = 5,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight)
        self.trunk = nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(), make_stage(16, 16, 1, blocks=blocks))
        make = (
            partial(LeakyExperts, blocks)
            if layout == "grouped-leaky"
            else partial(
                GroupConvExperts, partial(expert_stages, blocks=blocks), layout=layout, gradient="exact"
            )
        )
        self.experts = make(num_experts, num_classes, scale=scale, classifier=classifier)

    def forward(self, images: Tensor) -> ExpertOutput:
        """Compute the outputs of every expert."""
        output: ExpertOutput = self.experts(self.trunk(images))
        return output
