"""What every engine must compute, against float64; Triton's on a GPU where there is one, else interpreted."""

import pytest
import reference
import torch
import torch.nn.functional as F
from engines import (
    DTYPES,
    ENGINES,
    IGNORE,
    INF,
    MEMORY,
    NAN,
    device_of,
    like,
    named,
    random_logits,
    random_probabilities,
    random_table,
    random_target,
    use_small_blocks,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import HAS_GPU
from lgla_losses.functional import compute_dtype
from lgla_losses.kernels import Angles, Rows, Samples

#: The engine under test.
kernels = None

# NumPy, in the interpreter, warns of inf - inf where a GPU gives NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

KINDS = ["indices", "dense", "mixup"]


@pytest.fixture(params=ENGINES, autouse=True)
def _engine(request):
    global kernels
    kernels = named(request.param)
    with device_of(kernels):
        yield


@pytest.fixture(autouse=True)
def _poison(fresh_memory_is_nan):
    """An element never written fails its test."""


@pytest.fixture(params=[False, True], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    if request.param:
        use_small_blocks(kernels, monkeypatch)


@pytest.fixture
def blocked(monkeypatch):
    use_small_blocks(kernels, monkeypatch)


def random_targets(num_samples, num_classes, kind, dtype=torch.float64, ignored=()):
    if kind == "indices":
        return random_target(num_samples, num_classes, ignored)
    return random_probabilities(num_samples, num_classes, kind, dtype, ignored)


def random_weights(num_samples, num_experts, dtype=torch.float64):
    return (1 + torch.rand(num_samples, num_experts)).to(compute_dtype(dtype))


def random_constants(num_classes):
    """Class weights and margins."""
    return {
        "class_weight": 0.1 + torch.rand(num_classes, dtype=torch.float64),
        "margin": 2 * torch.rand(num_classes, dtype=torch.float64),
    }


def as_probabilities(target, num_classes, ignore_index=IGNORE):
    """Float64 ``[N, C]``, 0 for ignored samples."""
    if target.is_floating_point():
        return target.double()
    ignored = (target == ignore_index)[:, None]
    return F.one_hot(target.masked_fill(ignored[:, 0], 0), num_classes).double().masked_fill(ignored, 0)


def expected(logits, rows):
    """The losses ``[N]`` and the gradient of their sum ``[N, K, C]``, in float64 loops."""
    logits = (torch.cat(logits, dim=1) if isinstance(logits, list) else logits).double()
    num_samples, num_experts, num_classes = logits.shape
    probabilities = as_probabilities(rows.target, num_classes, rows.ignore_index)
    adjusted = logits if rows.table is None else logits + rows.table
    if rows.margin is not None:
        adjusted = adjusted - (rows.margin * probabilities)[:, None]
    adjusted, losses = adjusted.tolist(), []
    weights = torch.ones(num_samples, num_experts) if rows.weights is None else rows.weights
    class_weight = None if rows.class_weight is None else rows.class_weight.tolist()
    gradient = torch.zeros(logits.shape, dtype=torch.float64)
    for i, (q, factors) in enumerate(zip(probabilities.tolist(), weights.tolist(), strict=True)):
        losses.append(0.0)
        for k in range(num_experts if any(q) else 0):
            shares = reference.shares(q, class_weight, rows.label_smoothing)
            loss, slopes = reference.loss_of_row(adjusted[i][k], shares, rows.gamma)
            losses[i] += factors[k] * loss
            gradient[i, k] = factors[k] * torch.tensor(slopes, dtype=torch.float64)
    return torch.tensor(losses, dtype=torch.float64), gradient


def forward(logits, rows, out=None):
    logits = logits if isinstance(logits, list) else [logits]
    out = out if isinstance(out, list) else [out] * len(logits)
    return kernels.forward(logits, rows, out)


def backward(logits, rows, upstream, state, out):
    lists = [v if isinstance(v, list) else [v] for v in (logits, out)]
    kernels.backward(lists[0], rows, upstream, state, lists[1])


def check(close, logits, rows, memory="contiguous"):
    """All that the engine offers for a batch, against float64."""
    logits = logits if isinstance(logits, list) else [logits]
    before = [v.clone() for v in logits]
    exact = compute_dtype(logits[0].dtype)
    losses, gradient = expected(logits, rows)
    ignored = ~as_probabilities(rows.target, logits[0].shape[2], rows.ignore_index).any(dim=1)

    out = [like(torch.full_like(v, NAN), memory) for v in logits]
    total, _ = forward(logits, rows._replace(divisor=torch.tensor(3.0), reduce=True), out)
    assert total.shape == ()
    assert total.dtype == exact
    close(total, losses.sum() / 3)
    close(torch.cat(out, dim=1), gradient / 3)

    each, state = forward(logits, rows)
    assert each.dtype == exact
    assert not state.isnan().any()
    close(each, losses)
    assert not each[ignored].any()
    assert all(map(torch.equal, logits, before))

    upstream = torch.randn(len(losses), dtype=exact)
    out = [like(torch.full_like(v, NAN), memory) for v in logits]
    backward(logits, rows, upstream, state, out)
    out = torch.cat(out, dim=1)
    close(out, gradient * upstream[:, None, None])
    assert not out[ignored].any()


def weighted(
    close, num_samples, num_experts, num_classes, dtype, memory="contiguous", kind="indices", **more
):
    logits = like(random_logits(num_samples, num_experts, num_classes, dtype=dtype), memory)
    target = random_targets(num_samples, num_classes, kind, ignored=[num_samples // 2])
    table, weights = random_table(num_experts, num_classes), random_weights(num_samples, num_experts, dtype)
    more.setdefault("label_smoothing", 0.1)
    check(close, logits, Rows(target, table, weights, **more), memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 2, 5, 100, 1000])
def test_losses_and_gradients(dtype, num_classes, close):
    weighted(close, 7, 3, num_classes, dtype)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [17, 48, 100])
def test_long_rows(dtype, num_classes, close):
    weighted(close, 5, 2, num_classes, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beyond_the_limit(dtype, kind, close):
    weighted(close, 2, 1, 20_000, dtype, kind=kind)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5, 4), (3, 2, 7), (33, 5, 6)])
def test_shapes(shape, close):
    weighted(close, *shape, torch.float32)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", ["dense", "mixup"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities(dtype, kind, close):
    logits, table, weights = (
        random_logits(7, 3, 37, dtype=dtype),
        random_table(3, 37),
        random_weights(7, 3, dtype),
    )
    for target_dtype in DTYPES:
        target = random_probabilities(7, 37, kind, target_dtype, ignored=[0, 4])
        for smoothing in (0.0, 0.2):
            check(close, logits, Rows(target, table, weights, label_smoothing=smoothing))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_class_weights_margins_and_focus(dtype, kind, close):
    logits, weights = random_logits(7, 2, 37, dtype=dtype) / 6, random_weights(7, 2, dtype)
    target, constants = random_targets(7, 37, kind, ignored=[3]), random_constants(37)
    for names in [(), ("class_weight",), ("margin",), ("class_weight", "margin")]:
        chosen = {name: constants[name] for name in names}
        for gamma in (0.0, 0.5, 2.0):
            for smoothing in (0.0, 0.1):
                numbers = {"gamma": gamma, "label_smoothing": smoothing}
                check(close, logits, Rows(target, random_table(2, 37), weights, **chosen, **numbers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_weight", [False, True])
def test_it_is_pytorchs_cross_entropy(kind, smoothing, with_weight, close):
    logits = random_logits(6, 1, 9).requires_grad_()
    target, class_weight = random_targets(6, 9, kind), random_constants(9)["class_weight"]
    class_weight = class_weight if with_weight else None
    truth = F.cross_entropy(
        logits[:, 0], target, weight=class_weight, label_smoothing=smoothing, reduction="none"
    )
    truth.sum().backward()
    out, logits, gradient = torch.empty_like(logits), logits.detach(), logits.grad
    losses, _ = forward(logits, Rows(target, class_weight=class_weight, label_smoothing=smoothing), out)
    close(losses, truth)
    close(out, gradient)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strides(memory, kind, dtype, close):
    weighted(close, 5, 3, 12, dtype, memory, kind)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_long_rows(memory, kind, close):
    weighted(close, 5, 3, 20, torch.float32, memory, kind)


@pytest.mark.parametrize("memory", MEMORY[1:])
def test_gradient_has_its_own_strides(memory, close):
    logits, target = random_logits(4, 3, 6), random_target(4, 6)
    check(close, logits, Rows(target), memory)
    check(close, like(logits, memory), Rows(target))


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2)])
def test_stride_zero(dims, close):
    shape = [1 if dim in dims else size for dim, size in enumerate((4, 3, 6))]
    logits = random_logits(*shape).expand(4, 3, 6)
    check(close, logits, Rows(random_target(1, 6).expand(4), random_table(3, 6)))
    rows = Rows(random_target(4, 6), random_table(1, 6).expand(3, 6), random_weights(4, 1).expand(4, 3))
    check(close, logits, rows)
    _, state = forward(logits, rows)
    out, upstream = torch.empty(4, 3, 6, dtype=torch.float64), torch.full((1,), 0.5).expand(4)
    backward(logits, rows, upstream, state, out)
    close(out, expected(logits, rows)[1] / 2)


def test_target_of_any_memory(close):
    """Also 8 bytes off the alignment that loads of several elements need."""
    logits = random_logits(6, 3, 5)
    for target in (random_target(7, 5)[1:], random_target(12, 5)[::2], random_target(1, 5).expand(6)):
        check(close, logits, Rows(target))
    wide = random_probabilities(12, 10, "dense")
    for target in (wide[::2, ::2], random_probabilities(5, 6, "mixup").T, wide[:1, :5].expand(6, 5)):
        check(close, logits, Rows(target))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_experts_in_several_tensors(dtype, kind, close):
    """Of any strides each, as if they were stacked."""
    sizes = [(1, "classes first"), (2, "slice"), (1, "every other")]
    logits = [like(random_logits(6, k, 20, dtype=dtype), memory) for k, memory in sizes]
    rows = Rows(random_targets(6, 20, kind, ignored=[1]), random_table(4, 20), random_weights(6, 4, dtype))
    check(close, logits, rows)
    check(close, logits, rows._replace(**random_constants(20), gamma=0.5), "experts first")
    # One of them may need no gradient.
    outs = [torch.empty_like(logits[0]), None, torch.empty_like(logits[2])]
    losses, state = forward(logits, rows, outs)
    truth, gradient = expected(logits, rows)
    close(losses, truth)
    for _ in range(2):
        close(outs[0], gradient[:, :1])
        close(outs[2], gradient[:, 3:])
        outs = [torch.empty_like(logits[0]), None, torch.empty_like(logits[2])]
        backward(logits, rows, torch.ones(6), state, outs)


# Every number of classes is compiled anew on a GPU.
@pytest.mark.long
@settings(max_examples=4 if HAS_GPU else 25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    memory=st.sampled_from(MEMORY),
    kind=st.sampled_from(KINDS),
    numbers=st.fixed_dictionaries(
        {
            "label_smoothing": st.sampled_from([0.0, 0.3, 1.0]),
            "gamma": st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]),
        }
    ),
    parts=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 9),
)
def test_whatever_comes(shape, dtype, memory, kind, numbers, parts, seed, close):
    torch.manual_seed(seed)
    num_samples, num_experts, num_classes = shape
    with_table, with_weights, with_constants, all_ignored = parts
    ignored = range(num_samples) if all_ignored else range(0, num_samples, 3)
    rows = Rows(
        random_targets(num_samples, num_classes, kind, dtype, ignored),
        random_table(num_experts, num_classes) if with_table else None,
        random_weights(num_samples, num_experts, dtype) if with_weights else None,
        **(random_constants(num_classes) if with_constants else {}),
        **numbers,
    )
    check(close, like(random_logits(*shape, dtype=dtype), memory), rows, memory)


def test_against_the_equations_in_plain_loops(close):
    logits, target = random_logits(6, 3, 4), random_target(6, 4, ignored=[2])
    table, weights = random_table(3, 4), random_weights(6, 3)
    losses, _ = forward(logits, Rows(target, table, weights, label_smoothing=0.2))
    close(
        losses,
        reference.losses(logits.tolist(), target.tolist(), table.tolist(), weights.tolist(), 0.2),
    )


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory", ["contiguous", "experts first", "classes first"])
@pytest.mark.parametrize("kind", ["indices", "mixup"])
def test_gradient_over_the_logits(dtype, memory, kind, close):
    logits = like(random_logits(5, 3, 37, dtype=dtype), memory)
    rows = Rows(
        random_targets(5, 37, kind, ignored=[1]),
        random_table(3, 37),
        random_weights(5, 3, dtype),
        label_smoothing=0.1,
        reduce=True,
    )
    losses, gradient = expected(logits, rows)
    place = logits.clone()
    total, _ = forward(place, rows, place)
    close(total, losses.sum())
    close(place, gradient)
    _, state = forward(logits, rows)
    place, upstream = logits.clone(), torch.full((5,), 1.0)
    backward(place, rows, upstream, state, place)
    close(place, gradient)


def test_gradient_is_rounded_once():
    """Also that of the true class, where rounding the softmax before subtracting 1 would cost digits."""
    logits, target = torch.zeros(1, 1, 3), torch.zeros(1, dtype=torch.int64)
    logits[0, 0, 0] = 9.0
    for rows in (Rows(target), Rows(torch.eye(3)[target])):
        _, gradient = expected(logits, rows)
        for dtype in (torch.bfloat16, torch.float16):
            out = torch.empty(1, 1, 3, dtype=dtype)
            forward(logits.to(dtype), rows, out)
            assert ((out.double() - gradient) / gradient).abs().max() < torch.finfo(dtype).eps


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", ["indices", "one-hot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_rows(kind, dtype, close):
    logits = random_logits(8, 2, 50, dtype=dtype)
    target = random_target(8, 50)
    target[0] = 40
    logits[0, :, :40], logits[0, :, 41:] = -INF, -INF  # whole blocks before and after the target's
    target[1] = 3
    logits[1, :, 16:] = -INF
    logits[2] = 7.0  # ties
    logits[3] = 1e4
    logits[4] = -1e4
    logits[5] = torch.linspace(-1e4, 1e4, 50)
    logits[6] = torch.where(torch.arange(50) == target[6], 1e4, -1e4)
    logits[7] = 1e4 + torch.arange(50)
    target = target if kind == "indices" else as_probabilities(target, 50)
    check(close, logits, Rows(target))
    losses, _ = forward(logits, Rows(target))
    assert torch.equal(losses[0], torch.zeros_like(losses[0]))
    # Smoothing asks for the logarithm of every class, so -inf has infinite loss.
    check(close, logits[2:], Rows(target[2:], label_smoothing=0.1))
    losses, _ = forward(logits, Rows(target, label_smoothing=0.1))
    assert losses[:2].tolist() == [INF, INF]
    # A target at -inf has it too, focused on or not.
    target = torch.tensor([23]) if kind == "indices" else as_probabilities(torch.tensor([23]), 50)
    for gamma in (0.0, 0.5, 2.0):
        losses, _ = forward(logits[1:2], Rows(target, gamma=gamma))
        assert losses.tolist() == [INF]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_masked_classes_add_nothing(kind, gamma, close):
    """Of probability 0 and at -inf."""
    logits = random_logits(5, 2, 50, dtype=torch.float32) / 6
    logits[:, :, 10:40], logits[:, :, 47:] = -INF, -INF
    target = random_targets(5, 50, kind)
    if kind == "indices":
        target %= 10
    else:
        target[:, 10:40], target[:, 47:], target[:, 0] = 0.0, 0.0, target[:, 0] + 0.1
    check(close, logits, Rows(target, **random_constants(50), gamma=gamma))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", ["indices", "one-hot"])
@pytest.mark.parametrize("gamma", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_focus_where_nothing_is_left_to_learn(kind, gamma, dtype, close):
    """The power of 1 - p has no derivative at 0 for gamma < 1; the loss has one."""
    logits, target = torch.zeros(3, 1, 20, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    logits[:, 0, 0] = torch.tensor([1e4, 60.0, 12.0])
    check(close, logits, Rows(target if kind == "indices" else as_probabilities(target, 20), gamma=gamma))


@pytest.mark.usefixtures("blocks")
def test_smoothing_keeps_the_digits_of_large_logits(close):
    logits = 1e4 + torch.randn(3, 2, 200)
    check(close, logits, Rows(random_target(3, 200), label_smoothing=1.0))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("column", [0, 20, 49])
def test_what_is_not_a_number_shows(kind, value, column, close):
    logits, target = random_logits(4, 2, 50, dtype=torch.float32), random_targets(4, 50, kind)
    good, gradient = expected(logits, Rows(target))
    logits[2, 1, column] = value
    out = torch.empty_like(logits)
    losses, state = forward(logits, Rows(target), out)
    assert losses.isnan().tolist() == [False, False, True, False]
    assert out[2, 1].isnan().all()
    kept = torch.tensor([0, 1, 3])
    close(losses[kept], good[kept])
    close(out[kept], gradient[kept])
    total, _ = forward(logits, Rows(target, reduce=True))
    assert total.isnan()
    backward(logits, Rows(target), torch.ones(4), state, out)
    assert out[2, 1].isnan().all()
    for gamma in (0.5, 2.0):
        losses, _ = forward(logits, Rows(target, **random_constants(50), gamma=gamma))
        assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_ignored_rows_may_hold_anything(kind, value, close):
    logits, target = random_logits(4, 2, 50, dtype=torch.float32), random_targets(4, 50, kind, ignored=[0, 2])
    logits[0], logits[2, 1, 30] = value, value
    for more in ({}, random_constants(50) | {"gamma": 2.0}):
        rows = Rows(target, None, torch.ones(4, 2), label_smoothing=0.1, **more)
        out = torch.empty_like(logits)
        total, state = forward(logits, rows._replace(reduce=True), out)
        losses, gradient = expected(logits, rows)
        close(total, losses.sum())
        close(out, gradient)
        assert not out[0].any()
        out = torch.empty_like(logits)
        backward(logits, rows, torch.ones(4), state, out)
        close(out, gradient)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("full", [False, True])
def test_a_target_that_is_no_class_is_nan(full, close):
    """And nothing is read or written beyond the classes."""
    num_samples, wrong = 6, [1, 2, 4, 5]
    target = random_target(num_samples, 40, ignored=[3])
    target[wrong] = torch.tensor([40, -1, 2**62, -(2**63)])
    constants = random_constants(40) if full else {}
    rows = Rows(target, random_table(2, 40), random_weights(num_samples, 2, torch.float32), **constants)
    logits = random_logits(num_samples, 2, 40, dtype=torch.float32)
    out = torch.empty_like(logits)
    losses, state = forward(logits, rows, out)
    assert losses.isnan().tolist() == [i in wrong for i in range(num_samples)]
    truth, gradient = expected(
        logits[[0, 3]], rows._replace(target=target[[0, 3]], weights=rows.weights[[0, 3]])
    )
    close(losses[[0, 3]], truth)
    close(out[[0, 3]], gradient)
    backward(logits, rows, torch.ones(num_samples), state, out)
    close(out[[0, 3]], gradient)
    total, _ = forward(logits, rows._replace(reduce=True))
    assert total.isnan()

    # What comes before the loss need not be a number, but ends well.
    samples = Samples(target, random_target(40, 2), 2)
    features, weight = torch.randn(num_samples, 2, 3), torch.randn(2, 40, 3)
    for angles in (Angles([logits], 30.0), Angles(features=features, weight=weight)):
        own, parts = kernels.statistics(angles, samples)
        for weights, _ in (kernels.weights(own, samples, parts), kernels.weights(angles, samples)):
            assert weights.shape == (num_samples, 2)
    assert kernels.count(target, None, constants.get("class_weight"), IGNORE).shape == ()


@pytest.mark.parametrize("kind", ["indices", "mixup"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_divisor_of_zero_is_one(dtype, kind, close):
    logits, target = random_logits(4, 2, 5), random_targets(4, 5, kind)
    losses, gradient = expected(logits, Rows(target))
    for divisor, effective in ((0.0, 1.0), (2.0, 2.0)):
        out = torch.empty_like(logits)
        rows = Rows(target, divisor=torch.tensor(divisor, dtype=dtype), reduce=True)
        total, _ = forward(logits, rows, out)
        close(total, losses.sum() / effective)
        close(out, gradient / effective)
        # A loss a sample is not divided, its gradient is.
        each, _ = forward(logits, rows._replace(reduce=False), out)
        close(each, losses)
        close(out, gradient / effective)


@pytest.mark.parametrize("ignore_index", [0, 3, 255, -1])
def test_any_index_may_be_ignored(ignore_index, close):
    target = torch.tensor([0, 1, 2, 3, 4, ignore_index])
    check(close, random_logits(6, 2, 5), Rows(target, ignore_index=ignore_index))
    check(close, random_logits(6, 2, 5), Rows(target, ignore_index=ignore_index, gamma=2.0))
    assert kernels.count(target, None, None, ignore_index) == (target != ignore_index).sum()


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["indices", "dense"])
def test_no_samples(reduce, dtype, kind):
    logits, groups = torch.empty(0, 3, 5, dtype=dtype), random_target(5, 2)
    target = random_targets(0, 5, kind)
    rows = Rows(target, random_table(3, 5), reduce=reduce)
    out = torch.empty_like(logits)
    losses, state = forward(logits, rows, out)
    assert losses.shape == (() if reduce else (0,))
    assert losses.dtype == compute_dtype(dtype)
    assert losses.sum() == 0
    backward(logits, rows, torch.ones(0), state, out)
    kernels.rescale_(out, torch.tensor(2.0))
    samples = Samples(target, groups, 2)
    sources = [Angles([logits], 30.0), Angles([logits[:, :1], logits[:, 1:]], 30.0)]
    if kind == "indices":
        sources.append(Angles(features=torch.empty(0, 3, 4), weight=torch.rand(3, 5, 4)))
    for source in sources:
        angles, parts = kernels.statistics(source, samples)
        assert torch.equal(parts.sum(0), torch.zeros_like(parts[0]))
        weights, divisor = kernels.weights(angles, samples, parts + 2, num_ranks=2)
        assert weights.shape == (0, 3)
        assert divisor == 2 * len(parts)  # of the other ranks' samples
    assert kernels.count(target, None, None, IGNORE) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_all_ignored(kind, close):
    logits, target = random_logits(4, 3, 6), random_targets(4, 6, kind, ignored=range(4))
    check(close, logits, Rows(target, label_smoothing=0.1))
    samples = Samples(target, random_target(6, 2), 2, torch.rand(4))
    angles, parts = kernels.statistics(Angles([logits], 30.0), samples)
    weights, divisor = kernels.weights(angles, samples, parts)
    assert not weights.any()
    assert divisor == 0
    assert kernels.count(target, torch.rand(4), torch.rand(6).double(), IGNORE) == 0


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_every_run(kind):
    logits, target = random_logits(13, 3, 50, dtype=torch.float32), random_targets(13, 50, kind)
    samples = Samples(target, random_target(50, 2), 2, torch.rand(13))
    runs = []
    for _ in range(2):
        out = torch.empty_like(logits)
        angles, parts = kernels.statistics(Angles([logits], 30.0), samples)
        weights, divisor = kernels.weights(angles, samples, parts)
        total, state = forward(logits, Rows(target, None, weights, divisor, reduce=True), out)
        runs.append((weights, divisor, total, state, out))
    assert all(map(torch.equal, *runs))


def angles_to_every_class(angles):
    """Radians ``[N, K, C]`` in float64; given ones ``[N, K, 1]``."""
    if angles.angles is not None:
        return angles.angles[:, :, None].double()
    if angles.features is not None:
        features, weight = angles.features.tolist(), angles.weight.tolist()
        return torch.tensor(
            [
                [[reference.angle(f, w) for w in weight[k]] for k, f in enumerate(sample)]
                for sample in features
            ],
            dtype=torch.float64,
        )
    return (torch.cat(list(angles.cosines), dim=1).double() / angles.scale).clamp(-1, 1).acos()


def check_weights(close, angles, samples, num_experts):
    """Eqs. 7 and 8 against float64."""
    num_classes = len(samples.group_index)
    q = as_probabilities(samples.target, num_classes, samples.ignore_index)
    counted = q if samples.sample_weight is None else q * samples.sample_weight.double()[:, None]
    radians = angles_to_every_class(angles).expand(-1, -1, num_classes)
    radians = torch.where(q[:, None] == 0, 0.0, radians)
    of_group = torch.arange(samples.num_groups)[:, None] == samples.group_index
    sums = torch.einsum("nc,nkc,gc->gk", counted, radians, of_group.double())
    amounts = torch.einsum("nc,gc->g", counted, of_group.double())
    references = sums / torch.where(amounts > 0, amounts, 1.0)[:, None]
    excess = (radians - references[samples.group_index].T).clamp(min=0)
    expected = (counted[:, None] * (1 + excess)).sum(dim=2)

    given, parts = kernels.statistics(angles, samples)
    assert parts.dtype == torch.float64
    assert parts.shape[1:] == (samples.num_groups, num_experts + 1)
    dtypes = [
        v.dtype for v in [*angles.cosines, angles.features, angles.weight, angles.angles] if v is not None
    ]
    exact = torch.float64 if torch.float64 in dtypes else torch.float32
    if not samples.target.is_floating_point():
        kept = samples.target != samples.ignore_index
        assert given.angles.dtype == exact
        close(given.angles[kept], radians.sum(2)[kept] if angles.angles is None else angles.angles[kept])
        if samples.sample_weight is None:
            assert torch.equal(parts.sum(0)[:, -1], amounts)
    close(parts.sum(0)[:, :-1], sums, dtype=exact)
    close(parts.sum(0)[:, -1], amounts, dtype=exact)

    found = [(kernels.weights(angles, samples), 1)]  # both equations at once
    for each in (parts, parts.sum(0, keepdim=True)):
        found += [(kernels.weights(given, samples, each, num_ranks), num_ranks) for num_ranks in (1, 2)]
    for (weights, divisor), num_ranks in found:
        assert weights.dtype == exact
        assert weights.shape == (len(q), num_experts)
        close(weights, expected)
        assert divisor.dtype == torch.float64
        close(divisor, amounts.sum() / num_ranks, dtype=exact)


# On a GPU each type and each number of experts is compiled anew, for all memory: not every pair of them.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(k, dtype) for k in (2, 3, 5) for dtype in (DTYPES if k == 3 or not HAS_GPU else [torch.float32])],
)
def test_weights_from_logits(dtype, num_experts, kind, close):
    for memory in MEMORY:
        logits = like(1.1 * random_logits(9, num_experts, 6, dtype=dtype), memory)  # some beyond the scale
        target = random_targets(9, 6, kind, dtype, ignored=[4])
        logits[4] = NAN
        samples = Samples(target, random_target(6, num_experts - 1), num_experts - 1)
        check_weights(close, Angles([logits], 30.0), samples, num_experts)
        experts = [logits[:, :1], like(logits[:, 1:], memory)]
        samples = samples._replace(sample_weight=3 * torch.rand(9, dtype=dtype))
        check_weights(close, Angles(experts, 30.0), samples, num_experts)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_from_long_rows(kind, close):
    logits, target = random_logits(9, 3, 100, dtype=torch.float32), random_targets(9, 100, kind, ignored=[0])
    samples = Samples(target, random_target(100, 4), 5, torch.randint(3, (18,)).float()[::2])
    check_weights(close, Angles([logits], 30.0), samples, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_from_angles(dtype, close):
    group_index = torch.tensor([0, 0, 1, 3])  # group 2 has no class
    for angles in (
        torch.rand(9, 5, dtype=dtype),
        torch.rand(5, 9, dtype=dtype).T,
        torch.rand(9, 1, dtype=dtype).expand(9, 5),
    ):
        target = random_target(9, 3, ignored=[0])
        for ignored in (target, torch.full_like(target, IGNORE)):
            check_weights(close, Angles(angles=angles), Samples(ignored, group_index, 4), 5)
            check_weights(close, Angles(angles=angles), Samples(ignored, group_index, 4, torch.rand(9)), 5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_from_features(dtype, weight_dtype, close):
    for memory in MEMORY:
        features = like(torch.randn(9, 3, 21).to(dtype), memory)
        weight = like(torch.randn(3, 6, 21).to(weight_dtype), memory)
        features[2], weight[1, 0] = 0.0, 0.0
        features[4] = NAN
        samples = Samples(random_target(9, 6, ignored=[4]), random_target(6, 2), 2, torch.rand(9))
        check_weights(close, Angles(features=features, weight=weight), samples, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_on_their_class_centre(dtype):
    """Their cosine may round beyond 1."""
    features = torch.randn(200, 2, 5, dtype=dtype)
    weight = torch.cat([features, -3 * features]).transpose(0, 1)
    for target, angle in ((torch.arange(200), 0.0), (torch.arange(200, 400), torch.pi)):
        samples = Samples(target, torch.zeros(400, dtype=torch.int64), 1)
        given, _ = kernels.statistics(Angles(features=features, weight=weight), samples)
        assert (given.angles - angle).abs().max() <= 1e-3


def test_an_angle_that_is_nan_stays_so():
    logits = torch.tensor([0.5, NAN, 2.0, -2.0])[:, None, None]
    target = torch.zeros(4, dtype=torch.int64)
    samples = Samples(target, target[:1], 1)
    given, parts = kernels.statistics(Angles([logits]), samples)
    assert given.angles.isnan().flatten().tolist() == [False, True, False, False]
    assert given.angles[2:].flatten().tolist() == pytest.approx([0.0, torch.pi])
    weights, _ = kernels.weights(given, samples, parts)
    assert weights.isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 4.8e-7)])
def test_arc_cosine(dtype, tolerance):
    near = 10.0 ** -torch.arange(0, 18, 0.25, dtype=torch.float64)
    cosines = torch.cat([torch.linspace(-1, 1, 401, dtype=torch.float64), near, 1 - near, 0.5 + near / 4])
    cosines = torch.cat([cosines, -cosines]).to(dtype)
    target = torch.zeros(len(cosines), dtype=torch.int64)
    given, _ = kernels.statistics(Angles([cosines[:, None, None]]), Samples(target, target[:1], 1))
    assert (given.angles[:, 0].double() - cosines.double().acos()).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_count(kind, dtype):
    target = random_targets(9, 5, kind, dtype, ignored=[0, 4])
    q, weight = as_probabilities(target, 5), torch.rand(18).to(dtype)[::2]
    class_weight = random_constants(5)["class_weight"]
    for sample_weight in (None, weight):
        for factors in (None, class_weight):
            expected = q @ (torch.ones(5, dtype=torch.float64) if factors is None else factors)
            expected = (expected * (1 if sample_weight is None else sample_weight.double())).sum()
            result = kernels.count(target, sample_weight, factors, IGNORE)
            assert result.dtype == torch.float64
            assert result.shape == ()
            assert result.item() == pytest.approx(expected.item(), rel=1e-6)
    if kind == "indices":
        assert kernels.count(target, None, None, IGNORE) == 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
def test_rescale(dtype, memory, close):
    gradient = like(random_logits(5, 3, 100, dtype=dtype), memory)
    expected = gradient.double() / 3
    factor = torch.tensor(1 / 3, dtype=compute_dtype(dtype))
    before = gradient
    kernels.rescale_(gradient, factor)
    assert gradient is before
    close(gradient, expected)
    kernels.rescale_(gradient, torch.ones_like(factor))
    close(gradient, expected)
