"""Class counts, groups and adjustments stay what they are, whatever is done to the model with the loss."""

import copy
import pickle

import accelerate
import pytest
import torch
from reference import cosine_logits
from safetensors.torch import load_model, save_file, save_model
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

from lgla_losses import AAWWeighter, CLALogitAdjuster, ClassGrouper, LGLALoss, LinearLGLALoss
from lgla_losses.baselines import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    NCLLoss,
    RIDELoss,
    VSLoss,
)
from lgla_losses.distributed import ClassParallelLGLALoss

COUNTS = [500, 120, 60, 9, 3, 1]
OTHER = [3, 200, 90, 1, 400, 30]

#: Every loss that holds constants, from class counts.
LOSSES = {
    "lgla": LGLALoss,
    "without hard-sample weights": lambda counts: LGLALoss(counts, aaw=False),
    "softmax": lambda counts: LGLALoss(counts, adjustment="softmax"),
    "balanced": lambda counts: LGLALoss(counts, adjustment="balanced"),
    "logit": lambda counts: LGLALoss(counts, tau=1.5, adjustment="logit"),
    "table": lambda counts: LGLALoss(counts, adjustment=-torch.arange(18.0, device="cpu").view(3, 6)),
    "linear": lambda counts: LinearLGLALoss(counts, scale=30.0),
    "BalancedSoftmaxLoss": BalancedSoftmaxLoss,
    "ClassBalancedLoss": ClassBalancedLoss,
    "LDAMLoss": LDAMLoss,
    "own class weights": lambda counts: LDAMLoss(counts, class_weight=[0.5, 1.0, 2.0, 0.0, 3.5, 1.0]),
    "LogitAdjustedLoss": lambda counts: LogitAdjustedLoss(counts, tau=1.5),
    "VSLoss": VSLoss,
    "RIDELoss": RIDELoss,
    "NCLLoss": NCLLoss,
    "sade": lambda counts: LGLALoss(counts, tau=1.5, adjustment="sade", aaw=False),
    "background": lambda counts: LGLALoss(counts, background=[1, 4]),
    "may mask classes": lambda counts: LDAMLoss(counts, zero_counts="mask", background=2),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def value(criterion):
    """The loss of one batch, whatever the loss takes."""
    torch.manual_seed(3)
    logits, target = cosine_logits(12, 3, 6), torch.arange(12) % 6
    if isinstance(criterion, LinearLGLALoss):
        return criterion(torch.randn(12, 3, 4), torch.randn(3, 6, 4), target)
    return criterion(logits, target)


def assert_same(actual, expected):
    """Every constant to the last digit, and so the loss."""
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert states[0][name].dtype == tensor.dtype, name
        assert torch.equal(states[0][name], tensor), name
    assert torch.equal(value(actual), value(expected))
    assert repr(actual) == repr(expected)


class Model(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.layer, self.criterion = nn.Linear(2, 2), criterion


@pytest.mark.parametrize(
    "average",
    [
        lambda model: AveragedModel(model, use_buffers=True),
        lambda model: AveragedModel(model, use_buffers=True, avg_fn=swa_utils.get_ema_avg_fn(0.9998)),
        lambda model: AveragedModel(
            model, use_buffers=True, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9998)
        ),
        lambda model: ModelEmaV2(model, decay=0.9998),
        lambda model: ModelEmaV3(model, decay=0.9998),
    ],
    ids=["swa", "ema", "foreach ema", "timm v2", "timm v3"],
)
@every_loss
def test_averages_of_weights_leave_the_constants_exact(make, average):
    """An EMA truncated counts of 500 to 499 and groups of 1 to 0."""
    model = Model(make(COUNTS))
    averaged = average(model)
    for _ in range(5):
        getattr(averaged, "update_parameters", getattr(averaged, "update", None))(model)
    assert_same(averaged.module.criterion, make(COUNTS))
    assert_same(model.criterion, make(COUNTS))


def test_weights_swapped_for_validation_leave_the_constants_exact():
    """As Lightning swaps averaged weights in and out, through ``.data``."""
    model = Model(LGLALoss(COUNTS))
    averaged = AveragedModel(model, use_buffers=True, avg_fn=swa_utils.get_ema_avg_fn(0.9))
    for _ in range(5):
        averaged.update_parameters(model)
    for ours, theirs in zip(model.buffers(), averaged.module.buffers(), strict=True):
        ours.data.copy_(theirs.data)
    assert_same(model.criterion, LGLALoss(COUNTS))


@every_loss
def test_memory_without_values_is_filled_again(make):
    """Tables held whatever memory held after ``to_empty``."""
    with torch.device("meta"):
        criterion = make(COUNTS)
    assert all(buffer.is_meta for buffer in criterion.buffers())
    assert "meta" not in str(criterion.to_empty(device="cpu").state_dict())
    assert_same(criterion, make(COUNTS))
    for buffer in (model := Model(make(COUNTS))).to_empty(device="cpu").buffers():
        buffer.fill_(77)
    if make is not LOSSES["table"]:  # any table may be one of the caller's own
        assert_same(model.criterion, make(COUNTS))


@every_loss
def test_a_loader_that_assigns_empty_memory(make):
    """As ``from_pretrained`` does with what a checkpoint lacks."""
    with torch.device("meta"):
        model = Model(make(COUNTS))
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.full_like(buffer, 3, device="cpu"))
    assert_same(model.criterion, make(COUNTS))


@every_loss
def test_all_constants_lie_on_the_default_device(make):
    """The strength and the flag of LDAM did not."""
    with torch.device("meta"):
        criterion = make(COUNTS)
        assert {buffer.device.type for buffer in criterion.buffers()} == {"meta"}
    assert {buffer.device.type for buffer in make(COUNTS).buffers()} == {"cpu"}


@every_loss
def test_every_constant_stands_once_in_the_state(make, tmp_path):
    """safetensors refused tensors that share memory: the groups stood there twice."""
    model = Model(make(COUNTS))
    memory = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(memory)) == len(memory)
    assert not any(name.startswith("criterion.weighter") for name in model.state_dict())
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    save_model(model, tmp_path / "model.safetensors")
    other = Model(make(OTHER))
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(value(other.criterion), value(make(COUNTS)))


@every_loss
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_brings_its_class_counts(make, assign):
    criterion = make(OTHER)
    criterion.load_state_dict(make(COUNTS).state_dict(), assign=assign)
    assert_same(criterion, make(COUNTS))


@pytest.mark.parametrize("adjustment", ["lgla", "softmax", "balanced", "logit"])
@pytest.mark.parametrize("aaw", [True, False])
def test_states_of_version_0_1_0_still_load(adjustment, aaw):
    """They hold the groups of the weighter once more, and no strength of ``"logit"``."""
    tau = {"lgla": 3.3, "logit": 1.7}.get(adjustment)
    saved = LGLALoss(COUNTS, tau=tau, adjustment=adjustment, aaw=aaw)
    state = saved.state_dict()
    for name in [name for name in state if "grouper" in name]:
        state[name.replace("adjuster", "weighter")] = state[name]
    if adjustment == "logit":
        del state["adjuster.tau"]
    criterion = LGLALoss(OTHER, adjustment=adjustment, aaw=aaw)
    criterion.load_state_dict(state)
    assert torch.allclose(value(criterion), value(saved), rtol=1e-12)
    baseline = LogitAdjustedLoss(OTHER)
    old = LogitAdjustedLoss(COUNTS, tau=1.7).state_dict()
    del old["tau"]
    baseline.load_state_dict(old)
    assert float(baseline.tau) == pytest.approx(1.7)


REFUSED = {
    "balanced in softmax": (lambda: LGLALoss(COUNTS, adjustment="balanced"), LOSSES["softmax"], "softmax"),
    "softmax in lgla": (lambda: LGLALoss(COUNTS, adjustment="softmax"), LGLALoss, "lgla"),
    "lgla in logit": (lambda: LGLALoss(COUNTS), LOSSES["logit"], "logit"),
    "table in balanced": (lambda: LOSSES["table"](COUNTS), LOSSES["balanced"], "balanced"),
    "another baseline": (
        lambda: LogitAdjustedLoss(COUNTS, tau=2.0),
        BalancedSoftmaxLoss,
        "tau|BalancedSoftmaxLoss",
    ),
    "another beta": (lambda: ClassBalancedLoss(COUNTS, beta=0.9), ClassBalancedLoss, "class_weight"),
    "another gamma": (lambda: VSLoss(COUNTS, gamma=0.1), VSLoss, "multiplier"),
    "another margin": (lambda: LDAMLoss(COUNTS, max_margin=0.1), LDAMLoss, "margins"),
    "other classes": (lambda: LGLALoss(COUNTS[:5]), LGLALoss, "size mismatch"),
    "other experts": (lambda: LGLALoss(COUNTS, 4), LGLALoss, "size mismatch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_of_another_kind_is_an_error(name):
    """A loss that said softmax computed balanced softmax."""
    saved, make, message = REFUSED[name]
    criterion = make(OTHER)
    with pytest.raises(RuntimeError, match=message):
        criterion.load_state_dict(saved().state_dict())
    assert_same(criterion, make(OTHER))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adjuster.table", lambda v: v * float("nan"), "finite"),
        ("adjuster.grouper.class_counts", lambda v: v * 0, "class_counts.*positive"),
        ("adjuster.grouper.group_index", lambda v: v * 0, "group"),
        ("adjuster.grouper.group_index", lambda v: v * 0.9, "group_index.*integers"),
        ("adjuster.tau", lambda v: v * 0, "table"),
        ("adjuster.tau", lambda v: -v, "tau"),
    ],
)
def test_a_damaged_state_is_an_error(name, change, message):
    state = LGLALoss(COUNTS).state_dict()
    criterion = LGLALoss(OTHER)
    with pytest.raises(RuntimeError, match=message):
        criterion.load_state_dict(state | {name: change(state[name])})
    assert_same(criterion, LGLALoss(OTHER))


def test_groups_of_the_callers_own_travel_in_a_state_and_stay():
    own = LGLALoss(grouper=ClassGrouper.from_groups(COUNTS, [0, 1, 0, 1, 0, 1]))
    loaded = LGLALoss(OTHER)
    loaded.load_state_dict(own.state_dict())
    loaded.set_adjustment(OTHER)
    assert loaded.grouper.group_index.tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(RuntimeError, match="group_index: expected the groups given to the loss"):
        own.load_state_dict(LGLALoss(COUNTS).state_dict())
    assert own.grouper.group_index.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_part_of_a_state_says_that_all_belongs_together():
    criterion, state = LGLALoss(OTHER), LGLALoss(COUNTS).state_dict()
    for name in ("adjuster.table", "adjuster.grouper.class_counts"):
        with pytest.raises(RuntimeError, match="all constants of a state at once"):
            criterion.load_state_dict({name: state[name]}, strict=False)
        assert_same(criterion, LGLALoss(OTHER))


def test_a_state_in_half_precision_is_the_constants_again():
    """Those of a checkpoint that was cast as a whole."""
    state = {
        n: v.bfloat16() if v.is_floating_point() else v for n, v in LGLALoss(COUNTS).state_dict().items()
    }
    criterion = LGLALoss(COUNTS)
    criterion.load_state_dict(state)
    assert_same(criterion, LGLALoss(COUNTS))
    state["adjuster.grouper.group_index"] = state["adjuster.grouper.group_index"].bfloat16()
    with pytest.raises(RuntimeError, match="group_index: expected integers"):
        criterion.load_state_dict(state)


def test_what_is_written_into_the_buffers_as_a_whole_is_taken():
    """As DDP sends those of rank 0, and AveragedModel keeps buffers in step."""
    for make in (LGLALoss, LDAMLoss, LogitAdjustedLoss):
        model, source = Model(make(OTHER)), make(COUNTS)
        averaged = AveragedModel(model)
        if make is LDAMLoss:
            source.reweight()
        model.criterion.load_state_dict(source.state_dict())
        for _ in range(2):
            averaged.update_parameters(model)
            assert_same(averaged.module.criterion, source)


def test_tensors_that_a_loader_puts_in_the_buffers_place_are_taken(tmp_path):
    """As accelerate does."""
    source = LGLALoss(COUNTS, tau=1.0)
    save_file(Model(source).state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights(include_buffers=True):
        model = Model(LGLALoss(OTHER))
    accelerate.load_checkpoint_and_dispatch(
        model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    assert_same(model.criterion, source)

    criterion = LGLALoss(COUNTS)
    criterion.adjuster._buffers["tau"] = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="table: expected the table of"):
        criterion.to("cpu")


def test_memory_can_be_shared():
    criterion = LGLALoss(COUNTS)
    assert all(buffer.is_shared() for buffer in criterion.share_memory().buffers())
    assert_same(criterion, LGLALoss(COUNTS))


@pytest.mark.parametrize(
    "write",
    [
        lambda c: c.adjuster.tau.fill_(0.0),
        lambda c: c.adjuster.table.zero_(),
        lambda c: c.adjuster.table.__setitem__(0, 1.0),
        lambda c: c.grouper.class_counts.add_(1),
        lambda c: c.grouper.group_index.copy_(torch.zeros(6)),
        lambda c: torch.neg(c.adjuster.table, out=c.adjuster.table),
        lambda c: setattr(c.grouper.class_counts, "data", torch.ones(6)),
        lambda c: c.adjuster.tau.data,
        lambda c: c.adjuster.tau.__iadd__(1),
        lambda c: torch._foreach_add_([c.adjuster.tau], 1.0),
        lambda c: torch.sort(c.adjuster.table, out=(c.adjuster.table, torch.zeros(3, 6, dtype=torch.int64))),
        lambda c: setattr(c.adjuster, "tau", torch.tensor(0.0)),
        lambda c: setattr(c.adjuster, "grouper", ClassGrouper(OTHER, 2)),
        lambda c: setattr(c, "grouper", ClassGrouper(OTHER, 2)),
        lambda c: setattr(c, "adjustment", "softmax"),
        lambda c: setattr(c.grouper, "class_counts", torch.ones(6)),
    ],
)
def test_attributes_that_look_live_are_read_only(write):
    """Writing changed what ``repr`` and ``implied_prior`` said, and not the loss."""
    criterion = LGLALoss(COUNTS)
    with pytest.raises((ValueError, AttributeError), match="set_adjustment"):
        write(criterion)
    assert_same(criterion, LGLALoss(COUNTS))


def test_what_is_computed_of_an_attribute_is_a_plain_tensor():
    criterion = LGLALoss(COUNTS)
    counts, tau = criterion.grouper.class_counts, criterion.adjuster.tau
    results = counts / counts.sum(), counts.clone(), copy.deepcopy(counts), pickle.loads(pickle.dumps(counts))
    assert {type(result) for result in results} == {torch.Tensor}
    results[0].mul_(2)
    counts.numpy()[:] = 0
    assert f"{tau:.2f}" == "2.50"
    assert_same(criterion, LGLALoss(COUNTS))


@every_loss
def test_other_class_counts_during_training(make):
    """As of streaming data; the loss, what is printed and the implied prior follow."""
    criterion = make(COUNTS)
    criterion.set_adjustment(class_counts=OTHER)
    assert_same(criterion, make(OTHER))
    criterion.set_adjustment([float(count) for count in COUNTS])
    assert torch.equal(value(criterion), value(make(COUNTS)))


@pytest.mark.parametrize(
    "make",
    [
        lambda tau: LGLALoss(COUNTS, tau=tau),
        lambda tau: LGLALoss(COUNTS, tau=tau, adjustment="logit"),
        lambda tau: LinearLGLALoss(COUNTS, tau=tau, scale=30.0),
        lambda tau: LogitAdjustedLoss(COUNTS, tau=tau),
        lambda tau: VSLoss(COUNTS, tau=tau),
    ],
    ids=["lgla", "logit", "linear", "LogitAdjustedLoss", "VSLoss"],
)
def test_a_schedule_of_tau(make):
    criterion = make(0.5)
    for tau in (0.0, 1.25, 3.0):
        criterion.set_adjustment(tau=tau)
        assert_same(criterion, make(tau))
    resumed = make(0.5)
    resumed.load_state_dict(criterion.state_dict())
    assert_same(resumed, make(3.0))


def test_a_schedule_of_tau_compiles_nothing_anew(device):
    criterion = LGLALoss(COUNTS).to(device)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    logits, target = cosine_logits(12, 3, 6).to(device), torch.arange(12, device=device) % 6
    compiled(logits, target)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tau in (0.0, 3.0):
            criterion.set_adjustment(OTHER, tau)
            expected = LGLALoss(OTHER, tau=tau).to(device)(logits, target)
            torch.testing.assert_close(compiled(logits, target), expected)


def test_attributes_can_be_read_in_compiled_code():
    criterion = LGLALoss(COUNTS)
    compiled = torch.compile(lambda v: v + criterion.adjuster.table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(6)), 1 + criterion.adjuster.table)


def test_groups_and_a_table_of_the_callers_own_stay():
    grouper = ClassGrouper.from_groups(COUNTS, [0, 1, 0, 1, 0, 1])
    criterion = LGLALoss(grouper=grouper)
    criterion.set_adjustment(OTHER)
    assert criterion.grouper.group_index.tolist() == [0, 1, 0, 1, 0, 1]
    assert criterion.grouper.class_counts.tolist() == OTHER
    assert grouper.class_counts.tolist() == COUNTS  # the caller's

    table = -torch.rand(3, 6, dtype=torch.float64)
    criterion = LGLALoss(COUNTS, adjustment=table)
    criterion.set_adjustment(OTHER)
    assert torch.equal(criterion.adjuster.table, table)
    assert torch.equal(criterion.grouper.group_index, ClassGrouper(OTHER, 2).group_index)


def test_classes_of_one_rank_follow_too():
    criterion, features = ClassParallelLGLALoss(COUNTS), torch.randn(12, 3, 4)
    batch = features, torch.randn(3, 6, 4), torch.arange(12) % 6
    for counts, tau in ((None, 0.5), (OTHER, None), (COUNTS, 2.0)):
        criterion.set_adjustment(counts, tau)
    assert torch.equal(criterion(*batch), ClassParallelLGLALoss(COUNTS, tau=2.0)(*batch))
    criterion.to_empty(device="cpu")
    assert torch.equal(criterion(*batch), ClassParallelLGLALoss(COUNTS, tau=2.0)(*batch))
    own = LinearLGLALoss(COUNTS, tau=2.0)(*batch)
    torch.testing.assert_close(criterion(*batch), own)


@pytest.mark.parametrize(
    ("criterion", "arguments", "message"),
    [
        (LGLALoss(COUNTS), {"tau": -1.0}, "tau"),
        (LGLALoss(COUNTS), {"class_counts": COUNTS[:5]}, "class_counts.*6 classes"),
        (LGLALoss(COUNTS), {"class_counts": [0, *COUNTS[1:]], "tau": 1.0}, "class_counts.*positive"),
        (LGLALoss(COUNTS, adjustment="balanced"), {"tau": 1.0}, "tau.*balanced"),
        (LOSSES["table"](COUNTS), {"tau": 1.0}, "tau.*table"),
        (BalancedSoftmaxLoss(COUNTS), {"tau": 1.0}, "tau.*BalancedSoftmaxLoss"),
        (LogitAdjustedLoss(COUNTS), {"tau": float("nan")}, "tau"),
        (FocalLoss(), {"class_counts": COUNTS}, "class_counts.*FocalLoss"),
        (ClassParallelLGLALoss(COUNTS, adjustment="softmax"), {"tau": 1.0}, "tau.*softmax"),
    ],
)
def test_a_wrong_adjustment_changes_nothing(criterion, arguments, message):
    before = criterion.state_dict()
    with pytest.raises(ValueError, match=message):
        criterion.set_adjustment(**arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in criterion.state_dict().items())


def test_a_functional_call_still_puts_a_table_in_place():
    """And its gradient is that of the adjustments."""
    criterion = LGLALoss(COUNTS, aaw=False)
    logits, target = cosine_logits(12, 3, 6), torch.arange(12) % 6
    table = LGLALoss(OTHER, aaw=False).adjuster.table.clone().requires_grad_()
    loss = torch.func.functional_call(criterion, {"adjuster.table": table}, (logits, target))
    torch.testing.assert_close(loss, LGLALoss(OTHER, aaw=False)(logits, target))
    loss.backward()
    assert table.grad.abs().sum() > 0
    assert_same(criterion, LGLALoss(COUNTS, aaw=False))


def test_a_functional_call_still_puts_margins_and_weights_of_ldam_in_place():
    """And the gradient is that of the margins."""
    criterion, other = LDAMLoss(COUNTS), LDAMLoss(OTHER)
    other.reweight()
    logits, target = cosine_logits(12, 3, 6), torch.arange(12) % 6
    margins = other.margins.clone().requires_grad_()
    given = {
        "margins": margins,
        "class_weight": other.class_weight.clone(),
        "reweighting": torch.ones((), dtype=torch.float64),
    }
    loss = torch.func.functional_call(criterion, given, (logits, target))
    torch.testing.assert_close(loss, other(logits, target))
    loss.backward()
    assert margins.grad.abs().sum() > 0
    assert_same(criterion, LDAMLoss(COUNTS))


def test_what_ldam_reads_follows_every_change():
    """Weights switched on and off, other counts, and another scale."""
    logits, target = cosine_logits(12, 3, 6), torch.arange(12) % 6

    def expected(counts, enabled, scale=30.0):
        fresh = LDAMLoss(counts, scale=scale)
        fresh.reweight(enabled)
        return fresh(logits, target)

    criterion = LDAMLoss(COUNTS)
    criterion.reweight()
    assert torch.equal(criterion(logits, target), expected(COUNTS, True))
    criterion.set_adjustment(OTHER)
    assert torch.equal(criterion(logits, target), expected(OTHER, True))
    criterion.reweight(False)
    assert torch.equal(criterion(logits, target), expected(OTHER, False))
    criterion.scale = 40.0
    assert torch.equal(criterion(logits, target), expected(OTHER, False, scale=40.0))


def test_losses_are_stacked_and_mapped():
    """The engines saw no tensor of torch.func, but for the table."""
    criteria = [LGLALoss(COUNTS), LGLALoss(OTHER)]
    logits, target = cosine_logits(12, 3, 6), torch.arange(12) % 6

    def call(parameters, buffers):
        return torch.func.functional_call(criteria[0], (parameters, buffers), (logits, target))

    losses = torch.vmap(call)(*torch.func.stack_module_state(criteria))
    torch.testing.assert_close(losses, torch.stack([criterion(logits, target) for criterion in criteria]))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [LGLALoss, LDAMLoss, VSLoss])
def test_a_loss_is_exported(make, strict):
    criterion, batch = make(COUNTS), (cosine_logits(12, 3, 6), torch.arange(12) % 6)
    exported = torch.export.export(criterion, batch, strict=strict)
    torch.testing.assert_close(exported.module()(*batch), criterion(*batch))


def test_the_parts_by_themselves_keep_their_constants():
    grouper = ClassGrouper(COUNTS, 2)
    parts = nn.ModuleList([grouper, CLALogitAdjuster(grouper), AAWWeighter(grouper)])
    angles, target = torch.rand(12, 3), torch.arange(12) % 6
    before = parts[2](angles, target)
    for buffer in parts.half().to_empty(device="cpu").buffers():
        buffer.zero_()
    assert torch.equal(parts[0].class_counts, torch.tensor(COUNTS))
    assert float(parts[1].tau) == 2.5
    assert torch.equal(parts[2](angles, target), before)
    memory = [tensor.data_ptr() for tensor in parts.state_dict().values()]
    assert len(set(memory)) == len(memory)


def test_a_loss_made_in_inference_mode_can_be_moved_and_changed():
    with torch.inference_mode():
        criterion = LGLALoss(COUNTS)
    criterion.to(torch.float64).set_adjustment(tau=1.0)
    assert_same(criterion, LGLALoss(COUNTS, tau=1.0))
    with torch.inference_mode():
        criterion.to("cpu").set_adjustment(OTHER)
        criterion.load_state_dict(LGLALoss(COUNTS).state_dict())
    assert not any(buffer.is_inference() for buffer in criterion.buffers())
    assert_same(criterion, LGLALoss(COUNTS))


def test_without_hard_sample_weights_no_weighter_is_shown():
    assert "AAWWeighter" not in repr(LGLALoss(COUNTS, aaw=False))
    assert "AAWWeighter" in repr(LGLALoss(COUNTS))
