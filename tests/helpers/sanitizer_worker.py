"""Random calls of a C library that was built with sanitizers, which end the process at a wrong access.

python tests/helpers/sanitizer_worker.py LIBRARY CALLS [--unchecked]
"""

import contextlib
import random
import sys

import torch

from lgla_losses import ExpertOutput, LGLALoss, functional
from lgla_losses.kernels import native

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


def call_engine():
    """Every function of the engine once, on one batch."""
    n, k = random.choice([0, 1, 2, 7, 40]), random.randint(1, 5)
    c, g = random.choice([1, 2, 3, 15, 16, 17, 48, 1030]), random.randint(1, 4)
    dtype = random.choice(DTYPES)
    exact = functional.compute_dtype(dtype)
    logits, target = strided((n, k, c), dtype), labels(n, c)
    scale = random.choice([None, 30.0])
    source = strided((n, k), exact) if scale is None else logits
    groups = torch.randint(g, (c,))
    batch, options = (source, target, groups, g), {"ignore_index": IGNORE}
    with contextlib.suppress(native.BadValuesError):
        native.weights_of(*batch, scale=scale, **options)
        angles, parts = native.statistics(*batch, scale=scale, check=random.random() < 0.5, **options)
        native.weights(angles, target, groups, parts, num_ranks=random.randint(1, 3), **options)

    table = random.choice([None, strided((k, c), torch.float64)])
    weights = random.choice([None, strided((n, k), exact)])
    divisor = random.choice([None, torch.tensor(3.0)])
    over_logits = logits.clone()
    place = random.choice([over_logits, strided((n, k, c), dtype), None])
    options |= {"label_smoothing": random.choice([0.0, 0.1, 1.0])}
    flags = {"reduce": random.random() < 0.5, "check": random.random() < 0.5}
    batch = target, table, weights
    with contextlib.suppress(native.BadValuesError):
        _, state = native.forward(
            over_logits if place is over_logits else logits,
            *batch,
            divisor,
            gradient=place,
            **flags,
            **options,
        )
        gradient = strided((n, k, c), dtype)
        native.backward(logits, *batch, strided((n,), exact), state, gradient=gradient, **options)


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
    """What happened before the wrapper looked: an empty batch whose angles are in half precision."""
    native._address = lambda name, tensor, *_, **__: tensor.data_ptr()
    angles, target, groups = torch.zeros(0, 3).bfloat16(), torch.zeros(0).long(), torch.zeros(5).long()
    native.weights_of(angles, target, groups, 1, scale=None, ignore_index=IGNORE)


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
