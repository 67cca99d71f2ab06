"""Which public kernel stands behind a published row, and what it is called with.

Does: hold the call of every row whose kernel is public and runs under the present language. Does
not: run it (clones.py) or know a time.

Letters: S sequence, D head dim, H heads (the kernels' batch), N states.
Sources: AWS Neuron SDK docs, nki/examples; nki-library at d2ad3a5, core/attention/attention_cte.py;
nki-samples pull request 133, contributed/decode_attention.py.
"""

from __future__ import annotations

from .clones import Kernel

EXAMPLES = "aws-neuron-sdk/nki/examples"
LIBRARY = "nki-library/src/nkilib_src"


def matmul_kernel(version: str, m: int, k: int, n: int, dtype: str) -> Kernel | None:
    """The tutorial's kernel of one version, or None when the tutorial has none."""
    names = {
        "tiled": "nki_matmul_tiled_",
        "hoist": "nki_matmul_hoist_load_",
        "block": "nki_matmul_block_free_dimension_",
        "full": "nki_matmul_fully_optimized_",
    }
    if version not in names:
        return None
    return Kernel(
        folder=f"{EXAMPLES}/matrix_multiplication",
        module="matrix_multiplication_nki_kernels",
        function=names[version],
        arrays=(((k, m), dtype), ((k, n), dtype)),
    )


def mamba_kernel(version: int, channels: int, seq_len: int, states: int = 16) -> Kernel:
    """The tutorial's kernel of one version."""
    wide, rows = (1, channels, seq_len), (1, states, seq_len)
    shapes = (wide, wide, (channels, states), rows, rows)
    return Kernel(
        folder=f"{EXAMPLES}/fused_mamba",
        module="mamba_nki_kernels",
        function=f"mamba_v{version}",
        arrays=tuple((shape, "float32") for shape in shapes),
    )


def attention_cte_kernel(
    heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: str,
    *,
    causal: bool,
    tp_q: bool,
    tp_out: bool,
    tp_k: bool = False,
    sink: bool = False,
    lnc: int = 1,
) -> Kernel:
    """nki-library's prefill attention; heads are its batch. lnc: cores that share the work."""
    q = (heads, q_len, head_dim) if tp_q else (heads, head_dim, q_len)
    k = (heads, kv_len, head_dim) if tp_k else (heads, head_dim, kv_len)
    return Kernel(
        folder=LIBRARY,
        package="nkilib",
        module="core.attention.attention_cte",
        function="attention_cte",
        arrays=((q, dtype), (k, dtype), ((heads, kv_len, head_dim), dtype)),
        named=(("sink", ((heads, 1), dtype)),) if sink else (),
        options=(("causal_mask", causal), ("tp_q", tp_q), ("tp_k", tp_k), ("tp_out", tp_out)),
        lnc=lnc,
    )


def decode_kernel(keys: int, num_heads: int = 8, num_kv_heads: int = 2, dim: int = 128) -> Kernel:
    """The decode attention of a pull request to nki-samples, grouped heads, in fp32."""
    cache = (num_kv_heads, dim, keys)
    return Kernel(
        folder="nki-samples/contributed",
        module="decode_attention",
        function="decode_attention_gqa_fwd",
        arrays=tuple((shape, "float32") for shape in ((dim, num_heads), cache, cache)),
        options=(("n_q_heads", num_heads), ("n_kv_heads", num_kv_heads)),
    )
