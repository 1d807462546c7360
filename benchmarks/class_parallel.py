"""What a step of ClassParallelLGLALoss takes on R ranks, beside LinearLGLALoss in one process.

Peak memory a rank (Linux: ``VmHWM`` above what is there before the inputs are made: weights, their gradients
and what the loss needs), numbers sent a rank and step, and time. All ranks share this machine's cores, so
times say what the exchange costs, not what more machines gain. Float32 features, gloo, one thread a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import positive, record_file
from measure import made_here, resident
from tables import grid
from torch.multiprocessing import get_context

from lgla_losses import LinearLGLALoss
from lgla_losses.data import long_tailed_counts
from lgla_losses.distributed import ClassParallelLGLALoss, class_shard

RESULTS = Path(__file__).parent / "results"


class Counted:
    """Numbers that this rank gives to collectives."""

    def __init__(self) -> None:
        self.numbers = 0
        for name, given in (("all_reduce", 0), ("all_gather", 1)):
            setattr(dist, name, self._counted(getattr(dist, name), given))

    def _counted(self, call: Any, given: int) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.numbers += arguments[given].numel()
            return call(*arguments, **options)

        return counted


def measure(rank: int, num_ranks: int, options: argparse.Namespace, folder: str) -> None:
    """One rank: writes its figures into the folder. No ranks stand for LinearLGLALoss."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if num_ranks:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks)
    sent = Counted()
    counts = long_tailed_counts(1000, options.classes, 1000.0)
    criterion: Any
    if num_ranks:
        criterion, mine = ClassParallelLGLALoss(counts), class_shard(options.classes, rank, num_ranks)
    else:
        criterion, mine = LinearLGLALoss(counts), slice(0, options.classes)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(options.samples, 3, options.features, generator=generator)
    target = torch.randint(options.classes, (options.samples,), generator=generator)

    def step(weight: torch.Tensor) -> float:
        leaf = features.clone().requires_grad_()
        weight.grad = None
        begin = time.perf_counter()
        criterion(leaf, weight, target).backward()
        return time.perf_counter() - begin

    small = torch.randn(3, mine.stop - mine.start, options.features).mul_(0.02)
    step(small.requires_grad_())  # libraries, threads and connections begin
    del small
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    weight = torch.randn(3, mine.stop - mine.start, options.features).mul_(0.02).requires_grad_()
    step(weight)
    peak = resident("VmHWM") - before
    sent.numbers = 0
    seconds = [step(weight) for _ in range(options.repeats)]
    figures = {
        "peak_mb": peak / 1e6,
        "numbers_sent": sent.numbers // options.repeats,
        "seconds": statistics.median(seconds),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    if num_ranks:
        dist.barrier()
        dist.destroy_process_group()


def run(num_ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """The largest figures of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        ranks = [
            context.Process(target=measure, args=(rank, num_ranks, options, folder))
            for rank in range(max(1, num_ranks))
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"a rank failed: exit codes {[process.exitcode for process in ranks]}")
        figures = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(len(ranks))]
    return {name: max(figure[name] for figure in figures) for name in figures[0]}


def markdown(record: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    header = [
        "loss",
        "ranks",
        "MB a rank",
        "times ranks",
        "numbers sent",
        "seconds",
    ]
    rows = [
        [
            f"`{row['loss']}`",
            row["ranks"],
            f"{row['peak_mb']:.0f}",
            f"{row['memory_times_ranks_over_single']:.2f}",
            f"{row['numbers_sent']:,}",
            f"{row['seconds']:.2f}",
        ]
        for row in record["rows"]
    ]
    return grid(header, rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=positive, default=200_000)
    parser.add_argument("--samples", type=positive, default=256)
    parser.add_argument("--features", type=positive, default=64)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--output", type=record_file, default=RESULTS / "class_parallel_cpu.json")
    options = parser.parse_args(arguments)

    rows: list[dict[str, Any]] = []
    for num_ranks in (0, *options.ranks):
        figures = run(num_ranks, options)
        single = rows[0]["peak_mb"] if rows else figures["peak_mb"]
        row = {
            "loss": "ClassParallelLGLALoss" if num_ranks else "LinearLGLALoss",
            "ranks": max(1, num_ranks),
            "memory_times_ranks_over_single": figures["peak_mb"] * max(1, num_ranks) / single,
            **figures,
        }
        rows.append(row)
    record = {
        "what": "forward + backward, float32, gloo, one thread a rank, all ranks on this machine, seed 0",
        "classes": options.classes,
        "samples": options.samples,
        "features": options.features,
        "experts": 3,
        "repeats": options.repeats,
        **made_here(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(markdown(record))
    print(f"record: {options.output}")


if __name__ == "__main__":
    main()
