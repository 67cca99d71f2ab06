"""TensorE: nc_matmul and nc_transpose."""

from nki_sim import nisa, nl, psum, sbuf

from . import pair


def operands(k=128, m=64, n=256, dtype=nl.float32):
    """A stationary and a moving tile of ones."""
    return nl.ones((k, m), dtype), nl.ones((k, n), dtype)


@pair("nc_matmul.memory", good=nl.psum, bad=nl.sbuf)
def memory(region):
    a, b = operands()
    nisa.nc_matmul(nl.ndarray((64, 256), nl.float32, region), a, b)  # bad


@pair("nc_matmul.shape", good=64, bad=32)
def shape(rows):
    a, b = operands()
    nisa.nc_matmul(psum((rows, 256)), a, b)  # bad


@pair("nc_matmul.moving_free", good=512, bad=513)
def moving_free(columns):
    a, b = operands(n=columns)
    nisa.nc_matmul(psum((64, columns)), a, b)  # bad


@pair("nc_matmul.bank", good=0, bad=256)
def bank(first):
    a, b = operands(n=512)
    dst = psum((64, 1024))
    nisa.nc_matmul(dst[:, first : first + 512], a, b)  # bad


@pair("nc_matmul.input_dtype", good=nl.float32, bad=nl.bfloat16)
def input_dtype(dtype):
    a, b = nl.ones((128, 64), dtype), nl.ones((128, 256), nl.float32)
    nisa.nc_matmul(psum((64, 256)), a, b)  # bad


@pair("nc_matmul.dst_dtype", good=0, bad=0, generation="gen3", good_generation="gen4")
def dst_dtype(_):
    a, b = operands(dtype=nl.bfloat16)
    nisa.nc_matmul(psum((64, 256), nl.bfloat16), a, b)  # bad


@pair("nc_matmul.double_row", good=nl.float8_e5m2, bad=nl.bfloat16)
def double_row(dtype):
    a, b = nl.ones((128, 2, 64), dtype), nl.ones((128, 2, 256), dtype)
    mode = nisa.matmul_perf_mode.double_row
    nisa.nc_matmul(psum((64, 256)), a, b, perf_mode=mode)  # bad


@pair("nc_matmul.tile", good=(64, 0), bad=(32, 0))
def tile(position):
    a, b = operands(k=64)
    nisa.nc_matmul(psum((64, 256)), a, b, tile_position=position, tile_size=(64, 128))  # bad


@pair("nc_matmul.tile_partitions", good=64, bad=0)
def tile_partitions(first):
    a, b = nl.ones((128, 64), nl.float32), nl.ones((128, 256), nl.float32)
    rows, place = slice(first, first + 64), {"tile_position": (64, 0), "tile_size": (64, 128)}
    nisa.nc_matmul(psum((64, 256)), a[rows], b[rows], **place)  # bad


@pair("nc_matmul.accumulate_first", good=False, bad=True)
def accumulate_first(flag):
    a, b = operands()
    nisa.nc_matmul(psum((64, 256)), a, b, accumulate=flag)  # bad


@pair("nc_matmul.accumulate_foreign", good=0, bad=0, good_generation="gen4")
def accumulate_foreign(_):
    a, b = operands()
    dst = psum((64, 256))
    nisa.memset(dst, 1.0)
    nisa.nc_matmul(dst, a, b, accumulate=True)  # bad


@pair("nc_matmul.accumulate_zeroed", good=False, bad=None)
def accumulate_zeroed(flag):
    a, b = operands()
    dst = psum((64, 256))
    nisa.memset(dst, 0.0)
    nisa.nc_matmul(dst, a, b, accumulate=flag)  # bad


@pair("nc_matmul.accumulate_mixed", good=256, bad=128)
def accumulate_mixed(columns):
    a, b = operands()
    dst = psum((64, 256))
    nisa.nc_matmul(dst[:, 0:columns], a, b[:, 0:columns])
    nisa.nc_matmul(dst, a, b)  # bad


@pair("nc_transpose.operands", good=nl.bfloat16, bad=nl.float32)
def transpose(dtype):
    nisa.nc_transpose(psum((64, 128), dtype), nl.ones((128, 64), nl.bfloat16))  # bad


@pair("nc_transpose.product", good=nl.bfloat16, bad=nl.float32, generation="gen2")
def transpose_by_a_product(dtype):
    nisa.nc_transpose(psum((64, 128), dtype), nl.ones((128, 64), nl.bfloat16))  # bad


@pair("vector.inputs_in_psum", good=nl.sbuf, bad=nl.psum)
def both_in_psum(region):
    one, two = psum((128, 8)), nl.ndarray((128, 8), nl.float32, region)
    nisa.memset(one, 1.0)
    nisa.memset(two, 1.0)
    nisa.tensor_tensor(sbuf((128, 8)), one, two, nl.add)  # bad


@pair("transpose.uninitialised", good=64, bad=63)
def transposed_padding(columns):
    tile = sbuf((128, 64))
    nisa.memset(tile[:, 0:columns], 1.0)
    nisa.nc_transpose(psum((64, 128)), tile)  # bad
