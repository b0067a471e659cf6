"""Every tutorial runs as it stands, and draws its pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parent.parent / "tutorials"
SCRIPTS = [path for path in sorted(TUTORIALS.glob("*.py")) if path.name != "8_serve.py"]  # tests/vllm runs that


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the first learns codebooks, and the others find them."""
    return tmp_path_factory.mktemp("tutorials")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_tutorial_runs_and_draws_its_pictures(folder, script):
    pytest.importorskip("matplotlib")
    env = {**os.environ, "MPLBACKEND": "Agg"}
    env.pop("TRITON_INTERPRET", None)  # of conftest.py; a reader's shell has none
    shutil.copy(script, folder)
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn, wanted = ({path.name for path in where.glob(f"{script.name[:2]}*.png")} for where in (folder, TUTORIALS))
    assert drawn == wanted != set()
