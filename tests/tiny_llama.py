"""A tiny Llama in plain PyTorch on one device, 50 steps of its training: what others must equal.

Does: seeded weights, batches with unevenly ignored labels, the loss and gradients of the whole
sequence, and the comparison. Does not: use anything of nxd_cp but the two rotary functions.

Letters: B batch, S tokens, E model dim, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nxd_cp.demo.data import load_text
from nxd_cp.demo.model import rope_tables, rotate
from nxd_cp.sharding import IGNORE_INDEX

E, H, G, D, HIDDEN, LAYERS, VOCABULARY, EPS = 32, 4, 2, 8, 48, 2, 128, 1e-5
SEQ_LEN, BATCH, MICRO_BATCHES, STEPS = 64, 2, 2, 50
# As in the demo: at this rate training does not amplify roundings; eps is above the rounding error
# of a gradient, which Adam would else turn into a full step.
LEARNING_RATE, ADAM_EPS = 7e-4, 1e-5
FIRST_LOSS, FIRST_GRADIENT, LATER_LOSS = 1e-6, 1e-5, 1e-5  # relative, fp32

Weights = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass
class Training:
    """losses: of every step. gradients: of the first step, whole."""

    losses: list[float]
    gradients: Weights


def weights() -> Weights:
    """Every weight, fp32, always equal."""
    generator = torch.Generator().manual_seed(11)
    shapes = {"embed": (VOCABULARY, E), "head": (VOCABULARY, E)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.q": (H * D, E),
            f"layers.{layer}.k": (G * D, E),
            f"layers.{layer}.v": (G * D, E),
            f"layers.{layer}.o": (E, H * D),
            f"layers.{layer}.gate": (HIDDEN, E),
            f"layers.{layer}.up": (HIDDEN, E),
            f"layers.{layer}.down": (E, HIDDEN),
        }
    found = {n: 0.1 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    norms = [f"layers.{i}.{kind}" for i in range(LAYERS) for kind in ("norm_in", "norm_mlp")]
    return found | {name: torch.ones(E) for name in [*norms, "norm"]}


def batch(step: int, micro_batch: int) -> Batch:
    """Bytes of text [B, S]; labels are the tokens, with a stretch ignored at an uneven place."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    text = load_text()
    tokens = torch.empty(BATCH, SEQ_LEN, dtype=torch.int64)
    for row in tokens:
        start = int(torch.randint(len(text) - SEQ_LEN, (1,), generator=generator))
        window = bytearray(text[start : start + SEQ_LEN])
        row.copy_(torch.frombuffer(window, dtype=torch.uint8) % VOCABULARY)
    labels = tokens.clone()
    start = int(torch.randint(SEQ_LEN // 2, (1,), generator=generator))
    labels[0, start : start + SEQ_LEN // 3] = IGNORE_INDEX
    labels[1, SEQ_LEN - 5 :] = IGNORE_INDEX
    return {"input_ids": tokens, "labels": labels}


def whole_loss(w: Weights, given: Batch) -> Tensor:
    """The mean over all valid tokens; per-token losses are fp32, their sum is fp64."""
    tokens, labels = given["input_ids"], given["labels"]
    rope = rope_tables(torch.arange(SEQ_LEN).expand(tokens.shape), D)
    x = w["embed"][tokens]
    for layer in range(LAYERS):
        at = {n.rpartition(".")[2]: t for n, t in w.items() if n.startswith(f"layers.{layer}.")}
        h = F.rms_norm(x, (E,), at["norm_in"], EPS)
        q, k, v = ((h @ at[n].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
        o = F.scaled_dot_product_attention(
            rotate(q, *rope), rotate(k, *rope), v, is_causal=True, enable_gqa=True
        )
        x = x + o.transpose(1, 2).flatten(2) @ at["o"].T
        h = F.rms_norm(x, (E,), at["norm_mlp"], EPS)
        x = x + (F.silu(h @ at["gate"].T) * (h @ at["up"].T)) @ at["down"].T
    logits = F.rms_norm(x, (E,), w["norm"], EPS) @ w["head"].T
    targets = labels[:, 1:].reshape(-1)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none").double()
    return losses.sum() / (targets != IGNORE_INDEX).sum()


def optimiser(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of all runs."""
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=ADAM_EPS)


def train_one_device(num_steps: int = STEPS, num_replicas: int = 1) -> Training:
    """Training on one device; `num_replicas` x MICRO_BATCHES batches are averaged per step."""
    w = {name: torch.nn.Parameter(value) for name, value in weights().items()}
    adam = optimiser(list(w.values()))
    found = Training([], {})
    count = num_replicas * MICRO_BATCHES
    for step in range(num_steps):
        adam.zero_grad()
        shares = []
        for index in range(count):
            share = whole_loss(w, batch(step, index)) / count
            share.backward()
            shares.append(float(share.detach()))
        found.losses.append(sum(shares))
        if step == 0:
            found.gradients = {name: p.grad.clone() for name, p in w.items()}
        adam.step()
    return found


def problems(found: Training, one: Training) -> list[str]:
    """What is not equal within the bounds; empty when all is."""
    said = []
    pairs = zip(found.losses, one.losses, strict=True)
    for step, (loss, expected) in enumerate(pairs):
        bound = LATER_LOSS if step else FIRST_LOSS
        apart = abs(loss - expected) / abs(expected)
        if not apart <= bound:
            said.append(f"step {step}: loss {loss}, one device {expected}, apart {apart:.1e}")
    for name, expected_grad in one.gradients.items():
        apart = float((found.gradients[name] - expected_grad).norm() / expected_grad.norm())
        if not apart <= FIRST_GRADIENT:
            said.append(f"first gradient of {name} apart {apart:.1e}")
    if not found.losses[-1] < found.losses[0]:
        said.append("the loss did not fall")
    return said
