"""A sliding-window model over all ranks: keys outside the window are neither computed nor sent.

    torchrun --nproc-per-node 4 examples/window_model.py --window 256

The contiguous layout keeps neighbours together, so a window that is shorter than a rank's part
reaches one rank back, however many ranks there are. The script counts the messages.
"""

from typing import Annotated

import torch
import typer
from common import context, progress, run, tiny_model
from transformers import MistralConfig

from nxd_cp import allreduce_grads
from nxd_cp.demo.data import load_text, sample_batch
from nxd_cp.integrations import hf


def main(
    window: Annotated[int, typer.Option(help="Keys that each query sees.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, over all ranks.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 20,
) -> None:
    """Train with and without a window and compare what travels."""
    text = load_text()
    with context(layout="contiguous") as cp:
        sent = {}
        for name, size in (("no window", None), (f"window {window}", window)):
            model = tiny_model(MistralConfig, cp, sliding_window=size)
            optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
            cp.transport.counters.reset()
            with progress(cp, steps, f"{name}, {cp.size} ranks") as advance:
                for step in range(steps):
                    batch = hf.shard_batch(sample_batch(text, seq_len, step, seed=0), cp)
                    loss = model(**batch, use_cache=False).loss
                    optimiser.zero_grad()
                    loss.backward()
                    allreduce_grads(model.parameters(), cp)
                    optimiser.step()
                    advance(f"loss {float(cp.all_reduce(loss.detach())):.4f}")
            sent[name] = cp.all_reduce(torch.tensor(cp.transport.counters.ring_bytes))
        if cp.rank == 0:
            for name, num_bytes in sent.items():
                print(f"{name}: {int(num_bytes) / 2**20 / steps:.2f} MiB of keys and values a step")


if __name__ == "__main__":
    run(main)
