"""What an editor and mypy tell users about their calls."""

import re
import subprocess
import sys

import pytest
from scripts import ROOT

pytest.importorskip("mypy")

#: Lines of a user, and what is said about them; about others nothing.
SCRIPT = """\
import torch
from torch import nn
from lgla_losses import GroupConvExperts, LGLALoss, LinearLGLALoss
from lgla_losses.baselines import BalancedSoftmaxLoss, FocalLoss

logits, target = torch.zeros(2, 3, 3), torch.tensor([0, 2])
criterion = LGLALoss([3, 2, 1], num_experts=3, reduction="sum")
reveal_type(criterion(logits, target))  # torch._tensor.Tensor
criterion(logits, target, weigth=None)  # Unexpected keyword argument "weigth"
criterion(logits)  # Too few arguments
criterion(logits, target).back()  # "Tensor" has no attribute "back"
linear = LinearLGLALoss([3, 2, 1], 3, reduction="sum", aaw=False)
reveal_type(linear(logits, logits, target))  # torch._tensor.Tensor
LinearLGLALoss([3, 2, 1], redution="sum")  # Unexpected keyword argument "redution"
LinearLGLALoss([3, 2, 1], "3")  # Argument 2 to "LinearLGLALoss" has incompatible type "str"
LinearLGLALoss([3, 2, 1], ignore_index="none")  # Argument "ignore_index" to "LinearLGLALoss"
LGLALoss([3, 2, 1], ignore_index="none")  # Argument "ignore_index" to "LGLALoss"
focal = FocalLoss(alpha=[1.0, 2.0, 0.5], label_smoothing=0.1, sync=False)
reveal_type(focal(logits, target, sample_weight=torch.ones(2)))  # torch._tensor.Tensor
BalancedSoftmaxLoss([3, 2, 1], class_weigth=[1.0, 2.0, 0.5])  # Unexpected keyword argument "class_weigth"
experts = GroupConvExperts(nn.Linear(4, 4), 3, 7, reset=True)
reveal_type(experts(torch.zeros(2, 4)))  # fallback=lgla_losses.experts.output.ExpertOutput]"
reveal_type(experts.extract(0)(torch.zeros(2, 4)))  # Revealed type is "torch._tensor.Tensor"
reveal_type(experts.classifiers(torch.zeros(2, 3, 4)))  # Revealed type is "torch._tensor.Tensor"
experts("images")  # Argument 1 to "__call__" of "GroupConvExperts"
"""


@pytest.mark.slow
def test_misspelt_arguments_and_types_of_results_are_seen_before_the_run(tmp_path):
    """Calls of losses and experts had type Any, and LinearLGLALoss took any option."""
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--hide-error-context", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said = dict(re.findall(r"user\.py:(\d+): (?:error|note): (.*)", result.stdout)[::-1])
    expected = {
        str(n): line.split("  # ")[1] for n, line in enumerate(SCRIPT.splitlines(), 1) if "  # " in line
    }
    assert said.keys() == expected.keys(), result.stdout + result.stderr
    for number, words in expected.items():
        assert words in said[number]
