# Needs no other file.
"""Order and augmentation of training samples as functions of seed, epoch and sample.

So neither the number of workers nor an interruption changes a result.
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
    """A seed from several numbers, unlike that from any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Batches of pairs (epoch, index) in an order that depends on seed and epoch alone.

    Steps are of one size, give or take a sample, and so are the batches of a step: no batch norm meets a
    remainder of one sample, and a step has the same samples however many passes it is accumulated from.
    """

    def __init__(self, num_samples: int, options: argparse.Namespace) -> None:
        self.num_samples = num_samples
        self.seed: int = options.seed
        self.batch_size: int = options.batch_size
        self.num_steps = math.ceil(num_samples / (options.batch_size * options.accumulate))
        self.epoch = 0
        self.steps_done = 0

    def steps(self) -> list[tuple[Tensor, ...]]:
        """The batches of every step that is still to do in the epoch."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        steps = order.tensor_split(self.num_steps)[self.steps_done :]
        return [step.tensor_split(math.ceil(len(step) / self.batch_size)) for step in steps]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps():
            for batch in step:
                yield [(self.epoch, index) for index in batch.tolist()]


class Seeded(Dataset[Sample]):
    """Samples whose random augmentation depends on seed, epoch and index alone.

    Args:
        samples: by index.
        seed: None where they have nothing random: seeding takes longer than to load a small image.
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
                # The CPU's generator alone: torch.manual_seed would reach that of a GPU, which draws dropout.
                torch.default_generator.manual_seed(seed)
                return self.samples[key[1]]
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
