"""The benchmark of prediction: a miniature of it, and what its record says."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """The benchmark, with two data sets that are made up: one with a test part, one that is cross-fitted."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import prediction
    import real_data

    def pool(size, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (size,), generator=generator)
        inputs = 2 * torch.eye(4)[labels] + torch.randn(size, 4, generator=generator)
        return real_data.Pool(inputs, labels.numpy())

    sets = {
        "cut": real_data.DataSet(
            lambda _: (pool(200, 0), pool(60, 1)), 40, imbalance=4.0, epochs=2, batch=16
        ),
        "natural": real_data.DataSet(
            lambda _: (pool(150, 2), None), None, epochs=2, batch=16, cross_fit=True
        ),
    }
    for module in (prediction, real_data):
        monkeypatch.setattr(module, "DATA_SETS", sets)
    monkeypatch.setattr(prediction, "SETS", tuple(sets))
    monkeypatch.setattr(prediction, "FRESH", ("cut",))
    yield prediction
    for name in ("prediction", "real_data", "prior_shift"):
        sys.modules.pop(name, None)


@pytest.fixture
def record():
    return json.loads((BENCHMARKS / "results" / "prediction_cpu.json").read_text(encoding="utf-8"))


def test_a_run_that_is_kept_is_not_repeated_and_tables_and_picture_are_made(script, tmp_path, capsys):
    logits, output, picture = tmp_path / "logits", tmp_path / "record.json", tmp_path / "picture.png"
    options = [str(tmp_path), "--logits", str(logits), "--output", str(output)]
    script.main([*options, "--seeds", "1", "--picture", str(picture)])
    first = json.loads(output.read_text())["runs"]
    kept = {path: path.stat().st_mtime_ns for path in logits.iterdir()}
    assert picture.stat().st_size > 10_000
    assert len(first) == len(kept) == 2 * len(script.LOSSES) * len(script.HEADS)

    capsys.readouterr()
    script.main([*options, "--seeds", "2"])
    runs = json.loads(output.read_text())["runs"]
    assert runs[: len(first)] == first
    assert len(runs) == 2 * len(first)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())

    tables = capsys.readouterr().out
    plain = [run["plain"]["balanced_accuracy"] for run in runs if run["data"] == "cut"]
    assert f"| cut | cosine | {statistics.mean(plain[::6]):.1f} " in tables
    assert "| natural * | linear |" in tables
    assert "| mean, worst run |" in tables


def test_every_sample_is_used_once_and_cross_fitting_has_no_logits_of_a_network_that_saw_them(script):
    from real_data import split_of

    split = split_of("cut", Path(), seed=0)
    sizes = [len(labels) for labels in (split.labels, split.validation_labels)]
    counts = torch.bincount(torch.cat([split.labels, split.validation_labels]))
    assert sizes == [63, 7]
    assert counts.tolist() == [40, 20, 10]
    torch.testing.assert_close(split.inputs.mean(0), torch.zeros(4), atol=1e-6, rtol=0)

    seen = []
    real = script.train
    script.train = lambda part, *rest: seen.append(part) or real(part, *rest)
    try:
        run = script.cross_fit(split, script.LOSSES["softmax x3"], "cosine", 0, 1, 16)
    finally:
        script.train = real
    assert len(seen) == script.FOLDS + 1
    assert len(seen[-1].labels) == sum(sizes)
    for part in seen[:-1]:
        rows = {tuple(row) for row in part.inputs.tolist()}
        assert not rows & {tuple(row) for row in part.validation_inputs.tolist()}
    assert run["validation_logits"].isfinite().all()
    assert len(run["validation_target"]) == sum(sizes)


def test_a_natural_long_tail_has_a_test_part_of_its_own(script):
    from real_data import split_of

    split = split_of("natural", Path(), seed=1)
    sizes = [len(labels) for labels in (split.labels, split.validation_labels, split.test_labels)]
    assert sizes == [95, 10, 45]
    assert not np.isin(split.test_inputs.numpy()[:, 0], split.inputs.numpy()[:, 0]).any()


def test_the_record_is_of_five_paired_seeds_of_every_loss_and_head(record):
    found = {(run["data"], run["loss"], run["head"], run["seed"]) for run in record["runs"]}
    sets = {run["data"] for run in record["runs"]}
    assert len(sets) == 6
    assert len(found) == len(record["runs"]) == len(sets) * 3 * 2 * 5


def test_calibrated_prediction_gains_on_data_that_its_rules_were_not_chosen_on(record, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import prediction

    for loss, least in {"softmax x3": 4.0, "balanced softmax x3": 0.5, "LGLA, tau = K - 1": 0.5}.items():
        assert prediction.mean_gain(record, loss) > least
        for data in {run["data"] for run in record["runs"]}:
            for head in prediction.HEADS:
                assert statistics.mean(prediction.gains(record, data, head, loss)) > -0.3, (data, head, loss)


def test_probabilities_for_the_frequencies_of_training_are_calibrated(record):
    errors = {}
    for run in record["runs"]:
        key = run["data"], run["head"], run["loss"]
        errors.setdefault(key, []).append(run["calibrated"]["ece_as_in_training"])
    means = {key: statistics.mean(values) for key, values in errors.items()}
    assert max(means.values()) < 5, means


def test_an_estimated_prior_gains_on_average(record):
    found = [run["estimated_priors"] for run in record["runs"]]
    mean = {way: statistics.mean(run[way]["mean"] for run in found) for way in found[0]}
    assert mean["default"] > mean["smoothing=0"]
    assert min(mean["default"], mean["validation="], mean["calibrated"]) > 0.5, mean
