"""Stand-ins for NxD, and NxD's own files from a clone, where neither can be installed.

`ParallelState` makes gloo groups as NxD makes its own and checks how it is called. `real_module`
loads one file of aws-neuron/neuronx-distributed from the clone that NXD_CLONE names, with the
packages that it imports (torch_xla, torch_neuronx, neuronxcc) stubbed.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nxd_cp.demo.model import rotate

CLONE_VARIABLE = "NXD_CLONE"


class ParallelState:
    """What `parallel_state` answers, over gloo: TP innermost, then CP, then DP."""

    def __init__(self) -> None:
        self.groups: dict[str, list[list[int]]] = {}
        self.mine: dict[str, dist.ProcessGroup] = {}
        self.calls: list[str] = []

    def initialize_model_parallel(self, *, tensor: int, context: int, rings: Any = None) -> None:
        """Make the groups; every rank of the world calls it. rings: context groups, if special."""
        world = dist.get_world_size()
        mesh = torch.arange(world).view(-1, context, tensor)
        self.groups = {
            "tensor": mesh.flatten(0, 1).tolist(),
            "context": rings or mesh.transpose(1, 2).flatten(0, 1).tolist(),
            "data": mesh.flatten(1).T.tolist(),
        }
        for kind, groups in self.groups.items():
            for ranks in groups:
                group = dist.new_group(ranks)
                if dist.get_rank() in ranks:
                    self.mine[kind] = group

    def _get(self, name: str, kind: str) -> dist.ProcessGroup:
        self.calls.append(name)
        assert kind in self.mine, f"{kind} parallel group is not initialized"
        return self.mine[kind]

    def get_context_model_parallel_group(self) -> dist.ProcessGroup:
        return self._get("get_context_model_parallel_group", "context")

    def get_context_model_parallel_replica_groups(self) -> list[list[int]]:
        self._get("get_context_model_parallel_replica_groups", "context")
        return self.groups["context"]

    def get_context_model_parallel_size(self) -> int:
        return dist.get_world_size(self._get("get_context_model_parallel_size", "context"))

    def get_context_model_parallel_src_tgt_pairs(self) -> list[tuple[int, int]]:
        (ring,) = (ring for ring in self.groups["context"] if dist.get_rank() in ring)
        return closed_ring(ring)


def closed_ring(ring: list[int]) -> list[tuple[int, int]]:
    """(source, target) of every hop of a closed ring."""
    return list(zip(ring, ring[1:] + ring[:1], strict=True))


class Optimizer:
    """The order of NxDOptimizer.step: mean over CP, sum over TP of what sequence parallelism split,
    mean over DP; then the wrapped optimiser.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, state: ParallelState) -> None:
        self.optimizer, self.state = optimizer, state

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                for kind in ("context", "data"):
                    p.grad /= dist.get_world_size(self.state.mine[kind])
                    dist.all_reduce(p.grad, group=self.state.mine[kind])
                if getattr(p, "sequence_parallel_enabled", False):
                    dist.all_reduce(p.grad, group=self.state.mine["tensor"])
        self.optimizer.step()


class LlamaAttention(nn.Module):
    """The part of NxD's LlamaAttention that an adapter touches: the repetition of key/value heads
    just before the hook, and the check of the shape just after.
    """

    def __init__(self, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_heads // num_kv_heads
        self.use_flash_attention = False
        self.heads_seen: list[int] = []

    def call_attn_impln(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("NxD's own attention was called")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Any = None) -> Tensor:
        k, v = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k, v))
        self.heads_seen.append(k.shape[1])
        o = self.call_attn_impln(q, k, v)
        assert o.shape == q.shape, f"expected [B, H, S, D] = {q.shape}, got {o.shape}"
        return o


class _CollectivesConfig:
    """The compiler's helper: the ring of each rank as (source, target) pairs."""

    def __init__(self, replica_groups: list[list[int]]) -> None:
        self.rank_src_tgt_pairs = {
            rank: closed_ring(list(ring)) for ring in replica_groups for rank in ring
        }


def clone() -> Path:
    """The user's clone; skips the test, with the reason, when there is none."""
    given = os.environ.get(CLONE_VARIABLE)
    if not given:
        pytest.skip(f"set {CLONE_VARIABLE} to a clone of aws-neuron/neuronx-distributed")
    return Path(given)


@contextlib.contextmanager
def real_module(root: Path, name: str, chip: str = "trn1", **present: Any) -> Iterator[ModuleType]:
    """`neuronx_distributed.<name>` from the clone at `root`, on stubs that go away afterwards.

    present: attributes for stubs of `neuronx_distributed.parallel_layers`.
    """

    class hardware(enum.Enum):
        TRN1, TRN2, TRN3 = "trn1", "trn2", "trn3"

    package = "neuronx_distributed"
    stubs: dict[str, dict[str, Any]] = {
        "torch_xla": {},
        "torch_xla.core": {},
        "torch_xla.core.xla_model": {},
        "torch_xla.runtime": {},
        "torch_neuronx": {},
        "torch_neuronx.utils": {"get_platform_target": lambda: chip},
        "neuronxcc": {},
        "neuronxcc.nki": {},
        "neuronxcc.nki._pre_prod_kernels": {},
        "neuronxcc.nki._pre_prod_kernels.collectives": {"CollectivesConfig": _CollectivesConfig},
        package: {},
        f"{package}.utils": {"cpu_mode": lambda: True},
        f"{package}.utils.logger": {
            "get_logger": lambda: SimpleNamespace(info=_nothing, debug=_nothing)
        },
        f"{package}.utils.utils": {"hardware": hardware},
        f"{package}.parallel_layers": present,
    }
    before = {key: sys.modules.get(key) for key in [*stubs, f"{package}.{name}"]}
    try:
        for key, content in stubs.items():
            module = ModuleType(key)
            module.__path__ = []
            module.__dict__.update(content)
            sys.modules[key] = module
            parent, _, child = key.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        path = root / "src" / package / (name.replace(".", "/") + ".py")
        spec = importlib.util.spec_from_file_location(f"{package}.{name}", path)
        assert spec is not None, f"expected a module at {path}"
        assert spec.loader is not None, f"expected a loader for {path}"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        logging.disable(logging.INFO)
        spec.loader.exec_module(module)
        yield module
    finally:
        logging.disable(logging.NOTSET)
        for key, old in before.items():
            if old is None:
                sys.modules.pop(key, None)
            else:
                sys.modules[key] = old


def _nothing(*_: Any, **__: Any) -> None:
    """A logger's method."""


def real_llama(root: Path) -> ModuleType:
    """A module with the class LlamaAttention of NxD's Llama example, as it is in the clone.

    The file as a whole wants an older transformers, so the class alone is executed, on stand-ins
    for tensor parallelism of size 1.
    """

    class Linear(nn.Linear):
        def __init__(self, inputs: int, outputs: int, *, bias: bool, **_: Any) -> None:
            super().__init__(inputs, outputs, bias=bias)

    def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> Any:
        return rotate(q, cos, sin), rotate(k, cos, sin)

    path = root / "examples" / "training" / "llama" / "modeling_llama_nxd.py"
    tree = ast.parse(path.read_text())
    wanted = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("CoreAttention", "LlamaAttention")
    ]
    module = ModuleType("modeling_llama_nxd")
    module.__dict__.update(
        torch=torch,
        nn=nn,
        math=math,
        os=os,
        partial=functools.partial,
        Optional=Optional,
        Tuple=tuple,
        Cache=object,
        LlamaConfig=object,
        LlamaAttentionHF=nn.Module,
        ColumnParallelLinear=Linear,
        RowParallelLinear=Linear,
        _init_normal=_nothing,
        neuronx_dist_utils=SimpleNamespace(divide=lambda a, b: a // b),
        repeat_kv=lambda x, n: x.repeat_interleave(n, dim=1),
        apply_rotary_pos_emb=apply_rotary,
        get_tensor_model_parallel_size=lambda: 1,
        get_context_model_parallel_size=lambda: 2,
        get_context_model_parallel_src_tgt_pairs=lambda: closed_ring([0, 1]),
        nki_ring_attn_func=None,
        nki_flash_attn_func=None,
    )
    code = compile(ast.Module(body=wanted, type_ignores=[]), str(path), "exec")
    exec(code, module.__dict__)
    return module
