"""Long-tailed data sets: how many samples a class keeps, which ones, and the files they come in.

Only what opens images needs more than PyTorch: ``pip install "lgla-losses[vision]"``.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lgla_losses.checks import describe, finite_float, one_of, positive_int
from lgla_losses.counts import ArrayLike, as_class_counts, count_classes, label_array, to_numpy

__all__ = [
    "ImageData",
    "long_tailed_counts",
    "long_tailed_indices",
    "read_cifar",
    "read_image",
    "read_inaturalist",
    "read_list",
    "read_npz",
]

#: An image: encoded, in a file, or decoded as uint8 ``[H, W, 3]`` or ``[H, W]``.
Image: TypeAlias = "bytes | str | os.PathLike[str] | npt.NDArray[np.uint8]"

ARRAYS = ("train_images", "train_labels", "val_images", "val_labels")
PACK = ("train_jpg", "train_off", "train_y", "test_jpg", "test_off", "test_y")

#: Where the images come from that a list or a JSON file names.
IMAGE_SOURCES = (
    "ImageNet's images come from image-net.org, those of Places365 by "
    "torchvision.datasets.Places365(download=True), those of iNaturalist by "
    "torchvision.datasets.INaturalist(download=True)"
)


def long_tailed_counts(n_max: int, num_classes: int, imbalance_factor: float, kind: str = "exp") -> Tensor:
    r"""Samples per class of a long-tailed data set; class 0 is the largest.

    ``"exp"``: :math:`n_j = \lfloor n_{max} \, IF^{-j / (C - 1)} \rfloor`. ``"step"``: the first half of
    the classes keeps :math:`n_{max}`, the second :math:`\lfloor n_{max} / IF \rfloor`. At least 1 each.

    Source: Cui et al., CVPR 2019 (``"exp"``); Cao et al., NeurIPS 2019 (both). Rounded as their code does.

    Args:
        n_max: samples of the largest class: 500 for CIFAR-100, 5000 for CIFAR-10.
        num_classes: number of classes ``C``.
        imbalance_factor: largest class over smallest, at least 1.
        kind: ``"exp"`` or ``"step"``.

    Returns:
        int64 ``[C]``.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of its range, or ``kind`` is another word.

    Example:
        >>> long_tailed_counts(500, num_classes=5, imbalance_factor=100)
        tensor([500, 158,  50,  15,   5])
    """
    n_max = positive_int("n_max", n_max, "give the samples of the largest class")
    num_classes = positive_int("num_classes", num_classes, "give the number of classes")
    expected = "a finite number >= 1, the largest class over the smallest"
    factor = finite_float("imbalance_factor", imbalance_factor, low=1.0, high=math.inf, expected=expected)
    if one_of("kind", kind, ("exp", "step")) == "exp":
        # The same arithmetic as in the published code: 1 / IF first, or a count could round to its neighbour.
        counts = [int(n_max * (1 / factor) ** (j / max(1.0, num_classes - 1.0))) for j in range(num_classes)]
    else:
        head = (num_classes + 1) // 2
        counts = [n_max] * head + [int(n_max / factor)] * (num_classes - head)
    return torch.tensor(counts).clamp_min(1)


def long_tailed_indices(labels: ArrayLike | Dataset[Any], counts: ArrayLike, seed: int = 0) -> Tensor:
    """The samples of a long-tailed subset: for equal seeds those of the conventional CIFAR-LT.

    One legacy NumPy generator shuffles the samples of class 0, of class 1, and so on; of each class the
    first are taken. The global NumPy generator is left alone.

    Source: the code of Cao et al., NeurIPS 2019, which seeds with 0.

    Args:
        labels: what :func:`~lgla_losses.count_classes` takes.
        counts: samples to take of every class, positive integers ``[C]``.
        seed: 0 to 2**32 - 1.

    Returns:
        Indices of samples, int64, class by class.

    Raises:
        TypeError: labels or counts are not integers.
        ValueError: a label lies outside ``0..C-1``, or a class has too few samples.

    Example:
        >>> long_tailed_indices([1, 0, 0, 1], counts=[2, 1])
        tensor([2, 1, 0])
    """
    wanted = as_class_counts(counts)
    if wanted.is_floating_point():
        raise TypeError("counts: expected integers, got floats; long_tailed_counts makes such ones")
    held = count_classes(labels, len(wanted))
    short = (held < wanted).nonzero().flatten().tolist()
    if short:
        j = short[0]
        raise ValueError(
            f"counts: expected at most as many as there are, got {wanted[j]} for class {j}, "
            f"which has {held[j]} ({len(short)} such of {len(wanted)}); lower n_max of long_tailed_counts"
        )
    array = label_array(labels)
    generator = np.random.RandomState(seed)
    chosen = []
    for j, count in enumerate(wanted.tolist()):
        index = np.flatnonzero(array == j)
        generator.shuffle(index)
        chosen.append(index[:count])
    return torch.from_numpy(np.concatenate(chosen).astype(np.int64))


class ImageData(Dataset[tuple[Any, int]]):
    """Images and their classes; an image is decoded when it is asked for.

    Args:
        images: uint8 ``[N, H, W, 3]`` or ``[N, H, W]``, or a sequence of encoded images (``bytes``),
            of paths, or of arrays.
        targets: class indices ``[N]``.
        transform: what is made of each image, a PIL image in RGB; None leaves it as it is.
        classes: names of the classes.

    Attributes:
        images: as given.
        targets: list of ints.
        transform: may be replaced.
        classes: list of names, or None.

    Raises:
        TypeError: images or targets are of another type.
        ValueError: shapes do not fit, or a class is negative or has no name.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8] | Sequence[Image],
        targets: ArrayLike,
        transform: Callable[[Any], Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if isinstance(images, np.ndarray):
            _check_array("images", images)
        elif not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise TypeError(
                f"images: expected an array, or a sequence of bytes or paths, got {describe(images)}; "
                "list(images) makes one"
            )
        array = label_array(targets)
        if array.shape != (len(images),):
            raise ValueError(
                f"targets: expected one class index for each of {len(images)} images, got shape "
                f"{list(array.shape)}"
            )
        if array.size:
            # Refuses floats, negative indices and those without a name.
            count_classes(array, len(classes) if classes else int(array.max(initial=0)) + 1)
        self.images = images
        self.targets: list[int] = array.tolist()
        self.transform = transform
        self.classes = None if classes is None else list(classes)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = read_image(self.images[index])
        return image if self.transform is None else self.transform(image), self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: ArrayLike) -> ImageData:
        """Some of the samples, in the order of ``indices`` ``[M]``; the images are shared, not copied."""
        array = to_numpy("indices", indices)
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(
                f"indices: expected integers, got {array.dtype}; np.flatnonzero(mask) makes such ones"
            )
        chosen = array.tolist()
        targets = [self.targets[i] for i in chosen]
        return ImageData([self.images[i] for i in chosen], targets, self.transform, self.classes)


def read_image(image: Image) -> Any:
    """An image in RGB.

    Args:
        image: encoded as ``bytes``, a path, or uint8 ``[H, W, 3]`` or ``[H, W]``. Of 16 bits the
            upper 8 are kept.

    Returns:
        A ``PIL.Image.Image``.

    Raises:
        ImportError: Pillow is not installed.
        TypeError: ``image`` is something else.
    """
    pil = _library("PIL.Image")
    if isinstance(image, np.ndarray):
        return pil.fromarray(image).convert("RGB")
    if not isinstance(image, bytes | str | os.PathLike):
        raise TypeError(f"image: expected bytes, a path or a uint8 array, got {describe(image)}")
    with pil.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        if opened.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
            return pil.fromarray((np.asarray(opened) / 257).astype(np.uint8)).convert("RGB")
        return opened.convert("RGB")


def read_npz(path: str | os.PathLike[str]) -> dict[str, ImageData]:
    """Training and validation images of an ``.npz`` file.

    It has the arrays ``train_images``, uint8 ``[N, H, W, 3]`` or ``[N, H, W]``, and ``train_labels``,
    integers ``[N]``, and ``val_images`` and ``val_labels`` alike; or encoded images: ``train_jpg``, the files
    one after another as uint8, ``train_off``, where each begins and the last ends, ``[N + 1]``, and
    ``train_y`` ``[N]``, and ``test_...`` alike. Encoded images stay so until they are asked for.

    Returns:
        ``{"train": ..., "val": ...}``, with the numbers of the classes as their names.

    Raises:
        ValueError: the file is another, or its arrays do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*ARRAYS, *PACK) if name in file}
    except (OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
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
    present = np.unique(targets["train"])
    num_classes = int(present[-1]) + 1
    met = np.union1d(present, targets["val"])
    wrong = met[(met < 0) | (met >= num_classes)].tolist()
    if wrong:
        raise ValueError(
            f"{path}: expected labels 0..{num_classes - 1} as in {labels['train']}, got {_first(wrong)}"
        )
    if len(present) < num_classes:
        absent = np.setdiff1d(np.arange(num_classes), present).tolist()
        raise ValueError(
            f"{path}: expected {labels['train']} of every class 0..{num_classes - 1}, "
            f"got none of {_first(absent)}"
        )
    classes = [str(j) for j in range(num_classes)]
    return {half: ImageData(images[half], targets[half], classes=classes) for half in halves}


def _check_array(name: str, images: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if not grey_or_rgb or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(
            f"{name}: expected uint8 [N, H, W, 3] or [N, H, W], got {images.dtype} {list(images.shape)}"
        )
    return images


def _npz_images(
    path: str | os.PathLike[str], arrays: dict[str, npt.NDArray[Any]], name: str
) -> npt.NDArray[np.uint8] | list[bytes]:
    if f"{name}_jpg" not in arrays:
        return _check_array(f"{path}: {name}_images", arrays[f"{name}_images"])
    blob, offsets = arrays[f"{name}_jpg"], arrays[f"{name}_off"]
    if blob.ndim != 1 or blob.dtype != np.uint8:
        raise ValueError(f"{path}: expected {name}_jpg uint8 [bytes], got {blob.dtype} {list(blob.shape)}")
    rising = offsets.ndim == 1 and len(offsets) > 1 and np.issubdtype(offsets.dtype, np.integer)
    if not rising or offsets[0] < 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > len(blob):
        raise ValueError(
            f"{path}: expected {name}_off rising integers [N + 1] up to {len(blob)}, the length of "
            f"{name}_jpg, got {offsets.dtype} {list(offsets.shape)}"
        )
    content = blob.tobytes()
    return [content[start:end] for start, end in pairwise(offsets.tolist())]


def read_cifar(
    root: str | os.PathLike[str], num_classes: int, train: bool = True, download: bool = False
) -> ImageData:
    """CIFAR-10 or CIFAR-100 as torchvision keeps them.

    Args:
        root: the folder that has ``cifar-10-batches-py`` or ``cifar-100-python`` in it.
        num_classes: 10 or 100.
        train: the training images, or the test images.
        download: get what is missing.

    Returns:
        The images, with the names of the classes.

    Raises:
        FileNotFoundError: the files are missing or damaged.
        ImportError: torchvision is not installed.
        ValueError: ``num_classes`` is another number.
    """
    if num_classes not in (10, 100):
        raise ValueError(f"num_classes: expected 10 or 100, got {describe(num_classes)}")
    make = getattr(_library("torchvision.datasets"), f"CIFAR{num_classes}")
    try:
        cifar = make(os.fspath(root), train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{root}: expected the whole folder {make.base_folder} in it, got none or a damaged one; unpack "
            f"{make.filename} from https://www.cs.toronto.edu/~kriz/cifar.html there, or use download=True"
        ) from error
    return ImageData(cifar.data, cifar.targets, classes=cifar.classes)


def read_list(list_file: str | os.PathLike[str], root: str | os.PathLike[str]) -> ImageData:
    """The images of a list file, as published for ImageNet-LT, Places-LT and iNaturalist.

    A line is a path and a class index; the path may contain spaces, empty lines are skipped. Images are
    not opened, but the first must exist.

    Source of the lists: Liu et al., CVPR 2019.

    Args:
        list_file: text in UTF-8.
        root: the folder that the paths start from.

    Returns:
        The images as paths, in the order of the lines.

    Raises:
        FileNotFoundError: the list, the folder or the first image is missing.
        ValueError: a line is no path and class index, or a class of ``0..C-1`` has no line.
    """
    list_file, root = Path(list_file), Path(root)
    if not list_file.is_file():
        raise FileNotFoundError(
            f"{list_file}: expected a list file of lines 'path label', got none; put there those of "
            "https://github.com/zhmiao/OpenLongTailRecognition-OLTR (ImageNet-LT, Places-LT), or your own; "
            f"{IMAGE_SOURCES}"
        )
    paths, labels = [], []
    with list_file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            fields = line.strip().rsplit(maxsplit=1)
            if len(fields) != 2 or not fields[1].isdecimal():
                raise ValueError(
                    f"{list_file}, line {number}: expected a path and a class index >= 0, as in "
                    f"'train/a.jpg 0', got {line.strip()!r}"
                )
            paths.append(fields[0])
            labels.append(int(fields[1]))
    absent = sorted(set(range(max(labels, default=0) + 1)).difference(labels))
    if absent:
        raise ValueError(
            f"{list_file}: expected every class 0..{max(labels, default=0)}, got none of {_first(absent)}; "
            "number the classes without gaps from 0"
        )
    return ImageData(_under(root, paths), labels)


def read_inaturalist(json_file: str | os.PathLike[str], root: str | os.PathLike[str]) -> ImageData:
    """The images of iNaturalist 2018's ``train2018.json`` or ``val2018.json``.

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
        ValueError: the file is no such JSON.
    """
    json_file, root = Path(json_file), Path(root)
    if not json_file.is_file():
        raise FileNotFoundError(
            f"{json_file}: expected iNaturalist's train2018.json or val2018.json, got none; put it "
            f"there from https://github.com/visipedia/inat_comp/tree/master/2018; {IMAGE_SOURCES}"
        )
    try:
        content = json.loads(json_file.read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(one["image_id"], one["category_id"]) for one in content["annotations"]]
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
    except KeyError as error:
        raise ValueError(
            f"{json_file}: expected images (id, file_name), annotations (image_id, category_id) and "
            f"categories (id, name), got none of the key {error}; the files of tests have no annotations"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{json_file}: expected iNaturalist's JSON, got another file ({error})") from error
    unknown = [pair for pair in pairs if pair[0] not in files or pair[1] not in names]
    if unknown or not pairs:
        got = f"image {unknown[0][0]} of category {unknown[0][1]}" if unknown else "none"
        raise ValueError(f"{json_file}: expected annotations of its images and categories, got {got}")
    label_of = {category: label for label, category in enumerate(sorted(names))}
    return ImageData(
        _under(root, [files[image] for image, _ in pairs]),
        [label_of[category] for _, category in pairs],
        classes=[names[category] for category in sorted(names)],
    )


def _under(root: Path, paths: Sequence[str]) -> list[str]:
    """The paths below ``root``, of which the first is there."""
    whole = [os.path.join(root, path) for path in paths]
    if not os.path.isfile(whole[0]):
        what = "its images" if root.is_dir() else "the folder of the images"
        raise FileNotFoundError(
            f"{root}: expected {what}, the first at {whole[0]}, got none; put them there, "
            f"or give the root that the paths start from; {IMAGE_SOURCES}"
        )
    return whole


def _first(labels: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, labels[:most])) + (", ..." if len(labels) > most else "")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{name} cannot be imported ({error}): pip install "lgla-losses[vision]"'
        ) from error
