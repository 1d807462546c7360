"""How long the way of a call through the package is: few functions, few files.

That of a usual batch: batches 1, 2, 4, 8 and so on are also looked at for logits that are no cosines'.
"""

import sys
from pathlib import Path

import pytest
import torch
from reference import cosine_logits

import lgla_losses
from lgla_losses import LGLALoss
from lgla_losses.baselines import BalancedSoftmaxLoss, FocalLoss
from lgla_losses.kernels import native

PACKAGE = Path(lgla_losses.__file__).parent
MOST_FUNCTIONS, MOST_FILES = 30, 8


def entered(call):
    """The functions of the package that a call enters, as (file, name)."""
    found = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.add((str(path.relative_to(PACKAGE)), frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.skipif(native.LIBRARY is None, reason="the path of the C library")
@pytest.mark.parametrize(
    ("criterion", "experts"),
    [(LGLALoss([9, 5, 2, 1]), 3), (BalancedSoftmaxLoss([9, 5, 2, 1]), 1), (FocalLoss(), 1)],
    ids=["LGLALoss", "BalancedSoftmaxLoss", "FocalLoss"],
)
def test_a_call_enters_few_functions_in_few_files(criterion, experts):
    logits, target = cosine_logits(8, experts, 4, torch.float32).requires_grad_(), torch.arange(8) % 4
    logits = logits if experts > 1 else logits[:, 0]
    for _ in range(4):  # the first batches are looked at more closely
        criterion(logits, target)
    functions = entered(lambda: criterion(logits, target))
    assert len(functions) <= MOST_FUNCTIONS, sorted(functions)
    assert len({file for file, _ in functions}) <= MOST_FILES, sorted(functions)
