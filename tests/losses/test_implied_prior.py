"""The class prior that logits hold where a loss is lowest, found by making it lowest."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lgla_losses import ClassGrouper, LGLALoss, LinearLGLALoss, create_loss
from lgla_losses.adjusted import AdjustedLoss
from lgla_losses.baselines import FocalLoss, LDAMLoss, VSLoss
from lgla_losses.distributed import ClassParallelLGLALoss
from lgla_losses.losses.create import _LOSSES
from lgla_losses.losses.multi_label import MultiLabelLoss

NUM_INPUTS = 4


def reweighted(criterion):
    criterion.reweight()
    return criterion


#: A loss by the class counts, for each name and option that the theory is exact for.
EXACT = {
    "lgla": lambda counts, **o: create_loss("lgla", counts, num_experts=3, tau=1.3, aaw=False, **o),
    "cla": lambda counts, **o: create_loss("cla", counts, num_experts=2, **o),
    "softmax": lambda counts, **o: create_loss("softmax", counts, **o),
    "balanced": lambda counts, **o: create_loss("balanced", counts, **o),
    "logit": lambda counts, **o: create_loss("logit", counts, tau=1.5, **o),
    "focal": lambda counts, **o: create_loss("focal", counts, gamma=0.0, **o),
    "class_balanced": lambda counts, **o: create_loss("class_balanced", counts, beta=0.95, **o),
    "ldam": lambda counts, **o: create_loss("ldam", counts, max_margin=0.0, scale=1, **o),
    "ldam, reweighted": lambda counts, **o: reweighted(LDAMLoss(counts, 0.0, scale=1, beta=0.9, **o)),
    "vs": lambda counts, **o: create_loss("vs", counts, gamma=0.2, tau=0.7, **o),
    "ride": lambda counts, **o: create_loss("ride", counts, diversity=0.0, scale=None, **o),
    "ncl": lambda counts, **o: create_loss("ncl", counts, hard_share=1.0, **o),
    "sade": lambda counts, **o: create_loss("sade", counts, **o),
    "softmax of experts": lambda counts, **o: create_loss("softmax", counts, num_experts=3, **o),
    "balanced of experts": lambda counts, **o: create_loss("balanced", counts, num_experts=3, **o),
    "logit of experts": lambda counts, **o: create_loss("logit", counts, num_experts=2, tau=0.5, **o),
    "linear": lambda counts, **o: LinearLGLALoss(counts, aaw=False, **o),
    "class-parallel": lambda counts, **o: ClassParallelLGLALoss(counts, aaw=False, **o),
}
every_exact_loss = pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
weighted_loss = pytest.mark.parametrize(
    "make", [make for make in EXACT.values() if isinstance(make([3, 2, 1]), AdjustedLoss)]
)


def likelihoods(seed, num_classes):
    """Probabilities ``p(x|j)`` of a few inputs x, ``[X, C]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(NUM_INPUTS, num_classes, generator=generator, dtype=torch.float64).add(0.1).softmax(0)


def lowest(criterion, likelihood, counts):
    """Minimise the loss over the logits of every input: ``[X, C]``, of experts the mean of theirs.

    Every input and class with samples is a row that counts as often as it occurs.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    inputs, target = (likelihood * counts).nonzero(as_tuple=True)
    occurs = (likelihood * counts / counts.sum())[inputs, target]
    num_experts = getattr(criterion, "num_experts", 1)
    logits = torch.zeros(NUM_INPUTS, num_experts, likelihood.shape[1], dtype=torch.float64).requires_grad_()
    rows = torch.eye(NUM_INPUTS, dtype=torch.float64)[inputs]  # what a linear layer takes for an input

    def loss():
        optimizer.zero_grad()
        if isinstance(criterion, LinearLGLALoss | ClassParallelLGLALoss):
            features = rows[:, None].expand(-1, num_experts, -1)
            value = criterion(features, logits.permute(1, 2, 0), target, sample_weight=occurs)
        else:
            value = criterion(logits[inputs], target, sample_weight=occurs)
        value.backward()
        return value

    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    optimizer.step(loss)
    return logits.detach()


def held(logits, likelihood, classes):
    """Compute the prior of the classes that logits hold beside the likelihood, input by input."""
    return (logits - likelihood.log())[:, classes].softmax(1)


def assert_held(logits, likelihood, prior, classes=slice(None)):
    found, expected = held(logits, likelihood, classes), prior[classes] / prior[classes].sum()
    torch.testing.assert_close(found, expected.expand_as(found), rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(prior.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_every_loss_of_one_class_a_sample_is_here():
    names = {name for name, (kind, _) in _LOSSES.items() if not issubclass(kind, MultiLabelLoss)}
    assert names <= set(EXACT)


@every_exact_loss
@settings(max_examples=3)
@given(counts=st.lists(st.integers(1, 60), min_size=3, max_size=5), seed=st.integers(0, 99))
def test_logits_are_log_likelihood_plus_the_log_of_the_prior(make, counts, seed):
    criterion, likelihood = make(counts), likelihoods(seed, len(counts))
    logits = lowest(criterion, likelihood, counts).mean(dim=1)
    if isinstance(criterion, VSLoss):
        logits = logits * criterion.multiplier
    assert_held(logits, likelihood, criterion.implied_prior())


@weighted_loss
def test_weights_of_ones_own_count(make):
    counts, weight, likelihood = [40, 9, 4], [0.5, 2, 3], likelihoods(1, 3)
    criterion = make(counts, class_weight=weight)
    logits = lowest(criterion, likelihood, counts).mean(dim=1)
    if isinstance(criterion, VSLoss):
        logits = logits * criterion.multiplier
    assert_held(logits, likelihood, criterion.implied_prior())
    assert not torch.allclose(criterion.implied_prior(), make(counts).implied_prior())


@every_exact_loss
def test_masked_classes_have_none_and_a_background_its_own(make):
    counts, likelihood = [30, 0, 12, 5, 0, 2], likelihoods(2, 6)
    criterion = make(counts, zero_counts="mask", background=2)
    logits = lowest(criterion, likelihood, counts).mean(dim=1)
    if isinstance(criterion, VSLoss):
        logits = logits * criterion.multiplier
    prior = criterion.implied_prior()
    assert_held(logits, likelihood, prior, classes=[0, 2, 3, 5])
    assert prior[[1, 4]].tolist() == [0, 0]


@pytest.mark.parametrize("make", [EXACT["lgla"], EXACT["linear"], EXACT["class-parallel"]])
@pytest.mark.parametrize("fusion", [[1, 0, 0], [0.2, 0.5, 0.3], torch.tensor([1, 1, 2])])
def test_any_fusion_of_experts(make, fusion):
    counts, likelihood = [50, 20, 6, 2], likelihoods(3, 4)
    criterion = make(counts)
    weights = torch.as_tensor(fusion, dtype=torch.float64) / sum(fusion)
    fused = torch.einsum("k,xkc->xc", weights, lowest(criterion, likelihood, counts))
    assert_held(fused, likelihood, criterion.implied_prior(fusion))


def test_a_table_of_ones_own():
    counts, likelihood = [50, 20, 6], likelihoods(4, 3)
    criterion = LGLALoss(counts, adjustment=torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 0.0]]), aaw=False)
    assert_held(lowest(criterion, likelihood, counts).mean(1), likelihood, criterion.implied_prior())


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_keeps_the_order_of_the_classes(gamma):
    """Its probabilities are less confident than the posterior, so the prior is that of the order only."""
    counts, likelihood = [8, 5, 3], likelihoods(5, 3)
    criterion = FocalLoss(gamma, class_counts=counts)
    found = lowest(criterion, likelihood, counts)[:, 0].softmax(1)
    posterior = (likelihood.log() + criterion.implied_prior().log()).softmax(1)
    assert torch.equal(found.argsort(1), posterior.argsort(1))
    assert (found.amax(1) < posterior.amax(1)).all()


def test_margins_are_left_out():
    plain, margins = LDAMLoss([90, 10], max_margin=0.0), LDAMLoss([90, 10])
    assert margins.implied_prior().tolist() == plain.implied_prior().tolist() == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("name", [name for name in EXACT if name != "class-parallel"])
def test_it_follows_the_constants(name):
    """Through ``set_adjustment``, a state and a cast."""
    make, counts, others = EXACT[name], [40, 8, 2, 1], [3, 3, 9, 27]
    criterion, expected = make(counts), make(others).implied_prior()
    criterion.set_adjustment(others)
    torch.testing.assert_close(criterion.implied_prior(), expected)
    restored = make(counts)
    restored.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(nn.Sequential(restored).half()[0].implied_prior(), expected)


@every_exact_loss
def test_class_counts_are_read_in_one_way(make):
    criterion = make([40, 8, 2])
    for counts in (criterion.class_counts, criterion._training_counts()):
        assert counts.tolist() == [40, 8, 2]
    assert criterion._training_counts().dtype == torch.float64
    criterion._training_counts().zero_()
    assert criterion.class_counts.tolist() == [40, 8, 2]


def test_class_counts_of_experts_are_read_only():
    criterion = LGLALoss([40, 8, 2])
    assert criterion.class_counts.dtype == torch.float64
    with pytest.raises(ValueError, match="set_adjustment"):
        criterion.class_counts[0] = 1
    with pytest.raises(AttributeError, match=r"class_counts.*set_adjustment"):
        criterion.class_counts = torch.ones(3)


@pytest.mark.parametrize("zero_counts", ["smooth", "mask"])
def test_class_counts_where_classes_have_no_samples(zero_counts):
    expected = {"smooth": [41, 1, 3], "mask": [40, 0, 2]}[zero_counts]
    for kind in (LGLALoss, ClassParallelLGLALoss):
        assert kind([40, 0, 2], 2, zero_counts=zero_counts)._training_counts().tolist() == expected
    assert AdjustedLoss([40, 0, 2], zero_counts=zero_counts)._training_counts().tolist() == expected


def test_groups_of_ones_own_over_ranks():
    grouper = ClassGrouper.from_groups([40, 8, 2, 1], [1, 0, 0, 1])
    parallel = ClassParallelLGLALoss(grouper=grouper, tau=1.0)
    torch.testing.assert_close(
        parallel.implied_prior([2, 1, 0]), LGLALoss(grouper=grouper, tau=1.0).implied_prior([2, 1, 0])
    )


def test_counts_far_apart_stay_finite():
    prior = AdjustedLoss([1e300, 1e-300], class_weight=[1e-300, 1e300]).implied_prior()
    torch.testing.assert_close(prior, torch.full_like(prior, 0.5))
    assert math.isfinite(create_loss("logit", [1e300, 1e-300], tau=3.0).implied_prior().sum())


def test_a_class_of_weight_zero_has_no_prior():
    assert AdjustedLoss([6, 3, 1], class_weight=[1, 0, 1]).implied_prior()[1] == 0
