"""Fine-tune a Hugging Face causal language model on long sequences, cut over all ranks.

    torchrun --nproc-per-node 2 examples/hf_finetune.py --steps 20
    torchrun --nproc-per-node 2 examples/hf_finetune.py --model PATH --text book.txt --seq-len 32768

Without --model a tiny Llama over bytes is trained from scratch, on text that ships with Python.
The losses are those of one rank: run it with `python` instead of torchrun and compare.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from common import context, progress, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nxd_cp import CPContext, allreduce_grads
from nxd_cp.demo.data import load_text
from nxd_cp.integrations import hf


def load(path: Path | None, text: str, cp: CPContext) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model with ring attention, and the whole text as token ids int64 [T]."""
    if path is None:
        model = tiny_model(LlamaConfig, cp)
        return model, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=hf.NAME)
    hf.attach(model, cp)
    return model, AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0]


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a pretrained model.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, over all ranks.")] = 2048,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 20,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
) -> None:
    """Fine-tune over all ranks and print the losses."""
    words = text.read_text() if text is not None else load_text().decode()
    with context() as cp:
        network, tokens = load(model, words, cp)
        if len(tokens) < seq_len:
            raise typer.BadParameter(f"--seq-len: the text has {len(tokens)} tokens, got {seq_len}")
        optimiser = torch.optim.AdamW(network.parameters(), lr=lr, eps=1e-5)
        losses = []
        with progress(cp, steps, f"{cp.size} ranks x {seq_len // cp.size} tokens") as advance:
            for step in range(steps):
                start = step * seq_len % (len(tokens) - seq_len + 1)
                ids = tokens[None, start : start + seq_len]
                batch = hf.shard_batch({"input_ids": ids, "labels": ids}, cp)
                loss = network(**batch, use_cache=False).loss
                optimiser.zero_grad()
                loss.backward()
                allreduce_grads(network.parameters(), cp)
                optimiser.step()
                losses.append(float(cp.all_reduce(loss.detach())))
                advance(f"loss {losses[-1]:.4f}")
        if cp.rank == 0:
            print(f"first loss {losses[0]:.6f}, last loss {losses[-1]:.6f}")


if __name__ == "__main__":
    typer.run(main)
