"""`make gpu` as a user meets it: in a checkout whose sections do what a test needs, and in a dry run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import gpu
import gpu_problems
import pytest
from scripts import ROOT

import lgla_losses
from conftest import long_ones_first

SCRIPTS = {
    "bench": "benchmarks/losses.py",
    "layouts": "benchmarks/expert_layouts.py",
    "train": "examples/train_stacked.py",
}


class Checkout:
    """A checkout whose sections are scripts of a test."""

    def __init__(self, root):
        self.root = root
        self.out = root / "out"
        for folder in ("benchmarks", "examples"):
            (root / folder).mkdir()
        runner = (ROOT / "benchmarks" / "gpu.py").read_text()
        (root / "benchmarks" / "gpu.py").write_text(runner.replace("GRACE = 5.0", "GRACE = 1.0"))
        for section in SCRIPTS:
            self.let(section, "print('fine')")

    def let(self, section, code):
        """Make the section do this; ``out`` is the folder, ``sys.argv`` its command line."""
        header = f"import os, pathlib, signal, subprocess, sys, time\nout = pathlib.Path({str(self.out)!r})\n"
        (self.root / SCRIPTS[section]).write_text(header + textwrap.dedent(code))

    def begin(self, *arguments, sections=("bench", "layouts")):
        command = [sys.executable, str(self.root / "benchmarks" / "gpu.py"), "--out", str(self.out)]
        return subprocess.Popen(
            [*command, "--sections", *sections, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, **options):
        """Exit status and what was printed."""
        process = self.begin(*arguments, **options)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    def outcomes(self):
        record = json.loads((self.out / "gpu.json").read_text())
        return {section["name"]: section["outcome"] for section in record["sections"]}

    def packed(self):
        with tarfile.open(self.out / "gpu.tar.gz") as archive:
            return {member.name: archive.extractfile(member).read().decode() for member in archive}


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_sections_leave_logs_a_record_an_archive_and_a_table(checkout):
    checkout.let("bench", "(out / 'losses.json').write_text('{}'); print('rows: 12')")
    code, printed = checkout.run()
    assert code == 0
    assert set(checkout.packed()) == {"bench.log", "layouts.log", "gpu.json", "losses.json"}
    assert "rows: 12" in checkout.packed()["bench.log"]
    *_, head, bench, layouts, _ = printed.splitlines()
    assert head.split() == ["section", "outcome", "seconds", "limit", "last", "line", "of", "each", "process"]
    assert re.fullmatch(r"bench +passed +\d+\.\d +\d+ +rows: 12", bench)
    assert re.fullmatch(r"layouts +passed +\d+\.\d +\d+ +fine", layouts)


def test_a_section_that_fails_stops_no_other_and_is_told_by_the_exit_status(checkout):
    checkout.let("bench", "print('half of it'); sys.exit(3)")
    code, printed = checkout.run()
    assert code == 1
    assert checkout.outcomes() == {"bench": "losses.py: exit status 3", "layouts": "passed"}
    assert re.search("bench +losses.py: exit status 3 .* half of it", printed)


def test_a_section_at_its_limit_writes_what_it_has_and_all_that_it_started_ends(checkout):
    checkout.let(
        "bench",
        """
        def save(*_):
            (out / "losses.json").write_text("half of it")
            sys.exit(1)

        signal.signal(signal.SIGTERM, save)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("child", child.pid, flush=True)
        time.sleep(60)
        """,
    )
    begun = time.monotonic()
    code, _ = checkout.run(sections=("bench=2", "layouts"))
    assert code == 1
    assert time.monotonic() - begun < 30
    assert checkout.outcomes() == {"bench": "losses.py: cut off after 2 s", "layouts": "passed"}
    packed = checkout.packed()
    assert packed["losses.json"] == "half of it"
    child = int(re.search(r"child (\d+)", packed["bench.log"])[1])
    assert not is_running(child)


def is_running(process):
    """Whether a process computes still: one that ended may wait for its parent to notice."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_section_that_hears_no_signal_is_killed(checkout):
    checkout.let(
        "bench", "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    code, _ = checkout.run(sections=("bench=2", "layouts"))
    assert code == 1
    assert "deaf" in checkout.packed()["bench.log"]
    assert checkout.outcomes()["layouts"] == "passed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_keeps_what_there_is(checkout, number):
    checkout.let(
        "bench", "(out / 'losses.json').write_text('{}'); print('so far', flush=True); time.sleep(60)"
    )
    process = checkout.begin()
    for line in process.stdout:
        if line == "so far\n":
            break
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert checkout.outcomes() == {"bench": f"losses.py: stopped by {number.name}", "layouts": "not run"}
    assert {"losses.json", "bench.log", "gpu.json"} <= set(checkout.packed())
    assert "layouts  not run" in printed


def test_what_is_there_is_packed_after_every_section_lest_it_is_killed(checkout):
    checkout.let("layouts", "print(sorted(path.name for path in out.iterdir()))")
    checkout.run()
    assert "gpu.tar.gz" in checkout.packed()["layouts.log"]


def test_large_checkpoints_and_caches_stay_out_of_the_archive(checkout):
    checkout.let(
        "bench",
        """
        (out / "train" / "__pycache__").mkdir(parents=True)
        for name, size in {"small.pt": 9, "large.pt": 5_000_000, "logits.npz": 5_000_000}.items():
            (out / "train" / name).write_bytes(bytes(size))
        (out / "train" / "__pycache__" / "x.pyc").write_bytes(b"")
        """,
    )
    checkout.run(sections=["bench"])
    assert set(checkout.packed()) == {"bench.log", "gpu.json", "train/small.pt", "train/logits.npz"}


def test_a_section_plans_with_less_than_its_limit_and_what_others_leave_over_is_used(checkout):
    checkout.let("train", "print(sys.argv)")
    (checkout.root / "data.npz").write_bytes(b"")
    code, _ = checkout.run(
        *("--seconds", "200", "--data", str(checkout.root / "data.npz")),
        sections=("bench=50", "layouts", "train"),
    )
    assert code == 0
    record = json.loads((checkout.out / "gpu.json").read_text())
    limits = {section["name"]: section["limit"] for section in record["sections"]}
    assert limits["bench"] == 50
    assert limits["layouts"] == pytest.approx(190 * 45 / (45 + 315), rel=0.05)
    assert limits["train"] == pytest.approx(190, rel=0.05)
    seconds = int(re.search(r"'--seconds', '(\d+)'", checkout.packed()["train.log"])[1])
    assert seconds == pytest.approx(limits["train"] - 10, abs=1)


def test_training_without_data_is_skipped_by_name(checkout):
    code, printed = checkout.run(sections=("layouts", "train"))
    assert code == 0
    skipped = "skipped: no data given, as by DATA=FILE.npz"
    assert checkout.outcomes() == {"layouts": "passed", "train": skipped}
    assert f"== train: {skipped}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "benches"], "expected some of check, bench, layouts, train, got 'benches'"),
        (["--sections", "bench", "bench=3"], "expected each but once, got bench bench"),
        (["--sections", "bench=0"], "expected seconds above 0"),
        (["--seconds", "nan"], "expected seconds above 0"),
        (["--data", "nowhere.npz"], "expected a file, got nowhere.npz"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(checkout, arguments, message):
    code, printed = checkout.run(*arguments, sections=["layouts"])
    assert code == 2
    assert message in printed
    assert not checkout.out.exists()


def test_on_a_gpu_the_tests_are_those_that_name_a_device(tmp_path):
    command = gpu.tests(tmp_path, dry=False).command
    assert command[command.index("-m", 1) + 1] == "cuda and not slow"
    assert {
        "tests/engines/test_engines.py",
        "tests/engines/test_fused.py",
        "tests/losses/test_loss.py",
    } <= set(command)
    assert "tests/losses/test_grouping.py" not in command


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_process_of_tests_begins_with_a_long_one(parts):
    ordered = long_ones_first(range(12), [i >= 8 for i in range(12)], parts)
    assert sorted(ordered) == list(range(12))
    share, long_ones = 12 // parts, 4 // parts
    assert {i for i in range(12) if ordered[i] >= 8} == {
        share * part + i for part in range(parts) for i in range(long_ones)
    }


#: Problems of which the second takes its process with it, and the third gives a wrong gradient.
PROBLEMS = """
import os
from contextlib import nullcontext
import torch
from gpu_problems_of_the_project import Problem

class Line(torch.nn.Module):
    def __init__(self, kind, backend):
        super().__init__()
        self.kind, self.factor = (kind, 1.0 if backend == "reference" or kind != "wrong" else 1.1)

    def forward(self, x):
        if self.kind == "crash":
            os._exit(9)
        return (self.factor * x).sum()

def problems():
    for kind in ("right", "crash", "wrong", "right too"):
        make = lambda backend, kind=kind: Line(kind, backend)
        yield Problem(kind, torch.float32, make, lambda m, x, _: m(*x), [torch.ones(2)], [])
"""


def test_a_check_that_crashes_or_fails_stops_no_other(tmp_path):
    for name in ("arguments.py", "choices.py", "gpu_check.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path)
    shutil.copy(ROOT / "benchmarks" / "gpu_problems.py", tmp_path / "gpu_problems_of_the_project.py")
    (tmp_path / "gpu_problems.py").write_text(PROBLEMS)
    record = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, tmp_path / "gpu_check.py", "--device", "cpu", "--out", record],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "2 passed, 6 skipped, 3 unfinished, 1 failed"
    assert "exit status 9: another process takes 2 problems" in done.stdout
    results = json.loads(record.read_text())["results"]
    gradients = {r["problem"]: r["outcome"] for r in results if r["check"] == "gradient"}
    assert gradients == {"right": "passed", "crash": "unfinished", "wrong": "failed", "right too": "passed"}
    (wrong,) = (r for r in results if r["outcome"] == "failed")
    assert wrong["error"] == pytest.approx(0.1, rel=1e-3)


def test_every_problem_of_the_check_has_a_name_of_its_own():
    problems = list(gpu_problems.problems())
    assert len({problem.name for problem in problems}) == len(problems) > 50


#: What a bare machine lacks, beside git and a compiler: found by every Python that runs there.
BARE = """
import importlib.metadata, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sybil":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

# An editable installation brings a finder; any has metadata.
sys.meta_path[:] = [Missing(), *(f for f in sys.meta_path if "editable" not in getattr(f, "__module__", ""))]
distribution = importlib.metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.replace("_", "-") == "lgla-losses":
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(cls, name)

importlib.metadata.Distribution.from_name = classmethod(from_name)
if any(name in str(sys.orig_argv) for name in ("expert_layouts.py", "train_stacked.py", "train_paper.py")):
    import torchvision_shim
"""


class Bare(NamedTuple):
    """A checkout on a bare machine, and the environment there."""

    checkout: Path
    environment: dict[str, str]

    def run(self, *command, cwd="/"):
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def bare(tmp_path):
    """A checkout as git has it, where there is no sybil, git, installed package or compiler."""
    checkout, machine = tmp_path / "checkout", tmp_path / "machine"
    (machine / "bin").mkdir(parents=True)
    (machine / "sitecustomize.py").write_text(BARE)
    shutil.copy(ROOT / "tests" / "helpers" / "torchvision_shim.py", machine)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(machine / "bin"), "PYTHONPATH": str(machine), "OMP_NUM_THREADS": "1"}
    return Bare(checkout, environment)


LACKING = """
import importlib.util, shutil
from importlib.metadata import PackageNotFoundError, version
print([shutil.which(tool) for tool in ("git", "gcc", "cc")], importlib.util.find_spec("lgla_losses"))
for attempt in (lambda: version("lgla_losses"), lambda: __import__("sybil")):
    try:
        attempt()
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        print(type(error).__name__)
"""


def test_a_bare_machine_lacks_what_it_should(bare):
    done = bare.run(sys.executable, "-c", LACKING)
    assert done.stdout == "[None, None, None] None\nPackageNotFoundError\nModuleNotFoundError\n", done.stderr


@pytest.mark.parametrize("script", ["examples/make_data.py", "benchmarks/kernel_resources.py"])
def test_scripts_find_the_package_of_a_checkout_that_nobody_has_installed(bare, script):
    done = bare.run(sys.executable, bare.checkout / script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.slow
def test_a_run_of_the_paper_there_ends_with_its_record(bare, tmp_path):
    images = tmp_path / "images.npz"
    bare.run(sys.executable, bare.checkout / "benchmarks" / "random_images.py", images)
    recipes = [bare.checkout / "examples" / "paper" / name for name in ("table5_lgla.toml", "cpu.toml")]
    settings = (
        "backbone=resnet8",
        "epochs=1",
        "format=npz",
        "imbalance_factor=",
        "workers=0",
        f"data={images}",
    )
    folders = "--runs", tmp_path / "runs", "--records", tmp_path, "--name", "lgla"
    script = bare.checkout / "examples" / "train_paper.py"
    done = bare.run(sys.executable, script, *recipes, *folders, "--set", *settings)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "lgla.json").read_text())
    assert record["commit"] == ""
    assert record["runs"][0]["versions"]["lgla_losses"] == lgla_losses.__version__


@pytest.mark.slow  # all sections, shortened
def test_a_dry_run_passes_on_a_bare_machine(bare, tmp_path):
    variables = f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}", "DEVICE=cpu", "SECONDS_LEFT=500"
    done = bare.run(shutil.which("make"), "gpu", *variables, cwd=bare.checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    outcomes = {section["name"]: section["outcome"] for section in record["sections"]}
    assert outcomes == dict.fromkeys(("check", "bench", "layouts", "train"), "passed")
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"check.json", "tests.xml", "losses.json", "expert_layouts.json", "train.log"} <= names
