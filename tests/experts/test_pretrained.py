"""The loss inside a model of transformers: saved, loaded, trained from a checkpoint without it."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lgla_losses import GroupConvExperts, LGLALoss
from lgla_losses.baselines import LDAMLoss, VSLoss

COUNTS = [500, 120, 60, 9, 3, 1]


class Config(PretrainedConfig):
    model_type = "lgla_test"

    def __init__(self, class_counts=None, **kwargs):
        super().__init__(**kwargs)
        self.class_counts = class_counts


class Encoder(PreTrainedModel):
    config_class = Config
    base_model_prefix = "encoder"

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(5, 4)
        self.post_init()

    def forward(self, inputs):
        return self.layer(inputs)


class Classifier(PreTrainedModel):
    config_class = Config
    base_model_prefix = "encoder"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.experts = GroupConvExperts(None, 3, 6, num_features=4)
        self.losses = nn.ModuleList(
            [
                LGLALoss(config.class_counts),
                LGLALoss(config.class_counts, tau=2.0, adjustment="logit"),
                LDAMLoss(config.class_counts),
                VSLoss(config.class_counts),
            ]
        )
        self.post_init()

    def forward(self, inputs, labels):
        logits = self.experts(self.encoder(inputs))
        return torch.stack([criterion(logits, labels) for criterion in self.losses])


def constants(model):
    return model.losses.state_dict()


def assert_same_constants(actual, expected):
    assert constants(actual).keys() == constants(expected).keys()
    for name, tensor in constants(expected).items():
        assert torch.equal(constants(actual)[name], tensor), name


def test_a_model_with_its_loss_is_saved_and_loaded(tmp_path):
    """safetensors found tensors that share memory."""
    torch.manual_seed(0)
    model, (inputs, labels) = Classifier(Config(COUNTS)), (torch.randn(12, 5), torch.arange(12) % 6)
    model.save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path)
    assert_same_constants(loaded, model)
    torch.testing.assert_close(loaded(inputs, labels), model(inputs, labels))


def test_a_loss_that_was_changed_in_training_is_loaded_as_it_was(tmp_path):
    model = Classifier(Config(COUNTS))
    model.losses[0].set_adjustment([9, 8, 7, 6, 5, 1], tau=1.0)
    model.losses[1].set_adjustment(tau=0.5)
    model.losses[2].reweight()
    model.save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path)
    inputs, labels = torch.randn(12, 5), torch.arange(12) % 6
    torch.testing.assert_close(loaded(inputs, labels), model(inputs, labels))
    assert_same_constants(loaded, model)


def test_a_loss_that_the_checkpoint_lacks_is_the_constructors(tmp_path):
    """Its tables held whatever memory held: losses of 11.27 where tables were near 0."""
    Encoder(Config()).save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path, class_counts=COUNTS)
    assert_same_constants(loaded, Classifier(Config(COUNTS)))
    loaded.experts.classifiers.reset_parameters()  # which the checkpoint lacks too
    inputs, labels = torch.randn(12, 5), torch.arange(12) % 6
    twin = Classifier(Config(COUNTS))
    twin.encoder.load_state_dict(loaded.encoder.state_dict())
    twin.experts.load_state_dict(loaded.experts.state_dict())
    torch.testing.assert_close(loaded(inputs, labels), twin(inputs, labels))
    halved = Classifier.from_pretrained(tmp_path, class_counts=COUNTS, dtype=torch.bfloat16)
    assert_same_constants(halved, Classifier(Config(COUNTS)))
