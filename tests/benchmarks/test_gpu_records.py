"""What README and docs say of a GPU is what the committed records of one say."""

import re
import statistics

import pytest
import records
import report
import tables
from peers import CLONE
from scripts import ROOT

NAMES = ["losses_cuda", "expert_layouts_cuda", "gpu_check_cuda", "tests_cuda", "stacked_forms_cuda"]
NAMES += ["stacked_training_cuda", "stacked_alone_cuda"]
LARGE, SMALL = "iNaturalist 4096 x 3 x 8142", "CIFAR 128 x 3 x 100"
LONG, ITEMS = "words 256 x 3 x 50000", "items 1024 x 3 x 100000, d = 512"
STEP, DEVICE, GRAPH = "forward + backward", report.DEVICE, report.GRAPH
OURS, LINEAR, PLAIN, COMPILED = "LGLALoss", "LinearLGLALoss", "plain loop", "plain loop, compiled"
TYPES = "float32", "bfloat16"


def page(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


BENCHMARKS, README = page("docs/benchmarks.md"), page("README.md")
RESULTS = f"{page('docs/results.md')} {page('docs/results-details.md')}"


def told(template, *values, where=BENCHMARKS):
    """Assert that a page has a sentence, with these numbers."""
    assert template.format(*values) in where, template.format(*values)


@pytest.fixture(scope="module")
def losses():
    return tables.read("losses_cuda")


@pytest.fixture
def row(losses):
    """The row of a way, size, phase and type."""

    def find(shape, phase, column=OURS, dtype="float32"):
        wanted = {"shape": shape, "phase": phase, "dtype": dtype, "column": column}
        (found,) = (row for row in losses["rows"] if all(row[key] == value for key, value in wanted.items()))
        return found

    return find


@pytest.fixture
def ms(row):
    """The device's milliseconds for several ways of a size, one after the other."""
    return lambda shape, dtype, *ways: [row(shape, DEVICE, way, dtype)["median_ms"] for way in ways]


def lost(losses, word):
    """The factors of the losses that the report names, in whose line a word stands."""
    return [float(line.rpartition(" x ")[2]) for line in report.balance(losses)[1:] if word in line]


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_where_and_of_what_it_was_made(name):
    record = tables.read(name)
    assert record["device"] == "NVIDIA H200"
    assert record["torch"].startswith("2.11")
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])


@pytest.mark.parametrize("text", [BENCHMARKS, README], ids=["benchmarks", "README"])
def test_many_classes_cost_what_is_recorded(row, text):
    steps = [row(LARGE, DEVICE, dtype=dtype) for dtype in TYPES]
    told(
        "take {:.2f} ms in float32 and {:.2f} ms in bfloat16: {:.1f} and {:.0f} times as fast as the plain "
        "loop, at {:.0f} % and {:.0f} % of the limit",
        *(step["median_ms"] for step in steps),
        *(1 / step["ratio_to_plain"] for step in steps),
        *(100 * step["share_of_limit"] for step in steps),
        where=text,
    )


def test_copies_and_50000_classes_cost_what_is_recorded(row, losses):
    told("({:.0f} GB/s)", losses["copy_gb_per_s"])
    copies = [row(LARGE, DEVICE, CLONE, dtype) for dtype in TYPES]
    told("fresh memory reaches {:.0f} % and {:.0f} %", *(100 * step["share_of_limit"] for step in copies))
    steps = [row(LONG, DEVICE, dtype=dtype) for dtype in TYPES]
    share = [100 * step["share_of_limit"] for step in steps]
    told("take {:.2f} and {:.2f} ms, {:.0f} % and {:.0f} %", *(step["median_ms"] for step in steps), *share)


def test_wins_and_losses_are_those_of_the_report(losses):
    summary = re.search(r"\d+ wins, \d+ losses", report.balance(losses)[0])[0].replace(",", " and")
    for text in (BENCHMARKS, README):
        told("{} against the fastest peer" if text == BENCHMARKS else "record has {}", summary, where=text)
    on_device = lost(losses, DEVICE)
    told("of which {} are the kernels'", len(on_device), where=README)
    assert all("one model" in line for line in report.balance(losses) if DEVICE in line)
    told("by factors of {:.2f} to {:.2f}", min(on_device), max(on_device))
    told("step by step, {} of them without gradients", len(lost(losses, ", forward:")))


def test_few_classes_cost_what_is_recorded(row, ms):
    ours, plain = (row(SMALL, GRAPH, way) for way in (OURS, PLAIN))
    empty = row(SMALL, GRAPH, f"{ours['launches']} empty kernels")["median_ms"]
    device = [1000 * time for time in ms(SMALL, "float32", OURS, PLAIN, COMPILED)]
    told(
        "a step is {} kernels, one of them PyTorch's own, and {:.1f} microseconds of the device, where the "
        "plain loop has {} and {:.1f}, and {:.1f} compiled.",
        *(ours["launches"], device[0], plain["launches"], device[1], device[2]),
    )
    times = 1000 * ours["median_ms"], ours["launches"], 1000 * empty, ours["median_ms"] / empty
    told("it takes {:.1f}, of which {} empty kernels alone take {:.1f}: a ratio of {:.2f}", *times)
    times = ours["median_ms"], plain["median_ms"]
    told("take {:.3f} ms from a CUDA graph, where the plain loop takes {:.3f}", *times, where=README)


def test_every_input_costs_what_is_recorded(losses):
    graphs = [row for row in losses["rows"] if row["phase"] == GRAPH]
    empty = {(row["shape"], row["column"]): row["median_ms"] for row in graphs}
    found = {
        report.kind_of(row): (
            row["launches"],
            row["median_ms"] / empty[row["shape"], f"{row['launches']} empty kernels"],
        )
        for row in graphs
        if row["ours"]
    }
    models = [found[f"one model: {kind}"] for kind in ("balanced softmax", "focal", "class-balanced")]
    told("one model {} ({:.2f} to {:.2f}), with LDAM", models[0][0], *sorted(r for _, r in models)[::2])
    names = ("sample weights", "ExpertOutput", "K tensors", "probabilities")
    told(
        "sample weights take {} kernels ({:.2f}), an `ExpertOutput` {} ({:.2f}), K tensors {} ({:.2f}), "
        "probabilities {} ({:.2f})",
        *(number for name in names for number in found[name]),
    )
    told("with LDAM {} ({:.2f})", *found["one model: LDAM"])


def test_the_linear_loss_costs_what_is_recorded(row, ms):
    told(
        "{:.2f} ms of the device, where the compiled plain loop takes {:.2f} and cut-cross-entropy {:.2f}",
        *ms(ITEMS, "bfloat16", LINEAR, COMPILED, "cut-cross-entropy"),
    )
    ours, plain = (row(ITEMS, STEP, way, "bfloat16") for way in (LINEAR, COMPILED))
    told("compiled plain loop, {:.2f} ms beside {:.2f}", ours["median_ms"], plain["median_ms"])
    samples, experts, classes, width = 1024, 3, 100_000, 512
    gradients, chunk = 2 * experts * width * (samples + classes), 2 * samples * classes
    told(
        "is {:.0f} MB beyond the inputs; gradients and one chunk of logits are {:.0f}",
        *(ours["peak_mb"], (gradients + chunk) / 1e6),
    )


def test_the_hosts_time_is_what_is_recorded(losses, row):
    train = [row for row in losses["rows"] if row["phase"] == STEP]
    steps = [row for row in train if row["column"] == OURS]
    for text in (BENCHMARKS, README):
        told("about {:.1f} ms", statistics.median(row["median_ms"] for row in steps), where=text)
    assert [row["shape"] for row in steps if row["ratio_to_plain"] > 1] == [f"{SMALL}, probabilities"]
    models = [step for step in train if step["ours"] and "one model" in step["shape"]]
    factors = [step["median_ms"] / row(step["shape"], STEP, PLAIN)["median_ms"] for step in models]
    kernels = [row(step["shape"], DEVICE, step["column"])["ratio_to_plain"] for step in models]
    told(
        "slower, by {:.2f} to {:.2f}, while its kernels take {:.2f} to {:.2f} of the plain loop's time",
        *(min(factors), max(factors), min(kernels), max(kernels)),
    )


def test_compiled_columns_are_told_with_the_yardstick_of_their_process(losses, row):
    steps = [line for line in report.balance(losses) if f", {STEP}: {OURS} LOSES to {COMPILED}" in line]
    found = {}
    for line in steps:
        shape, dtype = re.match(r"(.*), (float32|bfloat16), ", line).groups()
        ours, compiled = (row(shape, STEP, way, dtype)["ratio_to_plain"] for way in (OURS, COMPILED))
        found[shape, dtype] = factor = float(line.rpartition(" x ")[2])
        assert factor == pytest.approx(ours / compiled, abs=0.005)
    thousand = SMALL.replace("CIFAR 128 x 3 x 100", "ImageNet-LT 256 x 3 x 1000")
    cells = [(LARGE, "bfloat16"), *((shape, dtype) for shape in (SMALL, thousand) for dtype in TYPES)]
    assert found.keys() == {*cells}
    told(
        "loop by {:.2f} at 4096 x 3 x 8142 in bfloat16; in float32 and bfloat16 by {:.2f} and {:.2f} at "
        "128 x 3 x 100, and by {:.2f} and {:.2f} at 256 x 3 x 1000.",
        *(found[cell] for cell in cells),
    )
    assert all("256 x 3 x 1000" in problem for problem in losses["problems"])


def test_the_choices_cost_what_is_recorded(row, ms):
    half, plan = "bfloat16", f"{OURS}, plan "
    wide = [time for dtype in TYPES for time in ms(LARGE, dtype, OURS, f"{plan}resident")]
    told("{:.3f} beside {:.3f} in float32; {:.3f} beside {:.3f} in bfloat16", *wide)
    single, double = (ms(LONG, dtype, f"{plan}swept-1", f"{plan}swept-2", OURS) for dtype in TYPES)
    told("{:.3f} and {:.3f} beside {:.3f} at 50,000 classes in float32", *single)
    told("in float32; {:.3f} and {:.3f} beside {:.3f} in bfloat16", *double)
    passes = row(LONG, STEP, report.FLOOR)["median_ms"] / 2
    told("passes over memory, {:.2f}, not three, {:.2f} | {:.3f}:", 2 * passes, 3 * passes, single[2])
    scaled = f"{OURS}, scaled, gradient in backward", f"{OURS}, scaled"
    told("{:.3f} instead of {:.3f} at 4096 x 3 x 8142 in float32", *ms(LARGE, "float32", *scaled))
    told("in float32, {:.3f} instead of {:.3f} in bfloat16", *ms(LARGE, half, *scaled))
    told("{:.2f} instead of {:.2f} |", *ms(ITEMS, half, LINEAR, f"{LINEAR}, chunks of 32 MB"))
    told("{:.2f} instead of {:.2f} at an even C", *ms(ITEMS, half, LINEAR, f"{LINEAR}, rows end to end"))


def test_the_speed_of_the_experts_is_the_recorded_one():
    record = tables.read("expert_layouts_cuda")

    def rates(network, memory="channels_last"):
        """By layout: step by step, and from a CUDA graph."""
        rows = [row for row in record["rows"] if row["network"] == network]
        found = {row["layout"]: row["images_per_second_quartiles"][1] for row in rows}
        ends = f", {memory}", f", {memory}, CUDA graph"
        layouts = [name.removesuffix(ends[0]) for name in found if name.endswith(ends[0])]
        return [{layout: found[layout + end] for layout in layouts} for end in ends]

    together, alone, in_turn = "grouped, together", "independent", "grouped, one by one"
    called, graph = rates("ResNet-50")
    assert max(called, key=called.get) == max(graph, key=graph.get) == alone
    told(
        "independent experts: {:,.0f} images a second step by step and {:,.0f} from a CUDA graph. One by one "
        "takes little longer ({:,.0f} and {:,.0f}). Together is slower by far ({:,.0f} and {:,.0f})",
        *(rate[way] for way in (alone, in_turn, together) for rate in (called, graph)),
    )
    called, graph = rates("ResNet-50", "channels first")
    told(
        "({:,.0f} and {:,.0f} step by step, {:,.0f} and {:,.0f} from a CUDA graph)",
        *(rate[way] for rate in (called, graph) for way in (alone, in_turn)),
    )
    called, graph = rates("ResNet-32")
    assert max(called, key=called.get) == "hand-grouped"
    assert max(graph, key=graph.get) == together
    told(
        "{:,.0f} images a second beside {:,.0f} of independent experts and {:,.0f} one by one",
        *(graph[way] for way in (together, alone, in_turn)),
    )
    told(
        "Called step by step it is slower ({:,.0f} beside {:,.0f} and {:,.0f})",
        *(called[way] for way in (together, alone, in_turn)),
    )
    told("{:,.0f} images a second", called["hand-grouped"])


def fastest_form(record):
    return re.search(r"\| `(.+?)` \| (.+?) \|", tables.forms(record)).groups()


def test_the_time_of_methods_trained_together_is_the_recorded_one():
    before, training = (tables.read(name) for name in ("stacked_forms_cuda", "stacked_training_cuda"))
    told("(`{}`) were the fastest: {} ms a step of all five", *fastest_form(before))
    form, milliseconds = fastest_form(training)
    assert form == training["form"] == "kernels"
    seconds = training["seconds"]
    told(
        "With {} ms a step the {} epochs of all five took {} seconds, {:.1f} minutes",
        *(milliseconds, training["epochs"], seconds, seconds / 60),
    )
    alone = tables.read("stacked_alone_cuda")
    told(
        "alone, with tau = 2, took {} seconds for its {} epochs, {:.1f} minutes, at {} ms a step",
        *(alone["seconds"], alone["epochs"], alone["seconds"] / 60, fastest_form(alone)[1]),
    )
    for record in (before, training):
        assert all(f"`{name}`" in tables.forms(record) for name in record["forms"])


def test_the_accuracies_of_the_gpus_training_are_the_recorded_ones():
    def said(method, split="balanced"):
        return records.mean(f"cifar10_gpu_{method}", split)

    def above(*methods, over, split="balanced"):
        gains = sorted(abs(said(method, split) - said(over, split)) for method in methods)
        return " to ".join(dict.fromkeys(f"{gain:.1f}" for gain in (gains[0], gains[-1])))

    told(
        "LGLA reaches {:.1f} % with the authors' tau = 3, {} points above three softmax experts and {} above "
        "one balanced-softmax model; {:.1f} with tau = 2. - Three balanced-softmax experts reach {:.1f}, CLA "
        "{:.1f}",
        *(said("lgla"), above("lgla", over="softmax"), above("lgla", over="balms1")),
        *map(said, ("lgla2", "balms3", "cla")),
        where=RESULTS,
    )
    adjusted = above("balms3", "cla", "lgla", over="balms1")
    told("Three adjusted experts gain {} points over one balanced-softmax model", adjusted, where=RESULTS)
    told("CLA is {} above BALMS x3", above("cla", over="balms3"), where=RESULTS)
    told("AAW (LGLA over CLA) adds {}", above("lgla", over="cla"), where=RESULTS)
    told(
        "LGLA and CLA lose {} points on the frequent classes and gain {} on the two",
        *(above("cla", "lgla", over="balms3", split=split) for split in ("many", "medium")),
        where=RESULTS,
    )
    told(
        'With tau = 2 LGLA is {} points below tau = 3: {} on "medium", {} on "many"',
        *(above("lgla2", over="lgla", split=split) for split in ("balanced", "medium", "many")),
        where=RESULTS,
    )
    told(
        "LGLA reaches {:.1f} %, three balanced-softmax experts {:.1f}, one balanced-softmax model {:.1f} and "
        "three softmax experts {:.1f}",
        *map(said, ("lgla", "balms3", "balms1", "softmax")),
        where=README,
    )


def test_the_gpus_training_is_told_as_it_was():
    together, alone = (tables.read(f"stacked_{name}_cuda") for name in ("training", "alone"))
    for training in (together, alone):
        for method in training["methods"]:
            record = records.record(f"paper/cifar10_gpu_{method}")
            assert record["finished"]
            assert record["commit"] == training["commit"]
            assert record["configuration"]["epochs"] == training["epochs"] == 400
            assert record["together"] == training["methods"]
    told(
        "trained together in {:.1f} minutes, LGLA with tau = 2 (K - 1) alone in {:.1f}",
        *(training["seconds"] / 60 for training in (together, alone)),
        where=RESULTS,
    )


def test_the_tests_on_a_gpu_are_told_as_they_ended():
    record = tables.read("tests_cuda")
    assert sum(failure["cases"] for failure in record["failures"]) == record["failed"]
    assert tables.tests(record).startswith(f"{record['passed']:,} passed, {record['failed']} failed")
    told(
        "{:,} passed and {} failed; {} were not run (",
        *(record[key] for key in ("passed", "failed", "cut_off")),
        where=page("docs/install.md"),
    )


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
