"""The ways to compute the adjusted cross entropy; :mod:`lgla_losses.fused` chooses among them.

Each engine is a module with the functions of :class:`Engine`: ``native`` (C, on the CPU), ``chunked``
(PyTorch, anywhere) and ``triton`` (GPUs). They take plain tensors, build no graph and check nothing.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """What an engine computes.

    ``A`` is float64 for float64 logits, else float32. Logits are ``[N, K, C]`` with any strides,
    ``target`` is int64 ``[N]``, ``table`` float64 ``[K, C]`` or None for zeros. With ``check`` an
    engine that sees every value anyway raises for those that are wrong; others take no notice of it.
    """

    def statistics(
        self,
        source: Tensor,
        target: Tensor,
        group_index: Tensor,
        num_groups: int,
        *,
        scale: float | None,
        ignore_index: int,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Angles ``A [N, K]`` of Eq. 7, and parts ``[B, G, K + 1]`` of ``aaw_statistics``.

        ``source`` is cosine logits, or with ``scale=None`` the angles themselves. The parts are to
        be summed over their first dimension.
        """

    def weights(
        self,
        angles: Tensor,
        target: Tensor,
        group_index: Tensor,
        parts: Tensor,
        *,
        ignore_index: int,
        num_ranks: int,
    ) -> tuple[Tensor, Tensor]:
        """Eq. 8 ``A [N, K]``, and the number of samples over ``num_ranks`` as a scalar ``A``."""

    def weights_of(
        self,
        source: Tensor,
        target: Tensor,
        group_index: Tensor,
        num_groups: int,
        *,
        scale: float | None,
        ignore_index: int,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``weights`` from ``statistics``, where no other rank has a part in them."""

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        table: Tensor | None,
        weights: Tensor | None,
        divisor: Tensor | None,
        *,
        ignore_index: int,
        label_smoothing: float,
        reduce: bool,
        gradient: Tensor | None,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Eq. 9 of every sample ``A [N]``, or with ``reduce`` their sum over ``divisor``.

        ``gradient``, which may be the logits themselves, is filled with that of the sum over
        ``divisor``. The second result is the state for ``backward``, ``A [N, K, 2]``: every row's
        maximum and its sum of exponentials.
        """

    def backward(
        self,
        logits: Tensor,
        target: Tensor,
        table: Tensor | None,
        weights: Tensor | None,
        upstream: Tensor,
        state: Tensor,
        *,
        ignore_index: int,
        label_smoothing: float,
        gradient: Tensor,
    ) -> None:
        """Fill ``gradient`` for the gradients ``upstream`` ``[N]`` of the samples' losses."""

    def rescale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiply ``gradient`` by a scalar in place; by 1 it costs next to nothing."""
