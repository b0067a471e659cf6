"""Files of named tensors and texts: written atomically, with a checksum of their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

Held = tuple[dict[str, Tensor], dict[str, str]]  # tensors and texts by name


@dataclass(frozen=True)
class Format:
    """A kind of safetensors file.

    Attributes:
        name: the format's name in the file.
        version: the version that is written and read; others are refused.
        what: what such a file is called in messages.
        instead: what messages advise for a file of another version.
    """

    name: str
    version: int
    what: str
    instead: str

    def sealed(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> Held:
        """The content of a file: the tensors, and the texts with the format and a checksum of everything."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        facts = {"format": self.name, "version": str(self.version), **texts}
        return tensors, {**facts, "checksum": _checksum(tensors, texts)}

    def save(self, tensors: dict[str, Tensor], texts: dict[str, str], path: str | os.PathLike[str]) -> None:
        """Write a file atomically: a killed process leaves no partial file under its name.

        Raises:
            OSError: the file cannot be written: no such folder, no permission, a full disk.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        held, meta = self.sealed(tensors, texts)
        partial = f"{os.fspath(path)}.{os.getpid()}-{threading.get_ident()}.partial"
        try:
            save_file(held, partial, meta)
            os.replace(partial, path)
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)

    def read(self, source: str | bytes, name: str) -> Held:
        """Read the tensors and texts of a file, or of its bytes; ``name`` is for messages. The caller calls `check_sum`
        after its own checks, which give better messages for a file that is inconsistent.

        Raises:
            ValueError: a damaged file, or one of another format or version.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load

        try:
            if isinstance(source, bytes):
                tensors = load(source)
                header = json.loads(source[8 : 8 + int.from_bytes(source[:8], "little")])
                meta = header.get("__metadata__", {})
                self._check_format(meta, name)
            else:
                with safe_open(source, framework="pt") as file:
                    meta = file.metadata() or {}
                    self._check_format(meta, name)  # before reading tensors: those of a model may fill the memory
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a dict)
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged, not a whole {self.what}: {error}") from error
        return tensors, meta

    def _check_format(self, meta: dict[str, str], name: str) -> None:
        if meta.get("format") != self.name:
            raise ValueError(f"{name} is not a torchgsrq {self.what} (format={meta.get('format')!r})")
        if meta.get("version") != str(self.version):
            raise ValueError(
                f"{name} has format version {meta.get('version')}; this torchgsrq reads {self.version}: {self.instead}"
            )

    def check_sum(self, tensors: dict[str, Tensor], meta: dict[str, str], name: str) -> None:
        """Verify the checksum of the result of `read`.

        Raises:
            ValueError: the content differs from what was written.
        """
        texts = {key: text for key, text in meta.items() if key not in ("format", "version", "checksum")}
        if meta.get("checksum") != _checksum(tensors, texts):
            raise ValueError(f"{name} is damaged, not a whole {self.what}: its checksum is not that of what it holds")


def _checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    found = hashlib.sha256("\n".join(texts[name] for name in sorted(texts)).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}{x.dtype}{list(x.shape)}".encode())
        found.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
