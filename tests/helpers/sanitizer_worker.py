"""Random calls of a C library that was built with sanitizers, which end the process at a wrong access.

python tests/helpers/sanitizer_worker.py LIBRARY CALLS [--unchecked]
"""

import random
import sys

import torch

from lgla_losses import ExpertOutput, LGLALoss, functional
from lgla_losses.kernels import Angles, Rows, Samples, native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100


def strided(shape, dtype):
    """Random numbers in memory of any order, often with nothing behind the last of them."""
    order = random.sample(range(len(shape)), len(shape))
    gaps = [random.choice([1, 1, 1, 2]) for _ in shape]
    whole = (60 * torch.rand([shape[i] * gaps[i] for i in order]) - 30).to(dtype)
    view = whole.permute([order.index(i) for i in range(len(shape))])
    return view[tuple(slice(None, None, gap) for gap in gaps)]


def labels(num_samples, num_classes):
    """Classes, ignored targets and now and then one that is no class."""
    target = torch.randint(num_classes, (2 * num_samples,))[::2]
    target[torch.rand(num_samples) < 0.2] = IGNORE
    if random.random() < 0.1:
        target[torch.rand(num_samples) < 0.2] = random.choice([num_classes, -1, 2**62, -(2**63)])
    return target


def probabilities(num_samples, num_classes):
    """Of two classes or of all, in any dtype, some samples without any."""
    target = strided((num_samples, num_classes), random.choice(DTYPES)).abs()
    if random.random() < 0.5:
        target[torch.rand(num_samples, num_classes) < 0.9] = 0
    target[torch.rand(num_samples) < 0.2] = 0
    return target


def blocks(num_samples, num_experts, num_classes, dtype):
    """Logits of all experts in one tensor or in several, each of its own strides."""
    sizes = []
    while left := num_experts - sum(sizes):
        sizes.append(random.randint(1, left))
    return [strided((num_samples, size, num_classes), dtype) for size in sizes]


def call_engine():
    """Every function of the engine once, on one batch."""
    n, k = random.choice([0, 1, 2, 7, 40]), random.randint(1, 5)
    c, g = random.choice([1, 2, 3, 15, 16, 17, 48, 1030]), random.randint(1, 4)
    dtype, soft = random.choice(DTYPES), random.random() < 0.5
    exact = functional.compute_dtype(dtype)
    logits, target = blocks(n, k, c, dtype), probabilities(n, c) if soft else labels(n, c)
    sample_weight = random.choice([None, strided((n,), random.choice(DTYPES)).abs()])
    class_weight = random.choice([None, strided((c,), torch.float64).abs()])
    d = random.choice([0, 1, 63, 64, 130])
    features = {
        "features": strided((n, k, d), random.choice(DTYPES)),
        "weight": strided((k, c, d), random.choice(DTYPES)),
    }
    sources = [Angles(logits, 30.0), Angles(**features), Angles(angles=strided((n, k), exact))]
    samples = Samples(target, torch.randint(g, (2 * c,))[::2], g, sample_weight, IGNORE)
    angles, parts = native.statistics(sources[0] if soft else random.choice(sources), samples)
    weights, count = native.weights(angles, samples, parts, random.randint(1, 3))
    native.count(target, sample_weight, class_weight if soft or not (target >= c).any() else None, IGNORE)

    rows = Rows(
        target,
        random.choice([None, strided((k, c), torch.float64), strided((1, c), torch.float64).expand(k, c)]),
        random.choice([None, weights, strided((n, 1), exact).expand(n, k)]),
        random.choice([None, count, torch.tensor(3.0)]),
        class_weight,
        random.choice([None, strided((c,), torch.float64)]),
        IGNORE,
        label_smoothing=random.choice([0.0, 0.1, 1.0]),
        gamma=random.choice([0.0, 0.0, 2.0]),
        reduce=random.random() < 0.5,
    )
    over_logits = [block.clone() for block in logits]
    places = [random.choice([block, strided(block.shape, dtype), None]) for block in over_logits]
    _, state = native.forward(over_logits, rows, places)
    gradients = [strided(block.shape, dtype) for block in logits]
    native.backward(logits, rows, strided((n,), random.choice(DTYPES)), state, gradients)


def call_loss():
    """The loss of a batch or of maps, forward and backward, with features or without."""
    samples = random.choice([(0,), (3,), (0, 4, 4), (2, 0, 3), (2, 3)])
    dtype, soft = random.choice(DTYPES), random.random() < 0.3
    n, *maps = samples
    logits = strided((n, 3, 5, *maps), dtype).requires_grad_()
    features, weight = strided((n, 3, 8, *maps), dtype), strided((3, 5, 8), dtype)
    target = torch.full((n, 5, *maps), 0.2) if soft else torch.randint(5, samples)
    criterion = LGLALoss(
        [50, 20, 5, 2, 1],
        scale=None,
        aaw=random.random() < 0.8,
        reduction=random.choice(["mean", "sum", "none"]),
        label_smoothing=random.choice([0.0, 0.1]),
        backend="fused",
    )
    loss = criterion(ExpertOutput(logits, features, weight), target)
    assert loss.isfinite().all()
    loss.sum().backward()


def unchecked():
    """What would happen if the wrapper did not look: sums of one group, in float32, for two."""
    native._array = lambda name, tensor, *_: (tensor.data_ptr(), native._INDEX[torch.int64], *tensor.stride())
    samples = Samples(torch.zeros(3).long(), torch.zeros(5).long(), 2)
    native.weights(Angles(angles=torch.zeros(3, 3)), samples, torch.ones(1, 1, 4))


if __name__ == "__main__":
    library, calls = sys.argv[1], int(sys.argv[2])
    native.LIBRARY, native._WORTH_THREADS = native.load(library), 1
    random.seed(0)
    torch.manual_seed(0)
    if "--unchecked" in sys.argv:
        unchecked()
    for number in range(calls):
        torch.set_num_threads(1 + number % 3)
        call_engine()
        call_loss()
    print(f"{calls} batches, no complaint")
