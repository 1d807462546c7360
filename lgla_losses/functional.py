"""The paper's equations as pure functions, in the paper's order.

Symbols: ``N`` samples, ``K`` experts, ``G = K - 1`` groups, ``C`` classes, ``d`` features. Local experts come
first, head group first; the global expert is the last. The functions do not check arguments: the modules that
call them do.

Source of every equation: Tao et al., "Local and Global Logit Adjustments for Long-Tailed
Learning", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lgla_losses._checks import one_of
from lgla_losses._partition import partition_sorted

__all__ = [
    "aaw_references",
    "aaw_statistics",
    "aaw_weights",
    "angles_from_features",
    "angles_from_logits",
    "angles_of",
    "cla_margin",
    "cla_table",
    "class_cosines",
    "compute_dtype",
    "expert_logits",
    "focal",
    "focal_slope",
    "fused_lgla_loss",
    "implied_prior",
    "lgla_loss",
    "log_prior_table",
    "partition_classes",
    "sade_table",
    "smoothed_probabilities",
    "soft_aaw_statistics",
    "soft_aaw_weights",
    "soft_cross_entropy",
    "target_groups",
    "unit_vectors",
    "widest_dtype",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype to compute in for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Choose float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def partition_classes(class_counts: Tensor, num_groups: int) -> Tensor:
    r"""Assign every class to one of ``G`` groups of equal sample mass (section 3.2).

    The classes are sorted by count, largest first, ties by class index, and cut into ``G`` non-empty
    contiguous groups that minimise :math:`\sum_g (\sum_{j \in C_g} n_j)^2`, exactly.

    Args:
        class_counts: positive samples per class, int64 or float64 ``[C]`` on the CPU.
        num_groups: ``G``, at most ``C``.

    Returns:
        Group of every class, 0 for the head, int64 ``[C]``.
    """
    order = torch.argsort(class_counts, descending=True, stable=True)
    cuts = partition_sorted(class_counts[order].numpy(), num_groups)
    group_of_rank = torch.zeros_like(order)
    group_of_rank[cuts] = 1
    return torch.empty_like(order).scatter_(0, order, group_of_rank.cumsum(0))


def log_prior_table(class_counts: Tensor, num_experts: int, tau: float = 1.0) -> Tensor:
    r"""Compute the adjustments :math:`T(j) = \tau \log(n_j / n_{max})` of Eq. 2, the same for every expert.

    ``tau=1`` is balanced softmax (Ren et al., 2020), other values logit adjustment (Menon et
    al., 2021), ``tau=0`` plain softmax, Eq. 1.

    Returns:
        float64 ``[K, C]`` with maximum 0 in every row.
    """
    return (tau * _log_prior(class_counts)).repeat(num_experts, 1)


def cla_table(class_counts: Tensor, group_index: Tensor, tau: float) -> Tensor:
    r"""Compute the adjustments :math:`T(k, j)` of Eq. 4, shifted by a constant per expert.

    :math:`\log(n_j / n_{max})` for the classes of group k and 0 for the others, for the local
    experts; :math:`\tau \log(n_j / n_{max})` for the global one. The shift does not change the softmax.

    Args:
        class_counts: positive samples per class ``[C]``.
        group_index: group of every class, int64 ``[C]``.
        tau: strength of the global adjustment.

    Returns:
        float64 ``[K, C]`` with maximum 0.
    """
    log_prior = _log_prior(class_counts)
    num_groups = int(group_index.max()) + 1
    own_group = group_index == torch.arange(num_groups, device=group_index.device)[:, None]
    return torch.cat([torch.where(own_group, log_prior, 0.0), tau * log_prior[None]])


def sade_table(class_counts: Tensor, tau: float = 2.0) -> Tensor:
    r"""Compute the adjustments of SADE's three experts: softmax, balanced softmax, inverse softmax.

    .. math:: T(1, j) = 0, \qquad T(2, j) = \log \pi_j, \qquad
        T(3, j) = \log \pi_j - \tau \log \bar\pi_j

    :math:`\pi` is the class prior, and :math:`\bar\pi` has its values in reversed order of frequency: the
    most frequent class has the value of the rarest. Among equal counts the lower class index is taken as
    rarer. Each row is shifted by a constant, so that its maximum is 0; this does not change the softmax.

    Source: Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed
    Recognition", NeurIPS 2022, the losses of the skill-diverse experts.

    Args:
        class_counts: positive samples per class ``[C]``.
        tau: strength of the third expert's preference for the rare classes, :math:`\lambda` of the paper.

    Returns:
        float64 ``[3, C]`` with maximum 0 in every row.
    """
    log_prior = _log_prior(class_counts)
    order = class_counts.argsort(stable=True)
    log_inverse = torch.empty_like(log_prior)
    log_inverse[order] = log_prior[order.flip(0)]
    inverse = log_prior - tau * log_inverse
    return torch.stack([torch.zeros_like(log_prior), log_prior, inverse - inverse.max()])


def _log_prior(class_counts: Tensor) -> Tensor:
    counts = class_counts.double()
    # A difference of logarithms: a quotient of extreme counts could underflow.
    return counts.log() - counts.max().log()


def cla_margin(table: Tensor, target: Tensor) -> Tensor:
    r"""Compute the margins :math:`M(y_i, j, k) = T(k, j) - T(k, y_i)` of Eq. 6.

    Args:
        table: adjustments ``[K, C]``.
        target: class indices ``[N]``.

    Returns:
        ``[N, K, C]``; positive where the boundary moves towards the target's side, so that the sample must
        win by more.
    """
    return table - table[:, target].T.unsqueeze(-1)


def implied_prior(table: Tensor, class_counts: Tensor, fusion: Tensor) -> Tensor:
    r"""Compute the class prior under which fused logits are log-likelihood plus log prior.

    Expert k learns :math:`v_k = \log p(x|j) + \log n_j - T(k, j)` up to a constant, so logits fused with
    weights :math:`f_k` hold the prior :math:`\propto \exp \sum_k f_k (\log n_j - T(k, j))`. (Our derivation,
    not the paper's, for calibrated posteriors: see :meth:`CLALogitAdjuster.implied_prior
    <lgla_losses.CLALogitAdjuster.implied_prior>`.)

    Args:
        table: adjustments ``[K, C]``.
        class_counts: samples per class ``[C]``; 0 for classes that the table masks by -inf.
        fusion: weights of the experts ``[K]``, summing to 1.

    Returns:
        Probabilities ``[C]`` in the table's dtype; 0 for masked classes.
    """
    masked = class_counts == 0
    log_prior = (class_counts.to(table.dtype).log() - table).masked_fill(masked, 0.0)
    fused = fusion.to(table.dtype) @ log_prior
    return torch.softmax(fused.masked_fill(masked, -torch.inf), dim=0)


def angles_from_features(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    r"""Compute the angles :math:`\theta_k^{y_i}` of Eq. 7 between features and their class centres.

    Args:
        features: inputs of the classifiers ``[N, K, d]``.
        weight: class centres ``[K, C, d]``.
        target: class indices ``[N]``.

    Returns:
        Radians ``[N, K]``, detached, in float32, or float64 for float64 inputs.
    """
    dtype = compute_dtype(torch.promote_types(features.dtype, weight.dtype))
    centres = weight.detach()[:, target].transpose(0, 1)
    cosine = (unit_vectors(features.detach().to(dtype)) * unit_vectors(centres.to(dtype))).sum(dim=-1)
    return cosine.clamp(-1.0, 1.0).acos()


def class_cosines(features: Tensor, weight: Tensor) -> Tensor:
    r"""Compute the cosines of Eq. 7 between features and all class centres.

    Args:
        features: inputs of the classifiers ``[N, K, d]``.
        weight: class centres ``[K, C, d]``.

    Returns:
        ``[N, K, C]`` within -1 and 1, detached, in float32, or float64 for float64 inputs.
    """
    device = features.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # autocast would round the cosines to 16 bits
            return class_cosines(features, weight)

    dtype = compute_dtype(torch.promote_types(features.dtype, weight.dtype))
    rows = unit_vectors(features.detach().to(dtype))
    centres = unit_vectors(weight.detach().to(dtype))
    return torch.einsum("nkd,kcd->nkc", rows, centres).clamp(-1.0, 1.0)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divide vectors by their lengths; zero, with zero gradient, if the length rounds to 0."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length == 0, torch.inf, length)


def angles_from_logits(logits: Tensor | Sequence[Tensor], target: Tensor, scale: float) -> Tensor:
    r"""Read the angles of Eq. 7 off cosine logits, :math:`v = s \cos\theta`.

    Args:
        logits: ``[N, K, C]``, or ``K`` tensors ``[N, C]``.
        target: class indices ``[N]``.
        scale: the factor ``s`` of the cosine classifier.

    Returns:
        Radians ``[N, K]``, detached, in float32, or float64 for float64 logits. A cosine that rounds above 1
        is clamped.
    """
    own = torch.cat([v.detach().gather(1, target[:, None]) for v in expert_logits(logits)], dim=1)
    return angles_of(own, scale)


def angles_of(cosine_logits: Tensor, scale: float) -> Tensor:
    """Read the angles off cosine logits of any shape, in radians, as :func:`angles_from_logits`."""
    dtype = compute_dtype(cosine_logits.dtype)
    return (cosine_logits.to(dtype) / scale).clamp(-1.0, 1.0).acos()


def expert_logits(logits: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Split logits into ``K`` tensors ``[N, C]``: views of a stacked tensor."""
    return logits.unbind(1) if isinstance(logits, Tensor) else logits


def target_groups(target: Tensor, group_index: Tensor, ignore_index: int) -> Tensor:
    """Look up the group of every sample's label ``[N]``; -1 for ignored samples."""
    ignored = target == ignore_index
    return torch.where(ignored, -1, group_index[torch.where(ignored, 0, target)])


def aaw_statistics(
    angles: Tensor, group: Tensor, num_groups: int, sample_weight: Tensor | None = None
) -> Tensor:
    r"""Sum the contributions of a batch to the reference angles of section 3.3.

    You may add sums over batches or ranks before dividing them.

    Args:
        angles: radians ``[N, K]``.
        group: group of every sample ``[N]``, -1 for ignored ones.
        num_groups: ``G``.
        sample_weight: weight of each sample ``[N]``; None for 1.

    Returns:
        ``[G, K + 1]``, for each group the sum of every expert's angles over its samples, and in the last
        column their number. In float64, so that sums over a million samples keep the digits of the angles.
    """
    dtype = widest_dtype(angles.device)
    ones = angles.new_ones((angles.shape[0], 1), dtype=dtype)
    rows = torch.cat([angles.detach().to(dtype), ones], dim=1)
    if sample_weight is not None:
        rows = rows * sample_weight.to(dtype)[:, None]
    # An extra row takes the ignored samples, whatever their angles are.
    sums = rows.new_zeros((num_groups + 1, rows.shape[1]))
    return sums.index_add(0, torch.where(group < 0, num_groups, group), rows)[:num_groups]


def aaw_weights(angles: Tensor, group: Tensor, statistics: Tensor) -> Tensor:
    r"""Compute the weights :math:`g(\theta, \theta^{ref}) = 1 + \max(0, \theta - \theta^{ref})` of Eq. 8.

    For every expert, the reference of a sample is the mean angle over the samples whose label lies in the
    same group.

    Args:
        angles: radians ``[N, K]``.
        group: group of every sample ``[N]``, -1 for ignored ones.
        statistics: from :func:`aaw_statistics`, ``[G, K + 1]``.

    Returns:
        ``[N, K]`` in the angles' dtype, detached. 0 for ignored samples, else within
        :math:`[1, 1 + \pi]`.
    """
    excess = (angles.detach() - aaw_references(statistics)[group.clamp(min=0)]).clamp(min=0.0)
    return torch.where(group[:, None] < 0, 0.0, 1.0 + excess).to(angles.dtype)


def aaw_references(statistics: Tensor) -> Tensor:
    r"""Compute the reference angles :math:`\theta^{ref}` of section 3.3.

    Args:
        statistics: from :func:`aaw_statistics` or :func:`soft_aaw_statistics`, ``[G, K + 1]``.

    Returns:
        ``[G, K]``; 0 for a group without samples.
    """
    samples = statistics[:, -1:]
    return statistics[:, :-1] / torch.where(samples > 0, samples, 1.0)


def soft_aaw_statistics(
    angles: Tensor,
    probabilities: Tensor,
    group_index: Tensor,
    num_groups: int,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Sum like :func:`aaw_statistics`; a sample belongs to each class by its probability.

    .. math::
        \theta_{gk}^{ref} = \frac{\sum_i \sum_{y \in g} q_{iy} \theta_{ik}^y}{\sum_i \sum_{y \in g} q_{iy}}

    (Our extension of section 3.3; for one-hot targets both are equal.)

    Args:
        angles: radians to every class ``[N, K, C]``.
        probabilities: ``[N, C]``.
        group_index: group of every class ``[C]``.
        num_groups: ``G``.
        sample_weight: weight of each sample ``[N]``; None for 1.

    Returns:
        float64 ``[G, K + 1]``.
    """
    dtype = widest_dtype(angles.device)
    probabilities = probabilities.to(angles.dtype)
    if sample_weight is not None:
        probabilities = probabilities * sample_weight[:, None].to(angles.dtype)
    by_class = (angles * probabilities[:, None]).sum(dim=0, dtype=dtype)
    rows = torch.cat([by_class, probabilities.sum(dim=0, dtype=dtype)[None]])
    return rows.new_zeros((num_groups, len(rows))).index_add(0, group_index, rows.T)


def soft_aaw_weights(
    angles: Tensor, probabilities: Tensor, group_index: Tensor, statistics: Tensor
) -> Tensor:
    r"""Average :func:`aaw_weights` over the classes that a sample belongs to.

    .. math:: \sum_y q_{iy} (1 + \max(0, \theta_{ik}^y - \theta_{g(y)k}^{ref}))

    Args:
        angles: radians to every class ``[N, K, C]``.
        probabilities: ``[N, C]``.
        group_index: group of every class ``[C]``.
        statistics: from :func:`soft_aaw_statistics`, ``[G, K + 1]``.

    Returns:
        ``[N, K]`` in the angles' dtype.
    """
    references = aaw_references(statistics).to(angles.dtype)[group_index]
    excess = (angles - references.T).clamp(min=0.0)
    return ((1.0 + excess) * probabilities[:, None].to(angles.dtype)).sum(dim=-1)


def lgla_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    table: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    margin: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    r"""Compute Eq. 9 for every sample: weighted adjusted cross entropy, summed over the experts.

    .. math::
        -\sum_k w_{ik} \log p(x_i, k), \qquad
        p(x_i, k) = \frac{\exp(v_{ik}^{y_i} + T(k, y_i))}{\sum_j \exp(v_{ik}^j + T(k, j))}

    :math:`p` is Eq. 3. If all rows of the table are the same, it is Eq. 2, logit adjustment; if they are 0,
    Eq. 1, softmax. Class weights :math:`c`, margins :math:`m`, the focal exponent :math:`\gamma`, label
    smoothing :math:`\epsilon` and targets that are probabilities :math:`q` (else one-hot) make it

    .. math::
        \sum_k w_{ik} \sum_j r_{ij} (1 - p_{ik}^j)^\gamma (-\log p_{ik}^j), \qquad
        p_{ik} = \mathrm{softmax}_j(v_{ik}^j + T(k, j) - m_j q_{ij}), \qquad
        r_{ij} = c_j \Big((1 - \epsilon) q_{ij} + \frac{\epsilon}{C} \sum_l q_{il}\Big)

    It is plain differentiable PyTorch, the reference for every other backend.

    Sources besides the paper: :math:`c` and :math:`\epsilon` as in :func:`torch.nn.functional.cross_entropy`;
    :math:`m` Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS
    2019, Eq. 12; :math:`\gamma` as in :func:`focal`.

    Args:
        logits: ``[N, K, C]``, or ``K`` tensors ``[N, C]``; maps have further dimensions ``[N, K, C, ...]``.
        target: class indices ``[N, ...]``, or probabilities ``[N, C, ...]``, all 0 for a sample to ignore.
        table: adjustments ``[K, C]``.
        weights: constants ``[N, ..., K]``, or None for ones.
        ignore_index: class index of samples to ignore.
        label_smoothing: share :math:`\epsilon` of the probability that is spread over all classes.
        class_weight: weights of the classes ``[C]``, or None for ones.
        margin: margin by which the target's logit must win ``[C]``, or None for zeros.
        gamma: focusing parameter, at least 0; 0 is cross entropy.

    Returns:
        ``[N, ...]`` in float32, or float64 for float64 logits; 0 for ignored samples.
    """
    losses = []
    for expert, adjustment in zip(expert_logits(logits), table, strict=True):
        dtype = compute_dtype(expert.dtype)
        # The logits of Eq. 3.
        adjusted = expert.to(dtype) + _along_classes(adjustment, expert, dim=1)
        if margin is not None:
            probabilities = _probabilities(target, adjusted, ignore_index)
            adjusted = adjusted - _along_classes(margin, adjusted, dim=1) * probabilities

        if gamma > 0 or target.is_floating_point():
            probabilities = _probabilities(target, adjusted, ignore_index)
            loss = soft_cross_entropy(
                adjusted, probabilities, label_smoothing, dim=1, class_weight=class_weight, gamma=gamma
            )
        else:
            loss = F.cross_entropy(
                adjusted,
                target,
                weight=None if class_weight is None else class_weight.to(dtype),
                ignore_index=ignore_index,
                reduction="none",
                label_smoothing=label_smoothing,
            )
        losses.append(loss)

    loss = torch.stack(losses, dim=-1)
    return (loss if weights is None else weights.to(loss.dtype) * loss).sum(dim=-1)


def fused_lgla_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    table: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    reduction: str = "none",
    divisor: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    margin: Tensor | None = None,
    gamma: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute :func:`lgla_loss` with an engine: it reads the logits once and writes their gradient once.

    Tensors are not checked here: the losses of this package do that. A class index out of range, or a logit
    that is NaN or +inf, makes the loss NaN.

    Source: Tao et al., ICCV 2023, Eq. 9.

    Args:
        logits: as in :func:`lgla_loss`.
        target: as in :func:`lgla_loss`.
        table: as in :func:`lgla_loss`; None for zeros.
        weights: as in :func:`lgla_loss`.
        reduction: ``"none"``, or ``"sum"``, which computes the gradient together with the loss.
        divisor: scalar that the sum is divided by; 0 and None stand for 1.
        ignore_index: as in :func:`lgla_loss`.
        label_smoothing: as in :func:`lgla_loss`.
        class_weight: as in :func:`lgla_loss`.
        margin: as in :func:`lgla_loss`.
        gamma: as in :func:`lgla_loss`.
        backend: as in :class:`~lgla_losses.LGLALoss`.

    Returns:
        ``[N, ...]``, or a scalar with ``"sum"``, in float32, or float64 for float64 logits.

    Raises:
        ValueError: an explicit backend cannot run, or there is no such backend or reduction.

    Example:
        >>> logits = torch.zeros(4, 1, 2, requires_grad=True)
        >>> fused_lgla_loss(logits, torch.tensor([0, 1, 1, 0]), reduction="sum").backward()
        >>> logits.grad[0, 0]
        tensor([-0.5000,  0.5000])
    """
    # Imported here, because the engines import this module.
    from lgla_losses.kernels import Rows, operators
    from lgla_losses.losses._config import BACKENDS

    one_of("backend", backend, BACKENDS)
    one_of("reduction", reduction, ("none", "sum"))  # a mean is a sum with a divisor

    blocks = [logits] if isinstance(logits, Tensor) else [expert.unsqueeze(1) for expert in logits]
    if blocks[0].dim() > 3:  # samples first
        blocks = [block.movedim((1, 2), (-2, -1)) for block in blocks]
        target = target.movedim(1, -1) if target.is_floating_point() else target
    reduce = reduction == "sum"
    rows = Rows(
        target, table, weights, divisor, class_weight, margin, ignore_index, label_smoothing, gamma, reduce
    )
    return operators.fused_loss(blocks, rows, backend)


def _probabilities(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Convert targets of logits ``[N, C, ...]`` to probabilities, 0 for ignored samples."""
    if target.is_floating_point():
        return target.to(logits.dtype)
    kept = (target != ignore_index).unsqueeze(1)
    own = target.unsqueeze(1) * kept
    return torch.zeros_like(logits).scatter(1, own, kept.to(logits.dtype))


def _along_classes(values: Tensor, logits: Tensor, dim: int) -> Tensor:
    """View values ``[C]`` so that they broadcast with logits, in the dtype of the logits."""
    shape = [1] * logits.dim()
    shape[dim] = -1
    return values.to(compute_dtype(logits.dtype)).view(shape)


def soft_cross_entropy(
    adjusted: Tensor,
    probabilities: Tensor,
    label_smoothing: float,
    dim: int,
    *,
    class_weight: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    r"""Compute cross entropy with class probabilities, :math:`-\sum_j q_j \log p_j`.

    Unlike :func:`torch.nn.functional.cross_entropy`, it gives no NaN if a class of probability 0 is masked by
    -inf.

    Args:
        adjusted: logits.
        probabilities: of the same shape; 0 everywhere for a sample to ignore.
        label_smoothing: share of the probability that is spread over all classes.
        dim: dimension of the classes.
        class_weight: weights of the classes ``[C]``, or None for ones.
        gamma: focusing parameter as in :func:`focal`, for every class; 0 is cross entropy.

    Returns:
        The losses, in the shape without ``dim``.
    """
    shares = smoothed_probabilities(probabilities.to(adjusted.dtype), label_smoothing, dim)
    if class_weight is not None:
        shares = shares * _along_classes(class_weight, adjusted, dim)
    # The value put in for a class without a share adds nothing. All derivatives of the focal loss are finite
    # at 1, but not at 0.
    stand_in = 1.0 if gamma > 0 else 0.0
    entropies = torch.where(shares == 0, stand_in, -torch.log_softmax(adjusted, dim=dim))
    return (focal(entropies, gamma) * shares).sum(dim=dim)


def focal(losses: Tensor, gamma: float) -> Tensor:
    r"""Focus cross entropies on hard samples: :math:`(1 - p)^\gamma L`, where :math:`p = e^{-L}`.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, Eq. 4.

    Args:
        losses: cross entropies :math:`L` of any shape.
        gamma: focusing parameter, at least 0; 0 leaves them unchanged.

    Returns:
        The same shape.
    """
    return losses if gamma == 0 else _missing_probability(losses) ** gamma * losses


def focal_slope(losses: Tensor, gamma: float) -> Tensor:
    r"""Differentiate :func:`focal`: :math:`(1 - p)^\gamma + \gamma (1 - p)^{\gamma - 1} p L`.

    Args:
        losses: cross entropies :math:`L` of any shape.
        gamma: focusing parameter, at least 0.

    Returns:
        The same shape.
    """
    missing = _missing_probability(losses)
    return missing**gamma + gamma * missing ** (gamma - 1) * torch.exp(-losses) * losses


def _missing_probability(losses: Tensor) -> Tensor:
    """Compute ``1 - p`` of cross entropies."""
    # expm1 keeps the digits near 0. A power of 0 has no derivative for gamma < 1, but the derivative of the
    # product is 0 there, that of a constant.
    return (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).tiny)


def smoothed_probabilities(probabilities: Tensor, label_smoothing: float, dim: int) -> Tensor:
    """Spread a share of the probability over all classes; ``dim`` is their dimension."""
    if not label_smoothing:
        return probabilities
    spread = probabilities.sum(dim=dim, keepdim=True) * (label_smoothing / probabilities.shape[dim])
    return (1 - label_smoothing) * probabilities + spread
