"""What one demo run is made of, as plain data that travels to the workers as JSON.

Not here: the number of ranks, which the launcher gives.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the model; the vocabulary is the 256 bytes."""

    num_layers: int = 2
    model_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    hidden_dim: int = 384

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


@dataclass(frozen=True)
class RunSettings:
    """One training run.

    `rounding_seed` is None for a plain run. With a number, every initial weight is moved by one
    fp32 rounding in a random direction: how far such a run drifts from the plain one says how far
    a run may drift that only adds up in another order. The learning rate is one at which training
    does not amplify roundings; at 2e-3 a single rounding of the weights moves the losses of later
    steps by 1 %, and no two orders of addition could agree.
    """

    name: str
    backend: str
    seq_len: int
    num_steps: int
    layout: str = "zigzag"
    learning_rate: float = 7e-4
    seed: int = 0
    rounding_seed: int | None = None
    model: ModelSettings = ModelSettings()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunSettings:
        return cls(**{**data, "model": ModelSettings(**data["model"])})


@dataclass(frozen=True)
class Sent:
    """Messages and bytes that rank 0 sends round the ring in one training step."""

    num_messages: int
    size_bytes: int


@dataclass(frozen=True)
class StepRecord:
    """One training step: the loss of the whole sequence, the time, and what rank 0 sent."""

    step: int
    loss: float
    seconds: float
    sent: Sent

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StepRecord:
        return cls(**{**data, "sent": Sent(**data["sent"])})
