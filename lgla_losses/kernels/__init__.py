"""The ways to compute the adjusted cross entropy; :mod:`lgla_losses.kernels.autograd` chooses among them.

Each engine is a module with the functions of :class:`Engine`: ``native`` (C, on the CPU), ``chunked``
(PyTorch, anywhere) and ``triton`` (GPUs). They take plain tensors, build no graph and check nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor


class Rows(NamedTuple):
    """Hold everything that the loss of a row reads, except its logits.

    A row is the ``C`` logits of one sample and one expert. ``A`` is float64 for float64 logits, else
    float32.

    Attributes:
        target: class indices, int64 ``[N]``, or probabilities ``[N, C]``, all 0 for an ignored sample.
        table: adjustments, float64 ``[K, C]``; None for zeros.
        weights: constants, ``A [N, K]``; None for ones.
        divisor: scalar of any floating dtype; 0 and None stand for 1.
        class_weight: weights of the classes, float64 ``[C]``; None for ones.
        margin: subtracted from a target's logit, times its probability, float64 ``[C]``; None for zeros.
        ignore_index: class index of ignored samples.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        gamma: focusing parameter of the focal loss; 0 is cross entropy.
        reduce: return one sum, divided by the divisor, instead of one loss per sample.
    """

    target: Tensor
    table: Tensor | None = None
    weights: Tensor | None = None
    divisor: Tensor | None = None
    class_weight: Tensor | None = None
    margin: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    gamma: float = 0.0
    reduce: bool = False


#: Positions of the fields of :class:`Rows` that are tensors, and of the others.
TENSORS, OPTIONS = slice(0, 6), slice(6, None)


class Angles(NamedTuple):
    """Hold the source of the angles of Eq. 7: cosine logits, features and class weights, or given angles.

    Attributes:
        cosines: cosine logits ``[N, k, C]``, one tensor or several that hold the ``K`` experts together.
        scale: factor of the cosine logits.
        features: inputs of the classifiers ``[N, K, d]``; not with probabilities.
        weight: weights of the classifiers ``[K, C, d]``.
        angles: radians, ``A [N, K]``; not with probabilities.
    """

    cosines: Sequence[Tensor] = ()
    scale: float = 1.0
    features: Tensor | None = None
    weight: Tensor | None = None
    angles: Tensor | None = None


class Samples(NamedTuple):
    """Hold the samples of a batch and the groups of their classes.

    Attributes:
        target: as in :class:`Rows`.
        group_index: group of every class, int64 ``[C]``.
        num_groups: ``G``.
        sample_weight: weight of each sample ``[N]``; None for 1.
        ignore_index: class index of ignored samples.
    """

    target: Tensor
    group_index: Tensor
    num_groups: int
    sample_weight: Tensor | None = None
    ignore_index: int = -100


Struct = TypeVar("Struct", Rows, Angles, Samples)


def with_fields(struct: Struct, **fields: Any) -> Struct:
    """Copy a named tuple with new values in some fields. PyTorch 2.6 cannot compile ``_replace``."""
    kind = type(struct)
    values: list[Any] = [fields.get(name, value) for name, value in zip(kind._fields, struct, strict=True)]
    return kind(*values)


class Engine(Protocol):
    """List what an engine computes. Its tensors may have any strides."""

    def statistics(self, angles: Angles, samples: Samples) -> tuple[Angles, Tensor]:
        """Compute Eq. 7 and the contribution of the batch to the reference angles.

        Returns:
            The angles ``A [N, K]`` of class indices, else ``angles`` itself, for ``weights``. Also
            parts, float64 ``[B, G, K + 1]``, to sum over their first dimension: for each group the sum of
            every expert's angles, and the number of samples.
        """

    def weights(
        self, angles: Angles, samples: Samples, parts: Tensor | None = None, num_ranks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Compute Eq. 8 times the samples' weights, ``A [N, K]``.

        Also give the number of samples, divided by ``num_ranks``. Without ``parts`` the reference angles are
        those of this batch alone.
        """

    def count(
        self,
        target: Tensor,
        sample_weight: Tensor | None,
        class_weight: Tensor | None,
        ignore_index: int,
    ) -> Tensor:
        """Sum the weights of the samples that are not ignored, or their number: a float64 scalar."""

    def forward(
        self, logits: Sequence[Tensor], rows: Rows, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Compute Eq. 9 of every sample ``A [N]``, or with ``reduce`` their sum, divided by the divisor.

        Args:
            logits: tensors ``[N, k, C]`` that hold the ``K`` experts together.
            rows: everything else.
            gradients: tensors like the logits, which may share their memory; filled with the gradient of the
                sum over the divisor. None if it is not needed.

        Returns:
            The losses, and a state for ``backward``, ``A [N, K, 2]``. The loss is NaN if a class index is out
            of range or a logit that is used is NaN or +inf.
        """

    def backward(
        self,
        logits: Sequence[Tensor],
        rows: Rows,
        upstream: Tensor,
        state: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Write the gradients of the logits, from ``upstream`` ``[N]``, those of the samples' losses."""

    def rescale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiply a gradient by a scalar in place; for 1 this costs almost nothing."""
