"""What the kernels share: tile sizes, the stand-in for minus infinity, and the on-chip transpose.

Letters: P partitions, F free elements per partition; B batch, H heads, S rows, D head dim; in a
tile M = 128 query rows, N keys, J = 128 keys.

Everything here is inlined into the kernel that calls it. Only NKI that versions 0.2 to 0.6 share
is used; so no slice is sliced again (0.2 cannot), and HBM tensors are passed whole with indices.
"""

import nki.isa as nisa
import nki.language as nl

ROWS = 128  # query rows of one tile, and keys of one sub-tile: the partition count of SBUF and PSUM
KEY_TILE = 512  # keys of one score tile: one PSUM bank of fp32, the widest moving operand

# A masked score. It lives in fp32 tiles only and is finite, so that no NaN can arise from it.
MASKED_SCORE = -1.0e30
# Where the running row maximum starts: so far above a masked score that exp() of one is exactly 0
# even in a row that has seen nothing yet, and far below every real score.
EMPTY_ROW_MAX = -1.0e29
# Floor of the row sum before log and reciprocal; a row that saw a key has a sum near 1 or above.
ROW_SUM_FLOOR = 2.0**-40


def make_identity(dtype):
    """The [128, 128] identity that gen2's transpose multiplies by; later chips need none."""
    if nisa.get_nc_version() == nisa.nc_version.gen2:
        return nl.shared_identity_matrix(ROWS, dtype=dtype)
    return None


def transpose(dst_FP, data_PF, identity_PP):
    """Write the transpose of an SBUF tile to another SBUF tile, through PSUM.

    gen2 has no transpose mode: there a transpose is a matmul with the identity, which lands in fp32
    and spreads NaN and Inf along rows. From gen3 it is bit-exact and keeps the dtype.
    """
    num_rows, num_cols = data_PF.shape
    if nisa.get_nc_version() == nisa.nc_version.gen2:
        t_psum_FP = nl.ndarray((num_cols, num_rows), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=t_psum_FP, stationary=data_PF, moving=identity_PP)  # TensorE  PF,PP->FP
    else:
        t_psum_FP = nl.ndarray((num_cols, num_rows), dtype=data_PF.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=t_psum_FP, data=data_PF)  # TensorE
    nisa.tensor_copy(dst=dst_FP, src=t_psum_FP)  # VectorE or ScalarE


def load_rows(hbm_BHSD, b, h, start):
    """Load rows start to start + 128 of one head to a fresh SBUF tile, rows on partitions."""
    tile_MD = nl.ndarray((ROWS, hbm_BHSD.shape[3]), dtype=hbm_BHSD.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile_MD, src=hbm_BHSD[b, h, start : start + ROWS, :])  # DMA
    return tile_MD


def load_transposed(hbm_BHSD, b, h, identity_PP):
    """Load one head [S, D] as [D, S]: every 128-row tile is loaded and transposed on chip."""
    num_rows, head_dim = hbm_BHSD.shape[2], hbm_BHSD.shape[3]
    out_DS = nl.ndarray((head_dim, num_rows), dtype=hbm_BHSD.dtype, buffer=nl.sbuf)
    for start in range(0, num_rows, ROWS):
        tile_MD = load_rows(hbm_BHSD, b, h, start)
        transpose(out_DS[:, start : start + ROWS], tile_MD, identity_PP)
    return out_DS


def load_by_tile(hbm_BHSD, b, h):
    """Load one head [S, D] as [128, S / 128, D]: row j * 128 + p on partition p, index j."""
    num_tiles, head_dim = hbm_BHSD.shape[2] // ROWS, hbm_BHSD.shape[3]
    out_JND = nl.ndarray((ROWS, num_tiles, head_dim), dtype=hbm_BHSD.dtype, buffer=nl.sbuf)
    for j in range(num_tiles):
        nisa.dma_copy(dst=out_JND[:, j, :], src=hbm_BHSD[b, h, j * ROWS : (j + 1) * ROWS, :])
    return out_JND


def num_visible(mask, q_start, key_start, num_keys):
    """How many keys of the tile that starts at key_start the 128 queries from q_start can reach.

    full: all of them. causal and strict: up to and including the 128-key sub-tile on the diagonal,
    whose own triangle `mask_diagonal` cuts. Zero or less: nothing to compute.
    """
    if mask == "full":
        return num_keys
    return min(num_keys, q_start + ROWS - key_start)


def has_diagonal(mask, q_start, key_start, num_keys):
    """True if the last 128 of these num_keys keys are the queries' own positions."""
    return mask != "full" and key_start + num_keys == q_start + ROWS


def mask_diagonal(tile_MN, mask, fill):
    """Fill the invisible triangle of a [128, 128] diagonal sub-tile in SBUF, in place. GpSimdE.

    Row m keeps column n where m - n >= 0 (causal) or m - n >= 1 (strict).
    """
    offset = 0
    if mask == "strict":
        offset = -1
    nisa.affine_select(
        dst=tile_MN,
        pattern=[[-1, ROWS]],
        offset=offset,
        channel_multiplier=1,
        on_true_tile=tile_MN,
        on_false_value=fill,
        cmp_op=nl.greater_equal,
    )
