"""examples/make_data.py."""

import csv
import gzip
import struct
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scripts import load

make_data = load("examples/make_data.py")


def test_long_tail():
    assert make_data.long_tail(1000, 100.0, 3) == [1000, 100, 10]
    assert make_data.long_tail(10, 100.0, 3) == [10, 1, 1]


def test_digits(tmp_path):
    for name in ("one", "two"):
        make_data.main(["digits", str(tmp_path / f"{name}.npz"), "--imbalance", "10"])
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.bincount(one["train_labels"]).tolist() == make_data.long_tail(150, 10.0, 10)
    assert set(np.bincount(one["val_labels"])) == {24}
    assert one["train_images"].dtype == np.uint8
    assert one["train_images"].max() == 255
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.fixture
def idx(tmp_path):
    """30 training and 20 test images in MNIST's format, which show their class."""
    for part, count in (("train", 3), ("t10k", 2)):
        labels = np.arange(10 * count, dtype=np.uint8) % 10
        images = np.broadcast_to(labels[:, None, None], (10 * count, 2, 2))
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return tmp_path


def test_fashion_mnist(idx):
    options = ["--source", str(idx), "--largest", "3", "--imbalance", "3", "--validation", "1"]
    make_data.main(["fashion-mnist", str(idx / "data.npz"), *options])
    arrays = np.load(idx / "data.npz")
    assert np.bincount(arrays["train_labels"]).tolist() == make_data.long_tail(3, 3.0, 10)
    assert arrays["val_labels"].tolist() == list(range(10))
    for half in ("train", "val"):
        assert (arrays[f"{half}_images"] == arrays[f"{half}_labels"][:, None, None]).all()


@pytest.mark.slow
def test_docstrings(tmp_path):
    make_data.main(["docstrings", str(tmp_path / "data.csv")])
    with (tmp_path / "data.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter(row["label"] for row in rows)
    assert len(counts) > 20
    assert max(counts.values()) > 200
    assert 10 <= min(counts.values()) < 20
    assert len({row["text"] for row in rows}) == len(rows)
    library = Path(sysconfig.get_path("stdlib"))
    assert all((library / name).is_dir() or (library / f"{name}.py").is_file() for name in counts)
    sources = (library / "pathlib.py", *(library / "pathlib").glob("*.py"))
    written = "".join(path.read_text(encoding="utf-8") for path in sources if path.is_file())
    assert all(row["text"].splitlines()[0] in written for row in rows if row["label"] == "pathlib")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fashion-mnist", "OUT", "--source", "/nowhere"], "apt install dataset-fashion-mnist"),
        (["digits", "OUT", "--imbalance", "0.5"], "--imbalance: expected a number from 1 to inf, got 0.5"),
        (["digits", "OUT", "--seed", "1" + 400 * "0"], "--seed: expected a number below 2 ** 63, got 1000"),
        (
            ["fashion-mnist", "OUT", "--validation", "0"],
            "--validation: expected a number from 1 to inf, got 0",
        ),
        (["digits", "/dev/full"], "output: expected a file, got the pipe or device /dev/full"),
        (["digits", "/nowhere/at/all.npz"], "output: there is no folder /nowhere/at"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        make_data.main([str(tmp_path / "x.npz") if a == "OUT" else a for a in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--largest", "4"], "--largest: expected at most 3, all images of class 0, got 4"),
        (["--validation", "3"], "--validation: expected at most 2, all images of class 0, got 3"),
    ],
)
def test_more_images_than_there_are_is_an_error_instead_of_another_tail(idx, capsys, options, message):
    enough = ["--largest", "3", "--validation", "1", "--imbalance", "1"]
    with pytest.raises(SystemExit) as stopped:
        make_data.main(["fashion-mnist", str(idx / "data.npz"), "--source", str(idx), *enough, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (idx / "data.npz").exists()


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"no MNIST"), gzip.compress(b"x" * 99)[:20], gzip.compress(b"x")],
    ids=["no gzip", "other content", "cut off", "too short"],  # gzip writes the time, which names no test
)
def test_a_damaged_download_is_named(idx, capsys, content):
    path = idx / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        make_data.main(["fashion-mnist", str(idx / "data.npz"), "--source", str(idx)])
    assert stopped.value.code == 2
    assert f"{path}: expected gzipped bytes in MNIST's format, got others" in capsys.readouterr().err


def test_the_file_has_the_name_that_was_given(tmp_path):
    make_data.main(["digits", str(tmp_path / "digits")])
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
