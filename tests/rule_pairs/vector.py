"""VectorE and ScalarE."""

from nki_sim import nisa, nl, psum, sbuf

from . import pair

COMMANDS = nisa.reduce_cmd


def ones(*shape, dtype=nl.float32):
    """A tile of ones."""
    return nl.ones(shape, dtype)


@pair("activation.accumulator", good=COMMANDS.reset_reduce, bad=COMMANDS.reduce)
def activation_accumulator(command):
    data, total = ones(128, 8), sbuf((128, 1))
    out = sbuf((128, 8))
    reduction = {"reduce_op": nl.add, "reduce_res": total, "reduce_cmd": command}
    nisa.activation(out, nl.exp, data, **reduction)  # bad


@pair("activation.bias", good=nl.float32, bad=nl.tfloat32)
def activation_bias(dtype):
    nisa.activation(sbuf((128, 8)), nl.exp, ones(128, 8), bias=ones(128, 1, dtype=dtype))  # bad


@pair("activation.scale", good=nl.float32, bad=nl.bfloat16)
def activation_scale(dtype):
    nisa.activation(sbuf((128, 8)), nl.exp, ones(128, 8), scale=ones(128, 1, dtype=dtype))  # bad


@pair("activation.range", good=1.0, bad=-1.0)
def activation_range(value):
    nisa.activation(sbuf((128, 8)), nl.log, nl.full((128, 8), value, nl.float32))  # bad


@pair("activation.reduce", good=nl.add, bad=nl.maximum)
def activation_reduce(op):
    nisa.activation_reduce(sbuf((128, 8)), nl.exp, ones(128, 8), op, sbuf((128, 1)))  # bad


@pair("activate2.steps", good=nl.add, bad=nl.multiply, generation="gen4")
def activate2(op):
    nisa.activate2(sbuf((128, 8)), nl.exp, ones(128, 8), 1.0, 1.0, nl.multiply, op)  # bad


@pair("instruction.generation", good=0, bad=0, generation="gen2", good_generation="gen3")
def generation(_):
    low, high = nl.zeros((128, 1), nl.float32), nl.full((128, 1), 4.0, nl.float32)
    out, total, data = sbuf((128, 8)), sbuf((128, 1)), ones(128, 8)
    nisa.range_select(out, data, nl.less, nl.less, low, high, reduce_res=total)  # bad


@pair("range_select.bounds", good=0, bad=2**24)
def range_select(start):
    low, high = nl.zeros((128, 1), nl.float32), nl.full((128, 1), 4.0, nl.float32)
    out, data = sbuf((128, 8)), ones(128, 8)
    nisa.range_select(out, data, nl.less, nl.less, low, high, range_start=start)  # bad


@pair("operand.op", good=nl.exp, bad=nl.add)
def op(function):
    nisa.activation(sbuf((128, 8)), function, ones(128, 8))  # bad


@pair("operand.op_generation", good=nl.maximum, bad=nl.abs_max)
def op_generation(function):
    nisa.tensor_tensor(sbuf((128, 8)), ones(128, 8), ones(128, 8), function)  # bad


@pair("operand.divide", good=nl.multiply, bad=nl.divide)
def divide(function):
    nisa.tensor_tensor(sbuf((128, 8)), ones(128, 8), ones(128, 8), function)  # bad


@pair("operand.unary", good=None, bad=1.0)
def unary(operand):
    nisa.tensor_scalar(sbuf((128, 8)), ones(128, 8), nl.rsqrt, operand)  # bad


@pair("operand.per_partition", good=nl.float32, bad=nl.bfloat16)
def per_partition(dtype):
    operand = ones(128, 1, dtype=dtype)
    nisa.tensor_scalar(sbuf((128, 8)), ones(128, 8), nl.multiply, operand)  # bad


@pair("tensor_scalar.operands", good=nl.add, bad=None)
def tensor_scalar(op1):
    out, data = sbuf((128, 8)), ones(128, 8)
    nisa.tensor_scalar(out, data, nl.multiply, 2.0, op1=op1, operand1=1.0)  # bad


@pair("tensor_scalar.op", good=0, bad=0, good_generation="gen4")
def tensor_scalar_op(_):
    nisa.tensor_scalar(sbuf((128, 8)), ones(128, 8), nl.square, None)  # bad


@pair("tensor_scalar.scalar_engine", good=nl.multiply, bad=nl.subtract)
def tensor_scalar_engine(op0):
    out, data = sbuf((128, 8)), ones(128, 8)
    nisa.tensor_scalar(out, data, op0, 2.0, engine=nisa.engine.scalar)  # bad


@pair("tensor_scalar_reduce.operators", good=False, bad=True)
def tensor_scalar_reduce(reverse):
    out, total, data = sbuf((128, 8)), sbuf((128, 1)), ones(128, 8)
    nisa.tensor_scalar_reduce(out, data, nl.add, 1.0, nl.add, total, reverse0=reverse)  # bad


@pair("tensor_scalar_cumulative.operands", good=nl.add, bad=nl.logical_and)
def cumulative(op1):
    nisa.tensor_scalar_cumulative(sbuf((128, 8)), ones(128, 8), nl.multiply, op1, 1.0)  # bad


@pair("tensor_reduce.axis", good=1, bad=0)
def tensor_reduce(axis):
    nisa.tensor_reduce(sbuf((128, 1)), nl.add, ones(128, 8), axis)  # bad


@pair("vector.bitvec", good=nl.uint8, bad=nl.float32)
def bitvec(dtype):
    data = ones(128, 8, dtype=dtype)
    nisa.tensor_tensor(sbuf((128, 8), dtype), data, data, nl.bitwise_and)  # bad


@pair("vector.bitvec_width", good=nl.int32, bad=nl.uint8)
def bitvec_width(dtype):
    one, two = ones(128, 8, dtype=nl.uint32), ones(128, 8, dtype=dtype)
    nisa.tensor_tensor(sbuf((128, 8), nl.uint32), one, two, nl.bitwise_and)  # bad


@pair("vector.engine", good=nisa.engine.scalar, bad=nisa.engine.tensor)
def engine(unit):
    nisa.tensor_copy(sbuf((128, 8)), ones(128, 8), engine=unit)  # bad


@pair("vector_reduce.command", good=nl.add, bad=nl.logical_and)
def reduce_command(reduce_op):
    out, total = sbuf((128, 8)), sbuf((128, 1))
    nisa.tensor_scalar_reduce(out, ones(128, 8), nl.add, 1.0, reduce_op, total)  # bad


@pair("vector_reduce.result", good=1, bad=2)
def reduce_result(columns):
    out, total = sbuf((128, 8)), sbuf((128, columns))
    nisa.tensor_scalar_reduce(out, ones(128, 8), nl.add, 1.0, nl.add, total)  # bad


@pair("vector_reduce.accumulator", good=COMMANDS.reset_reduce, bad=COMMANDS.reduce)
def reduce_accumulator(command):
    out, total, data = sbuf((128, 8)), sbuf((128, 1)), ones(128, 8)
    nisa.tensor_scalar_reduce(out, data, nl.add, 1.0, nl.add, total, reduce_cmd=command)  # bad


@pair("bn_stats.shape", good=512, bad=513)
def bn_stats(columns):
    nisa.bn_stats(sbuf((128, 6)), ones(128, columns))  # bad


@pair("scan.operands", good=nl.sbuf, bad=nl.psum)
def scan(region):
    one, two = psum((128, 8)), nl.ndarray((128, 8), nl.float32, region)
    nisa.memset(one, 1.0)
    nisa.memset(two, 1.0)
    nisa.tensor_tensor_scan(sbuf((128, 8)), one, two, 0.0, nl.multiply, nl.add)  # bad


@pair("search.shape", good=8, bad=7)
def search(columns):
    nisa.max8(sbuf((128, 8)), ones(128, columns))  # bad


@pair("select.predicate", good=nl.uint8, bad=nl.float32)
def predicate(dtype):
    nisa.tensor_copy_predicated(ones(128, 8), ones(128, 8), ones(128, 8, dtype=dtype))  # bad


@pair("select.dtype", good=nl.float32, bad=nl.bfloat16)
def select_dtype(dtype):
    mask = ones(128, 8, dtype=nl.uint8)
    nisa.tensor_copy_predicated(ones(128, 8), ones(128, 8, dtype=dtype), mask)  # bad


@pair("exponential.dtype", good=nl.int32, bad=nl.uint32, generation="gen4")
def exponential(dtype):
    nisa.exponential(sbuf((128, 8), dtype), ones(128, 8))  # bad


@pair("dropout.operands", good=nl.float32, bad=nl.bfloat16)
def dropout(dtype):
    nisa.dropout(sbuf((128, 8), dtype), ones(128, 8), 0.5)  # bad


@pair("rng.operands", good=nl.uint32, bad=nl.float32)
def rng(dtype):
    nisa.rng(sbuf((128, 8), dtype))  # bad


@pair("random.state", good=1, bad=2)
def seed(count):
    nisa.set_rng_seed(nl.zeros((1, count), nl.uint32))  # bad


@pair("rand2.dtype", good=nl.float8_e5m2, bad=nl.float8_e4m3fn, generation="gen4")
def rand2_dtype(dtype):
    nisa.rand2(sbuf((128, 8), dtype), 0.0, 1.0)  # bad


@pair("rand2.range", good=1.0, bad=0.0, generation="gen4")
def rand2(most):
    nisa.rand2(sbuf((128, 8)), 0.0, most)  # bad


@pair("nc_stream_shuffle.operands", good=31, bad=32)
def shuffle(lane):
    mask = (lane,) * 32
    nisa.nc_stream_shuffle(sbuf((32, 8)), ones(32, 8), mask)  # bad


@pair("nc_stream_shuffle.partition_start", good=32, bad=0)
def shuffle_start(first):
    data, out = ones(128, 8), sbuf((128, 8))
    rows = 32 if first else 64
    nisa.nc_stream_shuffle(out[32:64], data[first : first + rows], (0,) * 32)  # bad


@pair("nc_stream_shuffle.uninitialised", good=8, bad=7)
def shuffled_padding(columns):
    tile = sbuf((32, 8))
    nisa.memset(tile[:, 0:columns], 1.0)
    nisa.nc_stream_shuffle(sbuf((32, 8)), tile, (0,) * 32)  # bad
