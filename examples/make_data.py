# Needs: cli.py, files.py, quickstart.py.
"""Make real long-tailed data sets from data on this machine, without downloads.

digits: scikit-learn's handwritten digits. fashion-mnist: the four .gz files of Fashion-MNIST, in Debian's
package dataset-fashion-mnist. docstrings: docstrings of Python's standard library, labelled by package.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import io
import sysconfig
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cli import InputError, Parser, library, number, start
from files import check_output, write_whole

from lgla_losses.data import long_tailed_counts

#: Debian's package dataset-fashion-mnist puts the files here.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

#: Every third of the packages with at least this many docstrings, ranked by their number: the tail keeps its
#: shape.
FEWEST_DOCSTRINGS, EVERY = 10, 3

#: Not installed everywhere, or not part of the library itself.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


def long_tail(largest: int, imbalance: float, num_classes: int) -> list[int]:
    """Exponentially falling counts; class 0 is the largest."""
    counts: list[int] = long_tailed_counts(largest, num_classes, imbalance).tolist()
    return counts


def digits(options: argparse.Namespace) -> None:
    """The demo's long-tailed training set and balanced test set."""
    write_images(options.output, *long_tailed_digits(options.imbalance, options.seed))


def long_tailed_digits(imbalance: float, seed: int) -> tuple[npt.NDArray[np.uint8], ...]:
    """Images ``[N, 8, 8]`` and labels ``[N]`` for training, then for validation."""
    quickstart = library("quickstart", "examples")
    split = quickstart.long_tailed_digits(imbalance, seed, "cpu")
    train, val = (
        (255 * tensor[:, 0]).round().byte().numpy() for tensor in (split.train_images, split.test_images)
    )
    return train, split.train_labels.numpy(), val, split.test_labels.numpy()


def fashion_mnist(options: argparse.Namespace) -> None:
    """A long-tailed part of the training images, and a balanced part of the test images."""
    train_images, train_labels, val_images, val_labels = (
        read_idx(options.source / f"{part}-{kind}-ubyte.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
    generator = np.random.default_rng(options.seed)
    train = draw("--largest", train_labels, long_tail(options.largest, options.imbalance, 10), generator)
    val = draw("--validation", val_labels, [options.validation] * 10, generator)
    write_images(options.output, train_images[train], train_labels[train], val_images[val], val_labels[val])


def draw(
    option: str, labels: npt.NDArray[np.uint8], class_counts: list[int], generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw the indices of the allowed number of samples of every class."""
    classes = enumerate(class_counts)
    there = np.bincount(labels, minlength=len(class_counts))
    for j, n in enumerate(class_counts):
        if n > there[j]:
            raise InputError(f"{option}: expected at most {there[j]}, all images of class {j}, got {n}")
    return np.concatenate([generator.permutation(np.flatnonzero(labels == j))[:n] for j, n in classes])


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an array of bytes in MNIST's format: its dimensions, then the values."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; apt install dataset-fashion-mnist, or pass --source")
    try:
        content = gzip.decompress(path.read_bytes())
        num_dimensions = content[3]
        shape = np.frombuffer(content, ">i4", num_dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError) as error:
        raise InputError(f"{path}: expected gzipped bytes in MNIST's format, got others ({error})") from error


def write_images(
    path: Path,
    train_images: npt.NDArray[np.uint8],
    train_labels: npt.NDArray[np.integer],
    val_images: npt.NDArray[np.uint8],
    val_labels: npt.NDArray[np.integer],
) -> None:
    """Write the file that train_images.py reads."""
    arrays: dict[str, Any] = {
        "train_images": train_images,
        "train_labels": train_labels,
        "val_images": val_images,
        "val_labels": val_labels,
    }
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))
    print(f"{path}: training images by class {np.bincount(train_labels)}, {len(val_labels)} for validation")


def docstrings(options: argparse.Namespace) -> None:
    """Write docstrings of functions and classes, with their packages."""
    package_of = standard_docstrings()
    by_frequency = sorted(Counter(package_of.values()).items(), key=lambda item: (-item[1], item[0]))
    chosen = {package: n for package, n in by_frequency[::EVERY] if n >= FEWEST_DOCSTRINGS}
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["text", "label"])
    table.writerows(row for row in package_of.items() if row[1] in chosen)
    write_whole(options.output, lambda file: file.write(text.getvalue().encode()))
    print(f"{options.output}: texts by package {chosen}")


def standard_docstrings() -> dict[str, str]:
    """The package of every docstring of the standard library; the first of equal ones."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.isdisjoint(parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found.setdefault(ast.get_docstring(node) or "", parts[0].removesuffix(".py"))
    found.pop("", None)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Make one data set."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for make, output in ((digits, "OUT.npz"), (fashion_mnist, "OUT.npz"), (docstrings, "OUT.csv")):
        kind = kinds.add_parser(
            make.__name__.replace("_", "-"), help=make.__doc__, formatter_class=parser.formatter_class
        )
        kind.set_defaults(make=make)
        kind.add_argument("output", type=Path, metavar=output, help="the file to write")
        if make is not docstrings:
            kind.add_argument(
                "--imbalance", type=number(float, 1), default=100.0, help="largest / smallest class"
            )
            kind.add_argument("--seed", type=number(int, 0), default=0, help="seed of the choice of images")
        if make is fashion_mnist:
            kind.add_argument("--largest", type=number(int, 1), default=6000, help="images of class 0")
            kind.add_argument("--validation", type=number(int, 1), default=1000, help="images per class")
            kind.add_argument("--source", type=Path, default=DEBIAN, help="folder with the four .gz files")
    options = parser.parse_args(arguments)
    try:
        check_output("output", options.output)
        options.make(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main)
