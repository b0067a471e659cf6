"""The OpenAI server answers on codes, streaming, and its processes end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

vllm = pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Its address; it and all that it started are gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Quantized prefill: the second request hits the first one's pages, and must answer the same.
    books = {"codebooks": str(folder / "books" / "by-head.safetensors")}
    asked = json.dumps({"gsrq": {**books, "recent_tokens": 24, "prefill": "quantized"}})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    command += ["--served-model-name", "tiny", "--enforce-eager", "--skip-tokenizer-init", "--additional-config", asked]
    path = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(path, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(180):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, path.read_text()[-3000:]
                time.sleep(1)
        yield address, path
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the group that it leads: SIGTERM to it alone would leave its workers
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def post(address: str, **body):
    data = json.dumps({"model": "tiny", "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def test_it_answers_and_streams(server):
    address, log = server
    asked = {"prompt": list(range(3, 90)) * 2, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    whole = json.load(post(address, **asked))
    assert whole["usage"]["completion_tokens"] == 8
    lines = [line.decode().removeprefix("data: ").strip() for line in post(address, **asked, stream=True)]
    parts = [json.loads(line) for line in lines if line and line != "[DONE]"]
    assert lines[-2:].count("[DONE]") == 1 and len(parts) >= 8
    streamed = [t for part in parts for c in part["choices"] for t in c.get("token_ids") or []]
    assert streamed == whole["choices"][0]["token_ids"]
    said = log.read_text()
    assert "torchgsrq: keys and values of 3 layers are codes of 1 bits" in said
