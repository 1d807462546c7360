"""A network made into one with K experts: what it gives, keeps and refuses."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from families import DISTILBERT, NARROW_TIMM, SMALL_TEXT, SMALL_VIT, TOKENS, TRAINER
from reference import assert_raises
from timm.optim import param_groups_weight_decay
from torch import nn

from lgla_losses import (
    ExpertModel,
    ExpertOutput,
    GroupConvExperts,
    LGLALoss,
    parameter_groups,
    split_backbone,
    split_points,
)

COUNTS = [50, 30, 20, 10, 5]
CLASSES = len(COUNTS)


class CNN(nn.Module):
    """A network of one's own, without containers."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 16, 3)
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.Linear(16, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.conv2(F.relu(self.conv1(x)))))
        return self.out(F.dropout(self.conv3(x).mean((2, 3)), 0.1, self.training))


class Branching(nn.Module):
    """Code that cannot be traced; takes two inputs."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.images, self.numbers = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)
        self.classes = nn.Linear(8, classes)

    def forward(self, images, numbers=None):
        features = self.images(images).mean((2, 3))
        if features.sum() > 1e9 or numbers is not None:
            features = features + self.numbers(numbers)
        return self.classes(features)


def mlp(*behind):
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES), *behind
    )


def convnext():
    blocks = [(8, 16, 1), (16, 24, 2), (24, None, 1)]
    setting = [torchvision.models.convnext.CNBlockConfig(*block) for block in blocks]
    return torchvision.models.ConvNeXt(setting, num_classes=CLASSES)


def vision_transformer():
    sizes = {"num_layers": 6, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
    return torchvision.models.VisionTransformer(32, 8, **sizes, num_classes=CLASSES)


def of_timm(name, **options):
    return timm.create_model(name, num_classes=CLASSES, **options)


def of_transformers(kind, images=False, **options):
    inputs = {"image_size": 32, "patch_size": 8} if images else TOKENS
    config = transformers.AutoConfig.for_model(
        kind, **{**SMALL_TEXT, **inputs, **options}, num_labels=CLASSES
    )
    auto = "AutoModelForImageClassification" if images else "AutoModelForSequenceClassification"
    return getattr(transformers, auto).from_config(config)


SMALL_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}

#: How each is made, what it takes, and the default advice.
NETWORKS = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=CLASSES), 64, "layer4"),
    "torchvision mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES),
        64,
        "features.11",
    ),
    "torchvision convnext": (convnext, 64, "features.5"),
    "torchvision vit": (vision_transformer, 32, "encoder.layers.encoder_layer_4"),
    "timm resnet50": (lambda: of_timm("resnet50", **NARROW_TIMM), 64, "layer4"),
    "timm convnext": (lambda: of_timm("convnext_atto", **SMALL_CONVNEXT), 64, "stages.3"),
    "timm vit": (lambda: of_timm("vit_tiny_patch16_224", **SMALL_VIT), 32, "blocks.2"),
    "bert": (lambda: of_transformers("bert"), "text", "bert.encoder.layer.2"),
    "roberta": (lambda: of_transformers("roberta"), "text", "roberta.encoder.layer.2"),
    "distilbert": (
        lambda: of_transformers("distilbert", **DISTILBERT),
        "text",
        "distilbert.transformer.layer.2",
    ),
    "transformers vit": (lambda: of_transformers("vit", images=True), "pixels", "vit.layers.2"),
    "own mlp": (mlp, "vectors", "2"),
    "own cnn": (CNN, 16, "conv3"),
}


def inputs_of(kind):
    """Six samples, as positional and named inputs."""
    if kind == "text":
        mask = torch.ones(6, 9, dtype=torch.long)
        mask[1, 4:] = mask[3, 7:] = 0
        return (), {"input_ids": torch.randint(3, 99, (6, 9)) * mask, "attention_mask": mask}
    if kind == "vectors":
        return (torch.randn(6, 6),), {}
    size = 32 if kind == "pixels" else kind
    images = torch.randn(6, 3, size, size)
    return ((), {"pixel_values": images}) if kind == "pixels" else ((images,), {})


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def state_of(model):
    return {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_unchanged(model, state, text):
    assert repr(model) == text
    assert state_of(model).keys() == state.keys()
    for name, (identity, tensor) in state_of(model).items():
        assert identity == state[name][0], name
        assert torch.equal(tensor, state[name][1]), name


@pytest.mark.parametrize("split", [False, True], ids=["heads alone", "stage and heads"])
@pytest.mark.parametrize("name", NETWORKS)
def test_with_its_own_head_it_is_the_network_until_it_is_trained(name, split):
    make, kind, at = NETWORKS[name]
    network = make().eval()
    args, kwargs = inputs_of(kind)
    state, text = state_of(network), repr(network)

    model = ExpertModel.from_model(network, at=at if split else None, classifier="linear", keep_head=True)

    assert_unchanged(network, state, text)
    assert not model.training
    expected = network(*args, **kwargs)
    output = model(*args, **kwargs)
    torch.testing.assert_close(logits_of(output), logits_of(expected))
    assert isinstance(output, torch.Tensor) == isinstance(expected, torch.Tensor)
    torch.testing.assert_close(model.predict(*args, **kwargs), logits_of(expected).softmax(1))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in network.parameters()}


@pytest.mark.parametrize("split", [False, True], ids=["heads alone", "stage and heads"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_trained_by_the_loss_and_validated_as_any_network(name, split):
    make, kind, at = NETWORKS[name]
    args, kwargs = inputs_of(kind)
    target = torch.arange(6) % CLASSES

    model = ExpertModel.from_model(make(), at=at if split else None).train()
    output = model(*args, **kwargs)
    assert isinstance(output, ExpertOutput)
    assert output.logits.shape == (6, 3, CLASSES)
    LGLALoss(COUNTS)(output, target).backward()
    LGLALoss(COUNTS)(output.logits, target)  # as of outputs.logits of transformers
    for part in (model.trunk, model.experts):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())

    before = state_of(model)
    probabilities = model.predict(*args, **kwargs)
    assert model.training
    assert all(module.training for module in model.modules())
    assert state_of(model).keys() == before.keys()
    assert all(
        torch.equal(t, before[n][1]) for n, (_, t) in state_of(model).items()
    )  # running statistics too

    logits = logits_of(model.eval()(*args, **kwargs))
    assert logits.shape == (6, CLASSES)
    assert not probabilities.requires_grad
    torch.testing.assert_close(probabilities, logits.softmax(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_split_point_splits(name):
    make, _, default = NETWORKS[name]
    network = make()
    points = split_points(network)
    assert points[0] == default
    assert points[1:] == sorted(points[1:], key=[path for path, _ in network.named_modules()].index)
    assert len(points) == len(set(points))
    for at in points:
        model = ExpertModel.from_model(network, 2, at=at)
        assert any(True for _ in model.trunk.parameters())
        assert any(True for _ in model.experts.stage.parameters())


def test_split_points_serve_split_backbone_too():
    for network in (transformers.BertModel(transformers.BertConfig(**SMALL_TEXT, **TOKENS)), mlp()):
        for at in split_points(network):
            split_backbone(network, at)
    assert split_points(nn.Linear(3, 2)) == []
    assert split_points(Branching()) == []
    blocks = nn.Sequential(nn.Flatten(), torchvision.models.resnet18())
    assert split_points(blocks) == ["1.layer4", "1.layer1", "1.layer2", "1.layer3"]


@pytest.mark.parametrize("kind", ["copied", "pickled", "loaded", "saved as safetensors"])
@pytest.mark.parametrize("split", [False, True], ids=["heads alone", "stage and heads"])
@pytest.mark.parametrize("name", ["timm vit", "bert", "own cnn"])
def test_it_is_copied_saved_and_loaded(name, split, kind, tmp_path):
    make, inputs, at = NETWORKS[name]
    at = at if split else None
    args, kwargs = inputs_of(inputs)
    model = ExpertModel.from_model(make(), at=at).eval()
    expected = model.predict(*args, **kwargs)

    if kind == "copied":
        twin = copy.deepcopy(model)
    elif kind == "pickled":
        twin = pickle.loads(pickle.dumps(model))
    else:
        twin = ExpertModel.from_model(make(), at=at).eval()
        if kind == "loaded":
            torch.save(model.state_dict(), tmp_path / "model.pt")
            state = torch.load(tmp_path / "model.pt", weights_only=True)
        else:
            safetensors = pytest.importorskip("safetensors.torch")
            safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
            state = safetensors.load_file(tmp_path / "model.safetensors")
        twin.load_state_dict(state)

    assert torch.equal(twin.predict(*args, **kwargs), expected)
    assert type(twin(*args, **kwargs)) is type(model(*args, **kwargs))


def test_weights_stay_unless_they_are_reset():
    network = CNN()
    for reset in (None, False):
        stage = ExpertModel.from_model(network, at="conv3", reset=reset).experts.stage
        assert torch.equal(stage.conv3.weight, network.conv3.weight.expand(3, -1, -1, -1, -1))
    fresh = ExpertModel.from_model(network, at="conv3", reset=True)
    weights = [network.conv3.weight, *fresh.experts.stage.conv3.weight]
    assert not any(torch.equal(one, other) for one in weights for other in weights if one is not other)
    assert torch.equal(fresh.trunk.conv1.weight, network.conv1.weight)


def test_mode_frozen_weights_and_precision_are_the_networks():
    network = CNN().double().eval()
    network.conv1.requires_grad_(False)
    for at in (None, "conv3"):
        model = ExpertModel.from_model(network, at=at)
        assert not any(module.training for module in model.modules())
        assert not model.trunk.conv1.weight.requires_grad
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        network.norm.eval()
        network.training = True
        assert not ExpertModel.from_model(network, at=at).trunk.norm.training  # frozen by itself
        network.training = False


def test_options_reach_the_experts():
    network = CNN()
    model = ExpertModel.from_model(network, 4, 9, "conv3", scale=16.0, layout="independent")
    assert (model.experts.num_experts, model.experts.layout) == (4, "independent")
    assert model.experts.classifiers.scale == 16.0
    assert model(torch.randn(2, 3, 16, 16)).logits.shape == (2, 4, 9)
    assert ExpertModel.from_model(network, classifier="linear").experts.classifiers.bias.shape == (3, CLASSES)


def test_a_cosine_classifier_keeps_the_directions_of_a_head_without_bias():
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, CLASSES, bias=False))
    model = ExpertModel.from_model(network, keep_head=True).eval()
    x = torch.randn(4, 6)
    cosines = F.cosine_similarity(network[0](x)[:, None], network[1].weight, dim=2)
    torch.testing.assert_close(model(x), 30 * cosines)
    linear = ExpertModel.from_model(network, keep_head=True, classifier="linear").eval()
    torch.testing.assert_close(linear(x), network(x))


def test_eval_mode_gives_the_experts_where_that_is_asked_for():
    for at in (None, "bert.encoder.layer.2"):
        model = ExpertModel.from_model(of_transformers("bert"), at=at, eval_output="experts").eval()
        assert isinstance(model(**inputs_of("text")[1]), ExpertOutput)


def test_parts_of_ones_own_make_a_model():
    experts = GroupConvExperts(partial(nn.Linear, 8, 4), 3, CLASSES)
    model = ExpertModel(nn.Linear(6, 8), experts)
    x = torch.randn(4, 6)
    assert torch.equal(model.eval()(x), experts(model.trunk(x)).ensemble())


class Tempered:
    """Stands for a calibration: it notes what it is given."""

    def probabilities(self, logits, prior=None):
        self.given = logits, prior
        return (logits / 2).softmax(1)


def test_predict_takes_a_calibration_and_the_prior_of_the_test_set():
    model, x, calibration = ExpertModel.from_model(mlp()).eval(), torch.randn(4, 6), Tempered()
    torch.testing.assert_close(model.predict(x, calibration=calibration), (model(x) / 2).softmax(1))
    assert calibration.given[1] is None
    model.predict(x, prior=COUNTS, calibration=calibration)
    assert torch.equal(calibration.given[0], model(x))
    assert calibration.given[1] is COUNTS


def test_an_error_in_predict_leaves_the_mode():
    model = ExpertModel.from_model(mlp())
    with pytest.raises(RuntimeError):
        model.predict(torch.randn(4, 7))
    assert all(module.training for module in model.modules())


def test_half_precision_predicts_in_full():
    model = ExpertModel.from_model(mlp()).bfloat16()
    probabilities = model.predict(torch.randn(4, 6, dtype=torch.bfloat16))
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_what_else_a_model_of_transformers_gives_stays():
    model = ExpertModel.from_model(of_transformers("bert")).eval()
    output = model(**inputs_of("text")[1], output_hidden_states=True)
    assert isinstance(output, transformers.modeling_outputs.SequenceClassifierOutput)
    assert output.logits.shape == (6, CLASSES)
    assert len(output.hidden_states) == 4


def test_two_sentences_are_told_apart():
    network = of_transformers("bert").eval()
    inputs = inputs_of("text")[1]
    inputs["token_type_ids"] = (torch.arange(9) > 4).long().expand(6, -1)
    for at in (None, "bert.encoder.layer.2"):
        model = ExpertModel.from_model(network, at=at, classifier="linear", keep_head=True)
        torch.testing.assert_close(model(**inputs).logits, network(**inputs).logits)


def test_a_classifier_of_every_token_chooses_the_last():
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    network = of_transformers("gpt2", **options).eval()
    inputs = inputs_of("text")[1]
    model = ExpertModel.from_model(network, classifier="linear", keep_head=True)
    torch.testing.assert_close(model(**inputs).logits, network(**inputs).logits)


def test_a_trainer_of_transformers_trains_validates_and_saves(tmp_path):
    network = of_transformers("bert")
    samples = [{n: t[i] for n, t in inputs_of("text")[1].items()} | {"labels": i % CLASSES} for i in range(6)]
    criterion = LGLALoss(COUNTS)

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits
        return F.cross_entropy(logits, labels) if logits.dim() == 2 else criterion(logits, labels)

    for at in (None, "bert.encoder.layer.2"):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=3, **TRAINER
        )
        trainer = transformers.Trainer(
            ExpertModel.from_model(network, at=at),
            arguments,
            train_dataset=samples,
            eval_dataset=samples,
            compute_loss_func=loss,
        )
        trainer.train()
        assert trainer.predict(samples).predictions.shape == (6, CLASSES)
        trainer.save_model(tmp_path / "saved")
        safetensors = pytest.importorskip("safetensors.torch")
        twin = ExpertModel.from_model(network, at=at)
        twin.load_state_dict(safetensors.load_file(tmp_path / "saved" / "model.safetensors"))


def test_code_that_cannot_be_traced_is_left_as_it_is():
    """The classifier has no name of the field and is the last linear layer; several inputs are handed on."""
    network = Branching().eval()
    model = ExpertModel.from_model(network, classifier="linear", keep_head=True)
    images, numbers = torch.randn(2, 3, 8, 8), torch.randn(2, 4)
    torch.testing.assert_close(model(images, numbers=numbers), network(images, numbers))
    torch.testing.assert_close(model.predict(images, numbers), network(images, numbers).softmax(1))


def test_a_network_of_ones_own_keeps_its_dictionary():
    network = Ends(lambda logits: {"logits": logits, "more": 3})
    model = ExpertModel.from_model(network, head="fc", classifier="linear", keep_head=True)
    x = torch.randn(4, 6)
    assert model(x).logits.shape == (4, 3, CLASSES)
    output = model.eval()(x)
    assert output["more"] == 3
    torch.testing.assert_close(output["logits"], network(x)["logits"])


def test_a_classifier_that_stands_before_its_body_is_found_by_the_code():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.top, self.body = nn.Linear(8, CLASSES), nn.Linear(6, 8)

        def forward(self, x):
            return self.top(self.body(x))

    network = HeadFirst().eval()
    model = ExpertModel.from_model(network, classifier="linear", keep_head=True)
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), network(x))


def test_a_softmax_behind_the_classifier_goes_with_it():
    network = mlp(nn.LogSoftmax(1)).eval()
    x = torch.randn(4, 6)
    for at in (None, "2"):
        model = ExpertModel.from_model(network, at=at, classifier="linear", keep_head=True)
        torch.testing.assert_close(model(x), network[:5](x))


def test_a_linear_layer_alone_becomes_experts():
    network, x = nn.Linear(6, CLASSES), torch.randn(4, 6)
    model = ExpertModel.from_model(network, classifier="linear", keep_head=True).eval()
    torch.testing.assert_close(model(x), network(x))


@pytest.mark.parametrize(
    "name", ["torchvision resnet18", "timm convnext", "torchvision vit", "bert", "own cnn"]
)
@pytest.mark.parametrize("layout", ["grouped", "independent"])
def test_weight_decay_spares_what_it_spares_in_the_network(name, layout):
    make, _, at = NETWORKS[name]
    network = make()
    no_decay, _ = param_groups_weight_decay(network, 0.1)
    spared = {id(parameter) for parameter in no_decay["params"]}
    network_names = {n: id(parameter) in spared for n, parameter in network.named_parameters()}

    model = ExpertModel.from_model(network, at=at, layout=layout, classifier="linear")
    without, decayed = parameter_groups(model, 0.1)
    assert (without["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    ours = {id(parameter) for parameter in without["params"]}
    names = {n: id(parameter) in ours for n, parameter in model.named_parameters()}
    assert len(names) == len(without["params"]) + len(decayed["params"])

    assert names.pop("experts.classifiers.bias")
    assert not names.pop("experts.classifiers.weight")
    for path, is_spared in names.items():
        part = path.removeprefix("trunk.").removeprefix("experts.stage.")
        part = part if layout == "grouped" or path.startswith("trunk.") else part.partition(".")[2]
        assert is_spared == network_names[part], path


def test_weight_decay_leaves_out_what_is_frozen():
    model = ExpertModel.from_model(CNN(), at="conv3")
    model.trunk.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.experts.parameters()))
    torch.optim.SGD(groups, lr=0.1).step()


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self, first, second):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.get_submodule(second).weight = self.get_submodule(first).weight

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x))))


class Twice(nn.Module):
    """Two classifiers and a branch, so that none of them is the last."""

    def __init__(self):
        super().__init__()
        self.body, self.coarse, self.fine = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        y = self.body(x)
        return self.coarse(y) if y.sum() > 0 else self.fine(y)


class Auxiliary(nn.Module):
    """Gives two outputs in training, as Inception does."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.fc = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        y = self.body(x)
        return (self.fc(y), self.aux(y)) if self.training else self.fc(y)


class Ends(nn.Module):
    """Makes something else of its logits."""

    def __init__(self, end):
        super().__init__()
        self.body, self.fc, self.end = nn.Linear(6, 8), nn.Linear(8, 5), end

    def forward(self, x):
        return self.end(self.fc(self.body(x)))


def make(network, *args, **kwargs):
    return lambda: ExpertModel.from_model(network, *args, **kwargs)


CASES = {
    "no module": (make(3), TypeError, "model", "torch.nn.Module", "3"),
    "compiled": (make(torch.compile(mlp())), ValueError, "model", "before compiling"),
    "no classifier": (
        make(nn.Sequential(nn.Conv2d(3, 4, 3))),
        ValueError,
        "head",
        "linear layer",
        "Sequential",
    ),
    "no classifier in timm": (
        make(timm.create_model("resnet18", num_classes=0)),
        ValueError,
        "model",
        "get_classifier()",
        "Identity",
        "nn.Linear(model.num_features, C)",
    ),
    "two classifiers in timm": (
        make(of_timm("deit_tiny_distilled_patch16_224", depth=2)),
        ValueError,
        "one linear classifier",
        "get_classifier()",
        "'head' and 'head_dist'",
        "num_classes=0",
        "deit_tiny_patch16_224",
    ),
    "one of two classifiers on features of both": (
        make(of_timm("deit_tiny_distilled_patch16_224", depth=2), head="head"),
        ValueError,
        "'head' and 'head_dist'",
        "at=",
    ),
    "two classifiers with norms in timm": (
        make(of_timm("levit_128s")),
        ValueError,
        "'head.linear' and 'head_dist.linear'",
        "distilled=False",
    ),
    "a convolution that classifies": (
        make(torchvision.models.squeezenet1_1(num_classes=CLASSES)),
        ValueError,
        "head",
        "SqueezeNet",
        "classifier 'classifier.1' is a Conv2d",
        "nn.Linear(512, 5)",
    ),
    "a convolution named as the classifier": (
        make(torchvision.models.squeezenet1_1(num_classes=CLASSES), head="classifier.1"),
        ValueError,
        "'classifier.1', a Conv2d",
        "nn.Linear(512, 5)",
    ),
    "a split of a network where a convolution classifies": (
        make(torchvision.models.squeezenet1_1(num_classes=CLASSES), at="features.12"),
        ValueError,
        "'classifier.1' is a Conv2d",
    ),
    "an encoder without head": (
        make(transformers.BertModel(transformers.BertConfig(**SMALL_TEXT, **TOKENS))),
        ValueError,
        "model",
        "BertModel",
        "get_classifier(), by its code, or by the names fc, classifier",
        "pooler.dense",
        "head=",
    ),
    "two that could be it": (
        make(Twice()),
        ValueError,
        "one linear classifier",
        "Twice",
        "'coarse', 'fine'",
        "head=",
    ),
    "head is no linear layer": (
        make(CNN(), head="conv1"),
        ValueError,
        "head",
        "nn.Linear",
        "Conv2d",
        "'out'",
    ),
    "head that is not there": (make(CNN(), head="outs"), ValueError, "head", "'outs'", "did you mean 'out'"),
    "an auxiliary classifier": (
        lambda: ExpertModel.from_model(Auxiliary())(torch.randn(2, 6)),
        TypeError,
        "model",
        "only logits",
        "tuple",
        "training mode",
        "auxiliary",
    ),
    "a split beside an auxiliary classifier": (
        make(Auxiliary(), at="body"),
        ValueError,
        "model",
        "the module 'aux' in train mode and the output in eval mode",
        "auxiliary classifier",
        "switch it off",
    ),
    "a dictionary": (
        make(Ends(lambda y: {"logits": y})),
        ValueError,
        "model",
        "returns one tensor",
        "a dict of 'logits'",
        "'body', 'fc'",
        "head=",
    ),
    "a softmax in the code": (
        make(Ends(lambda y: y.log_softmax(1))),
        ValueError,
        "logits",
        "Ends",
        "log_softmax",
        "remove",
    ),
    "a softmax made on the way": (
        make(Ends(lambda y: nn.Softmax(1)(y))),
        ValueError,
        "logits",
        "Ends",
        "made",
        "remove",
    ),
    "shifted logits": (make(Ends(lambda y: y + 2)), ValueError, "head", "'add' of 'fc'"),
    "shifted logits of a named head": (
        make(Ends(lambda y: y + 2), head="fc"),
        ValueError,
        "logits",
        "add",
        "remove",
        "at=",
    ),
    "a head that is kept where logits are scaled": (
        make(Ends(lambda y: 30 * y), keep_head=True, classifier="linear"),
        ValueError,
        "keep_head",
        "Ends",
        "'fc' (mul)",
        "keep_head=False",
    ),
    "unknown split point": (
        make(torchvision.models.resnet18(), at="layer5"),
        ValueError,
        "at",
        "'layer5'",
        "layer4",
        "did you mean 'layer4'",
    ),
    "unknown split point in transformers": (
        make(of_transformers("bert"), at="bert.encoder.layer.7"),
        ValueError,
        "at",
        "bert.encoder.layer.2",
        "did you mean",
    ),
    "split point of a wrong type": (make(CNN(), at=3), TypeError, "at", "dotted path"),
    "code that cannot be split": (
        make(Branching(), at="images"),
        ValueError,
        "model",
        "torch.fx",
        "your own modules",
    ),
    "a head of another size": (
        make(CNN(), num_classes=9, keep_head=True, classifier="linear"),
        ValueError,
        "keep_head",
        "5",
        "num_classes=9",
        "keep_head=False",
    ),
    "a head with bias for cosine": (
        make(CNN(), keep_head=True),
        ValueError,
        "keep_head",
        "classifier='linear'",
        "bias",
        "'cosine'",
    ),
    "keep_head of a wrong type": (make(CNN(), keep_head="yes"), TypeError, "keep_head", "'yes'"),
    "no experts": (make(CNN(), 0), ValueError, "num_experts", "0"),
    "unknown classifier": (
        make(CNN(), classifier="cos"),
        ValueError,
        "classifier",
        "'cosine', 'linear'",
        "'cos'",
    ),
    "unknown output": (
        make(CNN(), eval_output="mean"),
        ValueError,
        "eval_output",
        "'ensemble', 'experts'",
        "'mean'",
    ),
    "trunk tied to stage": (
        make(Tied("a", "b"), at="b"),
        ValueError,
        "model",
        "the stage's 'b.weight'",
        "'a.weight'",
        "untie",
    ),
    "trunk tied to classifier": (
        make(Tied("a", "fc"), keep_head=True, classifier="linear"),
        ValueError,
        "model",
        "the classifier's 'weight'",
        "'a.weight'",
        "untie",
    ),
    "stage tied to classifier": (
        make(Tied("c", "fc"), at="b", keep_head=True, classifier="linear"),
        ValueError,
        "model",
        "the classifier's",
        "'c.weight'",
    ),
    "a trunk that is none": (
        lambda: ExpertModel(3, GroupConvExperts(None, 3, 5, num_features=4)),
        TypeError,
        "trunk",
        "3",
    ),
    "experts that are none": (
        lambda: ExpertModel(nn.Identity(), nn.Identity()),
        TypeError,
        "experts",
        "GroupConvExperts",
    ),
    "a prior without calibration": (
        lambda: ExpertModel.from_model(mlp()).predict(torch.randn(2, 6), prior=COUNTS),
        ValueError,
        "prior",
        "without calibration=",
    ),
    "a calibration that is none": (
        lambda: ExpertModel.from_model(mlp()).predict(torch.randn(2, 6), calibration=3),
        TypeError,
        "calibration",
        "probabilities(",
        "3",
    ),
    "labels": (
        lambda: ExpertModel.from_model(of_transformers("bert"))(
            **inputs_of("text")[1], labels=torch.zeros(6, dtype=torch.long)
        ),
        ValueError,
        "labels",
        "criterion(outputs.logits, labels)",
        "compute_loss_func",
    ),
    "weight decay": (lambda: parameter_groups(mlp(), -1), ValueError, "weight_decay", ">= 0", "-1"),
    "no network to list": (lambda: split_points(3), TypeError, "model", "torch.nn.Module"),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_say_what_to_do(case):
    assert_raises(*CASES[case])


def squeezenet():
    network = torchvision.models.squeezenet1_1()
    network.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))
    return network


def with_new_classifier(name, **options):
    network = timm.create_model(name, num_classes=0, **options)
    return nn.Sequential(network, nn.Linear(network.num_features, CLASSES))


DEIT = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
#: Of the networks that are refused: how made anew, split, and with which head.
WAYS_OUT = {
    "squeezenet": (squeezenet, "features.12", "auto"),
    "deit": (lambda: with_new_classifier("deit_tiny_distilled_patch16_224", **DEIT), "0.blocks.1", "auto"),
    "deit by one": (lambda: of_timm("deit_tiny_distilled_patch16_224", **DEIT), "blocks.1", "head"),
    "deit without distillation": (lambda: of_timm("deit_tiny_patch16_224", **DEIT), "blocks.1", "auto"),
    "levit": (lambda: with_new_classifier("levit_128s", img_size=64), "0.stages.2", "auto"),
    "levit by one": (lambda: of_timm("levit_128s", img_size=64), "stages.2", "head.linear"),
    "levit without distillation": (
        lambda: of_timm("levit_128s", img_size=64, distilled=False),
        "stages.2",
        "auto",
    ),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_what_errors_advise_works(way):
    create, at, head = WAYS_OUT[way]
    images = torch.randn(4, 3, *[32 if "deit" in way else 64] * 2)
    for split in [at] if "by one" in way else [None, at]:
        model = ExpertModel.from_model(create(), at=split, head=head)
        LGLALoss(COUNTS)(model(images), torch.arange(4)).backward()
        assert model.eval()(images).shape == (4, CLASSES)


class Noting(nn.Module):
    """Keeps what it saw, as for maps of activations."""

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.calls = nn.Linear(6, 8), nn.Linear(8, 5), 0

    def forward(self, x):
        self.seen = self.body(x)
        self.calls += 1
        return self.fc(self.seen)


@pytest.mark.parametrize("at", ["body", None])
def test_what_a_network_notes_is_of_batches_only(at):
    network = Noting()
    split_points(network)
    model = copy.deepcopy(ExpertModel.from_model(network, at=at))
    assert network.calls == 0
    assert not hasattr(network, "seen")
    assert not hasattr(model.trunk, "seen")
    model(torch.randn(2, 6))
    assert getattr(model.trunk, "calls", 1) == 1


@pytest.mark.parametrize("at", ["body", None])
def test_an_error_leaves_the_network_as_it_was(at):
    network = Ends(lambda y: y.log_softmax(1) if y.sum() > 0 else y)
    network.body.eval()
    state, text = state_of(network), repr(network)
    with pytest.raises((ValueError, TypeError)):
        ExpertModel.from_model(network, at=at, num_classes=9, classifier="linear", keep_head=True)
    assert_unchanged(network, state, text)
    assert network.training
    assert not network.body.training


class NotTraced(nn.Module):
    """Its code asks for a value."""

    def __init__(self, inner, outer):
        super().__init__()
        self.fc, self.out = nn.Linear(8, inner), nn.Linear(inner, outer)

    def forward(self, x):
        if x.sum() > 1e9:
            x = 2 * x
        return self.out(torch.relu(self.fc(x)))


class NotSeen(Branching):
    """Does something with its logits where no trace can see it."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, images, numbers=None):
        return self.end(super().forward(images, numbers))


@pytest.mark.parametrize("no_grad", [False, True])
def test_what_an_untraceable_network_does_with_its_logits_is_seen_in_the_first_batch(no_grad):
    images = torch.randn(2, 3, 8, 8)
    for end in (lambda y: y.softmax(1), lambda y: 2 * y, lambda y: y.mul_(2)):
        model = copy.deepcopy(ExpertModel.from_model(NotSeen(end)))
        with torch.set_grad_enabled(not no_grad):
            for _ in range(2):  # it is not forgotten
                assert_raises(
                    lambda model=model: model(images), ValueError, "'classes'", "NotSeen", "changes them"
                )
    model = ExpertModel.from_model(NotSeen(lambda y: y), head="numbers")
    assert_raises(lambda: model.predict(images), ValueError, "'numbers'", "does not call")


@pytest.mark.parametrize(
    "end",
    [
        lambda y: y,
        lambda y: y.flatten(1),
        lambda y: y[:, :, None].squeeze(2),
        lambda y: y.float(),
        lambda y: y.clone(),
        lambda y: y[torch.arange(len(y))],
    ],
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode, partial(torch.autocast, "cpu")])
def test_an_untraceable_network_may_return_its_logits_as_a_view_or_in_full_precision(end, context):
    network, images = NotSeen(end).eval(), torch.randn(2, 3, 8, 8)
    with context():
        model = ExpertModel.from_model(network, classifier="linear", keep_head=True)
        torch.testing.assert_close(model(images), network(images), rtol=2e-2, atol=2e-2, check_dtype=False)
    assert not any(module._forward_hooks for module in model.modules())


class SoftmaxInEvalMode(nn.Module):
    """Gives probabilities where it does not train, as many own networks do."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        y = self.fc(self.body(x).relu())
        return y if self.training else y.softmax(1)


def test_a_softmax_in_eval_mode_alone_is_refused_there():
    model = ExpertModel.from_model(SoftmaxInEvalMode())
    model(torch.randn(2, 6))
    assert_raises(lambda: model.eval()(torch.randn(2, 6)), ValueError, "'fc'", "changes them")


@pytest.mark.parametrize("context", [torch.inference_mode, partial(torch.autocast, "cpu")])
def test_no_context_hides_what_a_network_does_with_its_logits(context):
    model = ExpertModel.from_model(NotSeen(lambda y: (y.float() if y.dtype != torch.float32 else y).mul_(2)))
    with context():
        assert_raises(lambda: model(torch.randn(2, 3, 8, 8)), ValueError, "changes them")


def test_an_empty_first_batch_ends_no_watch():
    model = ExpertModel.from_model(NotSeen(lambda y: y.softmax(1)))
    model(torch.randn(0, 3, 8, 8))
    assert_raises(lambda: model(torch.randn(2, 3, 8, 8)), ValueError, "changes them")


class Flattening(nn.Module):
    """Its code asks for the number of dimensions, which torch.fx does not know."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        if x.dim() > 2:
            x = x.flatten(1)
        return self.fc(self.body(x).relu())


@pytest.mark.parametrize("how", ["compiled", "vmapped", "traced"])
def test_transforms_take_an_untraceable_network(how):
    images, model = torch.randn(2, 6), ExpertModel.from_model(Flattening()).eval()
    expected = copy.deepcopy(model)(images)
    transformed = {
        "compiled": lambda: torch.compile(model, backend="eager"),
        "vmapped": lambda: lambda x: torch.func.vmap(model)(x[:, None])[:, 0],
        "traced": lambda: torch.jit.trace(model, (images,)),
    }[how]()
    torch.testing.assert_close(transformed(images), expected)


def test_a_layer_that_only_bears_a_classifiers_name_is_not_taken_for_it():
    model = ExpertModel.from_model(NotTraced(6, 4))
    assert isinstance(model.trunk.out, nn.Identity)
    assert isinstance(model.trunk.fc, nn.Linear)
    with pytest.raises(ValueError, match=r"head="):
        ExpertModel.from_model(NotTraced(8, 8))


@pytest.mark.parametrize("at", [None, "0"])
def test_hooks_of_the_network_see_nothing_while_it_is_made(at):
    network, seen = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach().max())))
    ExpertModel.from_model(network, at=at, reset=False)
    assert seen == []
    network(torch.randn(2, 8))
    assert len(seen) == 1


def test_a_classifier_tied_to_an_embedding_is_dropped_like_any_other():
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    network[2].weight = network[0].weight
    assert ExpertModel.from_model(network)(torch.randn(2, 8)).logits.shape == (2, 3, 8)
    with pytest.raises(ValueError, match="tied"):
        ExpertModel.from_model(network, keep_head=True)
