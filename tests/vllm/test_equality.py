"""An engine says what `quantize_kv_` says: any lengths in a batch, any chunks, prefix hits, preemption, bits by head."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conftest import TINY
from tests.vllm.conftest import SIZES, agree, books_of, end, engine
from torchgsrq import Codebooks, GSRQConfig, quantize_kv_

vllm = pytest.importorskip("vllm")
TOKENS = {"sink_tokens": 4, "recent_tokens": 24, "block_tokens": 8}


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 100, (n,), generator=g).tolist() for n in lengths]


def ask(llm, texts, new: int = 12, **options):
    """What an engine answers: tokens after each prompt, and the log-probability of each."""
    sampling = vllm.SamplingParams(
        max_tokens=new, logprobs=0, detokenize=False, ignore_eos=True, **{"temperature": 0, **options}
    )
    found = llm.generate([{"prompt_token_ids": t} for t in texts], sampling, use_tqdm=False)
    return found


def likelihoods(quantized, output) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens of an output, by the engine and by transformers."""
    errors = []
    for one in output.outputs:
        ours = torch.tensor([x[t].logprob for x, t in zip(one.logprobs, one.token_ids, strict=True)])
        errors.append((ours, reference(quantized, list(output.prompt_token_ids), list(one.token_ids))))
    return torch.cat([a for a, _ in errors]), torch.cat([b for _, b in errors])


def reference(quantized, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = quantized(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def check(quantized, outputs) -> None:
    for output in outputs:
        agree(*likelihoods(quantized, output))


@pytest.fixture(scope="module", params=["uniform", "by-head"])
def quantized(request, model, folder):
    """The model in transformers, on the same codebooks, and which these are."""
    one = copy.deepcopy(model)
    books = Codebooks.load(folder / "books" / f"{request.param}.safetensors")
    quantize_kv_(one, GSRQConfig(prefill="quantized", **TOKENS), codebooks=books, progress=False)
    return one, request.param


@pytest.mark.parametrize("chunk", [16, 100, 512])
def test_mixed_lengths_in_any_chunks(quantized, folder, chunk):
    one, books = quantized
    llm = engine(
        folder,
        books,
        gsrq={"prefill": "quantized", **TOKENS},
        max_num_batched_tokens=chunk,
        enable_prefix_caching=False,
    )
    try:
        outputs = ask(llm, prompts(3, 30, 70, 200, 333))
        check(one, outputs)
        asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        for seed in (2, 3):
            (text,) = prompts(300, seed=seed)
            (found,) = llm.generate([{"prompt_token_ids": text}], asked, use_tqdm=False)
            ours = torch.tensor([x[t].logprob for x, t in zip(found.prompt_logprobs[1:], text[1:], strict=True)])
            agree(ours, reference(one, text[:1], text[1:]))
    finally:
        end(llm)


def test_prefix_hits_parallel_samples_and_aborts(quantized, folder):
    one, books = quantized
    llm = engine(folder, books, gsrq={"prefill": "quantized", **TOKENS}, max_num_batched_tokens=64)
    try:
        (text, other) = prompts(300, 90)
        check(one, ask(llm, [text]))
        again = ask(llm, [text, [*text[:280], *other]])
        assert [x.num_cached_tokens >= 128 for x in again] == [True, True]
        check(one, again)
        many = ask(llm, [text], n=2, temperature=1.0)
        assert len({tuple(x.token_ids) for x in many[0].outputs}) == 2
        check(one, many)
        sampling = vllm.SamplingParams(max_tokens=50, detokenize=False, ignore_eos=True)
        core = llm.llm_engine
        core.add_request("gone", {"prompt_token_ids": other}, sampling)
        core.step(), core.step()
        core.abort_request(["gone"])
        while core.has_unfinished_requests():
            core.step()
        check(one, ask(llm, [other, text]))
    finally:
        end(llm)


def test_preemption(quantized, folder):
    """A cache that cannot hold all requests at once: some are thrown out, and read again."""
    one, books = quantized
    llm = engine(
        folder,
        books,
        gsrq={"prefill": "quantized", **TOKENS},
        max_model_len=256,
        num_gpu_blocks_override=31,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    try:
        outputs = ask(llm, prompts(120, 110, 100, 115, 125, 90), new=100)
        check(one, outputs)
        counted = {x.name: getattr(x, "value", 0) for x in llm.get_metrics()}
        assert counted["vllm:num_preemptions"] > 0
    finally:
        end(llm)


@pytest.mark.parametrize("books", ["uniform", "by-head"])
def test_skipped_layers_keep_vllms_own_cache(model, folder, books):
    one = copy.deepcopy(model)
    config = GSRQConfig(prefill="quantized", skip_layers=(1,), **TOKENS)
    whole = Codebooks.load(folder / "books" / f"{books}.safetensors")
    rest = Codebooks({i: c for i, c in whole.layers.items() if i != 1}, whole.metadata)
    quantize_kv_(one, config, codebooks=rest, progress=False)
    llm = engine(folder, books, gsrq={"prefill": "quantized", "skip_layers": [1], **TOKENS}, max_num_batched_tokens=100)
    try:
        check(one, ask(llm, prompts(5, 200, 40)))
        check(one, ask(llm, prompts(5, 200, 40)))
    finally:
        end(llm)


def test_two_ranks(quantized, folder, monkeypatch):
    """Tensor parallelism: each rank has its heads, and pages of equal size."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    one, books = quantized
    llm = engine(
        folder,
        books,
        gsrq={"prefill": "quantized", **TOKENS},
        tensor_parallel_size=2,
        max_num_batched_tokens=100,
        enable_prefix_caching=False,
    )
    try:
        check(one, ask(llm, prompts(5, 200, 40)))
    finally:
        end(llm)


def test_sliding_layers_keep_vllms_own_cache(tmp_path):
    """Gemma 3: layers with a sliding window beside such with codes, also after a prefix hit."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {**TINY, **SIZES, "num_hidden_layers": 4}
    one = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=64, layer_types=kinds)).eval()
    one.save_pretrained(tmp_path)
    (tmp_path / "books").mkdir()
    books = books_of(one, GSRQConfig(bits=1))
    assert list(books) == [1, 3]
    books.save(tmp_path / "books" / "uniform.safetensors")
    quantize_kv_(one, GSRQConfig(prefill="quantized", **TOKENS), codebooks=books, progress=False)
    llm = engine(tmp_path, gsrq={"prefill": "quantized", **TOKENS}, max_num_batched_tokens=100)
    try:
        check(one, ask(llm, prompts(5, 200, 40)))
        again = ask(llm, prompts(5, 200, 40))
        assert again[1].num_cached_tokens >= 128
        check(one, again)
    finally:
        end(llm)
