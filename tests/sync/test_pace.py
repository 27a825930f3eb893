"""When the next pass is due."""

import pytest

from adapters_sync.pace import Pace
from adapters_sync.report import FailureKind, PassReport

HOUR = 3600.0
QUIET = PassReport(ok=True, finished_at=0.0)
FAILED = PassReport(ok=False, finished_at=0.0, error="no", failures={FailureKind.LIST: 1})


def settling(seconds, **changes):
    return PassReport(ok=True, finished_at=0.0, look_again_seconds=seconds, **changes)


def pauses(*reports, interval=HOUR, asked_for=()):
    """The pause after each report; those numbered in `asked_for` are of passes that somebody asked for."""
    pace = Pace(interval, lambda: 0.5)
    return [pace.seconds_after(one, asked_for=at in asked_for) for at, one in enumerate(reports)]


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 27), (0.5, 30), (1.0, 33)])
def test_the_interval_varies_by_a_tenth(chance, seconds):
    assert Pace(30, lambda: chance).seconds_after(QUIET, asked_for=False) == pytest.approx(seconds)


def test_what_time_alone_brings_is_looked_at_when_it_is_due():
    assert pauses(settling(60), QUIET) == [60, HOUR]
    assert pauses(settling(60), interval=30) == [30]


def test_there_is_a_second_between_passes_even_when_something_is_due_before():
    assert pauses(settling(0)) == [1]


def test_what_never_ends_is_looked_at_less_and_less_up_to_the_interval():
    assert pauses(*[settling(0)] * 14, interval=1000) == [2**n for n in range(10)] + [1000] * 4
    assert pauses(*[settling(60)] * 9) == [60] * 6 + [64, 128, 256]
    assert pauses(*[settling(0)] * 3000)[-1] == HOUR


@pytest.mark.parametrize("done", [{"published": ("a@1",)}, {"deleted": ("a",)}])
def test_a_pass_that_got_something_done_begins_anew(done):
    reports = [settling(0)] * 5 + [settling(0, **done)] + [settling(0)]
    assert pauses(*reports)[-3:] == [16, 1, 2]


def test_a_pass_that_was_asked_for_begins_anew():
    assert pauses(*[settling(60)] * 12, asked_for={10})[-3:] == [512, 60, 60]


def test_a_pass_that_had_nothing_to_wait_for_begins_anew():
    assert pauses(*[settling(0)] * 5, QUIET, settling(0))[-3:] == [16, HOUR, 1]


def test_a_pass_that_was_asked_for_and_failed_is_tried_again_until_one_succeeds():
    assert pauses(FAILED, FAILED) == [HOUR, HOUR]
    assert pauses(*[FAILED] * 4, QUIET, FAILED, asked_for={0}) == [1, 2, 4, 8, HOUR, HOUR]
    assert pauses(*[FAILED] * 9, interval=30, asked_for={0})[-1] == 30


@pytest.mark.parametrize(
    ("kind", "again"), [(FailureKind.FETCH, True), (FailureKind.CHANGED, True), (FailureKind.INVALID, False)]
)
def test_an_adapter_that_failed_for_now_counts_and_one_that_is_refused_does_not(kind, again):
    report = PassReport(ok=True, finished_at=0.0, failures={kind: 1})
    assert pauses(report, asked_for={0}) == [1 if again else HOUR]
