"""ScalarE's activate2 (gen4): two ALU steps, a function, and an optional reduction.

Shares the reduce registers of scalar_engine.py. Tensor indirection is not implemented.

Source: nki.isa.activate2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api.checks import operator, per_partition
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.log import READ_ACCUMULATOR
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import reduce_cmd as commands
from .generation import need
from .issue import NkiInstruction, issue
from .scalar_engine import REDUCE, check_range, read_out, reduce_into
from .stages import read, write

_STEPS = documented(
    "activate2.steps",
    "nki.isa.activate2",
    "(op0, op1) is multiply with add, subtract or bypass, or add, subtract or bypass with bypass; "
    "two tile operands have one dtype; bypass is not reversed",
)
_PAIRS = (
    ("multiply", "add"),
    ("multiply", "subtract"),
    ("multiply", "bypass"),
    ("add", "bypass"),
    ("subtract", "bypass"),
    ("bypass", "bypass"),
)


def activate2(
    dst: Any,
    op: Any,
    data: Any,
    imm0: Any,
    imm1: Any,
    op0: Any,
    op1: Any,
    relu_param: Any = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: Any = commands.idle,
    name: str | None = None,
) -> NkiInstruction:
    """dst = op((data op0 imm0) op1 imm1), and its reduction over the free dims (gen4)."""
    instr = "nki.isa.activate2"
    run = current(instr)
    need(run, instr, 4)
    function = operator(instr, "op", op, "activate").activate
    assert function is not None, "operator() has checked the role"
    values = read(instr, run, "data", data)
    pair = tuple("bypass" if o is None else getattr(o, "name", "") for o in (op0, op1))
    tiles = [imm for imm in (imm0, imm1) if type(imm) is NkiTensor]
    legal = pair in _PAIRS and len({tile.dtype for tile in tiles}) <= 1
    legal = legal and not (reverse0 and pair[0] == "bypass")
    if not legal or (reverse1 and pair[1] == "bypass"):
        fail(_STEPS, instr, f"op0={op0}, op1={op1}, {reverse0=}, {reverse1=}", data=data)
    for step, imm, reverse in zip(pair, (imm0, imm1), (reverse0, reverse1), strict=True):
        if step != "bypass":
            values = _step(instr, step, values, imm, reverse, data)
    slope = per_partition(instr, "relu_param", relu_param, data)
    if run.values and op.valid is not None:
        check_range(instr, op, values, data)
    if op is OPS["prelu"]:
        below = values * (np.float32(slope) if type(slope) is float else slope)
        values = np.where(values < 0, below, values)
    else:
        values = function(values)
    if reduce_cmd is not commands.idle or reduce_op is not None or reduce_res is not None:
        reduce_into(instr, run, values, data, reduce_op, reduce_cmd, tuple(REDUCE))
    write(instr, run, dst, values, data=data)
    if reduce_res is not None:
        read_out(instr, run, reduce_res, data)
    flags = READ_ACCUMULATOR if reduce_res is not None else 0
    operands = (data, imm0, imm1, reduce_res)
    return issue(run, "activate2", "scalar", dst, operands, data, flags, op.name, name)


def _step(instr: str, step: str, values: Any, imm: Any, reverse: bool, data: NkiTensor) -> Any:
    """One ALU step with a broadcast operand of any float type."""
    function = OPS[step].binary
    assert function is not None, "every step is a binary operator"
    scalar = per_partition(instr, "imm", imm, data)
    if type(scalar) is float:
        scalar = np.float32(scalar)
    return function(scalar, values) if reverse else function(values, scalar)
