"""What README and docs say of a GPU is what the committed records of one say."""

import re
import statistics

import pytest
import records
import report
import tables
from scripts import ROOT

NAMES = ["losses_cuda", "expert_layouts_cuda", "gpu_check_cuda", "tests_cuda", "stacked_forms_cuda"]
NAMES += ["losses_cuda_plans", "stacked_training_cuda"]
LARGE, SMALL = "iNaturalist 4096 x 3 x 8142", "CIFAR 128 x 3 x 100"


def page(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


BENCHMARKS, README = page("docs/benchmarks.md"), page("README.md")
RESULTS = page("docs/results.md")


@pytest.fixture(scope="module")
def losses():
    return tables.read("losses_cuda")


@pytest.fixture
def row(losses):
    """The row of a way, size, phase and type."""

    def find(shape, phase, dtype="float32", column="LGLALoss"):
        wanted = {"shape": shape, "phase": phase, "dtype": dtype, "column": column}
        (found,) = (row for row in losses["rows"] if all(row[key] == value for key, value in wanted.items()))
        return found

    return find


def microseconds(row):
    return f"{1000 * row['median_ms']:.1f}"


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_where_and_of_what_it_was_made(name):
    record = tables.read(name)
    assert record["device"] == "NVIDIA H200"
    assert record["torch"].startswith("2.11")
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])


@pytest.mark.parametrize("text", [BENCHMARKS, README], ids=["benchmarks", "README"])
def test_many_classes_cost_what_is_recorded(row, text):
    single, half = (row(LARGE, "device time", dtype) for dtype in ("float32", "bfloat16"))
    faster = [1 / step["ratio_to_plain"] for step in (single, half)]
    share = [100 * step["share_of_limit"] for step in (single, half)]
    assert (
        f"take {single['median_ms']:.2f} ms in float32 and {half['median_ms']:.2f} ms in bfloat16: "
        f"{faster[0]:.1f} and {faster[1]:.0f} times as fast as the plain loop, "
        f"at {share[0]:.0f} % and {share[1]:.0f} % of the limit"
    ) in text


def test_the_page_tells_how_the_commit_came_into_the_record(losses):
    assert losses["note"] in report.page(losses)


def test_the_bandwidth_is_the_recorded_one(losses):
    assert f"({losses['copy_gb_per_s']:.0f} GB/s)" in BENCHMARKS


def test_the_plans_of_the_kernels_cost_what_is_recorded():
    rows = tables.read("losses_cuda_plans")["rows"]
    steps = {row["column"]: row for row in rows if row["phase"] == "device time" and row["ours"]}
    said = {
        plan: (f"{step['median_ms']:.2f}", f"{100 * step['share_of_limit']:.0f} %")
        for name, step in steps.items()
        for plan in [name.removeprefix("LGLALoss").removeprefix(", plan ")]
    }
    ahead, resident, paired, first = (said[plan] for plan in ("", "resident", "paired", "0.1"))
    assert f"default: {resident[0]} ms of the device, {resident[1]} of the limit." in BENCHMARKS
    assert f"that of the first release: {first[0]} ms ({first[1]})." in BENCHMARKS
    assert f"while they compute: {ahead[0]} ms ({ahead[1]}) and {paired[0]} ({paired[1]})." in BENCHMARKS


def test_plan_0_1_took_what_is_recorded_in_the_first_run(row):
    before = row(LARGE, "device time", column="LGLALoss, plan 0.1")["median_ms"]
    assert f"In the first run they happened to be few, and it took {before:.2f} ms as well." in BENCHMARKS


def test_few_classes_cost_what_is_recorded(row):
    ours, plain = (
        (row(SMALL, "device time", column=column), row(SMALL, "CUDA graph", column=column))
        for column in ("LGLALoss", "plain loop")
    )
    launches = [ours[1]["launches"], plain[1]["launches"]]
    empty = row(SMALL, "CUDA graph", column=f"{launches[0]} empty kernels")
    ratio = ours[1]["median_ms"] / empty["median_ms"]
    assert (
        f"a step is {launches[0]} kernels and {microseconds(ours[0])} microseconds of the device, "
        f"where the plain loop has {launches[1]} and {microseconds(plain[0])}. From a CUDA graph it takes "
        f"{microseconds(ours[1])}, of which {launches[0]} empty kernels alone take {microseconds(empty)}: "
        f"a ratio of {ratio:.2f}"
    ) in BENCHMARKS
    assert (
        f"take {ours[1]['median_ms']:.3f} ms from a CUDA graph, where the plain loop takes "
        f"{plain[1]['median_ms']:.3f}"
    ) in README


def test_the_hosts_time_is_about_a_millisecond_at_any_size(losses):
    steps = [
        row["median_ms"]
        for row in losses["rows"]
        if row["column"] == "LGLALoss" and row["phase"] == "forward + backward"
    ]
    plain_inputs = [ms for ms in steps if ms < 1.5]
    assert len(plain_inputs) >= 8
    assert 0.95 < statistics.median(plain_inputs) < 1.2
    for text in (BENCHMARKS, README):
        assert "about 1 ms" in text


def of_one_model(losses):
    (shape,) = {row["shape"] for row in losses["rows"] if row["column"] == "BalancedSoftmaxLoss"}
    return shape


def test_the_launches_of_every_input_are_those_recorded(losses, row):
    launches = {
        kind: row(f"{SMALL}, {kind}", "forward + backward")["launches"]
        for kind in ("K tensors", "ExpertOutput", "sample weights", "probabilities")
    }
    one = row(of_one_model(losses), "forward + backward", column="BalancedSoftmaxLoss")
    assert (
        f"K tensors {launches['K tensors']} kernels, one model {one['launches']}, an `ExpertOutput` "
        f"{launches['ExpertOutput']}, sample weights {launches['sample weights']} and probabilities "
        f"{launches['probabilities']}"
    ) in BENCHMARKS


def test_every_loss_is_told(losses, row):
    first, *lost = report.balance(losses)
    said = re.search(r"\d+ wins, \d+ losses", first)[0].replace(",", " and")
    assert said in README
    for line in lost:
        assert any(kind in line for kind in ("probabilities", "sample weights", "one model"))
    assert {line.partition(", float32")[0].rpartition(", ")[2] for line in lost if "device time" in line} == {
        "one model"
    }

    def beside(shape, phase, column="LGLALoss", places=2):
        ours, plain = (row(shape, phase, column=name)["median_ms"] for name in (column, "plain loop"))
        return f"{ours:.{places}f}", f"{plain:.{places}f}"

    weights = beside(f"{SMALL}, sample weights", "forward + backward")
    shares = beside(f"{SMALL}, probabilities", "forward + backward")
    one = of_one_model(losses)
    called = beside(one, "forward + backward", "BalancedSoftmaxLoss")
    alone = beside(one, "device time", "BalancedSoftmaxLoss", places=3)
    assert f"with sample weights ({weights[0]} ms beside {weights[1]})" in BENCHMARKS
    assert f"with probabilities ({shares[0]} beside {shares[1]})" in BENCHMARKS
    assert f"({called[0]} ms beside {called[1]}, {alone[0]} beside {alone[1]} on the device)" in BENCHMARKS


def test_the_speed_of_the_experts_is_the_recorded_one():
    record = tables.read("expert_layouts_cuda")
    rate = {
        tuple(row["layout"].split(", channels_last")): row["images_per_second_quartiles"][1]
        for row in record["rows"]
        if "channels_last" in row["layout"]
    }
    graph = {layout: images for (layout, end), images in rate.items() if end}
    called = {layout: images for (layout, end), images in rate.items() if not end}
    together, alone = "grouped, together", "independent"
    assert max(graph, key=graph.get) == together
    assert max(called, key=called.get) == "hand-grouped"
    assert (
        f"From a CUDA graph that is the fastest of all: {graph[together]:,.0f} images a second beside "
        f"{graph[alone]:,.0f} of independent experts. Called step by step it is slower than they are "
        f"({called[together]:,.0f} beside {called[alone]:,.0f})"
    ) in BENCHMARKS
    assert f"{called['hand-grouped']:,.0f} images a second" in BENCHMARKS


def fastest_form(record):
    return re.search(r"\| `(.+?)` \| (.+?) \|", tables.forms(record)).groups()


def test_the_time_of_methods_trained_together_is_the_recorded_one():
    before, training = (tables.read(name) for name in ("stacked_forms_cuda", "stacked_training_cuda"))
    form, milliseconds = fastest_form(before)
    assert f"(`{form}`) were the fastest: {milliseconds} ms a step of all five" in BENCHMARKS
    form, milliseconds = fastest_form(training)
    assert form == training["form"] == "kernels"
    steps = 400 * training["steps_per_epoch"]
    minutes = steps * training["forms"][form]["milliseconds_per_step"] / 60_000
    assert (
        f"With {milliseconds} ms a step {training['epochs']} epochs of all five took {training['seconds']} "
        f"seconds. 400 epochs have {steps:,} steps, so they would take {minutes:.1f} minutes"
    ) in BENCHMARKS
    for record in (before, training):
        assert all(f"`{name}`" in tables.forms(record) for name in record["forms"])


def test_the_accuracies_of_the_gpus_training_are_the_recorded_ones():
    def said(method, split="balanced"):
        return records.mean(f"cifar10_gpu_{method}", split)

    def above(*methods, over, split="balanced"):
        gains = sorted(abs(said(method, split) - said(over, split)) for method in methods)
        return " to ".join(dict.fromkeys(f"{gain:.1f}" for gain in (gains[0], gains[-1])))

    adjusted = ("balms3", "cla", "lgla")
    assert (
        f"LGLA reaches {said('lgla'):.1f} %, {above('lgla', over='softmax')} points above three softmax "
        f"experts and {above('lgla', over='balms1')} above one balanced-softmax model. "
        f"- Three balanced-softmax experts reach {said('balms3'):.1f}, CLA {said('cla'):.1f}"
    ) in RESULTS
    assert (
        f"Three adjusted experts gain {above(*adjusted, over='balms1')} points over one "
        "balanced-softmax model"
    ) in RESULTS
    assert f"CLA is {above('cla', over='balms3')} above BALMS x3" in RESULTS
    assert f"AAW (LGLA over CLA) adds {above('lgla', over='cla')}" in RESULTS
    two = {"over": "balms3"}
    assert (
        f"LGLA and CLA give up {above('cla', 'lgla', split='many', **two)} points on the frequent "
        f"classes for {above('cla', 'lgla', split='medium', **two)} on the two"
    ) in RESULTS
    assert (
        f"LGLA reaches {said('lgla'):.1f} %, three balanced-softmax experts {said('balms3'):.1f}, one "
        f"balanced-softmax model {said('balms1'):.1f} and three softmax experts {said('softmax'):.1f}"
    ) in README


def test_the_gpus_training_is_told_as_it_was():
    training = tables.read("stacked_training_cuda")
    for method in training["methods"]:
        record = records.record(f"paper/cifar10_gpu_{method}")
        assert record["finished"]
        assert record["commit"] == training["commit"]
        assert record["configuration"]["epochs"] == training["epochs"] == 300
        assert record["together"] == training["methods"]
    assert f"trained together in {training['seconds'] / 60:.1f} minutes" in RESULTS


def test_the_tests_on_a_gpu_are_told_as_they_ended():
    record = tables.read("tests_cuda")
    assert sum(failure["cases"] for failure in record["failures"]) == record["failed"]
    assert f"{record['passed']:,} passed and {record['failed']} failed" in page("docs/install.md")
    shown = tables.tests(record)
    assert all(f"`{failure['test']}`" in shown for failure in record["failures"])
    for failure in record["failures"]:
        path, _, name = failure["test"].partition("::")
        (file,) = (ROOT / "tests").rglob(path.rpartition("/")[2])  # it may have moved since
        assert f"def {name}(" in file.read_text(encoding="utf-8")


def test_no_check_on_the_gpu_failed():
    record = tables.read("gpu_check_cuda")
    assert all(row["passed"] > row["failed"] == 0 for row in record["rows"])
    assert all(row["largest_error"] < row["bound"] for row in record["rows"] if "bound" in row)
    shown = tables.checks(record).splitlines()
    assert len(shown) == 2 + len(record["rows"])


def test_no_page_says_that_gpus_are_untested():
    old = (
        "nothing has been measured yet",
        "gpus are untested",
        "not run on a gpu yet",
        "no gpu ran",
        "not met one yet",
    )
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if "_build" not in path.parts:
            text = " ".join(path.read_text(encoding="utf-8").lower().split())
            assert [phrase for phrase in old if phrase in text] == [], path
