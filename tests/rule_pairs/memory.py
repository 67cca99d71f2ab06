"""Memory: allocation, placement, capacity, what was written."""

from nki_sim import nisa, nl, psum, sbuf

from nxd_cp.simulators.nki_api.runtime import current

from . import pair


def hbm(shape, dtype=nl.float32):
    """Written HBM of this core."""
    return nl.zeros(shape, dtype, buffer=nl.private_hbm)


@pair("ndarray.single", good=(1, 1), bad=(1,))
def single(shape):
    nl.ndarray(shape, dtype=nl.int32)  # bad


@pair("ndarray.shape", good=(128, 8), bad=(128,))
def shape(sizes):
    nl.ndarray(sizes, nl.float32, nl.sbuf)  # bad


@pair("ndarray.buffer", good=nl.sbuf, bad="sbuf")
def buffer(region):
    nl.ndarray((128, 8), nl.float32, buffer=region)  # bad


@pair("memory.partitions", good=128, bad=129)
def partitions(count):
    nl.ndarray((count, 8), nl.float32, nl.sbuf)  # bad


@pair("memory.address", good=(64, 2048), bad=(65, 2048))
def address(place):
    nl.ndarray((64, 8), nl.float32, nl.psum, address=place)  # bad


@pair("memory.alignment", good=4, bad=2)
def alignment(byte):
    nl.ndarray((128, 8), nl.bfloat16, nl.sbuf, address=(0, byte))  # bad


@pair("memory.capacity", good=1, bad=3)
def capacity(count):
    for _ in range(10 * count):
        nl.zeros((128, 4000), nl.float32)
    kept = []
    for _ in range(4 * count):
        kept.append(nl.zeros((128, 8000), nl.float32))  # bad
    for tile in kept:
        nisa.tensor_copy(tile, tile)


@pair("memory.uninitialised", good=8, bad=7)
def uninitialised(columns):
    tile, out = sbuf((128, 8)), sbuf((128, 8))
    nisa.memset(tile[:, 0:columns], 0.0)
    nisa.activation(out, nl.exp, tile)  # bad


@pair("memory.overwritten", good=32, bad=16)
def overwritten(byte):
    one = nl.ndarray((128, 8), nl.float32, nl.sbuf, address=(0, 0))
    two = nl.ndarray((128, 8), nl.float32, nl.sbuf, address=(0, byte))
    nisa.memset(one, 1.0)
    nisa.memset(two, 2.0)
    nisa.tensor_copy(sbuf((128, 8)), one)  # bad


@pair("dma_copy.uninitialised", good=8, bad=7)
def padding(columns):
    tile = sbuf((128, 8))
    nisa.memset(tile[:, 0:columns], 0.0)
    nisa.dma_copy(sbuf((128, 8)), tile)  # bad


@pair("tensor_copy.uninitialised", good=8, bad=7)
def copied_padding(columns):
    tile = sbuf((128, 8))
    nisa.memset(tile[:, 0:columns], 0.0)
    nisa.tensor_copy(sbuf((128, 8)), tile)  # bad


_KEPT: list = []


@pair("tensor.run", good=True, bad=False)
def other_call(fresh):
    if fresh:
        _KEPT[:] = [nl.ones((128, 8), nl.float32)]
    nisa.reciprocal(sbuf((128, 8)), _KEPT[0])  # bad


@pair("kernel.output", good=nl.shared_hbm, bad=nl.private_hbm)
def output(region):
    out = nl.ndarray((128, 8), nl.float32, buffer=region)  # bad
    nisa.dma_copy(out, nl.zeros((128, 8), nl.float32))
    return out


@pair("kernel.unwritten_output", good=8, bad=7)
def unwritten(columns):
    out = nl.ndarray((128, 8), nl.float32, buffer=nl.shared_hbm)  # bad
    nisa.dma_copy(out[:, 0:columns], nl.zeros((128, columns), nl.float32))
    return out


@pair("operand.overlap", good=8, bad=4)
def overlap(start):
    tile = nl.ones((128, 16), nl.float32)
    nisa.tensor_scalar(tile[:, start : start + 8], tile[:, 0:8], nl.multiply, 2.0)  # bad


@pair("operand.repeated_output", good=1, bad=0)
def repeated(stride):
    tile = sbuf((128, 8))
    view = tile.ap([[8, 128], [stride, 8]])
    nisa.memset(view, 1.0)  # bad


@pair("operand.partition_start", good=64, bad=32)
def partition_start(first):
    tile = sbuf((128, 8))
    nisa.memset(tile[first : first + 64], 0.0)  # bad


@pair("operand.tile", good=True, bad=False)
def tile(on_chip):
    data = nl.ones((128, 8), nl.float32) if on_chip else hbm((128, 8))
    nisa.activation(sbuf((128, 8)), nl.exp, data)  # bad


@pair("operand.shapes", good=8, bad=7)
def shapes(columns):
    data = nl.ones((128, 8), nl.float32)
    nisa.tensor_tensor(sbuf((128, 8)), data, data[:, 0:columns], nl.add)  # bad


@pair("operand.run_time_address", good=False, bad=True)
def run_time_address(dynamic):
    index = nl.zeros((1, 1), nl.uint32)
    data = nl.ones((128, 16), nl.float32)
    if dynamic:
        data = data.ap([[16, 128], [1, 8]], scalar_offset=index, indirect_dim=1)
    else:
        data = data[:, 0:8]
    nisa.activation(sbuf((128, 8)), nl.exp, data)  # bad


@pair("view.bounds", good=8, bad=9)
def bounds(stop):
    nl.zeros((128, 8), nl.float32)[:, 0:stop]  # bad


@pair("view.outside", good=8, bad=9)
def outside(columns):
    nl.zeros((128, 8), nl.float32)[64:128].ap([[8, 64], [1, columns]])  # bad


@pair("tensor.truth", good=False, bad=True)
def truth(asks):
    tile = nl.zeros((128, 8), nl.float32)
    present = tile if asks else tile.shape
    nisa.memset(tile, 1.0 if present else 2.0)  # bad


@pair("view.shape", good=(128, 2, 4), bad=(128, 3, 4))
def view_shape(sizes):
    nl.zeros((128, 8), nl.float32).reshape(sizes)  # bad


@pair("view.layout", good=1, bad=2)
def layout(step):
    nl.zeros((128, 8), nl.float32)[:, 0:8:step].view(nl.bfloat16)  # bad


@pair("view.partition_dim", good=(0, 2, 1), bad=(1, 0, 2))
def partition_dim(dims):
    nl.zeros((128, 2, 4), nl.float32).permute(dims)  # bad


@pair("view.rearrange", good=("p", ("a", "b")), bad=("p", ("a", "c")))
def rearrange(pattern):
    tile = nl.zeros((128, 8), nl.float32)
    tile.rearrange(("p", ("a", "b")), pattern, {"a": 2})  # bad


@pair("float8.range", good=240.0, bad=250.0)
def float8(value):
    tile = nl.full((128, 8), value, nl.float32)
    nisa.tensor_copy(sbuf((128, 8), nl.float8_e4m3), tile)  # bad


@pair("memset.dtype", good=2, bad=2.0)
def memset_dtype(value):
    nisa.memset(sbuf((128, 8), nl.int32), value)  # bad


@pair("memset.value", good=255, bad=256)
def memset(value):
    nisa.memset(sbuf((128, 8), nl.uint8), value)  # bad


@pair("kernel.instructions", good=4_999_990, bad=5_000_000)
def instructions(before):
    current("here").issued = before
    nisa.memset(psum((128, 8)), 0.0)  # bad
