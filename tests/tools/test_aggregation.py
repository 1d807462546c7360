"""Weights of experts from two views of test samples without labels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lgla_losses import ExpertOutput
from lgla_losses.aggregation import self_supervised_weights


def two_views(noises, num_samples=300, num_classes=5, seed=0):
    """Logits ``[N, K, C]`` of experts that know the classes but for noise of their own, in two views."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (num_samples,), generator=generator)
    clean = 3 * F.one_hot(target, num_classes)[:, None].double()
    shape = (2, num_samples, len(noises), num_classes)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tuple(clean + noise * torch.tensor(noises)[:, None])


def similarity(views, weights):
    """The paper's objective, in plain loops."""
    total = 0.0
    for one, other in zip(*views, strict=True):
        p, q = ((weights[:, None] * v).sum(0).softmax(0) for v in (one, other))
        total += float(p @ q / (p.norm() * q.norm()))
    return total / len(views[0])


def test_one_step_is_that_of_the_paper():
    """Against the gradient of the plain objective, with Nesterov's first step: (1 + momentum) times it."""
    views = two_views([1.0, 0.5, 2.0], num_samples=20)
    free = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    p, q = ((free.softmax(0)[:, None] * v).sum(1).softmax(1) for v in views)
    ((p * q).sum(1) / (p.norm(dim=1) * q.norm(dim=1))).mean().backward()
    expected = (0.3 * 1.9 * free.grad).softmax(0)
    found = self_supervised_weights(*views, learning_rate=0.3, epochs=1, batch_size=20)
    torch.testing.assert_close(found, expected)


@settings(max_examples=10)
@given(noises=st.permutations([0.1, 1.5, 4.0]), seed=st.integers(0, 99))
def test_experts_that_agree_with_themselves_weigh_more_and_the_views_become_alike(noises, seed):
    views = two_views(noises, seed=seed)
    weights = self_supervised_weights(*views)
    assert weights.argsort().tolist() == torch.tensor(noises).argsort(descending=True).tolist()
    assert weights.sum() == pytest.approx(1.0)
    assert (weights > 0).all()
    assert similarity(views, weights) > similarity(views, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_search_ends_when_an_expert_weighs_little():
    views = two_views([0.1, 1.5, 4.0])
    after = [self_supervised_weights(*views, learning_rate=2.0, epochs=n).min() for n in (1, 2, 50)]
    ended = self_supervised_weights(*views, learning_rate=2.0, epochs=50)
    longer = self_supervised_weights(*views, learning_rate=2.0, epochs=500)
    assert after[-1] < 0.05
    assert torch.equal(ended, longer)


def test_it_is_deterministic_and_leaves_the_random_state_alone():
    views = two_views([0.5, 1.0])
    state = torch.get_rng_state()
    found = self_supervised_weights(*views)
    assert torch.equal(found, self_supervised_weights(*views))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(found, self_supervised_weights(*views, seed=1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_where_one_predicts(mode):
    views = two_views([0.5, 1.0, 2.0])
    expected = self_supervised_weights(*views)
    with mode():
        view, other = (v * 1.0 for v in views)
        output = ExpertOutput(view, view, view)
        weights = self_supervised_weights(output, list(other.unbind(1)))
        fused = output.ensemble(weights)
    assert torch.equal(weights, expected)
    assert not weights.requires_grad
    torch.testing.assert_close(fused, torch.einsum("nkc,k->nc", views[0], expected))


def test_low_precision_and_gradients_do_not_matter():
    views = [v.bfloat16().requires_grad_() for v in two_views([0.5, 1.0, 2.0])]
    weights = self_supervised_weights(*views)
    assert weights.dtype == torch.float32
    assert views[0].grad is None
    expected = self_supervised_weights(*(v.detach().double() for v in views))
    torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=1e-4)


def test_equal_experts_keep_equal_weights():
    view, other = (v.expand(-1, 3, -1) for v in two_views([1.0]))
    weights = self_supervised_weights(view, other)
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=torch.float64))
