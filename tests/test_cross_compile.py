"""Every Triton kernel compiles for NVIDIA GPUs, fits the chip, and loads codewords as it should. Needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may take


@pytest.mark.slow
def test_kernels_fit_the_chip(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "cross_compile.py"
    command = [sys.executable, str(script), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {r["sm"] for r in rows} == {80, 90} and len(rows) > 100
    for r in rows:
        assert r["shared"] <= SHARED[r["sm"]], r
        assert r["async copies"] == 0, r  # they bypass the first-level cache, where codewords live
        # Bytes of a thread; most have none. Products of float32 take three of tf32, each with its operands.
        wide = 384 if r["kernel"] == "pages_kernel" else 256
        most = 440 if r["kernel"] == "encode_kernel" else wide if " fp32 " in r["configuration"] else 144
        assert r["spilled"] <= most, r
        attends = r["kernel"] in ("split_kernel", "pages_kernel")
        if re.fullmatch(r"(64|80|96|128) groups of 8 1 bf16 q1", r["configuration"]) and attends:
            assert 20 < r["per token"] <= 60, r  # instructions, which bound the speed: see roofline.py
        if attends or r["kernel"] in ("encode_kernel", "append_pages_kernel"):
            assert r["wide loads"] and r["mma"], r  # whole codewords at a time, products on tensor cores


@pytest.mark.slow
def test_the_gpu_benchmark_runs():
    """Its checks at tiny sizes in the interpreter, so that the script is ready where there is a GPU."""
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--smoke", "--section", "check"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows, table = done.stdout.split("| section |")
    assert rows.count("passed True") == table.count("passed True") == 3
