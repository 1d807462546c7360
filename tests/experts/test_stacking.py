"""Layers as people write them: what independent experts do with them, a stack of experts does too."""

import copy
import functools
import pickle
import random
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compilers import TAKES_OWN_LAYERS, TAKES_STAGES
from reference import assert_same
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.tensorboard import SummaryWriter

from lgla_losses import GroupConvExperts, split_backbone

#: How the copies of a stack run.
RUNS = pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])

# Old forms of normalisation and of tracing say that there are newer ones.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Layers(nn.Module):
    """A linear layer, and what its subclasses do to its output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.prepare()

    def prepare(self):
        pass

    def forward(self, x):
        return self.change(self.linear(x))


class WritesBuffers(Layers):
    def prepare(self):
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("scale", torch.ones(4))

    def change(self, x):
        if self.training:
            self.calls += 1
            self.started.fill_(True)
            self.scale.lerp_(x.detach().abs().mean(0), 0.1)
        return x / self.scale + x * self.calls


class ReplacesBuffers(WritesBuffers):
    def change(self, x):
        if self.training:
            self.calls = self.calls + 1
            self.started = torch.tensor(True)
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean(0)
        return x / self.scale + x * self.calls


class BranchesOnABuffer(WritesBuffers):
    def change(self, x):
        if not self.started.item():
            self.scale.copy_(x.detach().abs().mean(0))
            self.started.fill_(True)
        return x / self.scale


class GrowsABuffer(Layers):
    def prepare(self):
        self.register_buffer("bank", torch.zeros(1, 4))

    def change(self, x):
        if self.training:
            self.bank = torch.cat([self.bank, x.detach()])
        return x - self.bank.mean(0)


class MakesABuffer(Layers):
    def prepare(self):
        self.register_buffer("center", None)

    def change(self, x):
        if self.center is None:
            self.center = x.detach().mean(0)
            self.register_buffer("spread", x.detach().std(0))
        return (x - self.center) / self.spread


class BoundsItsWeight(nn.Linear):
    """As EEGNet's layers with a maximum norm."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


class KeepsItsOutput(Layers):
    def change(self, x):
        self.last = x
        self.seen = {"maps": [x.exp()]}
        return x


class Caches(Layers):
    """As timm's LeViT, which keeps biases of attention until it trains again."""

    def prepare(self):
        self.bias = nn.Parameter(torch.randn(4))
        self.cache = {}

    def train(self, mode=True):
        if mode and self.cache:
            self.cache = {}
        return super().train(mode)

    def change(self, x):
        if self.training:
            return x + 2 * self.bias
        if "bias" not in self.cache:
            self.cache["bias"] = [2 * self.bias]
        return x + self.cache["bias"][0]


class Counts(Layers):
    def prepare(self):
        self.calls = 0

    def change(self, x):
        self.calls += 1
        return x / self.calls


class RemembersTheBatchBefore(Layers):
    def prepare(self):
        self.before = ()

    def change(self, x):
        self.before = (*self.before, x.detach())[-2:]
        return x + self.before[0].mean(0)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(x @ self.encoder.weight)


class OneBlockUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleDict({"a": nn.Sequential(self.first, nn.BatchNorm1d(4))})
        self.again = self.blocks["a"]

    def forward(self, x):
        return self.again(self.blocks["a"](self.first(x)))


def at_two_paths(layer):
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4), layer)


def normed(**options):
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, **options), nn.Dropout(0.0))


def pruned():
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 4))


STAGES = {
    "PReLU at two paths": lambda: at_two_paths(nn.PReLU(4)),
    "layer norm at two paths": lambda: at_two_paths(nn.LayerNorm(4)),
    "batch norm at two paths": lambda: at_two_paths(nn.BatchNorm1d(4)),
    "activation at two paths": lambda: at_two_paths(nn.GELU()),
    "linear at two paths": lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2),
    "a block under two names": OneBlockUnderTwoNames,
    "tied embedding": TiedEmbedding,
    "cumulative batch norm": lambda: normed(momentum=None),
    "batch norm without statistics": lambda: normed(track_running_stats=False),
    "batch norm without weights": lambda: normed(affine=False),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "old spectral norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "old weight norm": lambda: weight_norm(nn.Linear(4, 4)),
    "pruned": pruned,
    "recurrent": Recurrent,
    "attention": Attention,
    "writes buffers": WritesBuffers,
    "replaces buffers": ReplacesBuffers,
    "branches on a buffer": BranchesOnABuffer,
    "grows a buffer": GrowsABuffer,
    "makes a buffer": MakesABuffer,
    "bounds its weight": lambda: BoundsItsWeight(4, 4),
    "keeps its output": KeepsItsOutput,
    "caches": Caches,
    "counts": Counts,
    "remembers the batch before": RemembersTheBatchBefore,
}

#: What vmap refuses: out= of old and new spectral norms, a fused kernel, .data.
ONE_BY_ONE = {"spectral norm", "old spectral norm", "recurrent", "bounds its weight"}


def twins(make, together=False):
    """Experts in both layouts, with the same weights, in float64."""
    pair = []
    for layout in ("grouped", "independent"):
        torch.manual_seed(0)
        pair.append(GroupConvExperts(make, 3, 5, num_features=4, layout=layout).double())
    grouped, independent = pair
    grouped.together = together
    return grouped, independent


def state(experts):
    """What a layout saves of its stage, the copies stacked."""
    if isinstance(experts.stage, nn.ModuleList):
        states = [expert.state_dict() for expert in experts.stage]
        return {name: torch.stack([s[name] for s in states]) for name in states[0]}
    return dict(experts.stage.state_dict())


def gradients(experts):
    if isinstance(experts.stage, nn.ModuleList):
        names = [name for name, _ in experts.stage[0].named_parameters()]
        return {n: torch.stack([e.get_parameter(n).grad for e in experts.stage]) for n in names}
    return {name: parameter.grad for name, parameter in experts.stage.named_parameters()}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert_same(tensor.double(), expected[name].double())


# vmap runs attention on a CPU copy by copy and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@RUNS
@pytest.mark.parametrize("name", STAGES)
def test_a_stack_trains_as_independent_experts_do(name, together):
    if together and name in ONE_BY_ONE:
        pytest.skip("cannot run together; see below")
    pair = twins(STAGES[name], together)
    optimizers = [torch.optim.SGD(experts.parameters(), lr=0.01) for experts in pair]
    for training in (True, True, False, True, False):
        inputs, seen = torch.randn(6, 4, dtype=torch.float64), []
        for experts, optimizer in zip(pair, optimizers, strict=True):
            experts.train(training).zero_grad()
            shared = inputs.clone().requires_grad_()
            output = experts(shared)
            (output.logits * torch.arange(5)).sum().backward()
            seen.append({"logits": output.logits.detach(), "gradient": shared.grad, **gradients(experts)})
            optimizer.step()
        assert_same_tensors(*seen)
        assert_same_tensors(*map(state, pair))

    grouped, independent = (experts.eval() for experts in pair)
    shared = torch.randn(6, 4, dtype=torch.float64)
    converted = [grouped.to_independent(), grouped.to_grouped()]
    single = grouped.extract(1)
    if name == "keeps its output":
        for expert in independent.stage:
            del expert.last, expert.seen
    if name not in ("caches", "remembers the batch before"):
        converted.append(independent.to_grouped())
    expected = independent(shared).logits
    for experts in (grouped, *converted):
        assert_same(experts(shared).logits, expected)
    assert_same(single(shared), expected[:, 1])


@pytest.mark.parametrize("name", sorted(ONE_BY_ONE))
def test_what_cannot_run_together_says_how_it_can(name):
    grouped, independent = twins(STAGES[name], together=True)
    shared = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cannot run grouped .*experts\.together = False.*independent"):
        grouped(shared)
    grouped.together = False
    assert_same(grouped(shared).logits, independent(shared).logits)


def test_experts_that_have_run_are_copied_and_pickled():
    """After a batch recurrent layers list the weights of the last copy."""
    grouped, _ = twins(lambda: nn.Sequential(Recurrent(), nn.BatchNorm1d(4)))
    shared = torch.randn(6, 4, dtype=torch.float64)
    grouped(shared).logits.sum().backward()
    expected = grouped.eval()(shared).logits
    for twin in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        assert_same(twin(shared).logits, expected)


@RUNS
def test_what_layers_keep_of_a_batch_can_be_read(together):
    grouped, independent = twins(KeepsItsOutput, together)
    shared = torch.randn(6, 4, dtype=torch.float64)
    grouped(shared), independent(shared)
    kept = torch.stack([expert.last for expert in independent.stage])
    for actual in (grouped.stage.last, grouped.stage.seen["maps"][0].log()):
        assert_same(actual, kept if together else kept[-1])


@pytest.mark.parametrize("convert", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
@RUNS
def test_what_layers_keep_survives_copies_and_another_way_of_running(together, convert):
    grouped, independent = twins(lambda: nn.Sequential(Caches(), Counts()), together)
    shared = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        for experts in (grouped.eval(), independent.eval()):
            experts(shared)
        expected = independent(shared).logits
        twin = convert(grouped)
        for experts in (twin, grouped):
            experts.together = not together
            assert_same(experts(shared).logits, expected)
        expected = independent(shared).logits
        twin.together = together
        assert_same(twin(shared).logits, expected)
        twin.stage[0].bias.zero_()
        for expert in independent.stage:
            expert[0].bias.zero_()
        for experts in (twin, independent):
            experts.train().eval()
        assert_same(twin(shared).logits, independent(shared).logits)
        twin.stage[1].calls = 0
        for expert in independent.stage:
            expert[1].calls = 0
        assert_same(twin(shared).logits, independent(shared).logits)


def test_a_cache_that_its_user_empties_is_empty_for_every_copy():
    grouped, independent = twins(Caches)
    shared = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        for experts in (grouped.eval(), independent.eval()):
            experts(shared)
        grouped.stage.bias.zero_()
        grouped.stage.cache.clear()
        for expert in independent.stage:
            expert.bias.zero_()
            expert.cache.clear()
    assert_same(grouped(shared).logits, independent(shared).logits)


def test_copies_that_count_apart_cannot_run_together():
    class CountsPositives(Layers):
        seen = 0

        def change(self, x):
            self.seen += int((x > 0).sum())
            return x / (1 + self.seen)

    grouped, _ = twins(CountsPositives)
    shared = torch.randn(6, 4, dtype=torch.float64)
    grouped(shared)
    grouped.together = True
    with pytest.raises(ValueError, match=r"'seen' of layer ''.*CountsPositives.*experts\.together = False"):
        grouped(shared)


@RUNS
def test_a_container_that_a_factory_shares_is_written_by_every_copy(together):
    class Reports(Layers):
        def __init__(self, shapes):
            super().__init__()
            self.shapes = shapes

        def change(self, x):
            self.shapes.append(x.shape)
            return x

    shapes = []
    grouped, _ = twins(lambda: Reports(shapes), together)
    grouped(torch.randn(6, 4, dtype=torch.float64))
    assert shapes == [(6, 4)] * (1 if together else 3)


@RUNS
def test_threads_may_share_experts(together):
    grouped, independent = twins(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), together)
    grouped.eval(), independent.eval()
    shared, failures = torch.randn(6, 4, dtype=torch.float64), []
    expected = independent(shared).logits

    def serve():
        try:
            for _ in range(100):
                assert_same(grouped(shared).logits, expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("together", [True, False])
def test_experts_may_be_part_of_experts(together):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = GroupConvExperts(Counts, 2, 4, num_features=4)
            self.experts.together = together

        def forward(self, x):
            return self.experts(x).ensemble()

    grouped, independent = twins(Nested, together)
    shared = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(3):
        assert_same(grouped(shared).logits, independent(shared).logits)


def test_constants_that_all_experts_share_are_stacked():
    """Of any type, in lists too."""

    class Constants(Layers):
        def prepare(self):
            self.options = [
                torch.ones(3, dtype=torch.bfloat16),
                torch.tensor(1 + 2j),
                np.eye(2),
                np.array([None]),
            ]

    assert GroupConvExperts(Constants, 3, 7).stage.options[0].dtype == torch.bfloat16


def test_experts_with_constants_of_their_own_are_not_stacked():
    class Constant(Layers):
        def prepare(self):
            self.frequencies = torch.randn(4)

        def change(self, x):
            return x * self.frequencies

    message = r"alike.*Constant that differ in 'frequencies'.*buffer.*independent"
    with pytest.raises(ValueError, match=message):
        GroupConvExperts(Constant, 3, 7)
    independent = GroupConvExperts(Constant, 3, 7, layout="independent")
    with pytest.raises(ValueError, match=message):
        independent.to_grouped()


def test_the_first_batch_runs_each_expert_once():
    """No trial moves Python's random numbers or calls hooks and layers a second time."""
    numbers = []

    class Draws(Layers):
        calls = 0

        def change(self, x):
            self.calls += 1
            numbers.append(random.random())
            return x

    experts, seen = GroupConvExperts(Draws, 3, 7), []
    experts.stage.linear.register_forward_hook(lambda *_: seen.append(1))
    random.seed(0)
    expected = [random.random() for _ in range(6)]
    random.seed(0)
    for training in (True, False):
        experts.train(training)(torch.randn(2, 4))
    assert numbers == expected
    assert len(seen) == 6
    assert experts.stage.calls == 2


@dataclass
class Recorder:
    """As a SummaryWriter it holds what nobody can copy."""

    lock: Any = field(default_factory=threading.Lock)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, layer, inputs, output):
        self.shapes.append(tuple(output.shape))


HOOKS = {
    "an object": lambda recorder: recorder,
    "a method": lambda recorder: recorder.__call__,
    "a partial": lambda recorder: functools.partial(Recorder.__call__, recorder),
    "a partial with a number": lambda recorder: functools.partial(
        lambda owner, number, *args: owner(*args), recorder, 4
    ),
    "a function": lambda recorder: lambda *args: recorder(*args),
}


@pytest.mark.parametrize("layout", ["grouped", "independent"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("lock", [threading.Lock, object], ids=["a lock", "nothing"])
def test_hooks_are_called_whatever_they_hold(lock, kind, when, layout):
    recorder = Recorder(lock())
    stage = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    if when == "before":
        stage[0].register_forward_hook(HOOKS[kind](recorder))
    experts = GroupConvExperts(stage, 3, 7, layout=layout, reset=True)
    if when == "after":
        for layer in [experts.stage[0]] if layout == "grouped" else [e[0] for e in experts.stage]:
            layer.register_forward_hook(HOOKS[kind](recorder))
    for training in (True, False):
        experts.train(training)(torch.randn(2, 4))
    experts.to_independent()(torch.randn(2, 4))
    experts.extract(0)(torch.randn(2, 4))
    assert recorder.shapes == [(2, 4)] * (6 + 3 + 1)


def test_a_hook_that_is_a_method_of_a_layer_belongs_to_that_layers_copy():
    class Watches(Layers):
        def prepare(self):
            self.linear.register_forward_hook(self.watch)
            self.linear.register_forward_hook(Recorder())
            self.linear.register_forward_hook(functools.partial(Watches.watch, self))
            self._register_load_state_dict_pre_hook(self.loads)

        def loads(self, *_):
            self.loaded = True

        def watch(self, layer, inputs, output):
            self.width = output.shape[-1]

        def change(self, x):
            return x * self.width

    experts = GroupConvExperts(Watches(), 3, 7, layout="independent", reset=True)
    experts(torch.randn(2, 4))
    hooks = [hook for expert in experts.stage for hook in expert.linear._forward_hooks.values()]
    assert [hook.__self__ for hook in hooks[::3]] == list(experts.stage)
    assert [hook.args[0] for hook in hooks[2::3]] == list(experts.stage)
    experts.stage[1].load_state_dict(experts.stage[1].state_dict())
    assert [hasattr(expert, "loaded") for expert in experts.stage] == [False, True, False]


@pytest.mark.parametrize("layout", ["grouped", "independent"])
@pytest.mark.parametrize("name", ["pruned", "old weight norm", "old spectral norm", "keeps its output"])
def test_a_stage_that_has_run_before_can_be_copied(name, layout):
    """Its layers hold tensors with a graph, which copy.deepcopy refuses."""
    stage, shared = STAGES[name](), torch.randn(6, 4)
    stage(shared)
    experts = GroupConvExperts(stage, 3, 7, num_features=4, reset=False, layout=layout).eval()
    expected = stage.eval()(shared)
    torch.testing.assert_close(experts(shared).features, torch.stack([expected] * 3, dim=1))


@RUNS
def test_update_bn_recomputes_the_statistics_of_experts(together):
    grouped, independent = twins(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), together)
    loader = [torch.randn(n, 4, dtype=torch.float64) for n in (6, 4, 7)]
    averages = []
    for experts in (grouped, independent):
        average = AveragedModel(experts)
        average.update_parameters(experts)
        update_bn(loader, average)
        averages.append(average.module)
    assert_same_tensors(*map(state, averages))
    assert averages[0].stage[1].num_batches_tracked.tolist() == [3, 3, 3]
    assert averages[0].stage[1].momentum == 0.1


def test_an_average_over_buffers_is_that_of_independent_experts():
    averages = []
    for experts in twins(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))):
        torch.manual_seed(1)
        average = AveragedModel(experts, use_buffers=True)
        for _ in range(3):
            experts(torch.randn(6, 4, dtype=torch.float64))
            average.update_parameters(experts)
        averages.append(average.module)
    assert_same_tensors(*map(state, averages))


def test_copies_that_differ_in_what_a_layer_reads_cannot_run_together():
    grouped, _ = twins(lambda: nn.Sequential(nn.BatchNorm1d(4, momentum=None)), together=True)
    grouped.stage[0].num_batches_tracked[1] = 5
    with pytest.raises(ValueError, match=r"'0' of type BatchNorm1d.*differs between the copies.*together"):
        grouped(torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_experts_are_traced(layout, together):
    experts = GroupConvExperts(lambda: normed(), 3, 7, num_features=4, layout=layout).eval()
    experts.together = together
    traced = torch.jit.trace(experts, torch.randn(2, 4))
    shared = torch.randn(5, 4)
    for actual, expected in zip(traced(shared), experts(shared), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_tensorboard_draws_the_graph_of_experts(layout, tmp_path):
    experts = GroupConvExperts(lambda: normed(), 3, 7, num_features=4, layout=layout)
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(experts, torch.randn(2, 4))
    (file,) = tmp_path.iterdir()
    assert b"batch_norm" in file.read_bytes()


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_gradients_of_single_samples_go_through_experts(layout):
    experts = GroupConvExperts(lambda: normed(), 3, 7, num_features=4, layout=layout).eval().double()
    parameters, buffers = dict(experts.named_parameters()), dict(experts.named_buffers())

    def of_one(parameters, sample):
        return torch.func.functional_call(experts, (parameters, buffers), (sample[None],)).logits.sum()

    shared = torch.randn(5, 4, dtype=torch.float64)
    single = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0))(parameters, shared)
    experts(shared).logits.sum().backward()
    for name, parameter in parameters.items():
        assert_same(single[name].sum(0), parameter.grad)


def test_a_forward_pass_that_autograd_would_refuse_is_refused_in_either_layout():
    """Writes into a buffer between forward and backward are counted, from one call to the next."""

    class Scales(Layers):
        def prepare(self):
            self.register_buffer("scale", torch.ones(4))

        def change(self, x):
            self.scale.mul_(2)
            return x * self.scale

    for experts in twins(Scales):
        loss = sum(experts(torch.randn(6, 4, dtype=torch.float64)).logits.sum() for _ in range(2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class WritesWeight(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight))
        return super().forward(x)


class KeepsAList(Layers):
    def prepare(self):
        self.weights = [self.linear.weight]


class Holds(Layers):
    """Its own weight in something else."""

    def prepare(self):
        self.held = self.holder(self.linear.weight)


class HoldsAPartial(Holds):
    def holder(self, weight):
        return functools.partial(F.linear, weight=weight)


class HoldsAnObject(Holds):
    def holder(self, weight):
        return Recorder(lock=None, shapes={"weight": weight})


class HoldsASet(Holds):
    def holder(self, weight):
        return {weight}


class HoldsAFunction(Holds):
    def holder(self, weight):
        return lambda x: F.linear(x, weight)


class HoldsAMethod(Holds):
    def holder(self, weight):
        return weight.matmul


class HoldsAModule(Holds):
    def holder(self, weight):
        twin = nn.Linear(4, 4)
        twin.weight = weight
        return [twin]


class HoldsItInAHook(Holds):
    def holder(self, weight):
        self.linear.register_forward_hook(lambda layer, inputs, output: output + weight.sum())


class SharesMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight.data = self.encoder.weight.data


class KeepsAGraph(Layers):
    def prepare(self):
        self.register_buffer("center", torch.zeros(4))

    def change(self, x):
        self.center = x.mean(0)
        return x - self.center


class LosesABuffer(KeepsAGraph):
    def change(self, x):
        self.center = None
        return x


class MakesAParameter(nn.Linear):
    def forward(self, x):
        self.weight = nn.Parameter(F.normalize(self.weight))
        return super().forward(x)


HELD = r"'linear\.weight' from where it is registered.*keeps it in 'held'"
REFUSED = {
    "writes its weight": (lambda: nn.Sequential(WritesWeight(4, 4)), r"'0' of type WritesWeight.*\.data"),
    "keeps a list": (KeepsAList, r"'linear\.weight' .*keeps it in 'weights'.*ParameterList"),
    "keeps a partial": (HoldsAPartial, HELD),
    "keeps an object": (HoldsAnObject, HELD),
    "keeps a set": (HoldsASet, HELD),
    "keeps a function": (HoldsAFunction, HELD),
    "keeps a method": (HoldsAMethod, HELD),
    "keeps a module in a list": (HoldsAModule, HELD),
    "keeps a hook": (HoldsItInAHook, HELD.replace("held", "_forward_hooks")),
    "shares memory": (
        SharesMemory,
        r"'encoder\.weight' and 'decoder\.weight', two tensors in the same memory",
    ),
    "compiled": (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 4))), r"'0', which is compiled"),
    "keeps a graph": (
        lambda: nn.Sequential(KeepsAGraph()),
        r"'0\.center' to something else; write into it by \.copy_\(\)",
    ),
    "loses a buffer": (LosesABuffer, r"'center' to something else; write into it"),
    "makes a parameter": (lambda: MakesAParameter(4, 4), r"'weight' to something else; write into it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stack_cannot_keep_is_refused_by_name(name):
    stage, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"stage: expected .*{message}.*layout='independent'"):
        GroupConvExperts(stage, 3, 7, num_features=4)(torch.randn(2, 4))


def test_a_refused_batch_leaves_the_stack_whole():
    experts = GroupConvExperts(KeepsAGraph, 3, 7, num_features=4)
    before = state(experts)
    with pytest.raises(ValueError, match="'center'"):
        experts(torch.randn(2, 4))
    assert_same_tensors(state(experts), before)


#: Behind a break of the graph 2.11 looks at gradients that no tensor there has.
BREAKS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.mark.parametrize(
    ("name", "fullgraph"),
    [
        ("batch norm at two paths", TAKES_STAGES),
        pytest.param("replaces buffers", TAKES_OWN_LAYERS, marks=() if TAKES_OWN_LAYERS else BREAKS),
        ("pruned", TAKES_STAGES),
    ],
)
def test_a_stack_compiles_as_one_graph(name, fullgraph):
    pair = [experts for _ in range(2) for experts in twins(STAGES[name])[:1]]
    compiled = torch.compile(pair[0], backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        shared, seen = torch.randn(6, 4, dtype=torch.float64), []
        for experts, run in zip(pair, (compiled, pair[1]), strict=True):
            experts.zero_grad()
            logits = run(shared).logits
            (logits * torch.arange(5)).sum().backward()
            seen.append({"logits": logits.detach(), **gradients(experts)})
        assert_same_tensors(*seen)
        assert_same_tensors(*map(state, pair))


def test_a_compiled_stack_keeps_the_caches_of_its_copies_apart():
    grouped, independent = (experts.eval() for experts in twins(Caches))
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=TAKES_OWN_LAYERS)
    shared = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            assert_same(compiled(shared).logits, independent(shared).logits)
    assert_same(grouped(shared).logits, independent(shared).logits)


class Remembering(nn.Module):
    """A cache of a parameter and a counter, as people keep them in attributes."""

    def __init__(self):
        super().__init__()
        self.bias, self.cache, self.calls = nn.Parameter(torch.randn(8)), {}, 0

    def forward(self, x):
        self.calls += 1
        if "bias" not in self.cache:
            self.cache["bias"] = 2 * self.bias.detach()
        return x + self.cache["bias"] / self.calls


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.memory, self.head = nn.Linear(4, 8), Remembering(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.memory(self.body(x)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), GroupConvExperts.to_grouped]
)
def test_a_stage_of_split_backbone_keeps_what_each_expert_remembers(copied):
    """Copies of a torch.fx.GraphModule lose the attributes that it does not know."""
    _, stage = split_backbone(Network(), "memory")
    grouped = GroupConvExperts(stage, 3, 5, reset=False, num_features=8)
    with torch.no_grad():
        for parameter in grouped.parameters():
            parameter.add_(torch.randn_like(parameter))
    independent, x = grouped.to_independent(), torch.randn(2, 8)
    for _ in range(2):
        torch.testing.assert_close(grouped(x).logits, independent(x).logits)
    expected = copy.deepcopy(independent)(x).logits
    torch.testing.assert_close(copied(grouped)(x).logits, expected)
    torch.testing.assert_close(grouped.to_independent()(x).logits, expected)
