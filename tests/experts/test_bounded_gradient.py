"""What cosine classifiers hand back in training, so that a usual learning rate works."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgla_losses import ExpertModel, GroupConvExperts, LGLALoss
from lgla_losses.experts import ExpertClassifiers
from lgla_losses.experts._classifiers import MOST_PULL, MOST_TURN


def gradients(features, lengths=1.0, **options):
    """Logits, and the gradients of features and class centres of one expert, of some sum of logits."""
    options = {"gradient": "bounded", **options}
    head = ExpertClassifiers(1, 9, 7, options.pop("scale", 30.0), **options).double()
    torch.manual_seed(1)
    with torch.no_grad():
        head.weight.copy_(lengths * F.normalize(torch.randn(1, 7, 9), dim=-1))
    features = features.clone().requires_grad_()
    logits = head(features)
    direction = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * direction).sum().backward()
    return logits.detach(), features.grad, head.weight.grad


@pytest.fixture
def features():
    return (
        torch.randn(5, 1, 9, dtype=torch.float64) * torch.tensor([0.1, 1.0, 5.0, 50.0, 500.0])[:, None, None]
    )


def test_logits_are_the_same_with_either_gradient(features):
    assert torch.equal(gradients(features)[0], gradients(features, gradient="exact")[0])


def test_the_exact_gradient_is_that_of_the_cosine(features):
    head = ExpertClassifiers(1, 9, 7, 30.0, gradient="exact").double()
    cosine = lambda f, w: 30 * F.normalize(f, dim=-1) @ F.normalize(w, dim=-1).mT  # noqa: E731
    given = torch.autograd.grad(head(features.requires_grad_()).square().sum(), [features, head.weight])
    expected = torch.autograd.grad(
        cosine(features[:, 0], head.weight[0]).square().sum(), [features, head.weight]
    )
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sample_pulls_about_as_at_a_linear_layer_at_most(features):
    _, bounded, _ = gradients(features)
    _, exact, _ = gradients(features, gradient="exact")
    factor = (MOST_PULL * features.norm(dim=-1, keepdim=True) / 30).clamp(max=1)
    torch.testing.assert_close(bounded, exact * factor)
    assert (factor == 1).any()
    assert (factor < 0.1).any()


@pytest.mark.parametrize("length", [0.1, 1.0, 2.0, 10.0])
def test_a_class_centre_turns_no_more_than_at_scale_three(features, length):
    _, _, bounded = gradients(features, length)
    _, _, exact = gradients(features, length, gradient="exact")
    factor = min(1.0, MOST_TURN * length**2 / 30)
    torch.testing.assert_close(bounded, exact * factor, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_linear_in_the_loss(features):
    """So that GradScaler and micro-batches change nothing."""
    head = ExpertClassifiers(1, 9, 7, 30.0, gradient="bounded").double()
    once = torch.autograd.grad(head(features).logsumexp(-1).sum(), head.weight)[0]
    scaled = torch.autograd.grad(1024 * head(features).logsumexp(-1).sum(), head.weight)[0]
    parts = sum(
        torch.autograd.grad(head(part).logsumexp(-1).sum(), head.weight)[0] for part in features.split(2)
    )
    torch.testing.assert_close(scaled / 1024, once)
    torch.testing.assert_close(parts, once)


def test_eval_mode_a_small_scale_and_linear_heads_have_the_exact_gradient(features):
    head = ExpertClassifiers(1, 9, 7, 30.0, gradient="bounded").double()
    twin = ExpertClassifiers(1, 9, 7, 30.0, gradient="exact").double()
    twin.load_state_dict(head.state_dict())
    ours, theirs = (
        torch.autograd.grad(net.eval()(features).square().sum(), net.weight)[0] for net in (head, twin)
    )
    assert torch.equal(ours, theirs)
    far = 1e3 * features
    for scale in (1.0, None):
        for ours, theirs in zip(
            gradients(far, scale=scale), gradients(far, scale=scale, gradient="exact"), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_experts_pass_the_choice_on_and_keep_it(layout):
    experts = GroupConvExperts(partial(nn.Linear, 4, 9), 3, 7, layout=layout, gradient="bounded")
    for other in (experts.to_grouped(), experts.to_independent()):
        assert other.classifiers.gradient == "bounded"
    assert experts.extract(0).classifier.gradient == "bounded"
    assert GroupConvExperts(None, 3, 7, num_features=9).classifiers.gradient == "bounded"
    network = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7))
    assert ExpertModel.from_model(network).experts.classifiers.gradient == "bounded"
    assert ExpertModel.from_model(network, gradient="exact").experts.classifiers.gradient == "exact"


@pytest.mark.parametrize("num_features", [64, 768])
@pytest.mark.parametrize("scale", [10.0, 30.0])
def test_first_logits_differ_about_as_those_of_a_linear_layer(num_features, scale):
    """The scale of 30 alone makes first losses of 10 to 20 an expert."""
    torch.manual_seed(0)
    shared = torch.randn(200, num_features)

    def spread(**options):
        experts = GroupConvExperts(None, 3, 100, num_features=num_features, **options)
        return experts(shared).logits.std(-1).mean()

    linear, bounded = spread(classifier="linear"), spread(scale=scale)
    assert 0.4 * linear < bounded < linear
    assert spread(scale=30.0, gradient="exact") > 1.7 * bounded


def test_fine_tuning_at_a_low_rate_is_not_much_slower_than_with_linear_heads():
    """Of class centres too close to each other AdamW needs hundreds of steps to part them."""
    losses = {}
    for classifier in ("linear", "cosine"):
        torch.manual_seed(0)
        inputs, labels = torch.randn(160, 32), torch.arange(160) % 10
        inputs += torch.randn(10, 32)[labels]
        body = nn.Sequential(nn.Linear(32, 768), nn.GELU(), nn.Linear(768, 768), nn.LayerNorm(768))
        experts = GroupConvExperts(None, 3, 10, num_features=768, classifier=classifier)
        optimizer = torch.optim.AdamW([*body.parameters(), *experts.parameters()], lr=2e-5)
        for _ in range(100):
            optimizer.zero_grad()
            logits = experts(body(inputs)).logits
            loss = sum(F.cross_entropy(v, labels) for v in logits.unbind(1))
            loss.backward()
            optimizer.step()
        losses[classifier] = loss.item()
    assert losses["cosine"] < 2 * losses["linear"], losses


def test_first_losses_are_those_of_a_guess():
    torch.manual_seed(0)
    labels = torch.arange(200) % 100
    experts = GroupConvExperts(None, 3, 100, num_features=64)
    loss = LGLALoss([5] * 100, 3, aaw=False)(experts(torch.randn(200, 64)), labels)
    torch.testing.assert_close(loss, torch.tensor(3 * math.log(100)), rtol=0.05, atol=0)


def test_class_centres_begin_close_to_each_other_and_apart_from_those_of_other_experts():
    torch.manual_seed(0)
    weight = GroupConvExperts(None, 3, 100, num_features=64).classifiers.weight.detach()
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(3, 100))
    assert (weight @ weight.mT).min() > 0.95
    assert (weight.mean(1) @ weight.mean(1).T).fill_diagonal_(0).abs().max() < 0.5


def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match=r"gradient: expected .*'bounded'.*'exact'.*got 'clipped'"):
        GroupConvExperts(None, 3, 7, num_features=9, gradient="clipped")


def test_compiled_gradients_are_the_same(features):
    head = ExpertClassifiers(1, 9, 7, 30.0, gradient="bounded").double()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(features).square().sum(), head.weight)[0] for f in (compiled, head))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_low_precision_are_finite_where_lengths_overflow_or_vanish(dtype):
    head = ExpertClassifiers(1, 9, 7, 30.0, gradient="bounded").to(dtype)
    features = torch.tensor([0.0, 1e-4, 1.0, 3e4], dtype=dtype)[:, None, None].expand(4, 1, 9)
    features = features.clone().requires_grad_()
    head(features).float().sum().backward()
    assert features.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def lengths_after_twenty_steps(gradient):
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randn(64, 8) + torch.randn(4, 8)[labels]
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
    stage = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    experts = GroupConvExperts(stage, 3, 4, reset=True, gradient=gradient)
    criterion = LGLALoss([100, 30, 10, 3])
    optimizer = torch.optim.SGD([*net.parameters(), *experts.parameters()], lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        criterion(experts(net(images)), labels).backward()
        optimizer.step()
    return experts.classifiers.weight.detach().norm(dim=-1).mean()


def test_class_centres_stay_short_at_a_usual_learning_rate():
    """That they do not, at scale 30 and rate 0.1, is why warm-up and clipping help."""
    bounded, exact = map(lengths_after_twenty_steps, ("bounded", "exact"))
    assert bounded - 1 < 0.25 * (exact - 1)
