"""What users install: the wheel holds the package alone, and works without the checkout."""

import subprocess
import sys
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
    packaged = {Path(name).name for name in names if name.startswith("lgla_losses/")}
    assert packaged == {p.name for p in (ROOT / "lgla_losses").iterdir() if p.suffix in (".py", ".typed")}
    assert "py.typed" in packaged
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lgla_losses"}
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = (tmp_path / "site" / metadata).read_text()
    required = [
        line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.6", "Requires-Dist: numpy>=1.26"]
    code = "import lgla_losses; print(lgla_losses.__file__, lgla_losses.LGLALoss([3, 2, 1]))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.startswith(str(tmp_path / "site"))
