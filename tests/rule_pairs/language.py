"""nki.language functions, loops, what a kernel's Python may say, handles of instructions."""

from nki_sim import nisa, nl, psum, sbuf

from . import chosen, pair
from .memory import hbm


def same(x):
    """What a fori_loop may call."""


def count_down(register):
    """The next condition: 0."""
    nisa.register_move(register, 0)
    return register


@pair("language.axis", good=1, bad=0)
def axis(dim):
    nl.sum(nl.ones((128, 8), nl.float32), dim)  # bad


@pair("language.device_print", good="x", bad=1)
def device_print(prefix):
    nl.device_print(prefix, nl.ones((1, 1), nl.float32))  # bad


@pair("language.known_issue", good=8, bad=1)
def known_issue(columns):
    nl.add(nl.ones((128, 8), nl.float32), nl.ones((128, columns), nl.float32))  # bad


@pair("language.load", good=True, bad=False)
def load(in_hbm):
    nl.load(hbm((128, 8)) if in_hbm else nl.ones((128, 8), nl.float32))  # bad


@pair("language.not_on_device", good=nl.maximum, bad=nl.fmod)
def not_on_device(function):
    function(nl.ones((128, 8), nl.float32), nl.ones((128, 8), nl.float32))  # bad


@pair("language.rsqrt", good=nl.sbuf, bad=nl.psum)
def rsqrt(region):
    tile = nl.ndarray((128, 8), nl.float32, region)
    nisa.memset(tile, 1.0)
    nl.rsqrt(tile)  # bad


@pair("language.tile", good=True, bad=False)
def tile(on_chip):
    nl.exp(nl.ones((128, 8), nl.float32) if on_chip else hbm((128, 8)))  # bad


@pair("program.axis", good=0, bad=1)
def program_axis(axis):
    nl.program_id(axis)  # bad


@pair("loop.bounds", good=1, bad=0)
def loop(step):
    nl.fori_loop(0, 2, same, step=step)  # bad


@pair("loop.nested", good=False, bad=True)
def nested(inside):
    def body(i):
        if inside:
            nl.fori_loop(0, 2, same)  # bad

    nl.fori_loop(0, 2, body)


@pair("loop.endless", good=count_down, bad=same)
def endless_loop(body):
    def unchanged(register):
        return register

    nl.while_loop(nisa.register_alloc(1), body if body == count_down else unchanged)  # bad


@pair("no_reorder.loop", good=False, bad=True)
def no_reorder(inside):
    with nl.no_reorder():
        if inside:
            nl.fori_loop(0, 2, same)  # bad


@pair("instruction.depends_on", good=True, bad=False)
def depends_on(forward):
    first = nisa.memset(sbuf((128, 8)), 0.0)
    second = nisa.memset(psum((128, 8)), 0.0)
    second.depends_on(first if forward else second)  # bad


@pair("kernel.endless", good=False, bad=True)
def endless(run_on):
    going = [run_on]
    for step in going:  # bad
        going.append(step) if step else None  # bad


def plain():
    """Nothing that a compiler refuses."""
    nisa.memset(sbuf((128, 8)), 0.0)


def compares(x=None):
    if x is None:  # bad
        plain()


def keyword_only(*, x=1.0):  # bad
    plain()


def integer_keys():
    names = {1: nl.float32}  # bad
    nisa.memset(sbuf((128, 8), names[1]), 0.0)


def tries():
    try:  # bad
        plain()
    finally:
        pass


def if_register():
    if nisa.register_alloc(1):  # bad
        plain()


def if_number():
    if nl.tile_size.pmax == 128:
        plain()


@pair("front_end.is", good=plain, bad=compares, launch=chosen)
@pair("front_end.signature", good=plain, bad=keyword_only, launch=chosen)
@pair("front_end.dict_keys", good=plain, bad=integer_keys, launch=chosen)
@pair("front_end.python", good=plain, bad=tries, launch=chosen)
@pair("front_end.if_register", good=if_number, bad=if_register, launch=chosen)
def text(_):
    """The good and the bad kernel differ in their text."""


@pair("front_end.list_argument", good=(1, 2), bad=[1, 2])
def list_argument(sizes):  # bad
    plain()
