"""The house: import order; and what is installed works without the checkout, all modules and the kernels' sources."""

from __future__ import annotations

import ast
import graphlib
import os
import shutil
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
print(use_kernels() == (bool(kernels.compiler())))
print(torchgsrq.GSRQConfig(bits=1).bits)
"""


ORDER = (
    "config", "codec", "reference", "kernels", "lowering", "ops", "paged", "tensor", "models", "attention", "cache", "learning",
    "probe", "state", "api", "measure", "cli", "vllm",
)  # fmt: skip


def imports():
    """Module to the modules of the package that it imports when it is imported itself."""
    files = {
        **{("torchgsrq", *p.relative_to(ROOT / "torchgsrq").with_suffix("").parts): p for p in (ROOT / "torchgsrq").rglob("*.py")},
        **{("torchgsrq", "kernels", p.stem): p for p in (ROOT / "kernels").glob("*.py")},
    }  # fmt: skip
    names = {".".join(name) for name in files}
    found = {}
    for name, path in files.items():
        found[".".join(name)] = used = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                base = ".".join(name[: -node.level]) if node.level else ""
                module = ".".join(x for x in (base, node.module) if x)
                for alias in node.names:
                    one = f"{module}.{alias.name}"
                    used |= {x for x in (one, module, f"{one}.__init__", f"{module}.__init__") if x in names}
    return found


def test_nothing_imports_from_further_down():
    """Import order is reading order: docs/design/architecture.md."""
    seen = set()
    for module, used in imports().items():
        first = module.split(".")[1]
        if first.startswith("__"):
            continue
        seen.add(first)
        for other in used - {"torchgsrq.__init__"}:
            assert ORDER.index(other.split(".")[1]) <= ORDER.index(first), f"{module} imports {other}"
    assert seen == set(ORDER)


CORE = ("config", "codec", "reference", "kernels", "lowering", "ops", "paged", "tensor")


def test_the_core_imports_torch_alone():
    """What an engine builds on: no transformers, no tokenizers, no bars."""
    folders = [*(ROOT / "torchgsrq").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    names = {p: p.relative_to(ROOT).parts[0 if p.parent.name == "kernels" else 1].removesuffix(".py") for p in folders}
    allowed = {*sys.stdlib_module_names, "torch", "torchgsrq", "triton"}
    for path in (p for p, name in names.items() if name in CORE):
        for node in ast.parse(path.read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {m.split(".")[0] for m in modules} <= allowed, path
    assert set(CORE) <= set(names.values())


def test_folders_have_no_circles():
    graph = {m: {u for u in used if not u.endswith("__init__")} for m, used in imports().items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a circle


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


TEN_LINES = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from torchgsrq import GSRQConfig, new_cache, quantize_kv_

sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, max_position_embeddings=512, **sizes)).eval()
quantize_kv_(model, GSRQConfig(bits=1), progress=False)
out = model.generate(torch.arange(3, 303)[None] % 128, max_new_tokens=8, return_dict_in_generate=True)
print(type(out.cache).__name__, out.cache.memory().codes > 0)
"""


@pytest.mark.slow
def test_what_pip_installs_quantizes(tmp_path):
    """In an empty environment, with the newest versions that pyproject.toml allows; torch alone is that of
    constraints.txt, since others bring gigabytes for GPUs."""
    bare = ("*.egg-info", "build", "__pycache__", ".*")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(*bare))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", "torch"], check=True)
    subprocess.run([*pip, tmp_path / "tree"], check=True)
    env = {**os.environ, "TORCHGSRQ_CACHE": str(tmp_path / "cache"), "TORCHGSRQ_KERNELS": "0"}
    done = subprocess.run([python, "-c", TEN_LINES], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["GSRQCache", "True"]
