"""Long-tailed data sets, and the files they come in."""

import hashlib
import io
import json
import os
import pickle
import sys
import tracemalloc
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

from lgla_losses import count_classes
from lgla_losses.data import (
    ImageData,
    long_tailed_counts,
    long_tailed_indices,
    read_cifar,
    read_image,
    read_inaturalist,
    read_list,
    read_npz,
)


@pytest.mark.parametrize(
    ("n_max", "num_classes", "factor", "total", "smallest"),
    [
        (500, 100, 100, 10_847, 5),
        (500, 100, 50, 12_608, 10),
        (500, 100, 10, 19_573, 50),
        (5000, 10, 100, 12_406, 50),
        (5000, 10, 200, 11_203, 25),
        (5000, 10, 10, 20_431, 500),
    ],
)
def test_counts_of_cifar(n_max, num_classes, factor, total, smallest):
    """The figures that the literature gives for CIFAR-LT."""
    counts = long_tailed_counts(n_max, num_classes, factor)
    assert counts.dtype == torch.int64
    assert (counts.sum(), counts[0], counts[-1]) == (total, n_max, smallest)


@given(st.integers(1, 10**6), st.integers(1, 300), st.floats(1, 1e4), st.sampled_from(["exp", "step"]))
def test_counts_fall_from_the_largest(n_max, num_classes, factor, kind):
    counts = long_tailed_counts(n_max, num_classes, factor, kind)
    assert counts.shape == (num_classes,)
    assert counts[0] == n_max
    assert (counts.diff() <= 0).all()
    if num_classes > 1:
        assert abs(counts[-1] - max(1, n_max / factor)) <= 1
    if kind == "step":
        assert set(counts.tolist()) <= {n_max, max(1, int(n_max / factor))}


def test_counts_in_steps():
    assert long_tailed_counts(500, 4, 100, "step").tolist() == [500, 500, 5, 5]
    assert long_tailed_counts(500, 5, 1000, "step").tolist() == [500, 500, 500, 1, 1]
    assert long_tailed_counts(7, 3, 1).tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "n_max: expected an integer >= 1, got 0", (0, 10, 100)),
        (TypeError, "n_max: expected an integer, got 5.5", (5.5, 10, 100)),
        (ValueError, "num_classes: expected an integer >= 1", (500, 0, 100)),
        (ValueError, "imbalance_factor: expected a finite number >= 1, .* got 0.01", (500, 10, 0.01)),
        (ValueError, "imbalance_factor: .* got inf", (500, 10, float("inf"))),
        (
            ValueError,
            r"n_max: expected an integer .*, got 1180591620717411303424",
            (2**70, 10, 100),
        ),
        (ValueError, "kind: expected one of 'exp', 'step', got 'pareto'", (500, 10, 100, "pareto")),
    ],
)
def test_bad_counts(error, message, arguments):
    with pytest.raises(error, match=message):
        long_tailed_counts(*arguments)


def conventional(labels, counts, seed):
    """As the code of Cao et al. does it."""
    np.random.seed(seed)  # noqa: NPY002
    chosen = []
    for the_class, n in zip(np.unique(labels), counts, strict=True):
        index = np.where(labels == the_class)[0]
        np.random.shuffle(index)  # noqa: NPY002
        chosen.extend(index[:n].tolist())
    return chosen


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_indices_are_the_conventional_ones(seed):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
    counts = long_tailed_counts(50, 10, 10)
    expected = conventional(labels, counts.tolist(), seed)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    index = long_tailed_indices(labels, counts, seed)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert index.dtype == torch.int64
    assert index.tolist() == expected
    images = TensorDataset(torch.zeros(500))
    images.targets = labels.tolist()
    for same in (labels.tolist(), torch.from_numpy(labels), images, Subset(images, range(500))):
        assert torch.equal(long_tailed_indices(same, counts.tolist(), seed), index)
    assert count_classes(labels[index], 10).tolist() == counts.tolist()


@pytest.mark.parametrize(
    ("error", "message", "labels", "counts"),
    [
        (
            ValueError,
            r"got 3 for class 1, which has 2 \(2 of 3 classes are too small\); lower n_max",
            [0, 1, 1],
            [1, 3, 1],
        ),
        (ValueError, "labels: expected class indices 0..1, got 2", [0, 1, 2], [1, 1]),
        (ValueError, "labels: expected class indices 0..1, got -1", [0, 1, -1], [1, 1]),
        (ValueError, r"counts: expected at least 1 of every class .* \[1, 0\]", [0, 1], [1, 0]),
        (ValueError, "counts: expected at least 1 of every class", [0, 1], []),
        (ValueError, r"counts: expected a 1-D vector, got shape \[1, 2\]", [0, 1], [[1, 1]]),
        (TypeError, "counts: expected integers, got float64; long_tailed_counts", [0, 1], [1.0, 1.0]),
        (TypeError, "labels: expected integer class indices", [0.0, 1.0], [1, 1]),
        (ValueError, "counts: expected the class numbers 0..C-1 as keys", [0, 1], {1: 1, 2: 1}),
    ],
)
def test_bad_indices(error, message, labels, counts):
    with pytest.raises(error, match=message):
        long_tailed_indices(labels, counts)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (2**32, ValueError), (0.5, TypeError)])
def test_a_seed_that_the_generator_does_not_take_is_named(seed, error):
    with pytest.raises(error, match=f"seed: expected an integer.* got {seed}"):
        long_tailed_indices([0, 1], [1, 1], seed)


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(params=["array", "bytes", "paths", "strings"])
def images(request, tmp_path):
    if request.param == "array":
        return PIXELS
    files = [png(pixels) for pixels in PIXELS]
    if request.param == "bytes":
        return files
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, content in zip(paths, files, strict=True):
        path.write_bytes(content)
    return paths if request.param == "paths" else list(map(str, paths))


def test_images(images):
    data = ImageData(images, torch.tensor(LABELS), classes=["a", "b", "c"])
    assert len(data) == 6
    assert data.images is images
    assert data.targets == LABELS
    assert all(type(label) is int for label in data.targets)
    image, label = data[4]
    assert (image.mode, image.size, label) == ("RGB", (5, 4), 1)
    assert (np.asarray(image) == PIXELS[4]).all()
    assert count_classes(data, 3).tolist() == [2, 2, 2]
    data.transform = lambda image: torch.from_numpy(np.array(image))
    batch, target = next(iter(DataLoader(data, batch_size=6)))
    assert torch.equal(batch, torch.from_numpy(PIXELS))
    assert target.tolist() == LABELS


def test_subsets_share_the_images(images):
    data = ImageData(images, LABELS, transform=np.asarray, classes=["a", "b", "c"])
    part = data.subset(torch.tensor([5, 0, 0]))
    assert part.targets == [2, 0, 0]
    assert (part.transform, part.classes) == (np.asarray, ["a", "b", "c"])
    assert [(image == PIXELS[i]).all() for (image, _), i in zip(part, [5, 0, 0], strict=False)] == [True] * 3
    own = part.images[0]
    assert np.shares_memory(own, images) if isinstance(images, np.ndarray) else own is images[5]
    assert part.subset([1]).targets == [0]
    assert len(data.subset([])) == 0
    with pytest.raises(TypeError, match="indices: expected integers, got bool"):
        data.subset(np.array(LABELS) == 0)


@pytest.mark.parametrize("index", [6, -7, 2**40])
def test_a_subset_of_samples_that_are_not_there_is_refused(index):
    with pytest.raises(ValueError, match=f"indices: expected indices of 6 samples, got {index}"):
        ImageData(PIXELS, LABELS).subset([0, index])
    assert ImageData(PIXELS, LABELS).subset([-1]).targets == [2]


def test_labels_of_a_table_lose_its_index():
    data = ImageData(PIXELS[:3], pd.Series(LABELS, index=range(10, 16))[:3])
    assert data.targets == [0, 1, 2]
    assert data.subset(pd.Series([2, 0], index=[5, 9])).targets == [2, 0]


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(ValueError, match=f"image: expected an image file, got a folder, pipe .*{path}"):
            read_image(path)
    with pytest.raises(FileNotFoundError, match="none"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("damage", [lambda content: b"text", lambda content: content[:60]])
def test_a_damaged_image_is_named(tmp_path, damage):
    (tmp_path / "a.png").write_bytes(damage(png(PIXELS[0])))
    with pytest.raises(
        ValueError, match=f"image: expected an image that Pillow can decode, got {tmp_path}/a.png"
    ):
        read_image(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"image: expected an image that Pillow can decode, got b'.* of type bytes"
    ):
        read_image(damage(png(PIXELS[0])))


def test_grey_images_become_rgb():
    image, _ = ImageData(PIXELS[..., 0], LABELS)[2]
    assert (np.asarray(image) == PIXELS[2, ..., :1]).all()


@pytest.mark.parametrize("encode", [lambda path: path, lambda path: path.read_bytes()])
def test_sixteen_bits_become_eight(tmp_path, encode):
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / "grey.png")
    image = np.asarray(read_image(encode(tmp_path / "grey.png")))
    assert (image == (shades // 257)[..., None]).all()


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            ValueError,
            r"images: expected uint8 \[N, H, W, 3\] or .* float64 \[6, 4, 5, 3\]",
            {"images": PIXELS / 1},
        ),
        (ValueError, r"images: .* got uint8 \[6, 3, 4, 5\]", {"images": PIXELS.transpose(0, 3, 1, 2)}),
        (ValueError, r"images: .* got uint8 \[4, 5\]", {"images": PIXELS[0, ..., 0]}),
        (TypeError, "images: expected an array, or a sequence of bytes or paths", {"images": "a.png"}),
        (ValueError, r"targets: .* per image, 6, got 5", {"targets": LABELS[1:]}),
        (TypeError, "targets: expected integers, got float64; map names", {"targets": [0.5] * 6}),
        (ValueError, "targets: expected class indices from 0 .*, got -1", {"targets": [-1, *LABELS[1:]]}),
        (ValueError, "less than 2, the number of classes, got 2", {"classes": ["a", "b"]}),
    ],
)
def test_bad_images(error, message, changes):
    with pytest.raises(error, match=message):
        ImageData(**{"images": PIXELS, "targets": LABELS, **changes})


def test_other_things_are_no_images():
    with pytest.raises(TypeError, match="image: expected bytes, a path or a uint8 array, got 3"):
        read_image(3)


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        read_image(PIXELS[0])


def arrays(**changes):
    made = {
        "train_images": PIXELS,
        "train_labels": np.array(LABELS),
        "val_images": PIXELS[:3, ..., 0],
        "val_labels": np.arange(3, dtype=np.uint8),
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


def pack(**changes):
    made = {}
    for half, pixels, labels in (("train", PIXELS, LABELS), ("test", PIXELS[:3], [0, 1, 2])):
        files = [png(image) for image in pixels]
        made[f"{half}_jpg"] = np.frombuffer(b"".join(files), np.uint8)
        made[f"{half}_off"] = np.cumsum([0, *map(len, files)])
        made[f"{half}_y"] = np.array(labels, np.uint16)
    return {name: array for name, array in (made | changes).items() if array is not None}


@pytest.mark.parametrize("make", [arrays, pack])
def test_npz(tmp_path, make):
    np.savez(tmp_path / "data.npz", **make())
    data = read_npz(tmp_path / "data.npz")
    assert set(data) == {"train", "val"}
    assert data["train"].targets == LABELS
    assert data["val"].targets == [0, 1, 2]
    assert data["val"].classes == ["0", "1", "2"]
    for i, (image, _) in zip(range(6), data["train"], strict=False):
        assert (np.asarray(image) == PIXELS[i]).all()
    assert np.asarray(data["val"][2][0]).shape == (4, 5, 3)
    assert isinstance(data["train"].images[0], bytes if make is pack else np.ndarray)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"x": PIXELS}, r"train_labels, val_images, val_labels \(or train_jpg, .* got no train_images, "),
        (arrays(val_labels=None), "got no val_labels$"),
        (arrays(train_labels=np.array([None] * 6)), "expected an .npz file of plain arrays, got another"),
        (arrays(val_images=PIXELS / 1), r"val_images: expected uint8 .* got float64 \[6, 4, 5, 3\]"),
        (arrays(val_images=PIXELS[:0]), r"val_images: expected uint8 .* got uint8 \[0, 4, 5, 3\]"),
        (arrays(train_labels=np.arange(5)), r"expected train_labels integers \[6\], got int64 \[5\]"),
        (arrays(train_labels=np.zeros(6)), r"expected train_labels integers \[6\], got float64 \[6\]"),
        (arrays(val_labels=np.arange(3) + 1), "expected labels 0..2 as in train_labels, got 3"),
        (arrays(train_labels=2 * np.array(LABELS)), "train_labels of every class 0..4, got none of 1, 3"),
        (arrays(train_labels=7 * np.array(LABELS)), "got none of 1, 2, 3, 4, 5, ..."),
        (pack(test_y=None), "got no test_y$"),
        (
            pack(train_jpg=np.zeros((2, 2), np.uint8)),
            r"expected train_jpg uint8 \[bytes\], got uint8 \[2, 2\]",
        ),
        (
            pack(test_off=np.array([0, 9, 5, 12], np.uint64)),
            r"expected test_off rising integers \[N \+ 1\] up to",
        ),
        (pack(test_off=np.array([0, 5, 10, 10**6])), r"expected test_off rising integers"),
        (pack(test_off=np.array([0.0, 1.0])), r"got float64 \[2\]"),
        (pack(test_y=np.arange(4)), r"expected test_y integers \[3\], got int64 \[4\]"),
        (pack(test_y=np.array([0, 1, -1])), "expected labels 0..2 as in train_y, got -1"),
    ],
)
def test_bad_npz(tmp_path, made, message):
    np.savez(tmp_path / "data.npz", **made)
    with pytest.raises(ValueError, match=message) as raised:
        read_npz(tmp_path / "data.npz")
    assert str(tmp_path / "data.npz") in str(raised.value)


def test_other_files_are_no_npz(tmp_path):
    np.save(tmp_path / "array.npy", PIXELS)
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("array.npy", "text.npz"):
        with pytest.raises(ValueError, match=r"expected an \.npz file of plain arrays, got another"):
            read_npz(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz: .*train_images.*got none.*download=True"):
        read_npz(tmp_path / "nowhere.npz")


def test_a_packed_bomb_is_refused_before_it_is_read(tmp_path):
    header = io.BytesIO()
    shape = (10**6, 32, 32, 3)
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("train_images.npy", "w", force_zip64=True) as file,
    ):
        file.write(header.getvalue())
        for _ in range(300):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"a.npz: expected .* \(train_images takes 314,572,928 bytes, compressed"
        ):
            read_npz(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.fixture(params=[10, 100])
def cifar(request, tmp_path, monkeypatch):
    """Two images a batch in the layout of CIFAR, with checksums of their own."""
    kind = getattr(torchvision.datasets, f"CIFAR{request.param}")
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    generator, made = np.random.default_rng(0), []

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for attribute in ("train_list", "test_list"):
        files = []
        for name, _ in getattr(kind, attribute):
            pixels = generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
            made.append((attribute, pixels))
            key = "labels" if request.param == 10 else "fine_labels"
            files.append(write(name, {"data": pixels.reshape(2, -1), key: [len(made), 0]}))
        monkeypatch.setattr(kind, attribute, files)
    names = [f"class {j}" for j in range(request.param)]
    file, md5 = write(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": file, "md5": md5})
    return tmp_path, request.param, made


def test_cifar(cifar):
    root, num_classes, made = cifar
    for train, attribute in ((True, "train_list"), (False, "test_list")):
        data = read_cifar(root, num_classes, train=train)
        pixels = np.concatenate([own for half, own in made if half == attribute]).transpose(0, 2, 3, 1)
        assert (data.images == pixels).all()
        assert (np.asarray(data[1][0]) == pixels[1]).all()
        assert data.targets[:2] == [1 if train else len(made), 0]
        assert len(data.classes) == num_classes


def test_missing_or_damaged_cifar(cifar):
    root, num_classes, _ = cifar
    name = {10: "cifar-10", 100: "cifar-100"}[num_classes]
    message = f"expected the whole folder {name}-.*unpack {name}-python.tar.gz from https.*download=True"
    for where in (root / "nowhere", root):
        for file in root.glob("*/*"):
            if where == root:
                file.write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=message):
            read_cifar(where, num_classes)


def test_other_numbers_of_classes_are_no_cifar(tmp_path):
    with pytest.raises(ValueError, match="num_classes: expected 10 or 100, got 20"):
        read_cifar(tmp_path, 20)


def test_cifar_needs_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        read_cifar(tmp_path, 10)


@pytest.fixture
def root(tmp_path):
    """Images that lists and JSON files name."""
    (tmp_path / "images" / "a b").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "images" / "a b" / f"{i}.png").write_bytes(png(PIXELS[i]))
    return tmp_path / "images"


def test_lists(root, tmp_path):
    (tmp_path / "list.txt").write_text(
        "a b/2.png 1\n\na b/0.png\t0 \n  \na b/not there.png 1", encoding="utf-8"
    )
    data = read_list(tmp_path / "list.txt", str(root))
    assert data.targets == [1, 0, 1]
    assert [str(path) for path in data.images[:2]] == [str(root / "a b/2.png"), str(root / "a b/0.png")]
    assert (np.asarray(data[1][0]) == PIXELS[0]).all()
    assert data.classes is None


def test_a_test_list_may_lack_classes(root, tmp_path):
    (tmp_path / "test.txt").write_text("a b/2.png 1\n\na b/0.png 3")
    assert read_list(tmp_path / "test.txt", root, num_classes=5).targets == [1, 3]
    with pytest.raises(ValueError, match=r"test.txt, line 3: expected a class index 0..2, got 3"):
        read_list(tmp_path / "test.txt", root, num_classes=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a b/0.png 0\n\na.png\n",
            "list.txt, line 3: expected a path and a class index >= 0, .* got 'a.png'",
        ),
        ("a b/0.png 0\na.png cat", "line 2: .* got 'a.png cat'"),
        ("a b/0.png -1\n", "line 1: .* got 'a b/0.png -1'"),
        ("a b/0.png 0\na.png 3\n", "list.txt: expected every class 0..3 .line 2., got none of 1, 2; number"),
        ("a b/0.png 0\na.png 999999999999\n", "got none of 1, 2, 3, 4, 5, ...;"),
        (
            "a b/0.png 0\na.png " + "9" * 5000,
            "line 2: expected a path and a class index .* got 'a.png 9+...9+'",
        ),
        (b"a b/0.png 0\n\xff\xfe.png 1\n", "list.txt, line 2: expected text in UTF-8, got binary data"),
        ("\n", "list.txt: expected lines 'path label', got none"),
    ],
)
def test_bad_lists(root, tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "list.txt", root)


INATURALIST = {
    "images": [{"id": 7, "file_name": "a b/1.png"}, {"id": 3, "file_name": "a b/0.png"}],
    "annotations": [{"image_id": 3, "category_id": 20}, {"image_id": 7, "category_id": 5}],
    "categories": [{"id": 20, "name": "Parus major"}, {"id": 5, "name": "Apis mellifera"}],
}


def test_inaturalist(root, tmp_path):
    (tmp_path / "train2018.json").write_text(json.dumps(INATURALIST))
    data = read_inaturalist(tmp_path / "train2018.json", root)
    assert data.targets == [1, 0]
    assert data.classes == ["Apis mellifera", "Parus major"]
    assert (np.asarray(data[0][0]) == PIXELS[0]).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**INATURALIST, "images": [{"id": 3}]}, "got no key 'file_name'"),
        ({"images": [], "categories": []}, "got no key 'annotations'; test files have no"),
        ({**INATURALIST, "annotations": [{"image_id": 3}]}, "got no key 'category_id'"),
        ({**INATURALIST, "annotations": []}, "expected annotations of its images and categories, got none"),
        ({**INATURALIST, "categories": [{"id": 5, "name": ""}]}, "got image 3 of category 20"),
        ([INATURALIST], "expected iNaturalist's JSON, got another file"),
        ("{", "expected iNaturalist's JSON, got another file"),
        ("[" * 100_000, "expected iNaturalist's JSON, got another file"),
        (b"\xff" * 9, "expected iNaturalist's JSON, got another file"),
        (
            {**INATURALIST, "categories": [*INATURALIST["categories"], {"id": "x", "name": ""}]},
            "another file .'<' not supported",
        ),
        ({**INATURALIST, "categories": [{"id": [5], "name": ""}]}, "another file .unhashable"),
        ({**INATURALIST, "annotations": [{"image_id": {}, "category_id": 5}]}, "another file .unhashable"),
        ({**INATURALIST, "annotations": 7}, "another file .'int' object is not iterable"),
        ({**INATURALIST, "images": [{"id": 3, "file_name": 5}]}, "another file .a file_name is not a string"),
    ],
)
def test_bad_inaturalist(root, tmp_path, content, message):
    path = tmp_path / "train2018.json"
    content = json.dumps(content) if isinstance(content, dict | list) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        read_inaturalist(path, root)


def test_missing_files_say_what_to_put_where(root, tmp_path):
    sources = r".*image-net.org.*Places365\(small=True.*INaturalist\(version='2018', download=True\)"
    for read, content in ((read_list, "a.png 0"), (read_inaturalist, json.dumps(INATURALIST))):
        with pytest.raises(FileNotFoundError, match="nowhere: expected .* got none; put " + sources):
            read(tmp_path / "nowhere", root)
        (tmp_path / "file").write_text(content)
        with pytest.raises(
            FileNotFoundError, match="nowhere: expected the folder of the images, .*" + sources
        ):
            read(tmp_path / "file", tmp_path / "nowhere")
        with pytest.raises(
            FileNotFoundError, match=f"{tmp_path}: expected its images, the first at " + sources
        ):
            read(tmp_path / "file", tmp_path)
