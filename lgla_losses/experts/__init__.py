"""K experts on a shared backbone: the network divided, its last stage K times, what they give."""

from lgla_losses.experts._classifiers import ExpertClassifiers
from lgla_losses.experts.backbone import split_backbone
from lgla_losses.experts.group_conv import GroupConvExperts
from lgla_losses.experts.output import ExpertOutput

__all__ = ["ExpertClassifiers", "ExpertOutput", "GroupConvExperts", "split_backbone"]
