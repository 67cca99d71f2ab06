"""How messages travel round a ring: torch.distributed, XLA, or the threads of a process."""

from nxd_cp.transport.base import Transport
from nxd_cp.transport.call import Call, Hop
from nxd_cp.transport.collective import CollectiveTransport
from nxd_cp.transport.distributed import DistributedTransport
from nxd_cp.transport.errors import RankMismatchError, RingError
from nxd_cp.transport.local import LocalSession, LocalTransport
from nxd_cp.transport.parcel import Counters, Parcel
from nxd_cp.transport.probe import probe
from nxd_cp.transport.xla import XlaTransport

__all__ = [
    "Call",
    "CollectiveTransport",
    "Counters",
    "DistributedTransport",
    "Hop",
    "LocalSession",
    "LocalTransport",
    "Parcel",
    "RankMismatchError",
    "RingError",
    "Transport",
    "XlaTransport",
    "probe",
]
