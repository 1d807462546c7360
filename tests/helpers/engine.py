"""Say which engine the installed package has on a CPU; ``python engine.py native`` fails for another."""

import re
import sys
from pathlib import Path

import torch

import lgla_losses
from lgla_losses.kernels import native


def main(expected=None):
    """Compute a loss and its gradient, with one OpenMP: a second one would start threads of its own."""
    logits = torch.rand(8, 3, 4, requires_grad=True)
    lgla_losses.LGLALoss([100, 30, 10, 3], backend="fused")(logits, torch.arange(8) % 4).backward()
    assert logits.grad.isfinite().all()
    if sys.platform == "linux":
        loaded = set(re.findall(r"/.*/libgomp[^/\n]*$", Path("/proc/self/maps").read_text(), re.MULTILINE))
        assert len(loaded) <= 1, loaded
    engine = "native" if native.LIBRARY else "PyTorch"
    folder = lgla_losses.__path__[0]
    print(f"lgla_losses {lgla_losses.__version__} in {folder}: {engine} {native.MISSING}".rstrip())
    return expected not in (None, engine)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
