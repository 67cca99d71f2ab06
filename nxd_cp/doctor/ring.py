"""Is the ring of a parallel configuration legal on the links of a machine?

Neuron's permute wants a ring whose neighbours are physically connected. Ranks of tensor- and
context-parallel groups are placed by NxD's rule (integrations/nxd/mesh.py); each hop is then one
within a chip, between linked chips, between nodes, or none.

Does: name every hop that has no link. Does not: measure; `nccom-test` with the same source-target
pairs does. Sources: Neuron SDK docs, neuron-runtime/about/collectives ("Permute") and
about-neuron/arch/neuron-hardware; the notes on linked ranks in NxD 0.18.0's parallel_state.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from nxd_cp.integrations.nxd.mesh import Groups, context_groups

CORES_PER_CHIP = {"trn1": 2, "trn2": 8}
TORUS = 4  # a node is a 4 x 4 torus of chips, numbered row by row
LINKS = ("same chip", "linked chips", "between nodes", "no link")
UNKNOWN = (
    "the links of {chip} are not known to this check; run nccom-test on the instance with the "
    "source-target pairs of the ring"
)


@dataclass(frozen=True)
class Hop:
    """source, target: global ranks. link: one of `LINKS`."""

    source: int
    target: int
    link: str


@dataclass(frozen=True)
class Verdict:
    """legal: None when it is not known. hops: of all rings. text: one sentence."""

    legal: bool | None
    hops: tuple[Hop, ...]
    text: str


def check_ring(
    *,
    chip: str,
    world_size: int,
    tensor_parallel_size: int,
    context_parallel_size: int,
    lnc: int = 1,
    links: dict[int, tuple[int, ...]] | None = None,
) -> Verdict:
    """Whether every hop of every context-parallel ring has a link.

    chip: trn1, inf2, trn2 or trn3. lnc: physical cores of a rank. links: chips that each chip of a
    node is connected to, as neuron-ls prints; default the torus. Raises ValueError for sizes that
    NxD cannot group, or an LNC that the chip does not have.
    """
    if lnc not in (1, 2) or (lnc == 2 and chip in ("trn1", "inf2")):
        raise ValueError(f"lnc: expected 1, or 2 on trn2 and trn3, got {lnc} on {chip}")
    per_node = TORUS**2 * CORES_PER_CHIP.get(chip, 1) // lnc
    groups = context_groups(
        world_size,
        tensor_parallel_size,
        context_parallel_size,
        chip=chip,
        lnc=lnc,
        ranks_per_node=per_node,
    )
    if chip not in CORES_PER_CHIP:
        return Verdict(None, (), UNKNOWN.format(chip=chip))
    hops = tuple(
        Hop(a, b, _link(a, b, per_node, CORES_PER_CHIP[chip] // lnc, links or torus_links()))
        for a, b in _hops(groups)
    )
    missing = [hop for hop in hops if hop.link == LINKS[-1]]
    if missing:
        first = missing[0]
        return Verdict(
            False,
            hops,
            f"{len(missing)} of {len(hops)} hops have no link, the first from rank {first.source} "
            f"to rank {first.target}; use another TP or CP size, or all-gather instead of the ring",
        )
    if any(hop.link == LINKS[2] for hop in hops):
        return Verdict(
            True, hops, "every hop is linked or goes between nodes (EFA): confirm with nccom-test"
        )
    return Verdict(True, hops, "every hop is within a chip or between linked chips")


def torus_links() -> dict[int, tuple[int, ...]]:
    """The neighbours of each chip of a 4 x 4 torus."""
    found = {}
    for chip in range(TORUS**2):
        row, column = divmod(chip, TORUS)
        steps = ((1, 0), (-1, 0), (0, 1), (0, -1))
        found[chip] = tuple(
            (row + down) % TORUS * TORUS + (column + right) % TORUS for down, right in steps
        )
    return found


def _hops(groups: Groups) -> list[tuple[int, int]]:
    """(source, target) of every hop; a ring of one has none."""
    rings = [ring for ring in groups if len(ring) > 1]
    return [hop for ring in rings for hop in zip(ring, ring[1:] + ring[:1], strict=True)]


def _link(a: int, b: int, per_node: int, per_chip: int, links: dict[int, tuple[int, ...]]) -> str:
    if a // per_node != b // per_node:
        return LINKS[2]
    chip_a, chip_b = a % per_node // per_chip, b % per_node // per_chip
    if chip_a == chip_b:
        return LINKS[0]
    return LINKS[1] if chip_b in links.get(chip_a, ()) else LINKS[3]
