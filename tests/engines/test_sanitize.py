"""The C library under AddressSanitizer and UBSan: ``make sanitize``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT, load

KERNELS = ROOT / "lgla_losses" / "kernels"
COMPILER = os.environ.get("CC", "gcc")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runtime():
    """What has to be loaded first, as Python itself is built without it."""
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        pytest.skip("needs gcc on Linux")
    path = subprocess.check_output([COMPILER, "-print-file-name=libasan.so"], text=True).strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{COMPILER} comes without libasan")
    return path


def build(folder, rows):
    """Compile as the package is, with sanitizers; ``rows`` is the text of native_rows.h."""
    shutil.copy(KERNELS / "native.c", folder)
    (folder / "native_rows.h").write_text(rows)
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [COMPILER, *load("setup.py").LIBRARY.extra_compile_args, *sanitizers, "-fPIC", "-shared"]
    subprocess.run([*command, folder / "native.c", "-o", folder / "native.so", "-lm"], check=True)
    return folder / "native.so"


@pytest.fixture(scope="module")
def library(runtime, tmp_path_factory):
    return build(tmp_path_factory.mktemp("native"), (KERNELS / "native_rows.h").read_text())


def run(runtime, library, calls, *options):
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the operating system
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # an allocation a structure
    }
    worker = [
        sys.executable,
        ROOT / "tests" / "helpers" / "sanitizer_worker.py",
        library,
        str(calls),
        *options,
    ]
    return subprocess.run(worker, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_random_calls_read_and_write_nothing_but_their_tensors(runtime, library):
    """Empty batches, half precision, all strides, targets that are no class, probabilities, features."""
    result = run(runtime, library, 1500)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "1500 batches, no complaint\n"


def test_without_the_wrappers_checks_the_overflow_is_caught(runtime, library):
    result = run(runtime, library, 0, "--unchecked")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "lgla_weights" in result.stderr


def test_an_element_too_many_in_a_row_is_caught(runtime, tmp_path):
    rows = (KERNELS / "native_rows.h").read_text()
    loop = "for (int64_t j = 0; j < C; j++)"
    assert loop in rows
    result = run(runtime, build(tmp_path, rows.replace(loop, loop.replace("<", "<="))), 100)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
