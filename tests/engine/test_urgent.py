"""Interactive rows go before those of the queue, and those do not wait for ever."""

import pytest

from tests.engine.scheduling import KEYS, sequence
from tests.engine.test_scheduler import compute, names, scheduler_of, starts
from worker.engine.sequence import Status


def call(name="call", tokens=2, adapter=None, max_new_tokens=2, **params):
    return sequence(name, tokens, adapter, max_new_tokens, interactive=True, **params)


def busy(*rows, **limits):
    """A scheduler in which these rows of the queue run."""
    scheduler = scheduler_of(rows=rows, **limits)
    compute(scheduler, scheduler.schedule())
    return scheduler


def test_a_full_batch_makes_a_place():
    rows = [sequence(str(number), 3, max_new_tokens=50) for number in range(4)]
    scheduler = busy(*rows, max_num_seqs=4)
    scheduler.add(call())
    assert "call" in names(scheduler.schedule())
    (gone,) = scheduler.waiting
    assert gone is rows[-1], "of equal losses the latest"
    scheduler.check_integrity()


def test_the_row_that_has_computed_least_goes():
    rows = [sequence("long", 40, max_new_tokens=9), sequence("short", 2, max_new_tokens=9)]
    scheduler = busy(*rows, sequence("longer", 44, max_new_tokens=9), max_num_seqs=3, tokens=100)
    scheduler.add(call())
    scheduler.schedule()
    assert [row.request.id for row in scheduler.waiting] == ["short"]


def test_all_slots_taken_by_other_adapters_make_one():
    rows = [sequence(f"{key.name}{n}", 3, key, 50) for key in KEYS[:2] for n in range(2)]
    rows.append(sequence("lonely", 3, KEYS[2], 50))
    scheduler = busy(*rows, max_loras=3)
    scheduler.add(call(adapter=KEYS[3]))
    batch = scheduler.schedule()
    assert "call" in names(batch)
    assert [key for _, key in batch.loads] == [KEYS[3]]
    assert [row.request.id for row in scheduler.waiting] == ["lonely"]
    scheduler.check_integrity()


def test_a_call_uses_the_slot_that_its_adapter_has():
    rows = [sequence(str(n), 3, KEYS[n], 50) for n in range(2)]
    scheduler = busy(*rows, max_loras=2)
    scheduler.add(call(adapter=KEYS[1]))
    assert len(scheduler.schedule().rows) == 3
    assert not scheduler.num_preempted


@pytest.mark.parametrize("own", [False, True])
def test_a_full_cache_makes_room(own):
    rows = [sequence(str(number), 17, max_new_tokens=3) for number in range(3)]
    limits = {"own": True, "max_num_seqs": 3} if own else {"blocks": 18, "max_num_seqs": 8}
    scheduler = busy(*rows, **limits)
    assert len(scheduler.running) == 3
    scheduler.add(call(tokens=9))
    assert "call" in names(scheduler.schedule())
    scheduler.check_integrity()


def test_rows_are_not_preempted_in_vain():
    """Where calls alone fill the cache, another one waits, and the queue's rows keep what they have."""
    scheduler = scheduler_of(blocks=12)
    for number in range(2):
        scheduler.add(call(str(number), 16, max_new_tokens=4))
    compute(scheduler, scheduler.schedule())
    scheduler.add(sequence("queue", 3, max_new_tokens=4))
    compute(scheduler, scheduler.schedule())
    scheduler.add(call("late", 16, max_new_tokens=4))
    assert names(scheduler.schedule()) == ["0", "1", "queue"]
    assert not scheduler.num_preempted


def test_a_long_prompt_of_the_queue_leaves_the_step_to_calls():
    scheduler = busy(sequence("long", 300, max_new_tokens=1), tokens=64)
    scheduler.max_tokens_beside = 8
    scheduler.add(call(tokens=40, max_new_tokens=2))
    seen = []
    for _ in range(3):
        batch = scheduler.schedule()
        seen.append({row.sequence.request.id: row.num_tokens for row in batch.rows})
        compute(scheduler, batch)
    assert seen == [{"call": 40, "long": 8}, {"call": 1, "long": 8}, {"long": 64}]


def test_a_call_starts_at_once_and_takes_a_step_for_each_token():
    """Everything is full at once: places, slots, blocks, and the step's tokens."""
    rows = [sequence(str(n), 30, KEYS[n % 2], 40) for n in range(12)]
    scheduler = scheduler_of(blocks=40, max_num_seqs=4, max_loras=2, tokens=16, rows=rows)
    for _ in range(10):
        compute(scheduler, scheduler.schedule())
    one = call(adapter=KEYS[4], tokens=12, max_new_tokens=5)
    scheduler.add(one)
    for steps in range(1, 6):
        compute(scheduler, scheduler.schedule())
        scheduler.check_integrity()
        assert one.num_generated == steps
    assert one.status is Status.FINISHED
    assert set(starts(scheduler)) <= {str(n) for n in range(12)}


def test_endless_calls_let_a_row_of_the_queue_through_and_keep_it():
    scheduler = scheduler_of(max_num_seqs=2, max_loras=2, max_passed_over=5)
    rows = [sequence(f"queue{n}", 3, KEYS[0], 7) for n in range(3)]
    for row in rows:
        scheduler.add(row)
    calls = started = 0
    most_between = between = 0
    while any(row.status is not Status.FINISHED for row in rows):
        while len(scheduler.urgent) < 3:  # there is always another one
            scheduler.add(call(f"call{calls}", 2, KEYS[1 + calls % 3], 1))
            calls += 1
        sheltered = scheduler.sheltered
        before = {*scheduler.urgent}
        batch = scheduler.schedule()
        begun = sum(row.sequence in before for row in batch.rows)
        assert sheltered in {None, scheduler.sheltered}, "it is kept until it ends"
        between = 0 if scheduler.sheltered else between + begun
        most_between = max(most_between, between)
        started += begun
        compute(scheduler, batch)
        scheduler.check_integrity()
    assert most_between == 4, "with the fifth a row of the queue begins"
    assert started > 15, "calls went on beside"


def test_a_call_whose_adapter_finds_no_slot_is_passed_a_bounded_number_of_times():
    scheduler = scheduler_of(max_num_seqs=2, max_loras=1, max_passed_over=4)
    scheduler.add(call("first", adapter=KEYS[0], max_new_tokens=3))
    compute(scheduler, scheduler.schedule())
    scheduler.add(call("other", adapter=KEYS[1]))
    for number in range(12):
        scheduler.add(call(str(number), adapter=KEYS[0], max_new_tokens=3))
    assert starts(scheduler).index("other") == 5, "first, which runs, and four"
    scheduler.check_integrity()


def test_calls_that_share_a_prompt_run_side_by_side_in_a_cache_that_has_it_once():
    shared = [("shared", n) for n in range(24)]
    scheduler = scheduler_of(blocks=14)
    scheduler.add(call("first", [*shared, "a"], max_new_tokens=4))
    compute(scheduler, scheduler.schedule())
    for number in range(4):
        scheduler.add(call(str(number), [*shared, f"b{number}"], max_new_tokens=4))
    assert names(scheduler.schedule()) == ["first", "0", "1", "2", "3"]
    scheduler.check_integrity()


def test_a_call_without_a_slot_does_not_keep_those_of_other_adapters_from_starting():
    scheduler = scheduler_of(max_num_seqs=8, max_loras=2)
    for name, key in (("a", 0), ("b", 1)):
        scheduler.add(call(name, adapter=KEYS[key], max_new_tokens=9))
    compute(scheduler, scheduler.schedule())
    for number in range(6):
        scheduler.add(call(f"lacks{number}", adapter=KEYS[2 + number % 2]))
    for name, key in (("more a", KEYS[0]), ("base", None)):
        scheduler.add(call(name, adapter=key))
    assert names(scheduler.schedule()) == ["a", "b", "more a", "base"]
    scheduler.check_integrity()


def test_calls_that_end_or_are_dropped_leave_the_books_clean():
    scheduler = busy(sequence("queue", 3, max_new_tokens=9), max_num_seqs=1)
    waits, runs = call("waits"), call("runs")
    scheduler.add(runs)
    scheduler.add(waits)
    compute(scheduler, scheduler.schedule())
    assert (runs.status, waits.status) == (Status.RUNNING, Status.WAITING)
    assert scheduler.num_waiting == 2
    for row in (waits, runs):
        scheduler.finish(row, "error")
    scheduler.check_integrity()
    assert starts(scheduler) == ["queue"]


def test_nothing_is_looked_ahead_while_a_call_would_displace():
    scheduler = busy(sequence("queue", 3, max_new_tokens=9), max_num_seqs=1)
    assert scheduler.can_look_ahead
    scheduler.add(call())
    assert not scheduler.can_look_ahead
    compute(scheduler, scheduler.schedule())
    assert scheduler.can_look_ahead, "what waits now is of the queue"
