"""Replays programs: one core alone, or several that meet in collectives and barriers.

Does: take whatever is ready first on any core, and let members of a meeting go on when the last of
them is there. Does not: place a record in time (machine.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .machine import Machine
from .program import Program
from .timeline import Timeline


def replay(program: Program) -> Timeline:
    """The timeline of a program that runs on one core, alone."""
    return replay_together([program])[0]


def replay_together(programs: Sequence[Program]) -> list[Timeline]:
    """The timelines of programs on as many cores, all started at once; they meet where logs say.

    Whatever is ready first on any core is placed first, so shared resources stay in order. Raises
    ValueError when a program meets a core whose log is not among them.
    """
    machines = [Machine(program) for program in programs]
    waiting: dict[int, list[tuple[Machine, int]]] = {}
    while True:
        machine = min(machines, key=lambda m: m.next_at)
        now = machine.next_at
        if now == math.inf:
            break
        record = machine.step()
        if record is None:
            continue
        exchange = machine.program.meetings[record]
        there = waiting.setdefault(exchange.meeting, [])
        there.append((machine, record))
        if len(there) == len(exchange.members):
            for member, its_record in waiting.pop(exchange.meeting):
                member.meet(its_record, now)
    for machine in machines:
        for record in machine.program.meetings:
            if record not in machine.met:
                members = machine.program.meetings[record].members
                raise ValueError(
                    f"programs: expected those of all {len(members)} members of a meeting, "
                    f"got {len(machines)}; pass the logs of all cores"
                )
    return [machine.finish() for machine in machines]
