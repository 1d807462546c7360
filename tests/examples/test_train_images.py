"""examples/train_images.py, and what it shares with train_text.py: examples/training.py."""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import cli
import numpy as np
import pytest
import recipe
import safetensors.torch
import sampling
import timm
import torch
import training
from PIL import Image
from scripts import ROOT, load
from torch import nn
from torch.utils.data import default_collate

from lgla_losses import GroupConvExperts
from lgla_losses.metrics import ShotAccuracy

make_data = load("examples/make_data.py")
train_images = load("examples/train_images.py")

COUNTS = [12, 6, 3]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    make_data.main(["digits", str(path), "--imbalance", "20"])
    return path


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell's background jobs begin with Ctrl-C ignored; these tests press it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tiny(monkeypatch):
    """A network for --backbone that trains in no time; dropout, but no batch norm."""

    def make(dropout=0.0):
        network = lambda: nn.Sequential(  # noqa: E731
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, 16, 3, stride=2)),
            *(nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7)),
        )
        monkeypatch.setattr(train_images, "network_factory", lambda options: network)

    make()
    return make


def arrays(**changes):
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), COUNTS)
    arrays = {
        "train_images": generator.integers(0, 256, (21, 8, 8, 3), dtype=np.uint8),
        "train_labels": labels,
        "val_images": generator.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
        "val_labels": np.arange(6) // 2,
        **changes,
    }
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.fixture
def npz(tmp_path):
    def write(**changes):
        np.savez(tmp_path / "data.npz", **arrays(**changes))
        return tmp_path / "data.npz"

    return write


@pytest.fixture
def folder(tmp_path):
    """The arrays as a folder of PNG files."""
    for half, held_out in (("train", "train"), ("val", "test")):
        for i, (image, label) in enumerate(
            zip(arrays()[f"{half}_images"], arrays()[f"{half}_labels"], strict=True)
        ):
            path = tmp_path / "data" / held_out / str(label) / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return tmp_path / "data"


def run(data, log_dir, *options):
    """Train, by default 2 epochs of 3 steps on the tiny data; the record."""
    defaults = ["--epochs", "2", "--batch-size", "8", "--workers", "0", "--split-at", "3"]
    train_images.main([str(data), "--log-dir", str(log_dir), *defaults, *map(str, options)])
    return json.loads((log_dir / "result.json").read_text())


def weights(log_dir, name="last.pt"):
    return torch.load(log_dir / name, weights_only=True)["model"]


def assert_same_run(log_dir, other):
    """Bit for bit."""
    records = [json.loads((path / "result.json").read_text()) for path in (log_dir, other)]
    assert records[0]["curve"] == records[1]["curve"]
    torch.testing.assert_close(weights(log_dir), weights(other), rtol=0, atol=0)


def interrupt(monkeypatch, step, times=1):
    """Press Ctrl-C in the middle of a step, counted from 1 over the epochs."""
    original, count = training.Trainer._train_step, itertools.count(1)

    def train_step(self, *arguments):
        if next(count) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(training.Trainer, "_train_step", train_step)


def test_it_learns(digits, tmp_path, capsys):
    options = [
        "--backbone",
        "timm:test_resnet",
        "--split-at",
        "layer3",
        "--augment",
        "none",
        "--image-size",
        "16",
    ]
    record = run(digits, tmp_path, *options, "--batch-size", "32", "--epochs", "6")
    final = record["final"]["scores"]
    assert final["ensemble"]["balanced"] > 0.5
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    assert record["final"] == record["curve"][-1]
    assert len(record["curve"]) == 6
    assert record["class_counts"] == dict(
        zip(map(str, range(10)), make_data.long_tail(150, 20.0, 10), strict=True)
    )
    assert record["versions"].keys() == {"python", "torch", "torchvision", "timm", "lgla_losses"}
    assert record["configuration"]["backbone"] == "timm:test_resnet"
    assert record["seed"] == 0
    assert record["seconds"] > 0
    assert list(tmp_path.glob("events.out.tfevents.*"))
    printed, progress = capsys.readouterr()
    for row in ("ensemble", "expert 1", "expert 2", "expert 3"):
        cells = next(line for line in printed.splitlines() if line.startswith(f"│ {row} ")).split("│")[2:-1]
        assert [cell.strip() for cell in cells] == [f"{100 * value:.1f}" for value in final[row].values()]
    assert f"best epoch, chosen on these data: {record['best']['epoch']}" in printed
    assert "loss=" in progress
    assert f"many={100 * record['curve'][0]['scores']['ensemble']['many']:.1f}" in progress


RANDOM = (
    "--optimizer",
    "adamw",
    "--lr",
    "0.01",
    "--augment",
    "randaugment",
    "--cutout",
    "3",
    "--clip-norm",
    "1",
)


def test_interrupted_in_mid_epoch_and_resumed(npz, tmp_path, tiny, monkeypatch, capsys):
    """6 steps of 2 epochs, stopped in the second of each; the weights and the curve are those of one go."""
    tiny(dropout=0.5)
    data, whole, parts = npz(), tmp_path / "whole", tmp_path / "in parts"
    run(data, whole, *RANDOM)
    interrupt(monkeypatch, step=2)
    with pytest.raises(SystemExit) as stopped:
        run(data, parts, *RANDOM)
    assert stopped.value.code == 130
    *_, command = capsys.readouterr().out.splitlines()
    assert shlex.split(command)[-1] == "--resume"
    assert str(parts) in shlex.split(command)
    assert not (parts / "result.json").exists()
    interrupt(monkeypatch, step=3)
    with pytest.raises(SystemExit):
        run(data, parts, *RANDOM, "--resume")
    run(data, parts, *RANDOM, "--resume", "--workers", "2")
    assert_same_run(whole, parts)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted_while_evaluating_and_resumed(npz, tmp_path, tiny, monkeypatch):
    tiny(dropout=0.5)
    data, whole, parts = npz(), tmp_path / "whole", tmp_path / "in parts"
    run(data, whole, *RANDOM)
    original = training.Trainer.evaluate

    def evaluate(self):
        if self.progress.epoch == 0:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(training.Trainer, "evaluate", evaluate)
    with pytest.raises(SystemExit):
        run(data, parts, *RANDOM)
    assert torch.load(parts / "last.pt", weights_only=True)["progress"]["epoch"] == 1
    run(data, parts, *RANDOM, "--resume")
    assert_same_run(whole, parts)


def test_a_second_interrupt_stops_at_once(npz, tmp_path, tiny, monkeypatch):
    interrupt(monkeypatch, step=2, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(npz(), tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_terminals_interrupt_reaches_the_workers_too_and_harms_none(digits, tmp_path):
    code = "import torchvision_shim, runpy; runpy.run_path('examples/train_images.py', run_name='__main__')"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests" / "helpers"), str(ROOT / "examples"))),
    }
    options = [
        "--backbone",
        "timm:test_resnet",
        "--workers",
        "2",
        "--epochs",
        "500",
        "--log-dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(digits), "--log-dir", str(tmp_path), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "last.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in printed
    assert "Traceback" not in errors


def test_the_number_of_workers_changes_nothing(npz, tmp_path, tiny):
    tiny(dropout=0.5)
    for workers in (0, 1, 2):
        run(npz(), tmp_path / str(workers), *RANDOM, "--workers", workers)
    assert_same_run(tmp_path / "0", tmp_path / "1")
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_workers_end_with_the_run(npz, tmp_path, tiny):
    """Not when garbage is collected, in whatever order: their queues then told of bad file descriptors."""
    tiny()
    gc.collect()
    gc.disable()
    try:
        run(npz(), tmp_path / "run", "--workers", 2)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_the_seed_changes_order_augmentation_and_weights(npz):
    data, _, _ = train_images.read_arrays(npz())
    options = argparse.Namespace(image_size=8, augment="flip", cutout=3, batch_size=8, accumulate=1, seed=0)
    samples = train_images.ImageSet(data, train_images.make_transforms(nn.Identity(), options)[0])
    first, again, other = (sampling.Seeded(samples, seed) for seed in (0, 0, 1))
    state = torch.get_rng_state()
    image = first[3, 5][0][0]
    assert torch.equal(image, again[3, 5][0][0])
    assert not torch.equal(image, other[3, 5][0][0])
    assert not torch.equal(image, first[4, 5][0][0])
    assert torch.equal(torch.get_rng_state(), state)
    orders = []
    for options.seed in (0, 1):
        order = sampling.EpochOrder(21, options)
        for order.epoch in (0, 1):
            orders.append([index for batch in order for _, index in batch])
    assert all(sorted(order) == list(range(21)) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_batches_are_even():
    options = argparse.Namespace(batch_size=4, accumulate=3, seed=0)
    steps = sampling.EpochOrder(25, options).steps()
    assert [[len(batch) for batch in step] for step in steps] == [[3, 3, 3], [4, 4], [4, 4]]


def test_accumulated_steps_are_those_of_a_large_batch(npz, tmp_path, tiny):
    """With a last step that is smaller, and an optimizer that scales with the gradient."""
    common = ("--no-aaw", "--lr", "0.1", "--augment", "none")
    once = run(npz(), tmp_path / "once", *common, "--batch-size", "10")
    parts = run(npz(), tmp_path / "parts", *common, "--batch-size", "5", "--accumulate", "2")
    fine = run(npz(), tmp_path / "fine", *common, "--batch-size", "1", "--accumulate", "10")
    for record, name in ((parts, "parts"), (fine, "fine")):
        assert [e["loss"] for e in record["curve"]] == pytest.approx([e["loss"] for e in once["curve"]], 1e-4)
        torch.testing.assert_close(weights(tmp_path / name), weights(tmp_path / "once"), rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_unless_the_user_says_no(npz, tmp_path, tiny, monkeypatch):
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, most: norms.append(most) or clip(p, most))
    data = npz()
    run(data, tmp_path / "clipped")
    assert norms == [1.0] * 6
    run(data, tmp_path / "other", "--clip-norm", "5", "--epochs", "1")
    run(data, tmp_path / "none", "--clip-norm", "0", "--epochs", "1")
    assert norms[6:] == [5.0] * 3
    first, last = weights(tmp_path / "clipped"), weights(tmp_path / "none")
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(npz, tmp_path, tiny, monkeypatch):
    """At a rate of 0, without augmentation, the criterion's of all samples at once."""
    trainers, fit = [], training.Trainer.fit
    monkeypatch.setattr(training.Trainer, "fit", lambda self: trainers.append(self) or fit(self))
    options = ["--no-aaw", "--lr", "0", "--augment", "none", "--batch-size", "4", "--accumulate", "2"]
    record = run(npz(), tmp_path, *options)
    (trainer,) = trainers
    samples = trainer.train_loader.dataset.samples
    (images,), labels = default_collate([samples[i] for i in range(21)])
    expected = trainer.criterion(trainer.model(images), labels).item()
    assert [entry["loss"] for entry in record["curve"]] == pytest.approx([expected] * 2, rel=1e-5)


def test_shot_accuracies_by_hand():
    """Classes of 200, 101 | 100, 20 | 19, 1 training images; the last has no sample to evaluate."""
    metric = ShotAccuracy([200, 101, 100, 20, 19, 1])
    for label, (correct, total) in enumerate([(10, 10), (5, 10), (4, 8), (0, 2), (3, 4), (0, 0)]):
        wrong = (label + 1) % 6
        predicted = torch.tensor([label] * correct + [wrong] * (total - correct), dtype=torch.int64)
        metric.update(predicted, torch.full((total,), label))
    columns = {"balanced": 0.55, "many": 0.75, "medium": 0.25, "few": 0.75, "top-1": 22 / 34}
    assert training.score(metric) == pytest.approx(columns)
    without_few = ShotAccuracy([200, 101])
    without_few.update(torch.tensor([1, 1]), torch.tensor([0, 1]))
    columns = {"balanced": 0.5, "many": 0.5, "medium": None, "few": None, "top-1": 0.5}
    assert training.score(without_few) == columns


def test_weight_decay_spares_norms_and_biases_alike_in_both_layouts():
    def stage():
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))

    decayed = {}
    for layout in ("grouped", "independent"):
        experts = GroupConvExperts(stage, 3, 5, layout=layout, classifier="linear")
        groups = recipe.parameter_groups(experts, 0.1)
        assert sum(len(group["params"]) for group in groups) == len(list(experts.parameters()))
        rate = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        decayed[layout] = {name for name, parameter in experts.named_parameters() if rate[id(parameter)]}
    assert decayed["grouped"] == {"stage.0.weight", "stage.2.weight", "classifiers.weight"}
    assert decayed["independent"] == {
        "classifiers.weight",
        *(f"stage.{k}.{layer}.weight" for k in range(3) for layer in (0, 2)),
    }


def test_schedules():
    def rates(**options):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        rate = {"lr": 1.0, "final_lr": 0.0, "warmup_start": None}
        options = argparse.Namespace(epochs=10, milestones=[6, 8], **rate, **options)
        schedule = recipe.make_schedule(optimizer, options, num_steps=2)
        found = []
        for _ in range(20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    steps = rates(schedule="step", warmup_epochs=2)
    assert steps[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert steps[4:] == pytest.approx([1.0] * 8 + [0.1] * 4 + [0.01] * 4)
    cosine = rates(schedule="cosine", warmup_epochs=0)
    assert cosine == pytest.approx([(1 + np.cos(np.pi * step / 20)) / 2 for step in range(20)])
    risen = rates(schedule="cosine", warmup_epochs=2)
    assert risen[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert risen[4:] == pytest.approx([(1 + np.cos(np.pi * step / 16)) / 2 for step in range(16)])


@pytest.mark.parametrize(("epochs", "milestones"), [(1, []), (2, [1]), (3, [2]), (10, [8, 9])])
def test_milestones_of_short_runs(epochs, milestones):
    parser = argparse.ArgumentParser()
    cli.add_options(parser)
    parser.set_defaults(epochs=epochs, warmup_epochs=0)
    assert cli.parse_options(parser, ["--log-dir", "nowhere"]).milestones == milestones


def test_the_curve_has_the_rate_that_an_epoch_ended_with(npz, tmp_path, tiny):
    options = (
        "--schedule",
        "step",
        "--milestones",
        "1",
        "--warmup-epochs",
        "0",
        "--lr",
        "0.01",
        "--epochs",
        "2",
    )
    curve = run(npz(), tmp_path / "run", *options)["curve"]
    assert [epoch["lr"] for epoch in curve] == pytest.approx([0.01, 0.001])


def test_sixteen_bit_images_keep_their_shades(tmp_path):
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / "grey.png")
    image = np.asarray(train_images.read_image(tmp_path / "grey.png"))
    assert image.shape == (8, 8, 3)
    assert (image[..., 0] == shades // 257).all()


def test_the_libraries_own_normalisation_and_names():
    network = nn.Identity()
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    options = argparse.Namespace(image_size=8, augment="none", cutout=0)
    white = train_images.make_transforms(network, options)[1](Image.new("RGB", (8, 8), "white"))
    torch.testing.assert_close(white, torch.full((3, 8, 8), 2.0))
    options = argparse.Namespace(backbone="timm:test_resnet.r160_in1k", small_images=False)
    assert sum(p.numel() for p in train_images.network_factory(options)().parameters()) > 0


def test_best_and_last(npz, tmp_path, tiny, monkeypatch):
    """Of balanced accuracies 0.3, 0.5, 0.5, 0.1 the second epoch's is the best."""
    script = iter([0.3, 0.5, 0.5, 0.1])
    row = {"many": None, "medium": None, "few": 0.1, "top-1": 0.1}
    monkeypatch.setattr(
        training.Trainer, "evaluate", lambda self: {"ensemble": {"balanced": next(script), **row}}
    )
    record = run(npz(), tmp_path, "--epochs", "4")
    assert (record["best"]["epoch"], record["final"]["epoch"]) == (2, 4)
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["progress"]["epoch"], last["progress"]["epoch"]) == (2, 4)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_checkpoint(npz, tmp_path, tiny, monkeypatch):
    original = training.Trainer._forward

    def forward(self, inputs):
        output = original(self, inputs)
        late = self.model.training and (self.progress.epoch, self.progress.step) == (1, 1)
        return output._replace(logits=output.logits * (float("nan") if late else 1))

    monkeypatch.setattr(training.Trainer, "_forward", forward)
    with pytest.raises(SystemExit, match=r"epoch 2, step 2: expected a finite loss, got nan; lower --lr"):
        run(npz(), tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["progress"]["epoch"] == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--layout", "independent", "--amp", "bf16"),
        ("--classifier", "linear"),
        ("--adjustment", "softmax", "--no-aaw", "--num-experts", "1"),
        ("--adjustment", "balanced", "--num-experts", "2"),
        ("--adjustment", "logit", "--tau", "0.5", "--no-aaw"),
        ("--schedule", "step", "--warmup-epochs", "0", "--momentum", "0", "--channels-last"),
        ("--augment", "autoaugment"),
    ],
)
def test_options_train(npz, tmp_path, tiny, options):
    record = run(npz(), tmp_path, *options)
    assert np.isfinite([entry["loss"] for entry in record["curve"]]).all()


@pytest.mark.slow
def test_compiled_training_is_the_same_function(npz, tmp_path, tiny):
    records = [
        run(npz(), tmp_path / name, *options) for name, options in (("plain", ()), ("fast", ["--compile"]))
    ]
    losses = [[entry["loss"] for entry in record["curve"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_folder_and_an_npz_file_give_the_same(npz, folder, tmp_path, tiny):
    run(npz(), tmp_path / "npz")
    run(folder, tmp_path / "folder")
    assert_same_run(tmp_path / "npz", tmp_path / "folder")


def test_grey_images_are_rgb_images_of_equal_channels(npz, tmp_path, tiny):
    grey = {name: array[..., 0] for name, array in arrays().items() if name.endswith("images")}
    rgb = {name: np.repeat(array[..., None], 3, axis=-1) for name, array in grey.items()}
    run(npz(**grey), tmp_path / "grey")
    run(npz(**rgb), tmp_path / "rgb")
    assert_same_run(tmp_path / "grey", tmp_path / "rgb")


def test_corrupt_images_are_named_and_can_be_skipped(folder, tmp_path, tiny, capsys):
    whole = (folder / "train" / "0" / "03.png").read_bytes()
    (folder / "train" / "0" / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "1" / "12.png").write_bytes(b"")
    assert "2 corrupt images" in refused([folder], tmp_path, capsys)
    record = run(folder, tmp_path / "run", "--skip-corrupt")
    assert list(record["class_counts"].values()) == [11, 5, 3]
    printed = capsys.readouterr().out
    assert "left out 2 corrupt images" in printed
    assert all(name in printed for name in ("03.png", "12.png"))


def test_large_images_are_cropped_at_random_scales():
    options = argparse.Namespace(image_size=96, augment="flip", cutout=0)
    transforms = train_images.make_transforms(nn.Identity(), options)
    image = Image.fromarray(np.zeros((120, 200, 3), dtype=np.uint8))
    assert [tuple(transform(image).shape) for transform in transforms] == [(3, 96, 96)] * 2


def test_small_images_keep_their_resolution():
    options = argparse.Namespace(backbone="torchvision:resnet18", small_images=True)
    network = train_images.network_factory(options)()
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    assert stem(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 32, 32)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_pretrained_weights_begin_every_expert(npz, tmp_path, ending):
    """A network of 5 classes, whose head is of no use, in all experts; a rate of 0 leaves it as it is."""
    network = timm.create_model("test_resnet", num_classes=5)
    path = tmp_path / f"network{ending}"
    save = torch.save if ending == ".pt" else safetensors.torch.save_file
    save(network.state_dict(), path)
    options = ["--backbone", "timm:test_resnet", "--split-at", "layer3", "--pretrained", path, "--lr", "0"]
    run(npz(), tmp_path / "run", *options, "--image-size", "32", "--epochs", "1", "--warmup-epochs", "0")
    trained = weights(tmp_path / "run")
    assert torch.equal(trained["trunk.layer1.0.conv1.weight"], network.layer1[0].conv1.weight)
    for expert in trained["experts.stage.layer4.0.conv1.weight"]:
        assert torch.equal(expert, network.layer4[0].conv1.weight)


def test_without_pretrained_weights_every_expert_begins_as_the_network_does(npz, tmp_path):
    options = ["--backbone", "timm:test_resnet", "--split-at", "layer3", "--lr", "0", "--image-size", "32"]
    run(npz(), tmp_path, *options, "--epochs", "1", "--warmup-epochs", "0")
    first, second, third = weights(tmp_path)["experts.stage.layer4.0.conv1.weight"]
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    fresh = timm.create_model("test_resnet").layer4[0].conv1.weight
    assert first.std().item() == pytest.approx(fresh.std().item(), rel=0.1)


def refused(arguments, tmp_path, capsys):
    """The one line that ends a run before it begins."""
    log_dir = tmp_path / "refused"
    with pytest.raises(SystemExit) as stopped:
        train_images.main([*map(str, arguments), "--log-dir", str(log_dir), "--workers", "0"])
    assert stopped.value.code == 2
    assert not log_dir.exists()
    *_, line = capsys.readouterr().err.splitlines()
    return line


LABELS = np.repeat(np.arange(3), COUNTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_images": None, "val_labels": None}, "got no val_images, val_labels"),
        (
            {"train_images": np.zeros((21, 3, 8, 8), np.uint8)},
            "or [N, H, W], got uint8 [21, 3, 8, 8]",
        ),
        ({"train_images": np.zeros((21, 8, 8, 3))}, "got float64 [21, 8, 8, 3]"),
        (
            {"val_images": np.zeros((0, 8, 8), np.uint8), "val_labels": np.zeros(0, int)},
            "got uint8 [0, 8, 8]",
        ),
        ({"train_labels": LABELS[:20]}, "train_labels integers [21], got int64 [20]"),
        ({"train_labels": LABELS / 2}, "train_labels integers [21], got float64 [21]"),
        ({"train_labels": np.array([object()] * 21)}, "expected an .npz file of plain arrays, got another"),
        ({"train_labels": LABELS - 1}, "expected labels 0..1 as in train_labels, got -1, 2"),
        ({"val_labels": np.arange(6)}, "expected labels 0..2 as in train_labels, got 3, 4, 5"),
        ({"train_labels": 2 * LABELS}, "train_labels of every class 0..4, got none of 1"),
        ({"train_labels": 0 * LABELS, "val_labels": np.zeros(6, int)}, "at most C + 1 = 2 for 1 classes"),
    ],
)
def test_wrong_arrays_are_refused(npz, tmp_path, capsys, changes, message):
    assert message in refused([npz(**changes)], tmp_path, capsys)


def empty(path):
    for image in path.rglob("*.png"):
        image.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "expected a folder or file, got none"),
        (
            lambda root: shutil.rmtree(root / "train"),
            "train/ and val/ or test/ in it, got test",
        ),
        (
            lambda root: shutil.rmtree(root / "test"),
            "train/ and val/ or test/ in it, got train",
        ),
        (lambda root: empty(root / "train"), "in one folder a class, got none"),
        (lambda root: empty(root / "test"), "in one folder a class, got none"),
        (lambda root: empty(root / "train" / "1"), "images of every class, got none of 1"),
        (lambda root: (root / "test" / "2").rename(root / "test" / "cat"), "got cat"),
    ],
)
def test_wrong_folders_are_refused(folder, tmp_path, capsys, spoil, message):
    spoil(folder)
    assert message in refused([folder], tmp_path, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "resnet18"], "expected torchvision:NAME or timm:NAME, got resnet18"),
        (["--backbone", "timm:resnet1"], "close names: resnet18, "),
        (["--backbone", "torchvision:resnet17"], "print(models.list_models())"),
        (
            ["--backbone", "timm:test_vit"],
            "--split-at: required for timm:test_vit, whose modules are patch_embed, ",
        ),
        (
            ["--backbone", "timm:vit_tiny_patch16_224", "--split-at", "blocks.6"],
            "--split-at blocks.6: Input height (8)",
        ),
        (
            ["--split-at", "layer9"],
            "--split-at layer9: at: expected the path of a module of ResNet, got 'layer9'",
        ),
        (["--small-images", "--backbone", "torchvision:squeezenet1_1"], "got a SqueezeNet with another stem"),
        (["--small-images", "--backbone", "timm:test_resnet"], "got a ResNet with another stem"),
        (["--cutout", "8"], "--cutout: expected less than --image-size 8, got 8"),
        (["--cutout", "-1"], "--cutout: expected a number from 0 to inf, got -1"),
        (["--epochs", "0"], "--epochs: expected a number from 1 to inf, got 0"),
        (["--lr", "nan"], "--lr: expected a number from 0 to inf, got nan"),
        (["--lr", "high"], "--lr: invalid float value: 'high'"),
        (
            ["--adjustment", "sade", "--num-experts", "2"],
            "--adjustment sade: expected --num-experts 3, got 2",
        ),
        (["--num-experts", "1"], "--num-experts 1: expected --no-aaw and an --adjustment other than lgla"),
        (["--num-experts", "5"], "expected at most C + 1 = 4 for 3 classes"),
        (
            ["--adjustment", "balanced", "--tau", "1"],
            "--tau: expected an --adjustment of lgla, logit, sade",
        ),
        (["--amp", "fp16", "--device", "cpu"], "--amp fp16: expected a GPU, got --device cpu"),
        (["--device", "abacus"], "--device abacus: "),
        (["--resume"], "--resume: there is no "),
        (
            ["--pretrained", "nowhere.pt"],
            "nowhere.pt: expected tensors of torch.save or safetensors",
        ),
        (["--pretrained", "nowhere.safetensors"], "nowhere.safetensors: expected tensors of torch.save or"),
    ],
)
def test_wrong_options_are_refused(npz, tmp_path, capsys, options, message):
    assert message in refused([npz(), *options], tmp_path, capsys)


def test_other_files_are_refused(tmp_path, capsys):
    for path in (tmp_path / "data.npz", tmp_path / "array.npy"):
        path.write_bytes(b"no archive") if path.suffix == ".npz" else np.save(path, np.zeros(3))
        assert "expected an .npz file of plain arrays" in refused([path], tmp_path, capsys)


def test_pretrained_weights_of_another_network_are_refused(npz, tmp_path, capsys):
    state = timm.create_model("test_resnet").state_dict()
    state["extra"] = state.pop("layer1.0.conv1.weight")
    state["layer3.0.bn1.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "other.pt")
    options = ["--backbone", "timm:test_resnet", "--pretrained", tmp_path / "other.pt"]
    message = refused([npz(), *options], tmp_path, capsys)
    assert "missing: layer1.0.conv1.weight" in message
    assert "of another shape: layer3.0.bn1.bias [5], expected [48]" in message
    assert "unexpected: extra" in message


def test_a_run_is_neither_overwritten_nor_continued_as_another(npz, tmp_path, tiny, capsys):
    run(npz(), tmp_path / "run")
    content = (tmp_path / "run" / "last.pt").read_bytes()
    changed = {"train_labels": np.append(LABELS[1:], 2)}
    for changes, options, message in (
        ({}, [], "add --resume to continue it, or choose another folder"),
        ({}, ["--resume", "--num-experts", "2"], "num_experts 3, now 2"),
        (
            {},
            ["--resume", "--backbone", "timm:resnet18"],
            "backbone 'torchvision:resnet18', now 'timm:resnet18'",
        ),
        (changed, ["--resume"], "class_counts [12, 6, 3], now [11, 6, 4]"),
    ):
        with pytest.raises(SystemExit):
            run(npz(**changes), tmp_path / "run", *options)
        assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").read_bytes() == content


def test_other_files_are_no_checkpoints(npz, tmp_path, tiny, capsys):
    run(npz(), tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["model"]["trunk.0.weight"] = torch.zeros(2)
    for content, message in (
        (checkpoint, "of another shape: trunk.0.weight [2], expected [8, 3, 3, 3]"),
        ({"model": {}}, "--resume: expected a checkpoint of this script, got another file as "),
        (
            Exception,
            "last.pt: expected tensors of torch.save or safetensors, got another file (UnpicklingError",
        ),
    ):
        torch.save(content, last)
        with pytest.raises(SystemExit):
            run(npz(), tmp_path / "run", "--resume")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--warmup-epochs", "1"], ["--schedule", "step"]])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_first_try_of_one_epoch_trains_and_saves(npz, tmp_path, tiny, epochs, options):
    """Also where the rate rises to the last step, and where a checkpoint of such a run is resumed."""
    options = ["--epochs", epochs, *options]
    record = run(npz(), tmp_path / "run", *options)
    assert len(record["curve"]) == epochs
    assert all(entry["lr"] > 0 for entry in record["curve"])
    assert run(npz(), tmp_path / "run", *options, "--resume")["curve"] == record["curve"]


def test_a_warm_up_as_long_as_the_run_or_longer_says_so(npz, tmp_path, tiny, capsys):
    run(npz(), tmp_path / "equal", "--warmup-epochs", "2")
    assert "--warmup-epochs" not in capsys.readouterr().err
    curve = run(npz(), tmp_path / "longer", "--warmup-epochs", "3")["curve"]
    assert "--warmup-epochs 3 of --epochs 2: the run ends before the learning rate" in capsys.readouterr().err
    assert [entry["lr"] for entry in curve] == pytest.approx([0.1 * 3 / 10, 0.1 * 6 / 10])


def test_a_wrong_path_is_told_before_what_an_earlier_run_left(npz, tmp_path, tiny, capsys):
    run(npz(), tmp_path / "run", "--epochs", "1")
    for data, message in (
        (tmp_path / "nowhere.npz", "nowhere.npz: expected a folder or file, got none"),
        (npz(), "--log-dir: .*last.pt belongs to an earlier run; add --resume to continue it"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(data, tmp_path / "run", "--epochs", "1")
        assert stopped.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_pipe_among_the_images_is_named_instead_of_waited_for(folder, tmp_path, tiny, capsys):
    os.mkfifo(folder / "train" / "0" / "pipe.png")
    assert "1 corrupt images: " in (message := refused([folder], tmp_path, capsys))
    assert "pipe.png" in message
    assert list(run(folder, tmp_path / "run", "--skip-corrupt")["class_counts"].values()) == COUNTS


def test_a_pipe_as_the_data_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.npz")
    message = refused([tmp_path / "pipe.npz"], tmp_path, capsys)
    assert "expected a folder or an .npz file of images, got a pipe or device" in message


def test_a_folder_that_cannot_be_made_is_refused_before_training(npz, tmp_path, tiny, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        run(npz(), tmp_path / "file" / "run")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--log-dir: {tmp_path}/file/run cannot be written (Not a directory); choose another" in line


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(npz, tmp_path, tiny, monkeypatch, capsys):
    save = torch.save

    def save_until_full(content, file):
        if content["progress"]["epoch"] == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(SystemExit) as stopped:
        run(npz(), tmp_path / "run", "--epochs", "3")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"(last|best)\.pt: cannot be written \(\[Errno 28\] No space left on device\)", line)
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["epoch"] == 1
    monkeypatch.undo()
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["progress"]["epoch"] == 1


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("optimizer", {}),
        ("optimizer", 3),
        ("model", 3),
        ("configuration", 3),
        ("progress", {"epochs": 3}),
        ("schedule", "text"),
        ("rng", torch.zeros(3)),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(npz, tmp_path, tiny, capsys, part, content):
    run(npz(), tmp_path / "run", "--epochs", "1")
    last = tmp_path / "run" / "last.pt"
    torch.save({**torch.load(last, weights_only=True), part: content}, last)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(npz(), tmp_path / "run", "--epochs", "1", "--resume")
    assert stopped.value.code == 2
    assert f"got a damaged one as {last} (" in capsys.readouterr().err.splitlines()[-1]


def test_a_text_as_pretrained_weights_is_refused(npz, tmp_path, capsys):
    (tmp_path / "notes.pt").write_text("Weights are to go here.\n")
    message = refused(
        [npz(), "--backbone", "timm:test_resnet", "--pretrained", tmp_path / "notes.pt"], tmp_path, capsys
    )
    assert f"{tmp_path}/notes.pt: expected tensors of torch.save or safetensors, got another file" in message
