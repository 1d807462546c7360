"""Eqs. 1 to 3 and 9 in plain PyTorch, with class weights, margins and the focal exponent."""

import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from engines import INF, NAN, random_logits, random_probabilities, random_table, random_target

from lgla_losses import functional

OPTIONS = [
    {"class_weight": class_weight, "margin": margin, "gamma": gamma, "label_smoothing": smoothing}
    for class_weight, margin, gamma, smoothing in itertools.product(
        [None, torch.tensor([0.5, 2.0, 1.0, 0.1])],
        [None, torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)],
        [0.0, 0.5, 2.0],
        [0.0, 0.2],
    )
]


def given(options):
    """The name of a case: what is not at its default."""
    return "-".join(
        name if torch.is_tensor(v) else f"{name}={v}" for name, v in options.items() if v is not None
    )


def targets(kind):
    """Of seven samples and four classes, the third ignored."""
    if kind == "indices":
        return random_target(7, 4, ignored=[2])
    return random_probabilities(7, 4, kind, ignored=[2])


def one_hot(target):
    ignored = (target == -100).unsqueeze(-1)
    return F.one_hot(target.clamp(min=0), 4).masked_fill(ignored, 0).double()


@pytest.mark.parametrize("kind", ["indices", "dense", "mixup"])
@pytest.mark.parametrize("options", OPTIONS, ids=given)
def test_loss_and_gradient_in_plain_loops(kind, options, close):
    logits, table = (random_logits(7, 3, 4) / 6).requires_grad_(), random_table(3, 4)
    target, weights = targets(kind), 1 + torch.rand(7, 3)
    losses = functional.lgla_loss(logits, target, table, weights, **options)
    losses.sum().backward()

    probabilities = one_hot(target) if kind == "indices" else target
    margin = 0.0 if options["margin"] is None else options["margin"]
    adjusted = (logits + table - (margin * probabilities)[:, None]).tolist()
    class_weight = options["class_weight"]
    for i, q in enumerate(probabilities.tolist()):
        shares = reference.shares(
            q, None if class_weight is None else class_weight.tolist(), options["label_smoothing"]
        )
        rows = [reference.loss_of_row(adjusted[i][k], shares, options["gamma"]) for k in range(3)]
        close(losses[i], math.fsum(w * loss for w, (loss, _) in zip(weights[i].tolist(), rows, strict=True)))
        close(
            logits.grad[i],
            weights[i, :, None].double() * torch.tensor([g for _, g in rows], dtype=torch.float64),
        )
    assert losses[2] == 0


@pytest.mark.parametrize("kind", ["indices", "mixup"])
@pytest.mark.parametrize("options", OPTIONS[-6:], ids=given)  # with class weights and margins
def test_first_and_second_derivatives(kind, options):
    logits, target = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True), targets(kind)[1:3]
    table = random_table(1, 4)
    loss = lambda v: functional.lgla_loss(v, target, table, **options)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("kind", ["indices", "dense"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_cross_entropy(kind, smoothing, close):
    logits, target, class_weight = torch.randn(5, 1, 4).double(), targets(kind)[3:], torch.rand(4).double()
    logits = logits[: len(target)]
    truth = F.cross_entropy(
        logits[:, 0], target, weight=class_weight, label_smoothing=smoothing, reduction="none"
    )
    table = torch.zeros(1, 4)
    options = {"class_weight": class_weight, "label_smoothing": smoothing}
    close(functional.lgla_loss(logits, target, table, **options), truth)


@pytest.mark.parametrize("options", OPTIONS, ids=given)
def test_a_one_hot_target_is_its_index(options, close):
    """Also of maps, whose samples are places."""
    target, table = random_target(2, 4).expand(3, 5, 2).clone(), random_table(2, 4)
    target[0, 1:3, 0] = -100
    logits, weights = torch.randn(3, 2, 4, 5, 2), torch.rand(3, 5, 2, 2)
    losses = functional.lgla_loss(logits, target, table, weights, **options)
    assert losses.shape == (3, 5, 2)
    close(losses, functional.lgla_loss(logits, one_hot(target).movedim(-1, 1), table, weights, **options))
    # As if every place were a sample; experts may come one by one.
    rows = logits.movedim((1, 2), (-2, -1)).flatten(0, 2)
    flat = functional.lgla_loss(rows.unbind(1), target.flatten(), table, weights.flatten(0, 2), **options)
    close(losses.flatten(), flat)


def test_equations_1_and_2_are_special_cases(close):
    logits, target = torch.randn(6, 1, 3).double(), random_target(6, 3)
    counts = torch.tensor([50, 20, 1])
    p = torch.softmax(logits[:, 0], dim=1)  # Eq. 1
    zeros = functional.log_prior_table(counts, 1, tau=0.0)
    close(functional.lgla_loss(logits, target, zeros), -p[torch.arange(6), target].log())

    adjusted = torch.exp(logits[:, 0] + 2 * counts.double().log())  # Eq. 2 with T(j) = 2 log n_j
    p = adjusted / adjusted.sum(dim=1, keepdim=True)
    table = functional.log_prior_table(counts, 1, tau=2.0)
    close(functional.lgla_loss(logits, target, table), -p[torch.arange(6), target].log())


@pytest.mark.parametrize("kind", ["indices", "one-hot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gamma", [0.2, 0.5, 1.0, 2.0])
def test_the_focal_gradient_vanishes_where_p_is_one(kind, dtype, gamma):
    """The power of 1 - p has no derivative at 0 for gamma < 1; the loss has one."""
    logits, target = torch.zeros(1, 1, 4, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    logits[0, 0, 0] = 1e4
    logits.requires_grad_()
    target = target if kind == "indices" else one_hot(target)
    loss = functional.lgla_loss(logits, target, torch.zeros(1, 4), gamma=gamma)
    loss.sum().backward()
    assert loss == 0
    assert logits.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
def test_the_slope_of_the_focal_loss_is_its_derivative(gamma, close):
    losses = torch.cat([torch.zeros(1), torch.logspace(-18, 2, 50)]).double().requires_grad_()
    functional.focal(losses, gamma).sum().backward()
    close(functional.focal_slope(losses, gamma), losses.grad)
    exact = [(-math.expm1(-v)) ** gamma * v for v in losses.tolist()]
    close(functional.focal(losses, gamma), exact)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_masked_classes_add_nothing(gamma):
    """Of probability 0 and at -inf; on the target -inf shows, as NaN does anywhere."""
    logits = torch.randn(3, 1, 4)
    logits[:, 0, 3] = torch.tensor([-INF, -INF, NAN])
    logits.requires_grad_()
    target = torch.tensor([[0.4, 0.6, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5], [0.3, 0.7, 0.0, 0.0]])
    losses = functional.lgla_loss(logits, target, torch.zeros(1, 4), gamma=gamma)
    losses[0].backward()
    assert logits.grad[0].isfinite().all()
    assert losses[1] == INF
    assert losses[2].isnan()
