"""What the Triton kernels need of a GPU: registers, spills and shared memory, without one.

Runs the launchers of ``lgla_losses.kernels.triton`` on tensors without memory, notes which kernels they
would launch with which block sizes, and compiles those for NVIDIA's sm_80, sm_90 and sm_100 and AMD's
gfx942. Spilled registers would be read and written again for every element: the block sizes are chosen
so that there are none in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from arguments import positive, record_file
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgla_losses.kernels import Angles, Rows, Samples
from lgla_losses.kernels import triton as kernels

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NUM_CLASSES = (2, 100, 1000, 8142, 16384, 100_000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
#: What a step is given: ``"usual"`` is class indices, table, weights and label smoothing; ``"plain"`` nothing
#: that may be left out; ``"focal"`` class weights, margins, gamma, features and weights of samples;
#: ``"probabilities"`` those instead of class indices; and ``"all"`` everything that probabilities go with.
FORMS = ("usual", "plain", "focal", "probabilities", "all")
#: Triton's names of the types.
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any
    tile: kernels.Tile
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def recorded(call: Any, *arguments: Any) -> list[Launch]:
    """The launches of one of the launchers, which are not run."""
    launches = []

    def record(kernel: Any, programs: int, tile: kernels.Tile, *arguments: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, tile, arguments, constants))

    with mock.patch.object(kernels, "_launch", record):
        call(*arguments)
    return launches


def launches_on(target: GPUTarget, *arguments: Any, **options: Any) -> list[Launch]:
    """What :func:`loss_launches` gives on such a GPU."""
    with mock.patch.object(kernels, "_architecture", return_value=architecture(target)):
        return list(loss_launches(*arguments, **options))


def loss_launches(
    num_classes: int, dtype: torch.dtype, num_samples: int = 1024, smoothing: float = 0.0, form: str = "usual"
) -> Iterator[Launch]:
    """All kernels of a training step of three experts; see :data:`FORMS`."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    accurate = torch.promote_types(dtype, torch.float32)
    logits, state = [empty(num_samples, 3, num_classes)], empty(num_samples, 3, 2, dtype=accurate)
    weights, scalar = empty(num_samples, 3, dtype=accurate), empty(dtype=torch.float64)
    of_samples = empty(num_samples, dtype=accurate)
    target = empty(num_samples, dtype=torch.int64)
    soft = form in ("probabilities", "all")
    if soft:
        target = empty(num_samples, num_classes, dtype=accurate)
    samples = Samples(target, empty(num_classes, dtype=torch.int64), 2)
    angles = Angles(cosines=logits, scale=30.0)

    if form == "plain":
        rows = Rows(target)
        yield from recorded(kernels.statistics, Angles(angles=weights), samples)
        yield from recorded(kernels.forward, logits, rows, [None])
        yield from recorded(kernels.backward, logits, rows, of_samples, state, logits)
        return

    rows = Rows(target, empty(3, num_classes, dtype=torch.float64), weights, scalar)
    rows = rows._replace(label_smoothing=smoothing, reduce=True)
    if form in ("focal", "all"):
        of_classes = empty(num_classes, dtype=torch.float64)
        rows = rows._replace(class_weight=of_classes, margin=of_classes, gamma=2.0)
        samples = samples._replace(sample_weight=of_samples)
    if form == "focal":
        rows = rows._replace(label_smoothing=0.0)
        angles = Angles(features=empty(num_samples, 3, 64), weight=empty(3, num_classes, 64))
    yield from recorded(kernels.statistics, angles, samples)
    given = angles if soft else Angles(angles=weights)
    yield from recorded(kernels.weights, given, samples, empty(2, 2, 4, dtype=torch.float64))
    if form == "usual":  # a batch of few samples
        few = samples._replace(target=target[:256])
        yield from recorded(kernels.weights, Angles(cosines=[logits[0][:256]], scale=30.0), few)
    yield from recorded(kernels.count, target, samples.sample_weight, rows.class_weight, -100)
    yield from recorded(kernels.forward, logits, rows, logits)
    yield from recorded(kernels.backward, logits, rows, of_samples, state, logits)
    yield from recorded(kernels.rescale_, logits[0], scalar)


def architecture(target: GPUTarget) -> int | None:
    """The GPU as the launchers know it."""
    return None if target.backend == "hip" else int(target.arch)


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel as the just-in-time compiler would make it for this launch."""
    names = launch.kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    constants = dict(launch.constants)
    attributes = {}
    for i, (name, argument) in enumerate(zip(names, launch.arguments, strict=False)):
        if argument is None or (type(argument) is int and argument == 1):
            constants[name] = argument
            continue
        if isinstance(argument, Tensor):
            signature[name] = "*" + TYPES[argument.dtype]
            aligned = True
        else:
            signature[name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
            aligned = argument % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.tile.options(architecture(target)))


def resources(launch: Launch, target: GPUTarget) -> dict[str, int]:
    """Registers a thread, bytes that one spills, and bytes of shared memory a program."""
    kernel = compiled(launch, target)
    if target.backend == "cuda":
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        # The kernels have no arrays and call no functions: the stack holds what did not fit in registers.
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
    else:
        found = {
            name: int(number) for name, number in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])
        }
        registers, spilled = found["vgpr_count"], 4 * found["vgpr_spill_count"]
    return {"registers": registers, "spill_bytes": spilled, "shared_bytes": kernel.metadata.shared}


def row_of(launch: Launch, num_classes: int, dtype: str, target: str) -> dict[str, Any]:
    """The record's row of one launch on a GPU."""
    options = launch.tile.options(architecture(TARGETS[target]))
    configuration = {
        "plan": kernels.plan(),
        "classes": num_classes,
        "dtype": dtype,
        "rows": launch.constants.get("rows", 1),
        "block": launch.constants["block"],
        "num_warps": options["num_warps"],
        "register_limit": options.get("maxnreg"),
    }
    row = {"kernel": launch.kernel.__name__, "configuration": configuration, "target": target}
    return {**row, **resources(launch, TARGETS[target])}


def cell(row: dict[str, Any]) -> str:
    """What the printed table says of a row."""
    spill = f" spill {row['spill_bytes']}" if row["spill_bytes"] else ""
    return f"{row['registers']}{spill}"


def report(plan: str, options: argparse.Namespace, *, whole: bool) -> list[dict[str, Any]]:
    """Compile and print what a plan launches; without ``whole`` only the kernels in which plans differ."""
    table = Table(title=f"Plan {plan}: registers a thread, and bytes spilled where any are")
    for column in ("kernel", "C", "type", "tile", *options.targets):
        table.add_column(column, justify="left" if column in ("kernel", "type") else "right")
    rows = []
    before = kernels.use(plan)
    for dtype, num_classes in itertools.product(options.dtypes, options.classes):
        # What differs between the GPUs has a line for each.
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for target in options.targets:
            launches = launches_on(
                TARGETS[target], num_classes, DTYPES[dtype], smoothing=options.smoothing, form=options.form
            )
            for launch in launches:
                if whole or launch.kernel.__name__.startswith("_forward"):
                    row = row_of(launch, num_classes, dtype, target)
                    tile = f"{row['configuration']['rows']} x {row['configuration']['block']}"
                    lines.setdefault((row["kernel"], tile), {})[target] = cell(row)
                    rows.append(row)
        for (kernel, tile), cells in lines.items():
            found = (cells.get(target, "") for target in options.targets)
            table.add_row(kernel, str(num_classes), dtype, tile, *found)
        table.add_section()
    kernels.use(before)
    Console(width=110).print(table)
    return rows


def main() -> None:
    """Compile, print a table a plan, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--classes", nargs="+", type=positive, default=list(NUM_CLASSES))
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--form", choices=FORMS, default="usual", help="what the step is given")
    parser.add_argument(
        "--other-plans", nargs="*", choices=kernels.PLANS, default=[],
        help="compile the forward kernels of these plans, too, to compare them with those in use",
    )  # fmt: skip
    parser.add_argument("--output", type=record_file, default=RESULTS / "kernel_resources.json")
    options = parser.parse_args()

    rows = report(kernels.plan(), options, whole=True)
    others = [row for plan in options.other_plans for row in report(plan, options, whole=False)]
    record = {
        "what": "what the Triton kernels of a training step of 3 experts need, compiled without a GPU",
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "form": options.form,
        "label_smoothing": options.smoothing,
        "rows": rows,
        "rows_of_other_plans": others,
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"record: {options.output}")


if __name__ == "__main__":
    main()
