"""A network divided into trunk and stage."""

import copy
import pickle
import random

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from families import DISTILBERT, FAMILIES, SMALL_TEXT, TOKENS, Family, build, inputs_of
from reference import assert_raises
from torch import nn

from lgla_losses import GroupConvExperts, split_backbone
from lgla_losses.experts.backbone import mean_of_tokens

FAST = [pytest.param(family, id=family.id) for family in FAMILIES if not family.slow]
BERT = Family("transformers", "bert", "encoder.layer.1")


def features_of(parts, *inputs):
    trunk, stage = parts
    values = trunk(*inputs)
    return stage(*values) if isinstance(values, tuple) else stage(values)


def expected_features(family, model, inputs):
    """What the network gives its classifier, by means of its library."""
    if family.library == "transformers":
        ids, mask = inputs
        tokens = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.stack([t[m.bool()].mean(0) for t, m in zip(tokens, mask, strict=True)])
    if family.library == "timm":
        headless = copy.deepcopy(model)
        headless.reset_classifier(0)
        return headless(*inputs)
    seen = []
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    handle = classifier.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(*inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAST)
def test_trunk_and_stage_are_the_network_up_to_its_classifier(family):
    model = build(family).eval()
    inputs = inputs_of(family, torch.float32)
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    parts = split_backbone(model, family.at)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    expected = expected_features(family, model, inputs)
    torch.testing.assert_close(features_of(parts, *inputs), expected)
    assert parts[1].num_features == expected.shape[1]
    assert not parts[0].training
    assert not parts[1].training
    trunk, stage = ({n: id(t) for n, t in part.state_dict(keep_vars=True).items()} for part in parts)
    assert trunk.keys().isdisjoint(stage)
    assert stage.items() <= before.items()
    assert trunk.items() <= before.items()
    assert any(name.startswith(family.at) for name in stage)


@pytest.mark.parametrize("kind", ["copy", "pickle"])
@pytest.mark.parametrize(
    "family", [FAMILIES[0], Family("timm", "resnet18", "layer4", {"drop_rate": 0.5}), BERT]
)
def test_parts_are_copied_and_pickled(family, kind):
    model = build(family).eval()
    parts = split_backbone(model, family.at)
    twins = copy.deepcopy(parts) if kind == "copy" else pickle.loads(pickle.dumps(parts))
    inputs = inputs_of(family, torch.float32)
    assert torch.equal(features_of(twins, *inputs), features_of(parts, *inputs))
    assert twins[1].num_features == parts[1].num_features
    if "drop_rate" in family.options:
        twins[1].train()
        assert (features_of(twins, *inputs) == 0).double().mean() > 0.3


class Reads(nn.Module):
    """Code that a container cannot express: modes, shapes, values that cross the split, parameters of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.classifier = nn.Linear(6, 10)
        self.trunk_scale = nn.Parameter(torch.rand(()))
        self.stage_scale = nn.Parameter(torch.rand(()))
        self.both_scale = nn.Parameter(torch.rand(()))
        self.register_buffer("offset", torch.rand(6, 1, 1))

    def forward(self, x, gain=None):
        if gain is not None:
            x = gain * x
        batch = x.shape[0]
        shortcut = self.first(x) * self.trunk_scale * self.both_scale
        y = F.dropout(self.second(shortcut), 0.5, self.training)
        y = self.third(y) + shortcut + self.offset
        y = F.dropout(y * self.stage_scale * self.both_scale, 0.5, training=self.training)
        return self.classifier(y.view(batch, 6, -1).mean(-1))


def test_what_crosses_the_split():
    model = Reads().double().eval()
    trunk, stage = split_backbone(model, "third")
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    values = trunk(x)
    assert [list(v.shape) if isinstance(v, torch.Tensor) else v for v in values] == [
        [4, 6, 5, 5],
        [4, 6, 5, 5],
        [],
        4,
    ]
    assert {n for n, _ in stage.named_parameters()} == {"third.weight", "third.bias", "stage_scale"}
    assert [n for n, _ in stage.named_buffers()] == ["offset"]
    torch.testing.assert_close(model.classifier(stage(*values)), model(x))
    grouped = GroupConvExperts(stage, 3, 7, reset=False)
    shared = trunk(x)
    torch.testing.assert_close(grouped(shared).features[:, 1], stage(*shared))
    for together in (True, False):  # both ways to run take numbers among the values
        grouped.together = together
        assert grouped(shared).logits.shape == (4, 3, 7)


@pytest.mark.parametrize("together", [True, False])
def test_the_mode_is_read_when_run(together):
    """fx itself bakes ``self.training`` into the graph."""
    trunk, stage = split_backbone(Reads().eval(), "third")
    x = torch.randn(4, 3, 5, 5)
    zeros = {}
    for mode in (True, False):
        values = trunk.train(mode)(x)
        zeros[mode] = (values[0] == 0).double().mean().item()
    assert zeros[True] > 0.3
    assert zeros[False] == 0
    experts = GroupConvExperts(stage, 3, 7, reset=False)
    experts.together = together
    values = trunk(x)
    first, second = (experts.eval()(values).features for _ in range(2))
    assert torch.equal(first, second)
    first, second = (experts.train()(values).features for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_experts_of_a_factory_begin_as_the_network_does():
    """torchvision initialises convolutions by fan-out and the norms of DenseNet and ResNet by constants."""
    experts = GroupConvExperts(lambda: split_backbone(torchvision.models.resnet18(), "layer4")[1], 3, 7)
    weight = experts.stage.get_parameter("layer4.0.conv1.weight")
    for k in range(3):
        assert weight[k].std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert not torch.equal(weight[0], weight[1])


def test_pretrained_weights_are_kept():
    model = torchvision.models.resnet18()
    trunk, stage = split_backbone(model, "layer4")
    experts = GroupConvExperts(stage, 3, 7, reset=False)
    for name, parameter in stage.named_parameters():
        assert torch.equal(experts.stage.get_parameter(name), parameter.expand(3, *parameter.shape))
    assert trunk.conv1.weight is model.conv1.weight


@pytest.mark.parametrize("softmax", [nn.LogSoftmax(1), nn.Softmax(1), nn.Identity(), nn.Flatten()])
def test_what_follows_the_classifier_goes_with_it(softmax):
    body = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    trunk, stage = split_backbone(nn.Sequential(*body, nn.Linear(4, 9), softmax), "0")
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(features_of((trunk, stage), x), nn.Sequential(*body)(x))


class HeadFirst(nn.Module):
    """Registers a classifier of several layers before its body."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 9)))
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.head(self.body(x) * torch.arange(4.0))


def test_the_classifier_is_found_by_the_output_it_gives():
    model = HeadFirst().eval()
    x = torch.randn(2, 3)
    parts = split_backbone(model, "body.1")
    torch.testing.assert_close(features_of(parts, x), model.body(x) * torch.arange(4.0))
    assert parts[1].num_features == 4
    assert parts[1].state_dict().keys() == {"body.1.weight", "body.1.bias"}


def test_a_network_without_classifier_is_split_at_its_last_block():
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2, embed_dim=32, num_heads=2
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(features_of(split_backbone(model.eval(), "blocks.1"), x), model(x))
    resnet = torchvision.models.resnet18().eval()
    resnet.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(features_of(split_backbone(resnet, "layer4", head=None), x), resnet(x))


def test_vision_transformers_keep_their_own_pooling():
    """The class token, the mean of the tokens, or whatever the network does."""
    for pooling in ("token", "avg", "map"):
        model = timm.create_model(
            "vit_tiny_patch16_224", global_pool=pooling, img_size=32, depth=2, embed_dim=32, num_heads=2
        ).eval()
        x = torch.randn(2, 3, 32, 32)
        features = features_of(split_backbone(model, "blocks.1"), x)
        torch.testing.assert_close(model.head(features), model(x))


def test_modes_and_unsaved_buffers_stay_as_they_are():
    model = timm.create_model("eva02_tiny_patch14_224", num_classes=3, img_size=28).eval()
    model.blocks[11].train()
    trunk, stage = split_backbone(model, "blocks.11")
    assert not trunk.training
    assert stage.get_submodule("blocks.11").training
    assert trunk.state_dict().keys() | stage.state_dict().keys() <= model.state_dict().keys()


def test_the_classifier_can_be_named_or_denied():
    squeezenet = torchvision.models.squeezenet1_1().eval()
    x = torch.randn(2, 3, 64, 64)
    parts = split_backbone(squeezenet, "features.10", head="classifier.1")
    torch.testing.assert_close(features_of(parts, x), squeezenet.features(x))
    projection = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    x = torch.randn(2, 4)
    for head, expected in ((None, projection(x)), ("2", projection[:2](x)), ("auto", projection[:2](x))):
        torch.testing.assert_close(features_of(split_backbone(projection, "0", head=head), x), expected)


@pytest.mark.parametrize("path", ["bert.encoder.layer.1", "encoder.layer.1"])
def test_the_encoder_below_a_transformers_head(path):
    config = transformers.AutoConfig.for_model(
        "bert",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=99,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids, mask = inputs_of(BERT)
    trunk, stage = split_backbone(model, path)
    features = features_of((trunk, stage), ids, mask)
    tokens = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(features[1], tokens[1, :4].mean(0))
    assert not any("pooler" in name for name, _ in stage.named_parameters())
    # Padding of any length and content changes nothing; without a mask every token counts.
    padded = F.pad(ids, (0, 3), value=7), F.pad(mask, (0, 3))
    torch.testing.assert_close(features_of((trunk, stage), *padded), features)
    every = model.bert(input_ids=ids).last_hidden_state.mean(1)
    torch.testing.assert_close(features_of((trunk, stage), ids), every)


@pytest.mark.parametrize(
    ("kind", "at", "head"),
    [
        ("bert", "bert.encoder.layer.1", "classifier"),  # its pooler
        ("roberta", "roberta.encoder.layer.1", "classifier.out_proj"),  # a class token, and a layer
        ("distilbert", "distilbert.transformer.layer.1", "classifier"),  # an activation made on the way
    ],
)
def test_the_own_pooling_of_a_transformers_model_whose_head_is_named(kind, at, head):
    sizes = DISTILBERT if kind == "distilbert" else SMALL_TEXT
    config = transformers.AutoConfig.for_model(kind, **sizes, **TOKENS)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    ids, mask = inputs_of(BERT)
    parts = split_backbone(model, at, head=head)
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model.get_submodule(head)(features_of(parts, ids, mask)), logits)


def test_an_image_classifier_of_transformers_whose_head_is_named():
    """Its code compares dtypes, which tracing cannot."""
    config = transformers.ViTConfig(**SMALL_TEXT, image_size=32, patch_size=8)
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 32, 32)
    layers = next(path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    parts = split_backbone(model, f"{layers}.1", head="classifier")
    torch.testing.assert_close(model.classifier(features_of(parts, images)), model(images).logits)


def test_the_mean_of_no_tokens_is_zero():
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    means = mean_of_tokens(tokens, torch.tensor([[0, 0, 0], [1, 0, 1]]))
    torch.testing.assert_close(means, torch.stack([torch.zeros(4), (tokens[1, 0] + tokens[1, 2]) / 2]))


class Branches(nn.Module):
    """Gives something else in train mode."""

    def __init__(self, output):
        super().__init__()
        self.body, self.fc, self.unused, self.output = (
            nn.Linear(4, 4),
            nn.Linear(4, 3),
            nn.Linear(4, 4),
            output,
        )

    def forward(self, x):
        return self.output(self, self.body(x))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.a(self.b(self.a(x))))


class HeadBelow(nn.Module):
    """Holds a linear layer that its output does not come from."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(4, 4), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def two_outputs(net, y):
    z = net.fc(y)
    return (z, y) if net.training else z


def without_gradient(net, y):
    with torch.no_grad():
        y = net.unused(y)
    return net.fc(y)


def written_into(net, y):
    z = net.unused(y)
    z.relu_()
    return net.fc(z)


def activated_in_place(net, y):
    z = net.unused(y)
    net.act(z)
    return net.fc(z)


def written_before(net, y):
    return net.fc(net.unused(y) + net.side(y))


def in_place():
    net = Branches(activated_in_place)
    net.act = nn.ReLU(inplace=True)
    return net


def side_branch():
    net = Branches(written_before)
    net.side = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    return net


def vision_transformer():
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTModel(config)


def bart():
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartModel(transformers.BartConfig(d_model=8, vocab_size=9, **layers, **heads))


PLAIN = Branches(lambda net, y: net.fc(y))
CASES = {
    "no module": (lambda: split_backbone(3, "a"), TypeError, "model", "torch.nn.Module", "3"),
    "path of a wrong type": (lambda: split_backbone(PLAIN, 3), TypeError, "at", "dotted path", "3"),
    "unknown path": (
        lambda: split_backbone(torchvision.models.resnet18(), "layer5"),
        ValueError, "at", "ResNet", "'layer5'", "conv1, bn1, relu", "layer4", "did you mean 'layer4'",
    ),
    "unknown path below": (
        lambda: split_backbone(torchvision.models.resnet18(), "layer3.7.conv1"),
        ValueError, "'layer3.7.conv1'", "layer3.0, layer3.1", "did you mean 'layer3.1.conv1'",
    ),
    "path below a leaf": (lambda: split_backbone(PLAIN, "body.x"), ValueError, "'body.x'", "none below"),
    "unknown head": (lambda: split_backbone(PLAIN, "body", head="top"), ValueError, "head", "'top'", "fc"),
    "module that is not called": (lambda: split_backbone(PLAIN, "unused"), ValueError, "at", "calls", "body, fc"),
    "head that is not called": (lambda: split_backbone(PLAIN, "body", head="unused"), ValueError, "head", "calls"),
    "split at the classifier": (lambda: split_backbone(PLAIN, "fc"), ValueError, "at", "before", "stage=None"),
    "two classifiers": (
        lambda: split_backbone(timm.create_model("deit_tiny_distilled_patch16_224", depth=2), "blocks.1"),
        ValueError, "head", "VisionTransformerDistilled", "head=None", "reset_classifier(0)",
    ),
    "another output in train mode": (
        lambda: split_backbone(Branches(lambda net, y: net.fc(y) if net.training else y + 1), "body"),
        ValueError, "model", "same calls in train and in eval mode",
    ),
    "another number in train mode": (
        lambda: split_backbone(Branches(lambda net, y: net.fc(F.dropout(y, 0.5 if net.training else 0.0))), "body"),
        ValueError, "model", "same calls", "the function 'dropout' with other inputs",
    ),
    "a function in train mode alone": (
        lambda: split_backbone(Branches(lambda net, y: net.fc(y + 1 if net.training else y)), "body"),
        ValueError, "first the function 'add' in train mode and the module 'fc' in eval mode",
    ),
    "another output of the same calls": (
        lambda: split_backbone(Branches(two_outputs), "body"), ValueError, "the output with other inputs",
    ),
    "auxiliary classifiers of torchvision": (
        lambda: split_backbone(torchvision.models.googlenet(init_weights=False), "inception5a"),
        ValueError, "first the module 'aux1' in train mode and the module 'inception4b' in eval mode", "switch it off",
    ),
    "control flow on values": (
        lambda: split_backbone(Branches(lambda net, y: net.fc(y) if y.sum() > 0 else y), "body"),
        ValueError, "model", "torch.fx", "Branches", "control flow", "your own modules",
    ),
    "random numbers": (
        lambda: split_backbone(Branches(lambda net, y: net.fc(y * random.random())), "body"), ValueError, "model", "random numbers",
    ),
    "no gradients": (lambda: split_backbone(Branches(without_gradient), "body"), ValueError, "model", "gradients or autocast"),
    "written into": (lambda: split_backbone(Branches(written_into), "body"), ValueError, "model", "'relu_'", "writes"),
    "activated in place": (lambda: split_backbone(in_place(), "body"), ValueError, "model", "act", "inplace=True"),
    "written before the trunk reads": (
        lambda: split_backbone(side_branch(), "unused"), ValueError, "model", "side", "inplace=True",
    ),
    "a module on both sides": (lambda: split_backbone(Shared(), "b"), ValueError, "at", "'a'", "on both sides"),
    "compiled": (lambda: split_backbone(torch.compile(Shared()), "b"), ValueError, "model", "before compiling"),
    "a shifted classifier": (
        lambda: split_backbone(Branches(lambda net, y: net.fc(y) + 1), "body"), ValueError, "head", "'add' of 'fc'", "head=None",
    ),
    "a classifier scaled by the input": (
        lambda: split_backbone(Branches(lambda net, y: net.fc(y) * y.mean()), "body"), ValueError, "'mul' of 'fc', 'body'", "head=None",
    ),
    "a classifier in the denominator": (
        lambda: split_backbone(Branches(lambda net, y: 1 / net.fc(y)), "body"), ValueError, "'truediv' of 'fc'",
    ),
    "an output that no linear layer gives": (
        lambda: split_backbone(HeadBelow(), "conv"), ValueError, "'mean' of 'conv'; its last linear layers are 'fc'", "head=",
    ),
    "no classifier": (
        lambda: split_backbone(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "0"), ValueError, "head", "Sequential", "head=None",
    ),
    "encoder and decoder": (lambda: split_backbone(bart(), "encoder.layers.0"), ValueError, "BartModel", "pass its encoder"),
    "several outputs": (
        lambda: split_backbone(Branches(lambda net, y: (net.fc(y), y)), "body"),
        ValueError, "one tensor", "2 values", "'body', 'fc', 'unused'", "head=", "picks",
    ),
    "image network of transformers": (
        lambda: split_backbone(vision_transformer(), "layers.0"), ValueError, "ViTModel", "pixel_values", "timm",
    ),
    "head of a transformers model": (
        lambda: split_backbone(build(BERT), "encoder.layer.1", head="pooler"), ValueError, "head", "without its heads",
    ),
    "unknown path in an encoder": (
        lambda: split_backbone(build(BERT), "encoder.layer.9"), ValueError, "BertModel", "encoder.layer.0, encoder.layer.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_errors_say_what_exists(case):
    assert_raises(*CASES[case])


def test_a_network_in_train_mode_stays_so_after_an_error():
    model = Branches(lambda net, y: net.fc(y) if y.sum() > 0 else y)
    model.body.eval()
    with pytest.raises(ValueError, match=r"torch\.fx"):
        split_backbone(model, "body")
    assert model.training
    assert not model.body.training
