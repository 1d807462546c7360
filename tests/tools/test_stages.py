"""Methods of two stages: what is done to a classifier after training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lgla_losses import GroupConvExperts
from lgla_losses.experts import ExpertClassifiers
from lgla_losses.stages import tau_normalize


def heads():
    return [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), ExpertClassifiers(3, 6, 4, scale=None)]


@pytest.mark.parametrize("head", heads(), ids=["linear", "without bias", "of experts"])
@settings(max_examples=20)
@given(tau=st.floats(0, 3))
def test_the_formula_of_the_paper(head, tau):
    before = {name: value.clone() for name, value in head.state_dict().items()}
    weight = tau_normalize(head, tau).weight.detach()
    for w, original in zip(weight.reshape(-1, 6).tolist(), head.weight.reshape(-1, 6).tolist(), strict=True):
        length = sum(v * v for v in original) ** 0.5
        assert w == pytest.approx([v / length**tau for v in original], rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


@pytest.mark.parametrize("head", heads(), ids=["linear", "without bias", "of experts"])
def test_a_new_module_without_bias_that_shares_nothing(head):
    head.weight.requires_grad_(False)
    normalized = tau_normalize(head)
    assert type(normalized) is type(head)
    assert normalized.bias is None or (normalized.bias == 0).all()
    assert not normalized.weight.requires_grad
    assert normalized.weight.data_ptr() != head.weight.data_ptr()
    torch.testing.assert_close(normalized.weight.norm(dim=-1), torch.ones(head.weight.shape[:-1]))


def test_an_expert_is_normalised_by_itself_in_a_model():
    experts = GroupConvExperts(None, 3, 4, num_features=6, classifier="linear")
    features = torch.randn(5, 6)
    single = [nn.Linear(6, 4) for _ in range(3)]
    for k, one in enumerate(single):
        one.load_state_dict({n: v[k] for n, v in experts.classifiers.state_dict().items()})
    experts.classifiers = tau_normalize(experts.classifiers, 0.7)
    expected = torch.stack([tau_normalize(one, 0.7)(features) for one in single], dim=1)
    torch.testing.assert_close(experts(features).logits, expected)


def test_a_head_that_was_parametrised_is_normalised_once_it_is_plain():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="remove_parametrizations"):
        tau_normalize(head)
    nn.utils.parametrize.remove_parametrizations(head, "weight")
    torch.testing.assert_close(tau_normalize(head).weight.norm(dim=1), torch.ones(4))


def test_half_precision_and_a_weight_of_length_zero():
    head = nn.Linear(6, 4)
    nn.init.zeros_(head.weight[0].data)
    normalized = tau_normalize(head.half())
    assert normalized.weight.dtype == torch.float16
    assert (normalized.weight[0] == 0).all()
    torch.testing.assert_close(normalized.weight[1:].float().norm(dim=1), torch.ones(3), rtol=2e-3, atol=0)
