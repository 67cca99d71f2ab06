"""Generate text with a key/value cache that is split over all ranks: none holds all of it.

    torchrun --nproc-per-node 2 examples/generate.py --model PATH --prompt-file long.txt

Without --model a tiny Llama over bytes writes noise, the same noise on any number of ranks.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from common import context, progress, run, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nxd_cp.integrations import hf
from nxd_cp.integrations.hf_generation import generate


def main(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a pretrained model."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="The prompt.")] = "The capital of France is",
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with the prompt.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
) -> None:
    """Prefill over all ranks, then decode token after token."""
    text = prompt_file.read_text() if prompt_file is not None else prompt
    with context() as cp:
        if model is None:
            network = tiny_model(LlamaConfig, cp)
            ids = torch.tensor([list(text.encode())])
        else:
            network = AutoModelForCausalLM.from_pretrained(model, attn_implementation=hf.NAME)
            hf.attach(network, cp)
            tokenizer = AutoTokenizer.from_pretrained(model)
            ids = tokenizer(text, return_tensors="pt").input_ids
        with progress(cp, new_tokens, f"{ids.shape[1]} tokens over {cp.size} ranks") as advance:
            tokens = generate(
                network.eval(),
                ids,
                cp,
                max_new_tokens=new_tokens,
                temperature=temperature,
                on_token=lambda column: advance(f"token {int(column[0])}"),
            )
        if cp.rank == 0:
            numbers = tokens[0].tolist()
            print(numbers if model is None else text + tokenizer.decode(numbers))


if __name__ == "__main__":
    run(main)
