"""One tile of transposed probabilities, pT = exp(f * (x - c)), and what masks do to it.

Does: scores of one key tile, the cap, the shift, the exponential, the mask. Does not: sum them or
multiply by v.

Letters as in flash_fwd.py: J <= 128 keys on partitions, N query columns of up to four units.
"""

import nki.isa as nisa
import nki.language as nl

from .masks import cut_past_queries, inside, keep_inside, on_diagonal
from .shift import subtract_shift
from .tiles import contract, is_gen2


def probabilities(queries, keys, limits, shift, options, t, first_unit):
    """pT [J, N] = exp(f * (x - c)) of one key tile for the columns of first_unit and later.

    In the input dtype, 0 where a query does not see a key. Masked scores may be far above c: they
    are replaced, never multiplied by zero.
    """
    key_start, num_keys = keys["tiles"][t]
    columns = queries["columns"]
    first, stop = columns[first_unit][0], columns[len(columns) - 1][1]
    s_psum_JN = nl.ndarray((num_keys, stop - first), dtype=nl.float32, buffer=nl.psum)
    key_span = (key_start, key_start + num_keys)
    contract(s_psum_JN, keys["kT"], key_span, queries["qT"], (first, stop))
    x_JN, factor = s_psum_JN, options["scale"]
    if options["softcap"] != 0.0:
        x_JN, factor = capped(s_psum_JN, shift, (first, stop), options)
    elif len(shift) > 0:
        subtract_shift(s_psum_JN, shift, (first, stop))
    if options["mask"] == "interval" and not is_gen2():
        x_JN = select_interval(x_JN, queries, limits, t, first_unit)
    pT_JN = nl.ndarray((num_keys, stop - first), dtype=queries["dtype"], buffer=nl.sbuf)
    nisa.activation(dst=pT_JN, op=nl.exp, data=x_JN, scale=factor)  # ScalarE
    if options["mask"] == "interval" and is_gen2():
        return choose_interval(pT_JN, queries, limits, t, first_unit)
    cut_diagonals(pT_JN, queries, options["mask"], key_start, first_unit)
    return pT_JN


def capped(s_psum_JN, shift, column_span, options):
    """x = tanh(scale * s / softcap), less its shift: fp32 in SBUF; and the factor in the exp."""
    softcap = options["softcap"]
    x_JN = nl.ndarray(s_psum_JN.shape, dtype=nl.float32, buffer=nl.sbuf)
    ratio = options["scale"] / softcap
    nisa.activation(dst=x_JN, op=nl.tanh, data=s_psum_JN, scale=ratio)  # ScalarE
    if len(shift) > 0:
        c_psum_JN = nl.ndarray(s_psum_JN.shape, dtype=nl.float32, buffer=nl.psum)
        subtract_shift(c_psum_JN, shift, column_span)
        nisa.tensor_tensor(dst=x_JN, data1=c_psum_JN, data2=x_JN, op=nl.add)  # VectorE
    return x_JN, softcap


def select_interval(x_JN, queries, limits, t, first_unit):
    """x where the query is one that sees the key, else the least fp32; from gen3. VectorE."""
    num_keys = x_JN.shape[0]
    first_JT, stop_JT = limits[1]
    first_J1, stop_J1 = first_JT[0:num_keys, t : t + 1], stop_JT[0:num_keys, t : t + 1]
    kept_JN = nl.ndarray(x_JN.shape, dtype=nl.float32, buffer=nl.sbuf)
    units, columns = queries["units"], queries["columns"]
    origin = columns[first_unit][0]
    for u in range(first_unit, len(units)):
        _, start, _ = units[u]
        first, stop = columns[u][0] - origin, columns[u][1] - origin
        keep_inside(kept_JN[:, first:stop], x_JN[:, first:stop], first_J1, stop_J1, start)
    return kept_JN


def choose_interval(pT_JN, queries, limits, t, first_unit):
    """pT where the query is one that sees the key, else 0; gen2. VectorE."""
    num_keys = pT_JN.shape[0]
    first_JT, stop_JT = limits[1]
    first_J1, stop_J1 = first_JT[0:num_keys, t : t + 1], stop_JT[0:num_keys, t : t + 1]
    seen_JN = nl.ndarray(pT_JN.shape, dtype=nl.uint8, buffer=nl.sbuf)
    units, columns = queries["units"], queries["columns"]
    origin = columns[first_unit][0]
    for u in range(first_unit, len(units)):
        _, start, rows = units[u]
        first, stop = columns[u][0] - origin, columns[u][1] - origin
        indices_JM = limits[2][0:num_keys, 0:rows]
        inside(seen_JN[:, first:stop], indices_JM, first_J1, stop_J1, start)
    kept_JN = nl.ndarray(pT_JN.shape, dtype=pT_JN.dtype, buffer=nl.sbuf)
    nisa.memset(dst=kept_JN, value=0.0)
    nisa.tensor_copy_predicated(dst=kept_JN, src=pT_JN, predicate=seen_JN)
    return kept_JN


def cut_diagonals(pT_JN, queries, mask, key_start, first_unit):
    """Zero what lies past the diagonal in the columns of every unit whose diagonal crosses."""
    units, columns = queries["units"], queries["columns"]
    origin = columns[first_unit][0]
    for u in range(first_unit, len(units)):
        _, start, _ = units[u]
        if on_diagonal(mask, start, key_start, pT_JN.shape[0]):
            first, stop = columns[u][0] - origin, columns[u][1] - origin
            cut_past_queries(pT_JN[:, first:stop], mask, start - key_start, 0.0)
