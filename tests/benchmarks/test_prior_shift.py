"""What an estimate of the prior is said to be worth."""

import pytest
import torch
from prior_shift import gains, priors_to_try

COUNTS = torch.tensor([10, 100, 1])
LOGITS = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(3).repeat_interleave(100)
PRIOR = torch.tensor([0.2, 0.5, 0.3])


def test_test_priors_begin_where_their_names_say():
    tries = priors_to_try(COUNTS)
    (head,), (tail,) = tries["head first, IF 50"], tries["tail first, IF 50"]
    assert (head.argmax(), head.argmin(), tail.argmax(), tail.argmin()) == (1, 2, 2, 1)
    assert (head.max() / head.min()).item() == pytest.approx(50)
    for priors in tries.values():
        for prior in priors:
            assert prior.sum().item() == pytest.approx(1)


def test_the_uniform_prior_gains_nothing():
    rows = gains(LOGITS, TARGET, PRIOR, COUNTS, lambda sample, prior: torch.ones(3))
    assert {gain for gain, _ in rows.values()} == {0.0}
    assert rows["uniform"] == (0.0, 0.0)


def test_gains_are_points_of_accuracy_over_the_uniform_prior():
    """All that is drawn of class 1 is predicted as class 0 until the prior is known."""
    logits = torch.tensor([[1.0, 0.0, -9.0]]).repeat(300, 1)
    rows = gains(logits, TARGET, torch.ones(3), COUNTS, lambda sample, prior: [0, 1, 0], sizes=(20_000,))
    prior = priors_to_try(COUNTS)["head first, IF 50"][0]
    assert rows["head first, IF 50"][0] == pytest.approx(100 * (prior[1] - prior[0]).item(), abs=1.5)
    assert rows["mean"][0] == pytest.approx(
        sum(gain for name, (gain, _) in rows.items() if name != "mean") / (len(rows) - 1)
    )


def test_classes_without_test_samples_are_left_out():
    some = TARGET < 2
    rows = gains(LOGITS[some], TARGET[some], PRIOR, COUNTS, lambda sample, prior: [1, 1, 0])
    assert rows["uniform"][0] == rows["uniform"][1] > 0
