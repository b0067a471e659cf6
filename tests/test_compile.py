"""torch.compile: one graph, the same outputs and the same cache contents as eager, no copy of the cache."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from tests.conftest import SMALL, cached, make_codec, make_pair, tiny_books, tiny_llama
from torchgsrq import GSRQTensor, new_cache
from torchgsrq.measure.evaluate import quantized

CAPACITY = 96


class Decoder(nn.Module):
    """A decoder block in plain PyTorch over static KV buffers, which may be plain or quantized."""

    def __init__(self, repeat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(100, 32), nn.Linear(32, 100)
        self.q, self.kv, self.o = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.repeat = repeat

    def forward(self, ids, slots, keys, values):
        x = self.embed(ids)
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 16).transpose(1, 2)
        k, v = (t.view(b, n, 2, 16).transpose(1, 2) for t in self.kv(x).split(32, -1))
        keys.index_copy_(2, slots, k)
        values.index_copy_(2, slots, v)
        mask = torch.arange(keys.shape[2], device=ids.device) <= slots[:, None]
        if self.repeat:
            y = F.scaled_dot_product_attention(
                q, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), attn_mask=mask
            )
        else:
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return self.out(x + self.o(y.transpose(1, 2).reshape(b, n, 64)))


@torch.no_grad()
def generate(step, steps: int = 40):
    """Greedy logits from a prompt of 20, and the buffers."""
    key, value, _, _ = make_pair(2, 2, 16, CAPACITY)
    ids = torch.randint(0, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    slots, logits = torch.arange(20), []
    for i in range(steps):
        logits.append(step(ids, slots, key, value)[:, -1])
        ids, slots = logits[-1].argmax(-1, keepdim=True), torch.tensor([20 + i])
    return torch.stack(logits), key, value


@pytest.mark.core
@torch.no_grad()
def test_the_dequantized_twin_says_the_same():
    """Swapped for plain buffers that hold what the quantized ones decode to, every step's logits are the same."""
    model = Decoder()
    key, value, _, _ = make_pair(2, 2, 16, CAPACITY)
    ids, slots = torch.randint(0, 100, (2, 20)), torch.arange(20)
    for i in range(40):
        got = model(ids, slots, key, value)
        plain = [t.dequantize() for t in (key, value)]
        want = model(ids, slots, *plain)  # writes the same tokens again
        if i:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert torch.equal(got.argmax(-1), want.argmax(-1))
        ids, slots = got[:, -1:].argmax(-1), torch.tensor([20 + i])


@pytest.mark.core
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, repeat):
    model = Decoder(repeat)
    want, key, value = generate(model)
    counter = CompileCounterWithBackend(backend)
    got, key_2, value_2 = generate(torch.compile(model, fullgraph=True, backend=counter, dynamic=False))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in ((key, key_2), (value, value_2)):
        assert int(b.length) == 59 and int(b.encoded.max()) == 48
        assert all(map(torch.equal, a.codes, b.codes))
        torch.testing.assert_close(a.window, b.window)
    assert counter.frame_count == 2, "one graph for the prompt and one for every length after it"


@pytest.mark.core
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_symbolic_sizes(backend):
    """One graph for buffers and prompts of several sizes; also where torch prints the buffers into its trace
    (TORCH_TRACE, or whatever listens to all loggers)."""
    counter = CompileCounterWithBackend(backend)
    decoder, graphs = Decoder(), []
    step = torch.compile(decoder, fullgraph=True, backend=counter, dynamic=True)
    trace, listener = logging.getLogger("torch.__trace"), logging.NullHandler()
    trace.addHandler(listener)
    try:
        for batch, capacity, n in ((5, 96, 20), (3, 64, 30), (6, 128, 9)):  # equal sizes would be one symbol
            ids = torch.randint(0, 100, (batch, n), generator=torch.Generator().manual_seed(0))
            ours, theirs = (make_pair(batch, 2, 16, capacity)[:2] for _ in range(2))
            got, want = step(ids, torch.arange(n), *ours), decoder(ids, torch.arange(n), *theirs)
            graphs.append(counter.frame_count)
            torch.testing.assert_close(got, want)
            for a, b in zip(ours, theirs, strict=True):
                assert all(map(torch.equal, a.codes, b.codes)) and int(a.length) == int(b.length) == n
                torch.testing.assert_close(a.window, b.window)
    finally:
        trace.removeHandler(listener)
    assert len(set(graphs)) == 1


@pytest.mark.core
@pytest.mark.parametrize(("backend", "size"), [("aot_eager", 96), ("inductor", None)])
@torch.no_grad()
def test_a_new_cache_of_symbolic_sizes(backend, size):
    """One graph allocates the buffers and reads prompts of every size into them, one decodes; alone in a batch, where
    torch takes 1 for a constant, too."""
    model = tiny_llama(num_hidden_layers=1)
    books = tiny_books(model)
    with quantized(model, SMALL, books):
        counter = CompileCounterWithBackend(backend)
        step = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        graphs = []
        for batch, n in ((3, 50), (1, 40), (5, 45), (1, 30)):
            prompt = torch.randint(3, 100, (batch, n), generator=torch.Generator().manual_seed(n))
            ours, theirs = (new_cache(model, size) for _ in range(2))
            for i in range(8):
                ids = prompt[:, i : i + 1].contiguous() if i else prompt
                got, want = (f(ids, **cached(c)).logits for f, c in ((step, ours), (model, theirs)))
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            for a, b in zip(ours.layers, theirs.layers, strict=True):
                for x, y in ((a.keys, b.keys), (a.values, b.values)):
                    assert torch.equal(x.encoded, y.encoded) and int(x.length) == int(y.length) == n + 7
                    torch.testing.assert_close(x.dequantize(), y.dequantize(), rtol=1e-4, atol=1e-4)
            graphs.append(counter.frame_count)
        assert graphs[1] == graphs[-1], "sizes that come later need no graphs of their own"


@pytest.mark.core
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_makes_a_buffer(dynamic):
    codec = make_codec(2)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def make(x):
        return GSRQTensor.empty(x.shape[0], 2, 96, 16, codec=codec)

    for rows in (3, 1):
        made, want = make(torch.zeros(rows)), GSRQTensor.empty(rows, 2, 96, 16, codec=codec)
        assert made.integers == want.integers and made.shape == want.shape
        for a, b in zip(made.parts, want.parts, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.core
def test_no_copy_of_the_cache_in_the_generated_code():
    """Neither the codes nor the window are allocated, cloned or copied."""
    key, value, _, _ = make_pair(2, 2, 16, CAPACITY, length=20)
    step = torch.compile(Decoder(), fullgraph=True, dynamic=False)
    arguments = (torch.zeros(2, 1, dtype=torch.long), torch.tensor([20]), key, value)
    with torch.no_grad():
        _, code = run_and_get_code(step, *arguments)
    text = "\n".join(code)
    assert "torchgsrq.append_" in text and "torchgsrq.attention" in text
    for held in (key.codes_0, key.window):
        shape = re.escape(", ".join(map(str, held.shape)))
        assert not re.search(rf"empty_strided\w*\(\({shape}\)", text)
    assert "clone" not in text


@torch.no_grad()
def test_append_after_clone():
    """clone-then-mutate in one graph must not write through to the source."""
    key, _, _, _ = make_pair(1, 2, 16, 32, length=10)
    was = key.dequantize()
    x = torch.randn(1, 2, 1, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fork(buffer, x):
        other = buffer.clone()
        other.index_copy_(2, torch.tensor([10]), x)
        return other

    other = fork(key, x)
    assert torch.equal(key.dequantize(), was) and int(key.length) == 10
    assert int(other.length) == 11 and torch.equal(other.dequantize()[:, :, 10:11], x)


@torch.no_grad()
def test_reduce_overhead(llama):
    """The mode that captures CUDA graphs on a GPU takes the same graph on a CPU."""
    model, books = llama
    prompt = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    with quantized(model, SMALL, books):
        step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead", dynamic=False)
        caches = [new_cache(model, max_cache_len=64) for _ in range(2)]
        for cache in caches:
            model(prompt, **cached(cache), use_cache=True)
        for i in range(10):
            facts = {"position_ids": torch.full((2, 1), 20 + i), "use_cache": True}
            want, got = (
                f(prompt[:, i : i + 1].clone(), **cached(c), **facts).logits
                for f, c in zip((model, step), caches, strict=True)
            )
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for a, b in zip(*(c.layers for c in caches), strict=True):
            assert all(map(torch.equal, a.keys.codes + a.values.codes, b.keys.codes + b.values.codes))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_a_transformers_decode_step(llama, backend):
    """One graph for all lengths of a static cache, with eager's logits and eager's codes."""
    model, books = llama
    prompt = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    with quantized(model, SMALL, books):
        counter = CompileCounterWithBackend(backend)
        step = torch.compile(model.forward, fullgraph=True, backend=counter, dynamic=False)
        caches = [new_cache(model, max_cache_len=64) for _ in range(2)]
        for cache in caches:
            model(prompt, **cached(cache), use_cache=True)
        token = prompt[:, -1:].contiguous()  # as those to come: strides are part of a graph
        for i in range(16):
            position = torch.full((2, 1), 20 + i)
            want = model(token, position_ids=position, **cached(caches[0]), use_cache=True).logits
            got = step(token, position_ids=position, **cached(caches[1]), use_cache=True).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            token = want[:, -1:].argmax(-1)
        for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
            for x, y in zip(a.keys.codes, b.keys.codes, strict=True):
                assert (x == y).float().mean() > 0.99  # Inductor rounds otherwise than eager, now and then
            assert torch.equal(a.keys.encoded, b.keys.encoded)
            torch.testing.assert_close(a.keys.window, b.keys.window, rtol=1e-4, atol=1e-4)
            assert int(b.keys.length) == int(b.get_seq_length()) == 36
    assert counter.frame_count == 1


@torch.no_grad()
def test_compiled_models_generate(llama):
    """`torch.compile(model).generate`, static cache; graphs do not multiply over calls and lengths."""
    model, books = llama
    with quantized(model, SMALL, books):
        prompt = torch.randint(3, 100, (1, 20), generator=torch.Generator().manual_seed(2))
        arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
        want = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
        counter = CompileCounterWithBackend("aot_eager")
        forward = model.forward
        model.forward = torch.compile(forward, backend=counter, fullgraph=True)
        try:
            graphs = []
            for length in (20, 17, 11):
                ids = prompt[:, :length]
                got = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
                if length == 20:
                    assert torch.equal(got, want)
                graphs.append(counter.frame_count)
        finally:
            model.forward = forward
        assert graphs[2] == graphs[1] <= graphs[0] + 2
        assert torch.equal(
            torch.compile(model).generate(prompt, attention_mask=torch.ones_like(prompt), **arguments), want
        )


@torch.no_grad()
def test_a_plain_forward_is_one_graph(llama):
    """`torch.compile(model)(ids)`: the cache is made and filled inside the graph; lengths do not multiply graphs."""
    model, books = llama
    prompt = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    with quantized(model, SMALL, books):
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(model, fullgraph=True, backend=counter)
        out = step(prompt)
        torch.testing.assert_close(out.logits, model(prompt).logits, rtol=1e-4, atol=1e-4)
        cache, token = out.past_key_values, prompt[:, :1].contiguous()
        graphs = []
        for i in range(8):
            want = model(token, **cached(copy.deepcopy(cache))).logits
            torch.testing.assert_close(step(token, **cached(cache)).logits, want, rtol=1e-4, atol=1e-4)
            assert cache.get_seq_length() == 21 + i
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[2] <= 4


@torch.no_grad()
def test_a_static_cache_is_used_again(llama):
    """After reset(), a compiled prefill writes where rows begin into buffers that it also mutates."""
    model, books = llama
    prompt = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    with quantized(model, SMALL, books):
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        cache = new_cache(model, max_cache_len=64)
        for _ in range(2):
            got = step(prompt, **cached(cache), use_cache=True).logits
            torch.testing.assert_close(got, model(prompt).logits, rtol=1e-4, atol=1e-4)
            assert int(cache.get_seq_length()) == 20
            cache.reset()


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


@torch.no_grad()
def test_decode_fuses_with_its_consumer():
    """Inductor makes a gather, a product and a rotation of it; no op is called."""
    codec = make_codec(2)
    codes = torch.randint(0, 256, (1, 2, 40, codec.layout.codes), dtype=torch.uint8)
    position = torch.arange(40)[None]

    def consumer(codes, position):
        return torch.ops.torchgsrq.decode(codes, position, codec.tensors, codec.integers, torch.float32).relu().sum(-1)

    got, code = run_and_get_code(torch.compile(consumer, fullgraph=True), codes, position)
    torch.testing.assert_close(got, consumer(codes, position), rtol=1e-4, atol=1e-4)
    assert "ops.torchgsrq" not in "\n".join(code)


@torch.no_grad()
def test_encode_fuses_with_rope():
    """Rotating and changing to the codes' metric are Inductor's; the search stays one op."""
    codec = make_codec(2)
    x = torch.randn(2, 2, 33, 16, generator=torch.Generator().manual_seed(0))
    position = torch.arange(33).expand(2, -1)
    angle = torch.cat([position[..., None] * codec.inv_freq] * 2, -1)[:, None]

    def producer(x, position, cos, sin):
        return torch.ops.torchgsrq.encode(rope(x, cos, sin), position, codec.tensors, codec.integers)

    arguments = (x, position, angle.cos(), angle.sin())
    got, code = run_and_get_code(torch.compile(producer, fullgraph=True), *arguments)
    assert (got == producer(*arguments)).all(-1).float().mean() > 0.98  # near-ties
    text = "\n".join(code)
    assert "ops.torchgsrq.search" in text and "ops.torchgsrq.encode" not in text
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        torch.compile(producer, fullgraph=True)(*arguments)


class WithBuffers(nn.Module):
    """A decoder that owns its caches, as plain buffers: what AOTInductor takes."""

    def __init__(self, model, *caches):
        super().__init__()
        self.model = model
        self.layouts = [kv.integers for kv in caches]
        for i, kv in enumerate(caches):
            for j, part in enumerate(kv.parts):
                self.register_buffer(f"kv_{i}_{j}", part)
        self.parts = len(caches[0].parts)

    def forward(self, ids, slots):
        caches = [
            GSRQTensor([getattr(self, f"kv_{i}_{j}") for j in range(self.parts)], layout)
            for i, layout in enumerate(self.layouts)
        ]
        return self.model(ids, slots, *caches)


@torch.no_grad()
def test_export():
    """An exported decode step, which takes the buffers, appends to them and serves every length."""
    model = Decoder().eval()
    key, value, _, _ = make_pair(2, 2, 16, CAPACITY, length=20)
    caches, others = [key.clone(), value.clone()], [key.clone(), value.clone()]
    program = torch.export.export(model, (torch.zeros(2, 1, dtype=torch.long), torch.tensor([20]), key, value))
    for i in range(20):
        ids, slots = torch.full((2, 1), i), torch.tensor([20 + i])
        torch.testing.assert_close(program.module()(ids, slots, *caches), model(ids, slots, *others))
    for a, b in zip(caches, others, strict=True):
        assert all(map(torch.equal, a.codes, b.codes)) and int(a.length) == int(b.length) == 40


@pytest.mark.parametrize("repeat", [False, True])
@torch.no_grad()
def test_ahead_of_time_inductor(tmp_path, repeat):
    """A decode step compiled ahead of time keeps its quantized cache between calls, and says what eager says."""
    model = Decoder(repeat).eval()
    key, value, _, _ = make_pair(2, 2, 16, CAPACITY, length=20)
    caches = [key.clone(), value.clone()]
    program = torch.export.export(
        WithBuffers(model, key, value), (torch.zeros(2, 1, dtype=torch.long), torch.tensor([20]))
    )
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    step = torch._inductor.aoti_load_package(package)
    for i in range(20):
        ids, slots = torch.full((2, 1), i), torch.tensor([20 + i])
        torch.testing.assert_close(step(ids, slots), model(ids, slots, *caches), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_buffers_of_a_static_cache_are_static_inputs(llama):
    """CUDA graphs are captured only where what a graph mutates is known to stay at its address."""
    model, books = llama
    prompt = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    found = []

    def backend(graph, inputs):
        def compiler(inner, inner_inputs):
            context = torch._guards.TracingContext.try_get()
            found.append((len(inner_inputs), set(context.fw_metadata.static_input_indices)))
            return inner

        return torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler, inference_compiler=compiler)(
            graph, inputs
        )

    with quantized(model, SMALL, books):
        cache = new_cache(model, max_cache_len=64)
        model(prompt, **cached(cache), use_cache=True)
        cache.batch_select_indices(torch.tensor([1, 0]))
        step = torch.compile(model.forward, fullgraph=True, backend=backend, dynamic=False)
        step(prompt[:, :1].clone(), position_ids=torch.full((2, 1), 20), **cached(cache), use_cache=True)
    (inputs, static), parts = found[-1], 10
    assert inputs > len(static) >= 2 * 2 * parts  # keys and values of two layers


@torch.no_grad()
def test_layers_compiled_one_by_one():
    """One code object serves layers whose heads have rates of their own; with symbolic sizes none takes another's."""
    model = tiny_llama(num_key_value_heads=4, num_attention_heads=8, head_dim=16)
    for i, layer in enumerate(model.model.layers):  # the first head matters in one, the last in the other
        layer.self_attn.o_proj.weight[:, 96 * i : 96 * i + 32].mul_(8)
    books = tiny_books(model)
    assert len({tuple(heads for heads, _ in books[i].key.parts) for i in books}) > 1
    prompt = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    with quantized(model, SMALL, books), torch._dynamo.config.patch(recompile_limit=64):
        outputs = []
        for compiled in (False, True):
            if compiled:
                for layer in model.model.layers:
                    layer.compile(dynamic=True)
            for size in (64, None):
                cache = new_cache(model, size)
                steps = [prompt, *prompt[:, :12].split(1, 1)]
                outputs.append(torch.cat([model(ids, **cached(cache)).logits[:, -1] for ids in steps]))
        for want, got in zip(outputs[:2], outputs[2:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
