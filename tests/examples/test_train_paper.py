"""The paper's recipes: what the files say, and miniature runs from the recipe to the page."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from argparse import Namespace

import make_data
import numpy as np
import paper_recipes
import paper_results
import pytest
import recipe
import torch
import torchvision
import train_paper
import training
from augment import TRAINING, Cutout, transforms
from cli import InputError, parse_options
from PIL import Image
from sampling import Seeded
from scripts import ROOT

from lgla_losses.data import ImageData

RECIPES = ROOT / "examples" / "paper"
CELLS = sorted(path for path in RECIPES.glob("*_*.toml"))
#: Options of a run in seconds.
SMALL = [
    "backbone=resnet8",
    "image_size=8",
    "epochs=2",
    "warmup_epochs=0",
    "evaluate_every=2",
]


@pytest.fixture
def digits(tmp_path):
    make_data.main(["digits", str(tmp_path / "digits.npz"), "--imbalance", "20"])
    return tmp_path / "digits.npz"


def options_of(*settings, files=()):
    said = {}
    for file in files:
        said |= paper_recipes.read_recipe(RECIPES / file)
    said |= dict(map(paper_recipes.parse_setting, settings))
    parser = train_paper.make_parser()
    return parse_options(parser, paper_recipes.as_arguments(parser, said))


def run(tmp_path, digits, *arguments, recipes=("table5_lgla.toml",), settings=()):
    train_paper.main(
        [
            *(str(RECIPES / name) for name in recipes),
            *(
                "--set",
                f"data={digits}",
                "format=npz",
                'imbalance_factor=""',
                "augment=cifar-weak",
                "workers=0",
            ),
            *SMALL,
            *settings,
            *("--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records")),
            *arguments,
        ]
    )


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_every_recipe_is_one(path):
    options = options_of(files=[path.name])
    said = paper_recipes.read_recipe(path)
    assert {"dataset", "table", "row", "column"} <= said.keys()
    assert ("paper" in said) == ("protocol" in said)
    assert options.adjustment in ("lgla", "balanced", "softmax")
    assert (options.tau is None) or options.adjustment == "lgla"


def test_cells_of_every_table_are_there():
    names = {path.stem for path in CELLS}
    for table, number in (("table1", 8), ("table2", 5), ("table3", 2), ("table4", 6), ("table5", 5)):
        assert len([name for name in names if name.startswith(table)]) == number
    assert {f"figure7_k{k}" for k in range(2, 8)} <= names
    assert {"figure3_linear", "figure6_four_experts", "figure8_ic", "figure8_gc", "figure8_leaky"} <= names


def test_the_recipe_of_cifar_is_the_authors():
    options = options_of(files=["table5_lgla.toml"])
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = recipe.make_optimizer(model, options)
    (decayed, kept) = optimizer.param_groups
    assert (len(decayed["params"]), len(kept["params"]), decayed["weight_decay"]) == (4, 0, 2e-4)
    assert (decayed["momentum"], decayed["nesterov"]) == (0.9, True)
    schedule = recipe.make_schedule(optimizer, options, num_steps=2)
    rates = []
    for _ in range(2 * options.epochs):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:10:2] == pytest.approx([0.0333, 0.0467, 0.06, 0.0733, 0.0867], abs=5e-5)
    assert rates[:10:2] == rates[1:10:2]
    assert [rates[2 * epoch] for epoch in (5, 319, 320, 359, 360, 399)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


@pytest.mark.parametrize(
    "settings", [(), ("leaky=true",), ("layout=independent",), ("backbone=torchvision:resnet18",)], ids=str
)
def test_the_papers_gradients_are_neither_clipped_nor_bounded(settings, digits):
    data = (f"data={digits}", "format=npz", 'imbalance_factor=""', "augment=cifar-weak", "num_experts=2")
    options = options_of(*data, *settings, files=["table5_lgla.toml"])
    assert options.clip_norm is None
    model = recipe.build_model(train_paper.prepare(options), options)
    assert model.experts.classifiers.gradient == "exact"


def test_a_cosine_ends_at_the_final_rate():
    options = options_of(files=["table3_inaturalist_gc.toml"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr)
    schedule = recipe.make_schedule(optimizer, options, num_steps=1)
    factor = schedule.lr_lambdas[0]
    assert (options.lr * factor(0), options.lr * factor(options.epochs)) == pytest.approx((0.2, 1e-4))


def test_later_recipes_and_settings_override():
    options = options_of(
        "epochs=3", "tau=1.5", files=["table5_lgla.toml", "data/cifar10_lt.toml", "cpu.toml"]
    )
    assert (options.format, options.backbone, options.epochs, options.tau) == ("cifar10", "resnet8", 3, 1.5)
    assert options_of("tau=", files=["table1_cifar10_lt_if50_gc.toml"]).tau is None
    assert options_of(files=["table5_balms.toml", "data/cifar10_lt.toml"]).tau is None
    assert not options_of("aaw=false", files=["table5_lgla.toml"]).aaw
    # Recipes of data say nothing of how to train.
    for data in ("tiny_imagenet_lt", "cifar10_lt"):
        assert options_of(files=["table4_lgla_weak.toml", f"data/{data}.toml"]).augment == "cifar-weak"


def test_shorter_runs_lower_the_rate_too():
    assert options_of(files=["table5_lgla.toml"]).milestones == [320, 360]
    assert options_of("epochs=20", files=["table5_lgla.toml"]).milestones == [16, 18]
    assert options_of("epochs=10", files=["table5_lgla.toml", "cpu.toml"]).milestones == [8, 9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epoch=3"], "epoch: there is no such option; close names: epochs"),
        (["seed=3"], "seed: there is no such option"),
        (["epochs"], "expected key=value, got 'epochs'"),
        (["epochs=false"], "epochs: expected a value, got false"),
    ],
)
def test_unknown_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        options_of(*settings, files=["table5_lgla.toml"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one recipe"),
        (["table5_lgal.toml"], "there is no such recipe; close names: .*table5_lgla.toml"),
        (["table5_lgla.toml", "--set", "epochs=some"], "argument --epochs: invalid"),
        (["table5_lgla.toml", "--set", "groups=shots"], "--groups shots: expected --num-experts 4, got 3"),
        (
            ["table5_lgla.toml", "--set", "cuda_graphs=true", "device=cpu"],
            "--cuda-graphs: expected --device cuda",
        ),
        (
            ["table5_lgla.toml", "--set", "leaky=true", "layout=independent"],
            "leaky: expected one of resnet32",
        ),
        (["table5_lgla.toml", "--set", "data=nowhere"], "nowhere.*download"),
        (["table5_lgla.toml", "--set", "format=npz", "data=nowhere.npz"], "nowhere.npz"),
        (
            ["table2_places_lt_ic.toml", "--set", 'train_list=""'],
            "format list: expected train_list and val_list",
        ),
        (["table2_places_lt_ic.toml", "--set", "workers=0"], "Places_LT_train.txt"),
        (
            ["table2_places_lt_ic.toml", "--set", "augment_on=device"],
            "augment_on device: expected augment cifar-weak or cifar-strong, got places; use augment_on",
        ),
        (
            ["table5_lgla.toml", "--set", "augment_on=device", "image_size=2"],
            "augment_on device: image_size: expected at least 3 pixels, got 2; use augment_on loader",
        ),
    ],
)
def test_bad_input_ends_with_what_to_do(arguments, message, tmp_path, capsys):
    paths = [str(RECIPES / text) if text.endswith(".toml") else text for text in arguments]
    with pytest.raises(SystemExit) as stop:
        train_paper.main([*paths, "--runs", str(tmp_path), "--records", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_options_are_listed(capsys):
    train_paper.main(["--options"])
    assert "--imbalance-factor" in capsys.readouterr().out


def test_from_recipe_to_record(tmp_path, digits, capsys):
    run(tmp_path, digits, "--seeds", "0", "1")
    path = tmp_path / "records" / "table5_lgla.json"
    record = json.loads(path.read_text())
    assert (record["paper"], record["table"], record["row"]) == (57.15, "Table 5", "LGLA")
    assert [result["seed"] for result in record["runs"]] == [0, 1]
    assert [bool(entry["scores"]) for entry in record["runs"][0]["curve"]] == [False, True]
    accuracies = [100 * result["final"]["scores"]["ensemble"]["balanced"] for result in record["runs"]]
    assert record["runs"][0]["curve"][0]["loss"] != record["runs"][1]["curve"][0]["loss"]
    assert record["summary"]["final"]["balanced"]["mean"] == pytest.approx(np.mean(accuracies))
    assert record["summary"]["final"]["balanced"]["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert record["configuration"]["class_counts"][0] == 150
    outputs = paper_results.read_outputs(tmp_path / "runs" / "table5_lgla" / "seed0" / "outputs.npz")
    assert outputs["logits"].shape == (240, 3, 10)
    right = (outputs["logits"].float().mean(1).argmax(1) == outputs["target"]).double().mean()
    assert 100 * right == pytest.approx(accuracies[0], abs=1)  # logits are kept in half precision

    # A second call makes nothing anew but the record.
    results = list((tmp_path / "runs").rglob("result.json"))
    before = [result.stat().st_mtime_ns for result in results]
    path.unlink()
    run(tmp_path, digits, "--seeds", "0", "1")
    assert [result.stat().st_mtime_ns for result in results] == before
    assert json.loads(path.read_text())["summary"] == record["summary"]

    # Test logits that were lost are computed again from the last checkpoint.
    (tmp_path / "runs" / "table5_lgla" / "seed1" / "outputs.npz").unlink()
    run(tmp_path, digits, "--seeds", "0", "1")
    assert json.loads(path.read_text())["summary"] == record["summary"]
    assert (tmp_path / "runs" / "table5_lgla" / "seed1" / "outputs.npz").exists()

    # Nor does it pass it off as a run of other settings.
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(tmp_path, digits, settings=["lr=7.0", "tau=9.0"])
    assert re.search("got one with tau None, now 9.0, lr 0.1, now 7.0; name the new", capsys.readouterr().err)

    page = tmp_path / "page.md"
    page.write_text(
        "# Results\n<!-- bars: table5_lgla -->\n![A title](bars.png)\n\n"
        "<!-- cells: table5_lgla -->\n<!-- end -->\n<!-- shift: analyses/table5_lgla -->\n<!-- end -->\nEnd\n"
    )
    arguments = [
        "--records",
        str(tmp_path / "records"),
        "--page",
        str(page),
        "--runs",
        str(tmp_path / "runs"),
    ]
    paper_results.main(arguments)
    filled = page.read_text()
    mean, deviation = record["summary"]["final"]["balanced"].values()
    assert f"| LGLA | {mean:.1f}\u00a0±\u00a0{deviation:.1f} |" in filled
    assert "| paper, with RandAug |" in filled
    assert "| 57.15 |" in filled
    assert "over 2 seeds. The paper's numbers: CIFAR-100-LT, ResNet-32, their GC, 400 epochs." in filled
    assert "| uniform | 240 |" in filled
    assert filled.endswith("<!-- end -->\nEnd\n")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    paper_results.main(arguments)
    assert page.read_text() == filled


def test_a_run_that_was_cut_short_goes_on(tmp_path, digits, monkeypatch):
    folder, save = tmp_path / "runs" / "table5_lgla" / "seed0", train_paper.Trainer._save

    def save_and_keep_the_first(trainer, name):
        save(trainer, name)
        if name == "last.pt" and trainer.progress.epoch == 1:
            shutil.copy(folder / "last.pt", folder / "first.pt")

    monkeypatch.setattr(train_paper.Trainer, "_save", save_and_keep_the_first)
    run(tmp_path, digits)
    whole = json.loads((folder / "result.json").read_text())
    (folder / "first.pt").replace(folder / "last.pt")
    (folder / "result.json").unlink()
    run(tmp_path, digits)
    again = json.loads((folder / "result.json").read_text())
    assert again["curve"] == whole["curve"]
    assert not (folder / "first.pt").exists()  # the first epoch was not done again


def trainer_of(digits, tmp_path, *settings, seed=0):
    options = options_of(
        *(f"data={digits}", "format=npz", 'imbalance_factor=""', "workers=0", *SMALL, *settings),
        files=["table5_lgla.toml"],
    )
    options.seed, options.log_dir = seed, tmp_path / "trainer"
    torch.manual_seed(seed)
    return train_paper.Trainer(train_paper.prepare(options), options, "")


def first_inputs(trainer):
    """What the network is given in the first epoch."""
    seen = []
    hook = trainer.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].cpu()))
    with training.Interruption() as interruption:
        trainer._train_epoch(interruption)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("augment", ["cifar-weak", "cifar-strong"])
def test_an_augmentation_on_the_device_trains(tmp_path, digits, augment):
    settings = ["augment_on=device", f"augment={augment}", "batch_size=16", "lr=0.05", "epochs=3"]
    run(tmp_path, digits, settings=[*settings, "evaluate_every=3"])
    record = json.loads((tmp_path / "records" / "table5_lgla.json").read_text())
    assert record["configuration"]["augment_on"] == "device"
    assert record["summary"]["final"]["balanced"]["mean"] > 15  # ten classes


def test_an_augmentation_on_the_device_is_that_of_seed_and_epoch(tmp_path, digits):
    settings = "augment_on=device", "augment=cifar-strong"
    trainer = trainer_of(digits, tmp_path, *settings)
    first = first_inputs(trainer)
    assert first.dtype == torch.float32
    assert first.shape == (len(trainer.task.train), 3, 8, 8)

    # Another method draws another number of weights before.
    other = trainer_of(digits, tmp_path, *settings, "num_experts=2", "adjustment=softmax")
    assert torch.equal(first_inputs(other), first)
    assert not torch.equal(first_inputs(trainer_of(digits, tmp_path, *settings, seed=1)), first)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_recipe_of_a_gpu_augments_there_and_replays_its_steps(tmp_path):
    generator, labels = np.random.default_rng(0), np.repeat(np.arange(4), (40, 20, 10, 5))
    images = generator.integers(0, 256, (75, 8, 8, 3), dtype=np.uint8)
    halves = {"train_images": images, "train_labels": labels, "val_images": images, "val_labels": labels}
    np.savez(tmp_path / "noise.npz", **halves)
    settings = ["augment=cifar-strong", "batch_size=25"]
    run(tmp_path, tmp_path / "noise.npz", recipes=("table5_lgla.toml", "gpu.toml"), settings=settings)
    record = json.loads((tmp_path / "records" / "table5_lgla-gpu.json").read_text())
    configuration = record["configuration"]
    assert (configuration["augment_on"], configuration["cuda_graphs"]) == ("device", True)
    assert all(np.isfinite(entry["loss"]) for entry in record["runs"][0]["curve"])


def test_evaluation_is_the_same_wherever_augmentation_is(tmp_path, digits):
    outputs = []
    for where in ("loader", "device"):
        trainer = trainer_of(digits, tmp_path, f"augment_on={where}", "image_size=16", "device=cpu")
        outputs.append(torch.cat([output.logits for output, _ in trainer.outputs()]).cpu())
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_a_split_network_is_tried_on_what_it_is_to_be_given(tmp_path, digits):
    """Not on uint8, as the images are kept."""
    trainer = trainer_of(
        digits, tmp_path, "augment_on=device", "backbone=torchvision:resnet18", "image_size=32"
    )
    output, _ = next(iter(trainer.outputs()))
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("when", ["between epochs", "in an epoch"])
def test_a_resumed_run_with_an_augmentation_on_the_device_equals_a_whole_one(
    tmp_path, digits, monkeypatch, when
):
    settings = ["augment_on=device", "augment=cifar-strong", "device=cpu"]
    run(tmp_path / "whole", digits, settings=settings)
    ending = (1, 0) if when == "between epochs" else (0, 3)
    step, end = train_paper.Trainer._train_step, train_paper.Trainer._end_epoch

    def interrupted_step(trainer, *arguments):
        loss = step(trainer, *arguments)
        if (trainer.progress.epoch, trainer.progress.step + 1) == ending:
            signal.raise_signal(signal.SIGINT)
        return loss

    def interrupted_end(trainer, *arguments):
        end(trainer, *arguments)
        if (trainer.progress.epoch, 0) == ending:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(train_paper.Trainer, "_train_step", interrupted_step)
    monkeypatch.setattr(train_paper.Trainer, "_end_epoch", interrupted_end)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "cut", digits, settings=settings)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()

    torch.rand(5)  # of another process nothing is left
    run(tmp_path / "cut", digits, settings=settings)
    whole, cut = (
        tmp_path / name / "runs" / "table5_lgla" / "seed0" / "result.json" for name in ("whole", "cut")
    )
    assert json.loads(cut.read_text())["curve"] == json.loads(whole.read_text())["curve"]


def test_test_classes_must_be_trained(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "train.txt").write_text("a.png 0\na.png 1\n")
    (tmp_path / "val.txt").write_text("a.png 0\na.png 1\na.png 2\n")
    options = options_of(
        f"data={tmp_path}", f"train_list={tmp_path / 'train.txt'}", f"val_list={tmp_path / 'val.txt'}",
        files=["table2_places_lt_ic.toml"],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"val\.txt, line 3: expected a class index 0\.\.1, got 2"):
        train_paper.read_data(options)


@pytest.mark.parametrize(
    ("recipes", "settings"),
    [
        (["figure8_leaky.toml"], []),
        (["figure8_ic.toml"], []),
        (["figure3_linear.toml"], []),
        (["figure6_four_experts.toml"], []),
        (["table5_softmax.toml"], ["num_experts=1"]),
    ],
)
def test_other_cells_run(tmp_path, digits, recipes, settings):
    run(tmp_path, digits, recipes=recipes, settings=["epochs=1", 'milestones=""', *settings])
    (path,) = (tmp_path / "records").glob("*.json")
    page = tmp_path / "page.md"
    paper_results.main(
        ["--records", str(tmp_path / "records"), "--runs", str(tmp_path / "runs"), "--page", str(page)]
    )
    assert "![Accuracy](accuracy.png)" in page.read_text()
    assert "| LGLA" in page.read_text() or "| Softmax" in page.read_text()
    pictures = [picture.name for picture in (tmp_path / "records").glob("*.png")]
    expected = {"figure3_linear": "norms", "figure6_four_experts": "fusion"}.get(path.stem)
    assert pictures == ([f"{path.stem}_{expected}.png"] if expected else [])


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_list_of_files_in_the_recipe_of_imagenet(tmp_path, pretrained):
    """The recipe of ImageNet-LT, or of Places-LT from weights in a file, on a handful of images."""
    generator = np.random.default_rng(0)
    for half, per_class in (("train", (9, 3, 2)), ("test", (2, 2, 2))):
        lines = []
        for label, number in enumerate(per_class):
            for i in range(number):
                path = tmp_path / half / f"{label} {i}.jpg"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
                lines.append(f"{half}/{path.name} {label}\n")
        (tmp_path / f"{half}.txt").write_text("".join(lines))
    cell = "table2_places_lt_ic" if pretrained else "table2_imagenet_lt_resnet50_gc"
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    settings = [f"pretrained={tmp_path / 'resnet18.pth'}"] if pretrained else []
    train_paper.main(
        [
            str(RECIPES / f"{cell}.toml"),
            *(
                "--set",
                f"data={tmp_path}",
                f"train_list={tmp_path / 'train.txt'}",
                f"val_list={tmp_path / 'test.txt'}",
            ),
            *("backbone=torchvision:resnet18", "image_size=32", "epochs=1", 'milestones=""', "workers=0"),
            *("batch_size=7", "amp=none", "lr=1e-6", *settings),
            *("--runs", str(tmp_path / "runs"), "--records", str(tmp_path)),
        ]
    )
    record = json.loads((tmp_path / f"{cell}.json").read_text())
    assert record["configuration"]["class_counts"] == [9, 3, 2]
    assert record["runs"][0]["final"]["scores"].keys() == {"ensemble", "expert 1", "expert 2", "expert 3"}
    if pretrained:
        checkpoint = torch.load(tmp_path / "runs" / cell / "seed0" / "last.pt")
        drift = checkpoint["model"]["trunk.conv1.weight"] - weights["conv1.weight"]
        assert 0 < drift.abs().max() < 1e-3


def test_shots_group_by_training_images():
    options = Namespace(groups="shots", num_experts=4, tau=None, aaw=True, classifier="cosine", scale=30.0)
    options.adjustment = "lgla"
    criterion = recipe.build_criterion(torch.tensor([500, 101, 100, 20, 19, 1]), options)
    assert criterion.grouper.group_index.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="few-shot"):
        recipe.build_criterion(torch.tensor([500, 101, 100, 20]), options)


def test_long_tail_is_cut_from_the_data(digits):
    options = options_of(
        f"data={digits}", "format=npz", "imbalance_factor=10", "largest_class=30", "image_size=8",
        files=["table5_lgla.toml"],
    )  # fmt: skip
    train, val = train_paper.read_data(options)
    assert np.bincount(train.targets).tolist()[::9] == [30, 3]
    assert train.images.shape[1:] == (8, 8, 3)
    assert len(val.targets) == 240
    options.largest_class = 500
    with pytest.raises(InputError, match="class 0"):
        train_paper.read_data(options)


def test_cutout_is_a_square_that_the_border_may_cut():
    image, sizes = torch.ones(3, 16, 16), set()
    for seed in range(200):
        torch.manual_seed(seed)
        black = Cutout(8)(image) == 0
        assert torch.equal(black, black.any(0).expand_as(black))
        height, width = black[0].any(1).sum().item(), black[0].any(0).sum().item()
        assert black[0].sum() == height * width
        sizes |= {height, width}
    assert sizes == {4, 5, 6, 7, 8}
    assert image.min() == 1


@pytest.mark.parametrize("name", TRAINING)
def test_augmentations(name):
    size = 32 if name.startswith("cifar") else 64
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    train, val = transforms(name, size)
    assert train(image).shape == val(image).shape == (3, size, size)
    torch.testing.assert_close(val(image), val(image))
    assert not torch.equal(train(image), train(image))
    seeded = Seeded(ImageData(np.asarray(image)[None], [0], train), seed=0)
    torch.testing.assert_close(seeded[5, 0][0], seeded[5, 0][0])


def shifted_outputs(num_samples):
    """Exact logits of three experts for Gaussian classes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 5, generator=generator)
    target = torch.arange(4).repeat_interleave(num_samples)
    points = means[target] + torch.randn(len(target), 5, generator=generator)
    likelihood = -0.5 * (points[:, None] - means).square().sum(-1)
    counts = torch.tensor([1000, 300, 60, 10])
    prior = torch.softmax(0.3 * counts.double().log(), 0)
    logits = (likelihood.double() + prior.log())[:, None].expand(-1, 3, -1)
    return {"logits": logits, "target": target, "class_counts": counts, "implied_prior": prior}


def test_a_fitted_prior_helps_where_the_test_set_is_shifted():
    rows = {row["imbalance"]: row for row in paper_results.label_shift(shifted_outputs(2000))}
    assert rows[50]["samples"] == 2000 + int(2000 * 50 ** (-1 / 3)) + int(2000 * 50 ** (-2 / 3)) + 40
    for factor in (50, -50):
        row = rows[factor]
        assert row["distance, fitted"] < 0.02 < row["distance, fitted, smoothed"]
        assert row["fitted"] > row["as it is"] + 0.5
        assert row["fitted"] == pytest.approx(row["true"], abs=0.5)
    assert rows[1]["uniform"] == rows[1]["true"] > rows[1]["as it is"]
    assert rows[-50]["samples"] == rows[50]["samples"]


def test_the_fusion_weight_decides_whom_the_ensemble_follows():
    outputs = shifted_outputs(50)
    experts = torch.nn.functional.one_hot(torch.arange(4) % 4, 4)[None].expand(200, 4, 4).double()
    outputs |= {"logits": 10 * experts}  # expert k always says class k
    rows = paper_results.fusion_rows([outputs, outputs])
    assert len(rows) == 27
    assert [row["many"] for row in rows if (row["expert"], row["weight"]) in ((0, 0.9), (2, 0.9))] == [
        50.0,
        0.0,
    ]


def test_the_results_pages_are_made_of_the_records():
    folder = ROOT / "benchmarks" / "results" / "paper"
    shown = set()
    for path in paper_results.PAGES:
        page = path.read_text(encoding="utf-8")
        assert paper_results.fill(page, folder) == page
        shown |= {name for found in paper_results.TABLE.finditer(page) for name in found[3].split()}
        for picture in re.findall(r"!\[.+?\]\((.+?)\)", page):
            assert (ROOT / "docs" / picture).exists(), picture
    assert {path.stem for path in folder.glob("*.json")} <= shown


def record_of(row, column="accuracy", seeds=2, paper=None, tau=None, **final):
    scores = {split: {"mean": mean, "deviation": 1.0 if seeds > 1 else None} for split, mean in final.items()}
    summary = {"final": scores, "best": {"balanced": scores["balanced"]}}
    said = {"row": row, "column": column, "paper": paper, "protocol": "CIFAR-100-LT"}
    adjustment = "lgla" if row in ("CLA", "LGLA") else "balanced"
    configuration = {"adjustment": adjustment, "num_experts": 3, "tau": tau}
    return said | {"summary": summary, "runs": seeds * [None], "configuration": configuration}


def test_a_table_says_which_of_the_papers_numbers_are_with_strong_augmentation():
    records = [record_of("LGLA", "w/o RandAug", paper=49.58, balanced=50.0), record_of("CLA", balanced=40.0)]
    header, _, weak, without, *_ = paper_results.cells_table(records).splitlines()
    assert header == "| method | all | many | medium | paper, with RandAug |"
    assert weak.endswith("| 49.58 (without) |")
    assert without.endswith("| - |")


def test_a_table_leaves_out_what_no_row_has():
    records = [record_of("LGLA", seeds=1, balanced=50.0, many=60.0, medium=40.0, few=30.0)]
    assert paper_results.cells_table(records).splitlines()[0] == "| method | all | many | medium | few |"
    assert paper_results.cells_table(records).endswith("One seed.")
    records[0]["summary"]["best"]["balanced"] = {"mean": 51.0, "deviation": None}
    assert "| few | best epoch |" in paper_results.cells_table(records)


def test_rows_name_tau_where_there_are_several_and_a_method_has_its_hatch_everywhere():
    rows = [("BALMS x3", None, None), ("CLA", None, 3.0), ("LGLA", None, 3.0), ("LGLA", "tau = K - 1", 2.0)]
    records = [record_of(row, column, tau=tau, balanced=50.0) for row, column, tau in rows]
    assert paper_results.labels(records) == ["BALMS x3", "CLA, tau = 3", "LGLA, tau = 3", "LGLA, tau = K - 1"]
    assert paper_results.labels(records[:3]) == ["BALMS x3", "CLA", "LGLA"]
    records[2]["configuration"]["tau"] = None
    assert paper_results.labels(records[2:])[0] == "LGLA, tau = 2.5"
    hatches = [paper_results.hatch(record) for record in records]
    assert len(set(hatches)) == 4
    assert paper_results.hatch(record_of("LGLA", "tau = 2", tau=2.0, balanced=50.0)) == hatches[3]


@pytest.mark.parametrize("seeds", [1, 3])
def test_bars_stand_around_their_tick_and_say_what_their_lines_are(tmp_path, monkeypatch, seeds):
    drawn = []
    monkeypatch.setattr(paper_results.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = ["Softmax x3", "BALMS x3", "BALMS x3 + AAW", "LGLA"]
    records = [record_of(row, seeds=seeds, balanced=50.0, many=60.0) for row in rows]
    paper_results.draw_cells(records, "a title", tmp_path / "bars.png")
    (figure,) = drawn
    (axes,) = figure.axes
    bars = [c for c in axes.containers if type(c).__name__ == "BarContainer"]
    centres = np.array([[bar.get_x() + bar.get_width() / 2 for bar in row] for row in bars])
    np.testing.assert_allclose(centres.mean(axis=0), axes.get_xticks())
    colors = [row[0].get_facecolor() for row in bars]
    assert colors[1] == colors[2]
    assert len(set(colors)) == 3
    assert len({row[0].get_hatch() for row in bars}) == len(rows)
    assert len(axes.containers) == len(rows) * (1 if seeds == 1 else 2)
    assert ("standard deviation, over 3 seeds" in axes.get_xlabel()) == (seeds == 3)
    assert figure.get_facecolor() == (1, 1, 1, 1)


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train_paper.main([*map(str, arguments)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": 'base = "a.toml"'},
            "a.toml: expected bases without a circle, got the circle a.toml -> a.toml",
        ),
        (
            {"a": 'base = ["b.toml"]', "b": 'base = "./c.toml"', "c": 'base = "b.toml"'},
            "b.toml: expected bases without a circle, got the circle b.toml -> c.toml -> b.toml",
        ),
        ({"a": "base = 5"}, "a.toml: expected base to be the name of a recipe, or a list of names, got [5]"),
        ({"a": "base = 'nowhere.toml'"}, "nowhere.toml: there is no such recipe"),
        ({"a": "x = ["}, "a.toml: expected TOML in UTF-8, got "),
        ({"a": b"x = '\xff'"}, "a.toml: expected TOML in UTF-8, got 'utf-8' codec"),
        ({"a": "x = " + 3000 * "[" + 3000 * "]"}, "a.toml: expected TOML in UTF-8, got "),
        ({"a": f"epochs = 1{5000 * '0'}"}, "a.toml: expected TOML in UTF-8, got Exceeds the limit"),
        (
            {"a": f"batch_size = 1{400 * '0'}"},
            "argument --batch-size: expected a number below 2 ** 63, got 1000",
        ),
        ({"a": "epochs = 0"}, "argument --epochs: expected a number from 1 to inf, got 0"),
        ({"a": "epochs = [1, 2]"}, "epochs: expected one value, got the list [1, 2]"),
        ({"a": "lr = nan"}, "argument --lr: expected a number from 0 to inf, got nan"),
    ],
)
def test_recipes_that_cannot_be_read_are_refused_by_name(files, message, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused([tmp_path / "a.toml", "--runs", tmp_path / "runs"], capsys)
    assert not (tmp_path / "runs").exists()


def test_a_pipe_or_folder_as_a_recipe_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.toml")
    for path, kind in ((tmp_path / "pipe.toml", "a pipe or device"), (tmp_path, "a folder")):
        assert f"{path}: expected a file of TOML, got {kind}" in refused([path], capsys)


def test_a_recipe_may_be_the_base_of_two(tmp_path):
    for name, text in (
        ("a", 'base = ["b.toml", "c.toml"]'),
        ("b", 'base = "d.toml"'),
        ("c", 'base = "d.toml"'),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "d.toml").write_text("epochs = 3")
    assert paper_recipes.read_recipe(tmp_path / "a.toml") == {"epochs": 3}


def test_a_first_try_of_one_epoch_trains(tmp_path, digits, capsys):
    """The recipe's warm-up has five."""
    run(tmp_path, digits, settings=["epochs=1", "warmup_epochs=5", "paper=2023-10-02"])
    record = json.loads((tmp_path / "records" / "table5_lgla.json").read_text())
    assert record["paper"] == "2023-10-02"
    assert "--warmup-epochs 5 of --epochs 1: the run ends before" in capsys.readouterr().err


def test_control_c_says_the_command_that_goes_on(tmp_path, digits, monkeypatch, capsys):
    step = train_paper.Trainer._train_step

    def interrupted(trainer, *arguments):
        signal.raise_signal(signal.SIGINT)
        return step(trainer, *arguments)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(train_paper.Trainer, "_train_step", interrupted)
    monkeypatch.setattr(sys, "argv", ["examples/train_paper.py"])
    try:
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, digits)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    monkeypatch.undo()
    python, script, *arguments = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (python, script) == ("python", "examples/train_paper.py")
    train_paper.main(arguments)
    assert (tmp_path / "records" / "table5_lgla.json").exists()


@pytest.mark.parametrize("option", ["--runs", "--records"])
def test_folders_that_cannot_be_made_are_refused_before_training(option, tmp_path, digits, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, digits, option, str(tmp_path / "file" / "deep"))
    assert stopped.value.code == 2
    assert f"{option}: {tmp_path}/file/deep cannot be written (Not a directory)" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_seed_given_twice_is_no_second_run(capsys):
    assert "--seeds: expected each only once, got 0, 0" in refused([CELLS[0], "--seeds", "0", "0"], capsys)


@pytest.mark.parametrize("content", ["{", "3", "{}", "[1]"])
def test_a_damaged_record_of_an_earlier_run_is_named(content, tmp_path, digits, capsys):
    run(tmp_path, digits)
    record = tmp_path / "runs" / "table5_lgla" / "seed0" / "result.json"
    record.write_text(content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, digits)
    assert stopped.value.code == 2
    assert f"{record}: expected the record of a run, got " in capsys.readouterr().err


def test_the_names_of_augmentations_are_all_there():
    assert set(TRAINING) == set(train_paper.AUGMENTATIONS)


def test_a_page_of_records_that_are_none_is_left_as_it_was(tmp_path, capsys):
    page, records = tmp_path / "page.md", tmp_path / "records"
    records.mkdir()
    page.write_text("<!-- cells: one -->\n<!-- end -->\n")
    for content, message in (
        (None, f"--records: expected a folder of records, got none in {records}"),
        ("{", f"{records}/one.json: expected a record in JSON, got "),
        ("{}", "expected records of train_paper.py or sweep_tau.py, got one without 'summary'"),
    ):
        if content is not None:
            (records / "one.json").write_text(content)
        with pytest.raises(SystemExit) as stopped:
            paper_results.main(["--records", str(records), "--page", str(page)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert page.read_text() == "<!-- cells: one -->\n<!-- end -->\n"
