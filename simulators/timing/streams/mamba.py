"""The three versions of the fused Mamba tutorial, as instruction streams.

Written from the tutorial's description: per 128 channels and per state, exp(delta A) on ScalarE,
then delta u B, a scan, the product with C and the sum over states on VectorE. Rows of B and C are
spread over the partitions by a multiplication with ones on TensorE. Version 1 walks the states and
in them the channels, and loads and multiplies delta and u each time; a spread row serves all
channels of a state, so ScalarE copies it to SBUF. Versions 2 and 3 walk the states of 128 channels
after each other, with one product delta u. There a spread row serves once: up to one PSUM bank
wide, VectorE reads it where it is; wider ones are copied too. v3 cuts the sequence in tiles of 512.

Does not model what the compiler does when a version does not fit in SBUF: it spills, and v2 does so
beyond about 4096 steps.
Source: AWS Neuron SDK docs, nki/guides/tutorials/fused_mamba.rst, and its kernels.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

CHANNELS, BANK = 128, 512


def mamba(version: int, channels: int, seq_len: int, states: int = 16) -> Log:
    """The log of version 1, 2 or 3 in fp32."""
    if version not in (1, 2, 3):
        raise ValueError(f"version: expected 1, 2 or 3, got {version!r}")
    s = Stream()
    wide = {"dtype": "float32"}
    delta, u, out = (s.hbm(channels, seq_len, **wide) for _ in range(3))
    a, b, c = (
        s.hbm(channels, states, **wide),
        s.hbm(states, seq_len, **wide),
        s.hbm(states, seq_len, **wide),
    )
    ones = s.sbuf(1, CHANNELS, **wide)
    s.vector("memset", ones)
    if version == 1:
        _states_then_channels(s, delta, u, out, a, b, c, ones)
        return s.log
    width = BANK if version == 3 else seq_len
    for first in range(0, channels, CHANNELS):
        rows = slice(first, first + CHANNELS)
        total = s.sbuf(CHANNELS, seq_len, **wide)
        s.vector("memset", total)
        delta_tile, product = _inputs(s, delta[rows], u[rows])
        for state in range(states):
            a_column = s.load(a[rows, state])
            carry = None
            for start in range(0, seq_len, width):
                part = slice(start, start + width)
                carry = _state(
                    s,
                    delta_tile[:, part],
                    product[:, part],
                    total[:, part],
                    a_column,
                    _spread(s, b[state, part], ones),
                    _spread(s, c[state, part], ones),
                    carry,
                )
        s.dma(out[rows], total)
    return s.log


def _states_then_channels(
    s: Stream, delta: Tile, u: Tile, out: Tile, a: Tile, b: Tile, c: Tile, ones: Tile
) -> None:
    """Version 1: every state loads all channels again."""
    channels, seq_len = delta.shape
    blocks = [slice(first, first + CHANNELS) for first in range(0, channels, CHANNELS)]
    totals = [s.sbuf(CHANNELS, seq_len, dtype="float32") for _ in blocks]
    for total in totals:
        s.vector("memset", total)
    for state in range(b.shape[0]):
        b_rows, c_rows = (_spread(s, side[state], ones, kept=True) for side in (b, c))
        for rows, total in zip(blocks, totals, strict=True):
            delta_tile, product = _inputs(s, delta[rows], u[rows])
            a_column = s.load(a[rows, state])
            _state(s, delta_tile, product, total, a_column, b_rows, c_rows, None)
    for rows, total in zip(blocks, totals, strict=True):
        s.dma(out[rows], total)


def _inputs(s: Stream, delta: Tile, u: Tile) -> tuple[Tile, Tile]:
    """delta and delta u of 128 channels, in SBUF."""
    delta_tile, u_tile = s.load(delta), s.load(u)
    product = s.sbuf(*delta.shape, dtype="float32")
    s.vector("tensor_tensor", product, delta_tile, u_tile)
    return delta_tile, product


def _state(
    s: Stream,
    delta: Tile,
    product: Tile,
    total: Tile,
    a_column: Tile,
    b_rows: Tile,
    c_rows: Tile,
    carry: Tile | None,
) -> Tile:
    """One state over one stretch of the sequence; returns the last column of the scan."""
    shape = delta.shape
    decay = s.sbuf(*shape, dtype="float32")
    s.scalar("exp", decay, delta, a_column)
    pushed, scan, seen = (s.sbuf(*shape, dtype="float32") for _ in range(3))
    s.vector("tensor_tensor", pushed, product, b_rows)
    s.vector("tensor_tensor_scan", scan, decay, pushed, *([carry] if carry is not None else []))
    s.vector("tensor_tensor", seen, scan, c_rows)
    s.vector("tensor_tensor", total, total, seen)
    return scan[:, shape[1] - 1 : shape[1]]


def _spread(s: Stream, row: Tile, ones: Tile, *, kept: bool = False) -> Tile:
    """A row of HBM on all partitions: in PSUM if it fits in a bank, else or if kept in SBUF."""
    on_chip = s.load(row)
    width = on_chip.shape[1]
    if width <= BANK and not kept:
        spread = s.psum(CHANNELS, width)
        s.matmul(spread, ones, on_chip)
        return spread
    copy = s.sbuf(CHANNELS, width, dtype="float32")
    for start in range(0, width, BANK):
        part = s.psum(CHANNELS, BANK)
        s.matmul(part, ones, on_chip[:, start : start + BANK])
        s.scalar("copy", copy[:, start : start + BANK], part)
    return copy
