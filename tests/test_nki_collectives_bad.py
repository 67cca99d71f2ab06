"""What nki.collectives does not take: every rule broken once, with the user's line."""

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, sbuf

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, NkiValidationError, simulate_ranks
from nxd_cp.simulators.nki_api import collectives as ncc

# Here both cores of a rank write every byte of the small tensors; test_nki_races.py has the rules.
RACES = "ignore:(?s).*rule race:nxd_cp.simulators.nki_api.NkiSimulatorWarning"
pytestmark = pytest.mark.filterwarnings(RACES)
N = 4
X = normal(8, 4)
ALL = ncc.ReplicaGroup([[0, 1, 2, 3]])
PAIRS = ncc.ReplicaGroup([[0, 1], [2, 3]])


def hbm(shape, name, dtype=nl.float32, first=1):
    """A tensor of ones; the first row may hold another number."""
    tensor = nl.ndarray(shape, dtype=dtype, buffer=nl.shared_hbm, name=name)
    tile = sbuf((1, int(np.prod(shape))), dtype)
    nisa.memset(tile, 1)
    nisa.memset(tile[:, : shape[-1]], first)
    nisa.dma_copy(tensor, tile)
    return tensor


def rejected(rule, call, *, lnc=1, generation="gen3", num_ranks=N):
    """`call(x)` must break `rule`, at a line marked bad."""
    with pytest.raises(NkiValidationError, match=rf"rule {rule} ".replace(".", r"\.")) as caught:
        simulate_ranks(call, [(X,)] * num_ranks, lnc=lnc, generation=generation)
    assert "# bad" in str(caught.value).splitlines()[-1], str(caught.value)


def test_operands():
    def no_list(x):
        ncc.all_reduce(hbm((8, 4), "s"), [hbm((8, 4), "d")], ALL, nl.add)  # bad

    def mixed(x):
        ncc.all_reduce([hbm((8, 4), "s")], [sbuf((8, 4))], ALL, nl.add)  # bad

    def in_psum(x):
        tile = nl.ndarray((8, 4), dtype=nl.float32, buffer=nl.psum)
        ncc.all_reduce([tile], [tile], ALL, nl.add)  # bad

    def two_on_chip(x):
        ncc.all_reduce([load(x)] * 2, [sbuf((8, 4)), sbuf((8, 4))], ALL, nl.add)  # bad

    def deep_on_chip(x):
        tile = sbuf((8, 2, 2))
        ncc.all_reduce([load(x)], [tile], ALL, nl.add)  # bad

    def on_chip_all_to_all(x):
        ncc.all_to_all([load(x)], [sbuf((8, 4))], ALL, 0)  # bad

    def on_chip_permute(x):
        ncc.collective_permute([load(x)], [sbuf((8, 4))], [(0, 1), (1, 0)])  # bad

    def two_permutes(x):
        pair = [hbm((8, 4), "a"), hbm((8, 4), "b")]
        ncc.collective_permute(pair, pair, [(0, 1), (1, 0)])  # bad

    for call in (
        no_list,
        mixed,
        in_psum,
        two_on_chip,
        deep_on_chip,
        on_chip_all_to_all,
        on_chip_permute,
        two_permutes,
    ):
        rejected("collective.operands", call)


def test_inputs_and_outputs_of_the_kernel_take_no_part():
    def from_input(x):
        ncc.all_reduce([x], [hbm((8, 4), "d")], ALL, nl.add)  # bad

    def to_input(x):
        ncc.all_reduce([hbm((8, 4), "s")], [x], ALL, nl.add)  # bad

    rejected("collective.io_tensor", from_input)
    rejected("collective.io_tensor", to_input)

    def returned(x):
        src, dst = hbm((8, 4), "s"), hbm((8, 4), "d")
        ncc.all_reduce([src], [dst], ALL, nl.add)
        return dst

    with pytest.raises(NkiValidationError, match=r"rule kernel\.collective_output "):
        simulate_ranks(returned, [(X,)] * N)


def test_names_and_aliases_are_warned_about():
    def unnamed(x):
        ncc.all_reduce([hbm((8, 4), "")], [hbm((8, 4), "d")], ALL, nl.add)

    def in_place(x):
        src = hbm((8, 4), "s")
        ncc.all_reduce([src], [src], ALL, nl.add)

    def into_one(x):
        dst = hbm((8, 4), "d")
        ncc.all_reduce([hbm((8, 4), "s"), hbm((8, 4), "t")], [dst, dst], ALL, nl.add)

    alias = r"collective\.alias"
    calls = ((r"collective\.name", unnamed), (alias, in_place), (alias, into_one))
    for rule, call in calls:
        with pytest.warns(NkiSimulatorWarning, match=rule):
            simulate_ranks(call, [(X,)] * N)


def test_a_source_that_was_never_written_is_warned_about():
    def kernel(x):
        src = nl.ndarray((8, 4), dtype=nl.float32, buffer=nl.shared_hbm, name="s")
        ncc.all_reduce([src], [hbm((8, 4), "d")], ALL, nl.add)

    with pytest.warns(NkiSimulatorWarning, match=r"dma_copy\.uninitialised"):
        simulate_ranks(kernel, [(X,)] * N)


def test_sizes():
    def reduce_shape(x):
        ncc.all_reduce([hbm((8, 4), "s")], [hbm((4, 8), "d")], ALL, nl.add)  # bad

    def reduce_dtype(x):
        ncc.all_reduce([hbm((8, 4), "s")], [hbm((8, 4), "d", nl.bfloat16)], ALL, nl.add)  # bad

    def reduce_count(x):
        src = hbm((8, 4), "s")
        ncc.all_reduce([src, src], [hbm((8, 4), "d")], ALL, nl.add)  # bad

    def gather(x):
        ncc.all_gather([hbm((8, 4), "s")], [hbm((8, 16), "d")], ALL, 0)  # bad

    def gather_partitions(x):
        src, dst = sbuf((64, 4)), sbuf((128, 4))
        nisa.memset(src, 0)
        ncc.all_gather([src], [dst], ALL, 0)  # bad

    def scatter(x):
        ncc.reduce_scatter([hbm((6, 4), "s")], [hbm((2, 4), "d")], ALL, 0, nl.add)  # bad

    def exchange(x):
        ncc.all_to_all([hbm((6, 4), "s")], [hbm((6, 4), "d")], ALL, 0)  # bad

    for call in (reduce_shape, reduce_dtype, reduce_count, gather, gather_partitions):
        rejected("collective.sizes", call)
    rejected("collective.sizes", scatter)
    rejected("collective.sizes", exchange)


def test_dims_ops_and_priorities():
    def dim(x):
        ncc.all_gather([hbm((8, 4), "s")], [hbm((8, 16), "d")], ALL, 1)  # bad

    def scatter_dim(x):
        ncc.reduce_scatter([load(x)], [sbuf((8, 1))], ALL, 1, nl.add)  # bad

    def op(x):
        ncc.all_reduce([hbm((8, 4), "s")], [hbm((8, 4), "d")], ALL, nl.multiply)  # bad

    def priority(x):
        ncc.all_reduce([hbm((8, 4), "s")], [hbm((8, 4), "d")], ALL, nl.add, priority=1)  # bad

    rejected("collective.dim", dim)
    rejected("collective.dim", scatter_dim)
    rejected("collective.op", op)
    rejected("collective.priority", priority)
    simulate_ranks(priority, [(X,)] * N, generation="gen4")


@pytest.mark.parametrize("pairs", [[(0, 1)], [(0, 1), (2, 1)], [(0, 9), (9, 0)], []])
def test_pairs_of_a_permute_form_rings(pairs):
    def kernel(x):
        src, dst = hbm((8, 4), "s"), hbm((8, 4), "d")
        ncc.collective_permute([src], [dst], pairs)  # bad

    rejected("collective.pairs", kernel)


def test_channels():
    def permute(group, ids, num_tensors=1):
        def kernel(x):
            srcs = [[hbm((8, 4), f"s{c}")] * num_tensors for c in ids]
            dsts = [[hbm((8, 4), f"d{c}")] * num_tensors for c in ids]
            ncc.collective_permute_implicit(srcs, dsts, group, channel_ids=ids)  # bad

        return kernel

    rejected("collective.channels", permute(ALL, [1]))
    rejected("collective.channels", permute(ALL, [0, 2]))
    rejected("collective.channels", permute(ALL, [0, 1, 2, 3, 4]))
    rejected("collective.channels", permute(PAIRS, [0, 1, 2]))
    rejected("collective.channels", permute(ALL, [0], num_tensors=2))
    simulate_ranks(permute(PAIRS, [0, 1]), [(X,)] * N)

    def flat(x):
        ncc.collective_permute_implicit([hbm((8, 4), "s")], [hbm((8, 4), "d")], ALL)  # bad

    def register(x):
        ncc.collective_permute_implicit_current_processing_rank_id(0, ALL, 4)  # bad

    rejected("collective.channels", flat)
    rejected("collective.channels", register)


def test_ring_iterations_are_integers():
    def kernel(x):
        ncc.collective_permute_implicit_current_processing_rank_id(-1, ALL)  # bad

    rejected("collective.iteration", kernel)


def variable(call, rows=3, dtype=nl.uint32, counts=1, **options):
    """A variable collective with every count equal to `counts`."""

    def kernel(x):
        src, dst = hbm((8,), "s"), hbm((8,), "d")
        table = hbm((rows, N), "m", dtype, first=counts)
        call([src], [dst], ALL, table, **options)  # bad

    return kernel


def test_variable_collectives_check_their_metadata():
    both = {"lnc": 2, "generation": "gen4"}
    rejected("collective_v.metadata", variable(ncc.all_to_all_v, rows=4), **both)
    rejected("collective_v.metadata", variable(ncc.all_to_all_v, dtype=nl.int32), **both)
    rejected("collective_v.metadata", variable(ncc.all_to_all_v, counts=9), **both)
    rejected("collective_v.metadata", variable(ncc.all_gather_v, counts=3), **both)
    simulate_ranks(variable(ncc.all_to_all_v), [(X,)] * N, **both)


def test_variable_collectives_have_limits():
    rejected("collective_v.limits", variable(ncc.all_gather_v))
    with_displs = variable(ncc.all_gather_v, rows=4, has_rdispls=True)
    rejected("collective_v.limits", with_displs, lnc=2)
    with_displs = variable(ncc.all_to_all_v, rows=4, has_rdispls=True)
    rejected("collective_v.limits", with_displs, lnc=2)
    rejected("collective_v.limits", variable(ncc.all_to_all_v), generation="gen4")
    simulate_ranks(with_displs, [(X,)] * N, lnc=2, generation="gen4")
