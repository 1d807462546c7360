"""What gpu_check.py checks: a step of every loss, with every kind of input, and of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import choices
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss, LinearLGLALoss, baselines
from lgla_losses.data import long_tailed_counts

NUM_EXPERTS, NUM_CLASSES, BATCH_SIZE = 3, 100, 128
#: Norm of a gradient's error over that of the gradient; 16-bit gradients are rounded.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}

Loss = Callable[[nn.Module, Sequence[Tensor], Sequence[Tensor]], Tensor]


class Problem(NamedTuple):
    """A step of training to check: a loss, and its gradients.

    Attributes:
        name: what it is, its dtype included.
        dtype: what it computes in.
        make: builds the module for a backend.
        loss: of the module, of what wants a gradient, and of what does not.
        leaves: want a gradient, beside the module's parameters; float32, on the CPU.
        constants: do not.
        autocast: whether the dtype comes by autocast; else the leaves are of it.
        around: entered around every step.
        slack: times the bound of the dtype is what the gradients may differ by from float64.
    """

    name: str
    dtype: torch.dtype
    make: Callable[[str], nn.Module]
    loss: Loss
    leaves: Sequence[Tensor]
    constants: Sequence[Tensor]
    autocast: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    slack: float = 1.0

    @property
    def bound(self) -> float:
        """What the gradients may differ by."""
        return self.slack * BOUNDS[self.dtype]


class ExpertsAndLoss(nn.Module):
    """Experts of two convolutions each, and their loss of shared features."""

    def __init__(self, layout: str, together: bool, channels_last: bool, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = GroupConvExperts(make_stage, NUM_EXPERTS, NUM_CLASSES, layout=layout)
        self.experts.together = together
        self.channels_last = channels_last
        self.criterion = LGLALoss(counts(), NUM_EXPERTS, backend=backend)

    def forward(self, shared: Tensor, target: Tensor) -> Tensor:
        """Eq. 9 of shared features ``[N, 16, 16, 16]``."""
        if self.channels_last:
            shared = shared.contiguous(memory_format=torch.channels_last)
        return self.criterion(self.experts(shared), target)


def make_stage() -> nn.Sequential:
    """What every expert has for itself."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def named(name: str, dtype: torch.dtype) -> str:
    """The name of a problem in a dtype."""
    return f"{name}, {str(dtype).removeprefix('torch.')}"


def counts(num_classes: int = NUM_CLASSES) -> Tensor:
    """A long tail of imbalance 100."""
    return torch.as_tensor(long_tailed_counts(500, num_classes, 100))


def cosine_logits(*shape: int) -> Tensor:
    """Logits of cosine classifiers of scale 30."""
    return 30 * (2 * torch.rand(shape) - 1)


def labels(*shape: int, most: int = NUM_CLASSES) -> Tensor:
    """Targets, every class alike."""
    return torch.randint(most, shape)


def probabilities(*shape: int) -> Tensor:
    """Class probabilities, classes in dimension 1."""
    return torch.randn(shape).softmax(dim=1)


def make_loss(num_classes: int = NUM_CLASSES, **options: Any) -> Callable[[str], nn.Module]:
    """Builds an LGLALoss for a backend."""
    return lambda backend: LGLALoss(counts(num_classes), NUM_EXPERTS, backend=backend, **options)


def make_linear_loss(scale: float | None) -> Callable[[str], nn.Module]:
    """Builds a LinearLGLALoss for a backend."""
    return lambda backend: LinearLGLALoss(counts(), NUM_EXPERTS, scale=scale, backend=backend)


def problems() -> Iterator[Problem]:
    """All of them, most wanted first; the same tensors in every process."""
    torch.manual_seed(0)
    yield from losses_of_logits()
    yield from many_classes()
    yield from experts()
    yield from linear_losses()
    yield from losses_for_comparison()


def of_stacked(criterion: nn.Module, leaves: Sequence[Tensor], constants: Sequence[Tensor]) -> Tensor:
    """The loss of logits in one tensor, and of targets."""
    loss: Tensor = criterion(*leaves, *constants)
    return loss


def losses_of_logits() -> Iterator[Problem]:
    """LGLALoss with every kind of input."""
    v, y = cosine_logits(BATCH_SIZE, NUM_EXPERTS, NUM_CLASSES), labels(BATCH_SIZE)
    classifiers = torch.randn(BATCH_SIZE, NUM_EXPERTS, 16), torch.randn(NUM_EXPERTS, NUM_CLASSES, 16)
    maps, label_map = cosine_logits(4, NUM_EXPERTS, NUM_CLASSES, 5, 5), labels(4, 5, 5)
    kinds: dict[str, tuple[Loss, Sequence[Tensor], Sequence[Tensor]]] = {
        "stacked logits": (of_stacked, [v], [y]),
        "K tensors": (lambda c, v, y: c(v, *y), v.unbind(1), [y]),
        "ExpertOutput": (lambda c, v, k: c(ExpertOutput(v[0], k[1], k[2]), k[0]), [v], [y, *classifiers]),
        "probabilities": (of_stacked, [v], [probabilities(BATCH_SIZE, NUM_CLASSES)]),
        "sample weights": (lambda c, v, k: c(v[0], k[0], sample_weight=k[1]), [v], [y, torch.rand(len(y))]),
        "mixup, sample weights": (
            lambda c, v, k: c(v[0], k[0], sample_weight=k[1]),
            [v],
            [0.7 * F.one_hot(y, NUM_CLASSES) + 0.3 * F.one_hot(y.roll(1), NUM_CLASSES), torch.rand(len(y))],
        ),
        "a normalizer": (lambda c, v, y: c(v[0], *y, normalizer=2 * BATCH_SIZE), [v], [y]),
        "maps": (of_stacked, [maps], [label_map]),
        "maps of probabilities": (of_stacked, [maps], [probabilities(4, NUM_CLASSES, 5, 5)]),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for kind, (loss, leaves, constants) in kinds.items():
            yield Problem(named(f"LGLALoss, {kind}", dtype), dtype, make_loss(), loss, leaves, constants)
    stacked = kinds["stacked logits"]
    yield Problem(named("LGLALoss", torch.float16), torch.float16, make_loss(), *stacked)
    settings: dict[str, dict[str, Any]] = {
        "without AAW": {"aaw": False},
        "balanced": {"adjustment": "balanced"},
        "label smoothing": {"label_smoothing": 0.1},
        "no reduction": {"reduction": "none"},
    }
    for setting, options in settings.items():
        dtype = torch.float32
        yield Problem(named(f"LGLALoss, {setting}", dtype), dtype, make_loss(**options), *stacked)


def many_classes() -> Iterator[Problem]:
    """Rows that one block of a kernel holds, and longer ones; by every plan of the kernels that differs."""
    for num_samples, num_classes in ((64, 8142), (16, 50_000)):
        v, y = cosine_logits(num_samples, NUM_EXPERTS, num_classes), labels(num_samples, most=num_classes)
        for dtype in (torch.float32, torch.bfloat16):
            loss = make_loss(num_classes), of_stacked, [v], [y]
            yield Problem(named(f"LGLALoss, {num_classes} classes", dtype), dtype, *loss)
            for plan in choices.other_plans(num_classes) if choices.has_triton() else ():
                name = named(f"LGLALoss, {num_classes} classes, kernels {plan}", dtype)
                yield Problem(name, dtype, *loss, around=partial(choices.use_plan, plan))


def experts() -> Iterator[Problem]:
    """Experts together, in turn and as modules of their own, by autocast in low precision."""
    shared, y = torch.randn(BATCH_SIZE, 16, 16, 16), labels(BATCH_SIZE)
    layouts: dict[str, tuple[str, bool, bool]] = {
        "together": ("grouped", True, False),
        "in turn": ("grouped", False, False),
        "independent": ("independent", False, False),
        "together, channels_last": ("grouped", True, True),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for layout, arrangement in layouts.items():
            yield Problem(
                named(f"experts {layout}", dtype),
                dtype,
                partial(ExpertsAndLoss, *arrangement),
                lambda module, leaves, constants: module(*leaves, *constants),
                [shared],
                [y],
                autocast=True,
                slack=20.0,
            )


def linear_losses() -> Iterator[Problem]:
    """LinearLGLALoss in one chunk and in several, with a bias and of cosine classifiers."""
    num_samples, width = 300, 64
    f, w = torch.randn(num_samples, NUM_EXPERTS, width), torch.randn(NUM_EXPERTS, NUM_CLASSES, width) / 8
    bias, y = torch.randn(NUM_EXPERTS, NUM_CLASSES), labels(num_samples)
    for dtype in (torch.bfloat16, torch.float32):
        for chunks, around in (("several chunks", choices.small_chunks), ("one chunk", nullcontext)):
            for kind, scale, leaves in (("bias", None, [f, w, bias]), ("cosine", 30.0, [f, w])):
                yield Problem(
                    named(f"LinearLGLALoss, {kind}, {chunks}", dtype),
                    dtype,
                    make_linear_loss(scale),
                    lambda c, leaves, y: c(leaves[0], leaves[1], y[0], *leaves[2:]),
                    leaves,
                    [y],
                    around=around,
                    slack=10.0,
                )


def losses_for_comparison() -> Iterator[Problem]:
    """The baselines: of one model in float32, of K experts in bfloat16."""
    y = labels(BATCH_SIZE)
    one = cosine_logits(BATCH_SIZE, NUM_CLASSES)
    stacked = cosine_logits(BATCH_SIZE, NUM_EXPERTS, NUM_CLASSES)
    for kind, make in BASELINES.items():
        for of, dtype, v in (("one model", torch.float32, one), ("K experts", torch.bfloat16, stacked)):
            yield Problem(named(f"{kind}, {of}", dtype), dtype, make, of_stacked, [v], [y])


def reweighted(backend: str) -> nn.Module:
    """LDAM in its second stage."""
    criterion = baselines.LDAMLoss(counts(), backend=backend)
    criterion.reweight()
    return criterion


BASELINES: dict[str, Callable[[str], nn.Module]] = {
    "FocalLoss": lambda backend: baselines.FocalLoss(backend=backend),
    "ClassBalancedLoss": lambda backend: baselines.ClassBalancedLoss(counts(), backend=backend),
    "LogitAdjustedLoss": lambda backend: baselines.LogitAdjustedLoss(counts(), 1.5, backend=backend),
    "BalancedSoftmaxLoss": lambda backend: baselines.BalancedSoftmaxLoss(counts(), backend=backend),
    "VSLoss": lambda backend: baselines.VSLoss(counts(), backend=backend),
    "LDAMLoss": lambda backend: baselines.LDAMLoss(counts(), backend=backend),
    "LDAMLoss, reweighted": reweighted,
    "RIDELoss": lambda backend: baselines.RIDELoss(counts(), backend=backend),
    "NCLLoss": lambda backend: baselines.NCLLoss(counts(), backend=backend),
}
