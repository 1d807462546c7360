"""Lets torchvision's wheel, which is built for CUDA, import beside a CPU-only torch.

Of its compiled operators none but detection needs them. Subprocesses of tests import this too.
"""

import torch

try:
    import torchvision
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
