"""Random numbers: rng, rand2, dropout (VectorE, GpSimdE) and the state of the generators.

Each lane has one XORWOW generator of six 32-bit words (GpSimdE), or four of them (VectorE, 24
words). Equal states give equal numbers, and a state that was read out continues where it was.
The device's own sequence is not documented: the numbers differ from it. A generator that nobody
seeded starts from a fixed state.

Sources: nki.isa.rng, rand2, dropout, set_rng_seed, rand_set_state, rand_get_state; Marsaglia,
"Xorshift RNGs", 2003 (XORWOW).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    destination,
    in_psum,
    per_partition,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, current

from .enums import engine as engines
from .generation import need
from .issue import NkiInstruction, issue

WORDS = {"gpsimd": 6, "vector": 24}
_WEYL = np.uint32(362437)

_RNG = documented(
    "rng.operands",
    "nki.isa.rng",
    "dst is of an integer type; on VectorE, or from gen3 on GpSimdE with dst in SBUF",
)
_STATE = documented(
    "random.state",
    "nki.isa.set_rng_seed, rand_set_state, rand_get_state",
    "a seed is one 32-bit value; a state is uint32 [lanes, 6] for GpSimdE or [lanes, 24] for "
    "VectorE (gen4), seeds in SBUF, and not in PSUM for GpSimdE or on gen3",
)
_RANGE = documented("rand2.range", "nki.isa.rand2", "min is below max")
_UNIFORM = documented("rand2.dtype", "nki.isa.rand2", "dst is of any type but float8_e4m3fn")
_DROPOUT = documented(
    "dropout.operands",
    "nki.isa.dropout",
    "dst has data's dtype; prob, 0 to 1, is a number or a float [partitions, 1] tile, float32 for "
    "integers",
)


def _expanded(seed: int, words: int) -> Any:
    """uint32 [128, words]: a state for every lane (splitmix64)."""
    with np.errstate(over="ignore"):
        at = np.arange(1, 128 * words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = at + np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(32)).astype(np.uint32).reshape(128, words)


def _state(run: Run, unit: str) -> Any:
    if unit not in run.random:
        run.random[unit] = _expanded(0, WORDS[unit])
    return run.random[unit]


def _draw(run: Run, unit: str, partitions: int, count: int) -> Any:
    """uint32 [partitions, count], moving the generators of those lanes on."""
    state = _state(run, unit)[:partitions]
    words = state.reshape(partitions, -1, 6)
    steps = -(-count // words.shape[1])
    out = np.empty((steps, *words.shape[:2]), np.uint32)
    x, y, z, w, v, d = (words[..., i].copy() for i in range(6))
    for i in range(steps):
        t = x ^ (x >> np.uint32(2))
        x, y, z, w = y, z, w, v
        v = (v ^ (v << np.uint32(4))) ^ (t ^ (t << np.uint32(1)))
        d = d + _WEYL
        out[i] = v + d
    for i, word in enumerate((x, y, z, w, v, d)):
        words[..., i] = word
    return out.transpose(1, 0, 2).reshape(partitions, -1)[:, :count]


def _unit(instr: str, run: Run, engine: Any, rule: Any, vector: int, gpsimd: int) -> str:
    """The engine's name; `vector` and `gpsimd` are the first generations that have it there."""
    least = {engines.vector: vector, engines.gpsimd: gpsimd}.get(engine)
    if least is None or run.chip.number < least:
        fail(rule, instr, f"engine={engine} on {run.chip.generation}")
    return str(engine.name)


def rng(dst: Any, engine: Any = engines.vector, name: str | None = None) -> NkiInstruction:
    """dst = random bits, the low ones of 32."""
    instr = "nki.isa.rng"
    run = current(instr)
    unit = _unit(instr, run, engine, _RNG, vector=2, gpsimd=3)
    out = destination(instr, "dst", dst)
    if dst.dtype.kind not in "iu" or (unit == "gpsimd" and in_psum(dst)):
        fail(_RNG, instr, f"dst is {dst.dtype}", dst=dst)
    if run.values:
        bits = _draw(run, unit, dst.shape[0], dst.size // dst.shape[0])
        low = bits.astype(f"u{dst.dtype.itemsize}").view(dst.dtype.np_dtype)
        out[...] = low.reshape(out.shape)
    return issue(run, "rng", unit, dst, (), dst, name=name)


def _uniform(run: Run, partitions: int, count: int) -> Any:
    """float32 in [0, 1) from VectorE's generator."""
    bits = _draw(run, "vector", partitions, count) >> np.uint32(8)
    return bits.astype(np.float32) * np.float32(2.0**-24)


def rand2(dst: Any, min: Any, max: Any, name: str | None = None) -> NkiInstruction:
    """dst = uniform values from min to max (gen4)."""
    instr = "nki.isa.rand2"
    run = current(instr)
    need(run, instr, 4)
    out = destination(instr, "dst", dst)
    if dst.dtype is dtypes.float8_e4m3fn:
        fail(_UNIFORM, instr, f"dst is {dst.dtype}", dst=dst)
    low, high = (
        per_partition(instr, role, value, dst, float32_only=True)
        for role, value in (("min", min), ("max", max))
    )
    if run.values:
        if not np.all(np.asarray(low) < np.asarray(high)):
            fail(_RANGE, instr, f"min={min!r}, max={max!r}", dst=dst)
        values = _uniform(run, dst.shape[0], dst.size // dst.shape[0]).reshape(out.shape)
        span = np.asarray(high, np.float32) - np.asarray(low, np.float32)
        dtypes.store_f32(out, np.asarray(low, np.float32) + values * span, dst.dtype)
    return issue(run, "rand2", "vector", dst, (min, max), dst, name=name)


def dropout(dst: Any, data: Any, prob: Any, name: str | None = None) -> NkiInstruction:
    """dst = data, elements replaced by 0 with probability prob; nothing is rescaled."""
    instr = "nki.isa.dropout"
    run = current(instr)
    values = source(instr, "data", data)
    limit = per_partition(instr, "prob", prob, data)
    kind = getattr(getattr(prob, "dtype", dtypes.float32), "kind", "f")
    integers = data.dtype.kind != "f"
    wrong = integers and getattr(prob, "dtype", dtypes.float32) is not dtypes.float32
    if dst.dtype is not data.dtype or kind != "f" or wrong:
        fail(_DROPOUT, instr, f"dst is {dst.dtype}", dst=dst, data=data, prob=prob)
    out = destination(instr, "dst", dst)
    same_tiles(instr, dst=dst, data=data)
    if (run.values or type(limit) is float) and not np.all((limit >= 0) & (limit <= 1)):
        fail(_DROPOUT, instr, "a probability outside 0 to 1", prob=prob)
    if run.values:
        drawn = _uniform(run, data.shape[0], data.size // data.shape[0]).reshape(values.shape)
        kept = np.where(drawn < limit, np.zeros((), values.dtype), values)
        out[...] = kept.reshape(out.shape)
    return issue(run, "dropout", "vector", dst, (data, prob), data, name=name)


def set_rng_seed(src_seeds: Any, name: str | None = None) -> NkiInstruction:
    """Start VectorE's generator from one 32-bit value."""
    instr = "nki.isa.set_rng_seed"
    run = current(instr)
    values = source(instr, "src_seeds", src_seeds)
    if src_seeds.size != 1 or src_seeds.dtype.itemsize != 4:
        fail(_STATE, instr, "the seed", src_seeds=src_seeds)
    seed = int(values.reshape(-1).view(np.uint32)[0]) if run.values else 0
    run.random["vector"] = _expanded(seed, WORDS["vector"])
    return issue(run, "set_rng_seed", "vector", None, (src_seeds,), 1, name=name)


def _check_state(instr: str, run: Run, tensor: Any, engine: Any) -> str:
    unit = _unit(instr, run, engine, _STATE, vector=4, gpsimd=3)
    if tensor.dtype is not dtypes.uint32 or tensor.size != WORDS[unit] * tensor.shape[0]:
        fail(_STATE, instr, f"{tensor.dtype} {tensor.shape} for {unit}", tensor=tensor)
    return unit


def rand_set_state(
    src_seeds: Any, engine: Any = engines.gpsimd, name: str | None = None
) -> NkiInstruction:
    """Give each lane's generator its state."""
    instr = "nki.isa.rand_set_state"
    run = current(instr)
    need(run, instr, 3)
    values = source(instr, "src_seeds", src_seeds)
    unit = _check_state(instr, run, src_seeds, engine)
    if in_psum(src_seeds):
        fail(_STATE, instr, "seeds in PSUM", src_seeds=src_seeds)
    if run.values:
        _state(run, unit)[: src_seeds.shape[0]] = values.reshape(src_seeds.shape[0], -1)
    return issue(run, "rand_set_state", unit, None, (src_seeds,), src_seeds, name=name)


def rand_get_state(
    dst: Any, engine: Any = engines.gpsimd, name: str | None = None
) -> NkiInstruction:
    """dst = each lane's generator state."""
    instr = "nki.isa.rand_get_state"
    run = current(instr)
    need(run, instr, 3)
    out = destination(instr, "dst", dst)
    unit = _check_state(instr, run, dst, engine)
    if in_psum(dst) and (unit == "gpsimd" or run.chip.number < 4):
        fail(_STATE, instr, "dst in PSUM", dst=dst)
    if run.values:
        out[...] = _state(run, unit)[: dst.shape[0]].reshape(out.shape)
    return issue(run, "rand_get_state", unit, dst, (), dst, name=name)
