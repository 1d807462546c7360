"""Losses and experts are built from configuration files, as by LightningCLI."""

import hydra
import jsonargparse
import omegaconf
import pytest
import torch
import yaml
from torch import nn

from lgla_losses import LGLALoss, create_loss

COUNTS = "[500, 100, 20]"

#: What stands in a file, and words of the repr.
CONFIGURATIONS = {
    "LGLALoss": (f"{{class_counts: {COUNTS}, num_experts: 3, tau: 2.0, aaw: false}}", "tau=2"),
    "LGLALoss by keyword": (
        f"{{class_counts: {COUNTS}, adjustment: balanced, ignore_index: -1}}",
        "balanced",
    ),
    "LinearLGLALoss": (f"{{class_counts: {COUNTS}, scale: 30.0, reduction: sum}}", "sum"),
    "ClassGrouper": (f"{{class_counts: {COUNTS}, num_groups: 2}}", "num_groups=2"),
    "distributed.ClassParallelLGLALoss": (f"{{class_counts: {COUNTS}, label_smoothing: 0.1}}", "of 3"),
    "baselines.FocalLoss": ("{gamma: 1.0, reduction: sum}", "gamma=1.0"),
    "baselines.FocalLoss of classes": ("{alpha: [0.5, 1.0, 2.0], label_smoothing: 0.1}", "gamma=2.0"),
    "baselines.BalancedSoftmaxLoss": (f"{{class_counts: {COUNTS}}}", "num_classes=3"),
    "baselines.ClassBalancedLoss": (f"{{class_counts: {COUNTS}, beta: 0.99, gamma: 2.0}}", "gamma=2.0"),
    "baselines.LDAMLoss": (f"{{class_counts: {COUNTS}, max_margin: 0.3}}", "scale=30.0"),
    "baselines.LogitAdjustedLoss": (f"{{class_counts: {COUNTS}, tau: 1.5}}", "num_classes=3"),
    "baselines.NCLLoss": (f"{{class_counts: {COUNTS}, distillation: 0.3}}", "distillation=0.3"),
    "baselines.RIDELoss": (f"{{class_counts: {COUNTS}, diversity: 0.2, scale: null}}", "diversity=0.2"),
    "baselines.SigmoidAdjustedLoss": (f"{{class_counts: {COUNTS}, num_samples: 900}}", "num_classes=3"),
    "baselines.ClassBalancedBCELoss": (f"{{class_counts: {COUNTS}, reduction: sum}}", "sum"),
    "baselines.VSLoss": (f"{{class_counts: {COUNTS}, backend: reference}}", "reference"),
    "create_loss": (f"{{name: lgla, class_counts: {COUNTS}, tau: 2.0}}", "tau=2"),
    "create_loss of a baseline": (f"{{name: vs, class_counts: {COUNTS}, gamma: 0.1}}", "VSLoss"),
    "create_loss of SADE": (f"{{name: sade, class_counts: {COUNTS}, tau: 1.0}}", "'sade'"),
    "create_loss without counts": ("{name: focal, gamma: 1.0}", "FocalLoss(gamma=1.0"),
    "GroupConvExperts": (
        "{stage: {class_path: torch.nn.Identity}, num_experts: 3, num_classes: 4, num_features: 5}",
        "num_experts=3",
    ),
    "GroupConvExperts of a stage": (
        "{stage: {class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 5}}, "
        "num_experts: 2, num_classes: 4, reset: true}",
        "Linear",
    ),
}


def build(name, arguments):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--module", type=nn.Module)
    class_path = f"lgla_losses.{name.split()[0]}"
    config = parser.parse_string(f"module: {{class_path: {class_path}, init_args: {arguments}}}")
    return parser.instantiate(config).module


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_built_from_yaml(name):
    """A number of experts was refused: it implements no protocol SupportsIndex."""
    arguments, words = CONFIGURATIONS[name]
    assert words in repr(build(name, arguments))


def test_a_loss_from_yaml_is_the_loss():
    logits, target = 30 * torch.rand(8, 3, 3), torch.arange(8) % 3
    built = build("LGLALoss", f"{{class_counts: {COUNTS}, tau: 2.0, label_smoothing: 0.1}}")
    assert built(logits, target) == LGLALoss([500, 100, 20], tau=2.0, label_smoothing=0.1)(logits, target)


def test_a_misspelt_option_in_yaml_is_named():
    with pytest.raises(jsonargparse.ArgumentError, match="redution"):
        build("LinearLGLALoss", f"{{class_counts: {COUNTS}, redution: sum}}")


def test_a_misspelt_option_of_a_loss_by_name_is_named():
    with pytest.raises(jsonargparse.ArgumentError, match="gama"):
        build("create_loss", f"{{name: focal, class_counts: {COUNTS}, gama: 1.0}}")


def test_a_loss_by_name_from_plain_yaml():
    config = yaml.safe_load(f"{{name: ldam, class_counts: {COUNTS}, max_margin: 0.3, scale: 16}}")
    assert "scale=16.0" in repr(create_loss(**config))
    by_class = yaml.safe_load("{name: balanced, class_counts: {0: 500, 2: 20, 1: 100}}")
    assert create_loss(**by_class).class_counts.tolist() == [500, 100, 20]


def test_a_number_that_yaml_takes_for_a_word_is_told():
    """YAML 1.1 reads 1e-1 as a string."""
    config = yaml.safe_load(f"{{name: focal, class_counts: {COUNTS}, gamma: 1e-1}}")
    with pytest.raises(TypeError, match=r"gamma: .*got '1e-1' of type str"):
        create_loss(**config)


def test_a_loss_by_name_from_hydra():
    """Its lists and mappings are classes of its own."""
    text = f"{{_target_: lgla_losses.create_loss, name: lgla, class_counts: {COUNTS}, tau: 2.0}}"
    criterion = hydra.utils.instantiate(omegaconf.OmegaConf.create(yaml.safe_load(text)))
    assert criterion.grouper.class_counts.tolist() == [500, 100, 20]

    text = (
        "{_target_: lgla_losses.create_loss, name: vs, class_counts: {0: 500, 1: 20}, class_weight: [1, 2]}"
    )
    criterion = hydra.utils.instantiate(omegaconf.OmegaConf.create(yaml.safe_load(text)))
    assert criterion.class_weight.tolist() == [1.0, 2.0]


def test_a_wrong_name_in_hydra_is_named():
    config = omegaconf.OmegaConf.create({"_target_": "lgla_losses.create_loss", "name": "lglaa"})
    with pytest.raises(hydra.errors.InstantiationException, match="did you mean 'lgla'"):
        hydra.utils.instantiate(config)
