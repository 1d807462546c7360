"""A model of experts saved into a folder, and loaded from there."""

import copy
import json
import os
import pickle
import sys

import pytest
import timm
import torch
import torchvision
import transformers
from families import DISTILBERT, SMALL_TEXT, SMALL_VIT, TOKENS, TRAINER
from reference import assert_raises
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lgla_losses import ExpertModel, ExpertOutput, GroupConvExperts, LGLALoss

CLASSES = 5
COUNTS = [50, 30, 20, 10, 5]


def of_transformers(kind, images=False, **options):
    inputs = {"image_size": 32, "patch_size": 8} if images else TOKENS
    config = transformers.AutoConfig.for_model(
        kind, **{**SMALL_TEXT, **inputs, **options}, num_labels=CLASSES
    )
    auto = "AutoModelForImageClassification" if images else "AutoModelForSequenceClassification"
    return getattr(transformers, auto).from_config(config)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
#: Its embeddings are tied: three names of one tensor.
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
OF_TRANSFORMERS = {
    "bert": (lambda: of_transformers("bert"), "bert.encoder.layer.2"),
    "distilbert": (lambda: of_transformers("distilbert", **DISTILBERT), "distilbert.transformer.layer.2"),
    "vit": (lambda: of_transformers("vit", images=True), "vit.layers.2"),
    "gpt2": (lambda: of_transformers("gpt2", **GPT2), None),
    "bart": (lambda: of_transformers("bart", **BART), None),
}


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, CLASSES)
    )


class OwnBert(transformers.BertForSequenceClassification):
    """A class of one's own on top of one of transformers."""


def inputs_of(model):
    """Six samples by name; the last token of a text is its end."""
    ids = torch.randint(3, 99, (6, 9))
    ids[:, -1] = 2
    images = isinstance(model, transformers.ViTForImageClassification)
    return {"pixel_values": torch.randn(6, 3, 32, 32)} if images else {"input_ids": ids}


def trained(model):
    """Weights and statistics as no constructor makes them."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def assert_same_weights(actual, expected):
    state = actual.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("split", [False, True], ids=["heads alone", "stage and heads"])
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_model_of_transformers_comes_back_from_its_folder_alone(name, split, tmp_path):
    make, at = OF_TRANSFORMERS[name]
    network = make()
    model = trained(ExpertModel.from_model(network, at=at if split else None)).eval()
    model.save_pretrained(tmp_path / "saved")

    loaded = ExpertModel.from_pretrained(tmp_path / "saved")
    assert_same_weights(loaded, model)
    assert not any(module.training for module in loaded.modules())
    inputs = inputs_of(network)
    expected, output = model(**inputs), loaded(**inputs)
    assert type(output) is type(expected)
    assert torch.equal(output.logits, expected.logits)
    assert isinstance(loaded.train()(**inputs), ExpertOutput)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        *("config.json", "experts.json", "model.safetensors")
    ]


def test_transformers_reads_the_config(tmp_path):
    network = of_transformers("bert")
    network.config.id2label = dict(enumerate("abcde"))
    ExpertModel.from_model(network).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is transformers.BertConfig
    assert config.architectures == ["BertForSequenceClassification"]
    assert list(config.id2label.values()) == list("abcde")
    assert network.config.architectures is None

    ExpertModel.from_model(network, num_classes=9).bfloat16().save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.num_labels, config.dtype) == (9, torch.bfloat16)
    assert network.config.num_labels == CLASSES


NETWORKS = {
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=7), 64, "layer4"),
    "timm": (lambda: timm.create_model("vit_tiny_patch16_224", **SMALL_VIT), 32, "blocks.2"),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("split", [False, True], ids=["heads alone", "stage and heads"])
def test_a_network_of_another_library_comes_back_with_one_of_its_kind(name, split, tmp_path):
    make, size, at = NETWORKS[name]
    model = trained(ExpertModel.from_model(make(), 2, CLASSES, at if split else None)).eval()
    model.save_pretrained(str(tmp_path))
    loaded = ExpertModel.from_pretrained(str(tmp_path), model=make())
    assert_same_weights(loaded, model)
    images = torch.randn(2, 3, size, size)
    assert torch.equal(loaded(images), model(images))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 4, "num_classes": 9, "at": "3", "layout": "independent", "scale": 16.0},
        {"classifier": "linear", "keep_head": True, "eval_output": "experts"},
        {"gradient": "exact", "reset": True, "at": "0", "head": "4"},
    ],
)
def test_what_it_was_made_with_comes_back(options, tmp_path):
    model = ExpertModel.from_model(mlp(), **options)
    model.save_pretrained(tmp_path)
    loaded = ExpertModel.from_pretrained(tmp_path, model=mlp())
    assert repr(loaded) == repr(model)
    assert loaded.eval_output == model.eval_output
    assert_same_weights(loaded, model)


def test_what_was_changed_since_comes_back(tmp_path):
    model = ExpertModel.from_model(of_transformers("bert"))
    model.trunk.resize_token_embeddings(120, mean_resizing=False)
    model.eval_output, model.experts.classifiers.scale = "experts", 20.0
    model.save_pretrained(tmp_path)
    loaded = ExpertModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert (loaded.eval_output, loaded.experts.classifiers.scale) == ("experts", 20.0)

    network = of_transformers("bert")
    model = ExpertModel.from_model(network, at="bert.encoder.layer.2")
    network.resize_token_embeddings(120, mean_resizing=False)  # no longer the model's
    model.save_pretrained(tmp_path)
    assert_same_weights(ExpertModel.from_pretrained(tmp_path), model)

    model = ExpertModel.from_model(mlp(), at="3")
    model.experts = model.experts.to_independent()
    model.save_pretrained(tmp_path)
    assert_same_weights(ExpertModel.from_pretrained(tmp_path, model=mlp()), model)


def test_precision_comes_back_tensor_by_tensor(tmp_path):
    model = ExpertModel.from_model(of_transformers("bert")).bfloat16()
    model.experts.classifiers.float()
    model.save_pretrained(tmp_path)
    assert_same_weights(ExpertModel.from_pretrained(tmp_path), model)


def test_a_linear_layer_alone_and_a_class_of_ones_own_come_back(tmp_path):
    model = ExpertModel.from_model(nn.Linear(6, CLASSES))
    model.save_pretrained(tmp_path)
    assert_same_weights(ExpertModel.from_pretrained(tmp_path, nn.Linear(6, CLASSES)), model)

    class Own(ExpertModel):
        pass

    assert type(Own.from_pretrained(tmp_path, nn.Linear(6, CLASSES))) is Own


@pytest.mark.parametrize("kind", ["copied", "pickled", "averaged", "compiled", "loaded"])
def test_a_twin_is_saved_as_well(kind, tmp_path):
    model = ExpertModel.from_model(of_transformers("bert"), at="bert.encoder.layer.2").eval()
    if kind == "loaded":
        model.save_pretrained(tmp_path / "first")
    twin = {
        "copied": copy.deepcopy,
        "pickled": lambda model: pickle.loads(pickle.dumps(model)),
        "averaged": lambda model: AveragedModel(model).module,
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "loaded": lambda model: ExpertModel.from_pretrained(tmp_path / "first"),
    }[kind](model)
    twin.save_pretrained(tmp_path)
    assert_same_weights(ExpertModel.from_pretrained(tmp_path), model)


def test_what_lies_in_the_folder_stays_where_saving_fails(tmp_path, monkeypatch):
    model = ExpertModel.from_model(of_transformers("bert"))
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        trained(ExpertModel.from_model(of_transformers("bert"), 4)).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_trainer_of_transformers_saves_resumes_and_takes_the_best(tmp_path):
    network = of_transformers("bert")
    samples = [{n: t[i] for n, t in inputs_of(network).items()} | {"labels": i % CLASSES} for i in range(6)]
    criterion, losses = LGLALoss(COUNTS), []

    def loss(outputs, labels, num_items_in_batch=None):
        return criterion(outputs.logits, labels)

    def worse_by_the_epoch(predictions):
        losses.append(float(criterion(*map(torch.from_numpy, predictions))))
        return {"score": 1 / len(losses)}

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        learning_rate=0.1,
        per_device_train_batch_size=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **TRAINER,
    )
    trainer = transformers.Trainer(
        ExpertModel.from_model(network, at="bert.encoder.layer.2"),
        arguments,
        train_dataset=samples,
        eval_dataset=samples,
        compute_loss_func=loss,
        compute_metrics=worse_by_the_epoch,
    )
    trainer.train()
    first, _, last = losses
    trainer.evaluate()
    assert losses[-1] == pytest.approx(first, rel=1e-5)
    assert first != pytest.approx(last, rel=1e-2)

    trained(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses[-1] == pytest.approx(last, rel=1e-5)
    trainer.evaluate()
    assert losses[-1] == pytest.approx(first, rel=1e-5)

    trainer.save_model(tmp_path / "saved")  # the weights alone
    trainer.model.save_pretrained(tmp_path / "saved")
    assert_same_weights(ExpertModel.from_pretrained(tmp_path / "saved"), trainer.model)
    checkpoint = trainer.state.best_model_checkpoint
    assert_raises(
        lambda: ExpertModel.from_pretrained(checkpoint),
        ValueError,
        *("directory", "experts.json", "Trainer", "load_state_dict"),
    )


@pytest.mark.parametrize("kind", ["expanded", "overlapping", "a view of a weight", "of one storage", "tied"])
def test_weights_that_share_memory_come_back(kind, tmp_path):
    def make(first=0.0):
        network, values = mlp(), torch.arange(first, first + 8)
        if kind == "expanded":
            network[3].register_buffer("positions", values.expand(3, 8))
        elif kind == "overlapping":
            network[3].register_buffer("low", values[:6])
            network[3].register_buffer("high", values[2:])
        elif kind == "a view of a weight":
            network[3].register_buffer("row", network[3].weight.detach()[2:4])
        elif kind == "of one storage":
            both = torch.randn(9, 8)
            network[3].weight.data, network[3].bias.data = both[:8], both[8]
        else:
            network[3].twin = network[3].weight
        return network

    for at in (None, "0"):
        model = ExpertModel.from_model(make(first=7.0), at=at)
        model.save_pretrained(tmp_path)
        loaded = ExpertModel.from_pretrained(tmp_path, make())
        assert_same_weights(loaded, model)
        assert len(list(loaded.parameters())) == len(list(model.parameters()))
        tensors = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        assert len(load_file(tmp_path / "model.safetensors")) == len(tensors)


def test_others_may_read_the_weights_as_they_may_the_record(tmp_path):
    before = os.umask(0o022)
    try:
        saved(ExpertModel.from_model(mlp()), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


class WithState(nn.Linear):
    """Has a state beside its tensors."""

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def test_a_state_that_safetensors_cannot_hold_is_named(tmp_path):
    model = ExpertModel.from_model(nn.Sequential(WithState(6, 8), nn.Linear(8, CLASSES)))
    assert_raises(
        lambda: model.save_pretrained(tmp_path / "new"),
        ValueError,
        *("model", "steps", "trunk.0._extra_state", "torch.save(model.state_dict(), path)"),
    )
    assert not (tmp_path / "new").exists()


def test_a_model_is_never_loaded_without_values(tmp_path):
    saved(ExpertModel.from_model(of_transformers("bert")), tmp_path / "bert")
    saved(ExpertModel.from_model(mlp()), tmp_path / "mlp")

    def load(folder, network=None):
        return lambda: ExpertModel.from_pretrained(tmp_path / folder, network)

    told = ValueError, "model", "meta", "on the CPU"
    assert_raises(load("mlp", mlp().to("meta")), *told)
    network = mlp()
    with torch.device("meta"):
        for call in (load("bert"), load("mlp", network)):
            assert_raises(call, *told)


def damaged(folder, file, text):
    """A folder of BERT where a file has this text, or is gone."""
    saved(ExpertModel.from_model(of_transformers("bert")), folder)
    (folder / file).unlink() if text is None else (folder / file).write_bytes(text)
    return folder


@pytest.mark.parametrize("text", [None, b"", b"{", b"[]", b'{"hidden_size": "wide"}'])
def test_a_config_that_is_gone_or_damaged_is_named(text, tmp_path):
    assert_raises(
        lambda: ExpertModel.from_pretrained(damaged(tmp_path, "config.json", text)),
        ValueError,
        *("directory", "BertForSequenceClassification", f"{tmp_path}/config.json", "model="),
    )
    ExpertModel.from_pretrained(tmp_path, of_transformers("bert"))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_weights_that_were_cut_off_are_named(size, tmp_path):
    weights = (damaged(tmp_path, "notes.txt", b"") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:size])
    assert_raises(
        lambda: ExpertModel.from_pretrained(tmp_path),
        ValueError,
        *("directory", f"{tmp_path}/model.safetensors", "damaged", "save the model again"),
    )


def with_options(folder, **options):
    """Load the folder of a small network whose record has these options too."""
    saved(ExpertModel.from_model(mlp(), at="3"), folder)
    record = json.loads((folder / "experts.json").read_text())
    (folder / "experts.json").write_text(
        json.dumps({**record, "options": {**record["options"], **options} if options else None})
    )
    return lambda: ExpertModel.from_pretrained(folder, mlp())


@pytest.mark.parametrize("options", [{}, {"routing": "top"}, {"reset": True}, {"scale": None}])
def test_a_record_of_another_version_is_told(options, tmp_path):
    told = (
        [next(iter(options)), "another version of lgla_losses wrote it"]
        if options
        else ["another version of lgla_losses wrote it"]
    )
    assert_raises(
        with_options(tmp_path, **options), ValueError, "directory", f"{tmp_path}/experts.json", *told
    )


@pytest.mark.parametrize("options", [{"at": "body.7"}, {"head": "classifier"}])
def test_a_network_that_the_record_does_not_fit_is_told_so(options, tmp_path):
    (value,) = options.values()
    told = f"record '{tmp_path}/experts.json'", value, "from the record", "model="
    assert_raises(with_options(tmp_path, **options), ValueError, "model", *told)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def with_record(folder, text):
    saved(ExpertModel.from_model(mlp()), folder)
    (folder / "experts.json").write_text(text)
    return lambda: ExpertModel.from_pretrained(folder, mlp())


def of_parts(folder):
    experts = GroupConvExperts(None, 3, 5, num_features=4)
    return lambda: ExpertModel(nn.Identity(), experts).save_pretrained(folder)


CASES = {
    "no path": (lambda _: lambda: ExpertModel.from_pretrained(3), TypeError, "directory", "3"),
    "no path to save to": (
        lambda _: lambda: ExpertModel.from_model(mlp()).save_pretrained(None),
        TypeError,
        "directory",
        "None",
    ),
    "a file": (
        lambda folder: (
            lambda: ExpertModel.from_model(mlp()).save_pretrained(
                saved(ExpertModel.from_model(mlp()), folder) / "experts.json"
            )
        ),
        ValueError,
        "directory",
        "the file",
        "experts.json",
    ),
    "no folder": (
        lambda folder: lambda: ExpertModel.from_pretrained(folder / "nowhere"),
        ValueError,
        "directory",
        "save_pretrained",
        "nowhere",
    ),
    "a record that is none": (
        lambda folder: with_record(folder, "{"),
        ValueError,
        "directory",
        "experts.json",
    ),
    "another record": (
        lambda folder: with_record(folder, '{"a": 1}'),
        ValueError,
        "directory",
        "experts.json",
        "it has a",
        "save the model again",
    ),
    "a list for a record": (
        lambda folder: with_record(folder, "[]"),
        ValueError,
        "directory",
        "experts.json",
    ),
    "made of parts": (of_parts, ValueError, "from_model", "state_dict()"),
    "a network that cannot be made": (
        lambda folder: lambda: ExpertModel.from_pretrained(saved(ExpertModel.from_model(mlp()), folder)),
        ValueError,
        "model",
        "Sequential",
        "model=network",
    ),
    "a class of one's own on top of transformers": (
        lambda folder: (
            lambda: ExpertModel.from_pretrained(
                saved(ExpertModel.from_model(OwnBert(of_transformers("bert").config)), folder)
            )
        ),
        ValueError,
        "model",
        "OwnBert",
        "model=network",
    ),
    "another network": (
        lambda folder: (
            lambda: ExpertModel.from_pretrained(
                saved(ExpertModel.from_model(mlp()), folder), nn.Sequential(nn.Linear(6, 9), *mlp()[1:])
            )
        ),
        ValueError,
        "model",
        "0.weight",
        "model=",
    ),
    "no module": (
        lambda folder: lambda: ExpertModel.from_pretrained(saved(ExpertModel.from_model(mlp()), folder), 3),
        TypeError,
        "model",
        "3",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_say_what_to_do(case, tmp_path):
    make, *expected = CASES[case]
    assert_raises(make(tmp_path), *expected)


def test_only_classes_of_transformers_are_made_by_name(tmp_path):
    ExpertModel.from_model(of_transformers("bert")).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "experts.json").read_text())
    for name in ("AutoTokenizer", "NoSuchModel", "__name__"):
        (tmp_path / "experts.json").write_text(json.dumps({**record, "network": name}))
        assert_raises(lambda: ExpertModel.from_pretrained(tmp_path), ValueError, "model", name)


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        ExpertModel.from_model(mlp()).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
