"""The public surface, pinned: a change here is a change of the contract."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest
from public import public_values, undocumented

import lgla_losses
from lgla_losses import baselines, functional, plot
from lgla_losses.losses.adjusted import AdjustedLoss, Options

SIGNATURES = {
    "count_classes": "labels, num_classes, *, iterate=False",
    "create_loss": "name, class_counts=None, **options",
    "ClassGrouper": "class_counts, num_groups, *, zero_counts='error', background=None",
    "ClassGrouper.from_groups": "class_counts, group_index, *, zero_counts='error', background=None",
    "ClassGrouper.forward": "self, target",
    "CLALogitAdjuster": "grouper, tau=None",
    "CLALogitAdjuster.from_table": "grouper, table",
    "CLALogitAdjuster.forward": "self, logits",
    "CLALogitAdjuster.margin": "self, target",
    "CLALogitAdjuster.implied_prior": "self, fusion=None",
    "AAWWeighter": "grouper, *, ignore_index=-100, sync=True, process_group=None, validate_args=None",
    "AAWWeighter.forward": "self, angles, target, statistics=None",
    "AAWWeighter.statistics": "self, angles, target",
    "LGLALoss": "class_counts=None, num_experts=None, tau=None, *, grouper=None, zero_counts='error', "
    "background=None, aaw=True, scale=30.0, adjustment='lgla', reduction='mean', ignore_index=-100, "
    "label_smoothing=0.0, sync=True, process_group=None, validate_args=None, backend='auto'",
    "LGLALoss.forward": "self, output, target, *, features=None, weight=None, sample_weight=None, "
    "normalizer=None",
    "LGLALoss.implied_prior": "self, fusion=None",
    "LinearLGLALoss": "class_counts=None, num_experts=None, tau=None, *, scale=None, **options",
    "LinearLGLALoss.forward": "self, features, weight, target, bias=None, *, sample_weight=None, "
    "normalizer=None",
    "ExpertOutput": "logits, features, weight",
    "ExpertOutput.ensemble": "self, fusion=None",
    "ExpertOutput.probabilities": "self, calibration=None, *, prior=None, fusion=None",
    "GroupConvExperts": "stage, num_experts, num_classes, *, num_features=None, classifier='cosine', "
    "scale=30.0, layout='grouped', reset=None, init_fn=None, gradient='bounded'",
    "GroupConvExperts.forward": "self, shared",
    "GroupConvExperts.to_independent": "self",
    "GroupConvExperts.to_grouped": "self",
    "GroupConvExperts.extract": "self, expert",
    "ExpertModel": "trunk, experts, *, eval_output='ensemble'",
    "ExpertModel.from_model": "model, num_experts=3, num_classes=None, at=None, *, classifier='cosine', "
    "scale=30.0, gradient='bounded', layout='grouped', reset=None, keep_head=False, eval_output='ensemble', "
    "head='auto'",
    "ExpertModel.save_pretrained": "self, directory",
    "ExpertModel.from_pretrained": "directory, model=None",
    "ExpertModel.forward": "self, *inputs, **kwargs",
    "ExpertModel.predict": "self, *inputs, prior=None, calibration=None, **kwargs",
    "parameter_groups": "model, weight_decay",
    "split_backbone": "model, at, *, head='auto'",
    "split_points": "model",
    "suggest": "num_experts=3, *, classifier='cosine', label_smoothing=0.0, training='usual', "
    "temperature=None",
}


#: Modules of their own, whose names the package does not repeat.
BASELINES = {
    "BalancedSoftmaxLoss": "class_counts, **options",
    "ClassBalancedBCELoss": "class_counts, beta=0.9999, gamma=None, **options",
    "ClassBalancedLoss": "class_counts, beta=0.9999, gamma=None, **options",
    "FocalLoss": "gamma=2.0, alpha=None, **options",
    "LDAMLoss": "class_counts, max_margin=0.5, scale=30.0, beta=0.9999, **options",
    "LDAMLoss.reweight": "self, enabled=True",
    "LogitAdjustedLoss": "class_counts, tau=1.0, **options",
    "NCLLoss": "class_counts, distillation=0.6, hard_share=0.3, **options",
    "RIDELoss": "class_counts, diversity=0.45, max_margin=None, scale=30.0, gamma=0.05, beta=0.9999, "
    "**options",
    "SigmoidAdjustedLoss": "class_counts, num_samples, tau=1.0, **options",
    "SigmoidAdjustedLoss.set_adjustment": "self, class_counts=None, tau=None, num_samples=None",
    "VSLoss": "class_counts, gamma=0.05, tau=1.0, **options",
    "expert_distillation": "output",
    "expert_diversity": "output, temperature=1.0",
}
AFTER_TRAINING = {
    "aggregation.self_supervised_weights": "view, other_view, *, learning_rate=0.1, epochs=5, "
    "batch_size=128, seed=0",
    "stages.tau_normalize": "head, tau=1.0",
}
PICTURES = {
    "fusion_sweep": "logits, target, class_counts, weights=None, *, many=100, few=20",
    "plot_angles": "angles, target, grouper, *, ignore_index=-100, bins=40, figure=None",
    "plot_boundaries": "adjuster, classes, centres=None, *, names=None, figure=None",
    "plot_fusion_sweep": "logits, target, class_counts, weights=None, *, many=100, few=20, figure=None",
    "plot_groups": "grouper, *, names=None, ax=None",
    "plot_implied_prior": "adjuster, fusion=None, *, names=None, ax=None",
    "plot_margins": "adjuster, target_class, *, names=None, ax=None",
    "plot_prior_shift": "logits, target, class_counts, exponents=None, *, calibration=None, many=100, "
    "few=20, ax=None",
    "plot_reliability": "probabilities, target, *, average='samples', bins=15, ax=None",
    "plot_table": "adjuster, *, names=None, ax=None",
    "plot_weight_norms": "weight, class_counts, *, names=None, ax=None",
}
OPTIONS = (
    "class_counts=None, numbers=None, *, class_weight=None, zero_counts='error', background=None, "
    "reduction='mean', ignore_index=-100, label_smoothing=0.0, sync=True, process_group=None, "
    "validate_args=None, backend='auto'"
)


def parameters(value):
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    value = lgla_losses
    for part in name.split("."):
        value = getattr(value, part)
    assert parameters(value) == SIGNATURES[name]


@pytest.mark.parametrize("name", BASELINES)
def test_signature_of_a_baseline(name):
    value = baselines
    for part in name.split("."):
        value = getattr(value, part)
    assert parameters(value) == BASELINES[name]
    if inspect.isclass(value):
        assert parameters(value.forward) == "self, output, target, *, sample_weight=None, normalizer=None"
        assert parameters(AdjustedLoss) == OPTIONS
        assert issubclass(value, AdjustedLoss)
        assert set(AdjustedLoss.__init__.__annotations__) - {"class_counts", "numbers", "return"} == set(
            Options.__annotations__
        )


@pytest.mark.parametrize("name", AFTER_TRAINING)
def test_signature_of_what_comes_after_training(name):
    module, function = name.split(".")
    assert parameters(getattr(getattr(lgla_losses, module), function)) == AFTER_TRAINING[name]
    assert getattr(lgla_losses, module).__all__ == [function]


@pytest.mark.parametrize("name", PICTURES)
def test_signature_of_a_picture(name):
    assert parameters(getattr(plot, name)) == PICTURES[name]
    assert plot.__all__ == sorted(PICTURES)


def test_baselines_are_sorted_and_complete():
    assert baselines.__all__ == sorted({name.split(".")[0] for name in BASELINES})
    assert not set(baselines.__all__) & set(lgla_losses.__all__)


def test_all_is_sorted_and_complete():
    assert lgla_losses.__all__ == sorted(lgla_losses.__all__)
    assert {name.split(".")[0] for name in SIGNATURES} | {"functional"} == set(lgla_losses.__all__)
    public = {
        name
        for name, value in vars(functional).items()
        if inspect.isfunction(value) and value.__module__ == functional.__name__ and name[0] != "_"
    }
    assert functional.__all__ == sorted(public)


def test_every_public_name_and_method_has_a_docstring():
    values = dict(public_values())
    assert len(values) > 60
    assert [name for item in values.items() for name in undocumented(*item)] == []


def test_every_public_name_is_annotated():
    values = [getattr(lgla_losses, name) for name in lgla_losses.__all__ if name != "functional"]
    values += [getattr(functional, name) for name in functional.__all__]
    values += [getattr(baselines, name) for name in baselines.__all__]
    values += [getattr(plot, name) for name in plot.__all__]
    for value in values:
        function = value if inspect.isfunction(value) else value.__init__
        if value is not lgla_losses.ExpertOutput:
            missing = set(inspect.signature(function).parameters) - set(function.__annotations__) - {"self"}
            assert not missing, (value, missing)


def test_experts_of_the_paper_by_default():
    criterion = lgla_losses.LGLALoss([5, 4, 3])
    assert criterion.num_experts == 3
    assert float(criterion.adjuster.tau) == 2.5


def test_import_takes_torch_and_numpy_only():
    """No import of the core may reach for an extra."""
    code = """
import sys
import torch  # which may import triton for itself

class OnlyTheCore:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"sklearn", "tqdm", "rich", "typer", "matplotlib", "torchvision"}:
            raise ImportError(f"{name} is no dependency of the core")

sys.meta_path.insert(0, OnlyTheCore())
import lgla_losses
lgla_losses.LGLALoss([5, 4, 3])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_are_attributes_of_the_package():
    """Without imports of their own; they are in ``dir``, which editors ask."""
    code = """
import sys
import torch, lgla_losses
before = set(sys.modules)
import torchvision_shim
for name in lgla_losses._MODULES:
    assert f"lgla_losses.{name}" not in before
    assert name in dir(lgla_losses)
    assert getattr(lgla_losses, name).__name__ == f"lgla_losses.{name}"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_what_is_no_module_is_no_attribute_of_the_package():
    with pytest.raises(AttributeError, match="module 'lgla_losses' has no attribute 'plots'"):
        lgla_losses.plots  # noqa: B018
    for module in pkgutil.iter_modules(lgla_losses.__path__):
        assert module.name[0] == "_" or hasattr(lgla_losses, module.name)


@pytest.mark.parametrize(
    ("name", "needed", "package"),
    [("plot", "matplotlib.figure", "matplotlib"), ("metrics", "torchmetrics", "torchmetrics")],
)
def test_a_module_whose_package_is_missing_names_it(name, needed, package, monkeypatch):
    for loaded in [one for one in sys.modules if f"{one}.".startswith(f"lgla_losses.{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delattr(lgla_losses, name, raising=False)
    monkeypatch.setitem(sys.modules, needed, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        getattr(lgla_losses, name)


def test_modules_hold_no_assert():
    """An assert vanishes under python -O; errors are ValueError or TypeError."""
    for module in pkgutil.walk_packages(lgla_losses.__path__, "lgla_losses."):
        if module.name.endswith("_native"):  # the C library, which is no Python module
            continue
        tree = ast.parse(inspect.getsource(importlib.import_module(module.name)))
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), module.name
