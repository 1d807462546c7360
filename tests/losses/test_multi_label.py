"""Losses of several labels a sample: their formulas, what they are good for, every kind of input."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from conftest import TOLERANCE
from lgla_losses import ExpertOutput
from lgla_losses._ranks import Ranks
from lgla_losses.baselines import ClassBalancedBCELoss, SigmoidAdjustedLoss
from lgla_losses.kernels.autograd import logger

COUNTS, NUM_SAMPLES = [60, 25, 3], 80
OWN = [0.5, 2.0, 3.0]

#: What makes a loss, and the numbers of its formula: the adjustments, the weights and the exponent.
EFFECTIVE = [(1 - 0.99) / (1 - 0.99**n) for n in COUNTS]
LOSSES = {
    "adjusted": (
        lambda **options: SigmoidAdjustedLoss(COUNTS, NUM_SAMPLES, 1.5, **options),
        [1.5 * math.log(n / NUM_SAMPLES / (1 - n / NUM_SAMPLES)) for n in COUNTS],
        [1.0] * 3,
        0.0,
    ),
    "class-balanced": (
        lambda **options: ClassBalancedBCELoss(COUNTS, 0.99, **options),
        [0.0] * 3,
        [3 * w / math.fsum(EFFECTIVE) for w in EFFECTIVE],
        0.0,
    ),
    "class-balanced focal": (
        lambda **options: ClassBalancedBCELoss(COUNTS, 0.99, 0.5, **options),
        [0.0] * 3,
        [3 * w / math.fsum(EFFECTIVE) for w in EFFECTIVE],
        0.5,
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def batch(num_experts=2, dtype=torch.float64):
    """Logits ``[N, K, C]``, targets of which some lie between 0 and 1, and weights of the samples."""
    logits = (8 * torch.rand(5, num_experts, 3, dtype=torch.float64) - 4).to(dtype)
    target = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0.0, 0.25, 1]])
    return logits, target.to(dtype), torch.tensor([1.0, 3.0, 0.0, 0.5, 2.0], dtype=torch.float64)


def in_plain_loops(name, logits, target, smoothing=0.0, own=(1.0, 1.0, 1.0)):
    """The losses ``[N, C]`` by definition."""
    _, table, weight, gamma = LOSSES[name]
    losses = torch.zeros(len(logits), 3, dtype=torch.float64)
    for i, k, j in itertools.product(range(len(logits)), range(logits.shape[1]), range(3)):
        q = (1 - smoothing) * float(target[i, j]) + smoothing / 2
        p = 1 / (1 + math.exp(-float(logits[i, k, j]) - table[j]))
        present, absent = (1 - p) ** gamma * -math.log(p), p**gamma * -math.log(1 - p)
        losses[i, j] += weight[j] * own[j] * (q * present + (1 - q) * absent)
    return losses


@every_loss
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_formula_in_plain_loops(name, smoothing):
    logits, target, sample_weight = batch()
    expected = sample_weight[:, None] * in_plain_loops(name, logits, target, smoothing, OWN)
    options = {"label_smoothing": smoothing, "class_weight": OWN}
    for reduction, value in {
        "none": expected,
        "sum": expected.sum(),
        "mean": expected.sum() / (3 * sample_weight.sum()),
    }.items():
        criterion = LOSSES[name][0](reduction=reduction, **options)
        loss = criterion(logits, target, sample_weight=sample_weight)
        torch.testing.assert_close(loss, value, rtol=1e-10, atol=1e-10)

    accumulated = LOSSES[name][0](**options)(logits, target, sample_weight=sample_weight, normalizer=16)
    torch.testing.assert_close(accumulated, expected.sum() / (3 * 16), rtol=1e-10, atol=1e-10)


@every_loss
def test_gradients_and_their_gradients(name):
    logits, target, sample_weight = batch()
    criterion = LOSSES[name][0](label_smoothing=0.1)
    arguments = (lambda v: criterion(v, target, sample_weight=sample_weight), logits.requires_grad_())
    assert torch.autograd.gradcheck(*arguments)
    assert torch.autograd.gradgradcheck(*arguments)


def test_without_strength_it_is_that_of_pytorch():
    logits, target, _ = batch(1)
    for criterion in (SigmoidAdjustedLoss(COUNTS, NUM_SAMPLES, 0.0), ClassBalancedBCELoss(COUNTS, beta=0.0)):
        for reduction in ("mean", "sum", "none"):
            criterion.reduction = reduction
            expected = F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction=reduction)
            torch.testing.assert_close(criterion(logits[:, 0], target), expected)


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_optimum_is_the_log_likelihood_ratio(tau):
    """Of the population, and with it Bayes' decision where a class is present half of the time."""
    present = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)  # p(x | class j)
    absent = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2]], dtype=torch.float64)
    prior = torch.tensor([0.02, 0.6], dtype=torch.float64)[:, None]
    joint = torch.stack(
        [(1 - prior) * absent, prior * present]
    )  # of a label, a class and one of three inputs

    ratio = (present / absent).log().T
    optimum = (ratio + (1 - tau) * (prior / (1 - prior)).log().T).requires_grad_()  # [3, C]
    losses = [
        SigmoidAdjustedLoss(1000 * prior[:, 0], 1000, tau, reduction="none")(
            optimum, torch.full((3, 2), float(label))
        )
        for label in (0, 1)
    ]
    population = sum(p.T * loss for p, loss in zip(joint, losses, strict=True)).sum()
    (slope,) = torch.autograd.grad(population, optimum)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)  # the loss is convex

    if tau == 1:
        of_half = present / (present + absent)
        torch.testing.assert_close(optimum.sigmoid(), of_half.T)


@every_loss
def test_every_form_of_logits_and_targets_is_the_same_loss(name):
    logits, target, _ = batch()
    target = target.round()
    criterion = LOSSES[name][0]()
    expected = criterion(logits, target)
    output = ExpertOutput(logits, torch.zeros(5, 2, 4), torch.zeros(2, 3, 4))
    for form in (list(logits.unbind(1)), output, logits.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(criterion(form, target), expected)
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        assert criterion(logits, target.to(dtype)) == expected
    torch.testing.assert_close(sum(criterion(v, target) for v in logits.unbind(1)), expected)


@every_loss
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_low_precision_computes_in_float32(name, dtype, close):
    logits, target, _ = batch(dtype=dtype)
    criterion = LOSSES[name][0]().half()
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(leaf, target)
    truth = LOSSES[name][0]()(exact, target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss, truth)
    loss.backward()
    truth.backward()
    assert leaf.grad.dtype == dtype
    close(leaf.grad, exact.grad)


@every_loss
def test_large_logits_give_finite_losses_and_gradients(name):
    logits = torch.tensor([[90.0, -90, 1e4]], requires_grad=True)
    for target in (torch.ones(1, 3), torch.zeros(1, 3)):
        loss = LOSSES[name][0]()(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@every_loss
def test_a_batch_of_no_samples_is_a_zero_that_keeps_the_graph(name):
    logits = torch.zeros(0, 2, 3, requires_grad=True)
    for sample_weight in (None, torch.ones(0)):
        loss = LOSSES[name][0]()(logits, torch.zeros(0, 3), sample_weight=sample_weight)
        loss.backward()
        assert loss == 0


@every_loss
def test_ranks_share_the_mean_of_the_whole_batch(name, monkeypatch):
    """Two ranks of 2 and 3 samples; the sum over them is done here."""
    logits, target, sample_weight = batch()
    whole = logits.clone().requires_grad_()
    LOSSES[name][0]()(whole, target, sample_weight=sample_weight).backward()
    criterion = LOSSES[name][0]()
    monkeypatch.setattr(criterion, "_ranks_of_step", lambda *_: Ranks(2))
    gradients = []
    for mine, other in ((slice(0, 2), slice(2, 5)), (slice(2, 5), slice(0, 2))):
        theirs = torch.tensor([float(sample_weight[other].sum()), 0.0])  # the digest rides along
        monkeypatch.setattr(
            torch.distributed, "all_reduce", lambda sent, group, theirs=theirs: sent.add_(theirs)
        )
        leaf = logits[mine].clone().requires_grad_()
        criterion(leaf, target[mine], sample_weight=sample_weight[mine]).backward()
        gradients.append(leaf.grad / 2)  # as DDP averages
    torch.testing.assert_close(torch.cat(gradients), whole.grad)


@pytest.mark.parametrize("name", ["adjusted", "class-balanced focal"])
def test_it_compiles_as_a_whole_graph_for_any_number_of_samples(name):
    criterion = LOSSES[name][0](label_smoothing=0.1)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="eager")
    logits, target, sample_weight = batch()
    compiled(logits, target, sample_weight=sample_weight)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (5, 3):
            arguments = logits[:n], target[:n]
            options = {"sample_weight": sample_weight[:n]}
            torch.testing.assert_close(compiled(*arguments, **options), criterion(*arguments, **options))


def test_it_takes_no_engine_and_says_nothing_of_one(caplog):
    caplog.set_level("INFO", logger=logger.name)
    criterion = SigmoidAdjustedLoss(COUNTS, NUM_SAMPLES)
    criterion(*batch()[:2])
    assert not caplog.records
    assert "backend" not in repr(criterion)


# --- Constants ----------------------------------------------------------------------------------------------


def test_counts_strength_and_samples_change_in_place():
    criterion = SigmoidAdjustedLoss(COUNTS, NUM_SAMPLES)
    before = criterion.constant("table").data_ptr()
    criterion.set_adjustment([90, 50, 1], num_samples=100)
    criterion.set_adjustment(tau=0.5)
    expected = SigmoidAdjustedLoss([90, 50, 1], 100, 0.5)
    assert torch.equal(criterion.table, expected.table)
    assert criterion.num_samples == 100
    assert criterion.constant("table").data_ptr() == before

    for wrong in ({"num_samples": 90}, {"class_counts": [100, 1, 1]}, {"tau": -1.0}):
        with pytest.raises(ValueError):  # noqa: PT011  (each its own, told below)
            criterion.set_adjustment(**wrong)
        assert torch.equal(criterion.table, expected.table)
        criterion.set_adjustment()
        assert torch.equal(criterion.table, expected.table)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_state_brings_counts_strength_and_samples(copied):
    source = SigmoidAdjustedLoss([90, 50, 1], 100, 0.5)
    criterion = copied(SigmoidAdjustedLoss(COUNTS, NUM_SAMPLES).bfloat16())
    criterion.load_state_dict(source.state_dict())
    for name, value in source.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(criterion.state_dict()[name], value), name
    logits, target, _ = batch()
    assert criterion(logits, target) == source(logits, target)

    criterion.set_adjustment(tau=1.0)
    assert torch.equal(criterion.table, SigmoidAdjustedLoss([90, 50, 1], 100).table)
    for damage in ({"num_samples": torch.tensor(80.0)}, {"table": torch.zeros(3)}):
        with pytest.raises(RuntimeError, match=r"num_samples|table"):
            criterion.load_state_dict(source.state_dict() | damage)
    with pytest.raises(RuntimeError, match=r"Missing key.*tau"):
        criterion.load_state_dict({n: v for n, v in source.state_dict().items() if n != "tau"})


def test_values_are_not_read_where_nobody_asks():
    criterion = SigmoidAdjustedLoss(COUNTS, NUM_SAMPLES, validate_args=False)
    assert criterion(torch.zeros(2, 3), torch.full((2, 3), 2)).isfinite()
