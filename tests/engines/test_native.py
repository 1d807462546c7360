"""The C library is handed no memory that it would take for something else."""

import pytest
import torch

from lgla_losses.kernels import native

N, K, C, G = 4, 3, 5, 2
OPTIONS = {"ignore_index": -100}
OF_ANGLES = {"scale": 30.0, **OPTIONS}
OF_LOGITS = {"label_smoothing": 0.0, **OPTIONS}

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason=native.MISSING)


def arguments():
    """Of every function, all as they should be."""
    logits, target = torch.zeros(N, K, C, dtype=torch.bfloat16), torch.arange(N)
    angles, parts = torch.zeros(N, K), torch.ones(1, G, K + 1, dtype=torch.float64)
    group_index = torch.arange(C) % G
    table, weights = torch.zeros(K, C, dtype=torch.float64), torch.ones(N, K)
    cosines = {"source": logits, "target": target, "group_index": group_index, "num_groups": G, **OF_ANGLES}
    inputs = {"logits": logits, "target": target, "table": table, "weights": weights}
    outputs = {"gradient": torch.empty_like(logits), **OF_LOGITS}
    return {
        "statistics": cosines,
        "weights_of": cosines,
        "weights": {
            "angles": angles,
            "target": target,
            "group_index": group_index,
            "parts": parts,
            "num_ranks": 1,
            **OPTIONS,
        },
        "forward": {**inputs, "divisor": torch.ones(()), "reduce": True, **outputs},
        "backward": {**inputs, "upstream": torch.ones(N), "state": torch.ones(N, K, 2), **outputs},
    }


#: Given in another dtype these are converted.
CONVERTED = ("table", "weights", "upstream", "parts", "group_index")
#: What may come of a tensor, and for which arguments that is as good as before.
SPOILT = {
    "shorter": (lambda v: v[:-1], ("parts",)),
    "narrower": (lambda v: v[..., :-1], ()),
    "without memory": (lambda v: v.to("meta"), ()),
    "freed": (lambda v: freed(v), ("parts",)),  # PyTorch sums them before
    "of another dtype": (lambda v: v.to(torch.int32), CONVERTED),
    "of half the width": (
        lambda v: v.to({8: torch.float32, 4: torch.float16, 2: torch.float8_e5m2}[v.element_size()]),
        CONVERTED,
    ),
    "sparse": (lambda v: v.to_sparse(), ("parts",)),
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
    if isinstance(value, torch.Tensor) and name != "divisor"
    for spoiling, (_, harmless) in SPOILT.items()
    if name not in harmless
    and (function, name, spoiling[-2:]) != ("weights", "group_index", "er")  # it says itself how many classes
]


@pytest.mark.parametrize(("function", "name", "spoiling"), CASES)
def test_memory_that_is_not_what_c_takes_it_for_is_refused(function, name, spoiling):
    inputs = arguments()[function]
    getattr(native, function)(**inputs)
    inputs[name] = SPOILT[spoiling][0](inputs[name])
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        getattr(native, function)(**inputs)


def test_the_refusal_names_what_came():
    inputs = arguments()["weights"] | {"angles": torch.zeros(N, K, dtype=torch.bfloat16)}
    with pytest.raises(
        ValueError, match=r"angles: expected a torch\.float32 .* \[4, 3\] .* got a torch\.bfloat16"
    ):
        native.weights(**inputs)


@pytest.mark.parametrize("function", arguments())
@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**70])
def test_an_ignore_index_of_more_than_64_bits_does_not_become_another(function, number):
    """2**70 became 0, so that class 0 was ignored."""
    inputs = arguments()[function] | {"ignore_index": number}
    with pytest.raises(ValueError, match=f"ignore_index: expected an integer of 64 bits, got {number}"):
        getattr(native, function)(**inputs)


def test_angles_of_any_strides_and_sums_in_parts():
    inputs = arguments()["weights"]
    angles, parts = torch.rand(N, K), torch.rand(3, G, K + 1, dtype=torch.float64)
    expected = native.weights(**inputs | {"angles": angles, "parts": parts.sum(0, keepdim=True)})
    got = native.weights(**inputs | {"angles": angles.T.contiguous().T, "parts": parts})
    torch.testing.assert_close(got, expected)
