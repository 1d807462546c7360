"""Lines of text files."""

from __future__ import annotations

import io
from pathlib import Path

#: Largest text that is read, in bytes.
LARGEST = 1 << 28


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text in UTF-8, with or without a byte-order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a text, or larger than ``LARGEST``.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path}: expected text of at most {LARGEST:,} bytes, got more; save labels as .npy")
    wrong = content.find(b"\0")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = content.count(b"\n", 0, wrong) + 1
        raise ValueError(
            f"{path}, line {line}: expected text in UTF-8, got binary data; "
            "save text as UTF-8, labels as .npy or .npz"
        )
    return list(io.StringIO(text, newline=""))
