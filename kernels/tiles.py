"""What the kernels share: tile sizes, sentinels, loads, on-chip transposes, and who does what.

Letters: P partitions, F free elements per partition; B batch, H query heads, G key/value heads,
S query rows, K keys, D head dim of q and k, E head dim of v; in a tile M <= 128 query rows,
J <= 128 keys, N <= 512 of either; C <= 128 of D or E (one contraction).

Everything here is inlined into the kernel that calls it. Only NKI that versions 0.2 to 0.6 share
is used; so no slice is sliced again (0.2 cannot), and tensors are passed whole with indices. A tile
that is cut short at the end of a sequence has fewer partitions: nothing is padded.
"""

import nki.isa as nisa
import nki.language as nl

ROWS = 128  # the partition count of SBUF and PSUM: rows of one tile, and the longest contraction
WIDTH = 512  # the widest moving operand, and one PSUM bank of fp32

# lse of a row that has seen nothing, in both directions: minus infinity without its NaN.
EMPTY_LSE = -1.0e30
# At or below this an lse counts as EMPTY_LSE.
EMPTY_LSE_LIMIT = -1.0e29


def spans(total, size):
    """(start, length) of the pieces of `total` elements, `size` at a time."""
    pieces = []
    for start in range(0, total, size):
        pieces.append((start, min(size, total - start)))
    return pieces


def my_items(num_batches, num_groups):
    """(batch, key/value head) pairs of this core: all of them, or its half on two cores (LNC2).

    Both cores follow the same control flow, so with two the number of pairs is even (host).
    """
    items_per_core = num_batches * num_groups // nl.num_programs(0)
    items = []
    for step in range(items_per_core):
        item = nl.program_id(0) * items_per_core + step
        items.append((item // num_groups, item % num_groups))
    return items


def query_units(num_heads, num_groups, g, num_rows):
    """(head, first row, rows) of every row tile of the query heads that share key/value head g.

    By row, then by head: neighbours can be one wide operand, at a similar distance to the diagonal.
    """
    heads_per_group = num_heads // num_groups
    units = []
    tiles = spans(num_rows, ROWS)
    for t in range(len(tiles)):
        start, rows = tiles[t]
        for h in range(g * heads_per_group, (g + 1) * heads_per_group):
            units.append((h, start, rows))
    return units


def lengths_of(tiles):
    """The last number of every tile or unit: its rows."""
    lengths = []
    for t in range(len(tiles)):
        lengths.append(tiles[t][-1])
    return lengths


def is_gen2():
    """Whether this is NeuronCore-v2: no range_select, no transpose mode."""
    return nisa.get_nc_version() == nisa.nc_version.gen2


def make_identity(dtype):
    """The [128, 128] identity that gen2's transpose multiplies by; later chips need none."""
    if is_gen2():
        return nl.shared_identity_matrix(ROWS, dtype=dtype)
    return None


def transpose(dst_FP, data_PF, identity_PP):
    """Write the transpose of an SBUF tile to another SBUF tile, through PSUM.

    gen2 has no transpose mode: there a transpose is a matmul with the identity, which lands in fp32
    and spreads NaN and Inf along rows. From gen3 it is bit-exact and keeps the dtype.
    """
    num_rows, num_cols = data_PF.shape
    if is_gen2():
        t_psum_FP = nl.ndarray((num_cols, num_rows), dtype=nl.float32, buffer=nl.psum)
        eye_PP = identity_PP[0:num_rows, 0:num_rows]
        nisa.nc_matmul(dst=t_psum_FP, stationary=data_PF, moving=eye_PP)  # TensorE  PF,PP->FP
    else:
        t_psum_FP = nl.ndarray((num_cols, num_rows), dtype=data_PF.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=t_psum_FP, data=data_PF)  # TensorE
    nisa.tensor_copy(dst=dst_FP, src=t_psum_FP)  # VectorE


def whole(hbm_BHSD):
    """All rows of an HBM tensor as a place to load from and store to."""
    rows, width = hbm_BHSD.shape[2], hbm_BHSD.shape[3]
    return {"hbm": hbm_BHSD, "kind": "whole", "pair": (), "rows": rows, "width": width}


def chunk(hbm_BHCSD, index, first_column, width):
    """Chunk number `index` of the rows of an HBM tensor, and some of its columns, as such."""
    return {
        "hbm": hbm_BHCSD,
        "kind": "chunk",
        "pair": (),
        "index": index,
        "first": first_column,
        "rows": hbm_BHCSD.shape[3],
        "width": width,
    }


def moving_chunk(hbm_BHCSD, index_11, first_column, width):
    """The same with a number known at run time only, int32 [1, 1] in SBUF.

    DMA adds it to the address, so that one program serves every rank.
    """
    place = chunk(hbm_BHCSD, index_11, first_column, width)
    place["kind"] = "moving"
    return place


def rows_of(place, b, h, start, count):
    """Rows start to start + count of one head at a place, as an operand of a DMA."""
    hbm = place["hbm"]
    if len(place["pair"]) > 0:  # a tensor that counts its heads in its own way
        b, h = place["pair"]
    if place["kind"] == "whole":
        return hbm[b, h, start : start + count, :]
    first, width = place["first"], place["width"]
    if place["kind"] == "chunk":
        return hbm[b, h, place["index"], start : start + count, first : first + width]
    _, num_heads, num_chunks, num_rows, row = hbm.shape
    before = ((b * num_heads + h) * num_chunks * num_rows + start) * row + first
    return hbm.ap(
        pattern=[[row, count], [1, width]],
        offset=before,
        scalar_offset=place["index"],
        indirect_dim=2,
    )


def load_rows(place, b, h):
    """Load one head [S, D] as [128, tiles, D]: row t * 128 + p on partition p, index t."""
    tiles = spans(place["rows"], ROWS)
    dtype = place["hbm"].dtype
    out_PTD = nl.ndarray((ROWS, len(tiles), place["width"]), dtype=dtype, buffer=nl.sbuf)
    for t in range(len(tiles)):
        start, rows = tiles[t]
        src = rows_of(place, b, h, start, rows)
        nisa.dma_copy(dst=out_PTD[0:rows, t, :], src=src)  # DMA
    return out_PTD


def load_units(place, b, units):
    """Load the rows of some units as [128, units, D]."""
    dtype = place["hbm"].dtype
    out_MUD = nl.ndarray((ROWS, len(units), place["width"]), dtype=dtype, buffer=nl.sbuf)
    for u in range(len(units)):
        h, start, rows = units[u]
        src = rows_of(place, b, h, start, rows)
        nisa.dma_copy(dst=out_MUD[0:rows, u, :], src=src)  # DMA
    return out_MUD


def store_units(place, b, units, values_MUD):
    """Write [128, units, D], the rows of some units."""
    for u in range(len(units)):
        h, start, rows = units[u]
        dst = rows_of(place, b, h, start, rows)
        nisa.dma_copy(dst=dst, src=values_MUD[0:rows, u, :])  # DMA


def make_pieces(head_dim, num_columns, dtype):
    """Room for [head_dim, columns], cut along head_dim into pieces of at most 128 partitions."""
    pieces = []
    chunks = spans(head_dim, ROWS)
    for c in range(len(chunks)):
        pieces.append(nl.ndarray((chunks[c][1], num_columns), dtype=dtype, buffer=nl.sbuf))
    return pieces


def transpose_unit(pieces_CN, rows_PTD, t, columns, identity_PP):
    """Write tile t of [128, tiles, D] to a range of columns of its transpose, piece by piece."""
    first, stop = columns
    chunks = spans(rows_PTD.shape[2], ROWS)
    for c in range(len(chunks)):
        start, count = chunks[c]
        tile_PC = rows_PTD[0 : stop - first, t, start : start + count]
        transpose(pieces_CN[c][:, first:stop], tile_PC, identity_PP)


def transpose_tiles(rows_PTD, lengths, identity_PP):
    """The transposes of all tiles side by side; lengths: rows of each tile."""
    total = 0
    for t in range(len(lengths)):
        total += lengths[t]
    pieces = make_pieces(rows_PTD.shape[2], total, rows_PTD.dtype)
    column = 0
    for t in range(len(lengths)):
        transpose_unit(pieces, rows_PTD, t, (column, column + lengths[t]), identity_PP)
        column += lengths[t]
    return pieces


def contract(dst_psum, stationary_pieces, stationary_span, moving_pieces, moving_span):
    """dst (+)= stationary^T moving over all pieces of the head dim; spans are column ranges."""
    s0, s1 = stationary_span
    m0, m1 = moving_span
    for c in range(len(stationary_pieces)):
        stationary_CM = stationary_pieces[c][:, s0:s1]
        moving_CN = moving_pieces[c][:, m0:m1]
        nisa.nc_matmul(  # TensorE  CM,CN->MN
            dst=dst_psum, stationary=stationary_CM, moving=moving_CN
        )
