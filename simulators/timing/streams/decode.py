"""A public decode attention kernel, one query per head, as an instruction stream.

Written from its description: q [D, H], k and v [G, D, S] in fp32 and in HBM; per key/value head and
128 keys: scores, running maximum and sum, exp, transposes of weights and values, second product,
running output rescaled. Everything between two products is on VectorE but for exp.

Letters: H query heads, G key/value heads, D head dim, S keys.
Source: nki-samples pull request 133 at 14c1acc, contributed/decode_attention.py.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

KEYS = 128
WIDE = {"dtype": "float32"}


def decode(keys: int, *, num_heads: int = 8, num_kv_heads: int = 2, head_dim: int = 128) -> Log:
    """The log for `keys` cached keys, a multiple of 128."""
    s = Stream()
    group = num_heads // num_kv_heads
    q = s.hbm(head_dim, num_heads, **WIDE)
    k, v = (s.hbm(num_kv_heads, head_dim, keys, **WIDE) for _ in range(2))
    out = s.hbm(num_heads, head_dim, **WIDE)
    for head in range(num_kv_heads):
        mine = slice(head * group, (head + 1) * group)
        q_tile = s.load(q[:, mine])
        top, total = s.sbuf(group, 1, **WIDE), s.sbuf(group, 1, **WIDE)
        acc = s.sbuf(group, head_dim, **WIDE)
        for state in (top, acc, total):
            s.vector("memset", state)
        for start in range(0, keys, KEYS):
            part = slice(start, start + KEYS)
            k_tile, v_tile = (_load(s, side[head, :, part]) for side in (k, v))
            _tile(s, q_tile, k_tile, v_tile, top, total, acc)
        inverse, result = s.sbuf(group, 1, **WIDE), s.sbuf(group, head_dim, **WIDE)
        s.vector("reciprocal", inverse, total)
        s.vector("tensor_scalar", result, acc, inverse)
        s.dma(out[mine], result)
    return s.log


def _load(s: Stream, side: Tile) -> Tile:
    tile = s.sbuf(*side.shape[1:], **WIDE)
    s.dma(tile, side)
    return tile


def _out_of_psum(s: Stream, bank: Tile) -> Tile:
    tile = s.sbuf(*bank.shape, **WIDE)
    s.vector("tensor_copy", tile, bank)
    return tile


def _transposed(s: Stream, data: Tile) -> Tile:
    bank = s.psum(data.shape[1], data.shape[0])
    s.transpose(bank, data)
    return _out_of_psum(s, bank)


def _with_rows(s: Stream, data: Tile, *rows: Tile) -> Tile:
    """data, changed by a number per row."""
    result = s.sbuf(*data.shape, **WIDE)
    s.vector("tensor_scalar", result, data, *rows)
    return result


def _tile(s: Stream, q: Tile, k: Tile, v: Tile, top: Tile, total: Tile, acc: Tile) -> None:
    """128 keys: the running maximum, sum and output are brought up to date."""
    group = q.shape[1]
    bank = s.psum(group, KEYS)
    s.matmul(bank, q, k)
    scores = _with_rows(s, _out_of_psum(s, bank))
    tile_top, new_top = s.sbuf(group, 1, **WIDE), s.sbuf(group, 1, **WIDE)
    s.vector("tensor_reduce", tile_top, scores)
    s.vector("tensor_tensor", new_top, top, tile_top)
    factor = _exp(s, _with_rows(s, top, new_top))
    weights = _exp(s, _with_rows(s, scores, new_top))
    tile_sum, new_total = s.sbuf(group, 1, **WIDE), s.sbuf(group, 1, **WIDE)
    s.vector("tensor_reduce", tile_sum, weights)
    s.vector("tensor_tensor", new_total, _with_rows(s, total, factor), tile_sum)
    weights_turned, v_turned = _transposed(s, weights), _transposed(s, v)
    product = s.psum(group, v.shape[0])
    s.matmul(product, weights_turned, v_turned)
    added = _out_of_psum(s, product)
    new_acc = s.sbuf(*acc.shape, **WIDE)
    s.vector("tensor_tensor", new_acc, _with_rows(s, acc, factor), added)
    for old, new in ((top, new_top), (total, new_total), (acc, new_acc)):
        s.vector("tensor_copy", old, new)


def _exp(s: Stream, data: Tile) -> Tile:
    result = s.sbuf(*data.shape, **WIDE)
    s.scalar("exp", result, data)
    return result
