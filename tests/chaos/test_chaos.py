"""A small run of the whole; `python -m tests.chaos` is the large one."""

from collections import Counter

from tests.chaos.fleet import Blow
from tests.chaos.run import Options, run

OPTIONS = Options(
    jobs=40,
    workers=2,
    kills=4,
    faults=0.05,
    seed=5,
    max_rows=30,
    large=1,
    large_rows=80,
    rows_per_part=20,
    deadline_seconds=300,
)


def test_every_row_is_committed_once_whatever_happens_to_workers_and_calls(tmp_path):
    tally = run(OPTIONS, tmp_path)
    print(tally.text())
    assert tally.is_good, tally.text()
    assert Counter(tally.kills) == Counter(Blow)
    assert tally.faults
