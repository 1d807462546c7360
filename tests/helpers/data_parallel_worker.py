"""One rank of test_data_parallel.py: DDP and FSDP2 beside one process on the whole batch."""

import contextlib
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from lgla_losses import GroupConvExperts, LGLALoss

COUNTS = [40, 9, 5, 1]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
TARGET = torch.tensor([0, 0, 0, 1, 2, 3, -100, 0, 2, 1, 1])

#: Rank 0 has no sample of the tail group, then a rank has none at all.
SIZES = ([3, 8], [6, 5], [11, 0], [0, 11])


class Net(nn.Module):
    """No batch norm, whose statistics are each rank's own."""

    def __init__(self, layout):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
        stage = lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.ReLU())  # noqa: E731
        self.experts = GroupConvExperts(stage, 3, 4, layout=layout)

    def forward(self, images):
        return self.experts(self.trunk(images))


def make(layout, distribute):
    """The same network twice: in one process, and on all ranks."""
    torch.manual_seed(1)
    single, parallel = Net(layout).double(), Net(layout).double()
    parallel.load_state_dict(single.state_dict())
    return single, distribute(parallel)


def sharded(units, placement=None):
    def distribute(model):
        for name, keep in units.items():
            part = model.get_submodule(name)
            fully_shard(part, mesh=MESH, reshard_after_forward=not keep, shard_placement_fn=placement)
        return model

    return distribute


def gathered(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(parallel, single):
    for actual, expected in zip(parallel.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(gathered(actual.grad), expected.grad, **CLOSE)


def check_training(rank, layout, distribute, criterion=LGLALoss):
    """Loss, every gradient and their norm in steps of uneven and empty shares, and the weights after them."""
    single, parallel = make(layout, distribute)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (single, parallel)]
    for sizes in SIZES:
        images = torch.randn(len(TARGET), 2, 5, 5, dtype=torch.float64)
        expected = criterion(COUNTS, sync=False)(single(images), TARGET)
        loss = criterion(COUNTS)(parallel(images.split(sizes)[rank]), TARGET.split(sizes)[rank])
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / len(sizes), expected.detach(), **CLOSE)
        for total, optimizer in zip((expected, loss), optimizers, strict=True):
            optimizer.zero_grad()
            total.backward()
        assert_same_gradients(parallel, single)
        norms = [nn.utils.clip_grad_norm_(model.parameters(), 1.0) for model in (parallel, single)]
        torch.testing.assert_close(gathered(norms[0]), norms[1], **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
    for actual, expected in zip(parallel.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(gathered(actual), expected, **CLOSE)


def check_accumulation(rank, distribute):
    """Micro-batches, of which one is empty, with ``normalizer=`` and one synchronisation, without AAW."""
    single, parallel = make("grouped", distribute)
    images = torch.randn(len(TARGET), 2, 5, 5, dtype=torch.float64)
    LGLALoss(COUNTS, aaw=False, sync=False)(single(images), TARGET).backward()
    sizes = SIZES[0]
    samples = int((TARGET != -100).sum()) / len(sizes)
    micro = [2, 1, 0] if rank == 0 else [3, 0, 5]
    batches = zip(images.split(sizes)[rank].split(micro), TARGET.split(sizes)[rank].split(micro), strict=True)
    criterion = LGLALoss(COUNTS, aaw=False)
    for i, (inputs, target) in enumerate(batches):
        last = i == len(micro) - 1
        without_sync = contextlib.nullcontext()
        if not isinstance(parallel, DistributedDataParallel):
            parallel.set_requires_gradient_sync(last)
        elif not last:
            without_sync = parallel.no_sync()
        with without_sync:
            criterion(parallel(inputs), target, normalizer=samples).backward()
    assert_same_gradients(parallel, single)


def check_class_weights_of_freed_memory(rank):
    """Of a unit that reshards after forward; only the angles read them, so without AAW nothing is amiss."""
    freed = sharded({"trunk": False, "experts": False, "": True})
    check_training(rank, "grouped", freed, lambda *args, **kwargs: LGLALoss(*args, aaw=False, **kwargs))
    _, parallel = make("grouped", freed)
    output = parallel(torch.randn(2, 2, 5, 5, dtype=torch.float64))
    assert output.weight.untyped_storage().size() == 0 < output.weight.numel()
    for num_samples in (2, 0):  # no rank may wait for others that have raised
        output = parallel(torch.randn(num_samples, 2, 5, 5, dtype=torch.float64))
        with pytest.raises(ValueError, match="reshard_after_forward=False"):
            LGLALoss(COUNTS)(output, TARGET[:num_samples])


def check_class_weights_in_shards(rank):
    """Of a unit of the classifiers alone, whose weights are read before it gathers them."""
    _, parallel = make("grouped", sharded({"experts.classifiers": True, "": True}))
    output = parallel(torch.randn(2, 2, 5, 5, dtype=torch.float64))
    assert isinstance(output.weight, DTensor)
    with pytest.raises(ValueError, match=r"a DTensor.*reshard_after_forward=False"):
        LGLALoss(COUNTS)(output, TARGET[:2])


def check_hooks_do_not_add_up(rank):
    """FSDP2 hooks every output that wants a gradient."""
    _, parallel = make("grouped", sharded({"experts": True, "": True}))
    in_use = []
    parallel.experts.classifiers.register_forward_hook(lambda module, *_: in_use.append(module.weight))
    for _ in range(3):
        LGLALoss(COUNTS)(parallel(torch.randn(2, 2, 5, 5, dtype=torch.float64)), TARGET[:2]).backward()
    assert not in_use[-1]._backward_hooks


def check_empty_batch_norm(rank):
    """On a CPU an empty batch leaves the running statistics alone."""
    norm = nn.BatchNorm2d(2)
    norm(torch.randn(4, 2, 3, 3))
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.randn(0, 2, 3, 3)).sum().backward()
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    assert torch.equal(norm.weight.grad, torch.zeros(2))


def main(rank, world_size, store):
    global MESH
    torch.set_num_threads(1)
    # Of the logits as a view, into which nothing writes.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    MESH = init_device_mesh("cpu", (world_size,))
    units = {"trunk": False, "experts": True, "": True}
    for layout in ("grouped", "independent"):
        check_training(rank, layout, DistributedDataParallel)
        check_training(rank, layout, sharded(units))
    check_training(rank, "grouped", sharded({"": True}))
    along_classes = lambda parameter: Shard(1) if parameter.dim() == 3 else None  # noqa: E731
    check_training(rank, "grouped", sharded(units, along_classes))
    check_accumulation(rank, DistributedDataParallel)
    check_accumulation(rank, sharded(units))
    check_class_weights_of_freed_memory(rank)
    check_class_weights_in_shards(rank)
    check_hooks_do_not_add_up(rank)
    check_empty_batch_norm(rank)
    dist.barrier()
    print(f"rank {rank} agrees", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
