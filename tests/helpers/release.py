"""Check that every file states the same version: ``python tests/helpers/release.py v0.2.0`` (the tag)."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, CHANGELOG, CITATION = "lgla_losses/__init__.py", "CHANGELOG.md", "CITATION.cff"
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
        f"{file}: expected {want}, got {stated(file, root)}"
        for file, want in expected.items()
        if stated(file, root) != want
    ]
    return lines if tag in (None, f"v{version}") else [*lines, f"tag: expected v{version}, got {tag}"]


if __name__ == "__main__":
    sys.exit("\n".join(faults(*sys.argv[1:])) or 0)
