"""The loss of classes that are spread over ranks."""

import pytest
import torch
from ranks import run_ranks
from reference import assert_raises

from lgla_losses import LinearLGLALoss
from lgla_losses.distributed import ClassParallelLGLALoss
from lgla_losses.kernels import class_parallel

COUNTS = [40, 9, 5, 1]
FEATURES, WEIGHT, TARGET = torch.zeros(2, 3, 5), torch.zeros(3, 4, 5), torch.tensor([0, 3])


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(world_size, tmp_path):
    """Loss, gradients, shards, DTensors, a mesh, the numbers sent, and what goes wrong on one rank, on gloo."""
    run_ranks("class_parallel_worker.py", world_size, tmp_path)


@pytest.mark.parametrize("options", [{}, {"scale": 20.0}, {"aaw": False, "label_smoothing": 0.1}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("is_soft", [False, True])
def test_alone_it_has_all_classes(options, reduction, is_soft):
    """Class indices, or probabilities with sample weights."""
    results = []
    for make in (LinearLGLALoss, ClassParallelLGLALoss):
        torch.manual_seed(0)
        features, weight = (torch.randn(size).double().requires_grad_() for size in ((6, 3, 5), (3, 4, 5)))
        target, inputs = torch.tensor([0, 1, 2, 3, -100, 0]), {}
        if is_soft:
            target, inputs = torch.rand(6, 4).softmax(dim=1), {"sample_weight": torch.rand(6)}
        loss = make(COUNTS, reduction=reduction, **options)(features, weight, target, **inputs)
        loss.backward(torch.linspace(1, 2, loss.numel(), dtype=torch.float64).view(loss.shape))
        results.append((loss.detach(), features.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalizer", [7, torch.tensor(7), torch.tensor(7.5, dtype=torch.float64)])
def test_a_normalizer_may_be_a_number_or_a_tensor(normalizer, device):
    """On a GPU no step waits for it."""
    features, weight = torch.randn(2, 3, 5, device=device), torch.randn(3, 4, 5, device=device)
    target = TARGET.to(device)
    total = ClassParallelLGLALoss(COUNTS, reduction="sum").to(device)(features, weight, target)
    criterion = ClassParallelLGLALoss(COUNTS).to(device)
    criterion(features, weight, target)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = criterion(features, weight, target, normalizer=normalizer)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, total / float(normalizer))


def test_a_masked_class_does_no_harm():
    bias = torch.zeros(3, 4)
    bias[:, 1] = -torch.inf
    features, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    ClassParallelLGLALoss(COUNTS)(features, weight, TARGET, bias).backward()
    assert features.grad.isfinite().all()
    assert (weight.grad[:, 1] == 0).all()


def test_second_derivatives_are_refused():
    features = torch.randn(2, 3, 5, requires_grad=True)
    loss = ClassParallelLGLALoss(COUNTS)(features, torch.randn(3, 4, 5), TARGET)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, features, create_graph=True)


def test_validation_computes_no_gradient(monkeypatch):
    """Though the weights of classifiers ask for one."""
    asked, compute = [], class_parallel.sum_over_experts

    def watched(inputs, wanted, *others):
        asked.append(any(wanted))
        return compute(inputs, wanted, *others)

    monkeypatch.setattr(class_parallel, "sum_over_experts", watched)
    with torch.no_grad():
        ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT.clone().requires_grad_(), TARGET)
    assert asked == [False]


def test_it_runs_beside_compiled_code():
    criterion = ClassParallelLGLALoss(COUNTS)
    compiled = torch.compile(lambda f, w: criterion(2 * f, w, TARGET), backend="aot_eager")
    features, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(3, 4, 5)
    loss = compiled(features, weight)
    loss.backward()
    gradient = features.grad.clone()
    features.grad = None
    expected = criterion(2 * features, weight, TARGET)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, features.grad)


@pytest.mark.parametrize("case", [
    (lambda: ClassParallelLGLALoss(COUNTS, backend="fused"), TypeError, "backend", "leave it out"),
    (lambda: ClassParallelLGLALoss(COUNTS, data_group=object()), ValueError, "process_group", "None", "mesh"),
    (lambda: ClassParallelLGLALoss(), TypeError, "class_counts"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT[:, :2], TARGET), ValueError, "weight", "[3, 4, d]", "[3, 2, 5]", "rank 0 of 1", "torch.chunk"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES[:, :2], WEIGHT, TARGET), ValueError, "features", "[2, 3, d]", "[2, 2, 5]"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, TARGET[:1]), ValueError, "target", "[2]", "[1]"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, TARGET + 1), ValueError, "target", "0..3", "got 4"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, torch.ones(2, 3) / 3), ValueError, "target", "[2, 4]", "[2, 3]"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, torch.ones(2, 4)), ValueError, "target", "sum to 1", "4 to 4", "softmax"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, TARGET, sample_weight=torch.ones(3)), ValueError, "sample_weight", "[2]", "[3]"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, TARGET, sample_weight=-torch.ones(2)), ValueError, "sample_weight", ">= 0"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES * torch.nan, WEIGHT, TARGET), ValueError, "features", "NaN"),
    (lambda: ClassParallelLGLALoss(COUNTS, aaw=False)(FEATURES, WEIGHT * torch.nan, TARGET), ValueError, "weight, bias", "rank 0"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, TARGET, torch.zeros(4)), ValueError, "bias", "[K, C_r]", "[4]"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, TARGET, torch.zeros(3, 3)), ValueError, "bias", "[3, 4]", "[3, 3]"),
    (lambda: ClassParallelLGLALoss(COUNTS, scale=9.0)(FEATURES, WEIGHT, TARGET, torch.zeros(3, 4)), ValueError, "bias", "None", "cosine"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT.double(), TARGET), ValueError, "weight", "float32", "float64"),
    (lambda: ClassParallelLGLALoss(COUNTS)(FEATURES, WEIGHT, TARGET, normalizer=0.0), ValueError, "normalizer", "positive"),
    (lambda: ClassParallelLGLALoss(COUNTS)._replicate_for_data_parallel(), TypeError, "ClassParallelLGLALoss", "DataParallel"),
])  # fmt: skip
def test_errors_name_the_argument_what_came_and_the_way_out(case):
    assert_raises(*case)
