"""What K experts cost: as stacked copies, run together or one by one, and as independent modules.

Times forward + backward of what experts add to real networks (K = 3), from the shared features to the
features of every expert: ResNet-32 and ResNet-50 split as in the paper, and a ViT-S/16 of which the last
four blocks are per expert. It alternates between the layouts, so that drift of the machine meets all of
them, and reports medians with quartiles and the peak of memory above what is there before a step. On a GPU
every layout runs in two memory formats, and replayed from a CUDA graph. The record is written after every
network; a layout that fails is a row with a note.
Hand-written grouped layers are what the library decided against: they need code per layer and get
channel-wise operations wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import measure
import peers
import torch
import torch.nn.functional as F
from arguments import positive, record_file
from recording import leave_on_sigterm, write_whole
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lgla_losses import GroupConvExperts, split_backbone

NUM_EXPERTS = 3
RESULTS = Path(__file__).parent / "results"


class Layout(NamedTuple):
    """A way to run the experts, from shared features to something to differentiate."""

    step: Callable[[Tensor], Tensor]
    modules: tuple[nn.Module, ...]
    shared: Tensor
    recorded: bool = False


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


TINY = Workload(
    lambda: Block(16, 32, 2, 1), (16, 8, 8), {"cpu": 4, "cuda": 4}, 32, lambda: Block(16, 32, 2, NUM_EXPERTS)
)

#: Name of a layout, and how it is made.
Maker = tuple[str, Callable[[], Layout]]


def makers(workload: Workload, device: str) -> Iterator[Maker]:
    """The ways to run the experts; on a GPU in both memory formats, and each from a CUDA graph too."""
    on_gpu = peers.on_gpu(device)
    formats = {"": torch.contiguous_format}
    if on_gpu and len(workload.shared) == 3:
        formats = {", channels_last": torch.channels_last, ", channels first": torch.contiguous_format}
    for suffix, memory_format in formats.items():
        for name, make in _modules(workload, device, memory_format).items():
            yield name + suffix, make
            if on_gpu:
                yield f"{name}{suffix}, CUDA graph", lambda make=make: make()._replace(recorded=True)  # type: ignore[misc]


def _modules(
    workload: Workload, device: str, memory_format: torch.memory_format
) -> dict[str, Callable[[], Layout]]:
    width = workload.num_features

    def experts() -> GroupConvExperts:
        made = GroupConvExperts(workload.make_stage, NUM_EXPERTS, 100, num_features=width).to(device)
        _format(made, memory_format)
        return made

    def grouped(together: bool) -> Layout:
        module = experts()
        module.together = together
        return Layout(lambda x: module(x).features.square().mean(), (module,), shared())

    def independent() -> Layout:
        module = experts().to_independent()
        return Layout(lambda x: module(x).features.square().mean(), (module,), shared())

    def hand_grouped() -> Layout:
        assert workload.hand_grouped is not None
        hand = workload.hand_grouped().to(device)
        _format(hand, memory_format)

        def step(x: Tensor) -> Tensor:
            maps: Tensor = hand(x.repeat(1, NUM_EXPERTS, 1, 1))
            return maps.mean((2, 3)).square().mean()

        return Layout(step, (hand,), shared())

    def shared() -> Tensor:
        batch_size = workload.batch_size[torch.device(device).type]
        features = torch.randn(batch_size, *workload.shared, device=device)
        if memory_format != torch.contiguous_format:
            features = features.to(memory_format=memory_format)
        return features.requires_grad_()

    made = {
        "grouped, one by one": lambda: grouped(False),
        "grouped, together": lambda: grouped(True),
        "independent": independent,
    }
    return made if workload.hand_grouped is None else made | {"hand-grouped": hand_grouped}


def _format(module: nn.Module, memory_format: torch.memory_format) -> None:
    if memory_format != torch.contiguous_format:
        module.to(memory_format=memory_format)  # type: ignore[call-overload]


def prepared(layout: Layout, device: str) -> Callable[[], object]:
    """A training step of a layout, its gradients in fresh memory; recorded in a CUDA graph if it says so."""
    leaves = [layout.shared, *(p for module in layout.modules for p in module.parameters())]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=peers.on_gpu(device)):
            loss = layout.step(layout.shared)
        torch.autograd.backward(loss)

    return measure.recorded(step).replay if layout.recorded else step


class Times:
    """What was measured of a layout so far."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.note = ""

    def row(self, name: str, batch_size: int) -> dict[str, Any]:
        """As the record has it; without numbers where there are too few."""
        enough = len(self.seconds) > 1
        rates = [batch_size / seconds for seconds in self.seconds]
        row = {
            "layout": name,
            "batch": batch_size,
            "images_per_second_quartiles": statistics.quantiles(rates, n=4) if enough else None,
            "peak_mib_median": statistics.median(self.peaks) / 2**20 if enough and self.peaks else None,
        }
        return row if enough else row | {"note": self.note or "not measured, as time was up"}


def measure_layouts(
    workload: Workload,
    repeats: int,
    device: str,
    deadline: float,
    times: dict[str, Times],
    names: Sequence[str] | None = None,
) -> None:
    """Fill in seconds and peak memory of every layout, taken in turn, after three rounds of warm-up."""
    torch.manual_seed(0)
    makers_of_all = dict(makers(workload, device))
    if names is not None:
        makers_of_all = {name: makers_of_all[name] for name in names if name in makers_of_all}
    times.update({name: Times() for name in makers_of_all})
    # With the layouts, as what a graph reads must stay where it is.
    steps: dict[str, tuple[Callable[[], object], Layout]] = {}
    begin = time.perf_counter()
    for name, make in makers_of_all.items():
        if time.perf_counter() - begin > 0.6 * (deadline - begin):
            break  # the rest of the time is for measuring
        with _noted(name, times[name]):
            layout = make()
            step = prepared(layout, device)
            for _ in range(3):
                step()
            measure.synchronize(device)
            steps[name] = step, layout

    for repeat in range(repeats):
        for name, (step, layout) in list(steps.items()):
            if repeat > 1 and time.perf_counter() > deadline:
                return
            with _noted(name, times[name]):
                before = _memory(device, reset=True)
                measure.synchronize(device)
                start = time.perf_counter()
                step()
                measure.synchronize(device)
                times[name].seconds.append(time.perf_counter() - start)
                if not layout.recorded:  # a graph has taken its memory once and for all
                    times[name].peaks.append(_memory(device) - before)
            if times[name].note:
                del steps[name]


class _noted:  # noqa: N801  # a context manager, which reads like a function
    """Keeps a failure of one layout from the others, and says so in its row."""

    def __init__(self, name: str, times: Times) -> None:
        self.name, self.times = name, times

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> bool:
        if not isinstance(error, Exception):
            return False
        print(f"{self.name}:", file=sys.stderr)
        traceback.print_exception(error)
        self.times.note = measure.reason(error)
        self.times.seconds.clear()
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # a broken device fails here too
                torch.cuda.empty_cache()
        return True


def _memory(device: str, reset: bool = False) -> int:
    """The peak of memory in bytes since the last reset; on a CPU as Linux and glibc tell it."""
    if peers.on_gpu(device):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier steps freed would serve this one unseen
        Path("/proc/self/clear_refs").write_text("5")
    return measure.resident("VmHWM")


def main() -> int:
    """Measure, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--networks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="only these, as the record names them")
    parser.add_argument("--output", type=record_file, help="default: results/expert_layouts_DEVICE.json")
    parser.add_argument("--quick", action="store_true", help="a tiny network, two repetitions: does it run?")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="N", help="measure no longer than that"
    )
    options = parser.parse_args()
    kind = torch.device(options.device).type
    output = options.output or RESULTS / f"expert_layouts_{kind}.json"
    networks = [TINY] if options.quick else [WORKLOADS[name] for name in options.networks]
    known = [name for workload in networks for name, _ in makers(workload, options.device)]
    if unknown := set(options.layouts or ()) - set(known):
        parser.error(f"--layouts: expected some of {sorted(set(known))}, got {sorted(unknown)}")
    # Else cuDNN takes what its rules of thumb say, which know grouped convolutions badly.
    torch.backends.cudnn.benchmark = kind == "cuda"
    leave_on_sigterm()
    record = run(options, output)
    Console(width=110).print(_terminal_table(record["rows"]))
    print(f"record: {output}")
    return 1 if any(row.get("note", "").startswith("failed") for row in record["rows"]) else 0


def run(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Measure network after network; the record is written after each, also when a signal ends this."""
    start = time.perf_counter()
    record = _empty_record(options)
    workloads = {"tiny": TINY} if options.quick else {name: WORKLOADS[name] for name in options.networks}
    longest = 0.0
    for network, workload in workloads.items():
        begin = time.perf_counter()
        if begin - start + longest > options.seconds:
            break
        times: dict[str, Times] = {}
        try:
            repeats = 2 if options.quick else options.repeats
            deadline = start + options.seconds
            measure_layouts(workload, repeats, options.device, deadline, times, options.layouts)
        except Exception as error:  # of the network itself, as where torchvision is missing
            traceback.print_exception(error)
            times[f"all: {measure.reason(error)}"] = Times()
        finally:
            batch_size = workload.batch_size[torch.device(options.device).type]
            rows = (found.row(name, batch_size) for name, found in times.items())
            record["rows"] += [{"network": network, **row} for row in rows]
            write_whole(output, json.dumps(record, indent=2) + "\n")
        longest = max(longest, time.perf_counter() - begin)
        print(f"{network}: {time.perf_counter() - begin:.0f} s", flush=True)
    return record


def _empty_record(options: argparse.Namespace) -> dict[str, Any]:
    kind = torch.device(options.device).type
    return {
        "what": "forward + backward of 3 experts from shared features, seed 0",
        "precision": "bfloat16 autocast, cuDNN's benchmark mode" if kind == "cuda" else "float32",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/expert_layouts.py", *sys.argv[1:]]),
        "commit": measure.commit(),
        "device": measure.device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": options.repeats,
        "rows": [],
    }


def _terminal_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Forward + backward of 3 experts: images a second, quartiles, and peak memory")
    for column in ("network", "batch", "layout", "lower", "median", "upper", "MiB"):
        table.add_column(column, justify="left" if column in ("network", "layout") else "right")
    network = rows[0]["network"] if rows else ""
    for row in rows:
        if row["network"] != network:
            table.add_section()
            network = row["network"]
        rates = row["images_per_second_quartiles"]
        quartiles = ["", row["note"], ""] if rates is None else [f"{rate:.1f}" for rate in rates]
        memory = "" if row["peak_mib_median"] is None else f"{row['peak_mib_median']:.0f}"
        table.add_row(network, str(row["batch"]), row["layout"], *quartiles, memory)
    return table


if __name__ == "__main__":
    sys.exit(main())
