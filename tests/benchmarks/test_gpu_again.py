"""`make gpu` in a folder that an earlier run has written into."""

from itertools import pairwise

import gpu
import pytest


def training(options):
    """The command that trains, as a dictionary of its options."""
    *_, part = gpu.parts_of("train", options)
    return {word: value for word, value in pairwise(part.command) if word.startswith("--")}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npz"
    path.touch()
    return ["--data", str(path), "--out", str(tmp_path / "out")]


def test_a_dry_run_leaves_no_checkpoint_in_the_way_of_the_next_run(data, tmp_path):
    dry, true = gpu.parse_options([*data, "--device", "cpu"]), gpu.parse_options(data)
    folder = gpu.Path(training(dry)["--out"])
    folder.mkdir()
    (folder / "seed0.pt").touch()
    assert training(dry)["--out"] == str(folder)
    assert not folder.exists()
    assert training(true)["--out"] == str(tmp_path / "out" / "train")


def test_a_second_run_is_refused_before_its_first_section(data, tmp_path, capsys):
    gpu.parse_options(data)
    checkpoint = tmp_path / "out" / "train" / "seed0.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    with pytest.raises(SystemExit) as stopped:
        gpu.parse_options(data)
    assert stopped.value.code == 2
    assert f"{checkpoint} is of an earlier run; take another folder" in capsys.readouterr().err
    gpu.parse_options([*data, "--sections", "check", "bench"])
