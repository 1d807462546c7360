"""Check that losses and experts are right on a device, wait for nothing there, and can be captured.

A problem is a step of training, of gpu_problems.py. ``gradient`` compares its loss and gradients with those
of plain PyTorch in float64 on the CPU. ``no wait`` repeats it while PyTorch refuses whatever waits for the
device. ``graph`` captures it in a CUDA graph and compares a replay. On a CPU the last two are skipped.

Processes share the problems, as most of the time goes into compiling kernels. One that crashes or loses its
device is followed by another for what it left. The record is written again whenever something is known.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from arguments import positive, record_file
from gpu_problems import Problem, problems
from torch import Tensor

CHECKS = ("gradient", "no wait", "graph")
#: Exit status of a process that failed to use its device any more.
LOST_DEVICE = 3
#: How often a share goes on in another process.
MOST_RESTARTS = 5
#: Of the CPU, for float64: a process each.
THREADS = 1
PACKAGES = (
    *("torch", "triton", "numpy", "torchvision", "timm", "torchmetrics", "transformers", "tensorboard"),
    *("pytest", "pytest-xdist", "hypothesis", "sybil", "tqdm", "rich", "liger-kernel", "cut-cross-entropy"),
)

Step = Callable[[], list[Tensor]]


def step_of(problem: Problem, device: torch.device, exact: bool = False) -> Step:
    """The problem's step on a device, which returns the loss and all gradients; exact in float64.

    The inputs of an exact step are those of the other: rounded to its dtype.
    """
    module = problem.make("reference" if exact else "auto").to(device)
    dtype = torch.float32 if problem.autocast else problem.dtype
    leaves = [leaf.detach().to(device, dtype, copy=True) for leaf in problem.leaves]
    constants = [constant.to(device) for constant in problem.constants]
    if exact:
        module.double()
        leaves = [leaf.double() for leaf in leaves]
        constants = [c.double() if c.is_floating_point() else c for c in constants]
    for leaf in leaves:
        leaf.requires_grad_()
    wanted = [*leaves, *module.parameters()]
    low = problem.autocast and problem.dtype != torch.float32 and not exact

    def step() -> list[Tensor]:
        # A cast weight that a cache holds would be none of a captured step's own.
        autocast = torch.autocast(device.type, problem.dtype, cache_enabled=False) if low else nullcontext()
        with problem.around():
            with autocast:
                loss = problem.loss(module, leaves, constants)
            loss = loss if loss.dim() == 0 else loss.sum()
            return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    return step


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the gradients' error over their norm, or the loss's error over the loss, if that is larger."""
    (loss, *gradients), (exact_loss, *exact_gradients) = got, expected
    return max(_relative([loss], [exact_loss]), _relative(gradients, exact_gradients), key=_nan_is_largest)


def _nan_is_largest(error: float) -> tuple[bool, float]:
    return error != error, error


def _relative(got: list[Tensor], expected: list[Tensor]) -> float:
    ours, truth = (torch.cat([t.detach().cpu().double().flatten() for t in ts]) for ts in (got, expected))
    return float((ours - truth).norm() / truth.norm())


def repeat_without_waiting(step: Step) -> None:
    """Raise where the step waits for the device, its first time aside."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(step: Step) -> list[Tensor]:
    """What the step gives from a CUDA graph."""
    outer = torch.cuda.current_stream()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):  # libraries choose and allocate before the capture
            step()
            step()
        outer.wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step()
        # The capture computed nothing: these are the replay's own.
        graph.replay()
        torch.cuda.synchronize()
        return [result.clone() for result in results]
    finally:
        torch.cuda.set_stream(outer)  # a capture that fails leaves its own behind


class Attempt:
    """The checks of one problem on one device."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self.step = step_of(problem, device)

    def gradient(self) -> float:
        """Loss and gradients against float64."""
        exact = step_of(self.problem, torch.device("cpu"), exact=True)
        return difference(self.step(), exact())

    def no_wait(self) -> float:
        """That nothing waits for the device."""
        repeat_without_waiting(self.step)
        return 0.0

    def graph(self) -> float:
        """A replay against the step itself."""
        return difference(replayed(self.step), self.step())


def check(problem: Problem, device: torch.device, tell: Callable[..., None]) -> None:
    """Check a problem, and tell how each check went."""
    attempt: Attempt | None = None
    for name in CHECKS:
        if name != "gradient" and device.type != "cuda":
            tell(check=name, outcome="skipped", why="needs --device cuda")
            continue
        begun = time.monotonic()
        try:
            attempt = attempt or Attempt(problem, device)
            error = getattr(attempt, name.replace(" ", "_"))()
            outcome = "passed" if error <= problem.bound else "failed"
            found = {"error": error, "bound": problem.bound}
        except Exception as raised:
            traceback.print_exc()
            outcome, found = "failed", {"why": first_cause(raised)}
        tell(check=name, outcome=outcome, **found, seconds=round(time.monotonic() - begun, 2))


def first_cause(error: BaseException) -> str:
    """What was raised first, in a line: a capture that fails ends by another error, which says less."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def run_share(options: argparse.Namespace) -> None:
    """Check every so-many-th problem, but for those that were begun before."""
    # Convolutions in float32 would round to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    begun = {line["problem"] for line in read_lines(options.out)}
    first, number = map(int, options.share.split("/"))
    if number > 1:
        torch.set_num_threads(THREADS)
    for problem in list(problems())[first::number]:
        if problem.name in begun:
            continue

        def tell(name: str = problem.name, **found: Any) -> None:
            # A line is one write, whoever else writes.
            with options.out.open("a") as file:
                file.write(json.dumps({"problem": name, **found}) + "\n")
            if found:
                sys.stdout.write(shown({"problem": name, **found}) + "\n")
                sys.stdout.flush()

        tell()
        check(problem, device, tell)
        if device.type == "cuda" and not is_usable(device):
            print(f"{problem.name}: the device is lost to this process", flush=True)
            raise SystemExit(LOST_DEVICE)


def is_usable(device: torch.device) -> bool:
    """Whether the device still computes for this process: after some errors it never does again."""
    try:
        return bool((torch.ones(2, device=device).sum() == 2).item())
    except (RuntimeError, AssertionError):
        return False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What processes told so far; a line that is cut short says nothing."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return lines


class Share(NamedTuple):
    """A process, and how many were there before it."""

    process: subprocess.Popen[bytes]
    restarts: int


class Checker:
    """Runs the processes, and makes one record of what they tell."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.names = [problem.name for problem in problems()]
        self.lines = options.out.with_suffix(".jsonl")
        self.lines.unlink(missing_ok=True)
        self.shares: dict[int, Share] = {}
        self.about: dict[str, Any] = {}

    def run(self) -> bool:
        """Check everything; whether all passed."""
        signal.signal(signal.SIGTERM, _exit)
        try:
            for index in range(self.options.processes):
                self._start(index, restarts=0)
            self.about = environment(torch.device(self.options.device))
            print(json.dumps(self.about, indent=1), flush=True)
            while self.shares:
                time.sleep(0.2)
                for index, share in list(self.shares.items()):
                    if share.process.poll() is not None:
                        del self.shares[index]
                        self._restart(index, share)
                self._write()
        finally:
            for share in self.shares.values():
                share.process.kill()
            results = self._write()
            print(summary(results), flush=True)
        return {result["outcome"] for result in results} <= {"passed", "skipped"}

    def _start(self, index: int, restarts: int) -> None:
        options = self.options
        command = [sys.executable, __file__, "--device", options.device, "--out", str(self.lines)]
        command += ["--share", f"{index}/{options.processes}"]
        self.shares[index] = Share(subprocess.Popen(command), restarts)

    def _restart(self, index: int, share: Share) -> None:
        """Begin another process for what one left that crashed or lost its device."""
        begun = {line["problem"] for line in read_lines(self.lines)}
        left = len(set(self.names[index :: self.options.processes]) - begun)
        if share.process.returncode != 0 and left and share.restarts < MOST_RESTARTS:
            code = share.process.returncode
            print(f"exit status {code}: another process takes {left} problems", flush=True)
            self._start(index, share.restarts + 1)

    def _write(self) -> list[dict[str, Any]]:
        """The results so far, which are also written, whole or not at all."""
        told = read_lines(self.lines)
        begun = {line["problem"] for line in told}
        found = {(line["problem"], line["check"]): line for line in told if "check" in line}
        results: list[dict[str, Any]] = []
        for name in self.names:
            unknown = {"problem": name, "outcome": "unfinished" if name in begun else "not run"}
            results += (found.get((name, check), {**unknown, "check": check}) for check in CHECKS)
        temporary = self.options.out.with_suffix(".part")
        temporary.write_text(json.dumps({**self.about, "results": results}, indent=1) + "\n")
        temporary.replace(self.options.out)
        return results


def _exit(*signalled: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def shown(result: dict[str, Any]) -> str:
    """A result as a line."""
    found = f"off by {result['error']:.1e}, at most {result['bound']:.0e}" if "error" in result else ""
    words = result["outcome"], result["problem"], result["check"], result.get("why", found)
    return ": ".join(filter(None, words))


def summary(results: list[dict[str, Any]]) -> str:
    """How many ended how, and which did not pass."""
    numbers = Counter(result["outcome"] for result in results)
    wrong = [shown(result) for result in results if result["outcome"] in ("failed", "unfinished")]
    return "\n".join([*wrong, ", ".join(f"{number} {outcome}" for outcome, number in numbers.items())])


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, tools and the device; what cannot be told is missing."""
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "tools": [tool for tool in ("git", "make", "gcc", "nvcc") if shutil.which(tool)],
        "device": str(device),
    }
    with suppress(OSError):
        about["free shared memory, bytes"] = shutil.disk_usage("/dev/shm").free
    if device.type == "cuda":
        with suppress(Exception):  # the checks tell
            about["name"] = torch.cuda.get_device_name(device)
            about["cuda"] = torch.version.cuda
            about["properties"] = str(torch.cuda.get_device_properties(device))
    return about


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Check, or as one of the processes check a share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--out", type=record_file, required=True, help="the record, JSON")
    parser.add_argument(
        "--processes", type=positive, help="that share the problems (default: up to 16 on a GPU, else 1)"
    )
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        run_share(options)
        return
    if options.processes is None:
        options.processes = min(16, os.cpu_count() or 1) if options.device.startswith("cuda") else 1
    raise SystemExit(0 if Checker(options).run() else 1)


if __name__ == "__main__":
    main()
