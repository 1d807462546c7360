"""The paper's equations in plain float64 loops, as written there: what every backend is judged by."""

import itertools
import math
import re
from fractions import Fraction

import pytest
import torch


def group_index(counts, num_groups):
    """Section 3.2 by brute force: the least sum of squared masses, the first cuts among equals."""
    order = sorted(range(len(counts)), key=lambda j: (-counts[j], j))
    exact = [Fraction(counts[j]) for j in order]
    best = None
    for cuts in itertools.combinations(range(1, len(counts)), num_groups - 1):
        edges = (0, *cuts, len(counts))
        cost = sum(sum(exact[a:b]) ** 2 for a, b in itertools.pairwise(edges))
        if best is None or cost < best[0]:
            best = (cost, cuts)
    groups = [0] * len(counts)
    for rank, j in enumerate(order):
        groups[j] = sum(rank >= cut for cut in best[1])
    return groups


def adjustment(counts, groups, tau, k, j):
    """Eq. 4, unshifted."""
    if k == max(groups) + 1:
        return tau * math.log(counts[j])
    return math.log(counts[j]) if groups[j] == k else math.log(max(counts))


def margin(counts, groups, tau, k, y, j):
    """The five cases of Eq. 6."""
    if k == max(groups) + 1:
        return tau * math.log(counts[j] / counts[y])
    if groups[y] == k and groups[j] == k:
        return math.log(counts[j] / counts[y])
    if groups[y] == k:
        return math.log(max(counts) / counts[y])
    if groups[j] == k:
        return math.log(counts[j] / max(counts))
    return 0.0


def angle(feature, centre):
    """Eq. 7; a vector of length 0 is at right angles to all."""
    dot = sum(a * b for a, b in zip(feature, centre, strict=True))
    cosine = dot / (math.hypot(*feature) * math.hypot(*centre) or math.inf)
    return math.acos(max(-1.0, min(1.0, cosine)))


def weights(angles, target, groups, ignore_index=-100):
    """Eq. 8 with one reference per (expert, group of the sample's label)."""
    result = [[0.0] * len(row) for row in angles]
    for i, y in enumerate(target):
        if y == ignore_index:
            continue
        for k in range(len(angles[i])):
            own = [row[k] for row, label in zip(angles, target, strict=True)
                   if label != ignore_index and groups[label] == groups[y]]  # fmt: skip
            reference = math.fsum(own) / len(own)
            result[i][k] = 1.0 if angles[i][k] <= reference else 1.0 + angles[i][k] - reference
    return result


def cross_entropy(adjusted, y, label_smoothing=0.0):
    """Negative log-softmax of the target, mixed with the mean over the classes."""
    peak = max(adjusted)
    log_sum = peak + math.log(math.fsum(math.exp(v - peak) for v in adjusted))
    smooth = math.fsum(log_sum - v for v in adjusted) / len(adjusted)
    return (1 - label_smoothing) * (log_sum - adjusted[y]) + label_smoothing * smooth


def losses(logits, target, table, sample_weights, label_smoothing=0.0, ignore_index=-100):
    """Eq. 9 for every sample: the sum over the experts."""
    return [
        0.0 if y == ignore_index else math.fsum(
            sample_weights[i][k]
            * cross_entropy([v + t for v, t in zip(logits[i][k], table[k], strict=True)], y, label_smoothing)
            for k in range(len(table))
        )
        for i, y in enumerate(target)
    ]  # fmt: skip


def loss_of_row(adjusted, shares, gamma=0.0):
    """Of adjusted logits: the sum of the classes' focal losses by their shares, and its gradient."""
    peak = max(adjusted)
    log_sum = math.log(math.fsum(math.exp(v - peak) for v in adjusted))
    loss, softmax, slopes = 0.0, [], []
    for v, share in zip(adjusted, shares, strict=True):
        entropy = max(0.0, peak - v + log_sum)
        p, missing = math.exp(-entropy), -math.expm1(-entropy)
        softmax.append(p)
        if share == 0:
            slopes.append(0.0)
            continue
        loss += share * missing**gamma * entropy
        # (1 - p)^(gamma - 1) L goes to 0 with 1 - p, as L does.
        focus = gamma * missing ** (gamma - 1) * p * entropy if gamma and missing else 0.0
        slopes.append(share * (missing**gamma + focus))
    total = math.fsum(slopes)
    return loss, [p * total - h for p, h in zip(softmax, slopes, strict=True)]


def shares(probabilities, class_weight=None, label_smoothing=0.0):
    """How much every class counts: its smoothed probability times its weight."""
    spread = label_smoothing * math.fsum(probabilities) / len(probabilities)
    class_weight = class_weight or [1.0] * len(probabilities)
    return [
        w * ((1 - label_smoothing) * q + spread) for w, q in zip(class_weight, probabilities, strict=True)
    ]


def logit_gradient(adjusted, y):
    """Of the cross entropy with respect to the logits: softmax less one-hot."""
    peak = max(adjusted)
    exponentials = [math.exp(v - peak) for v in adjusted]
    total = math.fsum(exponentials)
    return [e / total - (j == y) for j, e in enumerate(exponentials)]


def assert_same(actual, expected, name=""):
    """To 1e-10 of the largest entry; where all is rounding, as a bias's gradient before a norm, of 0.01."""
    assert actual.shape == expected.shape, name
    actual, expected = actual.detach().double(), expected.detach().double()
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1e-2), name


def assert_raises(call, error, *words):
    """Exactly that error, whose message has the words in this order."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, words)), message, re.DOTALL), message


def cosine_logits(num_samples, num_experts, num_classes, dtype=torch.float64, device="cpu"):
    """Logits of cosine classifiers of scale 30, at random."""
    return (30 * (2 * torch.rand(num_samples, num_experts, num_classes, device=device) - 1)).to(dtype)
