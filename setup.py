"""What pyproject.toml cannot say: the C library, the tag of its wheel, README's links on a package index."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# Optional: without a compiler the installation goes on, and the loss runs in PyTorch. -g0: Python's own flags
# may ask for debug information, which is four fifths of the file. The library is not linked with OpenMP: it
# uses the one that PyTorch has loaded (native.py), because a second one would start threads of its own.
LIBRARY = Extension(
    "lgla_losses.kernels._native",
    sources=["lgla_losses/kernels/native.c"],
    depends=["lgla_losses/kernels/native_rows.h"],
    extra_compile_args=["-O3", "-g0", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
    libraries=["m"],
    optional=True,
)

#: A block of code, or a link whose target is a file of the project: in Markdown, or a picture in HTML.
LINK = re.compile(
    r"^```.*?^```|"
    r'(?P<before>(?P<picture>!\[[^\]]*)?\]\(|(?P<html>\bsrc(set)?="))(?!\w+:|#)(?P<path>[^\s)"]+)',
    re.MULTILINE | re.DOTALL,
)


class BuildLibrary(build_ext):
    """Compile the C library under a name without a Python version: ctypes loads it, in any Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file ``_native.so``."""
        return os.path.join(*fullname.split(".")) + ".so"


class BuildWheel(bdist_wheel):
    """Build a wheel that serves every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Keep the platform of the tag alone."""
        return "py3", "none", super().get_tag()[2]


def readme(text: str, repository: str | None, version: str) -> str:
    """Make the links of README absolute, for an index that shows it without the files beside it.

    Without the address of a repository they stay as they are.
    """
    if repository is None:
        return text

    def absolute(link: re.Match[str]) -> str:
        if not link["path"]:
            return link[0]
        view = "raw" if link["picture"] or link["html"] else "blob"
        return f"{link['before']}{repository.rstrip('/')}/{view}/v{version}/{link['path']}"

    return LINK.sub(absolute, text)


def main() -> None:
    """Hand setuptools all of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = (ROOT / "lgla_losses" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"$', package, re.MULTILINE)[1]
    repository = project.get("urls", {}).get("Repository")
    # The library is tested on Linux only. LGLA_LOSSES_PURE=1 leaves it out, for the wheel of other systems.
    pure = os.environ.get("LGLA_LOSSES_PURE", "") not in ("", "0")
    setup(
        version=version,
        long_description=readme((ROOT / "README.md").read_text(encoding="utf-8"), repository, version),
        long_description_content_type="text/markdown",
        ext_modules=[LIBRARY] if sys.platform == "linux" and not pure else [],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
    )


if __name__ == "__main__":
    main()
