"""What a block of shell commands in the documentation must hold to."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import ROOT

if TYPE_CHECKING:
    from sybil import Example

EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
#: Commands that are not this project's.
OTHERS = {".", "apt-cache", "auditwheel", "cd", "cp", "git", "mkdir", "tensorboard"}
PYTHONS = {"python", "python3", "torchrun"}
TORCHRUN = {"--nproc-per-node", "--nnodes", "--standalone"}


def check_commands(example: Example) -> None:
    """Fail where a command installs, makes or runs what is not there, or gives an unknown option."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        for words in _commands(line):
            fault = _fault(words)
            assert fault is None, f"{line}: {fault}"


def _commands(line: str) -> list[list[str]]:
    """The commands of a line without the variables before them and the files they write to."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word in {"&&", "||", ";", "|"}:
            commands.append([])
        elif word == ">":
            next(lexer)
        elif commands[-1] or not re.fullmatch(r"\w+=.*", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def _fault(words: list[str]) -> str | None:
    program, *arguments = words
    missing = [
        w for w in words if re.match("(examples|benchmarks|docs|tests)/", w) and not (ROOT / w).exists()
    ]
    if missing:
        return f"no file {missing}"
    if program == "pip":
        extras = {extra for word in arguments for extra in _extras(word)}
        wrong = extras - EXTRAS
        return f"no extra {wrong}" if wrong else None if arguments[0] == "install" else "expected pip install"
    if program == "make":
        targets = {word for word in arguments if "=" not in word}
        return f"no target {targets - TARGETS}" if targets - TARGETS else None
    if program not in PYTHONS:
        known = program in OTHERS
        return (
            None
            if known
            else f"unknown command {program}: tests/helpers/commands.py checks those of this project"
        )
    if "-c" in arguments:
        compile(arguments[arguments.index("-c") + 1], "-c", "exec")
        return None
    if arguments[:2] == ["-m", "venv"]:
        return None
    if arguments[:2] == ["-m", "lgla_losses"]:
        known = _options_of_the_command(arguments[2])
    else:
        script = next((word for word in arguments if word.endswith(".py")), "")
        if not (ROOT / script).is_file():
            return f"no script {script or words}"
        known = _options(ROOT / script) | (TORCHRUN if program == "torchrun" else set())
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    return f"unknown options {given - known}; there are {sorted(known)}" if given - known else None


def _extras(word: str) -> list[str]:
    found = re.search(r"\[([\w,-]+)\]", word)
    return found[1].split(",") if found else []


@cache
def _options_of_the_command(name: str) -> set[str]:
    import typer

    from lgla_losses.inspection.command import app

    commands = typer.main.get_command(app).commands
    assert name in commands, f"no command {name}; there are {sorted(commands)}"
    return {"--help"} | {option for parameter in commands[name].params for option in parameter.opts}


@cache
def _options(script: Path) -> set[str]:
    """What looks like an option in the script and in what it imports from its own folder."""
    options, waiting, seen = {"--help"}, [script], set()
    while waiting:
        seen.add(path := waiting.pop())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                options |= {node.value, f"--no-{node.value[2:]}"}
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found = {script.parent / f"{name}.py" for name in names}
            waiting += [file for file in found - seen if file.is_file()]
    return options
