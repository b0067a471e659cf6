"""What can be asked for, and what a rate means for a head_dim."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchgsrq import GSRQConfig
from torchgsrq.codec.layout import Layout, key_layout, num_codes, rates, value_layout
from torchgsrq.config import BITS, encoded_tokens

HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bits", 3, "2, 1.5, 1, 0.75, 0.5, 0.375, 0.25"),
        ("key_bits", 0.3, "key_bits=0.3"),
        ("layout", "small", "quality, fast"),
        ("prefill", "fast", "exact, quantized"),
        ("recipe", "pq", "gsrq, gsrq-paper, kmeans, universal"),
        ("frame", 0, "at least 1"),
        ("sink_tokens", -1, "at least 0"),
        ("recent_tokens", 1.5, "integer"),
        ("block_tokens", 0, "at least 1"),
        ("beam", True, "integer"),
        ("skip_layers", ("a",), "layer indices"),
    ],
)
def test_bad_values_name_the_field_and_what_is_allowed(field, value, says):
    with pytest.raises(ValueError, match=f"{field}=") as error:
        GSRQConfig(**{field: value})
    assert says in str(error.value)


def test_config_is_frozen_and_rates_default_to_bits():
    config = GSRQConfig(bits=0.5, value_bits=1, skip_layers=[1, 2])
    assert (config.key_rate, config.value_rate, config.skip_layers) == (0.5, 1, (1, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 1  # type: ignore[misc]


def test_frames_follow_the_layout():
    assert [GSRQConfig(layout=x).key_frame for x in ("quality", "fast")] == [512, 1024]
    assert GSRQConfig(layout="fast", frame=64).key_frame == 64
    assert GSRQConfig(frame=512).codec_key() == GSRQConfig().codec_key()


def test_codec_key_follows_what_changes_the_codebooks_only():
    base = GSRQConfig()
    assert base.codec_key() == dataclasses.replace(base, recent_tokens=7, prefill="quantized").codec_key()
    for change in ({"bits": 0.5}, {"layout": "fast"}, {"frame": 64}, {"recipe": "kmeans"}, {"seed": 1}):
        assert base.codec_key() != dataclasses.replace(base, **change).codec_key()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("preset", ["quality", "fast"])
def test_layouts_cover_the_head_at_the_rate(head_dim, bits, preset):
    if bits not in rates(head_dim):
        with pytest.raises(ValueError, match=rf"bits={bits} is not offered for head_dim={head_dim}; choose one of 2"):
            key_layout(head_dim, bits, preset)
        return
    part = 1 if bits >= 1.5 or preset == "fast" else 0.75
    for layout, coded in ((key_layout(head_dim, bits, preset), part), (value_layout(head_dim, bits, preset), 1)):
        assert layout.bits == bits
        assert layout.groups * layout.width == layout.dims
        assert coded * head_dim <= layout.dims <= min(head_dim, coded * head_dim + 8 * layout.groups)
        assert sum(layout.groups_in(s) for s in range(layout.stages)) == layout.codes
        written = {layout.start(m) + i for m in range(layout.codes) for i in range(layout.width)}
        assert written == set(range(layout.dims))


def test_presets():
    assert key_layout(64, 1) == Layout(64, 1, 8, 48)
    assert key_layout(128, 1) == Layout(128, 2, 16, 96)
    assert value_layout(64, 1) == Layout(64, 1, 8)
    assert value_layout(128, 0.25) == Layout(128, 2, 4)
    assert key_layout(64, 1, "fast") == value_layout(64, 1, "fast") == Layout(64, 8, 8)
    assert key_layout(64, 2, "fast") == Layout(64, 8, 16)
    assert value_layout(64, 0.5, "fast") == Layout(64, 4, 4)
    assert value_layout(80, 0.5, "fast") == Layout(80, 5, 5)
    assert num_codes(96, 0.75) == 9


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match="groups=3 does not divide"):
        Layout(64, 3, 8)
    with pytest.raises(ValueError, match="without a code"):
        Layout(64, 8, 4)


@given(st.integers(0, 5000), st.integers(0, 300), st.integers(1, 64))
def test_the_window_holds_what_is_promised(length, recent, block):
    encoded = encoded_tokens(length, recent, block)
    assert encoded % block == 0 and 0 <= encoded <= max(length, 0)
    in_window = length - encoded
    assert in_window < recent + block
    assert in_window >= min(recent, length)
    assert encoded_tokens(length + 1, recent, block) >= encoded
