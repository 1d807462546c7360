"""Experts on shared features: one function in two layouts."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from reference import assert_same
from scripts import load
from torch import nn

from lgla_losses import ExpertOutput, GroupConvExperts, LGLALoss
from lgla_losses.experts import group_conv


class Residual(nn.Module):
    """A residual block whose shortcut is projected, or strided and zero-padded (ResNet option A)."""

    def __init__(self, inputs, outputs, stride, norm, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=True)
        self.norm2 = norm(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if shortcut == "projection" else None

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.project is not None:
            return F.relu(y + self.project(x))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.padding, self.padding)))


class Pooling(nn.Module):
    """Layers that see channels, space and functions of their own."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(8))
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.SiLU(), nn.Conv2d(2, 8, 1)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], dim=1)
        x = x * self.squeeze(x).sigmoid() * self.gate[:, None, None]
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))

    def reset_parameters(self):
        nn.init.normal_(self.gate)


class ChannelNorms(nn.Module):
    """ConvNeXt's: a norm over the channels of NCHW and one over those of NHWC, and a layer scale."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.channels_first = timm.layers.LayerNorm2d(8)
        self.channels_last = nn.LayerNorm(8)
        self.layer_scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        x = self.channels_first(self.conv(x))
        return x + self.layer_scale * self.channels_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention over the pixels, averaged."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1)


def group_norm(channels):
    return nn.GroupNorm(2, channels)


STAGES = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped and dilated conv": lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding="same"),
    "batch norm, projection": lambda: Residual(4, 8, 2, nn.BatchNorm2d, "projection"),
    "batch norm, zero padding": lambda: Residual(4, 8, 2, nn.BatchNorm2d, "padding"),
    "group norm, zero padding": lambda: Residual(4, 8, 2, group_norm, "padding"),
    "two blocks": lambda: nn.Sequential(
        Residual(4, 8, 2, nn.BatchNorm2d, "padding"), Residual(8, 8, 1, nn.BatchNorm2d, "padding")
    ),
    "pooling, activations, concatenation": Pooling,
    "no batch statistics": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU()
    ),
    "no parameters": lambda: nn.MaxPool2d(2),
    "one dimension, transposed, instance norm": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(4, 6, 3, bias=False),
        nn.InstanceNorm1d(6, affine=True, track_running_stats=True), nn.ReLU(),
        nn.ConvTranspose1d(6, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    ),
    "linear, batch norm": lambda: nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU()
    ),
    "two dimensions, transposed, instance norm": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.InstanceNorm2d(6, affine=True), nn.ReLU(),
        nn.Conv2d(6, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(),
    ),
    "three dimensions, transposed, batch norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 4, (1, 3, 3)), nn.BatchNorm3d(4), nn.ReLU(),
        nn.ConvTranspose3d(4, 6, (2, 3, 3)), nn.InstanceNorm3d(6, affine=True), nn.ReLU(),
    ),
    "channel layer norms, layer scale": ChannelNorms,
    "batch norm on the shared features": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
    "batch norm without weights": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "stochastic depth and dropout": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3), torchvision.ops.StochasticDepth(0.0, "row"), nn.Dropout2d(0.0), nn.Dropout(0.0)
    ),
    "attention": Attention,
}  # fmt: skip


WIDTHS = {
    "no parameters": 4,
    "two blocks": 8,
    "attention": 4,
    "channel layer norms, layer scale": 8,
}


def twins(name, classifier="cosine", device="cpu"):
    """The same experts in both layouts, in float64."""
    options = {"num_features": WIDTHS.get(name)}
    grouped = GroupConvExperts(STAGES[name], 3, 7, classifier=classifier, **options)
    grouped = grouped.to(device, torch.float64)
    return grouped, grouped.to_independent()


#: How the copies of the grouped layout run.
RUNS = pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])


# vmap runs attention on a CPU copy by copy and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@RUNS
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", STAGES)
def test_grouped_equals_independent_forward_and_backward(name, train, classifier, together, device):
    grouped, independent = (m.train(train) for m in twins(name, classifier, device))
    grouped.together = together
    inputs = torch.randn(5, 4, 8, 8, dtype=torch.float64, device=device)
    gradients = []
    outputs = []
    for module in (grouped, independent):
        shared = inputs.clone().requires_grad_()
        output = module(shared)
        torch.manual_seed(1)
        sum((t * torch.randn(t.shape, dtype=t.dtype, device=device)).sum() for t in output[:2]).backward()
        outputs.append(output)
        gradients.append(shared.grad)
    for actual, expected in zip(*outputs, strict=True):
        assert_same(actual, expected)
    assert_same(*gradients)
    assert_same(grouped.classifiers.weight.grad, independent.classifiers.weight.grad)
    for name, parameter in grouped.stage.named_parameters():
        copies = [expert.get_parameter(name).grad for expert in independent.stage]
        assert_same(parameter.grad, torch.stack(copies))
    for name, buffer in grouped.stage.named_buffers():
        assert_same(buffer.double(), torch.stack([e.get_buffer(name) for e in independent.stage]).double())


def test_an_experts_channels_reach_no_other_expert():
    """The authors' zero-padded shortcut leaks across experts at the second stage."""
    grouped, _ = twins("two blocks")
    shared = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    grouped(shared).logits[:, 1].sum().backward()
    for name, parameter in grouped.named_parameters():
        assert (parameter.grad[[0, 2]] == 0).all(), name
        assert (parameter.grad[1] != 0).any(), name


def test_layouts_convert_into_each_other_and_share_nothing():
    grouped, independent = twins("batch norm, projection")
    grouped.stage.conv1.weight.requires_grad_(False)
    independent = grouped.eval().to_independent()
    back = independent.to_grouped()
    assert (grouped.layout, independent.layout, back.layout) == ("grouped", "independent", "grouped")
    assert not back.training
    assert not back.stage.conv1.weight.requires_grad
    assert back.state_dict().keys() == grouped.state_dict().keys()
    for name, tensor in grouped.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    modules = (grouped, independent, back, grouped.to_grouped(), independent.to_independent())
    pointers = [t.untyped_storage().data_ptr() for m in modules for t in m.state_dict().values()]
    assert len(pointers) == len(set(pointers))


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(4, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    grouped = GroupConvExperts(Tied, 3, 7).double()
    independent = grouped.to_independent()
    assert grouped.stage.second.weight is grouped.stage.first.weight
    assert independent.stage[2].second.weight is independent.stage[2].first.weight
    shared = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_same(grouped(shared).logits, independent(shared).logits)


@RUNS
def test_random_layers_draw_independently_per_expert(together, device):
    experts = GroupConvExperts(lambda: nn.Dropout(0.5), 3, 7, num_features=64).to(device)
    experts.together = together
    features = experts(torch.ones(16, 64, device=device)).features
    kept = features != 0
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.3 < (kept[:, a] == kept[:, b]).double().mean() < 0.7


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_every_expert_is_initialised_as_its_ungrouped_self(layout):
    """The authors' ResNet-50 used the K-fold fan-out."""
    experts = GroupConvExperts(nn.Conv2d(64, 128, 3), 3, 7, layout=layout, reset=True).to_grouped()
    weight = experts.stage.weight
    bound = 1 / (64 * 9) ** 0.5
    for k in range(3):
        assert 0.95 * bound < weight[k].abs().max() <= bound
        assert weight[k].std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not torch.equal(weight[0], weight[1])


def test_a_block_initialises_after_its_layers():
    """Residual blocks that zero their last norm do so in their own reset_parameters()."""

    class ZeroNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.reset_parameters()

        def reset_parameters(self):
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return self.norm(x)

    for stage in (ZeroNorm, ZeroNorm()):
        assert (GroupConvExperts(stage, 3, 7, reset=True).stage.norm.weight == 0).all()


def test_classifiers_follow_the_stage():
    experts = GroupConvExperts(lambda: nn.Conv2d(4, 6, 3, device="meta", dtype=torch.float64), 3, 7)
    assert experts.classifiers.weight.dtype == torch.float64
    assert experts.classifiers.weight.is_meta


def test_channels_last_and_casts_reach_every_copy():
    grouped, independent = twins("batch norm, projection")
    shared = torch.randn(2, 4, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    expected = independent.eval()(shared).logits
    grouped = grouped.eval().to(memory_format=torch.channels_last)
    assert_same(grouped(shared).logits, expected)
    assert grouped.half().stage.conv1.weight.dtype == torch.float16


class Option(nn.Module):
    """A convolution and something that is no parameter."""

    def __init__(self, option):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.option = option

    def forward(self, x):
        return self.option(self.conv(x)) if callable(self.option) else self.conv(x)


@pytest.mark.parametrize(
    "options", [(F.relu, torch.tanh, F.silu), ([0, 0], [1, 0], [0, 0]), ({"a": 1}, {"a": 1}, {"a": 2})]
)
def test_experts_of_other_options_are_not_stacked(options):
    factory = iter([Option(option) for option in options])
    with pytest.raises(ValueError, match=r"alike.*'' of type Option.*independent"):
        GroupConvExperts(lambda: next(factory), 3, 7)


def test_layers_behind_a_shared_one_are_compared_too():
    relu = nn.ReLU()
    factory = iter([nn.Sequential(nn.Linear(4, 4), relu, last) for last in (relu, nn.Tanh(), nn.Tanh())])
    with pytest.raises(ValueError, match=r"alike.*'2'.*independent"):
        GroupConvExperts(lambda: next(factory), 3, 7)


def test_parametrized_layers_can_be_grouped():
    """Every parametrized module has a class of its own."""

    def factory():
        linear = nn.Linear(4, 4)
        nn.utils.parametrize.register_parametrization(linear, "weight", nn.Softplus())
        return nn.Sequential(linear)

    grouped = GroupConvExperts(factory, 3, 7).double()
    shared = torch.randn(2, 4, dtype=torch.float64)
    assert_same(grouped(shared).logits, grouped.to_independent()(shared).logits)


def test_experts_that_share_memory_are_refused():
    source = nn.Conv2d(4, 4, 1).state_dict()

    def factory():
        conv = nn.Conv2d(4, 4, 1)
        conv.load_state_dict(source, assign=True)
        return conv

    with pytest.raises(ValueError, match="shared between calls"):
        GroupConvExperts(factory, 3, 7, layout="independent")


def test_a_parameter_that_no_reset_sets_is_named():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.extra = nn.Parameter(torch.randn(4))

    with pytest.raises(ValueError, match=r"'extra' of a Scaled is initialised by no reset_parameters"):
        GroupConvExperts(Scaled(), 3, 7, reset=True)


def test_experts_that_came_to_differ_are_not_stacked():
    _, independent = twins("batch norm, projection")
    independent.stage[1].eval()
    with pytest.raises(ValueError, match=r"alike.*independent"):
        independent.to_grouped()


@pytest.mark.parametrize("layout", ["grouped", "independent"])
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_an_expert_is_extracted_as_a_plain_module(layout, classifier):
    experts = GroupConvExperts(STAGES["batch norm, projection"], 3, 7, classifier=classifier, layout=layout)
    experts.classifiers.weight.requires_grad_(False)
    shared = torch.randn(2, 4, 8, 8)
    expected = experts.eval()(shared).logits
    for k in range(3):
        expert = experts.extract(k)
        torch.testing.assert_close(expert(shared), expected[:, k])
        assert not expert.training
        assert not expert.classifier.weight.requires_grad
        assert {p.untyped_storage().data_ptr() for p in expert.parameters()}.isdisjoint(
            p.untyped_storage().data_ptr() for p in experts.parameters()
        )
    shared = torch.randn(5, 9)
    heads = GroupConvExperts(None, 3, 7, num_features=9, classifier=classifier)
    torch.testing.assert_close(heads.extract(2)(shared), heads(shared).logits[:, 2])


def test_a_stage_may_take_several_values():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, features, gate, scale):
            return self.fc(features * gate) * scale

    values = (torch.randn(5, 4), torch.randn(5, 1), 3)
    experts = GroupConvExperts(Gate, 3, 7)
    outputs = [experts.to_independent()(values), experts(values)]
    experts.together = True
    for output in (*outputs, experts(values)):
        torch.testing.assert_close(output.features, outputs[0].features)
    torch.testing.assert_close(experts.extract(1)(values), outputs[0].logits[:, 1])


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_nothing_is_written_into_the_callers_tensors(layout):
    experts = GroupConvExperts(STAGES["batch norm, projection"], 3, 7, layout=layout)
    shared = torch.randn(2, 4, 8, 8)
    before = shared.clone()
    output = experts(shared)
    kept = [t.clone() for t in output]
    output.ensemble([1, 2, 3]).sum().backward()
    assert torch.equal(shared, before)
    assert all(torch.equal(*pair) for pair in zip(output, kept, strict=True))


@pytest.mark.slow
def test_the_per_expert_stages_of_resnet32_are_exact():
    """Twenty convolutions and batch norms deep, in train mode."""
    grouped = GroupConvExperts(load("examples/resnet32.py").expert_stages, 3, 100).double()
    independent = grouped.to_independent()
    shared = torch.randn(4, 16, 32, 32, dtype=torch.float64)
    target, criterion = torch.arange(4), LGLALoss(list(range(100, 0, -1)))
    for module in (grouped, independent):
        criterion(module(shared), target).backward()
    for name, parameter in grouped.stage.named_parameters():
        assert_same(parameter.grad, torch.stack([e.get_parameter(name).grad for e in independent.stage]))


def test_pretrained_weights_are_kept_unless_fresh_ones_are_asked_for():
    stage = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    stage[1].running_mean.fill_(3.0)
    before = copy.deepcopy(stage.state_dict())
    for reset in (True, False, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            experts = GroupConvExperts(stage, 3, 7, reset=reset)
        experts(torch.randn(2, 4, 8, 8))
        same = torch.equal(experts.stage[0].weight, stage[0].weight.expand(3, -1, -1, -1, -1))
        assert same == (not reset)
        for name, tensor in before.items():
            assert torch.equal(stage.state_dict()[name], tensor)


def test_a_module_without_reset_is_told_once_what_became_of_its_weights(monkeypatch):
    monkeypatch.setattr(group_conv, "_told_what_is_kept", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to tell: chosen, a factory, fresh by init_fn, no weights
        GroupConvExperts(nn.Linear(4, 4), 3, 7, reset=False)
        GroupConvExperts(lambda: nn.Linear(4, 4), 3, 7)
        GroupConvExperts(nn.Linear(4, 4), 3, 7, init_fn=lambda _: None)
        GroupConvExperts(nn.ReLU(), 3, 7, num_features=4)
    with pytest.warns(FutureWarning, match=r"keeps.*0\.1\.0.*reset=False.*reset=True") as record:
        [GroupConvExperts(nn.Linear(4, 4), 3, 7) for _ in range(3)]
    assert len(record) == 1
    assert record[0].filename == __file__


def test_a_convnext_with_layer_scale_needs_no_option():
    stage = nn.Sequential(torchvision.models.convnext.CNBlock(4, 1e-6, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        experts = GroupConvExperts(stage, 3, 7)
    assert torch.equal(experts.stage[0].layer_scale, stage[0].layer_scale.expand(3, -1, -1, -1))
    experts(torch.randn(2, 4, 8, 8)).ensemble().sum().backward()
    with pytest.raises(ValueError, match=r"layer_scale.*reset=False"):
        GroupConvExperts(stage, 3, 7, reset=True)


def test_a_factorys_weights_come_as_they_are_or_fresh():
    pretrained = nn.Linear(4, 4)
    for reset in (None, False, True):
        experts = GroupConvExperts(lambda: copy.deepcopy(pretrained), 3, 7, reset=reset)
        assert torch.equal(experts.stage.weight, pretrained.weight.expand(3, -1, -1)) == (not reset)


def test_factory_and_init_fn_initialise_every_expert():
    calls = []

    def factory():
        calls.append(len(calls))
        return nn.Conv2d(1, 2, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(len(calls)))

    experts = GroupConvExperts(factory, 3, 7)
    assert experts.stage.weight.flatten(1).tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]

    def init_fn(layer):
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 0.5)

    experts = GroupConvExperts(nn.Conv2d(1, 2, 1), 3, 7, init_fn=init_fn)
    assert (experts.stage.weight == 0.5).all()


def test_classifiers_without_a_stage():
    for shared in (torch.randn(5, 9), torch.randn(5, 9, 4, 4)):
        output = GroupConvExperts(None, 3, 7, num_features=9)(shared)
        pooled = shared if shared.dim() == 2 else shared.mean((2, 3))
        assert output.logits.shape == (5, 3, 7)
        assert torch.equal(output.features, pooled[:, None].expand(5, 3, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_classifiers_are_cosine_or_linear(dtype, device, close):
    features = torch.randn(5, 9, device=device)
    for classifier in ("cosine", "linear"):
        experts = GroupConvExperts(None, 3, 7, num_features=9, classifier=classifier, scale=20.0)
        experts = experts.to(device, dtype)
        output = experts(features.to(dtype))
        weight = experts.classifiers.weight.double()
        f = features.to(dtype).double()
        if classifier == "cosine":
            expected = 20 * F.normalize(f, dim=1) @ F.normalize(weight, dim=2).mT
        else:
            expected = f @ weight.mT + experts.classifiers.bias.double()[:, None]
        assert output.logits.dtype == dtype
        assert output.weight.data_ptr() == experts.classifiers.weight.data_ptr()
        # Half precision rounds directions before their product.
        close(output.logits / 20, expected.transpose(0, 1) / 20)


def test_a_zero_feature_gives_finite_cosine_logits_and_gradients_in_half_precision():
    experts = GroupConvExperts(None, 3, 7, num_features=9).half()
    shared = torch.zeros(2, 9, dtype=torch.float16, requires_grad=True)
    logits = experts(shared).logits
    logits.float().sum().backward()
    assert (logits == 0).all()
    for gradient in (experts.classifiers.weight.grad, shared.grad):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("maps", [(5,), (4, 6), (3, 2, 3), (1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_ensemble_of_maps_fuses_experts_not_classes(maps, dtype):
    """Weights of the experts lay along the classes; where there were K of them nothing told."""
    output = ExpertOutput(
        torch.randn(2, 3, 3, *maps).to(dtype), torch.randn(2, 3, 5, *maps), torch.randn(3, 3, 5)
    )
    at_positions = output.logits.flatten(3)
    for fusion in (None, [1, 0, 0], [1, 2, 3], torch.tensor([0.0, 0.0, 1.0])):
        expected = [output._replace(logits=v).ensemble(fusion) for v in at_positions.unbind(-1)]
        assert torch.equal(output.ensemble(fusion).flatten(2), torch.stack(expected, dim=-1))
    assert torch.equal(output.ensemble([1, 0, 0]), output.logits[:, 0])


@pytest.mark.parametrize(
    "name", ["argmax", "softmax", "log_softmax", "max", "size", "shape", "device", "detach"]
)
def test_code_that_expects_logits_is_told_of_the_ensemble(name):
    output = ExpertOutput(torch.zeros(2, 3, 7), torch.zeros(2, 3, 4), torch.zeros(3, 7, 4))
    assert not hasattr(output, name)
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'.*output\.ensemble\(\)\.{name}"):
        getattr(output, name)


def test_an_output_is_a_tuple_that_pickles_and_compiles():
    output = ExpertOutput(torch.rand(2, 3, 7), torch.rand(2, 3, 4), torch.rand(3, 7, 4))
    assert isinstance(output, tuple)
    with pytest.raises(AttributeError) as caught:
        output.loss  # noqa: B018 - as trainers look for it
    assert "ensemble" not in str(caught.value)

    def predict(output):
        return (output.argmax if hasattr(output, "argmax") else output.ensemble)(), output

    twins = [pickle.loads(pickle.dumps(output)), copy.deepcopy(output)]
    fused, through = torch.compile(predict, fullgraph=True, backend="eager")(output)
    for twin in (*twins, through):
        assert type(twin) is ExpertOutput
        assert torch.equal(twin.ensemble(), output.ensemble())
    assert torch.equal(fused, output.ensemble())


def test_ensemble_is_the_mean_or_a_weighted_mean_of_the_logits(close):
    output = ExpertOutput(torch.randn(5, 3, 7, dtype=torch.float64), torch.empty(0), torch.empty(0))
    close(output.ensemble(), output.logits.mean(1))
    close(output.ensemble([2, 2, 2]), output.logits.mean(1))
    for fusion in ([1, 0, 3], torch.tensor([1.0, 0.0, 3.0])):
        close(output.ensemble(fusion), 0.25 * output.logits[:, 0] + 0.75 * output.logits[:, 2])
    assert torch.equal(output.ensemble(torch.full((3,), 3e38)), output.ensemble([1, 1, 1]))


def test_low_precision_is_fused_in_float32():
    output = ExpertOutput(30 * torch.randn(64, 3, 7).bfloat16(), torch.empty(0), torch.empty(0))
    expected = output._replace(logits=output.logits.float()).ensemble([1, 2, 3]).bfloat16()
    assert torch.equal(output.ensemble([1, 2, 3]), expected)


class Halved:
    """Stands for a calibration: of logits ``[N, C]``, times the prior."""

    def probabilities(self, logits, prior=None):
        assert logits.dim() == 2
        prior = torch.ones(logits.shape[1]) if prior is None else torch.as_tensor(prior)
        return (logits / 2 + prior.log()).softmax(1)


@pytest.mark.parametrize("fusion", [None, [1, 0, 3]])
@pytest.mark.parametrize("shape", [(5, 3, 4), (0, 3, 4), (2, 3, 4, 5, 6), (2, 3, 4, 0)])
def test_probabilities_are_those_of_the_fused_logits(shape, fusion):
    """Of maps as of samples: those of every position."""
    output = ExpertOutput(torch.randn(shape), torch.empty(0), torch.empty(0))
    fused = output.ensemble(fusion)
    torch.testing.assert_close(output.probabilities(fusion=fusion), fused.softmax(1))

    calibrated = output.probabilities(Halved(), fusion=fusion)
    torch.testing.assert_close(calibrated, (fused / 2).softmax(1))
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0])
    shifted = output.probabilities(Halved(), prior=prior, fusion=fusion)
    weighted = calibrated * prior.view(-1, *[1] * (len(shape) - 3))
    torch.testing.assert_close(shifted, weighted / weighted.sum(1, keepdim=True))


def test_probabilities_of_half_precision_are_float32():
    output = ExpertOutput(torch.randn(4, 3, 7).bfloat16(), torch.empty(0), torch.empty(0))
    assert output.probabilities().dtype == torch.float32
    assert output._replace(logits=output.logits.double()).probabilities().dtype == torch.float64


def test_an_expert_without_weight_may_mask_classes():
    logits = torch.randn(4, 3, 5)
    logits[:, 1, 3] = -torch.inf
    output = ExpertOutput(logits, logits, logits)
    torch.testing.assert_close(output.ensemble([1, 0, 1]), logits[:, [0, 2]].mean(1))
    assert (output.ensemble([1, 1, 1])[:, 3] == -torch.inf).all()
    fusion = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    output.ensemble(fusion).sum().backward()
    assert fusion.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_state_dict_deepcopy_and_pickle(layout):
    source = GroupConvExperts(STAGES["two blocks"], 3, 7, num_features=8, layout=layout).eval()
    shared = torch.randn(2, 4, 8, 8)
    expected = source(shared).logits
    loaded = GroupConvExperts(STAGES["two blocks"], 3, 7, num_features=8, layout=layout).eval()
    loaded.load_state_dict(source.state_dict())
    assert torch.equal(loaded(shared).logits, expected)
    assert torch.equal(copy.deepcopy(source)(shared).logits, expected)
    experts = GroupConvExperts(nn.Conv2d(4, 6, 3), 3, 7, layout=layout, reset=True)
    assert torch.equal(pickle.loads(pickle.dumps(experts))(shared).logits, experts(shared).logits)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("from_autocast", [True, False])
@pytest.mark.parametrize("name", ["batch norm, projection", "group norm, zero padding", "linear"])
@pytest.mark.parametrize("layout", ["together", "grouped", "independent"])
def test_autocast_trains(layout, name, from_autocast, low, device):
    """Inside vmap autocast on a CPU sees no convolution; the stage must run in low precision all the same."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    body = (lambda: nn.Linear(8, 8)) if name == "linear" else STAGES[name]
    experts = GroupConvExperts(lambda: nn.Sequential(body(), Spy()), 3, 7, num_features=8)
    experts = experts.to_independent() if layout == "independent" else experts
    experts.together = layout == "together"
    criterion = LGLALoss([9, 8, 7, 6, 5, 4, 3]).to(device)
    experts.to(device)
    shared = torch.randn(6, 8, device=device) if name == "linear" else torch.randn(6, 4, 8, 8, device=device)
    with torch.autocast(device, dtype=low):
        output = experts(shared.to(low) if from_autocast else shared)
        loss = criterion(output, torch.arange(6, device=device))
    loss.backward()
    assert loss.isfinite()
    assert output.logits.dtype == low
    if not name.startswith("group norm"):  # autocast itself runs it in float32
        assert set(seen) == {low}
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in experts.parameters())


def test_training_lowers_the_loss(device):
    labels = torch.arange(32) % 4
    # Each class has a pattern that can be learnt; made on the CPU, they are the same for every device.
    images = torch.randn(32, 4, 8, 8) + torch.randn(4, 4, 8, 8)[labels]
    images, labels = images.to(device), labels.to(device)
    experts = GroupConvExperts(STAGES["batch norm, projection"], 3, 4).to(device)
    criterion = LGLALoss([100, 30, 10, 3]).to(device)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(experts(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (experts.eval()(images).ensemble().argmax(1) == labels).double().mean() > 0.9


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0][:, -1]


class Fills(nn.Module):
    """Random layers that fill a tensor of their own, and one that writes into zeros."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 32, 3), torchvision.ops.StochasticDepth(0.5, "row"), timm.layers.DropPath(0.5),
            torchvision.ops.DropBlock2d(0.2, 3),
        )  # fmt: skip

    def forward(self, x):
        y = self.layers(x)
        z = torch.zeros(len(y), 32)
        z[:, ::2] = y.mean((2, 3))[:, ::2]
        return z


@RUNS
def test_random_fills_are_one_per_expert(together):
    """torchvision's stochastic depth fills a tensor in place, of which vmap would have only one."""
    experts = GroupConvExperts(Fills(), 3, 7, num_features=32, reset=True)
    with torch.no_grad():
        for parameter in experts.stage.parameters():
            parameter.copy_(parameter[0].expand_as(parameter).clone())
    experts.together = together
    shared = torch.randn(16, 4, 8, 8)
    features = experts(shared).features
    assert not torch.equal(features[:, 0], features[:, 1])
    features = experts.eval()(shared).features
    torch.testing.assert_close(features[:, 0], features[:, 1])


@RUNS
def test_every_layer_takes_channels_last_and_autocast(together):
    layers = (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), timm.layers.LayerNorm2d(8), nn.PReLU(8))
    experts = GroupConvExperts(nn.Sequential(nn.Conv2d(4, 8, 3), *layers), 3, 7, num_features=8, reset=False)
    experts.together = together
    experts.to(memory_format=torch.channels_last)
    shared = torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last)
    expected = experts.to_independent()(shared).logits
    torch.testing.assert_close(experts(shared).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(experts(shared).logits.float(), expected, rtol=0.1, atol=0.5)


# vmap runs attention on a CPU copy by copy and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@RUNS
def test_attention_runs_in_the_precision_of_autocast(together):
    experts = GroupConvExperts(Attention, 3, 7, num_features=4)
    experts.together = together
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(torch.randn(4, 4, 8, 8)).features.dtype == torch.bfloat16


@RUNS
def test_running_out_of_memory_is_passed_on(together):
    class Greedy(nn.Conv2d):
        def forward(self, x):
            raise torch.OutOfMemoryError("no more")

    experts = GroupConvExperts(Greedy(4, 6, 3), 3, 7, reset=True)
    experts.together = together
    with pytest.raises(torch.OutOfMemoryError):
        experts(torch.randn(2, 4, 8, 8))


def test_an_extracted_expert_keeps_the_modes_of_its_layers():
    stage = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    stage[1].eval()
    expert = GroupConvExperts(stage, 3, 7, reset=False).extract(0)
    assert expert.training
    assert not expert.stage[1].training


def test_layers_without_a_rule_are_named():
    """An RNN has no batching rule."""
    experts = GroupConvExperts(Recurrent, 3, 7, num_features=6)
    experts.together = True
    shared = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"layer 'gru' of type GRU cannot run grouped.*together = False"):
        experts(shared)
    experts.together = False
    torch.testing.assert_close(experts(shared).features, experts.to_independent()(shared).features)


@RUNS
def test_an_error_of_the_users_own_stage_is_passed_on(together):
    experts = GroupConvExperts(nn.Conv2d(4, 6, 3), 3, 7, reset=True)
    experts.together = together
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 5"):
        experts(torch.randn(2, 5, 8, 8))


def test_hooks_on_experts_and_classifiers_are_called():
    experts, seen = GroupConvExperts(nn.Linear(4, 4), 3, 7, reset=True), []
    for module in (experts, experts.classifiers):
        module.register_forward_hook(lambda *arguments: seen.append(type(arguments[2]).__name__))
    experts(torch.randn(2, 4))
    assert seen == ["Tensor", "ExpertOutput"]


def test_a_reentrant_checkpoint_leaves_the_class_weights_alone():
    experts = GroupConvExperts(None, 3, 4, num_features=8)
    shared = torch.randn(5, 8, requires_grad=True)
    logits, _, _ = torch.utils.checkpoint.checkpoint(experts, shared, use_reentrant=True)
    assert experts.classifiers.weight.is_leaf
    logits.sum().backward()
    assert experts.classifiers.weight.grad is not None
