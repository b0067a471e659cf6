"""What is installed works without the checkout: all modules, and the kernels' sources."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import torchgsrq, torch
from torchgsrq import kernels
from torchgsrq.ops import use_kernels
print(torchgsrq.__file__)
print(use_kernels() == (kernels.compiler() is not None))
print(torchgsrq.GSRQConfig(bits=1).bits)
"""


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_folder(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    offline = ["--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "wheel", *offline, "-w", tmp_path, str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("torchgsrq-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    held = {str(p.relative_to(ROOT)) for p in (ROOT / "torchgsrq").rglob("*.py")}
    held |= {f"torchgsrq/kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if p.suffix in (".py", ".cpp", ".h")}
    assert held | {"torchgsrq/py.typed"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels/")) for name in names)
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(site / "torchgsrq" / "__init__.py"), "True", "1"]
