"""Compiled kernels: C++ for the CPU, built when they are first needed and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

log = logging.getLogger("torchgsrq")
_FOLDER = Path(__file__).parent
# The second of each pair is compiled together with the first: headers and templates cost more than half of the time.
UNITS = (("attention.cpp", "paged.cpp"), ("encode.cpp", "cluster.cpp"))
HEADERS = ("vector.h", "tiles.h", "tables.h", "call.h", "by_tables.h", "by_blocks.h", "exact.h")
FILES = (*UNITS[0], *UNITS[1], *HEADERS, "__init__.py")  # what a library is made from


_MACHINE = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def compiler() -> list[str]:
    """The command of the C++ compiler: that of ``$CXX`` (``"ccache g++"``), or the machine's; empty without one."""
    named = os.environ.get("CXX", "")
    asked = [named] if shutil.which(named) else shlex.split(named)
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    return asked or found[:1]


def capability(scalar: bool = False) -> str:
    """The vector instructions to compile for: those that torch uses on this CPU, or none for the scalar twin."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in _MACHINE and not scalar else "DEFAULT"


def flags(scalar: bool = False) -> list[str]:
    """Compiler flags: torch's own vector types for this CPU, or their scalar twin."""
    from torch.utils.cpp_extension import include_paths

    name = capability(scalar)
    return [
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wno-psabi",
        *([] if sys.platform == "darwin" else ["-fopenmp"]),
        f"-DCPU_CAPABILITY={name}",
        f"-DCPU_CAPABILITY_{name}",
        *_MACHINE.get(name, []),
        *(f"-isystem{path}" for path in include_paths()),
        f"-I{sysconfig.get_path('include')}",
    ]


def build(output: Path, scalar: bool = False, extra: tuple[str, ...] = ()) -> None:
    """Compile the kernels to a shared library.

    Raises:
        RuntimeError: there is no compiler, or it failed; says what it printed.
    """
    program = compiler()
    if not program:
        raise RuntimeError("there is no C++ compiler (set CXX, or install g++ or clang++)")
    libraries = Path(torch.__file__).parent / "lib"
    partial = output.with_suffix(f".{os.getpid()}.partial")
    with tempfile.TemporaryDirectory(prefix="torchgsrq-") as folder:
        objects = [str(Path(folder, first).with_suffix(".o")) for first, _ in UNITS]
        compiling = [
            subprocess.Popen(
                [*program, *flags(scalar), *extra, f"-include{_FOLDER / first}", "-c", str(_FOLDER / second), "-o", to],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for (first, second), to in zip(UNITS, objects, strict=True)
        ]
        said = [process.communicate()[0] for process in compiling]
        for process, text in zip(compiling, said, strict=True):
            _check(program, process.returncode, text)
        command = [*program, *flags(scalar), *extra, *objects, "-o", str(partial), f"-L{libraries}"]
        command += [f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        _check(program, done.returncode, done.stderr)
    with open(partial, "ab") as file:  # a seal: loading half a library would kill the process
        file.write(hashlib.sha256(partial.read_bytes()).digest())
    os.replace(partial, output)  # other processes may be building it too


def _check(program: list[str], code: int, said: str) -> None:
    if code:
        raise RuntimeError(f"{shlex.join(program)} failed:\n{said[-4000:]}")


def is_whole(library: Path) -> bool:
    """Whether a library is as `build` left it."""
    if not library.exists():
        return False
    data = library.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def cpu_library() -> Path | None:
    """The shared library of the CPU kernels, built now if it is not on disk yet, or damaged there.

    Returns:
        Its path, or None where it cannot be built or ``TORCHGSRQ_KERNELS=0`` asks for the reference.
        ``TORCHGSRQ_KERNELS`` may also be the path of a library that `build` made.
    """
    asked = os.environ.get("TORCHGSRQ_KERNELS", "1")
    if asked != "1":
        return None if asked == "0" else Path(asked)
    try:
        facts = [torch.__version__, capability(), *((_FOLDER / name).read_text() for name in FILES)]
        name = f"kernels-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
        path, often = _kept(name)
        if not is_whole(path):
            if compiler():
                log.warning("torchgsrq: building the CPU kernels, %s; this takes about half a minute ...", often)
            build(path)
    except (RuntimeError, OSError, ValueError) as error:
        log.warning("torchgsrq: the CPU kernels cannot be built, so the slower reference runs: %s", error)
        return None
    return path


def load() -> bool:
    """Load the compiled kernels, building them first if necessary: the CPU implementations of the ops.

    Returns:
        Whether they run; a warning says why not, but where ``TORCHGSRQ_KERNELS=0`` asks for the reference.
    """
    library = cpu_library()
    if library is None:
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        log.warning("torchgsrq: the CPU kernels cannot be loaded, so the slower reference runs: %s", error)
        return False
    return True


def _kept(name: str) -> tuple[Path, str]:
    """Where a library is kept, and how often it is built: in the cache folder, or, where that cannot be written to, in
    one for this process alone, with a warning."""
    # Not above: where this folder is on the path, transformers imports it as it looks for the hub's package of that
    # name, and must not come back to itself through torchgsrq.
    from torchgsrq.config import cache_folder, temporary_folder

    try:
        path = cache_folder() / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        return path, "once"
    except OSError as error:
        return temporary_folder("torchgsrq: the CPU kernels", error) / name, "at every start"
