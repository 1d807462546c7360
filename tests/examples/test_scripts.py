"""How every script of examples/ begins and refuses: cli.py and files.py."""

import os
import re
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import cli
import files
import pytest
import torch
from needed import needed_files
from scripts import ROOT

EXAMPLES = ROOT / "examples"
EXTRAS = {
    "quickstart": "examples",
    "distill": "examples",
    "sweep_tau": "examples",
    "train_images": "vision",
    "train_text": "text",
    "train_paper": "vision",
    "train_stacked": "vision",
    "train_ddp": "train",
    "train_class_parallel": "train",
    "train_lightning": "lightning",
    "train_hf_trainer": "text",
    "paper_results": "plot",
}
MADE_OF_NOTHING = ("make_data",)  # but of torch and numpy
#: Short ones, to be copied as they are.
ALONE = ("quickstart", "plain_loop", "train_lightning", "train_hf_trainer")

#: Nothing but torch, numpy and the library is installed.
CORE_INSTALL = """
from importlib.metadata import packages_distributions

CORE = {"torch", "numpy", "lgla-losses", "setuptools", "sympy", "networkx", "mpmath", "jinja2", "markupsafe"}
CORE |= {"typing_extensions", "filelock", "fsspec"}
EXTRA = {name for name, owners in packages_distributions().items() if not CORE & {o.lower() for o in owners}}
EXTRA -= {"torchgen", "functorch", "triton"}  # the last is looked for, not imported
"""
#: All is installed but the library.
NO_LIBRARY = """
import sys
sys.path.append("tests/helpers")
import torchvision_shim
EXTRA = {"lgla_losses"}
"""

#: Runs a script where the packages EXTRA are missing.
WITHOUT = """
import runpy, sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
del sys.argv[0]
sys.path.insert(0, "examples")
script, *arguments = sys.argv
for sys.argv in ([script, "--help"], [script, *arguments]):
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        print("exit code", stopped.code)
"""
IN_A_CORE_INSTALL, WITHOUT_THE_LIBRARY = CORE_INSTALL + WITHOUT, NO_LIBRARY + WITHOUT


def run(name, *arguments, code=None):
    script = [str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def one_fast(cases):
    """Mark all cases but the first as slow: each begins a Python and imports PyTorch."""
    first, *others = ([case] if isinstance(case, str) else case for case in cases)
    return [pytest.param(*first), *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


def test_all_scripts_are_tried_here():
    programs = {path.stem for path in EXAMPLES.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert programs == {*EXTRAS, *MADE_OF_NOTHING}


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_top_of_a_script_says_which_files_go_with_it(script):
    files = needed_files(script)
    top = script.read_text().partition('"""')[0].replace("\n# ", " ")
    assert top == (f"# Needs: {', '.join(files)}.\n" if files else "# Needs no other file.\n")


def test_the_shortest_scripts_can_be_copied_alone():
    assert [needed_files(EXAMPLES / f"{name}.py") for name in ALONE] == [[]] * len(ALONE)


def test_the_plain_loop_learns_the_rare_digits(tmp_path):
    """Copied to a folder of its own."""
    copy = tmp_path / "loop.py"
    copy.write_text((EXAMPLES / "plain_loop.py").read_text().replace("range(50)", "range(20)"))
    done = subprocess.run(
        [sys.executable, copy],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    every, rare = map(float, re.findall(r": (\S+) %", done.stdout.splitlines()[-1]))
    assert every > 75
    assert rare > 50
    assert re.findall(r"^ +9 +3 +\S+$", done.stdout, re.MULTILINE)


def extras_of_the_library():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def packages_of(extra):
    """The names of all packages that an extra installs."""
    packages = set()
    for entry in extras_of_the_library()[extra]:
        name, inner = re.match(r"([\w-]+)(?:\[(\w+)\])?", entry).groups()
        packages |= packages_of(inner) if inner else {name}
    return packages


@pytest.mark.parametrize(("name", "extra"), one_fast(EXTRAS.items()))
def test_a_core_install_shows_the_options_and_says_what_to_install(name, extra):
    takes_data = name in ("train_images", "train_text", "train_lightning", "train_hf_trainer")
    done = run(name, *["data"] * takes_data, code=IN_A_CORE_INSTALL)
    assert done.stdout.startswith(f"usage: {name}.py")
    assert re.findall("exit code (.*)", done.stdout) == ["0", "2"]
    (line,) = done.stderr.splitlines()
    (packages,) = re.fullmatch(rf"{name}.py: error: No module named .*: pip install (.*)", line).groups()
    assert {re.sub(r"'|>=.*", "", package) for package in packages.split()} == packages_of(extra)


def test_the_plain_loop_without_scikit_learn_says_what_to_install():
    done = run("plain_loop", code=IN_A_CORE_INSTALL)
    line = "exit code plain_loop.py: error: No module named 'sklearn': pip install scikit-learn"
    assert done.stdout.splitlines() == [line, line]
    assert not done.stderr


@pytest.mark.parametrize("name", one_fast(ALONE))
def test_a_copied_script_without_the_library_says_how_to_install_it(name):
    done = run(name, *["data"] * name.startswith("train"), code=WITHOUT_THE_LIBRARY)
    told = f"{name}.py: error: No module named 'lgla_losses': run `pip install .` in the clone of lgla-losses"
    if name == "plain_loop":  # it has no options
        assert done.stdout.splitlines() == [f"exit code {told}"] * 2
    else:
        assert re.findall("exit code (.*)", done.stdout) == ["0", "2"]
        assert done.stderr.splitlines() == [told]


def test_a_package_that_is_too_old_is_named(capsys, monkeypatch):
    """Whether its import fails, as that of a name which it lacks, or not."""
    old = types.ModuleType("timm")
    old.__version__ = "1.0.9"
    monkeypatch.setitem(sys.modules, "timm", old)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    told = "expected timm 1.0.20 or newer, got 1.0.9: pip install 'timm>=1.0.20'"
    for import_it in (lambda: None, lambda: cli.import_module("timm.nowhere")):
        with pytest.raises(SystemExit) as stopped, cli.needs("vision", cli.Parser, "__main__"):
            import_it()
        assert stopped.value.code == 2
        assert capsys.readouterr().err.endswith(f": error: {told}\n")
    with pytest.raises(cli.InputError, match=re.escape(told)):
        cli.library("timm", "vision")


@pytest.mark.parametrize(
    ("name", "package", "version", "oldest", "others"),
    [
        ("train_hf_trainer", "transformers", "4.57.1", "5", "accelerate torchmetrics tqdm rich tensorboard"),
        ("train_lightning", "lightning", "2.0.9.post0", "2.4", "torchmetrics tqdm rich tensorboard"),
    ],
)
def test_a_framework_that_is_too_old_is_named(tmp_path, name, package, version, oldest, others):
    shadow = tmp_path / package / "__init__.py"
    shadow.parent.mkdir()
    shadow.write_text(f"__version__ = {version!r}\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); del sys.argv[0]; import runpy\n"
    done = run(name, "data", code=code + "runpy.run_path(sys.argv[0], run_name='__main__')")
    assert done.returncode == 2
    told = f"expected {package} {oldest} or newer, got {version}: pip install '{package}>={oldest}' {others}"
    assert done.stderr.splitlines() == [f"{name}.py: error: {told}"]


def test_the_packages_are_those_of_the_extras():
    told = {extra: set(packages.split()) for extra, packages in cli.PACKAGES.items()}
    assert told == {extra: packages_of(extra) for extra in told}


def test_the_oldest_versions_are_those_of_the_extras():
    extras = extras_of_the_library()
    least = dict(
        entry.split(">=")
        for name in ("train", "metrics", "vision", "text")
        for entry in extras[name]
        if ">=" in entry
    )
    assert cli.OLDEST.items() <= least.items()


def test_the_digits_without_scikit_learn_say_what_to_install(tmp_path):
    done = run("make_data", "digits", tmp_path / "digits.npz", code=IN_A_CORE_INSTALL)
    assert re.findall("exit code (.*)", done.stdout) == ["0", "2"]
    assert done.stderr.endswith(f"pip install {cli.PACKAGES['examples']}\n")
    assert not list(tmp_path.iterdir())


def test_a_torchvision_of_another_torch_says_how_to_install_both(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped, cli.needs("vision", cli.Parser, "__main__"):
        raise RuntimeError("operator torchvision::nms does not exist")
    assert stopped.value.code == 2
    assert "--index-url https://download.pytorch.org/whl/cpu" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="nms"), cli.needs("vision", cli.Parser, "train_images"):
        raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (int, "1" + "0" * 400, r"expected a number below 2 \*\* 63, got 1000"),
        (int, "1" * 5000, "invalid int value: '1111"),
        (int, "-1" + "0" * 400, "expected a number from 1 to inf, got -1000"),
        (int, "1.5", "invalid int value: '1.5'"),
        (float, "1" + "0" * 400, "expected a number from 1 to inf, got 1000"),
        (float, "nan", "expected a number from 1 to inf, got nan"),
    ],
)
def test_numbers_of_hundreds_of_digits_are_refused_with_the_options_name(kind, text, message, capsys):
    parser = cli.Parser(prog="script.py")
    parser.add_argument("--batch-size", type=cli.number(kind, 1))
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([f"--batch-size={text}"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"script.py: error: argument --batch-size: {message}", line)
    assert len(line) < 120


def test_control_c_ends_a_script_by_a_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "sweep_tau.py", "--seeds", "1", "--output", tmp_path / "sweep.json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    read = ""
    while "it" not in read and process.poll() is None:
        read += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.endswith("stopped\n")
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


class TestOutput:
    """What could not be written after the work is refused before it, and leaves nothing."""

    def refused(self, path, message, folder=False):
        there = sorted(path.parent.glob("*")) if os.path.isdir(path.parent) else None
        with pytest.raises(cli.InputError, match=message):
            files.check_output("--output", path, folder=folder)
        assert there is None or sorted(path.parent.glob("*")) == there

    def test_a_place_that_can_be_written(self, tmp_path):
        (tmp_path / "old").write_text("old")
        (tmp_path / "link").symlink_to("old")
        for name in ("new", "old", "link"):
            files.check_output("--output", tmp_path / name)
        for name in (".", "new", "new/deep/er"):
            files.check_output("--log-dir", tmp_path / name, folder=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]
        assert (tmp_path / "old").read_text() == "old"

    def test_a_file_in_the_way_of_a_folder(self, tmp_path):
        (tmp_path / "file").touch()
        self.refused(
            tmp_path / "file", f"--output: expected a folder, got the file {tmp_path}/file", folder=True
        )
        self.refused(tmp_path / "file" / "a" / "b", "b cannot be written .Not a directory.", folder=True)
        self.refused(tmp_path / "file" / "b", f"--output: there is no folder {tmp_path}/file")

    def test_a_folder_pipe_or_device_as_a_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        self.refused(tmp_path / "pipe.png", "expected a file, got the pipe or device .*pipe.png")
        self.refused(tmp_path, "expected a file, got the folder")
        self.refused(Path("/dev/full"), "expected a file, got the pipe or device /dev/full")
        assert Path("/dev/full").is_char_device()

    def test_a_link_to_what_is_yet_to_be_written(self, tmp_path):
        (tmp_path / "link").symlink_to("new")
        files.check_output("--output", tmp_path / "link")
        files.write_whole(tmp_path / "link", lambda file: file.write(b"content"))
        assert (tmp_path / "new").read_text() == "content"

    def test_a_name_that_is_too_long(self, tmp_path):
        self.refused(tmp_path / ("x" * 300), "cannot be written .File name too long.")
        self.refused(tmp_path / ("x" * 300) / "y", "cannot be written .File name too long.", folder=True)

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
    def test_a_folder_in_which_nothing_can_be_made(self):
        self.refused(Path("/proc/a/b"), "/proc/a/b cannot be written", folder=True)


class TestWholeFiles:
    """A disk that is full: the limit of a process on the size of its files stands for it."""

    CODE = """
import resource, sys, torch
sys.path.insert(0, "examples")
import cli, files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
size = int(sys.argv[2])
save = lambda file: torch.save(torch.zeros(size), file) if sys.argv[3] == "torch" else file.write(bytes(size))
cli.start(lambda: files.write_whole(files.Path(sys.argv[1]), save))
"""

    @pytest.mark.parametrize("kind", ["torch", "bytes"])
    def test_a_full_disk_keeps_the_last_good_checkpoint_and_leaves_no_half(self, tmp_path, kind):
        path = tmp_path / "last.pt"
        path.write_text("good")
        command = [sys.executable, "-c", self.CODE, path, "100000", kind]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert f"{path}: cannot be written ([Errno 27] File too large); the earlier file is kept" in line
        assert path.read_text() == "good"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_link_goes_on_to_be_one(self, tmp_path):
        (tmp_path / "file").write_text("old")
        (tmp_path / "link").symlink_to("file")
        files.write_whole(tmp_path / "link", lambda file: file.write(b"new"))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == "new"

    def test_an_interrupt_leaves_no_half(self, tmp_path):
        def interrupted(file):
            file.write(b"half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            files.write_whole(tmp_path / "file", interrupted)
        assert not list(tmp_path.iterdir())


def test_what_is_no_file_of_tensors_is_refused_by_name(tmp_path):
    (tmp_path / "text.pt").write_text("These are no weights.\n")
    (tmp_path / "text.safetensors").write_text("These are no weights.\n")
    (tmp_path / "empty.pt").touch()
    torch.save(torch.zeros(1000), tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:2000])
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("text.pt", "text.safetensors", "empty.pt", "half.pt", "pipe.pt", "nowhere.pt", "."):
        with pytest.raises(cli.InputError, match="expected tensors of torch") as error:
            files.load_plain(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(error.value)
