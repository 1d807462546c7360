"""Eq. 9: the loss against plain float64 loops, and what a training loop asks of it."""

import copy
import io
import math
import pickle

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import cosine_logits

from lgla_losses import ClassGrouper, ExpertOutput, LGLALoss, _batch
from lgla_losses.baselines import BalancedSoftmaxLoss, FocalLoss, LDAMLoss

COUNTS = [120, 60, 30, 9, 4, 1]
ADJUSTMENTS = ["lgla", "softmax", "balanced", "logit"]


def expected_losses(criterion, logits, target, angles=None):
    """Eq. 9 per sample, from the loops of the paper's equations."""
    groups = criterion.grouper.group_index.tolist()
    if angles is None:
        angles = [
            [math.acos(max(-1.0, min(1.0, float(v[max(y, 0)]) / 30))) for v in sample]
            for sample, y in zip(logits.double(), target.tolist(), strict=True)
        ]
    weights = [[1.0] * criterion.num_experts] * len(target)
    if criterion.aaw:
        weights = reference.weights(angles, target.tolist(), groups)
    table = criterion.adjuster.table.tolist()
    smoothing = criterion.label_smoothing
    values = reference.losses(logits.double().tolist(), target.tolist(), table, weights, smoothing)
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.integers(1, 10**4), min_size=1, max_size=7))
    num_experts = draw(st.integers(2, min(7, len(counts) + 1)))
    num_samples = draw(st.integers(0, 6))
    target = draw(
        st.lists(st.sampled_from([-100, *range(len(counts))]), min_size=num_samples, max_size=num_samples)
    )
    logits = draw(
        st.lists(
            st.floats(-30, 30), min_size=num_samples * num_experts * len(counts),
            max_size=num_samples * num_experts * len(counts),
        )
    )  # fmt: skip
    adjustment = draw(st.sampled_from(ADJUSTMENTS))
    criterion = LGLALoss(
        counts,
        num_experts,
        draw(st.floats(0, 5)) if adjustment in ("lgla", "logit") else None,
        adjustment=adjustment,
        aaw=draw(st.booleans()),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        reduction="none",
    )
    logits = torch.tensor(logits, dtype=torch.float64).reshape(num_samples, num_experts, len(counts))
    return criterion, logits, torch.tensor(target, dtype=torch.int64)


@given(cases())
def test_loss_is_eq9(case):
    criterion, logits, target = case
    actual = criterion(logits, target)
    expected = expected_losses(criterion, logits, target)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    valid = int((target >= 0).sum())
    for reduction, total in (("sum", expected.sum()), ("mean", expected.sum() / max(valid, 1))):
        criterion.reduction = reduction
        torch.testing.assert_close(criterion(logits, target), total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_experts", range(2, 8))
@pytest.mark.parametrize(
    "counts",
    [[5] * 6, [9, 9, 5, 5, 5, 1], [100] * 3 + [1] * 3, [10**6, 5, 4, 3, 2, 1]],
    ids=["equal counts", "ties", "step imbalance", "one dominant class"],
)
def test_every_number_of_experts_on_awkward_counts(counts, num_experts, close):
    criterion = LGLALoss(counts, num_experts, reduction="none")
    logits, target = cosine_logits(9, num_experts, 6), torch.arange(9) % 6
    close(criterion(logits, target), expected_losses(criterion, logits, target))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, device, close):
    """The loss is float32 at least, the gradient has the logits' dtype."""
    criterion = LGLALoss(COUNTS).to(device)
    logits = cosine_logits(16, 3, 6, dtype, device).requires_grad_()
    target = torch.arange(16, device=device) % 6
    loss = criterion(logits, target)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad.dtype == dtype
    expected = expected_losses(criterion.cpu(), logits.detach().cpu(), target.cpu())
    close(loss, expected.mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits_never_underflow(dtype, magnitude, device):
    """log(softmax(.)) would give -inf here, and 0 * inf = NaN in the gradient."""
    criterion = LGLALoss(COUNTS, scale=1e5).to(device)
    logits = torch.full((6, 3, 6), -magnitude, device=device).to(dtype)
    logits[:, :, 2] = magnitude
    logits.requires_grad_()
    loss = criterion(logits, torch.arange(6, device=device))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert loss > 1e3


def test_masked_classes_may_be_minus_infinity():
    logits = cosine_logits(4, 3, 6).requires_grad_()
    masked = logits.masked_fill(torch.arange(6) > 3, -math.inf)
    loss = LGLALoss(COUNTS)(masked, torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cosine_that_rounds_above_one_gives_a_finite_loss(dtype):
    """One such cosine turned the authors' whole loss into NaN."""
    logits = torch.zeros(2, 3, 6, dtype=dtype)
    logits[0, :, 1] = 30.25
    assert LGLALoss(COUNTS)(logits, torch.tensor([1, 4])).isfinite()


def test_layouts_give_the_same_loss_and_gradient(device):
    """[N, K, C], a permuted [K, N, C], other strides, lists and tuples, an ExpertOutput."""
    criterion = LGLALoss(COUNTS).to(device)
    base = cosine_logits(5, 3, 6, device=device)
    target = torch.tensor([0, 1, 4, 5, -100], device=device)
    features = torch.randn(5, 3, 8, device=device, dtype=torch.float64)
    weight = torch.randn(3, 6, 8, device=device, dtype=torch.float64)
    layouts = {
        "permuted": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda v: torch.stack([v, v], dim=-1)[..., 0],
        "list": lambda v: list(v.unbind(1)),
        "tuple": lambda v: tuple(v.unbind(1)),
    }

    def run(layout, **inputs):
        logits = base.clone().requires_grad_()
        loss = criterion(layout(logits), target, **inputs)
        loss.backward()
        return loss.item(), logits.grad

    loss, gradient = run(lambda v: v)
    for name, layout in layouts.items():
        other, other_gradient = run(layout)
        assert other == pytest.approx(loss, rel=1e-12), name
        torch.testing.assert_close(other_gradient, gradient)
    loss, gradient = run(lambda v: v, features=features, weight=weight)
    other, other_gradient = run(lambda v: ExpertOutput(v, features, weight))
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(other_gradient, gradient)


def test_angles_of_features_are_eq7_for_any_head(close):
    criterion = LGLALoss(COUNTS, scale=None, reduction="none")
    features = torch.randn(8, 3, 4, dtype=torch.float64)
    weight = torch.randn(3, 6, 4, dtype=torch.float64)
    logits = torch.einsum("nkd,kcd->nkc", features, weight)
    target = torch.arange(8) % 6
    angles = [
        [reference.angle(features[i, k].tolist(), weight[k, y].tolist()) for k in range(3)]
        for i, y in enumerate(target.tolist())
    ]
    expected = expected_losses(criterion, logits, target, angles)
    close(criterion(logits, target, features=features, weight=weight), expected)


def test_the_weights_carry_no_gradient_to_features_or_class_centres():
    features = torch.randn(4, 3, 5, requires_grad=True)
    weight = torch.randn(3, 6, 5, requires_grad=True)
    logits = cosine_logits(4, 3, 6).requires_grad_()
    criterion = LGLALoss(COUNTS, scale=None)
    criterion(logits, torch.arange(4), features=features, weight=weight).backward()
    assert features.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
def test_label_smoothing_is_cross_entropys_of_the_adjusted_logits(smoothing, adjustment, close):
    criterion = LGLALoss(COUNTS, aaw=False, label_smoothing=smoothing, adjustment=adjustment)
    logits, target = cosine_logits(7, 3, 6), torch.tensor([0, 1, 2, 3, 4, 5, -100])
    expected = sum(
        F.cross_entropy(logits[:, k] + criterion.adjuster.table[k], target, label_smoothing=smoothing)
        for k in range(3)
    )
    close(criterion(logits, target), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [[], [-100, -100]], ids=["empty", "all ignored"])
@pytest.mark.parametrize("aaw", [True, False])
def test_nothing_to_learn_from_gives_a_zero_that_keeps_the_graph(reduction, target, aaw):
    logits = cosine_logits(len(target), 3, 6).requires_grad_()
    loss = LGLALoss(COUNTS, reduction=reduction, aaw=aaw)(logits, torch.tensor(target, dtype=torch.int64))
    assert loss.shape == (torch.Size([len(target)]) if reduction == "none" else torch.Size([]))
    assert (loss == 0).all()
    loss.sum().backward()
    assert (logits.grad == 0).all()


def test_one_sample_batches(close):
    """Every angle is its own reference: the weights are one."""
    logits, target = cosine_logits(1, 3, 6), torch.tensor([5])
    close(LGLALoss(COUNTS)(logits, target), LGLALoss(COUNTS, aaw=False)(logits, target))


def test_ignored_samples_change_nothing(close):
    logits, target = cosine_logits(6, 3, 6), torch.tensor([0, -100, 2, -100, 4, 5])
    kept = target >= 0
    close(LGLALoss(COUNTS)(logits, target), LGLALoss(COUNTS)(logits[kept], target[kept]))
    criterion = LGLALoss(COUNTS, ignore_index=255)
    close(criterion(logits, torch.where(kept, target, 255)), criterion(logits[kept], target[kept]))


def test_normalizer_makes_gradient_accumulation_exact_without_aaw(close):
    criterion = LGLALoss(COUNTS, aaw=False)
    logits, target = cosine_logits(10, 3, 6), torch.arange(10) % 6
    parts = sum(criterion(v, y, normalizer=10) for v, y in zip(logits.split(3), target.split(3), strict=True))
    close(parts, criterion(logits, target))
    close(criterion(logits, target, normalizer=torch.tensor(10.0)), criterion(logits, target))


@pytest.mark.parametrize("normalizer", [7, 7.5, torch.tensor(7), torch.tensor(7.5, dtype=torch.float64)])
@pytest.mark.parametrize("criterion", [LGLALoss(COUNTS, aaw=False), LGLALoss(COUNTS)])
def test_a_normalizer_from_the_cpu_may_be_a_number_or_a_tensor(criterion, normalizer, device, close):
    """On a GPU no step waits for it, which capture in a graph would not survive."""
    criterion = copy.deepcopy(criterion)
    total = LGLALoss(COUNTS, aaw=criterion.aaw, reduction="sum")
    logits, target = cosine_logits(10, 3, 6), torch.arange(10) % 6
    expected = total(logits, target) / float(normalizer)
    criterion, logits, target = criterion.to(device), logits.to(device), target.to(device)
    close(criterion(logits, target, normalizer=normalizer), expected)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion(logits, target, normalizer=normalizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "criterion",
    [
        LGLALoss(COUNTS),
        LGLALoss(COUNTS, aaw=False, reduction="none"),
        BalancedSoftmaxLoss(COUNTS),
        FocalLoss(),
        LDAMLoss(COUNTS),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
@pytest.mark.parametrize("size", [(7, 3, 6), (0, 3, 6)])
def test_few_logits_in_k_tensors_are_joined(criterion, size, device, close, monkeypatch):
    """Kernels for each would take longer to start than a copy takes; nothing else may change."""
    criterion, target = copy.deepcopy(criterion).to(device), (torch.arange(size[0]) % 6).to(device)
    target[:1] = -100
    logits, results, joined, stack = cosine_logits(*size), [], [], torch.stack
    monkeypatch.setattr(
        _batch.torch, "stack", lambda v, **kwargs: joined.append(len(v)) or stack(v, **kwargs)
    )
    for most in (0, 1 << 20):
        monkeypatch.setattr(_batch, "_WORTH_JOINING", {device: most})
        experts = [v.to(device, copy=True).requires_grad_() for v in logits.unbind(1)]
        value = criterion(experts, target)
        gradients = torch.autograd.grad(value.sum() * 3, experts)
        results.append([value, *gradients])
    assert joined == [3]
    for ours, expected in zip(results[1], results[0], strict=True):
        close(ours, expected)


def test_many_logits_in_k_tensors_are_not_copied(monkeypatch):
    monkeypatch.setattr(_batch, "_WORTH_JOINING", {"cpu": 100})
    criterion = LGLALoss(COUNTS, backend="fused")
    monkeypatch.setattr(torch, "stack", None)
    experts = [torch.zeros(7, 6) for _ in range(3)]
    assert criterion(experts, torch.arange(7) % 6) > 0


def test_gradients_of_joined_logits_are_handed_over_without_a_copy(monkeypatch):
    """A GPU launched a kernel for each."""
    monkeypatch.setattr(_batch, "_WORTH_JOINING", {"cpu": 1 << 20})
    experts = [torch.zeros(7, 6, requires_grad=True) for _ in range(3)]
    LGLALoss(COUNTS)(experts, torch.arange(7) % 6).backward()
    assert all(v.grad.is_contiguous() for v in experts)
    assert len({v.grad.untyped_storage().data_ptr() for v in experts}) == 1


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("aaw", [True, False])
def test_the_number_of_samples_survives_any_default_dtype(default, aaw, close):
    """An int divided by an int takes the default dtype; 70,000 is infinite in float16."""
    logits, target = cosine_logits(1, 3, 6, torch.float32).expand(70_000, 3, 6), torch.full((70_000,), 2)
    expected = LGLALoss(COUNTS, aaw=aaw)(logits[:1], target[:1])
    try:
        torch.set_default_dtype(default)
        loss = LGLALoss(COUNTS, aaw=aaw)(logits, target)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    close(loss, expected)


def test_a_float64_normalizer_leaves_the_loss_in_float32():
    logits, target = cosine_logits(4, 3, 6, torch.float32), torch.arange(4)
    normalizer = torch.tensor(4.0, dtype=torch.float64)
    assert LGLALoss(COUNTS)(logits, target, normalizer=normalizer).dtype == torch.float32


@pytest.mark.parametrize("inputs", ["logits", "list", "output"])
def test_no_value_is_read_off_the_cpu(inputs):
    """Meta tensors have none: a step that passes here never waits for a GPU."""
    criterion = LGLALoss(COUNTS, label_smoothing=0.1).to("meta")
    assert "num_classes=6" in repr(criterion)
    logits = cosine_logits(5, 3, 6, torch.float32, "meta").requires_grad_()
    features, weight = torch.zeros(5, 3, 8, device="meta"), torch.zeros(3, 6, 8, device="meta")
    output = {
        "logits": logits,
        "list": list(logits.unbind(1)),
        "output": ExpertOutput(logits, features, weight),
    }
    loss = criterion(output[inputs], torch.zeros(5, dtype=torch.int64, device="meta"))
    loss.backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_is_captured_in_a_cuda_graph(close):
    criterion = LGLALoss(COUNTS).cuda()
    logits = cosine_logits(8, 3, 6, torch.float32, "cuda").requires_grad_()
    target = torch.arange(8, device="cuda") % 6
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            logits.grad = None
            criterion(logits, target).backward()
    torch.cuda.current_stream().wait_stream(stream)
    logits.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(logits, target)
        loss.backward()
    with torch.no_grad():
        logits.copy_(cosine_logits(8, 3, 6, torch.float32, "cuda"))
    graph.replay()
    close(loss, expected_losses(criterion.cpu(), logits.detach().cpu(), target.cpu()).mean())


@pytest.mark.parametrize("validate_args", [None, True, False])
@pytest.mark.parametrize("form", ["indices", "probabilities", "maps", "output", "weighted", "normalized"])
def test_vmap_takes_gradients_of_single_samples(form, validate_args):
    """With default arguments too: what nobody can read is not checked."""
    scale = None if form == "output" else 30.0
    criterion = LGLALoss(COUNTS, scale=scale, validate_args=validate_args)
    maps = [2, 2] if form == "maps" else []
    logits = 20 * torch.rand(4, 3, 6, *maps, dtype=torch.float64)
    target = torch.randint(6, (4, *maps))
    if form == "probabilities":
        target = torch.rand(4, 6).softmax(dim=1)
    features, weight = torch.randn(4, 3, 5).double(), torch.randn(3, 6, 5).double()
    numbers = 1 + torch.rand(4).double()

    def loss(logits, target, features, number):
        if form == "output":
            return criterion(ExpertOutput(logits[None], features[None], weight), target[None])
        options = {"weighted": {"sample_weight": number[None]}, "normalized": {"normalizer": number}}
        return criterion(logits[None], target[None], **options.get(form, {}))

    samples = logits, target, features, numbers
    gradients = torch.vmap(torch.func.grad(loss))(*samples)
    leaf = logits.clone().requires_grad_()
    for n in range(4):
        loss(leaf[n], *(v[n] for v in samples[1:])).backward()
    torch.testing.assert_close(gradients, leaf.grad, rtol=1e-10, atol=1e-10)


def test_a_table_of_ones_own(close):
    table = torch.randn(2, 6)
    criterion = LGLALoss(COUNTS, adjustment=table, aaw=False)
    logits, target = cosine_logits(5, 2, 6), torch.arange(5)
    expected = sum(F.cross_entropy(logits[:, k] + table[k].double(), target) for k in range(2))
    close(criterion(logits, target), expected)


def test_groups_of_ones_own_fix_the_number_of_experts(close):
    grouper = ClassGrouper.from_groups(COUNTS, [0, 1, 2, 2, 1, 0])
    criterion = LGLALoss(grouper=grouper, reduction="none")
    assert criterion.num_experts == 4
    logits, target = cosine_logits(6, 4, 6), torch.arange(6)
    close(criterion(logits, target), expected_losses(criterion, logits, target))


def test_more_experts_than_classes_where_no_groups_are_needed():
    criterion = LGLALoss([5, 1], 7, adjustment="balanced", aaw=False)
    assert criterion(cosine_logits(3, 7, 2), torch.tensor([0, 1, 1])).isfinite()


def test_nothing_is_written_into_the_callers_tensors():
    logits, target = cosine_logits(6, 3, 6, torch.float32), torch.tensor([0, 1, 2, 3, 4, -100])
    features, weight = torch.randn(6, 3, 4), torch.randn(3, 6, 4)
    given = {"logits": logits, "target": target, "features": features, "weight": weight}
    before = {name: (t.clone(), t._version) for name, t in given.items()}
    logits.requires_grad_()
    criterion = LGLALoss(COUNTS, scale=None, label_smoothing=0.1)
    criterion(logits, target, features=features, weight=weight).backward()
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor._version == before[name][1], name


def test_deepcopy_pickle_and_state_dict_keep_the_loss():
    source = LGLALoss(COUNTS, 4, 3.3, label_smoothing=0.1)
    logits, target = cosine_logits(8, 4, 6), torch.arange(8) % 6
    expected = source(logits, target)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    restored = LGLALoss([1.5, 2.5, 90, 4, 5, 6], 4, label_smoothing=0.1)
    assert not torch.equal(restored(logits, target), expected)
    restored.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), restored):
        assert torch.equal(other(logits, target), expected)
        assert torch.equal(other.adjuster.implied_prior(), source.adjuster.implied_prior())
        assert float(other.adjuster.tau) == 3.3
        assert other.adjuster.grouper is other.weighter.grouper


def test_state_dict_with_aaw_loads_without():
    source, other = LGLALoss(COUNTS), LGLALoss([1, 2, 3, 4, 5, 6], aaw=False)
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.adjuster.table, source.adjuster.table)


def test_a_failed_move_leaves_the_loss_as_it_was():
    criterion = LGLALoss(COUNTS)
    before = {name: t.clone() for name, t in criterion.state_dict().items()}

    def fail(_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        criterion._apply(fail)
    assert criterion.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in criterion.state_dict().items())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_a_model_leaves_the_constants_in_full_precision(cast):
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), LGLALoss(COUNTS)])
    before = {name: t.clone() for name, t in model[1].state_dict().items()}
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32 or cast == "float"
    for name, tensor in model[1].state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_constants_become_float32_where_float64_does_not_exist():
    """Apple's MPS raises a TypeError when asked for float64."""

    def to_mps(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor

    criterion = LGLALoss(COUNTS)._apply(to_mps)
    assert criterion.adjuster.table.dtype == torch.float32
    assert criterion(cosine_logits(3, 3, 6, torch.float32), torch.arange(3)).isfinite()


def test_autocast(device, close):
    criterion = LGLALoss(COUNTS, scale=None).to(device)
    features = torch.randn(12, 3, 8, device=device, requires_grad=True)
    weight = torch.randn(3, 6, 8, device=device)
    target = torch.arange(12, device=device) % 6
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = torch.einsum("nkd,kcd->nkc", features, weight)
        loss = criterion(logits, target, features=features, weight=weight)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    close(loss, criterion(logits.float(), target, features=features, weight=weight))
    loss.backward()
    assert features.grad.dtype == torch.float32


def test_a_module_of_the_loss_can_be_hooked():
    """Hooks on the weighter see the angles and the weights: what a logger needs."""
    criterion, seen = LGLALoss(COUNTS), []
    criterion.weighter.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    criterion(cosine_logits(4, 3, 6), torch.arange(4))
    assert [tuple(t.shape) for t in seen[0]] == [(4, 3), (4, 3)]
