"""What README and docs say of a GPU is what the committed records of one say."""

import re
import statistics

import pytest
import records
import report
import tables
from scripts import ROOT

NAMES = ["losses_cuda", "expert_layouts_cuda", "gpu_check_cuda", "tests_cuda", "stacked_forms_cuda"]
NAMES += ["stacked_training_cuda", "stacked_alone_cuda"]
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


def test_the_plans_of_the_kernels_cost_what_is_recorded(row):
    def steps(*plans, dtype="float32"):
        return [row(LARGE, "device time", dtype, f"LGLALoss, plan {plan}") for plan in plans]

    def said(steps):
        return [f"{step['median_ms']:.2f}" for step in steps]

    (first,), (ahead,) = steps("0.1"), steps("ahead")
    share = 100 * first["share_of_limit"]
    assert f"does not: {first['median_ms']:.2f} ms in float32, {share:.0f} % of the limit" in BENCHMARKS
    assert f"before it computes with the last: {ahead['median_ms']:.2f} ms" in BENCHMARKS
    lean = "lean", "lean-3", "lean-4", "lean-wide"
    single = sorted(said(steps(*lean)))
    assert f"In float32 they take {single[0]} to {single[-1]} ms" in BENCHMARKS
    half = steps(*lean, dtype="bfloat16")
    times, best = said(half), 100 * max(step["share_of_limit"] for step in half)
    assert f"{', '.join(times[:-1])} and {times[-1]} ms: up to {best:.0f} % of the limit" in BENCHMARKS
    at_once, later = (
        row(LARGE, "device time", column=f"LGLALoss, scaled{how}")["median_ms"]
        for how in ("", ", gradient in backward")
    )
    assert f"{later:.2f} ms instead of {at_once:.2f} where it is scaled" in BENCHMARKS


def test_few_classes_cost_what_is_recorded(row):
    ours, plain = (
        (row(SMALL, "device time", column=column), row(SMALL, "CUDA graph", column=column))
        for column in ("LGLALoss", "plain loop")
    )
    launches = [ours[1]["launches"], plain[1]["launches"]]
    empty = row(SMALL, "CUDA graph", column=f"{launches[0]} empty kernels")
    ratio = ours[1]["median_ms"] / empty["median_ms"]
    assert (
        f"a step is {launches[0]} kernels, one of them PyTorch's own, and {microseconds(ours[0])} "
        f"microseconds of the device, where the plain loop has {launches[1]} and {microseconds(plain[0])}. "
        f"From a CUDA graph it takes {microseconds(ours[1])}, of which {launches[0]} empty kernels alone "
        f"take {microseconds(empty)}: a ratio of {ratio:.2f}"
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
    assert len(steps) >= 6
    assert 0.95 < statistics.median(steps) < 1.2
    for text in (BENCHMARKS, README):
        assert "about 1 ms" in text


def test_the_launches_of_every_input_are_those_recorded(row):
    launches = [
        row(f"{SMALL}, {kind}", "forward + backward")["launches"] for kind in ("ExpertOutput", "K tensors")
    ]
    assert f"An `ExpertOutput` takes {launches[0]} kernels as well, K tensors {launches[1]};" in BENCHMARKS


def test_what_the_gpu_had_no_time_for_is_told(losses):
    lost = report.balance(losses)[1:]
    assert lost == []
    for kind in ("sample weights", "probabilities", "one model"):
        assert any(kind in size for size in losses["left_out"])
        assert kind in BENCHMARKS
        assert kind in README.casefold()


def test_the_speed_of_the_experts_is_the_recorded_one():
    def rates(network):
        """By layout, in channels_last: step by step, and from a CUDA graph."""
        rows = [row for row in tables.read("expert_layouts_cuda")["rows"] if row["network"] == network]
        found = {row["layout"]: row["images_per_second_quartiles"][1] for row in rows}
        ends = ", channels_last", ", channels_last, CUDA graph"
        layouts = [name.removesuffix(ends[0]) for name in found if name.endswith(ends[0])]
        return [{layout: found[layout + end] for layout in layouts} for end in ends]

    together, alone, in_turn = "grouped, together", "independent", "grouped, one by one"
    called, graph = rates("ResNet-50")
    assert max(called, key=called.get) == max(graph, key=graph.get) == alone
    assert (
        f"independent experts: {called[alone]:,.0f} images a second step by step and {graph[alone]:,.0f} "
        f"from a CUDA graph. One by one takes little longer ({called[in_turn]:,.0f} and "
        f"{graph[in_turn]:,.0f}). Together is slower by far ({called[together]:,.0f} and "
        f"{graph[together]:,.0f})"
    ) in BENCHMARKS
    called, graph = rates("ResNet-32")
    assert max(called, key=called.get) == "hand-grouped"
    assert max(graph, key=graph.get) == together
    assert (
        f"{graph[together]:,.0f} images a second beside {graph[alone]:,.0f} of independent experts and "
        f"{graph[in_turn]:,.0f} one by one"
    ) in BENCHMARKS
    assert (
        f"Called step by step it is slower ({called[together]:,.0f} beside {called[alone]:,.0f} and "
        f"{called[in_turn]:,.0f})"
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
    seconds, epochs = training["seconds"], training["epochs"]
    assert (
        f"With {milliseconds} ms a step the {epochs} epochs of all five took {seconds} seconds, "
        f"{seconds / 60:.1f} minutes"
    ) in BENCHMARKS
    alone = tables.read("stacked_alone_cuda")
    step = alone["forms"][alone["form"]]["milliseconds_per_step"]
    steps = 400 * alone["steps_per_epoch"]
    assert (
        f"alone was measured for {alone['epochs']} epochs: {step:.2f} ms a step, so that the {steps:,} "
        f"steps of 400 epochs would take {steps * step / 60_000:.1f} minutes"
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
        assert record["configuration"]["epochs"] == training["epochs"] == 400
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
        assert f"def {failure.get('now', name)}(" in file.read_text(encoding="utf-8")


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
