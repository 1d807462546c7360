"""What the Triton kernels alone promise: launches, graphs, and code for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgla_losses import functional

triton = pytest.importorskip("triton", reason="needs Triton")
from lgla_losses.kernels import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
OPTIONS = {"ignore_index": -100, "label_smoothing": 0.0}


def batch(num_samples, num_classes, dtype=torch.float64):
    logits = 60 * torch.rand(num_samples, 3, num_classes, dtype=dtype, device=DEVICE) - 30
    return logits, torch.randint(num_classes, (num_samples,), device=DEVICE)


def test_a_target_that_is_no_class_gives_nan():
    """Where values are not checked, reading beyond the logits would be worse."""
    logits, _ = batch(3, 5)
    target = torch.tensor([1, 5, -7], device=DEVICE)
    losses, _ = kernels.forward(logits, target, None, None, None, reduce=False, gradient=None, **OPTIONS)
    assert losses.isnan().tolist() == [False, True, True]


def test_weights_of_several_blocks(monkeypatch, close):
    monkeypatch.setattr(kernels, "sample_tile", lambda *_: kernels.Tile(4, 4, 4))
    logits, target = batch(70, 6)
    target[[1, 8, 9, 10, 11]] = -100
    group_index = torch.randint(2, (6,), device=DEVICE)
    angles, parts = kernels.statistics(logits, target, group_index, 2, scale=30.0, ignore_index=-100)
    assert len(parts) == 18
    weights, _ = kernels.weights(angles, target, group_index, parts, ignore_index=-100, num_ranks=1)
    group = functional.target_groups(target, group_index, -100)
    close(weights, functional.aaw_weights(angles, group, functional.aaw_statistics(angles, group, 2)))


def test_one_launch_up_to_a_thousand_samples():
    assert kernels.fits_one_block(1024, 3)
    assert not kernels.fits_one_block(1025, 3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_step_can_be_captured_in_a_graph():
    logits, target = batch(8, 100, torch.float32)
    group_index = torch.randint(2, (100,), device=DEVICE)
    table = -torch.rand(3, 100, dtype=torch.float64, device=DEVICE)
    out = torch.empty_like(logits)

    def step():
        weights, divisor = kernels.weights_of(logits, target, group_index, 2, scale=30.0, ignore_index=-100)
        total, _ = kernels.forward(
            logits, target, table, weights, divisor, reduce=True, gradient=out, **OPTIONS
        )
        kernels.rescale_(out, divisor)
        return total

    eager = step()
    gradient = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    out.zero_()
    graph.replay()
    assert torch.equal(total, eager)
    assert torch.equal(out, gradient)


def compile_kernels(directory, *options):
    """The record of benchmarks/kernel_resources.py, which compiles anew for GPUs that need not be here."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("needs Triton 3.3 to compile for other machines")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(directory / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parents[1] / "benchmarks" / "kernel_resources.py"
    output = directory / "record.json"
    subprocess.run(
        [sys.executable, script, "--output", output, *options], env=environment, check=True, timeout=900
    )
    return json.loads(output.read_text())["rows"]


def test_kernels_compile_for_a_gpu(tmp_path):
    rows = compile_kernels(
        tmp_path, "--targets", "sm_90", "--dtypes", "bfloat16", "--classes", "100", "100000"
    )
    names = {row["kernel"] for row in rows}
    assert names == {
        "_statistics", "_weights", "_forward", "_forward_blocked", "_backward", "_total", "_rescale"
    }  # fmt: skip
    assert all(row["spill_bytes"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("options", [[], ["--plain", "--dtypes", "float32"]], ids=["all", "plain"])
def test_kernels_compile_for_every_gpu(tmp_path, target, options):
    rows = compile_kernels(tmp_path, "--targets", target, *options)
    assert all(row["spill_bytes"] == 0 for row in rows if row["configuration"]["dtype"] != "float64")
