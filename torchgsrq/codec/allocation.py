"""Allocation of bits to the keys and the values of each head, under one mean rate."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Unit = TypeVar("Unit", bound=Hashable)


def allocate(
    costs: Mapping[Unit, float], sizes: Mapping[Unit, int], offered: Mapping[Unit, Sequence[float]], bits: float
) -> dict[Unit, float]:
    """The rates of least total cost ``sum_i cost_i 4^-rate_i`` among those whose mean is at most ``bits``.

    Each additional bit quarters the squared error of a code, so each step up saves less than the one before. Repeatedly
    taking the step that saves most per bit is optimal, except for the last steps, which have to fit.

    Args:
        costs: cost of each unit's errors at rate 0.
        sizes: elements of each unit, the weights of the mean.
        offered: valid rates of each unit, in any order.
        bits: the mean rate, in bits per element.

    Returns:
        The rate of each unit.

    Raises:
        ValueError: even the lowest rates are more than ``bits``.
    """
    steps = {unit: sorted(offered[unit]) for unit in costs}
    rates = {unit: steps[unit][0] for unit in costs}
    left = bits * sum(sizes[unit] for unit in costs) - sum(rates[unit] * sizes[unit] for unit in costs)
    if left < 0:
        mean = bits - left / sum(sizes[unit] for unit in costs)
        raise ValueError(f"bits={bits} is less than the lowest mean rate that is possible, {mean:g}")
    queue: list[tuple[float, float, int, Unit]] = []

    def offer(order: int, unit: Unit) -> None:
        """Queue the next step up of a unit, ordered by savings per bit, then lowest rate, then input order."""
        rate = rates[unit]
        higher = next((r for r in steps[unit] if r > rate), None)
        if higher is not None:
            saved = costs[unit] * (4**-rate - 4**-higher) / ((higher - rate) * sizes[unit])
            heapq.heappush(queue, (-saved, rate, order, unit))

    for order, unit in enumerate(rates):
        offer(order, unit)
    while queue:
        _, rate, order, unit = heapq.heappop(queue)
        higher = next(r for r in steps[unit] if r > rate)
        if (higher - rate) * sizes[unit] <= left:  # a step that does not fit now never fits
            left -= (higher - rate) * sizes[unit]
            rates[unit] = higher
            offer(order, unit)
    return rates


def head_rates(
    costs: Mapping[int, Sequence[tuple[float, float]]],
    dims: Mapping[int, int],
    offered: Mapping[int, Sequence[float]],
    bits: float,
) -> dict[int, list[tuple[float, float]]]:
    """Rates of the keys and values of every layer's heads, under one mean.

    No rate is lower than half of the mean, if such rates are offered: another text may need a head that the calibration
    text does not.

    Args:
        costs: as in `allocate`, by layer and head, for keys and for values.
        dims: elements of a vector, by layer.
        offered: valid rates, by layer.
        bits: the mean rate, in bits per element.

    Returns:
        By layer, the rates of the keys and of the values of each head.
    """
    units = [(layer, head, kind) for layer, some in costs.items() for head in range(len(some)) for kind in (0, 1)]
    enough = {layer: [r for r in rates if r >= bits / 2] or [max(rates)] for layer, rates in offered.items()}
    each = {(layer, head, kind): costs[layer][head][kind] for layer, head, kind in units}
    sizes, choice = {unit: dims[unit[0]] for unit in units}, {unit: enough[unit[0]] for unit in units}
    found = allocate(each, sizes, choice, bits)
    return {i: [(found[i, h, 0], found[i, h, 1]) for h in range(len(some))] for i, some in costs.items()}
