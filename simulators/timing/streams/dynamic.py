"""A microbenchmark of loads with dynamic addresses, some out of bounds, as an instruction stream.

256 loads of 128 rows of 6528 B each; one out of bounds is skipped: it costs its descriptors but
moves nothing.
Source: foxl-ai/kiln docs/neuron-notes.md (trn1.2xlarge, NKI 0.6.0).
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream

ROWS, COLUMNS = 128, 3264


def dynamic_loads(skipped: int, count: int = 256) -> Log:
    """The log of `count` loads, `skipped` of them, evenly spread, out of bounds."""
    s = Stream()
    source = s.hbm(count * ROWS, COLUMNS)
    for i in range(count):
        out_of_bounds = i * skipped // count != (i + 1) * skipped // count
        rows = source[i * ROWS : (i + 1) * ROWS]
        s.dma(s.sbuf(ROWS, COLUMNS), rows, "swdge", skipped=out_of_bounds)
    return s.log
