"""Version, changelog and citation of a release, and README as an index shows it."""

import re
import shutil

import pytest
import release
from scripts import ROOT, load


@pytest.fixture
def project(tmp_path):
    """A copy of the files that state the version, and an address."""
    for file in release.PATTERNS:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    address = '[project.urls]\nRepository = "https://code.example/lgla"\n'
    (tmp_path / release.PROJECT).write_text(address)
    return tmp_path


def test_every_file_states_the_same_version():
    assert release.faults() == []


def test_the_tag_is_the_version(project):
    version = release.stated(release.PACKAGE)["version"]
    assert release.faults(f"v{version}", project) == []
    assert release.faults("v0.0.1", project) == [f"tag: expected v{version}, got v0.0.1"]


def test_a_release_without_an_address_or_with_changes_of_no_version_is_refused(project):
    tag = f"v{release.stated(release.PACKAGE)['version']}"
    changelog = project / release.CHANGELOG
    changelog.write_text(
        changelog.read_text().replace("## [Unreleased]\n", "## [Unreleased]\n\n- A change.\n")
    )
    (project / release.PROJECT).write_text("[project]\n")
    address, changes = release.faults(tag, project)
    assert "Repository in [project.urls], got nothing" in address
    assert "[Unreleased]" in changes


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (release.PACKAGE, r'__version__ = ".*"', '__version__ = "9.9.9"'),
        (release.CHANGELOG, r"## \[\d.*", "## [9.9.9] - 2030-01-01"),
        (release.CHANGELOG, r"## \[\d", "### \\g<0>"),
        (release.CITATION, r"version: \S+\ndate", "version: 9.9.9\ndate"),
        (release.CITATION, r"date-released: .*", 'date-released: "2030-01-01"'),
    ],
)
def test_a_file_that_was_forgotten_is_a_fault(file, old, new, project):
    text = (project / file).read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    (project / file).write_text(changed)
    assert release.faults(root=project)


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
    address = "https://code.example/lgla"
    absolute = README.format(link=f"{address}/blob/v0.2.0/", picture=f"{address}/raw/v0.2.0/")
    assert readme(relative, f"{address}/", "0.2.0") == absolute


def test_no_relative_link_of_readme_is_forgotten():
    text = load("setup.py").readme((ROOT / "README.md").read_text(), "https://code.example/lgla", "0.2.0")
    outside_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r'\]\(([^)\s]+)|\b(?:src|srcset|href)="([^"]+)', outside_code)
    assert len(targets) > 30
    assert [
        link for pair in targets for link in pair if link and not link.startswith(("https://", "#"))
    ] == []
