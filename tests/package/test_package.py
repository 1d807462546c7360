"""What users install: ``make dist``, and what is in it works without the checkout."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from platform import machine

import pytest
from scripts import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("auditwheel"),
        reason="make dist needs auditwheel, of the extra release, on Linux",
    ),
]

ENGINE = (ROOT / "tests" / "helpers" / "engine.py").read_text()


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """What ``make dist`` builds, with the packages of the environment that the tests run in."""
    folder = tmp_path_factory.mktemp("dist")
    environment = Path(sys.prefix)
    run("make", "dist", f"DIST={folder}", f"VENV={environment}", "-o", environment / ".release", cwd=ROOT)
    return folder


@pytest.fixture
def source(dist, tmp_path):
    """The unpacked source archive."""
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


def installed(wheel, site):
    """The names in a wheel, and what says which engine it has."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return names, run(sys.executable, "-P", "-c", ENGINE, env={"PYTHONPATH": str(site)}, cwd=site)


def test_an_index_takes_what_is_built(dist):
    """A wheel for every system, one whose tag auditwheel grants, the source archive; no linux_x86_64."""
    names = sorted(path.name for path in dist.iterdir())
    stem = re.match(r"lgla_losses-[\d.]+\d", names[0])[0]
    archive, *wheels = sorted(name.removeprefix(stem) for name in names)
    assert archive == "-py3-none-any.whl"
    assert wheels[-1] == ".tar.gz"
    (linux,) = wheels[:-1]
    tags = linux.removeprefix("-py3-none-").removesuffix(".whl").split(".")
    shown = run(sys.executable, "-m", "auditwheel", "show", dist / f"{stem}{linux}")
    granted = re.search(r'following platform tag:\s+"(\w+)"', shown)[1]
    assert granted in tags
    assert granted.startswith("manylinux_")


@pytest.mark.skipif(machine() != "x86_64", reason="elsewhere an image of that old system builds the wheel")
def test_the_library_needs_the_c_library_of_an_old_system_and_the_openmp_of_pytorch(dist, tmp_path):
    """auditwheel counts versions alone: names without one, of a library not linked, get the oldest tag."""
    (wheel,) = dist.glob("*-py3-none-manylinux*.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("lgla_losses/kernels/_native.so", tmp_path)
    linked = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "--dynamic", library)))
    assert linked == {"libc.so.6", "libm.so.6"}
    symbols = run("readelf", "--wide", "--dyn-syms", library)
    names = re.findall(r"GLOBAL +DEFAULT +UND +(\S+)", symbols)
    versions = [tuple(map(int, version.split("."))) for version in re.findall(r"@GLIBC_([\d.]+)", symbols)]
    assert max(versions) <= (2, 17)
    assert {name for name in names if "@" not in name} == {
        "GOMP_parallel",
        "omp_get_num_threads",
        "omp_get_thread_num",
    }


def test_the_source_archive_holds_what_git_tracks(source):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a clone")
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    made = {name for name in files if name.startswith("lgla_losses.egg-info/")} | {"PKG-INFO"}
    assert files - made == set(run("git", "ls-files", cwd=ROOT).split()) - {".gitignore"}


@pytest.mark.parametrize("platform", ["any", "manylinux"])
def test_a_wheel_holds_the_package_alone_and_runs(platform, dist, tmp_path):
    (wheel,) = dist.glob(f"*-py3-none-{platform}*.whl")
    names, told = installed(wheel, tmp_path / "site")
    packaged = {Path(name) for name in names if name.startswith("lgla_losses/")}
    library = {path for path in packaged if path.suffix == ".so"}
    assert library == ({Path("lgla_losses/kernels/_native.so")} if platform == "manylinux" else set())
    for path in library:
        assert (tmp_path / "site" / path).stat().st_size < 600_000  # without debug information
    sources = (path for path in (ROOT / "lgla_losses").rglob("*") if path.suffix in (".py", ".typed"))
    assert packaged - library == {path.relative_to(ROOT) for path in sources}
    assert Path("lgla_losses/py.typed") in packaged
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lgla_losses"}
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = (tmp_path / "site" / metadata).read_text()
    required = [
        line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.6", "Requires-Dist: numpy>=1.26"]
    assert "Description-Content-Type: text/markdown" in text
    assert f"in {tmp_path / 'site'}" in told
    if library:
        assert told.endswith(": native\n")
    else:
        assert "PyTorch this installation has no C library" in told


def test_it_installs_without_a_compiler(source, tmp_path):
    """From the source archive, as pip does it; the loss then runs in PyTorch."""
    environment = {**os.environ, "CC": "no-such-compiler"}
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    names, told = installed(wheel, tmp_path / "site")
    assert not any(name.endswith(".so") for name in names)
    assert "PyTorch this installation has no C library" in told
    assert "C compiler" in told


def test_the_address_of_the_repository_makes_links_absolute(source):
    """It stands in one place."""
    project = source / "pyproject.toml"
    text = project.read_text()
    assert "[project.urls]" not in text or "Repository" in text
    address = "https://code.example/lgla"
    project.write_text(f'{text}\n[project.urls]\nRepository = "{address}"\n')
    run(sys.executable, "setup.py", "-q", "egg_info", cwd=source)
    information = (source / "lgla_losses.egg-info" / "PKG-INFO").read_text()
    assert f"Project-URL: Repository, {address}" in information
    assert f"({address}/blob/v" in information
    assert re.search(rf'[("]{address}/raw/v[\d.]+\d/docs/images/hero\.png', information)
    assert "](docs/" not in information


def test_tests_of_the_source_archive_pass_in_it(source):
    """Those of every folder that need no minute, and pages with figures from records."""
    chosen = [
        "tests/package/test_public_api.py",
        "tests/package/test_release.py",
        "tests/package/test_states.py",
        "tests/losses/test_equations.py",
        "tests/tools/test_counts.py",
        "tests/docs",
        "docs/install.md",
        "docs/guides/from-0-1.md",
        "CONTRIBUTING.md",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    collected = run(sys.executable, "-m", "pytest", "-q", "--collect-only", cwd=source, env=environment)
    assert re.search(r"\d{4,}/?\d* tests collected", collected), collected[-500:]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    told = run(*command, cwd=source, env=environment)
    assert re.search(r"\d{3,} passed", told)
