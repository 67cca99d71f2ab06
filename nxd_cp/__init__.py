"""Context parallelism for AWS Neuron devices: the public names, and nothing else.

Importing this package needs torch alone; kernels and simulator are loaded when a backend asks.
"""

from nxd_cp.attention import ring_attention
from nxd_cp.checkpointing import keep_attention
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.loss import allreduce_grads, token_mean_loss
from nxd_cp.positions import position_ids, rope_tables, segment_ids
from nxd_cp.sharding import shard, shard_batch, unshard
from nxd_cp.transport import RankMismatchError, RingError

__version__ = "0.1.0"

__all__ = [
    "CPContext",
    "RankMismatchError",
    "RingError",
    "allreduce_grads",
    "debug",
    "keep_attention",
    "position_ids",
    "ring_attention",
    "rope_tables",
    "segment_ids",
    "shard",
    "shard_batch",
    "token_mean_loss",
    "unshard",
]
