"""Codebooks in a folder with a model card, and on a hub (a stand-in: there is none here)."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from tests.conftest import SMALL
from torchgsrq import Codebooks, dequantize_kv_, quantize_kv_

pytestmark = pytest.mark.core


def test_a_folder_has_the_codebooks_and_a_card(llama, tmp_path):
    model, books = llama
    books = Codebooks(books.layers, books.metadata)
    books.metadata["measured"] = {
        "text": "t.txt",
        "tokens": 9,
        "kl": 0.5,
        "kl_low": 0,
        "kl_high": 1,
        "ppl": 2,
        "ppl_full": 1,
    }
    books.metadata["name"] = "user/model"
    folder = tmp_path / "deep" / "folder"
    books.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "codebooks.safetensors"]
    assert Codebooks.from_pretrained(folder).digest == Codebooks.load(folder).digest == books.digest
    card = (folder / "README.md").read_text()
    for said in (
        "base_model: user/model",
        "LlamaForCausalLM",
        "KL divergence 0.5000",
        "of t.txt",
        books.describe(),
    ):
        assert said in card, said
    quantize_kv_(model, SMALL, codebooks=folder)
    assert model._gsrq.codebooks.digest == books.digest
    dequantize_kv_(model)


def test_what_is_pushed_is_had_again(llama, tmp_path, monkeypatch):
    _, books = llama
    asked = []

    class Api:
        def __init__(self, token=None):
            asked.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"{repo_id}: {commit_message}"

    def download(repo_id, filename, revision, token):
        asked.append(revision)
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert books.push_to_hub("books", private=True, token="t", commit_message="new") == "me/books: new"
    assert Codebooks.from_pretrained("me/books", revision="v1").digest == books.digest
    assert asked == ["t", "v1"]


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    for read in (Codebooks.from_pretrained, Codebooks.load):
        with pytest.raises(FileNotFoundError, match=r"has no codebooks\.safetensors"):
            read(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such", "three/part/name"):
        with pytest.raises(FileNotFoundError, match=f"'{name}' is not a folder here"):
            Codebooks.from_pretrained(name)
    (tmp_path / "codebooks.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="damaged"):
        Codebooks.from_pretrained(tmp_path)
    assert torch.is_grad_enabled()
