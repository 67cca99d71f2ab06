"""Tokens from sequence order to the order in which ranks hold them, and back.

Letters: B batch (or batch times heads), S tokens, F numbers per token.

A layout (zigzag, striped, contiguous) is a list of runs (first token, tokens, distance between
them), rank by rank: tokens first, first + step, ... lie next to each other in the result. DMA moves
them from HBM to HBM; nothing is computed and nothing passes through SBUF. Which runs a layout has
is the schedule's business (`nxd_cp.schedule.token_runs`); they are compile-time numbers. Two cores
(LNC2) share the (batch element, run) pairs, an even number.

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
    places = places_of(runs)
    items = my_items(x_BSF.shape[0], len(runs))
    for i in range(len(items)):
        b, r = items[i]
        first, count, step = runs[r]
        stop = first + (count - 1) * step + 1
        place, next_place = places[r], places[r] + count
        if inverse:
            dst, src = out_hbm[b, first:stop:step, :], x_BSF[b, place:next_place, :]
        else:
            dst, src = out_hbm[b, place:next_place, :], x_BSF[b, first:stop:step, :]
        nisa.dma_copy(dst=dst, src=src)  # DMA
    return out_hbm


def places_of(runs):
    """Where each run begins when they lie side by side."""
    places = []
    total = 0
    for r in range(len(runs)):
        places.append(total)
        total += runs[r][1]
    return places
