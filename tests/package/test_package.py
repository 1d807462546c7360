"""What users install: the wheel holds the package alone, and works without the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from scripts import ROOT


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_runs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    packaged = {Path(name) for name in names if name.startswith("lgla_losses/")}
    library = {path for path in packaged if path.suffix == ".so"}
    assert [path.name.split(".")[0] for path in library] == ["_native"]
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
    code = """
import lgla_losses
from lgla_losses.kernels import native
print(lgla_losses.__file__, lgla_losses.LGLALoss([3, 2, 1]), native.LIBRARY)
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.startswith(str(tmp_path / "site"))
    assert f"CDLL '{tmp_path / 'site'}" in result.stdout


@pytest.mark.slow
def test_it_installs_without_a_compiler(tmp_path):
    """From the source archive, as pip does it; the loss then runs in PyTorch."""
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path)]
    subprocess.run([*build, "--sdist", str(ROOT)], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    source = archive.with_name(archive.name.removesuffix(".tar.gz"))
    environment = {**os.environ, "CC": "no-such-compiler"}
    subprocess.run([*build, "--wheel", str(source)], check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert not any(name.endswith(".so") for name in files.namelist())
        files.extractall(tmp_path / "site")
    code = """
import torch
from lgla_losses import LGLALoss
from lgla_losses.kernels import native
logits = torch.zeros(2, 3, 3, requires_grad=True)
for backend in ("auto", "fused"):
    LGLALoss([3, 2, 1], backend=backend)(logits, torch.tensor([0, 2])).backward()
print(native.MISSING)
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "C compiler" in result.stdout
