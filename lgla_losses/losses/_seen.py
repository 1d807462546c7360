"""The labels that a loss has seen: whether a sampler has balanced the classes that it corrects."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgla_losses._ranks import digest_of

#: From which step on, and after how many looks, the labels are judged.
FIRST_STEP, FEWEST_LOOKS = 64, 7

#: Labels of a batch below which looks do not differ enough to tell sorted data by them.
_FEWEST_LABELS = 8

#: How many labels of rare classes are evidence, and how many standard deviations above what counts say.
_FEWEST_RARE, _DEVIATIONS = 20, 8.0


class SeenLabels:
    """Compare the labels of some batches with class counts ``[C]``, by the rarer half of the classes.

    Balanced, half of the labels are of these classes. Their share is taken for a sampler's where it is far
    above that of the counts, and about the same in all batches: in sorted data it is 0 or 1 by turns.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts.detach().cpu().double().clone()
        rare = self._counts.argsort(stable=True)[: len(counts) // 2]
        self._is_rare = torch.zeros(len(counts), dtype=torch.bool)
        self._is_rare[rare] = True
        self._expected = float(self._counts[rare].sum() / self._counts.sum())
        #: Of each look the labels of rare classes, and all.
        self._looks: list[tuple[int, int]] = []
        self._digests: set[int] = set()

    def are_for(self, counts: Tensor) -> bool:
        """Say whether these are the class counts that labels are compared with."""
        return torch.equal(self._counts, counts.cpu().double())

    def add(self, labels: Tensor) -> None:
        """Look at the labels ``[N]`` of a batch. The same batch again tells nothing new."""
        labels = labels.cpu()
        digest = digest_of([labels])
        if len(labels) < _FEWEST_LABELS or digest in self._digests or not self._are_classes(labels):
            return
        self._digests.add(digest)
        self._looks.append((int(self._is_rare[labels].sum()), len(labels)))

    def _are_classes(self, labels: Tensor) -> bool:
        """Say whether all labels are class indices; others are errors, which others explain."""
        return 0 <= int(labels.min()) <= int(labels.max()) < len(self._counts)

    def problem(self, step: int, num_samples: int) -> str | None:
        """Say that the labels are balanced though the counts are not, or None.

        Data that are in some order show their classes in a whole epoch only.

        Args:
            step: number of the batch.
            num_samples: how many samples there were until then.
        """
        if step < FIRST_STEP or len(self._looks) < FEWEST_LOOKS or num_samples < self._counts.sum():
            return None
        rare, number = (sum(numbers) for numbers in zip(*self._looks, strict=True))
        share, expected = rare / number, self._expected
        # More than halfway to the half of balanced classes.
        if rare < _FEWEST_RARE or not max(1.5 * expected, math.sqrt(expected / 2)) < share < 0.9:
            return None

        deviations = (rare - number * expected) / math.sqrt(number * expected * (1 - expected))
        if deviations < _DEVIATIONS or not self._are_alike(share):
            return None
        return (
            f"class_counts: the rarer half of the classes makes {share:.0%} of the labels that came, but "
            f"{expected:.1%} of class_counts; a sampler that balances classes and a loss that corrects "
            "their counts correct twice: give the loss the counts that the sampler leaves, "
            "sampler.class_counts of lgla_losses.data.ClassBalancedSampler, or take no sampler; where there "
            "is none, count the training labels again"
        )

    def _are_alike(self, share: float) -> bool:
        """Say whether the share of rare classes differs between the looks as chance has it, by chi-square."""
        apart = sum((rare - number * share) ** 2 / number for rare, number in self._looks)
        degrees = len(self._looks) - 1
        return apart / (share * (1 - share)) <= degrees + 3 * math.sqrt(2 * degrees)
