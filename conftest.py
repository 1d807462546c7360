"""The code blocks of README and docs are tests: Python is run, commands must be those that exist."""

import contextlib
import os
import tempfile
from typing import Any

os.environ.setdefault("MPLBACKEND", "agg")

from commands import check_commands
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser


def setup(namespace: dict[str, Any]) -> None:
    """Run the blocks of a page after one another, in an empty folder."""
    import torchvision_shim  # noqa: F401  (not above: tests/conftest.py has something to set before PyTorch)

    namespace["_folder"] = folder = contextlib.ExitStack()
    folder.enter_context(contextlib.chdir(folder.enter_context(tempfile.TemporaryDirectory())))


def teardown(namespace: dict[str, Any]) -> None:
    """Leave the folder."""
    namespace["_folder"].close()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("sh", check_commands), SkipParser()],
    patterns=["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md", "docs/**/*.md"],
    setup=setup,
    teardown=teardown,
).pytest()
