"""The architecture page names every file of the package, and no other."""

import re

from scripts import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_map_names_every_file():
    table = PAGE.partition("| file |")[2].partition("\n\n")[0]
    named = {
        name
        for row in table.splitlines()
        if row[:2] == "| "
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    package = ROOT / "lgla_losses"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert named == files | folders
