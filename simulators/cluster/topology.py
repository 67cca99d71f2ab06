"""Where the positions of a ring lie, and which link each hop takes.

Does: place `num_positions` equal groups of logical cores (TP x LNC) along a walk through the
machine in which neighbours are linked, and name the link class of every hop. Does not: time it.

trn1, trn2: a node is a 4 x 4 torus of chips; a closed walk visits all 16. trn2 UltraServer: four
nodes, joined chip by chip; the walk goes through each node and on. trn3: sleds of four chips behind
a switch, racks of 16 sleds. Beyond that, EFA.
Source: AWS Neuron SDK docs, about-neuron/arch/neuron-hardware/.
"""

from __future__ import annotations

from dataclasses import dataclass

CORES_PER_CHIP = {"gen2": 2, "gen3": 8, "gen4": 8}
CHIPS_PER_NODE = {"gen2": 16, "gen3": 16, "gen4": 4}
NODES_PER_POD = {"gen2": 1, "gen3": 4, "gen4": 16}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A ring of positions. Each position is tensor_parallel x lnc physical cores.

    pods: trn2 nodes are joined to UltraServers (gen3 only; gen4 always is). Raises ValueError for
    what cannot be placed.
    """

    generation: str
    num_positions: int
    tensor_parallel: int
    lnc: int = 1
    pods: bool = False

    def __post_init__(self) -> None:
        if self.generation not in CORES_PER_CHIP:
            known = ", ".join(CORES_PER_CHIP)
            raise ValueError(f"generation: expected one of {known}, got {self.generation!r}")
        if self.num_positions < 1:
            raise ValueError(f"num_positions: expected at least 1, got {self.num_positions}")
        if self.lnc not in (1, 2) or (self.lnc == 2 and self.generation == "gen2"):
            raise ValueError(f"lnc: expected 1, or 2 on gen3 and gen4, got {self.lnc}")
        if self.pods and self.generation != "gen3":
            raise ValueError(
                f"pods: expected False on {self.generation}, got True: only trn2 (gen3) nodes are "
                "joined or not (trn1's never are, trn3's always); leave it out"
            )
        per_chip = CORES_PER_CHIP[self.generation]
        cores = self.tensor_parallel * self.lnc
        if cores < 1 or (cores % per_chip and per_chip % cores):
            raise ValueError(
                f"tensor_parallel x lnc: expected a divisor or a multiple of the {per_chip} cores "
                f"of a chip, got {self.tensor_parallel} x {self.lnc}"
            )

    @property
    def cores(self) -> int:
        """Physical cores per position."""
        return self.tensor_parallel * self.lnc

    @property
    def chips(self) -> float:
        """Chips per position; below 1 when several positions share a chip."""
        return self.cores / CORES_PER_CHIP[self.generation]

    def hop_links(self) -> tuple[str, ...]:
        """Link class of the hop from position i to i + 1 (the last goes back to 0)."""
        n = self.num_positions
        if n == 1:
            return ()
        step = max(1, round(self.chips))
        if self.chips >= 1:
            places = [i * step for i in range(n)]
        else:
            share = round(1 / self.chips)
            places = [i // share for i in range(n)]
        return tuple(self._link(places[i], places[(i + 1) % n], step) for i in range(n))

    def _link(self, a: int, b: int, step: int) -> str:
        """The slowest class on the way from the chips at walk place a to those at b."""
        if a == b:
            return "chip"
        node = CHIPS_PER_NODE[self.generation]
        pod = node * NODES_PER_POD[self.generation]
        last = max(a, b) + step - 1
        if self.generation == "gen4":
            if min(a, b) // node == last // node:
                return "sled"
            return "rack" if min(a, b) // pod == last // pod else "efa"
        if min(a, b) // node == last // node:
            return "neuronlink"
        if self.pods and min(a, b) // pod == last // pod:
            return "ultraserver"
        return "efa"
