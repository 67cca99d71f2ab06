"""Steps 5 to 7 of a published tuning run of Mamba on trn1, as instruction streams.

The sequence is walked in chunks of 512 with a carry per state; the sum over states stays in PSUM.
Rows of B and C are loaded per state and chunk and spread over the partitions through PSUM. Step 5
asks for the spread rows as tiles of their own, which ScalarE copies to SBUF; in steps 6 and 7 the
products read them where they are. Step 7 loads delta and u chunk by chunk.
Source: ucb-bar/autocomp, examples/trn-tutorial/3_mamba_trace.py.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

CHANNELS, CHUNK = 128, 512
WIDE = {"dtype": "float32"}


def mamba_step(step: int, channels: int = 256, seq_len: int = 2048, states: int = 16) -> Log:
    """The log of step 5, 6 or 7 in fp32; ValueError for another."""
    if step not in (5, 6, 7):
        raise ValueError(f"step: expected 5, 6 or 7, got {step!r}")
    s = Stream()
    delta, u, out = (s.hbm(channels, seq_len, **WIDE) for _ in range(3))
    a, b, c = (
        s.hbm(channels, states, **WIDE),
        s.hbm(states, seq_len, **WIDE),
        s.hbm(states, seq_len, **WIDE),
    )
    ones = s.sbuf(1, CHANNELS, **WIDE)
    s.vector("memset", ones)
    for first in range(0, channels, CHANNELS):
        rows = slice(first, first + CHANNELS)
        whole = _inputs(s, delta[rows], u[rows]) if step < 7 else None
        a_tile, carry = s.load(a[rows]), s.sbuf(CHANNELS, states, **WIDE)
        s.vector("memset", carry)
        for start in range(0, seq_len, CHUNK):
            part = slice(start, start + CHUNK)
            if whole is None:
                pair = _inputs(s, delta[rows, part], u[rows, part])
            else:
                pair = whole[0][:, part], whole[1][:, part]
            acc = s.psum(CHANNELS, CHUNK)
            s.vector("memset", acc)
            for state in range(states):
                column = slice(state, state + 1)
                b_row, c_row = (_spread(s, side[state, part], ones, step == 5) for side in (b, c))
                _state(s, *pair, a_tile[:, column], carry[:, column], b_row, c_row, acc)
            result = s.sbuf(CHANNELS, CHUNK, **WIDE)
            s.vector("tensor_copy", result, acc)
            s.dma(out[rows, part], result)
    return s.log


def _inputs(s: Stream, delta: Tile, u: Tile) -> tuple[Tile, Tile]:
    """delta and delta u, in SBUF."""
    delta_tile, u_tile = s.load(delta), s.load(u)
    product = s.sbuf(*delta.shape, **WIDE)
    s.vector("tensor_tensor", product, delta_tile, u_tile)
    return delta_tile, product


def _spread(s: Stream, row: Tile, ones: Tile, copied: bool) -> Tile:
    bank = s.psum(CHANNELS, CHUNK)
    s.matmul(bank, ones, s.load(row))
    if not copied:
        return bank
    tile = s.sbuf(CHANNELS, CHUNK, **WIDE)
    s.scalar("copy", tile, bank)
    return tile


def _state(
    s: Stream, delta: Tile, product: Tile, a: Tile, carry: Tile, b: Tile, c: Tile, acc: Tile
) -> None:
    """One state over one chunk, added to the sum in PSUM."""
    decay, pushed, scan, seen = (s.sbuf(CHANNELS, CHUNK, **WIDE) for _ in range(4))
    s.scalar("exp", decay, delta, a)
    s.vector("tensor_tensor", pushed, product, b)
    s.vector("tensor_tensor_scan", scan, decay, pushed, carry)
    s.vector("tensor_copy", carry, scan[:, CHUNK - 1 :])
    s.vector("tensor_tensor", seen, scan, c)
    s.vector("tensor_tensor", acc, acc, seen)
