"""A monitor of the loss in training: angles, weights and accuracies, as scalars for a log."""

from __future__ import annotations

import functools
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._batch import Batch
from lgla_losses._checks import describe, positive_int
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.losses.lgla import LGLALoss

__all__ = ["LossMonitor"]


class ScalarWriter(Protocol):
    """Take the scalars of :meth:`LossMonitor.write`, such as a ``SummaryWriter`` of TensorBoard."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Record a number under a name, at a step."""


class LossMonitor:
    """Watch a loss in training and sum its angles, weights and accuracies, for a log.

    It is a forward hook on the loss, so the training loop does not change. Losses and gradients are the same
    to the bit, and the same engine computes them. The monitor looks at every ``every``-th call of the loss in
    training mode with gradients enabled, and at none in validation. The sums stay on the device of the
    logits; only :meth:`compute` waits for it.

    Experts and groups are counted from 1; the last expert is the global one, group 1 the head. The samples
    are those of this process that are not ignored, even in distributed training, where the references of the
    loss come from all ranks. A group without samples is left out. A sample with class probabilities belongs
    to its most likely class, each position of a map is a sample, and sample weights are applied. The scalars
    are

    - ``angle/expert k``: mean angle between features and their class centre, in radians (Eq. 7)
    - ``reference/expert k/group g``: mean angle of the group's samples in radians, the reference in Eq. 8;
      over several batches, batches are weighted by their samples
    - ``weight/expert k``: mean weight of Eq. 8, with ``aaw`` only
    - ``hard share/expert k``: fraction of samples whose weight exceeds 1, with ``aaw`` only
    - ``accuracy/expert k/group g``, ``accuracy/ensemble/group g``: fraction of the group's samples for which
      the true class has the largest unadjusted logit, or sum of the experts' logits

    Angles come from the features given to the loss, else from the logits and ``scale``. For a linear head
    ``scale`` must be None; then there are no angles without features.

    Under ``torch.compile`` a watched loss breaks the graph. In a CUDA graph, a call that was watched when
    recorded is watched in every replay.

    Source: Tao et al., ICCV 2023, Eqs. 7 and 8.

    Args:
        criterion: the loss to watch.
        every: look at one call out of this many, the first. A look reads all logits twice, for the
            accuracies, and takes a few times as long as the loss itself.

    Attributes:
        criterion: as given.
        every: as given; may be changed.

    Raises:
        TypeError: ``criterion`` is not an :class:`~lgla_losses.LGLALoss`, or ``every`` is not an integer.
        ValueError: ``every`` is less than 1.

    Example:
        >>> criterion = LGLALoss([100, 10, 10], num_experts=2)
        >>> with LossMonitor(criterion, every=1) as monitor:
        ...     loss = criterion(torch.zeros(4, 2, 3), torch.tensor([0, 0, 1, 2]))
        >>> monitor.compute()["accuracy/ensemble/group 1"]
        0.5
    """

    def __init__(self, criterion: LGLALoss, every: int = 10) -> None:
        if not isinstance(criterion, LGLALoss):
            raise TypeError(
                f"criterion: expected an LGLALoss, got {describe(criterion)}; for a compiled loss pass the "
                "original; LinearLGLALoss has no logits to look at"
            )
        self.criterion = criterion
        self.every = positive_int("every", every, "1 looks at every training step")
        self._calls = 0
        #: For each kind of scalar, by group, the sums of its columns; the last column counts the samples.
        self._sums: dict[str, Tensor] = {}
        self._hook = criterion.register_forward_hook(self._watch, with_kwargs=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _watch(
        self, criterion: LGLALoss, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        """Run after a call of the loss; return None, or the result would replace the loss."""
        if not (criterion.training and torch.is_grad_enabled()):
            return
        if self._calls % self.every == 0:
            with torch.no_grad():
                self._add(*args, **kwargs)
        self._calls += 1

    def _add(
        self,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        *,
        normalizer: object = None,
        **inputs: Tensor | None,
    ) -> None:
        """Add a batch to the sums, from the arguments of :meth:`LGLALoss.forward`."""
        grouper, ignore_index = self.criterion.grouper, self.criterion.ignore_index
        table = self.criterion.adjuster.constant("table")
        batch = Batch.of_experts(output, target, table, needs_angles=True, **inputs)
        experts = [expert.flatten(0, -2) for expert in batch.experts()]
        target = batch.target
        if batch.is_soft:
            target = torch.where(target.sum(dim=-1) > 0, target.max(dim=-1).indices, ignore_index)
        target = target.flatten()
        of_samples = None if batch.sample_weight is None else batch.sample_weight.flatten()
        group = functional.target_groups(target, grouper.constant("group_index"), ignore_index)

        # In float32 or wider: sums in bfloat16 tie, and ties go to the class with the lower index.
        dtype = functional.compute_dtype(experts[0].dtype)
        ensemble = functools.reduce(torch.add, (v.to(dtype) for v in experts))
        # On a CPU max takes half the time of argmax.
        hits = torch.stack([v.max(dim=1).indices == target for v in (*experts, ensemble)], dim=1)
        self._add_by_group("accuracy", hits.to(dtype), group, of_samples)

        own_class = torch.where(target == ignore_index, 0, target)
        if batch.features is not None and batch.weight is not None:
            angles = functional.angles_from_features(batch.features.flatten(0, -3), batch.weight, own_class)
        elif self.criterion.scale is not None:
            angles = functional.angles_from_logits(experts, own_class, self.criterion.scale)
        else:
            return
        statistics = self._add_by_group("angle", angles, group, of_samples)
        if self.criterion.aaw:
            weights = functional.aaw_weights(angles, group, statistics)
            columns = torch.cat([weights, weights > 1], dim=1)
            self._add_by_group("weight", columns, group, of_samples)

    def _add_by_group(
        self, kind: str, columns: Tensor, group: Tensor, sample_weight: Tensor | None
    ) -> Tensor:
        """Add columns ``[N, M]`` to the sums ``[G, M + 1]``; return the sums of this batch."""
        num_groups = self.criterion.grouper.num_groups
        batch = functional.aaw_statistics(columns, group, num_groups, sample_weight)
        if kind in self._sums:
            # In place, so that the replays of a CUDA graph are added too.
            self._sums[kind] = self._sums[kind].to(batch.device).add_(batch)
        else:
            self._sums[kind] = batch.clone()
        return batch

    def compute(self) -> dict[str, float]:
        """Compute the scalars by name, over the batches since the last :meth:`reset`; wait for the device."""
        num_experts = self.criterion.num_experts
        experts = [f"expert {k + 1}" for k in range(num_experts)]
        scalars: dict[str, float] = {}
        for kind, on_device in self._sums.items():
            sums = on_device.cpu()
            present = [g for g in range(len(sums)) if sums[g, -1] > 0]
            by_group = {f"group {g + 1}": (sums[g, :-1] / sums[g, -1]).tolist() for g in present}
            mean = (sums[:, :-1].sum(dim=0) / sums[:, -1].sum()).tolist() if present else []
            if kind == "weight":
                names = [f"{name}/{expert}" for name in ("weight", "hard share") for expert in experts]
                scalars.update(zip(names, mean, strict=False))
                continue
            if kind == "angle":
                scalars.update(zip((f"angle/{expert}" for expert in experts), mean, strict=False))
            of_group, rows = ("reference", experts) if kind == "angle" else (kind, [*experts, "ensemble"])
            for name, means in by_group.items():
                scalars.update({f"{of_group}/{row}/{name}": v for row, v in zip(rows, means, strict=True)})
        return scalars

    def reset(self) -> None:
        """Forget the batches added up so far."""
        for sums in self._sums.values():
            sums.zero_()

    def write(self, writer: ScalarWriter, step: int) -> None:
        """Write the scalars to a writer, then :meth:`reset`.

        Args:
            writer: has ``add_scalar(name, value, step)``.
            step: step for the writer's axis.
        """
        for name, value in self.compute().items():
            writer.add_scalar(name, value, step)
        self.reset()

    def close(self) -> None:
        """Stop watching; the sums stay."""
        self._hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
