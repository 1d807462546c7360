"""Several runs as one network: the same numbers as each alone, and the command that trains them."""

import copy
import json
import re
import signal
from types import SimpleNamespace

import numpy as np
import paper_results
import pytest
import stacked_kernels
import stacked_runs
import torch
import train_stacked
from device_augment import DeviceAugment
from device_steps import DeviceSGD, Steps, Tables
from resnet32 import ResNet32
from stacked import FORMS, Form, stack
from torch import nn

from lgla_losses import LGLALoss

CPU = torch.device("cpu")
COUNTS = [20, 9, 4, 2]
EXPERTS = [3, 1, 2, 3]
#: Without kernels, which a CPU runs in an interpreter and in float32.
PLAIN_FORMS = {name: form for name, form in FORMS.items() if not form.fused}


def networks(experts=EXPERTS, dtype=torch.float64, blocks=2):
    nets = []
    for number in experts:
        torch.manual_seed(0)
        nets.append(ResNet32(len(COUNTS), number, blocks=blocks).to(dtype))
    return nets


def criteria(experts=EXPERTS):
    kinds = [{"adjustment": "balanced", "aaw": False}, {"tau": 2.5}]
    return [
        LGLALoss(COUNTS, num_experts=k, validate_args=False, **(kinds[i == 3] if k != 2 else {"aaw": False}))
        for i, k in enumerate(experts)
    ]


def tables(steps=4, batch=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    targets = torch.arange(40) % len(COUNTS)
    order = torch.stack([torch.randperm(40, generator=generator)[:batch] for _ in range(steps + 1)])
    rates = torch.tensor([0.02, 0.05, 0.1, 0.01], dtype=dtype)[:steps]
    return Tables(images, targets, order, rates)


def in_double(images):
    return images.double() / 128 - 1


def train(nets, losses, form, read, dtype=torch.float64, prepare=in_double):
    net = stack(nets, form, CPU)
    steps = Steps(net, losses, DeviceSGD(net, dtype), prepare, read, steps_per_epoch=len(read.rates))
    every = []
    for _ in range(len(read.rates)):
        steps.advance()
        every.append(steps.losses.clone())
    return torch.stack(every), steps


def train_alone(net, criterion, read):
    """A run of its own, by PyTorch's optimizer."""
    net, losses = copy.deepcopy(net), []
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=2e-4)
    for index, rate in zip(read.order[:-1], read.rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate.item()
        optimizer.zero_grad()
        loss = criterion(net(in_double(read.images[index])), read.targets[index])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), net.eval()


@pytest.mark.parametrize("name", PLAIN_FORMS)
def test_runs_together_give_what_each_gives_alone(name):
    nets, losses, read = networks(), criteria(), tables()
    together, steps = train(nets, losses, FORMS[name], read)
    predicted = steps.logits(read.images, in_double)
    for i, (net, criterion) in enumerate(zip(nets, losses, strict=True)):
        alone, trained = train_alone(net, criterion, read)
        torch.testing.assert_close(together[:, i].double(), alone, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            expected = trained(in_double(read.images)).logits
        torch.testing.assert_close(predicted[i].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, form in PLAIN_FORMS.items() if not form.separate])
def test_gradients_are_those_of_separate_networks(name):
    nets = networks()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    stacked = stack(nets, FORMS[name], CPU)
    logits, expected = stacked(images), [net(images).logits for net in nets]
    for one, other in zip(logits, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    upstream = [torch.randn_like(v) for v in expected]
    sum((v * u).sum() for v, u in zip(logits, upstream, strict=True)).backward()
    sum((v * u).sum() for v, u in zip(expected, upstream, strict=True)).backward()
    stem = torch.cat([net.trunk[0].weight.grad for net in nets])
    torch.testing.assert_close(stacked.stem.weight.grad.flatten(0, 1).permute(0, 3, 1, 2), stem)
    heads = torch.cat([net.experts.classifiers.weight.grad for net in nets])
    torch.testing.assert_close(stacked.weight.grad, heads)


@pytest.mark.parametrize(
    "name", [pytest.param("kernels", marks=pytest.mark.slow), "grouped-fused", "grouped-64-fused"]
)
def test_kernels_train_as_pytorch_does(name, monkeypatch):
    monkeypatch.setattr(stacked_kernels, "PROGRAMS", 3)
    monkeypatch.setattr(stacked_kernels, "PROGRAMS_OF_SUMS", 3)
    nets, losses = networks([2, 1], torch.float32, blocks=1), criteria([2, 1])
    read = tables(2, 3, torch.float32)

    def prepare(images):
        return images / 128 - 1

    expected, plain = train(nets, losses, FORMS["grouped"], read, torch.float32, prepare)
    got, steps = train(nets, losses, FORMS[name], read, torch.float32, prepare)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    for one, other in zip(
        steps.logits(read.images, prepare), plain.logits(read.images, prepare), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-2)


def test_branches_get_the_maps_of_their_run(device):
    run_of = torch.tensor([0, 0, 0, 1, 2, 2], dtype=torch.int32, device=device)
    first_of = torch.tensor([0, 3, 4, 6], dtype=torch.int32, device=device)
    x = torch.randn(2, 3 * 16, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
    got = stacked_kernels.spread(x.requires_grad_(), run_of, first_of, 3)
    expected = torch.cat([x.split(16, dim=1)[run] for run in run_of.tolist()], dim=1)
    assert torch.equal(got, expected)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (got, expected)))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_the_same_whichever_is_faster(stride, monkeypatch):
    x = torch.randn(2, 32, 6, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(2, 32, 3, 3, 16, requires_grad=True)
    upstream, results = torch.randn(2, 64, 6 // stride, 8 // stride), []
    for which in (0, 1):
        monkeypatch.setattr(stacked_kernels, "fastest", lambda key, *made, i=which: made[i]())
        y = stacked_kernels.grouped_convolution(x, weight, stride)
        results.append((y, *torch.autograd.grad(y, (x, weight), upstream)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_run_does_not_move_another():
    nets, read = networks([2, 2]), tables()
    losses = criteria([2, 2])
    first, _ = train(nets, losses, Form(group=128), read)
    other = [losses[0], LGLALoss(COUNTS, num_experts=2, aaw=False, adjustment="softmax", validate_args=False)]
    second, _ = train(nets, other, Form(group=128), read)
    torch.testing.assert_close(first[:, 0], second[:, 0])
    assert not torch.allclose(first[:, 1], second[:, 1])


def test_maps_stay_in_channels_last_memory():
    stacked = stack(networks(), FORMS["grouped-64"], CPU)
    seen = []
    for module in stacked.modules():
        if type(module).__name__ in ("Convolution", "Norm"):
            module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    stacked(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert len(seen) == 2 + 4 * 6
    maps = [tensor for pair in seen for tensor in pair]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in maps)


def test_weights_of_low_precision_learn_in_full():
    read = tables(dtype=torch.float32)
    nets = networks([2], torch.float32)
    losses = criteria([2])
    net = stack(nets, FORMS["grouped"], CPU)
    optimizer = DeviceSGD(net, torch.bfloat16)
    steps = Steps(net, losses, optimizer, lambda images: images / 128 - 1, read, 4)
    before = [weight.clone() for weight in optimizer.weights]
    for _ in range(4):
        steps.advance()
    assert len(optimizer.lowered) == 13
    for i, (parameter, weight) in enumerate(zip(optimizer.parameters, optimizer.weights, strict=True)):
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, before[i])
        assert parameter.dtype == (torch.bfloat16 if i in optimizer.lowered else torch.float32)
        assert torch.equal(parameter.detach(), weight.to(parameter.dtype))
    exact, _ = train(nets, losses, FORMS["grouped"], read, torch.float32, lambda images: images / 128 - 1)
    assert steps.losses.item() == pytest.approx(exact[-1].item(), rel=0.1)


def test_measuring_changes_nothing():
    net = stack(networks([2]), FORMS["grouped"], CPU)
    read = tables()
    steps = Steps(net, criteria([2]), DeviceSGD(net, torch.float64), in_double, read, 4)
    before = {name: tensor.clone() for name, tensor in steps.state().items()}
    losses, seconds = steps.trial(2)
    assert seconds > 0
    assert losses[0] != losses[1]
    after = steps.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_an_epoch_meets_every_image():
    order = stacked_runs.make_order(21, 8, seed=3, epoch=1)
    assert order.shape == (3, 8)
    assert order.flatten()[:21].sort().values.tolist() == list(range(21))
    assert torch.equal(order.flatten()[21:], order.flatten()[:3])
    assert not torch.equal(order, stacked_runs.make_order(21, 8, seed=3, epoch=2))


def test_methods_are_the_paper_s():
    options = train_stacked.make_parser().parse_args([])
    options.epochs, options.amp, options.data, options.device = 400, "none", "x.npz", "cpu"
    runs = {name: train_stacked.make_run(name, 400, COUNTS, options) for name in train_stacked.METHODS}
    said = {name: run.options for name, run in runs.items()}
    assert {name: (o.num_experts, o.adjustment, o.aaw, o.tau) for name, o in said.items()} == {
        "softmax": (3, "softmax", False, None),
        "balms1": (1, "balanced", False, None),
        "balms3": (3, "balanced", False, None),
        "cla": (3, "lgla", False, 3.0),
        "lgla": (3, "lgla", True, 3.0),
        "lgla2": (3, "lgla", True, 2.0),
        "lgla2.5": (3, "lgla", True, 2.5),
    }
    rates = stacked_runs.make_rates(said["lgla"], 2)
    assert rates[:10:2] == pytest.approx([0.0333, 0.0467, 0.06, 0.0733, 0.0867], abs=5e-5)
    assert [rates[2 * epoch] for epoch in (5, 319, 320, 359, 360, 399)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_as_many_epochs_are_taken_as_fit():
    left = {450.0: 400, 399.0: 350, 99.0: 50, 30.0: 25, 2.0: 1, -5.0: 1}
    assert {seconds: stacked_runs.fitting_epochs(400, float, seconds) for seconds in left} == left


def run(tmp_path, *arguments, forms=("grouped",)):
    out = tmp_path / "out"
    train_stacked.main(["--quick", "--device", "cpu", "--out", str(out), "--forms", *forms, *arguments])
    return out


def read(out, method="lgla"):
    return json.loads((out / f"stacked_{method}.json").read_text())


def test_a_command_trains_all_and_writes_what_tables_are_made_of(tmp_path):
    out = run(tmp_path, "--evaluate-every", "1", forms=("grouped", "separate"))
    overview = json.loads((out / "stacked.json").read_text())
    assert set(overview["seeds"][0]["forms"]) == {"grouped", "separate"}
    assert overview["seeds"][0]["form"] in overview["seeds"][0]["forms"]
    records = [read(out, method) for method in train_stacked.FIVE]
    table = paper_results.cells_table(records)
    assert "| LGLA, tau = 3 |" in table
    assert "| BALMS x1 |" in table
    for record, k in zip(records, (3, 1, 3, 3, 3), strict=True):
        (one,) = record["runs"]
        assert record["finished"]
        assert [entry["epoch"] for entry in one["curve"]] == [1, 2]
        assert all(entry["scores"] and entry["loss"] > 0 for entry in one["curve"])
        with np.load(out / record["name"] / "seed0" / "outputs.npz") as outputs:
            assert outputs["logits"].shape == (40, k, 10)
            right = outputs["logits"].astype(np.float64).mean(1).argmax(1) == outputs["target"]
        assert one["final"]["scores"]["ensemble"]["top-1"] == pytest.approx(right.mean(), abs=0.051)


def test_a_run_is_the_same_in_two_halves(tmp_path, monkeypatch):
    whole = read(run(tmp_path / "whole", "--epochs", "3"))
    save = stacked_runs.Stack.save

    def stop_after_the_first_epoch(self):
        save(self)
        monkeypatch.setattr(stacked_runs.Stack, "save", save)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(stacked_runs, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(stacked_runs.Stack, "save", stop_after_the_first_epoch)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--epochs", "3")
    assert stopped.value.code == 128 + signal.SIGTERM
    half = read(tmp_path / "out")
    assert not half["finished"]
    assert [entry["epoch"] for entry in half["runs"][0]["curve"]] == [1]

    gone_on = read(run(tmp_path, "--epochs", "3", "--resume"))
    assert gone_on["finished"]
    assert gone_on["runs"][0]["final"] == whole["runs"][0]["final"]


def test_a_finished_run_that_is_resumed_keeps_its_logits(tmp_path):
    def logits(out):
        with np.load(out / "stacked_lgla" / "seed0" / "outputs.npz") as outputs:
            return outputs["logits"]

    before = logits(run(tmp_path, "--methods", "lgla"))
    assert np.array_equal(logits(run(tmp_path, "--methods", "lgla", "--resume")), before)


def test_a_run_without_time_for_all_takes_fewer_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(stacked_runs, "fitting_epochs", lambda asked, seconds, left: asked // 2)
    out = run(tmp_path, "--epochs", "4", "--seconds", "300")
    record = read(out)
    assert (record["configuration"]["epochs"], record["configuration"]["milestones"]) == (2, [1])
    assert record["runs"][0]["final"]["epoch"] == 2
    assert record["finished"]
    assert json.loads((out / "stacked.json").read_text())["epochs_asked"] == 4


def test_a_run_that_meets_its_deadline_keeps_what_it_has(tmp_path, monkeypatch):
    advance = stacked_runs.Steps.advance

    def slow(self):
        advance(self)
        clock.now += 10.0

    clock = SimpleNamespace(now=0.0)
    for module in (train_stacked, stacked_runs):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(stacked_runs.Steps, "advance", slow)
    # The three steps of the measurement and the six of an epoch, but not those of another.
    record = read(run(tmp_path, "--epochs", "2", "--seconds", "95", "--methods", "lgla"))
    assert not record["finished"]
    assert record["runs"][0]["final"]["epoch"] == 1
    with pytest.raises(SystemExit, match="no time was left"):
        run(tmp_path / "without", "--seconds", "1")


def test_a_form_that_fails_leaves_the_others(tmp_path, monkeypatch):
    make = stacked_runs.stack

    def fail(networks, form, device):
        if form.group == 64:
            raise RuntimeError("no kernel\nmore lines")
        return make(networks, form, device)

    monkeypatch.setattr(stacked_runs, "stack", fail)
    out = run(tmp_path, "--methods", "balms1", forms=("grouped-64", "dense"))
    (seed,) = json.loads((out / "stacked.json").read_text())["seeds"]
    assert seed["forms"]["grouped-64"] == "failed: RuntimeError: no kernel"
    assert seed["form"] == "dense"


def test_a_run_that_diverges_leaves_the_others(tmp_path, monkeypatch, capsys):
    whole = read(run(tmp_path / "whole", "--methods", "cla", "lgla"))
    choose = stacked_runs.Stack.choose

    def choose_and_break(self, *arguments):
        choose(self, *arguments)
        with torch.no_grad():
            self.steps.net.stem.weight[0].fill_(float("inf"))

    monkeypatch.setattr(stacked_runs.Stack, "choose", choose_and_break)
    out = run(tmp_path, "--methods", "cla", "lgla")
    assert read(out)["runs"][0]["final"] == whole["runs"][0]["final"]
    assert not (out / "stacked_cla.json").exists()
    assert "stacked_cla: no record, because its loss was not finite" in capsys.readouterr().out
    (seed,) = json.loads((out / "stacked.json").read_text())["seeds"]
    assert list(seed["diverged"]) == ["cla"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forms", "fast"], "--forms: expected some of grouped, .* got 'fast'"),
        (["--methods", "lgla", "lgla"], "--methods: expected each only once"),
        (["--data", "nothing.npz"], "nothing.npz: expected an .npz file"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments)
    assert re.search(message, capsys.readouterr().err)


def test_an_earlier_run_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, "--epochs", "1", "--methods", "balms1")
    with pytest.raises(SystemExit):
        run(tmp_path, "--methods", "balms1")
    assert "add --resume to continue it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--methods", "lgla", "--resume")
    assert "expected" in capsys.readouterr().err


def needs_gpu(test):
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.cuda(skipped(test))


@pytest.fixture
def on_cuda():
    """Tables and networks of a miniature, on the device."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    read = tables(4, 16, torch.float32)
    return device, Tables(*(tensor.to(device) for tensor in read))


def steps_on(device, read, form, dtype=torch.bfloat16, graph=True):
    net = stack(networks(dtype=torch.float32), form, device)
    losses = [criterion.to(device) for criterion in criteria()]
    augment = DeviceAugment(size=8).to(device)
    steps = Steps(net, losses, DeviceSGD(net, dtype), augment, read, len(read.rates))
    if graph:
        steps.record()
    return steps


def losses_of(steps):
    torch.manual_seed(3)
    steps.prime()
    every = []
    for _ in range(4):
        steps.advance()
        every.append(steps.losses.clone())
    return torch.stack(every).cpu()


@needs_gpu
@pytest.mark.long
@pytest.mark.parametrize("name", ["grouped", "kernels", "grouped-64-fused", "dense-streams", "separate"])
def test_a_recorded_step_is_the_step(on_cuda, name):
    device, read = on_cuda
    written = losses_of(steps_on(device, read, FORMS[name], graph=False))
    recorded = losses_of(steps_on(device, read, FORMS[name]))
    torch.testing.assert_close(recorded[:3], written[:3], rtol=0.05, atol=0.05)
    plain = losses_of(steps_on(device, read, FORMS["grouped"], torch.float32, graph=False))
    torch.testing.assert_close(recorded[:2], plain[:2], rtol=0.05, atol=0.05)


@needs_gpu
@pytest.mark.long
def test_a_recorded_step_waits_for_nothing(on_cuda):
    device, read = on_cuda
    steps = steps_on(device, read, FORMS["kernels"], graph=False)
    steps.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def apart(got, expected):
    """The largest distance of a tensor from the exact one, relative to its length."""
    pairs = zip(got, expected, strict=True)
    return max(((one.double() - other).norm() / other.norm()).item() for one, other in pairs)


SIZES = [(16, 16, 32, 1), (16, 32, 32, 2), (32, 32, 16, 1), (32, 64, 16, 2), (64, 64, 8, 1)]


@needs_gpu
@pytest.mark.parametrize(("inputs", "outputs", "side", "stride"), SIZES)
def test_convolutions_of_real_sizes_are_pytorch_s(inputs, outputs, side, stride, monkeypatch):
    monkeypatch.setattr(stacked_kernels, "fastest", lambda key, *candidates: candidates[0]())
    groups = 13
    x = torch.randn(128, groups * inputs, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(
        groups, outputs, 3, 3, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    y = stacked_kernels.grouped_convolution(x, weight, stride)
    upstream = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (x, weight), upstream))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    kernel = exact[1].reshape(-1, 3, 3, inputs).permute(0, 3, 1, 2)
    z = nn.functional.conv2d(exact[0], kernel, None, stride, 1, 1, groups)
    assert apart(got, (z, *torch.autograd.grad(z, exact, upstream.double()))) < 0.01


@needs_gpu
@pytest.mark.parametrize(("channels", "side"), [(80, 32), (416, 16), (832, 8)])
@pytest.mark.parametrize("adds", [False, True])
def test_norms_of_real_sizes_are_pytorch_s(channels, side, adds):
    maps = torch.randn(2, 128, channels, side, side, device="cuda", dtype=torch.bfloat16) + 0.5
    maps = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps.unbind()]
    weight, bias, mean = torch.randn(3, channels, device="cuda").unbind()
    affine, var = (weight.requires_grad_(), bias.requires_grad_()), torch.ones_like(mean)
    statistics = mean.double(), var.double()
    y = stacked_kernels.norm_relu(maps[0], maps[1] if adds else None, *affine, mean, var, 0.1, 1e-5)
    upstream = torch.randn_like(y)
    inputs = [*maps[: 1 + adds], *affine]
    got = (y, *torch.autograd.grad(y, inputs, upstream), mean, var)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    z = nn.functional.batch_norm(exact[0], *statistics, *exact[-2:], True, 0.1, 1e-5)
    z = nn.functional.relu(z + exact[1] if adds else z)
    expected = (z, *torch.autograd.grad(z, exact, upstream.double()), *statistics)
    # The rectifier's gradient jumps at 0, where a rounded value may lie on the other side.
    assert apart(got, expected) < 0.05


@needs_gpu
@pytest.mark.long
def test_the_command_trains_on_a_gpu(tmp_path):
    out = tmp_path / "out"
    train_stacked.main(["--quick", "--device", "cuda", "--out", str(out), "--forms", "grouped", "kernels"])
    (seed,) = json.loads((out / "stacked.json").read_text())["seeds"]
    assert seed["graph"]
    assert all(isinstance(measured, dict) for measured in seed["forms"].values())
    assert read(out)["finished"]
