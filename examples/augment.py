# Needs: cli.py.
"""The image augmentations of the paper's recipes, by data set, weak and strong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cli import library
from torch import Tensor, nn
from torchvision.transforms import v2

#: Mean and deviation of the channels.
CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Cutout(nn.Module):
    """Blacken a square whose centre is anywhere in the image (DeVries and Taylor, 2017).

    Args:
        side: side of the square, in pixels; the square may extend beyond the border.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        """Copy the image ``[3, H, W]`` and set the square to 0."""
        image = image.clone()
        y, x = (int(torch.randint(size, ())) - self.side // 2 for size in image.shape[1:])
        image[:, max(y, 0) : y + self.side, max(x, 0) : x + self.side] = 0
        return image


def _tensor(normalisation: Any, *between: nn.Module) -> list[Any]:
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return [*finish, *between, v2.Normalize(*normalisation)]


def _small(size: int, strong: bool) -> list[Any]:
    """Augment CIFAR as the authors' code does: with AutoAugment's policy; the paper says RandAugment."""
    crop = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    if not strong:
        return [*crop, *_tensor(CIFAR)]
    return [*crop, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), *_tensor(CIFAR, Cutout(size // 2))]


def _large(size: int, strong: bool) -> list[Any]:
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)]
    if not strong:
        return [*crop, *_tensor(IMAGENET)]
    mean = tuple(round(255 * value) for value in IMAGENET[0])
    policy = library("timm.data.auto_augment", "vision").rand_augment_transform(
        "rand-n2-m10-mstd0.5", {"translate_const": int(0.45 * size), "img_mean": mean}
    )
    return [*crop, v2.Lambda(policy), *_tensor(IMAGENET)]


def _places(size: int) -> list[Any]:
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5)
    look = [jitter, v2.RandomGrayscale(0.2), blur]
    return [v2.RandomResizedCrop(size), *look, v2.RandomHorizontalFlip(), *_tensor(IMAGENET)]


#: Transforms of training images, by name, for a given size.
TRAINING: dict[str, Callable[[int], list[Any]]] = {
    "cifar-weak": lambda size: _small(size, strong=False),
    "cifar-strong": lambda size: _small(size, strong=True),
    "imagenet-weak": lambda size: _large(size, strong=False),
    "imagenet-strong": lambda size: _large(size, strong=True),
    "places": _places,
}


def transforms(name: str, size: int) -> tuple[Any, Any]:
    """Give the transforms of training and of test images."""
    if name.startswith("cifar"):
        whole = _tensor(CIFAR)
    else:
        whole = [v2.Resize(size * 8 // 7), v2.CenterCrop(size), *_tensor(IMAGENET)]
    return v2.Compose(TRAINING[name](size)), v2.Compose(whole)
