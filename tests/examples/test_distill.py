"""examples/distill.py, and the record that its page shows."""

import re

import distill
import pytest
import quickstart
import torch
import torch.nn.functional as F
from scripts import ROOT
from torch import nn

COUNTS = quickstart.digit_counts(50.0)


@pytest.fixture(scope="module")
def split():
    return quickstart.long_tailed_digits(50.0, 0, "cpu")


def lgla():
    return distill.LGLALoss(COUNTS, 3, scale=distill.SCALE)


def rows(text):
    """The cells of all rows of all tables, by their first one."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {name: rest for name, *rest in cells}


def test_a_short_run_prints_accuracies_costs_and_where_they_are_from(capsys):
    distill.main(["--epochs", "1", "--seeds", "2", "--temperatures", "2", "--shares", "1", "0.5"])
    printed = capsys.readouterr().out
    table = rows(printed)
    students = {"T=2", "T=2, equal draws", "T=2 share=0.5, equal draws"}
    assert {name[8:] for name in table if name.startswith("Student T")} == students
    for name, cells in table.items():
        assert sum("±" in cell for cell in cells) == (0 if len(cells) == 3 else 5), name
    assert max(map(len, printed.splitlines())) <= 110
    assert re.fullmatch(r".+, 1 thread, torch 2\.\S+, commit \S+", printed.splitlines()[-1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_divergence_from_the_teacher_and_its_entropy_times_t_squared(temperature):
    student, teacher = torch.randn(2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = (teacher / temperature).softmax(1)
    divergence = F.kl_div((student / temperature).log_softmax(1), p, reduction="batchmean")
    entropy = -(p * p.log()).sum(1).mean()
    loss = distill.distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, temperature**2 * (divergence + entropy), rtol=1e-14, atol=0)


def test_hot_logits_are_matched_as_they_are():
    """Eq. 4 of Hinton et al. times T^2: the gradient of centred logits is their difference over C."""
    student, teacher = torch.randn(2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student, teacher = (v - v.mean(1, keepdim=True) for v in (student, teacher))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(distill.distillation_loss(student, teacher, 1e4), student)
    torch.testing.assert_close(6 * gradient, (student - teacher).detach() / 10, rtol=1e-2, atol=1e-4)


def test_the_teacher_is_the_demos_lgla(split):
    torch.manual_seed(0)
    demo = quickstart.fit(*quickstart.METHODS["LGLA"], split, COUNTS, 1, lambda: None)
    torch.manual_seed(0)
    teacher = distill.fit(distill.Lesson(lambda: distill.network(3), lgla()), split, 1)
    assert torch.equal(teacher(split.test_images), demo(split.test_images).ensemble())


def test_the_student_learns_nothing_but_the_teacher_who_stays_as_is(split):
    teacher = distill.network(3).eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    lessons = distill.lessons(COUNTS, teacher, [4.0], [1.0])
    lesson = lessons["Student T=4, equal draws"]
    distill.fit(lesson, split, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())

    output = lesson.make().eval()(split.train_images[:8])[:, None]  # [N, 1, C]
    output = distill.ExpertOutput(output, output, output)
    losses = [
        lesson.loss(output, split.train_images[:8], labels)
        for labels in torch.arange(2)[:, None].expand(2, 8)
    ]
    assert torch.equal(*losses)  # whatever the labels are


def test_every_class_is_drawn_equally_often_or_every_image_once(split):
    torch.manual_seed(0)
    labels = split.train_labels
    assert torch.equal(distill.draw(labels, False).sort().values, torch.arange(len(labels)))
    drawn = torch.cat([distill.draw(labels, True) for _ in range(50)])
    share = torch.bincount(labels[drawn], minlength=10) / len(drawn)
    torch.testing.assert_close(share, torch.full((10,), 0.1), rtol=0, atol=0.01)


def test_what_is_shipped_gives_the_logits_of_what_was_trained(split):
    for make in (distill.one_network, distill.network_of_shared_features):
        model = make().double().eval()
        images = split.test_images.double()
        shipped = distill.shipped(model)
        assert isinstance(shipped, nn.Sequential)
        torch.testing.assert_close(shipped(images), model(images), rtol=1e-12, atol=1e-12)


def test_costs_are_those_of_one_network(split):
    trunk, stage, heads = 16 * 9 * 64, (32 * 16 * 9 + 32 * 32 * 9 + 32 * 16) * 16, 32 * 10
    networks = {
        3: distill.network(3).eval(),
        1: distill.shipped(distill.one_network()),
    }
    for k, model in networks.items():
        assert distill.multiply_adds(model, split.test_images) == trunk + k * (stage + heads)
    merged = distill.shipped(distill.network_of_shared_features())
    assert distill.multiply_adds(merged, split.test_images) == trunk + stage + heads
    times = distill.microseconds({"a": merged, "b": merged}, split.test_images, turns=3)
    assert {name: len(of_one) for name, of_one in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperatures", "0"], "--temperatures: expected a number from 0.001 to inf, got 0"),
        (["--shares", "1.5"], "--shares: expected a number from 0 to 1, got 1.5"),
        (["--seeds", "0"], "--seeds: expected a number from 1 to inf, got 0"),
        (["--imbalance", "nan"], "--imbalance: expected a number from 1 to inf, got nan"),
    ],
)
def test_wrong_arguments_end_before_any_training(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        distill.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_records_are_of_this_script():
    for name, students in (("distill_cpu", 2), ("distill_choice_cpu", 9)):
        record = (ROOT / "benchmarks" / "results" / f"{name}.txt").read_text(encoding="utf-8")
        table = rows(record)
        accuracies = {row: cells for row, cells in table.items() if len(cells) == 5}
        assert {"Softmax", "Balanced softmax", distill.SHARED} < set(accuracies)
        assert sum(row.startswith("Student T=") for row in accuracies) == students
        assert re.search(r", 1 thread, torch 2\.\S+, commit \w+$", record.strip())
