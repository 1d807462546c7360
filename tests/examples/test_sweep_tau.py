"""examples/sweep_tau.py."""

import json
import os

import numpy as np
import pytest
import sweep_tau


def test_one_epoch_of_two_experts(tmp_path):
    output = tmp_path / "sweep.json"
    sweep_tau.main(
        [
            *["--experts", "2", "--ratios", "1", "0.5", "1", "--seeds", "2", "--epochs", "1", "--output"],
            str(output),
        ]
    )
    record = json.loads(output.read_text())
    assert [(cell["experts"], cell["ratio"]) for cell in record["cells"]] == [(2, 0.5), (2, 1.0)]
    assert all(len(cell["balanced"]) == 2 for cell in record["cells"])  # a ratio given twice counts once
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def arrays(**changes):
    half = {"images": np.zeros((10, 4, 4), np.uint8), "labels": np.arange(10)}
    return {f"{name}_{kind}": array for name in ("train", "val") for kind, array in half.items()} | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: expected a number from 1 to inf, got 0"),
        (["--seeds", "0"], "--seeds: expected a number from 1 to inf, got 0"),
        (["--experts", "1"], "--experts: expected a number from 2 to 11, got 1"),
        (["--experts", "12"], "--experts: expected a number from 2 to 11, got 12"),
        (["--ratios", "-1"], "--ratios: expected a number from 0 to inf, got -1"),
        (["--data", "nowhere.npz"], "--data: expected an .npz file, got nothing at nowhere.npz"),
        (["--data", "PIPE"], "--data: expected an .npz file, got a pipe or device"),
        (["--data", "TEXT"], "text.npz: expected an .npz file of plain arrays, got another"),
        (["--data", "COLOUR"], "data.npz: expected grey train_images uint8 [N, H, W], got [10, 4, 4, 3]"),
        (["--data", "FEW"], "data.npz: expected val labels of all classes 0..9, got 0"),
        (["--output", "sweep.png"], "--output: expected a .json file, got sweep.png"),
        (["--output", "no/such/folder.json"], "--output: there is no folder no/such"),
        (["--output", "PIPE"], "--output: expected a file, got the pipe or device"),
    ],
)
def test_wrong_arguments_end_before_any_training(arguments, message, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "text.npz").write_text("no archive")
    changes = {
        "COLOUR": {"train_images": np.zeros((10, 4, 4, 3), np.uint8)},
        "FEW": {"val_labels": np.zeros(10, int)},
    }
    np.savez(tmp_path / "data.npz", **arrays(**changes.get(arguments[1], {})))
    places = {"PIPE": "pipe.npz", "TEXT": "text.npz", "COLOUR": "data.npz", "FEW": "data.npz"}
    arguments = [str(tmp_path / places[a]) if a in places else a for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        sweep_tau.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
