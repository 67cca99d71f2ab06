"""haoliuhl's ringattention (JAX) for `bench_peers.py`, in an environment of its own.

    python jax_ring.py     then one JSON request per line on stdin, one answer per line on stdout

Does: run the library's causal ring over two host devices of one process, one thread each; key/value
heads are repeated first, as it has no groups. Does not: import torch or nxd_cp, or run on an
accelerator. Tested with jax 0.4.30 and ringattention 0.1.1.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false "
    "intra_op_parallelism_threads=1"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.shard_map import shard_map
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ringattention import ringattention_jax

MESH = Mesh(np.array(jax.devices()[:2]), ("sp",))
SPEC = PartitionSpec(None, "sp", None, None)
CHUNK = 512


def attention(q, k, v):
    """[1, S, H, D] over both devices."""
    local = q.shape[1] // 2
    options = {
        "causal_block_size": 1,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "query_chunk_size": min(CHUNK, local),
        "key_chunk_size": min(CHUNK, local),
        "dtype": jnp.float32,
        "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None,
        "prevent_cse": True,
    }

    def ring(q, k, v):
        return ringattention_jax(q, k, v, None, None, None, "sp", True, options)

    return shard_map(ring, mesh=MESH, in_specs=(SPEC,) * 3, out_specs=SPEC, check_rep=False)(
        q, k, v
    )


@jax.jit
def forward(q, k, v, do):
    """o, with repeated key/value heads inside."""
    group = q.shape[2] // k.shape[2]
    return (attention(q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)),)


@jax.jit
def both(q, k, v, do):
    """o, dq, dk, dv."""
    o, pullback = jax.vjp(lambda *x: forward(*x, None)[0], q, k, v)
    return (o, *pullback(do))


def inputs(problem):
    """Standard normal, cut over the devices."""
    rng = np.random.default_rng(1)
    heads = [problem[n] for n in ("num_heads", "num_kv_heads", "num_kv_heads", "num_heads")]
    shape = (problem["seq_len"], problem["head_dim"])
    arrays = [rng.standard_normal((1, shape[0], h, shape[1]), dtype=np.float32) for h in heads]
    return arrays, [jax.device_put(x, NamedSharding(MESH, SPEC)) for x in arrays]


def truth(q, k, v, do):
    """o, dq, dk, dv in fp64 by NumPy."""
    group = q.shape[2] // k.shape[2]
    q, k, v, do = (x.astype(np.float64)[0].transpose(1, 0, 2) for x in (q, k, v, do))
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    scale = q.shape[-1] ** -0.5
    s = np.where(np.tri(q.shape[1], dtype=bool), scale * q @ k.transpose(0, 2, 1), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ v
    ds = p * (do @ v.transpose(0, 2, 1) - (do * o).sum(-1, keepdims=True)) * scale
    dk, dv = ds.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ do
    dk, dv = (x.reshape(-1, group, *x.shape[1:]).sum(1) for x in (dk, dv))
    return [x.transpose(1, 0, 2)[None] for x in (o, ds @ k, dk, dv)]


def answer(request):
    """{"errors": ...} or {"span": [start, end]}; a first run compiles and is not timed."""
    arrays, tensors = inputs(request["problem"])
    if request["command"] == "errors":
        found = both(*tensors)
        pairs = zip(("o", "dq", "dk", "dv"), found, truth(*arrays), strict=True)
        return {name: float(np.abs(np.asarray(x) - y).max()) for name, x, y in pairs}
    fn = forward if request["mode"] == "forward" else both
    if request["command"] == "warm":
        jax.block_until_ready(fn(*tensors))
        return []
    started = time.monotonic()
    jax.block_until_ready(fn(*tensors))
    return [started, time.monotonic()]


if __name__ == "__main__":
    print(json.dumps({"jax": jax.__version__, "devices": len(jax.devices())}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
