"""What the Triton kernels alone promise: launches, graphs, and code for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lgla_losses import ExpertOutput, LGLALoss, _batch, baselines, functional
from lgla_losses.kernels import Angles, Rows, Samples, autograd
from lgla_losses.losses import _base

triton = pytest.importorskip("triton", reason="needs Triton")
from lgla_losses.kernels import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def batch(num_samples, num_classes, dtype=torch.float64):
    logits = 60 * torch.rand(num_samples, 3, num_classes, dtype=dtype, device=DEVICE) - 30
    return logits, torch.randint(num_classes, (num_samples,), device=DEVICE)


def mixed(target, num_classes):
    """Probabilities of two classes a sample; 0 for targets below 0."""
    pairs = torch.stack([target, target.flip(0)], dim=1)
    shares = torch.tensor([0.7, 0.3], device=target.device).expand(len(target), 2)
    probabilities = torch.zeros(len(target), num_classes, device=target.device)
    return probabilities.scatter_add_(1, pairs.clamp(min=0), shares * (target >= 0)[:, None])


@pytest.mark.cuda
def test_weights_of_several_blocks(monkeypatch, close):
    monkeypatch.setattr(kernels, "sample_tile", lambda *_: kernels.Tile(4, 4, 4))
    logits, target = batch(600, 6)
    target[[1, 8, 9, 10, 11]] = -100
    samples = Samples(target, torch.randint(2, (6,), device=DEVICE), 2)
    given, parts = kernels.statistics(Angles(cosines=[logits], scale=30.0), samples)
    assert len(parts) == 150
    weights, _ = kernels.weights(given, samples, parts)
    group = functional.target_groups(target, samples.group_index, -100)
    statistics = functional.aaw_statistics(given.angles, group, 2)
    close(weights, functional.aaw_weights(given.angles, group, statistics))


@pytest.mark.cuda
@pytest.mark.parametrize("tensors", [1, 3])
def test_weights_of_probabilities_in_blocks_of_classes(tensors, monkeypatch, close):
    """Several samples a program, and blocks of classes that none of a sample's is in."""
    monkeypatch.setattr(kernels, "class_tile", lambda *_: kernels.Tile(16, 4, 4))
    monkeypatch.setattr(kernels, "_resident_programs", lambda *_: 5)
    logits, target = batch(19, 70)
    target[3] = -100
    logits[3] = float("nan")
    probabilities, factor = mixed(target, 70), torch.rand(19, device=DEVICE)
    probabilities[3] = 0.0
    samples = Samples(probabilities, torch.randint(2, (70,), device=DEVICE), 2, sample_weight=factor)
    source = Angles(cosines=logits.split(3 // tensors, dim=1), scale=30.0)

    radians = functional.angles_of(logits.nan_to_num(), 30.0)
    expected = functional.soft_aaw_statistics(radians, probabilities.double(), samples.group_index, 2, factor)
    given, parts = kernels.statistics(source, samples)
    assert parts.shape == (5, 2, 4)
    close(parts.sum(dim=0), expected)
    weights, number = kernels.weights(given, samples, parts, num_ranks=2)
    close(
        weights,
        factor[:, None]
        * functional.soft_aaw_weights(radians, probabilities.double(), samples.group_index, expected),
    )
    close(number, expected[:, -1].sum() / 2)


@pytest.mark.cuda
@pytest.mark.parametrize("depth", [16, 64])
def test_angles_of_features_in_blocks(depth, monkeypatch, close):
    monkeypatch.setattr(kernels, "DEPTH", depth)
    features = torch.randn(19, 3, 40, dtype=torch.float64, device=DEVICE)
    weight = torch.randn(3, 6, 40, dtype=torch.float64, device=DEVICE)
    target = torch.randint(6, (19,), device=DEVICE)
    samples = Samples(target, torch.randint(2, (6,), device=DEVICE), 2)
    given, parts = kernels.statistics(Angles(features=features, weight=weight), samples)
    expected = functional.angles_from_features(features, weight, target)
    close(given.angles, expected)
    group = functional.target_groups(target, samples.group_index, -100)
    close(parts.sum(dim=0), functional.aaw_statistics(expected, group, 2))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_count_of_several_programs(kind, monkeypatch, close):
    monkeypatch.setattr(kernels, "COUNTED_AT_ONCE", 1000)
    target = torch.randint(-1, 3, (2500,), device=DEVICE)
    factor, class_weight = torch.rand(2500, device=DEVICE), torch.rand(3, device=DEVICE).double()
    probabilities = mixed(target, 3).double()
    expected = (factor.double() * (probabilities * class_weight).sum(dim=1)).sum()
    if kind == "indices":
        expected = (factor.double() * torch.where(target < 0, 0.0, class_weight[target])).sum()
    given = target if kind == "indices" else probabilities
    close(kernels.count(given, factor, class_weight, -1), expected)


class Launches(TorchDispatchMode):
    """Notes kernels instead of running them, and PyTorch's operations, but not memory and views."""

    FREE = ("empty", "empty_like", "promote_types")

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        monkeypatch.setattr(kernels, "_launch", lambda kernel, *_, **__: self.names.append(kernel.__name__))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        alias = operation._schema.returns and operation._schema.returns[0].alias_info
        is_view = alias and not alias.is_write
        if operation.overloadpacket.__name__ not in self.FREE and not is_view:
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def step(rows, samples, angles, logits):
    """Loss and gradient of a batch on one rank; with angles weighted by AAW."""
    if angles is None:
        class_weight = rows.class_weight
        number = kernels.count(samples.target, samples.sample_weight, class_weight, -100)
        weights = samples.sample_weight
        weights = None if weights is None else weights[:, None].expand(logits.shape[:2])
    else:
        given, parts = kernels.statistics(angles, samples)
        weights, number = kernels.weights(given, samples, parts)
    gradient = torch.empty_like(logits)
    total, _ = kernels.forward(
        [logits], rows._replace(weights=weights, divisor=number, reduce=True), [gradient]
    )
    kernels.rescale_(gradient, number)
    return total, gradient


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def of_one(logits, target):
    return leaf(logits[:, 0]), target


def with_features(logits, target):
    return ExpertOutput(leaf(logits), logits[..., :8], logits[:100].movedim(0, 1)[..., :8]), target


#: A loss, what it is called with, and the launches of a step, with PyTorch's own at the start of `backward`.
LOSSES = {
    "stacked": (LGLALoss, lambda logits, target: (leaf(logits), target), 5),
    "K tensors": (LGLALoss, lambda logits, target: (list(map(leaf, logits.unbind(1))), target), 6),
    "probabilities": (LGLALoss, lambda logits, target: (leaf(logits), mixed(target, 100)), 6),
    "ExpertOutput": (LGLALoss, with_features, 6),
    "balanced softmax": (baselines.BalancedSoftmaxLoss, of_one, 5),
    "focal": (baselines.FocalLoss, of_one, 5),
    "class-balanced": (baselines.ClassBalancedLoss, of_one, 5),
    "LDAM": (baselines.LDAMLoss, of_one, 7),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_launches_of_a_whole_step(name, weighted, monkeypatch):
    """With 100 classes launches are most of the time; checks of values, which some steps make, are off."""
    make, inputs, number = LOSSES[name]
    counts = () if make is baselines.FocalLoss else (torch.arange(100, 0, -1),)
    criterion = make(*counts, validate_args=False).to(DEVICE)
    logits, target = batch(128, 100, torch.float32)
    given = inputs(logits, target)
    more = {"sample_weight": torch.rand(128, device=DEVICE)} if weighted else {}
    monkeypatch.setattr(autograd, "engine_for", lambda *_: kernels)
    monkeypatch.setattr(_batch, "_WORTH_JOINING", {DEVICE: 1 << 22})
    for module in (autograd, _base):  # which see the notes taken below as a trace
        monkeypatch.setattr(module, "unfit", lambda *_: None)

    with Launches(monkeypatch) as launches:
        criterion(*given, **more).backward()
    assert len(launches.names) == number, launches.names


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize(("angles", "number"), [(None, 4), ("logits", 5), ("features", 5)])
@pytest.mark.parametrize("more", [False, True])
def test_launches_of_a_step(target, angles, number, more, monkeypatch):
    """Nothing else runs on the device, whatever the input is."""
    if angles == "features" and target == "probabilities":
        pytest.skip("their angles come from logits")
    logits, indices = batch(128, 100, torch.float32)
    given = indices[::2].repeat_interleave(2) if target == "indices" else mixed(indices, 100)
    samples = Samples(given, torch.randint(2, (100,), device=DEVICE), 2)
    rows = Rows(given, table=torch.zeros(1, 100, dtype=torch.float64, device=DEVICE).expand(3, 100))
    if more:
        of_classes = torch.ones(100, dtype=torch.float64, device=DEVICE)
        rows = rows._replace(class_weight=of_classes, margin=of_classes, gamma=2.0, label_smoothing=0.1)
        samples = samples._replace(sample_weight=torch.ones(128, device=DEVICE))
    source = {
        None: None,
        "logits": Angles(cosines=[logits], scale=30.0),
        "features": Angles(features=logits, weight=torch.ones(3, 100, 100, device=DEVICE)),
    }[angles]
    with Launches(monkeypatch) as launches:
        step(rows, samples, source, logits)
    assert len(launches.names) == number
    assert all(name.startswith("_") for name in launches.names)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_tensors_of_experts_are_as_one(kind, gamma):
    logits, target = batch(9, 20, torch.float32)
    given = target if kind == "indices" else mixed(target, 20)
    rows = Rows(
        given,
        table=-torch.rand(3, 20, dtype=torch.float64, device=DEVICE),
        weights=torch.rand(9, 3, device=DEVICE),
        gamma=gamma,
    )
    apart = [logits[:, :1].clone(), logits[:, 1:].transpose(0, 1).contiguous().transpose(0, 1)]
    losses, state = kernels.forward([logits], rows, [None])
    others, other_state = kernels.forward(apart, rows, [None, None])
    assert torch.equal(losses, others)
    assert torch.equal(state, other_state)

    gradient, gradients = torch.empty_like(logits), [torch.empty_like(v) for v in apart]
    total, _ = kernels.forward([logits], rows._replace(reduce=True), [gradient])
    other_total, _ = kernels.forward(apart, rows._replace(reduce=True), gradients)
    assert torch.equal(torch.cat(gradients, dim=1), gradient)
    torch.testing.assert_close(other_total, total, rtol=1e-6, atol=0)

    upstream = torch.randn(9, device=DEVICE)
    kernels.backward([logits], rows, upstream, state, [gradient])
    kernels.backward(apart, rows, upstream, state, [None, gradients[1]])
    assert torch.equal(gradients[1], gradient[:, 1:])


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_step_can_be_captured_in_a_graph(kind):
    logits, target = batch(8, 100, torch.float32)
    given = target if kind == "indices" else mixed(target, 100)
    samples = Samples(given, torch.randint(2, (100,), device=DEVICE), 2)
    rows = Rows(given, table=-torch.rand(3, 100, dtype=torch.float64, device=DEVICE))
    batch_of_step = rows, samples, Angles(cosines=[logits], scale=30.0), logits

    eager, gradient = step(*batch_of_step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, out = step(*batch_of_step)
    out.zero_()
    graph.replay()
    assert torch.equal(total, eager)
    assert torch.equal(out, gradient)


@pytest.fixture(params=kernels.PLANS)
def plan(request):
    """The plan in use."""
    before = kernels.use(request.param)
    yield request.param
    kernels.use(before)


def loss_and_gradient(logits, target, table, weights, smoothing):
    """The sum of the losses over 3, and its gradient."""
    gradient = torch.full_like(logits, float("nan"))
    divisor = torch.tensor(3.0, dtype=functional.compute_dtype(logits.dtype), device=DEVICE)
    rows = Rows(target, table, weights, divisor, label_smoothing=smoothing, reduce=True)
    total, _ = kernels.forward([logits], rows, [gradient])
    return total, gradient


def check_long_rows(close, logits, target, smoothing=0.0):
    """Losses and gradients with a table and weights, against the equations in float64."""
    num_samples, num_experts, num_classes = logits.shape
    table = -9 * torch.rand(num_experts, num_classes, dtype=torch.float64, device=DEVICE)
    weights = 1 + torch.rand(num_samples, num_experts, device=DEVICE).to(
        functional.compute_dtype(logits.dtype)
    )
    leaf = logits.double().requires_grad_()
    losses = functional.lgla_loss(leaf, target, table, weights.double(), label_smoothing=smoothing)
    expected = losses.sum() / 3
    expected.backward()
    total, gradient = loss_and_gradient(logits, target, table, weights, smoothing)
    close(total, expected)
    close(gradient, leaf.grad)


@pytest.mark.cuda
class TestRowsOfSeveralBlocks:
    """With blocks of 16 classes, so that few classes are a long row."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch):
        monkeypatch.setattr(kernels, "forward_tile", lambda *_: kernels.Tile(1, 16, 4))

    # Each is compiled anew on a GPU.
    @pytest.mark.parametrize(
        "num_classes", [17, 31, 32, 33, 48, 49, 64, 65] if DEVICE == "cpu" else [17, 32, 48, 65]
    )
    def test_every_number_of_blocks(self, num_classes, close):
        """One more class than whole blocks or pairs of them, as many, and one less."""
        logits, target = batch(3, num_classes, torch.float32)
        target[1] = -100
        target[2] = num_classes - 1
        check_long_rows(close, logits, target, smoothing=0.1)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_every_type(self, dtype, smoothing, close):
        check_long_rows(close, *batch(3, 40, dtype), smoothing)

    @pytest.mark.parametrize("order", ["rising", "falling"])
    def test_maxima_that_come_early_and_late(self, order, close):
        """Every block raises the maximum of every lane, or none does after the first."""
        logits, target = batch(2, 64)
        logits = logits.sort(dim=2, descending=order == "falling").values.contiguous()
        check_long_rows(close, logits, target)

    def test_lanes_that_meet_nothing_but_minus_infinity(self, close):
        logits, target = batch(2, 64)
        logits[0, :, 5::16] = -float("inf")  # one lane of every block
        logits[1, :, :48] = -float("inf")
        target[:] = torch.tensor([4, 50], device=DEVICE)
        check_long_rows(close, logits, target)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_lowest_finite_number_is_a_logit_as_others_are(self, dtype):
        """Masks are made with it. A row of it alone has as many classes as any."""
        logits = torch.full((1, 1, 40), torch.finfo(dtype).min, dtype=dtype, device=DEVICE)
        target = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        losses, _ = kernels.forward([logits], Rows(target), [None])
        assert losses.item() == pytest.approx(torch.tensor(40.0).log().item(), rel=1e-6)

    def test_a_row_of_minus_infinity_is_not_a_number(self):
        logits, target = batch(3, 40, torch.float32)
        logits[1] = -float("inf")
        losses, state = kernels.forward([logits], Rows(target), [None])
        assert losses.isnan().tolist() == [False, True, False]
        assert (state[1, :, 0] == -float("inf")).all()

    @pytest.mark.parametrize("column", [0, 15, 16, 39])
    def test_what_is_not_a_number_reaches_its_row_and_no_other(self, column):
        logits, target = batch(3, 40, torch.float32)
        target[:] = 20
        logits[1, :, column] = float("nan")
        gradient = torch.empty_like(logits)
        losses, _ = kernels.forward([logits], Rows(target), [gradient])
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert not gradient[[0, 2]].isnan().any()

    @pytest.mark.parametrize("far", [0.0, -1e6], ids=["near", "far"])
    def test_a_mean_of_all_logits_keeps_the_digits_of_large_ones(self, far, close):
        """Also where the target's own logit is far from all others."""
        logits, target = batch(2, 40, torch.float32)
        logits += 1e4
        logits[0, :, target[0]] += far
        losses, _ = kernels.forward([logits], Rows(target, label_smoothing=0.9), [None])
        table = torch.zeros(3, 40, dtype=torch.float64, device=DEVICE)
        close(losses, functional.lgla_loss(logits.double(), target, table, label_smoothing=0.9))

    def test_gradient_over_the_logits(self):
        logits, target = batch(3, 40, torch.float32)
        _, expected = loss_and_gradient(logits, target, None, None, 0.1)
        divisor = torch.tensor(3.0, device=DEVICE)
        rows = Rows(target, divisor=divisor, label_smoothing=0.1, reduce=True)
        kernels.forward([logits], rows, [logits])
        assert torch.equal(logits, expected)

    def test_a_table_written_into_counts_at_the_next_step(self):
        """Its copy in float32 is made anew."""
        logits, target = batch(2, 40, torch.float32)
        table = torch.zeros(3, 40, dtype=torch.float64, device=DEVICE)
        before, _ = loss_and_gradient(logits, target, table, None, 0.0)
        table[:, ::2] = -5.0
        after, _ = loss_and_gradient(logits, target, table, None, 0.0)
        assert after != before


# On a GPU wide tiles take seconds to compile.
@pytest.mark.cuda
@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("num_classes", [8142, 8193, 16_384, 16_385] if DEVICE == "cpu" else [8142, 16_385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_tiles_in_use(num_classes, dtype, close):
    check_long_rows(close, *batch(1, num_classes, dtype), smoothing=0.1)


#: Tiles of every kernel of plain rows of 30 classes.
TILES = {
    "whole": kernels.Tile(4, 32, 4),
    "lean": kernels.Tile(1, 32, 4, lean=True),
    "lean, table read often": kernels.Tile(1, 32, 4, lean=True, keep=False),
    "streamed": kernels.Tile(1, 16, 4),
}


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    """The tile in use."""
    monkeypatch.setattr(kernels, "forward_tile", lambda *_: TILES[request.param])


@pytest.mark.cuda
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_one_program_takes_in_turn(in_place, smoothing, monkeypatch, close):
    """Each as if it were alone, also where the gradient takes the logits' memory, as in the linear loss."""
    monkeypatch.setattr(kernels, "_resident_programs", lambda *_: 6)
    logits, target = batch(19, 30, torch.float32)
    target[3] = -100
    logits[3, 0, 7] = float("nan")
    logits[4] += 1e4
    logits[5, 1, :] = -float("inf")
    logits[5, 1, target[5]] = 2.0
    logits[6, 2, :] = torch.finfo(torch.float32).min
    table = -9 * torch.rand(3, 30, dtype=torch.float64, device=DEVICE)
    table[2] = 0.0
    leaf = torch.where((target == -100)[:, None, None], 0.0, logits.double()).requires_grad_()
    losses = functional.lgla_loss(leaf, target, table, None, label_smoothing=smoothing)
    losses.sum().backward()

    gradient = logits if in_place else torch.full_like(logits, float("nan"))
    rows = Rows(target, table, label_smoothing=smoothing)
    found, _ = kernels.forward([logits], rows, [gradient])
    # Sums of a table and of logits near 10,000 are multiples of 0.001.
    exact = torch.arange(19, device=DEVICE) != 4
    close(found[exact], losses[exact])
    close(gradient[exact], leaf.grad[exact])
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=2e-3)


@pytest.mark.cuda
@pytest.mark.usefixtures("tile")
def test_a_logit_of_1e36_leaves_numbers(monkeypatch, close):
    """A GPU rounds a product and a sum once, and Triton's interpreter twice, if it is left to itself."""

    def fma(_, x, y, z):
        exact = x.data.astype("float64") * y.data + z.data
        return type(x)(exact.astype(x.data.dtype), x.dtype)

    if DEVICE == "cpu":
        monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_fma", fma)
    logits, target = batch(2, 30, torch.float32)
    logits[0, 0, target[0]] = 1e36
    logits[1, 1, target[1]] = -1e36
    gradient = torch.empty_like(logits)
    losses, _ = kernels.forward([logits], Rows(target), [gradient])
    leaf = logits.double().requires_grad_()
    expected = functional.lgla_loss(leaf, target, torch.zeros(3, 30, device=DEVICE), None)
    expected.sum().backward()
    close(losses, expected)
    close(gradient, leaf.grad)


def test_a_class_that_does_not_exist_is_not_stored(monkeypatch):
    """Its row is not a number, and the others are as they were."""
    monkeypatch.setattr(kernels, "forward_tile", lambda *_: kernels.Tile(1, 32, 4, lean=True))
    logits, target = batch(5, 30, torch.float32)
    expected = torch.empty_like(logits)
    kernels.forward([logits], Rows(target), [expected])
    target[2] = 30
    gradient = torch.empty_like(logits)
    losses, _ = kernels.forward([logits], Rows(target), [gradient])
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(gradient[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_plans_are_chosen_by_name():
    before = kernels.plan()
    tile = kernels.forward_tile(8142, torch.float32)
    assert kernels.use("resident") == before
    assert kernels.plan() == "resident"
    assert kernels.forward_tile(8142, torch.float32) != tile
    assert kernels.use(before) == "resident"
    assert kernels.forward_tile(8142, torch.float32) == tile


def test_every_plan_is_measured_where_it_differs(monkeypatch):
    choices = pytest.importorskip("choices")
    assert {*choices.OTHER_PLANS, kernels.plan()} == {*kernels.PLANS}
    for num_classes in (2, 2048, 2049, 16_384, 16_385, 100_000):
        tiles = {}
        for plan in kernels.PLANS:
            monkeypatch.setattr(kernels, "_plan", plan)
            tiles[plan] = kernels.forward_tile(num_classes, torch.bfloat16)
        other = {plan for plan, tile in tiles.items() if tile != tiles["wide"]}
        assert other == {*choices.other_plans(num_classes)}


def test_a_plan_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"plan: expected one of 'wide', 'resident', 'two-rows', got 'fastest'"
    ):
        kernels.use("fastest")


def test_amd_has_one_plan():
    tile = kernels.forward_tile(8142, torch.float32, architecture=None)
    assert tile == kernels.Tile(1, 8192, 16, 64)
    assert tile.options(None) == {"num_warps": 16}


@pytest.mark.parametrize(
    ("num_samples", "tile"),
    [
        (0, kernels.Tile(32, 4, 1)),
        (128, kernels.Tile(32, 4, 1)),
        (4096, kernels.Tile(32, 4, 1)),
        (16_385, kernels.Tile(256, 4, 4)),
        (1_000_000, kernels.Tile(1024, 4, 16)),
    ],
)
def test_samples_are_shared_by_up_to_128_programs(num_samples, tile):
    """Or by as many as it takes with the largest tiles."""
    assert kernels.sample_tile(3, num_samples) == tile
    assert -(-num_samples // tile.rows) <= max(128, num_samples // 1024 + 1)


@pytest.mark.cuda
@pytest.mark.parametrize(("num_samples", "launches"), [(0, 1), (1, 1), (256, 1), (257, 2)])
def test_weights_of_few_samples_take_one_launch(num_samples, launches, monkeypatch, close):
    logits, target = batch(num_samples, 6, torch.float32)
    samples = Samples(
        target, torch.randint(2, (6,), device=DEVICE), 2, torch.rand(num_samples, device=DEVICE)
    )
    angles, run, names = Angles(cosines=[logits], scale=30.0), kernels._launch, []
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, *a, **k: (names.append(kernel), run(kernel, *a, **k))
    )
    weights, number = kernels.weights(angles, samples)
    assert len(names) == launches
    own, parts = kernels.statistics(angles, samples)
    expected = kernels.weights(own, samples, parts)
    close(weights, expected[0])
    close(number, expected[1])


@pytest.mark.cuda
def test_weights_of_many_programs_have_the_same_bits_in_every_run(close):
    logits, target = batch(5000, 6, torch.float32)
    samples = Samples(target, torch.randint(2, (6,), device=DEVICE), 2)

    def found():
        given, parts = kernels.statistics(Angles(cosines=[logits], scale=30.0), samples)
        return given.angles, parts, *kernels.weights(given, samples, parts)

    angles, parts, weights, number = found()
    assert len(parts) == 79
    assert all(map(torch.equal, found(), (angles, parts, weights, number)))
    group = functional.target_groups(target, samples.group_index, -100)
    close(weights, functional.aaw_weights(angles, group, functional.aaw_statistics(angles, group, 2)))
    assert number == 5000


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [2, 100, 1000, 4096, 8142, 16_384, 100_000])
def test_programs_fit_every_gpu(num_classes, dtype):
    """AMD runs up to 16 warps a program; NVIDIA 32, and 65,536 registers on a multiprocessor."""
    tile = kernels.forward_tile(num_classes, dtype)
    amd = kernels.forward_tile(num_classes, dtype, architecture=None).options(None)
    assert amd.keys() == {"num_warps"}
    assert amd["num_warps"] <= 16
    for architecture in (80, 90, 100, 120):
        nvidia = tile.options(architecture)
        assert nvidia["num_warps"] <= 32
        assert nvidia["num_warps"] * 32 * nvidia.get("maxnreg", 0) <= 65536


def test_registers_are_limited_where_a_program_would_have_a_multiprocessor_to_itself():
    assert kernels.forward_tile(8142, torch.float32).options(90) == {"num_warps": 8, "maxnreg": 128}
    assert kernels.forward_tile(8142, torch.bfloat16).options(90) == {"num_warps": 4, "maxnreg": 128}
    longer = kernels.forward_tile(50_000, torch.float32)
    assert longer.options(90) == {"num_warps": 32, "maxnreg": 64}
    assert kernels.forward_tile(1000, torch.float32).options(90) == {"num_warps": 4}
    assert kernels.forward_tile(4096, torch.float64).options(90) == {"num_warps": 16}


def compile_kernels(directory, *options):
    """The record of benchmarks/kernel_resources.py, which compiles anew for GPUs that need not be here."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("needs Triton 3.3 to compile for other machines")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(directory / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
    output = directory / "record.json"
    subprocess.run(
        [sys.executable, script, "--output", output, *options], env=environment, check=True, timeout=900
    )
    return json.loads(output.read_text())["rows"]


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("usual", {"_statistics", "_weights", "_forward", "_forward_streamed", "_backward"}),
        pytest.param("all", {"_soft_statistics", "_soft_weights", "_shared"}, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_a_gpu(form, names, tmp_path):
    classes = ["--classes", "100", "100000"]
    rows = compile_kernels(tmp_path, "--targets", "sm_90", "--dtypes", "bfloat16", *classes, "--form", form)
    assert {row["kernel"] for row in rows} == names | {"_count", "_total", "_rescale"}
    assert all(row["spill_bytes"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("form", ["usual", "plain", "focal", "probabilities", "all"])
def test_kernels_compile_for_every_gpu(tmp_path, target, form):
    rows = compile_kernels(tmp_path, "--targets", target, "--form", form)
    assert all(row["spill_bytes"] == 0 for row in rows if row["configuration"]["dtype"] != "float64")
