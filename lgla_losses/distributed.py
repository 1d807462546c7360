"""Classes spread over the ranks of a job."""

from lgla_losses.losses.class_parallel import ClassParallelLGLALoss, class_shard

__all__ = ["ClassParallelLGLALoss", "class_shard"]
