"""Nonsense for any argument of any instruction gives one clear exception at the user's line."""

import inspect
import warnings

import numpy as np
import pytest
from nki_sim import nisa, nl, rejects, run, sbuf
from rule_pairs import PAIRS, Pair, alone, load_pairs, on_ranks
from rule_pairs.memory import hbm
from rule_pairs.ranks import ALL, filled, shared

from nxd_cp.simulators.nki_api import (
    NkiDeadlockError,
    NkiSimulatorWarning,
    NkiValidationError,
    SimParams,
    parameters,
)
from nxd_cp.simulators.nki_api import collectives as ncc

load_pairs()
JUNK = (None, -3, 1.5, "text", (), np.ones((2, 2), np.float32), object())
CLEAR = (NkiValidationError, NkiDeadlockError)
PARAMS = SimParams(stall_seconds=5.0)
FUNCTIONS = [
    (module, name)
    for module in (nisa, ncc)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name)) and not name.startswith("get_nc")
]


def vector(_):
    """Instructions that no pair calls."""
    ones, out = nl.ones((128, 8), nl.float32), sbuf((128, 8))
    nisa.reciprocal(out, ones)
    nisa.scalar_tensor_tensor(out, ones, nl.add, 1.0, nl.add, ones)
    nisa.select_reduce(out, nl.ones((128, 8), nl.uint8), ones, 0.0)
    nisa.nc_find_index8(sbuf((128, 8), nl.uint32), ones, ones)
    nisa.nc_match_replace8(out, ones, ones, 0.0)
    nisa.bn_aggr(sbuf((128, 2)), nl.ones((128, 6), nl.float32))


def gpsimd(_):
    """The same of other engines."""
    index = nl.zeros((16, 1), nl.uint16)
    nisa.local_gather(sbuf((16, 16)), nl.ones((16, 8), nl.float32), index)
    state = nl.zeros((128, 6), nl.uint32)
    nisa.rand_set_state(state)
    nisa.rand_get_state(state)
    nisa.register_load(nisa.register_alloc(0), hbm((1, 1), nl.int32))


def collectives(_):
    """The same of collectives, on two ranks."""
    src, dst, half = filled("src"), shared("dst"), shared("half", (64, 8))
    ncc.all_to_all([src], [dst], ALL, 0)
    ncc.reduce_scatter([src], [half], ALL, 0, nl.add)
    ncc.collective_permute_implicit_reduce([[src]], [[src]], [[dst]], ALL, nl.add)


MORE = [
    Pair("", kernel, None, None, "gen3", "gen3", launch)
    for kernel, launch in ((vector, alone), (gpsimd, alone), (collectives, on_ranks(2)))
]
NOT_CALLED = {"all_gather_v", "rank_id"}  # four ranks of two cores; no argument but a name


class Swap:
    """Counts the calls of a function and gives one of them another argument."""

    def __init__(self, function, turn=None, which=None, junk=None):
        self.function, self.turn, self.which, self.junk = function, turn, which, junk
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((len(args), tuple(kwargs)))
        if len(self.calls) - 1 == self.turn:
            args, kwargs = list(args), dict(kwargs)
            (args if isinstance(self.which, int) else kwargs)[self.which] = self.junk
        return self.function(*args, **kwargs)


def _pairs_that_call(name):
    """The first pair whose kernel names the function, if any."""
    found = [p for p in (*PAIRS.values(), *MORE) if f".{name}(" in inspect.getsource(p.kernel)]
    return [p for p in found if p.rule not in ("kernel.endless", "pair.alone")][:1]


def _call(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NkiSimulatorWarning)
        with parameters(PARAMS):
            case.launch(case.kernel, case.good, case.good_generation)


def _outcome(case):
    """The message of the one exception that may come; empty for junk that is legal or unused."""
    try:
        _call(case)
    except CLEAR as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=[name for _, name in FUNCTIONS])
def test_no_argument_confuses_an_instruction(monkeypatch, module, name):
    real = getattr(module, name)
    tried = 0
    for case in _pairs_that_call(name):
        seen = Swap(real)
        monkeypatch.setattr(module, name, seen)
        _call(case)
        if not seen.calls:
            continue
        positions, keywords = seen.calls[-1]
        for which in (*range(positions), *keywords):
            for junk in JUNK:
                swap = Swap(real, len(seen.calls) - 1, which, junk)
                monkeypatch.setattr(module, name, swap)
                tried += 1
                text = _outcome(case)
                assert not text or "\n  at " in text or "deadlock: " in text, text
        monkeypatch.setattr(module, name, real)
    assert tried or name in NOT_CALLED


def test_the_message_names_instruction_argument_and_line():
    def nothing():
        nisa.nc_transpose(None, nl.ones((128, 8), nl.float32))  # bad

    with pytest.raises(NkiValidationError, match=r"rule ") as caught:
        run(nothing)
    text = str(caught.value)
    assert text.startswith("nki.isa.nc_transpose: ")
    assert "None" in text
    assert "# bad" in text.splitlines()[-1]
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_call_that_does_not_fit_the_signature_keeps_its_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        run(lambda: nisa.memset(sbuf((128, 8)), 0.0, wrong=1))


@pytest.mark.parametrize("value", [None, "2", (), float("nan"), float("inf"), 2.5, -1, 256])
def test_memset_takes_numbers_that_dst_can_hold(value):
    def kernel(dtype):
        nisa.memset(sbuf((4, 4), dtype), value)  # bad

    number = isinstance(value, (int, float))
    for dtype in (nl.uint8, nl.float32):
        if number and dtype == nl.float32:
            run(kernel, dtype)
        else:
            rejects("memset.value" if number else "instruction.arguments", kernel, dtype)


def test_numbers_that_are_none_are_not_nan():
    def select():
        nisa.affine_select(sbuf((4, 8)), [[1, 8]], 0, nl.ones((4, 8), nl.float32), None)  # bad

    def replace():
        ones = nl.ones((4, 8), nl.float32)
        nisa.nc_match_replace8(sbuf((4, 8)), ones, ones, None)  # bad

    rejects("instruction.arguments", select)
    rejects("instruction.arguments", replace)


def test_a_step_that_is_no_operator_is_no_bypass():
    def kernel(op1):
        ones = nl.ones((4, 8), nl.float32)
        nisa.activate2(sbuf((4, 8)), nl.copy, ones, 1.0, 1.0, nl.multiply, op1)  # bad

    run(kernel, None, generation="gen4")
    for junk in ("text", 1.5, ()):
        rejects("activate2.steps", kernel, junk, generation="gen4")


def test_an_activation_that_reduces_has_a_place_for_the_sum():
    def kernel():
        ones = nl.ones((4, 8), nl.float32)
        nisa.activation_reduce(sbuf((4, 8)), nl.copy, ones, nl.add, None)  # bad

    rejects("activation.reduce", kernel)


@pytest.mark.parametrize("prob", [-0.1, 1.1, float("nan")])
def test_a_probability_is_between_0_and_1(prob):
    def kernel(in_tile):
        given = nl.full((4, 1), prob, nl.float32) if in_tile else prob
        nisa.dropout(sbuf((4, 8)), nl.ones((4, 8), nl.float32), given)  # bad

    rejects("dropout.operands", kernel, False)
    rejects("dropout.operands", kernel, True)


def test_an_error_of_a_kernels_own_callback_comes_through():
    def body(i):
        raise AttributeError("mine")

    with pytest.raises(AttributeError, match="mine"):
        run(lambda: nl.fori_loop(0, 2, body))


@pytest.fixture(autouse=True)
def _short_kernels(monkeypatch):
    monkeypatch.setattr("nxd_cp.simulators.nki_api.jit.check_kernel", lambda *_: None)


VIEWS = {
    "permute": ((0, 2, 1),),
    "broadcast": (1, 4),
    "expand_dim": (1,),
    "squeeze_dim": (1,),
    "reshape_dim": (2, (2, 4)),
    "flatten_dims": (1, 2),
    "reshape": ((128, 8),),
    "view": (nl.uint16,),
    "ap": ([[8, 128], [1, 8]], 0),
    "rearrange": (("p", "a", "b"), ("p", "b", "a"), {"a": 1}),
    "slice": (2, 0, 4, 1),
    "select": (2, 3),
}


def _clear_or_legal(call, arguments):
    """`call` takes these arguments, and refuses junk for any of them with the user's line."""

    def kernel(given):
        call(given)

    run(lambda: kernel(arguments))
    for at in range(len(arguments)):
        for junk in JUNK:
            given = [*arguments[:at], junk, *arguments[at + 1 :]]
            text = ""
            try:
                run(lambda given=given: kernel(given))
            except NkiValidationError as error:
                text = str(error)
            assert not text or "\n  at " in text, text


@pytest.mark.parametrize("method", VIEWS)
def test_no_argument_confuses_a_view(method):
    _clear_or_legal(
        lambda given: getattr(nl.ones((128, 1, 8), nl.float32), method)(*given), VIEWS[method]
    )


TILE = object()  # stands for a tile
LANGUAGE = {
    "add": (TILE, 1.0),
    "exp": (TILE,),
    "sum": (TILE, 1),
    "max": (TILE, 1),
    "mean": (TILE, 1),
    "softmax": (TILE, 1),
    "transpose": (TILE,),
    "matmul": (TILE, TILE, True),
    "where": (TILE, TILE, 0.0),
    "broadcast_to": (TILE, (128, 8)),
    "expand_dims": (TILE, 1),
    "copy": (TILE, nl.float32),
    "zeros": ((128, 8), nl.float32, nl.sbuf, ""),
    "full": ((128, 8), 1.0, nl.float32),
    "ndarray": ((128, 8), nl.float32, nl.sbuf, "", (0, 0)),
    "empty_like": (TILE, nl.float32),
    "shared_identity_matrix": (8, nl.float32),
    "fori_loop": (0, 1, lambda i: None, 1),
    "program_id": (0,),
    "num_programs": (0,),
    "dropout": (TILE, 0.5),
    "device_print": ("p", TILE),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_no_argument_confuses_a_function_of_the_language(name):
    def call(given):
        tiles = [nl.ones((128, 8), nl.float32) if value is TILE else value for value in given]
        getattr(nl, name)(*tiles)

    _clear_or_legal(call, LANGUAGE[name])
