"""Every loss takes every kind of input: probabilities, maps, weights of samples and classes, smoothing."""

import math
from typing import NamedTuple

import pytest
import reference
import torch
import torch.nn.functional as F

from lgla_losses import LGLALoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lgla_losses.kernels import autograd, chunked

COUNTS = [900, 120, 17, 17, 3]
TARGET = torch.tensor([0, 4, 2, -100, 1, 3, 4])
OWN = [0.5, 2.0, 0.0, 1.5, 3.0]
NUM_EXPERTS = 3


def effective_numbers(beta):
    weights = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return [len(COUNTS) * w / math.fsum(weights) for w in weights]


def log_priors(tau):
    return [tau * math.log(n / max(COUNTS)) for n in COUNTS]


def ldam_margins(scale=30.0):
    return [scale * 0.5 * (min(COUNTS) / n) ** 0.25 for n in COUNTS]


class Case(NamedTuple):
    """A loss, and the numbers of its formula: everything that a row ``[C]`` is adjusted and weighed by."""

    make: object
    table: object = (0.0,) * 5
    multiplier: object = (1.0,) * 5
    margin: object = (0.0,) * 5
    weight: object = (1.0,) * 5
    gamma: float = 0.0
    divides_by_weights: bool = False


def reweighted_ldam(counts, **options):
    criterion = LDAMLoss(counts, beta=0.999, **options)
    criterion.reweight()
    return criterion


BASELINES = {
    "focal": Case(lambda _, **o: FocalLoss(1.5, **o), gamma=1.5, divides_by_weights=True),
    "class-balanced": Case(lambda n, **o: ClassBalancedLoss(n, 0.99, **o), weight=effective_numbers(0.99)),
    "class-balanced focal": Case(
        lambda n, **o: ClassBalancedLoss(n, 0.99, 0.5, **o), weight=effective_numbers(0.99), gamma=0.5
    ),
    "ldam": Case(LDAMLoss, margin=ldam_margins(), divides_by_weights=True),
    "ldam-drw": Case(
        reweighted_ldam, margin=ldam_margins(), weight=effective_numbers(0.999), divides_by_weights=True
    ),
    "logit-adjusted": Case(
        lambda n, **o: LogitAdjustedLoss(n, 1.5, **o), table=log_priors(1.5), divides_by_weights=True
    ),
    "balanced softmax": Case(BalancedSoftmaxLoss, table=log_priors(1.0), divides_by_weights=True),
    "vector-scaling": Case(
        lambda n, **o: VSLoss(n, 0.3, **o),
        table=log_priors(1.0),
        multiplier=[(n / max(COUNTS)) ** 0.3 for n in COUNTS],
        divides_by_weights=True,
    ),
}
#: Beside them the losses of K experts, whose tables differ from expert to expert.
EXPERTS = {
    "cla": Case(lambda n, **o: LGLALoss(n, NUM_EXPERTS, aaw=False, **o)),
    "lgla": Case(lambda n, **o: LGLALoss(n, NUM_EXPERTS, **o)),
}
LOSSES = BASELINES | EXPERTS
#: Losses that are sums over the classes by their probabilities: no margin, no weights that these enter.
LINEAR = {name: case for name, case in LOSSES.items() if name not in ("ldam", "ldam-drw", "lgla")}

every_loss = pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
every_baseline = pytest.mark.parametrize("case", BASELINES.values(), ids=BASELINES)
on_every_backend = pytest.mark.parametrize("backend", ["reference", "fused", "chunked"], indirect=True)


@pytest.fixture
def backend(request, monkeypatch):
    """The argument of that name; "chunked" is PyTorch in chunks, which stands in for the C library."""
    if request.param == "chunked":
        monkeypatch.setattr(
            autograd, "engine_for", lambda backend, _: None if backend == "reference" else chunked
        )
    return request.param.replace("chunked", "fused")


def random_logits(*shape, dtype=torch.float64):
    return (16 * torch.rand(*shape, dtype=torch.float64) - 8).to(dtype)


def one_hot(target, num_classes=5):
    return F.one_hot(target.clamp(min=0), num_classes).double() * (target != -100)[..., None]


def targets(kind):
    """Class indices, or probabilities ``[7, 5]``; one sample counts nothing."""
    if kind == "indices":
        return TARGET.clone()
    if kind == "mixup":
        return 0.7 * one_hot(TARGET) + 0.3 * one_hot(
            torch.where(TARGET < 0, -100, TARGET.flip(0).clamp(min=0))
        )
    return torch.softmax(torch.randn(7, 5, dtype=torch.float64), dim=1) * (TARGET != -100)[:, None]


def value_and_gradient(criterion, logits, target, **options):
    """For an upstream gradient that is not one."""
    leaf = logits.detach().clone().requires_grad_()
    loss = criterion(leaf, target, **options)
    loss.backward(torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape).to(loss.device))
    return loss.detach(), leaf.grad


def assert_same(actual, expected, **tolerance):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-10, "atol": 1e-10}))


def formula(case, logits, target, own, sample_weight, label_smoothing):
    """Losses ``[N]``, gradients of their sum ``[N, K, C]``, and how many samples count, in plain loops."""
    losses, gradients, amounts = [], [], []
    probabilities = target if target.is_floating_point() else one_hot(target)
    class_weight = [w * o for w, o in zip(case.weight, own, strict=True)]
    for sample, q, times in zip(logits.tolist(), probabilities.tolist(), sample_weight.tolist(), strict=True):
        shares = reference.shares(q, class_weight, label_smoothing)
        loss, gradient = 0.0, []
        for v in sample:
            adjusted = [
                a * x + t - m * p
                for a, x, t, m, p in zip(case.multiplier, v, case.table, case.margin, q, strict=True)
            ]
            of_row, slopes = reference.loss_of_row(adjusted, shares, case.gamma)
            loss += times * of_row
            gradient.append([times * a * g for a, g in zip(case.multiplier, slopes, strict=True)])
        losses.append(loss)
        gradients.append(gradient)
        counted = class_weight if case.divides_by_weights else [1.0] * len(q)
        amounts.append(times * math.fsum(w * p for w, p in zip(counted, q, strict=True)))
    losses, gradients = (torch.tensor(v, dtype=torch.float64) for v in (losses, gradients))
    return losses, gradients, math.fsum(amounts)


@every_baseline
@on_every_backend
@pytest.mark.parametrize("kind", ["indices", "mixup", "dense"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_all_inputs_at_once_are_the_formula(case, backend, kind, label_smoothing):
    """Weights of classes and samples, smoothing, and any target; loss, gradient and divisor."""
    logits, target = random_logits(7, 2, 5), targets(kind)
    sample_weight = torch.rand(7, dtype=torch.float64)
    losses, gradients, amount = formula(case, logits, target, OWN, sample_weight, label_smoothing)
    options = {"class_weight": OWN, "label_smoothing": label_smoothing, "backend": backend}
    for reduction, divisor in (("sum", 1.0), ("mean", amount)):
        criterion = case.make(COUNTS, reduction=reduction, **options)
        actual = value_and_gradient(criterion, logits, target, sample_weight=sample_weight)
        assert_same(actual, (losses.sum() / divisor, 0.5 * gradients / divisor))
    criterion = case.make(COUNTS, reduction="none", **options)
    actual = value_and_gradient(criterion, logits, target, sample_weight=sample_weight)
    upstream = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    assert_same(actual, (losses, upstream[:, None, None] * gradients))


# --- Probabilities ------------------------------------------------------------------------------------------


@every_loss
@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_hot_probabilities_are_class_indices(case, backend, reduction):
    """Zeros stand for an ignored sample."""
    logits = random_logits(7, NUM_EXPERTS, 5)
    criterion = case.make(COUNTS, reduction=reduction, label_smoothing=0.1, backend=backend)
    expected = value_and_gradient(criterion, logits, TARGET)
    assert_same(value_and_gradient(criterion, logits, one_hot(TARGET)), expected)


@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
@on_every_backend
def test_mixup_is_the_mixture_of_the_losses_of_two_labels(case, backend):
    logits, first, second = random_logits(7, NUM_EXPERTS, 5), TARGET.clamp(min=0), TARGET.flip(0).clamp(min=0)
    criterion = case.make(COUNTS, reduction="none", backend=backend)
    mixed = value_and_gradient(criterion, logits, 0.7 * one_hot(first) + 0.3 * one_hot(second))
    of_labels = [value_and_gradient(criterion, logits, target) for target in (first, second)]
    assert_same(mixed, [0.7 * a + 0.3 * b for a, b in zip(*of_labels, strict=True)])


@on_every_backend
def test_a_margin_of_ldam_counts_by_the_probability(backend):
    """Half a label has half its margin, and both of a mixture are held to theirs at once."""
    logits, target = random_logits(7, 1, 5), targets("mixup")
    criterion = LDAMLoss(COUNTS, reduction="none", backend=backend)
    margin = torch.tensor(ldam_margins(), dtype=torch.float64)

    def statement(v, q):
        return F.cross_entropy(v[:, 0] - margin * q, q, reduction="none")

    expected = value_and_gradient(statement, logits, target)
    assert_same(value_and_gradient(criterion, logits, target), expected)


# --- Label smoothing and weights of classes, as PyTorch has them --------------------------------------------


@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, OWN])
def test_balanced_softmax_is_cross_entropy_of_adjusted_logits(backend, reduction, label_smoothing, weight):
    logits = random_logits(7, 5)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    criterion = BalancedSoftmaxLoss(COUNTS, class_weight=weight, backend=backend, **options)
    prior = torch.tensor(log_priors(1.0), dtype=torch.float64)
    own = None if weight is None else torch.tensor(weight, dtype=torch.float64)

    def statement(v, y):
        return F.cross_entropy(v + prior, y, weight=own, **options)

    expected = value_and_gradient(statement, logits, TARGET)
    assert_same(value_and_gradient(criterion, logits, TARGET), expected)


def test_the_mean_divides_by_own_weights_unless_the_loss_says_otherwise():
    """As PyTorch's does; alpha of the focal loss, and weights beside class-balanced ones, do not."""
    logits, kept = random_logits(7, 5), TARGET != -100
    own = torch.tensor(OWN, dtype=torch.float64)
    by_weights, by_number = own[TARGET[kept]].sum(), kept.sum()
    for case in BASELINES.values():
        if case.weight is not Case._field_defaults["weight"]:
            continue
        losses, total = (
            case.make(COUNTS, class_weight=OWN, reduction=r)(logits, TARGET) for r in ("none", "sum")
        )
        torch.testing.assert_close(losses.sum(), total)
        torch.testing.assert_close(case.make(COUNTS, class_weight=OWN)(logits, TARGET), total / by_weights)

    of_alpha, own_weight = FocalLoss(alpha=OWN, reduction="sum"), FocalLoss(class_weight=OWN, reduction="sum")
    assert of_alpha(logits, TARGET) == own_weight(logits, TARGET)
    torch.testing.assert_close(FocalLoss(alpha=OWN)(logits, TARGET), of_alpha(logits, TARGET) / by_number)
    balanced = ClassBalancedLoss(COUNTS, 0.99, class_weight=OWN, reduction="sum")(logits, TARGET)
    mean = ClassBalancedLoss(COUNTS, 0.99, class_weight=OWN)(logits, TARGET)
    torch.testing.assert_close(mean, balanced / by_number)


def test_own_weights_count_before_ldam_reweights():
    logits = random_logits(7, 5)
    criterion, margin = LDAMLoss(COUNTS, class_weight=OWN), torch.tensor(ldam_margins(), dtype=torch.float64)
    own = torch.tensor(OWN, dtype=torch.float64)
    adjusted = logits - margin * one_hot(TARGET)
    torch.testing.assert_close(criterion(logits, TARGET), F.cross_entropy(adjusted, TARGET, weight=own))
    criterion.reweight()
    weight = own * torch.tensor(effective_numbers(0.9999), dtype=torch.float64)
    torch.testing.assert_close(criterion(logits, TARGET), F.cross_entropy(adjusted, TARGET, weight=weight))


# --- Samples ------------------------------------------------------------------------------------------------


@every_loss
@on_every_backend
@pytest.mark.parametrize("kind", ["indices", "mixup"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sample_of_weight_n_is_that_sample_n_times(case, backend, kind, reduction):
    """Also in the reference angles; of weight 0 it is not there."""
    logits, target = random_logits(7, NUM_EXPERTS, 5), targets(kind)
    times = torch.tensor([2, 1, 0, 3, 1, 2, 1])
    criterion = case.make(COUNTS, reduction=reduction, label_smoothing=0.1, backend=backend)
    loss, gradient = value_and_gradient(criterion, logits, target, sample_weight=times.double())
    repeated = logits.repeat_interleave(times, 0), target.repeat_interleave(times, 0)
    expected, of_copies = value_and_gradient(criterion, *repeated)
    index = torch.arange(7).repeat_interleave(times)
    assert_same((loss, gradient), (expected, torch.zeros_like(logits).index_add_(0, index, of_copies)))


@every_loss
@on_every_backend
def test_a_normalizer_stands_for_the_number_of_samples(case, backend):
    """As it is: neither weights of samples nor those of classes enter it."""
    logits, sample_weight = random_logits(7, NUM_EXPERTS, 5), torch.rand(7)
    mean, total = (case.make(COUNTS, reduction=r, backend=backend) for r in ("mean", "sum"))
    loss, gradient = value_and_gradient(total, logits, TARGET, sample_weight=sample_weight)
    for normalizer in (12.5, torch.tensor(12.5)):
        options = {"sample_weight": sample_weight, "normalizer": normalizer}
        assert_same(value_and_gradient(mean, logits, TARGET, **options), (loss / 12.5, gradient / 12.5))


# --- Maps ---------------------------------------------------------------------------------------------------


def flattened(tensor, dim):
    """Samples of maps in one dimension; ``dim`` is that of the first position."""
    return tensor.movedim((dim, dim + 1), (1, 2)).flatten(0, 2)


@every_loss
@on_every_backend
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_every_position_of_a_map_is_a_sample(case, backend, kind):
    logits, sample_weight = random_logits(2, NUM_EXPERTS, 5, 3, 4), torch.rand(2, 3, 4).double()
    target = torch.randint(5, (2, 3, 4))
    target[0, 0, 1] = -100
    samples = target.flatten()
    if kind == "probabilities":
        target = torch.softmax(torch.randn(2, 5, 3, 4).double(), 1)
        samples = flattened(target, 2)
    for reduction in ("mean", "none"):
        criterion = case.make(COUNTS, reduction=reduction, label_smoothing=0.1, backend=backend)
        loss, gradient = value_and_gradient(criterion, logits, target, sample_weight=sample_weight)
        assert loss.shape == (() if reduction == "mean" else (2, 3, 4))
        expected = value_and_gradient(
            criterion, flattened(logits, 3), samples, sample_weight=sample_weight.flatten()
        )
        assert_same((loss.flatten() if loss.dim() else loss, flattened(gradient, 3)), expected)


@every_baseline
@on_every_backend
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_maps_of_one_model_need_no_dimension_of_experts(case, backend, kind):
    logits = random_logits(2, 5, 3, 4)
    target = torch.randint(5, (2, 3, 4))
    if kind == "probabilities":
        target = torch.softmax(torch.randn(2, 5, 3, 4).double(), 1)
    criterion = case.make(COUNTS, class_weight=OWN, backend=backend)
    loss, gradient = value_and_gradient(criterion, logits, target)
    of_experts, gradient_of_experts = value_and_gradient(criterion, logits[:, None], target)
    assert_same((loss, gradient), (of_experts, gradient_of_experts[:, 0]))
    samples = target.flatten() if kind == "indices" else flattened(target, 2)
    assert_same([loss], [criterion(flattened(logits, 2), samples)])


# --- Constants ----------------------------------------------------------------------------------------------


@every_baseline
def test_own_weights_travel_in_a_state_and_stay(case):
    logits = random_logits(7, 5)
    saved, loaded = case.make(COUNTS, class_weight=OWN), case.make([5, 4, 3, 2, 1], class_weight=[1.0] * 5)
    expected = saved(logits, TARGET)
    assert saved.half()(logits, TARGET) == expected
    loaded.load_state_dict(saved.state_dict())
    assert loaded(logits, TARGET) == expected
    assert torch.equal(loaded.state_dict()["own_class_weight"], torch.tensor(OWN, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="own_class_weight"):
        case.make(COUNTS).load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match=r"class_weight.*finite"):
        loaded.load_state_dict(saved.state_dict() | {"own_class_weight": torch.full((5,), -1.0)})
    assert loaded(logits, TARGET) == expected


@pytest.mark.parametrize(
    "case", [c for n, c in BASELINES.items() if n != "focal"], ids=[n for n in BASELINES if n != "focal"]
)
def test_other_class_counts_leave_own_weights(case):
    other, logits = [3, 30, 300, 3000, 30000], random_logits(7, 5)
    criterion = case.make(COUNTS, class_weight=OWN)
    criterion.set_adjustment(other)
    assert criterion(logits, TARGET) == case.make(other, class_weight=OWN)(logits, TARGET)


def test_alpha_travels_in_a_state():
    logits, loaded = random_logits(7, 5), FocalLoss(alpha=[1.0] * 5)
    loaded.load_state_dict(FocalLoss(alpha=OWN).state_dict())
    assert loaded(logits, TARGET) == FocalLoss(alpha=OWN)(logits, TARGET)
    assert loaded.class_weight.tolist() == OWN


# --- Precision and compilers --------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["indices", "dense"])
def test_backends_agree_in_every_precision(case, dtype, kind, device, close):
    logits, target = random_logits(7, NUM_EXPERTS, 5, dtype=dtype).to(device), targets(kind).to(device)
    target = target.to(dtype) if kind == "dense" else target
    sample_weight = torch.full((7,), 1 / 3, device=device)
    options = {"label_smoothing": 0.1}
    if case in BASELINES.values():
        options["class_weight"] = OWN
    expected, *found = (
        value_and_gradient(
            case.make(COUNTS, backend=backend, **options).to(device),
            logits,
            target,
            sample_weight=sample_weight,
        )
        for backend in ("reference", "auto", "fused")
    )
    for actual in found:
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == theirs.dtype
            close(ours, theirs)


@every_loss
def test_autocast_changes_nothing(case, close):
    """Losses are not computed in its low precision."""
    logits, target = random_logits(7, NUM_EXPERTS, 5, dtype=torch.bfloat16), targets("dense").float()
    criterion = case.make(COUNTS, label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(logits, target, sample_weight=torch.ones(7) / 3)
    assert loss.dtype == torch.float32
    close(loss, criterion(logits.double(), target.double(), sample_weight=torch.ones(7) / 3))


@pytest.mark.parametrize(
    "name", ["class-balanced focal", pytest.param("ldam-drw", marks=pytest.mark.slow), "lgla"]
)
@pytest.mark.parametrize("num_classes", [5, 600])
def test_it_compiles_with_all_inputs_at_once(name, num_classes):
    """Probabilities, weights and smoothing; from 512 classes on to the operator, for any batch size."""
    torch.compiler.reset()
    case, repeats = LOSSES[name], num_classes // 5
    options = {"class_weight": OWN * repeats} if name in BASELINES else {}
    criterion = case.make(COUNTS * repeats, label_smoothing=0.1, **options)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, size in enumerate((7, 4)):
        logits, sample_weight = random_logits(size, NUM_EXPERTS, num_classes), torch.rand(size)
        target = torch.softmax(torch.randn(size, num_classes, dtype=torch.float64), dim=1)
        expected = value_and_gradient(criterion, logits, target, sample_weight=sample_weight)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            actual = value_and_gradient(compiled, logits, target, sample_weight=sample_weight)
        assert_same(actual, expected)
