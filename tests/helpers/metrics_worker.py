"""One rank of tests/tools/test_metrics.py: its part of the samples counts as if one process had all."""

import torch
import torchvision_shim  # noqa: F401
from ranks import serve

from lgla_losses.metrics import ProbabilityScores, ShotAccuracy

COUNTS = [500, 50, 50, 5]


def check(rank, sizes):
    torch.manual_seed(0)
    pred, target = torch.randint(4, (2, sum(sizes)))
    whole = ShotAccuracy(COUNTS, sync_on_compute=False)
    whole.update(pred, target)
    metric = ShotAccuracy(COUNTS)
    if sizes[rank]:
        metric.update(pred.split(sizes)[rank], target.split(sizes)[rank])
    own = metric.total.clone()
    # Before, after and inside a synchronisation, and again: the ranks' own counts are kept.
    recalls = [metric.per_class()]
    means = [metric.compute(), metric.compute()]
    recalls.append(metric.per_class())
    with metric.sync_context():
        recalls.append(metric.per_class())
        assert metric._is_synced
    assert torch.equal(metric.total, own)
    for recall in recalls:
        torch.testing.assert_close(recall, whole.per_class(), equal_nan=True)
    for mean in means:
        torch.testing.assert_close(mean, whole.compute(), equal_nan=True)
    # A step's own value is the rank's own.
    if sizes[rank]:
        step = metric(pred.split(sizes)[rank], target.split(sizes)[rank])
        alone = ShotAccuracy(COUNTS, sync_on_compute=False)
        alone.update(pred.split(sizes)[rank], target.split(sizes)[rank])
        torch.testing.assert_close(step, alone.compute(), equal_nan=True)


def check_scores(rank, sizes, average):
    torch.manual_seed(0)
    probabilities = torch.randn(sum(sizes), 4).softmax(dim=1)
    target = torch.randint(4, (sum(sizes),))
    whole = ProbabilityScores(4, average=average, sync_on_compute=False)
    whole.update(probabilities, target)
    metric = ProbabilityScores(4, average=average)
    if sizes[rank]:
        metric.update(probabilities.split(sizes)[rank], target.split(sizes)[rank])
    torch.testing.assert_close(metric.compute(), whole.compute(), rtol=1e-6, atol=0)


def main(rank, world_size):
    for sizes in ([5, 12], [17, 0]):
        check(rank, sizes)
        for average in ("samples", "classes"):
            check_scores(rank, sizes, average)


if __name__ == "__main__":
    serve(main)
