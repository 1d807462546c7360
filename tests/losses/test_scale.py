"""A head that does not fit the loss's scale: it trains, to less than it could, so the user is told."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss
from lgla_losses.baselines import LDAMLoss
from lgla_losses.functional import unit_vectors

COUNTS = [50, 20, 10, 5, 3, 2]
TARGET = torch.arange(12) % 6


def head(features, weight, factor=30.0):
    """Logits of a cosine head, or for None of a linear one."""
    if factor is None:
        return torch.einsum("nkd,kcd->nkc", features, weight)
    return factor * torch.einsum("nkd,kcd->nkc", unit_vectors(features), unit_vectors(weight))


def inputs(dtype=torch.float32, width=16):
    return torch.randn(12, 3, width, dtype=dtype), torch.randn(3, 6, width, dtype=dtype)


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def test_a_target_logit_beyond_the_scale_is_told_once():
    criterion = LGLALoss(COUNTS, scale=10.0)
    logits, target = torch.full((2, 3, 6), 11.0), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match=r"target logit of 11 exceeds scale=10\.0.*scale=None") as record:
        [criterion(logits, target) for _ in range(3)]
    assert len(record) == 1
    assert record[0].filename == __file__
    silent(lambda: LGLALoss(COUNTS, scale=10.0)(torch.full((2, 3, 6), 10.4), target))
    silent(lambda: LGLALoss(COUNTS, scale=10.0, aaw=False)(logits, target))


def test_a_linear_classifier_of_the_library_is_told_at_the_first_batch():
    criterion = LGLALoss(COUNTS)
    experts = GroupConvExperts(None, 3, 6, num_features=16, classifier="linear")
    output = experts(torch.randn(12, 16))
    with pytest.warns(
        UserWarning, match=r"scale=30\.0: expected the logits of a cosine head.*scale=None"
    ) as record:
        [criterion(output, TARGET) for _ in range(5)]
    assert len(record) == 1
    silent(lambda: LGLALoss(COUNTS, scale=None)(output, TARGET))
    silent(lambda: LGLALoss(COUNTS, aaw=False)(output, TARGET))


def test_a_new_linear_layer_on_normalised_features_is_told():
    """Whose logits are nearly multiples of cosines: all lengths are nearly the same."""
    linear, features = nn.Linear(512, 6), nn.LayerNorm(512)(torch.randn(12, 512))
    options = {"features": features[:, None].expand(-1, 3, -1), "weight": linear.weight.expand(3, -1, -1)}
    with pytest.warns(UserWarning, match="linear head"):
        LGLALoss(COUNTS)([linear(features)] * 3, TARGET, **options)


def test_linear_heads_over_maps_are_told():
    features, weight = torch.randn(12, 3, 16, 2, 2), torch.randn(3, 6, 16)
    logits = torch.einsum("nkdhw,kcd->nkchw", features, weight)
    target = TARGET[:, None, None].expand(-1, 2, 2)
    with pytest.warns(UserWarning, match="linear head"):
        LGLALoss(COUNTS)(ExpertOutput(logits, features, weight), target)
    logits = 30 * torch.einsum(
        "nkdhw,kcd->nkchw", *(nn.functional.normalize(v, dim=2) for v in (features, weight))
    )
    silent(lambda: LGLALoss(COUNTS)(ExpertOutput(logits, features, weight), target))


@pytest.mark.parametrize("factor", [10.0, 30.0, 64.0, torch.tensor([7.0, 20.0, 50.0])[None, :, None]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cosine_heads_of_any_scale_and_precision_are_left_alone(dtype, factor):
    """A learned temperature goes with features and weight, whatever the loss's scale is."""
    features, weight = inputs(dtype, width=256)
    logits = head(features, weight, factor).to(dtype)
    silent(lambda: LGLALoss(COUNTS)(ExpertOutput(logits, features, weight), TARGET))
    logits[:, :, 5] = -torch.inf  # a masked class
    silent(lambda: LGLALoss(COUNTS)(ExpertOutput(logits, features, weight), TARGET.clamp(max=4)))


def test_cosine_heads_under_autocast_are_left_alone():
    experts, criterion = GroupConvExperts(None, 3, 6, num_features=64), LGLALoss(COUNTS)
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(torch.randn(12, 64))
        silent(lambda: criterion(output, TARGET))


@pytest.mark.parametrize("with_features", [False, True])
def test_cosines_that_nobody_multiplied_are_told_once(with_features):
    features, weight = inputs()
    cosines = head(features, weight, 1.0)
    options = {"features": features, "weight": weight} if with_features else {}
    criterion = LGLALoss(COUNTS)
    with pytest.warns(UserWarning, match=r"within \[-1, 1\] under scale=30\.0.*30 \* cosines") as record:
        [criterion(cosines, TARGET, **options) for _ in range(20)]
    assert len(record) == 1
    output = ExpertOutput(cosines, features, weight)
    for scale in (None, 1.0, 5.0):
        silent(lambda scale=scale: LGLALoss(COUNTS, scale=scale)(output, TARGET))


@pytest.mark.parametrize("with_features", [False, True])
def test_small_logits_of_a_new_cosine_head_tell_nothing(with_features):
    """Of 2048 features 30 cosines are often below 1."""

    def look():
        features, weight = torch.randn(1, 3, 2048), torch.randn(3, 6, 2048)
        options = {"features": features, "weight": weight} if with_features else {}
        LGLALoss(COUNTS)(head(features, weight), TARGET[:1], **options)

    for _ in range(30):
        silent(look)


def test_new_experts_that_train_at_a_low_rate_tell_nothing():
    """Their class centres are close to each other, so all logits of a sample are about the same."""
    for seed in range(20):
        torch.manual_seed(seed)
        experts, criterion = GroupConvExperts(None, 3, 6, num_features=2048), LGLALoss(COUNTS)
        features = torch.randn(2048) + 0.3 * torch.randn(12, 2048)
        optimizer = torch.optim.AdamW(experts.parameters(), lr=2e-6)

        def step(experts=experts, criterion=criterion, features=features, optimizer=optimizer):
            optimizer.zero_grad()
            criterion(experts(features).logits, TARGET).backward()
            optimizer.step()

        for _ in range(18):
            silent(step)


def test_a_class_that_is_masked_by_a_number_tells_nothing_of_the_head():
    features, weight = inputs()
    logits = head(features, weight)
    logits[:, :, 5] = -1e4
    silent(lambda: LGLALoss(COUNTS)(ExpertOutput(logits, features, weight), TARGET % 5))


def test_logits_of_zero_tell_nothing():
    silent(lambda: LGLALoss(COUNTS)(torch.zeros(12, 3, 6), TARGET))
    silent(lambda: LGLALoss(COUNTS)(torch.zeros(0, 3, 6), TARGET[:0]))


def test_a_batch_without_samples_tells_nothing_of_the_head():
    features, weight = inputs()
    empty = ExpertOutput(torch.zeros(0, 3, 6), features[:0], weight)
    silent(lambda: LGLALoss(COUNTS)(empty, TARGET[:0]))


@pytest.mark.parametrize("size", [(0, 4, 4), (0, 2), (3, 0, 2)])
@pytest.mark.parametrize("soft", [False, True])
def test_a_map_without_samples_tells_nothing_of_the_head(size, soft):
    n, *maps = size
    logits = torch.zeros(n, 3, 6, *maps, requires_grad=True)
    target = torch.zeros(n, 6, *maps) if soft else torch.zeros(size, dtype=torch.int64)
    features, weight = torch.zeros(n, 3, 8, *maps), torch.zeros(3, 6, 8)
    loss = LGLALoss(COUNTS)(logits, target, features=features, weight=weight)
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == logits.shape


def test_nobody_is_told_where_values_cannot_be_read():
    features, weight = inputs()
    output = ExpertOutput(head(features, weight, None), features, weight)
    silent(lambda: LGLALoss(COUNTS, validate_args=False)(output, TARGET))
    compiled = torch.compile(LGLALoss(COUNTS), fullgraph=True, backend="eager")
    silent(lambda: compiled(output, TARGET))

    def loss(logits, features, target):
        return LGLALoss(COUNTS)(ExpertOutput(logits[None], features[None], weight), target[None])

    silent(lambda: torch.vmap(loss)(output.logits, features, TARGET))


def test_what_was_told_is_no_state():
    criterion = LGLALoss(COUNTS)
    keys = set(criterion.state_dict())
    with pytest.warns(UserWarning, match="exceeds"):
        criterion(torch.full((12, 3, 6), 40.0), TARGET)
    assert set(criterion.state_dict()) == keys
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        silent(lambda twin=twin: twin(torch.full((12, 3, 6), 40.0), TARGET))


def test_a_linear_classifier_under_ldam_is_told_once():
    """Whose margins are 30 times those of cosines, so that the logits never reach them."""
    criterion = LDAMLoss(COUNTS)
    output = GroupConvExperts(None, 3, 6, num_features=16, classifier="linear")(torch.randn(12, 16))
    with pytest.warns(
        UserWarning, match=r"scale=30\.0: expected the logits of a cosine head.*set scale=1$"
    ) as record:
        [criterion(output, TARGET) for _ in range(5)]
    assert len(record) == 1
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match=r"target logit of 40 exceeds scale=30\.0.*margins.*set scale=1$"):
        LDAMLoss(COUNTS)(torch.full((12, 6), 40.0), TARGET)
    silent(lambda: LDAMLoss(COUNTS, scale=1.0)(output, TARGET))
    silent(lambda: LDAMLoss(COUNTS, scale=1.0)(torch.full((12, 6), 40.0), TARGET))


def test_cosines_under_ldam_are_told_as_its_authors_code_takes_them():
    features, weight = inputs()
    cosines = head(features, weight, 1.0)
    criterion = LDAMLoss(COUNTS)
    with pytest.warns(UserWarning, match=r"within \[-1, 1\] under scale=30\.0.*30 \* cosines") as record:
        [criterion(cosines[:, 0], TARGET) for _ in range(20)]
    assert len(record) == 1
    silent(lambda: [LDAMLoss(COUNTS)(30 * cosines[:, 0], TARGET) for _ in range(20)])


def test_cosine_heads_under_ldam_are_left_alone():
    features, weight = inputs()
    output = ExpertOutput(head(features, weight), features, weight)
    silent(lambda: LDAMLoss(COUNTS)(output, TARGET))
    maps = ExpertOutput(output.logits[..., None, None], features[..., None, None], weight)
    silent(lambda: LDAMLoss(COUNTS)(maps, TARGET[:, None, None]))
    silent(lambda: LDAMLoss(COUNTS)(maps, torch.eye(6)[TARGET][..., None, None]))


@pytest.mark.parametrize("shapes", [((12, 3, 5), (3, 6, 4)), ((12, 2, 4), (2, 6, 4)), ((7, 3, 4), (3, 6, 4))])
def test_features_that_ldam_needs_not_may_have_any_shape(shapes):
    features, weight = map(torch.randn, shapes)
    silent(lambda: LDAMLoss(COUNTS)(ExpertOutput(torch.randn(12, 3, 6), features, weight), TARGET))
