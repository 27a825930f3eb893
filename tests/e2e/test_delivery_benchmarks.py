"""The benchmarks of delivery do what they say, at their smallest."""

import re

import pytest

from tests.benchmarks import busy, large
from tests.benchmarks.busy import Totals


def test_a_file_is_split_worked_at_and_every_row_is_there(capsys):
    assert large.main(["--lines", "5000", "--work-seconds", "1", "--server", "moto"]) == 0
    printed = capsys.readouterr().out
    assert "every row once, in order" in printed
    assert re.search(r"splitting into 5 ", printed)


def test_a_worker_s_engine_is_watched_while_it_takes_small_jobs(base, capsys):
    assert busy.main(["--model", str(base), "--seconds", "2", "--warm", "1"]) == 0
    (share,) = re.findall(r"engine busy +([\d.]+) of", capsys.readouterr().out)
    assert 0 < float(share) <= 1.05


def test_the_share_is_of_the_time_between_two_looks():
    before = Totals(10.0, 100, 400.0, 5.0, {"forward": 3.0, "sample": 1.0})
    after = Totals(20.0, 200, 2000.0, 15.0, {"forward": 11.0, "sample": 2.5})
    lines = busy.report(before, after, 4).splitlines()
    assert lines[0] == "engine busy   0.950 of 10.0 s"
    assert lines[1] == "steps         100, each 16.00 rows, 100.0 ms on average"
    assert lines[2] == "jobs          1.00 a second, 4.0 rows a second"
    assert [line.split() for line in lines[3:]] == [["forward", "0.800"], ["sample", "0.150"]]


@pytest.mark.parametrize("of", [busy, large])
def test_arguments_that_make_no_sense_end_with_2(of, capsys):
    with pytest.raises(SystemExit) as raised:
        of.main(["--rows" if of is busy else "--lines", "0"])
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err
