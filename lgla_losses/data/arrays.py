"""Arrays in NumPy's files; their sizes are checked before they are read.

A file of a few megabytes may claim to hold terabytes, or may hold gigabytes of zeros.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

#: Bytes that an array may always take when unpacked; a larger one at most this many times its packed size.
ALWAYS_UNPACKED = 1 << 28
MOST_UNPACKED = 100

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def array_names(path: Path) -> list[str] | None:
    """List the arrays of an ``.npz`` file; None for an ``.npy`` file, which has one unnamed array.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is another kind of file, or damaged.
    """
    with _opened(path) as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            return None
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def read_array(path: Path, name: str | None = None) -> npt.NDArray[Any]:
    """Read an array of an ``.npz`` file, or the array of an ``.npy`` file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is another kind of file, or damaged, encrypted or compressed too much; or the array
            holds objects.
    """
    with _opened(path) as file:
        size = path.stat().st_size
        if name is None:
            return _read(file, size)
        with zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{name}.npy")
            most = max(ALWAYS_UNPACKED, MOST_UNPACKED * min(member.compress_size, size))
            if member.file_size > most:
                raise ValueError(
                    f"{name} takes {member.file_size:,} bytes, compressed to {member.compress_size:,}; "
                    "np.savez does not compress"
                )
            with archive.open(member) as unpacked:
                return _read(unpacked, member.file_size)


def _read(file: IO[bytes], size: int) -> npt.NDArray[Any]:
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"its format is {version}; np.save writes plain arrays in another format")
    shape, _, dtype = HEADERS[version](file)
    claimed, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    # Objects are pickled and take another number of bytes; NumPy refuses them.
    if claimed > held and not dtype.hasobject:
        raise ValueError(f"an array of shape {list(shape)} takes {claimed:,} bytes, but there are {held:,}")
    file.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it is a pipe or device, which can be read only once")
    with path.open("rb") as file:
        try:
            yield file
        except Exception as error:
            # No list names all errors that a damaged file raises in zipfile, its decompressors and NumPy.
            if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno):
                raise
            raise ValueError(str(error) or type(error).__name__) from error
