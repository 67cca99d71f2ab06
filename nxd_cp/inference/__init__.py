"""Generation over a key/value cache that is split over the ranks: prefill and decode, both exact.

Not here: paging, sampling, weights, or kernels for a device (the maths is plain PyTorch, in fp32).
Nothing here is differentiable.
"""

from nxd_cp.inference.cache import KVCache
from nxd_cp.inference.decode import decode
from nxd_cp.inference.prefill import prefill

__all__ = ["KVCache", "decode", "prefill"]
