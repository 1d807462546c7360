"""The code blocks of README and docs are tests: Python is run, commands must be those that exist."""

import contextlib
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
from commands import check_commands

try:
    from sybil import Sybil
    from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser
except ImportError:  # the other tests go without it
    Sybil = None

#: Scripts of the site, for which the tests have no Sphinx.
collect_ignore_glob = ["docs/*.py", "docs/*/*.py"]


def pytest_report_header() -> str | None:
    """Say which tests are missing."""
    return None if Sybil else "sybil is not installed: the code blocks of README and docs are no tests here"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """With ``-m cuda`` skip files that need packages which the GPU's machine lacks; elsewhere they fail."""
    report = yield
    missing = re.search(r"ModuleNotFoundError: (No module named '\w+)", str(report.longrepr))
    chosen = collector.config.getoption("markexpr").replace("not cuda", "")
    if report.failed and missing and "cuda" in chosen:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {missing[1]}'")
    return report


def setup(namespace: dict[str, Any]) -> None:
    """Run the blocks of a page after one another, in an empty folder and on one thread, as in the build."""
    import torch
    import torchvision_shim  # noqa: F401  (not above: tests/conftest.py has something to set before PyTorch)

    namespace["_undo"] = undo = contextlib.ExitStack()
    undo.enter_context(contextlib.chdir(undo.enter_context(tempfile.TemporaryDirectory())))
    undo.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)
    torch.manual_seed(0)


def teardown(namespace: dict[str, Any]) -> None:
    """Leave the folder, and the threads as they were."""
    namespace["_undo"].close()


class EmptyPage(pytest.File):
    """A page whose code blocks nobody collects; that of no collector would be an error."""

    def collect(self) -> list[pytest.Item]:
        """No tests."""
        return []


if Sybil is None:

    def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.File | None:
        """Collect pages as such without tests."""
        return EmptyPage.from_parent(parent, path=file_path) if file_path.suffix == ".md" else None

else:
    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), CodeBlockParser("sh", check_commands)],
        patterns=["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md", "docs/**/*.md"],
        setup=setup,
        teardown=teardown,
    ).pytest()
