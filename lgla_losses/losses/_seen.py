"""The labels that a loss has seen: does a sampler balance the classes that the loss corrects?"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from lgla_losses._ranks import digest_of

#: Least number of different batches to judge by, and most looks to keep once they span an epoch.
FEWEST_BATCHES, MOST_LOOKS = 10, 64

#: Least number of labels in a batch: with fewer, sorted data cannot be recognised.
_FEWEST_LABELS = 8

#: Least number of labels of rare classes to judge by, and of standard deviations above what the counts say.
_FEWEST_RARE, _DEVIATIONS = 100, 8.0


def next_look(step: int) -> int:
    """Give the next batch to look at after number ``step``: soon at first, later after about 260.

    The distances are random, so that the looks do not always meet the same part of an epoch. No distance has
    the factor 2 or 3: if natural and balanced batches take turns, the looks meet both.
    """
    most = 1 + min(step, 2040) // 24
    return step + 6 * random.Random(step).randint(1, most) + 1


class Look(NamedTuple):
    """Hold what is kept of a batch: samples until then, number of labels of rare classes and of all."""

    samples: int
    rare: int
    number: int
    digest: int


class SeenLabels:
    """Compare the labels of some batches with class counts ``[C]``, by the share of the rarer half.

    If a sampler balances the classes, this share of the labels is one half. It points to a sampler if it is
    far above the share in the counts and about the same in all of the newest batches. In sorted data it is 0
    in some batches and 1 in others.

    Args:
        counts: class counts ``[C]``.
        adjusted: which classes the loss corrects, bool ``[C]``. Labels of others are not judged.
    """

    def __init__(self, counts: Tensor, adjusted: Tensor) -> None:
        self._counts, self._adjusted = counts.detach().cpu().double().clone(), adjusted.cpu()
        classes = self._adjusted.nonzero().flatten()
        own = self._counts[classes]
        rare = classes[own.argsort(stable=True)[: len(own) // 2]]
        self._is_rare = torch.zeros(len(counts), dtype=torch.bool)
        self._is_rare[rare] = True
        self._expected = float(self._counts[rare].sum() / own.sum())
        self._epoch = float(self._counts.sum())

        self._step, self._samples = 0, 0
        self._looks: list[Look] = []

    def are_for(self, counts: Tensor) -> bool:
        """Say whether labels are compared with these class counts."""
        return torch.equal(self._counts, counts.cpu().double())

    def add(self, labels: Tensor, step: int, num_ranks: int) -> None:
        """Look at the labels ``[N]`` of batch number ``step`` of one of ``num_ranks`` ranks."""
        labels = labels.cpu()
        self._samples += (step - self._step) * len(labels) * num_ranks
        self._step = step
        if not self._are_classes(labels):
            return
        judged = labels[self._adjusted[labels]]
        if len(judged) < _FEWEST_LABELS:
            return

        rare = int(self._is_rare[judged].sum())
        self._looks.append(Look(self._samples, rare, len(judged), digest_of([labels])))
        while len(self._looks) > MOST_LOOKS and self._samples - self._looks[1].samples >= self._epoch:
            del self._looks[0]

    def _are_classes(self, labels: Tensor) -> bool:
        """Say whether all labels are class indices; wrong labels are reported elsewhere."""
        return len(labels) > 0 and 0 <= int(labels.min()) <= int(labels.max()) < len(self._counts)

    def problem(self) -> str | None:
        """Say that the labels are balanced although the counts are not, or None.

        Only the newest looks are judged, because a sampler may start late. They span at least an epoch,
        because ordered data show all classes only in a whole epoch. A repeated batch is no new evidence.
        """
        rare = number = looks = 0
        squares, digests = 0.0, set()
        for look in reversed(self._looks):
            looks, rare, number = looks + 1, rare + look.rare, number + look.number
            squares += look.rare**2 / look.number
            digests.add(look.digest)

            spans = self._samples - look.samples >= self._epoch
            if spans and len(digests) >= FEWEST_BATCHES and self._are_balanced(rare, number, squares, looks):
                return self._message(rare / number)
        return None

    def _are_balanced(self, rare: int, number: int, squares: float, looks: int) -> bool:
        """Say whether the share of rare classes comes from a sampler.

        Args:
            rare: labels of rare classes in all looks.
            number: labels in all looks.
            squares: sum over the looks of the squared rare labels over the labels.
            looks: how many there are.
        """
        share, expected = rare / number, self._expected
        # More than halfway to the half of balanced classes.
        if rare < _FEWEST_RARE or not max(1.5 * expected, math.sqrt(expected / 2)) < share < 0.9:
            return False
        deviations = (rare - number * expected) / math.sqrt(number * expected * (1 - expected))
        # By chi-square, the looks differ no more than by chance, plus one standard deviation.
        apart = (squares - rare * share) / (share * (1 - share))
        return deviations >= _DEVIATIONS and apart <= looks - 1 + math.sqrt(2 * (looks - 1))

    def _message(self, share: float) -> str:
        return (
            f"class_counts: the rarer half of the classes is {share:.0%} of the labels seen so far, but "
            f"{self._expected:.1%} of class_counts; a sampler that balances classes and a loss that "
            "corrects their counts make the same correction twice: pass the loss the counts after "
            "sampling, sampler.class_counts of lgla_losses.data.ClassBalancedSampler, or remove the "
            "sampler; if there is no sampler, count the training labels again"
        )
