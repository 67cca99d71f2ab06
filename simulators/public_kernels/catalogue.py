"""Which public kernels are run, and how to recognise the clones they come from.

A kernel of nki-library is one of its test files: its parameter rows, its torch reference, its
tolerances. A kernel of the documentation or of nki-samples is a script (see scripts.py).
Reference commits: nki-library d2ad3a5, nki-samples 6905a68; others may work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LIBRARY = "nki-library"
SAMPLES = "nki-samples"
DOCUMENTATION = "aws-neuron-sdk"
_MARKS = {
    LIBRARY: "test/utils/simulation_setup.py",
    SAMPLES: "src/nki_samples",
    DOCUMENTATION: "nki/examples",
}
TESTS = "test/integration/nkilib"


@dataclass(frozen=True)
class Kernel:
    """One line of the table; `path` is a test file or a script, below the clone.

    select: a pytest -k expression, for the rows that count as this kernel. may_be_empty: a file
    without rows is skipped, not failed.
    """

    name: str
    clone: str
    path: str
    select: str = ""
    may_be_empty: bool = False

    @property
    def tolerated(self) -> tuple[str, ...]:
        """Ids of documented rules that this kernel breaks and that only warn in its rows."""
        return TOLERATED.get(self.path.removeprefix(TESTS + "/"), ())


# Kernels of nki-library@d2ad3a5 that break a documented rule and are right all the same; each is
# explained in docs/public_kernels.md. Their rows are judged by values.
TOLERATED = {
    "core/attention/test_attention_tkg.py": ("memory.uninitialised",),
    "core/mlp/test_mlp_tkg.py": ("memory.uninitialised", "view.partition_dim"),
    "core/moe/moe_cte/test_moe_cte.py": ("memory.capacity",),
    "core/moe/moe_cte/test_moe_cte_unified.py": ("memory.capacity",),
    "core/moe/moe_tkg/test_moe_tkg.py": ("memory.uninitialised",),
    "core/moe_block/test_moe_block_tkg.py": ("memory.uninitialised",),
    "core/output_projection/test_output_proj_tkg.py": ("memory.capacity",),
    "core/router_topk/test_router_topk.py": ("memset.dtype",),
    "experimental/loss/test_cross_entropy_backward.py": ("memory.uninitialised",),
    "experimental/transformer/test_attention_block_tkg.py": (
        "memory.uninitialised",
        "nc_matmul.bank",
        "nc_matmul.moving_free",
    ),
}
_LIBRARY_FILES = (
    ("attention_cte", "core/attention/test_attention_cte.py", ""),
    ("rope", "core/embeddings/test_rope.py", ""),
    ("rope_hf", "core/embeddings/test_rope_hf.py", ""),
    ("cumsum", "core/cumsum/test_cumsum.py", ""),
    ("rmsnorm_quant", "core/rmsnorm/test_rmsnorm_quant.py", ""),
    ("qkv_cte", "core/qkv/test_qkv_cte.py", "not mx"),
    ("mlp_cte", "core/mlp/test_mlp_cte.py", "not mx"),
    ("output_projection_cte", "core/output_projection/test_output_proj_cte.py", "not fp8"),
    ("cross_entropy_forward", "experimental/loss/test_cross_entropy_forward.py", ""),
    ("cross_entropy_backward", "experimental/loss/test_cross_entropy_backward.py", ""),
    ("fg_allgather", "experimental/collectives/test_fg_allgather.py", ""),
    ("fgcc", "experimental/collectives/test_fgcc.py", ""),
)


def library_kernels() -> list[Kernel]:
    """The kernels of nki-library that the default run covers."""
    return [
        Kernel(name, LIBRARY, f"{TESTS}/{path}", select) for name, path, select in _LIBRARY_FILES
    ]


def library_suite(clone: Path) -> list[Kernel]:
    """Every integration test file of an nki-library clone, under its own name."""
    files = sorted((clone / TESTS).rglob("test_*.py"))
    names = [path.relative_to(clone).as_posix() for path in files]
    short = [name.removeprefix(TESTS + "/") for name in names]
    pairs = zip(short, names, strict=True)
    return [Kernel(name, LIBRARY, path, may_be_empty=True) for name, path in pairs]


def clones_in(paths: list[Path]) -> dict[str, Path]:
    """{repository: its root} for clones at `paths` or one folder below them.

    Raises ValueError when a path is no folder or holds none of the three repositories.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"expected the folder of a clone, got {path}; clone it first")
        here = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        known = {
            name: place.resolve()
            for place in reversed(here)
            for name, mark in _MARKS.items()
            if (place / mark).exists()
        }
        if not known:
            raise ValueError(
                f"expected a clone of {', '.join(_MARKS)} at {path} or in it, got none"
            )
        found = {**known, **found}
    return found
