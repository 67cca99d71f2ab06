"""What a collective inside a kernel costs one core.

Does: turn an Exchange into a Cost: a start, hops, and bytes at one rate. Does not: wait for the
others (together.py) or know where ranks lie (simulators.cluster does).

A permutation is one hop; everything else takes the logarithm of the group, because published times
of small messages hardly grow with it. Channels of an implicit permutation use links of their own.
What it sends takes its share of the core's DMA rate: "DMA engines are shared resources between
computation and communication" (compute-comm-overlap.rst).
Source: nccom-test.rst examples and intranode-collective-comm.rst, AWS Neuron SDK docs.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Exchange

from .constants import Values
from .cost import Cost


def collective_cost(exchange: Exchange, c: Values) -> Cost:
    """The Cost of one member's part, once all members are there."""
    hops = 1 if "permute" in exchange.kind else max(1, (len(exchange.group) - 1).bit_length())
    size = max(exchange.bytes_sent, exchange.bytes_received)
    links = max(1, len(exchange.channels))
    parts = (
        ("collective_start", c.collective_start),
        ("collective_hop", hops * c.collective_hop),
        ("collective_rate", size / (c.collective_rate * links)),
    )
    return Cost(parts, parts, dma=exchange.bytes_sent / c.dma_core_rate)
