"""K experts on a shared backbone: split the network, copy its last stage K times, fuse the outputs."""

from lgla_losses.experts._classifiers import ExpertClassifiers
from lgla_losses.experts._finding import split_points
from lgla_losses.experts._weight_decay import parameter_groups
from lgla_losses.experts.backbone import split_backbone
from lgla_losses.experts.group_conv import GroupConvExperts
from lgla_losses.experts.model import ExpertModel
from lgla_losses.experts.output import ExpertOutput

__all__ = [
    "ExpertClassifiers",
    "ExpertModel",
    "ExpertOutput",
    "GroupConvExperts",
    "parameter_groups",
    "split_backbone",
    "split_points",
]
