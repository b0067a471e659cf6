"""What can be asked for, and what a rate means for a head_dim."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchgsrq import GSRQConfig
from torchgsrq.codec.layout import Layout, num_codes, rates
from torchgsrq.config import BITS, encoded_tokens

pytestmark = pytest.mark.core

HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bits", 3, "2 bits and fewer"),
        ("bits", 0.2, "a number from 0.25 to 2"),
        ("bits", float("nan"), "a number from 0.25 to 2"),
        ("bits", True, "a number from 0.25 to 2"),
        ("group_size", 0, "at least 8"),
        ("group_size", 12, "a multiple of 8"),
        ("prefill", "fast", "exact, quantized"),
        ("recipe", "pq", "gsrq, gsrq-paper"),
        ("sink_tokens", -1, "at least 0"),
        ("recent_tokens", 1.5, "integer"),
        ("block_tokens", 0, "at least 1"),
        ("skip_layers", ("a",), "layer indices"),
    ],
)
def test_bad_values_name_the_field_and_what_is_allowed(field, value, says):
    with pytest.raises(ValueError, match=f"{field}=") as error:
        GSRQConfig(**{field: value})
    assert says in str(error.value)


def test_config_is_frozen_and_in_order():
    config = GSRQConfig(bits=0.5, skip_layers=[2, 1])
    assert config.skip_layers == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 1  # type: ignore[misc]


def test_any_number_of_bits_where_heads_have_their_own():
    assert GSRQConfig(bits=0.9).spreads_bits and GSRQConfig(bits=1.234).bits == 1.234
    for fields in ({"allocation": "uniform"}, {"recipe": "gsrq-paper", "group_size": 32}):
        with pytest.raises(
            ValueError, match=r"bits=0\.9 is not offered where all heads have the same; choose one of 2"
        ):
            GSRQConfig(bits=0.9, **fields)
    with pytest.raises(ValueError, match="group_size=8: the groups of recipe='gsrq-paper' are of 32 elements"):
        GSRQConfig(recipe="gsrq-paper")


def test_codec_key_follows_what_changes_the_codebooks_only():
    base = GSRQConfig()
    assert base.codec_key() == dataclasses.replace(base, recent_tokens=7, prefill="quantized").codec_key()
    for change in ({"bits": 0.5}, {"group_size": 16}, {"allocation": "uniform"}, {"skip_layers": (1,)}):
        assert base.codec_key() != dataclasses.replace(base, **change).codec_key()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 256])
def test_layouts_cover_the_head_at_the_rate(head_dim, bits, group_size):
    if bits not in rates(head_dim):
        with pytest.raises(ValueError, match=rf"bits={bits} is not offered for head_dim={head_dim}; choose one of 2"):
            Layout.of(head_dim, bits, group_size)
        return
    layout = Layout.of(head_dim, bits, group_size)
    assert layout.bits == bits and layout.groups * layout.width == head_dim and layout.width % 8 == 0
    assert layout.stages <= 8 or layout.width == 8
    assert layout.width <= group_size or layout.stages == 1 or layout.groups * 2 > layout.codes
    assert sum(layout.groups_in(s) for s in range(layout.stages)) == layout.codes
    written = {layout.start(m) + i for m in range(layout.codes) for i in range(layout.width)}
    assert written == set(range(head_dim))


def test_layouts_of_usual_heads():
    assert Layout.of(64, 1) == Layout(64, 8, 8)
    assert Layout.of(64, 2) == Layout(64, 8, 16)
    assert Layout.of(64, 0.5) == Layout(64, 4, 4)
    assert Layout.of(64, 0.375) == Layout(64, 2, 3)
    assert Layout.of(80, 0.5) == Layout(80, 5, 5)
    assert Layout.of(64, 1, 64) == Layout(64, 1, 8)
    assert Layout.of(128, 1, 64) == Layout(128, 2, 16)
    assert Layout.of(80, 1, 64) == Layout(80, 2, 10)
    assert Layout.of(64, 4, 64) == Layout(64, 4, 32)  # of no more than 8 stages
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
