"""What can be timed for a published row: a stream of ours, a public kernel, or both.

Does: name both for every row that has one. Does not: build, run or time them.

Rows measured with compilers of the older language ("old" namespaces, and tutorials whose figures
date from 2024) wait for whole tensors in HBM; those before dynamic descriptor generation, all on
trn1, are timed with one DMA queue per source line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nxd_cp.simulators.nki_api.log import Log

from .clones import Kernel
from .program import Options
from .public import attention_cte_kernel, decode_kernel, mamba_kernel, matmul_kernel
from .streams.attention import attention
from .streams.attention_steps import STEPS, attention_step
from .streams.conv import depthwise_conv
from .streams.decode import decode
from .streams.dynamic import dynamic_loads
from .streams.layernorm import layernorm
from .streams.mamba import mamba
from .streams.mamba_steps import mamba_step
from .streams.matmul import matmul
from .streams.nkibench import nkibench
from .streams.sd_attention import sd_attention

if TYPE_CHECKING:
    from .published import Row

NEW = Options()
FENCED = Options(granularity="fenced")
OLD = Options(granularity="fenced", dma_queues="line")
MATMUL = {"tiled": "tiled", "hoist": "hoist", "block": "block", "full": "full", "optimised": "full"}
STREAMS: dict[str, Callable[..., Log]] = {
    "matmul": matmul,
    "mamba": mamba,
    "mamba step": mamba_step,
    "layernorm": layernorm,
    "nkibench": nkibench,
    "conv": lambda images, channels, width, taps=3, psum=False, block=1: depthwise_conv(
        images, channels, width, taps, psum=psum, block=block
    ),
    "attention step": attention_step,
    "sd attention": sd_attention,
    "decode": decode,
    "dynamic loads": dynamic_loads,
    "attention": lambda seq_len, dtype, fused: attention(seq_len, dtype, fused=fused),
}


# Why rows without a stream have none, by group and a word of the row.
WHY_NOT = {
    ("A6", "span of 16"): "sixteen engines start one after the other here; the model has one start",
    ("A6", "trigger duration"): "the model has the interval between triggers, not their duration",
    ("A7", "LDWEIGHTS"): "loads of weights are timed only where they are not hidden",
    ("A7", "self-attention"): "a figure without its kernel",
    ("K2", "device loop"): "its op is not described",
    ("K2", "unrolled"): "its op is not described",
    ("K2", "both engines"): "how the work was divided is not described",
    ("K2", "gemv"): "its shapes are not described",
}


@dataclass(frozen=True)
class Source:
    """How to get a row's log. stream: name and arguments of one of STREAMS.

    why_stream: why the stream is timed although there is a public kernel.
    """

    stream: tuple[object, ...] | None = None
    kernel: Kernel | None = None
    options: Options = NEW
    why_stream: str = ""

    def build(self) -> Log:
        """The log of the stream."""
        assert self.stream is not None, "only sources with a stream can be built"
        return STREAMS[str(self.stream[0])](*self.stream[1:])


def source(row: Row) -> Source | None:
    """The Source of a row, or None when there is nothing to time."""
    group = {
        "A1": _matmul,
        "A2": _matmul,
        "A3": _mamba,
        "A4": _layernorm,
        "C": _suite,
        "D": _nkibench,
        "E": _tuning,
        "H": _profiled,
        "K2": _dynamic,
        "K5": _other,
    }.get(row.group)
    return group(row) if group is not None else None


def why_not(row: Row) -> str:
    """Why there is nothing to time for a row."""
    for (group, word), reason in WHY_NOT.items():
        if row.group == group and word in f"{row.kernel} {row.metric}":
            return reason
    return "no instruction stream for this kernel"


def _matmul(row: Row) -> Source | None:
    for word, version in MATMUL.items():
        if word in row.kernel:
            dtype = "bfloat16" if row.group == "A1" else "float32"
            shape = (version, 4096, 8192, 8192, dtype)
            options = OLD if row.group == "A1" else NEW
            return Source(("matmul", *shape), matmul_kernel(*shape), options)
    return None


def _mamba(row: Row) -> Source | None:
    found = re.search(r"v(\d) \| ch(\d+) seq(\d+)", f"{row.kernel} | {row.shape}")
    if found is None:
        return None
    version, channels, seq_len = map(int, found.groups())
    return Source(
        ("mamba", version, channels, seq_len),
        mamba_kernel(version, channels, seq_len),
        OLD,
        # fused_mamba.rst: "partition-dimension broadcast [...] using a separate instruction on
        # TensorE"; the simulator's nl.broadcast_to is four shuffles on VectorE.
        why_stream="broadcasts were TensorE's, by the tutorial",
    )


def _layernorm(row: Row) -> Source:
    rows, columns = map(int, row.shape.split()[0].split("x"))
    return Source(("layernorm", int(row.kernel[-1]), rows, columns), None, OLD)


def _nkibench(row: Row) -> Source | None:
    return Source(("nkibench", row.kernel.split()[1]), None, OLD)


def _profiled(row: Row) -> Source | None:
    if not row.kernel.startswith("attention"):
        return None
    dtype = "float32" if row.dtype == "fp32" else "bfloat16"
    stream = ("attention", int(row.shape.split("seq")[1]), dtype, "fused" in row.kernel)
    return Source(stream, None, FENCED)


def _tuning(row: Row) -> Source | None:
    """Steps of tuning runs, all by an old compiler on trn1."""
    name, _, step = row.kernel.rpartition(" trace step ")
    number = int(step)
    streams: dict[str, dict[int, tuple[object, ...]]] = {
        "gemm": {
            1: ("matmul", "group 1x2", 4096, 8192, 8192, "bfloat16"),
            3: ("matmul", "group 4x2", 4096, 8192, 8192, "bfloat16"),
        },
        "mamba": {
            **dict.fromkeys((2, 3), ("mamba", 2, 256, 2048)),
            **{i: ("mamba step", i) for i in (5, 6, 7)},
        },
        "attention": {i: ("attention step", i) for i in STEPS},
        "SD attention": {i: ("sd attention", i) for i in (1, 6)},
        "depthwise conv1d": {
            0: ("conv", 8, 512, 2048),
            1: ("conv", 8, 512, 2048, 3, True),
            2: ("conv", 8, 512, 2048, 3, True, 64),
        },
    }
    found = streams.get(name, {}).get(number)
    return Source(found, None, OLD) if found is not None else None


def _suite(row: Row) -> Source | None:
    """Rows of nki-library's own test list; those of attention_cte."""
    if row.kernel != "attention_cte":
        return None
    given = dict(part.split("=") for part in row.shape.split(", "))
    dtypes = {"np.float32": "float32", "np.float16": "float16", "nl.bfloat16": "bfloat16"}
    kernel = attention_cte_kernel(
        int(given["bs"]),
        int(given["seqlen_q"]),
        int(given["seqlen_kv"]),
        int(given["d"]),
        dtypes[given["dtype"]],
        causal=given["causal_mask"] == "True",
        tp_q=given["tp_q"] == "True",
        tp_out=given["tp_out"] == "True",
        sink=given.get("sink") == "True",
        lnc=int(given.get("vnc_degree", "1")),
    )
    return Source(None, kernel)


def _dynamic(row: Row) -> Source | None:
    """Loads with dynamic addresses, by how many of 256 are skipped."""
    shares = {"256 dynamic": 0, "1/4 skipped": 64, "1/2 skipped": 128, "all skipped": 256}
    for words, skipped in shares.items():
        if words in row.kernel:
            return Source(("dynamic loads", skipped))
    return None


def _other(row: Row) -> Source | None:
    if row.kernel.startswith("decode_attention"):
        keys = int(row.shape.split("=")[1])
        return Source(("decode", keys), decode_kernel(keys))
    if row.kernel.startswith("attention_cte"):
        heads, q_len, kv_len, head_dim = 12, 4736, 6240, 128  # queries padded to 128s by the caller
        kernel = attention_cte_kernel(
            heads,
            q_len,
            kv_len,
            head_dim,
            "bfloat16",
            causal=False,
            tp_q=True,
            tp_k=True,
            tp_out=False,
            lnc=2,
        )
        return Source(None, kernel)
    return None
