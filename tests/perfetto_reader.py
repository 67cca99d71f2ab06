"""What Perfetto keeps of a trace: the rules of its importer that cost slices or arrows.

Does: round times to whole nanoseconds, take events in order of time (of one moment: as in the
file), drop what overlaps, and hang arrows on open slices. Does not: draw, or judge names.

Source: Perfetto's trace processor, its JSON tokenizer, slice tracker and flow tracker.
"""

from __future__ import annotations

import math
from typing import Any

Event = dict[str, Any]


def _ns(microseconds: float) -> int:
    return math.floor(microseconds * 1e3 + 0.5)


def _end(event: Event) -> int:
    return _ns(event["ts"]) + _ns(event["dur"])


def read(trace: dict[str, Any]) -> tuple[list[Event], list[tuple[Event, Event]], list[str]]:
    """(slices that are kept, arrows as pairs of slices, what is dropped and why)."""
    slices: list[Event] = []
    arrows: list[tuple[Event, Event]] = []
    dropped: list[str] = []
    lanes: dict[tuple[int, int], list[Event]] = {}
    tails: dict[object, Event] = {}
    drawn = [event for event in trace["traceEvents"] if event["ph"] in ("X", "s", "f")]
    for event in sorted(drawn, key=lambda event: _ns(event["ts"])):
        lane = lanes.setdefault((event["pid"], event["tid"]), [])
        what, now = f"{event['name']} at {event['ts']} us", _ns(event["ts"])
        flow = (event.get("id"), event["cat"], event["name"])
        if event["ph"] == "X":
            instant = _ns(event["dur"]) == 0
            while lane and (
                _end(lane[-1]) < now
                or (_end(lane[-1]) == now and not (instant and _ns(lane[-1]["dur"]) == 0))
            ):
                lane.pop()
            if event["dur"] < 0:
                dropped.append(f"{what}: ends before it begins")
            elif lane and now < _end(lane[-1]) < _end(event):
                dropped.append(f"{what}: overlaps {lane[-1]['name']}")
            else:
                lane.append(event)
                slices.append(event)
        elif not lane:
            dropped.append(f"{what}: an arrow without a slice")
        elif event["ph"] == "s":
            tails[flow] = lane[-1]
        elif flow in tails:
            arrows.append((tails.pop(flow), lane[-1]))
        else:
            dropped.append(f"{what}: an arrow that begins nowhere")
    return slices, arrows, dropped
