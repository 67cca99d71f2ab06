"""What one call of the op was asked to do, in a form that passes the dispatcher.

Does: name the options once, with the op schema that carries them. Does not: check them
(`validation.py`) or compute.
"""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """Plain values only. `SCHEMA` lists the same names in the same order."""

    cp: str  # handle of a context, "" for one device
    causal: bool
    left: int | None  # keys that a query sees before its own place, None is all
    right: int | None  # keys that it sees after it, None is all; not read where causal
    scale: float
    softcap: float | None
    seq_len: int | None  # tokens of the whole sequence of queries, None: every slot holds one
    kv_seq_len: int | None  # the same of keys and values
    backend: str  # a name that is not "auto"
    differentiable: bool  # a backward may follow


SCHEMA = (
    "str cp, bool causal, SymInt? left, SymInt? right, float scale, float? softcap, "
    "SymInt? seq_len, SymInt? kv_seq_len, str backend, bool differentiable"
)
