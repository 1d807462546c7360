"""The losses' benchmark: it runs, its records keep their contract, and all columns do equal work."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import choices
import expert_layouts
import kinds as inputs
import losses as benchmark
import measure
import peers as contestants
import pytest
import torch
from scripts import ROOT, load

from lgla_losses import LGLALoss

RECORDS = sorted((ROOT / "benchmarks" / "results").glob("losses_*.json"))


@pytest.fixture(scope="module")
def peers():
    return load("benchmarks/peers.py")


@pytest.fixture(scope="module")
def report():
    return load("benchmarks/report.py")


@pytest.fixture(scope="module")
def tables():
    return load("benchmarks/tables.py")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "losses.json"
    result = run("--quick", "--out", str(path))
    assert result.returncode == 0, result.stderr
    return path, result


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "losses.py", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_the_quick_run_fulfils_the_contract(quick, report):
    path, result = quick
    record = json.loads(path.read_text())
    assert report.faults(record) == []
    columns = {row["column"] for row in record["rows"] if row["median_ms"] is not None}
    assert {"LGLALoss", "LinearLGLALoss", "plain loop", "plain loop, compiled", "paper's formula"} <= columns
    assert {"logits.clone()", "matrix products", "floor"} <= columns
    kinds = {row["shape"].partition(" x 20, ")[2] for row in record["rows"]}
    assert {*inputs.KINDS} <= kinds
    assert record["problems"] == record["left_out"] == []
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "against the fastest peer that computes the same loss" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= max(150, len(f"picture: {path}"))


def test_its_table_holds_its_figures(quick, report):
    path, _ = quick
    record = json.loads(path.read_text())
    printed = run("--table", str(path)).stdout
    tables = report.markdown(record)
    assert all(table in printed for table in tables.values())
    rows = [row for row in record["rows"] if row["column"] == "plain loop" and row["phase"] == "forward"]
    text = tables["logits: forward, ms (times plain loop)"]
    stacked = [row for row in rows if row["suite"] == "logits" and not report.kind_of(row)]
    assert all(f"{row['median_ms']:.3g} (1)" in text for row in stacked)


def test_a_table_of_times_has_a_row_a_way_and_a_column_a_size(report):
    like = {"suite": "logits", "phase": "forward", "ours": True, "equal": True, "ratio_to_plain": None}
    times = {("A", "float32"): (1.0, 2.0), ("B", "float32"): (4.0, None), ("A", "bfloat16"): (6.0, 5.0)}
    rows = [
        {**like, "shape": shape, "dtype": dtype, "column": way, "median_ms": time}
        for (shape, dtype), both in times.items()
        for way, time in zip(("ours", "other"), both, strict=True)
    ]
    table = report.markdown({"rows": rows})["logits: forward, ms (times plain loop)"]
    assert [line for line in table.splitlines() if "---" not in line] == [
        "| float32 | A | B |",
        "| ours | **1** | **4** |",
        "| other | 2 |  |",
        "",
        "| bfloat16 | A |",
        "| ours | 6 |",
        "| other | **5** |",
    ]


def test_a_table_sets_every_kind_of_input_beside_stacked_logits(quick, report):
    record = json.loads(quick[0].read_text())
    header, _, *lines = report.markdown(record)[
        "kinds of input: forward + backward, times the plain loop"
    ].splitlines()
    assert header == "| input | loss | 16 x 20 |"
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {kind}" for kind in ("stacked logits", *inputs.KINDS)
    ]
    (focal,) = (
        row for row in record["rows"] if (row["column"], row["phase"]) == ("FocalLoss", measure.TRAIN)
    )
    ratio, low, high = (focal[key] for key in ("ratio_to_plain", "ratio_q1", "ratio_q3"))
    cell = f"{ratio:.2f} ({low:.2f} to {high:.2f}), {focal['median_ms']:.3g} ms"
    assert f"| one model: focal | FocalLoss | {cell} |" in lines


def test_a_table_of_kinds_leaves_out_what_a_record_lacks(report):
    like = {"suite": "logits", "dtype": "float32", "phase": "forward", "column": "LGLALoss", "ours": True}
    like |= {"equal": True, "median_ms": 2.0, "ratio_to_plain": 0.5}
    rows = [
        {**like, "shape": "A 8 x 3 x 5"},
        {**like, "shape": "A 8 x 3 x 5", "dtype": "bfloat16", "ratio_to_plain": 9.0},
        {**like, "shape": "B 9 x 3 x 7"},
        {**like, "shape": "A 8 x 3 x 5, K tensors", "median_ms": None, "ratio_to_plain": None},
        {**like, "shape": "C 8 x 3 x 6, K tensors", "ratio_q1": 0.4, "ratio_q3": 0.6},
    ]
    table = report.markdown({"rows": rows})["kinds of input: forward, times the plain loop"]
    assert table.splitlines()[0] == "| input | loss | 8 x 5 | 8 x 6 |"
    assert table.splitlines()[2:] == [
        "| stacked logits | LGLALoss | 0.50, 2 ms |  |",
        "| K tensors | LGLALoss |  | 0.50 (0.40 to 0.60), 2 ms |",
    ]
    assert not any("kinds" in title for title in report.markdown({"rows": rows[:3]}))
    assert report.rows_to_draw({"rows": rows[3:], "kind": "cpu"}) == []


def test_a_page_of_a_record_tells_what_failed_and_what_is_missing(quick, report):
    record = json.loads(quick[0].read_text()) | {"problems": ["a way: failed"], "left_out": ["a size"]}
    text = report.page(record)
    assert "Failed:\n\n- a way: failed" in text
    assert "Not measured:\n\n- a size" in text
    assert all(table in text for table in report.markdown(record).values())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_fulfil_the_contract(path, report):
    assert report.faults(json.loads(path.read_text())) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"median_ms": "1"}, "median_ms is '1'"),
        ({"median_ms": None, "note": ""}, "no time and no note"),
        ({"q1_ms": 9e9}, "quartiles"),
        ({"phase": "backward"}, "phase 'backward'"),
        ({"extra": 1}, "unknown extra"),
        ({"peak_mb": float("nan")}, "not finite"),
        ({"repetitions": 1}, "repetitions"),
        ({"ratio_q1": 9e9}, "quartiles of the ratio"),
        ({"share_of_limit": 0.0}, "share_of_limit"),
    ],
)
def test_a_broken_record_is_told(quick, report, change, fault):
    record = json.loads(quick[0].read_text())
    record["rows"][0].update(change)
    assert any(fault in found for found in report.faults(record))


@pytest.mark.parametrize("quantity", ["ratio_to_plain", "median_ms"])
def test_a_loss_is_told_as_plainly_as_a_win(quantity, quick, report):
    """By the ratios to the plain loop; by the times where there is no plain loop."""
    record = json.loads(quick[0].read_text())
    cell = [
        row for row in record["rows"] if row["suite"] == "logits" and row["phase"] == "forward + backward"
    ]
    ours = next(row for row in cell if row["column"] == "LGLALoss")
    if quantity == "median_ms":
        for row in cell:
            row["ratio_to_plain"] = None
    ours[quantity] = 1e3 * max(row[quantity] for row in cell if row[quantity] is not None)
    assert any(line.startswith("tiny") and "LGLALoss LOSES to" in line for line in report.balance(record))
    ours[quantity] = 1e-9
    assert report.verdict(cell, ours).startswith("wins")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [None, 12])
def test_all_that_is_compared_by_time_is_the_same_loss(peers, features, dtype):
    shape = peers.Shape("test", 40, 3, 30, features)
    (batch,) = peers.make_batches(shape, dtype, "cpu")
    losses, gradients = {}, {}
    for column in peers.columns_for(shape, "cpu", compiler="eager"):
        if column.equal:
            step = column.make(shape, "cpu")
            step.train(batch)
            losses[column.name] = step.forward(batch)
            gradients[column.name] = [leaf.grad for leaf in batch.leaves]
            for leaf in batch.leaves:
                leaf.grad = None
    assert {"plain loop", "plain loop, compiled"} <= set(losses)
    assert len(losses) == 5 + (features is None)
    reference = losses.pop("plain loop"), gradients.pop("plain loop")
    for name, loss in losses.items():
        torch.testing.assert_close(loss.double(), reference[0].double(), rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(gradients[name], reference[1], rtol=1e-5, atol=1e-5, msg=name)


KINDS = inputs.shapes_of(contestants.Shape("test", 40, 3, 30))


def loss_and_gradients(step, batch):
    step.train(measure.without_gradients(batch))
    loss = None if step.forward is None else step.forward(batch)
    return loss, [leaf.grad for leaf in batch.leaves]


@pytest.mark.parametrize("shape", KINDS, ids=lambda shape: shape.kind)
def test_every_kind_of_input_has_a_plain_loop_of_the_same_loss(shape):
    (batch,) = inputs.make_batches(shape, torch.float64, "cpu")
    columns = inputs.columns_for(shape, "cpu", compiler="eager")
    found = {column.name: loss_and_gradients(column.make(shape, "cpu"), batch) for column in columns}
    expected = next(found[column.name] for column in columns if column.ours)
    for column in columns:
        loss, gradients = found[column.name]
        if column.equal:
            torch.testing.assert_close(gradients, expected[1], rtol=1e-5, atol=1e-6, msg=column.name)
        if column.equal and not column.compiled:
            torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0, msg=column.name)

    plain, compiled = found["plain loop"], found["plain loop, compiled"]
    assert compiled[0] is None
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-5, atol=1e-6)
    lacking = {column.name: column.note for column in columns if not column.equal}
    assert lacking == (
        dict.fromkeys(["plain loop", "plain loop, compiled"], "no AAW")
        if shape.kind == "probabilities"
        else {}
    )


def test_the_plain_loop_of_probabilities_lacks_the_hard_sample_weights_alone():
    (shape,) = (shape for shape in KINDS if shape.kind == "probabilities")
    (batch,) = inputs.make_batches(shape, torch.float64, "cpu")
    loss, gradients = loss_and_gradients(
        contestants.step_of(inputs.KINDS[shape.kind].plain.loss(shape, "cpu")), batch
    )
    criterion = LGLALoss(
        contestants.class_counts(shape), 3, contestants.TAU, scale=contestants.SCALE, aaw=False
    )
    (logits,), (probabilities,) = batch.leaves, batch.extras
    expected = criterion(logits, probabilities)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, [*torch.autograd.grad(expected, logits)], rtol=1e-5, atol=1e-6)


def test_kinds_of_input_are_the_same_in_every_run():
    for shape in KINDS:
        first, second = (inputs.make_batches(shape, torch.float32, "cpu", 2) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_cpu_measures_every_kind_at_the_sizes_of_the_targets():
    cells = [cell for job in benchmark.SUITES["cpu"] for cell in job.cells if cell.shape.kind]
    sizes = {(128, 100), (256, 1000), (256, 8142)}
    assert {(cell.shape.kind, cell.shape.samples, cell.shape.classes) for cell in cells} == {
        (kind, *size) for kind in inputs.KINDS for size in sizes
    }


def test_a_gpu_measures_aligned_rows_right_after_those_of_inaturalist(report):
    """By the default, its plans, the plain loop and a copy alone; a size without peers is no victory."""
    *large, aligned = benchmark.SUITES["cuda"][:3]
    assert [job.cells[0].shape for job in large] == [benchmark.LARGE] * 2
    (cell,) = aligned.cells
    assert cell.shape == benchmark.LARGE._replace(classes=8192)
    assert set(cell.dtypes) == {torch.float32, torch.bfloat16}
    columns = [column.name for column in benchmark._columns(cell, aligned.part, "cuda", "inductor")]
    plans = [f"LGLALoss, plan {plan}" for plan in choices.other_plans(8192)]
    assert columns == ["LGLALoss", *plans, contestants.PLAIN, contestants.CLONE]

    like = {"suite": "logits", "dtype": "float32", "phase": "device time", "equal": True}
    for shape, summary in ((benchmark.LARGE, "1 wins, 0 losses"), (cell.shape, "0 wins, 0 losses")):
        ours = like | {"shape": shape.label, "column": "LGLALoss", "ours": True, "median_ms": 1.0}
        plain = ours | {"column": contestants.PLAIN, "ours": False, "median_ms": 2.0, "ratio_to_plain": 1.0}
        rows = [ours | {"ratio_to_plain": 0.5}, plain]
        record = {"kind": "cuda", "rows": rows}
        assert report.balance(record)[0].endswith(summary)
        assert report.rows_to_draw(record) == (rows if shape == benchmark.LARGE else [])


class _Event:
    """Of a GPU that does everything at once."""

    def __init__(self, enable_timing=False):
        self.is_timed, self.time = enable_timing, None

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        if not (self.is_timed and other.is_timed) or None in (self.time, other.time):
            raise RuntimeError("both events must be recorded, with timing enabled")
        return 1e3 * (other.time - self.time)


class _Graph:
    """Records nothing."""

    is_recorded = False

    def replay(self):
        if not self.is_recorded:
            raise RuntimeError("called replay without a preceding successful capture")


@contextlib.contextmanager
def _recording(graph, *, capture_error_mode):
    yield
    graph.is_recorded = True


def is_missing(*arguments):
    raise contestants.MissingError("not installed")


@pytest.fixture
def stand_in_gpu(monkeypatch):
    """What the benchmark asks of a GPU, of a CPU, so that these lines run where there is none.

    As strict as a GPU. Gives the indices of the devices that were set.
    """
    stream = SimpleNamespace(wait_stream=lambda other: None)
    devices_set = []

    def set_device(device):
        devices_set.append(torch.cuda._utils._get_device_index(device))  # PyTorch's own check

    stand_in = {
        "set_device": set_device,
        "get_device_name": lambda device: "a stand-in",
        "Event": _Event,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=10_000),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 10,
        "max_memory_allocated": lambda: 30,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda other: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": _recording,
    }
    for name, value in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(contestants, "on_gpu", lambda device: True)
    monkeypatch.setattr(contestants, "liger", is_missing)
    monkeypatch.setattr(measure, "launches", lambda step, batch: 4)
    return devices_set


def job_on_stand_in(tmp_path, part, *cells):
    setting = benchmark.Setting("cpu", benchmark.QUICK_EFFORT, "eager", 1e9)
    found = benchmark.Found({}, [], [])
    path = tmp_path / "rows.json"
    job = benchmark.Job(cells, part)
    ready = benchmark.prepare(job, setting.device, setting.compiler, found.problems)
    benchmark.measure_job(job, ready, setting, found, lambda: found.save(path))
    assert json.loads(path.read_text())["rows"] == found.rows
    return found


@pytest.fixture
def tiny():
    return benchmark.Cell(contestants.Shape("tiny", 16, 3, 20), (torch.float32,), launches=True)


def test_a_gpu_has_device_times_shares_of_the_limit_and_graphs_beside_empty_kernels(
    stand_in_gpu, tmp_path, tiny, report
):
    found = job_on_stand_in(tmp_path, "uncompiled columns", tiny)
    rows = {(row["column"], row["phase"]): row for row in found.rows}
    assert found.problems == []
    ours = rows["LGLALoss", "device time"]
    assert ours["share_of_limit"] == pytest.approx(7.68e-3 / ours["median_ms"], rel=1e-2)
    assert ours["peak_mb"] is None
    assert rows["LGLALoss", "forward + backward"]["peak_mb"] == 2e-5
    assert (
        rows["LGLALoss", "forward + backward"]["launches"] == rows["LGLALoss", "CUDA graph"]["launches"] == 4
    )
    assert rows["4 empty kernels", "CUDA graph"]["repetitions"] == 2
    assert rows["liger-kernel", "forward + backward"]["note"].endswith("not installed")
    tables = report.markdown({"rows": found.rows})
    assert "%" in tables["logits: share of the limit, device time"]
    assert "4 empty kernels" in tables["logits: CUDA graph, ms (times plain loop)"]
    whole = benchmark._empty_record(SimpleNamespace(device="cuda")) | {"rows": found.rows}
    assert report.faults(whole) == []
    assert report.terminal_table(whole).row_count == len({row["column"] for row in found.rows})


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_process_measures_on_the_gpu_that_is_named(
    stand_in_gpu, monkeypatch, tmp_path, tiny, device, index
):
    measured = []
    monkeypatch.setattr(benchmark, "prepare", lambda *_: [])
    monkeypatch.setattr(
        benchmark, "measure_job", lambda job, ready, setting, *_: measured.append(setting.device)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("1e12\n"))
    options = SimpleNamespace(device=device, quick=False, rows=tmp_path / "rows.json")
    assert benchmark.work(benchmark.Job([tiny], "uncompiled columns"), options) == 0
    assert (measured, stand_in_gpu) == ([device], [index])


def test_a_plain_loop_that_does_less_is_the_yardstick_and_no_rival(stand_in_gpu, tmp_path, report):
    (shape,) = (shape for shape in KINDS if shape.kind == "probabilities")
    cell = benchmark.Cell(shape, (torch.float32,), launches=True)
    found = job_on_stand_in(tmp_path, "uncompiled columns", cell)
    rows = {(row["column"], row["phase"]): row for row in found.rows}
    for phase in ("forward + backward", "CUDA graph"):
        assert not rows["plain loop", phase]["equal"]
        assert rows["plain loop", phase]["ratio_to_plain"] == 1
    assert rows["plain loop with AAW", "forward + backward"]["equal"]
    assert "plain loop with AAW" in report.verdict(found.rows, rows["LGLALoss", "forward"])


def test_compiled_columns_are_measured_beside_the_plain_loop_that_is_there_already(
    stand_in_gpu, tmp_path, tiny
):
    rows = job_on_stand_in(tmp_path, "compiled columns", tiny).rows
    assert {row["column"] for row in rows} == {"LGLALoss, compiled", "plain loop, compiled"}
    assert all(row["ratio_to_plain"] > 0 for row in rows)


def breaks(*arguments):
    raise RuntimeError("no such kernel")


def test_what_fails_is_a_row_with_a_note_and_leaves_the_others_alone(
    stand_in_gpu, tmp_path, tiny, monkeypatch, capsys
):
    monkeypatch.setattr(contestants, "lgla", breaks)
    monkeypatch.setattr(measure, "recorded", breaks)
    found = job_on_stand_in(tmp_path, "uncompiled columns", tiny)
    rows = {row["column"]: row for row in found.rows if row["phase"] == "forward + backward"}
    assert rows["LGLALoss"]["median_ms"] is None
    assert rows["LGLALoss"]["note"] == "failed: RuntimeError: no such kernel"
    assert rows["plain loop"]["median_ms"] > 0
    assert any("LGLALoss: failed" in problem for problem in found.problems)
    assert any("plain loop, launches and graph" in problem for problem in found.problems)
    assert "Traceback" in capsys.readouterr().err


def test_a_column_that_breaks_later_is_a_row_with_a_note_too(tiny):
    turns = iter([None] * 3)

    def train(batch):
        if next(turns, "end") == "end":
            raise RuntimeError("worn out")

    weak = contestants.Column("weak", lambda shape, device: contestants.Step(None, train))
    plain = contestants.columns_for(tiny.shape, "cpu", "eager")[2]
    batches = contestants.make_batches(tiny.shape, torch.float32, "cpu")
    found, steps = measure.warm_up([weak, plain], batches[0], tiny.shape, "cpu")
    measure.time_columns(found, steps, batches, "cpu", measure.Effort(0.0, 5, 5))
    assert found["weak"] == ({}, None, "failed: RuntimeError: worn out", True)
    assert list(steps) == [plain.name]
    assert len(found[plain.name].milliseconds["forward"]) == 5


@pytest.mark.slow
def test_a_run_that_is_ended_keeps_what_it_has(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, ROOT / "benchmarks" / "losses.py", "--quick", "--out", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("tiny 16 x 3 x 20")
        while not path.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    record = json.loads(path.read_text())
    assert "LGLALoss" in {row["column"] for row in record["rows"]}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_sizes_that_no_time_is_left_for_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.Workers, "run", lambda self, number, word, seconds: "")
    options = SimpleNamespace(device="cpu", quick=True, only=[""], seconds=0.0)
    record = benchmark.run(options, tmp_path / "record.json", benchmark.Console())
    assert record["left_out"] == [job.label for job in benchmark.QUICK[1:]]


@pytest.mark.slow
def test_a_process_that_crashes_or_takes_too_long_is_named(tmp_path, monkeypatch):
    ends = [[sys.executable, "-c", "import os; os.abort()"], ["sleep", "60"], ["true"]]
    monkeypatch.setattr(benchmark, "_command", lambda number, *others: ends[number])
    options = SimpleNamespace(device="cpu", quick=True, only=[""], seconds=4.0)
    monkeypatch.setattr(benchmark.statistics, "median", lambda values: 0.0)
    start = time.perf_counter()
    record = benchmark.run(options, tmp_path / "record.json", benchmark.Console())
    assert time.perf_counter() - start < 30
    assert record["problems"] == [f"{benchmark.QUICK[0].label}: ended with status -6"]
    assert record["left_out"][0] == f"{benchmark.QUICK[1].label}: cut off, as time was up"


def test_a_gpu_has_the_layouts_in_two_memory_formats_and_in_graphs(stand_in_gpu, tables):
    times = {}
    expert_layouts.measure_layouts(expert_layouts.TINY, 2, "cpu", float("inf"), times)
    ways = {"grouped, one by one", "grouped, together", "independent", "hand-grouped"}
    formats = {f"{way}, {memory}" for way in ways for memory in ("channels_last", "channels first")}
    assert set(times) == formats | {f"{way}, CUDA graph" for way in formats}
    rows = [{"network": "tiny", **found.row(name, 4)} for name, found in times.items()]
    assert all(row["images_per_second_quartiles"][1] > 0 for row in rows)
    assert all((row["peak_mib_median"] is None) == row["layout"].endswith("graph") for row in rows)
    assert len(tables.layouts({"rows": rows}).splitlines()) == 2 + 16


def test_a_layout_that_fails_is_a_row_with_a_note(monkeypatch, tmp_path, capsys, tables):
    monkeypatch.setattr(expert_layouts.GroupConvExperts, "to_independent", breaks)
    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["expert_layouts.py", "--quick", "--output", str(path)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert expert_layouts.main() == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    rows = {row["layout"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["independent"]["note"] == "failed: RuntimeError: no such kernel"
    assert rows["grouped, together"]["images_per_second_quartiles"][1] > 0
    assert "Traceback" in capsys.readouterr().err
    assert "no such kernel" in tables.layouts({"rows": list(rows.values())})


def test_layouts_that_no_time_is_left_for_are_rows_with_a_note():
    times = {}
    expert_layouts.measure_layouts(expert_layouts.TINY, 9, "cpu", 0.0, times)
    assert {found.row("", 4)["note"] for found in times.values()} == {"not measured, as time was up"}


def test_wrong_arguments_end_before_any_measuring():
    result = run("--device", "meta")
    assert result.returncode == 2
    assert "expected cpu or cuda" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks: expected an integer from 1 to 2 ** 31, got 0"),
        (["--samples", "-1"], "--samples: expected an integer from 1 to 2 ** 31, got -1"),
        (["--classes", "1" + 400 * "0"], "--classes: expected an integer from 1 to 2 ** 31, got 1000"),
        (
            ["--output", "no/such/record.json"],
            "--output: expected a file in a folder that exists, got no/such",
        ),
        (["--output", "/dev/full"], "--output: expected a file in a folder that exists, got /dev/full"),
    ],
)
def test_what_class_parallel_cannot_measure_or_write_is_refused_before(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("benchmarks/class_parallel.py").main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_class_parallel_ranks_share_memory_and_send_little(tmp_path):
    """In miniature; memory is not asserted, as little of it is the loss's here."""
    script, path = ROOT / "benchmarks" / "class_parallel.py", tmp_path / "record.json"
    options = ["--classes", "30000", "--samples", "8", "--features", "4", "--repeats", "1", "--ranks", "2"]
    command = [sys.executable, script, *options, "--output", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    assert [(row["loss"], row["ranks"]) for row in record["rows"]] == [
        ("LinearLGLALoss", 1),
        ("ClassParallelLGLALoss", 2),
    ]
    # Checks: a number a rank, two a sample, two a sample and expert. Angles by group, and weights;
    # two a sample and expert; the features' gradient.
    sent = 2 + 2 * 8 * (1 + 3) + 2 * (3 + 1) + 8 * 3 + 2 * 8 * 3 + 8 * 3 * 4
    assert [row["numbers_sent"] for row in record["rows"]] == [0, sent]


def test_class_parallel_ranks_divide_the_memory_and_send_little_in_the_record(tables):
    record = tables.read("class_parallel_cpu")
    ranks = [row for row in record["rows"] if row["ranks"] > 1]
    assert max(row["memory_times_ranks_over_single"] for row in ranks) < 1.2
    assert max(row["numbers_sent"] for row in ranks) < 60_000  # of 154 million logits


def test_the_table_of_the_layouts_has_every_row_of_the_record(tables):
    record = {
        "rows": [
            {
                "network": "A",
                "layout": "independent",
                "batch": 8,
                "images_per_second_quartiles": [1.04, 2.06, 3.0],
                "peak_mib_median": 512.4,
            }
        ]
        * 2
    }
    header, rule, *rows = tables.layouts(record).splitlines()
    assert rule == "| --- | --- | ---: | ---: | ---: |"
    assert rows == ["| A | independent | 8 | 2.1 (1.0 to 3.0) | 512 |"] * 2
    assert header.count("|") == rows[0].count("|")


def test_the_summary_of_the_kernels_has_the_worst_of_each_gpu_and_type(tables):
    def row(target, dtype, registers, spilled, shared):
        need = {"registers": registers, "spill_bytes": spilled, "shared_bytes": shared}
        return {"kernel": "_forward", "configuration": {"dtype": dtype}, "target": target, **need}

    rows = [
        row("sm_80", "float32", 10, 0, 7),
        row("sm_90", "float32", 40, 0, 0),
        row("sm_80", "float32", 30, 4, 5),
    ]
    assert tables.kernels({"rows": rows}).splitlines()[2:] == [
        "| sm_80 | float32 | 2 | 30 | 4 | 7 |",
        "| sm_90 | float32 | 1 | 40 | 0 | 0 |",
    ]


def test_the_machine_of_a_record_is_told_as_far_as_it_is_known(tables):
    record = {
        "device": "a CPU",
        "threads": 2,
        "torch": "2.13.0",
        "date": "2026-11-25T00:24:36",
        "commit": None,
    }
    assert tables.machine(record) == "a CPU, 2 threads, torch 2.13.0, 2026-11-25"
    assert tables.machine({"device": "a CPU", "cores": 4, "commit": "0123456789"}) == "a CPU, 4 cores"


def test_the_brief_table_marks_the_fastest_whosever_it_is(quick, tables):
    record = json.loads(quick[0].read_text())
    wanted = {"suite": "logits", "dtype": "float32", "phase": "forward + backward"}
    rows = [row for row in record["rows"] if all(row[key] == value for key, value in wanted.items())]
    for row in rows:
        row["peak_mb"] = 2.0
        row["median_ms"] = 1.0 if row["column"] == "plain loop" else 1.5
    first = tables.brief({"rows": rows}).splitlines()[2]
    assert first.split(" | ")[1:] == ["1.5", "1.5", "**1**", "1.5", "2", "2 |"]


@pytest.mark.parametrize("features", [None, 4])
def test_choices_that_are_measured_side_by_side_give_the_same(features):
    shape = contestants.Shape("some", 5, 3, 2500, features)
    columns = contestants.other_choices(shape)
    assert len(columns) == (2 if features is None else 3)
    autograd, linear = choices.autograd, choices.linear
    before = autograd._AT_ONCE, linear._ADD_AT_ONCE, linear._CHUNK_BYTES
    gradients = []
    for column in columns:
        (batch,) = contestants.make_batches(shape, torch.float32, "cpu")
        column.make(shape, "cpu").train(batch)
        gradients.append([leaf.grad for leaf in batch.leaves])
    torch.testing.assert_close(gradients[1:], gradients[:1] * (len(columns) - 1))
    assert before == (autograd._AT_ONCE, linear._ADD_AT_ONCE, linear._CHUNK_BYTES)
