"""Networks of research code: trained by LGLALoss as they are, and divided into trunk and stage."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import assert_raises
from research import NetworksTogether, NormedLinear, ResNet, ResNeXtOfExperts, ScaledCosine
from torch import nn

from lgla_losses import ExpertModel, GroupConvExperts, LGLALoss, split_backbone, split_points

COUNTS = [50, 30, 20, 10, 5]
CLASSES = len(COUNTS)
IMAGES, TARGET = torch.randn(6, 3, 16, 16), torch.tensor([0, 0, 0, 1, 2, 4])


def seen_by(network, layer, images):
    """What a layer of the network takes."""
    seen = []
    handle = network.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(images)
    handle.remove()
    return seen[0]


class Temperature(ResNet):
    """Scales its logits by a parameter, a buffer and numbers, in place and by functions."""

    def __init__(self, num_classes):
        super().__init__(num_classes, blocks=1)
        self.log_s = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("of_class", torch.rand(num_classes))

    def forward(self, x):
        out = super().forward(x)
        out *= self.log_s.exp()
        return torch.mul(self.of_class, out.div(0.5))


class Untraceable(nn.Module):
    """Asks for a value, and gives bare cosines."""

    def __init__(self):
        super().__init__()
        self.body, self.linear = nn.Conv2d(3, 8, 3), NormedLinear(8, CLASSES)

    def forward(self, x):
        if x.sum() > 1e9:
            x = x / 2
        return self.linear(self.body(x).relu().mean((2, 3)))


class Within(nn.Module):
    """Holds a network as its backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


def normed(num_classes=CLASSES):
    return ResNet(num_classes, NormedLinear, blocks=1)


def bare_cosines():
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), *pooled, NormedLinear(8, CLASSES))


def keeps_logits():
    return ResNeXtOfExperts(CLASSES, returns_dict=False)


def together(stacked=True):
    return NetworksTogether(CLASSES, stacked=stacked)


#: How each is made, where it is split, its classifier, and whether that has to be named.
NETWORKS = {
    "ResNet-32, linear": (lambda: ResNet(CLASSES), "layer2", "linear", False),
    "normed": (normed, "layer3", "linear", False),
    "normed, 64 classes of 64 features": (lambda: normed(64), "layer3", "linear", False),
    "bare cosines": (bare_cosines, "2", "5", False),
    "scaled cosine": (lambda: ResNet(CLASSES, ScaledCosine, 1, blocks=1), "layer2.0", "linear", False),
    "temperature": (lambda: Temperature(CLASSES), "layer2", "linear", False),
    "within": (lambda: Within(ResNet(CLASSES, blocks=1)), "backbone.layer3", "backbone.linear", False),
    "experts inside, dict": (lambda: ResNeXtOfExperts(CLASSES), "layer3s.1", "linears.1", True),
    "experts inside, mean": (keeps_logits, "layer3s.0.1", "linears.0", True),
    "together": (together, "backbone.2.1", "classifier.2", True),
}
FOUND = [name for name, (*_, is_named) in NETWORKS.items() if not is_named]


@pytest.mark.parametrize("name", NETWORKS)
def test_trunk_and_stage_give_what_the_classifier_takes(name):
    create, at, head, is_named = NETWORKS[name]
    network = create().eval()
    trunk, stage = split_backbone(network, at, head=head if is_named else "auto")

    expected = seen_by(network, head, IMAGES)
    assert torch.equal(stage(trunk(IMAGES)), expected)
    assert stage.num_features == expected.shape[1]
    assert not any(path.startswith(head) for path in (*trunk.state_dict(), *stage.state_dict()))


@pytest.mark.parametrize("split", [True, False], ids=["stage and heads", "heads alone"])
@pytest.mark.parametrize("name", FOUND)
def test_experts_take_the_features_of_the_network_without_its_scale(name, split):
    create, at, head, _ = NETWORKS[name]
    network = create().eval()
    before = copy.deepcopy(network.state_dict())
    model = ExpertModel.from_model(network, at=at if split else None, eval_output="experts")

    output = model(IMAGES)
    assert not model.training
    torch.testing.assert_close(output.features[:, 1], seen_by(network, head, IMAGES))
    assert output.logits.shape[2] == network.get_submodule(head)(output.features[:, 0]).shape[1]
    assert output.logits.abs().max() <= 30.001
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_normed_layer_of_an_untraceable_network_is_found():
    network = Untraceable().eval()
    output = ExpertModel.from_model(network, eval_output="experts")(IMAGES)
    assert torch.equal(output.features[:, 2], seen_by(network, "linear", IMAGES))


def test_heads_alone_on_a_scaled_network_are_copied_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    network = normed()
    model = copy.deepcopy(ExpertModel.from_model(network)).eval()
    model.save_pretrained(tmp_path)
    twin = ExpertModel.from_pretrained(tmp_path, model=normed())
    assert torch.equal(twin(IMAGES), model(IMAGES))


def test_scaled_networks_have_split_points():
    assert split_points(ResNet(CLASSES, NormedLinear)) == ["layer3", "layer1", "layer2"]


#: A network, the scale of its heads, and what of its output the loss takes beside the target.
TRAINED = {
    "dict": (lambda: ResNeXtOfExperts(CLASSES), 30.0, lambda network, output: output["logits"]),
    "kept list": (keeps_logits, 30.0, lambda network, output: network.logits),
    "list": (lambda: together(stacked=False), 16.0, lambda network, output: output),
    "stack": (together, 16.0, lambda network, output: output.transpose(0, 1)),
    "stack as a list": (together, 16.0, lambda network, output: list(output)),
    "split": (lambda: ExpertModel.from_model(normed(), at="layer3"), 30.0, lambda network, output: output),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_lowers_the_loss_and_moves_every_head(name):
    create, scale, logits_of = TRAINED[name]
    network, criterion = create(), LGLALoss(COUNTS, scale=scale)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = criterion(logits_of(network, network(IMAGES)), TARGET)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_a_stack_of_as_many_samples_as_experts_is_read_as_a_list():
    """Its shape does not tell experts from samples; a list of its parts does."""
    stack, target, criterion = (
        30 * torch.rand(3, 3, CLASSES),
        torch.tensor([0, 1, 4]),
        LGLALoss(COUNTS, aaw=False),
    )
    expected = sum(
        F.cross_entropy(v + t, target) for v, t in zip(stack, criterion.adjuster.table.float(), strict=True)
    )
    torch.testing.assert_close(criterion(list(stack), target), expected)
    torch.testing.assert_close(criterion(stack.transpose(0, 1), target), expected)


def made(network, **options):
    return lambda: ExpertModel.from_model(network, **options)


CASES = {
    "a mean of heads": (
        *(made(keeps_logits(), at="layer3s.0"), ValueError),
        *("head", "'mean' of 'linears.0', 'linears.1', 'linears.2'", "head="),
    ),
    "a dict": (
        *(made(ResNeXtOfExperts(CLASSES), at="layer3s.0"), ValueError),
        *("a dict of 'output', 'feat', 'logits'", "'linears.2'", "head="),
    ),
    "a list": (
        *(made(together(stacked=False)), ValueError),
        *("3 values", "'classifier.0', 'classifier.1'", "head="),
    ),
    "one of several heads, without a split": (
        *(made(ResNeXtOfExperts(CLASSES), head="linears.0"), ValueError),
        *("'linears.0'", "(stack)", "at="),
    ),
    "a scaled head that is kept": (
        *(made(ResNet(CLASSES), at="layer3", keep_head=True, classifier="linear"), ValueError),
        *("keep_head", "scales its logits", "'linear' (mul)", "keep_head=False"),
    ),
    "a normed head that is kept": (
        *(made(normed(), keep_head=True), ValueError),
        *("keep_head", "not an nn.Linear", "NormedLinear", "scale="),
    ),
    "a head without a weight matrix": (
        *(made(normed(), head="bn1"), ValueError),
        *("head", "one weight matrix", "BatchNorm2d", "'linear'"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_heads(case):
    assert_raises(*CASES[case])


def test_what_they_advise_works():
    for network, at, head in (
        (ResNeXtOfExperts(CLASSES), "layer3s.0", "linears.0"),
        (together(), "backbone.0.1", "classifier.0"),
    ):
        model = ExpertModel.from_model(network, at=at, head=head)
        LGLALoss(COUNTS)(model(IMAGES), TARGET).backward()
        assert model.eval()(IMAGES).shape == (6, CLASSES)


class Table(nn.Module):
    """Holds a matrix, but is no classifier."""

    def __init__(self, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.body = [nn.Linear(3, columns)]

    def forward(self, x):
        return x + self.weight


@pytest.mark.parametrize(
    "layer", [Table(1, 4), Table(4, 4), nn.EmbeddingBag(4, 4), nn.PReLU(4), nn.LazyConv1d(4, 1)]
)
def test_a_layer_with_a_matrix_that_gives_no_classes_is_no_classifier(layer):
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer)
    assert_raises(lambda: split_backbone(network, "0"), ValueError, "head", "'2'", "'0'")


def test_fresh_experts_of_a_scaled_network():
    experts = GroupConvExperts(lambda: split_backbone(normed(), "layer3")[1], 3, CLASSES)
    trunk, _ = split_backbone(normed(), "layer3")
    assert experts(trunk(IMAGES)).features.shape == (6, 3, 64)
