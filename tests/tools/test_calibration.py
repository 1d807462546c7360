"""Calibrated probabilities under any test prior: on simulated logits, whose truth is known."""

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from lgla_losses import ExpertModel, ExpertOutput, LGLALoss, LinearLGLALoss, create_loss
from lgla_losses import _fitting as fitting
from lgla_losses import calibration as module
from lgla_losses.calibration import Calibration, Report, Scores, fit
from lgla_losses.distributed import ClassParallelLGLALoss
from lgla_losses.label_shift import estimate_prior

COUNTS = torch.tensor([2000.0, 700, 250, 90, 30], dtype=torch.float64)
EQUAL = torch.ones(5, dtype=torch.float64)
REVERSED = COUNTS.flip(0) / COUNTS.sum()


def samples(num_samples, prior, seed=0):
    """Draw samples of Gaussian classes: the exact log p(x|j) ``[N, C]``, up to a constant, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    prior = torch.as_tensor(prior, dtype=torch.float64)
    target = torch.multinomial(prior, num_samples, replacement=True, generator=generator)
    noise = torch.randn(num_samples, len(prior), generator=generator, dtype=torch.float64)
    return 2 * (2 * one_hot(target, len(prior)) + noise), target


def held(likelihood, temperature, log_prior):
    """Make logits of this temperature that hold a prior; a constant of every sample does not count."""
    constant = torch.linspace(-9, 9, len(likelihood), dtype=torch.float64)[:, None]
    return temperature * likelihood + log_prior + constant


def balanced_accuracy(scores, target):
    right = (scores.argmax(1) == target).double()
    return 100 * float(torch.stack([right[target == j].mean() for j in target.unique()]).mean())


def assert_finds(calibration, temperature, exponent):
    assert calibration.temperature == pytest.approx(temperature, rel=0.08)
    assert calibration.exponent == pytest.approx(exponent, abs=0.15)


def assert_is_posterior(probabilities, likelihood, prior):
    """Near the true posterior, by the mean over samples of half the sum of the differences."""
    truth = (likelihood + torch.as_tensor(prior, dtype=torch.float64).log()).softmax(1)
    assert float((probabilities - truth).abs().sum(1).mean() / 2) < 0.025
    torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))


IMPLIED = {"softmax": COUNTS, "balanced softmax": EQUAL, "LGLA": COUNTS ** (1 - 3.5 / 3), "none given": None}


# What is found


@pytest.mark.parametrize("implied", IMPLIED.values(), ids=IMPLIED.keys())
@pytest.mark.parametrize(("temperature", "exponent"), [(1.6, 0.43), (0.8, -0.4), (1.0, 1.0), (2.5, 1.3)])
def test_temperature_and_exponent_are_found_whatever_the_loss(implied, temperature, exponent):
    likelihood, target = samples(6000, COUNTS)
    calibration = fit(
        held(likelihood, temperature, exponent * COUNTS.log()),
        target,
        class_counts=COUNTS,
        implied_prior=implied,
    )
    assert calibration.used
    assert_finds(calibration, temperature, exponent)

    likelihood, _ = samples(500, EQUAL, seed=1)
    logits = held(likelihood, temperature, exponent * COUNTS.log())
    for prior, truth in ((None, EQUAL), ("uniform", EQUAL), (COUNTS, COUNTS), (REVERSED.tolist(), REVERSED)):
        assert_is_posterior(calibration.probabilities(logits, prior), likelihood, truth)


@pytest.mark.parametrize(
    ("validation_prior", "drawn"),
    [(None, COUNTS), ("uniform", EQUAL), (REVERSED, REVERSED), ([1, 0, 2, 2, 2], [1, 0, 2, 2, 2])],
    ids=["of training", "uniform", "given", "given, a class absent"],
)
def test_the_parameters_are_those_of_the_logits_whatever_the_prior_of_the_split(validation_prior, drawn):
    likelihood, target = samples(6000, drawn)
    logits = held(likelihood, 1.5, 0.5 * COUNTS.log())
    calibration = fit(logits, target, class_counts=COUNTS, validation_prior=validation_prior)
    assert calibration.used
    assert_finds(calibration, 1.5, 0.5)
    probabilities = calibration.probabilities(logits, COUNTS)
    assert_is_posterior(probabilities, likelihood, COUNTS)


OTHER_FORM = {
    "fused experts": LGLALoss(COUNTS, tau=2.0).implied_prior([3, 1, 0]),
    "background": LGLALoss(COUNTS, tau=4.0, background=0).implied_prior(),
    "any": torch.tensor([1.0, 5, 2, 9, 1], dtype=torch.float64),
}


@pytest.mark.parametrize("implied", OTHER_FORM.values(), ids=OTHER_FORM.keys())
def test_a_prior_of_another_form_is_taken_out(implied):
    """The logits hold it, and over it what a longer training adds: a power of the counts."""
    likelihood, target = samples(6000, COUNTS)
    log_prior = implied.log() + 0.4 * COUNTS.log()
    logits = held(likelihood, 1.4, log_prior)
    calibration = fit(logits, target, class_counts=COUNTS, implied_prior=implied)
    assert calibration.used
    spread = COUNTS.log() - COUNTS.log().mean()
    assert_finds(calibration, 1.4, float(log_prior @ spread / spread.square().sum()))
    for prior in (EQUAL, COUNTS, REVERSED):
        assert_is_posterior(calibration.probabilities(logits, prior), likelihood, prior)


@pytest.mark.parametrize(("temperature", "tau"), [(1.0, 2.5), (1.6, 2.0), (1.6, 3.5)])
def test_ensembles_hold_what_the_law_says(temperature, tau):
    """Experts whose v + T(k, j) is calibrated at this temperature."""
    criterion = LGLALoss(COUNTS, num_experts=3, tau=tau)
    likelihood, target = samples(6000, COUNTS)
    adjusted = held(likelihood, temperature, temperature * COUNTS.log())
    logits = (adjusted[:, None] - criterion.adjuster.table).mean(1)
    calibration = fit(logits, target, criterion=criterion)
    assert_finds(calibration, temperature, temperature - (1 + tau) / 3)


def test_probabilities_are_those_of_the_equation():
    likelihood, target = samples(2000, COUNTS)
    logits = held(likelihood, 1.5, COUNTS.log())
    calibration = fit(logits, target, class_counts=COUNTS)
    assert calibration.used
    t, s = calibration.temperature, calibration.exponent
    expected = ((logits - s * COUNTS.log()) / t + REVERSED.log()).softmax(1)
    torch.testing.assert_close(calibration.probabilities(logits, REVERSED), expected)
    torch.testing.assert_close(calibration.logits(logits, REVERSED).softmax(1), expected)


def test_the_mean_of_softmax_experts_gains_on_the_uniform_prior():
    likelihood, target = samples(3000, COUNTS)
    calibration = fit(held(likelihood, 1.5, COUNTS.log()), target, class_counts=COUNTS)
    likelihood, target = samples(2000, EQUAL, seed=1)
    logits = held(likelihood, 1.5, COUNTS.log())
    gain = balanced_accuracy(calibration.logits(logits), target) - balanced_accuracy(logits, target)
    assert gain > 4
    assert calibration.report.gain > 2 * calibration.report.standard_error > 0


def test_equal_counts_leave_a_temperature():
    likelihood, target = samples(3000, EQUAL)
    calibration = fit(held(likelihood, 1.6, 0.0 * EQUAL), target, class_counts=[300] * 5)
    assert_finds(calibration, 1.6, 0.0)
    assert calibration.exponent == 0
    assert_is_posterior(calibration.probabilities(1.6 * likelihood), likelihood, EQUAL)


def test_two_classes():
    counts = COUNTS[[0, 3]]
    likelihood, target = samples(4000, counts)
    calibration = fit(held(likelihood, 1.5, 0.8 * counts.log()), target, class_counts=counts)
    assert calibration.used
    assert_finds(calibration, 1.5, 0.8)


# The prior of the test set is estimated


def test_an_estimated_prior_is_that_of_the_calibrated_test_set():
    likelihood, target = samples(3000, COUNTS)
    calibration = fit(held(likelihood, 1.5, COUNTS.log()), target, class_counts=COUNTS)
    likelihood, _ = samples(3000, REVERSED, seed=1)
    logits = held(likelihood, 1.5, COUNTS.log())
    found = estimate_prior(calibration.logits(logits), EQUAL)
    estimated = calibration.probabilities(logits, "estimated")
    torch.testing.assert_close(estimated, calibration.probabilities(logits, found))

    truth = (likelihood + torch.as_tensor(REVERSED).log()).softmax(dim=1)
    uniform = calibration.probabilities(logits)
    errors = [float((found - truth).abs().sum(1).mean() / 2) for found in (estimated, uniform)]
    assert errors[0] < 0.6 * errors[1], errors  # the estimate is held back


def test_a_masked_class_is_left_out_of_the_estimate():
    counts = [2000, 0, 250, 90, 30]
    likelihood, target = samples(2000, counts)
    calibration = fit(likelihood + torch.tensor(counts).clamp(min=1).log(), target, class_counts=counts)
    assert calibration.used
    seen = [0, 2, 3, 4]
    found = estimate_prior(calibration.logits(likelihood)[:, seen], torch.ones(4))
    expected = calibration.probabilities(
        likelihood, torch.zeros(5).double().index_copy(0, torch.tensor(seen), found)
    )
    estimated = calibration.probabilities(likelihood, "estimated")
    torch.testing.assert_close(estimated, expected)
    assert (estimated[:, 1] == 0).all()


# Safety

CLASSES = 10
LONG_TAIL = np.array([int(5000 * 100 ** (-j / 9)) for j in range(CLASSES)])
#: Logits of every kind, by their exact values, the labels, a random generator, and biases of the network.
SPOILED = {
    "calibrated": lambda z, target, rng, biases: z,
    "overconfident": lambda z, target, rng, biases: 2 * z,
    "class biases": lambda z, target, rng, biases: z + biases,
    "temperatures of classes": lambda z, target, rng, biases: z * np.linspace(3, 1, CLASSES),
    "higher in the tail": lambda z, target, rng, biases: z * np.linspace(1, 3, CLASSES),
    "temperatures of samples": lambda z, target, rng, biases: z * np.where(target < 5, 3, 1)[:, None],
    "outliers": lambda z, target, rng, biases: np.where(
        rng.random((len(z), 1)) < 0.08, 10 * z[:, rng.permutation(CLASSES)], z
    ),
    "biased middle": lambda z, target, rng, biases: z - 1.5 * np.isin(np.arange(CLASSES), [3, 4, 5, 6]),
    "random": lambda z, target, rng, biases: rng.normal(size=z.shape),
    "flipped labels": lambda z, target, rng, biases: z,
}


def spoiled(kind, target, rng, biases):
    z = 2 * (2 * np.eye(CLASSES)[target] + rng.normal(size=(len(target), CLASSES)))
    return torch.from_numpy(SPOILED[kind](z, target, rng, biases))


def gains(kind, uniform, seeds):
    """Give balanced accuracy beyond that of the logits, of fits to 500 samples, and what each reports."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        biases = rng.normal(size=CLASSES)
        frequencies = LONG_TAIL / LONG_TAIL.sum()
        drawn = np.repeat(np.arange(CLASSES), 50) if uniform else rng.choice(CLASSES, 500, p=frequencies)
        logits = spoiled(kind, drawn, rng, biases)
        if kind == "flipped labels":
            drawn = np.where(rng.random(500) < 0.15, rng.integers(0, CLASSES, 500), drawn)
        calibration = fit(
            logits,
            torch.from_numpy(drawn),
            class_counts=LONG_TAIL,
            implied_prior=[1] * CLASSES,
            validation_prior="uniform" if uniform else None,
        )
        target = np.repeat(np.arange(CLASSES), 300)
        logits, target = spoiled(kind, target, rng, biases), torch.from_numpy(target)
        gain = balanced_accuracy(calibration.logits(logits), target) - balanced_accuracy(logits, target)
        yield gain, 100 * calibration.report.standard_error


@pytest.mark.parametrize("kind", SPOILED)
def test_fifty_samples_a_class_lose_next_to_nothing(kind):
    assert np.mean([gain for gain, _ in gains(kind, uniform=True, seeds=range(5))]) >= -0.3


@pytest.mark.filterwarnings("ignore:calibration.fit. the labels")  # those that are flipped
@pytest.mark.parametrize("kind", SPOILED)
def test_few_samples_of_a_long_tail_lose_less_than_the_error_that_is_stated(kind):
    gain, error = np.mean(list(gains(kind, uniform=False, seeds=range(5))), axis=0)
    assert gain >= -min(error, 1.0)


def assert_leaves_the_order(calibration, logits):
    assert not calibration.used
    assert calibration.exponent == 0
    assert calibration.report.reason.startswith("not used")
    assert torch.equal(calibration.logits(logits).argsort(1), logits.argsort(1))
    for prior in (None, "uniform", COUNTS, "estimated"):
        assert calibration.probabilities(logits, prior).sum(1).allclose(torch.ones(1, dtype=torch.float64))
    likelihood = logits / calibration.temperature - torch.tensor(calibration.log_prior).double()
    expected = (likelihood + REVERSED.log()).softmax(1)
    torch.testing.assert_close(calibration.probabilities(logits, REVERSED), expected)


def test_softmax_logits_with_few_labels_are_tempered_and_hold_the_prior_of_training():
    """Their prior is not counted twice; chance may speak for the uniform one."""
    tempered = []
    for seed in range(12):
        likelihood, target = samples(30, COUNTS, seed)
        calibration = fit(held(likelihood, 1.5, 1.5 * COUNTS.log()), target, class_counts=COUNTS)
        if calibration.used:
            continue
        likelihood, target = samples(500, COUNTS, 100 + seed)
        logits = held(likelihood, 1.5, 1.5 * COUNTS.log())
        assert_leaves_the_order(calibration, logits)
        found = (logits / calibration.temperature).softmax(1)
        torch.testing.assert_close(calibration.probabilities(logits), found)
        tempered.append(torch.allclose(calibration.probabilities(logits, COUNTS), found))
    assert len(tempered) > 3
    assert sum(tempered) >= len(tempered) / 2, tempered


def test_equal_counts_leave_nothing_to_take_out():
    for seed in range(4):
        likelihood, target = samples(300, EQUAL, seed)
        calibration = fit(held(likelihood, 1.5, EQUAL), target, class_counts=[100] * 5)
        assert not calibration.used, calibration.report.reason


@pytest.mark.parametrize("size", [100, 1000])
def test_a_balanced_split_that_nobody_names_is_noticed(size):
    likelihood, target = samples(size, EQUAL)
    logits = held(likelihood, 1.5, COUNTS.log())
    with pytest.warns(UserWarning, match="validation_prior='uniform'"):
        calibration = fit(logits, target, class_counts=COUNTS)
    assert not calibration.used
    assert "class frequencies of training" in calibration.report.reason
    assert (
        "frequencies"
        not in fit(logits, target, class_counts=COUNTS, validation_prior="uniform").report.reason
    )


def test_ordinary_splits_raise_no_doubt():
    """Of many classes, few samples, and a tail that is mostly missing too."""
    long_tail = torch.tensor([1000 * 0.97**j for j in range(200)], dtype=torch.float64)
    for counts, size in ((COUNTS, 20), (COUNTS, 5000), (long_tail, 50), (long_tail, 1000)):
        for seed in range(5):
            _, target = samples(size, counts, seed)
            split = counts.log() - counts.sum().log()
            assert not module._has_other_frequencies(target, split), (size, seed)


def test_logits_that_hold_no_prior_keep_their_order():
    likelihood, target = samples(2000, COUNTS)
    logits = held(likelihood, 1.5, 0 * COUNTS)
    calibration = fit(logits, target, class_counts=COUNTS)
    assert_leaves_the_order(calibration, logits)
    assert calibration.temperature == pytest.approx(1.5, rel=0.06)
    assert_is_posterior(calibration.probabilities(logits, COUNTS), likelihood, COUNTS)


@pytest.mark.parametrize(("gain", "used"), [(-0.02, False), (-0.005, True)])
def test_balanced_accuracy_that_falls_by_more_than_its_error_is_not_used(monkeypatch, gain, used):
    likelihood, target = samples(1000, COUNTS)
    logits = held(likelihood, 1.5, COUNTS.log())
    monkeypatch.setattr(
        module, "judge", lambda *points: fitting.judge(*points)._replace(accuracy=(gain, 0.01))
    )
    calibration = fit(logits, target, class_counts=COUNTS)
    assert calibration.used is used
    if not used:
        assert "balanced accuracy falls" in calibration.report.reason
        assert_leaves_the_order(calibration, logits)


# What comes in, and stays as it is


LOSSES = {
    name: lambda counts, name=name, **o: create_loss(name, counts, **o)
    for name in ("lgla", "cla", "softmax", "balanced", "logit", "focal", "class_balanced", "ldam", "vs")
} | {
    "balanced of experts": lambda counts, **o: create_loss("balanced", counts, num_experts=3, **o),
    "linear": LinearLGLALoss,
    "class-parallel": ClassParallelLGLALoss,
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_every_loss_knows_its_counts_and_prior(make):
    criterion = make(COUNTS.tolist())
    implied = criterion.implied_prior()
    likelihood, target = samples(3000, EQUAL)
    logits = held(likelihood, 1.5, implied.log() + 0.5 * COUNTS.log())
    calibration = fit(logits, target, criterion=criterion, validation_prior="uniform")
    same = {"class_counts": COUNTS, "implied_prior": implied, "validation_prior": "uniform"}
    assert calibration.log_prior == pytest.approx(fit(logits, target, **same).log_prior, rel=1e-9)
    assert calibration.used
    assert_is_posterior(calibration.probabilities(logits), likelihood, EQUAL)


@every_loss
def test_masked_classes_have_probability_zero(make):
    counts = [2000, 0, 250, 90, 30]
    criterion = make(counts, zero_counts="mask")
    likelihood, target = samples(3000, [1, 0, 1, 1, 1])
    log_prior = criterion.implied_prior().log()  # -inf for the masked class
    logits = held(likelihood, 1.5, log_prior + 0.5 * torch.tensor(counts).clamp(min=1).log())
    calibration = fit(logits, target, criterion=criterion, validation_prior="uniform")
    assert calibration.used
    assert calibration.log_prior[1] == -math.inf
    for prior in (None, [1, 9, 1, 1, 1], "estimated"):
        probabilities = calibration.probabilities(logits, prior)
        assert (probabilities[:, 1] == 0).all()
        torch.testing.assert_close(probabilities.sum(1), torch.ones_like(target, dtype=torch.float64))
    assert_is_posterior(calibration.probabilities(logits), likelihood, [1, 0, 1, 1, 1])
    for other in (0.0, math.nan):  # its logits are not read
        filled = logits.index_fill(1, torch.tensor(1), other)
        assert fit(filled, target, criterion=criterion, validation_prior="uniform") == calibration
        torch.testing.assert_close(calibration.probabilities(filled), calibration.probabilities(logits))


@every_loss
def test_smoothed_counts_and_a_background(make):
    likelihood, target = samples(3000, EQUAL)
    smooth = fit(
        likelihood,
        target,
        criterion=make([2000, 0, 250, 90, 30], zero_counts="smooth"),
        validation_prior="uniform",
    )
    assert all(map(math.isfinite, smooth.log_prior))
    criterion = make(COUNTS.tolist(), background=0)
    logits = held(likelihood, 1.5, criterion.implied_prior().log() + 0.5 * COUNTS.log())
    assert_is_posterior(
        fit(logits, target, criterion=criterion, validation_prior="uniform").probabilities(logits),
        likelihood,
        EQUAL,
    )


def experts_of(logits, num_experts=3):
    """Make experts that differ, and whose mean is ``logits``."""
    apart = torch.linspace(-1, 1, num_experts, dtype=logits.dtype)[:, None] * torch.tensor([1.0, 0, 0, 2, 0])
    return ExpertOutput(logits[:, None] + apart, logits[:, None, :2], torch.zeros(num_experts, 5, 2))


def test_the_output_of_experts_stands_for_its_ensemble():
    criterion = LGLALoss(COUNTS.tolist())
    likelihood, target = samples(2000, COUNTS)
    output = experts_of(held(likelihood, 1.5, 0.6 * COUNTS.log()))
    logits = output.ensemble()
    calibration = fit(output, target, criterion=criterion)
    assert calibration == fit(logits, target, criterion=criterion)
    for prior in (None, COUNTS):
        expected = calibration.probabilities(logits, prior)
        assert torch.equal(calibration.logits(output, prior), calibration.logits(logits, prior))
        assert torch.equal(calibration.probabilities(output, prior), expected)
        assert torch.equal(output.probabilities(calibration, prior=prior), expected)


def test_a_model_predicts_with_it():
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5))
    model = ExpertModel.from_model(network, num_experts=2).eval()
    x, target = samples(300, COUNTS)
    x = x.float()
    calibration = fit(model(x), target, criterion=LGLALoss(COUNTS.tolist(), 2))
    for prior in (None, COUNTS, "estimated"):
        expected = calibration.probabilities(model(x), prior).detach()
        torch.testing.assert_close(model.predict(x, calibration=calibration, prior=prior), expected)


@pytest.mark.parametrize(
    ("dtype", "apart"), [(torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.05)], ids=str
)
def test_the_dtype_of_the_logits_is_as_they_come(dtype, apart):
    likelihood, target = samples(2000, COUNTS)
    logits = held(likelihood, 1.5, 0.7 * COUNTS.log())
    truth = fit(logits, target, class_counts=COUNTS)
    low = logits.to(dtype)
    found = fit(low, target, class_counts=COUNTS.float())
    assert found == fit(low.double(), target, class_counts=COUNTS)  # all is computed in float64
    assert found.temperature == pytest.approx(truth.temperature, abs=apart)
    assert found.exponent == pytest.approx(truth.exponent, abs=apart)
    assert found.logits(low).dtype == found.probabilities(low, COUNTS).dtype == torch.float32
    assert found.probabilities(logits, REVERSED.float()).dtype == torch.float64


def test_devices_agree(device):
    likelihood, target = samples(500, COUNTS)
    logits = held(likelihood, 1.5, COUNTS.log())
    here = fit(logits, target, class_counts=COUNTS)
    there = fit(logits.to(device), target.to(device), criterion=create_loss("softmax", COUNTS).to(device))
    assert there.temperature == pytest.approx(here.temperature, rel=1e-6)
    for prior in (None, COUNTS, "estimated"):
        probabilities = there.probabilities(logits.to(device), prior)
        assert probabilities.device.type == device
        torch.testing.assert_close(probabilities.cpu(), here.probabilities(logits, prior))


def test_nothing_that_is_given_changes():
    likelihood, target = samples(400, COUNTS)
    logits = held(likelihood, 1.5, COUNTS.log()).requires_grad_()
    given = {
        "class_counts": COUNTS.clone(),
        "implied_prior": COUNTS.clone(),
        "validation_prior": COUNTS.clone(),
    }
    before, labels, state = logits.detach().clone(), target.clone(), torch.get_rng_state()
    calibration = fit(logits, target, **given)
    prior = REVERSED.clone()
    for wanted in (None, prior, "estimated"):
        calibration.probabilities(logits, wanted)
    assert torch.equal(logits, before)
    assert torch.equal(target, labels)
    assert torch.equal(prior, REVERSED)
    assert all(torch.equal(value, COUNTS) for value in given.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_fit_is_the_same():
    likelihood, target = samples(400, COUNTS)
    first = fit(likelihood, target, class_counts=COUNTS)
    torch.manual_seed(1)
    assert fit(likelihood, target, class_counts=COUNTS) == first


def test_pickle_keeps_it():
    likelihood, target = samples(400, COUNTS)
    calibration = fit(held(likelihood, 1.5, COUNTS.log()), target, class_counts=COUNTS)
    fresh = pickle.loads(pickle.dumps(calibration))
    assert fresh == calibration
    expected = calibration.probabilities(likelihood)
    assert torch.equal(fresh.probabilities(likelihood), expected)
    assert pickle.loads(pickle.dumps(calibration)) == calibration  # after its use too


@pytest.mark.parametrize("counts", [COUNTS.tolist(), [2000, 0, 250, 90, 30]])
def test_json_keeps_it(counts):
    likelihood, target = samples(400, counts)
    calibration = fit(likelihood, target, class_counts=counts)
    read = json.loads(json.dumps(dataclasses.asdict(calibration)))
    report = read.pop("report")
    report |= {name: Scores(*report[name]) for name in ("plain", "calibrated")}
    report["missing_classes"] = tuple(report["missing_classes"])
    fresh = Calibration(**read | {"report": Report(**report), "log_prior": tuple(read["log_prior"])})
    assert fresh == calibration
    assert torch.equal(fresh.probabilities(likelihood), calibration.probabilities(likelihood))


# What the report says


def test_the_plain_scores_are_those_of_the_softmax():
    likelihood, target = samples(700, COUNTS)
    logits = held(likelihood, 1.5, COUNTS.log())
    scores = fit(logits, target, class_counts=COUNTS).report.plain
    p = logits.softmax(1)
    assert scores.nll == pytest.approx(float(cross_entropy(logits, target)))
    assert scores.brier == pytest.approx(float((p - one_hot(target, 5)).square().sum(1).mean()))
    assert scores.accuracy == pytest.approx(float((p.argmax(1) == target).double().mean()), rel=1e-12)
    assert 100 * scores.balanced_accuracy == pytest.approx(balanced_accuracy(logits, target), rel=1e-12)
    confidence, right = p.amax(1).numpy(), (p.argmax(1) == target).numpy()
    cells = np.ceil(15 * confidence)
    gaps = [abs((right[cells == b] - confidence[cells == b]).sum()) for b in np.unique(cells)]
    assert scores.ece == pytest.approx(sum(gaps) / 700)


def test_overconfident_logits_are_calibrated_on_held_out_folds():
    likelihood, target = samples(3000, COUNTS)
    report = fit(held(likelihood, 2.5, COUNTS.log()), target, class_counts=COUNTS).report
    assert report.calibrated.nll < report.plain.nll - 0.05
    assert report.calibrated.brier < report.plain.brier
    assert report.calibrated.ece < 0.02 < report.plain.ece
    assert report.calibrated.balanced_accuracy - report.plain.balanced_accuracy == pytest.approx(report.gain)


def test_a_split_without_some_classes_is_fitted_and_they_are_named():
    likelihood, target = samples(600, COUNTS)
    seen = (target != 3) & (target != 4)
    logits = held(likelihood, 1.5, COUNTS.log())[seen]
    calibration = fit(logits, target[seen], class_counts=COUNTS)
    assert calibration.report.missing_classes == (3, 4)
    assert calibration.report.num_samples == int(seen.sum())
    assert calibration.probabilities(logits).isfinite().all()
    assert (calibration.probabilities(logits) > 0).all()
    assert "2 classes without any" in str(calibration.report)


def test_a_report_reads_as_a_table():
    scores = Scores(nll=1.5, ece=0.25, brier=0.5, accuracy=0.75, balanced_accuracy=0.5)
    report = Report(
        "used, as told", 300, (), scores, scores._replace(nll=1.25), gain=0.04, standard_error=0.01
    )
    assert str(report).splitlines() == [
        "300 samples; used, as told",
        "on held-out folds        plain  calibrated",
        "nll                      1.500       1.250",
        "ece                      0.250       0.250",
        "brier                    0.500       0.500",
        "accuracy                 0.750       0.750",
        "balanced accuracy        0.500       0.500",
        "gain                                 0.040 +- 0.010",
    ]


# Where there is little to fit


def test_a_fit_that_does_not_converge_is_not_used(monkeypatch):
    likelihood, target = samples(500, COUNTS)
    logits = held(likelihood, 2.5, COUNTS.log())
    assert fit(logits, target, class_counts=COUNTS).used
    monkeypatch.setattr(fitting, "MOST_STEPS", 1)
    calibration = fit(logits, target, class_counts=COUNTS)
    assert "did not converge" in calibration.report.reason
    assert_leaves_the_order(calibration, logits)


def test_a_fold_that_does_not_converge_is_not_used_either(monkeypatch):
    likelihood, target = samples(500, COUNTS)
    logits = held(likelihood, 2.5, COUNTS.log())
    monkeypatch.setattr(module, "judge", lambda *points: fitting.judge(*points)._replace(converged=False))
    calibration = fit(logits, target, class_counts=COUNTS)
    assert "did not converge" in calibration.report.reason
    assert_leaves_the_order(calibration, logits)


@pytest.mark.parametrize("factor", [1e150, 1e300])
def test_logits_beyond_all_numbers_do_not_converge(factor):
    likelihood, target = samples(100, COUNTS)
    calibration = fit(factor * likelihood, target, class_counts=COUNTS)
    assert not calibration.used
    assert "did not converge" in calibration.report.reason
    assert calibration.probabilities(likelihood).isfinite().all()


def test_float32_is_enough_to_converge(monkeypatch):
    """Some devices have nothing wider."""
    for name in ("lgla_losses.calibration", "lgla_losses.label_shift", "lgla_losses._fitting"):
        monkeypatch.setattr(f"{name}.widest_dtype", lambda device: torch.float32)
    for num_samples in (100, 5000):
        likelihood, target = samples(num_samples, COUNTS)
        logits = held(likelihood, 1.5, COUNTS.log()).float()
        calibration = fit(logits, target, class_counts=COUNTS)
        assert calibration.used
    assert_finds(calibration, 1.5, 1.0)


def test_two_samples():
    calibration = fit(torch.eye(5)[:2], torch.tensor([0, 1]), class_counts=COUNTS)
    assert not calibration.used
    assert calibration.report.missing_classes == (2, 3, 4)
    assert calibration.probabilities(torch.eye(5)).isfinite().all()


def test_logits_that_are_never_wrong():
    _, target = samples(300, COUNTS)
    logits = 30 * one_hot(target, 5).double()
    calibration = fit(logits, target, class_counts=COUNTS)
    assert calibration.report.plain.balanced_accuracy == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(calibration.probabilities(logits).argmax(1), target)
    assert 0.5 < calibration.temperature < 3


def test_logits_that_say_nothing():
    _, target = samples(300, COUNTS)
    calibration = fit(torch.zeros(300, 5), target, class_counts=COUNTS, implied_prior=EQUAL)
    assert not calibration.used
    torch.testing.assert_close(calibration.probabilities(torch.zeros(1, 5)), torch.full((1, 5), 0.2))
    given = (COUNTS / COUNTS.sum()).float()
    torch.testing.assert_close(calibration.probabilities(torch.zeros(1, 5), COUNTS)[0], given)


# Where it is used


def fitted():
    likelihood, target = samples(500, COUNTS)
    logits = held(likelihood, 1.5, COUNTS.log())
    return fit(logits, target, class_counts=COUNTS), logits


def test_another_default_device_changes_nothing():
    expected, logits = fitted()
    with torch.device("meta"):
        found, _ = expected, None
        probabilities = found.probabilities(logits)
    torch.testing.assert_close(expected.probabilities(logits), probabilities)
    _, target = samples(500, COUNTS)
    counts = COUNTS.tolist()
    with torch.device("meta"):
        found = fit(logits, target, class_counts=counts)
    assert found == expected


def test_a_compiled_step_and_inference_mode_predict_the_same():
    calibration, logits = fitted()
    expected = calibration.probabilities(logits)
    compiled = torch.compile(
        lambda values: calibration.probabilities(values), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(logits), expected)
    with torch.inference_mode():
        torch.testing.assert_close(calibration.probabilities(logits), expected)
    logits.requires_grad_()
    calibration.logits(logits).logsumexp(1).sum().backward()
    assert logits.grad.isfinite().all()


def test_a_checkpoint_keeps_it(tmp_path):
    calibration, _ = fitted()
    torch.save({"calibration": calibration}, tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == {"calibration": calibration}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_not_predicted_with(wrong):
    calibration, logits = fitted()
    logits[3, 1] = wrong
    with pytest.raises(ValueError, match="logits: expected finite values, or -inf"):
        calibration.probabilities(logits)
    logits[3, 1] = -math.inf
    assert calibration.probabilities(logits)[3, 1] == 0


def test_it_shows_itself_in_a_line_and_prints_a_table():
    calibration, _ = fitted()
    assert "log_prior" not in repr(calibration)
    lines = str(calibration).splitlines()
    assert lines[0] == f"temperature {calibration.temperature:.2f}, exponent {calibration.exponent:.2f}"
    assert lines[1:] == str(calibration.report).splitlines()


def test_the_stated_error_is_that_of_many_splits():
    """The spread of the gain over splits, of a network that stays the same."""
    gains, errors = [], []
    for seed in range(40):
        likelihood, target = samples(400, COUNTS, seed)
        report = fit(held(likelihood, 1.5, COUNTS.log()), target, class_counts=COUNTS).report
        gains.append(report.gain)
        errors.append(report.standard_error)
    assert 0.6 < np.mean(errors) / np.std(gains) < 1.6, (np.mean(errors), np.std(gains))
