"""What every example needs: its command, this process's context, a tiny model, a progress bar."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nxd_cp import CPContext
from nxd_cp.integrations import hf


def run(main: Callable[..., None]) -> None:
    """`main` as a command whose options are its arguments; its errors are plain tracebacks."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(main)
    command()


@contextmanager
def context(layout: str = "zigzag") -> Iterator[CPContext]:
    """The context of this process: `torchrun` says which rank it is; without it there is one."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield CPContext.from_group(dist.group.WORLD, layout=layout)
    finally:
        dist.destroy_process_group()


@contextmanager
def progress(cp: CPContext, total: int, text: str) -> Iterator:
    """A bar on rank 0. Call what it yields after each step, with a note to show."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    notes = (TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *notes, disable=cp.rank > 0) as bar:
        task = bar.add_task(text, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def tiny_model(config_class: type[PreTrainedConfig], cp: CPContext, **settings) -> PreTrainedModel:
    """A small causal language model over bytes, with the same weights on every rank."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=hf.NAME)
    hf.attach(model, cp)
    return model
