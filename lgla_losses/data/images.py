"""Images and their classes, decoded when they are used."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from lgla_losses._checks import describe
from lgla_losses._counts import ArrayLike, integer_array

#: An image: encoded, in a file, or decoded as uint8 ``[H, W, 3]`` or ``[H, W]``.
Image: TypeAlias = bytes | str | os.PathLike[str] | npt.NDArray[np.uint8]


class ImageData(Dataset[tuple[Any, int]]):
    """Hold images and their classes; an image is decoded when it is used.

    Args:
        images: uint8 ``[N, H, W, 3]`` or ``[N, H, W]``, or a sequence of encoded images (``bytes``),
            of paths, or of arrays.
        targets: class indices ``[N]``.
        transform: applied to each image, a PIL image in RGB; None leaves it unchanged.
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
            check_image_array("images", images)
        elif not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise TypeError(
                f"images: expected an array, or a sequence of bytes or paths, got {describe(images)}; "
                "list(images) gives a sequence"
            )

        array = integer_array("targets", targets, "map names to indices first, for example with np.unique")
        if len(array) != len(images):
            raise ValueError(f"targets: expected one class index per image, {len(images)}, got {len(array)}")

        most = len(classes) if classes else np.inf
        wrong = array[(array < 0) | (array >= most)]
        if wrong.size:
            raise ValueError(
                f"targets: expected class indices from 0 to less than {most}, the number of classes, "
                f"got {wrong[0]}"
            )

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
        """Take some of the samples, in the order of ``indices`` ``[M]``; the images are shared, not copied.

        Raises:
            TypeError: the indices are not integers.
            ValueError: the indices are not 1-D, or one is out of range; negative ones count from the end.
        """
        array = integer_array("indices", indices, "np.flatnonzero(mask) gives those of a mask")
        wrong = array[(array < -len(self)) | (array >= len(self))]
        if wrong.size:
            raise ValueError(f"indices: expected indices of {len(self)} samples, got {wrong[0]}")
        chosen = array.tolist()
        targets = [self.targets[i] for i in chosen]
        return ImageData([self.images[i] for i in chosen], targets, self.transform, self.classes)


def read_image(image: Image) -> Any:
    """Read an image in RGB.

    Args:
        image: encoded as ``bytes``, a path, or uint8 ``[H, W, 3]`` or ``[H, W]``. Of 16-bit values the upper
            8 bits are kept.

    Returns:
        A ``PIL.Image.Image``.

    Raises:
        ImportError: Pillow is not installed.
        OSError: there is no such file, or it cannot be opened.
        TypeError: ``image`` is something else.
        ValueError: Pillow cannot decode it; the error names the file.
    """
    pil = vision_library("PIL.Image", "pillow")
    if isinstance(image, np.ndarray):
        return pil.fromarray(image).convert("RGB")
    if not isinstance(image, bytes | str | os.PathLike):
        raise TypeError(f"image: expected bytes, a path or a uint8 array, got {describe(image)}")

    # Opening a pipe would wait for data.
    if not isinstance(image, bytes) and not os.path.isfile(image) and os.path.exists(image):
        raise ValueError(f"image: expected an image file, got a folder, pipe or device: {os.fspath(image)}")

    try:
        with pil.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            if opened.mode.startswith("I"):  # 16 bits: convert() would clip at 255
                return pil.fromarray((np.asarray(opened) / 257).astype(np.uint8)).convert("RGB")
            return opened.convert("RGB")
    except Exception as error:
        # No list names all errors that a damaged file raises in a decoder. Errors of the system name the
        # file.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        what = describe(image) if isinstance(image, bytes) else os.fspath(image)
        raise ValueError(f"image: expected an image that Pillow can decode, got {what} ({error})") from error


def check_image_array(name: str, images: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Check that ``images`` is an array of images."""
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if not grey_or_rgb or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(
            f"{name}: expected uint8 [N, H, W, 3] or [N, H, W], got {images.dtype} {list(images.shape)}"
        )
    return images


def vision_library(name: str, package: str) -> Any:
    """Import a module of another package."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): pip install {package}") from error
