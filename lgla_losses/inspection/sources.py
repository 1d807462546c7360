"""Class counts from a text, CSV or JSON file, an array of labels or a folder of images."""

from __future__ import annotations

import json
import os
import re
import reprlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lgla_losses._checks import describe, one_of
from lgla_losses.data.arrays import array_names, read_array
from lgla_losses.inspection import _entries as entries
from lgla_losses.inspection._csv import read_csv
from lgla_losses.inspection._entries import Found, SourceError


class Kind(StrEnum):
    """Name the kinds of sources."""

    TEXT = "text"
    CSV = "csv"
    JSON = "json"
    LABELS = "labels"
    IMAGES = "images"


@dataclass(frozen=True)
class ClassCounts:
    """Hold the samples per class, zeros included, and how they were found."""

    counts: list[int]
    names: list[str] | None
    kind: Kind
    description: str

    @property
    def positive(self) -> list[int]:
        """Leave out classes without samples, as the losses expect."""
        return [count for count in self.counts if count > 0]


#: The kind of a file by its ending.
KINDS = {
    ".csv": Kind.CSV, ".tsv": Kind.CSV, ".json": Kind.JSON, ".npy": Kind.LABELS, ".npz": Kind.LABELS
}  # fmt: skip

#: Endings of the images in a folder.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: Arrays of an .npz that are the labels if none is named.
LABEL_KEYS = ("train_labels", "train_y")

JSON_WAY_OUT = "give a list of counts or a mapping of names to counts"

#: A value of a JSON text, or the bracket that opens one.
JSON_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[^\[\]{}",:\s]+')


def read_class_counts(
    source: str | os.PathLike[str],
    kind: str | None = None,
    *,
    key: str | None = None,
    count_column: str | None = None,
    name_column: str | None = None,
    label_column: str | None = None,
) -> ClassCounts:
    """Read class counts.

    Args:
        source: a text file with one count per line (``#`` begins a comment); a CSV file with a row for each
            class, a column of counts and perhaps one of names; a CSV file with a row for each sample and a
            column of labels; a JSON list of counts or mapping of names to counts; an ``.npy`` or ``.npz``
            file of integer labels; a folder with a folder of images for each class, or with ``train/`` that
            holds them.
        kind: ``"text"``, ``"csv"``, ``"json"``, ``"labels"`` or ``"images"``; None tells by the ending and
            the content.
        key: the array of labels in an ``.npz``; None takes ``train_labels``, ``train_y`` or the only array.
        count_column: heading of the counts in a CSV file, or its number from 1; None finds it.
        name_column: heading of the names, or its number from 1; None finds it if there is one.
        label_column: heading of the labels in a CSV file of samples, or its number from 1. Whole numbers are
            classes counted from 0; other labels are the names of classes, in sorted order.

    Returns:
        The counts, with names if the source has them.

    Raises:
        SourceError: a ``ValueError`` that gives the file, the line, what was expected, what was found and the
            way out.
        TypeError: ``source`` is no path, or ``kind`` no text.
        ValueError: ``kind`` is another word.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a path, got {describe(source)}; give counts to LGLALoss directly")
    path = Path(source)
    if kind is not None:
        kind = one_of("kind", kind, [str(one) for one in Kind])
    columns = {"count_column": count_column, "name_column": name_column, "label_column": label_column}

    try:
        found = detect_kind(path) if kind is None else Kind(kind)
        _check_options(path, found, key=key, **columns)
        match found:
            case Kind.TEXT:
                read = _read_text(path)
            case Kind.CSV:
                read = read_csv(path, **columns)
            case Kind.JSON:
                read = _read_json(path)
            case Kind.LABELS:
                read = _read_labels(path, key)
            case Kind.IMAGES:
                read = _read_images(path)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path}: expected a file or folder that can be read, got "
            f"{error.strerror or error}; check the path and its permissions"
        ) from error
    counts, names, description = read
    return ClassCounts(counts, names, found, description)


def detect_kind(path: Path) -> Kind:
    """Find the kind of a source by its ending, else by its content.

    Raises:
        OSError: there is no such file, or it cannot be read.
        SourceError: it is a pipe or device.
    """
    if path.is_dir():
        return Kind.IMAGES
    if path.exists() and not path.is_file():
        raise SourceError(
            f"{path}: expected a file or folder, got a pipe or device, which can be read only once; give "
            "its kind by --kind"
        )
    if path.suffix.lower() in KINDS:
        return KINDS[path.suffix.lower()]

    with path.open("rb") as file:
        begin = file.read(1 << 16)
    if begin.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return Kind.LABELS

    lines = (line.split(b"#")[0].strip() for line in begin.removeprefix(b"\xef\xbb\xbf").splitlines())
    first = next(filter(None, lines), b"")
    if first.startswith((b"[", b"{")):
        return Kind.JSON
    return Kind.CSV if any(mark in first for mark in (b",", b"\t", b";")) else Kind.TEXT


def _check_options(path: Path, kind: Kind, **options: str | None) -> None:
    """Refuse options of another kind: they show a misunderstanding."""
    for name, value in options.items():
        of_kind, option = Kind.LABELS if name == "key" else Kind.CSV, name.replace("_", "-")
        if not isinstance(value, str | None):
            raise TypeError(f"{name}: expected a text or None, got {describe(value)}")
        if value is not None and kind != of_kind:
            raise SourceError(
                f"{path}: expected a source of kind {of_kind} with {option}={value!r}, got one of kind "
                f"{kind}; leave {option} out, or say kind={of_kind}"
            )


def _read_text(path: Path) -> Found:
    contents = (line.partition("#")[0].strip() for line in entries.text_lines(path))
    cells = {line: content for line, content in enumerate(contents, start=1) if content}
    if not cells:
        raise SourceError(f"{path}: expected class counts, one per line, got an empty file")

    counts = entries.whole_numbers(
        path,
        list(cells.values()),
        lambda entry: f"line {list(cells)[entry]}",
        "write one count per line; # begins a comment; names with counts go into a CSV file",
    )
    return counts, None, "a text file of class counts, one per line"


def _read_json(path: Path) -> Found:
    text = "".join(entries.text_lines(path))
    content = _parse_json(path, text)
    is_mapping = isinstance(content, tuple)

    def where(entry: int) -> str:
        # The first value is the whole; in a mapping names stand between.
        starts = [value.start() for value in JSON_VALUE.finditer(text)]
        before = text[: starts[(entry + 1) * (1 + is_mapping)]]
        return f"line {before.count(chr(10)) + 1}, entry {entry + 1}"

    values = [value for _, value in content] if is_mapping else content
    counts = entries.whole_numbers(path, values, where, JSON_WAY_OUT)
    if not is_mapping:
        return counts, None, "a JSON list of class counts"

    names = [name for name, _ in content]
    entries.check_unique(path, names, where, "add the counts up")
    order = entries.class_order(names)
    if order:
        counts, names = [counts[entry] for entry in order], [names[entry] for entry in order]
    return counts, names, f"a JSON mapping of class {'numbers' if order else 'names'} to counts"


def _parse_json(path: Path, text: str) -> Any:
    """Parse a list, or a mapping as a tuple of pairs, which keeps a name that stands twice."""
    if not text.strip():
        raise SourceError(f"{path}: expected a JSON list or mapping of counts, got an empty file")
    try:
        content = json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"{path}, line {error.lineno}: expected JSON, got {error.msg}; {JSON_WAY_OUT}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path}: expected JSON, got what cannot be read ({error}); {JSON_WAY_OUT}"
        ) from error

    if not isinstance(content, list | tuple) or not content:
        got = "an empty one" if content in ([], ()) else reprlib.repr(content)
        raise SourceError(f"{path}: expected a JSON list or mapping of counts, got {got}; {JSON_WAY_OUT}")
    return content


def _read_labels(path: Path, key: str | None) -> Found:
    key, labels = _label_array(path, key)
    described = f"{path}" if key is None else f"{path}, array {key!r}"
    if not np.issubdtype(labels.dtype, np.integer):
        raise SourceError(
            f"{described}: expected integer labels, got {labels.dtype}; number the classes, as by "
            "np.unique(labels, return_inverse=True)[1]; class counts go into a text file, one per line"
        )
    if labels.ndim != 1 or labels.size == 0:
        raise SourceError(
            f"{described}: expected labels of shape [N], got {list(labels.shape)}; flatten them, or take "
            "the argmax(axis=1) of one-hot rows"
        )

    counts = entries.count_labels(described, labels, lambda position: f"position {position}")
    what = "an array of labels" if key is None else f"the labels in the array {key!r}"
    return counts, None, what


def _label_array(path: Path, key: str | None) -> tuple[str | None, npt.NDArray[Any]]:
    """Read the labels of an .npz with their name in it, or those of an .npy without a name."""
    try:
        keys = array_names(path)
        if keys is not None:
            key = _label_key(path, keys, key)
        elif key is not None:
            raise SourceError(f"{path}: expected an .npz file with --key {key}, got a single array")
        return key, read_array(path, key)
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(
            f"{path}: expected an array of labels, got another file or a damaged one ({error}); "
            "save integer labels [N] by np.save or np.savez"
        ) from error


def _label_key(path: Path, keys: list[str], key: str | None) -> str:
    wanted = LABEL_KEYS if key is None else (key,)
    for name in wanted:
        if name in keys:
            return name
    if key is None and len(keys) == 1:
        return keys[0]
    raise SourceError(
        f"{path}: expected an array {' or '.join(map(repr, wanted))}, got "
        f"{', '.join(map(repr, keys)) or 'none'}; name the array of the labels by --key"
    )


def _read_images(root: Path) -> Found:
    if root.is_file():
        raise SourceError(f"{root}: expected a folder with a folder of images for each class, got a file")
    # A class may be called train too: its folder holds images, not folders.
    train = root / "train"
    folder = train if train.is_dir() and _class_folders(train) else root

    classes = _class_folders(folder)
    counts = [_count_images(one) for one in classes]
    if not any(counts):
        raise SourceError(
            f"{folder}: expected a folder of images ({', '.join(IMAGE_SUFFIXES)}) for each class, got "
            f"{len(classes)} folders without images; give the folder that holds the folders of the classes, "
            "or the one with train/ in it"
        )
    what = "a folder of images, a folder for each class" + (", in train/" if folder == train else "")
    return counts, [one.name for one in classes], what


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _count_images(folder: str | Path) -> int:
    """Count the images in a folder and in the folders inside it."""
    with os.scandir(folder) as inside:
        return sum(
            _count_images(one.path) if one.is_dir(follow_symlinks=False) else _is_image(one) for one in inside
        )


def _is_image(one: os.DirEntry[str]) -> bool:
    is_named = one.name.lower().endswith(IMAGE_SUFFIXES) and not one.name.startswith(".")
    return is_named and one.is_file()  # and no pipe or broken link
