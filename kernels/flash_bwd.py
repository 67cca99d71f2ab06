"""Flash attention backward over one rectangle of scores: do, q, k, v, lse, delta -> dq, dk, dv.

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim;
in a tile M = 128 query rows, N <= 512 keys, J = 128 keys.

The mathematics (FlashAttention-2, Dao 2023, algorithm 2), with lse and delta = rowsum(do * o) of
the whole row:

    p  = exp(scale * q k^T - lse)
    dv = p^T do
    ds = p * (do v^T - delta)
    dq = scale * ds k
    dk = scale * ds^T q

Keys are the outer loop, so that dk and dv of one key tile stay in PSUM while all query heads of the
group and all their rows pass by; dq gathers in fp32 in SBUF. Queries lie on partitions: p and ds
are then the stationary operands of dv and dk as they are, and only dq needs ds transposed.

Precision: q, k, v, do, p and ds are in the input dtype (bf16 or fp32); scores, do v^T, lse, delta
and all three gradients are fp32. A row without a visible key must come with lse = EMPTY_ROW_LSE.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .tiles import (
    KEY_TILE,
    ROWS,
    has_diagonal,
    load_by_tile,
    load_rows,
    load_transposed,
    make_identity,
    mask_diagonal,
    num_visible,
    transpose,
)

# The host passes this as lse for a row that sees no key anywhere: exp(scale * s - lse) is then 0.
EMPTY_ROW_LSE = 1.0e30


@nki.jit
def flash_bwd(do_BHSD, q_BHSD, k_BGKD, v_BGKD, lse_BHS1, delta_BHS1, mask, scale):
    """Gradients of one block of attention.

    Args:
        do_BHSD, q_BHSD: HBM [B, H, S, D], bf16 or fp32; S a multiple of 128, D at most 128.
        k_BGKD, v_BGKD: HBM [B, G, K, D], q's dtype; K a multiple of 128, G divides H.
        lse_BHS1, delta_BHS1: HBM [B, H, S, 1] fp32, of the whole row over all blocks.
        mask: "full", "causal" or "strict", as in the forward kernel.
        scale: factor on the scores, a compile-time float.

    Returns:
        dq [B, H, S, D], dk and dv [B, G, K, D], fp32, summed over the query heads of each group.
    """
    num_batches, num_groups = k_BGKD.shape[0], k_BGKD.shape[1]
    dq_hbm_BHSD = nl.ndarray(q_BHSD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dk_hbm_BGKD = nl.ndarray(k_BGKD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dv_hbm_BGKD = nl.ndarray(v_BGKD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    identity_PP = make_identity(q_BHSD.dtype)
    rows_hbm = (do_BHSD, q_BHSD, lse_BHS1, delta_BHS1)

    for b in range(num_batches):
        for g in range(num_groups):
            keys_and_values = (
                load_transposed(k_BGKD, b, g, identity_PP),
                load_transposed(v_BGKD, b, g, identity_PP),
                load_by_tile(k_BGKD, b, g),
            )
            tiles = group_tiles(q_BHSD, num_groups, g)
            dq_shape = (ROWS, len(tiles), q_BHSD.shape[3])
            dq_MTD = nl.ndarray(dq_shape, dtype=nl.float32, buffer=nl.sbuf)
            for key_start in range(0, k_BGKD.shape[2], KEY_TILE):
                dk_psum_JND, dv_psum_JND = backward_key_tile(
                    rows_hbm, b, tiles, keys_and_values, dq_MTD, key_start, mask, scale, identity_PP
                )
                store_key_gradient(dk_hbm_BGKD, b, g, dk_psum_JND, key_start, scale)
                store_key_gradient(dv_hbm_BGKD, b, g, dv_psum_JND, key_start, 1.0)
            for t in range(len(tiles)):
                h, q_start = tiles[t]
                dq_rows_hbm = dq_hbm_BHSD[b, h, q_start : q_start + ROWS, :]
                nisa.dma_copy(dst=dq_rows_hbm, src=dq_MTD[:, t, :])  # DMA
    return dq_hbm_BHSD, dk_hbm_BGKD, dv_hbm_BGKD


def group_tiles(q_BHSD, num_groups, g):
    """(head, first row) of every 128-row tile of the query heads that share key/value head g."""
    heads_per_group = q_BHSD.shape[1] // num_groups
    tiles = []
    for h in range(g * heads_per_group, (g + 1) * heads_per_group):
        for q_start in range(0, q_BHSD.shape[2], ROWS):
            tiles.append((h, q_start))
    return tiles


def backward_key_tile(
    rows_hbm, b, tiles, keys_and_values, dq_MTD, key_start, mask, scale, identity_PP
):
    """Pass all query tiles of one group by one key tile: returns dk, dv in PSUM, adds into dq."""
    do_BHSD, q_BHSD, lse_BHS1, delta_BHS1 = rows_hbm
    kT_DK, vT_DK, k_JKD = keys_and_values
    head_dim, key_tile = kT_DK.shape[0], min(KEY_TILE, kT_DK.shape[1] - key_start)
    dk_psum_JND = nl.ndarray((ROWS, key_tile // ROWS, head_dim), dtype=nl.float32, buffer=nl.psum)
    dv_psum_JND = nl.ndarray((ROWS, key_tile // ROWS, head_dim), dtype=nl.float32, buffer=nl.psum)
    for t in range(len(tiles)):
        h, q_start = tiles[t]
        num_keys = num_visible(mask, q_start, key_start, key_tile)
        if num_keys > 0:
            q_MD = load_rows(q_BHSD, b, h, q_start)
            do_MD = load_rows(do_BHSD, b, h, q_start)
            lse_M1 = load_rows(lse_BHS1, b, h, q_start)
            delta_M1 = load_rows(delta_BHS1, b, h, q_start)
            kT_DN = kT_DK[:, key_start : key_start + num_keys]
            vT_DN = vT_DK[:, key_start : key_start + num_keys]
            p_MN = recompute_p(q_MD, kT_DN, lse_M1, scale, identity_PP)
            if has_diagonal(mask, q_start, key_start, num_keys):
                mask_diagonal(p_MN[:, num_keys - ROWS : num_keys], mask, 0.0)
            ds_MN = score_gradient(do_MD, vT_DN, p_MN, delta_M1, identity_PP)
            add_key_gradients(dk_psum_JND, dv_psum_JND, p_MN, ds_MN, q_MD, do_MD)
            add_query_gradient(dq_MTD[:, t, :], ds_MN, k_JKD, key_start, scale, identity_PP)
    return dk_psum_JND, dv_psum_JND


def recompute_p(q_MD, kT_DN, lse_M1, scale, identity_PP):
    """p [128, N] = exp(scale * q k^T - lse) in the input dtype, unmasked."""
    num_keys = kT_DN.shape[1]
    qT_DM = nl.ndarray((q_MD.shape[1], ROWS), dtype=q_MD.dtype, buffer=nl.sbuf)
    transpose(qT_DM, q_MD, identity_PP)
    s_psum_MN = nl.ndarray((ROWS, num_keys), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=s_psum_MN, stationary=qT_DM, moving=kT_DN)  # TensorE  DM,DN->MN
    bias_M1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=bias_M1, data=lse_M1, op0=nl.multiply, operand0=-1.0)  # VectorE
    p_MN = nl.ndarray((ROWS, num_keys), dtype=q_MD.dtype, buffer=nl.sbuf)
    nisa.activation(dst=p_MN, op=nl.exp, data=s_psum_MN, bias=bias_M1, scale=scale)  # ScalarE
    return p_MN


def score_gradient(do_MD, vT_DN, p_MN, delta_M1, identity_PP):
    """ds [128, N] = p * (do v^T - delta), without the scale, in the input dtype."""
    doT_DM = nl.ndarray((do_MD.shape[1], ROWS), dtype=do_MD.dtype, buffer=nl.sbuf)
    transpose(doT_DM, do_MD, identity_PP)
    dp_psum_MN = nl.ndarray(p_MN.shape, dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=dp_psum_MN, stationary=doT_DM, moving=vT_DN)  # TensorE  DM,DN->MN
    ds_MN = nl.ndarray(p_MN.shape, dtype=p_MN.dtype, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(  # VectorE
        dst=ds_MN,
        data=dp_psum_MN,
        op0=nl.subtract,
        operand0=delta_M1,
        op1=nl.multiply,
        operand1=p_MN,
    )
    return ds_MN


def add_key_gradients(dk_psum_JND, dv_psum_JND, p_MN, ds_MN, q_MD, do_MD):
    """dv += p^T do and dk += ds^T q, per 128 keys, accumulated in PSUM over all query tiles."""
    for j in range(p_MN.shape[1] // ROWS):
        p_MJ = p_MN[:, j * ROWS : (j + 1) * ROWS]
        ds_MJ = ds_MN[:, j * ROWS : (j + 1) * ROWS]
        nisa.nc_matmul(  # TensorE  MJ,MD->JD
            dst=dv_psum_JND[:, j, :], stationary=p_MJ, moving=do_MD
        )
        nisa.nc_matmul(  # TensorE  MJ,MD->JD
            dst=dk_psum_JND[:, j, :], stationary=ds_MJ, moving=q_MD
        )


def add_query_gradient(dq_MD, ds_MN, k_JKD, key_start, scale, identity_PP):
    """dq += scale * ds k; the first key tile writes, the later ones add."""
    dq_psum_MD = nl.ndarray(dq_MD.shape, dtype=nl.float32, buffer=nl.psum)
    for j in range(ds_MN.shape[1] // ROWS):
        dsT_JM = nl.ndarray((ROWS, ROWS), dtype=ds_MN.dtype, buffer=nl.sbuf)
        transpose(dsT_JM, ds_MN[:, j * ROWS : (j + 1) * ROWS], identity_PP)
        k_JD = k_JKD[:, key_start // ROWS + j, :]
        nisa.nc_matmul(  # TensorE  JM,JD->MD
            dst=dq_psum_MD, stationary=dsT_JM, moving=k_JD
        )
    if key_start == 0:
        nisa.tensor_scalar(dst=dq_MD, data=dq_psum_MD, op0=nl.multiply, operand0=scale)  # VectorE
    else:
        nisa.scalar_tensor_tensor(  # VectorE
            dst=dq_MD, data=dq_psum_MD, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=dq_MD
        )


def store_key_gradient(d_hbm_BGKD, b, g, d_psum_JND, key_start, factor):
    """Write factor * d of one key tile from PSUM through SBUF to HBM."""
    for j in range(d_psum_JND.shape[1]):
        d_JD = nl.ndarray((ROWS, d_psum_JND.shape[2]), dtype=nl.float32, buffer=nl.sbuf)
        d_psum_JD = d_psum_JND[:, j, :]
        nisa.tensor_scalar(dst=d_JD, data=d_psum_JD, op0=nl.multiply, operand0=factor)  # VectorE
        start = key_start + j * ROWS
        nisa.dma_copy(dst=d_hbm_BGKD[b, g, start : start + ROWS, :], src=d_JD)  # DMA
