"""Codebooks in a folder with a model card, and on the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torchgsrq.codec.codec import LayerCodec

FILE = "codebooks.safetensors"


def find(name: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> str:
    """The path of the codebook file of a folder, or of a hub repository, downloaded if necessary.

    Raises:
        FileNotFoundError: the folder has no such file; or the repository does not exist, has none, or is unreachable.
    """
    if os.path.isdir(name):
        path = Path(name) / FILE
        if not path.exists():
            raise FileNotFoundError(f"the folder {os.fspath(name)} has no {FILE}")
        return str(path)
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(os.fspath(name), FILE, revision=revision, token=token))
    except Exception as error:  # the network, the hub and its checks of names raise various types
        raise FileNotFoundError(
            f"{os.fspath(name)!r} is not a folder here, and no {FILE} was found in a repository of that name "
            f"({type(error).__name__}: {error})"
        ) from error


def push(save_pretrained: Any, repo_id: str, private: bool | None, token: str | None, message: str) -> str:
    """Upload the files that ``save_pretrained(folder)`` writes; returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def card(layers: dict[int, LayerCodec], metadata: dict[str, Any], bits: float, description: str) -> str:
    """A model card: the model of the codebooks, how they were learned, what was measured."""
    config, owner = metadata.get("config", {}), metadata.get("model") or {}
    base = metadata.get("name")
    head = ["---", "library_name: torchgsrq", *([f"base_model: {base}"] if base else []), "tags: [kv-cache]", "---"]
    facts = {
        "model": f"{base or 'of class'} ({owner.get('class', 'any')}, shape {owner.get('shape', 'any')})",
        "bits per element": f"{bits:.3g}",
        "group size, recipe": f"{config.get('group_size')}, {config.get('recipe')}",
        "learned from": f"{metadata.get('source')}, {metadata.get('tokens')} tokens",
        "size": f"{sum(c.nbytes() for layer in layers.values() for c in layer) / 2**20:.1f} MiB",
    }
    measured = metadata.get("measured")
    if measured:
        facts["measured"] = (
            f"KL divergence {measured['kl']:.4f} nats ({measured['kl_low']:.4f} to {measured['kl_high']:.4f}), "
            f"perplexity {measured['ppl']:.3f} (full precision {measured['ppl_full']:.3f}), on {measured['tokens']} "
            f"tokens of {measured['text']}"
        )
    use = [
        "```python",
        "from torchgsrq import Codebooks, quantize_kv_",
        "",
        'quantize_kv_(model, codebooks=Codebooks.from_pretrained("this repository"))',
        "```",
    ]
    rows = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    title = f"# Codebooks for the KV cache of {base or owner.get('class', 'any model')}"
    return "\n".join([*head, "", title, "", *rows, "", *use, "", "```text", description, "```", ""])
