"""How the benchmark of the losses measures time, memory and kernel launches."""

from __future__ import annotations

import ctypes
import datetime
import itertools
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peers
import torch
from peers import Batch, MissingError, Shape, Step
from torch import Tensor

FORWARD, TRAIN = "forward", "forward + backward"
#: A training step as a GPU sees it, whose queue is never empty.
DEVICE = "device time"
#: Small inputs are taken in turn from so many sets that the last level of cache cannot hold them all.
_MOST_SETS = 64


class Effort(NamedTuple):
    """How long a cell (all columns of a shape and a dtype) may take, and how often it is measured."""

    seconds: float
    at_least: int
    at_most: int


class Measured(NamedTuple):
    """What came of one column; ``milliseconds`` by phase, empty if it could not run.

    ``failed`` tells a column that broke from one that is not there or has no memory.
    """

    milliseconds: dict[str, list[float]]
    first_step_seconds: float | None = None
    note: str = ""
    failed: bool = False


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if peers.on_gpu(device):
        torch.cuda.synchronize()


#: Clock cycles for which a GPU is kept busy, about 5 ms: longer than the host takes to call any step.
_HEAD_START = 10_000_000


def timed(call: Callable[[], object], device: str, head_start: bool = False) -> float:
    """Milliseconds of one call, from an idle device to its end.

    With a head start a GPU is busy until the call has put all its kernels into the queue, so that the
    time is that of the kernels alone, unless the call waits for the device.
    """
    if peers.on_gpu(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if head_start:
            torch.cuda._sleep(_HEAD_START)
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        elapsed = float(begin.elapsed_time(end))
    else:
        start = time.perf_counter()
        result = call()
        elapsed = 1e3 * (time.perf_counter() - start)
    del result  # after the clock: freeing is the next step's business
    return elapsed


def without_gradients(batch: Batch) -> Batch:
    """The batch as before a step, so that its gradients take fresh memory."""
    for leaf in batch.leaves:
        leaf.grad = None
    return batch


def number_of_sets(shape: Shape, dtype: torch.dtype, device: str) -> int:
    """Enough input sets to exceed a GPU's cache twice, where a few do; one on a CPU."""
    if not peers.on_gpu(device):
        return 1
    width = shape.classes if shape.features is None else shape.features
    size = shape.samples * shape.experts * width * dtype.itemsize
    if shape.features is not None:
        size += shape.experts * shape.classes * width * dtype.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_SETS, 1 + 2 * cache // size)


def warm_up(
    columns: list[peers.Column], batch: Batch, shape: Shape, device: str
) -> tuple[dict[str, Measured], dict[str, Step]]:
    """A first step of all columns of a cell.

    Returns:
        What the times go into, by column, and the steps of those that ran. One that fails leaves the others
        alone.
    """
    found: dict[str, Measured] = {}
    steps: dict[str, Step] = {}
    for column in columns:
        try:
            step, first = _first_step(column, batch, shape, device)
        except Exception as error:
            found[column.name] = _failure(error, f"{shape.label}, {column.name}")
            continue
        finally:
            without_gradients(batch)
        steps[column.name] = step
        phases = [FORWARD] * (step.forward is not None) + [TRAIN] + [DEVICE] * peers.on_gpu(device)
        seconds = first / 1e3 if column.compiled else None
        found[column.name] = Measured({phase: [] for phase in phases}, seconds)
    return found, steps


def time_columns(
    found: dict[str, Measured], steps: dict[str, Step], batches: list[Batch], device: str, effort: Effort
) -> None:
    """Time the steps in turn, in a new order every time; what fails is out."""
    start = time.perf_counter()
    turns = itertools.cycle(batches)
    order = random.Random(0)
    for repetition in range(effort.at_most):
        if repetition >= effort.at_least and time.perf_counter() - start > effort.seconds:
            break
        for name, step in order.sample(list(steps.items()), len(steps)):
            batch = without_gradients(next(turns))
            try:
                _take_turn(step, batch, found[name].milliseconds, device)
            except Exception as error:
                found[name] = _failure(error, name)
                del steps[name]
            without_gradients(batch)


def _first_step(column: peers.Column, batch: Batch, shape: Shape, device: str) -> tuple[Step, float]:
    """The step of a column, which has run once, and the milliseconds of that."""
    step = column.make(shape, device)
    first = timed(partial(step.train, without_gradients(batch)), device)
    if step.forward is not None:
        step.forward(batch)
    synchronize(device)
    return step, first


def _take_turn(step: Step, batch: Batch, times: dict[str, list[float]], device: str) -> None:
    """Add a time to each phase."""
    if step.forward is not None:
        times[FORWARD].append(timed(partial(step.forward, batch), device))
    times[TRAIN].append(timed(partial(step.train, batch), device))
    if DEVICE in times:
        without_gradients(batch)
        times[DEVICE].append(timed(partial(step.train, batch), device, head_start=True))


def _failure(error: Exception, what: str) -> Measured:
    """Say why a column cannot run; what nobody expected is told on the terminal."""
    failed = not isinstance(error, MissingError | torch.OutOfMemoryError)
    if failed:
        print(f"{what}:", file=sys.stderr)
        traceback.print_exception(error)
    elif isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    return Measured({}, None, reason(error), failed)


def reason(error: Exception) -> str:
    """One line of why something did not run."""
    if isinstance(error, MissingError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"[:120]


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def copy_bandwidth(device: str, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes read and written a second by a copy into warm memory, far larger than the caches."""
    source = torch.ones(megabytes * 1_000_000 // 4, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    milliseconds = statistics.median(timed(copy, device, head_start=True) for _ in range(repeats))
    return 2 * source.nbytes / (1e-3 * milliseconds)


# Memory


def peaks_on_gpu(step: Step, batch: Batch) -> dict[str, float]:
    """Peak of allocated memory above the inputs, in bytes, by phase, of a step that has run before."""
    found = {}
    for phase, call in ((FORWARD, step.forward), (TRAIN, step.train)):
        if call is not None:
            without_gradients(batch)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(batch)
            torch.cuda.synchronize()
            found[phase] = float(torch.cuda.max_memory_allocated() - before)
    without_gradients(batch)
    return found


def peaks_on_cpu(column: peers.Column, shape: Shape, dtype: torch.dtype, compiler: str) -> dict[str, float]:
    """Peak of resident memory above the inputs, in bytes, by phase, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    server = multiprocessing.get_context("forkserver")
    # Loaded but never run there: each cell's process begins its threads and its memory afresh.
    modules = ["torch", "lgla_losses", "torch._inductor.compile_fx"]
    server.set_forkserver_preload(modules[: 3 if compiler == "inductor" else 2])
    with ProcessPoolExecutor(1, mp_context=server) as pool:
        try:
            threads = torch.get_num_threads()
            return pool.submit(_peaks_here, column.name, shape, dtype, compiler, threads).result()
        except BrokenProcessPool:  # killed for want of memory
            return {}


def _peaks_here(name: str, shape: Shape, dtype: torch.dtype, compiler: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    column = next(column for column in peers.columns_for(shape, "cpu", compiler) if column.name == name)
    (batch,) = peers.make_batches(shape, dtype, "cpu")
    step = column.make(shape, "cpu")
    found = {}
    for phase, call in ((FORWARD, step.forward), (TRAIN, step.train)):
        if call is not None:
            call(batch)
            without_gradients(batch)
            ctypes.CDLL(None).malloc_trim(0)  # else what the warm-up freed would serve unseen
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                return {}
            before = resident("VmRSS")
            call(batch)
            found[phase] = float(resident("VmHWM") - before)
    return found


def resident(which: str) -> int:
    """Resident memory of this process in bytes, as Linux counts it: ``VmRSS`` now, ``VmHWM`` the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{which}:")[2].split()[0])


# GPUs only


def launches(step: Step, batch: Batch) -> int | None:
    """Kernels that a usual training step launches; None where the profiler sees none."""
    step.train(without_gradients(batch))
    # Our losses look at the values of batches 1, 2, 4, 8 and so on: of these two at most at one.
    found = [_launches_of_one(step, batch) for _ in range(2)]
    return min(filter(None, found), default=None)


def _launches_of_one(step: Step, batch: Batch) -> int:
    from torch.profiler import ProfilerActivity, profile

    without_gradients(batch)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of cycles, of which there is one
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step.train(batch)
            torch.cuda.synchronize()
        # cudaLaunchKernel of the runtime, cuLaunchKernel of the driver.
        number = sum("LaunchKernel" in event.name for event in profiler.events() or [])
    without_gradients(batch)
    return number


def recorded(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, which has run thrice before; other threads may go on with what they do."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def chain_of_empty_kernels(dot: Tensor, number: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many kernels that do next to nothing, to a scalar that outlives it."""

    def nothing() -> None:
        for _ in range(number):
            dot.neg_()

    return recorded(nothing)


def graph_times(graphs: Mapping[str, torch.cuda.CUDAGraph], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds on the device of every graph, in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repetitions):
        for name, graph in graphs.items():
            times[name].append(timed(graph.replay, "cuda", head_start=True))
    return times


def device_name(device: str) -> str:
    """The model of the GPU or of the CPU."""
    return torch.cuda.get_device_name(device) if peers.on_gpu(device) else cpu_model()


def cpu_model() -> str:
    """The model of the CPU, as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def made_here() -> dict[str, object]:
    """When, of what and where a record of a CPU is made."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of the checkout, marked where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
