"""Three-way numerics: the library, plain PyTorch in the same precision, and float64 truth."""

import pytest
import torch
import torch.nn.functional as F

from lgla_losses import LGLALoss

pytestmark = [
    pytest.mark.usefixtures("engine"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]

COUNTS = [int(5000 * 256 ** (-j / 199)) for j in range(200)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain_loop(logits, target, table, weights):
    """What a careful user writes: adjusted cross entropy in the precision of the logits."""
    return sum(
        (
            weights[:, k]
            * F.cross_entropy(logits[:, k] + table[k].to(logits.dtype), target, reduction="none")
        ).mean()
        for k in range(3)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["random", "confident", "uniform"])
def test_error_is_at_most_plain_pytorchs(dtype, rows):
    logits = {
        "random": 30 * (2 * torch.rand(32, 3, 200) - 1),
        "confident": 30 * F.one_hot(torch.randint(200, (32, 3)), 200),
        "uniform": torch.randn(32, 3, 200) / 100,
    }[rows].to(dtype)  # fmt: skip
    target = torch.randint(200, (32,))
    features, weight = torch.randn(32, 3, 16), torch.randn(3, 200, 16)
    criterion = LGLALoss(COUNTS, scale=None).to(logits.device)

    def run(loss_of, values):
        values = values.clone().requires_grad_()
        loss = loss_of(values)
        loss.backward()
        return loss.detach().double(), values.grad.double()

    weights = criterion.weighter(
        torch.nn.functional.cosine_similarity(
            features.double(), weight.double()[:, target].transpose(0, 1), dim=-1
        ).acos(),
        target,
    )  # fmt: skip
    table = criterion.adjuster.table
    truth, true_gradient = run(lambda v: plain_loop(v, target, table, weights), logits.double())
    plain, plain_gradient = run(lambda v: plain_loop(v, target, table, weights.to(dtype)), logits)
    ours, gradient = run(lambda v: criterion(v, target, features=features, weight=weight), logits)

    # Half a unit in the last place of the result's own dtype comes on top, and of float32 sums.
    rounding = 4 * torch.finfo(torch.float32).eps
    assert (ours - truth).abs() <= (plain - truth).abs() + rounding * truth.abs()
    slack = torch.finfo(dtype).eps * true_gradient.abs().max()
    assert (gradient - true_gradient).abs().max() <= (plain_gradient - true_gradient).abs().max() + slack


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_arithmetic_beats_low_precision_arithmetic(dtype):
    """The contract's "at least float32": a loss computed in bfloat16 would be off by percents."""
    logits = (30 * (2 * torch.rand(64, 3, 200) - 1)).to(dtype)
    target = torch.randint(200, (64,))
    criterion = LGLALoss(COUNTS, aaw=False).to(logits.device)
    truth = criterion(logits.double(), target)
    assert criterion(logits, target).item() == pytest.approx(truth.item(), rel=1e-6)
