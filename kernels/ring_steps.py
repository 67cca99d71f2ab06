"""What the two ring kernels share: the group, the rectangles of a step, and messages in HBM.

Letters: N ranks of a ring; B batch, H query heads, G key/value heads, C chunks of a rank's rows
(2 under a causal mask, 1 without), S rows of a chunk, D head dim of q and k, E of v.

Note [Zigzag]
    Rank r of N holds chunks r and 2N - 1 - r of the sequence. Its own keys are step 0: a causal
    square per chunk, and its later chunk sees all of its earlier one. Keys of another rank w: the
    later query chunk sees their earlier chunk, always; and if w is before r the earlier query chunk
    sees that one too, else the later query chunk sees their later one as well. So two full
    rectangles, (1, 0) and (x, x) with x = 0 or 1, and x alone depends on the rank.

The runtime chooses the order of the ring, so whose keys are here is known at run time only, as is
x. It is looked up in a table and added to DMA addresses; every rank runs the same program. Compute
instructions never see it.
"""

import nki.collectives as ncc
import nki.isa as nisa
import nki.language as nl

from .tiles import chunk, moving_chunk

NKI_SINCE = "0.3"  # nki.collectives, with channel_ids


def rectangles(mask, step):
    """(query chunk, key chunk, mask, whether these rows and these keys come first) of a step.

    "x" stands for the chunk known at run time.
    """
    if mask == "full":
        return ((0, 0, "full", step == 0, step == 0),)
    if step == 0:
        return (
            (0, 0, "causal", True, True),
            (1, 0, "full", True, False),
            (1, 1, "causal", False, True),
        )
    return ((1, 0, "full", False, False), ("x", "x", "full", False, False))


def place_of(hbm, index, side_11, first_column, width):
    """A chunk of an HBM tensor by its number, or by the one known at run time."""
    if index == "x":
        return moving_chunk(hbm, side_11, first_column, width)
    return chunk(hbm, index, first_column, width)


def load_sides(sides_NN, group):
    """This rank's row of the table of x, in HBM [N, 1]: one number for each owner of keys."""
    size = sides_NN.shape[0]
    me = ncc.collective_permute_implicit_current_processing_rank_id(0, group)
    row_N1 = nl.ndarray((size, 1), dtype=nl.int32, buffer=nl.private_hbm)
    mine = sides_NN.ap(pattern=[[1, size], [1, 1]], scalar_offset=me, indirect_dim=0)
    nisa.dma_copy(dst=row_N1, src=mine)  # DMA
    return row_N1


def side_of(row_N1, group, step):
    """x of this step, int32 [1, 1] in SBUF."""
    owner = ncc.collective_permute_implicit_current_processing_rank_id(step, group)
    side_11 = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    entry = row_N1.ap(pattern=[[1, 1], [1, 1]], scalar_offset=owner, indirect_dim=0)
    nisa.dma_copy(dst=side_11, src=entry)  # DMA
    return side_11


def make_buffers(like_k, like_v, dtype, name, items):
    """Two HBM buffers [1, I, C, S, D + E], keys and values (or their gradients) side by side.

    items: the I (batch, key/value head) pairs of this core; with two, each sends its own.
    """
    _, _, chunks, num_rows, head_dim = like_k.shape
    shape = (1, len(items), chunks, num_rows, head_dim + like_v.shape[4])
    here = nl.ndarray(shape, dtype=dtype, buffer=nl.private_hbm, name=name + "_0")
    there = nl.ndarray(shape, dtype=dtype, buffer=nl.private_hbm, name=name + "_1")
    return here, there


def pack(buffer, k, v, items):
    """Copy keys and values side by side into a message."""
    chunks, head_dim, width = k.shape[2], k.shape[4], buffer.shape[4]
    for i in range(len(items)):
        b, g = items[i]
        for c in range(chunks):
            nisa.dma_copy(dst=buffer[0, i, c, :, 0:head_dim], src=k[b, g, c, :, :])  # DMA
            nisa.dma_copy(dst=buffer[0, i, c, :, head_dim:width], src=v[b, g, c, :, :])  # DMA


def unpack(k, v, buffer, items):
    """Copy a message apart."""
    chunks, head_dim, width = k.shape[2], k.shape[4], buffer.shape[4]
    for i in range(len(items)):
        b, g = items[i]
        for c in range(chunks):
            nisa.dma_copy(dst=k[b, g, c, :, :], src=buffer[0, i, c, :, 0:head_dim])  # DMA
            nisa.dma_copy(dst=v[b, g, c, :, :], src=buffer[0, i, c, :, head_dim:width])  # DMA


def send_on(src, dst, group):
    """Pass a message to the next rank of the ring, which the runtime chose."""
    ncc.collective_permute_implicit(
        srcs_by_channel=[[src]], dsts_by_channel=[[dst]], replica_group=group, channel_ids=[0]
    )
