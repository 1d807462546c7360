"""States that version 0.1.0 saved load, and give what they gave."""

import pytest
import states
import torch
from scripts import ROOT

SAVED = torch.load(ROOT / "tests" / "package" / "data" / "states_0.1.0.pt", weights_only=True)


def test_the_file_is_of_another_version():
    assert SAVED["version"] == "0.1.0"


@pytest.mark.parametrize("counts", [states.COUNTS, states.OTHER_COUNTS], ids=["same counts", "other counts"])
@pytest.mark.parametrize("name", SAVED["modules"])
def test_a_state_of_0_1_0_loads_and_gives_the_same(name, counts, close):
    module, keys = states.cases(counts)[name]
    saved = SAVED["modules"][name]
    module.load_state_dict(saved["state"], strict=True)
    close(states.output(module, [SAVED["inputs"][key] for key in keys]), saved["output"])


def test_every_module_of_today_has_a_state_of_0_1_0():
    assert set(states.cases(states.COUNTS)) == set(SAVED["modules"])
