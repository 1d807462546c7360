"""Targets that are no class index a sample: probabilities, weights of samples, and maps."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conftest import TOLERANCE
from lgla_losses import ClassGrouper, ExpertOutput, LGLALoss, LinearLGLALoss
from lgla_losses.kernels import blockwise

COUNTS = [120, 60, 30, 9, 4, 1]
BACKENDS = ["reference", "fused"]
FORMS = ["cosine", "list", "features", "output", "no aaw"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few samples, which do not divide the batch."""
    monkeypatch.setattr(blockwise, "_CPU_BLOCK", 3 * 3 * len(COUNTS) + 1)
    monkeypatch.setattr(blockwise, "_BLOCK", 3 * 3 * len(COUNTS) + 1)


def batch(num_samples, *maps, dtype=torch.float64):
    """Logits, features and class weights."""
    logits = 60 * torch.rand(num_samples, 3, len(COUNTS), *maps, dtype=torch.float64) - 30
    features = torch.randn(num_samples, 3, 5, *maps, dtype=torch.float64)
    weight = torch.randn(3, len(COUNTS), 5, dtype=torch.float64)
    return logits.to(dtype), features, weight


def mixed(num_samples, *maps):
    """Probabilities as mixup makes them, some of one class and one of none."""
    first, second = torch.randint(0, len(COUNTS), (2, num_samples, *maps))
    share = torch.rand(num_samples, *maps, dtype=torch.float64)
    share[::3] = 1.0
    q = share[..., None] * F.one_hot(first, len(COUNTS)) + (1 - share)[..., None] * F.one_hot(
        second, len(COUNTS)
    )
    if num_samples > 4:
        q[4] = 0.0
    return q.movedim(-1, 1)


def call(form, logits, features, weight, target, *, backend="reference", **options):
    """The loss and the gradient of the logits, whatever form they come in."""
    inputs = {name: options.pop(name) for name in ("sample_weight", "normalizer") if name in options}
    of_angles = {"scale": None} if form in ("features", "output") else {}
    # Every form with the same tau, which by default depends on the heads.
    criterion = LGLALoss(COUNTS, tau=2.5, aaw=form != "no aaw", backend=backend, **of_angles, **options)
    leaf = logits.detach().clone().requires_grad_()
    if form == "list":
        loss = criterion(list(leaf.unbind(1)), target, **inputs)
    elif form == "features":
        loss = criterion(leaf, target, features=features, weight=weight, **inputs)
    elif form == "output":
        loss = criterion(ExpertOutput(leaf, features, weight), target, **inputs)
    else:
        loss = criterion(leaf, target, **inputs)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    loss.backward(upstream)
    return loss.detach(), leaf.grad


def assert_alike(got, expected, **tolerance):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or EXACT))


def soft_losses(criterion, logits, q, sample_weight):
    """The definition in plain loops: references, weights and cross entropy of class probabilities."""
    groups = criterion.grouper.group_index.tolist()
    table = criterion.adjuster.table.tolist()
    n, k, c = logits.shape
    angles = [
        [[math.acos(max(-1.0, min(1.0, v / 30))) for v in row] for row in rows] for rows in logits.tolist()
    ]
    losses = []
    for i in range(n):
        total = 0.0
        for e in range(k):
            weight = 0.0
            for y in range(c):
                mass = math.fsum(
                    sample_weight[j] * q[j][z] for j in range(n) for z in range(c) if groups[z] == groups[y]
                )
                angle_sum = math.fsum(
                    sample_weight[j] * q[j][z] * angles[j][e][z]
                    for j in range(n)
                    for z in range(c)
                    if groups[z] == groups[y]
                )
                excess = angles[i][e][y] - angle_sum / mass if mass else 0.0
                weight += q[i][y] * (1.0 + max(0.0, excess))
            adjusted = [v + t for v, t in zip(logits[i, e].tolist(), table[e], strict=True)]
            entropy = math.fsum(q[i][y] * reference.cross_entropy(adjusted, y) for y in range(c))
            total += sample_weight[i] * weight * entropy
        losses.append(total)
    return torch.tensor(losses, dtype=torch.float64)


@st.composite
def soft_cases(draw):
    counts = draw(st.lists(st.integers(1, 1000), min_size=2, max_size=5))
    n, c = draw(st.integers(1, 4)), len(counts)
    parts = st.lists(st.integers(0, 3), min_size=c, max_size=c)
    q = torch.tensor([draw(parts) for _ in range(n)], dtype=torch.float64)
    q = q / q.sum(dim=1, keepdim=True).clamp(min=1)
    numbers = st.lists(st.floats(-30, 30), min_size=3 * n * c, max_size=3 * n * c)
    logits = torch.tensor(draw(numbers), dtype=torch.float64).view(n, 3, c)
    weights = draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=n, max_size=n))
    return counts, logits, q, torch.tensor(weights, dtype=torch.float64)


@given(soft_cases(), st.sampled_from(BACKENDS))
def test_probabilities_in_plain_loops(case, backend):
    counts, logits, q, sample_weight = case
    criterion = LGLALoss(counts, reduction="none", backend=backend)
    expected = soft_losses(criterion, logits, q.tolist(), sample_weight.tolist())
    torch.testing.assert_close(criterion(logits, q, sample_weight=sample_weight), expected, **EXACT)
    mean = LGLALoss(counts, backend=backend)(logits, q, sample_weight=sample_weight)
    samples = float((q.sum(dim=1) * sample_weight).sum()) or 1.0
    torch.testing.assert_close(mean, expected.sum() / samples, **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_one_hot_target_equals_its_index(form, reduction, backend, small_blocks):
    """A row of zeros equals an ignored target."""
    inputs = batch(11)
    target = torch.arange(11) % 6
    one_hot = F.one_hot(target, 6).double()
    one_hot[7], target[7] = 0.0, -100
    options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
    assert_alike(call(form, *inputs, one_hot, **options), call(form, *inputs, target, **options))


@pytest.mark.parametrize("form", FORMS)
def test_both_backends_agree_on_probabilities(form, small_blocks):
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.2, "sample_weight": torch.rand(11).double()}
        inputs, q = batch(11), mixed(11)
        expected = call(form, *inputs, q, **options)
        assert_alike(call(form, *inputs, q, backend="fused", **options), expected)


def test_probabilities_without_adjustment_are_pytorchs_cross_entropy(backend):
    logits, q = batch(9)[0], torch.rand(9, 6, dtype=torch.float64).softmax(dim=1)
    criterion = LGLALoss(COUNTS, adjustment="softmax", aaw=False, label_smoothing=0.3, backend=backend)
    expected = sum(F.cross_entropy(v, q, label_smoothing=0.3) for v in logits.unbind(1))
    torch.testing.assert_close(criterion(logits, q), expected, **EXACT)


def test_a_masked_class_without_probability_does_no_harm(backend):
    """F.cross_entropy gives NaN here."""
    logits, q = batch(6)[0], torch.eye(6, dtype=torch.float64).roll(1, dims=0)
    logits[:, :, 2] = -torch.inf
    q[:, 3] += q[:, 2]
    q[:, 2] = 0.0
    loss, gradient = call("cosine", logits, None, None, q, backend=backend)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, :, 2] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("soft", [False, True])
def test_a_weight_of_three_is_three_samples_and_of_zero_none(form, soft, backend):
    logits, features, weight = batch(7)
    target = mixed(7) if soft else torch.tensor([0, 1, -100, 3, 4, 5, 0])
    times = torch.tensor([1, 3, 2, 0, 1, 2, 1])
    copies = torch.arange(7).repeat_interleave(times)
    options = {"backend": backend, "label_smoothing": 0.1}
    got, gradient = call(form, logits, features, weight, target, sample_weight=times.double(), **options)
    repeated = call(form, logits[copies], features[copies], weight, target[copies], **options)
    torch.testing.assert_close(got, repeated[0], **EXACT)
    torch.testing.assert_close(gradient, torch.zeros_like(logits).index_add(0, copies, repeated[1]), **EXACT)


def test_weights_of_samples_without_reduction_and_with_a_normalizer(backend):
    logits, features, weight = batch(8)
    sample_weight = torch.rand(8).double()
    target = torch.arange(8) % 6
    sums = {}
    for reduction in ("none", "sum", "mean"):
        options = {"reduction": reduction, "sample_weight": sample_weight, "backend": backend}
        sums[reduction] = call("cosine", logits, features, weight, target, **options)[0]
    torch.testing.assert_close(sums["none"].sum(), sums["sum"], **EXACT)
    torch.testing.assert_close(sums["mean"], sums["sum"] / sample_weight.sum(), **EXACT)
    options = {"sample_weight": sample_weight, "normalizer": 8.0, "backend": backend}
    other = call("cosine", logits, features, weight, target, **options)[0]
    torch.testing.assert_close(other, sums["sum"] / 8, **EXACT)


def test_all_weights_zero_give_a_zero_that_keeps_the_graph(backend):
    for target in (torch.arange(6), mixed(6)):
        loss, gradient = call("cosine", *batch(6), target, sample_weight=torch.zeros(6), backend=backend)
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("aaw", [True, False])
def test_the_linear_loss_takes_weights_of_samples(aaw, backend):
    _, features, weight = batch(9)
    target, sample_weight = torch.arange(9) % 6, torch.rand(9).double()
    target[2] = -100
    logits = torch.einsum("nkd,kcd->nkc", features, weight)
    options = {"aaw": aaw, "scale": None, "backend": backend}
    expected = LGLALoss(COUNTS, **options)(
        logits, target, features=features, weight=weight, sample_weight=sample_weight
    )
    got = LinearLGLALoss(COUNTS, **options)(features, weight, target, sample_weight=sample_weight)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("maps", [(4, 5), (7,), (2, 3, 2), (1, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_a_map_is_a_batch_of_its_positions(form, maps, soft, backend, small_blocks):
    logits, features, weight = batch(3, *maps)
    target = mixed(3, *maps) if soft else torch.randint(0, 6, (3, *maps))
    if not soft:
        target[0, 0] = -100
    sample_weight = torch.rand(3, *maps).double()

    def flat(tensor, channels):
        return tensor.movedim(tuple(range(1, 1 + channels)), tuple(range(-channels, 0))).flatten(0, len(maps))

    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
        got = call(form, logits, features, weight, target, sample_weight=sample_weight, **options)
        rows = flat(logits, 2), flat(features, 2), weight, flat(target, 1) if soft else target.flatten()
        expected = call(form, *rows, sample_weight=sample_weight.flatten(), **options)
        torch.testing.assert_close(got[0].flatten(), expected[0].flatten(), **EXACT)
        torch.testing.assert_close(flat(got[1], 2), expected[1], **EXACT)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "cropped"])
def test_gradients_of_maps_lie_as_the_logits_do(layout, small_blocks):
    memory = {
        "contiguous": lambda: torch.randn(2, 3, 6, 4, 5).double(),
        "channels last": lambda: torch.randn(2, 4, 5, 3, 6).double().movedim((3, 4), (1, 2)),
        "cropped": lambda: torch.randn(2, 3, 6, 6, 7).double()[..., 1:5, 1:6],
    }
    logits = memory[layout]().requires_grad_()
    target = torch.randint(0, 6, (2, 4, 5))
    LGLALoss(COUNTS, backend="fused")(logits, target).backward()
    expected = logits.detach().clone().requires_grad_()
    LGLALoss(COUNTS, backend="reference")(expected, target).backward()
    torch.testing.assert_close(logits.grad, expected.grad, **EXACT)
    if layout != "cropped":
        assert logits.grad.stride() == logits.stride()


def test_maps_are_not_copied_whole(monkeypatch):
    """The largest tensor that is made beside the gradient is a block."""
    monkeypatch.setattr(blockwise, "_CPU_BLOCK", 1 << 12)
    logits = torch.rand(2, 3, 6, 64, 64).requires_grad_()
    target = torch.randint(0, 6, (2, 64, 64))
    criterion = LGLALoss(COUNTS, backend="fused", aaw=False, validate_args=False)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True
    ) as profile:
        criterion(logits, target).backward()
    large = [
        event.name
        for event in profile.events()
        if event.self_cpu_memory_usage >= logits.numel() * logits.element_size() // 2
    ]
    assert len(large) == 1, large  # the gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft", [False, True])
def test_low_precision(dtype, soft, close):
    """No further from float64 than the gradient's own rounding."""
    logits = batch(3, 4, 5, dtype=dtype)[0]
    target = mixed(3, 4, 5).to(dtype) if soft else torch.randint(0, 6, (3, 4, 5))
    got = call("cosine", logits, None, None, target, backend="fused")
    exact = call("cosine", logits.double(), None, None, target.double() if soft else target)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    torch.testing.assert_close(got[0].double(), exact[0], **TOLERANCE[torch.float32])
    torch.testing.assert_close(got[1].double(), exact[1], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_samples_keep_their_digits_beside_probabilities_of_16_bits(dtype):
    logits, target = batch(12)[0].to(dtype), torch.arange(12) % 6
    sample_weight = 1e5 * (1 + torch.rand(12))
    hard = LGLALoss(COUNTS)(logits, target, sample_weight=sample_weight)
    soft = LGLALoss(COUNTS)(logits, F.one_hot(target, 6).to(dtype), sample_weight=sample_weight)
    torch.testing.assert_close(soft, hard, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_gradients(soft, reduction):
    logits = (torch.rand(2, 3, 6, 2, dtype=torch.float64) * 4).requires_grad_()
    target = mixed(2, 2) if soft else torch.randint(0, 6, (2, 2))
    criterion = LGLALoss(COUNTS, reduction=reduction, backend="fused", label_smoothing=0.1, aaw=False)
    weights = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)

    def loss(logits):
        return criterion(logits, target, sample_weight=weights)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("maps", [(), (2, 3)])
def test_it_compiles(soft, maps):
    criterion = LGLALoss(COUNTS, label_smoothing=0.1)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    target = mixed(5, *maps) if soft else torch.randint(0, 6, (5, *maps))
    sample_weight = torch.rand(5, *maps).double()
    results = []
    for function in (criterion, compiled):
        torch.manual_seed(0)
        logits = batch(5, *maps)[0].requires_grad_()
        loss = function(logits, target, sample_weight=sample_weight)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    assert_alike(*results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", [(0,), (0, 4, 4), (2, 0, 3), (3, 2, 0)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_empty_batch_is_a_zero_that_keeps_the_graph(
    form, samples, soft, dtype, backend, fresh_memory_is_nan
):
    """Angles of an empty map in half precision had a wrong dtype, and the loss was NaN."""
    logits, features, weight = (v.to(dtype) for v in batch(*samples))
    n, *maps = samples
    target = torch.zeros(n, 6, *maps) if soft else torch.zeros(n, *maps, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        options = {"backend": backend, "reduction": reduction}
        loss, gradient = call(form, logits, features, weight, target, **options)
        assert loss.shape == (samples if reduction == "none" else ())
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not loss.any()
        assert gradient.shape == logits.shape


def test_maps_of_features_without_width(backend):
    """All angles are right angles, so that no sample is harder than another."""
    logits, target = batch(2, 4)[0], torch.randint(0, 6, (2, 4))
    inputs = torch.zeros(2, 3, 0, 4).double(), torch.zeros(3, 6, 0).double(), target
    expected = call("no aaw", logits, None, None, target, backend=backend)
    assert_alike(call("output", logits, *inputs, backend=backend), expected)


def test_nothing_of_the_callers_changes():
    logits, features, weight = batch(4, 3)
    q, sample_weight = mixed(4, 3), torch.rand(4, 3).double()
    inputs = logits, features, weight, q, sample_weight
    before = [v.clone() for v in inputs]
    leaf = logits.requires_grad_()
    loss = LGLALoss(COUNTS, scale=None, backend="fused")(
        leaf, q, features=features, weight=weight, sample_weight=sample_weight
    )
    loss.backward()
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


def test_blocks_cover_every_sample_once():
    for samples in [(7,), (3, 4), (2, 5, 3), (0, 4), (1, 1, 1)]:
        for width in (1, 1 << 17, 1 << 18, 1 << 21):
            seen = torch.zeros(samples)
            for block in blockwise._blocks(seen.long(), width):
                seen[block] += 1
            assert (seen == 1).all()


def test_references_of_groups_with_fractions_of_a_sample():
    """Less than one sample a group is no reason to shrink its mean."""
    grouper = ClassGrouper([4, 1], 1)
    logits = torch.tensor([[[15.0, 0.0], [15.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    quarter = torch.full((2,), 0.25, dtype=torch.float64)
    criterion = LGLALoss(grouper=grouper, reduction="none")
    target = torch.tensor([0, 0])
    torch.testing.assert_close(
        criterion(logits, target, sample_weight=quarter), 0.25 * criterion(logits, target), **EXACT
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", ["fused", "auto"])
def test_every_device_agrees(device, backend, soft):
    inputs = batch(5, 3, 4)
    target = mixed(5, 3, 4) if soft else torch.randint(0, 6, (5, 3, 4))
    sample_weight = torch.rand(5, 3, 4).double()
    expected = call("cosine", *inputs, target, sample_weight=sample_weight)
    criterion = LGLALoss(COUNTS, backend=backend).to(device)
    leaf = inputs[0].to(device).requires_grad_()
    loss = criterion(leaf, target.to(device), sample_weight=sample_weight.to(device))
    loss.backward(torch.full((), 0.5, dtype=torch.float64, device=device))  # as ``call`` does for a scalar
    assert_alike((loss.detach().cpu(), leaf.grad.cpu()), expected)


def test_a_linear_head_under_a_cosine_scale_is_noticed_beside_weights_of_samples():
    logits = batch(6)[0]
    logits[0, 0, 0] = 40.0
    target = torch.arange(6)
    with pytest.warns(UserWarning, match="exceeds scale=30"):
        LGLALoss(COUNTS, backend="fused")(logits, target, sample_weight=torch.ones(6))
