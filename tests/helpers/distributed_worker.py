"""One rank of tests/distributed/test_distributed.py: compares its part of a job with one process."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import serve
from torch.nn.parallel import DistributedDataParallel

from lgla_losses import AAWWeighter, ClassGrouper, GroupConvExperts, LGLALoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    NCLLoss,
    RIDELoss,
    SigmoidAdjustedLoss,
)

COUNTS = [40, 9, 5, 1]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def shares(world_size):
    """Uneven, with an empty batch, ignored samples and groups missing on some ranks."""
    torch.manual_seed(0)  # alike on all ranks
    target = torch.tensor([0, 0, 0, 1, 2, 3, -100, 0, 2, 1, 1])
    logits = 60 * torch.rand(len(target), 3, 4, dtype=torch.float64) - 30
    sizes = {2: [3, 8], 4: [3, 0, 5, 3]}[world_size]
    return logits, target, sizes


def check_loss_and_gradients(rank, world_size, aaw, reduction):
    logits, target, sizes = shares(world_size)
    whole = logits.clone().requires_grad_()
    expected = LGLALoss(COUNTS, aaw=aaw, reduction=reduction, sync=False)(whole, target)
    expected.sum().backward()
    mine = logits.split(sizes)[rank].clone().requires_grad_()
    loss = LGLALoss(COUNTS, aaw=aaw, reduction=reduction)(mine, target.split(sizes)[rank])
    loss.sum().backward()
    gradient = mine.grad
    if reduction == "none":
        torch.testing.assert_close(loss, expected.split(sizes)[rank], **CLOSE)
    else:
        total = loss.detach().clone()
        dist.all_reduce(total)
        if reduction == "mean":  # what DDP does to losses and gradients
            total, gradient = total / world_size, gradient / world_size
        torch.testing.assert_close(total, expected.detach(), **CLOSE)
    torch.testing.assert_close(gradient, whole.grad.split(sizes)[rank], **CLOSE)


def check_ddp(rank, world_size):
    """A model under DDP gets the gradients of the whole batch."""
    torch.manual_seed(1)
    _, target, sizes = shares(world_size)
    images = torch.randn(len(target), 2, 5, 5, dtype=torch.float64)
    experts = GroupConvExperts(lambda: torch.nn.Conv2d(2, 4, 3), 3, 4).double()
    single = GroupConvExperts(lambda: torch.nn.Conv2d(2, 4, 3), 3, 4).double()
    single.load_state_dict(experts.state_dict())
    LGLALoss(COUNTS, sync=False)(single(images), target).backward()
    parallel = DistributedDataParallel(experts)
    LGLALoss(COUNTS)(parallel(images.split(sizes)[rank]), target.split(sizes)[rank]).backward()
    for actual, expected in zip(experts.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, **CLOSE)


def check_collectives(rank, world_size):
    """One a step, of at most (K + 1)(K - 1) + 1 numbers; none without gradients or without sync."""
    sizes = []
    all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        logits, target, split = shares(world_size)
        inputs = (logits.split(split)[rank], target.split(split)[rank])
        LGLALoss(COUNTS)(*inputs)
        assert sizes == [9], sizes
        LGLALoss(COUNTS, aaw=False)(*inputs)
        assert sizes == [9, 2], sizes
        LGLALoss(COUNTS, sync=False)(*inputs)
        AAWWeighter(ClassGrouper(COUNTS, 2), sync=False)(inputs[0][..., 0].abs() / 30, inputs[1])
        with torch.no_grad():
            if rank == 0:  # validation on one rank must wait for nobody
                LGLALoss(COUNTS)(*inputs)
        assert sizes == [9, 2], sizes
    finally:
        dist.all_reduce = all_reduce


def check_other_targets(rank, world_size):
    """Probabilities, weights of samples and maps; the samples of a rank are any, in any proportion."""
    logits, target, sizes = shares(world_size)
    q, sample_weight = mixed(target), torch.rand(len(target), dtype=torch.float64)
    maps = 60 * torch.rand(len(target), 3, 4, 5, dtype=torch.float64) - 30
    of_maps = torch.randint(0, 4, (len(target), 5))
    for v, y, s in (
        (logits, q, None),
        (logits, q, sample_weight),
        (logits, target, sample_weight),
        (maps, of_maps, None),
    ):
        for aaw in (True, False):
            compare_shares(partial(LGLALoss, COUNTS, aaw=aaw), v, y, s, sizes, rank)


def check_baselines(rank, world_size):
    """Means over samples and over their weights, one model and K, with the targets of check_other_targets."""
    logits, target, sizes = shares(world_size)
    q, sample_weight = mixed(target), torch.rand(len(target), dtype=torch.float64)
    weighted = partial(LogitAdjustedLoss, COUNTS, class_weight=[1.0, 2.0, 3.0, 5.0])
    for make in (
        partial(BalancedSoftmaxLoss, COUNTS),
        reweighted,
        partial(FocalLoss, alpha=[1, 2, 1, 4]),
        weighted,
    ):
        for v, y, s in ((logits[:, 0], target, None), (logits[:, 0], q, sample_weight), (logits, q, None)):
            compare_shares(make, v, y, s, sizes, rank)
    for v, y, s in ((logits, target, None), (logits, target, sample_weight)):
        compare_shares(partial(NCLLoss, COUNTS), v, y, s, sizes, rank)
        compare_shares(reweighted_ride, v, y, s, sizes, rank)
    for v, s in ((logits[:, 0], None), (logits, sample_weight)):
        compare_shares(partial(SigmoidAdjustedLoss, COUNTS, 60), v, q, s, sizes, rank)


def mixed(target):
    """Probabilities of all classes, and of none for ignored samples."""
    q = torch.rand(len(target), 4, dtype=torch.float64).softmax(dim=1)
    return q.masked_fill((target == -100)[:, None], 0.0)


def reweighted(**options):
    criterion = LDAMLoss(COUNTS, **options)
    criterion.reweight()
    return criterion


def reweighted_ride(**options):
    """Whose mean divides by the weights of all ranks' samples, and by their number."""
    criterion = RIDELoss(COUNTS, diversity=0.3, gamma=0.4, **options)
    criterion.reweight()
    return criterion


def compare_shares(make, logits, target, sample_weight, sizes, rank):
    """Of a loss the share of a rank: what DDP makes of all is the gradient of one process, and its loss."""
    whole = logits.clone().requires_grad_()
    expected = make(sync=False)(whole, target, sample_weight=sample_weight)
    expected.backward()
    mine = logits.split(sizes)[rank].clone().requires_grad_()
    weights = None if sample_weight is None else sample_weight.split(sizes)[rank]
    loss = make()(mine, target.split(sizes)[rank], sample_weight=weights)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / len(sizes), expected.detach(), **CLOSE)
    torch.testing.assert_close(mine.grad / len(sizes), whole.grad.split(sizes)[rank], **CLOSE)


def check_bad_values(rank, world_size):
    """All ranks raise, and name the one whose values are bad; afterwards all is as before."""
    for bad in ("NaN", "target", "features", "soft features"):
        logits, target, sizes = shares(world_size)
        v, y = logits.split(sizes)[rank].clone(), target.split(sizes)[rank].clone()
        features = torch.randn(len(y), 3, 2, dtype=torch.float64)
        if rank == world_size - 1:
            v[0] = float("nan") if bad == "NaN" else 0.0
            y[0] = 4 if bad == "target" else 0
            features[0] = float("nan") if "features" in bad else 1.0
        inputs = {"features": features, "weight": torch.ones(3, 4, 2)} if "features" in bad else {}
        if bad == "soft features":
            y = torch.full((len(y), 4), 0.25)
        for aaw in (True, False):
            if "features" in bad and not aaw:
                continue
            own = LGLALoss(COUNTS, aaw=aaw)
            for _ in range(2):
                with pytest.raises(ValueError, match=f"rank {world_size - 1}"):
                    own(v, y, **inputs)
            # A script that catches the error and takes the next batch goes on.
            assert own(*(t.split(sizes)[rank] for t in (logits, target))).isfinite()


def check_mismatched_constants(rank, world_size):
    """Found in the first step, before any gradient."""
    logits, target, sizes = shares(world_size)
    inputs = logits.split(sizes)[rank], target.split(sizes)[rank]
    last = rank == world_size - 1
    for options in (
        {"class_counts": [40, 9, 5, 2] if last else COUNTS},
        {"class_counts": COUNTS, "tau": 2.0 if last else 2.5},
        {"class_counts": COUNTS, "tau": 2.0 if last else 2.5, "aaw": False},
        {"class_counts": COUNTS, "adjustment": "balanced" if last else "lgla"},
        {"class_counts": COUNTS, "scale": 20.0 if last else 30.0},
        {"class_counts": COUNTS, "label_smoothing": 0.1 * last, "aaw": False, "reduction": "sum"},
    ):
        with pytest.raises(ValueError, match=f"on rank {world_size - 1} than on rank 0"):
            LGLALoss(**options)(*inputs)
    with pytest.raises(ValueError, match=f"on rank {world_size - 1} than on rank 0"):
        LGLALoss(COUNTS, tau=2.0 + last, aaw=False)(*inputs, normalizer=4.0)
    # What counts is what a loss holds when it begins.
    loaded = LGLALoss([3, 2, 1, 1] if last else COUNTS)
    loaded.load_state_dict(LGLALoss(COUNTS).state_dict())
    assert loaded(*inputs).isfinite()


class WithLoss(torch.nn.Module):
    """As models are that give their loss; DDP sends rank 0's buffers to all before every step."""

    def __init__(self):
        super().__init__()
        self.experts = GroupConvExperts(None, 3, 4, num_features=5).double()
        self.criterion = LGLALoss(COUNTS)

    def forward(self, features, target):
        return self.criterion(self.experts(features), target)


def check_changed_adjustment(rank, world_size):
    """Changed on all ranks it is that of one process; changed on one, the next step says so."""
    torch.manual_seed(1)  # alike on all ranks
    _, target, sizes = shares(world_size)
    features, model = torch.randn(len(target), 5, dtype=torch.float64), WithLoss()
    parallel = DistributedDataParallel(model)
    mine = features.split(sizes)[rank], target.split(sizes)[rank]
    parallel(*mine).backward()
    for changed in ({"tau": 0.5}, {"class_counts": [1, 2, 3, 90]}):
        model.criterion.set_adjustment(**changed)
        model.zero_grad()
        parallel(*mine).backward()
        single = LGLALoss([1, 2, 3, 90] if "class_counts" in changed else COUNTS, tau=0.5, sync=False)
        (gradient,) = torch.autograd.grad(
            single(model.experts(features), target), model.experts.classifiers.weight
        )
        torch.testing.assert_close(model.experts.classifiers.weight.grad, gradient, **CLOSE)

    model.criterion.set_adjustment(tau=2.0 if rank == 0 else 0.5)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        # What such a DDP writes before a step is seen: all ranks take what rank 0 has.
        parallel(*mine)
        assert model.criterion.adjuster.tau == 2.0
        return
    with pytest.raises(ValueError, match="than on rank 0"):
        parallel(*mine)


def check_states_of_one_rank(rank, world_size):
    """DDP sends what rank 0 has loaded, as PyTorch's tutorials have it."""
    logits, target, sizes = shares(world_size)
    inputs = logits.split(sizes)[rank], target.split(sizes)[rank]
    for make in (LGLALoss, LDAMLoss, LogitAdjustedLoss):
        saved = make([1, 2, 3, 90])
        if make is LDAMLoss:
            saved.reweight()
        model = torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1), "loss": make(COUNTS)})
        if rank == 0:
            model["loss"].load_state_dict(saved.state_dict())
        criterion = DistributedDataParallel(model).module["loss"]
        torch.testing.assert_close(criterion(*inputs), saved(*inputs), **CLOSE)


def check_copies(rank, world_size):
    """Of a loss with a group share it, as an average of models needs; a group cannot be pickled."""
    logits, target, sizes = shares(world_size)
    inputs = logits.split(sizes)[rank], target.split(sizes)[rank]
    criterion = LGLALoss(COUNTS, process_group=dist.new_group(range(world_size)))
    torch.testing.assert_close(copy.deepcopy(criterion)(*inputs), criterion(*inputs), **CLOSE)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(criterion)
    pickle.loads(pickle.dumps(LGLALoss(COUNTS)))(*inputs)


def check_group(rank, world_size):
    """process_group limits the batch to some of the ranks."""
    group = dist.new_group([0, 1])
    others = dist.new_group([world_size - 1])
    logits, target, _ = shares(world_size)
    if rank != world_size - 1:  # its world size is -1 here, which would turn the loss around
        for aaw in (True, False):
            with pytest.raises(ValueError, match="process_group"):
                LGLALoss(COUNTS, aaw=aaw, process_group=others)(logits, target)
    if rank > 1:
        return
    parts = [(logits[:4], target[:4]), (logits[4:], target[4:])]
    mine = LGLALoss(COUNTS, process_group=group)(*parts[rank])
    dist.all_reduce(mine, group=group)
    torch.testing.assert_close(mine / 2, LGLALoss(COUNTS, sync=False)(logits, target), **CLOSE)


def check_compile(rank, world_size):
    logits, target, sizes = shares(world_size)
    inputs = (logits.split(sizes)[rank], target.split(sizes)[rank])
    criterion = LGLALoss(COUNTS)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), criterion(*inputs), **CLOSE)


def main(rank, world_size):
    for aaw in (True, False):
        for reduction in ("mean", "sum", "none"):
            check_loss_and_gradients(rank, world_size, aaw, reduction)
    check_ddp(rank, world_size)
    check_collectives(rank, world_size)
    check_other_targets(rank, world_size)
    check_baselines(rank, world_size)
    check_bad_values(rank, world_size)
    check_mismatched_constants(rank, world_size)
    check_changed_adjustment(rank, world_size)
    check_states_of_one_rank(rank, world_size)
    check_copies(rank, world_size)
    check_group(rank, world_size)
    check_compile(rank, world_size)


if __name__ == "__main__":
    serve(main)
