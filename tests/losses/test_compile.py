"""torch.compile sees whole graphs, and new batch sizes compile nothing anew."""

import importlib.util

import pytest
import torch
from compilers import CHANGES_NUMBERS, TAKES_STAGES
from torch import nn

from lgla_losses import (
    AAWWeighter,
    CLALogitAdjuster,
    ClassGrouper,
    GroupConvExperts,
    LGLALoss,
    LinearLGLALoss,
)
from lgla_losses.kernels import autograd, chunked, native

COUNTS = [40, 9, 5, 1]
#: aot_eager traces and differentiates whole graphs without generating code: enough for most checks.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def batch(num_samples, num_experts=3):
    logits = 60 * torch.rand(num_samples, num_experts, 4, dtype=torch.float64) - 30
    target = torch.arange(num_samples) % 4
    target[num_samples // 2] = -100
    return logits.requires_grad_(), target


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["tensor", "list", "features"])
def test_criterion_compiles_with_a_dynamic_batch(backend, form, reduction):
    scale = None if form == "features" else 30.0
    criterion = LGLALoss(COUNTS, scale=scale, label_smoothing=0.1, reduction=reduction)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=backend)
    weight = torch.randn(3, 4, 6, dtype=torch.float64)
    for step, num_samples in enumerate((8, 5, 13)):
        results = []
        for function in (criterion, compiled):
            torch.manual_seed(num_samples)
            logits, target = batch(num_samples)
            output = (
                [v.detach().clone().requires_grad_() for v in logits.unbind(1)] if form == "list" else logits
            )
            features = torch.randn(num_samples, 3, 6, dtype=torch.float64)
            inputs = {"features": features, "weight": weight} if form == "features" else {}
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                loss = function(output, target, **inputs)
            loss.sum().backward()
            results.append((loss.detach(), [v.grad for v in (output if form == "list" else [output])]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_logits", [True, False])
@pytest.mark.parametrize("number", [8, 8.0])
def test_a_number_as_normalizer_compiles_and_may_change(backend, of_logits, number):
    criterion = LGLALoss(COUNTS) if of_logits else LinearLGLALoss(COUNTS)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=backend)
    logits, target = batch(8)
    inputs = (logits, target) if of_logits else (torch.randn(8, 3, 6), torch.randn(3, 4, 6), target)
    once = isinstance(number, int) or CHANGES_NUMBERS
    for step, normalizer in enumerate((number, number + 5, number + 1)):
        with torch.compiler.set_stance("fail_on_recompile" if step and once else "default"):
            loss = compiled(*inputs, normalizer=normalizer)
        torch.testing.assert_close(loss, criterion(*inputs, normalizer=normalizer))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["tensor", "list"])
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_many_classes_compile_to_the_operator(backend, form, reduction):
    """From 512 classes on the fused operator stands in the graph, in both directions."""
    counts = list(range(600, 0, -1))
    criterion = LGLALoss(counts, label_smoothing=0.1, reduction=reduction)
    graphs = []

    def spy(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=spy)
    target = torch.tensor([0, 599, -100, 7, 300])
    for number in (5, 4):
        results = []
        for function in (criterion, compiled):
            torch.manual_seed(number)
            logits = 60 * torch.rand(number, 3, 600, dtype=torch.float64) - 30
            leaves = list(logits.unbind(1)) if form == "list" else [logits]
            leaves = [v.clone().requires_grad_() for v in leaves]
            loss = function(leaves if form == "list" else leaves[0], target[:number])
            loss.backward(torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
            results.append((loss.detach(), [v.grad for v in leaves]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    assert all("lgla_losses.cross_entropy" in graph for graph in graphs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_compiled_gradient_is_computed_in_every_backward(backend, dtype, monkeypatch):
    """Each time anew through a retained graph."""
    if native.LIBRARY is None:
        pytest.skip(native.MISSING)
    calls = []
    monkeypatch.setattr(native, "backward", lambda *a, f=native.backward: (calls.append(1), f(*a)))
    criterion = LGLALoss(list(range(600, 0, -1)))
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    logits = (30 * torch.rand(4, 3, 600) - 15).to(dtype).requires_grad_()
    results = []
    for function in (compiled, LGLALoss(list(range(600, 0, -1)), backend="reference")):
        loss = 4 * function(logits, torch.arange(4))
        results += [
            torch.autograd.grad(loss, logits, retain_graph=True)[0],
            torch.autograd.grad(loss, logits)[0],
        ]
    assert len(calls) == 2
    for result in results[:3]:
        torch.testing.assert_close(result, results[3])


def test_a_compiled_loss_computes_no_gradient_before_backward(monkeypatch):
    wanted = []

    def spy(logits, rows, gradients, forward=chunked.forward):
        wanted.append(gradients[0] is not None)
        return forward(logits, rows, gradients)

    monkeypatch.setattr(chunked, "forward", spy)
    monkeypatch.setattr(native, "LIBRARY", None)
    criterion = LGLALoss(list(range(600, 0, -1)), backend="fused")
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    logits = torch.randn(4, 3, 600)
    compiled(logits, torch.arange(4))
    compiled(logits.requires_grad_(), torch.arange(4))
    with torch.no_grad():
        compiled(logits, torch.arange(4))
    assert wanted == [False, False, False]


def test_values_are_checked_on_request_under_a_compiler():
    criterion = LGLALoss(list(range(600, 0, -1)), validate_args=True)
    logits = torch.full((4, 3, 600), float("nan"))
    with pytest.raises(ValueError, match="logits"):
        torch.compile(criterion, backend="eager")(logits, torch.arange(4))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_loss_has_no_second_derivative_and_says_so(reduction):
    """A penalty on the gradient beside the loss would go without its own gradient."""
    criterion = LGLALoss(list(range(600, 0, -1)), aaw=False, reduction=reduction)
    logits = torch.randn(4, 3, 600, requires_grad=True)
    loss = torch.compile(criterion, backend="eager")(logits, torch.arange(4)).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (loss + (gradient**2).sum()).backward()


def of_many_classes(loss, device="cpu"):
    """A criterion, for which the operator stands in a graph, and its inputs."""
    counts, target = list(range(600, 0, -1)), torch.arange(4, device=device)
    if loss == "logits":
        return LGLALoss(counts).to(device), (30 * torch.rand(4, 3, 600, device=device), target)
    features, weight = torch.randn(4, 3, 5, device=device), torch.randn(3, 600, 5, device=device)
    return LinearLGLALoss(counts).to(device), (features, weight, target)


@pytest.mark.parametrize("loss", ["logits", "linear"])
def test_it_compiles_without_the_c_library(loss, monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", None)
    criterion, inputs = of_many_classes(loss)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), criterion(*inputs))


@pytest.mark.parametrize("loss", ["logits", "linear"])
def test_many_classes_compile_on_a_gpu(loss, device, monkeypatch):
    """Where Triton is looked for, the compiler of PyTorch 2.11 gives up. Without a GPU it traces as if."""
    pytest.importorskip("triton")
    looked_for, find = [], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: looked_for.append(name) or find(name))
    if device == "cpu":
        choose, gpu = autograd.engine_for, torch.device("cuda")
        monkeypatch.setattr(autograd, "engine_for", lambda backend, _: choose(backend, gpu))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch.compiler.is_dynamo_compiling())
    criterion, inputs = of_many_classes(loss, device)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), criterion(*inputs))
    assert "triton" not in looked_for


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_compile(backend):
    grouper = ClassGrouper(COUNTS, 2)
    angles, target = torch.rand(6, 3), torch.arange(6) % 4
    for module, inputs in (
        (grouper, (target,)),
        (CLALogitAdjuster(grouper), (torch.randn(6, 3, 4),)),
        (AAWWeighter(grouper), (angles, target)),
    ):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
        torch.testing.assert_close(compiled(*inputs), module(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_a_whole_step_compiles(backend, layout):
    stage = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    experts = GroupConvExperts(stage, 3, 4, layout=layout, reset=True)
    criterion = LGLALoss(COUNTS)

    def step(images, target):
        return criterion(experts(images), target)

    images, target = torch.randn(8, 2, 6, 6), torch.arange(8) % 4
    losses = []
    fullgraph = layout == "independent" or TAKES_STAGES
    for function in (step, torch.compile(step, fullgraph=fullgraph, backend=backend)):
        experts.zero_grad()
        loss = function(images, target)
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in experts.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_a_step_under_autocast_compiles(layout):
    stage = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    experts, criterion = GroupConvExperts(stage, 3, 4, layout=layout, reset=True), LGLALoss(COUNTS)

    def step(images, target):
        with torch.autocast("cpu", torch.bfloat16):
            return criterion(experts(images), target)

    images, target = torch.randn(8, 2, 6, 6), torch.arange(8) % 4
    fullgraph = layout == "independent" or TAKES_STAGES
    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")(images, target)
    torch.testing.assert_close(compiled, step(images, target), rtol=1e-2, atol=1e-2)
