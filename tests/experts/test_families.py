"""Real networks as experts: grouped, however they are run, equal independent ones."""

import pytest
import torch
from families import FAMILIES, build, inputs_of, without_randomness
from reference import assert_same

from lgla_losses import GroupConvExperts, split_backbone

EVERY_FAMILY = [
    pytest.param(family, id=family.id, marks=[pytest.mark.slow] if family.slow else []) for family in FAMILIES
]


def gradients_and_outputs(trunk, experts, inputs):
    """By name; per copy where the layout has copies."""
    trunk.zero_grad()
    shared = trunk(*inputs)
    shared = shared if isinstance(shared, tuple) else (shared,)
    leaf = shared[0].detach().requires_grad_()
    output = experts((leaf, *shared[1:]))
    torch.manual_seed(1)
    sum((t * torch.randn(t.shape, dtype=t.dtype)).sum() for t in output[:2]).backward()
    if experts.layout == "grouped":
        copies = dict(experts.stage.named_parameters())
        buffers = dict(experts.stage.named_buffers())
        gradients = {name: parameter.grad for name, parameter in copies.items()}
    else:
        names = [name for name, _ in experts.stage[0].named_parameters()]
        gradients = {name: [expert.get_parameter(name).grad for expert in experts.stage] for name in names}
        gradients = {n: None if g[0] is None else torch.stack(g) for n, g in gradients.items()}
        buffers = {
            name: torch.stack([expert.get_buffer(name) for expert in experts.stage])
            for name, _ in experts.stage[0].named_buffers()
        }
    return {"input": leaf.grad, **gradients}, buffers, output


# vmap runs some layers, as attention on a CPU, copy by copy and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_grouped_experts_equal_independent_ones(family, train):
    model = without_randomness(build(family)).double().train(train)
    inputs = inputs_of(family)
    trunk, stage = split_backbone(model, family.at)
    grouped = GroupConvExperts(stage, 2, 7, reset=False).train(train)
    # Pretrained copies are alike; unlike ones show whether each uses its own.
    with torch.no_grad():
        for parameter in grouped.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0) * 0.1)
    independent = grouped.to_independent()
    together = grouped.to_grouped()
    together.together = True
    expected = gradients_and_outputs(trunk, independent, inputs)
    for experts in (grouped, together):
        results = gradients_and_outputs(trunk, experts, inputs)
        for actual, truth in zip(results[:2], expected[:2], strict=True):
            assert actual.keys() == truth.keys()
            for name in actual:
                assert (actual[name] is None) == (truth[name] is None), name
                if truth[name] is not None:
                    assert_same(actual[name], truth[name], name)
        for name, actual, truth in zip(results[2]._fields, results[2], expected[2], strict=True):
            assert_same(actual, truth, name)
