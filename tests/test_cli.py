"""What commands draw."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
import torch

from tests.conftest import SMALL
from torchgsrq import new_cache
from torchgsrq.cli.common import bar
from torchgsrq.cli.measure import bytes_at
from torchgsrq.measure.evaluate import quantized


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bars_are_as_long_as_what_they_stand_for(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for share, columns in ((0, 0), (0.5, 20), (1, 40), (7, 40)):
        drawn = bar(share, 40)
        assert len(drawn) == max(1, columns), "a little is seen of nothing too"
        drawn.encode(encoding)
    lengths = [len(bar(i / 400, 40)) for i in range(401)]
    assert lengths == sorted(lengths) and lengths[-1] == 40


@torch.no_grad()
def test_bytes_at_another_context_are_those_of_a_cache(llama):
    model, books = llama
    rows = {}
    with quantized(model, SMALL, books):
        for context in (512, 4096):
            cache = new_cache(model, context)
            for layer in cache.quantized_layers:
                layer.update(*torch.zeros(2, 1, 2, context, 32))
            memory = cache.memory()
            rows[context] = {**dataclasses.asdict(memory), "context": context, "slots": context}
            assert str(memory).splitlines()[0].startswith(f"codes       {memory.codes / 2**20:9.2f} MiB")
            total = memory.total
    assert bytes_at(rows[512], 4096) == total


def test_every_command_says_what_it_does():
    from typer.testing import CliRunner

    from torchgsrq.cli import app

    said = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    for command in ("demo", "calibrate", "evaluate", "memory", "recommend"):
        assert command in said
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    assert max(map(len, said.splitlines())) <= 80
