"""examples/train_lightning.py: Lightning trains, logs, saves and resumes with the loss and its monitor."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from curves import curves
from scripts import ROOT, load

import lgla_losses
from lgla_losses.data import long_tailed_counts

make_data = load("examples/make_data.py")
train_lightning = load("examples/train_lightning.py")

pytestmark = [
    # Lightning's own, of a small machine and of a run that goes on in its folder.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    make_data.main(["digits", str(path), "--imbalance", "20"])
    return path


def run(data, log_dir, *options):
    options = ["--batch-size", "80", "--log-every", "2", "--devices", "1", *options]
    given = [] if data is None else [str(data)]
    train_lightning.main([*given, "--log-dir", str(log_dir), *options])
    return torch.load(log_dir / "last.ckpt", weights_only=True)


def test_it_learns_and_logs_what_the_loss_does(digits, tmp_path, capsys):
    run(digits, tmp_path, "--epochs", "5")
    logged = curves(tmp_path)
    assert logged["accuracy/all"][-1][1] > 0.5
    assert logged["loss"][-1][1] < 0.5 * logged["loss"][0][1]
    steps = [step for step, _ in logged["angle/expert 1"]]
    assert steps == list(range(2, steps[-1] + 1, 2))
    assert logged["angle/expert 1"][-1][1] < logged["angle/expert 1"][0][1] < math.pi
    assert all(value >= 1 for _, value in logged["weight/expert 3"])
    for name in ("hard share/expert 2", "accuracy/ensemble/group 2", "reference/expert 1/group 1"):
        assert len(logged[name]) == len(steps), name
    printed = capsys.readouterr().out
    assert all(column in printed for column in ("all", "many", "medium", "few"))
    row = next(line for line in printed.splitlines() if " accuracy/all " in line)
    assert f"{logged['accuracy/all'][-1][1]:.4f}"[:5] in row


@pytest.mark.parametrize(("options", "largest"), [((), 1.0), (("--clip-norm", "0"), 0.0)])
def test_gradients_are_clipped_unless_the_user_says_no(digits, tmp_path, monkeypatch, options, largest):
    clipped, clip = [], train_lightning.LongTailedClassifier.configure_gradient_clipping

    def record(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clipped.append(gradient_clip_val)
        clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    monkeypatch.setattr(train_lightning.LongTailedClassifier, "configure_gradient_clipping", record)
    run(digits, tmp_path, "--epochs", "1", *options)
    assert set(clipped) == {largest}


@pytest.mark.slow
def test_copied_alone_it_trains_on_long_tailed_digits_and_resumes(tmp_path):
    shutil.copy(ROOT / "examples" / "train_lightning.py", tmp_path)
    shim = ROOT / "tests" / "helpers" / "torchvision_shim.py"
    done = subprocess.run(
        [sys.executable, shim, "train_lightning.py", "--epochs", "1", "--devices", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy/few" in done.stdout
    log_dir = tmp_path / "runs" / "train_lightning"
    before = torch.load(log_dir / "last.ckpt", weights_only=True)
    assert before["hyper_parameters"]["class_counts"] == long_tailed_counts(150, 10, 50).tolist()
    assert run(None, log_dir, "--epochs", "2", "--resume")["epoch"] == before["epoch"] + 1 == 1


def test_the_digits_to_validate_are_none_of_those_to_train():
    train, val = train_lightning.read_images(None)
    assert np.bincount(val.targets).tolist() == [24] * 10
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in val.images}
    assert train[0][0].shape == (3, 8, 8)
    assert max(image.max().item() for image, _ in train) == 1


def test_without_scikit_learn_it_says_what_to_give_or_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stopped:
        run(None, tmp_path / "run")
    assert stopped.value.code == 2
    assert "pass FILE.npz, or pip install scikit-learn" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_monitor_changes_nothing_that_is_trained(digits, tmp_path, monkeypatch):
    watched = run(digits, tmp_path / "watched", "--epochs", "1")["state_dict"]
    monkeypatch.setattr(train_lightning, "LogLoss", lambda every: train_lightning.Callback())
    without = run(digits, tmp_path / "without", "--epochs", "1")["state_dict"]
    torch.testing.assert_close(watched, without, rtol=0, atol=0)


def test_a_killed_run_resumes(digits, tmp_path, monkeypatch, capsys):
    def killed(self):
        if self.current_epoch == 2:
            raise OSError("killed")

    monkeypatch.setattr(train_lightning.LongTailedClassifier, "on_train_epoch_start", killed)
    with pytest.raises(OSError, match="killed"):
        run(digits, tmp_path, "--epochs", "3")
    monkeypatch.undo()
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert before["epoch"] == 1
    with pytest.raises(SystemExit) as stopped:
        run(digits, tmp_path, "--epochs", "3")
    assert stopped.value.code == 2
    assert "belongs to an earlier run; add --resume to continue it" in capsys.readouterr().err
    after = run(digits, tmp_path, "--epochs", "3", "--resume")
    assert after["epoch"] == 2
    assert after["global_step"] == before["global_step"] * 3 // 2
    steps = [step for step, _ in curves(tmp_path)["angle/expert 1"]]
    assert steps == sorted(set(steps))
    assert steps[-1] > before["global_step"]


def test_a_checkpoint_is_a_whole_model(digits, tmp_path):
    """With the loss, whose groups and adjustments it holds."""
    run(digits, tmp_path, "--epochs", "1")
    model = train_lightning.LongTailedClassifier.load_from_checkpoint(
        tmp_path / "best.ckpt", map_location="cpu"
    ).eval()
    assert model.criterion.grouper.class_counts.tolist() == make_data.long_tail(150, 20.0, 10)
    output = model(torch.rand(2, 3, 8, 8))
    assert isinstance(output, lgla_losses.ExpertOutput)
    assert output.ensemble().shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.npz"], "nowhere.npz: expected an .npz file with the arrays train_images"),
        (["--strategy", "abacus"], "abacus"),
        (["--devices", "0"], "--devices 0"),
        (["--devices", "many"], "--devices many"),
        (["--devices", "1" + 400 * "0"], "--devices 1000"),
        (["--resume"], "--resume: there is no "),
        (["--epochs", "0"], "--epochs: expected a number >= 1, got 0"),
    ],
)
def test_wrong_input_is_refused(digits, tmp_path, capsys, arguments, message):
    data = [] if arguments[0].endswith(".npz") else [str(digits)]
    with pytest.raises(SystemExit) as stopped:
        train_lightning.main([*data, *arguments, "--log-dir", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_another_run_is_neither_continued_nor_overwritten(digits, tmp_path, capsys):
    run(digits, tmp_path, "--epochs", "1")
    before = (tmp_path / "last.ckpt").read_bytes()
    for options, message in (
        ([], "add --resume to continue it"),
        (["--resume", "--lr", "0.5"], "to another run: lr differs; choose another --log-dir"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(digits, tmp_path, *options)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "last.ckpt").read_bytes() == before
