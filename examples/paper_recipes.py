# Needs: cli.py, files.py.
"""Read the TOML files of examples/paper: recipes, one per cell of a table, and suites of them."""

from __future__ import annotations

import argparse
import os
import reprlib
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cli import WITH_TAU, InputError
from files import kind_of

RECIPES = Path(__file__).with_name("paper")

#: Keys of a recipe besides options: its base files, its cell, and the paper's number there.
ABOUT = ("base", "dataset", "table", "row", "column", "paper", "protocol")


def suite_commands(name: str, files: dict[str, str]) -> list[list[str]]:
    """Expand a suite of ``suites.toml`` into the arguments of train_paper.py, one list per cell.

    Args:
        name: name of the suite.
        files: data files by their names in the suites; for others the suite's default is used.

    Raises:
        InputError: there is no such suite or file.
    """
    said = read_toml(RECIPES / "suites.toml")
    suites, known = said["suites"], said["files"]
    if name not in suites:
        raise InputError(f"--suite: expected one of {', '.join(suites)}, got {name}")
    if unknown := sorted(files.keys() - known.keys()):
        raise InputError(f"--files: expected names among {', '.join(known)}, got {', '.join(unknown)}")

    suite, paths = suites[name], known | files
    folder = os.path.relpath(RECIPES)  # relative, as typed by hand
    commands = []
    for run in suite["runs"]:
        for cell in run["cells"]:
            for data in map(suite["data"].__getitem__, run["on"]):
                settings = [text.format_map(paths) for text in data["set"] + run.get("set", [])]
                named = ["--name", data["prefix"] + run.get("name", cell)] if "prefix" in data else []
                commands.append(
                    [
                        *(f"{folder}/{recipe}" for recipe in (f"{cell}.toml", *data["recipes"])),
                        *("--set", *settings),
                        *("--seeds", *map(str, suite["seeds"])),
                        *named,
                    ]
                )
    return commands


def read_recipe(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe on top of the files of its ``base``; ``readers`` are the files that build on it."""
    got = kind_of(path)
    if got == "nothing":
        others = get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")])
        raise InputError(f"{path}: there is no such recipe; close names: {', '.join(others) or 'none'}")
    if got != "a file":
        raise InputError(f"{path}: expected a file of TOML, got {got}")
    chain = (*readers, path.resolve())
    if chain[-1] in readers:
        names = " -> ".join(file.name for file in chain[chain.index(chain[-1]) :])
        raise InputError(f"{path}: expected bases without a circle, got the circle {names}")

    said = read_toml(path)
    settings: dict[str, Any] = {}
    bases = said.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: expected base to be the name of a recipe, or a list of names, got {bases}")
    for base in bases:
        settings |= read_recipe(path.parent / base, chain)
    return settings | said


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raise InputError if it is not one."""
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected TOML in UTF-8, got {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raise ValueError if it is not TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("lists or tables nested too deeply") from error


def parse_setting(text: str) -> tuple[str, Any]:
    """Split ``key=value``; the value is TOML, or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set: expected key=value, got {text!r}")
    try:
        return key.replace("-", "_"), parse_toml(f"value = {value}")["value"]
    except ValueError:
        return key.replace("-", "_"), value


def as_arguments(parser: argparse.ArgumentParser, settings: dict[str, Any]) -> list[str]:
    """Turn settings into command-line arguments; the parser checks their values."""
    not_settings = ("help", "resume", "seed", "log_dir")  # --seeds and --runs set these
    actions = {action.dest: action for action in parser._actions if action.dest not in not_settings}
    has_tau = settings.get("adjustment", "lgla") in WITH_TAU
    arguments = []
    for key, value in settings.items():
        if key in ABOUT or value == "":  # empty: the option's default
            continue
        if key == "tau" and not has_tau:  # set by the data set's recipe, for methods with a tau
            continue
        if key not in actions:
            close = ", ".join(get_close_matches(key, actions)) or "none"
            raise InputError(f"{key}: there is no such option; close names: {close}; all: --options")
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            negative = f"--no-{key.replace('_', '-')}"
            if actions[key].nargs != 0:
                raise InputError(f"{key}: expected a value, got {str(value).lower()}")
            if value or negative in actions[key].option_strings:
                arguments.append(flag if value else negative)
        elif isinstance(value, list):
            if actions[key].nargs != "+":
                raise InputError(f"{key}: expected one value, got the list {reprlib.repr(value)}")
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value}")
    return arguments
