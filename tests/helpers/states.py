"""Modules with a state, built and called as version 0.1.0 allowed.

Theirs are in ``tests/package/data/states_0.1.0.pt.gz``. It was written with a checkout of commit dc1a57f as
PYTHONPATH: ``python tests/helpers/states.py FILE``.
"""

import gzip
import sys

import torch
from torch import nn

import lgla_losses
from lgla_losses import CLALogitAdjuster, ClassGrouper, GroupConvExperts, LGLALoss, LinearLGLALoss, baselines
from lgla_losses.label_shift import estimate_prior

COUNTS = [100, 30, 10, 3]
#: Of the same shape, to load a state into.
OTHER_COUNTS = [7, 9, 8, 90]
GROUPS = [0, 1, 0, 1]


def inputs():
    """Arguments of the calls below, stored beside the states."""
    features, weight = torch.randn(8, 3, 5), torch.randn(3, 4, 5)
    return {
        "logits": 30 * torch.nn.functional.cosine_similarity(features[:, :, None], weight, dim=-1),
        "target": torch.arange(8) % 4,
        "features": features,
        "weight": weight,
        "shared": torch.randn(2, 6, 4, 4),
        "vectors": torch.randn(2, 6),
        "label": torch.tensor([0, 3]),
    }


def stage():
    return nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.PReLU(5))


class Model(nn.Module):
    """A network that holds its loss."""

    def __init__(self, counts):
        super().__init__()
        self.trunk = nn.Conv2d(6, 6, 1)
        self.experts = GroupConvExperts(stage, 3, 4)
        self.criterion = LGLALoss(counts, num_experts=3)

    def forward(self, images, target):
        return self.criterion(self.experts(self.trunk(images)), target)


def cases(counts):
    """A module by name, and what it is called with."""
    logits = {
        "LGLALoss": LGLALoss(counts),
        "LGLALoss with tau": LGLALoss(counts, 3, 1.5, label_smoothing=0.1),
        "LGLALoss of groups": LGLALoss(grouper=ClassGrouper.from_groups(counts, GROUPS)),
        "LGLALoss as softmax": LGLALoss(counts, adjustment="softmax"),
        "LGLALoss as balanced softmax": LGLALoss(counts, adjustment="balanced"),
        "LGLALoss as logit adjustment": LGLALoss(counts, tau=1.5, adjustment="logit"),
        "LGLALoss of a table": LGLALoss(counts, adjustment=torch.arange(12.0).reshape(3, 4) / 12),
        "FocalLoss": baselines.FocalLoss(),
        "ClassBalancedLoss": baselines.ClassBalancedLoss(counts, gamma=1.0),
        "LogitAdjustedLoss": baselines.LogitAdjustedLoss(counts, tau=1.5),
        "BalancedSoftmaxLoss": baselines.BalancedSoftmaxLoss(counts),
        "VSLoss": baselines.VSLoss(counts, gamma=0.3),
        "LDAMLoss": baselines.LDAMLoss(counts),
        "LDAMLoss with weights": reweighted(baselines.LDAMLoss(counts)),
    }
    features = {
        "LinearLGLALoss": LinearLGLALoss(counts, tau=2.5),
        "LinearLGLALoss of cosines": LinearLGLALoss(counts, scale=30.0),
    }
    shared = {
        "grouped experts": GroupConvExperts(stage, 3, 4),
        "independent experts": GroupConvExperts(stage, 3, 4, layout="independent"),
        "linear experts": GroupConvExperts(stage, 3, 4, classifier="linear"),
    }
    return (
        {name: (module, ("logits", "target")) for name, module in logits.items()}
        | {name: (module, ("features", "weight", "target")) for name, module in features.items()}
        | {name: (module, ("shared",)) for name, module in shared.items()}
        | {
            "heads": (GroupConvExperts(None, 3, 4, num_features=6), ("vectors",)),
            "ClassGrouper": (ClassGrouper(counts, 2), ("target",)),
            "CLALogitAdjuster": (CLALogitAdjuster(ClassGrouper(counts, 2)), ("logits",)),
            "model with its loss": (Model(counts), ("shared", "label")),
        }
    )


def reweighted(loss):
    loss.reweight()
    return loss


def output(module, arguments):
    """What a module gives in eval mode; of experts the logits."""
    with torch.no_grad():
        found = module.eval()(*arguments)
    return 1.0 * (found[0] if isinstance(found, tuple) else found)


def fresh(make):
    """The state of experts as they start."""
    torch.manual_seed(0)
    return make().state_dict()


def main(file):
    """Write inputs, the state and output of each module, and what defaults gave."""
    torch.manual_seed(0)
    given = inputs()
    kept = {
        name: {"state": module.state_dict(), "output": output(module, [given[key] for key in keys])}
        for name, (module, keys) in cases(COUNTS).items()
    }
    defaults = {
        "experts of a factory": fresh(lambda: GroupConvExperts(stage, 3, 4)),
        "experts of a module": fresh(lambda: GroupConvExperts(stage(), 3, 4)),
        "estimated prior": estimate_prior(given["logits"].mean(1), COUNTS),
    }
    saved = {"version": lgla_losses.__version__, "inputs": given, "modules": kept, "defaults": defaults}
    with gzip.open(file, "wb") as stream:
        torch.save(saved, stream)


if __name__ == "__main__":
    main(sys.argv[1])
