"""The ring as data: who holds which tokens, what each step computes, what moves.

Does: turn (layout, mask, ring size, ring order, lengths) into a `Plan` of integers and slices.
Does not: touch tensors, ranks of a process group, or time. Standard library only, so that the eager
executor, a fused kernel and the cluster simulator can all read the same plan.

Read `layout.py` (who holds what), `masks.py` (what is seen), `rings.py` (who does what when) and
`plan.py` (the result) in this order.
Letters: n ring size, S tokens of the whole sequence, run a `range` of global token positions.
Source: Ring Attention (arXiv 2310.01889), Striped Attention (arXiv 2311.09431) and the zigzag
order of Llama-3 style context parallelism.
"""

from nxd_cp.schedule.layout import LAYOUTS, Layout, padded_len, seq_len_multiple, token_runs
from nxd_cp.schedule.masks import Bounded, Mask, MaskKind, Tile
from nxd_cp.schedule.plan import (
    GRADIENT_ITEMSIZE,
    HEADER_BYTES,
    Move,
    Plan,
    Rows,
    Step,
    Traffic,
    num_rows,
)
from nxd_cp.schedule.rings import Window, make_plan, one_move, ring_moves, spare, union

__all__ = [
    "GRADIENT_ITEMSIZE",
    "HEADER_BYTES",
    "LAYOUTS",
    "Bounded",
    "Layout",
    "Mask",
    "MaskKind",
    "Move",
    "Plan",
    "Rows",
    "Step",
    "Tile",
    "Traffic",
    "Window",
    "make_plan",
    "num_rows",
    "one_move",
    "padded_len",
    "ring_moves",
    "seq_len_multiple",
    "spare",
    "token_runs",
    "union",
]
