import os

import hypothesis
import pytest
import torch

if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 take it unasked: 10 bits of 23
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import torchvision_shim  # noqa: F401

HAS_GPU = torch.cuda.is_available()

# The same examples in every run: a failure seen once is seen again.
hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def on_gpu(value):
    """A parameter whose tests run on a GPU, where there is one: ``pytest -m cuda`` chooses them."""
    return pytest.param(value, marks=pytest.mark.cuda) if HAS_GPU else value


DEVICES = ["cpu", on_gpu("cuda")] if HAS_GPU else ["cpu"]

#: What a result may differ by from float64 truth, by its dtype.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """On a GPU each process begins with a long test: at the end of its part all others would wait for it.

    pytest-xdist gives the processes equal parts, in order, and takes no test away that is next in turn.
    """
    if HAS_GPU:
        processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        items[:] = long_ones_first(
            items, [bool(item.get_closest_marker("long")) for item in items], processes
        )


def long_ones_first(items, are_long, parts):
    """The same items, those that are long where each of equal parts begins, one after the other."""
    long, ordered = (
        [item for item, is_long in zip(items, are_long, strict=True) if is_long is kind]
        for kind in (True, False)
    )
    places = sorted((i % parts * len(items) // parts + i // parts, i) for i in range(len(long)))
    for place, i in places:
        ordered.insert(place, long[i])
    return ordered


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gpu_survives():
    """What breaks a process's GPU, as an access out of bounds or a capture cut short, fails one test only.

    All later tests of the process would fail too. pytest-xdist starts another one in its place.
    """
    yield
    if HAS_GPU and torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.rand(1, device="cuda").item()
        except RuntimeError:
            os._exit(1)


@pytest.fixture
def fresh_memory_is_nan(monkeypatch):
    """Memory that nothing has been written to holds NaN, as far as PyTorch's functions give it."""
    # PyTorch lists once what a default device applies to; a list with our torch.empty would last for ever.
    torch.utils._device._device_constructors()

    def poisoned(original):
        def create(*args, **options):
            tensor = original(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return create

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def close():
    """Assert equality within the one tolerance of the result's dtype."""

    def check(actual, expected, dtype=None):
        expected = torch.as_tensor(expected, dtype=torch.float64)
        tolerance = TOLERANCE[dtype or actual.dtype]
        torch.testing.assert_close(actual.detach().double().cpu(), expected.detach().cpu(), **tolerance)

    return check
