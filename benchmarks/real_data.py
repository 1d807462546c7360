"""Real long-tailed data sets for benchmarks: parts for training, validation and test, drawn by a seed.

All but the digits and Python's own names of characters are read from a folder, in which lie

- ``cifar10.npz``, as :func:`lgla_losses.data.read_npz` takes it;
- ``fashion-mnist/``, the four files of Debian's package dataset-fashion-mnist;
- ``packages.txt``, what ``apt-cache dumpavail`` prints: a line on every Debian package, and its section;
- ``docstrings.csv``, which ``python examples/make_data.py docstrings`` writes: docstrings of Python's
  standard library and their packages;
- ``wordnet/``, the files ``data.*`` of Debian's package wordnet-base: the glosses and their 45 topics.
"""

from __future__ import annotations

import csv
import gzip
import sys
import unicodedata
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

#: Side of the images of CIFAR-10.
PIXELS = 16


class Pool(NamedTuple):
    """Inputs and labels."""

    inputs: Tensor
    labels: npt.NDArray[np.int64]


#: The samples to train on, and those of the test; None where every seed draws a test part of the former.
Pools = tuple[Pool, Pool | None]


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

    pools: Callable[[Path], Pools]
    largest: int | None
    imbalance: float = 100.0
    epochs: int = 30
    batch: int = 128
    cross_fit: bool = False


def split_of(name: str, folder: Path, seed: int, validation: float = 0.1) -> Split:
    """Draw the parts of one seed: the share ``validation`` of the training samples is held out."""
    data = DATA_SETS[name]
    pool, test = data.pools(folder)
    order = np.random.default_rng(seed).permutation(len(pool.labels))
    num_classes = int(pool.labels.max()) + 1

    if test is None:
        share = int(0.3 * len(order))
        chosen, order = order[:share], order[share:]
        test = Pool(pool.inputs[chosen], pool.labels[chosen])
    if data.largest is not None:
        counts = long_tailed_counts(data.largest, num_classes, data.imbalance)
        order = order[long_tailed_indices(pool.labels[order], counts, seed=seed).numpy()]
        order = np.random.default_rng(seed).permutation(order)

    held = int(validation * len(order))
    parts = (order[held:], order[:held])
    mean, deviation = _moments(pool.inputs[parts[0]])
    inputs = [(values - mean) / deviation for values in (*(pool.inputs[part] for part in parts), test.inputs)]
    labels = [torch.from_numpy(values) for values in (*(pool.labels[part] for part in parts), test.labels)]
    return Split(inputs[0], labels[0], inputs[1], labels[1], inputs[2], labels[2])


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, of images by channel, of features as a whole."""
    if inputs.dim() == 4:
        return inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    return inputs.mean(0), inputs.std()


@cache
def _digits(folder: Path) -> Pools:
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    rest, test = np.arange(len(labels)) % 2 == 0, np.arange(len(labels)) % 2 == 1
    inputs = torch.from_numpy(data).float() / 16
    return Pool(inputs[rest], labels[rest]), Pool(inputs[test], labels[test])


@cache
def _fashion_mnist(folder: Path) -> Pools:
    arrays = []
    for half in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            packed = (folder / "fashion-mnist" / f"{half}-{kind}-ubyte.gz").read_bytes()
            arrays.append(np.frombuffer(gzip.decompress(packed), np.uint8, offset=header))
    inputs = [torch.from_numpy(arrays[i].reshape(-1, 784) / np.float32(255)) for i in (0, 2)]
    labels = [arrays[i].astype(np.int64) for i in (1, 3)]
    return Pool(inputs[0], labels[0]), Pool(inputs[1], labels[1])


@cache
def _cifar10(folder: Path) -> Pools:
    parts: list[Tensor] = []
    labels = []
    for images in read_npz(folder / "cifar10.npz").values():
        whole = torch.stack([torch.from_numpy(np.array(images[i][0])) for i in range(len(images))])
        parts.append(F.interpolate(whole.movedim(-1, 1).float() / 255, size=PIXELS, mode="area"))
        labels.append(np.asarray(images.targets, np.int64))
    return Pool(parts[0], labels[0]), Pool(parts[1], labels[1])


@cache
def _debian_sections(folder: Path) -> Pools:
    texts: dict[str, str] = {}
    labels: dict[str, str] = {}
    for block in (folder / "packages.txt").read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        if "Description" in fields and "/" not in fields.get("Section", "/"):
            # Packages of one source say nearly the same: the first stands for all.
            source = fields.get("Source", fields["Package"]).split()[0]
            texts.setdefault(source, fields["Description"])
            labels.setdefault(source, fields["Section"])
    return _text_pool(list(texts.values()), [labels[source] for source in texts], fewest=30)


@cache
def _wordnet(folder: Path) -> Pools:
    texts, labels = [], []
    for name in ("noun", "verb", "adj", "adv"):
        for line in (folder / "wordnet" / f"data.{name}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                texts.append(line.split("|", 1)[1].split(";")[0])
                labels.append(line.split()[1])
    chosen = np.random.default_rng(0).permutation(len(texts))[:25000]
    return _text_pool([texts[i] for i in chosen], [labels[i] for i in chosen], fewest=30)


@cache
def _docstrings(folder: Path) -> Pools:
    with (folder / "docstrings.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return _text_pool([row["text"] for row in rows], [row["label"] for row in rows], fewest=10)


@cache
def _unicode_names(folder: Path) -> Pools:
    """The name of a character says something of its category: letter, mark, number, symbol, ..."""
    named = [(unicodedata.name(c, ""), unicodedata.category(c)) for c in map(chr, range(sys.maxunicode + 1))]
    # The names of whole blocks are their numbers.
    numbered = ("CJK ", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH", "NUSHU", "KHITAN")
    kept = [(name, category) for name, category in named if name and not name.startswith(numbered)]
    chosen = [kept[i] for i in np.random.default_rng(0).permutation(len(kept))[:16000]]
    return _text_pool([name for name, _ in chosen], [category for _, category in chosen], fewest=15)


def _text_pool(texts: list[str], labels: list[str], fewest: int) -> Pools:
    """Texts as 256 numbers each, made without labels; classes of fewer texts than ``fewest`` are left out."""
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
    numbers = np.array([index[labels[i]] for i in kept])
    return Pool(torch.from_numpy(features).float(), numbers), None


DATA_SETS = {
    "digits": DataSet(_digits, largest=80, imbalance=40.0, epochs=60, batch=32, cross_fit=True),
    "Fashion-MNIST": DataSet(_fashion_mnist, largest=5000),
    "CIFAR-10": DataSet(_cifar10, largest=5000),
    "small CIFAR-10": DataSet(_cifar10, largest=2500),
    "Debian sections": DataSet(_debian_sections, largest=None),
    "docstrings": DataSet(_docstrings, largest=None, epochs=20, batch=64, cross_fit=True),
    "WordNet topics": DataSet(_wordnet, largest=None),
    "Unicode names": DataSet(_unicode_names, largest=None),
}
