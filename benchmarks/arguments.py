"""What scripts import first: the package of this checkout, and types of arguments that are checked."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lgla_losses") is None:  # a checkout that nobody has installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))


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
