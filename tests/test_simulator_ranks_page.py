"""docs/simulator_ranks.md: every block runs, and the race that it shows is reported."""

from snippets import ROOT, run_python

PAGE = ROOT / "docs" / "simulator_ranks.md"


def test_the_blocks_run_and_print_what_the_page_says(capsys):
    run_python(PAGE)
    printed = capsys.readouterr().out
    assert "rule race.shared_hbm " in printed
    assert printed.count("simulator_ranks.md:") == 2  # both lines
    assert printed.count("collective_permute_implicit ((2, 0),) 2048") == 3
