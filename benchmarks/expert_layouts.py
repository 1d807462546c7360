"""What K experts cost: stacked under vmap, as independent modules, as hand-written grouped layers.

Times forward + backward of the per-expert stages of the paper's ResNet-32 (layers 2 and 3, K = 3), with
projection shortcuts, which do not leak where layers are grouped, on CIFAR-sized feature maps. It
alternates between the layouts, so that drift of the machine meets all of them, and reports medians
with quartiles. Hand-written grouped layers are what the library decided against: they need code per
layer and get channel-wise operations wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lgla_losses import GroupConvExperts

NUM_EXPERTS = 3
RESULTS = Path(__file__).parent / "results"


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


def layouts(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The three ways, each from shared features to something to differentiate."""
    stacked = GroupConvExperts(resnet32_stages, NUM_EXPERTS, 100).to(device)
    independent = stacked.to_independent()
    grouped = resnet32_stages(groups=NUM_EXPERTS).to(device)
    return {
        "stacked (vmap)": lambda x: stacked(x).features.square().mean(),
        "independent": lambda x: independent(x).features.square().mean(),
        "hand-grouped": lambda x: grouped(x.repeat(1, NUM_EXPERTS, 1, 1)).mean((2, 3)).square().mean(),
    }


def measure(batch_size: int, repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of forward + backward, every layout in turn, after two rounds of warm-up."""
    torch.manual_seed(0)
    functions = layouts(device)
    shared = torch.randn(batch_size, 16, 32, 32, device=device, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-2, repeats):
        for name, function in functions.items():
            _synchronize(device)
            start = time.perf_counter()
            function(shared).backward()
            _synchronize(device)
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--output", type=Path, help="default: results/expert_layouts_DEVICE.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"expert_layouts_{torch.device(options.device).type}.json"

    table = Table(title="ResNet-32, K = 3: forward + backward of the experts, ms")
    for column in ("batch", "layout", "lower quartile", "median", "upper quartile"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    rows = []
    for batch_size in options.batch_sizes:
        for name, times in measure(batch_size, options.repeats, options.device).items():
            low, median, high = statistics.quantiles(times, n=4)
            rows.append({"batch": batch_size, "layout": name, "ms_quartiles": [low, median, high]})
            table.add_row(str(batch_size), name, f"{low:.0f}", f"{median:.0f}", f"{high:.0f}")
    Console(width=80).print(table)
    record = {
        "what": "forward + backward of ResNet-32 layers 2-3, 3 experts, 16 x 32 x 32 inputs, float32, seed 0",
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
