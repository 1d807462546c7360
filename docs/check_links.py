"""Check the built site: every link within it leads somewhere, and no page loads a file from elsewhere.

Sphinx's own link check needs a network.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, what it links to, and which files it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: list[str] = []
        self.files: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note anchors, links and files."""
        values = dict(attrs)
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)
                if name == "src" or (tag == "link" and values.get("rel") != "canonical"):
                    self.files.append(value)


def broken_links(site: Path) -> list[str]:
    """One line for each link that leads nowhere."""
    pages = {path: Page(path) for path in site.resolve().rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {""}
            if not target.is_file() or unquote(parts.fragment) not in anchors:
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


def outside_files(site: Path) -> list[str]:
    """One line for each script, style, font or picture that a page or a style takes from another site."""
    loaded = [(path, name) for path in site.rglob("*.html") for name in Page(path).files]
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        loaded += [(path, name) for name in re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text)]
    outside = ("http:", "https:", "//")
    return [f"{path.relative_to(site)}: {name}" for path, name in loaded if name.startswith(outside)]


if __name__ == "__main__":
    built = Path(sys.argv[1])
    checks = {"broken links:": broken_links(built), "files of other sites:": outside_files(built)}
    report = [line for title, found in checks.items() if found for line in (title, *found)]
    sys.exit("\n".join(report) if report else 0)
