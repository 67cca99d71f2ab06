"""Many documents in one long sequence, cut over all ranks, none of which sees another.

    torchrun --nproc-per-node 2 examples/packed_documents.py

Documents have any length and end anywhere; the cut over ranks goes right through them. After
training, the script shows that the loss of one document is the same alone and in a pack.
"""

from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from common import context, progress, run, tiny_model
from torch.nn import functional as F
from transformers import LlamaConfig

from nxd_cp import CPContext, allreduce_grads
from nxd_cp.integrations import hf
from nxd_cp.sharding import IGNORE_INDEX


def pack(documents: list[bytes], seq_len: int) -> dict[str, torch.Tensor]:
    """One row of tokens, with the number and the inner position of each one's document.

    A document's first token is nobody's successor, so its label is IGNORE_INDEX.
    """
    data = b"".join(documents)[:seq_len].ljust(seq_len, b" ")
    lengths = torch.tensor([len(document) for document in documents])
    numbers = torch.repeat_interleave(torch.arange(len(documents)), lengths)[:seq_len]
    numbers = F.pad(numbers, (0, seq_len - len(numbers)), value=len(documents))
    starts = torch.cat([torch.ones(1, dtype=torch.bool), numbers[1:] != numbers[:-1]])
    first = torch.arange(seq_len)[starts][starts.cumsum(0) - 1]
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return {
        "input_ids": ids[None],
        "labels": ids.masked_fill(starts | (numbers == len(documents)), IGNORE_INDEX)[None],
        "segment_ids": numbers[None],
        "position_ids": (torch.arange(seq_len) - first)[None],
    }


def loss_sum(model: torch.nn.Module, batch: dict[str, torch.Tensor], cp: CPContext) -> float:
    """The sum of the losses of all labelled tokens."""
    with torch.no_grad():
        loss = model(**hf.shard_batch(batch, cp, num_items_in_batch=1), use_cache=False).loss
    return float(cp.all_reduce(loss))


def main(
    seq_len: Annotated[int, typer.Option(help="Tokens per pack, over all ranks.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 20,
) -> None:
    """Train on packs of Python's help topics."""
    documents = sorted((text.encode() for text in topics.values()), key=len)[:64]
    if seq_len < (least := sum(map(len, documents[:3]))):
        raise typer.BadParameter(f"--seq-len: expected at least {least}, three documents")
    with context() as cp:
        model = tiny_model(LlamaConfig, cp)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
        with progress(cp, steps, f"packs of {seq_len} over {cp.size} ranks") as advance:
            for step in range(steps):
                begin = step * 7 % len(documents)
                batch = pack(documents[begin:] + documents[:begin], seq_len)
                loss = model(**hf.shard_batch(batch, cp), use_cache=False).loss
                optimiser.zero_grad()
                loss.backward()
                allreduce_grads(model.parameters(), cp)
                optimiser.step()
                advance(f"loss {float(cp.all_reduce(loss.detach())):.4f}")
        short, *others = documents[:3]
        together = loss_sum(model, pack([*others, short], seq_len), cp)
        together -= loss_sum(model, pack(others, seq_len), cp)
        alone = loss_sum(model, pack([short], seq_len), cp)
        if cp.rank == 0:
            print(f"a document's summed loss: {alone:.3f} alone, {together:.3f} behind two others")


if __name__ == "__main__":
    run(main)
