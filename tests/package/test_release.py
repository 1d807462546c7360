"""Version, changelog and citation of a release, and README as an index shows it."""

import re
import tomllib

import pytest
import release
from scripts import ROOT, load

ADDRESS = "https://code.example/lgla"
READY = {
    release.PACKAGE: '__version__ = "1.2.0"\n',
    release.CHANGELOG: "## [Unreleased]\n\n## [1.2.0] - 2030-01-02\n\n## [1.1.0] - 2029-01-01\n",
    release.CITATION: 'version: 1.2.0\ndate-released: "2030-01-02"\n',
    release.PROJECT: f'[project]\n[project.urls]\nRepository = "{ADDRESS}"\nDocumentation = "{ADDRESS}"\n',
}


@pytest.fixture
def project(tmp_path):
    """Write the files of a project that is ready for release."""
    for file, text in READY.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def test_every_file_states_the_same_version():
    assert release.disagreements() == []


def test_a_project_that_is_ready_has_no_faults(project):
    assert release.faults("v1.2.0", project) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        (release.PACKAGE, "__version__", "version", "a line with __version__, found none"),
        (release.CHANGELOG, "[1.2.0]", "[1.3.0]", "version 1.2.0, as in lgla_losses/__init__.py, got 1.3.0"),
        (
            release.CHANGELOG,
            "## [1.2.0]",
            "### [1.2.0]",
            "version 1.2.0, as in lgla_losses/__init__.py, got 1.1.0",
        ),
        (release.CHANGELOG, "01-02", "01-03", "the date 2030-01-02, as in CITATION.cff, got 2030-01-03"),
        (release.CITATION, "1.2.0", "1.1.0", "version 1.2.0, as in lgla_losses/__init__.py, got 1.1.0"),
        (release.CITATION, '"2030-01-02"', "soon", "version 1.2.0 with its date, found neither"),
    ],
)
def test_a_file_that_was_forgotten_is_named(file, old, new, fault, project):
    assert READY[file].count(old) == 1
    (project / file).write_text(READY[file].replace(old, new))
    assert release.disagreements(project) == [f"{file}: expected {fault}"]
    assert f"{file}: expected {fault}" in release.faults("v1.2.0", project)


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        (release.PROJECT, "Repository", "Homepage", "an address as Repository of [project.urls], found none"),
        (
            release.PROJECT,
            "Documentation",
            "Docs",
            "an address as Documentation of [project.urls], found none",
        ),
        (
            release.CHANGELOG,
            "## [Unreleased]\n",
            "## [Unreleased]\n\n### Fixed\n- It.\n",
            "an empty section [Unreleased], found its entries",
        ),
        (
            release.CHANGELOG,
            "## [Unreleased]\n",
            "",
            "an empty section [Unreleased], found no such section",
        ),
    ],
)
def test_what_only_a_release_needs_is_named(file, old, new, fault, project):
    (project / file).write_text(READY[file].replace(old, new))
    assert release.disagreements(project) == []
    assert release.faults("v1.2.0", project) == [f"{file}: expected {fault}"]


def test_the_tag_is_the_version(project):
    assert release.faults("v1.1.0", project) == ["tag: expected v1.2.0, got v1.1.0"]


def test_this_project_lacks_nothing_but_addresses_that_are_not_known_yet():
    """Entries of the next version may stand in the changelog."""
    addresses = tomllib.loads((ROOT / release.PROJECT).read_text())["project"].get("urls", {})
    faults = release.faults(f"v{release.stated(release.PACKAGE)['version']}")
    assert [fault for fault in faults if "[Unreleased], found its entries" not in fault] == [
        f"pyproject.toml: expected an address as {name} of [project.urls], found none"
        for name in ("Repository", "Documentation")
        if name not in addresses
    ]


README = """
[install]({link}docs/install.md#extras), [site](https://example.org/a), [here](#use), [`code`]({link}examples)
![gain]({picture}docs/images/hero.png), [![gain]({picture}docs/images/hero.png)]({link}docs/results.md)
<img alt="gain" src="{picture}docs/images/hero.png" width="80%"> <a href="#use">

```python
callbacks[0](docs)
```
"""


def test_links_of_readme_are_absolute_on_an_index():
    """With the address of the repository, which stands in project.urls."""
    readme = load("setup.py").readme
    relative = README.format(link="", picture="")
    assert readme(relative, None, "0.2.0") == relative
    absolute = README.format(link=f"{ADDRESS}/blob/v0.2.0/", picture=f"{ADDRESS}/raw/v0.2.0/")
    assert readme(relative, f"{ADDRESS}/", "0.2.0") == absolute


def test_no_relative_link_of_readme_is_forgotten():
    text = load("setup.py").readme((ROOT / "README.md").read_text(), ADDRESS, "0.2.0")
    outside_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r'\]\(([^)\s]+)|\b(?:src|srcset|href)="([^"]+)', outside_code)
    assert len(targets) > 30
    assert [
        link for pair in targets for link in pair if link and not link.startswith(("https://", "#"))
    ] == []
