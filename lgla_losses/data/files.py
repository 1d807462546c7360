"""Readers for the files of long-tailed image data."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lgla_losses._checks import describe, positive_int
from lgla_losses.data.arrays import array_names, read_array
from lgla_losses.data.images import ImageData, check_image_array, vision_library
from lgla_losses.data.text import read_lines

ARRAYS = ("train_images", "train_labels", "val_images", "val_labels")
PACK = ("train_jpg", "train_off", "train_y", "test_jpg", "test_off", "test_y")

#: Where to get the images that a list or a JSON file names.
IMAGE_SOURCES = (
    "ImageNet's images come from image-net.org, those of Places365 by "
    "torchvision.datasets.Places365(small=True, download=True), with split='val' too, whose folder "
    "data_256_standard you rename to data_256, those of iNaturalist by "
    "torchvision.datasets.INaturalist(version='2018', download=True), whose folder 2018 you rename to "
    "train_val2018"
)


def read_npz(path: str | os.PathLike[str]) -> dict[str, ImageData]:
    """Read the training and validation images of an ``.npz`` file.

    It has the arrays ``train_images``, uint8 ``[N, H, W, 3]`` or ``[N, H, W]``, and ``train_labels``,
    integers ``[N]``, and likewise ``val_images`` and ``val_labels``. Or it has encoded images: ``train_jpg``,
    the files one after another as uint8, ``train_off``, where each starts and the last ends, ``[N + 1]``, and
    ``train_y`` ``[N]``, and likewise ``test_...``. Images are decoded when they are used.

    Returns:
        ``{"train": ..., "val": ...}``, with the numbers of the classes as their names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, or its arrays do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected an .npz file with the arrays {', '.join(ARRAYS)} (or {', '.join(PACK)}), got "
            "none; put one there, or let torchvision download CIFAR: read_cifar(..., download=True)"
        )

    try:
        there = array_names(path)
        if there is None:
            raise ValueError("a single array")
        arrays = {name: read_array(path, name) for name in (*ARRAYS, *PACK) if name in there}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected an .npz file of plain arrays, got another ({error})") from error

    encoded = any(name in arrays for name in PACK)
    names, others = (PACK, ARRAYS) if encoded else (ARRAYS, PACK)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(
            f"{path}: expected the arrays {', '.join(names)} (or {', '.join(others)}), "
            f"got no {', '.join(missing)}"
        )

    halves = {"train": "train", "val": "test" if encoded else "val"}
    images = {half: _npz_images(path, arrays, name) for half, name in halves.items()}
    labels = {half: name + ("_y" if encoded else "_labels") for half, name in halves.items()}

    for half, name in labels.items():
        found = arrays[name]
        if found.shape != (len(images[half]),) or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(
                f"{path}: expected {name} integers [{len(images[half])}], "
                f"got {found.dtype} {list(found.shape)}"
            )

    targets = {half: arrays[name].astype(np.int64) for half, name in labels.items()}
    num_classes = int(targets["train"].max()) + 1
    met = np.union1d(targets["train"], targets["val"])
    wrong = met[(met < 0) | (met >= num_classes)].tolist()
    if wrong:
        raise ValueError(
            f"{path}: expected labels 0..{num_classes - 1} as in {labels['train']}, got {_first(wrong)}"
        )

    absent = _absent(targets["train"].tolist())
    if absent:
        raise ValueError(
            f"{path}: expected {labels['train']} of every class 0..{num_classes - 1}, "
            f"got none of {_first(absent)}"
        )

    classes = [str(j) for j in range(num_classes)]
    return {half: ImageData(images[half], targets[half], classes=classes) for half in halves}


def _npz_images(
    path: str | os.PathLike[str], arrays: dict[str, npt.NDArray[Any]], name: str
) -> npt.NDArray[np.uint8] | list[bytes]:
    if f"{name}_jpg" not in arrays:
        return check_image_array(f"{path}: {name}_images", arrays[f"{name}_images"])
    blob, offsets = arrays[f"{name}_jpg"], arrays[f"{name}_off"]
    if blob.ndim != 1 or blob.dtype != np.uint8:
        raise ValueError(f"{path}: expected {name}_jpg uint8 [bytes], got {blob.dtype} {list(blob.shape)}")
    rising = offsets.ndim == 1 and len(offsets) > 1 and np.issubdtype(offsets.dtype, np.integer)
    if (
        not rising
        or offsets[0] < 0
        or (np.diff(offsets.astype(np.int64)) <= 0).any()
        or offsets[-1] > len(blob)
    ):
        raise ValueError(
            f"{path}: expected {name}_off rising integers [N + 1] up to {len(blob)}, the length of "
            f"{name}_jpg, got {offsets.dtype} {list(offsets.shape)}"
        )
    content = blob.tobytes()
    return [content[start:end] for start, end in pairwise(offsets.tolist())]


def read_cifar(
    root: str | os.PathLike[str], num_classes: int, train: bool = True, download: bool = False
) -> ImageData:
    """Read CIFAR-10 or CIFAR-100 from the files of torchvision.

    Args:
        root: the folder that contains ``cifar-10-batches-py`` or ``cifar-100-python``.
        num_classes: 10 or 100.
        train: True for the training images, False for the test images.
        download: download missing files.

    Returns:
        The images, with the names of the classes.

    Raises:
        FileNotFoundError: the files are missing or damaged.
        ImportError: torchvision is not installed.
        ValueError: ``num_classes`` is another number.
    """
    if num_classes not in (10, 100):
        raise ValueError(f"num_classes: expected 10 or 100, got {describe(num_classes)}")
    make = getattr(vision_library("torchvision.datasets", "torchvision"), f"CIFAR{num_classes}")
    try:
        cifar = make(os.fspath(root), train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{root}: expected the whole folder {make.base_folder} in it, got none or a damaged one; unpack "
            f"{make.filename} from https://www.cs.toronto.edu/~kriz/cifar.html there, or use download=True"
        ) from error
    return ImageData(cifar.data, cifar.targets, classes=cifar.classes)


def read_list(
    list_file: str | os.PathLike[str], root: str | os.PathLike[str], num_classes: int | None = None
) -> ImageData:
    """Read the images of a list file, as published for ImageNet-LT and Places-LT, or your own.

    A line is a path and a class index; the path may contain spaces, empty lines are skipped. Images are
    not opened, but the first must exist.

    Source: Liu et al., CVPR 2019.

    Args:
        list_file: text in UTF-8 of at most 256 MiB.
        root: the folder that the paths start from.
        num_classes: number of classes, for a test list in which some may be missing; None takes those of the
            list, none missing.

    Returns:
        The images as paths, in the order of the lines.

    Raises:
        FileNotFoundError: the list, the folder or the first image is missing.
        ValueError: the file is not such a text, a line is not a path and class index, a class of ``0..C-1``
            has no line, or one is not below ``num_classes``.
    """
    list_file, root = Path(list_file), Path(root)
    if num_classes is not None:
        num_classes = positive_int("num_classes", num_classes, "give the number of classes, or None")

    if not list_file.is_file():
        raise FileNotFoundError(
            f"{list_file}: expected a list file of lines 'path label', got none; put one there from "
            "https://github.com/zhmiao/OpenLongTailRecognition-OLTR (ImageNet-LT, Places-LT), or your own; "
            f"{IMAGE_SOURCES}"
        )

    paths, labels, largest = [], [], (-1, 0)
    for number, line in enumerate(read_lines(list_file), start=1):
        if line.isspace():
            continue
        fields = line.strip().rsplit(maxsplit=1)
        # A number that int64 cannot hold is not a class index.
        if len(fields) != 2 or not fields[1].isdecimal() or len(fields[1]) > 18:
            raise ValueError(
                f"{list_file}, line {number}: expected a path and a class index >= 0, as in "
                f"'train/a.jpg 0', got {reprlib.repr(line.strip())}"
            )
        paths.append(fields[0])
        labels.append(int(fields[1]))
        largest = max(largest, (labels[-1], number))

    if not paths:
        raise ValueError(f"{list_file}: expected lines 'path label', got none")
    if num_classes is not None and largest[0] >= num_classes:
        raise ValueError(
            f"{list_file}, line {largest[1]}: expected a class index 0..{num_classes - 1}, got {largest[0]}"
        )

    absent = _absent(labels) if num_classes is None else []
    if absent:
        raise ValueError(
            f"{list_file}: expected every class 0..{largest[0]} (line {largest[1]}), got none of "
            f"{_first(absent)}; number the classes without gaps from 0"
        )

    return ImageData(_under(root, paths), labels)


def read_inaturalist(json_file: str | os.PathLike[str], root: str | os.PathLike[str]) -> ImageData:
    """Read the images of iNaturalist 2018's ``train2018.json`` or ``val2018.json``.

    Classes are numbered in the order of their category ids. Images are not opened, but the first must
    exist.

    Args:
        json_file: with ``images`` (``id``, ``file_name``), ``annotations`` (``image_id``,
            ``category_id``) and ``categories`` (``id``, ``name``).
        root: the folder that the file names start from, the one with ``train_val2018`` in it.

    Returns:
        The images as paths, in the order of the annotations, with the names of the classes.

    Raises:
        FileNotFoundError: the file, the folder or the first image is missing.
        ValueError: the file is not such a JSON file.
    """
    json_file, root = Path(json_file), Path(root)
    if not json_file.is_file():
        raise FileNotFoundError(
            f"{json_file}: expected iNaturalist's train2018.json or val2018.json, got none; put it "
            f"there from https://github.com/visipedia/inat_comp/tree/master/2018; {IMAGE_SOURCES}"
        )

    try:
        content = json.loads(json_file.read_bytes())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(one["image_id"], one["category_id"]) for one in content["annotations"]]
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        unknown = [pair for pair in pairs if pair[0] not in files or pair[1] not in names]
        categories = sorted(names)
        if not all(isinstance(file, str) for file in files.values()):
            raise TypeError("a file_name is not a string")
    except KeyError as error:
        raise ValueError(
            f"{json_file}: expected images (id, file_name), annotations (image_id, category_id) and "
            f"categories (id, name), got no key {error}; test files have no annotations"
        ) from error
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{json_file}: expected iNaturalist's JSON, got another file ({error})") from error

    if unknown or not pairs:
        got = f"image {unknown[0][0]} of category {unknown[0][1]}" if unknown else "none"
        raise ValueError(f"{json_file}: expected annotations of its images and categories, got {got}")

    label_of = {category: label for label, category in enumerate(categories)}
    return ImageData(
        _under(root, [files[image] for image, _ in pairs]),
        [label_of[category] for _, category in pairs],
        classes=[names[category] for category in categories],
    )


def _under(root: Path, paths: Sequence[str]) -> list[str]:
    """Join paths to ``root``; the first must be there."""
    whole = [os.path.join(root, path) for path in paths]
    if not os.path.isfile(whole[0]):
        what = "its images" if root.is_dir() else "the folder of the images"
        raise FileNotFoundError(
            f"{root}: expected {what}, the first at {whole[0]}, got none; put them there, or pass the root "
            f"that the paths start from; {IMAGE_SOURCES}"
        )
    return whole


def _absent(labels: Sequence[int]) -> list[int]:
    """Find classes of ``0..max`` without a label, only as many as are shown: a wrong label may be huge."""
    present = set(labels)
    return list(islice((j for j in range(max(present) + 1) if j not in present), 6))


def _first(labels: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, labels[:most])) + (", ..." if len(labels) > most else "")
