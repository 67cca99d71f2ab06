"""Who comes after whom: data dependencies, and the order that engines, loops and meetings impose.

Does: join the dependency edges of a program with those of its queues. Does not: place anything in
time (machine.py).
"""

from __future__ import annotations

from .edges import Edge
from .program import Program


def order(program: Program) -> tuple[list[list[Edge]], list[int]]:
    """(followers of every record with the kind of edge, how many predecessors it has)."""
    followers: list[list[Edge]] = [[] for _ in range(len(program))]
    missing = [0] * len(program)

    def edge(before: int, after: int, kind: str) -> None:
        followers[before].append((after, kind))
        missing[after] += 1

    recent: dict[str, list[int]] = {}
    meeting: dict[str, int] = {}  # the last one of each queue: nothing overtakes it
    barrier = -1
    since: list[int] = []
    depth = 1 if program.options.order == "program" else program.options.window
    for record, edges in enumerate(program.edges):
        for before, kind in edges:
            edge(before, record, kind)
        if record in program.barriers:
            for before in since:
                edge(before, record, "loop")
            barrier, since, recent = record, [], {}
            continue
        if barrier >= 0:
            edge(barrier, record, "loop")
        since.append(record)
        queue = program.queues[record]
        mine = recent.setdefault(queue, [])
        if queue in meeting:
            edge(meeting[queue], record, "engine")
        if record in program.meetings:
            for before in mine:
                edge(before, record, "engine")
            meeting[queue], mine[:] = record, []
        elif len(mine) >= depth:
            edge(mine[-depth], record, "engine" if depth == 1 else "window")
            mine.append(record)
        else:
            mine.append(record)
    return followers, missing
