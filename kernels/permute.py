"""Tokens from sequence order to the order in which ranks hold them, and back.

Letters: B batch (or batch times heads), S tokens, F numbers per token.

A layout (zigzag, striped, contiguous) is a list of runs (first token, tokens, distance between
them), rank by rank: tokens first, first + step, ... lie next to each other in the result. DMA moves
them from HBM to HBM; nothing is computed and nothing passes through SBUF. Which runs a layout has
is the schedule's business (`nxd_cp.schedule.token_runs`); they are compile-time numbers.

Precision: bits are moved as they are, in any dtype that NKI has.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .tiles import my_items


@nki.jit
def permute_tokens(x_BSF, runs, inverse=False):
    """The tokens of every run side by side, in the order of the runs; or, inverse, back.

    Args:
        x_BSF: HBM [B, S, F], any dtype that NKI has.
        runs: tuple of (first, count, step) that holds every token exactly once.
        inverse: False from sequence order to runs, True from runs to sequence order.

    Returns:
        [B, S, F] in x's dtype.
    """
    out_hbm = nl.ndarray(x_BSF.shape, dtype=x_BSF.dtype, buffer=nl.shared_hbm)
    items = my_items(x_BSF.shape[0], 1)
    for i in range(len(items)):
        b, _ = items[i]
        place = 0
        for r in range(len(runs)):
            first, count, step = runs[r]
            stop = first + (count - 1) * step + 1
            next_place = place + count
            if inverse:
                dst, src = out_hbm[b, first:stop:step, :], x_BSF[b, place:next_place, :]
            else:
                dst, src = out_hbm[b, place:next_place, :], x_BSF[b, first:stop:step, :]
            nisa.dma_copy(dst=dst, src=src)  # DMA
            place = next_place
    return out_hbm
