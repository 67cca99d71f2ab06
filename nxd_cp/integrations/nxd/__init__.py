"""neuronx-distributed (NxD) with this package's context parallelism in place of its own.

    import neuronx_distributed as nxd
    from nxd_cp.integrations import nxd as nxd_cp_nxd

    model = nxd.initialize_parallel_model(config, lambda: nxd_cp_nxd.convert(make_model()))
    batch = nxd_cp_nxd.get_batch_on_this_context_parallel_rank(batch)

Read in this order: mesh.py, state.py, attention.py, convert.py, batch.py, loss.py. Importing this
needs neither NxD nor torch_xla. Checked against the sources of NxD 0.18.0 (Neuron SDK 2.29,
aws-neuron/neuronx-distributed@fbac349); not run on a Neuron device.
"""

from nxd_cp.integrations.nxd.attention import nki_ring_attn_func
from nxd_cp.integrations.nxd.batch import get_batch_on_this_context_parallel_rank, shift_labels
from nxd_cp.integrations.nxd.convert import convert, patch
from nxd_cp.integrations.nxd.loss import token_mean_loss
from nxd_cp.integrations.nxd.mesh import check_sizes, context_groups, tensor_groups

__all__ = [
    "check_sizes",
    "context_groups",
    "convert",
    "get_batch_on_this_context_parallel_rank",
    "nki_ring_attn_func",
    "patch",
    "shift_labels",
    "tensor_groups",
    "token_mean_loss",
]
