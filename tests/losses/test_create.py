"""Losses by name, as configuration files have them."""

import pytest
import torch
import torch.nn.functional as F

from lgla_losses import ClassGrouper, LGLALoss, create_loss
from lgla_losses.adjusted import AdjustedLoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedBCELoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    NCLLoss,
    RIDELoss,
    SigmoidAdjustedLoss,
    VSLoss,
)

COUNTS = [500, 100, 20]

#: A name, options, and the loss that they stand for.
LOSSES = {
    "lgla": ({"tau": 2.0}, LGLALoss(COUNTS, tau=2.0)),
    "cla": ({"num_experts": 3}, LGLALoss(COUNTS, aaw=False)),
    "softmax": ({"class_weight": [1, 2, 3]}, AdjustedLoss(class_weight=[1, 2, 3])),
    "balanced": ({"label_smoothing": 0.1}, BalancedSoftmaxLoss(COUNTS, label_smoothing=0.1)),
    "logit": ({"tau": 1.5}, LogitAdjustedLoss(COUNTS, tau=1.5)),
    "focal": ({"gamma": 1.0}, FocalLoss(gamma=1.0)),
    "class_balanced": ({"beta": 0.99, "gamma": 0.5}, ClassBalancedLoss(COUNTS, beta=0.99, gamma=0.5)),
    "ldam": ({"max_margin": 0.3, "scale": 16.0}, LDAMLoss(COUNTS, max_margin=0.3, scale=16.0)),
    "vs": ({"gamma": 0.1}, VSLoss(COUNTS, gamma=0.1)),
    "ride": ({"diversity": 0.2, "scale": 16.0}, RIDELoss(COUNTS, 0.2, scale=16.0)),
    "ncl": ({"distillation": 0.3}, NCLLoss(COUNTS, 0.3)),
    "sade": ({"tau": 1.0}, LGLALoss(COUNTS, adjustment="sade", tau=1.0, aaw=False)),
}


@pytest.fixture
def logits():
    return (30 * torch.rand(12, 3, 3) - 15).requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
def test_a_name_gives_the_loss_with_its_options(name, logits):
    options, expected = LOSSES[name]
    criterion, target = create_loss(name, COUNTS, **options), torch.arange(12) % 3
    assert type(criterion) is type(expected)
    assert criterion(logits, target) == expected(logits, target)


@pytest.mark.parametrize("adjustment", ["softmax", "balanced", "logit"])
def test_with_a_number_of_experts_it_is_an_adjustment_of_lgla(adjustment, logits):
    target = torch.arange(12) % 3
    criterion = create_loss(adjustment, COUNTS, num_experts=3)
    assert isinstance(criterion, LGLALoss)
    assert not criterion.aaw
    assert criterion(logits, target) == create_loss(adjustment, COUNTS)(logits, target)

    weighted = create_loss(adjustment, COUNTS, num_experts=3, aaw=True)
    assert weighted(logits, target) > criterion(logits, target)
    grouped = create_loss(adjustment, grouper=ClassGrouper.from_groups(COUNTS, [0, 1, 2]))
    assert grouped.num_experts == 4


def test_null_in_a_file_is_the_default():
    assert float(create_loss("lgla", COUNTS, tau=None, num_experts=None).adjuster.tau) == 2.5
    assert create_loss("logit", COUNTS, tau=None)(torch.zeros(1, 3), torch.tensor([2])) > 3
    assert create_loss("ldam", COUNTS, num_experts=None, background=None).scale == 30.0


def test_an_option_may_say_what_the_name_says():
    assert not create_loss("cla", COUNTS, aaw=False).aaw
    assert create_loss("balanced", COUNTS, num_experts=3, adjustment="balanced").adjustment == "balanced"


def test_softmax_and_focal_need_no_counts(logits):
    target = torch.arange(12) % 3
    summed = sum(F.cross_entropy(v, target) for v in logits.unbind(1))
    for options in ({}, {"num_experts": 3}, {"num_experts": None}):
        torch.testing.assert_close(create_loss("softmax", **options)(logits, target), summed)
    torch.testing.assert_close(create_loss("focal", gamma=0.0)(logits, target), summed)


def test_softmax_and_focal_check_the_number_of_classes_where_they_are_given_counts():
    for name in ("softmax", "focal"):
        with pytest.raises(ValueError, match=r"expected shape \[N, 3\]"):
            create_loss(name, COUNTS)(torch.randn(4, 5), torch.arange(4))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lgl", "'lgla'"),
        ("LGLA", "'lgla'"),
        ("cross-entropy", "'softmax'"),
        ("balanced_softmax", "'balanced'"),
        ("BalancedSoftmaxLoss", "'balanced'"),
        ("focal_loss", "'focal'"),
        ("LDAM-DRW", "'ldam'"),
        ("logit_adjusted", "'logit'"),
    ],
)
def test_an_unknown_name_names_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"one of 'lgla', .*got {name!r}; did you mean {meant}"):
        create_loss(name, COUNTS)


def test_a_name_like_no_other_lists_all():
    with pytest.raises(ValueError, match=r"expected one of 'lgla', 'cla', 'softmax', .*got 'xyzzy'$"):
        create_loss("xyzzy", COUNTS)
    with pytest.raises(TypeError, match=r"name: expected one of .*got 3 of type int"):
        create_loss(3, COUNTS)


@pytest.mark.parametrize(
    ("name", "options", "way_out"),
    [
        ("focal", {"gama": 1.0}, "gama: expected an option of the loss 'focal' .*did you mean 'gamma'"),
        ("balanced", {"tau": 1.0}, "tau: .*'balanced' .*leave it out"),
        ("balanced", {"aaw": True}, "aaw: .*pass num_experts and class_counts"),
        ("balanced", {"num_experts": 3, "adjustment": "logit"}, "adjustment: .*leave it out"),
        ("cla", {"aaw": True}, "aaw: .*leave it out"),
        ("vs", {"num_experts": 3}, "num_experts: .*any number of experts"),
        ("softmax", {"num_experts": "x"}, "num_experts: expected an integer"),
        (
            "sigmoid",
            {},
            "num_samples: expected a value for the loss 'sigmoid', got none; see SigmoidAdjustedLoss",
        ),
        ("lgla", {"class_weight": [1, 2, 3]}, "class_weight: .*leave it out"),
    ],
)
def test_an_option_that_a_loss_does_not_have_is_named(name, options, way_out):
    with pytest.raises(TypeError, match=way_out):
        create_loss(name, COUNTS, **options)


def test_losses_of_several_labels_by_name(logits):
    target = (torch.rand(12, 3) < 0.5).float()
    criterion = create_loss("sigmoid", COUNTS, num_samples=900, tau=0.5)
    assert criterion(logits, target) == SigmoidAdjustedLoss(COUNTS, 900, 0.5)(logits, target)
    criterion = create_loss("class_balanced_bce", COUNTS, gamma=1.0)
    assert criterion(logits, target) == ClassBalancedBCELoss(COUNTS, gamma=1.0)(logits, target)
    with pytest.raises(TypeError, match="ignore_index: expected an option of the loss 'sigmoid'"):
        create_loss("sigmoid", COUNTS, num_samples=900, ignore_index=-1)


def test_counts_that_a_loss_needs_are_asked_for():
    for name in ("lgla", "balanced", "ldam"):
        with pytest.raises(TypeError, match="class_counts: expected samples per class"):
            create_loss(name)
