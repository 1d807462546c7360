"""The paper's ResNet-32: its size, its layouts, and the leak of the authors' released code."""

import pytest
import torch
from scripts import load
from torch.utils.flop_counter import FlopCounterMode

from lgla_losses import LGLALoss

resnet32 = load("examples/resnet32.py")


def multiply_adds(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("layout", resnet32.LAYOUTS)
@pytest.mark.parametrize(("num_experts", "parameters", "mega"), [(1, 469_904, 68.9), (3, 1_362_064, 158.5)])
def test_size(layout, num_experts, parameters, mega):
    model = resnet32.ResNet32(100, num_experts, layout)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert multiply_adds(model) / 1e6 == pytest.approx(mega, abs=0.05)


def test_grouped_and_independent_are_one_function():
    model = resnet32.ResNet32(10).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grouped = model(images).logits
    model.experts = model.experts.to_independent()
    torch.testing.assert_close(model(images).logits, grouped, rtol=1e-10, atol=1e-10)


def test_one_expert_has_no_neighbour_to_leak_from():
    leaky, grouped = (resnet32.ResNet32(10, 1, layout).double() for layout in ("grouped-leaky", "grouped"))
    grouped.load_state_dict(
        {name: t.reshape(grouped.state_dict()[name].shape) for name, t in leaky.state_dict().items()}
    )
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(leaky(images).logits, grouped(images).logits, rtol=1e-10, atol=1e-10)


def test_the_middle_expert_of_the_leaky_network_gets_16_channels_of_each_neighbour():
    """At the last stage 3 x 32 channels become 3 x 64 with zeros outside all of them."""
    block = resnet32.BasicBlock(96, 192, 2, groups=3)
    torch.nn.init.zeros_(block.bn2.weight)  # the shortcut alone
    channels = torch.arange(1.0, 97.0)[None, :, None, None].expand(2, 96, 2, 2)
    middle = block(channels)[0, 64:128, 0, 0]
    expert = (middle - 1).div(32, rounding_mode="floor")
    assert [(expert == k).sum().item() for k in range(3)] == [16, 32, 16]


@pytest.mark.parametrize(("layout", "leaks"), [("grouped", False), ("grouped-leaky", True)])
def test_only_the_leaky_network_leaks(layout, leaks):
    """What reaches the middle expert's logits from the other experts' weights."""
    model = resnet32.ResNet32(10, 3, layout)
    model(torch.randn(4, 3, 32, 32)).logits[:, 1].square().sum().backward()
    gradient = model.experts.stage[0][4].conv2.weight.grad
    others = gradient.reshape(3, -1)[[0, 2]]
    assert bool((others != 0).any()) == leaks


@pytest.mark.parametrize("layout", resnet32.LAYOUTS)
def test_every_layout_trains(layout, device):
    model = resnet32.ResNet32(10, layout=layout).to(device)
    criterion = LGLALoss(range(100, 0, -10)).to(device)
    criterion(model(torch.randn(4, 3, 32, 32, device=device)), torch.arange(4, device=device)).backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in model.parameters())


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"layout: expected one of .*grouped-leaky.*, got 'dense'"):
        resnet32.ResNet32(10, layout="dense")
