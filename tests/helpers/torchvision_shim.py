"""Lets torchvision's wheel, which is built for CUDA, import beside a CPU-only torch.

Of its compiled operators only detection needs them. Subprocesses of tests import this too; as a script
it runs another one: ``python tests/helpers/torchvision_shim.py SCRIPT ARGUMENTS``.
"""

import runpy
import sys
from pathlib import Path

import torch

try:
    import torchvision
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
