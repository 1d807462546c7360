"""examples/train_class_parallel.py in miniature, on two ranks of torchrun."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import ROOT, load


def torchrun(*options):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples"))),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "examples" / "train_class_parallel.py"
    command = [*launcher, script, *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("data_ranks", [1, 2])
@pytest.mark.slow
def test_it_learns(data_ranks):
    done = torchrun("--classes", 301, "--steps", 60, "--data-ranks", data_ranks)
    assert done.returncode == 0, done.stderr
    assert f"301 classes, {151 if data_ranks == 1 else 301} of them on this rank" in done.stdout
    first, last, hits = map(
        float, re.search(r"loss (\S+) -> (\S+), .* accuracy (\S+) %", done.stdout).groups()
    )
    assert last < first / 2
    assert hits > 20  # chance is 0.3 %


def test_gradients_are_clipped_by_the_norm_over_the_classes_of_all_ranks(monkeypatch):
    """Every rank scales the shared parameters alike, whatever the norm of its own classes."""
    script = load("examples/train_class_parallel.py")
    shared, weight = torch.nn.Linear(2, 1, bias=False), torch.nn.Parameter(torch.zeros(1, 3))
    shared.weight.grad, weight.grad = torch.tensor([[2.0, 4.0]]), torch.tensor([[0.0, 3.0, 6.0]])
    others = 35.0  # 20 + 45 + 35 is 10 squared
    monkeypatch.setattr(script.dist, "all_reduce", lambda square, group: square.add_(others))
    ranks = SimpleNamespace(device=torch.device("cpu"), classes=None)

    script.clip_gradients(shared, weight, 1.0, ranks)
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(shared.weight.grad, torch.tensor([[0.2, 0.4]]), **close)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.3, 0.6]]), **close)
    script.clip_gradients(shared, weight, 100.0, ranks)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.3, 0.6]]), **close)


def test_more_experts_than_classes_allow_are_refused_before_ranks_meet(monkeypatch, capsys):
    script = load("examples/train_class_parallel.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--classes", "5", "--num-experts", "7"])
    assert stopped.value.code == 2
    assert "--num-experts: expected at most 6 for 5 classes, got 7" in capsys.readouterr().err


def test_ranks_that_form_no_mesh_are_refused(monkeypatch, capsys):
    script = load("examples/train_class_parallel.py")
    for world_size, message in (
        ("3", "--data-ranks: expected a number that divides 3 ranks"),
        (None, "torchrun"),
    ):
        monkeypatch.setenv("WORLD_SIZE", world_size) if world_size else monkeypatch.delenv("WORLD_SIZE")
        with pytest.raises(SystemExit) as stopped:
            script.main(["--data-ranks", "2"])
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
