"""States that version 0.1.0 saved load, and give what they gave."""

import gzip

import pytest
import states
import torch
from scripts import ROOT

from lgla_losses import GroupConvExperts
from lgla_losses.label_shift import estimate_prior

with gzip.open(ROOT / "tests" / "package" / "data" / "states_0.1.0.pt.gz") as stream:
    SAVED = torch.load(stream, weights_only=True)


def test_the_file_is_of_another_version():
    assert SAVED["version"] == "0.1.0"


@pytest.mark.parametrize("counts", [states.COUNTS, states.OTHER_COUNTS], ids=["same counts", "other counts"])
@pytest.mark.parametrize("name", SAVED["modules"])
def test_a_state_of_0_1_0_loads_and_gives_the_same(name, counts, close):
    module, keys = states.cases(counts)[name]
    saved = SAVED["modules"][name]
    module.load_state_dict(saved["state"], strict=True)
    close(states.output(module, [SAVED["inputs"][key] for key in keys]), saved["output"])


@pytest.mark.parametrize(
    ("source", "make"),
    [
        ("factory", lambda: GroupConvExperts(states.stage, 3, 4, gradient="exact")),
        ("module", lambda: GroupConvExperts(states.stage(), 3, 4, gradient="exact", reset=True)),
    ],
)
def test_experts_start_as_in_0_1_0_when_asked(source, make, close):
    saved = SAVED["defaults"][f"experts of a {source}"]
    experts = states.fresh(make)
    assert set(experts) == set(saved)
    for name, value in saved.items():
        close(1.0 * experts[name], value)


def test_a_prior_is_estimated_as_in_0_1_0_when_asked(close):
    logits, saved = SAVED["inputs"]["logits"].mean(1), SAVED["defaults"]["estimated prior"]
    close(estimate_prior(logits, states.COUNTS, smoothing=0), saved)
    assert not torch.allclose(estimate_prior(logits, states.COUNTS), saved, atol=1e-2)


def test_every_module_of_today_has_a_state_of_0_1_0():
    assert set(states.cases(states.COUNTS)) == set(SAVED["modules"])
