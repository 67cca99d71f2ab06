"""Every rule has a good and a bad kernel, and the bad one's message shows the user's line."""

import warnings

import pytest
from nki_sim import nisa, nl, psum
from rule_pairs import PAIRS, Pair, alone, load_pairs

from nxd_cp.simulators.nki_api import RULES, NkiValidationError, SimParams, parameters
from nxd_cp.simulators.nki_api.surface import nki_modules

nki_modules()  # registers every rule
load_pairs()
STRICT = SimParams(strict=True)
IMPATIENT = SimParams(strict=True, stall_seconds=0.3)


def check_pair(case):
    """The good call breaks nothing; the bad one breaks the rule, at the line that says so."""
    params = IMPATIENT if case.rule == "kernel.endless" else STRICT
    with parameters(params), warnings.catch_warnings():
        warnings.simplefilter("error")
        case.launch(case.kernel, case.good, case.good_generation)
        with pytest.raises(NkiValidationError) as caught:
            case.launch(case.kernel, case.bad, case.generation)
    text = str(caught.value)
    assert f"rule {case.rule} ({RULES[case.rule].tier}; " in text, text
    last = text.splitlines()[-1]
    assert last.startswith("  at "), text
    assert "# bad" in last, text
    assert "/rule_pairs/" in last or __file__ in last, text


def test_every_rule_has_a_pair_and_every_pair_a_rule():
    assert sorted(set(RULES) - set(PAIRS)) == []
    assert sorted(set(PAIRS) - set(RULES)) == []


@pytest.mark.parametrize("rule", sorted(PAIRS))
def test_the_good_kernel_passes_and_the_bad_one_shows_its_line(rule):
    check_pair(PAIRS[rule])


@pytest.mark.parametrize("rule", sorted(set(PAIRS) - {"kernel.endless", "kernel.instructions"}))
def test_a_broken_rule_of_the_inferred_tier_warns_and_of_the_documented_tier_raises(rule):
    case = PAIRS[rule]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            case.launch(case.kernel, case.bad, case.generation)
        except NkiValidationError as error:
            text = str(error)
        else:
            text = ""
    warned = any(f"rule {rule} (inferred; " in str(w.message) for w in seen)
    if RULES[rule].tier == "documented":
        assert f"rule {rule} (documented; " in text
    else:
        assert warned or f"rule {rule} (inferred; " in text


def _matmul(columns):
    nisa.nc_matmul(
        psum((64, 256)),
        nl.ones((128, 64), nl.float32),
        nl.ones((128, columns), nl.float32),
    )


def _marked(columns):
    stationary, moving = nl.ones((128, 64), nl.float32), nl.ones((128, columns), nl.float32)
    nisa.nc_matmul(psum((64, 256)), stationary, moving)  # bad


def _case(rule, kernel, good, bad):
    return Pair(rule, kernel, good, bad, "gen3", "gen3", alone)


def test_pairs_that_prove_nothing_are_caught():
    check_pair(_case("nc_matmul.shape", _marked, 256, 128))
    with pytest.raises(NkiValidationError, match=r"nc_matmul\.shape"):
        check_pair(_case("nc_matmul.shape", _marked, 128, 256))  # the good one is bad
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_pair(_case("nc_matmul.shape", _marked, 256, 256))  # the bad one is good
    with pytest.raises(AssertionError):
        check_pair(_case("nc_matmul.shape", _matmul, 256, 128))  # another line
    with pytest.raises(AssertionError):
        check_pair(_case("nc_matmul.memory", _marked, 256, 128))  # another rule
