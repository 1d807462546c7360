"""A model of transformers that holds a loss: ``from_pretrained`` makes it on meta, then fills it in."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lgla_losses import LGLALoss
from lgla_losses.baselines import LDAMLoss, LogitAdjustedLoss, VSLoss

COUNTS, OTHER, EQUAL = [100, 30, 10, 3], [7, 400, 1, 2], [5, 5, 5, 5]
LOSSES = {
    "lgla": LGLALoss,
    "logit": lambda counts, **tau: LGLALoss(counts, adjustment="logit", **tau),
    "LogitAdjustedLoss": LogitAdjustedLoss,
    "VSLoss": VSLoss,
    "LDAMLoss": LDAMLoss,
}


class Holder(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(2, 2)
        self.criterion = LOSSES[config.loss](config.class_counts)
        self.post_init()


def saved(folder, name, criterion):
    model = Holder(PreTrainedConfig(loss=name, class_counts=OTHER))
    model.criterion = criterion
    model.save_pretrained(folder)
    return folder


def load(folder, **options):
    model, report = Holder.from_pretrained(folder, output_loading_info=True, **options)
    return model, {name for keys in report.values() for name in keys}


def assert_same(actual, expected):
    states = actual.state_dict(), expected.state_dict()
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype, name
        assert torch.equal(states[0][name], value), name
    assert repr(actual) == repr(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_constants_come_back_exact_in_every_precision(name, dtype, tmp_path):
    """Those in the weights, not those of the config."""
    model, problems = load(saved(tmp_path, name, LOSSES[name](COUNTS)), dtype=dtype)
    assert not problems
    assert model.layer.weight.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert_same(model.criterion, LOSSES[name](COUNTS))


@pytest.mark.parametrize("name", ["lgla", "logit", "LogitAdjustedLoss", "VSLoss"])
def test_the_strength_comes_back_where_no_table_shows_it(name, tmp_path):
    """Of equal class counts every tau has the same table: it came back as 1."""
    model, problems = load(saved(tmp_path, name, LOSSES[name](EQUAL, tau=1.75)))
    assert not problems
    model.criterion.set_adjustment(COUNTS)
    assert_same(model.criterion, LOSSES[name](COUNTS, tau=1.75))


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_loss_in_the_weights_it_is_that_of_the_config(name, tmp_path):
    """As in the weights of an encoder that was trained elsewhere."""
    file = saved(tmp_path, name, LOSSES[name](COUNTS)) / "model.safetensors"
    weights = {key: value for key, value in load_file(file).items() if not key.startswith("criterion.")}
    save_file(weights, file, metadata={"format": "pt"})
    model, problems = load(tmp_path, dtype=torch.bfloat16)
    assert problems == {f"criterion.{key}" for key in model.criterion.state_dict()}
    assert_same(model.criterion, LOSSES[name](OTHER))


def test_a_model_in_half_precision_is_saved_with_whole_constants(tmp_path):
    Holder(PreTrainedConfig(loss="lgla", class_counts=COUNTS)).half().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["criterion.adjuster.table"].dtype == torch.float64
    model, _ = load(tmp_path)
    assert model.layer.weight.dtype == torch.float16
    assert_same(model.criterion, LGLALoss(COUNTS))
