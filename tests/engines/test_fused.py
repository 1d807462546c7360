"""The losses through every engine against plain PyTorch, and what autograd may do to them."""

import copy
import logging
import warnings

import pytest
import torch
from engines import GPU, NAN
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from lgla_losses import AAWWeighter, ExpertOutput, LGLALoss, LinearLGLALoss
from lgla_losses.kernels import Rows, autograd, chunked, native

try:
    from lgla_losses.kernels import triton
except ImportError:
    triton = None

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
COUNTS = [90, 40, 9, 5, 2, 1]
TARGET = torch.tensor([0, 3, 1, -100, 5, 2, 0])


def batch(dtype=torch.float64, num_classes=6):
    logits = (60 * torch.rand(len(TARGET), 3, num_classes, dtype=torch.float64) - 30).to(dtype)
    return logits, TARGET.clone().to(logits.device)


def criterion(**options):
    return LGLALoss(COUNTS, **options).to(torch.get_default_device())


def loss_and_gradients(criterion, inputs, *arguments, **options):
    """For an upstream gradient that is not one."""
    leaves = [v.detach().clone().requires_grad_() for v in inputs]
    form = options.pop("form", lambda v: v)
    loss = criterion(form(*leaves), *arguments, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    loss.backward(upstream)
    return [loss.detach(), *(v.grad for v in leaves)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("aaw", [True, False])
@pytest.mark.parametrize("form", ["tensor", "list", "output", "linear head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_engine_is_the_reference(engine, reduction, aaw, form, dtype, close):
    options = {"reduction": reduction, "aaw": aaw, "label_smoothing": 0.1}
    if form in ("output", "linear head"):
        options["scale"] = None
    logits, target = batch(dtype)
    features, weight = torch.randn(7, 3, 8, dtype=dtype), torch.randn(3, 6, 8, dtype=dtype)
    make = {
        "tensor": lambda v: v,
        "list": lambda v: list(v.unbind(1)),
        "output": lambda v: ExpertOutput(v, features, weight),
        "linear head": lambda v: v,
    }[form]
    inputs = {"features": features, "weight": weight} if form == "linear head" else {}
    ours, plain = (
        loss_and_gradients(criterion(backend=backend, **options), [logits], target, form=make, **inputs)
        for backend in ("auto", "reference")
    )
    for actual, expected in zip(ours, plain, strict=True):
        assert actual.dtype == expected.dtype
        close(actual, expected)


@pytest.mark.parametrize("kind", ["number", "tensor", "tensor that learns"])
def test_normalizer(engine, kind, close):
    logits, target = batch()
    results = []
    for backend in ("auto", "reference"):
        normalizer = 5.0 if kind == "number" else torch.tensor(5.0)
        if kind == "tensor that learns":
            normalizer.requires_grad_()
        result = loss_and_gradients(criterion(backend=backend), [logits], target, normalizer=normalizer)
        results.append([*result, normalizer.grad] if kind == "tensor that learns" else result)
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(engine, reduction):
    logits, target = (v[:2] if engine is triton else v for v in batch())  # the interpreter is slow
    features, weight = torch.randn(len(target), 3, 8), torch.randn(3, 6, 8)
    module = criterion(scale=None, reduction=reduction, label_smoothing=0.1)

    def loss(logits):
        return module(logits, target, features=features, weight=weight)

    leaf = logits.clone().requires_grad_()
    assert gradcheck(loss, leaf, fast_mode=engine is triton)
    assert gradgradcheck(loss, leaf, fast_mode=True)  # of plain PyTorch, whatever the engine


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_retained_graph_gives_the_gradient_again(engine, dtype, close):
    """The first gradient is the caller's, who may write into it."""
    logits, target = batch(dtype)
    loss = criterion()(logits.requires_grad_(), target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.fill_(NAN)
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(2.0), retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits)
    close(second, 2 * kept.double())
    close(third, kept)


def test_changed_inputs_give_the_right_gradient_or_an_error(engine):
    logits, target = batch()
    expected = loss_and_gradients(criterion(), [logits], target)[1] / 0.5
    leaf = logits.clone().requires_grad_()
    inner = leaf.clone()
    loss = criterion()(inner, target)
    inner.data.zero_()  # unseen by autograd, and too late to matter
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected)
    for what in ("logits", "target", "table"):
        inner, labels, module = leaf.clone(), target.clone(), criterion(reduction="none")
        losses = module(inner, labels)
        if what == "table":
            module.set_adjustment(tau=0.5)
        else:
            with torch.no_grad():
                {"logits": inner, "target": labels}[what].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_small_gradients_of_float16_meet_the_scale_first(engine, reduction):
    """A mean over many samples is below float16's smallest number until the loss is scaled."""
    logits = torch.zeros(4096, 1, 6, dtype=torch.float16)
    logits[:, 0, 0] = 12
    target = torch.zeros(4096, dtype=torch.int64)
    module = LGLALoss(COUNTS, 1, adjustment="softmax", aaw=False, reduction=reduction).to(logits.device)
    loss = module(logits.requires_grad_(), target)
    (65536 * loss).mean().backward()
    off_target = logits.grad[:, 0, 1:].double()
    expected = torch.softmax(logits[0, 0].double(), 0)[1:] * 65536 / 4096
    assert ((off_target - expected) / expected).abs().max() < 2e-3


def test_nothing_is_kept_where_no_gradient_is_wanted(engine, monkeypatch):
    logits, target = batch()
    module, wanted = criterion(), []

    def spy(logits, rows, gradients, forward=engine.forward):
        wanted.append(gradients[0] is not None)
        return forward(logits, rows, gradients)

    monkeypatch.setattr(engine, "forward", spy)
    assert module(logits, target).grad_fn is None
    with torch.no_grad():
        assert module(logits.requires_grad_(), target).grad_fn is None
    with torch.inference_mode():
        assert not module(logits, target).requires_grad
    assert wanted == [False] * 3
    module(logits, target)
    assert wanted[3:] == [True]


def test_only_some_experts_learn(engine, close):
    logits, target = batch()
    experts = [v.clone().requires_grad_(k != 1) for k, v in enumerate(logits.unbind(1))]
    criterion()(experts, target).backward()
    whole = logits.clone().requires_grad_()
    criterion(backend="reference")(whole, target).backward()
    assert experts[1].grad is None
    close(experts[0].grad, whole.grad[:, 0])
    close(experts[2].grad, whole.grad[:, 2])


def test_nothing_to_learn_from(engine):
    for target in (TARGET[:0], torch.full((2,), -100)):
        logits = torch.randn(len(target), 3, 6, requires_grad=True)
        loss = criterion()(logits, target.to(logits.device))
        loss.backward()
        assert loss == 0
        assert not logits.grad.any()


def test_copies_of_a_loss_are_whole(engine):
    logits, target = batch()
    module = criterion()
    assert torch.equal(copy.deepcopy(module)(logits, target), module(logits, target))


def test_hooks_on_the_weighter_are_called(engine, close):
    logits, target = batch()
    module, seen = criterion(), []
    plain = module(logits, target)
    module.weighter.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    close(module(logits, target), plain)
    assert [tuple(v.shape) for v in seen[0]] == [(7, 3), (7, 3)]


# --- What PyTorch may do around the C library ---------------------------------------------------------------


def test_a_default_device_is_no_matter():
    """Memory for results was made on the default device."""
    logits, target = batch()
    features, weight = torch.randn(7, 3, 4), torch.randn(3, 6, 4)
    module, linear = LGLALoss(COUNTS), LinearLGLALoss(COUNTS)
    expected = module(logits, target), linear(features, weight, target)
    with torch.device("meta"):
        found = module(logits, target), linear(features, weight, target)
    torch.testing.assert_close(found, expected)


def test_who_replaces_the_weights_is_heard(close):
    """By a hook, a subclass, or a hook on every module; a smaller tensor was read beyond its end."""
    logits, target = batch()

    class Halved(AAWWeighter):
        def forward(self, *args):
            return super().forward(*args).mean(dim=1, keepdim=True)

    def halve(_, __, output):
        return output.mean(dim=1, keepdim=True)

    results = {}
    for backend in ("auto", "reference"):
        hooked, replaced, everywhere = (LGLALoss(COUNTS, backend=backend) for _ in range(3))
        hooked.weighter.register_forward_hook(halve)
        replaced.weighter = Halved(replaced.grouper)
        seen = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda m, _, __, seen=seen: seen.append(type(m))
        )
        try:
            everywhere(logits, target)
        finally:
            handle.remove()
        assert AAWWeighter in seen
        results[backend] = hooked(logits, target), replaced(logits, target)
    for actual, expected in zip(*results.values(), strict=True):
        close(actual, expected)


def test_weights_of_one_column_are_every_experts(engine, close):
    """As of samples; none is read beyond its end, and no table either."""
    logits, target = batch()
    weights, table = 1 + torch.rand(7, 1, dtype=torch.float64), -torch.rand(1, 6, dtype=torch.float64)
    rows = Rows(target, table.expand(3, -1), weights.expand(-1, 3))
    losses, _ = engine.forward([logits], rows, [None])
    copied = Rows(target, table.repeat(3, 1), weights.repeat(1, 3))
    close(losses, engine.forward([logits], copied, [None])[0])


def test_constants_of_other_forms_are_read_right(close):
    """load_state_dict(assign=True) takes whatever memory it is given."""
    logits, target = batch()
    expected = LGLALoss(COUNTS)(logits, target)
    state = LGLALoss(COUNTS).state_dict()
    for change in (lambda v: v.int(), lambda v: v.repeat_interleave(2)[::2]):
        module = LGLALoss(COUNTS)
        changed = {name: change(v) if "group_index" in name else v for name, v in state.items()}
        module.load_state_dict(changed, assign=True)
        close(module(logits, target), expected)


def test_forward_mode_keeps_its_tangent(close):
    logits, target = batch()
    tangents = []
    for backend in ("auto", "reference"):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(logits, torch.ones_like(logits))
            loss = LGLALoss(COUNTS, backend=backend, validate_args=False)(2 * dual, target)
            tangents.append(forward_ad.unpack_dual(loss).tangent)
    close(*tangents)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_of_the_loss_not_of_its_memory(close):
    logits, target = batch()
    module = LGLALoss(COUNTS, validate_args=False)
    traced = torch.jit.trace(module, (logits, target), check_trace=False)
    other = batch()[0]
    close(traced(other, target), module(other, target))
    graph = make_fx(module)(logits, target)
    close(graph(other, target), module(other, target))


def test_negated_views(close):
    logits, target = batch()
    negated = torch.complex(torch.zeros_like(logits), -logits).conj().imag
    assert negated.is_neg()
    close(LGLALoss(COUNTS)(negated, target), LGLALoss(COUNTS)(logits, target))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_changed_normalizer_gives_the_right_gradient_or_an_error(linear, dtype):
    """A running count of samples, say: one of float32 was copied, and one of float64 is as it is."""
    logits, target = batch(torch.float16)
    inputs = (torch.randn(7, 3, 4).half(), torch.randn(3, 6, 4).half()) if linear else (logits,)
    module = LinearLGLALoss(COUNTS) if linear else LGLALoss(COUNTS)
    leaf, normalizer = inputs[0].clone().requires_grad_(), torch.tensor(5.0, dtype=dtype)
    (expected,) = torch.autograd.grad(module(leaf, *inputs[1:], target, normalizer=5.0), leaf)
    loss = module(leaf, *inputs[1:], target, normalizer=normalizer)
    normalizer.fill_(500.0)
    if dtype == torch.float64:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients(reduction, close):
    """Where the gradient of the loss, not the logits, is batched."""
    logits, target = batch()
    jacobians = [
        torch.autograd.functional.jacobian(
            lambda v, b=backend: LGLALoss(COUNTS, backend=b, reduction=reduction)(v, target).reshape(-1),
            logits,
            vectorize=True,
        )
        for backend in ("auto", "reference")
    ]
    close(*jacobians)


def test_transforms_over_other_inputs(close):
    logits, target = batch()
    features, weight = torch.randn(2, 7, 3, 4), torch.randn(3, 6, 4)
    found = {}
    for backend in ("auto", "reference"):
        module = LGLALoss(COUNTS, backend=backend, validate_args=False)
        linear = LinearLGLALoss(COUNTS, backend=backend, validate_args=False)
        found[backend] = [
            torch.vmap(lambda f, m=module: m(logits, target, features=f, weight=weight))(features),
            torch.func.grad(lambda w, m=linear: m(features[0], w, target))(weight),
        ]
    for actual, expected in zip(*found.values(), strict=True):
        close(actual, expected)


def test_a_loss_made_in_inference_mode_trains():
    with torch.inference_mode():
        module = LGLALoss(COUNTS)
    logits, target = batch()
    module(logits.requires_grad_(), target).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("form", ["tensor", "list", "output", "hooked"])
@pytest.mark.parametrize("what", ["target", "logits", "scale"])
def test_bad_values_are_told_alike(form, what):
    """Whatever finds them: the C library on its way, or a look at all values beforehand."""
    told = []
    for backend in ("auto", "reference"):
        logits, target = batch()
        if what == "target":
            target[4] = 6
        elif what == "logits":
            logits[2, 1, 4] = NAN
        else:
            logits[0, 1, 0] = 99.0
        module = LGLALoss(COUNTS, backend=backend)
        if form == "hooked":
            module.weighter.register_forward_hook(lambda *_: None)
        output = {
            "list": lambda v=logits: list(v.unbind(1)),
            "output": lambda v=logits: ExpertOutput(v, torch.ones(7, 3, 4), torch.ones(3, 6, 4)),
        }.get(form, lambda v=logits: v)()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                module(output, target)
                module(output, target)
                told.append([str(w.message) for w in caught])
            except (ValueError, IndexError, RuntimeError) as error:
                told.append((type(error), str(error)))
    assert told[0] == told[1]
    assert told[0] or (what, form) == ("scale", "output")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_unchecked_target_out_of_range_makes_the_loss_nan(engine, reduction):
    """That of its sample alone; nothing is read out of bounds."""
    logits, target = batch()
    good = criterion(aaw=False, reduction="none")(logits, target)
    for wrong in (6, -1, 2**62, -(2**62)):
        target[4] = wrong
        loss = criterion(aaw=False, reduction=reduction, validate_args=False)(logits.requires_grad_(), target)
        loss.sum().backward()
        if reduction == "mean":
            assert loss.isnan()
        else:
            assert loss.isnan().tolist() == [i == 4 for i in range(7)]
            assert torch.equal(loss[[0, 1, 2, 3, 5, 6]], good[[0, 1, 2, 3, 5, 6]])
        logits = logits.detach()


def test_an_unchecked_target_out_of_range_makes_every_loss_nan():
    logits, target = batch()
    target[4] = 6
    assert LGLALoss(COUNTS, validate_args=False)(logits, target).isnan()
    features, weight = torch.ones(7, 3, 4), torch.ones(3, 6, 4)
    assert LinearLGLALoss(COUNTS, aaw=False, validate_args=False)(features, weight, target).isnan()
    assert LinearLGLALoss(COUNTS, validate_args=False)(features, weight, target).isnan()


@pytest.mark.parametrize("factor", [1.0, 1 / 3, 1024.0])
def test_a_bfloat16_gradient_of_a_scaled_loss(engine, factor):
    """Rounded once; once more for a factor that is no power of two."""
    logits, target = batch(torch.bfloat16)
    logits[2, 0] = torch.tensor([11.0, 28.5, -4.0, -20.0, 0.0, -5.0])  # its label's probability is 1 - 3e-8
    loss = criterion(aaw=False)(logits.requires_grad_(), target)
    (factor * loss).backward()
    exact = logits.detach().double().requires_grad_()
    (factor * criterion(aaw=False, backend="reference")(exact, target)).backward()
    roundings = 2 if factor == 1 / 3 else 1
    error = (logits.grad.double() - exact.grad).abs()
    # The interpreter of Triton cuts off where hardware rounds.
    unit = torch.finfo(torch.bfloat16).eps / (1 if engine is triton and GPU == "cpu" else 2)
    allowed = 1.01 * roundings * unit * exact.grad.abs() + 1e-30
    # A label's gradient is its probability less 1, and float32 knows the logarithm of that to 32 eps.
    is_label = torch.nn.functional.one_hot(target.clamp(min=0), 6).bool()[:, None]
    allowed += is_label * factor / 6 * 32 * torch.finfo(torch.float32).eps
    assert (error <= allowed).all()


# --- The choice of an engine --------------------------------------------------------------------------------


def test_the_c_library_is_there():
    """Tests of the rest would pass without it."""
    assert native.LIBRARY is not None, native.MISSING
    assert autograd.engine_for("auto", torch.device("cpu")) is native
    assert autograd.engine_for("fused", torch.device("cpu")) is native
    assert autograd.engine_for("reference", torch.device("cpu")) is None


def test_without_the_c_library_auto_is_plain_pytorch_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "MISSING", "no compiler in this test")
    with caplog.at_level(logging.INFO, "lgla_losses"):
        for _ in range(3):
            assert autograd.engine_for("auto", torch.device("cpu")) is None
    assert [record.message.count("no compiler in this test") for record in caplog.records] == [1]
    assert autograd.engine_for("fused", torch.device("cpu")) is chunked


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'triton' cannot run.*CUDA device"):
        LGLALoss(COUNTS, backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"'triton' cannot run.*logits on cpu"):
        LGLALoss(COUNTS, backend="triton")(*batch())
    monkeypatch.setattr(autograd, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"'triton' cannot run.*not installed"):
        LGLALoss(COUNTS, backend="triton")


def test_transforms_and_subclasses_go_through_plain_pytorch():
    logits, target = batch()
    expected = loss_and_gradients(LGLALoss(COUNTS, aaw=False), [logits], target)[1] / 0.5
    gradient = torch.func.grad(LGLALoss(COUNTS, aaw=False, validate_args=False))(logits, target)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(ValueError, match=r"'fused' cannot run.*torch\.func"):
        torch.func.grad(LGLALoss(COUNTS, backend="fused", validate_args=False))(logits, target)

    class Marked(torch.Tensor):
        pass

    marked = logits.as_subclass(Marked)
    assert isinstance(LGLALoss(COUNTS)(marked, target), Marked)
    with pytest.raises(ValueError, match=r"'fused' cannot run.*Marked"):
        LGLALoss(COUNTS, backend="fused")(marked, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_number_of_threads_changes_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(native, "_WORTH_THREADS", 1)
    logits, target = batch(dtype)
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2, 3, 50):
        torch.set_num_threads(number)
        try:
            results.append(loss_and_gradients(LGLALoss(COUNTS), [logits], target))
        finally:
            torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# --- Operators, as torch.compile calls them; "reference" there stands for chunks of PyTorch -----------------


def every_backend(test):
    return pytest.mark.parametrize("backend", ["auto", "reference"])(test)


def operator_rows(kind):
    """The fields of rows of 7 samples and 3 experts, as the operators take them but for ``reduce``."""
    target = TARGET.clone() if kind == "plain" else torch.softmax(torch.randn(7, 6), 1)
    table = LGLALoss(COUNTS).adjuster.constant("table")
    own = () if kind == "plain" else (torch.rand(6).double(), torch.rand(6).double())
    rows = Rows(target, table, torch.rand(7, 3), torch.tensor(3.0), *own, label_smoothing=0.1)
    return rows._replace(gamma=0.0 if kind == "plain" else 1.5)


@every_backend
@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("reduce", [True, False])
def test_operator_of_logits(reduce, kind, backend):
    logits = batch(torch.float32)[0].requires_grad_()
    rows = operator_rows(kind)._replace(reduce=reduce)
    torch.library.opcheck(torch.ops.lgla_losses.cross_entropy.default, (logits, *rows, backend))


@every_backend
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_operator_of_gradients(kind, backend):
    """By itself; it has no gradient of its own."""
    logits, operators = batch(torch.float32)[0].requires_grad_(), torch.ops.lgla_losses
    rows = operator_rows(kind)._replace(reduce=True)
    loss, state = operators.cross_entropy(logits, *rows, backend)
    arguments = torch.tensor(2.0), state, logits.detach(), *rows, backend
    torch.library.opcheck(operators.cross_entropy_backward.default, arguments)
    (gradient,) = torch.autograd.grad(2 * loss, logits)
    torch.testing.assert_close(operators.cross_entropy_backward(*arguments), gradient)


@every_backend
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_operators_of_the_linear_loss(kind, backend):
    """With a bias, and without one."""
    operators, rows = torch.ops.lgla_losses, operator_rows(kind)._replace(divisor=None)
    sizes = (7, 3, 4), (3, 6, 4), (3, 6)
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    inputs[2] = inputs[2] if kind == "plain" else None
    torch.library.opcheck(operators.linear_cross_entropy.default, (*inputs, *rows, None, backend))
    inputs = [None if v is None else v.detach() for v in inputs]
    arguments = torch.rand(7), *inputs, *rows, None, backend
    torch.library.opcheck(operators.linear_cross_entropy_backward.default, arguments)


def test_memory_is_one_gradient(tmp_path):
    """In a process of its own; beyond the inputs, a gradient and 8 MB."""
    import subprocess
    import sys

    code = """
import torch
from lgla_losses import LGLALoss
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
def step():
    logits.grad = None
    criterion(logits, target).backward()
logits = torch.randn(256, 3, 8142, requires_grad=True)
target = torch.randint(8142, (256,))
criterion = LGLALoss(range(8142, 0, -1))
step()
logits.grad = None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
step()
print(peak() - before - logits.numel() * 4 / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8
