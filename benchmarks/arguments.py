"""Types of command-line arguments that are refused before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 2 ** 31, got {text:.20}")
    return value


def record_file(text: str) -> Path:
    """The path of a file to write, in a folder that is there."""
    path = Path(text)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {path}")
    return path
