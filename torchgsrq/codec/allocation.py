"""How many bits each layer's keys and values are given, under one mean rate."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Unit = TypeVar("Unit", bound=Hashable)


def allocate(
    costs: Mapping[Unit, float], sizes: Mapping[Unit, int], offered: Mapping[Unit, Sequence[float]], bits: float
) -> dict[Unit, float]:
    """The rates of least total cost ``sum_i cost_i 4^-rate_i`` among those whose mean is at most ``bits``.

    A bit more quarters the squared error of a code, so what a step up saves falls with every step, and taking the step
    that saves most per bit again and again is best, but for the last steps, which have to fit.

    Args:
        costs: of an error at rate 0. sizes: elements, the weights of the mean. offered: rates of each, in any order.

    Raises:
        ValueError: even the lowest rates are more than ``bits``.
    """
    steps = {unit: sorted(offered[unit]) for unit in costs}
    rates = {unit: steps[unit][0] for unit in costs}
    left = bits * sum(sizes[unit] for unit in costs) - sum(rates[unit] * sizes[unit] for unit in costs)
    if left < 0:
        mean = bits - left / sum(sizes[unit] for unit in costs)
        raise ValueError(f"bits={bits} is less than the lowest mean rate that can be had, {mean:g}")
    while True:
        best, most = None, (-1.0, 0.0)
        for unit, rate in rates.items():
            higher = next((r for r in steps[unit] if r > rate), None)
            if higher is None or (higher - rate) * sizes[unit] > left:
                continue
            saved = costs[unit] * (4**-rate - 4**-higher) / ((higher - rate) * sizes[unit])
            if (saved, -rate) > most:
                best, most = (unit, higher), (saved, -rate)
        if best is None:
            return rates
        unit, higher = best
        left -= (higher - rates[unit]) * sizes[unit]
        rates[unit] = higher


def layer_rates(
    costs: Mapping[Unit, tuple[float, float]],
    sizes: Mapping[Unit, int],
    offered: Mapping[Unit, tuple[Sequence[float], Sequence[float]]],
    key_bits: float,
    value_bits: float,
) -> dict[Unit, tuple[float, float]]:
    """Rates of every layer's (or whatever is given rates) keys and values; one mean over both if they are asked to have
    the same.

    None is lower than half of its mean, if that is offered: a layer that calibration text does not need may be needed
    by another text.

    Args:
        costs, sizes, offered: as in `allocate`, by layer; ``sizes`` of keys, which are those of values.
    """
    asked = (key_bits, value_bits)
    units = [(layer, kind) for layer in sizes for kind in (0, 1)]
    pools = [units] if key_bits == value_bits else [units[0::2], units[1::2]]
    found: dict[tuple[Unit, int], float] = {}
    for pool in pools:
        bits = asked[pool[0][1]]
        choice = {(i, kind): offered[i][kind] for i, kind in pool}
        choice = {unit: [r for r in rates if r >= bits / 2] or [max(rates)] for unit, rates in choice.items()}
        found |= allocate({(i, k): costs[i][k] for i, k in pool}, {(i, k): sizes[i] for i, k in pool}, choice, bits)
    return {layer: (found[layer, 0], found[layer, 1]) for layer in sizes}
