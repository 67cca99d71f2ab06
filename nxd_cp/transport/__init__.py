"""How messages travel round a ring: over torch.distributed, or between the threads of a process."""

from nxd_cp.transport.base import Transport
from nxd_cp.transport.call import Call, Hop
from nxd_cp.transport.distributed import DistributedTransport
from nxd_cp.transport.errors import RankMismatchError, RingError
from nxd_cp.transport.local import LocalSession, LocalTransport
from nxd_cp.transport.parcel import Counters, Parcel

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
