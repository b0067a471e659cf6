"""``prefill="exact"``: tokens of a chunk see each other exactly, older ones as they are stored."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conftest import cached
from tests.vllm.conftest import agree, end, engine
from tests.vllm.test_equality import TOKENS, ask, prompts
from torchgsrq import Codebooks, GSRQConfig, new_cache, quantize_kv_

vllm = pytest.importorskip("vllm")
CHUNK = 96


@pytest.fixture(scope="module")
def quantized(model, folder):
    one = copy.deepcopy(model)
    books = Codebooks.load(folder / "books" / "by-head.safetensors")
    quantize_kv_(one, GSRQConfig(prefill="exact", **TOKENS), codebooks=books, progress=False)
    return one


def in_cuts(quantized, prompt: list[int], answer: list[int], chunk: int) -> torch.Tensor:
    """Log-probabilities of an answer, of a cache that read the prompt in the same chunks."""
    cache, ids, found = new_cache(quantized), torch.tensor([prompt + answer]), []
    cuts = [*range(0, len(prompt), chunk), *range(len(prompt), ids.shape[1])]
    with torch.no_grad():
        for first, last in zip(cuts, [*cuts[1:], ids.shape[1]], strict=True):
            found.append(quantized(ids[:, first:last], **cached(cache)).logits[0])
    logits = torch.cat(found)[len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def test_the_same_cuts_give_the_same_answers(quantized, folder):
    llm = engine(folder, "by-head", gsrq=TOKENS, max_num_batched_tokens=CHUNK, enable_prefix_caching=False)
    try:
        for text in prompts(5, 60, 96, 250, 333):
            (output,) = ask(llm, [text], new=40)  # alone, so that the cuts are known
            (one,) = output.outputs
            ours = torch.tensor([x[t].logprob for x, t in zip(one.logprobs, one.token_ids, strict=True)])
            theirs = in_cuts(quantized, text, list(one.token_ids), CHUNK)
            agree(ours, theirs)
    finally:
        end(llm)


def test_a_hit_goes_on_from_codes(folder):
    """What a hit brings has no window: close to what was said before, and deterministic."""
    llm = engine(folder, "by-head", gsrq=TOKENS, max_num_batched_tokens=512)
    try:
        (text,) = prompts(300)
        first, again, third = (ask(llm, [text], new=4)[0] for _ in range(3))
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, third.num_cached_tokens)
        assert again.num_cached_tokens >= 128
        assert again.outputs[0].token_ids == third.outputs[0].token_ids
        assert again.outputs[0].cumulative_logprob == pytest.approx(third.outputs[0].cumulative_logprob, abs=1e-4)
    finally:
        end(llm)


def test_a_model_that_does_not_ask_is_vllms_own(model, folder):
    llm = engine(folder, None)
    try:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert {type(x).__name__ for x in context.values()} == {"Attention"}
        assert {type(x.impl).__name__ for x in context.values()} == {"CPUAttentionBackendImpl"}
        outputs = ask(llm, prompts(5, 70))
        for output in outputs:
            ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0]
            n = len(output.prompt_token_ids)
            assert logits[n - 1 : -1].argmax(-1).tolist() == list(output.outputs[0].token_ids)
    finally:
        end(llm)


@pytest.mark.parametrize(
    "gsrq, options, said",
    [
        ({"codebooks": "nowhere.safetensors"}, {}, "there are no codebooks at nowhere.safetensors"),
        ({"bits": 1}, {}, "unknown keys: bits"),
        ({}, {"block_size": 48}, "--block-size 48: pages of codes hold a power of two"),
        ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is another quantization"),
    ],
)
def test_refusals_end_the_start(folder, gsrq, options, said):
    with pytest.raises(Exception, match=said):
        engine(folder, "uniform", gsrq=gsrq, **options)


def test_bfloat16(folder):
    llm = engine(folder, "by-head", gsrq=TOKENS, dtype="bfloat16", max_num_batched_tokens=64)
    try:
        outputs = ask(llm, prompts(10, 200, 90))
        assert all(len(x.outputs[0].token_ids) == 12 for x in outputs)
        assert all(x.outputs[0].cumulative_logprob > -100 for x in outputs)
    finally:
        end(llm)
