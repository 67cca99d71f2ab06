"""Depthwise convolution over one dim, three steps of a tuning run, as instruction streams.

Every output column is a product of 3 columns and a sum over them, both on VectorE: 2 x 2048
instructions of three elements per image and 128 channels. The second step keeps the filter in PSUM;
the
third walks the columns in blocks of 64, whose products and sums are one instruction each here:
as written it has the same instructions as the second, so the compiler must have joined them.
The zeros around an image come from GpSimdE, so that the next image can be fetched meanwhile.
Source: ucb-bar/autocomp, examples/trn-advanced/4_conv1d_trace.py.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

CHANNELS = 128


def depthwise_conv(
    images: int, channels: int, width: int, taps: int = 3, *, psum: bool = False, block: int = 1
) -> Log:
    """The log in fp32; channels a multiple of 128, outputs as wide as inputs.

    psum: the filter lies in PSUM. block: output columns per instruction.
    """
    s = Stream()
    source = s.hbm(images * channels, width, dtype="float32")
    target = s.hbm(images * channels, width, dtype="float32")
    weights = s.hbm(channels, taps, dtype="float32")
    kernels = [_filter(s, weights[c : c + CHANNELS], psum) for c in range(0, channels, CHANNELS)]
    for start in range(0, images * channels, CHANNELS):
        rows = slice(start, start + CHANNELS)
        padded = s.sbuf(CHANNELS, width + taps - 1, dtype="float32")
        s.gpsimd("memset", padded)
        s.dma(padded[:, taps // 2 : taps // 2 + width], source[rows])
        out = s.sbuf(CHANNELS, width, dtype="float32")
        kernel = kernels[start // CHANNELS % len(kernels)]
        for column in range(0, width, block):
            product = s.sbuf(CHANNELS, block * taps, dtype="float32")
            last = column + block + taps - 1
            s.vector("tensor_tensor", product, padded[:, column:last], kernel)
            s.vector("tensor_reduce", out[:, column : column + block], product)
        s.dma(target[rows], out)
    return s.log


def _filter(s: Stream, weights: Tile, psum: bool) -> Tile:
    tile = s.load(weights)
    if not psum:
        return tile
    bank = s.psum(*weights.shape)
    s.vector("tensor_copy", bank, tile)
    return bank
