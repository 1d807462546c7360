"""Networks as research code on long-tailed data writes them: heads of their own scale, experts inside."""

import torch
import torch.nn.functional as F
from torch import nn


class NormedLinear(nn.Module):
    """Cosines of features and class centres, which lie in the columns: weight ``[d, C]``."""

    def __init__(self, num_features, num_classes):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num_features, num_classes), dim=0))

    def forward(self, x):
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


class ScaledCosine(nn.Module):
    """Cosines times a scale, and a bias, in one layer: weight ``[C, d]``."""

    def __init__(self, num_features, num_classes, scale=16):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.scale = scale

    def forward(self, x):
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight)) + self.bias


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class BasicBlock(nn.Module):
    """Two convolutions; a shortcut that strides and pads with zeros (option A of He et al., 2016)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            pad = (outputs - inputs) // 2
            self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, pad, pad)))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    """Three convolutions, that in the middle of groups, and a shortcut by a convolution."""

    def __init__(self, inputs, outputs, stride, groups=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs // 2, 1, bias=False), nn.BatchNorm2d(outputs // 2)
        self.conv2 = nn.Conv2d(outputs // 2, outputs // 2, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs // 2)
        self.conv3, self.bn3 = nn.Conv2d(outputs // 2, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def layer_of(block, inputs, outputs, stride, blocks):
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """The ResNet for CIFAR of ``6 * blocks + 2`` layers, 32 by default, whose code scales its logits."""

    def __init__(self, num_classes, head=nn.Linear, scale=30, blocks=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = layer_of(BasicBlock, 16, 16, 1, blocks)
        self.layer2 = layer_of(BasicBlock, 16, 32, 2, blocks)
        self.layer3 = layer_of(BasicBlock, 32, 64, 2, blocks)
        self.linear = head(64, num_classes)
        self.s = scale

    def forward(self, x):
        out = self.layer1(F.relu(self.bn1(self.conv1(x))))
        out = self.layer3(self.layer2(out))
        out = F.avg_pool2d(out, out.size()[3])
        out = self.linear(out.view(out.size(0), -1))
        return out * self.s


class ResNeXtOfExperts(nn.Module):
    """K copies of the last two layers and K heads in one network.

    Returns a dictionary of the mean, the features ``[N, K, d]`` and the logits ``[N, K, C]``; or the mean
    alone, and keeps a list of K logits in ``logits``, as ``extra_info`` of the trainers has it.
    """

    def __init__(self, num_classes, num_experts=3, head=NormedLinear, scale=30, returns_dict=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = layer_of(Bottleneck, 8, 16, 1, 1)
        self.layer2 = layer_of(Bottleneck, 16, 16, 2, 1)
        self.layer3s = nn.ModuleList(layer_of(Bottleneck, 16, 24, 2, 2) for _ in range(num_experts))
        self.layer4s = nn.ModuleList(layer_of(Bottleneck, 24, 32, 1, 1) for _ in range(num_experts))
        self.linears = nn.ModuleList(head(32, num_classes) for _ in range(num_experts))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.s, self.returns_dict = scale, returns_dict

    def forward(self, x):
        shared = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        self.feat, self.logits = [], []
        for layer3, layer4, linear in zip(self.layer3s, self.layer4s, self.linears, strict=True):
            out = torch.flatten(self.avgpool(layer4(layer3(shared))), 1)
            self.feat.append(out)
            self.logits.append(linear(out) * self.s)

        logits = torch.stack(self.logits, dim=1)
        mean = logits.mean(dim=1)
        if self.returns_dict:
            return {"output": mean, "feat": torch.stack(self.feat, dim=1), "logits": logits}
        return mean


class NetworksTogether(nn.Module):
    """K networks side by side: a list of K logits, or their stack ``[K, N, C]``."""

    def __init__(self, num_classes, num_experts=3, stacked=False):
        super().__init__()
        self.backbone = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1),
                layer_of(BasicBlock, 8, 12, 2, 1),
                layer_of(BasicBlock, 12, 16, 1, 1),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            for _ in range(num_experts)
        )
        self.classifier = nn.ModuleList(ScaledCosine(16, num_classes) for _ in range(num_experts))
        self.stacked = stacked

    def forward(self, x):
        logits = [head(body(x)) for body, head in zip(self.backbone, self.classifier, strict=True)]
        return torch.stack(logits) if self.stacked else logits
