"""Links between chips: latency and bandwidth per class and generation, with sources and tags.

Does: hold one LinkClass per kind of hop. Does not: know who is connected to whom (topology.py).
Rates are bytes per ns (GB/s) in one direction of one chip; alpha is the time of an empty message.
`channels` is how many such links the runtime can drive at once between two neighbours of a ring:
one direction, both, or both directions of two edge-disjoint rings. EFA is one pipe per chip.

Sources: AWS Neuron SDK docs, about-neuron/arch/neuron-hardware/{trn1,trn2,trn3}-arch.rst and
trainium{,2,3}.rst; neuron-runtime/explore/{intranode,internode}-collective-comm.rst;
neuron-runtime/about/collectives.rst.
"""

from __future__ import annotations

from dataclasses import dataclass

from nxd_cp.simulators.timing.constants import Constant

_HOP = Constant(1000.0, 1500.0, 2000.0, "ns", "documented", "intranode-collective-comm.rst: 1-2 us")
_FAR = Constant(15000.0, 15000.0, 20000.0, "ns", "documented", "collectives.rst: about 15 us")
# Added to every hop, once.
LAUNCH = Constant(0.0, 5000.0, 20000.0, "ns", "guess", "semaphores and start of a collective step")


@dataclass(frozen=True)
class LinkClass:
    """One kind of hop. rate: per channel; max_channels: how many a ring neighbour pair has."""

    name: str
    alpha: Constant
    rate: Constant
    max_channels: int

    def hop_ns(self, size_bytes: float, *, channels: int, level: str) -> float:
        """Time of one message of `size_bytes` between two chips, without launch overhead."""
        used = min(channels, self.max_channels)
        return self.alpha.at(level) + size_bytes / (self.rate.at(level) * used)


def _rate(low: float, expected: float, high: float, tag: str, source: str) -> Constant:
    return Constant(low, expected, high, "B/ns", tag, source)  # type: ignore[arg-type]


ON_CHIP = {
    "gen2": _rate(205.0, 130.0, 100.0, "guess", "copy through HBM: half its rate, two cores"),
    "gen3": _rate(362.0, 180.0, 150.0, "guess", "copy through HBM: half a stack per core pair"),
    "gen4": _rate(588.0, 290.0, 250.0, "guess", "copy through HBM: half a stack per core pair"),
}

LINKS: dict[str, dict[str, LinkClass]] = {
    "gen2": {
        "neuronlink": LinkClass(
            "neuronlink",
            _HOP,
            _rate(96.0, 48.0, 48.0, "derived", "trn1-arch: 384 GB/s per chip over 4 links, 2 ways"),
            4,
        ),
        "efa": LinkClass(
            "efa",
            _FAR,
            _rate(12.5, 6.25, 6.25, "documented", "800 Gbps (trn1n 1600) / 16 chips"),
            1,
        ),
    },
    "gen3": {
        "neuronlink": LinkClass(
            "neuronlink",
            _HOP,
            _rate(128.0, 128.0, 128.0, "documented", "trn2-arch: 128 GB/s per XY neighbour"),
            4,
        ),
        "ultraserver": LinkClass(
            "ultraserver",
            _HOP,
            _rate(64.0, 64.0, 64.0, "documented", "trn2-arch: 64 GB/s per Z neighbour"),
            2,
        ),
        "efa": LinkClass(
            "efa", _FAR, _rate(25.0, 25.0, 25.0, "documented", "3200 Gbps / 16 chips"), 1
        ),
    },
    "gen4": {
        "sled": LinkClass(
            "sled", _HOP, _rate(256.0, 256.0, 128.0, "guess", "trn3-arch: 256 GB/s, way unclear"), 1
        ),
        "rack": LinkClass(
            "rack", _HOP, _rate(320.0, 320.0, 160.0, "guess", "trn3-arch: 320 GB/s, way unclear"), 1
        ),
        "racks": LinkClass(
            "racks", _HOP, _rate(128.0, 128.0, 64.0, "guess", "trn3-arch: 128 GB/s, way unclear"), 1
        ),
        "efa": LinkClass(
            "efa", _FAR, _rate(25.0, 25.0, 25.0, "documented", "12800 Gbps / 64 chips"), 1
        ),
    },
}
for _generation, _on_chip in ON_CHIP.items():
    LINKS[_generation]["chip"] = LinkClass("chip", _HOP, _on_chip, 1)
