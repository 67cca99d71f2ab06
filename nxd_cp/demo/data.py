"""Real English text that ships with Python, as bytes: the help topics of `pydoc` (about 465 kB).

The text differs a little from one Python version to the next, and so do the losses; within one
environment it is the same on every rank.
"""

import torch


def load_text() -> bytes:
    """The corpus, topics in alphabetical order, UTF-8."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def sample_batch(text: bytes, seq_len: int, step: int, seed: int) -> dict[str, torch.Tensor]:
    """The batch of one step: a window of `seq_len` bytes at a place that (seed, step) decides.

    Returns:
        `input_ids` and `labels`, the same int64 [1, seq_len] tensor (labels not yet shifted).

    Raises:
        ValueError: the corpus is shorter than `seq_len`.
    """
    if len(text) < seq_len:
        raise ValueError(f"expected seq_len of at most {len(text)} bytes of text, got {seq_len}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    start = int(torch.randint(len(text) - seq_len + 1, (1,), generator=generator))
    window = bytearray(text[start : start + seq_len])
    tokens = torch.frombuffer(window, dtype=torch.uint8).long()[None]
    return {"input_ids": tokens, "labels": tokens}
