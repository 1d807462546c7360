"""Losses with terms between the experts, and SADE's: against plain float64 loops written from the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lgla_losses import ExpertOutput, LGLALoss, create_loss
from lgla_losses.adjusted import AdjustedLoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    LDAMLoss,
    NCLLoss,
    RIDELoss,
    expert_distillation,
    expert_diversity,
)

COUNTS = [900, 120, 17, 17, 3]
TARGET = torch.tensor([0, 4, 2, -100, 1, 3, 4])
#: At which every term of the losses matters.
LOSSES = {
    "ride": lambda counts, **o: RIDELoss(counts, diversity=0.3, gamma=0.4, **o),
    "ride, reweighted": lambda counts, **o: reweighted(RIDELoss(counts, 0.3, gamma=0.4, beta=0.99, **o)),
    "ncl": lambda counts, **o: NCLLoss(counts, hard_share=0.6, **o),
    "sade": lambda counts, **o: create_loss("sade", counts, tau=1.7, **o),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
between_experts = pytest.mark.parametrize("make", [LOSSES["ride, reweighted"], LOSSES["ncl"]])


def reweighted(criterion):
    criterion.reweight()
    return criterion


def batch(num_experts=3, num_classes=5, dtype=torch.float64, spread=3.0):
    logits = spread * torch.randn(len(TARGET), num_experts, num_classes, dtype=torch.float64)
    return logits.to(dtype), TARGET.clone()


def softmax(values):
    peak = max(values)
    exponentials = [math.exp(v - peak) for v in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def divergence(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mean_of(experts):
    return [math.fsum(column) / len(experts) for column in zip(*experts, strict=True)]


def diversity(experts, temperature):
    """Wang et al., the KL divergence of every expert from the mean of the logits."""
    of_mean = softmax([v / t for v, t in zip(mean_of(experts), temperature, strict=True)])
    divergences = [
        divergence(of_mean, softmax([v / t for v, t in zip(expert, temperature, strict=True)]))
        for expert in experts
    ]
    return (math.fsum(temperature) / len(temperature)) ** 2 * math.fsum(divergences)


def distillation(experts):
    """Li et al., the KL divergence of every pair of experts."""
    p = [softmax(expert) for expert in experts]
    pairs = [(a, b) for a in range(len(p)) for b in range(len(p)) if a != b]
    return math.fsum(divergence(p[a], p[b]) for a, b in pairs) / max(1, len(p) - 1)


def ride(experts, y, counts, reweighted):
    """Give LDAM with its weight, and the diversity term, which has none."""
    largest = max(n ** (-1 / 4) for n in counts)
    ldam = 0.0
    for v in experts:
        margin = 30 * counts[y] ** (-1 / 4) * 0.5 / largest
        ldam -= math.log(softmax([value - margin * (j == y) for j, value in enumerate(v)])[y])
    temperature, weight = [1.0] * len(counts), 1.0
    if reweighted:
        mean = math.fsum(counts) / len(counts)
        raw = [0.4 * n / mean + 0.6 for n in counts]
        temperature = [t / max(raw) for t in raw]
        weights = [(1 - 0.99) / (1 - 0.99**n) for n in counts]
        weight = len(counts) * weights[y] / math.fsum(weights)
    return weight, ldam, -0.3 * diversity(experts, temperature)


def ncl(experts, y, counts):
    """Balanced softmax and distillation over all classes and over the hard ones."""
    number = max(2, round(0.6 * len(counts)))
    others = sorted((j for j in range(len(counts)) if j != y), key=lambda j: -experts[0][j])
    loss = 0.0
    for classes in (range(len(counts)), [y, *others[: number - 1]]):
        of_set = [[v[j] + math.log(counts[j]) for j in classes] for v in experts]
        loss -= math.fsum(math.log(softmax(v)[list(classes).index(y)]) for v in of_set)
        loss += 0.6 * distillation(of_set)
    return loss


def sade(experts, y, counts, tau=1.7):
    """Zhang et al., the losses of the three experts."""
    prior = [n / math.fsum(counts) for n in counts]
    ascending = sorted(range(len(counts)), key=lambda j: counts[j])
    inverse = {j: prior[ascending[-1 - place]] for place, j in enumerate(ascending)}
    shifts = [
        [0.0] * len(counts),
        [math.log(p) for p in prior],
        [math.log(p) - tau * math.log(inverse[j]) for j, p in enumerate(prior)],
    ]
    return -math.fsum(
        math.log(softmax([a + b for a, b in zip(v, shift, strict=True)])[y])
        for v, shift in zip(experts, shifts, strict=True)
    )


@st.composite
def problems(draw, num_experts=None):
    """Counts, logits ``[N, K, C]`` and targets, of which some are ignored."""
    counts = draw(st.lists(st.integers(1, 10**6), min_size=2, max_size=6))
    num_samples, num_experts = draw(st.integers(1, 3)), num_experts or draw(st.integers(1, 4))
    value = st.floats(-8, 8)
    row = st.lists(value, min_size=len(counts), max_size=len(counts), unique=True)
    sample = st.lists(row, min_size=num_experts, max_size=num_experts)
    logits = draw(st.lists(sample, min_size=num_samples, max_size=num_samples))
    label = st.integers(-1, len(counts) - 1)
    return counts, logits, draw(st.lists(label, min_size=num_samples, max_size=num_samples))


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def assert_formula(make, formula, problem, **options):
    counts, logits, target = problem
    losses = [0.0 if y == -1 else formula(v, y, counts) for v, y in zip(logits, target, strict=True)]
    expected = {"none": losses, "sum": math.fsum(losses)}
    expected["mean"] = expected["sum"] / max(1, sum(y != -1 for y in target))
    for reduction, value in expected.items():
        criterion = make(counts, reduction=reduction, ignore_index=-1, **options)
        close(criterion(torch.tensor(logits, dtype=torch.float64), torch.tensor(target)), value)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_the_formula_of_ncl(backend):
    @settings(max_examples=25)
    @given(problem=problems())
    def check(problem):
        assert_formula(LOSSES["ncl"], ncl, problem, backend=backend)

    check()


@settings(max_examples=25)
@given(problem=problems(num_experts=3))
def test_the_formula_of_sade(problem):
    assert_formula(LOSSES["sade"], sade, problem)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("name", ["ride", "ride, reweighted"])
def test_the_formula_of_ride(name, backend):
    """The mean of LDAM is over the classes' weights, that of the diversity over the samples."""

    @settings(max_examples=25)
    @given(problem=problems())
    def check(problem):
        counts, logits, target = problem
        terms = [
            (0.0, 0.0, 0.0) if y == -1 else ride(v, y, counts, name != "ride")
            for v, y in zip(logits, target, strict=True)
        ]
        losses = [weight * ldam + between for weight, ldam, between in terms]
        weights = math.fsum(weight for weight, _, _ in terms) or 1.0
        number = sum(y != -1 for y in target) or 1
        mean = math.fsum(w * ldam for w, ldam, _ in terms) / weights
        expected = {
            "none": losses,
            "sum": math.fsum(losses),
            "mean": mean + math.fsum(between for _, _, between in terms) / number,
        }
        for reduction, value in expected.items():
            criterion = LOSSES[name](counts, reduction=reduction, ignore_index=-1, backend=backend)
            close(criterion(torch.tensor(logits, dtype=torch.float64), torch.tensor(target)), value)

    check()


@settings(max_examples=25)
@given(problem=problems(), data=st.data())
def test_the_formulas_of_the_terms(problem, data):
    counts, logits, _ = problem
    temperature = data.draw(st.lists(st.floats(0.5, 3), min_size=len(counts), max_size=len(counts)))
    stack = torch.tensor(logits, dtype=torch.float64)
    close(expert_distillation(stack), [distillation(v) for v in logits])
    close(expert_diversity(stack, 1.5), [diversity(v, [1.5] * len(counts)) for v in logits])
    per_class = torch.tensor(temperature, dtype=torch.float64)
    close(expert_diversity(stack, per_class), [diversity(v, temperature) for v in logits])
    for term in (expert_distillation, expert_diversity):
        assert (term(stack) >= -1e-12).all()


def test_a_temperature_keeps_its_digits_and_a_compiler_sees_it_change():
    logits, _ = batch()
    close(expert_diversity(logits, 0.1), [diversity(v, [0.1] * 5) for v in logits.tolist()])
    traced = torch.compile(expert_diversity, backend="eager", fullgraph=True)
    for temperature in (0.5, 1.5, torch.rand(5) + 0.5, torch.tensor(2.0)):
        torch.testing.assert_close(traced(logits, temperature), expert_diversity(logits, temperature))


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(make, reduction):
    logits, target = batch()
    criterion = make(COUNTS, reduction=reduction)
    if isinstance(criterion, RIDELoss):  # whose mean has no gradient, which differences would see
        mean = logits.mean(dim=1, keepdim=True)
        loss = lambda v: criterion(v, target)  # noqa: E731
        ours = torch.autograd.grad(loss(logits.requires_grad_()).sum(), logits)[0]
        temperature = torch.where(criterion.reweighting, criterion.temperature, 1.0)
        p = (mean / temperature).softmax(-1)
        leaf = logits.detach().requires_grad_()
        of_mean = (p * (p.log() - (leaf / temperature).log_softmax(-1))).sum(dim=(1, 2))
        kept = (target != -100).double()
        kept = kept / kept.sum() if reduction == "mean" else kept
        term = -0.3 * temperature.mean() ** 2 * (kept * of_mean).sum()
        plain = LDAMLoss(COUNTS, beta=0.99, reduction=reduction)
        plain.reweight(bool(criterion.reweighting))
        expected = torch.autograd.grad(term + plain(leaf, target).sum(), leaf)[0]
        torch.testing.assert_close(ours, expected)
    else:
        assert gradcheck(lambda v: criterion(v, target), logits.requires_grad_())


def test_gradcheck_of_distillation():
    logits, _ = batch()
    assert gradcheck(expert_distillation, logits.requires_grad_())


@pytest.mark.parametrize("term", [expert_diversity, expert_distillation])
def test_no_term_between_equal_experts_or_of_one(term):
    logits, _ = batch()
    equal = logits[:, :1].expand(-1, 3, -1).clone().requires_grad_()
    torch.testing.assert_close(term(equal), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    term(equal).sum().backward()
    torch.testing.assert_close(equal.grad, torch.zeros_like(equal), atol=1e-12, rtol=0)
    assert term(logits[:, 0]).abs().max() < 1e-12
    assert (term(logits) > 0).all()


@pytest.mark.parametrize("term", [expert_diversity, expert_distillation])
def test_a_term_takes_every_form_of_logits_and_computes_in_float32(term):
    logits, _ = batch()
    expected = term(logits)
    torch.testing.assert_close(term(list(logits.unbind(1))), expected)
    torch.testing.assert_close(term(ExpertOutput(logits, logits, logits)), expected)
    assert term(logits[:0]).shape == (0,)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = logits.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = term(low)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), term(low.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("term", [expert_diversity, expert_distillation])
def test_a_class_that_all_experts_mask_counts_nothing(term):
    logits, _ = batch()
    masked = torch.cat([logits, torch.full_like(logits[..., :1], -math.inf)], dim=-1).requires_grad_()
    loss = term(masked)
    torch.testing.assert_close(loss, term(logits))
    loss.sum().backward()
    assert masked.grad.isfinite().all()


def test_one_expert_of_ride_is_ldam_and_without_distillation_ncl_is_balanced_softmax():
    logits, target = batch(num_experts=1)
    torch.testing.assert_close(RIDELoss(COUNTS)(logits, target), LDAMLoss(COUNTS)(logits, target))
    linear = RIDELoss(COUNTS, scale=None)
    torch.testing.assert_close(linear(logits, target), F.cross_entropy(logits[:, 0], target))
    # Over all classes twice.
    logits, target = batch()
    ours = NCLLoss(COUNTS, distillation=0.0, hard_share=1.0)(logits, target)
    torch.testing.assert_close(ours, 2 * BalancedSoftmaxLoss(COUNTS)(logits, target))
    without = RIDELoss(COUNTS, diversity=0.0)(logits, target)
    torch.testing.assert_close(without, LDAMLoss(COUNTS)(logits, target))


@pytest.mark.parametrize("hard_share", [1e-9, 0.3, 0.6, 1.0])
def test_label_smoothing_is_over_the_classes_of_each_softmax(hard_share):
    logits, target = batch(num_experts=1)
    criterion = NCLLoss(COUNTS, 0.0, hard_share, label_smoothing=0.1, reduction="none")
    v = logits[:, 0] + torch.tensor(COUNTS, dtype=torch.float64).log()
    expected = F.cross_entropy(v, target, reduction="none", label_smoothing=0.1)
    for n, y in enumerate(target.tolist()):
        if y >= 0:
            hard = sorted(set(range(5)) - {y}, key=lambda j: -logits[n, 0, j])
            chosen = [y, *hard[: max(2, round(5 * hard_share)) - 1]]
            expected[n] += F.cross_entropy(v[n, chosen], torch.tensor(0), label_smoothing=0.1)
    torch.testing.assert_close(criterion(logits, target), expected)


@every_loss
def test_every_form_of_logits(make):
    logits, target = batch()
    criterion = make(COUNTS)
    expected = criterion(logits, target)
    torch.testing.assert_close(criterion(list(logits.unbind(1)), target), expected)
    torch.testing.assert_close(criterion(ExpertOutput(logits, logits, logits), target), expected)
    maps = logits.view(7, 3, 5, 1, 1).expand(-1, -1, -1, 2, 1)
    torch.testing.assert_close(criterion(maps, target.view(7, 1, 1).expand(-1, 2, 1)), expected)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(make, dtype):
    logits, target = batch(dtype=dtype)
    truth, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected, loss = make(COUNTS)(truth, target), make(COUNTS)(leaf, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=2e-2, atol=2e-2)


@every_loss
def test_weights_count_a_sample_as_often(make):
    logits, target = batch()
    weight = torch.tensor([2.0, 1, 0, 3, 1, 1, 2])
    repeats = weight.long()
    expected = make(COUNTS)(logits.repeat_interleave(repeats, 0), target.repeat_interleave(repeats))
    torch.testing.assert_close(make(COUNTS)(logits, target, sample_weight=weight), expected)
    twice = make(COUNTS)(logits, target, normalizer=4.0)
    torch.testing.assert_close(make(COUNTS)(logits, target, normalizer=8.0), twice / 2)
    torch.testing.assert_close(make(COUNTS, reduction="sum")(logits, target), 4 * twice)


@every_loss
def test_what_is_ignored_may_hold_anything(make):
    logits, target = batch()
    expected = make(COUNTS)(logits[target != -100], target[target != -100])
    logits[3] = math.nan
    leaf = logits.requires_grad_()
    loss = make(COUNTS)(leaf, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (leaf.grad[3] == 0).all()
    assert leaf.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("number", [0, 2])
def test_a_batch_without_samples_gives_a_zero_with_a_graph(make, number):
    leaf = torch.randn(number, 3, 5, requires_grad=True)
    loss = make(COUNTS)(leaf, torch.full((number,), -100))
    assert loss == 0
    loss.backward()
    assert (leaf.grad == 0).all()


@every_loss
@pytest.mark.parametrize("number", [1, 15])
def test_masked_classes_are_as_if_they_were_not_there(make, number):
    logits, target = batch()
    leaf = logits.clone().requires_grad_()
    kept = make(COUNTS)(leaf, target)
    kept.backward()
    wider = torch.cat([logits, 50 * torch.ones(7, 3, number, dtype=torch.float64)], dim=-1).requires_grad_()
    criterion = make([*COUNTS, *[0] * number], zero_counts="mask")
    loss = criterion(wider, target)
    torch.testing.assert_close(loss, kept)
    loss.backward()
    torch.testing.assert_close(wider.grad, F.pad(leaf.grad, (0, number)))


@pytest.mark.parametrize("hard_share", [0.3, 0.7])
def test_as_many_classes_are_hard_as_without_the_masked_ones(hard_share):
    """Also where half a class is rounded."""
    for number in range(2, 36):
        counts, target = list(range(1, number + 1)), torch.tensor([0, number - 1])
        logits = torch.randn(2, 3, number, dtype=torch.float64)
        expected = NCLLoss(counts, hard_share=hard_share)(logits, target)
        masking = NCLLoss([*counts, 0, 0, 0], hard_share=hard_share, zero_counts="mask")
        torch.testing.assert_close(masking(F.pad(logits, (0, 3)), target), expected)


@every_loss
def test_other_classes_can_be_masked_in_training(make):
    logits, target = batch(num_classes=8)
    criterion = make([*COUNTS, 7, 5, 2], zero_counts="mask")
    step = torch.compile(criterion, backend="eager", fullgraph=True)
    for masked in ([], [5], [5, 7], [6]):
        counts = [0 if j in masked else n for j, n in enumerate([*COUNTS, 7, 5, 2])]
        criterion.set_adjustment(counts)
        left = [j for j in range(8) if j not in masked]
        expected = make([counts[j] for j in left])(logits[..., left], target)
        torch.testing.assert_close(criterion(logits, target), expected)
        torch.testing.assert_close(step(logits, target), expected)


@every_loss
def test_traced_by_a_compiler_and_in_a_checkpoint(make):
    logits, target = batch(dtype=torch.float32)
    criterion = make(COUNTS)
    expected = criterion(logits, target)
    traced = torch.compile(criterion, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(logits, target), expected)
    other = make([5, 4, 3, 2, 1])
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(other(logits, target), expected)
    other = make([5, 4, 3, 2, 1])
    other.set_adjustment(COUNTS)
    torch.testing.assert_close(other(logits, target), expected)


def test_ride_takes_probabilities():
    logits, target = batch()
    kept = target != -100
    hot = F.one_hot(target.clamp(min=0), 5).double() * kept[:, None]
    criterion = LOSSES["ride, reweighted"](COUNTS)
    torch.testing.assert_close(criterion(logits, hot), criterion(logits, target))


def test_ncl_refuses_probabilities():
    with pytest.raises(ValueError, match=r"target: expected class indices.*expert_distillation"):
        NCLLoss(COUNTS)(torch.zeros(2, 3, 5), torch.full((2, 5), 0.2))


def test_own_class_weights_weigh_all_terms_of_ncl():
    logits, target = batch()
    weight = torch.tensor([1.0, 2, 3, 4, 5])
    each = NCLLoss(COUNTS, reduction="none")(logits, target)
    of_sample = torch.where(target >= 0, weight[target.clamp(min=0)], 0.0)
    loss = NCLLoss(COUNTS, class_weight=weight)(logits, target)
    torch.testing.assert_close(loss, (of_sample * each).sum() / of_sample.sum())


def test_own_class_weights_and_label_smoothing_of_ncl():
    """Over all classes each has its own weight, as in PyTorch; over hard ones all that of the target."""
    logits, target = batch(num_experts=1)
    weight = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    v = logits[:, 0] + torch.tensor(COUNTS, dtype=torch.float64).log()
    over_all = F.cross_entropy(v, target, weight, label_smoothing=0.1, reduction="sum")
    of_sample = torch.where(target >= 0, weight[target.clamp(min=0)], 0.0)
    over_hard = of_sample * F.cross_entropy(v, target, label_smoothing=0.1, reduction="none")
    criterion = NCLLoss(COUNTS, 0.0, hard_share=1.0, class_weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(criterion(logits, target), (over_all + over_hard.sum()) / of_sample.sum())


class CrossEntropyTwice(AdjustedLoss):
    """A loss of one's own, which adds to each sample what it computes itself."""

    _adds = True

    def _added(self, batch):
        log_p = batch.stacked(self.ignore_index).log_softmax(-1).sum(dim=-2)
        if batch.is_soft:
            return -(batch.target * log_p).sum(dim=-1)
        return -log_p.gather(-1, batch.own_class(log_p.shape[-1])[..., None])[..., 0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_term_of_a_loss_of_ones_own_is_weighed_for_indices_and_probabilities(weighted, reduction):
    logits, target = batch()
    hot = F.one_hot(target.clamp(min=0), 5).double() * (target != -100)[:, None]
    class_weight = [1.0, 2, 3, 4, 5] if weighted else None
    given = {"sample_weight": torch.tensor([2.0, 1, 0, 3, 1, 1, 2])}
    plain = AdjustedLoss(COUNTS, class_weight=class_weight, reduction=reduction)(logits, target, **given)
    criterion = CrossEntropyTwice(COUNTS, class_weight=class_weight, reduction=reduction)
    for kind in (target, hot):
        torch.testing.assert_close(criterion(logits, kind, **given), 2 * plain)


def test_a_term_of_a_loss_of_ones_own_weighs_mixed_samples_by_the_mean_of_their_weights():
    logits, _ = batch(num_experts=1)
    mixed = torch.rand(7, 5, dtype=torch.float64).softmax(dim=1)
    weight = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    each = -(mixed * logits[:, 0].log_softmax(-1)).sum(dim=-1)
    plain = AdjustedLoss(COUNTS, class_weight=weight, reduction="none")(logits, mixed)
    loss = CrossEntropyTwice(COUNTS, class_weight=weight, reduction="none")(logits, mixed)
    torch.testing.assert_close(loss, plain + mixed @ weight * each)


def test_a_target_that_is_no_class_gives_nan_where_nobody_looks():
    logits, target = batch()
    for wrong in (7, -3):
        target[1] = wrong
        for criterion in (
            NCLLoss(COUNTS, reduction="none", validate_args=False),
            NCLLoss(COUNTS, class_weight=[1.0, 2, 3, 4, 5], reduction="none", validate_args=False),
        ):
            loss = criterion(logits, target)
            assert loss.isnan().tolist() == [n == 1 for n in range(7)]


def test_the_margin_of_ride_is_used_or_refused_and_shown():
    assert RIDELoss(COUNTS).margins.max() == 0.5
    given = RIDELoss(COUNTS, max_margin=0.3, scale=1.0)
    assert given.margins.max() == 0.3
    assert "max_margin=0.3, scale=1.0" in repr(given)
    linear = RIDELoss(COUNTS, scale=None)
    assert linear.margins.max() == 0
    assert "max_margin=0.0, scale=1.0" in repr(linear)
    with pytest.raises(ValueError, match=r"max_margin, scale: expected no margin.*got max_margin=0\.3"):
        RIDELoss(COUNTS, max_margin=0.3, scale=None)


def test_sade_has_three_experts_and_a_strength_that_can_change():
    criterion = create_loss("sade", COUNTS)
    assert isinstance(criterion, LGLALoss)
    assert not criterion.aaw
    assert (criterion.num_experts, float(criterion.adjuster.tau)) == (3, 2.0)
    criterion.set_adjustment(COUNTS[::-1], tau=1.0)
    assert torch.equal(criterion.adjuster.table, create_loss("sade", COUNTS[::-1], tau=1.0).adjuster.table)
    assert (criterion.adjuster.table.amax(dim=1) == 0).all()
    for message, options in {
        "2 from num_experts, 3 from adjustment='sade'": {"num_experts": 2},
        "4 from num_experts": {"num_experts": 4},
    }.items():
        with pytest.raises(ValueError, match=f"num_experts: .*{message}"):
            create_loss("sade", COUNTS, **options)
    # Validation: of the ensemble it is cross entropy.
    logits = torch.randn(4, 5)
    torch.testing.assert_close(criterion(logits, TARGET[:4]), F.cross_entropy(logits, TARGET[:4]))


@between_experts
def test_validation_is_that_of_the_loss_it_is_made_of(make):
    """Of logits ``[N, C]`` without a gradient there is nothing between experts."""
    logits, target = batch(num_experts=1)
    criterion = make(COUNTS)
    torch.testing.assert_close(criterion(logits[:, 0], target), criterion(logits, target))
