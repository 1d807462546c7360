"""The engines as a parameter of tests: native on the CPU, the others on a GPU where there is one."""

import pytest
import torch

from conftest import HAS_GPU, on_gpu
from lgla_losses.kernels import chunked, native

try:
    from lgla_losses.kernels import triton
except ImportError:
    triton = None

GPU = "cuda" if HAS_GPU else "cpu"
INF, NAN = float("inf"), float("nan")
IGNORE = -100
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MEMORY = ["contiguous", "experts first", "classes first", "slice", "every other"]

#: By name; all but the C library's run on a GPU where there is one.
ENGINES = ["native", on_gpu("chunked"), on_gpu("triton")]


def named(name):
    """The engine of that name; skips the test where it cannot run."""
    engine = {"native": native, "chunked": chunked, "triton": triton}[name]
    if engine is None:
        pytest.skip("needs Triton")
    return engine


def device_of(engine):
    return torch.device("cpu" if engine is native else GPU)


def use_small_blocks(engine, monkeypatch):
    """Small batches in as many parts as large ones."""
    if engine is native:
        monkeypatch.setattr(native, "_WORTH_THREADS", 1)
    elif engine is chunked:
        monkeypatch.setattr(chunked, "_CPU_CHUNK", 64)
        monkeypatch.setattr(chunked, "_CHUNK", 64)
    else:
        monkeypatch.setattr(triton, "forward_tile", lambda *_: triton.Tile(2, 16, 4))
        monkeypatch.setattr(triton, "backward_tile", lambda *_: triton.Tile(2, 16, 4))


def random_logits(*shape, dtype=torch.float64):
    return (60 * torch.rand(*shape, dtype=torch.float64) - 30).to(dtype)


def random_target(num_samples, num_classes, ignored=()):
    target = torch.randint(num_classes, (num_samples,))
    target[list(ignored)] = IGNORE
    return target


def random_probabilities(num_samples, num_classes, kind, dtype=torch.float64, ignored=()):
    """Of every class ("dense"), or of at most two ("mixup"); 0 everywhere for ignored samples."""
    if kind == "dense":
        result = torch.softmax(torch.randn(num_samples, num_classes, dtype=torch.float64), dim=1)
    else:
        pairs = torch.randint(num_classes, (num_samples, 2))
        share = torch.rand(num_samples, 1, dtype=torch.float64)
        result = torch.zeros(num_samples, num_classes, dtype=torch.float64)
        result.scatter_add_(1, pairs, torch.cat([share, 1 - share], dim=1))
    result[list(ignored)] = 0.0
    return result.to(dtype)


def random_table(num_experts, num_classes):
    return -9 * torch.rand(num_experts, num_classes, dtype=torch.float64)


def like(values, memory):
    """The same values ``[n, k, c]`` in memory of another layout."""
    n, k, c = values.shape
    view = {
        "contiguous": lambda: torch.empty_like(values, memory_format=torch.contiguous_format),
        "experts first": lambda: values.new_zeros(k, n, c).transpose(0, 1),
        "classes first": lambda: values.new_zeros(c, k, n).permute(2, 1, 0),
        "slice": lambda: values.new_zeros(n + 1, k + 2, c + 3)[1:, 1:-1, 1:-2],
        "every other": lambda: values.new_zeros(2 * n, k, 2 * c)[::2, :, ::2],
    }[memory]()
    return view.copy_(values)
