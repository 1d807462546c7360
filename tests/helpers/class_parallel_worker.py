"""One rank of tests/distributed/test_class_parallel.py: classes spread over ranks against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import serve
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lgla_losses import LinearLGLALoss
from lgla_losses.distributed import ClassParallelLGLALoss, class_shard
from lgla_losses.kernels import linear

COUNTS = [40, 9, 5, 3, 2, 1, 1]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
CONFIGURATIONS = [
    {},
    {"scale": 20.0},
    {"aaw": False, "label_smoothing": 0.1},
    {"reduction": "sum", "label_smoothing": 0.2, "scale": 20.0},
    {"reduction": "none"},
    {"adjustment": "balanced", "num_experts": 2},
]


def batch(counts=COUNTS, num_experts=3, num_samples=11, seed=0):
    torch.manual_seed(seed)  # alike on all ranks
    features = torch.randn(num_samples, num_experts, 5, dtype=torch.float64)
    weight = torch.randn(num_experts, len(counts), 5, dtype=torch.float64)
    bias = torch.randn(num_experts, len(counts), dtype=torch.float64)
    target = torch.randint(len(counts), (num_samples,))
    target[-1] = -100
    return features, weight, target, bias


def gradients(criterion, features, weight, target, bias=None, **inputs):
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in (features, weight, bias)]
    loss = criterion(leaves[0], leaves[1], target, leaves[2], **inputs)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape))
    return loss.detach(), *(None if v is None else v.grad for v in leaves)


def check_one_process(rank, world_size):
    """Loss, the gradients of features and of every shard, the prior; uneven shards, and empty ones."""
    for counts in (COUNTS, COUNTS[:5], COUNTS[:3]):
        for options in CONFIGURATIONS:
            features, weight, target, bias = batch(counts, options.get("num_experts", 3))
            bias = None if "scale" in options else bias
            alone = LinearLGLALoss(counts, sync=False, **options)
            expected = gradients(alone, features, weight, target, bias)
            mine = class_shard(len(counts), rank, world_size)
            criterion = ClassParallelLGLALoss(counts, **options)
            assert torch.equal(criterion.implied_prior(), alone.implied_prior())
            assert criterion.table.shape == (features.shape[1], mine.stop - mine.start)
            for lines in (1 << 25, 1):  # one chunk, and several
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(linear, "_CHUNK_BYTES", {"cpu": lines})
                    patch.setattr(linear, "_LEAST_SAMPLES", 4)
                    got = gradients(
                        criterion, features, weight[:, mine], target, None if bias is None else bias[:, mine]
                    )
                torch.testing.assert_close(got[0], expected[0], **CLOSE)
                torch.testing.assert_close(got[1], expected[1], **CLOSE)
                torch.testing.assert_close(got[2], expected[2][:, mine], **CLOSE)
                if bias is not None:
                    torch.testing.assert_close(got[3], expected[3][:, mine], **CLOSE)


def check_other_targets(rank, world_size):
    """Probabilities, sample weights, an ignored class, masked classes, and a rank without classes."""
    for counts, options in (
        (COUNTS, {}),
        (COUNTS, {"scale": 20.0, "reduction": "none"}),
        (COUNTS, {"aaw": False, "label_smoothing": 0.1, "reduction": "sum"}),
        (COUNTS, {"aaw": False, "ignore_index": 2}),
        (COUNTS, {"ignore_index": 2, "label_smoothing": 0.1}),
        ([4], {"num_experts": 2}),
    ):
        features, weight, target, bias = batch(counts, options.get("num_experts", 3))
        target[-1] = options.get("ignore_index", -100)
        q = torch.rand(len(target), len(counts), dtype=torch.float64).softmax(dim=1)
        q[-1], q[:, 1:2] = 0.0, 0.0  # an ignored sample, and a class that no sample is of
        q = q / q.sum(dim=1, keepdim=True).clamp(min=1e-9)
        if "label_smoothing" not in options and len(counts) > 1:
            bias[:, 1], target = -torch.inf, torch.where(target == 1, 0, target)
        bias = None if "scale" in options else bias
        sample_weight = torch.rand(len(target), dtype=torch.float64)
        mine = class_shard(len(counts), rank, world_size)
        for y, s in ((q, None), (q.float(), sample_weight), (target, sample_weight), (target, None)):
            expected = gradients(
                LinearLGLALoss(counts, sync=False, **options), features, weight, y, bias, sample_weight=s
            )
            own = weight[:, mine], y, None if bias is None else bias[:, mine]
            criterion = ClassParallelLGLALoss(counts, **options)
            got = gradients(criterion, features, *own, sample_weight=s)
            for one, other in zip(got[:2], expected[:2], strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
            for one, other in zip(got[2:], expected[2:], strict=True):
                assert (one is None) == (other is None)
                torch.testing.assert_close(one, other if one is None else other[:, mine], **CLOSE)


def check_masked_classes(rank, world_size):
    """Ranks whose classes are all masked, and those that are not, equal one process."""
    for counts, options in (
        ([40, 9, 0, 3, 0, 0, 0], {}),
        ([40, 9, 0, 3, 0, 0, 0], {"scale": 20.0, "reduction": "none", "background": 3}),
        ([0, 0, 0, 0, 40, 9, 1], {"background": [4]}),
    ):
        features, weight, target, _ = batch(counts)
        present = torch.tensor(counts).nonzero()[:, 0]
        target = torch.where(target < 0, target, present[target.clamp(min=0) % len(present)])
        q = torch.rand(len(target), len(counts), dtype=torch.float64) * (torch.tensor(counts) > 0)
        q = q / q.sum(dim=1, keepdim=True)
        mine = class_shard(len(counts), rank, world_size)
        criterion = ClassParallelLGLALoss(counts, zero_counts="mask", **options)
        for y in (target, q):
            alone = LinearLGLALoss(counts, zero_counts="mask", sync=False, **options)
            expected = gradients(alone, features, weight, y)
            got = gradients(criterion, features, weight[:, mine], y)
            for one, other in zip(got[:3], (*expected[:2], expected[2][:, mine]), strict=True):
                torch.testing.assert_close(one, other, **CLOSE)


def check_shards(rank, world_size):
    """Cut as torch.chunk and DTensor cut."""
    for num_classes in range(1, 12):
        parts = torch.arange(num_classes).chunk(world_size)
        mine = torch.arange(num_classes)[class_shard(num_classes, rank, world_size)]
        assert mine.equal(parts[rank]) if rank < len(parts) else len(mine) == 0


def check_dtensor(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("classes",))
    features, weight, target, bias = batch()
    expected = gradients(LinearLGLALoss(COUNTS, sync=False), features, weight, target, bias)
    shards = [distribute_tensor(v, mesh, [Shard(1)]).requires_grad_() for v in (weight, bias)]
    leaf = features.clone().requires_grad_()
    criterion = ClassParallelLGLALoss(COUNTS, process_group=mesh.get_group())
    (0.5 * criterion(leaf, shards[0], target, shards[1])).backward()  # as in ``gradients``
    torch.testing.assert_close(leaf.grad, expected[1], **CLOSE)
    for shard, whole in zip(shards, expected[2:], strict=True):
        assert isinstance(shard.grad, DTensor)
        torch.testing.assert_close(shard.grad.full_tensor(), whole, **CLOSE)
    with pytest.raises(ValueError, match="sharded on dimension 1"):
        criterion(features, distribute_tensor(weight, mesh, [Shard(0)]), target)


def check_mesh(rank, world_size):
    """Classes and data on a mesh of two dimensions; DDP for what precedes the classifier."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "classes"))
    of_data, of_classes = mesh["data"].get_local_rank(), mesh["classes"].get_local_rank()
    groups = {"process_group": mesh["classes"].get_group(), "data_group": mesh["data"].get_group()}
    for options, is_soft in (({}, False), ({}, True), ({"aaw": False}, False), ({"scale": 20.0}, False)):
        features, weight, target, _ = batch()
        sample_weight = torch.rand(len(target), dtype=torch.float64) if is_soft else None
        target = torch.rand(len(target), len(COUNTS)).softmax(dim=1) if is_soft else target
        whole = torch.nn.Linear(5, 5).double()
        single = torch.nn.Linear(5, 5).double()
        single.load_state_dict(whole.state_dict())
        for module in (whole, single):
            with torch.no_grad():
                torch.manual_seed(1)
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape))
        expected = weight.clone().requires_grad_()
        loss = LinearLGLALoss(COUNTS, sync=False, **options)(
            single(features), expected, target, sample_weight=sample_weight
        )
        loss.backward()
        mine = class_shard(len(COUNTS), of_classes, world_size // 2)
        shard = torch.nn.Parameter(weight[:, mine].clone())
        trunk = DistributedDataParallel(whole)
        rows = [slice(0, 3), slice(3, 11)][of_data]
        own = ClassParallelLGLALoss(COUNTS, **groups, **options)(
            trunk(features[rows]),
            shard,
            target[rows],
            sample_weight=None if sample_weight is None else sample_weight[rows],
        )
        own.backward()
        dist.all_reduce(shard.grad, group=groups["data_group"])  # the mean, as DDP would take it
        torch.testing.assert_close(shard.grad / 2, expected.grad[:, mine], **CLOSE)
        for one, other in zip(whole.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, **CLOSE)
        total = own.detach().clone()
        dist.all_reduce(total, group=groups["data_group"])
        torch.testing.assert_close(total / 2, loss.detach(), **CLOSE)
        criterion = ClassParallelLGLALoss(COUNTS, **groups, **options)
        bad = features[rows] * (float("nan") if of_data else 1.0)
        told = (
            f"^rank {rank}: features"
            if of_data
            else f"on rank {rank + world_size // 2}; see the error of that rank"
        )
        with pytest.raises(ValueError, match=told):
            criterion(bad, weight[:, mine], target[rows])
        assert criterion(features[rows], weight[:, mine], target[rows]).isfinite()


def check_communication(rank, world_size):
    """What is sent does not depend on the number of classes; backward it is one gradient of the features."""
    volumes = {}
    for num_classes in (20, 2000):
        sizes = []
        originals = dist.all_reduce, dist.all_gather

        def counted_sum(tensor, *args, sizes=sizes, call=originals[0], **kwargs):
            sizes.append(("sum", tensor.numel()))
            return call(tensor, *args, **kwargs)

        def counted_gather(out, tensor, *args, sizes=sizes, call=originals[1], **kwargs):
            sizes.append(("gather", tensor.numel()))
            return call(out, tensor, *args, **kwargs)

        counts = list(range(num_classes, 0, -1))
        features, weight, target, _ = batch(counts)
        mine = class_shard(num_classes, rank, world_size)
        for validate_args in (None, False):
            criterion = ClassParallelLGLALoss(counts, validate_args=validate_args)
            criterion(features, weight[:, mine], target)  # the first step compares constants
            dist.all_reduce, dist.all_gather = counted_sum, counted_gather
            try:
                gradients(criterion, features, weight[:, mine], target)
            finally:
                dist.all_reduce, dist.all_gather = originals
            volumes[num_classes, validate_args] = sizes[:]
            sizes.clear()
    n, k, d = features.shape
    # Angles by expert and group, with samples, and weights; sums of exponentials and the target's logit.
    step = [("sum", (k - 1) * (k + 1)), ("sum", n * k), *[("gather", 2 * n)] * k, ("sum", n * k * d)]
    assert volumes[20, False] == volumes[2000, False] == step
    # Checks take a number a rank, two a sample, and two a sample and expert.
    checks = [("sum", world_size), ("gather", 2 * n * (k + 1))]
    assert volumes[20, None] == volumes[2000, None] == checks + step


def check_bad_input(rank, world_size):
    """All ranks raise, and the message names the rank."""
    features, weight, target, _ = batch()
    mine = class_shard(len(COUNTS), rank, world_size)
    last = rank == world_size - 1
    bad = weight[:, mine].clone()
    if last:
        bad[0, 0, 0] = float("nan")
    for aaw in (True, False):
        with pytest.raises(ValueError, match=f"rank {world_size - 1}"):
            ClassParallelLGLALoss(COUNTS, aaw=aaw)(features, bad, target)
        ignored, of_the_same_rank = target.clone(), target.clone()
        if last:
            ignored[0], of_the_same_rank[:] = -100, 1 - (target == 1).long()
        for other in (ignored, of_the_same_rank):
            with pytest.raises(ValueError, match="got other targets on some"):
                ClassParallelLGLALoss(COUNTS, aaw=aaw)(features, weight[:, mine], other)
        mixed = torch.full((len(target), len(COUNTS)), 1 / len(COUNTS))
        if last:
            mixed[3, :2] = torch.tensor([2, 0]) / len(COUNTS)
        with pytest.raises(ValueError, match="got other targets on some"):
            ClassParallelLGLALoss(COUNTS, aaw=aaw)(features, weight[:, mine], mixed)
        counted = torch.ones(len(target)).index_fill(0, torch.tensor([2]), 1.0 + last)
        for sample_weight in (counted, counted if last else None):
            with pytest.raises(ValueError, match="got other sample weights on some"):
                ClassParallelLGLALoss(COUNTS, aaw=aaw)(
                    features, weight[:, mine], target, sample_weight=sample_weight
                )
        dropped = torch.nn.functional.dropout(features, 0.1 * last)
        with pytest.raises(ValueError, match="got other features on some"):
            ClassParallelLGLALoss(COUNTS, aaw=aaw)(dropped, weight[:, mine], target)
        criterion = ClassParallelLGLALoss(COUNTS, aaw=aaw)
        for inputs in (
            (features * (float("nan") if last else 1.0), weight[:, mine], target),
            (features, weight[:, mine], target.clamp(min=0) + 7 * last),
        ):
            for _ in range(2):
                with pytest.raises(ValueError, match=f"rank {world_size - 1}"):
                    criterion(*inputs)
            assert criterion(features, weight[:, mine], target).isfinite()  # with the next batch it goes on
        with pytest.raises(ValueError, match=f"on rank {world_size - 1} than on rank 0"):
            ClassParallelLGLALoss(COUNTS, tau=2.0 if last else 1.0, aaw=aaw)(
                features, weight[:, mine], target
            )
        rows = slice(0, 4 if last else 5)
        with pytest.raises(ValueError, match=r"got \[5,.* 4\] samples"):
            criterion(features[rows], weight[:, mine], target[rows])
        for options in ({"scale": 20.0 if last else None}, {"label_smoothing": 0.1 * last}):
            with pytest.raises(ValueError, match=f"on rank {world_size - 1} than on rank 0"):
                ClassParallelLGLALoss(COUNTS, aaw=aaw, **options)(features, weight[:, mine], target)
    with pytest.raises(ValueError, match=r"as torch\.chunk cuts them"):
        ClassParallelLGLALoss(COUNTS)(features, weight, target)


def check_low_precision(rank, world_size):
    features, weight, target, _ = batch()
    mine = class_shard(len(COUNTS), rank, world_size)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        inputs = features.to(dtype), weight.to(dtype)
        exact = gradients(LinearLGLALoss(COUNTS, sync=False), inputs[0].double(), inputs[1].double(), target)
        got = gradients(ClassParallelLGLALoss(COUNTS), inputs[0], inputs[1][:, mine], target)
        for one, other in zip(got[:3], (exact[0], exact[1], exact[2][:, mine]), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
        assert got[1].dtype == got[2].dtype == dtype


def check_training(rank, world_size):
    """Without gradients, with a graph that is kept, and with no samples."""
    features, weight, target, _ = batch()
    mine = class_shard(len(COUNTS), rank, world_size)
    criterion = ClassParallelLGLALoss(COUNTS)
    with torch.no_grad():
        evaluated = criterion(features, weight[:, mine], target)
    leaf = features.clone().requires_grad_()
    loss = criterion(leaf, weight[:, mine], target)
    torch.testing.assert_close(evaluated, loss.detach(), **CLOSE)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * first, **CLOSE)
    empty = gradients(criterion, features[:0], weight[:, mine], target[:0])
    assert empty[0] == 0
    assert (empty[2] == 0).all()
    for parameter in (True, False):  # nothing of a gradient is computed that nobody asked for
        with torch.no_grad():
            w = weight[:, mine].clone().requires_grad_(parameter)
            torch.testing.assert_close(criterion(features, w, target), evaluated, **CLOSE)


def check_constants(rank, world_size):
    """DDP sends no rank's constants to others, checkpoints hold none, and copies have them."""
    features, weight, target, _ = batch()
    mine = class_shard(len(COUNTS), rank, world_size)
    holder = torch.nn.ModuleDict({"trunk": torch.nn.Linear(5, 5).double()})
    holder["criterion"] = ClassParallelLGLALoss(COUNTS, process_group=dist.new_group(range(world_size)))
    expected = holder["criterion"](features, weight[:, mine], target)
    table = holder["criterion"].table.clone()
    DistributedDataParallel(holder)
    assert holder["criterion"].table.equal(table)
    assert holder["criterion"].state_dict() == {}
    copied = copy.deepcopy(holder["criterion"]).half()
    assert copied.table.dtype == torch.float64
    torch.testing.assert_close(copied(features, weight[:, mine], target), expected, **CLOSE)


def check_place(rank, world_size):
    """A loss belongs to the ranks that it was constructed for."""
    features, weight, target, _ = batch()
    group = dist.new_group([0])
    if rank > 0:
        with pytest.raises(ValueError, match="process_group: expected a group that contains this rank"):
            ClassParallelLGLALoss(COUNTS, process_group=group)
        return
    criterion = ClassParallelLGLALoss(COUNTS, process_group=group)
    criterion._ranks = type(criterion._ranks)(None)
    with pytest.raises(ValueError, match=f"got rank 0 of {world_size}; construct it after"):
        criterion(features, weight, target)


CHECKS = [
    check_shards,
    check_one_process,
    check_other_targets,
    check_masked_classes,
    check_dtensor,
    check_mesh,
    check_communication,
    check_bad_input,
    check_low_precision,
    check_training,
    check_constants,
    check_place,
]


def main(rank, world_size):
    for check in CHECKS:
        check(rank, world_size)


if __name__ == "__main__":
    serve(main)
