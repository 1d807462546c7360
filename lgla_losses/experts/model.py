"""A network and its K experts as one module, which validation code can use like the network."""

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
    """Hold a trunk and its experts: train it with the loss, validate it like any network.

    In training mode it returns an :class:`ExpertOutput`, which :class:`LGLALoss` takes; in eval mode the
    logits ``[N, C]`` of the ensemble. (The output of torchvision's Inception also depends on the mode.)

    In eval mode a model of transformers returns its usual output, with the ensemble's ``logits``. In training
    it returns an ``ExpertOutput``, which has ``logits`` ``[N, K, C]`` too, so ``criterion(outputs.logits,
    labels)`` is right in both modes. (With ``classifier="linear"`` train with ``criterion(outputs, labels)``,
    because the weights need the features.) The model takes no ``labels``: ``Trainer`` removes them if
    ``compute_loss_func`` is given. Set ``TrainingArguments(label_names=["labels"],
    remove_unused_columns=False)`` so that it finds them and keeps the other columns.

    :meth:`from_model` makes one from a network, :meth:`save_pretrained` and :meth:`from_pretrained` save and
    load it. To load a ``state_dict``, first make the model as before.

    Args:
        trunk: computes the features that the experts share.
        experts: takes these features.
        eval_output: the output in eval mode: ``"ensemble"``, or ``"experts"`` for the ExpertOutput there too.

    Attributes:
        trunk: the shared part of the network.
        experts: the :class:`GroupConvExperts`.
        eval_output: as given.

    Raises:
        TypeError: a part is of a wrong type.
        ValueError: ``eval_output`` is neither of these.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = ExpertModel.from_model(network, num_experts=3)
        >>> model(torch.randn(2, 8)).logits.shape
        torch.Size([2, 3, 4])
        >>> model.eval()(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    #: For the ``Trainer`` of transformers: it passes the number of samples to the loss, not to the network.
    accepts_loss_kwargs = False
    #: The output class of transformers, and the origin of the model; a model made from parts has none.
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
        """Turn a network of torchvision, timm or transformers, or your own, into one with K experts.

        The network is copied with its weights and stays unchanged. In the copy, the classifier is found and
        replaced by one per expert.

        Args:
            model: a network that returns the logits of one linear layer, unchanged or times a constant, as in
                research code (``linear(x) * s``). The constant is removed with the layer.
            num_experts: number of experts ``K``.
            num_classes: number of classes ``C``; None takes that of the classifier.
            at: dotted path of the module from which on every expert has its own layers, one of
                :func:`split_points`. None gives each expert only a classifier, on shared features. With a
                path, or a constant after the classifier, the model takes the inputs of
                :func:`split_backbone`'s trunk, and hooks on the enclosing modules are not kept. Activation
                checkpointing in the layers that the experts copy needs ``layout="independent"``.
            classifier: ``"cosine"`` or ``"linear"`` (with bias).
            scale: factor of cosine logits.
            gradient: for cosine classifiers: ``"bounded"`` or ``"exact"``, as in :class:`GroupConvExperts`.
            layout: as in :class:`GroupConvExperts`.
            reset: None and False keep the weights of the copied layers; True draws new ones by
                ``reset_parameters()``. Without ``at`` no layers are copied.
            keep_head: start every expert's classifier from the network's classifier. With a bias this needs
                ``classifier="linear"``, which is the same function. A cosine classifier takes only the
                directions of the weights, so its logits differ.
            eval_output: the output in eval mode, as above.
            head: path of the classifier, if it cannot be found. A network whose code torch.fx cannot trace
                must return its logits unchanged; anything else is refused at the first batch.

        Returns:
            The new module, in the mode of the network.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: the classifier cannot be found or does not fit ``keep_head``, there is no module at
                ``at``, the network cannot be split there, or weights are tied across the parts.
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
        for module in new:  # the others keep the mode that they had in the network
            module.training = model.training
        return result

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the model into a folder, for :meth:`from_pretrained`.

        ``model.safetensors`` holds the weights, and ``experts.json`` says how the model was made. For a
        network of transformers, ``config.json`` is its config, which ``AutoConfig`` and ``AutoTokenizer``
        read. ``AutoModel`` does not load the experts and makes new weights. The files are written under
        temporary names and then renamed one after the other. ``requires_grad`` and ``experts.together`` are
        not kept.

        Args:
            directory: the folder; it is made if it does not exist.

        Raises:
            TypeError: ``directory`` is not a path.
            ValueError: ``directory`` is a file, the model was not made by :meth:`from_model`, or a module's
                ``get_extra_state`` returns something other than a tensor.
            ImportError: safetensors is not installed.
        """
        _saving.save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> Self:
        """Load the model that :meth:`save_pretrained` wrote; nothing is downloaded.

        Args:
            directory: the folder.
            model: a network like the one given to :meth:`from_model`, with any weights. None makes it from
                its config, if its class is one of transformers.

        Returns:
            The model, in eval mode, in the precision of its weights.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: the folder lacks a file, a file is damaged or of another version, or ``model`` is
                missing, is on meta or does not fit.
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
        """Return an :class:`ExpertOutput` in training mode, in eval mode the ensemble's logits ``[N, C]``.

        Args:
            *inputs: inputs of the network.
            **kwargs: inputs by name.

        Raises:
            TypeError: the network returns something besides its logits.
            ValueError: a model of transformers is given ``labels``, or the network changes its logits.
        """
        output, shared = self._run(*inputs, **kwargs)
        if self.training or self.eval_output == "experts":
            return output
        if isinstance(shared, dict):  # other outputs of the model, such as hidden states, stay
            return type(shared)(**{**shared, "logits": output.ensemble()})
        if self._output_class is not None:
            return self._output_class(logits=output.ensemble())
        return output.ensemble()

    def _run(self, *inputs: Any, **kwargs: Any) -> tuple[ExpertOutput, Any]:
        """Give the outputs of the experts and of the trunk."""
        if self._output_class is not None and kwargs.get("labels") is not None:
            raise ValueError(
                "labels: expected none, because the criterion computes the loss, got some; pass them to "
                "criterion(outputs.logits, labels), in a Trainer through compute_loss_func="
            )
        run = self.trunk if self._watch is None else partial(self._watch.run, self.trunk)
        shared = run(*inputs, **kwargs)
        features = shared["logits"] if isinstance(shared, dict) and "logits" in shared else shared
        if self.experts.stage is None and not isinstance(features, Tensor):
            raise TypeError(
                f"model: expected a network that returns only logits, got {describe(shared)} in "
                f"{'training' if self.training else 'eval'} mode; switch off its other outputs, such as an "
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
        """Compute probabilities ``[N, C]`` in eval mode, without gradient; then restore the mode.

        They are those of :meth:`ExpertOutput.probabilities`.

        Args:
            *inputs: inputs of the network.
            prior: class prior of the test set, for the calibration: ``[C]``, or ``"estimated"`` from the
                samples of this call; None is uniform.
            calibration: turns the ensemble's logits into probabilities; None takes their softmax.
            **kwargs: inputs by name.

        Raises:
            TypeError: ``calibration`` has no ``probabilities``.
            ValueError: there is a ``prior`` without ``calibration``.
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
    """Find the output class of a classifier of transformers."""
    if not is_transformers_model(model):
        return None
    outputs: Any = sys.modules["transformers"].modeling_outputs
    images = model.main_input_name == "pixel_values"
    found: type = outputs.ImageClassifierOutput if images else outputs.SequenceClassifierOutput
    return found


def _check_fits(linear: nn.Linear, num_classes: int | None, classifier: str) -> None:
    """Raise unless every expert can start from this classifier."""
    if num_classes not in (None, linear.out_features):
        raise ValueError(
            f"keep_head: expected as many classes as the classifier has, {linear.out_features}, got "
            f"num_classes={num_classes}; set keep_head=False for a new classifier"
        )
    if classifier == "cosine" and linear.bias is not None:
        raise ValueError(
            "keep_head: expected classifier='linear' for a classifier with bias, got 'cosine', which has "
            "no bias; pass classifier='linear', or keep_head=False"
        )


def _check_untied(trunk: nn.Module, stage: nn.Module | None, linear: nn.Module | None) -> None:
    """Raise if the parts to copy share a parameter with other parts."""
    seen: dict[int, str] = {}
    for part in filter(None, (trunk, stage, linear)):
        names = {id(parameter): name for name, parameter in part.named_parameters()}
        for tied in names.keys() & seen.keys():
            where = "the classifier's" if part is linear else "the stage's"
            raise ValueError(
                f"model: expected separate weights in trunk, stage and classifier, got {where} "
                f"{names[tied]!r} tied to {seen[tied]!r}; copies would separate them: untie them first, or "
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
