"""How messages travel round a ring: over torch.distributed, or between the threads of a process."""

from nxd_cp.transport.base import (
    Call,
    Counters,
    Hop,
    Parcel,
    RankMismatchError,
    RingError,
    Transport,
)
from nxd_cp.transport.distributed import DistributedTransport
from nxd_cp.transport.local import LocalSession, LocalTransport

__all__ = [
    "Call",
    "Counters",
    "DistributedTransport",
    "Hop",
    "LocalSession",
    "LocalTransport",
    "Parcel",
    "RankMismatchError",
    "RingError",
    "Transport",
]
