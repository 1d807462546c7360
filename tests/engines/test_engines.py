"""What every engine must compute, against float64; Triton's on a GPU where there is one, else interpreted."""

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import HAS_GPU, on_gpu
from lgla_losses import functional
from lgla_losses.kernels import chunked, native

try:
    from lgla_losses.kernels import triton
except ImportError:
    triton = None

GPU = "cuda" if HAS_GPU else "cpu"
INF, NAN = float("inf"), float("nan")
IGNORE = -100
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: The engine under test.
kernels = chunked

# NumPy, in the interpreter, warns of inf - inf where a GPU gives NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


#: By name; all but the C library's run on a GPU where there is one.
ENGINES = ["native", on_gpu("chunked"), on_gpu("triton")]


@pytest.fixture(params=ENGINES, autouse=True)
def _engine(request):
    global kernels
    kernels = {"native": native, "chunked": chunked, "triton": triton}[request.param]
    if kernels is None:
        pytest.skip("needs Triton")
    with torch.device("cpu" if kernels is native else GPU):
        yield


@pytest.fixture(autouse=True)
def _poison(fresh_memory_is_nan):
    """An element never written fails its test."""


@pytest.fixture
def blocked(monkeypatch):
    """Small batches in as many parts as large ones."""
    if kernels is native:
        monkeypatch.setattr(native, "_WORTH_THREADS", 1)
    elif kernels is chunked:
        monkeypatch.setattr(chunked, "_CPU_CHUNK", 64)
        monkeypatch.setattr(chunked, "_CHUNK", 64)
    else:
        monkeypatch.setattr(triton, "forward_tile", lambda *_: triton.Tile(2, 16, 4))
        monkeypatch.setattr(triton, "backward_tile", lambda *_: triton.Tile(2, 16, 4))


def random_logits(*shape, dtype=torch.float64):
    return (60 * torch.rand(*shape, dtype=torch.float64) - 30).to(dtype)


def random_target(num_samples, num_classes, ignored=()):
    target = torch.randint(num_classes, (num_samples,))
    target[list(ignored)] = IGNORE
    return target


def random_table(num_experts, num_classes):
    return -9 * torch.rand(num_experts, num_classes, dtype=torch.float64)


def like(values, memory):
    """The same values in memory of another layout."""
    n, k, c = values.shape
    view = {
        "contiguous": lambda: torch.empty_like(values, memory_format=torch.contiguous_format),
        "experts first": lambda: values.new_zeros(k, n, c).transpose(0, 1),
        "classes first": lambda: values.new_zeros(c, k, n).permute(2, 1, 0),
        "slice": lambda: values.new_zeros(n + 1, k + 2, c + 3)[1:, 1:-1, 1:-2],
        "every other": lambda: values.new_zeros(2 * n, k, 2 * c)[::2, :, ::2],
    }[memory]()
    return view.copy_(values)


MEMORY = ["contiguous", "experts first", "classes first", "slice", "every other"]


def expected(logits, target, table=None, weights=None, smoothing=0.0, upstream=None):
    """Losses ``[N]`` in float64, and the gradient of their sum, or for an upstream gradient."""
    ignored = target == IGNORE
    leaf = logits.detach().double().masked_fill(ignored[:, None, None], 0.0).requires_grad_()
    table = torch.zeros(logits.shape[1:]) if table is None else table
    losses = functional.lgla_loss(
        leaf, target, table, None if weights is None else weights.double(), label_smoothing=smoothing
    )
    losses.backward(torch.ones_like(losses) if upstream is None else upstream.double())
    return losses.detach(), leaf.grad


def forward(logits, target, table=None, weights=None, divisor=None, *, smoothing=0.0, reduce=False, out=None):
    return kernels.forward(
        logits, target, table, weights, divisor,
        ignore_index=IGNORE, label_smoothing=smoothing, reduce=reduce, gradient=out,
    )  # fmt: skip


def backward(logits, target, table, weights, upstream, state, *, smoothing=0.0, out):
    kernels.backward(
        logits, target, table, weights, upstream, state,
        ignore_index=IGNORE, label_smoothing=smoothing, gradient=out,
    )  # fmt: skip


def check(close, logits, target, table=None, weights=None, smoothing=0.0, memory="contiguous"):
    """All that the engine offers, against float64."""
    divisor = torch.tensor(3.0, dtype=functional.compute_dtype(logits.dtype))
    before = logits.clone()
    losses, gradient = expected(logits, target, table, weights, smoothing)

    out = like(torch.full_like(logits, NAN), memory)
    total, _ = forward(logits, target, table, weights, divisor, smoothing=smoothing, reduce=True, out=out)
    assert total.shape == ()
    assert total.dtype == divisor.dtype
    close(total, losses.sum() / 3)
    close(out, gradient / 3)

    each, state = forward(logits, target, table, weights, smoothing=smoothing)
    assert each.dtype == divisor.dtype
    assert not state.isnan().any()
    close(each, losses)
    assert torch.equal(each[target == IGNORE], torch.zeros_like(each[target == IGNORE]))
    assert torch.equal(logits, before)

    upstream = torch.randn(len(target), dtype=divisor.dtype)
    _, gradient = expected(logits, target, table, weights, smoothing, upstream)
    out = like(torch.full_like(logits, NAN), memory)
    backward(logits, target, table, weights, upstream, state, smoothing=smoothing, out=out)
    close(out, gradient)
    assert torch.equal(out[target == IGNORE], torch.zeros_like(out[target == IGNORE]))


def weighted(close, num_samples, num_experts, num_classes, dtype, smoothing=0.1, memory="contiguous"):
    logits = like(random_logits(num_samples, num_experts, num_classes, dtype=dtype), memory)
    target = random_target(num_samples, num_classes, ignored=[num_samples // 2])
    weights = 1 + torch.rand(num_samples, num_experts).to(functional.compute_dtype(dtype))
    check(close, logits, target, random_table(num_experts, num_classes), weights, smoothing, memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 2, 5, 100, 1000])
def test_losses_and_gradients(dtype, num_classes, close):
    weighted(close, 7, 3, num_classes, dtype)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [17, 48, 100])
def test_long_rows(dtype, num_classes, close):
    weighted(close, 5, 2, num_classes, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beyond_the_limit(dtype, close):
    weighted(close, 2, 1, 20_000, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5, 4), (3, 2, 7), (33, 5, 6)])
def test_shapes(shape, close):
    weighted(close, *shape, torch.float32)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strides(memory, dtype, close):
    weighted(close, 5, 3, 12, dtype, memory=memory)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("memory", MEMORY)
def test_strides_of_long_rows(memory, close):
    weighted(close, 5, 3, 20, torch.float32, memory=memory)


@pytest.mark.parametrize("memory", MEMORY[1:])
def test_gradient_has_its_own_strides(memory, close):
    logits, target = random_logits(4, 3, 6), random_target(4, 6)
    check(close, logits, target, memory=memory)
    check(close, like(logits, memory), target)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2)])
def test_stride_zero(dims, close):
    shape = [1 if dim in dims else size for dim, size in enumerate((4, 3, 6))]
    logits = random_logits(*shape).expand(4, 3, 6)
    check(close, logits, random_target(1, 6).expand(4), random_table(3, 6))
    _, state = forward(logits, random_target(4, 6))
    out = torch.empty(4, 3, 6, dtype=torch.float64)
    target, upstream = random_target(4, 6), torch.full((1,), 0.5).expand(4)
    backward(logits, target, None, None, upstream, state, out=out)
    close(out, expected(logits, target, upstream=upstream)[1])


def test_target_of_any_memory(close):
    """Also 8 bytes off the alignment that loads of several elements need."""
    logits = random_logits(6, 3, 5)
    for target in (random_target(7, 5)[1:], random_target(12, 5)[::2], random_target(1, 5).expand(6)):
        check(close, logits, target)


# Every number of classes is compiled anew on a GPU.
@pytest.mark.long
@settings(max_examples=4 if HAS_GPU else 25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    memory=st.sampled_from(MEMORY),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 9),
)
def test_whatever_comes(shape, dtype, memory, smoothing, parts, seed, close):
    torch.manual_seed(seed)
    num_samples, num_experts, num_classes = shape
    with_table, with_weights, all_ignored = parts
    ignored = range(num_samples) if all_ignored else range(0, num_samples, 3)
    weights = 1 + torch.rand(num_samples, num_experts)
    check(
        close,
        like(random_logits(*shape, dtype=dtype), memory),
        random_target(num_samples, num_classes, ignored),
        random_table(num_experts, num_classes) if with_table else None,
        weights.to(functional.compute_dtype(dtype)) if with_weights else None,
        smoothing,
        memory,
    )


def test_against_the_equations_in_plain_loops(close):
    logits, target = random_logits(6, 3, 4), random_target(6, 4, ignored=[2])
    table, weights = random_table(3, 4), 1 + torch.rand(6, 3, dtype=torch.float64)
    losses, _ = forward(logits, target, table, weights, smoothing=0.2)
    close(
        losses,
        reference.losses(logits.tolist(), target.tolist(), table.tolist(), weights.tolist(), 0.2),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("memory", ["contiguous", "experts first", "classes first"])
def test_gradient_over_the_logits(dtype, long, memory, close, request):
    if long:
        request.getfixturevalue("blocked")
    logits = like(random_logits(5, 3, 37, dtype=dtype), memory)
    target, table = random_target(5, 37, ignored=[1]), random_table(3, 37)
    weights = 1 + torch.rand(5, 3).to(functional.compute_dtype(dtype))
    losses, gradient = expected(logits, target, table, weights, 0.1)
    place = logits.clone()
    total, _ = forward(place, target, table, weights, smoothing=0.1, reduce=True, out=place)
    close(total, losses.sum())
    close(place, gradient)
    _, state = forward(logits, target, table, weights, smoothing=0.1)
    place, upstream = logits.clone(), torch.full((5,), 1.0)
    backward(place, target, table, weights, upstream, state, smoothing=0.1, out=place)
    close(place, gradient)


def test_gradient_is_rounded_once():
    """Also that of the true class, where rounding the softmax before subtracting 1 would cost digits."""
    logits, target = torch.zeros(1, 1, 3), torch.zeros(1, dtype=torch.int64)
    logits[0, 0, 0] = 9.0
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(1, 1, 3, dtype=dtype)
        forward(logits.to(dtype), target, out=out)
        _, gradient = expected(logits, target)
        assert ((out.double() - gradient) / gradient).abs().max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_rows(long, dtype, close, request):
    if long:
        request.getfixturevalue("blocked")
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
    check(close, logits, target)
    losses, _ = forward(logits, target)
    assert torch.equal(losses[0], torch.zeros_like(losses[0]))
    # Smoothing asks for the logarithm of every class, so -inf has infinite loss.
    check(close, logits[2:], target[2:], smoothing=0.1)
    losses, _ = forward(logits, target, smoothing=0.1)
    assert losses[:2].tolist() == [INF, INF]


@pytest.mark.parametrize("long", [False, True])
def test_smoothing_keeps_the_digits_of_large_logits(long, close, request):
    if long:
        request.getfixturevalue("blocked")
    logits = 1e4 + torch.randn(3, 2, 200)
    check(close, logits, random_target(3, 200), smoothing=1.0)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("column", [0, 20, 49])
def test_what_is_not_a_number_shows(long, value, column, close, request):
    if long:
        request.getfixturevalue("blocked")
    logits, target = random_logits(4, 2, 50, dtype=torch.float32), random_target(4, 50)
    good, gradient = expected(logits, target)
    logits[2, 1, column] = value
    out = torch.empty_like(logits)
    losses, state = forward(logits, target, out=out)
    assert losses.isnan().tolist() == [False, False, True, False]
    assert out[2, 1].isnan().all()
    kept = torch.tensor([0, 1, 3])
    close(losses[kept], good[kept])
    close(out[kept], gradient[kept])
    total, _ = forward(logits, target, reduce=True)
    assert total.isnan()
    backward(logits, target, None, None, torch.ones(4), state, out=out)
    assert out[2, 1].isnan().all()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_ignored_rows_may_hold_anything(long, value, close, request):
    if long:
        request.getfixturevalue("blocked")
    logits, target = random_logits(4, 2, 50, dtype=torch.float32), random_target(4, 50, ignored=[0, 2])
    logits[0], logits[2, 1, 30] = value, value
    out, weights = torch.empty_like(logits), torch.ones(4, 2)
    total, state = forward(logits, target, None, weights, smoothing=0.1, reduce=True, out=out)
    losses, gradient = expected(logits, target, smoothing=0.1)
    close(total, losses.sum())
    close(out, gradient)
    assert not out[0].any()
    out = torch.empty_like(logits)
    backward(logits, target, None, weights, torch.ones(4), state, smoothing=0.1, out=out)
    close(out, gradient)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_samples(reduce, dtype):
    logits = torch.empty(0, 3, 5, dtype=dtype)
    target = torch.empty(0, dtype=torch.int64)
    out = torch.empty_like(logits)
    losses, state = forward(logits, target, random_table(3, 5), reduce=reduce, out=out)
    assert losses.shape == (() if reduce else (0,))
    assert losses.dtype == functional.compute_dtype(dtype)
    assert losses.sum() == 0
    upstream = torch.ones(0)
    backward(logits, target, None, None, upstream, state, out=out)
    kernels.rescale_(out, torch.tensor(2.0))
    angles, partial = kernels.statistics(
        logits, target, random_target(5, 2), 2, scale=30.0, ignore_index=IGNORE
    )
    assert angles.shape == (0, 3)
    assert torch.equal(partial.sum(0), torch.zeros_like(partial[0]))
    weights, divisor = kernels.weights(
        angles, target, random_target(5, 2), partial + 2, ignore_index=IGNORE, num_ranks=2
    )
    assert weights.shape == (0, 3)
    assert divisor == 2  # of the other ranks' samples


@pytest.mark.parametrize("long", [False, True])
def test_same_bits_in_every_run(long, request):
    if long:
        request.getfixturevalue("blocked")
    logits, target = random_logits(13, 3, 50, dtype=torch.float32), random_target(13, 50)
    group_index = random_target(50, 2)
    runs = []
    for _ in range(2):
        out = torch.empty_like(logits)
        weights, divisor = kernels.weights_of(logits, target, group_index, 2, scale=30.0, ignore_index=IGNORE)
        total, state = forward(logits, target, None, weights, divisor, reduce=True, out=out)
        runs.append((weights, divisor, total, state, out))
    assert all(map(torch.equal, *runs))


def check_weights(close, source, target, group_index, num_groups, scale):
    """Statistics and weights, in two launches and where it fits in one, against the equations."""
    angles = source
    if scale is not None:
        classes = torch.where(target == IGNORE, 0, target)
        angles = functional.angles_from_logits(source, classes, scale)
    group = functional.target_groups(target, group_index, IGNORE)
    statistics = functional.aaw_statistics(angles, group, num_groups)
    expected = functional.aaw_weights(angles, group, statistics)
    kept = target != IGNORE

    given, partial = kernels.statistics(
        source, target, group_index, num_groups, scale=scale, ignore_index=IGNORE
    )
    assert given.dtype == functional.compute_dtype(source.dtype)
    assert partial.dtype == torch.float64
    close(given[kept], angles[kept])
    assert torch.equal(partial.sum(0)[:, -1], statistics[:, -1])
    close(partial.sum(0), statistics, dtype=given.dtype)
    results = [kernels.weights(given, target, group_index, partial, ignore_index=IGNORE, num_ranks=1)]
    total = partial.sum(0, keepdim=True)
    results.append(kernels.weights(given, target, group_index, total, ignore_index=IGNORE, num_ranks=1))
    results.append(
        kernels.weights_of(source, target, group_index, num_groups, scale=scale, ignore_index=IGNORE)
    )
    for weights, divisor in results:
        assert weights.dtype == given.dtype
        close(weights, expected)
        assert divisor == max(1, kept.sum())


# On a GPU each type and each number of experts is compiled anew, for all memory: not every pair of them.
@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(k, dtype) for k in (2, 3, 5) for dtype in (DTYPES if k == 3 or not HAS_GPU else [torch.float32])],
)
def test_weights_from_logits(dtype, num_experts, close):
    for memory in MEMORY:
        logits = like(1.1 * random_logits(9, num_experts, 6, dtype=dtype), memory)  # some beyond the scale
        target = random_target(9, 6, ignored=[4])
        logits[4] = NAN
        group_index = random_target(6, num_experts - 1)
        check_weights(close, logits, target, group_index, num_experts - 1, 30.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_from_angles(dtype, close):
    group_index = torch.tensor([0, 0, 1, 3])  # group 2 has no class
    for angles in (
        torch.rand(9, 5, dtype=dtype),
        torch.rand(5, 9, dtype=dtype).T,
        torch.rand(9, 1).expand(9, 5),
    ):
        target = random_target(9, 3, ignored=[0])
        check_weights(close, angles, target, group_index, 4, None)
        check_weights(close, angles, torch.full_like(target, IGNORE), group_index, 4, None)


def test_divisor_over_ranks():
    angles, target = torch.rand(4, 3), torch.tensor([0, 1, IGNORE, 1])
    group_index = torch.tensor([0, 1])
    _, partial = kernels.statistics(angles, target, group_index, 2, scale=None, ignore_index=IGNORE)
    _, divisor = kernels.weights(angles, target, group_index, 2 * partial, ignore_index=IGNORE, num_ranks=2)
    assert divisor == 3
    _, divisor = kernels.weights(angles, target, group_index, 0 * partial, ignore_index=IGNORE, num_ranks=2)
    assert divisor == 0.5


def test_an_angle_that_is_nan_stays_so():
    logits = torch.tensor([0.5, NAN, 2.0, -2.0])[:, None, None]
    target = torch.zeros(4, dtype=torch.int64)
    angles, _ = kernels.statistics(logits, target, target[:1], 1, scale=1.0, ignore_index=IGNORE)
    assert angles.isnan().flatten().tolist() == [False, True, False, False]
    assert angles[2:].flatten().tolist() == pytest.approx([0.0, torch.pi])
    weights, _ = kernels.weights_of(logits, target, target[:1], 1, scale=1.0, ignore_index=IGNORE)
    assert weights.isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 4.8e-7)])
def test_arc_cosine(dtype, tolerance):
    near = 10.0 ** -torch.arange(0, 18, 0.25, dtype=torch.float64)
    cosines = torch.cat([torch.linspace(-1, 1, 401, dtype=torch.float64), near, 1 - near, 0.5 + near / 4])
    cosines = torch.cat([cosines, -cosines]).to(dtype)
    target = torch.zeros(len(cosines), dtype=torch.int64)
    angles, _ = kernels.statistics(
        cosines[:, None, None], target, target[:1], 1, scale=1.0, ignore_index=IGNORE
    )
    assert (angles[:, 0].double() - cosines.double().acos()).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
def test_rescale(dtype, memory, close):
    gradient = like(random_logits(5, 3, 100, dtype=dtype), memory)
    expected = gradient.double() / 3
    factor = torch.tensor(1 / 3, dtype=functional.compute_dtype(dtype))
    before = gradient
    kernels.rescale_(gradient, factor)
    assert gradient is before
    close(gradient, expected)
    kernels.rescale_(gradient, torch.ones_like(factor))
    close(gradient, expected)
