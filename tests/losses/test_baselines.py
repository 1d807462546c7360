"""The losses LGLA is compared with: against their papers, in plain float64 loops, and against PyTorch."""

import copy
import math
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import ROOT
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from lgla_losses import ExpertOutput, LGLALoss, baselines
from lgla_losses._batch import Batch
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lgla_losses.kernels import autograd, chunked, native

COUNTS = [900, 120, 17, 17, 3]
TARGET = torch.tensor([0, 4, 2, -100, 1, 3, 4])


def softmax(values):
    peak = max(values)
    exponentials = [math.exp(v - peak) for v in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def effective_number_weights(counts, beta):
    weights = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(counts) * w / math.fsum(weights) for w in weights]


def focal(v, y, counts, gamma=2.0):
    """Lin et al., Eq. 4."""
    p = softmax(v)[y]
    return -((1 - p) ** gamma) * math.log(p)


def class_balanced(v, y, counts, beta=0.99):
    """Cui et al., section 4: the softmax cross entropy."""
    return effective_number_weights(counts, beta)[y] * -math.log(softmax(v)[y])


def class_balanced_focal(v, y, counts, beta=0.99, gamma=0.5):
    """Cui et al., section 4: the focal loss."""
    return effective_number_weights(counts, beta)[y] * focal(v, y, counts, gamma)


def ldam(v, y, counts, max_margin=0.5, scale=30.0):
    """Cao et al., section 3.2, of the cosines v / s."""
    largest = max(n ** (-1 / 4) for n in counts)
    cosine = [value / scale for value in v]
    cosine[y] -= counts[y] ** (-1 / 4) * max_margin / largest
    return -math.log(softmax([scale * c for c in cosine])[y])


def ldam_reweighted(v, y, counts, beta=0.999):
    """Cao et al., section 3.3."""
    return effective_number_weights(counts, beta)[y] * ldam(v, y, counts)


def logit_adjusted(v, y, counts, tau=1.5):
    """Menon et al., Eq. 10."""
    prior = [n / math.fsum(counts) for n in counts]
    return -math.log(softmax([a + tau * math.log(p) for a, p in zip(v, prior, strict=True)])[y])


def balanced_softmax(v, y, counts):
    """Ren et al., Theorem 1."""
    peak = max(v)
    terms = [n * math.exp(a - peak) for a, n in zip(v, counts, strict=True)]
    return -math.log(terms[y] / math.fsum(terms))


TAIL = [300, 150, 75, 36, 18, 9, 5, 3]


def vector_scaling(v, y, counts, gamma=0.3, tau=1.0):
    """Kini et al., the VS-loss."""
    delta = [(n / max(counts)) ** gamma for n in counts]
    iota = [tau * math.log(n / math.fsum(counts)) for n in counts]
    return -math.log(softmax([d * a + i for d, a, i in zip(delta, v, iota, strict=True)])[y])


class Case(NamedTuple):
    """A loss, the formula of its paper for one row, and for ``"mean"`` what a sample of a class divides by."""

    make: object
    formula: object
    share: object = lambda y, counts: 1.0


def reweighted_ldam(counts, **options):
    criterion = LDAMLoss(counts, beta=0.999, **options)
    criterion.reweight()
    return criterion


CASES = {
    "focal": Case(lambda counts, **options: FocalLoss(2.0, **options), focal),
    "class-balanced": Case(lambda counts, **o: ClassBalancedLoss(counts, 0.99, **o), class_balanced),
    "class-balanced focal": Case(
        lambda counts, **o: ClassBalancedLoss(counts, 0.99, 0.5, **o), class_balanced_focal
    ),
    "ldam": Case(LDAMLoss, ldam),
    "ldam-drw": Case(
        reweighted_ldam, ldam_reweighted, lambda y, counts: effective_number_weights(counts, 0.999)[y]
    ),
    "logit-adjusted": Case(lambda counts, **o: LogitAdjustedLoss(counts, 1.5, **o), logit_adjusted),
    "balanced softmax": Case(BalancedSoftmaxLoss, balanced_softmax),
    "vector-scaling": Case(lambda counts, **o: VSLoss(counts, 0.3, **o), vector_scaling),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def batch(dtype=torch.float64, num_experts=3, spread=15.0, num_classes=5):
    logits = spread * (2 * torch.rand(len(TARGET), num_experts, num_classes, dtype=torch.float64) - 1)
    return logits.to(dtype), TARGET.clone()


def value_and_gradient(criterion, logits, target):
    """For an upstream gradient that is not one."""
    leaf = logits.detach().clone().requires_grad_()
    loss = criterion(leaf, target)
    loss.backward(torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape).to(loss.device))
    return loss.detach(), leaf.grad


@st.composite
def problems(draw):
    """Counts, logits ``[N, K, C]`` and targets, of which some are ignored."""
    counts = draw(st.lists(st.integers(1, 10**6), min_size=2, max_size=6))
    num_samples, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    value = st.floats(-12, 12)
    row = st.lists(value, min_size=len(counts), max_size=len(counts))
    sample = st.lists(row, min_size=num_experts, max_size=num_experts)
    logits = draw(st.lists(sample, min_size=num_samples, max_size=num_samples))
    label = st.integers(-1, len(counts) - 1)
    target = draw(st.lists(label, min_size=num_samples, max_size=num_samples))
    return counts, logits, target


@every_loss
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_the_formula_of_the_paper(case, backend):
    @settings(max_examples=25)
    @given(problem=problems())
    def check(problem):
        counts, logits, target = problem
        losses = [
            0.0 if y == -1 else math.fsum(case.formula(v, y, counts) for v in sample)
            for sample, y in zip(logits, target, strict=True)
        ]
        divisor = math.fsum(case.share(y, counts) for y in target if y != -1) or 1.0
        expected = {"none": losses, "sum": math.fsum(losses), "mean": math.fsum(losses) / divisor}
        for reduction, value in expected.items():
            criterion = case.make(counts, reduction=reduction, ignore_index=-1, backend=backend)
            loss = criterion(torch.tensor(logits, dtype=torch.float64), torch.tensor(target))
            value = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(loss, value, rtol=1e-9, atol=1e-12)

    check()


def plain(name, v, target):
    """The losses of logits ``[N, C]`` in PyTorch, one statement each."""
    n = torch.tensor(COUNTS, dtype=v.dtype)
    hot = F.one_hot(target, len(COUNTS)).to(v.dtype)
    log_p = F.log_softmax(v, 1)
    inverse = (1 - 0.99) / (1 - 0.99**n)
    drw = (1 - 0.999) / (1 - 0.999**n)
    focal, half_focal = ((-((1 - log_p.exp()) ** g) * log_p * hot).sum(1) for g in (2.0, 0.5))
    margins = n**-0.25 / (n**-0.25).max() * 0.5
    of_margins = F.cross_entropy(v - 30 * margins * hot, target, reduction="none")
    return {
        "focal": focal,
        "class-balanced": (inverse / inverse.mean())[target] * -(log_p * hot).sum(1),
        "class-balanced focal": (inverse / inverse.mean())[target] * half_focal,
        "ldam": of_margins,
        "ldam-drw": (drw / drw.mean())[target] * of_margins,
        "logit-adjusted": F.cross_entropy(v + 1.5 * (n / n.sum()).log(), target, reduction="none"),
        "balanced softmax": F.cross_entropy(v + n.log(), target, reduction="none"),
        "vector-scaling": F.cross_entropy(
            (n / n.max()) ** 0.3 * v + (n / n.sum()).log(), target, reduction="none"
        ),
    }[name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_gradient_is_that_of_plain_pytorch(name, backend, reduction, close):
    logits, target = batch(spread=4.0)
    kept = target != -100

    def statement(v, target):
        losses = sum(plain(name, expert, target.clamp(min=0)) for expert in v.unbind(1)) * kept
        return losses if reduction == "none" else losses.sum()

    ours = value_and_gradient(CASES[name].make(COUNTS, reduction=reduction, backend=backend), logits, target)
    for actual, expected in zip(ours, value_and_gradient(statement, logits, target), strict=True):
        close(actual, expected)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(case, reduction):
    logits, target = batch(num_experts=2, spread=3.0)
    logits, target = logits[:4, :, :].requires_grad_(), target[:4]
    criterion = case.make(COUNTS, reduction=reduction)
    assert gradcheck(criterion, (logits, target))
    assert gradgradcheck(criterion, (logits, target))


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(case, reduction, dtype, device, close, monkeypatch):
    """Also PyTorch in chunks, which stands in where there is no C library."""
    logits, target = (v.to(device) for v in batch(dtype))
    yardstick = case.make(COUNTS, reduction=reduction, backend="reference").to(device)
    expected = value_and_gradient(yardstick, logits, target)
    assert expected[0].dtype == torch.promote_types(dtype, torch.float32)
    assert expected[1].dtype == dtype
    for backend in ("fused", "auto", "chunked"):
        if backend == "chunked":
            monkeypatch.setattr(autograd, "engine_for", lambda *_: chunked)
        criterion = case.make(COUNTS, reduction=reduction, backend=backend.replace("chunked", "fused"))
        actual = value_and_gradient(criterion.to(device), logits, target)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == theirs.dtype
            close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_plain_pytorch_in_it(name, dtype):
    """Three ways: ours, the plain statement in the same dtype, and float64 truth of the same logits."""
    logits, target = batch(dtype, num_experts=1)
    logits, target = logits[target != -100], target[target != -100]
    ours = value_and_gradient(CASES[name].make(COUNTS, reduction="none"), logits, target)
    low, truth = (
        value_and_gradient(lambda v, y: plain(name, v[:, 0], y), logits.to(d), target)
        for d in (dtype, torch.float64)
    )
    for fast, slow, exact in zip(ours, low, truth, strict=True):
        # NaN, as 0 / 0 among weights of bfloat16, is as wrong as can be.
        error, allowed = ((v.double() - exact).abs().nan_to_num(nan=math.inf).max() for v in (fast, slow))
        assert error <= allowed + 1e-6 * exact.abs().max()
        assert error <= 1e-2 * exact.abs().max()


# What each is when its parameters vanish.
def cross_entropy(logits, target):
    return F.cross_entropy(logits[:, 0], target)


@pytest.mark.parametrize(
    "criterion",
    [
        FocalLoss(gamma=0.0),
        ClassBalancedLoss(COUNTS, beta=0.0),
        ClassBalancedLoss([7] * 5, beta=0.9),
        ClassBalancedLoss(COUNTS, beta=0.0, gamma=0.0),
        BalancedSoftmaxLoss([7] * 5),
        LogitAdjustedLoss(COUNTS, tau=0.0),
        VSLoss(COUNTS, gamma=0.0, tau=0.0),
        LDAMLoss(COUNTS, max_margin=0.0),
    ],
    ids=repr,
)
def test_it_is_cross_entropy(criterion, close):
    logits, target = batch(num_experts=1)
    for actual, expected in zip(
        value_and_gradient(criterion, logits, target),
        value_and_gradient(cross_entropy, logits, target),
        strict=True,
    ):
        close(actual, expected)


def balanced_accuracy(criterion, seed):
    """That of a small network after training on eight long-tailed blobs."""
    torch.manual_seed(seed)
    centers = 1.5 * torch.randn(8, 8)
    target, classes = (
        torch.repeat_interleave(torch.arange(8), torch.tensor(TAIL)),
        torch.arange(8).repeat(100),
    )
    train, test = (centers[y] + torch.randn(len(y), 8) for y in (target, classes))
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        criterion(model(train), target).backward()
        optimizer.step()
    return (model(test).argmax(dim=1) == classes).double().mean().item()


def test_vector_scaling_as_it_comes_does_not_fall_behind_balanced_softmax():
    """The 0.3 of the authors' code does, and at the default nobody is told."""
    of = {
        name: sum(balanced_accuracy(criterion, seed) for seed in range(4)) / 4
        for name, criterion in {
            "default": VSLoss(TAIL),
            "authors'": VSLoss(TAIL, gamma=0.3),
            "balanced": BalancedSoftmaxLoss(TAIL),
        }.items()
    }
    assert of["default"] >= of["balanced"] - 0.01, of
    assert of["authors'"] < of["balanced"] - 0.03, of


def test_identities_between_them(close):
    logits, target = batch()
    pairs = [
        (BalancedSoftmaxLoss(COUNTS), LogitAdjustedLoss(COUNTS, tau=1.0)),
        (VSLoss(COUNTS, gamma=0.0, tau=0.7), LogitAdjustedLoss(COUNTS, tau=0.7)),
        (ClassBalancedLoss(COUNTS, beta=0.0, gamma=1.5), FocalLoss(gamma=1.5)),
        (BalancedSoftmaxLoss(COUNTS), LGLALoss(COUNTS, 3, adjustment="balanced", aaw=False)),
        (LogitAdjustedLoss(COUNTS, 0.6), LGLALoss(COUNTS, 3, 0.6, adjustment="logit", aaw=False)),
        (FocalLoss(gamma=0.0), LGLALoss(COUNTS, 3, adjustment="softmax", aaw=False)),
    ]
    for one, other in pairs:
        close(one(logits, target), other(logits, target))
    # Close to 1, the weights are the inverse counts.
    inverse = 1 / torch.tensor(COUNTS, dtype=torch.float64)
    weight = ClassBalancedLoss(COUNTS, beta=1 - 1e-12).class_weight
    torch.testing.assert_close(weight, inverse / inverse.mean(), rtol=1e-8, atol=0)


def test_equal_counts_make_one_margin_of_ldam(close):
    """Then the largest margin, whatever the counts: a shift of the target's logit by s * m."""
    logits, target = batch(num_experts=1)
    v, y = logits[target != -100, 0], target[target != -100]
    shifted = v - 30 * 0.4 * F.one_hot(y, 5)
    for counts in ([7] * 5, [9000] * 5):
        close(LDAMLoss(counts, max_margin=0.4)(v, y), F.cross_entropy(shifted, y))


def test_the_mean_divides_as_the_authors_do(close):
    """LDAM-DRW by the weights, as F.cross_entropy; class-balanced by the samples, as its TensorFlow code."""
    logits, target = batch(num_experts=1)
    v, y = logits[:, 0], target
    criterion = reweighted_ldam(COUNTS, scale=20.0)
    hot = F.one_hot(y.clamp(min=0), 5)
    expected = F.cross_entropy(v - 20 * criterion.margins * hot, y, weight=criterion.class_weight)
    close(criterion(v, y), expected)
    balanced = ClassBalancedLoss(COUNTS, 0.999)
    assert balanced.class_weight.sum().item() == pytest.approx(5)
    close(balanced(v, y), F.cross_entropy(v, y, weight=balanced.class_weight, reduction="sum") / 6)


def test_weights_of_ones_own_multiply_those_that_the_loss_makes_and_show():
    own = [1.0, 2.0, 3.0, 4.0, 5.0]
    made = ClassBalancedLoss(COUNTS, 0.999).class_weight
    both = ClassBalancedLoss(COUNTS, 0.999, class_weight=own).class_weight
    assert torch.equal(both, made * torch.tensor(own, dtype=torch.float64))
    with pytest.raises(ValueError, match="read-only"):
        both[0] = 3.0


def test_deferred_reweighting():
    criterion, (logits, target) = LDAMLoss(COUNTS, beta=0.999), batch()
    before = criterion(logits, target)
    losses = []
    for epoch in range(4):
        criterion.reweight(epoch >= 2)
        losses.append(criterion(logits, target))
    assert losses[0] == losses[1] == before
    assert losses[2] == losses[3] == reweighted_ldam(COUNTS)(logits, target) != before
    resumed = LDAMLoss(COUNTS, beta=0.999)
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.reweighting
    resumed.reweight(np.int64(2) < 2)  # a bool of NumPy
    assert resumed(logits, target) == before


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_experts_are_summed_in_whatever_form_they_come(case, reduction, close):
    logits, target = batch()
    criterion = case.make(COUNTS, reduction=reduction)
    expected = sum(criterion(expert, target) for expert in logits.unbind(1))
    close(criterion(logits, target), expected)
    close(criterion(list(logits.unbind(1)), target), expected)
    close(criterion(tuple(logits.unbind(1)), target), expected)
    close(criterion(ExpertOutput(logits, torch.zeros(7, 3, 2), torch.zeros(3, 5, 2)), target), expected)
    strided = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    close(criterion(strided, target), expected)
    experts = [v.clone().requires_grad_() for v in logits.unbind(1)]
    whole = logits.clone().requires_grad_()
    criterion(experts, target).sum().backward()
    criterion(whole, target).sum().backward()
    close(torch.stack([v.grad for v in experts], dim=1), whole.grad)


@every_loss
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_ignored_samples_count_nothing(case, backend, close):
    logits, target = batch()
    for ignore_index in (-100, 255, 2):
        kept = (target != -100) & (target != ignore_index)
        labels = torch.where(target == -100, ignore_index, target)
        criterion = case.make(COUNTS, ignore_index=ignore_index, backend=backend)
        loss, gradient = value_and_gradient(criterion, logits, labels)
        of_kept, gradient_of_kept = value_and_gradient(criterion, logits[kept], target[kept])
        close(loss, of_kept)
        close(gradient[kept], gradient_of_kept)
        assert not gradient[~kept].any()


@every_loss
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from(case, backend, reduction):
    criterion = case.make(COUNTS, reduction=reduction, backend=backend)
    for target in (TARGET[:0], torch.full((2,), -100)):
        logits = torch.randn(len(target), 3, 5, requires_grad=True)
        loss = criterion(logits, target)
        loss.sum().backward()
        assert loss.shape == (target.shape if reduction == "none" else ())
        assert not loss.any()
        assert not logits.grad.any()


@pytest.mark.filterwarnings("ignore:a target logit of .* exceeds scale")  # as LDAM says
@every_loss
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_masked_classes_and_confident_rows(case, backend):
    logits, target = batch(torch.float32)
    masked = logits.clone()
    masked[..., 3] = -math.inf
    target[target == 3] = 0
    loss, gradient = value_and_gradient(case.make(COUNTS, backend=backend), masked, target)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[..., 3].any()
    for sign in (1, -1):
        confident = torch.zeros(5, 1, 5)
        confident[range(5), 0, range(5)] = sign * 1e4
        losses, gradient = value_and_gradient(
            case.make(COUNTS, reduction="none", backend=backend), confident, torch.arange(5)
        )
        assert gradient.isfinite().all()
        assert (losses == 0).all() if sign == 1 else (losses > 100).all()


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("gamma", [0.01, 0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_focal_gradient_vanishes_with_the_loss(backend, gamma, dtype):
    """(1 - p) ** gamma has an infinite derivative at p = 1 for gamma < 1: a naive backward is NaN there."""
    logits = torch.zeros(9, 1, 2)
    logits[:, 0, 0] = torch.tensor([0, 5, 10, 15, 20, 40, 90, 1e3, 1e4])
    target = torch.zeros(9, dtype=torch.int64)
    criterion = FocalLoss(gamma, reduction="none", backend=backend)
    loss, gradient = value_and_gradient(criterion, logits.to(dtype), target)
    assert gradient.isfinite().all()
    assert not gradient[-2:].any()
    # Of 1 - p = e: e ** gamma * -log(1 - e), to the digits that PyTorch's float32 has of e; C has them all.
    few = torch.sigmoid(-logits[:3, 0, 0].double())
    rtol = 2e-5 if backend == "fused" and native.LIBRARY is not None else 1e-2
    torch.testing.assert_close(loss[:3].double(), few**gamma * -torch.log1p(-few), rtol=rtol, atol=0)


@every_loss
def test_one_pass_over_the_logits_gives_loss_and_gradient(case, monkeypatch):
    """All experts at once, whatever the loss makes of them."""
    calls = []

    def spy(logits, rows, gradients, forward=chunked.forward):
        calls.append(([block.shape[1] for block in logits], rows.reduce, gradients[0] is not None))
        return forward(logits, rows, gradients)

    monkeypatch.setattr(autograd, "engine_for", lambda *_: chunked)
    monkeypatch.setattr(chunked, "forward", spy)
    monkeypatch.setattr(chunked, "backward", lambda *_: pytest.fail("a second pass"))
    value_and_gradient(case.make(COUNTS), *batch())
    assert calls == [([3], True, True)]


@every_loss
def test_the_callers_tensors_stay_as_they_are(case):
    logits, target = batch(torch.float32)
    before, versions = (logits.clone(), target.clone()), (logits._version, target._version)
    value_and_gradient(case.make(COUNTS), logits, target)
    leaf = logits.requires_grad_()
    case.make(COUNTS)(leaf, target).backward()
    assert torch.equal(leaf, before[0])
    assert torch.equal(target, before[1])
    assert (leaf._version, target._version) == versions


@every_loss
def test_constants_travel_and_keep_their_precision(case, close):
    logits, target = batch()
    criterion = case.make(COUNTS)
    expected = criterion(logits, target)
    for cast in (criterion.half(), criterion.bfloat16(), copy.deepcopy(criterion)):
        assert all(b.dtype == torch.float64 for b in cast.buffers() if b.is_floating_point())
        assert cast(logits, target) == expected
    other = case.make([5, 4, 3, 2, 1])
    other.load_state_dict(criterion.state_dict())
    assert other(logits, target) == expected
    assert not list(criterion.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [("focal", 5), ("balanced softmax", 5), ("vector-scaling", 5), ("focal", 600), ("ldam-drw", 600)],
)
def test_it_compiles_as_a_whole_graph(name, num_classes, close):
    """From 512 classes on to the fused operator; a new batch size compiles nothing anew."""
    torch.compiler.reset()
    criterion, graphs = CASES[name].make(COUNTS * (num_classes // 5)), []

    def spy(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=spy)
    logits, target = batch(num_classes=num_classes)
    for step, size in enumerate((7, 4)):
        inputs = logits[:size].clone(), target[:size].clone()
        expected = value_and_gradient(criterion, *inputs)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            actual = value_and_gradient(compiled, *inputs)
        for ours, theirs in zip(actual, expected, strict=True):
            close(ours, theirs)
    assert {"lgla_losses.cross_entropy" in graph for graph in graphs} == {num_classes == 600}


def test_a_compiled_loss_sees_the_reweighting(close):
    torch.compiler.reset()
    criterion, (logits, target) = LDAMLoss(COUNTS, beta=0.999), batch()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    compiled(logits, target)
    criterion.reweight()
    with torch.compiler.set_stance("fail_on_recompile"):
        close(compiled(logits, target), reweighted_ldam(COUNTS)(logits, target))


@every_loss
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_values_are_checked_unless_told_otherwise(case, backend):
    logits, target = batch()
    for wrong, where in ((math.nan, (0, 1, 2)), (math.inf, (0, 1, 2)), (-math.inf, (1, 2, 4))):
        bad = logits.clone()
        bad[where] = wrong
        with pytest.raises(ValueError, match=r"logits: expected no NaN.*validate_args=False"):
            case.make(COUNTS, backend=backend)(bad, target)
        assert not case.make(COUNTS, backend=backend, validate_args=False)(bad, target).isfinite()
    with pytest.raises(ValueError, match="target: expected class indices"):
        case.make(COUNTS, backend=backend)(logits, target + 1)
    if backend == "reference":  # PyTorch has errors of its own
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            case.make(COUNTS, backend=backend, validate_args=False)(logits, target + 1)
    else:
        assert case.make(COUNTS, backend=backend, validate_args=False)(logits, target + 1).isnan()


@pytest.mark.skipif(native.LIBRARY is None, reason="plain PyTorch has errors of its own, which come first")
@every_loss
def test_good_batches_are_not_looked_at_twice(case, monkeypatch):
    """What is wrong is looked for where the loss is not finite."""
    logits, target = batch()
    monkeypatch.setattr(Batch, "explain", lambda *_: pytest.fail("a second look at good logits"))
    case.make(COUNTS)(logits, target)
    looks = []
    monkeypatch.setattr(Batch, "explain", lambda *_: looks.append(1))
    logits[0, 0, 0] = math.nan
    case.make(COUNTS)(logits, target)
    assert len(looks) == 1


def test_torch_func_and_autocast(close):
    logits, target = batch(torch.float32)
    for case in CASES.values():
        criterion = case.make(COUNTS)
        _, expected = value_and_gradient(criterion, logits, target)
        close(torch.func.grad(criterion)(logits, target) * 0.5, expected)
        with torch.autocast("cpu", torch.bfloat16):
            close(criterion(logits, target), criterion(logits.double(), target), torch.float32)


PAGE = (ROOT / "docs" / "guides" / "baselines.md").read_text()


@every_loss
def test_vmap_takes_gradients_of_single_samples(case):
    criterion, (logits, target) = case.make(COUNTS), batch()
    gradients = torch.vmap(torch.func.grad(lambda v, y: criterion(v[None], y[None])))(logits, target)
    leaf = logits.clone().requires_grad_()
    torch.stack([criterion(v[None], y[None]) for v, y in zip(leaf, target, strict=True)]).sum().backward()
    torch.testing.assert_close(gradients, leaf.grad, rtol=1e-10, atol=1e-10)


def test_the_page_has_a_row_for_each():
    rows = re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)
    assert rows == [*(name for name in baselines.__all__ if name.endswith("Loss")), "LGLALoss"]
