"""Every wrong input raises: the argument's name, what was expected, what came, the way out."""

import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from reference import assert_raises
from torch import nn

from lgla_losses import (
    AAWWeighter,
    CLALogitAdjuster,
    ClassGrouper,
    ExpertOutput,
    GroupConvExperts,
    LGLALoss,
    LinearLGLALoss,
    aggregation,
    calibration,
    count_classes,
    create_loss,
    plot,
    stages,
    suggest,
)
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedBCELoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    NCLLoss,
    RIDELoss,
    SigmoidAdjustedLoss,
    VSLoss,
    expert_distillation,
    expert_diversity,
)
from lgla_losses.distributed import ClassParallelLGLALoss, class_shard

COUNTS = [40, 9, 5, 1]
LOGITS = torch.zeros(2, 3, 4)
TARGET = torch.tensor([0, 3])
ROWS = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])  # multi-hot
WITH_GRADIENT = LOGITS.clone().requires_grad_()
META = torch.device("meta")
FLOAT8 = torch.float8_e4m3fn
ADJUSTER = CLALogitAdjuster(ClassGrouper(COUNTS, 2))
SPLIT = torch.eye(4).repeat(5, 1)  # 20 samples for a calibration
LABELS = torch.arange(4).repeat(5)
MASKING = CLALogitAdjuster(ClassGrouper([5, 0, 3], 2, zero_counts="mask"))


def nested(*tensors, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of a prototype
        return torch.nested.nested_tensor(list(tensors), **options)


def older_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return nn.utils.weight_norm(layer)


def criterion(**options):
    return LGLALoss(COUNTS, **options)


def calibrated(logits=SPLIT, target=LABELS, class_counts=COUNTS, validation_prior="uniform", **options):
    return calibration.fit(
        logits, target, class_counts=class_counts, validation_prior=validation_prior, **options
    )


def sigmoid(counts=COUNTS, num_samples=80, **options):
    return SigmoidAdjustedLoss(counts, num_samples, **options)


def criterion_of(counts, **options):
    return LGLALoss(counts, **options)


def experts(stage=nn.Conv2d(2, 4, 3), num_experts=3, num_classes=4, **options):  # noqa: B008
    return GroupConvExperts(stage, num_experts, num_classes, **{"reset": True} | options)


def together(value):
    stack = experts()
    stack.together = value
    return stack(torch.zeros(2, 2, 5, 5))


def another_activation(activations):
    return nn.Sequential(nn.Conv2d(2, 4, 3), next(activations))


class NoReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale[:, None, None]


#: What is called, the error, and words that its message must hold in this order.
CASES = {
    # class counts
    "empty counts": (lambda: ClassGrouper([], 1), ValueError, "class_counts", "1-D", "[0]", "count_classes"),
    "zero count": (
        lambda: ClassGrouper([3, 0, 1], 2), ValueError, "class_counts", "positive", "0 for class 1", "zero_counts='smooth'", "'mask'", "leave",
    ),
    "negative count to smooth": (
        lambda: criterion_of([3, -1, 2], zero_counts="smooth"), ValueError, "class_counts", ">= 0", "-1 for class 1", "count_classes",
    ),
    "frequencies to smooth": (
        lambda: criterion_of([0.5, 0.5, 0.0], zero_counts="smooth"), ValueError, "class_counts", "numbers of samples", "frequencies", "'mask'",
    ),
    "no class with samples": (lambda: criterion_of([0, 0, 0], zero_counts="mask"), ValueError, "class_counts", "with samples", "none of 3"),
    "no class with samples to smooth": (
        lambda: criterion_of([0, 0, 0], zero_counts="smooth"), ValueError, "class_counts", "with samples", "none of 3", "count_classes",
    ),
    "new counts without samples to smooth": (
        lambda: LDAMLoss(COUNTS, zero_counts="smooth").set_adjustment([0.0] * 4), ValueError, "class_counts", "with samples", "none of 4",
    ),
    "only a background with samples to smooth": (
        lambda: ClassGrouper([0, 7, 0], 1, zero_counts="smooth", background=1), ValueError, "class_counts", "besides background=[1]", "none of 3",
    ),
    "only a background with samples": (
        lambda: criterion_of([0, 7, 0], zero_counts="mask", background=1), ValueError, "class_counts", "besides background=[1]", "none of 3",
    ),
    "more experts than classes with samples": (
        lambda: criterion_of([5, 0, 0, 2], zero_counts="mask", num_experts=4), ValueError, "num_experts", "C + 1 = 3", "2 classes", "of 4", "got 4",
    ),
    "more groups than classes but the background": (
        lambda: ClassGrouper([3, 2], 2, background=0), ValueError, "num_groups", "1 here", "got 2",
    ),
    "unknown zero_counts": (lambda: criterion(zero_counts="ignore"), ValueError, "zero_counts", "'smooth', 'mask'", "'ignore'"),
    "zero_counts of a wrong type": (lambda: LDAMLoss(COUNTS, zero_counts=1), TypeError, "zero_counts", "'error'", "1", "int"),
    "smoothed labels of masked classes": (
        lambda: criterion(zero_counts="mask", label_smoothing=0.1), ValueError, "label_smoothing", "0", "'mask'", "0.1", "'smooth'",
    ),
    "smoothed labels of masked classes of a grouper": (
        lambda: LGLALoss(grouper=ClassGrouper(COUNTS, 2, zero_counts="mask"), label_smoothing=0.1), ValueError, "label_smoothing", "0.1",
    ),
    "smoothed labels of masked classes of a baseline": (
        lambda: BalancedSoftmaxLoss(COUNTS, zero_counts="mask", label_smoothing=0.1), ValueError, "label_smoothing", "0.1",
    ),
    "background out of range": (lambda: criterion(background=4), ValueError, "background", "0..3", "got 4"),
    "background counted from the end": (lambda: criterion(background=[0, -1]), ValueError, "background", "0..3", "got -1"),
    "background twice": (lambda: criterion(background=[1, 0, 1]), ValueError, "background", "once", "class 1 twice"),
    "nothing but background": (lambda: VSLoss(COUNTS, background=range(4)), ValueError, "background", "all 4 classes", "leave one"),
    "boolean background": (lambda: criterion(background=True), TypeError, "background", "integer", "True"),
    "boolean in the background": (lambda: criterion(background=[True]), TypeError, "background", "integer", "True"),
    "mask as background": (
        lambda: criterion(background=torch.tensor([True, False])), TypeError, "background", "integer", "torch.bool", "mask.nonzero()",
    ),
    "array of booleans as background": (
        lambda: VSLoss(COUNTS, background=np.array([False, True])), TypeError, "background", "integer", "False", "mask.nonzero()",
    ),
    "boolean tensor as background": (lambda: criterion(background=torch.tensor(True)), TypeError, "background", "integer", "torch.bool"),
    "float background": (lambda: criterion(background=0.0), TypeError, "background", "integer", "0.0"),
    "text background": (lambda: criterion(background="other"), TypeError, "background", "integer", "'other'"),
    "background beside a grouper": (
        lambda: LGLALoss(grouper=ClassGrouper(COUNTS, 2), background=0), ValueError, "background", "together with a grouper", "0", "ClassGrouper",
    ),
    "zero_counts beside a grouper": (
        lambda: LGLALoss(grouper=ClassGrouper(COUNTS, 2), zero_counts="smooth"), ValueError, "zero_counts", "together with a grouper", "'smooth'",
    ),
    "background beside a table": (
        lambda: criterion(background=0, adjustment=torch.zeros(3, 4)), ValueError, "adjustment table", "background=[0]", "write 0",
    ),
    "masked classes beside a table": (
        lambda: criterion(zero_counts="mask", adjustment=torch.zeros(3, 4)), ValueError, "adjustment table", "zero_counts='mask'", "-inf",
    ),
    "target of a masked class": (
        lambda: criterion_of([5, 0, 3], zero_counts="mask")(torch.zeros(1, 3, 3), torch.tensor([1])),
        ValueError, "target", "with training samples", "class 1", "masked", "set_adjustment",
    ),
    "margin of a masked class": (
        lambda: criterion_of([5, 0, 3], zero_counts="mask").adjuster.margin(torch.tensor([2, 1])), ValueError, "target", "class 1", "masked",
    ),
    "group of masked classes": (
        lambda: ClassGrouper.from_groups([3, 0], [0, 1], zero_counts="mask"), ValueError, "group_index", "has samples", "[0]",
    ),
    "a group far from the others": (
        lambda: ClassGrouper.from_groups([5, 3], [0, 2**62]), ValueError, "group_index", "0..G-1", "[0, 4611686018427387904]", "without gaps",
    ),
    "negative count": (lambda: ClassGrouper([3, -2], 2), ValueError, "class_counts", "positive", "-2 for class 1"),
    "NaN count": (lambda: ClassGrouper([3, math.nan], 2), ValueError, "class_counts", "finite", "nan for class 1"),
    "infinite count": (lambda: ClassGrouper([3, math.inf], 2), ValueError, "class_counts", "finite", "inf"),
    "2-D counts": (lambda: ClassGrouper([[3, 2]], 1), ValueError, "class_counts", "1-D", "[1, 2]"),
    "ragged counts": (lambda: ClassGrouper([[3], [2, 1]], 1), ValueError, "class_counts", "1-D", "different lengths"),
    "scalar counts": (lambda: ClassGrouper(7, 1), ValueError, "class_counts", "1-D", "[]"),
    "text counts": (lambda: ClassGrouper(["3", "2"], 1), TypeError, "class_counts", "integers or floats", "count_classes"),
    "boolean counts": (lambda: ClassGrouper([True, True], 1), TypeError, "class_counts", "integers or floats", "bool"),
    "complex counts": (lambda: ClassGrouper([1 + 2j], 1), TypeError, "class_counts", "complex"),
    "object counts": (lambda: ClassGrouper([None, 1], 1), TypeError, "class_counts", "object"),
    "huge counts": (lambda: ClassGrouper(np.array([2**63], np.uint64), 1), ValueError, "class_counts", "2**63", "floats"),
    "no counts": (lambda: LGLALoss(), TypeError, "class_counts", "None", "grouper"),
    # groups
    "more groups than classes": (lambda: ClassGrouper([3, 2], 3), ValueError, "num_groups", "2", "got 3", "fewer"),
    "no groups": (lambda: ClassGrouper([3, 2], 0), ValueError, "num_groups", ">= 1", "got 0"),
    "float groups": (lambda: ClassGrouper([3, 2], 2.0), TypeError, "num_groups", "integer", "2.0", "float"),
    "boolean groups": (lambda: ClassGrouper([3, 2], True), TypeError, "num_groups", "integer", "bool"),
    "gap in groups": (lambda: ClassGrouper.from_groups([3, 2], [0, 2]), ValueError, "group_index", "0..G-1", "[0, 2]"),
    "groups of another length": (lambda: ClassGrouper.from_groups([3, 2], [0]), ValueError, "group_index", "[2]", "[1]"),
    "float group index": (lambda: ClassGrouper.from_groups([3, 2], [0.0, 1.0]), TypeError, "group_index", "float"),
    "no grouper": (lambda: CLALogitAdjuster([3, 2]), TypeError, "grouper", "ClassGrouper", "list"),
    "no grouper for weights": (lambda: AAWWeighter(None), TypeError, "grouper", "ClassGrouper", "NoneType"),
    "target out of range of groups": (lambda: ClassGrouper(COUNTS, 2)(torch.tensor([-1])), ValueError, "target", "0..3", "-1"),
    # labels
    "no group index": (lambda: ClassGrouper.from_groups([3, 2], None), ValueError, "group_index", "[2]", "[]"),
    "text group index": (lambda: ClassGrouper.from_groups([3, 2], ["a", "b"]), TypeError, "group_index", "0..G-1"),
    "tensor of groups": (lambda: ClassGrouper([3, 2], torch.tensor(2.0)), TypeError, "num_groups", "integer", "float32"),
    "overflowing counts": (lambda: ClassGrouper([2**62] * 3, 1), ValueError, "class_counts", "sum", "int64", "divide"),
    "overflowing float counts": (lambda: ClassGrouper([1e308] * 4, 1), ValueError, "class_counts", "sum", "inf", "divide"),
    "label out of range": (lambda: count_classes([0, 4], 4), ValueError, "labels", "0..3", "got 4", "num_classes"),
    "negative label": (lambda: count_classes([0, -1], 4), ValueError, "labels", "0..3", "got -1"),
    "float labels": (lambda: count_classes([0.0, 1.0], 4), TypeError, "labels", "integer", "float64"),
    "counts of another order": (lambda: ClassGrouper({1: 3, 2: 2}, 1), ValueError, "class_counts", "0..C-1", "[1, 2]", "reindex"),
    "counts by name": (lambda: ClassGrouper({"cat": 3, "dog": 2}, 1), ValueError, "class_counts", "0..C-1", "'cat'", "order of your classes"),
    "groups by name": (lambda: ClassGrouper.from_groups([3, 2], {"cat": 0, "dog": 1}), ValueError, "group_index", "0..C-1", "'cat'"),
    "sparse counts": (lambda: ClassGrouper(torch.ones(3).to_sparse(), 1), TypeError, "class_counts", "dense", "sparse_coo"),
    "meta counts": (lambda: ClassGrouper(torch.ones(3, device=META), 1), TypeError, "class_counts", "with values", "meta"),
    "mapping of labels": (lambda: count_classes({0: 5}, 4), TypeError, "labels", "one label per sample", "mapping"),
    "samples without labels": (lambda: count_classes([5], 4, iterate=True), TypeError, "labels", "(input, label)", "5", "at 0"),
    "2-D labels": (lambda: count_classes([[0], [1]], 4), ValueError, "labels", "1-D", "[2, 1]"),
    "no classes": (lambda: count_classes([0], 0), ValueError, "num_classes", "got 0"),
    "data set without labels": (
        lambda: count_classes(torch.utils.data.TensorDataset(TARGET), 4), TypeError, "labels", "targets", "TensorDataset", "iterate=True",
    ),
    # experts and adjustment
    "one expert with LGLA": (lambda: criterion(num_experts=1), ValueError, "num_experts", "at least 2", "got 1", "softmax"),
    "one expert with AAW": (lambda: criterion(num_experts=1, adjustment="softmax"), ValueError, "num_experts", "aaw=False"),
    "no expert": (lambda: criterion(num_experts=0), ValueError, "num_experts", ">= 1", "got 0"),
    "float experts": (lambda: criterion(num_experts=3.0), TypeError, "num_experts", "integer", "float"),
    "too many experts": (lambda: criterion(num_experts=6), ValueError, "num_experts", "5", "4 classes", "got 6", "fewer"),
    "conflicting experts": (
        lambda: LGLALoss(grouper=ClassGrouper(COUNTS, 2), num_experts=4), ValueError, "num_experts", "4", "3", "drop",
    ),
    "table of other experts": (
        lambda: criterion(num_experts=2, adjustment=torch.zeros(3, 4)), ValueError, "num_experts", "2", "3",
    ),
    "counts and grouper": (lambda: criterion(grouper=ClassGrouper(COUNTS, 2)), ValueError, "grouper", "both", "drop"),
    "unknown adjustment": (lambda: criterion(adjustment="focal"), ValueError, "adjustment", "'lgla'", "'focal'"),
    "adjustment of a wrong type": (lambda: criterion(adjustment=3), TypeError, "adjustment", "'lgla'", "3", "int"),
    "table as a list": (lambda: criterion(adjustment=[[0.0] * 4] * 3), TypeError, "adjustment", "[K, C]", "list", "torch.tensor("),
    "table of other classes": (lambda: criterion(adjustment=torch.zeros(3, 5)), ValueError, "adjustment", "4]", "[3, 5]"),
    "1-D table": (lambda: criterion(adjustment=torch.zeros(3)), ValueError, "adjustment", "[K, C]", "[3]"),
    "integer table": (
        lambda: criterion(adjustment=torch.zeros(3, 4, dtype=torch.int64)), TypeError, "adjustment", "floating", "int64",
    ),
    "NaN table": (lambda: criterion(adjustment=torch.full((3, 4), math.nan)), ValueError, "adjustment", "finite", "NaN"),
    "negative tau": (lambda: criterion(tau=-1.0), ValueError, "tau", ">= 0", "-1.0"),
    "NaN tau": (lambda: criterion(tau=math.nan), ValueError, "tau", "finite", "nan"),
    "negative tau of logit adjustment": (lambda: criterion(tau=-1.0, adjustment="logit"), ValueError, "tau", "-1.0"),
    "tau beside softmax": (lambda: criterion(tau=2.0, adjustment="softmax"), ValueError, "tau: expected None", "'softmax'", "got 2.0", "'lgla'"),
    "tau beside balanced": (lambda: criterion(tau=2.0, adjustment="balanced"), ValueError, "tau: expected None", "'balanced'", "got 2.0"),
    "tau beside a table": (lambda: criterion(tau=2.0, adjustment=torch.zeros(3, 4)), ValueError, "tau: expected None", "'table'", "got 2.0"),
    "nested table": (lambda: criterion(adjustment=torch.nested.nested_tensor([torch.zeros(4), torch.zeros(3)], layout=torch.jagged)), TypeError, "adjustment table", "nested"),
    "text for iterate": (lambda: count_classes([0, 1], 2, iterate="no"), TypeError, "iterate: expected True or False", "'no'"),
    "table on meta": (lambda: criterion(adjustment=torch.zeros(3, 4, device=META)), ValueError, "adjustment table", "meta"),
    "text for aaw": (lambda: criterion(aaw="no"), TypeError, "aaw: expected True or False", "'no'"),
    "number for aaw": (lambda: criterion(aaw=1), TypeError, "aaw: expected True or False", "1 of type int"),
    "text for sync": (lambda: criterion(sync="x"), TypeError, "sync: expected True or False", "'x'"),
    "text for validate_args": (lambda: criterion(validate_args="x"), TypeError, "validate_args: expected True, False or None", "'x'"),
    "text for validate_args of a baseline": (lambda: FocalLoss(validate_args="x"), TypeError, "validate_args", "'x'"),
    "text for sync of the weights": (lambda: AAWWeighter(ClassGrouper(COUNTS, 2), sync="x"), TypeError, "sync", "'x'"),
    "argument of another loss": (lambda: criterion(weight=torch.ones(4)), TypeError, "LGLALoss.__init__()", "'weight'"),
    "misspelt option": (lambda: LinearLGLALoss(COUNTS, redution="sum"), TypeError, "LinearLGLALoss", "'redution'", "'reduction'"),
    "statistics of lists": (lambda: AAWWeighter(ClassGrouper(COUNTS, 2)).statistics([[0.5]], TARGET), TypeError, "angles", "[[0.5]]"),
    "statistics of other shapes": (lambda: AAWWeighter(ClassGrouper(COUNTS, 2)).statistics(torch.ones(3, 3), TARGET), ValueError, "target", "[3]", "[2]"),
    "statistics of NaN": (lambda: AAWWeighter(ClassGrouper(COUNTS, 2)).statistics(torch.full((2, 3), math.nan), TARGET), ValueError, "angles", "NaN"),
    "statistics of classes that are not there": (lambda: AAWWeighter(ClassGrouper(COUNTS, 2)).statistics(torch.ones(2, 3), TARGET + 9), ValueError, "target", "0..3", "9"),
    "shard of no ranks": (lambda: class_shard(5, 0, 0), ValueError, "num_ranks", ">= 1", "0"),
    "shard of a rank that is not there": (lambda: class_shard(5, 9, 4), ValueError, "rank: expected 0..3 of 4 ranks", "9"),
    "shard of no classes": (lambda: class_shard(0, 0, 1), ValueError, "num_classes", ">= 1", "0"),
    "text tau": (lambda: criterion(tau="2.5"), TypeError, "tau", "number", "'2.5'"),
    # other options
    "zero scale": (lambda: criterion(scale=0.0), ValueError, "scale", "positive", "None", "0.0"),
    "negative scale": (lambda: criterion(scale=-30.0), ValueError, "scale", "positive", "-30.0"),
    "infinite scale": (lambda: criterion(scale=math.inf), ValueError, "scale", "finite", "inf"),
    "text scale": (lambda: criterion(scale="30"), TypeError, "scale", "positive", "'30'"),
    "unknown reduction": (lambda: criterion(reduction="avg"), ValueError, "reduction", "'mean'", "'avg'"),
    "no reduction": (lambda: criterion(reduction=None), TypeError, "reduction", "'mean'", "None"),
    "array of adjustments": (lambda: criterion(adjustment=np.zeros((3, 4))), TypeError, "adjustment", "'lgla'", "array"),
    "triton backend": (lambda: criterion(backend="triton"), ValueError, "backend", "'triton'", "cannot run", "'auto'"),
    "unknown backend": (lambda: criterion(backend="cuda"), ValueError, "backend", "'reference'", "'cuda'"),
    "smoothing above one": (lambda: criterion(label_smoothing=1.5), ValueError, "label_smoothing", "0..1", "1.5"),
    "ignore_index of more than 64 bits": (lambda: criterion(ignore_index=2**70), ValueError, "ignore_index", "64 bits", "1180591620717411303424"),
    "number of thousands of digits": (lambda: criterion(num_experts=10**5000), ValueError, "num_experts", "64 bits", "got a number of thousands"),
    "tau beyond every float": (lambda: criterion(tau=10**400), ValueError, "tau", "finite", "10000"),
    "float ignore_index": (lambda: criterion(ignore_index=0.5), TypeError, "ignore_index", "integer", "0.5"),
    # the suggested tau
    "suggest: one model": (lambda: suggest(1), ValueError, "num_experts: expected an integer >= 2", "got 1", "no tau"),
    "suggest: part of an expert": (lambda: suggest(2.5), TypeError, "num_experts: expected an integer", "2.5"),
    "suggest: unknown head": (lambda: suggest(classifier="cos"), ValueError, "classifier", "'cosine'", "'cos'"),
    "suggest: smoothing above one": (lambda: suggest(label_smoothing=1.5), ValueError, "label_smoothing", "0..1", "1.5"),
    "suggest: epochs for training": (lambda: suggest(training=200), TypeError, "training", "'usual'", "200"),
    "suggest: no temperature": (lambda: suggest(temperature=0), ValueError, "temperature: expected a positive", "calibration.fit", "0"),
    "suggest: tensor as temperature": (lambda: suggest(temperature=torch.tensor(1.5)), TypeError, "temperature", "tensor"),
    # logits
    "2-D logits": (lambda: criterion()(WITH_GRADIENT[:, 0], TARGET), ValueError, "logits", "[N, 3, 4]", "[2, 4] with a gradient", "BalancedSoftmaxLoss", "ExpertOutput", ".ensemble()", "validation"),
    "2-D logits of a loss of one expert": (
        lambda: criterion(num_experts=1, adjustment="balanced", aaw=False)(WITH_GRADIENT[:, 0], TARGET), ValueError, "logits", "[N, 1, 4]", "[2, 4]", "BalancedSoftmaxLoss", "logits[:, None]",
    ),
    "one expert of three": (lambda: criterion()(LOGITS[:, :1], TARGET), ValueError, "logits", "[N, 3, 4]", "[2, 1, 4]", "BalancedSoftmaxLoss", "ExpertOutput"),
    "map of one model": (
        lambda: criterion()(WITH_GRADIENT[:, 0, :, None, None], TARGET[:, None, None]), ValueError, "logits", "[N, 3, 4]", "[2, 4, 1, 1]", "BalancedSoftmaxLoss",
    ),
    "experts before samples": (lambda: criterion()(LOGITS.transpose(0, 1), TARGET), ValueError, "logits", "[N, 3, 4]", "[3, 2, 4]", "logits.transpose(0, 1)"),
    "experts before samples: maps": (
        lambda: criterion()(LOGITS.transpose(0, 1)[..., None], TARGET[:, None]), ValueError, "logits", "[N, 3, 4]", "[3, 2, 4, 1]", "logits.transpose(0, 1)",
    ),
    "experts before samples: baseline": (
        lambda: VSLoss(COUNTS)(LOGITS.transpose(0, 1), TARGET), ValueError, "logits", "[N, K, C]", "[3, 2, 4]", "logits.transpose(0, 1)",
    ),
    "ensemble of other classes": (lambda: criterion()(LOGITS[:, 0, :3], TARGET), ValueError, "logits", "[N, 4]", "[2, 3]"),
    "ensemble: features besides": (
        lambda: criterion()(LOGITS[:, 0], TARGET, features=LOGITS, weight=torch.zeros(3, 4, 4)), ValueError, "logits", "[N, 3, 4]", "[2, 4]", "ExpertOutput",
    ),
    "ensemble: target out of range": (lambda: criterion()(LOGITS[:, 0], TARGET + 9), ValueError, "target", "0..3", "got 9"),
    "ensemble: NaN": (lambda: criterion()(LOGITS[:, 0] * math.nan, TARGET), ValueError, "logits", "NaN", "expert 0"),
    "other experts": (lambda: criterion()(LOGITS[:, :2], TARGET), ValueError, "logits", "[N, 3, 4]", "[2, 2, 4]", "stack"),
    "other classes": (lambda: criterion()(torch.zeros(2, 3, 5), TARGET), ValueError, "logits", "[N, 3, 4]", "[2, 3, 5]"),
    "integer logits": (lambda: criterion()(LOGITS.long(), TARGET), TypeError, "logits", "floating", "int64"),
    "array of logits": (lambda: criterion()(LOGITS.numpy(), TARGET), TypeError, "logits", "[N, 3, 4]", "ndarray"),
    "dict of logits": (
        lambda: criterion()({"output": LOGITS[:, 0], "logits": LOGITS}, TARGET), TypeError, "logits", "[N, 3, 4]", "dict", "'output', 'logits'", 'criterion(output["logits"], target)',
    ),
    "dict without logits": (lambda: criterion()({"feat": LOGITS}, TARGET), TypeError, "logits", "dict", "'feat'", "criterion(output[KEY], target)"),
    "dict of logits: baseline": (
        lambda: VSLoss(COUNTS)({"logits": LOGITS}, TARGET), TypeError, "logits", "[N, K, C]", "dict", "'logits'", 'criterion(output["logits"], target)',
    ),
    "short list": (lambda: criterion()([LOGITS[:, 0]], TARGET), ValueError, "logits", "3 tensors", "1 tensors"),
    "empty list": (lambda: criterion()([], TARGET), ValueError, "logits", "3 tensors", "0 tensors"),
    "uneven list": (
        lambda: criterion()([LOGITS[:, 0], LOGITS[:, 0], LOGITS[:1, 0]], TARGET), ValueError, "logits", "[2, 4]", "[1, 4]",
    ),
    "list of two dtypes": (
        lambda: criterion()([LOGITS[:, 0], LOGITS[:, 1].double(), LOGITS[:, 2]], TARGET), ValueError, "logits", "one dtype", "torch.float64 on cpu", ".to()",
    ),
    "list of arrays": (lambda: criterion()([LOGITS.numpy()] * 3, TARGET), TypeError, "logits[0]", "floating", "array"),
    "NaN logits": (lambda: criterion()(LOGITS * math.nan, TARGET), ValueError, "logits", "NaN", "expert 0", "validate_args"),
    "infinite logits": (lambda: criterion()(LOGITS + math.inf, TARGET), ValueError, "logits", "+inf", "expert 0"),
    "-inf on the target": (lambda: criterion()(LOGITS - math.inf, TARGET), ValueError, "logits", "-inf", "expert 0"),
    "sparse logits": (lambda: criterion()(LOGITS.to_sparse(), TARGET), TypeError, "logits", "dense", "torch.sparse_coo torch.float32 tensor of shape [2, 3, 4]", "logits.to_dense()"),
    "nested logits": (lambda: criterion()(nested(*LOGITS), TARGET), TypeError, "logits", "dense", "nested torch.float32", "to_padded_tensor"),
    "jagged logits": (lambda: criterion()(nested(*LOGITS, layout=torch.jagged), TARGET), TypeError, "logits", "dense", "nested", "to_padded_tensor"),
    "logits of MKL-DNN": (lambda: criterion()(LOGITS.to_mkldnn(), TARGET), TypeError, "logits", "dense", "torch._mkldnn", "to_dense"),
    "logits of 8 bits": (lambda: criterion()(LOGITS.to(FLOAT8), TARGET), TypeError, "logits", "16 bits or more", "float8", "logits.float()"),
    "list of sparse logits": (lambda: criterion()([v.to_sparse() for v in LOGITS.unbind(1)], TARGET), TypeError, "logits[0]", "dense", "torch.sparse_coo"),
    "logits without values": (lambda: criterion()(LOGITS.to(META), TARGET), ValueError, "logits on meta", "target on cpu"),
    "logits to adjust": (lambda: CLALogitAdjuster(ClassGrouper(COUNTS, 2))(LOGITS[0]), ValueError, "logits", "[3, 4]"),
    # targets
    "float target": (lambda: criterion()(LOGITS, TARGET.float()), TypeError, "target", "int64", "float32", "long()"),
    "int32 target": (lambda: criterion()(LOGITS, TARGET.int()), TypeError, "target", "int64", "int32", "long()"),
    "list target": (lambda: criterion()(LOGITS, [0, 3]), TypeError, "target", "int64", "[0, 3]", "as_tensor"),
    "2-D target": (lambda: criterion()(LOGITS, TARGET[:, None]), ValueError, "target", "[2]", "[2, 1]", "flatten"),
    "short target": (lambda: criterion()(LOGITS, TARGET[:1]), ValueError, "target", "[2]", "[1]"),
    "target too large": (lambda: criterion()(LOGITS, TARGET + 1), ValueError, "target", "0..3", "-100", "got 4 at position 1"),
    "map without a target for each position": (lambda: criterion()(torch.zeros(2, 3, 4, 5, 5), TARGET), ValueError, "target", "[2, 5, 5]", "[2]"),
    "target of a map too large": (lambda: criterion()(torch.zeros(2, 3, 4, 2), torch.tensor([[0, 1], [4, 0]])), ValueError, "target", "0..3", "got 4 at position (1, 0)"),
    "map of other experts": (lambda: criterion()(torch.zeros(2, 4, 3, 5), TARGET), ValueError, "logits", "[N, 3, 4]", "[2, 4, 3, 5]"),
    "probabilities of other classes": (lambda: criterion()(LOGITS, torch.ones(2, 3)), ValueError, "target", "[2, 4]", "[2, 3]", "int64"),
    "probabilities classes last": (lambda: criterion()(torch.zeros(2, 3, 4, 5), torch.ones(2, 5, 4)), ValueError, "target", "[2, 4, 5]", "[2, 5, 4]"),
    "integer multi-hot target": (lambda: criterion()(LOGITS, ROWS), ValueError, "target", "[2]", "[2, 4]", "argmax", "SigmoidAdjustedLoss"),
    "bool multi-hot target": (lambda: criterion()(LOGITS, ROWS.bool()), ValueError, "target", "[2]", "[2, 4] of torch.bool", "argmax", "SigmoidAdjustedLoss"),
    "multi-hot target": (lambda: criterion()(LOGITS, ROWS.float()), ValueError, "target", "sum to 1", "2 to 2", "softmax", "SigmoidAdjustedLoss"),
    "multi-hot map": (lambda: criterion()(LOGITS[..., None], ROWS[..., None]), ValueError, "target", "[2, 1]", "[2, 4, 1]", "SigmoidAdjustedLoss"),
    "probabilities that do not sum to 1": (lambda: criterion()(LOGITS, torch.ones(2, 4)), ValueError, "target", "sum to 1", "4 to 4", "softmax"),
    "negative probabilities": (lambda: criterion()(LOGITS, torch.tensor([[2.0, -1, 0, 0]] * 2)), ValueError, "target", ">= 0", "from -1"),
    "NaN probabilities": (lambda: criterion()(LOGITS, torch.full((2, 4), math.nan)), ValueError, "target", "nan"),
    "probabilities with a gradient": (lambda: criterion()(LOGITS, torch.ones(2, 4, requires_grad=True)), ValueError, "target", "without gradient", "detach"),
    "-inf where there is probability": (lambda: criterion()(LOGITS - math.inf, torch.full((2, 4), 0.25)), ValueError, "logits", "-inf", "expert 0"),
    "probabilities of a linear head": (lambda: criterion(scale=None)(LOGITS, torch.full((2, 4), 0.25)), ValueError, "features, weight", "none", "scale=None"),
    "map of a linear head": (lambda: criterion(scale=None)(LOGITS[..., None], TARGET[:, None]), ValueError, "features, weight", "none", "scale=None"),
    "features without the map": (
        lambda: criterion()(LOGITS[..., None], TARGET[:, None], features=torch.zeros(2, 3, 5), weight=torch.zeros(3, 4, 5)), ValueError, "features", "[N, K, d, S]", "[2, 3, 5]",
    ),
    "sparse target": (lambda: criterion()(LOGITS, TARGET.to_sparse()), TypeError, "target", "dense", "torch.sparse_coo", "target.to_dense()"),
    "nested target": (lambda: criterion()(LOGITS, nested(TARGET)), TypeError, "target", "dense", "nested torch.int64"),
    "probabilities of 8 bits": (lambda: criterion()(LOGITS, torch.full((2, 4), 0.25).to(FLOAT8)), TypeError, "target", "16 bits", "float8", "target.float()"),
    "sparse probabilities": (lambda: criterion()(LOGITS, torch.eye(4)[:2].to_sparse()), TypeError, "target", "dense", "torch.sparse_coo"),
    # weights of samples
    "sparse sample weights": (lambda: criterion()(LOGITS, TARGET, sample_weight=torch.ones(2).to_sparse()), TypeError, "sample_weight", "dense", "sample_weight.to_dense()"),
    "sample weights of 8 bits": (lambda: criterion()(LOGITS, TARGET, sample_weight=torch.ones(2).to(FLOAT8)), TypeError, "sample_weight", "16 bits", "float8"),
    "list of sample weights": (lambda: criterion()(LOGITS, TARGET, sample_weight=[1.0, 2.0]), TypeError, "sample_weight", "[2]", "[1.0, 2.0]"),
    "integer sample weights": (lambda: criterion()(LOGITS, TARGET, sample_weight=TARGET), TypeError, "sample_weight", "floating-point", "int64"),
    "sample weights of another shape": (lambda: criterion()(LOGITS, TARGET, sample_weight=torch.ones(2, 1)), ValueError, "sample_weight", "[2]", "[2, 1]"),
    "negative sample weight": (lambda: criterion()(LOGITS, TARGET, sample_weight=torch.tensor([1.0, -1])), ValueError, "sample_weight", ">= 0", "-1 to 1"),
    "infinite sample weight": (lambda: criterion()(LOGITS, TARGET, sample_weight=torch.tensor([1.0, math.inf])), ValueError, "sample_weight", "finite", "inf"),
    "sample weights that learn": (lambda: criterion()(LOGITS, TARGET, sample_weight=torch.ones(2, requires_grad=True)), ValueError, "sample_weight", "without gradient", "none"),
    "linear: negative sample weight": (
        lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.zeros(2).long(), sample_weight=torch.tensor([1.0, -1])), ValueError, "sample_weight", ">= 0",
    ),
    "linear: sample weights of another shape": (
        lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.zeros(2).long(), sample_weight=torch.ones(3)), ValueError, "sample_weight", "[2]", "[3]",
    ),
    # DataParallel copies every module in this way
    "DataParallel of the loss": (lambda: criterion()._replicate_for_data_parallel(), TypeError, "LGLALoss", "DataParallel", "DistributedDataParallel"),
    "DataParallel of the experts": (lambda: experts()._replicate_for_data_parallel(), TypeError, "GroupConvExperts", "DataParallel", "DistributedDataParallel"),
    "DataParallel of the weighter": (lambda: AAWWeighter(ClassGrouper(COUNTS, 2))._replicate_for_data_parallel(), TypeError, "AAWWeighter", "DataParallel"),
    "negative target": (lambda: criterion()(LOGITS, TARGET - 1), ValueError, "target", "0..3", "got -1 at position 0"),
    "margin out of range": (
        lambda: CLALogitAdjuster(ClassGrouper(COUNTS, 2)).margin(TARGET + 1), ValueError, "target", "0..3", "got 4",
    ),
    # features, weights, devices, normalizer
    "linear head without features": (
        lambda: criterion(scale=None)(LOGITS, TARGET), ValueError, "features", "weight", "linear", "aaw=False",
    ),
    "features alone": (
        lambda: criterion()(LOGITS, TARGET, features=torch.zeros(2, 3, 5)), ValueError, "features, weight", "both", "one",
    ),
    "features of another width": (
        lambda: criterion()(LOGITS, TARGET, features=torch.zeros(2, 3, 5), weight=torch.zeros(3, 4, 6)),
        ValueError, "features, weight", "[2, 3, d]", "[2, 3, 5]", "[3, 4, 6]",
    ),
    "weight of other classes": (
        lambda: criterion()(LOGITS, TARGET, features=torch.zeros(2, 3, 5), weight=torch.zeros(3, 5, 5)),
        ValueError, "features, weight", "[3, 4, d]", "[3, 5, 5]",
    ),
    "2-D features": (
        lambda: criterion()(LOGITS, TARGET, features=torch.zeros(2, 5), weight=torch.zeros(3, 4, 5)),
        ValueError, "features", "[N, K, d]", "[2, 5]",
    ),
    "features beside an output": (
        lambda: criterion()(ExpertOutput(LOGITS, LOGITS, LOGITS), TARGET, features=LOGITS), ValueError, "features", "none",
    ),
    "mixed devices": (lambda: criterion()(LOGITS, TARGET.to(META)), ValueError, "logits on cpu", "target on meta", ".to("),
    "criterion elsewhere": (
        lambda: criterion()(LOGITS.to(META), TARGET.to(META)), ValueError, "logits on meta", "criterion on cpu", "the loss module",
    ),
    "angles elsewhere": (
        lambda: AAWWeighter(ClassGrouper(COUNTS, 2))(LOGITS[..., 0].to(META), TARGET), ValueError, "angles on meta",
    ),
    "normalizer of a sum": (
        lambda: criterion(reduction="sum")(LOGITS, TARGET, normalizer=2), ValueError, "normalizer", "'sum'", "mean",
    ),
    "zero normalizer": (lambda: criterion()(LOGITS, TARGET, normalizer=0), ValueError, "normalizer", "positive", "0.0"),
    "NaN normalizer": (
        lambda: criterion()(LOGITS, TARGET, normalizer=torch.tensor(math.nan)), ValueError, "normalizer", "positive", "nan",
    ),
    "text normalizer": (lambda: criterion()(LOGITS, TARGET, normalizer="3"), TypeError, "normalizer", "positive", "'3'"),
    "normalizer beyond every float": (lambda: criterion()(LOGITS, TARGET, normalizer=10**400), ValueError, "normalizer", "positive, finite", "10000"),
    "normalizer without a value": (lambda: criterion()(LOGITS, TARGET, normalizer=torch.ones((), device=META)), ValueError, "normalizer", "with a value", "meta"),
    "sparse normalizer": (lambda: criterion()(LOGITS, TARGET, normalizer=torch.ones(()).to_sparse()), TypeError, "normalizer", "dense", "torch.sparse_coo"),
    "sparse features": (
        lambda: criterion()(LOGITS, TARGET, features=torch.zeros(2, 3, 5).to_sparse(), weight=torch.zeros(3, 4, 5)), TypeError, "features", "dense", "torch.sparse_coo",
    ),
    "weight of 8 bits": (
        lambda: criterion()(LOGITS, TARGET, features=torch.zeros(2, 3, 5), weight=torch.zeros(3, 4, 5).to(FLOAT8)), TypeError, "weight", "16 bits", "float8",
    ),
    "1-D normalizer": (
        lambda: criterion()(LOGITS, TARGET, normalizer=torch.ones(2)), ValueError, "normalizer", "scalar", "[2]",
    ),
    "NaN features": (
        lambda: criterion()(LOGITS, TARGET, features=torch.full((2, 3, 5), math.nan), weight=torch.ones(3, 4, 5)),
        ValueError, "angles", "finite", "features",
    ),
    "infinite weight": (
        lambda: criterion()(LOGITS, TARGET, features=torch.ones(2, 3, 5), weight=torch.full((3, 4, 5), math.inf)),
        ValueError, "angles", "finite", "class weights",
    ),
    "NaN angles": (
        lambda: AAWWeighter(ClassGrouper(COUNTS, 2))(LOGITS[..., 0] * math.nan, TARGET), ValueError, "angles", "NaN",
    ),
    "3-D angles": (lambda: AAWWeighter(ClassGrouper(COUNTS, 2))(LOGITS, TARGET), ValueError, "angles", "[N, K]", "[2, 3, 4]"),
    # fusion
    "negative fusion": (
        lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble([1, -1, 1]), ValueError, "fusion", "non-negative", "-1.0",
    ),
    "text fusion": (lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble(["a", "b", "c"]), TypeError, "fusion", "3 real"),
    "complex fusion": (
        lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble(torch.ones(3) * 1j), TypeError, "fusion", "real", "complex",
    ),
    "zero fusion": (lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble([0, 0, 0]), ValueError, "fusion", "positive"),
    "short fusion": (lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble([1, 1]), ValueError, "fusion", "per expert, shape [3]", "[2]"),
    "NaN fusion": (
        lambda: CLALogitAdjuster(ClassGrouper(COUNTS, 2)).implied_prior([1, math.nan, 1]), ValueError, "fusion", "finite",
    ),
    "fusion beyond every float": (lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble([10**400, 1, 1]), TypeError, "fusion", "3 real numbers", "10000"),
    "fusion without values": (
        lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble(torch.ones(3, device=META)), ValueError, "fusion", "with values", "meta",
    ),
    "sparse fusion": (lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).ensemble(torch.ones(3).to_sparse()), TypeError, "fusion", "dense", "to_dense"),
    "prior of a fusion without values": (lambda: ADJUSTER.implied_prior(torch.ones(3, device=META)), ValueError, "fusion", "with values", "meta"),
    "prior of a loss with a short fusion": (lambda: criterion().implied_prior([1, 1]), ValueError, "fusion", "per expert, shape [3]", "[2]"),
    "prior without class counts": (lambda: FocalLoss().implied_prior(), ValueError, "class_counts", "FocalLoss", "None", "count_classes"),
    "prior of several labels": (lambda: sigmoid().implied_prior(), ValueError, "one class per sample", "SigmoidAdjustedLoss", "share"),
    "prior of weights that are all 0": (
        lambda: BalancedSoftmaxLoss(COUNTS, class_weight=[0] * 4).implied_prior(), ValueError, "class_weight", "positive", "none",
    ),
    "prior of a table over ranks": (
        lambda: ClassParallelLGLALoss(COUNTS, adjustment=torch.zeros(3, 4)).implied_prior(), ValueError, "adjustment", "your own table", "from_table",
    ),
    "probabilities of a prior alone": (
        lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).probabilities(prior=COUNTS), ValueError, "prior", "without calibration=", "validation split",
    ),
    "probabilities of no calibration": (
        lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).probabilities(3), TypeError, "calibration", "probabilities(", "3",
    ),
    "probabilities of a short fusion": (
        lambda: ExpertOutput(LOGITS, LOGITS, LOGITS).probabilities(fusion=[1, 1]), ValueError, "fusion", "per expert, shape [3]", "[2]",
    ),
    "ensemble of one model": (lambda: ExpertOutput(LOGITS[:, 0], LOGITS, LOGITS).ensemble(), ValueError, "logits", "[N, K, C, ...]", "[2, 4]", "directly"),
    "ensemble of a list": (lambda: ExpertOutput([LOGITS[:, 0]] * 3, LOGITS, LOGITS).ensemble(), TypeError, "logits", "floating-point tensor [N, K, C, ...]", "list"),
    "ensemble of sparse logits": (lambda: ExpertOutput(LOGITS.to_sparse(), LOGITS, LOGITS).ensemble([1, 2, 3]), TypeError, "logits", "dense", "to_dense"),
    "short fusion of a map": (lambda: ExpertOutput(LOGITS[..., None], LOGITS, LOGITS).ensemble([1, 1]), ValueError, "fusion", "per expert, shape [3]", "[2]"),
    # GroupConvExperts
    "stage of a wrong type": (lambda: experts(stage=3), TypeError, "stage", "module", "3"),
    "factory of a wrong type": (lambda: experts(stage=lambda: 3), TypeError, "stage", "Module", "3"),
    "unlike factory": (
        lambda: experts(stage=lambda: nn.Linear(2, int(torch.randint(3, 10**6, ())))), ValueError, "stage", "alike", "independent",
    ),
    "factory of other options": (
        lambda: experts(stage=lambda: nn.Conv2d(2, 4, 3, stride=int(torch.randint(1, 10**6, ())))),
        ValueError, "stage", "alike", "Conv2d", "independent",
    ),
    "factory of other layers": (
        lambda: experts(stage=functools.partial(another_activation, iter([nn.ReLU(), nn.Tanh(), nn.SiLU()]))),
        ValueError, "stage", "alike", "'1'", "ReLU", "independent",
    ),
    "factory of one module": (
        lambda: experts(stage=functools.partial(next, itertools.repeat(nn.Conv2d(2, 4, 3)))), ValueError, "stage", "new module", "shared", "inside",
    ),
    "lazy stage": (lambda: experts(stage=nn.LazyConv2d(4, 3)), ValueError, "stage", "lazy", "batch"),
    "init_fn for kept weights": (
        lambda: experts(reset=False, init_fn=lambda _: None), ValueError, "init_fn", "reset=False", "keeps",
    ),
    "init_fn that leaves a layer out": (
        lambda: experts(stage=nn.Sequential(nn.Conv2d(2, 4, 3), NoReset()), init_fn=lambda _: None),
        ValueError, "stage", "'1.scale'", "NoReset",
    ),
    "stage that writes into its input": (
        lambda: experts(stage=nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 4, 3)))(torch.zeros(2, 2, 5, 5)),
        ValueError, "stage", "input", "wrote", "inplace=False",
    ),
    "shared features of a wrong type": (lambda: experts()([1.0]), TypeError, "shared", "tensor", "[1.0]"),
    "stage of two outputs": (
        lambda: experts(stage=nn.LSTM(2, 4), num_features=4, layout="independent")(torch.zeros(2, 2)),
        TypeError, "stage", "[N, d]", "tuple",
    ),
    "sparse shared features": (
        lambda: experts(stage=None, num_features=4)(torch.zeros(2, 4).to_sparse()), ValueError, "shared", "dense", "sparse_coo",
    ),
    "nested features": (
        lambda: experts(stage=None, num_features=4)(torch.nested.nested_tensor([torch.zeros(2, 4)], layout=torch.jagged)),
        ValueError, "shared", "dense", "nested",
    ),
    "mkldnn features": (
        lambda: experts(stage=None, num_features=4)(torch.zeros(2, 4).to_mkldnn()), ValueError, "shared", "dense", "mkldnn",
    ),
    "float8 features": (
        lambda: experts(stage=None, num_features=4)(torch.zeros(2, 4).to(torch.float8_e4m3fn)), TypeError, "shared", "float32", "float8",
    ),
    "integer features": (lambda: experts(stage=nn.Flatten(), num_features=4)(torch.zeros(2, 4).long()), TypeError, "stage", "float32", "int64"),
    "meta features": (lambda: experts()(torch.zeros(2, 2, 5, 5, device=META)), ValueError, "shared", "cpu", "meta", "values"),
    "init_fn of a wrong type": (lambda: experts(init_fn=3), TypeError, "init_fn", "function", "3"),
    "reset of a wrong type": (lambda: experts(reset="no"), TypeError, "reset", "True or False", "'no'"),
    "together of a wrong type": (lambda: together("no"), TypeError, "experts.together", "True or False", "'no'"),
    "unknown layout": (lambda: experts(layout="fast"), ValueError, "layout", "'grouped'", "'fast'"),
    "unknown classifier": (lambda: experts(classifier="mlp"), ValueError, "classifier", "'cosine'", "'mlp'"),
    "zero scale of experts": (lambda: experts(scale=0.0), ValueError, "scale", "positive", "0.0"),
    "no classes for experts": (lambda: experts(num_classes=0), ValueError, "num_classes", "got 0"),
    "no experts": (lambda: experts(num_experts=0), ValueError, "num_experts", "got 0"),
    "no features": (lambda: experts(stage=None), ValueError, "num_features", "None"),
    "unknown features": (lambda: experts(stage=nn.ReLU()), ValueError, "num_features", "no layer"),
    "wrong features": (
        lambda: experts(num_features=5)(torch.zeros(2, 2, 5, 5)), ValueError, "num_features", "4", "got 5", "num_features=4",
    ),
    "layer without reset": (
        lambda: experts(stage=nn.Sequential(nn.Conv2d(2, 4, 3), NoReset())),
        ValueError, "stage", "'1.scale'", "NoReset", "init_fn=", "factory", "reset=False",
    ),
    "linear: sparse weight": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4).to_sparse(), torch.zeros(2).long()), TypeError, "weight", "dense", "weight.to_dense()"),
    "linear: bias of 8 bits": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.zeros(2).long(), torch.zeros(3, 2).to(FLOAT8)), TypeError, "bias", "16 bits", "float8"),
    "linear: probabilities of other classes": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.ones(2, 3) / 3), ValueError, "target", "[2, 2]", "[2, 3]"),
    "linear: mixed dtypes": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4).double(), torch.zeros(3, 2, 4), torch.zeros(2, dtype=torch.int64)), ValueError, "weight", "float64", "float32", "autocast"),
    "linear: weight of other classes": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 5, 4), torch.zeros(2, dtype=torch.int64)), ValueError, "features, weight", "[3, 2, d]", "[3, 5, 4]"),
    "linear: logits for features": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3), torch.zeros(3, 2, 4), torch.zeros(2, dtype=torch.int64)), ValueError, "features", "[N, K, d]", "[2, 3]"),
    "linear: bias of another shape": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2)), ValueError, "bias", "[K, C]", "[2]"),
    "linear: bias of a cosine head": (lambda: LinearLGLALoss([3, 2], scale=30.0)(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2)), ValueError, "bias", "None", "cosine"),
    "linear: target too large": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.full((2,), 2)), ValueError, "target", "0..1", "got 2"),
    "linear: NaN features": (lambda: LinearLGLALoss([3, 2])(torch.full((2, 3, 4), math.nan), torch.zeros(3, 2, 4), torch.zeros(2, dtype=torch.int64)), ValueError, "features", "NaN", "learning rate"),
    "linear: NaN weight": (lambda: LinearLGLALoss([3, 2], aaw=False)(torch.zeros(2, 3, 4), torch.full((3, 2, 4), math.nan), torch.zeros(2, dtype=torch.int64)), ValueError, "features, weight, bias", "NaN", "learning rate"),
    "linear: NaN angles": (lambda: LinearLGLALoss([3, 2])(torch.zeros(2, 3, 4), torch.full((3, 2, 4), math.nan), torch.zeros(2, dtype=torch.int64)), ValueError, "angles", "NaN"),
    # baselines
    "baseline without counts": (lambda: BalancedSoftmaxLoss(None), TypeError, "class_counts", "None", "count_classes"),
    "zero count of a baseline": (lambda: LDAMLoss([3, 0]), ValueError, "class_counts", "positive", "0 for class 1"),
    "counts for the focal loss": (lambda: FocalLoss([3, 1]), TypeError, "gamma", "number >= 0", "ClassBalancedLoss", "[3, 1]"),
    "negative gamma": (lambda: FocalLoss(-1.0), ValueError, "gamma", ">= 0", "-1.0"),
    "negative gamma of class-balanced": (lambda: ClassBalancedLoss([3, 1], gamma=-1.0), ValueError, "gamma", ">= 0", "None", "-1.0"),
    "NaN gamma of vector scaling": (lambda: VSLoss([3, 1], gamma=math.nan), ValueError, "gamma", "finite", "nan"),
    "negative tau of vector scaling": (lambda: VSLoss([3, 1], tau=-1.0), ValueError, "tau", ">= 0", "-1.0"),
    "text tau of logit adjustment": (lambda: LogitAdjustedLoss([3, 1], "1"), TypeError, "tau", "number", "'1'"),
    "beta of one": (lambda: ClassBalancedLoss([3, 1], beta=1.0), ValueError, "beta", "[0, 1)", "0.9999", "1.0"),
    "negative beta": (lambda: LDAMLoss([3, 1], beta=-0.1), ValueError, "beta", "[0, 1)", "-0.1"),
    "negative margin": (lambda: LDAMLoss([3, 1], -0.5), ValueError, "max_margin", ">= 0", "-0.5"),
    "zero scale of LDAM": (lambda: LDAMLoss([3, 1], scale=0.0), ValueError, "scale", "positive", "linear", "0.0"),
    "epoch for the re-weighting": (lambda: LDAMLoss([3, 1]).reweight(160), TypeError, "enabled", "True or False", "160", "epoch >="),
    "reduction of a baseline": (lambda: FocalLoss(reduction="avg"), ValueError, "reduction", "'mean'", "'avg'"),
    "ignore_index of a baseline": (lambda: FocalLoss(ignore_index=0.5), TypeError, "ignore_index", "integer", "0.5"),
    "backend of a baseline": (lambda: FocalLoss(backend="cuda"), ValueError, "backend", "'reference'", "'cuda'"),
    "smoothing of a baseline": (lambda: FocalLoss(label_smoothing=1.1), ValueError, "label_smoothing", "0..1", "1.1"),
    "baseline: other classes": (lambda: VSLoss(COUNTS)(LOGITS[..., :3], TARGET), ValueError, "logits", "[N, 4] or [N, K, 4]", "[2, 3, 3]", "class_counts"),
    "baseline: one dimension": (lambda: FocalLoss()(LOGITS[0, 0], TARGET), ValueError, "logits", "[N, C] or [N, K, C]", "[4]"),
    "baseline: no expert": (lambda: FocalLoss()(LOGITS[:, :0], TARGET), ValueError, "logits", "[N, K, C]", "[2, 0, 4]"),
    "baseline: empty list": (lambda: FocalLoss()([], TARGET), ValueError, "logits", "1 tensors", "0 tensors"),
    "baseline: unlike experts": (lambda: FocalLoss()([LOGITS[:, 0], LOGITS[:, 0, :3]], TARGET), ValueError, "logits", "[2, 4]", "[2, 3]"),
    "baseline: list of arrays": (lambda: FocalLoss()([LOGITS.numpy()], TARGET), TypeError, "logits[0]", "floating", "array"),
    "baseline: integer logits": (lambda: FocalLoss()(LOGITS.long(), TARGET), TypeError, "logits", "floating", "int64"),
    "baseline: no logits": (lambda: FocalLoss()("logits", TARGET), TypeError, "logits", "ExpertOutput", "'logits'"),
    "baseline: float target": (lambda: FocalLoss()(LOGITS, TARGET.float()), TypeError, "target", "int64", "long()"),
    "baseline: probabilities of other classes": (lambda: BalancedSoftmaxLoss(COUNTS)(LOGITS, torch.full((2, 3), 0.25)), ValueError, "target", "[2, 4]", "[2, 3]"),
    "baseline: probabilities that sum to 2": (lambda: BalancedSoftmaxLoss(COUNTS)(LOGITS, torch.full((2, 4), 0.5)), ValueError, "target", "sum to 1", "2"),
    "baseline: negative sample weight": (lambda: FocalLoss()(LOGITS, TARGET, sample_weight=torch.tensor([1.0, -1.0])), ValueError, "sample_weight", ">= 0", "-1"),
    "class weights of other classes": (lambda: BalancedSoftmaxLoss(COUNTS, class_weight=[1.0, 2.0]), ValueError, "class_weight", "[4]", "[2]"),
    "negative class weights": (lambda: FocalLoss(alpha=[1.0, -1.0]), ValueError, "alpha", ">= 0", "-1"),
    "class weights twice": (lambda: FocalLoss(alpha=[1.0, 1.0], class_weight=[1.0, 1.0]), ValueError, "alpha, class_weight", "both"),
    "baseline: sparse logits": (lambda: FocalLoss()(LOGITS.to_sparse(), TARGET), TypeError, "logits", "dense", "torch.sparse_coo", "logits.to_dense()"),
    "baseline: nested logits": (lambda: FocalLoss()(nested(*LOGITS), TARGET), TypeError, "logits", "dense", "nested"),
    "baseline: logits of 8 bits": (lambda: FocalLoss()(LOGITS.to(FLOAT8), TARGET), TypeError, "logits", "16 bits", "float8"),
    "baseline: ignore_index of more than 64 bits": (lambda: FocalLoss(ignore_index=2**70), ValueError, "ignore_index", "64 bits"),
    "baseline: short target": (lambda: FocalLoss()(LOGITS, TARGET[:1]), ValueError, "target", "[2]", "[1]"),
    "baseline: target too large": (lambda: FocalLoss()(LOGITS, TARGET + 1), ValueError, "target", "0..3", "got 4"),
    "baseline: NaN logits": (lambda: FocalLoss()(LOGITS * math.nan, TARGET), ValueError, "logits", "NaN", "expert 0", "validate_args"),
    "baseline: criterion elsewhere": (lambda: VSLoss(COUNTS)(LOGITS.to(META), TARGET.to(META)), ValueError, "logits on meta", "criterion on cpu", ".to("),
    "baseline: fused under vmap": (
        lambda: torch.func.grad(FocalLoss(backend="fused"))(LOGITS, TARGET), ValueError, "backend", "'fused'", "torch.func", "'auto'",
    ),
    "baseline: multi-hot target": (lambda: FocalLoss()(LOGITS[:, 0], ROWS), ValueError, "target", "[2]", "[2, 4]", "SigmoidAdjustedLoss"),
    "baseline: multi-hot target of experts": (lambda: VSLoss(COUNTS)(LOGITS, ROWS), ValueError, "target", "[2]", "[2, 4]", "SigmoidAdjustedLoss"),
    "baseline: labels of a sequence": (lambda: BalancedSoftmaxLoss(COUNTS)(torch.zeros(2, 7, 4), torch.zeros(2, 7).long()), ValueError, "logits", "[N, 4, S]", "[2, 7, 4]", "movedim(-1, 1)"),
    # terms between experts, and what comes after training
    "negative diversity": (lambda: RIDELoss(COUNTS, -0.1), ValueError, "diversity", ">= 0", "-0.1"),
    "temperatures too far apart": (lambda: RIDELoss(COUNTS, gamma=1.0), ValueError, "gamma", "[0, 1)", "1.0"),
    "negative distillation": (lambda: NCLLoss(COUNTS, -0.1), ValueError, "distillation", ">= 0", "-0.1"),
    "no hard classes": (lambda: NCLLoss(COUNTS, hard_share=0.0), ValueError, "hard_share", "(0, 1]", "0.0"),
    "more than all classes are hard": (lambda: NCLLoss(COUNTS, hard_share=1.5), ValueError, "hard_share", "(0, 1]", "1.5"),
    "NCL of probabilities": (lambda: NCLLoss(COUNTS)(LOGITS, torch.full((2, 4), 0.25)), ValueError, "target", "class indices", "probabilities", "expert_distillation"),
    "SADE of two experts": (lambda: create_loss("sade", COUNTS, num_experts=2), ValueError, "num_experts", "2 from num_experts", "3 from adjustment='sade'"),
    "SADE's table of two experts": (
        lambda: CLALogitAdjuster.of_prior(ClassGrouper(COUNTS, 2), 2, "sade"), ValueError, "num_experts", "3 with adjustment='sade'", "got 2",
    ),
    "SADE of two logits": (lambda: create_loss("sade", COUNTS)(LOGITS[:, :2], TARGET), ValueError, "logits", "[N, 3, 4]", "[2, 2, 4]"),
    "temperatures of other classes": (lambda: expert_diversity(LOGITS, torch.ones(3)), ValueError, "temperature", "[4]", "[3]"),
    "temperature of zero": (lambda: expert_diversity(LOGITS, 0.0), ValueError, "temperature", "positive, finite", "[C]", "0.0"),
    "negative temperature": (lambda: expert_diversity(LOGITS, -1.0), ValueError, "temperature", "positive, finite", "-1.0"),
    "NaN temperature": (lambda: expert_diversity(LOGITS, math.nan), ValueError, "temperature", "positive, finite", "nan"),
    "no temperature": (lambda: expert_diversity(LOGITS, None), TypeError, "temperature", "positive, finite", "None"),
    "temperatures as a list": (lambda: expert_diversity(LOGITS, [1.0] * 4), TypeError, "temperature", "tensor [C]", "list"),
    "temperatures as integers": (lambda: expert_diversity(LOGITS, torch.ones(4).long()), TypeError, "temperature", "floating-point", "int64"),
    "a temperature of zero among others": (lambda: expert_diversity(LOGITS, torch.arange(4.0)), ValueError, "temperature", "positive, finite", "0 to 3"),
    "infinite temperature": (lambda: expert_diversity(LOGITS, torch.tensor(math.inf)), ValueError, "temperature", "positive, finite", "inf to inf"),
    "NCL: target too large": (lambda: NCLLoss(COUNTS)(LOGITS, TARGET + 1), ValueError, "target", "0..3", "got 4"),
    "NCL: negative target": (lambda: NCLLoss(COUNTS, class_weight=COUNTS)(LOGITS, TARGET - 3), ValueError, "target", "0..3", "got -3"),
    "RIDE: a margin for linear heads": (lambda: RIDELoss(COUNTS, max_margin=0.3, scale=None), ValueError, "max_margin, scale", "no margin", "0.3", "scale=1"),
    "distillation of integer logits": (lambda: expert_distillation(LOGITS.long()), TypeError, "logits", "floating", "int64"),
    "views of other samples": (lambda: aggregation.self_supervised_weights(LOGITS, LOGITS[:1]), ValueError, "other_view", "[2, 3, 4]", "[1, 3, 4]"),
    "views of one expert": (lambda: aggregation.self_supervised_weights(LOGITS[:, 0], LOGITS[:, 0]), ValueError, "view", "two experts", "[2, 1, 4]"),
    "views without samples": (lambda: aggregation.self_supervised_weights(LOGITS[:0], LOGITS[:0]), ValueError, "view", "at least one sample", "[0, 3, 4]"),
    "NaN in a view": (lambda: aggregation.self_supervised_weights(LOGITS, LOGITS * math.nan), ValueError, "other_view", "finite"),
    "no epochs": (lambda: aggregation.self_supervised_weights(LOGITS, LOGITS, epochs=0), ValueError, "epochs", "0"),
    "tau-normalising a model": (lambda: stages.tau_normalize(nn.ReLU()), TypeError, "head", "Linear", "ReLU", "model.experts.classifiers"),
    "tau-normalising cosine heads": (lambda: stages.tau_normalize(experts().classifiers), ValueError, "head", "linear", "scale=30", 'classifier="linear"'),
    "tau-normalising a weight that is computed": (
        lambda: stages.tau_normalize(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), ValueError, "head", "plain parameters", "weight_norm", "remove_parametrizations",
    ),
    "tau-normalising after the older weight_norm": (lambda: stages.tau_normalize(older_weight_norm(nn.Linear(2, 2))), ValueError, "head", "plain parameters", "remove_weight_norm"),
    "negative tau of a head": (lambda: stages.tau_normalize(nn.Linear(2, 2), -1.0), ValueError, "tau", ">= 0", "-1.0"),
    # several labels a sample
    "multi-label: no counts": (lambda: sigmoid(None), TypeError, "class_counts", "None", "count_classes"),
    "multi-label: a class of no sample": (lambda: sigmoid([3, 0, 1, 1]), ValueError, "class_counts", "positive", "class 1"),
    "multi-label: a class of every sample": (lambda: sigmoid([3, 80, 1, 1]), ValueError, "class_counts, num_samples", "num_samples=80", "got 80 for class 1", "leave out a class"),
    "multi-label: stack of experts": (lambda: sigmoid()(LOGITS.transpose(0, 1), ROWS), ValueError, "target", "[3, 4] as for the logits", "[2, 4]", "transpose(0, 1)"),
    "multi-label: no samples": (lambda: sigmoid(num_samples=0), ValueError, "num_samples", "positive", "rows"),
    "multi-label: text for samples": (lambda: sigmoid(num_samples="80"), TypeError, "num_samples", "'80'"),
    "multi-label: negative tau": (lambda: sigmoid(tau=-1.0), ValueError, "tau", "-1"),
    "multi-label: beta of one": (lambda: ClassBalancedBCELoss(COUNTS, beta=1.0), ValueError, "beta", "[0, 1)"),
    "multi-label: negative gamma": (lambda: ClassBalancedBCELoss(COUNTS, gamma=-1.0), ValueError, "gamma", ">= 0", "None"),
    "multi-label: tau without strength": (lambda: ClassBalancedBCELoss(COUNTS).set_adjustment(tau=1.0), ValueError, "tau", "ClassBalancedBCELoss"),
    "multi-label: ignore_index": (lambda: sigmoid(ignore_index=-1), TypeError, "SigmoidAdjustedLoss", "label_smoothing", "'ignore_index'"),
    "multi-label: smoothing": (lambda: sigmoid(label_smoothing=2.0), ValueError, "label_smoothing", "0..1"),
    "multi-label: class indices": (lambda: sigmoid()(LOGITS, TARGET), ValueError, "target", "[2, 4]", "[2]", "one_hot(target, 4)"),
    "multi-label: lists of indices": (lambda: sigmoid()(LOGITS, [[0, 2], [1]]), TypeError, "target", "[2, 4]", "[[0, 2], [1]]", "as_tensor"),
    "multi-label: other classes": (lambda: sigmoid()(LOGITS, ROWS[:, :2]), ValueError, "target", "[2, 4]", "[2, 2]"),
    "multi-label: unknown as -1": (lambda: sigmoid()(LOGITS, -ROWS), ValueError, "target", "-1 to 0", "reduction='none'"),
    "multi-label: a target above 1": (lambda: sigmoid()(LOGITS, 2 * ROWS), ValueError, "target", "0 to 2"),
    "multi-label: NaN in the target": (lambda: sigmoid()(LOGITS, ROWS * math.nan), ValueError, "target", "nan"),
    "multi-label: target with a gradient": (lambda: sigmoid()(LOGITS, torch.ones(2, 4, requires_grad=True)), ValueError, "target", "detach"),
    "multi-label: sparse target": (lambda: sigmoid()(LOGITS, ROWS.to_sparse()), TypeError, "target", "dense", "to_dense"),
    "multi-label: target of 8 bits": (lambda: sigmoid()(LOGITS, ROWS.to(FLOAT8)), TypeError, "target", "16 bits", "target.float()"),
    "multi-label: logits of other classes": (lambda: sigmoid()(LOGITS[..., :2], ROWS), ValueError, "logits", "[N, K, 4]", "[2, 3, 2]"),
    "multi-label: NaN logits": (lambda: sigmoid()(LOGITS * math.nan, ROWS), ValueError, "logits", "finite"),
    "multi-label: infinite logits": (lambda: sigmoid()([LOGITS[:, 0], LOGITS[:, 0] - math.inf], ROWS), ValueError, "logits", "finite"),
    "multi-label: negative sample weight": (lambda: sigmoid()(LOGITS, ROWS, sample_weight=torch.tensor([1.0, -1])), ValueError, "sample_weight", ">= 0", "-1"),
    "multi-label: sample weights of elements": (lambda: sigmoid()(LOGITS, ROWS, sample_weight=torch.ones(2, 4)), ValueError, "sample_weight", "[2]", "[2, 4]"),
    "multi-label: normalizer": (lambda: sigmoid()(LOGITS, ROWS, normalizer=0), ValueError, "normalizer", "positive"),
    "multi-label: another device": (lambda: sigmoid()(LOGITS, ROWS.to(META)), ValueError, "target on meta", "criterion on cpu"),
    "multi-label: rows to count": (lambda: count_classes(ROWS, 4), ValueError, "labels", "[2, 4]", "targets.sum(dim=0)"),
    # pictures
    "plot: a loss as adjuster": (
        lambda: plot.plot_table(LGLALoss(COUNTS)), TypeError, "adjuster: expected a CLALogitAdjuster", "got LGLALoss", "criterion.adjuster",
    ),
    "plot: adjuster as grouper": (lambda: plot.plot_groups(ADJUSTER), TypeError, "grouper: expected a ClassGrouper", "got CLALogitAdjuster"),
    "plot: a number as names": (
        lambda: plot.plot_groups(ADJUSTER.grouper, names=5), TypeError, "names: expected the names of the classes, texts [C]", "got 5 of type int", "order of the class indices", "dataset.classes",
    ),
    "plot: text as names": (lambda: plot.plot_table(ADJUSTER, names="abcd"), TypeError, "names: expected", "texts [C]", "got 'abcd' of type str", "dataset.classes"),
    "plot: numbers of a generator as names": (lambda: plot.plot_table(ADJUSTER, names=(j for j in range(4))), TypeError, "names: expected", "got [0, 1, 2, 3]", "dataset.classes"),
    "plot: too few names of a generator": (lambda: plot.plot_table(ADJUSTER, names=(name for name in "abc")), ValueError, "names: expected one for each of 4 classes", "got 3"),
    "plot: class out of range": (lambda: plot.plot_margins(ADJUSTER, 4), ValueError, "target_class: expected class indices 0..3", "got 4", "from 0"),
    "plot: class not an integer": (lambda: plot.plot_margins(ADJUSTER, 1.5), TypeError, "target_class: expected an integer", "got 1.5"),
    "plot: no rival": (lambda: plot.plot_margins(CLALogitAdjuster(ClassGrouper([1], 1)), 0), ValueError, "expected two classes or more", "got one"),
    "plot: one class to compare": (lambda: plot.plot_boundaries(ADJUSTER, [1]), ValueError, "classes: expected two or more different", "got [1]"),
    "plot: the same class twice": (lambda: plot.plot_boundaries(ADJUSTER, [1, 2, 1]), ValueError, "classes: expected", "got [1, 2, 1]"),
    "plot: negative class": (lambda: plot.plot_boundaries(ADJUSTER, [1, -1]), ValueError, "classes: expected class indices 0..3", "got -1"),
    "plot: names as classes": (lambda: plot.plot_boundaries(ADJUSTER, ["cat", "dog"]), TypeError, "classes: expected integers", "got"),
    "plot: centres in 3-D": (lambda: plot.plot_boundaries(ADJUSTER, [0, 1], torch.ones(2, 3)), ValueError, "centres: expected", "[2, 2]", "got [2, 3]"),
    "plot: centres that coincide": (lambda: plot.plot_boundaries(ADJUSTER, [0, 1], torch.ones(2, 2)), ValueError, "centres: expected finite, different points", "got"),
    "plot: complex centres": (lambda: plot.plot_boundaries(ADJUSTER, [0, 1], torch.ones(2, 2) * 1j), TypeError, "centres: expected real numbers", "got complex64"),
    "plot: weight of one head": (lambda: plot.plot_weight_norms(torch.ones(4, 5), COUNTS), ValueError, "weight: expected shape [K, C, d]", "got [4, 5]"),
    "plot: weight of other classes": (lambda: plot.plot_weight_norms(torch.ones(3, 5, 2), COUNTS), ValueError, "weight: expected shape [K, 4, d]", "got [3, 5, 2]", "torch.stack"),
    "plot: weight as a list": (lambda: plot.plot_weight_norms([[1.0]], COUNTS), TypeError, "weight: expected a floating-point tensor [K, C, d]", "got"),
    "plot: weight not finite": (lambda: plot.plot_weight_norms(torch.full((1, 4, 2), math.nan), COUNTS), ValueError, "weight: expected finite", "got NaN"),
    "plot: negative count": (lambda: plot.plot_weight_norms(torch.ones(1, 2, 2), [3, -1]), ValueError, "class_counts: expected finite counts >= 0", "got -1"),
    "plot: margins of a masked class": (
        lambda: plot.plot_margins(MASKING, 1), ValueError, "target_class: expected classes with training samples", "got class 1", "'smooth'",
    ),
    "plot: boundaries of a masked class": (
        lambda: plot.plot_boundaries(MASKING, [0, 1]), ValueError, "classes: expected classes with training samples", "got class 1",
    ),
    "plot: no rival with samples": (
        lambda: plot.plot_margins(CLALogitAdjuster(ClassGrouper([5, 0], 1, zero_counts="mask")), 0), ValueError, "two classes or more with samples", "got one",
    ),
    "plot: fusion of two": (lambda: plot.plot_implied_prior(ADJUSTER, [1, 1]), ValueError, "fusion: expected one weight per expert, shape [3]", "got shape [2]"),
    "plot: one expert": (lambda: plot.plot_fusion_sweep(LOGITS[:, :1], TARGET, COUNTS), ValueError, "logits: expected two experts or more", "got one"),
    "plot: no sample": (lambda: plot.fusion_sweep(LOGITS[:0], TARGET[:0], COUNTS), ValueError, "logits: expected one test sample or more", "got none"),
    "plot: NaN logits": (lambda: plot.fusion_sweep(LOGITS / 0, TARGET, COUNTS), ValueError, "logits: expected finite", "got NaN"),
    "plot: logits of other classes": (lambda: plot.fusion_sweep(LOGITS[..., :3], TARGET, COUNTS), ValueError, "logits: expected shape", "got [2, 3, 3]"),
    "plot: target too long": (lambda: plot.fusion_sweep(LOGITS, TARGET.repeat(2), COUNTS), ValueError, "target: expected shape [2]", "got [4]"),
    "plot: target out of range": (lambda: plot.fusion_sweep(LOGITS, TARGET + 1, COUNTS), ValueError, "target: expected class indices 0..3", "got 4"),
    "plot: fusion weight above 1": (lambda: plot.fusion_sweep(LOGITS, TARGET, COUNTS, [0.5, 1.5]), ValueError, "weights: expected", "0..1", "got 1.5"),
    "plot: no fusion weight": (lambda: plot.fusion_sweep(LOGITS, TARGET, COUNTS, []), ValueError, "weights: expected one fusion weight or more", "got shape [0]"),
    "plot: words as fusion weights": (lambda: plot.fusion_sweep(LOGITS, TARGET, COUNTS, ["much"]), TypeError, "weights: expected", "got 'much'"),
    "plot: logits as probabilities": (lambda: plot.plot_reliability(LOGITS[:, 0], TARGET), ValueError, "probabilities: expected class probabilities", "sums from", "softmax"),
    "plot: probabilities of experts": (lambda: plot.plot_reliability(LOGITS.softmax(-1), TARGET), ValueError, "probabilities: expected shape [N, C]", "got [2, 3, 4]"),
    "plot: no probabilities": (lambda: plot.plot_reliability({}, TARGET), ValueError, "probabilities: expected", "got an empty mapping"),
    "plot: probabilities of no sample": (lambda: plot.plot_reliability(LOGITS[:0, 0], TARGET[:0]), ValueError, "probabilities: expected one sample or more", "got none"),
    "plot: unknown average": (lambda: plot.plot_reliability(LOGITS[:, 0].softmax(-1), TARGET, average="macro"), ValueError, "average: expected one of 'samples', 'classes'", "got 'macro'"),
    "plot: no bins of confidence": (lambda: plot.plot_reliability(LOGITS[:, 0].softmax(-1), TARGET, bins=0), ValueError, "bins: expected", "got 0"),
    "plot: logits of experts to shift": (lambda: plot.plot_prior_shift(LOGITS, TARGET, COUNTS), ValueError, "logits: expected shape [N, C]", "got [2, 3, 4]"),
    "plot: logits of other classes to shift": (lambda: plot.plot_prior_shift(LOGITS[:, 0, :3], TARGET, COUNTS), ValueError, "logits: expected shape [N, 4]", "got [2, 3]"),
    "plot: NaN logits to shift": (lambda: plot.plot_prior_shift(LOGITS[:, 0] / 0, TARGET, COUNTS), ValueError, "logits: expected finite", "got NaN"),
    "plot: infinite exponent": (lambda: plot.plot_prior_shift(LOGITS[:, 0], TARGET, COUNTS, [0.0, float("inf")]), ValueError, "exponents: expected finite", "got inf"),
    "plot: no exponent": (lambda: plot.plot_prior_shift(LOGITS[:, 0], TARGET, COUNTS, []), ValueError, "exponents: expected one exponent or more", "got shape [0]"),
    "plot: a number as calibration": (lambda: plot.plot_prior_shift(LOGITS[:, 0], TARGET, COUNTS, calibration=0.5), TypeError, "calibration: expected", "fit", "got 0.5"),
    "plot: few above many": (lambda: plot.fusion_sweep(LOGITS, TARGET, COUNTS, many=5, few=9), ValueError, "few: expected a number in 0..many=5", "got 9"),
    "plot: angles in degrees": (lambda: plot.plot_angles(torch.full((2, 3), 60.0), TARGET, ADJUSTER.grouper), ValueError, "angles: expected radians", "got 60", "torch.deg2rad"),
    "plot: NaN angles": (lambda: plot.plot_angles(torch.full((2, 3), math.nan), TARGET, ADJUSTER.grouper), ValueError, "angles: expected radians", "got nan"),
    "plot: angles without experts": (lambda: plot.plot_angles(torch.zeros(2), TARGET, ADJUSTER.grouper), ValueError, "angles: expected shape [N, K]", "got [2]"),
    "plot: all ignored": (lambda: plot.plot_angles(torch.zeros(2, 3), TARGET * 0 - 100, ADJUSTER.grouper), ValueError, "angles: expected one sample or more", "got none in [2, 3]"),
    "plot: no bins": (lambda: plot.plot_angles(torch.zeros(2, 3), TARGET, ADJUSTER.grouper, bins=0), ValueError, "bins: expected an integer >= 1", "got 0"),
    # calibration
    "calibration: one class alone": (lambda: calibrated(target=LABELS * 0), ValueError, "target: expected at least two classes", "got 20 samples of class 0", "at random"),
    "calibration: one sample": (lambda: calibrated(SPLIT[:1], LABELS[:1]), ValueError, "logits: expected at least two samples", "got 1", "hold out"),
    "calibration: no sample": (lambda: calibrated(SPLIT[:0], LABELS[:0]), ValueError, "logits: expected at least two samples", "got 0", "hold out"),
    "calibration: logits of one class": (lambda: calibrated(SPLIT[:, :1], LABELS * 0, [40]), ValueError, "logits: expected at least two classes", "got [20, 1]"),
    "calibration: no class counts": (lambda: calibrated(class_counts=None), ValueError, "class_counts: expected", "shape [4]", "got None", "criterion="),
    "calibration: a prior without class counts": (lambda: calibrated(class_counts=None, implied_prior=COUNTS), ValueError, "class_counts: expected", "got None"),
    "calibration: loss without class counts": (
        lambda: calibrated(class_counts=None, criterion=create_loss("softmax")), ValueError, "class_counts", "got None", "pass class_counts=",
    ),
    "calibration: loss beside class counts": (lambda: calibrated(criterion=criterion()), ValueError, "criterion: expected None together with", "got both", "leave one out"),
    "calibration: loss beside a prior": (
        lambda: calibrated(class_counts=None, criterion=criterion(), implied_prior=COUNTS), ValueError, "criterion: expected None together with", "got both",
    ),
    "calibration: loss of several labels": (lambda: calibrated(class_counts=None, criterion=sigmoid()), ValueError, "criterion: expected a loss for one class", "got SigmoidAdjustedLoss"),
    "calibration: loss of PyTorch": (
        lambda: calibrated(class_counts=None, criterion=nn.CrossEntropyLoss()), TypeError, "criterion: expected a loss of lgla_losses", "got CrossEntropyLoss()", "class_counts=",
    ),
    "calibration: name of a loss": (lambda: calibrated(class_counts=None, criterion="lgla"), TypeError, "criterion: expected a loss", "got 'lgla'"),
    "calibration: logits of experts": (lambda: calibrated(SPLIT[:, None].expand(-1, 3, -1)), ValueError, "logits: expected the ensemble's [M, C]", "got [20, 3, 4]", "mean(dim=1)"),
    "calibration: output of other experts": (
        lambda: calibrated(ExpertOutput(SPLIT[:, None].expand(-1, 2, -1), SPLIT, SPLIT), class_counts=None, criterion=criterion()),
        ValueError, "logits: expected [M, 3, C]", "criterion", "got [20, 2, 4]",
    ),
    "calibration: logits of other classes than the loss": (
        lambda: calibrated(SPLIT[:, :3], LABELS % 3, None, criterion=criterion()), ValueError, "logits: expected [M, 4]", "4 classes of criterion", "got [20, 3]",
    ),
    "calibration: logits of other classes than the counts": (lambda: calibrated(SPLIT[:, :3], LABELS % 3), ValueError, "class_counts", "shape [3]", "got [4]"),
    "calibration: NaN logits": (lambda: calibrated(SPLIT * math.nan), ValueError, "logits: expected finite", "got NaN", "leave such samples out"),
    "calibration: infinite logits": (lambda: calibrated(SPLIT / 0), ValueError, "logits: expected finite", "got NaN or infinity"),
    "calibration: logits as an array": (lambda: calibrated(SPLIT.numpy()), TypeError, "logits: expected a tensor [M, C]", "got array", "torch.as_tensor"),
    "calibration: integer logits": (lambda: calibrated(SPLIT.long()), TypeError, "logits: expected a floating-point tensor", "int64"),
    "calibration: target too large": (lambda: calibrated(target=LABELS + 1), ValueError, "target: expected class indices 0..3", "got 4", "target - 1"),
    "calibration: negative target": (lambda: calibrated(target=LABELS - 1), ValueError, "target: expected class indices 0..3", "got -1"),
    "calibration: float target": (lambda: calibrated(target=LABELS.float()), TypeError, "target: expected an int64 tensor", "got torch.float32", "target.long()"),
    "calibration: target as a list": (lambda: calibrated(target=LABELS.tolist()), TypeError, "target: expected an int64 tensor", "list", "torch.as_tensor"),
    "calibration: target too short": (lambda: calibrated(target=LABELS[1:]), ValueError, "target: expected shape [20]", "got [19]"),
    "calibration: text for a validation prior": (lambda: calibrated(validation_prior="estimated"), ValueError, "validation_prior: expected", "'uniform'", "got 'estimated'"),
    "calibration: negative validation prior": (lambda: calibrated(validation_prior=[1, -1, 1, 1]), ValueError, "validation_prior: expected finite, non-negative", "got [1.0, -1.0"),
    "calibration: negative implied prior": (lambda: calibrated(implied_prior=[1, -1, 1, 1]), ValueError, "implied_prior: expected finite, non-negative", "got [1.0, -1.0"),
    "calibration: negative class counts": (lambda: calibrated(class_counts=[1, -1, 1, 1]), ValueError, "class_counts: expected finite, non-negative", "got [1.0, -1.0"),
    "calibration: labels that the split cannot have": (
        lambda: calibrated(validation_prior=[1, 0, 1, 1]), ValueError, "target: expected classes whose", "validation prior", "got class 1 (5 such samples)", "leave them out",
    ),
    "calibration: labels of a masked class": (lambda: calibrated(class_counts=[9, 5, 0, 1]), ValueError, "target: expected classes whose class count", "got class 2 (5 such samples)"),
    "calibration: labels of a class without a prior": (lambda: calibrated(implied_prior=[1, 1, 1, 0]), ValueError, "target: expected", "implied prior", "got class 3 (5 such samples)"),
    "calibrated: unknown prior": (lambda: calibrated().logits(SPLIT, "test"), ValueError, "prior: expected one of 'uniform', 'estimated'", "got 'test'"),
    "calibrated: prior of other classes": (lambda: calibrated().probabilities(SPLIT, [1, 1]), ValueError, "prior: expected", "shape [4]", "got [2]"),
    "calibrated: negative prior": (lambda: calibrated().probabilities(SPLIT, [1, -1, 1, 1]), ValueError, "prior: expected finite, non-negative", "got [1.0, -1.0"),
    "calibrated: prior of a masked class only": (
        lambda: calibrated(SPLIT[LABELS < 3], LABELS[LABELS < 3], [9, 5, 3, 0]).probabilities(SPLIT, [0, 0, 0, 1]),
        ValueError, "prior: expected a positive value for a class with training samples", "got 0 for all of them",
    ),
    "calibrated: logits of other classes": (lambda: calibrated().logits(SPLIT[:, :3]), ValueError, "logits: expected [N, 4]", "got [20, 3]"),
    "calibrated: logits of experts": (lambda: calibrated().logits(SPLIT[:, None]), ValueError, "logits: expected shape [N, C]", "got [20, 1, 4]"),
    "calibrated: logits as a list": (lambda: calibrated().logits(SPLIT.tolist()), TypeError, "logits: expected a floating-point tensor [N, C]", "list"),
    "3-D stage output": (
        lambda: experts(stage=nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2)))(torch.zeros(2, 2, 5, 5)),
        ValueError, "stage", "[N, d]", "9", "pooling",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error_names_the_argument_what_came_and_the_way_out(name):
    assert_raises(*CASES[name])


@pytest.mark.parametrize("name", ["target too large", "NaN logits"])
def test_values_are_read_only_on_request(name):
    """With validate_args=False the loss is NaN."""
    inputs = {"target too large": (LOGITS, TARGET + 1), "NaN logits": (LOGITS * math.nan, TARGET)}[name]
    with pytest.raises(ValueError, match="expected"):
        criterion(validate_args=True)(*inputs)
    unchecked = criterion(validate_args=False, aaw=False)
    assert unchecked(*inputs).isnan()
