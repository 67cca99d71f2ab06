"""Random numbers, activate2 and sequence_bounds."""

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, rejects, run, sbuf, store

X = normal(128, 64)
SEED = np.array([[7]], np.int32)


def _bits(dtype=nl.uint32, engine=nisa.engine.vector, shape=(128, 64)):
    tile = sbuf(shape, dtype)
    nisa.rng(tile, engine=engine)
    return tile


def test_equal_seeds_give_equal_bits_and_another_seed_others():
    def kernel(seed):
        found = []
        for value in (seed, seed, None):
            if value is not None:
                nisa.set_rng_seed(load(value))
            found.append(store(_bits()))
        return tuple(found)

    first, again, later = run(kernel, SEED)
    np.testing.assert_array_equal(first, again)
    other = run(kernel, SEED + 1)[0]
    for different in (later, other):
        assert (first == different).mean() < 0.001
    assert len(np.unique(first)) > 0.999 * first.size
    assert abs(np.unpackbits(first.view(np.uint8)).mean() - 0.5) < 4 * 0.5 / np.sqrt(
        8 * first.nbytes
    )


def test_a_state_that_was_read_out_continues_where_it_was():
    def kernel():
        state = sbuf((128, 6), nl.uint32)
        nisa.rand_get_state(state)
        first = store(_bits(engine=nisa.engine.gpsimd))
        nisa.rand_set_state(state)
        return first, store(_bits(engine=nisa.engine.gpsimd)), store(state)

    first, again, state = run(kernel)
    np.testing.assert_array_equal(first, again)
    x, v, d = (int(state[5, i]) for i in (0, 4, 5))  # one step of XORWOW by hand
    t = x ^ (x >> 2)
    v = (v ^ (v << 4) ^ t ^ (t << 1)) % 2**32
    assert first[5, 0] == (v + d + 362437) % 2**32


def test_narrow_types_take_the_low_bits():
    def kernel(seed):
        nisa.set_rng_seed(load(seed))
        wide = store(_bits())
        nisa.set_rng_seed(load(seed))
        return wide, store(_bits(nl.int8))

    wide, narrow = run(kernel, SEED)
    np.testing.assert_array_equal(narrow, wide.astype(np.uint8).view(np.int8))


def test_rand2_and_rand_are_uniform():
    def kernel(low):
        tile = sbuf((128, 512))
        nisa.rand2(tile, load(low), 5.0)
        return store(tile), store(nl.rand((128, 512), nl.float32))

    low = np.linspace(-3, 3, 128, dtype=np.float32)[:, None]
    found, unit = run(kernel, low, generation="gen4")
    assert ((low <= found) & (found <= 5)).all()
    assert ((unit >= 0) & (unit < 1)).all()
    scaled = (found - low) / (5 - low)
    for values in (scaled, unit):
        deviation = np.sqrt(1 / 12 / values.size)
        assert abs(values.mean() - 0.5) < 5 * deviation

    def swapped():
        nisa.rand2(sbuf((4, 4)), 1.0, 0.0)  # bad

    rejects("rand2.range", swapped, generation="gen4")


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_dropout_drops_at_the_given_rate(rate):
    def kernel(x):
        tile = load(x)
        nisa.dropout(tile, tile, rate)
        return store(tile), store(nl.dropout(load(x), rate))

    for found in run(kernel, X):
        kept = found != 0
        np.testing.assert_array_equal(found[kept], X[kept])
        assert abs((1 - kept.mean()) - rate) <= 5 * np.sqrt(rate * (1 - rate) / X.size)


def test_rules_of_random_numbers():
    def gpsimd(x):
        _bits(engine=nisa.engine.gpsimd)  # bad

    def floats(x):
        _bits(nl.float32)  # bad

    def seed(x):
        nisa.set_rng_seed(load(x))  # bad

    def state(x):
        nisa.rand_get_state(sbuf((128, 6)))  # bad

    def vector_state(x):
        nisa.rand_get_state(sbuf((128, 24), nl.uint32), engine=nisa.engine.vector)  # bad

    def types(x):
        nisa.dropout(sbuf((128, 64), nl.bfloat16), load(x), 0.5)  # bad

    def too_old(x):
        nisa.rand2(sbuf((4, 4)), 0.0, 1.0)  # bad

    with pytest.raises(ValueError, match=r"rule rng\.operands"):
        run(gpsimd, X, generation="gen2")
    with pytest.raises(ValueError, match=r"rule rng\.operands"):
        run(floats, X)
    rejects("random.state", seed, X)
    rejects("random.state", state, X)
    rejects("random.state", vector_state, X)
    rejects("dropout.operands", types, X)
    rejects("instruction.generation", too_old, X)


def _activate2(*args, op=nl.exp, **kwargs):
    def kernel(x):
        out, total = sbuf(x.shape), sbuf((x.shape[0], 1))
        if "reduce_op" in kwargs:
            kwargs["reduce_res"] = total
        nisa.activate2(out, op, load(x), *args, **kwargs)  # bad
        return store(out), store(total) if "reduce_op" in kwargs else None

    return lambda x: kernel(x)


def test_activate2_runs_two_steps_a_function_and_a_reduction():
    reset = nisa.reduce_cmd.reset_reduce
    cases = [
        ((2.0, 0.5, nl.multiply, nl.add), {}, np.exp(X * np.float32(2) + np.float32(0.5))),
        ((2.0, 1.0, nl.subtract, nl.bypass), {"reverse0": True}, np.exp(np.float32(2) - X)),
        ((0.0, 0.0, nl.bypass, nl.bypass), {"op": nl.copy}, X),
        (
            (1.0, 0.0, nl.multiply, nl.bypass),
            {"op": nl.prelu, "relu_param": 0.5},
            np.where(X < 0, X * np.float32(0.5), X),
        ),
    ]
    for args, options, expected in cases:
        found, _ = run(_activate2(*args, **options), X, generation="gen4")
        np.testing.assert_array_equal(found, expected)
    for op, reduced in (
        (nl.maximum, X.max(1)),
        (nl.abs_max, abs(X).max(1)),
        (nl.minimum, X.min(1)),
    ):
        options = {"op": nl.copy, "reduce_op": op, "reduce_cmd": reset}
        _, total = run(_activate2(0, 0, nl.bypass, nl.bypass, **options), X, generation="gen4")
        np.testing.assert_array_equal(total[:, 0], reduced)


def test_rules_of_activate2():
    add_add = _activate2(1.0, 1.0, nl.add, nl.add)
    rejects("activate2.steps", add_add, X, generation="gen4")
    rejects("instruction.generation", add_add, X)
    sums = {"reduce_op": nl.multiply, "reduce_cmd": nisa.reduce_cmd.reset_reduce}
    rejects("activation.reduce", _activate2(1, 1, nl.add, nl.bypass, **sums), X, generation="gen4")


def test_sequence_bounds_matches_the_documented_example():
    def kernel(ids):
        tile = load(ids)
        out = sbuf((1, 2, ids.shape[1]), ids.dtype)
        nisa.sequence_bounds(out, tile)  # bad
        return store(out)

    ids = np.array([[0, 1, 1, 2, 2, 2, 0, 3, 3]], np.int32)
    found = run(kernel, ids)
    np.testing.assert_array_equal(found[0, 0], [9, 1, 1, 3, 3, 3, 9, 7, 7])
    np.testing.assert_array_equal(found[0, 1], [-1, 3, 3, 6, 6, 6, -1, 9, 9])
    np.testing.assert_array_equal(run(kernel, ids.astype(np.float32)), found)
    rejects("sequence_bounds.operands", kernel, -ids)
    rejects("sequence_bounds.operands", kernel, ids.astype(np.int16))
