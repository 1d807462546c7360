"""The tests themselves where packages are missing, as on machines whose image has others."""

import subprocess
import sys

import pytest
from scripts import ROOT

CODE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

import pytest

sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def run_without(package, *arguments):
    command = [sys.executable, "-c", CODE, package, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_without_sybil_pages_are_no_tests():
    done = run_without("sybil", "--collect-only", "CONTRIBUTING.md", "tests/tools/test_counts.py")
    assert done.returncode == 0, done.stdout
    assert "sybil is not installed" in done.stdout
    assert "test_counts.py" in done.stdout
    assert "line:" not in done.stdout  # as sybil names code blocks


@pytest.mark.parametrize(
    "arguments", [(), ("-m", "cuda"), pytest.param(("-m", "not cuda"), marks=pytest.mark.slow)]
)
def test_a_missing_package_is_an_error_but_where_tests_for_a_gpu_are_chosen(arguments):
    files = "tests/package/test_config_files.py", "tests/tools/test_monitor.py"
    done = run_without("jsonargparse", *arguments, "--collect-only", "-rs", *files)
    if "cuda" in arguments:
        assert done.returncode == 0, done.stdout
        assert "tests/package/test_config_files.py:1: No module named 'jsonargparse'" in done.stdout
    else:
        assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout
