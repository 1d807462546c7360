"""Which other files of the project a script of examples/ imports."""

from __future__ import annotations

import ast
import os
from pathlib import Path

from scripts import ROOT

FOLDERS = (ROOT / "examples", ROOT / "benchmarks")


def needed_files(script: Path) -> list[str]:
    """The files that must lie beside a script to run it, as it would name them: ``cli.py``."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        new = _imported(waiting.pop()) - found - {script}
        found |= new
        waiting += new
    return sorted(os.path.relpath(path, script.parent) for path in found)


def _imported(script: Path) -> set[Path]:
    names = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("library", "import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    paths = {folder / f"{name}.py" for name in names for folder in FOLDERS if "." not in str(name)}
    return {path for path in paths if path.is_file()}
