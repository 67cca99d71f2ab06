"""The worker of the demo: `torchrun ... -m nxd_cp.demo.train RUNS.json`, one process per rank.

It runs the settings of the file one after another, and rank 0 prints one JSON line per step.
Everything is fp32 and deterministic, and nothing in the training depends on the number of ranks.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record as record_errors
from torch.nn import functional as F

from nxd_cp.context import CPContext
from nxd_cp.demo.data import load_text, sample_batch
from nxd_cp.demo.model import TinyLlama
from nxd_cp.demo.settings import RunSettings, Sent, StepRecord
from nxd_cp.loss import allreduce_grads, token_mean_loss
from nxd_cp.sharding import shard_batch

TIMEOUT = timedelta(minutes=10)


def train(
    run: RunSettings, cp: CPContext, report: Callable[[StepRecord], None] | None = None
) -> list[StepRecord]:
    """Train one model from scratch on this rank's part of every sequence.

    Args:
        run: what to train.
        cp: the context; every rank of it makes this call.
        report: called after every step.

    Returns:
        One record per step; the losses are equal on all ranks.
    """
    model = TinyLlama(run.model, run.seed)
    if run.rounding_seed is not None:
        _move_by_one_rounding(model, run.rounding_seed)
    # eps well above the rounding error of a gradient: where a gradient is only rounding error, Adam
    # would else turn it into a full step.
    optimiser = torch.optim.Adam(model.parameters(), lr=run.learning_rate, eps=1e-5)
    text = load_text()
    records = []
    for step in range(run.num_steps):
        start = time.perf_counter()
        cp.transport.counters.reset()
        batch = sample_batch(text, run.seq_len, step, run.seed)
        loss = _train_step(model, optimiser, batch, cp, run.backend)
        sent = Sent(cp.transport.counters.ring_messages, cp.transport.counters.ring_bytes)
        record = StepRecord(step, loss, time.perf_counter() - start, sent)
        records.append(record)
        if report is not None:
            report(record)
    return records


def _train_step(
    model: TinyLlama,
    optimiser: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    cp: CPContext,
    backend: str,
) -> float:
    local = shard_batch(batch, cp)
    logits_BLV = model(local["input_ids"], local["position_ids"], cp, backend)
    labels = local["labels"].flatten()
    per_token = F.cross_entropy(logits_BLV.flatten(0, 1), labels, reduction="none")
    # Losses of single tokens are fp32; their sum is not, so that it adds no rounding of its own to
    # the comparison.
    loss = token_mean_loss(per_token.double(), labels, cp)
    optimiser.zero_grad()
    loss.backward()
    allreduce_grads(model.parameters(), cp)
    optimiser.step()
    return float(cp.all_reduce(loss.detach()))


@torch.no_grad()
def _move_by_one_rounding(model: TinyLlama, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        up = torch.randint(0, 2, parameter.shape, generator=generator).bool()
        infinity = torch.where(up, torch.inf, -torch.inf)
        parameter.copy_(torch.nextafter(parameter, infinity))


@record_errors
def main(path: str) -> None:
    """Run every entry of a JSON list of settings over the process group that torchrun describes."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        runs = [RunSettings.from_json(entry) for entry in json.loads(Path(path).read_text())]
        world = dist.group.WORLD
        assert world is not None, "init_process_group makes the world group"
        for run in runs:
            cp = CPContext.from_group(world, layout=run.layout)
            train(run, cp, _print_line(run) if cp.rank == 0 else None)
    finally:
        dist.destroy_process_group()


def _print_line(run: RunSettings) -> Callable[[StepRecord], None]:
    def report(record: StepRecord) -> None:
        print(json.dumps({"run": run.name, **asdict(record)}), flush=True)

    return report


if __name__ == "__main__":
    main(sys.argv[1])
