"""VectorE's reduce registers, shared by the instructions that select or scale and also reduce.

One fp32 value per lane. reset_reduce begins at the operator's identity, load_reduce at a given
value, reduce goes on; idle leaves the registers unknown, so a later reduce is an error.
Does not hold ScalarE's registers: see scalar_engine.py.

Source: nki.isa.tensor_scalar_reduce, select_reduce, range_select, exponential ("Accumulator
behavior").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import destination, like, per_partition
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.ops import Op
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import reduce_cmd as commands

_COMMAND = documented(
    "vector_reduce.command",
    "nki.isa, Accumulator behavior",
    "reduce_op and reduce_cmd are ones that the instruction takes; an initial value comes with "
    "load_reduce and only with it",
)
_RESULT = documented(
    "vector_reduce.result",
    "nki.isa, Accumulator behavior",
    "reduce_res is a float tile with one element per partition, and something was reduced",
)
_EMPTY = documented(
    "vector_reduce.accumulator",
    "nki.isa, Accumulator behavior",
    "reduce_cmd.reduce continues a reduction; after idle the registers are unknown",
)
_IDENTITY = {
    "add": 0.0,
    "subtract": 0.0,
    "multiply": 1.0,
    "max": -np.inf,
    "maximum": -np.inf,
    "min": np.inf,
    "minimum": np.inf,
}


def reduce_lanes(
    instr: str,
    run: Run,
    data: NkiTensor,
    values: Any,
    op: Any,
    allowed: tuple[str, ...],
    command: Any,
    known: tuple[commands, ...],
    result: Any,
    initial: Any = None,
    negate: bool = False,
) -> None:
    """Fold fp32 `values` (of `data`'s size) into the registers; write them out to `result`.

    allowed, known: the names of the operators and the commands that the instruction takes.
    """
    if type(op) is not Op or op.name not in allowed or command not in known:
        fail(_COMMAND, instr, f"reduce_op={op}, reduce_cmd={command}", data=data)
    if (initial is not None) is not (command is commands.load_reduce):
        fail(_COMMAND, instr, f"initial value {initial!r} with {command}", data=data)
    if command is commands.idle:
        run.accumulators.pop("vector", None)
        if result is not None:
            fail(_RESULT, instr, "reduce_res with reduce_cmd.idle", reduce_res=result)
        return
    partitions = data.shape[0]
    registers = begin(instr, run, data, op, command, initial)
    if command is not commands.reset and run.values:
        assert op.binary is not None, "every reduction is a binary operator too"
        part = op.reduce.reduce(values.reshape(partitions, -1), axis=1, keepdims=True)
        registers[:partitions] = op.binary(registers[:partitions], part)
    if result is not None:
        _read_out(instr, run, result, registers[:partitions], negate)


def begin(instr: str, run: Run, data: NkiTensor, op: Op, command: Any, initial: Any) -> Any:
    """The [128, 1] registers as `command` leaves them before the first element."""
    registers = run.accumulators.get("vector")
    if command is commands.reduce:
        if registers is None:
            fail(_EMPTY, instr, "reduce_cmd.reduce before any reset", data=data)
        return registers
    registers = run.accumulators["vector"] = np.full((128, 1), _IDENTITY[op.name], np.float32)
    if command is commands.load_reduce:
        first = per_partition(instr, "initial value", initial, data, float32_only=True)
        if type(first) is not float:
            first = first.reshape(-1, 1)
        registers[: data.shape[0]] = first
    return registers


def _read_out(instr: str, run: Run, result: Any, lanes: Any, negate: bool) -> None:
    out = destination(instr, "reduce_res", result, OTHER)
    if result.shape[0] != len(lanes) or result.size != len(lanes) or result.dtype.kind != "f":
        fail(_RESULT, instr, f"for {len(lanes)} partitions", reduce_res=result)
    if run.values:
        dtypes.store_f32(out, like(-lanes if negate else lanes, out.shape), result.dtype)
