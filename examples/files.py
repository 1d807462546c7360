# Needs: cli.py.
"""Files of the scripts: check them before work starts, and write them whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from cli import InputError, library


def kind_of(path: Path) -> str:
    """Describe what is at a path, for the "got" part of an error."""
    kinds = {"a folder": os.path.isdir, "a file": os.path.isfile, "a pipe or device": os.path.exists}
    return next((kind for kind, is_one in kinds.items() if is_one(path)), "nothing")


def check_output(option: str, path: Path, *, folder: bool = False) -> None:
    """Refuse, before any work, a file or folder that cannot be written; leave nothing behind.

    A folder and its parents may be missing; the folder of a file must exist.
    """
    got = kind_of(path)
    what = f"the {got.split(maxsplit=1)[-1]} {path}"
    if got not in ("a folder" if folder else "a file", "nothing"):
        raise InputError(f"{option}: expected a {'folder' if folder else 'file'}, got {what}")
    place = path if folder else path.parent
    if not folder and not os.path.isdir(place):
        raise InputError(f"{option}: there is no folder {place}; make it first")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # a name may be too long
        if got == "a file":
            path.open("ab").close()  # some files are not writable
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place) as trial:
            trial.write(bytes(4096))  # a full disk still makes empty files
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be written ({error.strerror}); choose another") from error


def check_log_dir(folder: Path, name: str, resume: bool) -> None:
    """Refuse a folder of another run, an unwritable one, and --resume without a checkpoint."""
    last = folder / name
    check_output("--log-dir", folder, folder=True)
    if resume and not last.is_file():
        raise InputError(f"--resume: there is no {last}; leave out --resume to start a run")
    if not resume and os.path.lexists(last):
        raise InputError(
            f"--log-dir: {last} belongs to an earlier run; add --resume to continue it, or choose another "
            "folder"
        )


def make_folder(option: str, path: Path) -> None:
    """Make the folder and its parents, if they are missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be made ({error.strerror}); choose another") from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all, even if the process or the machine stops or the disk is full."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or the new name could outlive a power cut and the content not
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        # torch.save hides the reason behind its own error.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(
            f"{path}: cannot be written ({reason}); the earlier file is kept, and nothing half-written is "
            "left"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_plain(path: Path) -> Any:
    """Load a file of torch.save or safetensors that holds only tensors and plain values."""
    expected = f"{path}: expected tensors of torch.save or safetensors, got"
    if not path.is_file():
        raise InputError(f"{expected} {kind_of(path)}")
    load: Callable[[Path], Any] = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        load = library("safetensors.torch", "vision").load_file
    try:
        return load(path)
    except Exception as error:  # any kind: there are many readers
        reason = re.split(r"\. |\n", str(error))[0]
        raise InputError(f"{expected} another file ({type(error).__name__}: {reason})") from error
