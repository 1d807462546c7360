"""How the benchmarks keep what they measured, whatever happens next."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def rounded(value: Any, digits: int) -> Any:
    """Round all numbers of a value that a record holds."""
    if isinstance(value, dict):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner, digits) for inner in value]
    return round(value, digits) if isinstance(value, float) else value


def unit_file(what: Iterable[object], how: object) -> str:
    """Name the file of a unit of work; what is made in another way has another name."""
    name = "_".join(map(str, what)).replace(" ", "-")
    return f"{name}_{zlib.crc32(repr(how).encode()):08x}.json"


def leave_on_sigterm() -> None:
    """Have SIGTERM end this process by way of every ``finally``, undisturbed by a second one."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)
