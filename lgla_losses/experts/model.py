"""A network and its K experts as one module, which validation code takes for the network."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lgla_losses._checks import boolean, describe, one_of
from lgla_losses._counts import ArrayLike
from lgla_losses.experts import _saving
from lgla_losses.experts._finding import Watch, check_kept, find_classifier, remove_classifier
from lgla_losses.experts._stacking import copy_module
from lgla_losses.experts.backbone import (
    BackbonePart,
    check_network,
    is_transformers_model,
    sizes_of_classifier,
    split_backbone,
)
from lgla_losses.experts.group_conv import GroupConvExperts
from lgla_losses.experts.output import Calibrated, ExpertOutput


class ExpertModel(nn.Module):
    """Hold a trunk and its experts: train it with the loss, validate it as any network.

    In training mode it gives an :class:`ExpertOutput`, which :class:`LGLALoss` takes; in eval mode the
    logits ``[N, C]`` of the ensemble, as torchvision's Inception changes what it gives.

    A model of transformers gives in eval mode what it gave before, an output whose ``logits`` are the
    ensemble's. In training it gives an ``ExpertOutput``, which has ``logits`` ``[N, K, C]`` too, so that
    ``criterion(outputs.logits, labels)`` is right in both modes (with ``classifier="linear"`` train by
    ``criterion(outputs, labels)``, as the weights need the features). It takes no ``labels``: ``Trainer``
    keeps them back where ``compute_loss_func`` is given, and finds them and its columns by
    ``TrainingArguments(label_names=["labels"], remove_unused_columns=False)``.

    :meth:`from_model` makes one of a network, :meth:`save_pretrained` and :meth:`from_pretrained` save and
    load it. A ``state_dict`` is loaded by a model that is made as before.

    Args:
        trunk: gives what the experts share.
        experts: takes that.
        eval_output: what eval mode gives: ``"ensemble"``, or ``"experts"`` for the ExpertOutput there too.

    Attributes:
        trunk: the shared part of the network.
        experts: the :class:`GroupConvExperts`.
        eval_output: as given.

    Raises:
        TypeError: a part is of a wrong type.
        ValueError: ``eval_output`` is neither.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = ExpertModel.from_model(network, num_experts=3)
        >>> model(torch.randn(2, 8)).logits.shape
        torch.Size([2, 3, 4])
        >>> model.eval()(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    #: For the ``Trainer`` of transformers: the number of samples goes to the loss, not to the network.
    accepts_loss_kwargs = False
    #: Of what transformers gives, and where the model is from; a model of parts has none.
    _output_class: type | None = None
    _origin: _saving.Origin | None = None
    _watch: Watch | None = None

    def __init__(self, trunk: nn.Module, experts: GroupConvExperts, *, eval_output: str = "ensemble") -> None:
        super().__init__()
        if not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk: expected a torch.nn.Module, got {describe(trunk)}")
        if not isinstance(experts, GroupConvExperts):
            raise TypeError(f"experts: expected a GroupConvExperts, got {describe(experts)}")
        self.trunk = trunk
        self.experts = experts
        self.eval_output = one_of("eval_output", eval_output, ("ensemble", "experts"))

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        num_experts: int = 3,
        num_classes: int | None = None,
        at: str | None = None,
        *,
        classifier: str = "cosine",
        scale: float = 30.0,
        gradient: str = "bounded",
        layout: str = "grouped",
        reset: bool | None = None,
        keep_head: bool = False,
        eval_output: str = "ensemble",
        head: str = "auto",
    ) -> Self:
        """Make a network of torchvision, timm, transformers or one's own into one with K experts.

        The network is copied, with its weights, and left as it is. Its classifier is found and replaced by
        one for each expert.

        Args:
            model: a network that gives the logits of one linear layer, as they are or times a constant, as
                research code does (``linear(x) * s``). The constant goes with the layer.
            num_experts: number of experts ``K``.
            num_classes: number of classes ``C``; None takes the classifier's.
            at: dotted path of the module from which on every expert has layers of its own, one of
                :func:`split_points`. None gives the experts a classifier each, on features that they share.
                With a path, or a constant behind the classifier, the module takes the inputs that
                :func:`split_backbone`'s trunk takes, and hooks on the modules around are not kept. Activation
                checkpointing in what the experts copy needs ``layout="independent"``.
            classifier: ``"cosine"`` or ``"linear"`` (with bias).
            scale: factor of cosine logits.
            gradient: of cosine classifiers: ``"bounded"`` or ``"exact"``, as of :class:`GroupConvExperts`.
            layout: of :class:`GroupConvExperts`.
            reset: None and False keep the weights of the layers that are copied; True draws fresh ones by
                ``reset_parameters()``. Without ``at`` there are none.
            keep_head: begin every expert's classifier with the network's; with a bias it needs
                ``classifier="linear"``, which is the same function. A cosine classifier takes the directions
                of the weights, so its logits are others.
            eval_output: what eval mode gives.
            head: path of the classifier, where it cannot be found. A network whose code torch.fx cannot trace
                must return its logits as they are; anything else is refused at the first batch.

        Returns:
            The new module, in the mode of the network.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: the classifier cannot be found or is another than ``keep_head`` needs, there is no
                module at ``at``, the network cannot be split there, or weights are tied across.
        """
        check_network(model)
        keep = boolean("keep_head", keep_head)
        path = find_classifier(model, head)
        output_class = _output_class_of(model)

        source = copy_module(model)
        layer = source.get_submodule(path)
        kept = check_kept(source, path) if keep else None
        if kept is not None:
            _check_fits(kept, num_classes, classifier)

        stage: nn.Module | None = None
        if at is None:
            trunk = remove_classifier(source, path)
        else:
            trunk, stage = split_backbone(source, at, head=path)
        _check_untied(trunk, stage, kept)

        num_features, own_classes = cast(tuple[int, int], sizes_of_classifier(layer))
        experts = GroupConvExperts(
            stage,
            num_experts,
            own_classes if num_classes is None else num_classes,
            num_features=num_features,
            classifier=classifier,
            scale=scale,
            gradient=gradient,
            layout=layout,
            reset=False if reset is None else reset,
        )
        weight = next(layer.parameters())
        experts.classifiers.to(weight.device, weight.dtype)
        if kept is not None:
            _keep_head(experts, kept)

        result = cls(trunk, experts, eval_output=eval_output)
        result._output_class = output_class
        watched = at is None and path and not isinstance(trunk, BackbonePart)
        result._watch = Watch(path) if watched else None
        result._origin = _saving.Origin.of(model, path, at)
        new: list[nn.Module] = [result, experts, *experts.children()]
        for module in new:  # the others have the mode that each had in the network
            module.training = model.training
        return result

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the model into a folder, for :meth:`from_pretrained`.

        The weights are ``model.safetensors``, ``experts.json`` says how the model was made, and of a network
        of transformers ``config.json`` is its config, which ``AutoConfig`` and ``AutoTokenizer`` read. Its
        ``AutoModel`` knows nothing of experts and makes new weights. The files are written beside those in
        the folder and then renamed one after the other. ``requires_grad`` and ``experts.together`` are not
        kept.

        Args:
            directory: the folder, which is made where there is none.

        Raises:
            TypeError: ``directory`` is no path.
            ValueError: it is a file, the model was not made by :meth:`from_model`, or a module's
                ``get_extra_state`` gives something else than a tensor.
            ImportError: safetensors is not installed.
        """
        _saving.save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> Self:
        """Make the model that :meth:`save_pretrained` wrote; nothing is downloaded.

        Args:
            directory: the folder.
            model: a network as :meth:`from_model` was given, of whatever weights. None makes it of its
                config, where its class is one of transformers.

        Returns:
            The model, in eval mode, in the precision of its weights.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: the folder lacks a file, a file is damaged or of another version, or ``model`` is
                needed, is on meta or does not fit.
            ImportError: safetensors, or transformers for its networks, is not installed.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            >>> with TemporaryDirectory() as folder:
            ...     ExpertModel.from_model(network, num_experts=3).save_pretrained(folder)
            ...     model = ExpertModel.from_pretrained(folder, model=network)
            >>> model(torch.randn(2, 8)).shape
            torch.Size([2, 4])
        """
        return cast(Self, _saving.load(cls, directory, model))

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Give an :class:`ExpertOutput` in training mode, in eval mode the ensemble's logits ``[N, C]``.

        Args:
            *inputs: what the network takes.
            **kwargs: likewise.

        Raises:
            TypeError: the network gives something beside its logits.
            ValueError: ``labels`` for a model of transformers, or a network that returns no logits as they
                are.
        """
        output, shared = self._run(*inputs, **kwargs)
        if self.training or self.eval_output == "experts":
            return output
        if isinstance(shared, dict):  # what else the model gave, as hidden states, stays
            return type(shared)(**{**shared, "logits": output.ensemble()})
        if self._output_class is not None:
            return self._output_class(logits=output.ensemble())
        return output.ensemble()

    def _run(self, *inputs: Any, **kwargs: Any) -> tuple[ExpertOutput, Any]:
        """Give what the experts and what the trunk give."""
        if self._output_class is not None and kwargs.get("labels") is not None:
            raise ValueError(
                "labels: expected none, as the loss is the criterion's, got some; keep them for "
                "criterion(outputs.logits, labels), in a Trainer by compute_loss_func="
            )
        run = self.trunk if self._watch is None else partial(self._watch.run, self.trunk)
        shared = run(*inputs, **kwargs)
        features = shared["logits"] if isinstance(shared, dict) and "logits" in shared else shared
        if self.experts.stage is None and not isinstance(features, Tensor):
            raise TypeError(
                f"model: expected a network that returns logits alone, got {describe(shared)} in "
                f"{'training' if self.training else 'eval'} mode; switch off what it gives beside, as an "
                "auxiliary classifier"
            )
        return self.experts(features), shared

    @torch.no_grad()
    def predict(
        self,
        *inputs: Any,
        prior: ArrayLike | str | None = None,
        calibration: Calibrated | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Give probabilities ``[N, C]``, in eval mode and without gradient; the mode is as before afterwards.

        They are those of :meth:`ExpertOutput.probabilities`.

        Args:
            *inputs: what the network takes.
            prior: of the classes in the test set, for the calibration: ``[C]``, or ``"estimated"`` from the
                samples of this call; None is uniform.
            calibration: what makes probabilities of the ensemble's logits; None takes their softmax.
            **kwargs: inputs by name.

        Raises:
            TypeError: ``calibration`` has no ``probabilities``.
            ValueError: a ``prior`` without ``calibration``.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            output, _ = self._run(*inputs, **kwargs)
        finally:
            for module, training in modes:
                module.training = training
        return output.probabilities(calibration, prior=prior)

    def extra_repr(self) -> str:
        """Describe the configuration, as ``repr`` shows it."""
        return f"eval_output={self.eval_output!r}"


def _output_class_of(model: nn.Module) -> type | None:
    """Find the class of what a classifier of transformers gives."""
    if not is_transformers_model(model):
        return None
    outputs: Any = sys.modules["transformers"].modeling_outputs
    images = model.main_input_name == "pixel_values"
    found: type = outputs.ImageClassifierOutput if images else outputs.SequenceClassifierOutput
    return found


def _check_fits(linear: nn.Linear, num_classes: int | None, classifier: str) -> None:
    """Raise unless every expert can begin with this classifier."""
    if num_classes not in (None, linear.out_features):
        raise ValueError(
            f"keep_head: expected as many classes as the classifier has, {linear.out_features}, got "
            f"num_classes={num_classes}; leave keep_head=False for a new classifier"
        )
    if classifier == "cosine" and linear.bias is not None:
        raise ValueError(
            "keep_head: expected classifier='linear' for a classifier with bias, got 'cosine', which has "
            "none; pass classifier='linear', or keep_head=False"
        )


def _check_untied(trunk: nn.Module, stage: nn.Module | None, linear: nn.Module | None) -> None:
    """Raise where parts that are to be copied have a parameter in common with others."""
    seen: dict[int, str] = {}
    for part in filter(None, (trunk, stage, linear)):
        names = {id(parameter): name for name, parameter in part.named_parameters()}
        for tied in names.keys() & seen.keys():
            where = "the classifier's" if part is linear else "the stage's"
            raise ValueError(
                f"model: expected weights that trunk, stage and classifier have for themselves, got {where} "
                f"{names[tied]!r} tied to {seen[tied]!r}; copies would part them: untie them first, or "
                "choose another split"
            )
        seen |= names


def _keep_head(experts: GroupConvExperts, linear: nn.Linear) -> None:
    """Give every expert the weights of a classifier."""
    classifiers = experts.classifiers
    with torch.no_grad():
        classifiers.weight.copy_(linear.weight.expand_as(classifiers.weight))
        if classifiers.bias is not None:
            classifiers.bias.copy_(torch.zeros(()) if linear.bias is None else linear.bias)
