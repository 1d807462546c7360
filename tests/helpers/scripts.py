"""Loads scripts that are in no package."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load(path):
    """The module at a path below the root of the checkout."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
