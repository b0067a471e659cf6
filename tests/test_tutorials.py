"""Every tutorial runs as it stands, and draws its pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parent.parent / "tutorials"


@pytest.mark.slow
def test_every_tutorial_runs_and_draws_its_pictures(tmp_path):
    """In one empty folder, in their order: the first learns codebooks, in which the others then find them."""
    pytest.importorskip("matplotlib")
    scripts = sorted(TUTORIALS.glob("*.py"))
    assert len(scripts) == 7
    env = {**os.environ, "MPLBACKEND": "Agg"}
    env.pop("TRITON_INTERPRET", None)  # of conftest.py; a reader's shell has none
    for script in scripts:
        shutil.copy(script, tmp_path)
        before, begin = set(tmp_path.glob("*.png")), time.perf_counter()
        command = [sys.executable, script.name]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        print(f"--- {script.name}, {time.perf_counter() - begin:.0f} s\n{done.stdout}")
        assert done.returncode == 0, done.stderr[-3000:]
        drawn = {path.name for path in set(tmp_path.glob("*.png")) - before}
        assert drawn == {path.name for path in TUTORIALS.glob(f"{script.name[:2]}*.png")} != set()
