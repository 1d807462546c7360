"""What pyproject.toml cannot say: the C library, the tag of its wheel, and README's links on a package index."""

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

# Optional: without a compiler the installation goes on, and the loss runs in PyTorch. -g0: Python's own flags may ask
# for debug information, which is four fifths of the file. It is not linked with an OpenMP: PyTorch brings one of its
# own, which native.py finds, and a second one would start its own threads.
LIBRARY = Extension(
    "lgla_losses.kernels._native",
    sources=["lgla_losses/kernels/native.c"],
    depends=["lgla_losses/kernels/native_rows.h"],
    extra_compile_args=["-O3", "-g0", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)

#: Link or picture of Markdown, or picture of HTML, whose target is a file of the project.
LINK = re.compile(r'(?P<before>(?P<picture>!?)\[[^\]]*\]\(|\b(?P<html>src|srcset)=")(?!\w+:|#)(?P<path>[^\s)"]+)')


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
        view = "raw" if link["picture"] or link["html"] else "blob"
        return f"{link['before']}{repository.rstrip('/')}/{view}/v{version}/{link['path']}"

    return LINK.sub(absolute, text)


def main() -> None:
    """Hand setuptools all of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = (ROOT / "lgla_losses" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"$', package, re.MULTILINE)[1]
    repository = project.get("urls", {}).get("Repository")
    # The library has run on Linux only. LGLA_LOSSES_PURE=1 builds the wheel without it, which installs everywhere.
    with_library = sys.platform == "linux" and os.environ.get("LGLA_LOSSES_PURE", "0") == "0"
    setup(
        version=version,
        long_description=readme((ROOT / "README.md").read_text(encoding="utf-8"), repository, version),
        long_description_content_type="text/markdown",
        ext_modules=[LIBRARY] if with_library else [],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
    )


if __name__ == "__main__":
    main()
