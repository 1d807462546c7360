"""What a block of shell commands in the documentation must hold to."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

from sybil import Example

ROOT = Path(__file__).parents[1]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
#: Commands that are not this project's.
OTHERS = {"cd", "git", "tensorboard", "auditwheel"}
PROGRAMS = {"python", "python3", "torchrun"}
RUNNERS = {"--nproc-per-node", "--nnodes", "--standalone"}  # torchrun's own options


def check_commands(example: Example) -> None:
    """Fail where a command installs, makes or runs what is not there, or gives an unknown option."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words and words[0] not in OTHERS:
            fault = _fault(words)
            assert fault is None, f"{line}: {fault}"


def _fault(words: list[str]) -> str | None:
    program, *arguments = words
    if program == "pip":
        extras = {extra for word in arguments for extra in _extras(word)}
        return f"no extra {extras - EXTRAS}" if extras - EXTRAS else None
    if program == "make":
        targets = {word for word in arguments if "=" not in word}
        return f"no target {targets - TARGETS}" if targets - TARGETS else None
    if program not in PROGRAMS:
        return f"unknown command {program}: tests/commands.py checks those of this project"
    if "-c" in arguments:
        compile(arguments[arguments.index("-c") + 1], "-c", "exec")
        return None
    module = arguments[:2] == ["-m", "lgla_losses"]
    script = "lgla_losses/__main__.py" if module else next((w for w in arguments if w.endswith(".py")), "")
    if not (ROOT / script).is_file():
        return f"no script {script}"
    if module:
        sources = [*(ROOT / "lgla_losses" / "inspection").glob("*.py")]
    else:
        sources = _sources(ROOT / script, set())
    text = "\n".join(path.read_text() for path in sources)
    for word in arguments:
        option = re.match(r"--([a-z][\w-]*)", word)
        if option and f"--{option[1]}" not in RUNNERS:
            name = option[1].removeprefix("no-")
            if not re.search(rf"\b{name}\b|\b{name.replace('-', '_')}\b", text):
                return f"{script} knows no option --{option[1]}"
    return None


def _extras(word: str) -> list[str]:
    found = re.search(r"\[([\w,-]+)\]", word)
    return found[1].split(",") if found else []


def _sources(script: Path, seen: set[Path]) -> set[Path]:
    """The script and what it imports from its own folder, where its options may be declared."""
    if script.is_file() and script not in seen:
        seen.add(script)
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                _sources(script.parent / f"{name}.py", seen)
    return seen
