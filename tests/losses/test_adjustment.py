"""Eqs. 4 to 6: the adjustments and the margins they make."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from lgla_losses import CLALogitAdjuster, ClassGrouper, ExpertOutput, functional

COUNTS = st.lists(st.integers(1, 10**6), min_size=2, max_size=8)
TAU = st.floats(0, 5)


@st.composite
def adjusters(draw):
    counts = draw(COUNTS)
    grouper = ClassGrouper(counts, draw(st.integers(1, min(6, len(counts)))))
    tau = draw(TAU)
    return counts, grouper.group_index.tolist(), tau, CLALogitAdjuster(grouper, tau)


@given(adjusters())
def test_table_is_eq4_up_to_a_constant_per_expert(case):
    counts, groups, tau, adjuster = case
    for k in range(adjuster.num_experts):
        paper = torch.tensor(
            [reference.adjustment(counts, groups, tau, k, j) for j in range(len(counts))], dtype=torch.float64
        )
        shift = paper - adjuster.table[k]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-9)
    assert adjuster.table.max() == 0
    assert adjuster.table.amax(dim=1).tolist() == [0.0] * adjuster.num_experts


@given(adjusters())
def test_margins_are_the_five_cases_of_eq6(case):
    counts, groups, tau, adjuster = case
    target = torch.arange(len(counts))
    margins = adjuster.margin(target)
    assert margins.shape == (len(counts), adjuster.num_experts, len(counts))
    for y in range(len(counts)):
        for k in range(adjuster.num_experts):
            for j in range(len(counts)):
                expected = reference.margin(counts, groups, tau, k, y, j)
                assert margins[y, k, j].item() == pytest.approx(expected, abs=1e-9)


@given(adjusters())
def test_sign_of_each_margin(case):
    """The boundary moves towards the smaller class; not at all where counts tie."""
    counts, groups, tau, adjuster = case
    counts = torch.tensor(counts)
    margins = adjuster.margin(torch.arange(len(counts)))
    order = torch.sign(counts[None, :] - counts[:, None]).double()  # [y, j]
    groups = torch.tensor(groups)
    largest = counts == counts.max()
    for k in range(adjuster.num_experts - 1):
        own = groups == k
        sign = torch.sign(margins[:, k])
        both = own[:, None] & own[None, :]
        assert torch.equal(sign[both], order[both])
        assert (sign[~own][:, ~own] == 0).all()
        into, out = sign[own][:, ~own], sign[~own][:, own]
        assert torch.equal(into, (~largest[own]).double()[:, None].expand_as(into))
        assert torch.equal(out, -(~largest[own]).double()[None, :].expand_as(out))
    assert torch.equal(torch.sign(margins[:, -1]), order if tau > 1e-300 else torch.zeros_like(order))


@given(adjusters())
def test_tau_zero_turns_the_global_adjustment_off(case):
    *_, adjuster = case
    assert (CLALogitAdjuster(adjuster.grouper, tau=0.0).table[-1] == 0).all()


def test_default_tau_is_the_papers_at_three_experts_and_scales():
    counts = [32, 16, 8, 4, 2, 1]
    taus = [float(CLALogitAdjuster(ClassGrouper(counts, k - 1)).tau) for k in range(2, 8)]
    assert taus == [1.25, 2.5, 3.75, 5.0, 6.25, 7.5]


@given(adjusters(), st.lists(st.floats(0.1, 9), min_size=7, max_size=7))
def test_implied_prior_with_any_fusion(case, fusion):
    counts, groups, tau, adjuster = case
    fusion = fusion[: adjuster.num_experts]
    exponents = [
        sum(
            f * (math.log(n) - reference.adjustment(counts, groups, tau, k, j)) for k, f in enumerate(fusion)
        ) / sum(fusion)
        for j, n in enumerate(counts)
    ]  # fmt: skip
    peak = max(exponents)
    expected = torch.tensor([math.exp(e - peak) for e in exponents], dtype=torch.float64)
    torch.testing.assert_close(
        adjuster.implied_prior(fusion), expected / expected.sum(), rtol=1e-9, atol=1e-12
    )


@given(adjusters())
def test_implied_prior_of_equal_fusion_is_a_power_of_the_counts(case):
    counts, _, tau, adjuster = case
    num_experts = adjuster.num_experts
    power = torch.tensor(counts, dtype=torch.float64) ** ((num_experts - 1 - tau) / num_experts)
    torch.testing.assert_close(adjuster.implied_prior(), power / power.sum(), rtol=1e-9, atol=1e-12)


@given(adjusters())
def test_the_ensemble_is_uniform_at_tau_of_k_minus_one(case):
    counts, _, _, adjuster = case
    prior = CLALogitAdjuster(adjuster.grouper, tau=adjuster.num_experts - 1).implied_prior()
    torch.testing.assert_close(prior, torch.full_like(prior, 1 / len(counts)), rtol=1e-9, atol=1e-12)


def test_extreme_counts_stay_finite():
    adjuster = CLALogitAdjuster(ClassGrouper([1e300, 1e-300], 2))
    assert adjuster.table.isfinite().all()
    assert adjuster.table[-1, 1].item() == pytest.approx(2.5 * -600 * math.log(10))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_adds_the_table_in_full_precision(dtype, close, device):
    adjuster = CLALogitAdjuster(ClassGrouper([100, 10, 1], 2)).to(device)
    logits = torch.randn(4, 3, 3, device=device).to(dtype)
    before = logits.clone()
    adjusted = adjuster(logits)
    assert adjusted.dtype == functional.compute_dtype(dtype)
    close(adjusted, logits.double() + adjuster.table)
    for other in (list(logits.unbind(1)), ExpertOutput(logits, logits, logits)):
        assert torch.equal(adjuster(other), adjusted)
    assert torch.equal(logits, before)


def test_from_table_copies_the_users_table():
    table = torch.zeros(4, 3)
    adjuster = CLALogitAdjuster.from_table(ClassGrouper([3, 2, 1], 2), table)
    table.fill_(5.0)
    assert adjuster.num_experts == 4
    assert adjuster.table.tolist() == [[0.0] * 3] * 4
