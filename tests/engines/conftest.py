import os
import re

import pytest
from engines import ENGINES, device_of, named

from conftest import HAS_GPU
from lgla_losses.kernels import autograd

#: What Triton's interpreter takes seconds for, case by case.
SLOW = re.compile(
    r"(probabilities|class_weights_margins|whatever_comes|focus_where|gradient_over|rows_beyond|masked_classes"
    r"|ignored_rows|not_a_number|experts_in_several|strides|weights_from)"
)


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """What every backend but "reference" then runs on, and Triton interpreted where there is no GPU."""
    engine = named(request.param)
    monkeypatch.setattr(autograd, "engine_for", lambda backend, _: None if backend == "reference" else engine)
    with device_of(engine):
        yield engine


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without a GPU one of each kind of Triton's cases runs, unless ALL_CASES is set."""
    seen = set()
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        triton = "triton" in map(str, parameters.values()) and item.path.name == "test_engines.py"
        if HAS_GPU or "ALL_CASES" in os.environ or not triton or not SLOW.search(item.originalname):
            continue
        kind = item.originalname, str(parameters.get("kind")), "blocks" in item.name
        if kind in seen or "blocks" in item.name:
            item.add_marker(pytest.mark.skip(reason="minutes in Triton's interpreter: ALL_CASES=1 runs them"))
        seen.add(kind)
