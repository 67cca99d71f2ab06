"""Depthwise convolution over one dim, the published starting point, as an instruction stream.

Every output column is a product of 3 columns and a sum over them, both on VectorE: 2 x 2048
instructions of three elements per image and 128 channels.
Source: ucb-bar/autocomp, examples/trn-advanced/4_conv1d_trace.py, first step.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream

CHANNELS = 128


def depthwise_conv(images: int, channels: int, width: int, taps: int = 3) -> Log:
    """The log in fp32; channels a multiple of 128, outputs as wide as inputs."""
    s = Stream()
    source = s.hbm(images * channels, width, dtype="float32")
    target = s.hbm(images * channels, width, dtype="float32")
    weights = s.hbm(channels, taps, dtype="float32")
    kernels = [s.load(weights[c : c + CHANNELS]) for c in range(0, channels, CHANNELS)]
    for start in range(0, images * channels, CHANNELS):
        rows = slice(start, start + CHANNELS)
        padded = s.sbuf(CHANNELS, width + taps - 1, dtype="float32")
        s.vector("memset", padded)
        s.dma(padded[:, taps // 2 : taps // 2 + width], source[rows])
        out = s.sbuf(CHANNELS, width, dtype="float32")
        kernel = kernels[start // CHANNELS % len(kernels)]
        for column in range(width):
            product = s.sbuf(CHANNELS, taps, dtype="float32")
            s.vector("tensor_tensor", product, padded[:, column : column + taps], kernel)
            s.vector("tensor_reduce", out[:, column : column + 1], product)
        s.dma(target[rows], out)
    return s.log
