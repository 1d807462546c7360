# Needs: cli.py, quickstart.py, sampling.py.
"""Every rank's share of a data set in memory, for train_ddp.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from cli import InputError, library
from sampling import mixed_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lgla_losses.data import ImageData, read_npz

Batch = tuple[Tensor, Tensor]


class Images(Dataset[Batch]):
    """Images ``[N, 3, H, W]`` and their classes, in batches, which may be empty."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices, dtype=torch.int64)
        return self.images[index], self.labels[index]


class Shares(Sampler[list[int]]):
    """This rank's share of every step: ranks take equally many steps, and shares differ by at most one.

    Every sample is seen once per epoch: unlike DistributedSampler it does not pad or drop samples. If a step
    has fewer samples than ranks, some shares are empty.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int | None = None) -> None:
        self.num_samples = num_samples
        self.num_steps = math.ceil(num_samples / batch_size)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_steps

    def steps(self) -> tuple[Tensor, ...]:
        """The samples of all ranks, step by step; in order without a seed."""
        if self.seed is None:
            return torch.arange(self.num_samples).tensor_split(self.num_steps)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator).tensor_split(self.num_steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield step.tensor_split(dist.get_world_size())[dist.get_rank()].tolist()


def loader(images: Images, shares: Shares) -> DataLoader[Batch]:
    """Batches of this rank."""
    pin_memory = torch.cuda.is_available()
    return DataLoader(images, batch_sampler=shares, collate_fn=lambda batch: batch, pin_memory=pin_memory)


def read_data(path: Path | None) -> tuple[Images, Images]:
    """Training and validation images of a file; without a file, long-tailed digits."""
    if path is None:
        quickstart = library("quickstart", "examples")
        digits = quickstart.long_tailed_digits(50.0, 0, "cpu")
        train, val = digits.train_images.expand(-1, 3, -1, -1), digits.test_images.expand(-1, 3, -1, -1)
        return Images(train, digits.train_labels), Images(val, digits.test_labels)
    try:
        data = read_npz(path)
        return in_memory(data["train"]), in_memory(data["val"])
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def in_memory(data: ImageData) -> Images:
    """Images as floats in 0..1; all of one size, else NumPy refuses to stack them."""
    pixels = np.stack([np.asarray(data[i][0]) for i in range(len(data))])
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, torch.tensor(data.targets))
