"""What K experts cost: as stacked copies, run together or one by one, and as independent modules.

Times forward + backward of what experts add to real networks (K = 3), from the shared features to the
features of every expert: ResNet-32 and ResNet-50 split as in the paper, and a ViT-S/16 of which the last
four blocks are per expert. It alternates between the layouts, so that drift of the machine meets all of
them, and reports medians with quartiles and the peak of memory above what is there before a step.
Hand-written grouped layers are what the library decided against: they need code per layer and get
channel-wise operations wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lgla_losses import GroupConvExperts, split_backbone

NUM_EXPERTS = 3
RESULTS = Path(__file__).parent / "results"

Step = Callable[[Tensor], Tensor]


class Workload(NamedTuple):
    """Experts of one network, and the shape of the features that they share, for one image."""

    make_stage: Callable[[], nn.Module]
    shared: tuple[int, ...]
    batch_size: dict[str, int]
    num_features: int
    hand_grouped: Callable[[], nn.Module] | None = None


class Block(nn.Module):
    """A basic block of ResNet-32 with a projection shortcut; ``groups`` copies side by side."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        inputs, outputs = inputs * groups, outputs * groups
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, groups=groups)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, groups=groups)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Conv2d(inputs, outputs, 1, stride, bias=False, groups=groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's feature map."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet32_stages(groups: int = 1) -> nn.Module:
    """Layers 2 and 3 of ResNet-32: five blocks at 32 channels, five at 64."""
    shapes = [(16, 32, 2), *[(32, 32, 1)] * 4, (32, 64, 2), *[(64, 64, 1)] * 4]
    return nn.Sequential(*(Block(*shape, groups) for shape in shapes))


def resnet50_stages() -> nn.Module:
    """Layers 3 and 4 of torchvision's ResNet-50."""
    import torchvision

    return split_backbone(torchvision.models.resnet50(), "layer3")[1]


def vit_stages() -> nn.Module:
    """The last four of twelve blocks of timm's ViT-S/16."""
    import timm

    return split_backbone(timm.create_model("vit_small_patch16_224"), "blocks.8")[1]


WORKLOADS = {
    "ResNet-32": Workload(
        resnet32_stages, (16, 32, 32), {"cpu": 128, "cuda": 128}, 64, lambda: resnet32_stages(NUM_EXPERTS)
    ),
    "ResNet-50": Workload(resnet50_stages, (512, 28, 28), {"cpu": 8, "cuda": 64}, 2048),
    "ViT-S/16": Workload(vit_stages, (197, 384), {"cpu": 8, "cuda": 64}, 384),
}


def layouts(workload: Workload, device: str) -> dict[str, Step]:
    """The ways to run the experts, each from shared features to something to differentiate."""
    width = workload.num_features
    experts = GroupConvExperts(workload.make_stage, NUM_EXPERTS, 100, num_features=width).to(device)
    if device.startswith("cuda"):
        experts.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    together, one_by_one = experts.to_grouped(), experts.to_grouped()
    together.together, one_by_one.together = True, False
    modules = {
        "grouped, one by one": one_by_one,
        "grouped, together": together,
        "independent": experts.to_independent(),
    }
    steps: dict[str, Step] = {
        name: lambda x, module=module: module(x).features.square().mean()  # type: ignore[misc]
        for name, module in modules.items()
    }
    if workload.hand_grouped is not None:
        hand = workload.hand_grouped().to(device)
        steps["hand-grouped"] = lambda x: hand(x.repeat(1, NUM_EXPERTS, 1, 1)).mean((2, 3)).square().mean()
    return steps


def measure(workload: Workload, repeats: int, device: str) -> list[dict[str, Any]]:
    """Images a second and peak memory of every layout, taken in turn, after two rounds of warm-up."""
    torch.manual_seed(0)
    kind = torch.device(device).type
    batch_size = workload.batch_size[kind]
    steps = layouts(workload, device)
    shared = torch.randn(batch_size, *workload.shared, device=device)
    if kind == "cuda" and shared.dim() == 4:
        shared = shared.to(memory_format=torch.channels_last)
    shared.requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-2, repeats):
        for name, step in steps.items():
            before = _memory(kind, reset=True)
            _synchronize(kind)
            start = time.perf_counter()
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                loss = step(shared)
            loss.backward()
            _synchronize(kind)
            elapsed = time.perf_counter() - start
            if repeat >= 0:
                seconds[name].append(elapsed)
                peaks[name].append(_memory(kind) - before)
            del loss
    return [
        {
            "layout": name,
            "batch": batch_size,
            "images_per_second_quartiles": statistics.quantiles([batch_size / s for s in times], n=4),
            "peak_mib_median": statistics.median(peaks[name]) / 2**20,
        }
        for name, times in seconds.items()
    ]


def _memory(kind: str, reset: bool = False) -> int:
    """The peak of memory in bytes since the last reset; on a CPU as Linux and glibc tell it."""
    if kind == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier steps freed would serve this one unseen
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _synchronize(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def main() -> None:
    """Measure, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16, channels_last)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--networks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--output", type=Path, help="default: results/expert_layouts_DEVICE.json")
    options = parser.parse_args()
    kind = torch.device(options.device).type
    output = options.output or RESULTS / f"expert_layouts_{kind}.json"

    table = Table(title="Forward + backward of 3 experts: images a second, quartiles, and peak memory")
    for column in ("network", "batch", "layout", "lower", "median", "upper", "MiB"):
        table.add_column(column, justify="left" if column in ("network", "layout") else "right")
    rows = []
    for network in options.networks:
        for row in measure(WORKLOADS[network], options.repeats, options.device):
            rows.append({"network": network, **row})
            quartiles = [f"{rate:.1f}" for rate in row["images_per_second_quartiles"]]
            cells = [network, str(row["batch"]), row["layout"], *quartiles, f"{row['peak_mib_median']:.0f}"]
            table.add_row(*cells)
        table.add_section()
    Console(width=88).print(table)
    record = {
        "what": "forward + backward of 3 experts from shared features, seed 0",
        "precision": "bfloat16 autocast, channels_last" if kind == "cuda" else "float32",
        "device": _device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": options.repeats,
        "rows": rows,
    }
    output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"record: {output}")


if __name__ == "__main__":
    main()
