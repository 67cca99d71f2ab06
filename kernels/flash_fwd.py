"""Flash attention forward over one rectangle of scores: q, k, v -> o, lse.

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim;
in a tile M = 128 query rows, N <= 512 keys, J = 128 keys; T row tiles of a head.

The recurrence over key tiles, per query row (online softmax, Milakov and Gimelshein 2018;
FlashAttention-2, Dao 2023):

    m'  = max(m, max_n s_n)                     s = q k^T, before the scale
    p_n = exp(scale * s_n - scale * m')
    a   = exp(scale * m - scale * m')
    l   = a * l + sum_n p_n
    acc = a * acc + sum_n p_n v_n               at the end o = acc / l,  lse = scale * m + log l

Precision: q, k, v and p are in the input dtype (bf16 or fp32); scores, m, l, acc, o and lse are
fp32. A row that sees nothing leaves with o = 0 and lse = scale * EMPTY_ROW_MAX.

Not here: windows, documents, lengths that are no multiple of 128, head dim over 128.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .tiles import (
    EMPTY_ROW_MAX,
    KEY_TILE,
    MASKED_SCORE,
    ROW_SUM_FLOOR,
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


@nki.jit
def flash_fwd(q_BHSD, k_BGKD, v_BGKD, mask, scale):
    """Attention of every query row over one block of keys.

    Args:
        q_BHSD: HBM [B, H, S, D], bf16 or fp32; S a multiple of 128, D at most 128.
        k_BGKD, v_BGKD: HBM [B, G, K, D], q's dtype; K a multiple of 128, G divides H.
        mask: "full", "causal" (row i sees keys 0..i) or "strict" (row i sees keys 0..i-1);
            the last two need S == K.
        scale: factor on the scores, a compile-time float.

    Returns:
        o [B, H, S, D] fp32, normalised, and lse [B, H, S, 1] fp32, the natural logarithm with the
        scale included.
    """
    num_batches, num_heads, num_rows = q_BHSD.shape[0], q_BHSD.shape[1], q_BHSD.shape[2]
    num_groups = k_BGKD.shape[1]
    heads_per_group = num_heads // num_groups
    o_hbm_BHSD = nl.ndarray(q_BHSD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    lse_hbm_BHS1 = nl.ndarray(
        (num_batches, num_heads, num_rows, 1), dtype=nl.float32, buffer=nl.shared_hbm
    )
    identity_PP = make_identity(q_BHSD.dtype)

    for b in range(num_batches):
        for g in range(num_groups):
            kT_DK = load_transposed(k_BGKD, b, g, identity_PP)
            v_JKD = load_by_tile(v_BGKD, b, g)
            for h in range(g * heads_per_group, (g + 1) * heads_per_group):
                m_MT = nl.ndarray((ROWS, num_rows // ROWS), dtype=nl.float32, buffer=nl.sbuf)
                l_MT = nl.ndarray((ROWS, num_rows // ROWS), dtype=nl.float32, buffer=nl.sbuf)
                nisa.memset(dst=m_MT, value=EMPTY_ROW_MAX)
                nisa.memset(dst=l_MT, value=0.0)
                for t in range(num_rows // ROWS):
                    q_MD = load_rows(q_BHSD, b, h, t * ROWS)
                    m_M1 = m_MT[:, t : t + 1]
                    l_M1 = l_MT[:, t : t + 1]
                    acc_MD = attend_rows(
                        q_MD, kT_DK, v_JKD, m_M1, l_M1, t * ROWS, mask, scale, identity_PP
                    )
                    o_MD = normalise(acc_MD, l_M1)
                    nisa.dma_copy(dst=o_hbm_BHSD[b, h, t * ROWS : (t + 1) * ROWS, :], src=o_MD)
                store_lse(lse_hbm_BHS1, b, h, m_MT, l_MT, scale)
    return o_hbm_BHSD, lse_hbm_BHS1


def attend_rows(q_MD, kT_DK, v_JKD, m_M1, l_M1, q_start, mask, scale, identity_PP):
    """128 query rows over all their visible keys: updates m and l, returns acc [128, D] fp32."""
    head_dim, num_keys = kT_DK.shape
    qT_DM = nl.ndarray((head_dim, ROWS), dtype=q_MD.dtype, buffer=nl.sbuf)
    transpose(qT_DM, q_MD, identity_PP)
    acc_MD = nl.ndarray((ROWS, head_dim), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=acc_MD, value=0.0)

    for key_start in range(0, num_keys, KEY_TILE):
        tile_keys = num_visible(mask, q_start, key_start, min(KEY_TILE, num_keys - key_start))
        if tile_keys > 0:
            s_MN = score_tile(
                qT_DM, kT_DK[:, key_start : key_start + tile_keys], q_start, key_start, mask
            )
            p_MN, alpha_M1 = update_softmax(s_MN, m_M1, l_M1, scale, q_MD.dtype)
            accumulate_output(acc_MD, p_MN, alpha_M1, v_JKD, key_start // ROWS, identity_PP)
    return acc_MD


def score_tile(qT_DM, kT_DN, q_start, key_start, mask):
    """Scores [128, N] fp32 before the scale: in PSUM, or in SBUF with the diagonal masked."""
    num_keys = kT_DN.shape[1]
    s_psum_MN = nl.ndarray((ROWS, num_keys), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=s_psum_MN, stationary=qT_DM, moving=kT_DN)  # TensorE  DM,DN->MN
    if not has_diagonal(mask, q_start, key_start, num_keys):
        return s_psum_MN
    s_MN = nl.ndarray((ROWS, num_keys), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=s_MN, src=s_psum_MN)  # VectorE: GpSimdE, which masks, cannot read PSUM
    mask_diagonal(s_MN[:, num_keys - ROWS : num_keys], mask, MASKED_SCORE)
    return s_MN


def update_softmax(s_MN, m_M1, l_M1, scale, dtype):
    """Fold one score tile into the running m and l; returns p [128, N] and alpha [128, 1] fp32."""
    tile_max_M1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=tile_max_M1, op=nl.maximum, data=s_MN, axis=1)  # VectorE
    nisa.tensor_tensor(dst=tile_max_M1, data1=tile_max_M1, data2=m_M1, op=nl.maximum)  # VectorE
    bias_M1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=bias_M1, data=tile_max_M1, op0=nl.multiply, operand0=-scale)  # VectorE

    p_MN = nl.ndarray(s_MN.shape, dtype=dtype, buffer=nl.sbuf)
    p_sum_M1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(  # ScalarE: p = exp(scale * s - scale * m'), and its row sum before rounding
        dst=p_MN,
        op=nl.exp,
        data=s_MN,
        bias=bias_M1,
        scale=scale,
        reduce_op=nl.add,
        reduce_res=p_sum_M1,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    alpha_M1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=alpha_M1, op=nl.exp, data=m_M1, bias=bias_M1, scale=scale)  # ScalarE
    nisa.scalar_tensor_tensor(  # VectorE: l = alpha * l + sum p
        dst=l_M1, data=l_M1, op0=nl.multiply, operand0=alpha_M1, op1=nl.add, operand1=p_sum_M1
    )
    nisa.tensor_copy(dst=m_M1, src=tile_max_M1)  # VectorE
    return p_MN, alpha_M1


def accumulate_output(acc_MD, p_MN, alpha_M1, v_JKD, first_sub_tile, identity_PP):
    """acc = alpha * acc + p v, 128 keys at a time: the transposed p is the stationary operand."""
    num_keys = p_MN.shape[1]
    o_psum_MD = nl.ndarray(acc_MD.shape, dtype=nl.float32, buffer=nl.psum)
    for j in range(num_keys // ROWS):
        pT_JM = nl.ndarray((ROWS, ROWS), dtype=p_MN.dtype, buffer=nl.sbuf)
        transpose(pT_JM, p_MN[:, j * ROWS : (j + 1) * ROWS], identity_PP)
        v_JD = v_JKD[:, first_sub_tile + j, :]
        nisa.nc_matmul(  # TensorE  JM,JD->MD
            dst=o_psum_MD, stationary=pT_JM, moving=v_JD
        )
    nisa.scalar_tensor_tensor(  # VectorE
        dst=acc_MD, data=acc_MD, op0=nl.multiply, operand0=alpha_M1, op1=nl.add, operand1=o_psum_MD
    )


def normalise(acc_MD, l_M1):
    """o = acc / l; a row that saw nothing has acc = 0 and l = 0, and l gets its floor in place."""
    nisa.tensor_scalar(dst=l_M1, data=l_M1, op0=nl.maximum, operand0=ROW_SUM_FLOOR)  # VectorE
    inverse_M1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse_M1, data=l_M1)  # VectorE
    o_MD = nl.ndarray(acc_MD.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=o_MD, data=acc_MD, op0=nl.multiply, operand0=inverse_M1)  # VectorE
    return o_MD


def store_lse(lse_hbm_BHS1, b, h, m_MT, l_MT, scale):
    """lse = scale * m + log l for a whole head: only here does ScalarE change from exp to log."""
    lse_MT = nl.ndarray(l_MT.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=lse_MT, op=nl.log, data=l_MT)  # ScalarE
    nisa.scalar_tensor_tensor(  # VectorE
        dst=lse_MT, data=m_MT, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=lse_MT
    )
    for t in range(lse_MT.shape[1]):
        rows_hbm = lse_hbm_BHS1[b, h, t * ROWS : (t + 1) * ROWS, :]
        nisa.dma_copy(dst=rows_hbm, src=lse_MT[:, t : t + 1])  # DMA
