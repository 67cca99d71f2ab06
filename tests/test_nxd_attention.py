"""`nki_ring_attn_func`, `convert` and `patch`: NxD's arguments, layout and results."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close
from cases import NAMES, Case, cut, inputs, join_all, truth
from nxd_stand_ins import (
    LlamaAttention,
    ParallelState,
    clone,
    closed_ring,
    real_llama,
    real_module,
)
from ranks import RankGroup
from torch import Tensor, nn

from nxd_cp.context import CPContext
from nxd_cp.demo.model import rope_tables, rotate
from nxd_cp.integrations.nxd import convert, nki_ring_attn_func, patch
from nxd_cp.integrations.nxd.convert import HOOK, NAME
from nxd_cp.sharding import shard, unshard

# NxD takes local lengths of 1024, 2048, 3072 and multiples of 2048; ours need no such multiple.
ACCEPTED = [
    Case(layout="contiguous", size=2, S=2048, Hq=1, Hkv=1, D=32),
    Case(layout="contiguous", size=4, S=4096, Hq=1, Hkv=1, D=16),
    Case(layout="contiguous", size=1, S=3072, Hq=1, Hkv=1, D=16),
    Case(layout="contiguous", size=1, S=1024, Hq=2, Hkv=2, D=128),
    Case(layout="contiguous", size=2, S=2048, Hq=1, Hkv=1, D=16, causal=False),
    Case(layout="contiguous", size=2, S=48, Hq=4, Hkv=2, D=16),
]
BOUNDS = (FP32_OUTPUT, FP32_GRADIENT, FP32_GRADIENT, FP32_GRADIENT)


def one_rank(cp: CPContext, case: Case, attend: Any) -> tuple[Tensor, ...]:
    q, k, v, do = (cut(x, case, cp.rank).clone() for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attend(*leaves)
    o.backward(do)
    return (o.detach(), *(x.grad for x in leaves))


def ring_of(cp: CPContext) -> list[tuple[int, int]]:
    return closed_ring([cp.transport.global_ranks[rank] for rank in cp.ring_order])


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_layout_results_and_gradients_are_those_of_fp64(case: Case) -> None:
    def work(cp: CPContext) -> tuple[Tensor, ...]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nki_ring_attn_func(
                q, k, v, cp.rank, ring_of(cp), 0.0, None, case.causal, True, None, cp=cp
            )

        return one_rank(cp, case, attend)

    results = CPContext.local(case.size, layout="contiguous").run(work)
    o, *_ = results[0]
    assert o.shape == (case.B, case.Hq, case.S // case.size, case.D), "expected [B, H, S, D]"
    for name, x, y, bound in zip(NAMES, join_all(results, case), truth(case), BOUNDS, strict=True):
        assert_close(name, x, y, bound)


def test_the_arguments_are_nxds_in_nxds_order() -> None:
    parameters = list(inspect.signature(nki_ring_attn_func).parameters.values())
    assert [(p.name, p.default) for p in parameters if p.kind != p.KEYWORD_ONLY] == [
        ("q", inspect.Parameter.empty),
        ("k", inspect.Parameter.empty),
        ("v", inspect.Parameter.empty),
        ("rank_id", inspect.Parameter.empty),
        ("src_tgt_pairs", inspect.Parameter.empty),
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("causal", True),
        ("mixed_precision", True),
        ("seed", None),
    ]


def test_the_arguments_are_those_of_nxds_own_file() -> None:
    config = SimpleNamespace(FlashConfig=None)
    helpers = SimpleNamespace(get_seed=None, move_seed=None, permute=None, cast=None)
    stubs = {
        "neuronxcc.nki.kernels": SimpleNamespace(attention=config),
        "neuronxcc.nki.kernels.attention": config,
        "neuronx_distributed.kernels": SimpleNamespace(kernel_utils=helpers),
        "neuronx_distributed.kernels.kernel_utils": helpers,
    }
    with (
        mock.patch.dict("sys.modules", stubs),
        real_module(clone(), "kernels.ring_attention_kernel") as nxd,
    ):
        theirs = inspect.signature(nxd.nki_ring_attn_func).parameters
    ours = inspect.signature(nki_ring_attn_func).parameters
    assert [(p.name, p.default) for p in theirs.values()] == [
        (p.name, p.default) for p in ours.values() if p.kind != p.KEYWORD_ONLY
    ]


def test_scale_is_used_and_dropout_is_refused_on_every_rank() -> None:
    case = ACCEPTED[-1]

    def work(cp: CPContext) -> Tensor:
        q, k, v, _ = (cut(x, case, cp.rank) for x in inputs(case))
        arguments = (q, k, v, cp.rank, ring_of(cp))
        with pytest.raises(ValueError, match="dropout"):
            nki_ring_attn_func(*arguments, dropout_p=0.1 if cp.rank == 0 else 0.0, cp=cp)
        o = nki_ring_attn_func(*arguments, softmax_scale=0.5, cp=cp)
        apart = (o - nki_ring_attn_func(*arguments, cp=cp)).abs().max()
        assert apart > 100 * FP32_OUTPUT
        return apart

    CPContext.local(2, layout="contiguous").run(work)


class Model(nn.Module):
    """Two attention layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaAttention(4, 2) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Any = None) -> Tensor:
        for layer in self.layers:
            q = layer(q, k, v)
        return q


def test_a_converted_model_hands_over_key_and_value_heads_unrepeated() -> None:
    case = Case(size=2)

    def work(cp: CPContext) -> list[int]:
        model = convert(Model(), cp)
        q, k, v, _ = (cut(x, case, cp.rank) for x in inputs(case))
        model(q, k, v, position_ids=torch.arange(1))
        return [heads for layer in model.layers for heads in layer.heads_seen]

    assert CPContext.local(2).run(work) == [[2, 2], [2, 2]]


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_a_converted_layer_gives_the_attention_of_the_whole_sequence(layout: str) -> None:
    case = Case(layout=layout, size=2)

    def work(cp: CPContext) -> tuple[Tensor, ...]:
        layer = convert(LlamaAttention(case.Hq, case.Hkv), cp)
        return one_rank(cp, case, lambda q, k, v: layer(q, k, v, position_ids=torch.arange(1)))

    results = join_all(CPContext.local(2, layout=layout).run(work), case)
    for name, x, y, bound in zip(NAMES, results, truth(case), BOUNDS, strict=True):
        assert_close(name, x, y, bound)


def test_a_converted_model_without_positions_raises_where_nxd_would_number_wrongly() -> None:
    q = torch.zeros(1, 4, 4, 16)
    for layout, raises in (("zigzag", True), ("contiguous", False)):
        group = CPContext.local(2, layout=layout)
        model = convert(LlamaAttention(4, 4), group.contexts[0])
        hooks = list(model._forward_pre_hooks.values())
        assert bool(hooks) == raises
        for hook in hooks:
            with pytest.raises(ValueError, match="expected global positions"):
                hook(model, (q, q, q), {})
            hook(model, (q, q, q), {"position_ids": torch.arange(4)})


def test_models_that_cannot_be_converted_are_refused() -> None:
    (cp,) = CPContext.local(1).contexts
    with pytest.raises(ValueError, match="expected modules with a method call_attn_impln"):
        convert(nn.Linear(2, 2), cp)
    layer = LlamaAttention(4, 2)
    layer.use_flash_attention = True
    with pytest.raises(ValueError, match="expected use_flash_attention=False"):
        convert(layer, cp)
    with pytest.raises(ValueError, match="neuronx-distributed to be installed"):
        convert(LlamaAttention(4, 2))
    assert HOOK not in vars(layer), "a refused model was changed"


def test_patch_replaces_the_name_and_gives_back_what_was_there() -> None:
    case = ACCEPTED[-1]

    def work(cp: CPContext) -> tuple[Tensor, ...]:
        original = object()
        modeling = SimpleNamespace(**{NAME: original})
        assert patch(modeling, cp) is original
        return one_rank(
            cp, case, lambda q, k, v: modeling.nki_ring_attn_func(q, k, v, cp.rank, ring_of(cp))
        )

    results = join_all(CPContext.local(2, layout="contiguous").run(work), case)
    assert_close("o", results[0], truth(case)[0], FP32_OUTPUT)


def test_modules_and_layouts_that_cannot_be_patched_are_refused() -> None:
    (cp,) = CPContext.local(1).contexts
    with pytest.raises(ValueError, match="expected a module that uses nki_ring_attn_func"):
        patch(SimpleNamespace(), cp)
    with pytest.raises(ValueError, match='expected layout="contiguous"'):
        patch(SimpleNamespace(**{NAME: None}), cp)


def as_nxd_calls_it(group: dist.ProcessGroup, case: Case) -> tuple[Tensor, ...]:
    """NxD's call: global rank and pairs by position, everything else by default."""
    state = ParallelState()
    state.initialize_model_parallel(tensor=2, context=2)
    cp = CPContext.from_nxd(layout="contiguous", parallel_state=state)
    with mock.patch("nxd_cp.nxd_place.load_parallel_state", return_value=state):

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pairs = state.get_context_model_parallel_src_tgt_pairs()
            return nki_ring_attn_func(q, k, v, dist.get_rank(), pairs)

        return one_rank(cp, case, attend)


def test_nxds_own_call_works_in_the_groups_of_tp_2_cp_2(ranks: RankGroup) -> None:
    case = ACCEPTED[0]
    results = ranks.run(as_nxd_calls_it, case)
    for tensor_rank in (0, 1):
        found = join_all([results[tensor_rank], results[2 + tensor_rank]], case)
        for name, x, y, bound in zip(NAMES, found, truth(case), BOUNDS, strict=True):
            assert_close(name, x, y, bound)


LLAMA = SimpleNamespace(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    pretraining_tp=1,
    max_position_embeddings=64,
    rope_theta=1e4,
    initializer_range=0.02,
    sequence_parallel_enabled=False,
    transpose_nki_inputs=True,
    torch_dtype=torch.float32,
)


def _whole(layer: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The layer on the whole sequence, by PyTorch alone."""
    q, k, v = (
        projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    o = F.scaled_dot_product_attention(
        rotate(q, *rope), rotate(k, *rope), v, is_causal=True, enable_gqa=True
    )
    return layer.o_proj(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("sequence_first", [False, True], ids=["BSE", "SBE"])
@pytest.mark.parametrize("how", ["convert", "patch"])
def test_nxds_own_llama_attention_gives_that_of_the_whole_sequence(
    how: str, sequence_first: bool
) -> None:
    root = clone()
    x = torch.randn(2, 32, LLAMA.hidden_size)
    do = torch.randn_like(x)
    weights = real_llama(root).LlamaAttention(LLAMA).state_dict()
    layout = "zigzag" if how == "convert" else "contiguous"

    def work(cp: CPContext) -> tuple[Tensor, Tensor, list[int]]:
        modeling = real_llama(root)
        heads: list[int] = []
        repeat = modeling.repeat_kv
        modeling.repeat_kv = lambda x, n: heads.append(n) or repeat(x, n)
        config = {**vars(LLAMA), "sequence_parallel_enabled": sequence_first}
        layer = modeling.LlamaAttention(SimpleNamespace(**config))
        layer.load_state_dict(weights)
        if how == "convert":
            convert(layer, cp)
        else:
            patch(modeling, cp)
        positions = shard(torch.arange(32).expand(2, 32), cp)
        local = shard(x, cp).requires_grad_()
        # NxD asks torch.distributed for its rank; these ranks are threads.
        ranks = SimpleNamespace(get_rank=lambda: cp.rank)
        modeling.torch = SimpleNamespace(**{**vars(torch), "distributed": ranks})
        hidden = local.transpose(0, 1) if sequence_first else local
        o, _ = layer(hidden, rope_tables(positions, 8), position_ids=positions)
        o = o.transpose(0, 1) if sequence_first else o
        o.backward(shard(do, cp))
        return unshard(o.detach(), cp), unshard(local.grad, cp), heads

    layer = real_llama(root).LlamaAttention(LLAMA)
    layer.load_state_dict(weights)
    leaf = x.clone().double().requires_grad_()
    rope = rope_tables(torch.arange(32).expand(2, 32), 8)
    truth = _whole(layer.double(), leaf, tuple(t.double() for t in rope))
    truth.backward(do.double())
    for o, grad, repeated in CPContext.local(2, layout=layout).run(work):
        assert_close("o", o, truth.detach(), FP32_OUTPUT)
        assert_close("dx", grad, leaf.grad, FP32_GRADIENT)
        assert repeated == ([1, 1] if how == "convert" else [2, 2])
