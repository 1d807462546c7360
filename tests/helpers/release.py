"""Check that every file states the same version: ``python tests/helpers/release.py v0.2.0`` (the tag)."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, CHANGELOG, CITATION = "lgla_losses/__init__.py", "CHANGELOG.md", "CITATION.cff"
PROJECT = "pyproject.toml"
#: How a file states version and date; of the changelog it is the newest release.
PATTERNS = {
    PACKAGE: r'^__version__ = "(?P<version>.+)"$',
    CHANGELOG: r"^## \[(?P<version>\d.*)\] - (?P<date>\S+)$",
    CITATION: r'^version: (?P<version>\S+)\ndate-released: "(?P<date>\S+)"$',
}


def stated(file, root=ROOT):
    """Read version and date of a file; nothing where it states none."""
    match = re.search(PATTERNS[file], (root / file).read_text(encoding="utf-8"), re.MULTILINE)
    return match.groupdict() if match else {}


def faults(tag=None, root=ROOT):
    """List what disagrees, a line each."""
    version = stated(PACKAGE, root).get("version")
    expected = {PACKAGE: {"version": version}}
    expected[CHANGELOG] = expected[CITATION] = {
        "version": version,
        "date": stated(CITATION, root).get("date"),
    }
    lines = [
        f"{file}: expected {_said(want)}, got {_said(stated(file, root))}"
        for file, want in expected.items()
        if stated(file, root) != want
    ]
    return lines if tag is None else [*lines, *_faults_of_a_release(tag, version, root)]


def _said(found):
    return ", ".join(f"{name} {value}" for name, value in found.items()) or "nothing"


def _faults_of_a_release(tag, version, root):
    if tag != f"v{version}":
        yield f"tag: expected v{version}, got {tag}"
    # Without it README's links and pictures lead nowhere on a package index.
    urls = tomllib.loads((root / PROJECT).read_text(encoding="utf-8"))["project"].get("urls", {})
    if "Repository" not in urls:
        yield f"{PROJECT}: expected Repository in [project.urls], got {_said(urls)}"
    unreleased = (root / CHANGELOG).read_text(encoding="utf-8").partition("## [Unreleased]\n")[2]
    if unreleased.partition("\n## [")[0].strip():
        yield f"{CHANGELOG}: expected nothing under [Unreleased]; move it to [{version}]"


if __name__ == "__main__":
    sys.exit("\n".join(faults(*sys.argv[1:])) or 0)
