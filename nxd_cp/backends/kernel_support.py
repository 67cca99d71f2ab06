"""The small kernels around attention, from tensors to tensors: delta, the merge, and token order.

Does: check on the host what the kernels assume, and cut what would be too long a program into
several launches. Does not: attend (`neuron.py`), or decide who holds which token (`schedule`).

Letters: B batch, H heads, S rows or tokens, E head dim; R rows of all batches and heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nxd_cp.backends import kernel_limits as limits
from nxd_cp.backends.base import Pair
from nxd_cp.backends.kernel_blocks import pieces
from nxd_cp.backends.kernel_modules import generation_of, kernel_module

Runs = tuple[tuple[int, int, int], ...]

TILE_INSTRUCTIONS = 24  # of 128 rows, at most: a merge of one tile that is alone in its launch
ROW_LIMIT = limits.MAX_INSTRUCTIONS // TILE_INSTRUCTIONS * limits.ROWS


class SupportKernels:
    """`row_delta`, `merge` and `permute_tokens`; arguments as of `KernelBackend`."""

    def __init__(self, name: str, generation: str | None = None, *, cores: int = 1) -> None:
        generation = generation_of(name, generation)
        limits.check_cores(name, generation, cores)
        self.name, self.cores = name, cores
        self._delta = kernel_module(name, generation, "row_delta")
        self._merge = kernel_module(name, generation, "merge")
        self._permute = kernel_module(name, generation, "permute", "permute_tokens")
        tiles = kernel_module(name, generation, "tiles")
        self._empty_lse_limit: float = tiles.EMPTY_LSE_LIMIT

    def row_delta(self, do: Tensor, o: Tensor) -> Tensor:
        """rowsum(do * o) of [B, H, S, E] each, any dtypes of the kernels: [B, H, S] fp32."""
        self._check_rows("row_delta", do, o, limits.DTYPES)
        kernel = self._launch(self._delta.row_delta)
        parts = [kernel(*rows) for rows in self._rows(do, o)]
        return _whole(parts, do.shape[:-1])

    def merge(self, a: Pair, b: Pair) -> Pair:
        """Two results of the same rows over different keys as one.

        a, b: o [B, H, S, E] and lse [B, H, S], fp32; a row that saw nothing has o = 0 and
        lse = -inf, also in what is returned.
        """
        self._check_rows("merge", a[0], b[0], (torch.float32,))
        for lse in (a[1], b[1]):
            if lse.shape != a[0].shape[:-1] or lse.dtype != torch.float32:
                raise ValueError(
                    f"merge: expected lse {list(a[0].shape[:-1])} in float32, got "
                    f"{list(lse.shape)} in {lse.dtype}; cut or cast it as its o"
                )
        kernel = self._launch(self._merge.merge)
        inputs = (a[0], a[1].unsqueeze(-1), b[0], b[1].unsqueeze(-1))
        parts = [kernel(*rows) for rows in self._rows(*inputs)]
        o = _whole([one[0] for one in parts], a[0].shape)
        lse = _whole([one[1] for one in parts], a[1].shape)
        return o, lse.masked_fill(lse <= self._empty_lse_limit, float("-inf"))

    def permute(self, x: Tensor, runs: Runs, *, inverse: bool = False) -> Tensor:
        """The tokens of x [B, S, ...] in the order of the runs (first, count, step); or back.

        Any dtype: bits are moved as they are, numbers of 8 bytes, which NKI has not, as two of 4.
        """
        self._check_runs(x, runs)
        if x.shape[0] * len(runs) % self.cores:
            runs = _cut_one(runs)
        flat = x.contiguous().flatten(2) if x.dim() > 2 else x.contiguous().unsqueeze(2)
        if x.is_complex():
            flat = torch.view_as_real(flat).flatten(2)
        if flat.element_size() == 8:
            flat = flat.view(torch.int32)
        kernel = self._launch(self._permute.permute_tokens)
        size = limits.MAX_INSTRUCTIONS // len(runs) // self.cores * self.cores
        parts = [
            kernel(flat[some], runs, inverse=inverse)
            for some in pieces(x.shape[0], max(size, self.cores))
        ]
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        return found.view(x.dtype).reshape(x.shape)

    def _check_runs(self, x: Tensor, runs: Runs) -> None:
        if x.dim() < 2 or x.numel() == 0:
            raise ValueError(
                "permute_tokens: expected [batch, tokens, ...] without an empty dim, got "
                f"{list(x.shape)}; unsqueeze it, or permute in PyTorch"
            )
        for first, count, step in runs:
            if first < 0 or count < 1 or step < 1:
                raise ValueError(
                    "permute_tokens: expected runs (first, count, step) from (0, 1, 1) on, got "
                    f"{(first, count, step)}; cut a run that goes back into runs of one token"
                )
        places = [torch.arange(first, first + count * step, step) for first, count, step in runs]
        held = torch.cat(places).sort()[0] if places else torch.arange(0)
        if not torch.equal(held, torch.arange(x.shape[1])):
            raise ValueError(
                f"permute_tokens: expected runs that hold each of {x.shape[1]} tokens once, got "
                f"{len(held)} in {len(runs)} runs; take those of nxd_cp.schedule.token_runs"
            )
        if len(runs) > limits.MAX_INSTRUCTIONS:
            raise ValueError(
                f"permute_tokens: expected at most {limits.MAX_INSTRUCTIONS} runs (one DMA each), "
                f"got {len(runs)}; permute in PyTorch"
            )
        odd = x.shape[0] * len(runs) % self.cores
        if odd and max(count for _, count, _ in runs) == 1:
            raise ValueError(
                f"permute_tokens: expected batch x runs, or a run, that the {self.cores} cores of "
                f"a launch can share, got {x.shape[0]} x {len(runs)} runs of one token; use "
                "cores=1, or permute in PyTorch"
            )

    def _check_rows(
        self, kernel: str, a: Tensor, b: Tensor, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        if a.dim() != 4 or a.numel() == 0:
            raise ValueError(
                f"{kernel}: expected [batch, heads, rows, head dim] without an empty dim, got "
                f"{list(a.shape)}; reshape it, or use PyTorch's operators"
            )
        if a.shape != b.shape:
            raise ValueError(
                f"{kernel}: expected two tensors of one shape, got {list(a.shape)} and "
                f"{list(b.shape)}; cut them to the same rows"
            )
        for x in (a, b):
            if x.dtype not in dtypes:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise ValueError(f"{kernel}: expected {names}, got {x.dtype}; cast it")
        if a.shape[-1] > limits.MAX_HEAD_DIM:
            raise ValueError(
                f"{kernel}: expected a head dim of at most {limits.MAX_HEAD_DIM}, got "
                f"{a.shape[-1]}; use PyTorch's operators"
            )

    def _rows(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same rows of each [B, H, S, any], as [cores, 1, rows, any], launch by launch.

        Rows are independent, so any of them may lie side by side; an odd one for two cores goes
        with a row of zeros.
        """
        flat = [x.contiguous().flatten(0, 2) for x in tensors]
        for rows in pieces(flat[0].shape[0], ROW_LIMIT * self.cores):
            missing = -(rows.stop - rows.start) % self.cores
            yield tuple(
                torch.nn.functional.pad(x[rows], (0, 0, 0, missing)).unflatten(
                    0, (self.cores, 1, -1)
                )
                for x in flat
            )

    def _launch(self, kernel: Any) -> Any:
        return kernel if self.cores == 1 else kernel[self.cores]


def _cut_one(runs: Runs) -> Runs:
    """One run more: of those with more than one token the one next to the middle is cut in two."""
    middle = len(runs) // 2
    at = min((r for r, run in enumerate(runs) if run[1] > 1), key=lambda r: abs(r - middle))
    first, count, step = runs[at]
    half = count // 2
    halves = (first, half, step), (first + half * step, count - half, step)
    return (*runs[:at], *halves, *runs[at + 1 :])


def _whole(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Parts of `SupportKernels._rows` behind each other, without the rows that were added."""
    width = parts[0].shape[-1]
    flat = [part.reshape(-1, width) for part in parts]
    rows = flat[0] if len(flat) == 1 else torch.cat(flat)
    return rows[: shape.numel() // width].reshape(shape)
