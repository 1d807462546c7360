"""LossMonitor: its scalars against plain loops, and that the loss takes no notice of it."""

import copy
import math
import pickle
import subprocess
import sys
from statistics import fmean

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss, LinearLGLALoss, functional
from lgla_losses.kernels import autograd
from lgla_losses.monitor import LossMonitor

COUNTS = [40, 9, 5, 1]
SCALE = 30.0


def batch(num_samples=12, num_experts=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(num_samples, num_experts, len(COUNTS), generator=generator, dtype=dtype) - 1
    target = torch.randint(len(COUNTS), (num_samples,), generator=generator)
    return SCALE * cosines, target


def head_batch(dtype=torch.float64):
    """Features, class weights and the logits of linear heads."""
    features, weight = torch.randn(9, 3, 5, dtype=dtype), torch.randn(3, 4, 5, dtype=dtype)
    logits = torch.einsum("nkd,kcd->nkc", features, weight)
    return ExpertOutput(logits, features, weight), torch.arange(9) % 4


def cosine_angles(logits, target):
    return [
        [math.acos(max(-1.0, min(1.0, float(row[k, max(y, 0)]) / SCALE))) for k in range(logits.shape[1])]
        for row, y in zip(logits, target.tolist(), strict=True)
    ]


def by_hand(criterion, batches, aaw=True):
    """The scalars in plain loops over (logits, target, angles)."""
    groups = criterion.grouper.group_index.tolist()
    num_experts = criterion.num_experts
    rows = []  # of every sample that is not ignored: group, angles, weights, hits
    for logits, target, angles in batches:
        labels = target.tolist()
        weights = reference.weights(angles or [[0.0] * num_experts] * len(labels), labels, groups)
        for i, y in enumerate(labels):
            if y == criterion.ignore_index:
                continue
            scores = [*logits[i].tolist(), logits[i].sum(dim=0).tolist()]
            hits = [float(max(range(len(s)), key=s.__getitem__) == y) for s in scores]
            rows.append((groups[y], angles[i] if angles else None, weights[i], hits))
    expected = {}
    present = sorted({row[0] for row in rows})
    experts = [f"expert {k + 1}" for k in range(num_experts)]
    for k, expert in enumerate([*experts, "ensemble"]):
        for g in present:
            name = f"accuracy/{expert}/group {g + 1}"
            expected[name] = fmean(row[3][k] for row in rows if row[0] == g)
    for k, expert in enumerate(experts if rows and rows[0][1] else []):
        expected[f"angle/{expert}"] = fmean(row[1][k] for row in rows)
        for g in present:
            own = [row[1][k] for row in rows if row[0] == g]
            expected[f"reference/{expert}/group {g + 1}"] = fmean(own)
        if aaw:
            expected[f"weight/{expert}"] = fmean(row[2][k] for row in rows)
            expected[f"hard share/{expert}"] = fmean(float(row[2][k] > 1) for row in rows)
    return expected


def watched(criterion, *batches, every=1, **inputs):
    with LossMonitor(criterion, every) as monitor:
        for logits, target in batches:
            criterion(logits, target, **inputs)
    return monitor.compute()


@given(
    st.integers(1, 4),
    st.lists(st.lists(st.sampled_from([0, 1, 2, 3, -100]), max_size=8), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["stacked", "list"]),
)
def test_it_agrees_with_plain_loops(num_groups, targets, aaw, form):
    """Any number of experts, groups that are absent, ignored samples, and empty batches."""
    criterion = LGLALoss(COUNTS, num_groups + 1, aaw=aaw)
    batches, expected = [], []
    for seed, labels in enumerate(targets):
        logits, _ = batch(len(labels), num_groups + 1, seed=seed)
        target = torch.tensor(labels, dtype=torch.int64)
        batches.append((logits if form == "stacked" else list(logits.unbind(1)), target))
        expected.append((logits, target, cosine_angles(logits, target)))
    scalars = watched(criterion, *batches)
    assert scalars == pytest.approx(by_hand(criterion, expected, aaw), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("form", ["output", "keywords", "all keywords"])
def test_angles_of_any_head_come_from_its_features(form):
    output, target = head_batch()
    angles = [
        [reference.angle(f, w[y]) for f, w in zip(row, output.weight.tolist(), strict=True)]
        for row, y in zip(output.features.tolist(), target.tolist(), strict=True)
    ]
    criterion = LGLALoss(COUNTS, scale=None)
    with LossMonitor(criterion, every=1) as monitor:
        if form == "output":
            criterion(output, target)
        elif form == "keywords":
            criterion(output.logits, target, features=output.features, weight=output.weight)
        else:
            criterion(target=target, output=output, normalizer=3.0)
    expected = by_hand(criterion, [(output.logits, target, angles)])
    assert monitor.compute() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_a_linear_head_without_features_has_no_angles():
    criterion = LGLALoss(COUNTS, scale=None, aaw=False)
    logits, target = batch()
    scalars = watched(criterion, (logits, target))
    assert scalars == pytest.approx(by_hand(criterion, [(logits, target, None)]))
    assert {name.split("/")[0] for name in scalars} == {"accuracy"}


def test_one_expert_of_balanced_softmax():
    criterion = LGLALoss(COUNTS, 1, adjustment="balanced", aaw=False)
    logits, target = batch(num_experts=1)
    expected = by_hand(criterion, [(logits, target, cosine_angles(logits, target))], aaw=False)
    assert watched(criterion, (logits, target)) == pytest.approx(expected)


def test_the_ensemble_is_told_in_float32():
    """The sum of two bfloat16 numbers, rounded to bfloat16, would tie here; the lower class would win."""
    logits = torch.tensor([[[16.0, 16.0, 0, 0], [0.0, 0.03125, 0, 0]]], dtype=torch.bfloat16)
    scalars = watched(LGLALoss(COUNTS, 2), (logits, torch.tensor([1])))
    assert scalars["accuracy/ensemble/group 1"] == 1.0


def test_without_samples_there_is_nothing_to_say():
    criterion = LGLALoss(COUNTS)
    assert watched(criterion) == {}
    assert watched(criterion, (torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64))) == {}
    assert watched(criterion, (torch.zeros(2, 3, 4), torch.full((2,), -100))) == {}


@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"aaw": False}, {"reduction": "none"}])
def test_losses_and_gradients_are_the_same_bits(backend, dtype, options, device):
    criterion = LGLALoss(COUNTS, backend=backend, **options).to(device)
    logits, target = (tensor.to(device) for tensor in batch(dtype=dtype))
    results = []
    for look in (False, True):
        watching = LossMonitor(criterion, every=1) if look else None
        inputs = logits.clone().requires_grad_()
        loss = criterion(inputs, target)
        loss.sum().backward()
        results.append((loss.detach(), inputs.grad))
        assert (watching is not None) == bool(watching and watching.compute())
    for without, with_monitor in zip(*results, strict=True):
        assert torch.equal(without, with_monitor)


def test_the_engine_still_computes(monkeypatch):
    """Neither weights nor losses come from plain PyTorch."""
    criterion = LGLALoss(COUNTS, backend="fused")
    engine = autograd.engine_for("fused", torch.device("cpu"))
    weights, original = [], engine.weights

    def noted(*args, **kwargs):
        weights.append(original(*args, **kwargs))
        return weights[-1]

    monkeypatch.setattr(engine, "weights", noted)
    monkeypatch.setattr(functional, "lgla_loss", None)
    scalars = watched(criterion, batch())
    assert len(weights) == 1
    means = weights[0][0].mean(dim=0).tolist()
    assert [scalars[f"weight/expert {k + 1}"] for k in range(3)] == pytest.approx(means)


def test_only_every_so_many_calls_in_training_are_looked_at():
    criterion = LGLALoss(COUNTS)
    batches = [batch(seed=seed) for seed in range(7)]
    with LossMonitor(criterion, every=3) as monitor:
        for logits, target in batches:
            criterion(logits, target)
            with torch.no_grad():  # validation in between is not counted
                criterion(*batch(seed=99))
            criterion.eval()
            criterion(*batch(seed=98))
            criterion.train()
    looked_at = [(logits, target, cosine_angles(logits, target)) for logits, target in batches[::3]]
    assert monitor.compute() == pytest.approx(by_hand(criterion, looked_at))


def test_reset_begins_anew():
    criterion = LGLALoss(COUNTS)
    monitor = LossMonitor(criterion, every=1)
    criterion(*batch(seed=1))
    monitor.reset()
    assert monitor.compute() == {}
    logits, target = batch(seed=2)
    criterion(logits, target)
    expected = by_hand(criterion, [(logits, target, cosine_angles(logits, target))])
    assert monitor.compute() == pytest.approx(expected)


def test_write_gives_and_forgets():
    criterion = LGLALoss(COUNTS)
    monitor = LossMonitor(criterion, every=1)
    criterion(*batch())
    expected = monitor.compute()
    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            assert step == 7
            written[name] = value

    monitor.write(Writer(), 7)
    assert written == expected
    assert all(isinstance(value, float) and math.isfinite(value) for value in written.values())
    assert monitor.compute() == {}


def test_closing_takes_the_hook_off():
    criterion = LGLALoss(COUNTS)
    monitor = LossMonitor(criterion, every=1)
    criterion(*batch(seed=1))
    with pytest.raises(ValueError, match="target"), monitor:
        criterion(batch()[0], torch.tensor([9]))
    before = monitor.compute()
    criterion(*batch(seed=2))
    assert monitor.compute() == before != {}
    assert not criterion._forward_hooks
    monitor.close()  # once more does no harm


def test_copies_have_sums_of_their_own():
    criterion = LGLALoss(COUNTS)
    monitor = LossMonitor(criterion, every=1)
    criterion(*batch(seed=1))
    before = monitor.compute()
    copy.deepcopy(criterion)(*batch(seed=2))
    unpickled = pickle.loads(pickle.dumps(monitor))
    unpickled.criterion(*batch(seed=2))
    assert monitor.compute() == before
    assert unpickled.compute() != before
    assert criterion.state_dict().keys() == LGLALoss(COUNTS).state_dict().keys()


def test_in_a_training_loop_the_model_learns_the_same():
    """Parameters after a few steps of SGD, with and without."""
    trained = []
    for look in (False, True):
        torch.manual_seed(0)
        experts = GroupConvExperts(lambda: torch.nn.Linear(6, 8), 3, 4)
        criterion = LGLALoss(COUNTS)
        monitor = LossMonitor(criterion, every=2) if look else None
        optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
        for _ in range(5):
            loss = criterion(experts(torch.randn(16, 6)), torch.randint(4, (16,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append(experts.state_dict())
        assert monitor is None or "hard share/expert 3" in monitor.compute()
    torch.testing.assert_close(*trained, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_look_waits_for_a_gpu():
    """But compute does."""
    criterion = LGLALoss(COUNTS).cuda()
    monitor = LossMonitor(criterion, every=1)
    logits, target = (tensor.cuda() for tensor in batch(dtype=torch.float32))
    criterion(logits, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs in (logits, list(logits.unbind(1))):
            criterion(inputs, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.compute()["angle/expert 1"] > 0


@pytest.mark.slow
def test_a_compiled_loss_is_watched():
    """The original is what the monitor hangs on; the compiler's graph breaks there."""
    criterion = LGLALoss(COUNTS)
    compiled = torch.compile(criterion, backend="aot_eager")
    monitor = LossMonitor(criterion, every=1)
    batches = [batch(n, seed=n) for n in (8, 6, 5)]
    for logits, target in batches:
        compiled(logits, target)
    expected = [(logits, target, cosine_angles(logits, target)) for logits, target in batches]
    assert monitor.compute() == pytest.approx(by_hand(criterion, expected))


def test_it_takes_torch_and_numpy_only():
    code = """
import sys
sys.modules.update(dict.fromkeys(("tensorboard", "torchmetrics", "lightning", "transformers", "rich")))
from lgla_losses.monitor import LossMonitor
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LossMonitor(torch.nn.CrossEntropyLoss()), TypeError, ("criterion", "an LGLALoss", "Cross")),
        (lambda: LossMonitor(LinearLGLALoss(COUNTS)), TypeError, ("criterion", "an LGLALoss", "no logits")),
        (lambda: LossMonitor(LGLALoss(COUNTS), 0), ValueError, ("every", ">= 1", "got 0")),
        (lambda: LossMonitor(LGLALoss(COUNTS), 0.5), TypeError, ("every", "integer", "0.5")),
    ],
)
def test_wrong_arguments(make, error, words):
    reference.assert_raises(make, error, *words)


def assert_scalars(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-10), name


def test_positions_of_a_map_are_samples():
    logits, target = batch(12)
    maps = logits.view(2, 6, 3, 4).permute(0, 2, 3, 1), target.view(2, 6)
    assert_scalars(watched(LGLALoss(COUNTS), maps), watched(LGLALoss(COUNTS), (logits, target)))
    as_list = list(maps[0].unbind(1)), maps[1]
    assert_scalars(watched(LGLALoss(COUNTS), as_list), watched(LGLALoss(COUNTS), (logits, target)))
    output, target = head_batch()
    feature_maps = output.features.view(3, 3, 3, 5).permute(0, 2, 3, 1)
    logit_maps = output.logits.view(3, 3, 3, 4).permute(0, 2, 3, 1)
    criterion = LGLALoss(COUNTS, scale=None)
    got = watched(criterion, (ExpertOutput(logit_maps, feature_maps, output.weight), target.view(3, 3)))
    assert_scalars(got, watched(criterion, (output, target)))


def test_probabilities_stand_for_the_likeliest_class():
    logits, target = batch(12)
    q = (torch.nn.functional.one_hot(target, 4) * 2.0).softmax(dim=1)
    q[5], target[5] = 0.0, -100
    assert_scalars(watched(LGLALoss(COUNTS), (logits, q)), watched(LGLALoss(COUNTS), (logits, target)))


def test_weights_of_samples_count_as_samples():
    logits, target = batch(6)
    times = torch.tensor([1, 0, 3, 1, 2, 1])
    got = watched(LGLALoss(COUNTS), (logits, target), sample_weight=times.double())
    copies = (logits.repeat_interleave(times, dim=0), target.repeat_interleave(times))
    assert_scalars(got, watched(LGLALoss(COUNTS), copies))
