"""A small Llama-style language model whose attention is `ring_attention`.

RMSNorm before each block, rotary embeddings by GLOBAL position ids, grouped-query attention,
SwiGLU. The only lines that know of context parallelism are the call of `ring_attention` and the
position ids, which come from `shard_batch`.

Letters: B batch, L tokens of this rank, H query heads, G key/value heads, D head dim, E model dim.
"""

import torch
from torch import nn
from torch.nn import functional as F

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.demo.settings import ModelSettings
from nxd_cp.positions import rope_tables as half_rope_tables

VOCABULARY = 256
Rope = tuple[torch.Tensor, torch.Tensor]


def rope_tables(position_ids_BL: torch.Tensor, head_dim: int) -> Rope:
    """cos and sin, fp32 [B, 1, L, D], for global positions int64 [B, L]: each half of D alike."""
    cos_BLd, sin_BLd = half_rope_tables(position_ids_BL, head_dim)
    return torch.cat([cos_BLd, cos_BLd], -1)[:, None], torch.cat([sin_BLd, sin_BLd], -1)[:, None]


def rotate(x_BHLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021), first half of D paired with the second."""
    first, second = x_BHLD.chunk(2, dim=-1)
    return x_BHLD * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention over the whole sequence, of which this rank holds L tokens."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        self.s = s
        self.q = nn.Linear(s.model_dim, s.num_heads * s.head_dim, bias=False)
        self.kv = nn.Linear(s.model_dim, 2 * s.num_kv_heads * s.head_dim, bias=False)
        self.o = nn.Linear(s.num_heads * s.head_dim, s.model_dim, bias=False)

    def forward(self, x_BLE: torch.Tensor, rope: Rope, cp: CPContext, backend: str) -> torch.Tensor:
        s, (cos, sin) = self.s, rope
        q_BHLD = self.q(x_BLE).unflatten(-1, (s.num_heads, s.head_dim)).transpose(1, 2)
        kv = self.kv(x_BLE).unflatten(-1, (2, s.num_kv_heads, s.head_dim))
        k_BGLD, v_BGLD = kv.unbind(2)
        k_BGLD, v_BGLD = k_BGLD.transpose(1, 2), v_BGLD.transpose(1, 2)
        q_BHLD, k_BGLD = rotate(q_BHLD, cos, sin), rotate(k_BGLD, cos, sin)
        o_BHLD = ring_attention(q_BHLD, k_BGLD, v_BGLD, cp=cp, backend=backend)
        assert isinstance(o_BHLD, torch.Tensor), "return_lse was not asked for"
        return self.o(o_BHLD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and SwiGLU, each behind its norm and added to the stream."""

    def __init__(self, s: ModelSettings):
        super().__init__()
        self.norm_attention = nn.RMSNorm(s.model_dim, eps=1e-5)
        self.attention = Attention(s)
        self.norm_mlp = nn.RMSNorm(s.model_dim, eps=1e-5)
        self.gate_up = nn.Linear(s.model_dim, 2 * s.hidden_dim, bias=False)
        self.down = nn.Linear(s.hidden_dim, s.model_dim, bias=False)

    def forward(self, x_BLE: torch.Tensor, rope: Rope, cp: CPContext, backend: str) -> torch.Tensor:
        x_BLE = x_BLE + self.attention(self.norm_attention(x_BLE), rope, cp, backend)
        gate, up = self.gate_up(self.norm_mlp(x_BLE)).chunk(2, dim=-1)
        return x_BLE + self.down(F.silu(gate) * up)


class TinyLlama(nn.Module):
    """Bytes in, logits over 256 bytes out. Weights depend on the seed alone, never on the rank."""

    def __init__(self, s: ModelSettings, seed: int):
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(VOCABULARY, s.model_dim)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.num_layers))
        self.norm = nn.RMSNorm(s.model_dim, eps=1e-5)
        self.head = nn.Linear(s.model_dim, VOCABULARY, bias=False)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        # A generator of its own: threads of one process share the global one.
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.02, generator=generator)

    def forward(
        self, tokens_BL: torch.Tensor, position_ids_BL: torch.Tensor, cp: CPContext, backend: str
    ) -> torch.Tensor:
        rope = rope_tables(position_ids_BL, self.s.head_dim)
        x_BLE = self.embed(tokens_BL)
        for block in self.blocks:
            x_BLE = block(x_BLE, rope, cp, backend)
        return self.head(self.norm(x_BLE))
