"""Real long-tailed data sets for benchmarks: a training, an ordinary validation and a test part for every seed.

All but the digits are read from a folder, in which lie

- ``cifar10.npz`` and ``tiny_imagenet.npz``, as :func:`lgla_losses.data.read_npz` takes them;
- ``fashion-mnist/``, the four files of Debian's package dataset-fashion-mnist;
- ``packages.txt``, what ``apt-cache dumpavail`` prints: a line on every Debian package, and its section;
- ``wordnet/``, the files ``data.*`` of Debian's package wordnet-base: the glosses and their 45 topics.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lgla_losses.data import long_tailed_counts, long_tailed_indices, read_npz

#: Side of the images of CIFAR-10 and Tiny-ImageNet.
PIXELS = 16


class Pool(NamedTuple):
    """Inputs and labels; where there is no test set, every seed draws one of the samples."""

    inputs: Tensor
    labels: npt.NDArray[np.int64]
    test_inputs: Tensor | None = None
    test_labels: npt.NDArray[np.int64] | None = None


class Split(NamedTuple):
    """Inputs and labels for training, and of a validation and a test part; both parts are in no order."""

    inputs: Tensor
    labels: Tensor
    validation_inputs: Tensor
    validation_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class DataSet(NamedTuple):
    """Where the samples come from, and the long tail that is cut from them; None keeps the natural one."""

    pool: Callable[[Path], Pool]
    largest: int | None
    imbalance: float = 100.0
    epochs: int = 30
    batch: int = 128


def split_of(name: str, folder: Path, seed: int, validation: float = 0.1) -> Split:
    """Draw the parts of one seed: the share ``validation`` of the training samples is held out."""
    data = DATA_SETS[name]
    pool = data.pool(folder)
    order = np.random.default_rng(seed).permutation(len(pool.labels))
    num_classes = int(pool.labels.max()) + 1

    if pool.test_inputs is None or pool.test_labels is None:
        share = int(0.3 * len(order))
        test, order = order[:share], order[share:]
        pool = pool._replace(test_inputs=pool.inputs[test], test_labels=pool.labels[test])
    if data.largest is not None:
        counts = long_tailed_counts(data.largest, num_classes, data.imbalance)
        order = order[long_tailed_indices(pool.labels[order], counts, seed=seed).numpy()]
        order = np.random.default_rng(seed).permutation(order)

    held = int(validation * len(order))
    parts = (order[held:], order[:held])
    mean, deviation = _moments(pool.inputs[parts[0]])
    assert pool.test_inputs is not None and pool.test_labels is not None
    halves: list[Tensor] = []
    for part in parts:
        halves += [(pool.inputs[part] - mean) / deviation, torch.from_numpy(pool.labels[part])]
    return Split(*halves, (pool.test_inputs - mean) / deviation, torch.from_numpy(pool.test_labels))


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, of images by channel, of features as a whole."""
    if inputs.dim() == 4:
        return inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    return inputs.mean(0), inputs.std()


@cache
def _digits(folder: Path) -> Pool:
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    rest, test = np.arange(len(labels)) % 2 == 0, np.arange(len(labels)) % 2 == 1
    inputs = torch.from_numpy(data).float() / 16
    return Pool(inputs[rest], labels[rest], inputs[test], labels[test])


@cache
def _fashion_mnist(folder: Path) -> Pool:
    arrays = []
    for half in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            packed = (folder / "fashion-mnist" / f"{half}-{kind}-ubyte.gz").read_bytes()
            arrays.append(np.frombuffer(gzip.decompress(packed), np.uint8, offset=header))
    inputs = [torch.from_numpy(arrays[i].reshape(-1, 784) / np.float32(255)) for i in (0, 2)]
    return Pool(inputs[0], arrays[1].astype(np.int64), inputs[1], arrays[3].astype(np.int64))


@cache
def _cifar10(folder: Path) -> Pool:
    return _images(folder / "cifar10.npz")


@cache
def _tiny_imagenet(folder: Path) -> Pool:
    return _images(folder / "tiny_imagenet.npz")


def _images(path: Path) -> Pool:
    """Images of an ``.npz`` file, ``[N, 3, 16, 16]``."""
    parts: list[Tensor] = []
    labels = []
    for images in read_npz(path).values():
        small = [
            F.interpolate(
                torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float() / 255, PIXELS, mode="area"
            )
            for image, _ in images
        ]
        parts.append(torch.cat(small))
        labels.append(np.asarray(images.targets, np.int64))
    return Pool(parts[0], labels[0], parts[1], labels[1])


@cache
def _debian_sections(folder: Path) -> Pool:
    texts, labels = {}, {}
    for block in (folder / "packages.txt").read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        if "Description" in fields and "/" not in fields.get("Section", "/"):
            # Packages of one source say nearly the same: the first stands for all.
            source = fields.get("Source", fields["Package"]).split()[0]
            texts.setdefault(source, fields["Description"])
            labels.setdefault(source, fields["Section"])
    return _text_pool(list(texts.values()), [labels[source] for source in texts], fewest=30)


@cache
def _wordnet(folder: Path) -> Pool:
    texts, labels = [], []
    for name in ("noun", "verb", "adj", "adv"):
        for line in (folder / "wordnet" / f"data.{name}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                texts.append(line.split("|", 1)[1].split(";")[0])
                labels.append(line.split()[1])
    chosen = np.random.default_rng(0).permutation(len(texts))[:25000]
    return _text_pool([texts[i] for i in chosen], [labels[i] for i in chosen], fewest=30)


def _text_pool(texts: list[str], labels: list[str], fewest: int) -> Pool:
    """Texts as 256 numbers each, made without labels; classes with fewer samples than ``fewest`` are left out."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    sizes = Counter(labels)
    names = sorted((name for name in sizes if sizes[name] >= fewest), key=lambda name: (-sizes[name], name))
    index = {name: j for j, name in enumerate(names)}
    kept = [i for i, label in enumerate(labels) if label in index]
    words = TfidfVectorizer(min_df=3, sublinear_tf=True, ngram_range=(1, 2)).fit_transform(
        [texts[i] for i in kept]
    )
    features = TruncatedSVD(256, random_state=0).fit_transform(words)
    features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-6
    return Pool(torch.from_numpy(features).float(), np.array([index[labels[i]] for i in kept]))


DATA_SETS = {
    "digits": DataSet(_digits, largest=80, imbalance=40.0, epochs=60, batch=32),
    "Fashion-MNIST": DataSet(_fashion_mnist, largest=5000),
    "CIFAR-10": DataSet(_cifar10, largest=5000),
    "Tiny-ImageNet": DataSet(_tiny_imagenet, largest=None, epochs=20),
    "Debian sections": DataSet(_debian_sections, largest=None),
    "WordNet topics": DataSet(_wordnet, largest=None),
}
