"""LinearLGLALoss is LGLALoss of the logits it never holds."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lgla_losses import LGLALoss, LinearLGLALoss
from lgla_losses.functional import compute_dtype, unit_vectors
from lgla_losses.kernels import chunked, linear, native

COUNTS = [90, 40, 9, 5, 2, 1]
TARGET = torch.tensor([0, 3, 1, -100, 5, 2, 0])


@pytest.fixture(params=["one chunk", "chunks", "chunks with gaps between the rows"])
def _chunks(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(linear, "_LEAST_SAMPLES", 3)
        monkeypatch.setattr(linear, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(linear, "_WIDENED", 10)
    monkeypatch.setattr(linear, "_ROW_BYTES", {"cpu": 64, "cuda": 64} if "gaps" in request.param else {})


def inputs(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    features, weight, bias = torch.randn(7, 3, 5), torch.randn(3, 6, 5), torch.randn(3, 6)
    return [v.to(device, dtype).requires_grad_() for v in (features, weight, bias)]


def logits_of(features, weight, bias, scale):
    """As a careful user computes them."""
    if scale is None:
        return torch.einsum("nkd,kcd->nkc", features, weight) + (0 if bias is None else bias)
    return scale * torch.einsum("nkd,kcd->nkc", unit_vectors(features), unit_vectors(weight))


def results(loss, *leaves):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    wanted = [v for v in leaves if v is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream)]


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("head", ["linear", "without bias", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("aaw", [True, False])
def test_it_is_the_loss_of_the_logits(backend, head, reduction, aaw, device):
    scale = 30.0 if head == "cosine" else None
    features, weight, bias = inputs(device=device)
    bias = bias if head == "linear" else None
    target = TARGET.to(device)
    options = {"reduction": reduction, "aaw": aaw, "label_smoothing": 0.1}
    criterion = LinearLGLALoss(COUNTS, scale=scale, backend=backend, **options).to(device)
    plain = LGLALoss(COUNTS, scale=scale, backend="reference", **options).to(device)
    ours = results(criterion(features, weight, target, bias), features, weight, bias)
    logits = logits_of(features, weight, bias, scale)
    angles = {"features": features, "weight": weight}
    expected = results(plain(logits, target, **angles), features, weight, bias)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("learns", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_each_input_may_be_the_one_that_learns(learns):
    leaves = inputs()
    whole = results(LinearLGLALoss(COUNTS)(*leaves[:2], TARGET, leaves[2]), *leaves)[1:]
    some = [v.detach().requires_grad_(i in learns) for i, v in enumerate(leaves)]
    loss = LinearLGLALoss(COUNTS)(*some[:2], TARGET, some[2])
    loss.backward(torch.tensor(0.5))
    for i, (leaf, expected) in enumerate(zip(some, whole, strict=True)):
        if i in learns:
            torch.testing.assert_close(leaf.grad, expected)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("_chunks", ["one chunk", "chunks"], indirect=True)
@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("scale", [None, 30.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_and_second_derivatives(scale, reduction):
    """Without AAW, whose angles move with the features and carry no gradient."""
    features, weight, bias = inputs()
    criterion = LinearLGLALoss(COUNTS, scale=scale, reduction=reduction, aaw=False)

    def loss(*leaves):
        return criterion(*leaves[:2], TARGET, *leaves[2:])

    leaves = (features, weight) if scale else (features, weight, bias)
    assert gradcheck(loss, leaves)
    assert gradgradcheck(loss, leaves)


def test_a_retained_graph_gives_the_gradients_again():
    features, weight, bias = inputs()
    loss = LinearLGLALoss(COUNTS)(features, weight, TARGET, bias)
    first = torch.autograd.grad(loss, (features, weight, bias), retain_graph=True)
    kept = [v.clone() for v in first]
    for v in first:
        v.fill_(float("nan"))
    torch.testing.assert_close(list(torch.autograd.grad(loss, (features, weight, bias))), kept)


@pytest.mark.parametrize("engine", [native, chunked], ids=["native", "chunked"])
def test_no_more_than_a_chunk_of_logits_exists(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "_LEAST_SAMPLES", 4)
    monkeypatch.setattr(linear, "_CHUNK_BYTES", {"cpu": 4 * 6 * 8})
    monkeypatch.setattr(native, "LIBRARY", native.LIBRARY if engine is native else None)
    original = engine.forward

    def spy(logits, *args):
        seen.append((tuple(logits[0].shape), logits[0].data_ptr()))
        return original(logits, *args)

    monkeypatch.setattr(engine, "forward", spy)
    features, weight, _ = inputs()
    LinearLGLALoss(COUNTS)(features, weight, TARGET).backward()
    assert [shape for shape, _ in seen] == 3 * [(4, 1, 6), (3, 1, 6)]
    assert len({pointer for _, pointer in seen}) == 1


@pytest.fixture(params=["float64", "float32", "bfloat16", "float16", "autocast"])
def precision(request):
    """The dtype of what the network gives, and what it runs under."""
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield torch.float32
    else:
        yield getattr(torch, request.param)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("scale", [None, 30.0])
@pytest.mark.parametrize(
    ("reduction", "compiled"), [("mean", False), ("sum", False), ("none", False), ("mean", True)]
)
def test_an_empty_batch_or_one_of_ignored_samples_gives_zero_gradients(
    number, scale, reduction, compiled, precision, fresh_memory_is_nan
):
    """In half precision the weight's gradient was what its memory held before, up to 1e31 or NaN."""
    leaves = [v.detach().to(precision).requires_grad_() for v in inputs()[: 3 if scale is None else 2]]
    leaves[0] = leaves[0][:number].detach().requires_grad_()
    criterion = LinearLGLALoss(COUNTS, scale=scale, reduction=reduction)
    if compiled:
        torch.compiler.reset()
        criterion = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    loss = criterion(*leaves[:2], torch.full((number,), -100), *leaves[2:])
    loss.sum().backward()
    assert not loss.any()
    for leaf in leaves:
        assert not leaf.grad.any()


@pytest.mark.parametrize("shape", [(0, 3, 0), (2, 3, 0)])
def test_features_of_no_width_are_zeros(shape, fresh_memory_is_nan):
    features = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(3, 6, 0, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(3, 6, dtype=torch.bfloat16, requires_grad=True)
    LinearLGLALoss(COUNTS)(features, weight, TARGET[: shape[0]], bias).backward()
    assert bias.grad.isfinite().all()


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 30.0])
def test_error_is_at_most_plain_pytorchs(dtype, scale, monkeypatch):
    """Three-way, for the loss and both gradients; plain PyTorch makes the logits in the same dtype."""
    monkeypatch.setattr(linear, "_LEAST_SAMPLES", 8)
    counts = [int(500 * 100 ** (-j / 49)) for j in range(50)]
    features, weight = torch.randn(32, 3, 16).to(dtype), torch.randn(3, 50, 16).to(dtype)
    target = torch.randint(50, (32,))
    criterion = LinearLGLALoss(counts, scale=scale, aaw=False)
    plain = LGLALoss(counts, scale=scale, aaw=False, backend="reference")

    def run(loss_of, dtype):
        leaves = [v.to(dtype).requires_grad_() for v in (features, weight)]
        loss = loss_of(*leaves)
        # A loss scale, as float16 is trained with.
        gradients = torch.autograd.grad(1024 * loss, leaves)
        return [loss.detach().double(), *(v.double() / 1024 for v in gradients)]

    def naive(features, weight):
        if scale is not None:
            wide = compute_dtype(features.dtype)
            features, weight = (unit_vectors(v.to(wide)).to(v.dtype) for v in (features, weight))
            features = scale * features
        return plain(torch.einsum("nkd,kcd->nkc", features, weight), target)

    truth = run(naive, torch.float64)
    theirs = run(naive, dtype)
    ours = run(lambda f, w: criterion(f, w, target), dtype)
    for name, true, plainly, value in zip(("loss", "features", "weight"), truth, theirs, ours, strict=True):
        slack = (8 if name != "loss" else 4) * torch.finfo(torch.float32).eps
        slack = max(slack, torch.finfo(dtype).eps) if name != "loss" else slack
        error, allowed = (value - true).abs().max(), (plainly - true).abs().max()
        assert error <= 1.25 * allowed + slack * true.abs().max(), name


def test_weight_gradients_add_up_in_float32(monkeypatch):
    """Chunks of one sign add up to what bfloat16 would stop counting at."""
    monkeypatch.setattr(linear, "_LEAST_SAMPLES", 1)
    monkeypatch.setattr(linear, "_CHUNK_BYTES", {"cpu": 1})
    features = torch.ones(1024, 2, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(1024, dtype=torch.int64)
    LinearLGLALoss([1, 1], 2, aaw=False, adjustment="softmax", reduction="sum")(
        features, weight, target
    ).backward()
    assert weight.grad[:, 1, 0].tolist() == [512.0, 512.0]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("row_bytes", [1, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 30.0])
def test_many_chunks_in_half_precision_add_up(device, dtype, scale, row_bytes, at_once, monkeypatch):
    """Every way to add up the weight's gradient, and rows of an odd number of classes, against float64."""
    monkeypatch.setattr(linear, "_LEAST_SAMPLES", 16)
    monkeypatch.setattr(linear, "_CHUNK_BYTES", {device: 1})
    monkeypatch.setattr(linear, "_ROW_BYTES", {device: row_bytes})
    monkeypatch.setattr(linear, "_ADD_AT_ONCE", at_once)
    counts, target = list(range(131, 0, -1)), torch.randint(131, (100,)).to(device)
    rounded = [torch.randn(shape).to(device, dtype) for shape in ((100, 3, 64), (3, 131, 64))]
    leaves = [v.clone().requires_grad_() for v in rounded]
    exact = [v.double().requires_grad_() for v in rounded]

    criterion = LinearLGLALoss(counts, scale=scale, aaw=False, reduction="sum").to(device)
    loss = criterion(*leaves, target)
    truth = criterion(*exact, target)
    loss.backward()
    truth.backward()

    torch.testing.assert_close(loss.double(), truth, rtol=1e-2, atol=1e-2)
    for ours, expected in zip(leaves, exact, strict=True):
        error = (ours.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_16_bit_products_are_added_where_pytorch_can(device):
    """On a GPU PyTorch 2.11 can; before 2.7 and on a CPU the matrices are widened."""
    total = torch.full((9, 8), float("nan"), device=device)  # the first product overwrites it
    left, right = (torch.randn(shape).to(device, torch.bfloat16) for shape in ((9, 40), (40, 8)))
    product = (left.double() @ right.double()).cpu()
    linear.add_product(total, left, right, first=True)
    torch.testing.assert_close(total.double().cpu(), product, rtol=1e-5, atol=1e-4)
    linear.add_product(total, left, right, first=False)
    torch.testing.assert_close(total.double().cpu(), 2 * product, rtol=1e-5, atol=1e-4)


def test_autocast_makes_the_products_in_low_precision():
    features, weight, bias = inputs(torch.float32)
    criterion = LinearLGLALoss(COUNTS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(features, weight, TARGET, bias)
    gradients = torch.autograd.grad(loss, (features, weight, bias))
    assert loss.dtype == torch.float32
    assert [v.dtype for v in gradients] == 3 * [torch.float32]
    low = [v.detach().bfloat16().requires_grad_() for v in (features, weight, bias)]
    expected = criterion(low[0], low[1], TARGET, low[2])
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(gradients[1].bfloat16().float(), gradients[1])


def test_float64_features_under_autocast_are_told():
    features, weight, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="float64"):
        LinearLGLALoss(COUNTS)(features, weight.float(), TARGET)


def test_vmap_takes_gradients_of_single_samples():
    features, weight, _ = (v.detach() for v in inputs())
    criterion, target = LinearLGLALoss(COUNTS), TARGET.clamp(min=0)

    def loss(weight, features, target):
        return criterion(features[None], weight, target[None])

    gradients = torch.vmap(torch.func.grad(loss), (None, 0, 0))(weight, features, target)
    for gradient, sample in zip(gradients, zip(features, target, strict=True), strict=True):
        leaf = weight.clone().requires_grad_()
        loss(leaf, *sample).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-10)


def test_meta_tensors_pass_through():
    features, weight, bias = (v.detach().to("meta").requires_grad_() for v in inputs())
    loss = LinearLGLALoss(COUNTS).to("meta")(features, weight, TARGET.to("meta"), bias)
    loss.backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [None, 30.0])
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_it_compiles_with_a_dynamic_batch(backend, scale, reduction):
    torch.compiler.reset()
    criterion = LinearLGLALoss(COUNTS, scale=scale, reduction=reduction)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=backend)
    features, weight, bias = inputs()
    bias = bias if scale is None else None
    for number in (7, 5):
        some = features.detach()[:number].clone().requires_grad_()
        ours = results(compiled(some, weight, TARGET[:number], bias), some, weight, bias)
        expected = results(criterion(some, weight, TARGET[:number], bias), some, weight, bias)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_a_state_dict_of_either_loss_serves_the_other():
    linear_loss = LinearLGLALoss([1] * 6)
    linear_loss.load_state_dict(LGLALoss(COUNTS).state_dict())
    assert linear_loss.grouper.class_counts.tolist() == COUNTS
