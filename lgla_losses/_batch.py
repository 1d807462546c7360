"""A batch in normal form: the inputs of a loss, checked once, as views with the samples first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from lgla_losses import functional
from lgla_losses._checks import (
    FLOATING,
    WAY_OUT,
    computable_tensor,
    describe,
    finite_tensors,
    floating_tensor,
    gathered_weight,
    probability_tensor,
    probability_values,
    same_device,
    sample_weight_tensor,
    sample_weight_values,
    target_tensor,
    target_values,
)
from lgla_losses.experts.output import ExpertLogits, ExpertOutput
from lgla_losses.kernels import Angles
from lgla_losses.kernels.autograd import with_experts

#: Up to this many logits in K tensors are stacked for an engine: copying them is faster than a kernel for
#: each.
_WORTH_JOINING = {"cuda": 1 << 22}


class Batch(NamedTuple):
    """Hold the inputs of a loss in normal form, after the checks.

    ``B`` are the dimensions of the samples: ``[N]``, or ``[N, *S]`` for maps.

    Attributes:
        logits: one tensor ``[*B, K, C]``, or one tensor ``[*B, C]`` per expert; empty if the loss computes
            the logits itself.
        target: class indices ``[*B]`` or probabilities ``[*B, C]``.
        features: inputs of the classifiers ``[*B, K, d]``, or None.
        weight: weights of the classifiers ``[K, C, d]``, or None.
        sample_weight: weight of each sample ``[*B]``, or None.
        is_soft: whether the targets are probabilities.
        is_map: whether the samples have several dimensions.
        of_one: whether each tensor of logits belongs to one expert, ``[*B, C]``.
    """

    logits: Sequence[Tensor]
    target: Tensor
    features: Tensor | None = None
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    is_soft: bool = False
    is_map: bool = False
    of_one: bool = False

    @classmethod
    def of_experts(
        cls,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        table: Tensor,
        *,
        features: Tensor | None = None,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        needs_angles: bool = True,
    ) -> Batch:
        """Take the output of K experts; its experts and classes must match ``table`` ``[K, C]``."""
        if isinstance(output, ExpertOutput):
            if features is not None or weight is not None:
                raise ValueError(
                    "features, weight: expected none together with an ExpertOutput, which holds them; "
                    "leave them out"
                )
            output, features, weight = output
        logits = check_logits(output, table.shape[0], table.shape[1], maps=True)
        blocks = (logits,) if isinstance(logits, Tensor) else logits

        if (features is None) != (weight is None):
            raise ValueError(
                "features, weight: expected both or neither, got one; pass both, which Eq. 7 needs"
            )
        if not needs_angles:  # they are used for angles only
            features = weight = None
        of_one = not isinstance(logits, Tensor)
        return cls._arranged(blocks, of_one, target, features, weight, sample_weight, table)

    @classmethod
    def of_any(
        cls,
        output: ExpertOutput | ExpertLogits,
        target: Tensor,
        num_classes: int | None,
        sample_weight: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> Batch:
        """Take the logits of one model or of K experts; all must be on the device of ``constant``."""
        dims = 1
        if isinstance(target, Tensor):
            dims = target.dim() - int(target.is_floating_point())
            logits = output.logits if isinstance(output, ExpertOutput) else output
            if dims == 2 and isinstance(logits, Tensor) and logits.dim() == 3:
                # If this is not a map of classes, the target holds rows of classes and the logits are of
                # experts.
                is_map = logits.shape[1] == (num_classes or logits.shape[1])
                dims = 2 if is_map or target.shape[1] != logits.shape[2] else 1
        blocks, of_one = one_or_more_experts(output, num_classes, dims)
        if not of_one and isinstance(target, Tensor) and target.dim() > 0:
            found, samples = blocks[0].shape[:2], target.shape[0]
            if found[0] != samples == found[1]:
                raise ValueError(
                    f"logits: expected shape [N, K, C] for the {samples} samples of the target, got "
                    f"{list(blocks[0].shape)}; put experts on dimension 1: pass logits.transpose(0, 1)"
                )
        return cls._arranged(blocks, of_one, target, None, None, sample_weight, constant)

    @classmethod
    def of_features(
        cls,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        table: Tensor,
        sample_weight: Tensor | None = None,
        num_classes: int | None = None,
    ) -> Batch:
        """Take the inputs of K classifiers; experts and classes must match ``table`` ``[K, C]``.

        If these are only a part of the classes, ``num_classes`` is the number in the target.
        """
        samples = floating_tensor("features", features, "[N, K, d]").shape[:1]
        check_features(features, weight, samples, *table.shape)
        num_classes = table.shape[1] if num_classes is None else num_classes
        return cls._arranged((), False, target, features, weight, sample_weight, table, num_classes)

    @classmethod
    def _arranged(
        cls,
        blocks: Sequence[Tensor],
        of_one: bool,
        target: Tensor,
        features: Tensor | None,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        constant: Tensor | None,
        num_classes: int | None = None,
    ) -> Batch:
        """Check the inputs beside logits ``[N, K, C, *S]`` or ``[N, C, *S]``, or beside checked features.

        The dimensions of the samples come first in the result.
        """
        first, classes = blocks[0] if blocks else cast(Tensor, features), 1 if of_one else 2
        samples = first.shape[:1] + first.shape[classes + 1 :]
        num_classes = first.shape[classes] if num_classes is None else num_classes
        is_soft, is_map = False, len(samples) > 1
        if not is_usual(target, len(samples), (torch.int64,)) or tuple(target.shape) != tuple(samples):
            is_soft = isinstance(target, Tensor) and target.is_floating_point()
            if is_soft and target.dim() == len(samples) + 1:
                probability_tensor(target, samples, num_classes)
            else:
                target_tensor(target, samples)
        if sample_weight is not None:
            sample_weight_tensor(sample_weight, samples)
        if blocks and features is not None and weight is not None:
            num_experts = len(blocks) if of_one else first.shape[1]
            check_features(features, weight, samples, num_experts, num_classes)
        same_device(
            logits=blocks[0] if blocks else None,
            target=target,
            features=features,
            weight=weight,
            sample_weight=sample_weight,
            criterion=constant,
        )

        few = len(blocks) > 1 and sum(v.numel() for v in blocks) < _WORTH_JOINING.get(first.device.type, 0)
        if few and of_one and not torch.compiler.is_compiling():
            # One expert after the other in memory, so that gradients are passed on without a copy.
            blocks, of_one = (torch.stack(tuple(blocks)).movedim(0, 1),), False
        if is_map:
            blocks = [v.movedim(1, -1) if of_one else v.movedim((1, 2), (-2, -1)) for v in blocks]
            features = None if features is None else features.movedim((1, 2), (-2, -1))
            target = target.movedim(1, -1) if is_soft else target
        return cls(blocks, target, features, weight, sample_weight, is_soft, is_map, of_one)

    def with_classifiers(self, output: ExpertOutput) -> Batch:
        """Add the features and class weights of an output, if they are complete and fit the logits."""
        first, (_, features, weight) = self.logits[0], output
        if features is None or weight is None:
            return self
        num_experts = len(self.logits) if self.of_one else first.shape[-2]
        samples = self.target.shape[: self.target.dim() - int(self.is_soft)]
        try:
            check_features(features, weight, samples, num_experts, first.shape[-1])
            same_device(logits=first, features=features, weight=weight)
        except (TypeError, ValueError):
            return self
        features = features.movedim((1, 2), (-2, -1)) if self.is_map else features
        return self._replace(features=features, weight=weight)

    def experts(self) -> list[Tensor]:
        """Give the logits of every expert ``[*B, C]``, detached."""
        if self.of_one:
            return [expert.detach() for expert in self.logits]
        return [expert for block in self.logits for expert in block.detach().unbind(-2)]

    def stacked(self, ignore_index: int) -> Tensor:
        """Stack the logits of all experts ``[*B, K, C]``, with 0 for ignored samples.

        They have the dtype that losses are computed in.
        """
        return torch.where(self._counted(ignore_index)[..., None, None], stack(self.logits, self.of_one), 0.0)

    def amounts(self, ignore_index: int, class_weight: Tensor | None = None) -> Tensor:
        """Compute the weight of each sample ``[*B]`` in the dtype of sums, with class weights ``[C]``."""
        dtype = functional.widest_dtype(self.target.device)
        if self.is_soft:
            shares = self.target if class_weight is None else self.target * class_weight
            amounts = shares.sum(dim=-1).to(dtype)
        else:
            amounts = self._counted(ignore_index).to(dtype)
            if class_weight is not None:
                amounts = amounts * class_weight[self.own_class(len(class_weight))]
        return amounts if self.sample_weight is None else amounts * self.sample_weight

    def own_class(self, num_classes: int) -> Tensor:
        """Give the class of every sample ``[*B]``; any class if the target is ignored or out of range.

        The cross entropy of a target out of range is NaN, and the error for it comes after the loss.
        """
        return self.target.clamp(0, num_classes - 1)

    def _counted(self, ignore_index: int) -> Tensor:
        """Say which samples are not ignored ``[*B]``."""
        return self.target.sum(dim=-1) > 0 if self.is_soft else self.target != ignore_index

    def weights_of_experts(self, num_experts: int) -> Tensor | None:
        """Repeat the samples' weights for every expert ``[*B, K]``; give None if there are none."""
        if self.sample_weight is None:
            return None
        like = next(v for v in (*self.logits, self.features) if v is not None)
        weights = self.sample_weight.to(functional.compute_dtype(like.dtype))
        return weights[..., None].expand(*weights.shape, num_experts)

    def angles(self, scale: float | None) -> Angles:
        """Choose the source of the angles of Eq. 7: features, or cosine logits.

        Raises:
            ValueError: there are neither features nor a scale of cosine logits.
        """
        if self.features is not None and self.weight is not None:
            return Angles(features=self.features.detach(), weight=self.weight.detach())
        if scale is None:
            raise ValueError(
                "features, weight: expected features [N, K, d] and weight [K, C, d], got none; the logits "
                "of a linear head (scale=None) do not give the angles of Eq. 7: call criterion(logits, "
                "target, features=f, weight=w), pass an ExpertOutput, or set aaw=False"
            )
        logits = tuple(map(Tensor.detach, self.logits))
        return Angles(with_experts(logits) if self.of_one else logits, scale)

    def check_weights(self) -> None:
        """Raise for bad sample weights and probabilities, which the loss may not show. This reads them."""
        if self.sample_weight is not None:
            sample_weight_values(self.sample_weight)
        if self.is_soft:
            probability_values(self.target)

    def explain(
        self, ignore_index: int, num_classes: int | None = None, masked: Tensor | None = None
    ) -> None:
        """Raise if a value of the batch makes the loss wrong. This reads all values.

        Args:
            ignore_index: target value of samples to ignore.
            num_classes: ``C``; None takes that of the logits.
            masked: which classes are masked for lack of training samples, so that no target may have them
                ``[C]``; None for none.
        """
        self.check_weights()
        if not self.is_soft:
            target_values(self.target, num_classes or self.logits[0].shape[-1], ignore_index)
        if masked is not None:
            if self.is_soft:
                classes = (self.target > 0).flatten(0, -2).any(dim=0).nonzero()[:, 0]
            else:
                classes = self.target[self.target != ignore_index]
            refuse_masked(classes, masked.to(classes.device))
        if self.features is not None and self.is_soft:
            finite_tensors(features=self.features, weight=self.weight)
        elif self.features is not None:
            self.check_angles(ignore_index)
        for k, expert in enumerate(self.experts()):
            self._finite_logits(k, expert, ignore_index)

    def largest_target_logit(self, ignore_index: int) -> float:
        """Find the largest logit of a true class. This reads the values."""
        kept = self.target > 0 if self.is_soft else self.target != ignore_index
        found = []
        for expert in self.experts():
            index = (self.target * kept)[..., None] if not self.is_soft else None
            found.append((expert if index is None else expert.gather(-1, index))[kept].flatten())
        largest = torch.cat(found)
        return float(largest.max()) if largest.numel() else -math.inf

    def is_within(self, bound: float) -> bool:
        """Say whether logits exist, are not all 0, and stay within ``bound``. This reads the values."""
        ends = [end.item() for block in self.logits if block.numel() for end in block.detach().aminmax()]
        return any(ends) and all(-bound <= end <= bound for end in ends)

    def is_unlike_new_experts(self) -> bool:
        """Say whether logits vary less over classes than those of new experts, or much more than their mean.

        Class centres of new experts are close: the deviation of their logits is 0.375, less than the mean.
        """
        experts = [expert.float() for expert in self.experts()]
        common = [expert.mean(dim=-1, keepdim=True) for expert in experts]
        own = sum(float((e - c).square().mean()) for e, c in zip(experts, common, strict=True))
        return own < 0.05 * len(experts) or own > 4 * sum(float(c.square().mean()) for c in common)

    def compared_with_cosines(self) -> tuple[float, float]:
        """Compare the logits with the cosines of features and weights.

        It returns the part of the logits' norm that no multiple of the cosines explains, and the multiple. It
        looks at some samples and classes (for maps, at one row) and reads the values. Cosine heads of any
        scale give 0 up to rounding. The largest part over the experts and the largest multiple are returned.
        Large negative numbers are taken as masks.
        """
        features, weight = cast(Tensor, self.features).detach(), cast(Tensor, self.weight).detach()
        some, dtype = (0,) * (features.dim() - 3), functional.widest_dtype(features.device)
        logits = torch.stack([expert[some][:32, :256] for expert in self.experts()], dim=1).to(dtype)
        directions = functional.unit_vectors(features[some][:32].to(dtype))
        centres = functional.unit_vectors(weight[:, :256].to(dtype))
        cosines = torch.einsum("nkd,kcd->nkc", directions, centres)

        masked = ~(logits.isfinite() & cosines.isfinite()) | (logits < -1e3)
        logits, cosines = logits.masked_fill(masked, 0.0), cosines.masked_fill(masked, 0.0)
        scale = (logits * cosines).sum(dim=(0, 2)) / cosines.square().sum(dim=(0, 2)).clamp_min(1e-30)
        rest = (logits - scale[:, None] * cosines).square().sum(dim=(0, 2))
        share = (rest / logits.square().sum(dim=(0, 2)).clamp_min(1e-30)).amax().sqrt()
        return float(share), float(scale.abs().amax())

    def check_angles(self, ignore_index: int) -> None:
        """Raise for angles of class indices that are not finite. This reads them."""
        if self.features is None or self.weight is None:
            return
        kept = self.target != ignore_index
        angles = functional.angles_from_features(self.features[kept], self.weight, self.target[kept])
        if not angles.isfinite().all():
            raise ValueError(
                "angles: expected finite radians, got NaN or infinity; look for them in the features and "
                "class weights of the angles"
            )

    def _finite_logits(self, k: int, expert: Tensor, ignore_index: int) -> None:
        """Raise for logits ``[*B, C]`` of expert k that are NaN or +inf, or -inf on the target."""
        if expert.numel() == 0:
            return
        if self.is_soft:
            own = torch.where(self.target > 0, expert, 0.0)
        else:
            kept = self.target != ignore_index
            own = expert.gather(-1, (self.target * kept)[..., None])[kept]
        # The maximum shows NaN and +inf anywhere in the batch; -inf may mask other classes.
        if not (own.isfinite().all() and expert.amax() < float("inf")):
            raise ValueError(
                f"logits: expected no NaN or +inf, and no -inf on the target, got one from expert {k}; "
                f"{WAY_OUT}"
            )


def stack(blocks: Sequence[Tensor], of_one: bool) -> Tensor:
    """Stack logits ``[*B, C]`` of single experts, or take those of all: ``[*B, K, C]``, to compute with."""
    logits = torch.stack(tuple(blocks), dim=-2) if of_one else blocks[0]
    return logits.to(functional.compute_dtype(logits.dtype))


def refuse_masked(classes: Tensor, masked: Tensor) -> None:
    """Raise if one of the targets' classes is masked ``[C]``. This reads the values."""
    found = classes[masked[classes]]
    if found.numel():
        way_out = "leave its samples out, or count them in class_counts (set_adjustment changes it)"
        if not torch.is_grad_enabled():
            way_out = (
                "in validation pass LGLALoss the ensemble's logits, output.ensemble(), which it does not "
                "adjust; for another loss use torch.nn.functional.cross_entropy(logits, target)"
            )
        raise ValueError(
            f"target: expected classes with training samples, got class {int(found[0])}, which has no "
            f"training samples and is masked; {way_out}"
        )


def is_of_ensemble(logits: Tensor, target: object, num_classes: int) -> bool:
    """Say whether logits are those of an ensemble for this target: ``[N, C]``, for maps ``[N, C, *S]``."""
    if logits.dim() == 2 or not isinstance(target, Tensor) or target.is_nested:
        return logits.dim() == 2
    maps = target.shape[2:] if target.is_floating_point() else target.shape[1:]
    of_one = logits.dim() == 2 + len(maps) > 2
    return of_one and logits.shape[1] == num_classes and logits.shape[2:] == maps


def check_features(
    features: Tensor, weight: Tensor, samples: Sequence[int], num_experts: int, num_classes: int
) -> None:
    """Check that features ``[N, K, d, *S]`` and weights ``[K, C, d]`` fit samples, experts and classes."""
    n, *maps = samples
    floating_tensor("features", features, f"[N, K, d{', S' * len(maps)}]")
    floating_tensor("weight", weight, "[K, C, d]")
    gathered_weight(weight)
    k, c, d = num_experts, num_classes, features.shape[2]
    if list(features.shape) != [n, k, d, *maps] or list(weight.shape) != [k, c, d]:
        of_maps = "".join(f", {size}" for size in maps)
        raise ValueError(
            f"features, weight: expected shapes [{n}, {k}, d{of_maps}] and [{k}, {c}, d], "
            f"got {list(features.shape)} and {list(weight.shape)}"
        )


def is_usual(value: object, dims: int, dtypes: Sequence[torch.dtype] = FLOATING) -> TypeGuard[Tensor]:
    """Say whether a value is a plain, dense tensor with ``dims`` dimensions and one of the ``dtypes``."""
    return (
        type(value) is Tensor
        and value.dim() == dims
        and value.dtype in dtypes
        and value.layout == torch.strided
        and not value.is_nested
    )


def check_logits(logits: object, num_experts: int, num_classes: int, maps: bool = False) -> ExpertLogits:
    """Check that logits are a floating-point tensor ``[N, K, C]`` or K tensors ``[N, C]``; return them.

    With ``maps`` they may have further dimensions, as in ``[N, K, C, H, W]``.
    """
    # The usual case first, in one look.
    if is_usual(logits, 3) and logits.shape[1:] == (num_experts, num_classes):
        return logits
    if isinstance(logits, Sequence) and not isinstance(logits, str):
        experts = [_expert_tensor(f"logits[{k}]", v, "[N, C]", maps) for k, v in enumerate(logits)]
        got = f"{len(experts)} tensors of shapes {[list(v.shape) for v in experts]}"
        # Do not use a set of shapes: hashing a dynamic size would make torch.compile specialise on it.
        alike = all(v.shape == experts[0].shape for v in experts)
        if len(experts) != num_experts or not alike or experts[0].shape[1] != num_classes:
            raise ValueError(
                f"logits: expected {num_experts} tensors [N, {num_classes}], one per expert, got {got}; "
                "num_experts and class_counts set their number and width"
            )
        if any((v.dtype, v.device) != (experts[0].dtype, experts[0].device) for v in experts):
            raise ValueError(
                "logits: expected tensors of one dtype on one device, got "
                f"{', '.join(f'{v.dtype} on {v.device}' for v in experts)}; convert them with .to()"
            )
        return experts
    shape = f"[N, {num_experts}, {num_classes}]"
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits: expected an ExpertOutput, a tensor {shape} or {num_experts} tensors "
            f"[N, {num_classes}], got {_no_logits(logits)}"
        )
    computable_tensor("logits", logits, shape)
    if logits.dim() < 3 or (not maps and logits.dim() > 3) or logits.shape[1:3] != (num_experts, num_classes):
        gradient = " with a gradient" if logits.requires_grad else ""
        raise ValueError(
            f"logits: expected an ExpertOutput or shape {shape}, got {list(logits.shape)}{gradient}; "
            f"{_way_out(logits, num_experts, num_classes)}"
        )
    return logits


def _way_out(logits: Tensor, num_experts: int, num_classes: int) -> str:
    """Say what to do with logits that do not come from K experts."""
    if logits.dim() > 2 and (logits.shape[0], logits.shape[2]) == (num_experts, num_classes):
        return "put experts on dimension 1: pass logits.transpose(0, 1)"
    of_one = " or logits[:, None]" if num_experts == 1 else ""
    return (
        f"to train one model use BalancedSoftmaxLoss(class_counts){of_one}; to train experts pass their "
        "whole ExpertOutput, not its .ensemble(), or torch.stack(heads, dim=1) of K heads; in validation "
        f"pass the ensemble's logits [N, {num_classes}] without a gradient"
    )


def _no_logits(value: object) -> str:
    """Describe a value that is not logits; for a dict its keys, and how to get the logits."""
    if not isinstance(value, Mapping):
        return describe(value)
    key = '"logits"' if "logits" in value else "KEY"
    return (
        f"a {type(value).__name__} with keys {', '.join(map(repr, value))}; pass only the experts' logits: "
        f"criterion(output[{key}], target)"
    )


def _expert_tensor(name: str, value: object, shape: str, maps: bool) -> Tensor:
    if maps and isinstance(value, Tensor) and value.dim() > shape.count(",") + 1:
        shape = f"{shape[:-1]}{', S' * (value.dim() - shape.count(',') - 1)}]"
    return floating_tensor(name, value, shape)


def one_or_more_experts(
    output: ExpertOutput | ExpertLogits, num_classes: int | None, num_samples_dims: int = 1
) -> tuple[Sequence[Tensor], bool]:
    """Check the logits of one model or of K experts, and say whether each tensor belongs to one expert.

    Args:
        output: ``[N, C, ...]`` of one model, ``[N, K, C, ...]``, ``K`` tensors ``[N, C, ...]`` or an
            :class:`ExpertOutput`.
        num_classes: ``C``, or None for any number.
        num_samples_dims: number of dimensions of the samples, more than 1 for maps.
    """
    if isinstance(output, ExpertOutput):
        output = output.logits
    # The usual case first, in one look.
    if (
        num_samples_dims == 1
        and is_usual(output, 2)
        and 0 < output.shape[1] == (num_classes or output.shape[1])
    ):
        return (output,), True
    if isinstance(output, Sequence) and not isinstance(output, str):
        if num_classes is None:
            # check_logits requires all experts to agree with the first.
            num_classes = [*output[0].shape, 1, 1][1] if output and isinstance(output[0], Tensor) else 1
        experts = check_logits(output, max(1, len(output)), num_classes, maps=num_samples_dims > 1)
        return list(experts), True
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(
            "logits: expected an ExpertOutput, a floating-point tensor [N, C] or [N, K, C], or K tensors "
            f"[N, C], got {_no_logits(output)}"
        )
    computable_tensor("logits", output, "[N, C] or [N, K, C]")
    maps = max(0, num_samples_dims - 1)
    if output.dim() not in (2 + maps, 3 + maps):
        maps = 0
    width = "C" if num_classes is None else num_classes
    found = output.shape[1 : output.dim() - maps]
    if len(found) not in (1, 2) or 0 in found or found[-1] != (num_classes or found[-1]):
        way_out = "class_counts sets the number of classes, and experts are on dimension 1"
        if maps and output.shape[-1] == num_classes:
            way_out = "for maps and sequences the classes are on dimension 1: pass logits.movedim(-1, 1)"
        shape = f"{width}{', S' * maps}"
        raise ValueError(
            f"logits: expected shape [N, {shape}] or [N, K, {shape}], got {list(output.shape)}; {way_out}"
        )
    return (output,), len(found) == 1
