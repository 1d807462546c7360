"""What an estimate of the class prior is worth on test sets of several priors, from logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import arguments  # noqa: F401  the package of this checkout
import numpy as np
import torch
from torch import Tensor

from lgla_losses.label_shift import shift_prior


def priors_to_try(class_counts: Tensor, seed: int = 0) -> dict[str, list[Tensor]]:
    """Priors of test sets by name: uniform, long tails that begin at the head or the tail, random ones."""
    num_classes = len(class_counts)
    order = class_counts.argsort(descending=True, stable=True)
    tries = {"uniform": [torch.ones(num_classes, dtype=torch.float64) / num_classes]}
    for factor in (5, 50):
        tail = factor ** -torch.linspace(0, 1, num_classes, dtype=torch.float64)
        for name, classes in (("head first", order), ("tail first", order.flip(0))):
            prior = torch.empty_like(tail)
            prior[classes] = tail / tail.sum()
            tries[f"{name}, IF {factor}"] = [prior]
    random = np.random.default_rng(seed)
    for concentration in (1.0, 0.3):
        draws = random.dirichlet(np.full(num_classes, concentration), size=3)
        tries[f"Dirichlet({concentration})"] = list(torch.from_numpy(draws))
    return tries


def gains(
    logits: Tensor,
    target: Tensor,
    prior: Tensor,
    class_counts: Tensor,
    estimate: Callable[[Tensor, Tensor], Tensor],
    *,
    sizes: Sequence[int] = (100, 1000, 5000),
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Points of accuracy that an estimated prior and the true one gain over the uniform one.

    Test sets are drawn with replacement, class by class as a prior says; classes without test samples are
    left out of it.

    Args:
        logits: log-likelihood plus log ``prior`` of labelled test samples ``[N, C]``.
        target: their classes, int64 ``[N]``.
        prior: what the logits hold ``[C]``.
        class_counts: of training ``[C]``, which say where head and tail are.
        estimate: gives a prior ``[C]`` from logits and what they hold, as ``estimate_prior`` does.
        sizes: of the test sets.
        seed: of the random priors and the draws.

    Returns:
        By the name of the test prior, and for ``"mean"`` over these: gain of the estimate and of the truth.
    """
    generator = torch.Generator().manual_seed(seed)
    available = target.bincount(minlength=logits.shape[1])
    rows = {}
    for name, drawn_priors in priors_to_try(class_counts, seed).items():
        row = []
        for drawn in drawn_priors:
            true = drawn * (available > 0)
            of_sample = (true / available.clamp(min=1))[target]
            for size in sizes:
                chosen = torch.multinomial(of_sample, size, replacement=True, generator=generator)
                sample, labels = logits[chosen].double(), target[chosen]
                assumed = (torch.ones_like(true), estimate(sample, prior), true)
                uniform, estimated, known = (
                    100 * (shift_prior(sample, prior, p).argmax(dim=1) == labels).double().mean().item()
                    for p in assumed
                )
                row.append((estimated - uniform, known - uniform))
        rows[name] = _mean(row)
    return rows | {"mean": _mean(list(rows.values()))}


def _mean(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    estimated, known = np.mean(pairs, axis=0).tolist()
    return estimated, known
