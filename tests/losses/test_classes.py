"""Classes without samples, smoothed or masked, and a background class that is left out."""

import copy
import math
import pickle

import pytest
import torch
from engines import GPU, named
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

from conftest import on_gpu
from lgla_losses import CLALogitAdjuster, ClassGrouper, LGLALoss, LinearLGLALoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lgla_losses.distributed import ClassParallelLGLALoss
from lgla_losses.kernels import autograd

# Of the interpreter's 0 * inf, which the kernels put another number in the place of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

COUNTS = [0, 500, 40, 0, 40, 3]
MASKED, PRESENT = [0, 3], [1, 2, 4, 5]


def reweighted_ldam(counts, **options):
    criterion = LDAMLoss(counts, beta=0.999, **options)
    criterion.reweight()
    return criterion


BASELINES = {
    "focal": lambda n, **o: FocalLoss(1.5, class_counts=n, **o),
    "class-balanced": lambda n, **o: ClassBalancedLoss(n, 0.99, 0.5, **o),
    "ldam": reweighted_ldam,
    "logit-adjusted": lambda n, **o: LogitAdjustedLoss(n, 1.5, **o),
    "balanced softmax": BalancedSoftmaxLoss,
    "vector-scaling": lambda n, **o: VSLoss(n, 0.3, **o),
}
EXPERTS = {
    "lgla": LGLALoss,
    "cla": lambda n, **o: LGLALoss(n, 4, aaw=False, **o),
    "softmax": lambda n, **o: LGLALoss(n, adjustment="softmax", **o),
    "logit": lambda n, **o: LGLALoss(n, adjustment="logit", tau=0.7, **o),
}
LOSSES = BASELINES | EXPERTS
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
every_baseline = pytest.mark.parametrize("make", BASELINES.values(), ids=BASELINES)


def loss_and_gradient(criterion, logits, target, **options):
    leaf = logits.detach().clone().requires_grad_()
    loss = criterion(leaf, target, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device)
    loss.backward(upstream.reshape(loss.shape))
    return loss.detach(), leaf.grad


def random_logits(criterion, *sizes):
    """Of the experts that the loss has; of any other loss, of two."""
    n, *others = sizes
    return 16 * torch.rand(n, getattr(criterion, "num_experts", 2), *others).double() - 8


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- Masked classes -----------------------------------------------------------------------------------------


def check_against_the_present(make, engine, present, places, reduction):
    """Class indices, probabilities and maps give the loss and gradient of the present classes alone.

    ``places`` says of each class whether it is the next of the ``present`` counts, or masked.
    """
    places = torch.tensor(places)
    index, masked = places.nonzero()[:, 0], (~places).nonzero()[:, 0]
    counts = torch.zeros(len(places), dtype=torch.int64).index_add_(0, index, torch.tensor(present))
    weight = torch.rand(len(places)).double()
    own = {"class_weight": weight} if make in BASELINES.values() else {}
    of_present = {"class_weight": weight[index]} if own else {}

    with pytest.MonkeyPatch.context() as patch:
        backend, device = "reference" if engine == "reference" else "fused", "cpu"
        if engine in ("chunked", "triton"):  # Triton in its interpreter, where there is no GPU
            patch.setattr(autograd, "engine_for", lambda *_: named(engine))
            device = GPU if engine == "triton" else "cpu"
        options = {"backend": backend, "reduction": reduction}
        criterion = make(counts, zero_counts="mask", **own, **options).to(device)
        alone = make(present, **of_present, **options).to(device)

        labels = torch.arange(6) % len(present)
        labels[4] = -100
        of_all = torch.where(labels < 0, labels, index[labels.clamp(min=0)])
        shares = torch.rand(6, len(present)).double().softmax(dim=1)
        of_all_shares = shares.new_zeros(6, len(places)).index_copy_(1, index, shares)
        maps = random_logits(criterion, 2, len(places), 3, 1)
        samples = random_logits(criterion, 6, len(places))
        for logits, target, of_columns, inputs in (
            (samples, of_all, labels, {}),
            (samples, of_all_shares, shares, {"sample_weight": torch.rand(6).double().to(device)}),
            (maps, of_all.view(2, 3, 1), labels.view(2, 3, 1), {}),
        ):
            logits, index, masked = logits.to(device), index.to(device), masked.to(device)
            loss, gradient = loss_and_gradient(criterion, logits, target.to(device), **inputs)
            columns = logits.index_select(2, index), of_columns.to(device)
            expected = loss_and_gradient(alone, *columns, **inputs)
            assert_equal(loss, expected[0])
            assert_equal(gradient.index_select(2, index), expected[1])
            assert not gradient.index_select(2, masked).any()


@every_loss
@pytest.mark.parametrize("engine", ["reference", "native", "chunked"])
@settings(max_examples=3, phases=[Phase.generate])
@given(present=st.lists(st.integers(1, 300), min_size=3, max_size=5), data=st.data())
def test_the_loss_is_that_of_the_classes_with_samples_alone(make, engine, present, data):
    places = data.draw(st.permutations([True] * len(present) + [False] * data.draw(st.integers(1, 3))))
    check_against_the_present(make, engine, present, places, data.draw(st.sampled_from(["mean", "none"])))


@pytest.mark.parametrize("name", ["lgla", "class-balanced", "ldam", "vector-scaling"])
@pytest.mark.parametrize("engine", [on_gpu("triton")])
def test_and_so_it_is_on_a_gpu(name, engine):
    places = [False, True, True, False, True, False]
    check_against_the_present(LOSSES[name], engine, [40, 7, 7], places, "mean")


@pytest.mark.parametrize("make", [LinearLGLALoss, ClassParallelLGLALoss])
@pytest.mark.parametrize("scale", [None, 20.0])
def test_classifiers_of_masked_classes_get_no_gradient(make, scale):
    features = torch.randn(6, 3, 5).double()
    labels, weight = torch.arange(6) % 4, torch.randn(3, 6, 5).double()
    criterion = make(COUNTS, scale=scale, zero_counts="mask")
    alone = LinearLGLALoss([COUNTS[j] for j in PRESENT], scale=scale)
    found, gradient = loss_and_gradient(
        lambda w, y: criterion(features, w, y), weight, torch.tensor(PRESENT)[labels]
    )
    expected = loss_and_gradient(lambda w, y: alone(features, w, y), weight[:, PRESENT], labels)
    assert_equal(found, expected[0])
    assert_equal(gradient[:, PRESENT], expected[1])
    assert not gradient[:, MASKED].any()


@every_baseline
def test_constants_are_those_of_the_classes_with_samples(make):
    """Weights of mean 1 over them; no NaN for the others."""
    criterion, alone = make(COUNTS, zero_counts="mask"), make([COUNTS[j] for j in PRESENT])
    for name in ("class_weight", "multiplier", "margins"):
        if getattr(alone, name, None) is not None:
            assert torch.equal(getattr(criterion, name)[PRESENT], getattr(alone, name))
            assert getattr(criterion, name)[MASKED].isfinite().all()
    assert (criterion.table[MASKED] == -math.inf).all()
    assert torch.equal(criterion.table[PRESENT], torch.zeros(4) if alone.table is None else alone.table)


def test_masked_classes_are_in_the_last_group_and_weigh_nothing():
    grouper = ClassGrouper(COUNTS, 3, zero_counts="mask")
    assert grouper.group_index[PRESENT].tolist() == ClassGrouper([500, 40, 40, 3], 3).group_index.tolist()
    assert grouper.group_index[MASKED].tolist() == [2, 2]
    assert grouper.group_sizes.tolist() == [1, 1, 2]
    assert grouper.group_masses.tolist() == [500, 40, 43]
    assert grouper.imbalance_factor == pytest.approx(500 / 3)


@pytest.mark.parametrize("fusion", [None, [1, 0, 0]])
def test_masked_classes_have_no_prior(fusion):
    masked = LGLALoss(COUNTS, zero_counts="mask").adjuster.implied_prior(fusion)
    alone = LGLALoss([COUNTS[j] for j in PRESENT]).adjuster.implied_prior(fusion)
    torch.testing.assert_close(masked[PRESENT], alone)
    assert masked[MASKED].tolist() == [0, 0]


@every_loss
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_a_target_of_a_masked_class_is_an_error(make, backend):
    criterion = make(COUNTS, zero_counts="mask", backend=backend)
    shares = torch.full((2, 6), 0.25).double()
    shares[:, [0, 4]] = 0.0
    for target in (torch.tensor([1, 3]), shares):
        with pytest.raises(ValueError, match="got class 3, which has no training samples"):
            criterion(random_logits(criterion, 2, 6), target)


@pytest.mark.parametrize("make", [LinearLGLALoss, ClassParallelLGLALoss])
def test_a_target_of_a_masked_class_is_an_error_of_classifiers(make):
    criterion = make(COUNTS, zero_counts="mask")
    with pytest.raises(ValueError, match="class 3, which has no training samples"):
        criterion(torch.randn(2, 3, 5), torch.randn(3, 6, 5), torch.tensor([1, 3]))


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_validation_takes_masked_classes_as_the_ensembles_logits_are_not_adjusted(backend):
    criterion, logits = LGLALoss(COUNTS, zero_counts="mask", backend=backend), torch.randn(4, 6)
    target = torch.tensor([0, 1, 3, 5])
    torch.testing.assert_close(criterion(logits, target), torch.nn.functional.cross_entropy(logits, target))


@every_loss
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_validation_says_what_takes_masked_classes(make, backend):
    criterion = make(COUNTS, zero_counts="mask", backend=backend)
    logits, target = random_logits(criterion, 2, 6), torch.tensor([1, 3])
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"in validation .* output\.ensemble\(\).*cross_entropy"),
    ):
        criterion(logits, target)
    with pytest.raises(ValueError, match="leave its samples out"):
        criterion(logits, target)


@every_loss
def test_masked_constants_survive_copies_averages_casts_and_states(make):
    criterion = make(COUNTS, zero_counts="mask", background=5)
    other = make([9, 8, 7, 6, 5, 4], zero_counts="mask", background=5)
    other.load_state_dict(criterion.state_dict())
    averaged = AveragedModel(
        torch.nn.Sequential(criterion), use_buffers=True, avg_fn=lambda a, b, _: a - b + b
    )
    averaged.update_parameters(torch.nn.Sequential(criterion))
    averaged.update_parameters(torch.nn.Sequential(criterion))
    copies = copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion).half()
    logits, target = random_logits(criterion, 4, 6), torch.tensor([1, 5, 2, 4])
    for twin in (*copies, other, averaged.module[0]):
        assert torch.equal(twin(logits, target), criterion(logits, target))
        assert repr(twin) == repr(criterion)
        assert (twin.zero_counts, twin.background) == ("mask", (5,))


@pytest.mark.parametrize("name", ["lgla", "class-balanced"])
def test_counts_that_come_and_go_compile_nothing_anew(name):
    """As of streaming data: a class has its first samples, another has none any more."""
    criterion = LOSSES[name]([5, 4, 3, 2, 1, 1], zero_counts="mask")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    logits, target = random_logits(criterion, 4, 6), torch.tensor([1, 5, 2, 4])
    compiled(logits, target)
    with torch.compiler.set_stance("fail_on_recompile"):
        for counts in (COUNTS, [0, 9, 3, 7, 40, 2]):
            criterion.set_adjustment(counts)
            expected = LOSSES[name](counts, zero_counts="mask")(logits, target)
            torch.testing.assert_close(compiled(logits, target), expected)


def test_a_change_that_leaves_a_group_without_classes_changes_nothing():
    own = LGLALoss(grouper=ClassGrouper.from_groups([5, 4, 3], [0, 1, 1], zero_counts="mask"))
    few = LGLALoss([5, 4, 3], 4, zero_counts="mask")
    for criterion, message in ((own, "group_index: expected groups"), (few, "num_groups: expected at most")):
        before = criterion.adjuster.table
        with pytest.raises(ValueError, match=message):
            criterion.set_adjustment([0, 4, 3])
        assert torch.equal(criterion.adjuster.table, before)


# --- Smoothed counts ----------------------------------------------------------------------------------------


@every_loss
def test_smoothing_adds_a_sample_to_every_class_once(make):
    """A state and a new tau take the counts as they are; new counts are smoothed again."""
    criterion, expected = make(COUNTS, zero_counts="smooth"), make([n + 1 for n in COUNTS])
    loaded = make(range(6), zero_counts="smooth")
    loaded.load_state_dict(criterion.state_dict())
    changed = make([7.5] * 6, zero_counts="smooth")
    changed.set_adjustment(COUNTS)
    logits, target = random_logits(criterion, 6, 6), torch.arange(6)
    for twin in (criterion, loaded, changed):
        twin.set_adjustment()
        assert torch.equal(twin(logits, target), expected(logits, target))
    assert (criterion if make in BASELINES.values() else criterion.grouper).class_counts.tolist() == [
        n + 1 for n in COUNTS
    ]


def test_ranks_of_classes_obey_new_counts_too():
    features, weight, target = torch.randn(4, 3, 5), torch.randn(3, 6, 5), torch.tensor([1, 5, 2, 4])
    for options in ({"zero_counts": "smooth"}, {"zero_counts": "mask"}, {"background": 2}):
        counts = COUNTS if "zero_counts" in options else [4, 5, 6, 7, 8, 9]
        criterion = ClassParallelLGLALoss([6, 5, 4, 3, 2, 1], **options)
        criterion.set_adjustment(counts)
        criterion.set_adjustment(tau=1.0)
        expected = LinearLGLALoss(counts, tau=1.0, **options)(features, weight, target)
        torch.testing.assert_close(criterion(features, weight, target), expected)


# --- A background -------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("background", [2, [0, 2]])
def test_other_classes_are_adjusted_as_if_the_background_were_not_there(make, background):
    counts = [7, 500, 90_000, 30, 40, 3]
    left_out = torch.tensor(background).flatten()
    others = [j for j in range(6) if j not in left_out]
    criterion, alone = make(counts, background=background), make([counts[j] for j in others])
    criteria = [(criterion, alone, {"class_weight": 1, "multiplier": 1, "margins": 0, "table": 0})]
    if make in EXPERTS.values():
        criteria = [
            (criterion.adjuster, alone.adjuster, {"table": 0}),
            (criterion.grouper, alone.grouper, {"group_index": 0}),
        ]
        assert torch.equal(criterion.grouper.group_sizes, alone.grouper.group_sizes)
        assert torch.equal(criterion.grouper.group_masses, alone.grouper.group_masses)
        assert criterion.grouper.imbalance_factor == alone.grouper.imbalance_factor
    for ours, theirs, names in criteria:
        for name, value in names.items():
            if getattr(theirs, name, None) is not None:
                assert torch.equal(getattr(ours, name)[..., others], getattr(theirs, name))
                assert (getattr(ours, name)[..., left_out] == value).all()


def test_the_prior_that_a_background_keeps():
    counts, largest, k, tau = [90_000, 500, 40, 3], 500, 3, 2.5
    found = LGLALoss(counts, k, tau, background=0).adjuster.implied_prior()
    expected = [90_000, *(largest * (n / largest) ** ((k - 1 - tau) / k) for n in counts[1:])]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64) / sum(expected))


def test_a_background_of_any_kind_of_integers():
    for background in (1, [1], (1,), torch.tensor(1), torch.tensor([1]), range(1, 2)):
        assert BalancedSoftmaxLoss([5, 4, 3], background=background).background == (1,)
    assert LGLALoss([5, 4, 3], background=[]).background == ()
    assert "background" not in repr(LGLALoss([5, 4, 3]))
    assert "background=[1]" in repr(LGLALoss([5, 4, 3], background=1))


def test_the_options_come_with_a_grouper():
    grouper = ClassGrouper(COUNTS, 2, zero_counts="mask", background=5)
    criterion = LGLALoss(grouper=grouper)
    assert torch.equal(
        criterion.adjuster.table, LGLALoss(COUNTS, zero_counts="mask", background=5).adjuster.table
    )
    assert (criterion.zero_counts, criterion.background) == ("mask", (5,))
    own = ClassGrouper.from_groups(COUNTS, [1, 0, 1, 0, 1, 0], zero_counts="mask", background=5)
    assert CLALogitAdjuster(own).table[0].tolist() == [-math.inf, 0, 0, -math.inf, 0, 0]


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ({"zero_counts": "mask"}, {}, "positive.*zero_counts='smooth'"),
        ({"zero_counts": "mask", "background": 1}, {"zero_counts": "mask"}, "(table|class_weight|margins): "),
        (
            {"zero_counts": "mask"},
            {"zero_counts": "mask", "background": 1},
            "(table|class_weight|margins|group_index): ",
        ),
    ],
)
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"focal", "softmax"}))  # which adjust no class
def test_a_state_of_other_options_is_an_error(name, saved, options, message):
    state = LOSSES[name](COUNTS, **saved).state_dict()
    criterion = LOSSES[name]([9, 5, 1, 1, 1, 1], **options)
    with pytest.raises(RuntimeError, match=message):
        criterion.load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "options"), [({}, {"background": 1}), ({"background": 1}, {}), ({}, {"background": [0, 2]})]
)
def test_a_state_of_another_background_names_the_options(saved, options):
    counts = [9, 90_000, 5, 3]
    state = LGLALoss(counts, **saved).state_dict()
    with pytest.raises(RuntimeError, match="zero_counts and background") as caught:
        LGLALoss(counts, **options).load_state_dict(state)
    assert "number them" not in str(caught.value)


def test_a_loss_without_counts_has_none_to_leave_out():
    for options in ({"zero_counts": "mask"}, {"background": 0}):
        with pytest.raises(ValueError, match="zero_counts, background: expected neither for FocalLoss"):
            FocalLoss(**options)
