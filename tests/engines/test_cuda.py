"""Whole steps on a GPU: right, without a wait, in CUDA graphs and streams; without one, the same on a CPU.

Where there is no GPU a graph is the step itself, and the meta device, which has no values, tells of reads.
"""

import contextlib
import gc

import pytest
import torch
from torch import nn

from conftest import HAS_GPU, on_gpu
from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss, LinearLGLALoss, baselines
from lgla_losses.kernels import linear

NUM_CLASSES = 50
COUNTS = [int(500 * 100 ** (-j / (NUM_CLASSES - 1))) for j in range(NUM_CLASSES)]
DTYPES = [torch.float32, torch.bfloat16]


# --- Steps --------------------------------------------------------------------------------------------------


class Step:
    """A loss and its inputs; a call gives the loss and the gradients of the leaves."""

    def __init__(self, loss, leaves, constants=()):
        self.loss, self.leaves, self.constants = loss, list(leaves), list(constants)

    def __call__(self):
        for leaf in self.leaves:
            leaf.grad = None
        loss = self.loss()
        loss.sum().backward()
        return [loss.detach(), *(leaf.grad for leaf in self.leaves)]

    def next_batch(self):
        """Other inputs in the same memory."""
        with torch.no_grad():
            for number, tensor in enumerate([*self.leaves, *self.constants], start=1):
                tensor.copy_(tensor.roll(number, dims=0) if tensor.dim() else 2 * tensor)


def leaf(values, device, dtype):
    return values.to(device, dtype).requires_grad_()


def of_logits(device, dtype, make=lambda v: v, criterion=None, target=None, maps=(), **inputs):
    """A step of :class:`LGLALoss`; ``inputs`` as its forward takes them, or None of those."""
    logits = leaf(60 * torch.rand(12, 3, NUM_CLASSES, *maps) - 30, device, dtype)
    if target is None:
        target = torch.randint(NUM_CLASSES, (12, *maps))
        target[3] = -100
    target = target.to(device)
    inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
    criterion = (LGLALoss(COUNTS) if criterion is None else criterion).to(device)
    constants = [v for v in (target, *inputs.values()) if isinstance(v, torch.Tensor)]
    return Step(lambda: criterion(make(logits), target, **inputs), [logits], constants)


def of_output(device, dtype):
    features = torch.randn(12, 3, 16).to(device, dtype)
    weight = torch.randn(3, NUM_CLASSES, 16).to(device)
    form = lambda v: ExpertOutput(v, features, weight)  # noqa: E731
    return of_logits(device, dtype, form, criterion=LGLALoss(COUNTS, scale=None))


def of_linear_head(device, dtype):
    features = torch.randn(12, 3, 16).to(dtype)
    weight = torch.randn(3, NUM_CLASSES, 16)
    return of_logits(device, dtype, criterion=LGLALoss(COUNTS, scale=None), features=features, weight=weight)


def of_one_model(device, dtype):
    criterion = LGLALoss(COUNTS, 1, adjustment="logit", aaw=False, label_smoothing=0.1)
    return of_logits(device, dtype, lambda v: v[:, :1], criterion)


def of_masked(device, dtype, make):
    """A step of a loss that masks the last ten classes."""
    criterion = make([*COUNTS[:-10], *[0] * 10], zero_counts="mask")
    return of_logits(device, dtype, criterion=criterion, target=torch.randint(NUM_CLASSES - 10, (12,)))


def of_term(device, dtype, term):
    """A step of a term between experts alone."""
    logits = leaf(torch.randn(12, 3, NUM_CLASSES), device, dtype)
    return Step(lambda: term(logits), [logits])


def of_features(device, dtype, criterion, with_bias=False, **inputs):
    """A step of :class:`LinearLGLALoss`."""
    features = leaf(torch.randn(300, 3, 16), device, dtype)
    weight = leaf(torch.randn(3, NUM_CLASSES, 16) / 4, device, dtype)
    bias = leaf(torch.randn(3, NUM_CLASSES), device, dtype) if with_bias else None
    target = torch.randint(NUM_CLASSES, (300,))
    target[7] = -100
    target, criterion = target.to(device), criterion.to(device)
    leaves = [v for v in (features, weight, bias) if v is not None]
    return Step(lambda: criterion(features, weight, target, bias, **inputs), leaves, [target])


def probabilities(*maps):
    return torch.rand(12, NUM_CLASSES, *maps).softmax(dim=1)


def of_baseline(criterion, make):
    return lambda device, dtype: of_logits(device, dtype, make, criterion())


def deferred_ldam():
    criterion = baselines.LDAMLoss(COUNTS)
    criterion.reweight()
    return criterion


def of_several_labels(device, dtype, criterion, **inputs):
    multi_hot = (torch.rand(12, NUM_CLASSES) < 0.2).float()
    return of_logits(device, dtype, criterion=criterion, target=multi_hot, **inputs)


BASELINES = {
    "focal": baselines.FocalLoss,
    "class-balanced": lambda: baselines.ClassBalancedLoss(COUNTS),
    "class-balanced focal": lambda: baselines.ClassBalancedLoss(COUNTS, gamma=2.0),
    "logit-adjusted": lambda: baselines.LogitAdjustedLoss(COUNTS),
    "balanced softmax": lambda: baselines.BalancedSoftmaxLoss(COUNTS),
    "VS": lambda: baselines.VSLoss(COUNTS),
    "LDAM": lambda: baselines.LDAMLoss(COUNTS),
    "LDAM, deferred weights": deferred_ldam,
    "RIDE": lambda: baselines.RIDELoss(COUNTS),
    "NCL": lambda: baselines.NCLLoss(COUNTS),
}

#: By name what makes a step for a device and a dtype.
STEPS = {
    "logits": of_logits,
    "K tensors": lambda *to: of_logits(*to, lambda v: list(v.unbind(1))),
    "ExpertOutput": of_output,
    "linear head": of_linear_head,
    "CLA": lambda *to: of_logits(*to, criterion=LGLALoss(COUNTS, aaw=False)),
    "no reduction": lambda *to: of_logits(*to, criterion=LGLALoss(COUNTS, reduction="none")),
    "plain PyTorch": lambda *to: of_logits(*to, criterion=LGLALoss(COUNTS, backend="reference")),
    "one model": of_one_model,
    "weights of samples": lambda *to: of_logits(*to, sample_weight=torch.rand(12)),
    "a number as normalizer": lambda *to: of_logits(*to, normalizer=9.0),
    "a tensor as normalizer": lambda *to: of_logits(*to, normalizer=torch.tensor(9.0)),
    "probabilities": lambda *to: of_logits(*to, target=probabilities()),
    "probabilities, CLA": lambda *to: of_logits(
        *to, criterion=LGLALoss(COUNTS, aaw=False), target=probabilities()
    ),
    "maps": lambda *to: of_logits(*to, maps=(2, 3)),
    "maps of probabilities": lambda *to: of_logits(*to, target=probabilities(2, 3), maps=(2, 3)),
    "several labels": lambda *to: of_several_labels(*to, baselines.SigmoidAdjustedLoss(COUNTS, 5000)),
    "several labels, focal": lambda *to: of_several_labels(
        *to, baselines.ClassBalancedBCELoss(COUNTS, gamma=2.0), sample_weight=torch.rand(12), normalizer=9.0
    ),
    "RIDE, masked classes": lambda *to: of_masked(*to, baselines.RIDELoss),
    "NCL, masked classes": lambda *to: of_masked(*to, baselines.NCLLoss),
    "diversity": lambda *to: of_term(*to, baselines.expert_diversity),
    "diversity, a temperature": lambda *to: of_term(*to, lambda v: baselines.expert_diversity(v, 1.5)),
    "distillation": lambda *to: of_term(*to, baselines.expert_distillation),
    "features, linear": lambda *to: of_features(*to, LinearLGLALoss(COUNTS), with_bias=True),
    "features, cosine": lambda *to: of_features(*to, LinearLGLALoss(COUNTS, scale=30.0)),
    "features, a number as normalizer": lambda *to: of_features(*to, LinearLGLALoss(COUNTS), normalizer=9.0),
}
for _name, _criterion in BASELINES.items():
    STEPS[f"{_name}, three experts"] = of_baseline(_criterion, lambda v: v)
    STEPS[f"{_name}, one model"] = of_baseline(_criterion, lambda v: v[:, 0])


def stage():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    )  # fmt: skip


def twins(device, **options):
    """The same experts in both layouts."""
    grouped = GroupConvExperts(stage, 3, NUM_CLASSES, **options).to(device)
    return grouped, grouped.to_independent()


def in_precision(low, device):
    """Autocast to a dtype; None is none."""
    return contextlib.nullcontext() if low is None else torch.autocast(device, dtype=low)


def of_experts(device, experts, low=None, memory_format=torch.contiguous_format):
    """A step of experts with the loss; with ``low`` under autocast."""
    experts.to(memory_format=memory_format)
    images = torch.randn(32, 8, 12, 12).to(device).contiguous(memory_format=memory_format).requires_grad_()
    target = (torch.arange(32) % NUM_CLASSES).to(device)
    criterion = LGLALoss(COUNTS).to(device)

    def loss():
        with in_precision(low, device):
            return criterion(experts(images), target)

    return Step(loss, [images, *experts.parameters()], [target])


# --- What a GPU does with them ------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waits(device):
    """What waits for the GPU raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step, device):
    """A function that replays a step from a CUDA graph; on a CPU the step itself."""
    if device != "cuda":
        return step
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    current.wait_stream(side)
    gc.collect()  # graphs of autograd that are still alive remember their stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step()

    def replay():
        for tensor in results:
            tensor.fill_(float("nan"))  # what is not written again shows
        graph.replay()
        return [tensor.clone() for tensor in results]

    return replay


def in_use(device):
    """Bytes on a GPU, tensors on a CPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def assert_alike(actual, expected, **tolerance):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, **tolerance)


def error(actual, expected):
    """The relative error of a tensor, by norms."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_near(actual, expected, tolerance):
    """By the norms of tensors, for results of convolutions."""
    errors = [error(ours, theirs) for ours, theirs in zip(actual, expected, strict=True)]
    assert all(value < tolerance for value in errors), errors


# --- Losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_float64_on_the_cpu(name, dtype, device):
    torch.manual_seed(1)
    found = STEPS[name](device, dtype)
    torch.manual_seed(1)
    truth = STEPS[name]("cpu", torch.float64)
    with torch.no_grad():
        for rounded, exact in zip(found.leaves, truth.leaves, strict=True):
            exact.copy_(rounded)
    (loss, *gradients), (true_loss, *true_gradients) = found(), truth()
    assert error(loss, true_loss) < (1e-5 if dtype == torch.float32 else 0.02)
    for ours, exact in zip(gradients, true_gradients, strict=True):
        assert ours.dtype == dtype
        assert error(ours, exact) < (2e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [on_gpu("cuda")] if HAS_GPU else ["meta"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing(name, dtype, place):
    step = STEPS[name](place, dtype)
    step()  # compiles the kernels
    with no_waits(place):
        step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_replayed_from_a_graph(name, dtype, device):
    step = STEPS[name](device, dtype)
    first = step()
    replay = captured(step, device)
    assert_alike(replay(), first)
    step.next_batch()
    assert_alike(replay(), step())


@pytest.mark.parametrize(
    "name",
    ["logits", "K tensors", "ExpertOutput", "maps of probabilities", "features, linear", "LDAM, one model"],
)
def test_steps_leave_no_memory_behind(name, device):
    """Also where nobody collects garbage meanwhile."""
    step = STEPS[name](device, torch.float32)
    step()
    gc.collect()
    gc.disable()
    try:
        step()
        before = in_use(device)
        for _ in range(3):
            step()
        assert in_use(device) <= before  # less, where other tests left something
    finally:
        gc.enable()


def test_steps_on_several_streams_share_a_loss(device):
    """Each its own inputs; the loss's constants are only read."""
    criterion = LGLALoss(COUNTS)
    steps = [of_logits(device, torch.float32, criterion=criterion) for _ in range(4)]
    expected = [step() for step in steps]
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in steps]
    found = []
    for _ in range(5):
        found = []
        for step, stream in zip(steps, streams, strict=True):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(step())
        for stream in filter(None, streams):
            torch.cuda.current_stream().wait_stream(stream)
    for ours, theirs in zip(found, expected, strict=True):
        assert_alike(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["logits", "no reduction", "features, linear", "LDAM, three experts"])
@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(name):
    torch.manual_seed(1)
    found = STEPS[name]("cuda:1", torch.float32)()
    torch.manual_seed(1)
    expected = STEPS[name]("cpu", torch.float32)()
    assert_alike([v.cpu() for v in found], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 30.0])
def test_chunks_of_bfloat16_features_keep_the_digits(scale, device, monkeypatch):
    """Five chunks, whose gradients are added in float32; each of its products may round once."""
    monkeypatch.setattr(linear, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    results = []
    for dtype, place, backend in ((torch.bfloat16, device, "auto"), (torch.float64, "cpu", "reference")):
        torch.manual_seed(1)
        step = of_features(
            place, dtype, LinearLGLALoss(COUNTS, scale=scale, backend=backend), with_bias=scale is None
        )
        with torch.no_grad():
            for tensor in step.leaves:
                tensor.copy_(tensor.bfloat16())
        results.append(step())
    for number, (ours, exact) in enumerate(zip(*results, strict=True)):
        assert error(ours, exact) < 0.02, number


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("maps", [(), (2, 3)])
def test_a_multi_hot_batch_is_told_in_a_later_call_without_a_wait(maps):
    multi_hot = (torch.rand(12, NUM_CLASSES, *maps) < 0.2).float()
    unchecked = LGLALoss(COUNTS, validate_args=False)
    step = of_logits("cuda", torch.float32, criterion=unchecked, target=multi_hot, maps=maps)
    for _ in range(2):
        step()  # compiles the kernels
        torch.cuda.synchronize()

    step = of_logits("cuda", torch.float32, target=multi_hot, maps=maps)
    with no_waits("cuda"):
        step()
    torch.cuda.synchronize()
    with no_waits("cuda"), pytest.raises(ValueError, match=r"SigmoidAdjustedLoss .*earlier batch"):
        step()


# --- Experts ------------------------------------------------------------------------------------------------


RUNS = ["together", "in turn", "independent"]


def experts_that_run(how, device, **options):
    grouped, independent = twins(device, **options)
    grouped.together = how == "together"
    return independent if how == "independent" else grouped


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
@pytest.mark.parametrize("how", RUNS)
def test_experts_are_those_of_float64_on_the_cpu(how, classifier, low, memory_format, device):
    torch.manual_seed(1)
    experts = experts_that_run(how, device, classifier=classifier)
    torch.manual_seed(1)
    exact = experts_that_run(how, "cpu", classifier=classifier).double()
    images = torch.randn(32, 8, 12, 12)
    upstream = torch.randn(32, 3, NUM_CLASSES)
    results = []
    for module, place, dtype in ((experts, device, torch.float32), (exact, "cpu", torch.float64)):
        module.to(memory_format=memory_format)
        inputs = images.to(place, dtype).clone(memory_format=memory_format).requires_grad_()
        taken = low if module is experts else None
        with in_precision(taken, place):
            output = module(inputs)
        assert output.logits.dtype == (taken or dtype)
        (output.logits.to(dtype) * upstream.to(place, dtype)).sum().backward()
        found = {name: tensor.grad for name, tensor in module.named_parameters()}
        found |= {name: tensor for name, tensor in module.named_buffers() if tensor.is_floating_point()}
        results.append({"logits": output.logits.detach(), "images": inputs.grad, **found})
    ours, truth = results
    for name, tensor in ours.items():
        assert tensor.isfinite().all(), name
        # Batch norm takes differences of gradients, which bfloat16 has rounded; and the gradient of class
        # centres that begin close to each other is a difference too.
        assert error(tensor, truth[name]) < (5e-3 if low is None else 0.25), name


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("how", RUNS)
def test_a_step_of_experts_waits_for_nothing(how, low, device):
    step = of_experts(device, experts_that_run(how, device), low)
    step()
    with no_waits(device):
        step()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("how", RUNS)
def test_a_step_of_experts_is_replayed_from_a_graph(how, low, memory_format, device):
    experts = experts_that_run(how, device)
    step = of_experts(device, experts, low, memory_format)
    first = step()
    replay = captured(step, device)
    # cuDNN may add up gradients in another order every time.
    tolerance = 1e-3 if low is None else 0.1
    assert_near(replay(), first, tolerance)
    counters = [v for v in experts.buffers() if not v.is_floating_point()]
    before = [int(v.sum()) for v in counters]
    step.next_batch()
    assert_near(replay(), step(), tolerance)
    after = [n + 2 * v.numel() for n, v in zip(before, counters, strict=True)]
    assert [int(v.sum()) for v in counters] == after


@pytest.mark.parametrize("how", RUNS)
def test_steps_of_experts_leave_no_memory_behind(how, device):
    step = of_experts(device, experts_that_run(how, device))
    for _ in range(2):
        step()
    gc.collect()
    before = in_use(device)
    for _ in range(3):
        step()
    gc.collect()
    assert in_use(device) <= before  # less, where other tests left something
