# Needs no other file.
"""Order and augmentation of training samples as functions of seed, epoch and sample.

So the number of workers and interruptions do not change a result.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

#: The tensors that a model takes, and the class.
Sample = tuple[tuple[Any, ...], int]


def mixed_seed(*numbers: int) -> int:
    """Mix several numbers into one seed, different for different numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Batches of pairs (epoch, index) in an order that depends only on seed and epoch.

    Sizes of steps differ by at most one sample, and so do the batches of a step: no batch norm gets a single
    leftover sample, and a step has the same samples for any number of accumulated passes.
    """

    def __init__(self, num_samples: int, options: argparse.Namespace) -> None:
        self.num_samples = num_samples
        self.seed: int = options.seed
        self.batch_size: int = options.batch_size
        self.num_steps = math.ceil(num_samples / (options.batch_size * options.accumulate))
        self.epoch = 0
        self.steps_done = 0

    def steps(self) -> list[tuple[Tensor, ...]]:
        """The batches of the remaining steps of the epoch."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        steps = order.tensor_split(self.num_steps)[self.steps_done :]
        return [step.tensor_split(math.ceil(len(step) / self.batch_size)) for step in steps]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps():
            for batch in step:
                yield [(self.epoch, index) for index in batch.tolist()]


class Seeded(Dataset[Sample]):
    """Samples whose random augmentation depends only on seed, epoch and index.

    Args:
        samples: samples by index.
        seed: None if nothing is random: seeding takes longer than loading a small image.
    """

    def __init__(self, samples: Dataset[Sample], seed: int | None) -> None:
        self.samples = samples
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        if self.seed is None:
            return self.samples[key[1]]
        seed = mixed_seed(self.seed, *key)
        # timm's RandAugment draws from the generators of Python and NumPy.
        others = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            with torch.random.fork_rng(devices=[]):
                # Only the CPU's generator: torch.manual_seed would also reset that of a GPU, which draws
                # dropout.
                torch.default_generator.manual_seed(seed)
                return self.samples[key[1]]
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


def ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C here: a terminal sends it to all processes, and the main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
