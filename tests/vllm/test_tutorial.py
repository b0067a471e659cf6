"""The tutorial on serving runs as it stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("matplotlib")


def test_serving_runs_and_draws_its_picture(tmp_path):
    shutil.copy(Path(__file__).parents[2] / "tutorials" / "8_serve.py", tmp_path)
    env = {**os.environ, "MPLBACKEND": "Agg"}
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # the tutorial says how large the cache is
    command = [sys.executable, "8_serve.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "codes, 1 bit:" in done.stdout and (tmp_path / "8_serve.png").exists()
