"""Check that a version is ready for release: ``python tests/helpers/release.py v0.2.0`` (the tag)."""

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
UNRELEASED = re.compile(r"^## \[Unreleased\]\n(?P<text>.*?)^## ", re.MULTILINE | re.DOTALL)
#: README's links on a package index, and the site's canonical addresses, begin with these.
ADDRESSES = ("Repository", "Documentation")


def read(file, root):
    return (root / file).read_text(encoding="utf-8")


def stated(file, root=ROOT):
    """Read version and date of a file; nothing where it states none."""
    match = re.search(PATTERNS[file], read(file, root), re.MULTILINE)
    return match.groupdict() if match else {}


def disagreements(root=ROOT):
    """List where version or date differ, a line each."""
    version, date = stated(PACKAGE, root).get("version"), stated(CITATION, root).get("date")
    if not version:
        return [f"{PACKAGE}: expected a line with __version__, found none"]
    lines = []
    for file in (CHANGELOG, CITATION):
        got = stated(file, root)
        if not got:
            lines.append(f"{file}: expected version {version} with its date, found neither")
        elif got["version"] != version:
            lines.append(f"{file}: expected version {version}, as in {PACKAGE}, got {got['version']}")
        elif date and got["date"] != date:
            lines.append(f"{file}: expected the date {date}, as in {CITATION}, got {got['date']}")
    return lines


def faults(tag, root=ROOT):
    """List all that forbids to release a tag, a line each."""
    lines, version = disagreements(root), stated(PACKAGE, root).get("version")
    if tag != f"v{version}":
        lines.append(f"tag: expected v{version}, got {tag}")
    addresses = tomllib.loads(read(PROJECT, root))["project"].get("urls", {})
    lines += [
        f"{PROJECT}: expected an address as {name} of [project.urls], found none"
        for name in ADDRESSES
        if not addresses.get(name)
    ]
    unreleased = UNRELEASED.search(read(CHANGELOG, root))
    if not unreleased or unreleased["text"].strip():
        found = "its entries" if unreleased else "no such section"
        lines.append(f"{CHANGELOG}: expected an empty section [Unreleased], found {found}")
    return lines


if __name__ == "__main__":
    sys.exit("\n".join(faults(sys.argv[1])) if len(sys.argv) == 2 else __doc__)
