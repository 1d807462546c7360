import pytest
from engines import ENGINES, device_of, named

from lgla_losses.kernels import autograd


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """What every backend but "reference" then runs on, and Triton interpreted where there is no GPU."""
    engine = named(request.param)
    monkeypatch.setattr(autograd, "engine_for", lambda backend, _: None if backend == "reference" else engine)
    with device_of(engine):
        yield engine
