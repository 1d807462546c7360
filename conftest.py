"""The code blocks of README and docs are tests: Python is run, commands must be those that exist."""

import contextlib
import os
import tempfile
from typing import Any

os.environ.setdefault("MPLBACKEND", "agg")

from commands import check_commands
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

#: Scripts of the site, for which the tests have no Sphinx.
collect_ignore_glob = ["docs/*.py", "docs/*/*.py"]


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


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("sh", check_commands)],
    patterns=["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md", "docs/**/*.md"],
    setup=setup,
    teardown=teardown,
).pytest()
