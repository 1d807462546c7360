"""The C library takes no memory for something else, and computes what it is asked for."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from lgla_losses import functional
from lgla_losses.kernels import Angles, Rows, Samples, native

N, K, C, G, D = 4, 3, 5, 2, 6

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason=native.MISSING)


def arguments():
    """Of every function, all as they should be."""
    logits, target = torch.zeros(N, K, C, dtype=torch.bfloat16), torch.arange(N)
    rows = {
        "target": target,
        "table": torch.zeros(K, C, dtype=torch.float64),
        "weights": torch.ones(N, K),
        "divisor": torch.ones(()),
        "class_weight": torch.ones(C, dtype=torch.float64),
        "margin": torch.ones(C, dtype=torch.float64),
    }
    samples = {"target": target, "group_index": torch.arange(C) % G, "sample_weight": torch.ones(N)}
    parts = torch.ones(1, G, K + 1, dtype=torch.float64)
    outputs = {"logits": logits, "gradient": torch.empty_like(logits)}
    return {
        "statistics": {"cosines": logits, **samples},
        "statistics of features": {
            "features": torch.ones(N, K, D),
            "weight": torch.ones(K, C, D),
            **samples,
        },
        "statistics of probabilities": {"cosines": logits, **samples, "target": torch.ones(N, C)},
        "weights": {"angles": torch.zeros(N, K), "parts": parts, **samples},
        "count": {"target": target, "sample_weight": torch.ones(N), "class_weight": torch.ones(C)},
        "forward": {**rows, **outputs},
        "forward of probabilities": {**rows, **outputs, "target": torch.ones(N, C)},
        "backward": {**rows, **outputs, "upstream": torch.ones(N), "state": torch.ones(N, K, 2)},
    }


def call(function, ignore_index=-100, **given):
    """A function of the engine, whose structures are made of what is given."""
    angles = {name: given.pop(name) for name in ("angles", "features", "weight") if name in given}
    angles |= {"cosines": [given.pop("cosines")]} if "cosines" in given else {}
    if function == "count":
        return native.count(**given, ignore_index=ignore_index)
    if function.startswith(("statistics", "weights")):
        parts = [given.pop("parts")] if "parts" in given else []
        samples = Samples(**given, num_groups=G, ignore_index=ignore_index)
        return getattr(native, function.split()[0])(Angles(**angles), samples, *parts)
    logits, gradient = [given.pop("logits")], [given.pop("gradient")]
    state = [given.pop(name) for name in ("upstream", "state") if name in given]
    return getattr(native, function.split()[0])(
        logits, Rows(**given, ignore_index=ignore_index), *state, gradient
    )


#: What may come of a tensor, and for which arguments that is as good as before.
SPOILT = {
    "shorter": (lambda v: v[:-1], ("parts",)),
    "narrower": (lambda v: v[..., :-1], ()),
    "without memory": (lambda v: v.to("meta"), ()),
    "freed": (lambda v: freed(v), ()),
    "of another dtype": (lambda v: v.to(torch.int32), ()),
    "sparse": (lambda v: v.to_sparse(), ()),
}


def freed(tensor):
    """As FSDP2 leaves a parameter whose memory it took back."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


CASES = [
    (function, name, spoiling)
    for function, inputs in arguments().items()
    for name, value in inputs.items()
    for spoiling, (_, harmless) in SPOILT.items()
    if name not in harmless
    and not (value.dim() == 0 and spoiling in ("shorter", "narrower"))
    # These say themselves how many classes, features or samples there are.
    and (function, name, spoiling) not in {
        ("weights", "group_index", "shorter"),
        ("weights", "group_index", "narrower"),
        ("count", "class_weight", "shorter"),
        ("count", "class_weight", "narrower"),
    }
]  # fmt: skip


@pytest.mark.parametrize(("function", "name", "spoiling"), CASES)
def test_memory_that_is_not_what_c_takes_it_for_is_refused(function, name, spoiling):
    inputs = arguments()[function]
    call(function, **inputs)
    inputs[name] = SPOILT[spoiling][0](inputs[name])
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call(function, **inputs)


def test_the_refusal_names_what_came():
    inputs = arguments()["forward"] | {"weights": torch.zeros(N, K - 1, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"weights: expected .* \[4, 3\] .* got a torch\.bfloat16"):
        call("forward", **inputs)


@pytest.mark.parametrize("function", arguments())
@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**70])
def test_an_ignore_index_of_more_than_64_bits_does_not_become_another(function, number):
    """2**70 became 0, so that class 0 was ignored."""
    with pytest.raises(ValueError, match=f"ignore_index: expected an integer of 64 bits, got {number}"):
        call(function, **arguments()[function], ignore_index=number)


def test_logits_of_two_dtypes_are_refused():
    logits = [torch.zeros(N, 1, C), torch.zeros(N, 1, C, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"logits: expected .* torch\.float32 .* got a torch\.float64"):
        native.forward(logits, Rows(torch.arange(N)), [None, None])


def test_angles_of_any_strides_and_sums_in_parts():
    samples = Samples(torch.arange(N), torch.arange(C) % G, G)
    angles, parts = torch.rand(N, K), torch.rand(3, G, K + 1, dtype=torch.float64)
    expected = native.weights(Angles(angles=angles), samples, parts.sum(0, keepdim=True))
    got = native.weights(Angles(angles=angles.T.contiguous().T), samples, parts)
    torch.testing.assert_close(got, expected)


def a_batch(kind, dtype=torch.float32, n=40, c=300):
    logits = (3 * torch.randn(n, K, c)).to(dtype)
    target = torch.randint(c, (n,))
    target[::5] = -100
    if kind == "mixup":
        one_hot = F.one_hot(target.clamp(min=0), c) * (target >= 0)[:, None]
        target = 0.7 * one_hot.to(dtype) + 0.3 * one_hot.roll(5, dims=0).to(dtype)
    elif kind == "smooth":
        target = torch.rand(n, c).softmax(1).to(dtype) * (target >= 0)[:, None]
    return logits, target


def run(logits, rows):
    """The losses, the state and the gradients from the forward pass, whatever was in their memory."""
    gradients = [torch.full_like(block, torch.nan) for block in logits]
    losses, state = native.forward(logits, rows, gradients)
    return losses, state, torch.cat(gradients, dim=1)


@pytest.mark.parametrize("kind", ["indices", "mixup", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_experts_give_what_the_stacked_logits_give(kind, dtype):
    logits, target = a_batch(kind, dtype)
    rows = Rows(target, torch.randn(K, logits.shape[2], dtype=torch.float64), label_smoothing=0.1)
    separate = [logits[:, :1].clone(), logits[:, 1:].transpose(0, 2).contiguous().transpose(0, 2)]
    for got, expected in zip(run(separate, rows), run([logits], rows), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["indices", "mixup", "smooth"])
def test_results_do_not_depend_on_the_number_of_threads(kind, monkeypatch):
    monkeypatch.setattr(native, "_WORTH_THREADS", 1)
    logits, target = a_batch(kind, n=333, c=500)
    samples = Samples(target, torch.arange(500) % G, G, torch.rand(333))

    def everything():
        angles, parts = native.statistics(Angles([logits], 10.0), samples)
        weights, count = native.weights(angles, samples, parts)
        return [
            parts, weights, count, native.count(target, None, None, -100),
            *run([logits], Rows(target, None, weights, count)),
        ]  # fmt: skip

    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["indices", "mixup", "smooth"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_class_weights_margins_and_focus_are_those_of_the_formula(kind, smoothing, gamma, close):
    logits, target = a_batch(kind, torch.float64)
    c = logits.shape[2]
    class_weight, margin = torch.rand(2, c, dtype=torch.float64)
    class_weight[::9] = 0.0
    rows = Rows(target, None, None, None, class_weight, margin, label_smoothing=smoothing, gamma=gamma)
    q = target if kind != "indices" else F.one_hot(target.clamp(min=0), c) * (target >= 0.0)[:, None].double()
    v = logits.clone().requires_grad_()
    r = class_weight * ((1 - smoothing) * q + smoothing * q.sum(dim=1, keepdim=True) / c)
    entropy = -torch.log_softmax(v - (margin * q)[:, None], dim=2)
    expected = (r[:, None] * (1 - (-entropy).exp()) ** gamma * entropy).sum(dim=(1, 2))
    expected.sum().backward()

    losses, state, gradient = run([logits], rows)
    close(losses, expected)
    close(gradient, v.grad)
    upstream = torch.rand(1, dtype=torch.float64).expand(len(target))
    again = logits.clone()
    native.backward([again], rows, upstream, state, [again])
    close(again, v.grad * upstream[0])


@pytest.mark.parametrize("few", [1, 2, 8, 9, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_of_few_and_of_many_classes_are_those_of_the_formula(few, dtype, weighted, close):
    logits = 9 * torch.randn(6, 3, 150, dtype=dtype)
    target = torch.zeros(6, 150, dtype=dtype)
    for n in range(1, 6):  # the first sample is ignored
        target[n, torch.randperm(150)[:few]] = torch.rand(few, dtype=dtype).softmax(0)
    class_weight = torch.rand(150, dtype=torch.float64) if weighted else None
    v = logits.clone().requires_grad_()
    expected = functional.lgla_loss(v, target, torch.zeros(3, 150, dtype=dtype), class_weight=class_weight)
    expected.sum().backward()

    apart = target.T.contiguous().T  # its numbers are not one beside the other
    for rows in (Rows(target, class_weight=class_weight), Rows(apart, class_weight=class_weight)):
        losses, state, gradient = run([logits], rows)
        close(losses, expected)
        close(gradient, v.grad)
        again = logits.clone()
        native.backward([again], rows, torch.ones(6, dtype=dtype), state, [again])
        close(again, v.grad)


def test_a_masked_class_of_weight_0_costs_nothing_in_a_mixture():
    logits = torch.tensor([[[0.0, -torch.inf, 1.0]]])
    rows = Rows(torch.tensor([[0.5, 0.5, 0.0]]), class_weight=torch.tensor([1.0, 0.0, 1.0]).double())
    losses, _, gradient = run([logits], rows)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_what_counts_nothing_may_hold_anything(soft, gamma):
    """An ignored sample of NaN; a class masked by -inf; beside them NaN and +inf in rows that count."""
    logits = torch.zeros(5, 1, 4)
    logits[0], logits[1, 0, 1], logits[2, 0, 0] = torch.nan, -torch.inf, -torch.inf
    logits[3, 0, 1], logits[4, 0, 1] = torch.nan, torch.inf
    target = torch.tensor([-100, 0, 0, 0, 0])
    if soft:
        target = F.one_hot(target.clamp(min=0), 4).float() * (target >= 0)[:, None]
    losses, state, gradient = run([logits], Rows(target, gamma=gamma))
    assert losses[:3].isfinite().tolist() == [True, True, False]
    assert losses[[0, 2]].tolist() == [0.0, torch.inf]
    assert losses[3:].isnan().all()
    assert gradient[:3].isfinite().all()
    assert (gradient[0] == 0).all()
    assert state[0].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("label", [C, -1, 2**62, -(2**63)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "gamma": 1.0}])
def test_a_class_that_is_none_gives_nan_and_spoils_no_other_sample(label, options):
    target = torch.tensor([0, label, 1, -100])
    losses, *_ = run([torch.zeros(N, K, C)], Rows(target, weights=torch.ones(N, K), **options))
    assert losses.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 64, 100])
def test_angles_of_features_are_those_of_pytorch(dtype, d, close):
    features, weight = torch.randn(K, 50, d, dtype=dtype).transpose(0, 1), torch.randn(K, C, d).to(dtype)
    features[3] = 0
    target = torch.randint(C, (50,))
    samples = Samples(target, torch.arange(C) % G, G)
    angles, _ = native.statistics(Angles(features=features, weight=weight), samples)
    expected = functional.angles_from_features(features.double(), weight.double(), target)
    assert angles.angles.dtype == functional.compute_dtype(dtype)
    torch.testing.assert_close(angles.angles.double(), expected, rtol=1e-5, atol=1e-3 if d == 1 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_reference_angles_of_probabilities_are_those_of_the_formula(dtype, close):
    logits, target = a_batch("mixup", dtype)
    group_index, sample_weight = torch.arange(logits.shape[2]) % G, torch.rand(len(target))
    samples = Samples(target, group_index, G, sample_weight)
    kept, parts = native.statistics(Angles([logits], 10.0), samples)
    weights, count = native.weights(kept, samples, parts, num_ranks=2)

    angles = functional.angles_of(logits, 10.0).double()
    statistics = functional.soft_aaw_statistics(angles, target.double(), group_index, G, sample_weight)
    close(parts.sum(dim=0), statistics, torch.float32)
    expected = functional.soft_aaw_weights(angles, target.double(), group_index, statistics)
    close(weights, expected * sample_weight[:, None], torch.float32)
    close(count, statistics[:, -1].sum() / 2, torch.float32)


def test_a_group_whose_samples_weigh_nothing_has_no_reference():
    samples = Samples(torch.arange(N), torch.arange(C) % G, G, torch.zeros(N))
    angles, parts = native.statistics(Angles([torch.zeros(N, K, C)]), samples)
    weights, count = native.weights(angles, samples, parts)
    assert (weights == 0).all()
    assert count == 0


def test_a_divisor_of_0_stands_for_1():
    logits, rows = [torch.randn(N, K, C)], Rows(torch.arange(N), reduce=True)
    by_zero = run(logits, rows._replace(divisor=torch.zeros((), dtype=torch.bfloat16)))
    for got, expected in zip(by_zero, run(logits, rows), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.fixture
def open_with(monkeypatch):
    """Open a library where the first loads fail; give what was loaded, and whether for all libraries."""

    def opened(failures):
        loaded = []

        def load(path, mode=ctypes.DEFAULT_MODE):
            loaded.append((path, mode == ctypes.RTLD_GLOBAL))
            if len(loaded) <= failures:
                raise OSError("undefined symbol: GOMP_parallel")

        monkeypatch.setattr(ctypes, "CDLL", load)
        native._open("_native.so")
        return loaded

    return opened


def test_the_openmp_that_pytorch_shows_is_used(open_with):
    assert open_with(failures=0) == [("_native.so", False)]


def test_the_openmp_that_pytorch_hides_is_used_and_no_second_one(open_with):
    first, (openmp, for_all), last = open_with(failures=1)
    assert first == last == ("_native.so", False)
    assert for_all
    with open("/proc/self/maps") as maps:
        assert any(line.endswith(f"{openmp}\n") for line in maps)


def test_without_openmp_the_reason_says_what_to_install(open_with):
    with pytest.raises(OSError, match=r"GOMP_parallel; it needs GNU OpenMP.*apt install libgomp1"):
        open_with(failures=2)


def test_what_a_broken_library_lacks_is_told(tmp_path):
    (tmp_path / "_native.so").write_text("text")
    with pytest.raises(OSError, match=r"_native\.so: (?!.*libgomp1)"):
        native.load(str(tmp_path / "_native.so"))
